"""Evaluators: the same numbers every time and in every batch size, and numbers that mean what they are called."""

import collections
import itertools
import json
import math
import random

import jax
import numpy as np
import pytest
from etils import epath

from rl_reasoning import checkpoint, config, evaluate, evaluators, model, rollout, sharding, stored, tables, tokenizer, train
from rl_reasoning.build import Run
from rl_reasoning.config import ConfigError
from rl_reasoning.estimates import bootstrap_interval, maj_at_k, mean_and_error, pass_at_k
from rl_reasoning.structs import Batch, Rollout
from rl_reasoning.tasks.procedural import is_test

ARCH, TOKENIZER = model.Arch(264, 16, 32, 1, 2, 2, 8), tokenizer.ByteTokenizer()
SETTINGS = {'rollout': {'max_completion_length': 8, 'chunk': 8}, 'eval': {'seed': 3}, 'data': {'max_prompt_length': 32},
            'roles': {'policy': {'template': 'plain'}}}  # fmt: skip
# Prompts of many lengths: the padding of a batch depends on which of them share it.
PROBLEMS = [{'prompt': '9' * (1 + 3 * i % 20) + '+1=', 'answer': str(i)} for i in range(11)]


def make_run(**eval_keys) -> Run:
  settings = config.merge(SETTINGS, {'eval': eval_keys})
  return Run(config.resolve(settings), None, ARCH, TOKENIZER, None, None, None)  # type: ignore[arg-type]


@pytest.fixture(scope='module')
def params():
  return jax.jit(model.init, static_argnums=1)(jax.random.key(0), ARCH)


def one(options: dict, name='it') -> evaluators.Evaluator:
  return evaluators.make_evaluators({name: options})[name]


@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_pass_at_k(n):
  """Failure: pass@k is not the share of all choices of k samples that hold a right one."""
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    chosen = list(itertools.combinations(range(n), k))
    hits = sum(min(choice) < correct for choice in chosen)
    assert pass_at_k(n, correct, k) == pytest.approx(hits / len(chosen))


def brute_force_majority(answers: list, value: dict, k: int) -> float:
  total, choices = 0.0, list(itertools.combinations(answers, k))
  for choice in choices:
    counts = collections.Counter(a for a in choice if a is not None)
    winners = [a for a in counts if counts[a] == max(counts.values())]
    total += sum(value[a] for a in winners) / len(winners) if winners else 0.0
  return total / len(choices)


def test_maj_at_k():
  """Failure: maj@k is not the mean over all choices of k samples, ties are not shared, or a sample without an answer votes."""
  rng, value = random.Random(0), {'a': 1.0, 'b': 0.0, 'c': 0.5, 'd': 1.0}
  for _ in range(60):
    n = rng.randint(1, 8)
    answers = [rng.choice([None, *value]) for _ in range(n)]
    groups = tuple((answers.count(a), value[a]) for a in sorted({*answers} - {None}))
    for k in range(1, n + 1):
      assert maj_at_k(n, groups, k) == pytest.approx(brute_force_majority(answers, value, k), abs=1e-12)
  assert maj_at_k(4, ((2, 1.0), (2, 0.0)), 4) == pytest.approx(0.5) and maj_at_k(4, (), 2) == 0
  assert maj_at_k(1200, ((700, 1.0), (500, 0.0)), 600) == pytest.approx(1.0)  # counts of choices beyond the floats


def test_bootstrap_interval():
  """Failure: the interval changes from call to call, does not hold the mean of the population in 95 % of samples, or depends on units."""
  rng = np.random.default_rng(0)
  samples = rng.choice([0.0, 0.25, 0.5, 1.0], p=[0.4, 0.2, 0.1, 0.3], size=(400, 60))
  intervals = [bootstrap_interval(x) for x in samples]
  covered = np.mean([low <= 0.4 <= high for low, high in intervals])
  assert 0.91 < covered < 0.975
  assert bootstrap_interval(samples[0]) == intervals[0]
  assert bootstrap_interval(samples[0] * 10) == pytest.approx([10 * v for v in intervals[0]])
  width = 2 * 1.96 * mean_and_error(samples[0])[1]
  assert intervals[0][1] - intervals[0][0] == pytest.approx(width, rel=0.1)


def test_mean_and_error():
  """Failure: the error bar is the spread of problems and not that of their mean, or one problem claims to be certain."""
  values = [0.0, 1.0, 1.0, 0.5]
  mean, error = mean_and_error(values)
  variance = sum((v - 0.625) ** 2 for v in values) / 3
  assert mean == pytest.approx(0.625) and error == pytest.approx(math.sqrt(variance / 4))
  mean, error = mean_and_error([0.5])
  assert mean == 0.5 and math.isnan(error)


EVALUATORS = {'greedy': {}, 'sampled': {'num_samples': 2, 'temperature': 1.0}}


@pytest.fixture(scope='module')
def found(params):
  """(metrics, samples) by evaluator, all problems in one batch."""
  return {n: evaluators.evaluate(make_run(batch_size=11), params, PROBLEMS, n, one(e)) for n, e in EVALUATORS.items()}


