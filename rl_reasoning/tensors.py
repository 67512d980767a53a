"""The tensors of safetensors files, read part by part. 8-bit weights in blocks, as DeepSeek publishes them, come out as float32."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rl_reasoning.config import ConfigError, check
from rl_reasoning.families import read_json

Slices = tuple[slice, ...]


class Tensor(NamedTuple):
  """A tensor of a file; `read(slices)` gives that part of it as numpy."""

  file: str
  shape: tuple[int, ...]
  read: Callable[[Slices], np.ndarray]


def whole(tensor: Tensor) -> np.ndarray:
  return tensor.read(tuple(slice(0, size) for size in tensor.shape))


def safetensors_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], str]:
  """(the files of weights, the file that names them)."""
  index = folder / 'model.safetensors.index.json'
  if index.is_file():
    names: Any = read_json(index).get('weight_map')
    good = isinstance(names, dict) and bool(names) and all(isinstance(name, str) for name in names.values())
    check(good, f"{index}: no key 'weight_map' of tensor names to file names")
    return [folder / name for name in sorted(set(names.values()))], index.name
  file = folder / 'model.safetensors'
  if not file.is_file():
    pickles = sorted(p.name for pattern in ('*.bin', '*.pt', '*.pth') for p in folder.glob(pattern))
    check(not pickles, f'{folder}: only {", ".join(pickles)}: pickle is not read; convert the weights to safetensors')
    raise ConfigError(f'{folder}: no weights (model.safetensors or model.safetensors.index.json)')
  return [file], file.name


def safetensors_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  import safetensors

  files, named_by = safetensors_files(folder)
  result: dict[str, Tensor] = {}
  eighths: set[str] = set()
  for file in files:
    check(file.is_file(), f'{file}: no such file, but {named_by} names it')
    try:
      opened = safetensors.safe_open(file, framework='np')
      for name in opened.keys():  # noqa: SIM118
        part = opened.get_slice(name)
        kind = part.get_dtype()
        check(kind in ('F32', 'F16', 'BF16', 'F64', 'F8_E4M3'), f'{file}: tensor {name}: dtype {kind} is not read')
        eighths |= {name} if kind == 'F8_E4M3' else set()
        shape = tuple(part.get_shape())
        read = (
          (lambda at, opened=opened, name=name: opened.get_slice(name)[at])
          if name not in eighths
          else functools.partial(eighth, file, name)
        )
        if name in result:
          raise ConfigError(f'{file}: tensor {name} is in {result[name].file}, too')
        result[name] = Tensor(str(file), shape, read)
    except (safetensors.SafetensorError, OSError) as error:
      raise ConfigError(f'{file}: truncated or no safetensors file: {error}') from None
  return dequantised(result, eighths, folder)


def stored_kinds(folder: pathlib.Path) -> Iterator[tuple[str, tuple[int, ...]]]:
  """(dtype, shape) of every tensor of a folder, as safetensors calls it."""
  import safetensors

  for file in safetensors_files(folder)[0]:
    with safetensors.safe_open(file, framework='np') as opened:
      for part in map(opened.get_slice, opened.keys()):
        yield part.get_dtype(), tuple(part.get_shape())


def eighth(file: pathlib.Path, name: str, at: Slices) -> np.ndarray:
  """A part of a tensor of 8-bit numbers, for which the library's numpy has no type. The file has been checked by then."""
  with file.open('rb') as opened:
    size = int.from_bytes(opened.read(8), 'little')
    about = json.loads(opened.read(size))[name]
  stored = np.memmap(file, np.uint8, 'r', 8 + size + about['data_offsets'][0], tuple(about['shape']))
  return np.array(stored[at]).view(ml_dtypes.float8_e4m3fn)


BLOCK = 128  # rows and columns that share a scale in DeepSeek's fp8 checkpoints


def dequantised(tensors: dict[str, Tensor], eighths: set[str], folder: pathlib.Path) -> dict[str, Tensor]:
  """fp8 weights times the scales of their blocks, 'NAME_scale_inv'."""
  file = folder / 'config.json'
  quantised = read_json(file).get('quantization_config') or {} if file.is_file() else {}
  if quantised:
    check(isinstance(quantised, dict), f'{file}: quantization_config {quantised!r} is no JSON object')
    method, block = quantised.get('quant_method'), quantised.get('weight_block_size')
    check(method == 'fp8' and block == [BLOCK, BLOCK],
          f'{file}: quantization {method!r} with blocks of {block} is not read, only fp8 in blocks of [{BLOCK}, {BLOCK}]')  # fmt: skip
  # A scale of no 8-bit numbers belongs to some that were cast without it: it stays, and is refused as a tensor that nothing reads.
  scales_of = {f'{name}_scale_inv' for name in eighths}
  result = {name: tensor for name, tensor in tensors.items() if name not in scales_of}
  for name in sorted(eighths):
    check(f'{name}_scale_inv' in tensors, f'{tensors[name].file}: tensor {name} is of 8 bits, and {name}_scale_inv is missing')
    scales = tensors[f'{name}_scale_inv']
    wanted = tuple(-(-size // BLOCK) for size in tensors[name].shape)
    check(scales.shape == wanted, f'{scales.file}: tensor {name}_scale_inv has shape {scales.shape}, {wanted} belong to it')
    result[name] = Tensor(tensors[name].file, tensors[name].shape, functools.partial(scaled, tensors[name], scales))
  return result


def scaled(tensor: Tensor, scales: Tensor, at: Slices) -> np.ndarray:
  """A part of an fp8 matrix, float32."""
  indices = [np.arange(*part.indices(size)) // BLOCK for part, size in zip(at, tensor.shape, strict=True)]
  return tensor.read(at).astype(np.float32) * whole(scales).astype(np.float32)[np.ix_(*indices)]
