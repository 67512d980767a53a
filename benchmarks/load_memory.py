"""Host memory while published weights are read into device shards, as a multiple of the largest tensor in the files.

  python -m benchmarks.load_memory [--hidden=2048] [--layers=12] [--dtype=bfloat16]

Writes a folder of safetensors with random weights and reads it onto eight virtual CPU devices (so that the shards are host memory, too, and
are taken off). Memory is the process's own (RssAnon, every millisecond): pages of the files, which the system may drop, are not counted.
Tensors count in float32, as they are read.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import pathlib
import tempfile
import threading
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUM_CPU_DEVICES'] = '8'

import jax
import jax.numpy as jnp

from rl_reasoning import model, sharding, stored, weights


def resident() -> int:
  """Bytes."""
  text = pathlib.Path('/proc/self/status').read_text()
  return int(text.partition('RssAnon:')[2].split()[0]) * 1024


class Peak:
  """with Peak() as peak: ...; peak.bytes is the most that was resident."""

  def __enter__(self):
    self.bytes, self.over = resident(), threading.Event()
    self.thread = threading.Thread(target=self.watch)
    self.thread.start()
    return self

  def watch(self):
    while not self.over.is_set():
      self.bytes = max(self.bytes, resident())
      time.sleep(0.001)

  def __exit__(self, *_):
    self.over.set()
    self.thread.join()


MESHES = {'fsdp 8': (1, 8, 1), 'tensor 4, fsdp 2': (1, 2, 4), 'data 2, fsdp 4': (2, 4, 1)}


def measure(path: str, mesh: str) -> dict:
  """One load, in a process that has held nothing before: what is freed may stay with the process."""
  arch, sizes = weights.read_arch(path), MESHES[mesh]
  shardings = stored.param_shardings(sharding.make_mesh(*sizes), arch)
  table = jax.tree.leaves(model.weight_table(arch), is_leaf=model.is_weight)
  largest = max(4 * math.prod(weights.hf_shape(w)) for w in table)
  jax.block_until_ready(jnp.zeros(8))
  before = resident()
  with Peak() as peak:
    params = jax.block_until_ready(weights.load(path, arch, shardings))
  shards = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
  above = peak.bytes - before - shards
  return {
    'parameters': model.count(model.weight_table(arch)), 'largest_tensor_MiB': largest >> 20, 'shards_MiB': shards >> 20,
    'peak_above_shards_MiB': above >> 20, 'ratio': round(above / largest, 2),
  }  # fmt: skip


def write(path: str, hidden: int, layers: int, dtype: str) -> None:
  arch = model.Arch(32_000, hidden, 4 * hidden, layers, hidden // 64, max(1, hidden // 256), 64, tie_word_embeddings=False)
  weights.save(jax.jit(model.init, static_argnums=1)(jax.random.key(0), arch), arch, path, dtype=dtype)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--hidden', type=int, default=2048)
  parser.add_argument('--layers', type=int, default=12)
  parser.add_argument('--dtype', default='bfloat16', choices=weights.DTYPES)
  flags = parser.parse_args()
  apart = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), max_tasks_per_child=1)
  with tempfile.TemporaryDirectory() as folder, apart:
    path = f'{folder}/weights'
    apart.submit(write, path, flags.hidden, flags.layers, flags.dtype).result()
    print(json.dumps({'stored': flags.dtype, **{mesh: apart.submit(measure, path, mesh).result() for mesh in MESHES}}, indent=1))


if __name__ == '__main__':
  main()