@pytest.mark.parametrize('name', EVALUATORS)
@pytest.mark.parametrize('batch_size', [11, 4, 16])
def test_batch_size(batch_size, name, params, found):
  """Failure: an evaluation does not repeat, depends on how problems are batched, or counts those that fill the last batch."""
  again = evaluators.evaluate(make_run(batch_size=batch_size), params, PROBLEMS, name, one(EVALUATORS[name]))
  assert again == found[name]
  assert [s['problem'] for s in again[1]] == [i for i in range(11) for _ in range(EVALUATORS[name].get('num_samples', 1))]
  assert again[0]['problems'] == 11


def test_samples_differ(params, found):
  """Failure: the samples of a problem are copies of each other, or the seed of the evaluation is not read."""
  texts = [s['completion'] for s in found['sampled'][1]]
  assert all(a != b for a, b in zip(texts[::2], texts[1::2]))
  other = evaluators.evaluate(make_run(batch_size=11, seed=4), params, PROBLEMS, 'sampled', one(EVALUATORS['sampled']))
  assert [s['completion'] for s in other[1]] != texts


def test_divergence(params, monkeypatch):
  """Failure: the KL divergence is of the prompts or the padding too, at another temperature than that of sampling, has the wrong sign, or
  is not 0 from the policy's own weights."""
  run = make_run(batch_size=4)._replace(mesh=sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  others = {'same': params, 'other': jax.tree.map(lambda x: 0.7 * x, params)}
  monkeypatch.setattr(stored, 'load_params', lambda init, *rest: others[init])
  found = {
    name: evaluators.evaluate(run, params, PROBLEMS[:6], 'it', one({'num_samples': 2, 'temperature': 0.7, 'kl_to': name}))
    for name in others
  }
  assert found['same'][0]['kl'] == 0.0
  values, samples = found['other']
  assert values['kl'] == pytest.approx(np.mean([s['kl'] for s in samples])) and values['kl'] > 0
  for s in samples[::5]:
    prompt = TOKENIZER.encode(s['prompt'])
    ids = np.asarray([prompt + s['completion_ids']], np.int32)
    place, nothing = np.arange(ids.shape[1])[None], np.zeros(1)
    rows = Batch(tokens=ids, segment_NT=0 * ids + 1, position_NT=place, mask_NT=ids, source_N=nothing, group_N=nothing)
    ours, theirs = (np.asarray(model.log_probs(p, ARCH, rows, 0.7)[0])[0, len(prompt) :].sum() for p in others.values())
    assert s['kl'] == pytest.approx(ours - theirs, abs=1e-4)


def test_length_of_an_evaluator(params, found):
  """Failure: an evaluator's own limit is ignored, or changes what greedy decoding says before it."""
  short = evaluators.evaluate(make_run(batch_size=11), params, PROBLEMS, 'short', one({'max_completion_length': 5}))[1]
  assert max(s['length'] for s in short) == 5 and max(s['length'] for s in found['greedy'][1]) == 8
  same = [b['completion'].startswith(a['completion'].rstrip('\ufffd')) for a, b in zip(short, found['greedy'][1])]
  assert all(same) and len({s['completion'] for s in short}) > 1


def stub(monkeypatch, texts: list[str], ended=None) -> list:
  """rollout.generate returns these completions, prompt by prompt; what it is asked is collected."""
  asked, ended = [], [True] * len(texts) if ended is None else ended

  def generate(params, arch, prompts, *, settings, group, prompt_ids, **rest):
    asked.append({'prompts': prompts, 'settings': settings, 'ids': prompt_ids, **rest})
    rows = [i * group + g for i in prompt_ids for g in range(group)]
    ids = [TOKENIZER.encode(texts[r]) + [TOKENIZER.end_id] * ended[r] for r in rows]
    tokens = np.zeros((len(rows), max(map(len, ids))), np.int32)
    for row, line in enumerate(ids):
      tokens[row, : len(line)] = line
    length = np.array([len(line) for line in ids], np.int32)
    return Rollout(tokens, np.zeros(tokens.shape, np.float32), length, np.array([not ended[r] for r in rows]))

  monkeypatch.setattr(rollout, 'generate', generate)
  return asked


RIGHT, UNMARKED, WRONG = '<think>a</think><answer>7</answer>', 'it is 7', '<think>a</think><answer>8</answer>'


def test_metrics_mean_what_they_say(monkeypatch):
  """Failure: accuracy asks for the format, strict accuracy does not, or a share is over something else than completions."""
  stub(monkeypatch, [RIGHT, UNMARKED, WRONG, 'hm'], ended=[True, True, True, False])
  rows = [{'prompt': 'x', 'answer': '7'}] * 4
  got, samples = evaluators.evaluate(make_run(batch_size=3), {}, rows, 'it', one({}))
  lengths = [len(TOKENIZER.encode(t)) + 1 for t in (RIGHT, UNMARKED, WRONG)] + [2]
  error = math.sqrt(0.25 * 4 / 3 / 4)
  assert {k: v for k, v in got.items() if not k.endswith('_ci95')} == pytest.approx({
    'problems': 4, 'accuracy': 0.5, 'accuracy_stderr': error, 'strict_accuracy': 0.25, 'strict_accuracy_stderr': 0.25,
    'format': 0.5, 'format_stderr': error, 'truncated': 0.25, 'truncated_stderr': 0.25,
    'length': np.mean(lengths), 'length_stderr': np.std(lengths, ddof=1) / 2,
    'length_right': np.mean(lengths[:2]), 'length_wrong': np.mean(lengths[2:]),
    'reward': 1.0, 'reward_stderr': math.sqrt(2 / 3 / 4),  # of accuracy and format: 2, 1, 1, 0
    'rewards/accuracy': 0.5, 'rewards/accuracy_stderr': error, 'rewards/format': 0.5, 'rewards/format_stderr': error,
  })  # fmt: skip
  assert got['accuracy_ci95'] == bootstrap_interval([1, 1, 0, 0]) and got['reward_ci95'] == bootstrap_interval([2, 1, 1, 0])
  keys = ('accuracy', 'format', 'truncated', 'completion', 'reward')
  assert [tuple(s[key] for key in keys) for s in samples] == [
    (1, 1, False, RIGHT, 2), (1, 0, False, UNMARKED, 1), (0, 1, False, WRONG, 1), (0, 0, True, 'hm', 0)]  # fmt: skip
  assert [evaluators.vote(s['answer']) for s in samples[:3]] == [7, 7, 8] and samples[3]['answer'] is None
  assert samples[2]['rewards'] == {'accuracy': 0, 'format': 1}
  alone = evaluators.evaluate(make_run(batch_size=1), {}, rows[:1], 'it', one({}))[0]
  assert alone['accuracy'] == 1 and not any(key.endswith(('_stderr', '_ci95')) for key in alone)  # one problem is no spread


def test_several_samples(monkeypatch):
  """Failure: samples are counted with another problem, or pass@k or the error bar is over samples instead of problems."""
  texts = [RIGHT, WRONG, WRONG, WRONG] + [UNMARKED, RIGHT, RIGHT, WRONG] + [WRONG] * 4
  stub(monkeypatch, texts)
  rows = [{'prompt': 'x', 'answer': '7'}] * 3
  got, _ = evaluators.evaluate(make_run(batch_size=2), {}, rows, 'it', one({'num_samples': 4, 'temperature': 1.0}))
  correct = np.array([1, 3, 0])
  assert got['accuracy'] == pytest.approx(correct.mean() / 4)
  assert got['accuracy_stderr'] == pytest.approx(np.std(correct / 4, ddof=1) / math.sqrt(3))
  assert got['strict_accuracy'] == pytest.approx(3 / 12)
  assert got['pass@2'] == pytest.approx((3 / 6 + 6 / 6 + 0) / 3) and got['pass@4'] == pytest.approx(2 / 3)
  wanted = {f'{n}@{k}{end}' for n in ('pass', 'maj') for k in (2, 4) for end in ('', '_stderr', '_ci95')}
  assert {name for name in got if '@' in name} == wanted
  assert got['pass@4_ci95'] == bootstrap_interval([1, 1, 0])
  chosen = evaluators.evaluate(make_run(batch_size=2), {}, rows, 'it', one({'num_samples': 4, 'temperature': 1.0, 'ks': (1, 3)}))[
    0
  ]
  assert {name for name in chosen if name.startswith('pass') and name[5:].isdigit()} == {'pass@1', 'pass@3'}
  assert chosen['pass@1'] == chosen['accuracy'] == pytest.approx(chosen['maj@1'])  # every sample here has an answer


def answered(text: str) -> str:
  return f'<think>a</think><answer>{text}</answer>'


def test_majority_votes(monkeypatch):
  """Failure: equal answers written in two ways do not vote together, or a sample without an answer casts a vote."""
  # 7 wins by three to two only if 7, 7.0 and $7 are one answer; of the second problem's votes one is right and none is against it.
  stub(monkeypatch, [answered(a) for a in ('7', '7.0', '$7', '8', '8')] + ['hm', 'hm', '<answer>', '<think>', answered('7')])
  rows = [{'prompt': 'x', 'answer': '7'}] * 2
  got, samples = evaluators.evaluate(
    make_run(batch_size=2), {}, rows, 'it', one({'num_samples': 5, 'temperature': 1.0, 'ks': (5, 1)})
  )
  assert got['maj@5'] == pytest.approx(1) and got['maj@1'] == pytest.approx((3 / 5 + 1 / 5) / 2)
  assert [s['answer'] for s in samples[5:]] == [None] * 4 + ['7']
  assert evaluators.vote(' The  Cat') == evaluators.vote('the cat') != evaluators.vote('a cat')
  programs = [{**row, 'tests': 'assert True'} for row in rows]
  code = evaluators.measure(samples, programs, one({'num_samples': 5, 'temperature': 1.0}))
  assert 'pass@4' in code and not any(key.startswith('maj') for key in code)


def test_groups_add_up(monkeypatch):
  """Failure: a problem is counted in another difficulty or data set, in two of them or in none."""
  stub(monkeypatch, [RIGHT, WRONG, RIGHT, RIGHT, WRONG, WRONG, UNMARKED, WRONG, RIGHT, RIGHT])
  rows = [{'prompt': 'x', 'answer': '7', 'difficulty': d, 'dataset': n} for d, n in ((10, 'a'), (2, 'b'), (10, 'b'), (2, None))]
  rows.append({'prompt': 'x', 'answer': '7'})
  got = evaluators.evaluate(make_run(batch_size=2), {}, rows, 'it', one({'num_samples': 2, 'temperature': 1.0}))[0]
  assert list(got['difficulty']) == ['2', '10'] and list(got['dataset']) == ['a', 'b']
  assert {v: (m['problems'], m['accuracy'], m['pass@2']) for v, m in got['difficulty'].items()} == {
    '2': (2, 0.75, 1),
    '10': (2, 0.25, 0.5),
  }
  assert {v: m['problems'] for v, m in got['dataset'].items()} == {'a': 1, 'b': 2}
  inside = sum(m['problems'] * m['accuracy'] for m in got['difficulty'].values())
  assert inside + 1.0 == pytest.approx(5 * got['accuracy'])  # the last problem has no difficulty and is right twice
  stub(monkeypatch, [RIGHT, WRONG])
  rows = [{'prompt': 'x', 'answer': '7', 'difficulty': d} for d in ([1, 2], 'hard')]  # a file may hold anything
  got = evaluators.evaluate(make_run(batch_size=2), {}, rows, 'it', one({}))[0]['difficulty']
  assert {v: m['accuracy'] for v, m in got.items()} == {'[1, 2]': 1, 'hard': 0}


def test_accuracy_by_length():
  """Failure: a completion is in no bin or in two, or equal lengths are in two bins."""
  rng = random.Random(0)
  samples = [{'length': rng.choice([1, 2, 2, 2, 5, 9, 30, 31, 77]), 'accuracy': float(rng.random() < 0.5)} for _ in range(90)]
  bins = evaluators.accuracy_by_length([*samples, {'length': 3, 'accuracy': None}])
  assert sum(b['completions'] for b in bins) == 90 and 1 < len(bins) <= 8
  assert all(a['high'] < b['low'] for a, b in itertools.pairwise(bins))
  assert sum(b['completions'] * b['accuracy'] for b in bins) == pytest.approx(sum(s['accuracy'] for s in samples))
  assert evaluators.accuracy_by_length([]) == []


def test_prefix(monkeypatch):
  """Failure: the prefix is not what the model continues, or the thinking that it opened is not counted as opened."""
  asked = stub(monkeypatch, ['a</think><answer>7</answer>'])
  got, samples = evaluators.evaluate(
    make_run(batch_size=2), {}, [{'prompt': 'x', 'answer': '7'}], 'it', one({'prefix': '<think>'})
  )
  assert asked[0]['prompts'] == [TOKENIZER.encode('x<think>')] * 2 and samples[0]['prompt'] == 'x<think>'
  assert got['format'] == got['strict_accuracy'] == 1


def test_what_is_sampled_from(monkeypatch):
  """Failure: an evaluator's options do not reach the sampler, or those of training do."""
  asked = stub(monkeypatch, [RIGHT])
  options = {'temperature': 0.7, 'top_k': 5, 'top_p': 0.9, 'min_p': 0.1, 'max_completion_length': 9}
  evaluators.evaluate(make_run(batch_size=1), {}, [{'prompt': 'x', 'answer': '7'}], 'it', one(options))
  evaluators.evaluate(make_run(batch_size=1), {}, [{'prompt': 'x', 'answer': '7'}], 'it', one({}))
  assert asked[0]['settings'] == config.Rollout(**options, chunk=8)
  assert asked[1]['settings'] == config.Rollout(temperature=0.0, max_completion_length=8, chunk=8)
  assert asked[0]['end_ids'] == TOKENIZER.end_ids


def test_without_gold_answer(monkeypatch):
  """Failure: a problem that nobody can judge counts as wrong, or hides that of the problems after it."""
  stub(monkeypatch, [RIGHT, RIGHT, WRONG, RIGHT])
  rows = [{'prompt': 'x'}, {'prompt': 'x', 'answer': '7'}, {'prompt': 'x', 'answer': '7'}, {'prompt': 'x', 'answer': 'unknown'}]
  got, samples = evaluators.evaluate(make_run(batch_size=4), {}, rows, 'it', one({}))
  assert got['problems'] == 2 and got['accuracy'] == 0.5 and [s['accuracy'] for s in samples] == [None, 1, 0, None]
  evaluators.check_problems(make_run(), {'it': rows}, {'it': one({})})
  with pytest.raises(ConfigError, match=r"eval.evaluators.it: no problem of data.task 'arithmetic' has a gold answer"):
    evaluators.check_problems(make_run(), {'it': rows[:1] + rows[3:]}, {'it': one({})})


def test_prompt_beyond_the_limit(monkeypatch):
  """Failure: a prompt that is longer than the config allows is cut, left out, or runs without a word."""
  stub(monkeypatch, [RIGHT] * 2)
  rows = [{'prompt': 'x' * 31, 'answer': '7'}, {'prompt': 'y' * 32, 'answer': '7'}]
  assert evaluators.evaluate(make_run(batch_size=2), {}, rows, 'it', one({}))[0]['problems'] == 2
  with pytest.raises(ConfigError, match=r"'data.max_prompt_length': 32, but eval.evaluators.it has a prompt of 33 tokens: 'yyy"):
    evaluators.check_problems(
      make_run(batch_size=2), {'it': rows}, {'it': one({'prefix': '<think>'})}
    )  # before anything is sampled


REFUSED = [
  ({'num_samples': 4}, 'num_samples', '4 need a temperature'),
  ({'tempersture': 1.0}, 'tempersture', 'is unknown'),
  ({'num_samples': 0}, 'num_samples', '0 is out of range'),
  ({'temperature': -1.0}, 'temperature', '-1.0 is out of range'),
  ({'top_p': 0.0, 'temperature': 1.0}, 'top_p', '0.0 is out of range'),
  ({'max_completion_length': -1}, 'max_completion_length', '-1 is out of range'),
  ({'top_p': 0.9}, 'top_p', 'cannot act'),
  ({'size': -1}, 'size', '-1 is out of range'),
  ({'seed': -1}, 'seed', '-1 is out of range'),
  ({'seed': 2**32}, 'seed', '4294967296 is out of range'),
  ({'num_samples': 4, 'temperature': 1.0, 'ks': (8,)}, 'ks', r'\(8,\) is out of range'),
  ({'num_samples': 4, 'temperature': 1.0, 'ks': (0,)}, 'ks', r'\(0,\) is out of range'),
  ({'num_samples': 4, 'temperature': 1.0, 'ks': (2, 2)}, 'ks', r'\(2, 2\) is out of range'),
  ({'ks': (1,)}, 'ks', 'cannot act: there is one sample'),
]


@pytest.mark.parametrize(('options', 'key', 'says'), REFUSED)
def test_refused(options, key, says):
  """Failure: a misspelt, impossible or idle option is ignored, or refused without saying where it stands."""
  with pytest.raises(ConfigError, match=f"'eval.evaluators.it.{key}'.*{says}"):
    one(options)
  with pytest.raises(ConfigError, match=r"'eval.evaluators.it': 3 is not a mapping"):
    one(3)  # type: ignore[arg-type]
  for name in ('', '../x', '.x', 'a/b', 'x' * 201):
    with pytest.raises(ConfigError, match='the name is that of a file'):
      evaluators.make_evaluators({name: {}})


def test_all_evaluators_by_name(monkeypatch):
  """Failure: evaluators share their options or their results."""
  stub(monkeypatch, [RIGHT, WRONG])
  run = make_run(batch_size=1, every=1, evaluators={'greedy': {}, 'pass': {'num_samples': 2, 'temperature': 1.0}})
  got = evaluators.evaluate_all(run, {}, {name: [{'prompt': 'x', 'answer': '7'}] for name in ('greedy', 'pass')})
  assert list(got) == ['greedy', 'pass'] and (got['greedy']['accuracy'], got['pass']['accuracy']) == (1.0, 0.5)


def test_problems_are_the_test_split(tmp_path):
  """Failure: held-out problems change from one evaluation to the next, or are those that training sees."""
  keys = {'eval': {'size': 20, 'evaluators': {'it': {}}}, 'data': {'cache_dir': str(tmp_path)}}
  run = make_run()._replace(config=config.resolve({**SETTINGS, **keys}))
  rows = evaluators.test_problems(run)['it']
  assert len(rows) == 20 == len({row['prompt'] for row in rows}) and evaluators.test_problems(run)['it'] == rows
  assert all(is_test(row['prompt']) for row in rows)


def test_several_tasks_in_one_config(tmp_path):
  """Failure: an evaluator's own task, options, size or seed is ignored, or another evaluator gets it."""
  (tmp_path / 'test.jsonl').write_text(''.join(json.dumps({'prompt': f'q{i}', 'answer': str(i)}) + '\n' for i in range(5)))
  chosen = {'plain': {}, 'small': {'size': 3}, 'seeded': {'seed': 9}, 'two': {'options': {'operands': 2}},
            'cd': {'task': 'countdown', 'size': 4}, 'mine': {'task': 'dataset', 'path': str(tmp_path)}}  # fmt: skip
  data = {'cache_dir': str(tmp_path / 'cache'), 'options': {'operands': 3, 'low': 5}}
  run = make_run()._replace(config=config.resolve({**SETTINGS, 'data': data, 'eval': {'size': 6, 'evaluators': chosen}}))
  found = evaluators.test_problems(run)
  assert {name: len(rows) for name, rows in found.items()} == {'plain': 6, 'small': 3, 'seeded': 6, 'two': 6, 'cd': 4, 'mine': 5}
  assert found['small'] == found['plain'][:3] and found['seeded'] != found['plain']
  assert all(sum(map(row['prompt'].count, '+-')) == 1 for row in found['two'])
  assert all('numbers' in row for row in found['cd']) and [row['prompt'] for row in found['mine']] == [f'q{i}' for i in range(5)]
  mixed = config.resolve({**SETTINGS, 'data': {'mixture': {'a': {'task': 'arithmetic', 'train_size': 4}}, 'cache_dir': data['cache_dir']},
                          'eval': {'evaluators': {'it': {'options': {'operands': 2}}}}})  # fmt: skip
  with pytest.raises(ConfigError, match=r"'eval.evaluators.it.options' cannot act on data.mixture"):
    evaluators.test_problems(run._replace(config=mixed))


SAMPLED = {'num_samples': 2, 'temperature': 1.0}


def contents(folder) -> dict[str, bytes]:
  return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.suffix == '.jsonl'}


