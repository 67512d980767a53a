"""Rewards: what is paid, what is no verdict, and what happens when a reward function fails."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from rl_reasoning import rewards
from rl_reasoning.config import ConfigError
from rl_reasoning.rewards import REWARDS, RewardError

RIGHT = '<think>2+3=5</think><answer>5</answer>'


def reward(name, completions, prompts=None, **columns):
  return REWARDS[name](prompts=prompts or ['q'] * len(completions), completions=completions, **columns)


def test_signature():
  """Failure: a reward cannot be called as other trainers call theirs, or returns something else than one value a row."""
  for function in REWARDS.values():
    arguments = {
      'prompts': ['q', 'q'],
      'completions': [RIGHT, 'x'],
      'completion_ids': [[1], [2]],
      'answer': ['5', '5'],
      'other': [1, 2],
    }
    assert function(**arguments) == [1.0, 0.0]
    assert function(['q', 'q'], [RIGHT, 'x'], [[1], [2]], answer=['5', '5']) == [1.0, 0.0]
    assert function(prompts=[], completions=[], completion_ids=[]) == []


def test_no_verdict_is_not_zero():
  """Failure: a row without a readable gold answer is trained as wrong (or as right)."""
  for name in ('accuracy', 'accuracy_flexible'):
    assert reward(name, [RIGHT] * 4, answer=['5', None, 'see above', '6']) == [1.0, None, None, 0.0]
    assert reward(name, [RIGHT]) == [None]


def test_strict_and_flexible():
  """Failure: the reward pays an unmarked last number, or the evaluator does not count it."""
  texts = [RIGHT, r'\boxed{5}', 'First there are 2, then 3 more, so 5', '5', '<answer>5</answer><answer>5</answer>', '<think>5']
  assert reward('accuracy', texts, answer=['5'] * 6) == [1, 1, 0, 1, 0, 0]
  assert reward('accuracy_flexible', texts, answer=['5'] * 6) == [1, 1, 1, 1, 0, 0]


def test_answer_in_thinking_that_the_prompt_opened():
  """Failure: where the template ends in <think>, an answer inside a chain that never ended is paid."""
  prompts = ['q <think>\n', 'q <think>\n', 'q']
  texts = [r'maybe \boxed{5}', r'maybe</think>\boxed{5}', r'maybe \boxed{5}']
  for name in ('accuracy', 'accuracy_flexible'):
    assert reward(name, texts, prompts, answer=['5'] * 3) == [0, 1, 1]


def test_countdown():
  """Failure: countdown is graded by its columns only now and then, or an expression that misses is paid."""
  numbers, target = [[3, 5, 7]] * 4 + [None], [20] * 4 + [None]
  texts = ['<answer>(7-3)*5</answer>', '<answer>7*5-15</answer>', '<answer>20</answer>', '', '<answer>5</answer>']
  assert reward('accuracy', texts, numbers=numbers, target=target) == [1, 0, 0, 0, None]
  assert reward('accuracy', texts, numbers=numbers, target=target, answer=['x'] * 4 + ['5']) == [1, 0, 0, 0, 1]


FORMATS = {  # (format, format_tags)
  RIGHT: (1, 1), f' {RIGHT}\n': (1, 1), '<think>a</think>\n<answer>b</answer>': (1, 1), '<think></think><answer></answer>': (1, 1),
  f'x{RIGHT}': (0, 1), f'{RIGHT}x': (0, 1), '<think>a</think>x<answer>b</answer>': (0, 1),
  '': (0, 0), 'x': (0, 0), '<think>': (0, 0.25), '<think></think>': (0, 0.5), '<answer>5</answer>': (0, 0.5),
  '<think>a</think><answer>5': (0, 0.75), 'a</think><answer>5</answer>': (0, 0.75), '<think>a<answer>5</answer>': (0, 0.75),
  '<think><think>a</think><answer>5</answer>': (0, 0.75), RIGHT + '<answer>5</answer>': (0, 0.5), RIGHT * 2: (0, 0),
  '<answer>5</answer><think>a</think>': (0, 0.5), '</think><think>': (0, 0.25), '</answer><answer></think><think>': (0, 0.25),
  '<THINK>a</THINK>': (0, 0), '<think >a</think >': (0, 0),
}  # fmt: skip


@pytest.mark.parametrize('text', FORMATS, ids=repr)
def test_formats(text):
  """Failure: a malformed completion is well formed, or repeating or shuffling tags earns more than using each once, in order."""
  assert (reward('format', [text])[0], reward('format_tags', [text])[0]) == FORMATS[text]


def test_format_after_an_opened_think():
  """Failure: completions of a template that ends in <think> can never be, or are always, well formed."""
  texts, prompts = ['a</think><answer>5</answer>', RIGHT, 'a'], ['q <think>'] * 3
  assert reward('format', texts, prompts) == [1, 0, 0]
  assert reward('format_tags', texts, prompts) == [1, 0.75, 0.25]


def test_hostile_format_is_judged_at_once():
  """Failure: a completion of many tags stalls the step."""
  texts = ['<think>' + '</think><answer></answer>' * 10_000 + 'x', '<answer>' * 20_000, '<think></think>' + ' ' * 200_000]
  start = time.perf_counter()
  assert reward('format', texts) == [0, 0, 0]
  assert time.perf_counter() - start < 1.0  # 0.01 s where linear


def test_chat_messages():
  """Failure: completions given as chat messages are graded by another turn than the last, or crash."""
  chats = [[{'role': 'assistant', 'content': '<answer>6</answer>'}, {'role': 'assistant', 'content': RIGHT}]]
  prompts = [[{'role': 'user', 'content': 'use <think>'}]]
  for name in REWARDS:
    assert reward(name, chats, prompts, answer=['5']) == [1.0]


# Reward functions of a user, named 'tests.test_rewards:...' below.
def by_length(prompts, completions, completion_ids, **columns):
  return [float(len(c)) for c in completions]


def crashes_on_bad(prompts, completions, completion_ids, **columns):
  return [1 / (c != 'bad') + columns['bonus'][n] for n, c in enumerate(completions)]


def too_few(prompts, completions, completion_ids, **columns):
  return [1.0] * (len(completions) // 2)


def only_alone(prompts, completions, completion_ids, **columns):
  (text,) = completions
  return [float(len(text))]


def parsed(prompts, completions, completion_ids, **columns):
  known = {
    'nan': math.nan, '1e39': 1e39, 'inf': np.float32('inf'), 'text': '1', 'list': [1], 'none': None, 'true': True,
    'numpy true': np.bool_(True), 'int': 2, 'int64': np.int64(3), 'float16': np.float16(0.5),
  }  # fmt: skip
  return [known[c] for c in completions]


def array(prompts, completions, completion_ids, **columns):
  return np.arange(len(completions), dtype=np.float32)


NOT_CALLABLE = 3


def score(name, completions, on_error='raise', **columns):
  names = [name] if isinstance(name, str) else name
  names = [n if n in REWARDS else f'tests.test_rewards:{n}' for n in names]
  N = len(completions)
  return rewards.score(names, on_error, ['q'] * N, completions, [[n] for n in range(N)], columns)


def test_score():
  """Failure: values of one function stand in another's column, a verdict of 0 counts as missing, or None as 0 (OpenRLHF#1219)."""
  values, has, failed = score(['accuracy', 'by_length', 'array'], [RIGHT, '6', RIGHT], answer=['5', '5', None])
  np.testing.assert_array_equal(values, [[1, len(RIGHT), 0], [0, 1, 1], [0, len(RIGHT), 2]])
  np.testing.assert_array_equal(has, [[True, True, True], [True, True, True], [False, True, True]])
  assert not failed.any() and values.dtype == np.float64 and has.dtype == bool


