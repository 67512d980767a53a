"""Programs judged a second: `python benchmarks/code_rate.py`, from the repository's root. HumanEval's 164 references in the sandbox."""

import gzip
import json
import time

from rl_reasoning.verify.code import Job, run, slots


def main() -> None:
  with gzip.open('tests/fixtures/humaneval/HumanEval.jsonl.gz') as file:
    rows = [json.loads(line) for line in file]
  jobs = [Job(r['prompt'] + r['canonical_solution'], r['test'], r['entry_point'], stub=r['prompt']) for r in rows]
  start = time.perf_counter()
  verdicts = run(jobs)
  seconds = time.perf_counter() - start
  passed = sum(v is not None and v.passed == v.total for v in verdicts)
  print(f'{passed} of {len(jobs)} references pass; {seconds / len(jobs) * 1e3:.0f} ms each on {slots()} slots')


if __name__ == '__main__':
  main()