@pytest.mark.parametrize('cut', [0, 1, 40])
def test_resume_is_bit_for_bit(cut, params, tmp_path, monkeypatch):
  """Failure: what a kill left of an evaluation is generated again, counted twice or changes a number; `cut` bytes of the last line
  were not yet written when it came."""
  run, evaluator = make_run(batch_size=4), one(SAMPLED)
  whole, part = epath.Path(tmp_path / 'whole'), epath.Path(tmp_path / 'part')
  expected = evaluators.evaluate(run, params, PROBLEMS, 'it', evaluator, whole)
  generate, calls = rollout.generate, []

  def counted(*arguments, prompt_ids, **others):
    calls.append(prompt_ids)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return generate(*arguments, prompt_ids=prompt_ids, **others)

  with monkeypatch.context() as patch:
    patch.setattr(rollout, 'generate', counted)
    with pytest.raises(KeyboardInterrupt):
      evaluators.evaluate(run, params, PROBLEMS, 'it', evaluator, part)
    file = tmp_path / 'part' / 'it.jsonl'
    assert len(file.read_text().splitlines()) == 16  # two batches of four problems
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) - cut])
    assert evaluators.evaluate(run, params, PROBLEMS, 'it', evaluator, part) == expected
    again = [[4, 5, 6, 7]] if cut else []
    assert calls[3:] == [*again, [8, 9, 10, 10]]
    calls.clear()
    assert evaluators.evaluate(run, params, PROBLEMS, 'it', evaluator, part) == expected and calls == []
  assert contents(tmp_path / 'part') == contents(tmp_path / 'whole')
  assert [json.loads(line) for line in file.read_text().splitlines()] == expected[1]
  (tmp_path / 'part' / 'it.json').write_text('')  # what a machine without power leaves: nobody knows of what these are samples
  assert evaluators.evaluate(run, params, PROBLEMS, 'it', evaluator, part) == expected


