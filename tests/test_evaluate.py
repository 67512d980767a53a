"""Evaluators: the same numbers every time and in every batch size, and numbers that mean what they are called."""

import itertools
import math

import jax
import numpy as np
import pytest

from rl_reasoning import config, evaluate, model, rollout, tokenizer
from rl_reasoning.build import Run
from rl_reasoning.config import ConfigError
from rl_reasoning.structs import Rollout
from rl_reasoning.tasks.arithmetic import is_test

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


def one(options: dict, name='it') -> evaluate.Evaluator:
  return evaluate.make_evaluators({name: options})[name]


@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_pass_at_k(n):
  """Failure: pass@k is not the share of all choices of k samples that hold a right one."""
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    chosen = list(itertools.combinations(range(n), k))
    hits = sum(min(choice) < correct for choice in chosen)
    assert evaluate.pass_at_k(n, correct, k) == pytest.approx(hits / len(chosen))


def test_mean_and_error():
  """Failure: the error bar is the spread of problems and not that of their mean, or one problem claims to be certain."""
  values = [0.0, 1.0, 1.0, 0.5]
  mean, error = evaluate.mean_and_error(values)
  variance = sum((v - 0.625) ** 2 for v in values) / 3
  assert mean == pytest.approx(0.625) and error == pytest.approx(math.sqrt(variance / 4))
  mean, error = evaluate.mean_and_error([0.5])
  assert mean == 0.5 and math.isnan(error)


EVALUATORS = {'greedy': {}, 'sampled': {'num_samples': 2, 'temperature': 1.0}}


@pytest.fixture(scope='module')
def found(params):
  """(metrics, samples) by evaluator, all problems in one batch."""
  return {n: evaluate.evaluate(make_run(batch_size=11), params, PROBLEMS, n, one(e)) for n, e in EVALUATORS.items()}


@pytest.mark.parametrize('name', EVALUATORS)
@pytest.mark.parametrize('batch_size', [11, 4, 16])
def test_batch_size(batch_size, name, params, found):
  """Failure: an evaluation does not repeat, depends on how problems are batched, or counts those that fill the last batch."""
  again = evaluate.evaluate(make_run(batch_size=batch_size), params, PROBLEMS, name, one(EVALUATORS[name]))
  assert again == found[name]
  assert [s['problem'] for s in again[1]] == [i for i in range(11) for _ in range(EVALUATORS[name].get('num_samples', 1))]
  assert again[0]['problems'] == 11


def test_samples_differ(params, found):
  """Failure: the samples of a problem are copies of each other, or the seed of the evaluation is not read."""
  texts = [s['completion'] for s in found['sampled'][1]]
  assert all(a != b for a, b in zip(texts[::2], texts[1::2]))
  other = evaluate.evaluate(make_run(batch_size=11, seed=4), params, PROBLEMS, 'sampled', one(EVALUATORS['sampled']))
  assert [s['completion'] for s in other[1]] != texts


def test_length_of_an_evaluator(params, found):
  """Failure: an evaluator's own limit is ignored, or changes what greedy decoding says before it."""
  short = evaluate.evaluate(make_run(batch_size=11), params, PROBLEMS, 'short', one({'max_completion_length': 5}))[1]
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
  got, samples = evaluate.evaluate(make_run(batch_size=3), {}, rows, 'it', one({}))
  lengths = [len(TOKENIZER.encode(t)) + 1 for t in (RIGHT, UNMARKED, WRONG)] + [2]
  error = math.sqrt(0.25 * 4 / 3 / 4)
  assert got == pytest.approx({
    'problems': 4, 'accuracy': 0.5, 'accuracy_stderr': error, 'strict_accuracy': 0.25, 'strict_accuracy_stderr': 0.25, 'format': 0.5,
    'length': np.mean(lengths), 'truncated': 0.25,
    'reward': 1.0, 'reward_stderr': math.sqrt(2 / 3 / 4),  # of accuracy and format: 2, 1, 1, 0
  })  # fmt: skip
  assert [(s['accuracy'], s['format'], s['truncated'], s['completion']) for s in samples] == [
    (1, 1, False, RIGHT), (1, 0, False, UNMARKED), (0, 1, False, WRONG), (0, 0, True, 'hm')]  # fmt: skip


def test_several_samples(monkeypatch):
  """Failure: samples are counted with another problem, or pass@k or the error bar is over samples instead of problems."""
  texts = [RIGHT, WRONG, WRONG, WRONG] + [UNMARKED, RIGHT, RIGHT, WRONG] + [WRONG] * 4
  stub(monkeypatch, texts)
  rows = [{'prompt': 'x', 'answer': '7'}] * 3
  got, _ = evaluate.evaluate(make_run(batch_size=2), {}, rows, 'it', one({'num_samples': 4, 'temperature': 1.0}))
  correct = np.array([1, 3, 0])
  assert got['accuracy'] == pytest.approx(correct.mean() / 4)
  assert got['accuracy_stderr'] == pytest.approx(np.std(correct / 4, ddof=1) / math.sqrt(3))
  assert got['strict_accuracy'] == pytest.approx(3 / 12)
  assert got['pass@2'] == pytest.approx((3 / 6 + 6 / 6 + 0) / 3) and got['pass@4'] == pytest.approx(2 / 3)
  assert {name for name in got if name.startswith('pass')} == {'pass@2', 'pass@2_stderr', 'pass@4', 'pass@4_stderr'}