def test_crash_names_function_and_row():
  """Failure: whoever wrote the reward cannot see which completion broke it."""
  with pytest.raises(RewardError, match=r"'tests.test_rewards:crashes_on_bad' failed on row 2: ZeroDivisionError.*'bad'"):
    score('crashes_on_bad', ['a', 'b', 'bad', 'bad'], bonus=[0, 1, 2, 3])


def test_crash_loses_only_its_row():
  """Failure: one bad completion costs the batch its rewards, or the others get their neighbours' values or columns."""
  values, has, failed = score(['crashes_on_bad', 'by_length'], ['a', 'bad', 'c', 'bad', 'e'], 'none', bonus=[0, 1, 2, 3, 4])
  np.testing.assert_array_equal(values, [[1, 1], [0, 3], [3, 1], [0, 3], [5, 1]])
  np.testing.assert_array_equal(has[:, 0], [True, False, True, False, True])
  assert has[:, 1].all()
  np.testing.assert_array_equal(failed, [[False, False], [True, False], [False, False], [True, False], [False, False]])


def test_wrong_number_of_rewards():
  """Failure: a function that returns too few values shifts rewards to other rows."""
  with pytest.raises(RewardError, match=r'too_few.*returned 0 rewards for 1 completions'):
    score('too_few', ['a', 'b'])
  _, has, failed = score('too_few', ['a', 'b'], 'none')
  assert not has.any() and failed.all()