@pytest.mark.parametrize('change', ['params', 'seed', 'evaluator', 'problems', 'batch_size'])
def test_samples_of_something_else(change, params, tmp_path, capsys):
  """Failure: samples of other weights, settings or problems pass for those of this evaluation."""
  folder, rows = epath.Path(tmp_path / 'a'), PROBLEMS[:4]
  evaluators.evaluate(make_run(batch_size=4), params, rows, 'it', one(SAMPLED), folder)
  other = {
    'params': lambda: (make_run(batch_size=4), jax.tree.map(lambda x: x * 1.5, params), rows, 'it', one(SAMPLED)),
    'seed': lambda: (make_run(batch_size=4, seed=4), params, rows, 'it', one(SAMPLED)),
    'evaluator': lambda: (make_run(batch_size=4), params, rows, 'it', one({**SAMPLED, 'temperature': 0.5})),
    'problems': lambda: (make_run(batch_size=4), params, PROBLEMS[4:8], 'it', one(SAMPLED)),
    'batch_size': lambda: (make_run(batch_size=2), params, rows, 'it', one(SAMPLED)),
  }[change]()
  got = evaluators.evaluate(*other, folder)
  assert 'made anew' in capsys.readouterr().out
  assert got == evaluators.evaluate(*other, epath.Path(tmp_path / 'b'))
  assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(workdir of a run of the tiny config, evaluated in its loop; its data cache)."""
  folder = tmp_path_factory.mktemp('run')
  flags = ["--config.eval.evaluators={'greedy': {}}", '--config.eval.every=1', '--config.eval.at_start=False',
           '--config.eval.size=16', '--config.eval.batch_size=16', '--config.rollout.max_completion_length=8']  # fmt: skip
  argv = [
    '--config=configs/tiny.py',
    f'--workdir={folder / "run"}',
    '--config.total_steps=1',
    f'--config.data.cache_dir={folder}',
  ]
  assert train.main([*argv, *flags]) == 0
  return folder / 'run', folder


def call(trained, *flags, workdir='', settings='configs/eval.py:size=24,samples=4,batch_size=16,max_completion_length=8') -> int:
  argv = [f'--config={settings}', f'--checkpoint={trained[0]}', f'--config.data.cache_dir={trained[1]}', *flags]
  return evaluate.main([*argv, *([f'--workdir={workdir}'] if workdir else [])])


def test_training_keeps_samples(trained):
  """Failure: what a training run's evaluation was counted from is not on disk."""
  lines = (trained[0] / 'samples' / 'step_000001' / 'greedy.jsonl').read_text().splitlines()
  numbers = json.loads((trained[0] / 'eval.jsonl').read_text())['evaluators']['greedy']
  assert len(lines) == 16 and numbers['accuracy'] == np.mean([json.loads(line)['accuracy'] for line in lines])
  assert len(numbers['accuracy_ci95']) == 2 and numbers['difficulty']


