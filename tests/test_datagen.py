"""Data made by a checkpoint: every completion is kept or counted, and what is kept is what the policy said."""

import collections
import itertools
import json
import random
import re
import types

import numpy as np
import pytest

from rl_reasoning import (
  config,
  data,
  data_from_checkpoint,
  data_kept,
  data_settings,
  datagen,
  evaluate,
  evaluators,
  pipeline,
  resolution,
  rollout,
  tokenizer,
)
from rl_reasoning.build import Run
from rl_reasoning.config import ConfigError
from rl_reasoning.structs import Rollout
from rl_reasoning.tasks import dataset

TOKENIZER = tokenizer.ByteTokenizer()
PROBLEM = {'prompt': 'q=', 'answer': '7', 'completion': '7', 'chain_of_thought': 'gold', 'difficulty': 3}


def make(**options) -> data_settings.Generate:
  return data_settings.Generate(**options)


def said(
  text: str, reward: float | None = 0.0, accuracy: float | None = 0.0, truncated: bool = False, prompt: str = 'q='
) -> dict:
  ids = [*TOKENIZER.encode(text), *([] if truncated else [TOKENIZER.end_id])]
  return {
    'problem': 0, 'prompt': prompt, 'completion': text, 'completion_ids': ids, 'length': len(ids), 'truncated': truncated,
    'reward': reward, 'accuracy': accuracy,
  }  # fmt: skip


SAMPLES = [
  said('b', 1.0, 1.0), said('a', 1.2, 1.0), said('a', 1.2, 1.0), said('w', 0.2), said('cut', 1.2, 1.0, truncated=True),
  said(' \n', 0.0), said('v', 0.2), said('?', None, 1.0), said('!', 0.2, None),
]  # fmt: skip
KEPT = [  # settings, rows, what is left out beside the one truncated, the one empty and the one repeated
  (
    {'keep': 'best'},
    [{'prompt': 'q=', 'answer': '7', 'difficulty': 3, 'completion': 'a', 'reward': 1.2}],
    {'no reward': 1, 'not the best': 4},
  ),
  ({'keep': 'best', 'min_reward': 1.3}, [], {'no reward': 1, 'not the best': 4, 'below min_reward': 1}),
  (
    {'keep': 'correct'},
    [
      {'prompt': 'q=', 'answer': '7', 'difficulty': 3, 'completion': t, 'reward': r}
      for t, r in (('b', 1.0), ('a', 1.2), ('?', None))
    ],
    {'no accuracy': 1, 'not verified': 2},
  ),
  (
    {'keep': 'correct', 'min_reward': 1.0, 'max_per_prompt': 1},
    [{'prompt': 'q=', 'answer': '7', 'difficulty': 3, 'completion': 'b', 'reward': 1.0}],
    {'no accuracy': 1, 'not verified': 2, 'below min_reward': 1, 'over max_per_prompt': 1},
  ),
  (
    {'keep': 'ranking'},
    [{'prompt': 'q=', 'responses': ['b', 'a', 'w', 'v', '!'], 'ranks': [1, 0, 2, 2, 2]}],
    {'no reward': 1},
  ),
  (
    {'keep': 'pairs'},
    [{'prompt': 'q=', 'responses': pair, 'ranks': [0, 1]} for pair in map(list, ('bw', 'av', '?w', 'bv', 'aw', '?v'))],
    {'no accuracy': 1},
  ),
  (
    {'keep': 'pairs', 'max_per_prompt': 2},
    [{'prompt': 'q=', 'responses': pair, 'ranks': [0, 1]} for pair in (['b', 'w'], ['a', 'v'])],
    {'no accuracy': 1, 'over max_per_prompt': 1},
  ),
  (
    {'keep': 'labels', 'max_per_prompt': 3},
    [{'prompt': 'q=', 'completion': t, 'label': v} for t, v in (('b', 1.0), ('a', 1.0), ('w', 0.0))],
    {'no accuracy': 1, 'over max_per_prompt': 2},
  ),
]


@pytest.mark.parametrize(('options', 'rows', 'left_out'), KEPT)
def test_what_is_kept(options, rows, left_out):
  """Failure: another completion is kept than the setting says, a column is missing or is that of the problem's own demonstration, or a
  completion is left out under another reason."""
  dropped = collections.Counter()
  got, _ = data_kept.KEEP[options['keep']](PROBLEM, SAMPLES, make(**options), dropped)
  assert sorted(map(json.dumps, got)) == sorted(map(json.dumps, rows)) if options['keep'] == 'pairs' else got == rows
  assert {k: v for k, v in dropped.items() if v} == {'truncated': 1, 'empty': 1, 'duplicate': 1, **left_out}
  if options['keep'] == 'pairs':
    assert got[0]['responses'] != got[1]['responses'] and not {*got[0]['responses']} & {*got[1]['responses']}


