"""Published demonstrations as data: the rows that data.task (or data.mixture) gives, each with its own chain of thought.

The tasks are those whose rows have chain_of_thought and completion: reasoning_sets, gsm8k, math, dataset, ...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from rl_reasoning.config import check
from rl_reasoning.data_kept import kept_and_counted, verdicts
from rl_reasoning.data_settings import Generate, Job
from rl_reasoning.tokenizer import render_completion


class Published:
  """Rows are grouped by what they ask, so that limits a prompt and equal completions are seen wherever they stand."""

  def __init__(self, job: Job):
    self.generate: Generate = job.generate
    data = job.config.data
    parts = {name: dict(part) for name, part in data.mixture.items()} or {'': {'task': data.task, 'path': data.path}}
    self.told = {'data': ', '.join(f'{part["task"]} {part.get("path", "")}'.strip() for part in parts.values())}
    self.about: dict[str, Any] = {}

  def check(self, rows: Sequence[dict]) -> None:
    for row in rows:
      check('completion' in row, f"config key 'data.task': a row shows no completion; columns: {', '.join(row)}")

  def make(self, rows: Sequence[dict], folder: epath.Path) -> tuple[list[dict], dict[str, Any]]:
    places: dict[str, int] = {}
    asked: list[dict] = []
    samples: list[dict] = []
    for row, verdict in zip(rows, verdicts(rows, [row['completion'] for row in rows]), strict=True):
      key = json.dumps(row['prompt'])
      if key not in places:
        places[key] = len(asked)
        asked.append(row)
      samples.append({
        'problem': places[key], 'prompt': '', 'completion': render_completion(row), 'truncated': False, 'reward': None,
        'accuracy': verdict,
      })  # fmt: skip
    return kept_and_counted(asked, samples, self.generate)