def test_command_line(trained, tmp_path, monkeypatch, capsys):
  """Failure: an evaluation leaves out a file, does not repeat, is interrupted for good, or mixes two checkpoints or configs."""
  assert call(trained) == 0  # into RUN/evaluation
  folder = trained[0] / 'evaluation'
  result = json.loads((folder / 'evaluation.json').read_text())
  assert set(result) == {'checkpoint', 'fingerprint', 'config_hash', 'hardware', 'tokens', 'seconds', 'evaluators'}
  assert set(result['evaluators']) == {'greedy', '4 samples'} and 'maj@4_ci95' in result['evaluators']['4 samples']
  lengths = [json.loads(line)['length'] for f in (folder / 'samples').glob('*.jsonl') for line in f.read_text().splitlines()]
  assert result['tokens'] == sum(lengths) and len(lengths) == 24 * 5
  assert result['fingerprint'] == int(checkpoint.fingerprint(checkpoint.restore_params(str(trained[0]), 'policy')))
  table = (folder / 'evaluation.md').read_text()
  assert '| 4 samples | 24 |' in table and '| maj |' in table and '## By difficulty' in table
  assert (folder / 'evaluation.png').read_bytes().startswith(b'\x89PNG')

  generate, calls = rollout.generate, []

  def interrupted(*arguments, **others):
    calls.append(1)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return generate(*arguments, **others)

  with monkeypatch.context() as patch:
    patch.setattr(rollout, 'generate', interrupted)
    assert call(trained, workdir=tmp_path / 'cut') == 130 and not (tmp_path / 'cut' / 'evaluation.json').exists()
    assert call(trained, workdir=tmp_path / 'cut') == 0 and len(calls) == 5  # four batches in all, one of them tried twice
    assert call(trained, workdir=tmp_path / 'cut') == 0 and len(calls) == 5  # finished
  again = json.loads((tmp_path / 'cut' / 'evaluation.json').read_text())
  assert {**again, 'seconds': 0} == {**result, 'seconds': 0} and again['seconds'] > 0
  assert contents(tmp_path / 'cut' / 'samples') == contents(folder / 'samples')
  assert (tmp_path / 'cut' / 'evaluation.md').read_text() == table

  capsys.readouterr()
  assert call(trained, '--config.eval.size=16') == 2
  text = capsys.readouterr().err
  assert 'eval.size: 24 -> 16' in text and '--overwrite' in text
  assert json.loads((folder / 'evaluation.json').read_text()) == result  # as it was
  about = json.loads((folder / 'evaluation_config.json').read_text())
  (folder / 'evaluation_config.json').write_text(json.dumps({**about, 'fingerprint': 1}))
  assert call(trained) == 2 and 'fingerprint: 1 -> ' in capsys.readouterr().err
  assert call(trained, '--config.eval.size=16', '--overwrite') == 0
  assert json.loads((folder / 'evaluation.json').read_text())['evaluators']['greedy']['problems'] == 16


