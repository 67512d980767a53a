"""What a folder of made data holds beside its settings: data.jsonl, the same rows as ArrayRecord, README.md (a dataset card as the Hugging Face
hub reads it) and summary.json, which is written last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rl_reasoning import data, dedup, train
from rl_reasoning.config import Data
from rl_reasoning.data_settings import Generate, evaluation_sets

RECORDS = 'array_record'
FILES = ('config.json', 'data.jsonl', 'README.md', 'summary.json')
SOURCES = {
  'checkpoint': 'sampled from a checkpoint',
  'api': 'answers of a model behind an API',
  'published': 'a published set, converted',
}
READ_BACK = """\
```python
import json
import tensorflow_datasets as tfds

rows = tfds.builder_from_directory('{folder}').as_data_source('rows')  # ArrayRecord; TensorFlow is not needed
print(json.loads(rows[0]['row']))
```"""


def left_out(rows: Sequence[dict], g: Generate, given: Data, seed: int) -> tuple[list[dict], dict[str, int]]:
  """(rows that remain, counts): without those that evaluations ask, and without near duplicates."""
  kept, dropped = list(rows), {}
  evaluation: list[dict] = []
  for name, component in evaluation_sets(g).items():
    key = f'generate.decontaminate.{name}'
    source = data.load_component(given, key, component, 'test', seed, component.train_size or None)
    evaluation += [source[index] for index in range(len(source))]
  if evaluation:
    kept, found = dedup.decontaminate(kept, evaluation, g.ngram)
    dropped |= found
  if g.near_duplicates:
    kept, found = dedup.near_duplicates(kept, g.near_duplicates)
    dropped |= found
  return kept, dropped


def filters(g: Generate) -> list[str]:
  """What rows have passed, for the card."""
  told = {
    'possible': 'the final answer is the gold answer, where there is one that can be checked (accuracy reward)',
    'always': 'the final answer is the gold answer (accuracy reward)',
    'never': 'answers are not verified',
  }
  found = [told[g.verify]] if g.keep == 'reasoning' else []
  sets = ', '.join(f'{name} ({c.task} {c.path})'.replace(' )', ')') for name, c in evaluation_sets(g).items())
  if sets:
    found.append(f'no {g.ngram} successive words of a prompt of these evaluation sets: {sets}')
  if g.near_duplicates:
    found.append(f'near duplicates (MinHash, Jaccard similarity of {g.near_duplicates:g} or more): the first one stays')
  return found


def listed(lines: Sequence[str]) -> str:
  return '\n'.join(f'- {line}' for line in lines)


def card(rows: Sequence[Mapping[str, Any]], g: Generate, told: Mapping[str, str], about: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
  """README.md of the folder. Nothing in it depends on when or where the data were made."""
  columns = sorted(set().union(*rows))
  numbers = {key: value for key, value in summary.items() if isinstance(value, int) and key not in ('fingerprint', *told)}
  dropped = {f'left out, {reason}': count for reason, count in summary['dropped'].items()}
  front = {'license': g.licence.lower()} if g.licence else {}
  front = '\n'.join([*(f'{key}: {value}' for key, value in front.items()), 'configs:', '- config_name: default', '  data_files: data.jsonl'])
  return f"""---
{front}
---
# {len(rows):,} rows ({g.keep})

Source: {SOURCES[g.source]}.
{listed([f'{key}: {value}' for key, value in told.items()])}
- licence: {g.licence or 'not stated (generate.licence)'}

Columns: {', '.join(columns)}.

## Counts

| | |
|---|---|
{chr(10).join(f'| {key} | {value:,} |' for key, value in {**numbers, **dropped}.items())}

## Filters

{listed(filters(g)) or 'None beside the kind of data above.'}

## Settings

```json
{json.dumps(about, indent=1, sort_keys=True)}
```

## Reading

`data.jsonl` has a row a line. The same rows:

{READ_BACK.format(folder=f'{RECORDS}/rows/{data.Rows.VERSION}')}
"""


def write(folder: epath.Path, rows: Sequence[dict], text: str, summary: Mapping[str, Any]) -> None:
  train.write_atomically(folder / 'data.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))
  records = folder / RECORDS
  if records.exists():  # of rows that are no longer these, or half written
    records.rmtree()
  data.prepare(rows, records)
  train.write_atomically(folder / 'README.md', text)
  train.write_atomically(folder / 'summary.json', json.dumps(summary, indent=1))