def test_reasoning():
  """Failure: a row is in another form than thought and answer, a completion out of the format or verified wrong is kept, one whose thinking
  its prompt has opened is not, or a missing verdict counts as one."""
  form = '<think>{}</think> <answer>{}</answer>'
  samples = [
    said(form.format(' a ', '7'), 1.0, 1.0), said('b</think><answer>7</answer>', 1.0, 1.0, prompt='q= <think>'),
    said(form.format('c', '8'), 0.0, 0.0), said(form.format('d', '9'), None, None), said('e <answer>7</answer>', 1.0, 1.0),
    said(form.format('f', ' '), 1.0, 1.0), said(form.format('', '7'), 1.0, 1.0), said(form.format('g', '7'), 1.0, 1.0, truncated=True),
    said(form.format('h', '7') + 'more', 1.0, 1.0), said(form.format(' a ', '7'), 1.0, 1.0),
  ]  # fmt: skip
  always = {'truncated': 1, 'duplicate': 1, 'not in the format': 2, 'empty thought or answer': 2}
  for options, chains, left_out in (
    ({}, 'abd', {'not verified': 1}),
    ({'verify': 'never'}, 'abcd', {}),
    ({'verify': 'always'}, 'ab', {'no accuracy': 1, 'not verified': 1}),
    ({'verify': 'always', 'max_per_prompt': 1}, 'a', {'no accuracy': 1, 'not verified': 1, 'over max_per_prompt': 1}),
  ):  # fmt: skip
    dropped = collections.Counter()
    rows, kept = data_kept.keep_reasoning(PROBLEM, samples, make(keep='reasoning', **options), dropped)
    assert [row['chain_of_thought'] for row in rows] == [*chains] and len(kept) == len(rows)
    assert {k: v for k, v in dropped.items() if v} == {**always, **left_out}
  assert rows == [{'prompt': 'q=', 'answer': '7', 'difficulty': 3, 'chain_of_thought': 'a', 'completion': '7'}]
  dataset.check_row('here', rows[0])


def test_all_are_kept():
  """Failure: those who rank by hand or by a judge do not see everything, get a row with nothing to rank, which they refuse,
  or the judgements of the data on other texts."""
  dropped = collections.Counter()
  (row,), kept = data_kept.keep_all(PROBLEM, SAMPLES, make(), dropped)
  assert row == {
    'prompt': 'q=', 'answer': '7', 'difficulty': 3, 'responses': ['b', 'a', 'w', 'v', '?', '!'], 'counts': [1, 2, 1, 1, 1, 1],
    'rewards': [1.0, 1.2, 0.2, 0.2, None, 0.2], 'correct': [1, 1, 0, 0, 1, None],
  }  # fmt: skip
  assert len(kept) == 6 and dropped == {'truncated': 1, 'empty': 1, 'duplicate': 1, 'nothing to compare with': 0}
  (row,), _ = data_kept.keep_all(PROBLEM, [said('a', 1.0, None), said('b', 1.0, None)], make(), dropped)
  assert 'correct' not in row
  judged = {**PROBLEM, 'responses': ['x', 'y'], 'ranks': [0, 1], 'margin': 1.0, 'label': 1, 'labels': [1]}  # of other texts
  (row,), _ = data_kept.keep_all(judged, [said('a'), said('b')], make(), dropped)
  assert row['responses'] == ['a', 'b'] and not row.keys() & {'ranks', 'margin', 'label', 'labels'}
  assert data_kept.keep_all(PROBLEM, [said('a'), said('a')], make(), dropped)[0] == []


@pytest.mark.parametrize('keep', data_kept.KEEP)
def test_every_completion_is_accounted_for(keep):
  """Failure: a completion is lost without a word or counted twice, a row holds what was not sampled, or its order contradicts rewards."""
  rng = random.Random(keep)
  for _ in range(200):
    samples = [
      said(rng.choice('abcdef '), rng.choice([None, 0.0, 0.2, 1.0, 1.2]), rng.choice([None, 0.0, 0.5, 1.0]), rng.random() < 0.2)
      for _ in range(rng.randint(1, 9))
    ]
    for s in samples:  # a text is judged one way
      s.update({key: next(o[key] for o in samples if o['completion'] == s['completion']) for key in ('reward', 'accuracy')})
    limit = rng.choice([0, 1, 2]) if keep in data_settings.ONLY['max_per_prompt'] else 0
    least = rng.choice([None, 0.2]) if keep in data_settings.ONLY['min_reward'] else None
    dropped = collections.Counter()
    rows, kept = data_kept.KEEP[keep](PROBLEM, samples, make(keep=keep, max_per_prompt=limit, min_reward=least), dropped)
    assert len(kept) + sum(dropped.values()) == len(samples) and min(dropped.values(), default=0) >= 0
    texts = [text for row in rows for text in row.get('responses') or [row['completion']]]
    assert {*texts} == {s['completion'] for s in kept} and len({s['completion'] for s in kept}) == len(kept)
    verdict = {s['completion']: s for s in samples}
    assert len({*map(json.dumps, rows)}) == len(rows)
    if keep == 'best':
      assert len(rows) <= 1 and all(verdict[r['completion']]['reward'] == r['reward'] for r in rows)
    for row in rows:
      if 'ranks' in row:
        assert len({*row['ranks']}) > 1 and min(row['ranks']) == 0
        key = 'reward' if keep == 'ranking' else 'accuracy'
        for (a, i), (b, j) in itertools.combinations(zip(row['responses'], row['ranks']), 2):
          assert np.sign(j - i) == np.sign(verdict[a][key] - verdict[b][key])
      if keep == 'pairs':
        assert verdict[row['responses'][0]]['accuracy'] == 1 > verdict[row['responses'][1]]['accuracy']
    if limit:
      assert max(len(rows), *(len(r.get('responses', ())) for r in rows), 0) <= (limit if keep != 'pairs' else max(limit, 2))


def test_least_reward_in_float32():
  """Failure: 0.7 is asked for and 0.7 is left out, because a float32 sum of rewards is a little below it."""
  sample = said('a', float(np.float32(0.7)))
  assert sample['reward'] < 0.7
  assert data_kept.worth([sample], collections.Counter(), 0.7) == [sample]
  assert data_kept.worth([sample], collections.Counter(), 0.70001) == []


CHAT = [{'role': 'user', 'content': 'hi'}]