def test_training_config_evaluates_too(trained, tmp_path):
  """Failure: the file that a run was trained by cannot evaluate it, or its evaluation is another than that of the loop."""
  flags = ["--config.eval.evaluators={'greedy': {}}", '--config.eval.size=16', '--config.eval.batch_size=16',
           '--config.rollout.max_completion_length=8']  # fmt: skip
  assert call(trained, *flags, workdir=tmp_path, settings='configs/tiny.py') == 0
  got = json.loads((tmp_path / 'evaluation.json').read_text())['evaluators']['greedy']
  got.pop('by_length')
  assert got == json.loads((trained[0] / 'eval.jsonl').read_text())['evaluators']['greedy']
  assert contents(tmp_path / 'samples') == contents(trained[0] / 'samples' / 'step_000001')


def test_implicit_reward_outside_of_the_run(tmp_path, capsys):
  """Failure: an evaluation of a run that learned from preferences ranks by something else than the run itself does."""
  start, folder = tmp_path / 'start', tmp_path / 'dpo'
  argv = [f'--config.data.cache_dir={tmp_path}', '--config.total_steps=1', '--config.optim.learning_rate=0.01']
  assert train.main(['--config=configs/tiny.py', f'--workdir={start}', *argv]) == 0
  flags = ["--config.eval.evaluators={'held out': {'kind': 'ranking'}}", '--config.eval.size=16', '--config.eval.batch_size=8']
  loop = [f'--config.roles.ref.init={start}', '--config.eval.every=1', '--config.eval.at_start=False', *flags]
  assert train.main(['--config=configs/tiny.py:objective=dpo', f'--workdir={folder}', *argv, *loop]) == 0
  asked = ['--config=configs/tiny.py:objective=dpo', f'--checkpoint={folder}', argv[0], *flags]
  assert evaluate.main([*asked, f'--workdir={tmp_path / "e"}']) == 0
  got = json.loads((tmp_path / 'e' / 'evaluation.json').read_text())['evaluators']['held out']
  assert got == json.loads((folder / 'eval.jsonl').read_text())['evaluators']['held out']
  start.rename(tmp_path / 'elsewhere')
  assert evaluate.main([*asked, f'--workdir={tmp_path / "f"}']) == 2
  assert 'is over its reference' in capsys.readouterr().err


