"""Host memory while published weights are read into device shards, as a multiple of the largest weight.

  python -m benchmarks.load_memory [--hidden=1024] [--layers=8] [--dtype=bfloat16]

Writes a folder of safetensors with random weights and reads it onto eight virtual CPU devices (so that the shards are host memory, too, and
are taken off). Memory is the process's own (RssAnon, every millisecond): pages of the files, which the system may drop, are not counted.
"""

import argparse
import json
import os
import pathlib
import tempfile
import threading
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUM_CPU_DEVICES'] = '8'

import jax

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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--hidden', type=int, default=1024)
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--dtype', default='bfloat16', choices=weights.DTYPES)
  flags = parser.parse_args()
  D = flags.hidden
  arch = model.Arch(32_000, D, 4 * D, flags.layers, D // 64, max(1, D // 256), 64, tie_word_embeddings=False)
  with tempfile.TemporaryDirectory() as folder:
    path = f'{folder}/weights'
    weights.save(jax.jit(model.init, static_argnums=1)(jax.random.key(0), arch), arch, path, dtype=flags.dtype)
    jax.clear_caches()
    results = {}
    for name, sizes in {'fsdp 8': (1, 8, 1), 'tensor 4': (1, 2, 4), 'data 8 (every device has all)': (8, 1, 1)}.items():
      mesh = sharding.make_mesh(*sizes)
      before = resident()
      with Peak() as peak:
        params = jax.block_until_ready(weights.load(path, arch, stored.param_shardings(mesh, arch)))
      shards = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
      largest = max(x.nbytes for x in jax.tree.leaves(params))
      above = peak.bytes - before - shards
      results[name] = {
        'shards_MiB': shards >> 20, 'largest_weight_MiB': largest >> 20, 'peak_above_shards_MiB': above >> 20,
        'ratio': round(above / largest, 2),
      }  # fmt: skip
      del params
  print(json.dumps({'parameters': model.count(model.weight_table(arch)), 'stored': flags.dtype, **results}, indent=1))


if __name__ == '__main__':
  main()