@pytest.mark.parametrize(
  ('prompt', 'template'), [('q=', 'plain'), ('q=', 'Q: {prompt} <think>'), ('q=', 'chat'), (CHAT, 'plain')]
)
def test_imitation_repeats_the_tokens(prompt, template):
  """Failure: SFT on a kept completion trains other tokens than the policy sampled: tags are put around it, the problem's own demonstration
  wins, or the prompt is rendered another way."""
  text = 'a b</think><answer>7</answer>'
  row = {**PROBLEM, 'prompt': prompt, 'messages': [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]}
  rendered = tokenizer.render_prompt(prompt, template, TOKENIZER)
  (made,), _ = data_kept.keep_correct(row, [said(text, 1.0, 1.0, prompt=rendered)], make(keep='correct'), collections.Counter())
  dataset.check_row('here', made)
  assert made['completion'].startswith('<think>') == rendered.endswith('<think>')  # a filter of the format finds it whole
  asked = TOKENIZER.encode(rendered)
  tokens, flags = data.encode_row(made, TOKENIZER, template)
  assert tokens == [*asked, *TOKENIZER.encode(text), TOKENIZER.end_id]
  assert flags == [0] * len(asked) + [1] * (len(tokens) - len(asked))
  chain = {'prompt': prompt, 'chain_of_thought': 'a b', 'completion': '7'}  # of another model, in columns
  opened = text if rendered.endswith('<think>') else f'<think>{text}'
  assert data.encode_row(chain, TOKENIZER, template)[0] == [*asked, *TOKENIZER.encode(opened), TOKENIZER.end_id]


@pytest.mark.parametrize(
  ('text', 'separator', 'steps'),
  [
    ('a\nb\nc', '\n', ['a\n', 'b\n', 'c']),
    ('a\n\nb\n', '\n', ['a\n\n', 'b\n']),
    ('\n\na\nb', '\n', ['\n\na\n', 'b']),
    ('1+2=3;3+4=7</think>', ';', ['1+2=3;', '3+4=7</think>']),
    ('a\n\nb\nc', '\n\n', ['a\n\n', 'b\nc']),
    ('a; ;b', ';', ['a; ;', 'b']),
    ('a.*b', '.*', ['a.*', 'b']),
    ('alone', '\n', ['alone']),
  ],
)
def test_steps_join_to_the_text(text, separator, steps):
  """Failure: a step is lost or empty, or a separator is taken for a pattern: the rows would train other text than was sampled."""
  assert data_from_checkpoint.split_steps(text, separator) == steps and ''.join(steps) == text


class Continuations:
  """A sampler of known continuations: beginning -> [(text, ended)]."""

  def __init__(self, settings: data_settings.Generate, known: dict):
    self.generate, self.known, self.asked, self.ready = settings, known, [], False

  def to_continue(self):
    self.ready = True
    return self

  def __call__(self, rows, name, num_samples, seed):
    assert self.ready and seed != self.generate.seed
    self.asked += [row['prompt'] for row in rows]
    assert all(len(self.known[row['prompt']]) == num_samples for row in rows)
    return [said(text, None, None, not ended) for row in rows for text, ended in self.known[row['prompt']]]


def test_labels_of_steps():
  """Failure: a step's label is not the share of its continuations that are right, a continuation is judged without its beginning, one that
  never ends counts as right, or the same beginning is continued twice."""
  settings = make(keep='steps', step_separator=';', rollouts_per_step=4)
  right, wrong = ('</think><answer>7</answer>', True), ('<answer>8</answer>', True)
  known = {
    'Q q= 3+4=7;': [right, wrong, (right[0], False), right],
    'Q q= 3+4=8;': [wrong] * 4,
    'Q q= 3+4=7;The answer is 7;': [('', True), wrong, right, ('', True)],  # an end at once leaves the answer that stands there
  }
  sampler = Continuations(settings, known)
  chains = [('3+4=7;so <answer>7</answer>', 1.0), ('3+4=7;The answer is 7;bye', 1.0), ('3+4=8;no', 0.0), ('7', 1.0)]
  made, continued = data_from_checkpoint.label_steps(sampler, [(PROBLEM, said(t, 1.0, v, prompt='Q q= ')) for t, v in chains])
  assert made == [
    {'prompt': 'q=', 'completions': ['3+4=7;', 'so <answer>7</answer>'], 'labels': [0.5, 1.0]},
    {'prompt': 'q=', 'completions': ['3+4=7;', 'The answer is 7;', 'bye'], 'labels': [0.5, 0.75, 1.0]},
    {'prompt': 'q=', 'completions': ['3+4=8;', 'no'], 'labels': [0.0, 0.0]},
    {'prompt': 'q=', 'completions': ['7'], 'labels': [1.0]},
  ]
  assert sorted(sampler.asked) == sorted(known) and len(continued) == 12


ARITHMETIC = {
  'roles': {'policy': {'init': 'tests/fixtures/llama', 'tokenizer': 'bytes', 'template': 'Q: {prompt}'}},
  'data': {'task': 'arithmetic', 'train_size': 40, 'options': {'operands': 2, 'high': 9}, 'max_prompt_length': 32},
  'rollout': {'max_completion_length': 48},
  'rewards': {'functions': ('accuracy', 'format'), 'weights': (1.0, 0.2)},
  'generate': {'keep': 'correct', 'size': 24, 'num_samples': 3, 'batch_size': 8},
}


def settings_of(cache, **generate) -> dict:
  found = config.override(ARITHMETIC, 'data.cache_dir', str(cache))
  return {**found, 'generate': {k: v for k, v in {**found['generate'], **generate}.items() if v is not None}}