@pytest.mark.parametrize(
  'flags, wanted',
  [
    (['--config.optim.learning_rate=1.0'], "cannot act in an evaluation:\n  'optim.learning_rate'"),
    (['--config.rollout.temperature=1.0'], "cannot act in an evaluation:\n  'rollout.temperature'"),
    (['--config.eval.every=3'], "cannot act in an evaluation:\n  'eval.every'"),
    (
      ["--config.data.mixture={'a': {'task': 'linear'}}"],
      "cannot act in an evaluation:\n  'data.path': data.mixture names the tasks",
    ),
    (['--config.rewards.timeout=3.0'], "'rewards.timeout': no reward function is a module:function"),
    (['--config.roles.policy.init=x'], "'roles.policy.init' cannot act here: --checkpoint stands for it"),
    (['--config.eval.evaluators.greedy.ks=(2,)'], "'eval.evaluators.greedy.ks'"),
    (['--config.eval.batch_size=12'], "'eval.batch_size': 12 does not divide over the 8"),
    (['--config.data.max_prompt_length=4'], "'data.max_prompt_length': 4"),
    (['--config.model.arch.num_hidden_layers=7'], "'model.arch.num_hidden_layers': 7, but"),
    (['--config.data.task=nothing'], "'data.task': 'nothing'"),
    (['--config.rewards.functions=("nothing",)'], "'rewards.functions': 'nothing'"),
    (['--checkpont=x'], 'flag --checkpont is unknown'),
  ],
)
def test_command_line_refuses(flags, wanted, trained, tmp_path, capsys):
  """Failure: a flag or key that is wrong or cannot act is ignored, is a traceback, or leaves a workdir behind."""
  assert call(trained, *flags, workdir=tmp_path / 'new') == 2
  assert wanted in capsys.readouterr().err and not (tmp_path / 'new').exists()