def test_failure_that_no_single_row_shows():
  """Failure: a function that fails on batches only passes as well, or its error blames a row."""
  with pytest.raises(RewardError, match=r'only_alone.*failed on the batch: ValueError'):
    score('only_alone', ['a', 'bb'])


@pytest.mark.parametrize('value', ['nan', 'inf', '1e39', 'text', 'list'])
def test_what_is_no_reward(value):
  """Failure: NaN or a text goes into the advantages of the whole group."""
  with pytest.raises(RewardError, match=r'failed on row 1.*neither a finite number of float32 nor None'):
    score('parsed', ['int', value])
  values, has, failed = score('parsed', ['int', value, 'int64'], 'none')
  assert values[:, 0].tolist() == [2, 0, 3] and has[:, 0].tolist() == [True, False, True] and failed.sum() == 1


def test_numbers_of_every_kind():
  """Failure: integer rewards are truncated, or numpy's and Python's kinds of numbers are refused."""
  values, has, _ = score('parsed', ['true', 'numpy true', 'int', 'int64', 'float16', 'none'])
  assert values[:, 0].tolist() == [1, 1, 2, 3, 0.5, 0] and has[:, 0].tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(
  'name,reason',
  [
    ('acuracy', 'is none of accuracy'), (':f', 'is none of'), ('tests.test_rewards:', 'is none of'),
    ('no_such_module:f', 'No module named'),
    ('tests.test_rewards:nothing', "no attribute 'nothing'"), ('tests.test_rewards:NOT_CALLABLE', 'is not callable'),
  ],
)  # fmt: skip
def test_names(name, reason):
  """Failure: a mistyped reward is a traceback, or is found only in the middle of a run."""
  with pytest.raises(ConfigError, match=f"'rewards.functions': '{name}'.*{reason}"):
    rewards.resolve(name)
  assert rewards.resolve('tests.test_rewards:by_length') is by_length and rewards.resolve('accuracy') is rewards.accuracy


def test_from_a_plain_script(tmp_path):
  """Failure: a reward needs a trainer, a main guard or JAX around it."""
  script = tmp_path / 'script.py'
  script.write_text(
    'import json, sys\n'
    'from rl_reasoning.rewards import REWARDS\n'
    f"call = dict(prompts=['q'] * 2, completions=[{RIGHT!r}, '6'], completion_ids=[[0]] * 2, answer=['5', '5'])\n"
    "print(json.dumps([{name: f(**call) for name, f in REWARDS.items()}, 'jax' in sys.modules]))\n"
  )
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env={'PYTHONPATH': '.'})
  assert json.loads(done.stdout) == [{name: [1.0, 0.0] for name in REWARDS}, False]


def conversational(prompts, completions, **columns):
  return [
    float(len(p) + (c[0]['role'] == 'assistant') + ('5' in c[0]['content'])) for p, c in zip(prompts, completions, strict=True)
  ]


def test_chat_prompts_give_chat_completions():
  """Failure: a reward function written for TRL's conversational data sets gets texts, or the <think> that the template opened is lost."""
  messages = [{'role': 'user', 'content': '2+3'}]
  assert rewards.as_given('2+3', 'Q: 2+3 <think>', '5') == ('Q: 2+3 <think>', '5')
  prompt, completion = rewards.as_given(messages, '<user>2+3<assistant><think>', 'add</think><answer>5</answer>')
  assert conversational([prompt], [completion]) == [3.0]
  assert REWARDS['format']([prompt], [completion]) == [1.0] == REWARDS['accuracy']([prompt], [completion], answer=['5'])


def leaves(prompts, completions, **columns):
  raise SystemExit(0)


def test_exit_is_a_crash():
  """Failure: sys.exit(0) in a user's function ends the run as if it were done."""
  with pytest.raises(RewardError, match=r'leaves.*SystemExit'):
    score('leaves', ['a'])
  assert score('leaves', ['a'], 'none').failed_NR.all()
