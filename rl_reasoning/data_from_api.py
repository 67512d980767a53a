"""Completions of a teacher behind an OpenAI-compatible endpoint: thinking from `reasoning_content` (DeepSeek) or from think tags.

Before anything is bought an estimate is printed; then api.py asks, within the limits of generate.api. Every answer is in answers.jsonl of
the folder, under a hash of what was asked: after an interruption, a failure or the end of the budget the same command (with a higher limit)
buys only what is missing, and neither --overwrite nor another config throws away what was bought. Rows are in the order of the problems.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from rl_reasoning import api
from rl_reasoning.config import check
from rl_reasoning.data_kept import kept_and_counted, verdicts
from rl_reasoning.data_settings import Api, Job, price_of
from rl_reasoning.tokenizer import split_thinking
from rl_reasoning.verify.math import answer_elements

ANSWERS = 'answers.jsonl'
CUT = ('length', 'content_filter')  # finish_reason of half an answer
BYTES_PER_TOKEN = 4  # of English and mathematics, roughly: for the estimate alone


def request_of(a: Api, row: Mapping[str, Any], sample: int) -> api.Request:
  prompt = row['prompt']
  if isinstance(prompt, str):
    turns = [{'role': 'user', 'content': a.template.replace('{prompt}', prompt)}]
  else:
    check(
      a.template == Api.template, f"config key 'generate.api.template': {a.template!r} cannot act on a prompt of chat messages"
    )
    turns = list(prompt)
  system = [{'role': 'system', 'content': a.system}] if a.system else []
  return api.Request([*system, *turns], a.options, sample)


def thought_and_answer(answer: api.Answer) -> tuple[str, str] | None:
  """(thinking, what was said then); None where there is no thinking, or the text does not tell where it ends."""
  thought, text = answer.reasonings[0].strip(), answer.texts[0].strip()
  found = (thought, text) if thought else split_thinking(text)
  if found is None:
    return None
  inside = answer_elements(found[1])
  return found[0], inside[0].strip() if len(inside) == 1 else found[1]


def estimate(client: api.Client, asked: Iterator[api.Request]) -> str:
  """What the requests that have no answer yet will cost: prompts by their length, completions between nothing and max_tokens."""
  budget, missing, known, prompts, most = client.budget, 0, 0, 0, 0
  for request in asked:
    if isinstance(client.known(request), api.Answer):
      known += 1
      continue
    missing += 1
    prompts += sum(len(message['content'].encode()) for message in request.messages) // BYTES_PER_TOKEN + 1
    most += budget.bound(request).completion_tokens
  upto = f'at most {most:,} tokens of completions' if most or not missing else 'completions of any length (no max_tokens)'
  text = f'{missing:,} requests ({known:,} are answered): about {prompts:,} tokens of prompts and {upto}, retries apart'
  if budget.price_in or budget.price_out:
    least, highest = (budget.cost_of(api.Usage(0, prompts, completions)) for completions in (0, most))
    text += f'; at the prices of {client.endpoint.model} {least:.2f}' + (f' to {highest:.2f}' if most else ' and more')
  limits = {'requests': budget.requests, 'tokens': budget.tokens, 'cost': budget.cost}
  told = ', '.join(f'{value:,} {name}' if name != 'cost' else f'a cost of {value:g}' for name, value in limits.items() if value)
  spent = budget.cost_of(client.cache.used)
  return text + f'; limit: {told or "none"}' + (f', {spent:.2f} spent before' if spent else '')


class Teacher:
  def __init__(self, job: Job):
    self.generate, a = job.generate, job.generate.api
    self.endpoint = api.Endpoint(
      a.url, a.model, a.key_env, a.concurrency, a.timeout, a.attempts, a.backoff, a.answers_as
    )  # fmt: skip
    price = price_of(a)
    self.budget = api.Budget(a.max_requests, a.max_tokens, a.max_cost, price.input, price.output)
    # What is wrong with these is told before the first request, and before the folder is there.
    api.checked_url(a.url)
    api.read_key(a.key_env)
    self.told = {'model': a.model, 'url': a.url}
    self.about: dict[str, Any] = {}

  def requests(self, rows: Sequence[dict]) -> Iterator[api.Request]:
    for row in rows:
      for sample in range(self.generate.num_samples):
        yield request_of(self.generate.api, row, sample)

  def check(self, rows: Sequence[dict]) -> None:
    for request in self.requests(rows):
      self.budget.bound(request)

  def make(self, rows: Sequence[dict], folder: epath.Path) -> tuple[list[dict], dict[str, Any]]:
    g, n = self.generate, self.generate.num_samples
    check('://' not in str(folder), f'--workdir={folder}: answers are appended to a file: name a local folder')
    with api.Client(self.endpoint, folder / ANSWERS, self.budget) as client:
      print(estimate(client, self.requests(rows)), flush=True)
      api.ask_all(client, self.requests(rows), len(rows) * n)
      outcomes = [client.known(request) for request in self.requests(rows)]
      used, ended_by = client.cache.used, client.stopped
    samples: list[dict] = []
    failures: collections.Counter[str] = collections.Counter()
    said: list[str] = []  # of each sample, without its thinking
    for index, outcome in enumerate(outcomes):
      if isinstance(outcome, api.Failure):
        failures[re.split('[;:(]', outcome.reason)[0].strip()] += 1
      if not isinstance(outcome, api.Answer):
        continue
      found = thought_and_answer(outcome)
      text = outcome.texts[0] if found is None else f'<think>{found[0]}</think><answer>{found[1]}</answer>'
      said.append(text if found is None else found[1])
      samples.append({
        'problem': index // n, 'prompt': '', 'completion': text, 'truncated': outcome.finished[0] in CUT, 'reward': None,
      })  # fmt: skip
    for sample, verdict in zip(samples, verdicts([rows[s['problem']] for s in samples], said), strict=True):
      sample['accuracy'] = verdict
    made, counts = kept_and_counted(rows, samples, g)
    return made, {
      **counts,
      'not_asked': outcomes.count(None), 'failed': failures.total(), 'failures': dict(failures), 'budget_ended_by': ended_by,
      **used._asdict(), 'cost': self.budget.cost_of(used),
    }  # fmt: skip