@pytest.fixture
def speaker(monkeypatch):
  """A policy that says what its prompt and its turn decide; what the sampler is asked is collected."""
  asked: list[dict] = []

  def say(prompt: str, member: int) -> tuple[str, bool]:
    value = eval(prompt.removeprefix('Q: ').split('=')[0])
    form = '<think>{};so</think><answer>{}</answer>'
    if '<think>' in prompt:
      return f'so</think><answer>{value + (member == 0)}</answer>', True
    return (form.format('x', value), True) if member == 0 else (form.format('y' * len(prompt), value + 1), member == 1)

  def generate(params, arch, prompts, *, settings, group, prompt_ids, **rest):
    asked.append({'prompts': [TOKENIZER.decode(p) for p in prompts], 'settings': settings, **rest})
    if len(asked) == 2 and getattr(say, 'dies', False):
      raise KeyboardInterrupt
    texts = [say(TOKENIZER.decode(p), member) for p in prompts for member in range(group)]
    ids = [TOKENIZER.encode(text) + [TOKENIZER.end_id] * ended for text, ended in texts]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, line in enumerate(ids):
      tokens[row, : len(line)] = line
    ended = np.array([end for _, end in texts])
    return Rollout(tokens, np.zeros(tokens.shape, np.float32), np.array([len(line) for line in ids], np.int32), ~ended)

  def opened(chosen, source):
    fields = {
      'config': chosen,
      'arch': config.Model(),
      'tokenizer': TOKENIZER,
      'mesh': resolution.make_mesh(chosen),
      'reward_models': {},
      'speaks': True,
    }
    return Run(**{**dict.fromkeys(Run._fields), **fields}), {'w': np.ones(3, np.float32)}, {}

  monkeypatch.setattr(rollout, 'generate', generate)
  monkeypatch.setattr(evaluate, 'open_run', opened)
  return types.SimpleNamespace(asked=asked, say=say)


def contents(folder) -> dict[str, bytes]:
  return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob('*.jsonl'))}