def test_prefix(monkeypatch):
  """Failure: the prefix is not what the model continues, or the thinking that it opened is not counted as opened."""
  asked = stub(monkeypatch, ['a</think><answer>7</answer>'])
  got, samples = evaluate.evaluate(make_run(batch_size=2), {}, [{'prompt': 'x', 'answer': '7'}], 'it', one({'prefix': '<think>'}))
  assert asked[0]['prompts'] == [TOKENIZER.encode('x<think>')] * 2 and samples[0]['prompt'] == 'x<think>'
  assert got['format'] == got['strict_accuracy'] == 1


def test_what_is_sampled_from(monkeypatch):
  """Failure: an evaluator's options do not reach the sampler, or those of training do."""
  asked = stub(monkeypatch, [RIGHT])
  options = {'temperature': 0.7, 'top_k': 5, 'top_p': 0.9, 'min_p': 0.1, 'max_completion_length': 9}
  evaluate.evaluate(make_run(batch_size=1), {}, [{'prompt': 'x', 'answer': '7'}], 'it', one(options))
  evaluate.evaluate(make_run(batch_size=1), {}, [{'prompt': 'x', 'answer': '7'}], 'it', one({}))
  assert asked[0]['settings'] == config.Rollout(**options, chunk=8)
  assert asked[1]['settings'] == config.Rollout(temperature=0.0, max_completion_length=8, chunk=8)
  assert asked[0]['end_ids'] == TOKENIZER.end_ids


def test_without_gold_answer(monkeypatch):
  """Failure: a problem that nobody can judge counts as wrong, or hides that of the problems after it."""
  stub(monkeypatch, [RIGHT, RIGHT, WRONG, RIGHT])
  rows = [{'prompt': 'x'}, {'prompt': 'x', 'answer': '7'}, {'prompt': 'x', 'answer': '7'}, {'prompt': 'x', 'answer': 'unknown'}]
  got, samples = evaluate.evaluate(make_run(batch_size=4), {}, rows, 'it', one({}))
  assert got['problems'] == 2 and got['accuracy'] == 0.5 and [s['accuracy'] for s in samples] == [None, 1, 0, None]
  evaluate.check_problems(make_run(), rows, {'it': one({})})
  with pytest.raises(ConfigError, match=r"eval.evaluators: no problem of data.task 'arithmetic' has a gold answer"):
    evaluate.check_problems(make_run(), rows[:1] + rows[3:], {'it': one({})})


def test_prompt_beyond_the_limit(monkeypatch):
  """Failure: a prompt that is longer than the config allows is cut, left out, or runs without a word."""
  stub(monkeypatch, [RIGHT] * 2)
  rows = [{'prompt': 'x' * 31, 'answer': '7'}, {'prompt': 'y' * 32, 'answer': '7'}]
  assert evaluate.evaluate(make_run(batch_size=2), {}, rows, 'it', one({}))[0]['problems'] == 2
  with pytest.raises(ConfigError, match=r"'data.max_prompt_length': 32, but eval.evaluators.it has a prompt of 33 tokens: 'yyy"):
    evaluate.check_problems(make_run(batch_size=2), rows, {'it': one({'prefix': '<think>'})})  # before anything is sampled


REFUSED = [
  ({'num_samples': 4}, 'num_samples', '4 need a temperature'),
  ({'tempersture': 1.0}, 'tempersture', 'is unknown'),
  ({'num_samples': 0}, 'num_samples', '0 is out of range'),
  ({'temperature': -1.0}, 'temperature', '-1.0 is out of range'),
  ({'top_p': 0.0, 'temperature': 1.0}, 'top_p', '0.0 is out of range'),
  ({'max_completion_length': -1}, 'max_completion_length', '-1 is out of range'),
  ({'top_p': 0.9}, 'top_p', 'cannot act'),
]


@pytest.mark.parametrize(('options', 'key', 'says'), REFUSED)
def test_refused(options, key, says):
  """Failure: a misspelt, impossible or idle option is ignored, or refused without saying where it stands."""
  with pytest.raises(ConfigError, match=f"'eval.evaluators.it.{key}'.*{says}"):
    one(options)
  with pytest.raises(ConfigError, match=r"'eval.evaluators.it': 3 is not a mapping"):
    one(3)  # type: ignore[arg-type]


def test_all_evaluators_by_name(monkeypatch):
  """Failure: evaluators share their options or their results."""
  stub(monkeypatch, [RIGHT, WRONG])
  run = make_run(batch_size=1, every=1, evaluators={'greedy': {}, 'pass': {'num_samples': 2, 'temperature': 1.0}})
  got = evaluate.evaluate_all(run, {}, [{'prompt': 'x', 'answer': '7'}])
  assert list(got) == ['greedy', 'pass'] and (got['greedy']['accuracy'], got['pass']['accuracy']) == (1.0, 0.5)


def test_problems_are_the_test_split(tmp_path):
  """Failure: held-out problems change from one evaluation to the next, or are those that training sees."""
  run = make_run()._replace(config=config.resolve({**SETTINGS, 'eval': {'size': 20}, 'data': {'cache_dir': str(tmp_path)}}))
  rows = evaluate.test_problems(run)
  assert len(rows) == 20 == len({row['prompt'] for row in rows}) and evaluate.test_problems(run) == rows
  assert all(is_test(row['prompt']) for row in rows)
