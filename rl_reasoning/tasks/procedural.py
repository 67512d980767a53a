"""What tasks without files share: problems that are a function of (seed, split, index), and a test split by a hash of the problem."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator

from rl_reasoning.config import ConfigError


def is_test(prompt: str, share: float = 0.1) -> bool:
  """Whether a problem is of the test split, `share` of all, by a hash of its text: none is in both, whatever seed and size."""
  return hashlib.sha256(prompt.encode()).digest()[0] < math.ceil(256 * share)


def problems(
  task: str, split: str, seed: int, size: int | None, options: str, propose: Callable[[random.Random], dict | None]
) -> Iterator[tuple[dict, random.Random]]:
  """`size` times (a row of `propose` that belongs to the split, its generator for what is drawn further).

  `propose` gives a row with its prompt, or None for a draw that is no problem. Test problems are distinct, training problems may repeat.
  Raises ConfigError, telling to widen `options`, where a thousand draws find no (new) problem.
  """
  seen: set[str] = set()
  for index in range(size or 0):
    rng = random.Random(f'{task}/{split}/{seed}/{index}')
    for _ in range(1000):
      row = propose(rng)
      if row is not None and is_test(row['prompt']) == (split == 'test') and row['prompt'] not in seen:
        break
    else:
      raise ConfigError(f'data.options: the {split} split has fewer than {size} problems: {index} found; widen {options}')
    if split == 'test':
      seen.add(row['prompt'])
    yield row, rng