def test_checkpoint_is_named(trained, tmp_path, capsys):
  """Failure: a missing or wrong checkpoint or workdir is a traceback, or something else is evaluated in its place."""
  empty = '--config=configs/tiny.py'
  for argv, wanted in (
    ([empty], '--checkpoint=RUN_OR_WEIGHTS is missing'),
    (
      [empty, '--checkpoint=/no/such', '--workdir=x', "--config.eval.evaluators={'e': {}}"],
      '--checkpoint=/no/such: does not exist',
    ),
    ([empty, '--checkpoint=tests/fixtures/llama'], '--workdir=DIR is missing: tests/fixtures/llama is no workdir of ours'),
    ([empty, f'--checkpoint={trained[0]}'], "'eval.evaluators' is empty"),
    (['--config=configs/demo.py', f'--checkpoint={trained[0]}'], 'configs/demo.py: the stages of a pipeline'),
  ):
    assert evaluate.main(argv) == 2 and wanted in capsys.readouterr().err


def test_table_and_plot(tmp_path):
  """Failure: a name of the user's breaks the table, or an evaluation of one problem or without a verdict has no picture."""
  bare = {'problems': 0.0, 'format': 0.5, 'length': 3.0, 'truncated': 0.0, 'by_length': []}
  one_problem = {**bare, 'problems': 1.0, 'accuracy': 1.0, 'pass@2': 1.0, 'maj@2': 1.0,
                 'by_length': [{'low': 3, 'high': 3, 'length': 3.0, 'completions': 2, 'accuracy': 1.0}]}  # fmt: skip
  result = {'checkpoint': 'x', 'fingerprint': 1, 'config_hash': 'h', 'tokens': 6, 'hardware': {'device': 'd'},
            'evaluators': {'a|b': bare, 'c': one_problem, 'd': {**bare, 'accuracy': 0.0}}}  # fmt: skip
  tables.plot(result, epath.Path(tmp_path / 'x.png'))
  assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
  lines = tables.markdown(result).splitlines()
  assert '| a\\|b | 0 |  |  | 0.500 |  | 3.0 |  |  | 0.000 |' in lines and '| pass | 1.000 | 1.000 |' in lines
