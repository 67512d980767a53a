"""Verifications a second: `python benchmarks/verify_rate.py`. Integers are judged in this process, LaTeX by the worker processes.

Every pair is new, so that the cache of verdicts answers none of them.
"""

import time

from rl_reasoning.verify import pool
from rl_reasoning.verify.answers import verdicts


def rate(name: str, golds: list[str], answers: list[str]) -> None:
  start = time.perf_counter()
  found = verdicts(golds, answers, [None] * len(golds))
  seconds = time.perf_counter() - start
  assert found == [True, False] * (len(golds) // 2)
  print(f'{name}: {len(golds) / seconds:,.0f}/s ({seconds / len(golds) * 1e3:.3f} ms each)')


def main() -> None:
  start = time.perf_counter()
  assert verdicts([r'\sqrt{2}'], [r'\sqrt2'], [None]) == [True]
  print(f'first worker, started and loaded: {time.perf_counter() - start:.2f} s')
  N = 20_000
  rate('integers', [str(i) for i in range(N)], [f'{i + i % 2:,}' for i in range(N)])
  rate('fractions in LaTeX', [f'{i}/7' for i in range(N)], [rf'\frac{{{i + i % 2}}}{{7}}' for i in range(N)])
  N = 1_000
  rate('roots and pi', [rf'\frac{{{i}\pi}}{{7}}' for i in range(N)], [rf'\frac{{{2 * (i + i % 2)}\pi}}{{14}}' for i in range(N)])
  rate('polynomials', [f'x^2+{i + 1}x+1' for i in range(N)], [f'x(x+{i + 1 + i % 2})+1' for i in range(N)])
  workers = pool.shared('math')
  print(f'{workers.size} workers; outcomes {dict(workers.counts)}')


if __name__ == '__main__':
  main()