def read(folder) -> list[dict]:
  return [json.loads(line) for line in (folder / 'data.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('keep', ['correct', 'steps'])
def test_interrupted_and_finished(keep, speaker, tmp_path, capsys):
  """Failure: what a kill left is sampled again or changes a row, a half-made data.jsonl is there for a later stage to read, a finished
  folder is sampled again, or data of another config or a training run is overwritten."""
  options = {'keep': 'steps', 'step_separator': ';', 'rollouts_per_step': 2} if keep == 'steps' else {}
  job = datagen.resolve(settings_of(tmp_path / 'cache', **options))
  summary = datagen.generate(job, str(tmp_path / 'whole'))
  calls = len(speaker.asked)
  assert {f.name for f in (tmp_path / 'whole').iterdir()} == {
    'config.json', 'data.jsonl', 'README.md', 'array_record', 'summary.json', 'samples'
  }  # fmt: skip
  assert json.loads((tmp_path / 'whole' / 'summary.json').read_text()) == summary
  speaker.asked.clear()
  speaker.say.dies = True
  with pytest.raises(KeyboardInterrupt):
    datagen.generate(job, str(tmp_path / 'cut'))
  speaker.say.dies = False
  assert {f.name for f in (tmp_path / 'cut').iterdir()} == {'config.json', 'samples'}
  again = datagen.generate(job, str(tmp_path / 'cut'))
  assert {**again, 'seconds': 0} == {**summary, 'seconds': 0} and len(speaker.asked) == calls + 1  # one batch was tried twice
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')
  assert datagen.generate(job, str(tmp_path / 'cut')) == again and len(speaker.asked) == calls + 1

  other = datagen.resolve(settings_of(tmp_path / 'cache', **options, seed=5))
  with pytest.raises(ConfigError, match=r'data of another config .*\n  generate.seed: 0 -> 5'):
    datagen.generate(other, str(tmp_path / 'cut'))
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')
  datagen.generate(other, str(tmp_path / 'cut'), overwrite=True)
  assert json.loads((tmp_path / 'cut' / 'config.json').read_text())['generate']['seed'] == 5
  (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(ConfigError, match='run holds a training run'):
    datagen.generate(job, str(tmp_path / 'run'), overwrite=True)
  (tmp_path / 'stray').mkdir()
  (tmp_path / 'stray' / 'data.jsonl').write_text('mine')
  with pytest.raises(ConfigError, match=r'stray has data.jsonl but no config.json'):
    datagen.generate(job, str(tmp_path / 'stray'))


def test_what_the_sampler_is_told(monkeypatch):
  """Failure: an option of the section does not reach the sampler, reward models get no weights, or roll-outs, which nobody pays for, are
  rendered a second time, refused for their length or scored by them."""
  told = []
  monkeypatch.setattr(evaluators, 'sample_problems', lambda *arguments: told.append(arguments) or [])
  g = make(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, batch_size=24)
  chosen = config.resolve({'roles': {'policy': {'template': 'Q: {prompt}'}}, 'rewards': {'functions': ('length',)}})
  run = Run(**{**dict.fromkeys(Run._fields), 'config': chosen, 'reward_models': {'rm': 1}})
  sampler = data_from_checkpoint.Sampler(run, 'params', {'reward.rm': 'weights'}, g, 'folder')  # type: ignore[arg-type]
  sampler([PROBLEM], 'samples', 3, 11)
  sampler.to_continue()([PROBLEM], 'continuations', 4, 12)
  for (asked, params, rows, name, evaluator, folder, frozen), number, seed in zip(told, (3, 4), (11, 12)):
    assert (params, rows, folder, asked.config.eval.batch_size) == ('params', [PROBLEM], 'folder', 24)
    assert evaluator == evaluators.Evaluator(
      num_samples=number, seed=seed, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1
    ) and name in ('samples', 'continuations')  # fmt: skip
    own = name == 'samples'
    assert frozen == ({'reward.rm': 'weights'} if own else {}) and asked.reward_models == ({'rm': 1} if own else {})
    assert asked.config.roles.policy.template == ('Q: {prompt}' if own else 'plain')
    assert asked.config.rewards.functions == (('length',) if own else ('accuracy_flexible',))
    assert (asked.config.data.max_prompt_length == 128) == own


def test_the_summary_adds_up(speaker, tmp_path):
  """Failure: a number of the summary is not what was sampled or kept."""
  job = datagen.resolve(settings_of(tmp_path / 'cache', temperature=0.7, top_p=0.9, seed=4))
  got, rows = datagen.generate(job, str(tmp_path / 'it')), read(tmp_path / 'it')
  prompts = [row['prompt'] for row in rows]
  assert got['prompts'] == got['rows'] == got['kept'] == len({*prompts}) and got['prompts'] + got['repeated_prompts'] == 24
  assert got['samples'] == 3 * got['prompts'] and got['dropped'] == {'not verified': got['prompts'], 'truncated': got['prompts']}
  assert got['accuracy'] == {'all': pytest.approx(1 / 3), 'kept': 1.0} and got['reward']['kept'] == pytest.approx(1.2)
  samples = [json.loads(line) for line in (tmp_path / 'it' / 'samples' / 'samples.jsonl').read_text().splitlines()]
  assert got['tokens'] == sum(s['length'] for s in samples) and got['other_tokens'] == 0 and got['keep'] == 'correct'
  sampled = speaker.asked[0]['settings']
  assert (sampled.temperature, sampled.top_p, sampled.max_completion_length) == (0.7, 0.9, 48)
  assert all(set(row) == {'prompt', 'completion', 'answer', 'difficulty', 'reward'} for row in rows)
  assert [row['completion'] for row in rows] == [s['completion'] for s in samples[::3]]
  assert len(speaker.asked[0]['prompts']) == 8


def test_reasoning_of_a_checkpoint(speaker, tmp_path):
  """Failure: SFT cannot read what a checkpoint has thought, an evaluation's problem is in it, or the same sums are there twice."""
  chosen = settings_of(tmp_path / 'cache', keep='reasoning', licence='Apache-2.0')
  asked = datagen.problems(datagen.resolve(chosen))[0][0]['prompt']
  (tmp_path / 'exam').mkdir()
  (tmp_path / 'exam' / 'test.jsonl').write_text(json.dumps({'prompt': asked}) + '\n')
  exam = {'exam': {'task': 'dataset', 'path': str(tmp_path / 'exam')}}
  job = datagen.resolve(config.merge(chosen, {'generate': {'decontaminate': exam, 'near_duplicates': 1.0}}))
  got, rows = datagen.generate(job, str(tmp_path / 'it')), read(tmp_path / 'it')
  assert all(row['chain_of_thought'] == 'x;so' and row['completion'] == row['answer'] for row in rows)
  assert got['dropped'] == {'contaminated': 1, 'not verified': got['prompts'], 'truncated': got['prompts']}
  assert got['rows'] == len(rows) == got['prompts'] - 1 and asked not in {row['prompt'] for row in rows}
  tokens, _ = data.encode_row(rows[0], TOKENIZER, 'plain')
  assert TOKENIZER.decode(tokens).endswith(f'<think>x;so</think><answer>{rows[0]["answer"]}</answer>')
  card = (tmp_path / 'it' / 'README.md').read_text()
  assert (
    'license: apache-2.0' in card and '- checkpoint: tests/fixtures/llama' in card and '| left out, contaminated | 1 |' in card
  )


def test_steps_of_a_checkpoint(speaker, tmp_path):
  """Failure: roll-outs begin elsewhere than at a step's end, or rows are not those that process reward models read."""
  job = datagen.resolve(settings_of(tmp_path / 'cache', keep='steps', step_separator=';', rollouts_per_step=4, size=4))
  got, rows = datagen.generate(job, str(tmp_path / 'it')), read(tmp_path / 'it')
  assert {json.dumps(row['labels']) for row in rows} == {'[0.75, 1.0]', '[0.75, 0.0]'}
  assert all(''.join(row['completions']).startswith('<think>') and len(row['completions']) == 2 for row in rows)
  assert got['steps'] == 2 * len(rows) and got['continuations'] == 4 * len(rows) and got['label'] == pytest.approx(0.625)
  lines = [json.loads(line) for f in (tmp_path / 'it' / 'samples').glob('*.jsonl') for line in f.read_text().splitlines()]
  assert got['tokens'] == sum(s['length'] for s in lines)
  wanted = {'Q: ' + row['prompt'] + row['completions'][0] for row in rows}
  assert {p for call in speaker.asked[1:] for p in call['prompts']} == wanted


def test_conditioned_on_what_came_of_it(speaker, tmp_path):
  """Failure: a label stands behind its step or before another, is the wrong one at the threshold, or a text loses a step."""
  options = {'keep': 'conditioned', 'step_separator': ';', 'rollouts_per_step': 4, 'size': 4, 'good': '^', 'bad': '~'}
  for threshold, marks in ((0.75, {'^^', '^~'}), (0.8, {'~^', '~~'})):
    folder = tmp_path / str(threshold)
    datagen.generate(datagen.resolve(settings_of(tmp_path / 'cache', **options, threshold=threshold)), str(folder))
    rows = read(folder)
    assert {row['completion'][0] + row['completion'].partition(';')[2][0] for row in rows} == marks
    assert all(row['completion'].count('^') + row['completion'].count('~') == 2 for row in rows)
    texts = {re.sub('[~^]', '', row['completion']) for row in rows}
    lines = [json.loads(line) for line in (folder / 'samples' / 'samples.jsonl').read_text().splitlines()]
    assert texts <= {s['completion'] for s in lines} and all(row.keys() == {'prompt', 'completion'} for row in rows)


def test_rounds_ask_other_problems(tmp_path):
  """Failure: a second round asks what the first has asked, in another order than training reads it, or a prompt is asked twice."""
  chosen = settings_of(tmp_path, size=20)
  first, repeated = datagen.problems(datagen.resolve(chosen))
  train = data.open_train(config.resolve({k: v for k, v in chosen.items() if k != 'generate'}).data, 0)
  drawn = train.draw(train.first(), 40)[0]
  assert first == list({row['prompt']: row for row in reversed(drawn[:20])}.values())[::-1] and len(first) + repeated == 20
  assert repeated > 0  # else nothing was shown
  second, _ = datagen.problems(datagen.resolve(settings_of(tmp_path, size=None, first=20)))
  assert {r['prompt'] for r in second} == {r['prompt'] for r in drawn[20:]}
  seeded, _ = datagen.problems(datagen.resolve({**chosen, 'seed': 1}))
  assert seeded[:5] != first[:5]
  test, _ = datagen.problems(datagen.resolve(settings_of(tmp_path, split='test', size=3, first=2)))
  assert test == data.open_test(train.data, 0, 5)[2:]
  for options in ({'first': 20, 'size': 21}, {'first': 40, 'size': None}):
    with pytest.raises(ConfigError, match=r"'generate.first' and 'generate.size': .* but the train split has 40 problems"):
      datagen.problems(datagen.resolve(settings_of(tmp_path, **options)))


def test_a_problem_without_a_prompt_or_answer(speaker, tmp_path):
  """Failure: data that cannot be asked or judged is a traceback, or is told when all has been sampled."""

  def run(rows: list[dict], **generate):
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    chosen = settings_of(tmp_path / 'cache', size=None, **generate)
    chosen = {**chosen, 'data': {'task': 'dataset', 'path': str(tmp_path / 'rows.jsonl'), 'cache_dir': str(tmp_path / 'cache')}}
    return datagen.generate(datagen.resolve(chosen), str(tmp_path / 'it'))

  for keep in data_settings.BY_VERDICT:
    with pytest.raises(ConfigError, match=f"'generate.keep': '{keep}' goes by verdicts"):
      run([{'prompt': f'{n}+1=', 'text': 'x'} for n in range(20)], keep=keep)
  with pytest.raises(ConfigError, match='no column prompt'):
    run([{'messages': [*CHAT, {'role': 'assistant', 'content': f'{n}'}]} for n in range(20)])
  with pytest.raises(ConfigError, match=r"'data.max_prompt_length': 128, but a prompt has"):
    run([{'prompt': f'{n}' * 200, 'answer': '1'} for n in range(20)])
  assert not speaker.asked and not (tmp_path / 'it').exists()
  with pytest.raises(ConfigError, match=r"'generate.keep': correct leaves none of \d+ completions: .*'not verified': "):
    run([{'prompt': f'{n}+1=', 'answer': '-1'} for n in range(100, 120)])
  assert not (tmp_path / 'it' / 'data.jsonl').exists() and not (tmp_path / 'it' / 'summary.json').exists()


def test_text_that_reads_back_as_other_tokens():
  """Failure: nobody is told that what is imitated is not what was sampled."""
  broken = {**said('x\ufffd', 1.0, 1.0), 'completion_ids': [ord('x'), 0xE4, TOKENIZER.end_id]}  # half a character

  class Fixed(types.SimpleNamespace):
    def __call__(self, *arguments):
      return [said('a', 1.0, 1.0), broken]

  sampler = Fixed(
    run=types.SimpleNamespace(tokenizer=TOKENIZER), generate=make(keep='correct', num_samples=2), seconds=lambda name: 0.0
  )
  made, counted = data_from_checkpoint.make_data(sampler, [PROBLEM])  # type: ignore[arg-type]
  assert len(made) == 2 and counted['other_tokens'] == 1


REFUSED = [
  ({'generate.keep': 'bestt'}, "'generate.keep': 'bestt' is none of all, best"),
  ({'generate.kep': 'best'}, "'generate.kep' is unknown; did you mean 'generate.keep'"),
  ({'generate.split': 'dev'}, "'generate.split': 'dev' is none of"),
  ({'generate.first': -1}, "'generate.first': -1 is out of range"),
  ({'generate.size': -1}, "'generate.size': -1 is out of range"),
  ({'generate.split': 'test', 'generate.size': 0}, "'generate.size': say how many"),
  ({'generate.num_samples': 0}, "'generate.num_samples': 0 is out of range"),
  ({'generate.temperature': -1.0}, "'generate.temperature': -1.0 is out of range"),
  ({'generate.temperature': 0.0}, "'generate.temperature': 0.0 is greedy, 3 samples would be all equal"),
  ({'generate.top_k': -1}, "'generate.top_k': -1 is out of range"),
  ({'generate.top_p': 0.0}, "'generate.top_p': 0.0 is out of range"),
  ({'generate.min_p': 1.0}, "'generate.min_p': 1.0 is out of range"),
  ({'generate.num_samples': 1, 'generate.temperature': 0.0, 'generate.top_p': 0.5}, "'generate.top_p' cannot act"),
  ({'generate.seed': 2**32}, "'generate.seed': 4294967296 is out of range"),
  ({'generate.batch_size': 0}, "'generate.batch_size': 0 is out of range"),
  ({'generate.batch_size': 12}, "'generate.batch_size': 12 does not divide over the 8"),
  ({'generate.max_per_prompt': -1}, "'generate.max_per_prompt': -1 is out of range"),
  (
    {'generate.keep': 'best', 'generate.max_per_prompt': 2},
    "'generate.max_per_prompt' cannot act: it is for generate.keep correct",
  ),
  (
    {'generate.keep': 'labels', 'generate.min_reward': 1.0},
    "'generate.min_reward' cannot act: it is for generate.keep best, correct",
  ),
  ({'generate.verify': 'never'}, "'generate.verify' cannot act: it is for generate.keep reasoning"),
  (
    {'generate.keep': 'labels', 'generate.near_duplicates': 0.5},
    "'generate.near_duplicates' cannot act: it is for generate.keep best",
  ),
  ({'generate.api.model': 'x'}, "'generate.api' cannot act: it is for generate.source api, not checkpoint"),
  ({'generate.step_separator': ';'}, "'generate.step_separator' cannot act: it is for generate.keep steps"),
  ({'generate.rollouts_per_step': 2}, "'generate.rollouts_per_step' cannot act: it is for generate.keep steps"),
  ({'generate.keep': 'steps', 'generate.step_separator': ''}, "'generate.step_separator': '' is out of range"),
  ({'generate.keep': 'steps', 'generate.rollouts_per_step': 0}, "'generate.rollouts_per_step': 0 is out of range"),
  ({'generate.good': 'x'}, "'generate.good' cannot act: it is for generate.keep conditioned"),
  ({'generate.keep': 'conditioned', 'generate.good': 'x', 'generate.bad': 'x'}, "'generate.bad': 'x' is out of range"),
  ({'generate.keep': 'conditioned', 'generate.threshold': 0.0}, "'generate.threshold': 0.0 is out of range"),
  ({'generate.keep': 'pairs', 'generate.num_samples': 1}, "'generate.num_samples': 1 leaves nothing to compare"),
  ({'generate.keep': 'ranking', 'generate.max_per_prompt': 1}, "'generate.max_per_prompt': 1 leaves nothing to compare"),
  ({'generate.keep': 'best', 'rewards': {'functions': (), 'weights': ()}}, "'rewards.functions': empty"),
  ({'generate.min_reward': 1.0, 'rewards.weights': (0.0, 0.0)}, "'rewards.weights': all 0"),
  ({'rewards.functions': ('nothing', 'format')}, "'rewards.functions': 'nothing'"),
  ({'roles.policy.init': ''}, "'roles.policy.init' is empty"),
  ({'roles.policy.init': '/no/such'}, "'roles.policy.init': '/no/such' does not exist"),
  (
    {'roles.reward': {'rm': {'init': '/no/such'}}, 'rewards.functions': ('rm', 'format')},
    "'roles.reward.rm.init': '/no/such' does not",
  ),
  ({'rollout.temperature': 1.0}, "cannot act beside a section generate:\n  'rollout.temperature'"),
  ({'total_steps': 3, 'optim.learning_rate': 1.0}, "\n  'optim.learning_rate'\n  'total_steps'"),
  ({'rewards.timeout': 3.0}, "'rewards.timeout': no reward function is a module:function"),
]


@pytest.mark.parametrize(('keys', 'wanted'), REFUSED)
def test_refused(keys, wanted, speaker, tmp_path):
  """Failure: a key that is misspelt, impossible or without effect is ignored, or refused without its name."""
  chosen = settings_of(tmp_path / 'cache')
  for key, value in keys.items():
    chosen = config.override(chosen, key, value)
  with pytest.raises(ConfigError) as caught:
    datagen.generate(datagen.resolve(chosen), str(tmp_path / 'it'))
  assert wanted in str(caught.value) and not (tmp_path / 'it').exists() and not speaker.asked


def test_a_reward_model_says_nothing(speaker, tmp_path, monkeypatch):
  """Failure: text is sampled from a network without a head for it."""
  opened = evaluate.open_run

  def without_head(*arguments):
    run, *weights = opened(*arguments)
    return run._replace(speaks=False), *weights

  monkeypatch.setattr(evaluate, 'open_run', without_head)
  with pytest.raises(ConfigError, match=r"'roles.policy.init': tests/fixtures/llama is a reward model"):
    datagen.generate(datagen.resolve(settings_of(tmp_path / 'cache')), str(tmp_path / 'it'))


def test_command_line(speaker, tmp_path, capsys):
  """Failure: the command does not make the data that its config says, or a mistake is a traceback."""
  (tmp_path / 'file.py').write_text(f'def get_config():\n  return {settings_of(tmp_path / "cache")!r}\n')
  argv = [f'--config={tmp_path / "file.py"}', f'--workdir={tmp_path / "it"}']
  assert datagen.main([*argv, '--config.generate.keep=labels', '--config.generate.max_per_prompt=1']) == 0
  assert {row['label'] for row in read(tmp_path / 'it')} == {1.0} and 'kept of' in capsys.readouterr().out
  assert datagen.main(argv) == 2 and "generate.keep: 'labels' -> 'correct'" in capsys.readouterr().err
  assert datagen.main([*argv, '--overwrite']) == 0 and 'completion' in read(tmp_path / 'it')[0]
  assert datagen.main(argv[:1]) == 2 and '--workdir=DIR is missing' in capsys.readouterr().err
  assert datagen.main(['--config=configs/tiny.py', argv[1]]) == 2 and "'generate' is missing" in capsys.readouterr().err
  assert datagen.main(['--config=configs/best_of_k.py', argv[1]]) == 2 and 'the stages of a pipeline' in capsys.readouterr().err


SFT = {'total_steps': 1, 'model': {'preset': 'tiny'}, 'data': {'train_size': 8, 'batch_size': 8}, 'objective': {'name': 'sft'}}


def stages(cache) -> dict:
  base = config.override(SFT, 'data.cache_dir', str(cache))
  sample = config.override(settings_of(cache), 'roles.policy', {'init': '{workdir}/base'})
  tuned = {**base, 'roles': {'policy': {'init': '{workdir}/base'}}}
  tuned = config.override(tuned, 'data', {'task': 'dataset', 'path': '{workdir}/sample/data.jsonl', 'train_size': 0})
  return {'base': base, 'sample': sample, 'tuned': {k: v for k, v in tuned.items() if k != 'model'}}


def test_stage_of_a_pipeline(speaker, tmp_path, monkeypatch):
  """Failure: a pipeline cannot sample from a stage and train on what it gave, or does it in another order."""
  order = []

  def train_stub(chosen, workdir, **_):
    order.append((workdir, chosen.data.path, dataset.is_single(chosen.data.path)))
    (tmp_path / 'run' / 'base').mkdir(parents=True, exist_ok=True)
    return {'evaluations': [], 'wall_s': 1.0}

  monkeypatch.setattr(pipeline.train, 'train', train_stub)
  folder = str(tmp_path / 'run')
  result = pipeline.run_pipeline(stages(tmp_path / 'cache'), folder)
  assert order == [(f'{folder}/base', '', False), (f'{folder}/tuned', f'{folder}/sample/data.jsonl', True)]
  assert result['sample']['kept'] == len(read(tmp_path / 'run' / 'sample')) > 0 and result['sample']['evaluators'] == {}
  assert list(result) == ['base', 'sample', 'tuned', 'final']
  assert result == json.loads((tmp_path / 'run' / 'summary.json').read_text())
  rows = list(dataset.rows('train', 0, None, f'{folder}/sample/data.jsonl'))
  assert rows == read(tmp_path / 'run' / 'sample')  # no procedural training problem is in the test split


@pytest.mark.parametrize(
  ('stage', 'key', 'value', 'wanted'),
  [
    ('sample', 'generate.keep', 'bestt', "stage sample: config key 'generate.keep'"),
    ('sample', 'optim.learning_rate', 1.0, 'stage sample: config keys that cannot act beside a section generate'),
    (
      'sample',
      'roles.policy.init',
      '{workdir}/bose',
      "stage sample: config key 'roles.policy.init': '{workdir}/bose' does not exist",
    ),
    ('sample', 'roles.policy.init', '{workdir}/tuned', "no earlier stage is called 'tuned'"),
    ('tuned', 'data.path', '{workdir}/sampled/data.jsonl', "stage tuned: config key 'data.path': '{workdir}/sampled/data.jsonl'"),
    ('tuned', 'roles.policy.init', '{workdir}/sample', "stage tuned: config key 'roles.policy.init'"),
  ],
)
def test_stages_are_checked_before_the_first_runs(stage, key, value, wanted, speaker, tmp_path):
  """Failure: a mistake in what a later stage samples, or in the name of what it reads, is told when the first has been trained."""
  chosen = stages(tmp_path / 'cache')
  chosen[stage] = config.override(chosen[stage], key, value)
  with pytest.raises(ConfigError) as caught:
    pipeline.run_pipeline(chosen, str(tmp_path / 'run'))
  assert wanted in str(caught.value) and not (tmp_path / 'run').exists()


def test_rounds_of_the_config():
  """Failure: configs/best_of_k.py does not resolve, a round samples problems of the round before or from another model than was trained
  last, or trains on another round's data."""
  chosen = config.read_file('configs/best_of_k.py:rounds=3,size=100')['stages']
  assert list(chosen) == ['base', *(f'round{n}_{kind}' for n in (1, 2, 3) for kind in ('generate', 'train'))]
  pipeline.check_stages(chosen, '/tmp/no such folder')
  for n in (1, 2, 3):
    made, trained = chosen[f'round{n}_generate'], chosen[f'round{n}_train']
    assert (made['generate']['first'], made['generate']['size'], made['data']['train_size']) == (100 * (n - 1), 100, 300)
    assert made['roles']['policy']['init'] == ('{workdir}/base' if n == 1 else f'{{workdir}}/round{n - 1}_train')
    assert trained['data']['path'] == f'{{workdir}}/round{n}_generate/data.jsonl'
    assert trained['roles']['policy']['init'] == '{workdir}/base'
  last = config.read_file('configs/best_of_k.py:start=last,keep=best,base=/some/base')['stages']
  assert 'base' not in last and last['round2_train']['roles']['policy']['init'] == '{workdir}/round1_train'
  assert (
    last['round1_generate']['roles']['policy']['init'] == '/some/base' and 'min_reward' not in last['round1_generate']['generate']
  )
  ranked = config.read_file('configs/best_of_k.py:start=last,keep=ranking')['stages']
  pipeline.check_stages(ranked, '/tmp/no such folder')
  assert ranked['round1_generate']['generate']['keep'] == 'ranking' and ranked['round2_train']['objective'] == {'name': 'dpo'}
  by_model = config.read_file('configs/best_of_k.py:keep=best,judge=/some/judge')['stages']['round2_generate']
  assert by_model['roles']['policy'] == {'init': '{workdir}/round1_train'} and by_model['rewards'] == {'functions': ('judge',)}
