"""Rewards: what is paid, what is no verdict, and what happens when a reward function fails."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from rl_reasoning import config, rewards, rule_rewards
from rl_reasoning.config import ConfigError, Rewards
from rl_reasoning.rewards import REWARDS, RewardError

RIGHT = '<think>2+3=5</think><answer>5</answer>'


def reward(name, completions, prompts=None, **columns):
  return REWARDS[name](prompts=prompts or ['q'] * len(completions), completions=completions, **columns)


def test_signature():
  """Failure: a reward cannot be called as other trainers call theirs, or returns something else than one value a row."""
  rows = {'prompts': ['q', 'q'], 'completions': [RIGHT, 'x'], 'completion_ids': [[1], [2]], 'answer': ['5', '5'], 'other': [1, 2]}
  for name, function in REWARDS.items():
    given = rewards.arguments(name, {}, 8)
    values = function(**rows, **given)
    assert len(values) == 2 and all(v is None or isinstance(v, float) for v in values)
    assert function(['q', 'q'], [RIGHT, 'x'], [[1], [2]], answer=['5', '5'], **given) == values
    assert function(prompts=[], completions=[], completion_ids=[], **given) == []
  for name in ('accuracy', 'accuracy_flexible', 'format', 'format_tags'):
    assert REWARDS[name](**rows) == [1.0, 0.0]


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
  RIGHT: (1, 1), f' {RIGHT}\n': (1, 1), '<think>a</think>\n<answer>b</answer>': (1, 1), '<think></think><answer></answer>': (1,
  1),
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
  for name in ('accuracy', 'accuracy_flexible', 'format', 'format_tags'):
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


def score(name, completions, on_error='raise', given=None, **columns):
  names = [name] if isinstance(name, str) else name
  names = [n if n in REWARDS else f'tests.test_rewards:{n}' for n in names]
  N = len(completions)
  return rewards.score(names, on_error, ['q'] * N, completions, [[n] for n in range(N)], columns, **given or {})


@pytest.fixture(params=[60.0, 0.0], ids=['worker', 'here'])
def where(request):
  """Keyword arguments of `score`, for a user's function in a worker and in this process."""
  return {'timeout': request.param}


def test_score(where, given=where):
  """Failure: values of one function stand in another's column, a verdict of 0 counts as missing, or None as 0 (OpenRLHF#1219)."""
  values, has, failed = score(['accuracy', 'by_length', 'array'], [RIGHT, '6', RIGHT], answer=['5', '5', None], given=where)
  np.testing.assert_array_equal(values, [[1, len(RIGHT), 0], [0, 1, 1], [0, len(RIGHT), 2]])
  np.testing.assert_array_equal(has, [[True, True, True], [True, True, True], [False, True, True]])
  assert not failed.any() and values.dtype == np.float64 and has.dtype == bool


def test_crash_names_function_and_row(where):
  """Failure: whoever wrote the reward cannot see which completion broke it."""
  with pytest.raises(RewardError, match=r"'tests.test_rewards:crashes_on_bad' failed on row 2: ZeroDivisionError.*'bad'"):
    score('crashes_on_bad', ['a', 'b', 'bad', 'bad'], bonus=[0, 1, 2, 3], given=where)


def test_crash_loses_only_its_row(where):
  """Failure: one bad completion costs the batch its rewards, or the others get their neighbours' values or columns."""
  values, has, failed = score(
    ['crashes_on_bad', 'by_length'], ['a', 'bad', 'c', 'bad', 'e'], 'none', bonus=[0, 1, 2, 3, 4], given=where
  )
  np.testing.assert_array_equal(values, [[1, 1], [0, 3], [3, 1], [0, 3], [5, 1]])
  np.testing.assert_array_equal(has[:, 0], [True, False, True, False, True])
  assert has[:, 1].all()
  np.testing.assert_array_equal(failed, [[False, False], [True, False], [False, False], [True, False], [False, False]])


def test_wrong_number_of_rewards(where):
  """Failure: a function that returns too few values shifts rewards to other rows."""
  with pytest.raises(RewardError, match=r'too_few.*returned 0 rewards for 1 completions'):
    score('too_few', ['a', 'b'], given=where)
  _, has, failed = score('too_few', ['a', 'b'], 'none', given=where)
  assert not has.any() and failed.all()


def test_failure_that_no_single_row_shows(where):
  """Failure: a function that fails on batches only passes as well, or its error blames a row."""
  with pytest.raises(RewardError, match=r'only_alone.*failed on the batch: ValueError'):
    score('only_alone', ['a', 'bb'], given=where)


@pytest.mark.parametrize('value', ['nan', 'inf', '1e39', 'text', 'list'])
def test_what_is_no_reward(value, where):
  """Failure: NaN or a text goes into the advantages of the whole group."""
  with pytest.raises(RewardError, match=r'failed on row 1.*neither a finite number of float32 nor None'):
    score('parsed', ['int', value], given=where)
  values, has, failed = score('parsed', ['int', value, 'int64'], 'none', given=where)
  assert values[:, 0].tolist() == [2, 0, 3] and has[:, 0].tolist() == [True, False, True] and failed.sum() == 1


def test_numbers_of_every_kind(where):
  """Failure: integer rewards are truncated, or numpy's and Python's kinds of numbers are refused."""
  values, has, _ = score('parsed', ['true', 'numpy true', 'int', 'int64', 'float16', 'none'], given=where)
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
    f"call = dict(prompts=['q'] * 2, completions=[{RIGHT!r}, '6'], completion_ids=[[0]] * 2, answer=['5', '6'])\n"
    "found = {name: REWARDS[name](**call) for name in ('accuracy', 'format', 'format_tags')}\n"
    "call['answer'] = [r'\\frac{\\pi}{2}'] * 2\n"
    "call['completions'] = [r'<answer>\\pi/2</answer>', r'\\boxed{\\pi}']\n"
    "print(json.dumps([found, REWARDS['accuracy'](**call), 'jax' in sys.modules]))\n"
  )
  done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env={'PYTHONPATH': '.'})
  right = {'accuracy': [1.0, 1.0], 'format': [1.0, 0.0], 'format_tags': [1.0, 0.0]}
  assert json.loads(done.stdout) == [right, [1.0, 0.0], False] and done.stderr == ''


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


def test_exit_is_a_crash(where):
  """Failure: sys.exit(0) in a user's function ends the run as if it were done."""
  with pytest.raises(RewardError, match=r'leaves.*SystemExit'):
    score('leaves', ['a'], given=where)
  assert score('leaves', ['a'], 'none', given=where).failed_NR.all()


# Worker processes, options, tasks in one batch.


def hangs_on_bad(prompts, completions, **columns):
  if 'bad' in completions:
    time.sleep(60)
  return [1.0] * len(completions)


def dies_on_bad(prompts, completions, **columns):
  if 'bad' in completions:
    os._exit(7)
  return [1.0] * len(completions)


def prints(prompts, completions, **columns):
  print('{"value": [9.0]}')
  os.system('echo \'{"value": [9.0]}\'')
  return [1.0] * len(completions)


def weighs(prompts, completions, *, factor: float = 2.0, max_completion_length: int = 0, answer, **columns):
  return [factor * max_completion_length + int(a) for a in answer]


def from_trl(completions, solution, **kwargs):
  assert kwargs['prompts'] and kwargs['completion_ids']
  return [None if s is None else 1.0 if c == s else 0.0 for c, s in zip(completions, solution, strict=True)]


def process(prompts, completions, **columns):
  return [float(os.getpid())] * len(completions)


def returns_nothing(prompts, completions, **columns):
  return None


def generates(prompts, completions, **columns):
  return (float(n) for n in range(len(completions)))


def test_a_function_that_hangs():
  """Failure: a user's reward stalls the run, its row is not named, or other rows go without a verdict."""
  start = time.monotonic()
  with pytest.raises(RewardError, match=r"hangs_on_bad' failed on row 1: not done after 1 s.*rewards.timeout.*'bad'"):
    score('hangs_on_bad', ['a', 'bad', 'c'], given={'timeout': 1.0})
  got = score('hangs_on_bad', ['a', 'bad', 'c', 'd'], 'none', given={'timeout': 1.0})
  assert got.failed_NR[:, 0].tolist() == [False, True, False, False] and got.values_NR[:, 0].tolist() == [1, 0, 1, 1]
  assert time.monotonic() - start < 20
  assert score('hangs_on_bad', ['a'], given={'timeout': 1.0}).values_NR.tolist() == [[1]]


def test_a_function_that_ends_its_process():
  """Failure: a reward that crashes the interpreter takes the run with it, or the error says neither row nor how it ended."""
  with pytest.raises(RewardError, match=r"dies_on_bad' failed on row 1: the worker process died: exit code 7.*'bad'"):
    score('dies_on_bad', ['a', 'bad', 'c'])
  assert score('dies_on_bad', ['a', 'bad', 'c'], 'none').failed_NR[:, 0].tolist() == [False, True, False]


def test_users_functions_run_elsewhere():
  """Failure: a user's function runs in the training process although a limit is set, or in a worker where none is (state, accelerators)."""
  assert score('process', ['a'], given={'timeout': 0}).values_NR.tolist() == [[os.getpid()]]
  assert score('process', ['a']).values_NR.tolist() != [[os.getpid()]]


def test_what_a_worker_returns(where):
  """Failure: output of a reward is taken for its result, a generator cannot be returned, or a missing return is no error."""
  assert score('prints', ['a'], given=where).values_NR.tolist() == [[1]]
  assert score('generates', ['a', 'b'], given=where).values_NR.tolist() == [[0], [1]]
  with pytest.raises(RewardError, match=r'returns_nothing.*TypeError'):
    score('returns_nothing', ['a'], given=where)


def test_columns_that_are_no_json():
  """Failure: a column that cannot be sent to a worker arrives as something else, or the error does not name the function."""
  assert score('from_trl', ['a'], solution=np.asarray(['a'])).values_NR.tolist() == [[1]]
  for column in ([object()], [b'a']):
    with pytest.raises(RewardError, match=r"from_trl'.*must be JSON"):
      score('from_trl', ['a'], solution=column)


def test_options_and_max_completion_length(where):
  """Failure: an option or the limit of tokens does not reach the function that asks for it, or reaches one that does not."""
  options = {'tests.test_rewards:weighs': {'factor': 3.0}}
  got = score(['weighs', 'accuracy'], [RIGHT], given={**where, 'options': options, 'max_completion_length': 10}, answer=['5'])
  assert got.values_NR.tolist() == [[35, 1]]
  assert score('weighs', ['a'], given={**where, 'max_completion_length': 10}, answer=['5']).values_NR.tolist() == [[25]]
  assert score('weighs', ['a'], given=where, answer=['5']).values_NR.tolist() == [[5]]
  with pytest.raises(RewardError, match=r"its option 'factor' has the name of a column"):
    score('weighs', ['a'], given={**where, 'options': options}, answer=['5'], factor=[1])


def test_columns_are_no_options(monkeypatch):
  """Failure: a column of the data sets an option of a built-in function (`unsafe` of the code rewards runs programs unprotected)."""

  def picky(prompts, completions, completion_ids=None, *, unsafe: bool = False, **columns):
    return [float(unsafe)] * len(completions)

  monkeypatch.setitem(rewards.REWARDS, 'picky', picky)
  assert score('picky', ['a'], unsafe=[True]).values_NR.tolist() == [[0]]
  given = {'options': {'picky': {'unsafe': True}}}
  assert score('picky', ['a'], unsafe=[False], given=given).values_NR.tolist() == [[1]]


def test_functions_of_trl(where):
  """Failure: a reward function as TRL documents it (completions, a column by name, the rest in kwargs, None) does not run unchanged."""
  got = score('from_trl', ['a', 'b', 'c'], given=where, solution=['a', 'a', None])
  assert got.values_NR[:, 0].tolist() == [1, 0, 0] and got.has_NR[:, 0].tolist() == [True, True, False]


def test_known_columns():
  """Failure: what a reward model said stands in another function's column, its missing verdict counts as 0, or its name is called."""
  given = {'known': {'helpful': [0.5, None], 'unasked': [9.0, 9.0]}, 'timeout': 0.0}
  values, has, failed = rewards.score(
    ('accuracy', 'helpful'), 'none', ['q'] * 2, [RIGHT, RIGHT], [[1], [2]], {'answer': ['5', None]}, **given
  )
  assert values.tolist() == [[1, 0.5], [0, 0]] and has.tolist() == [[True, True], [False, False]] and not failed.any()
  for bad, message in (([1.0], 'returned 1 rewards for 2'), ([1.0, math.nan], 'returned nan')):
    with pytest.raises(RewardError, match=f"reward 'helpful': {message}"):
      rewards.score(('helpful',), 'none', ['q'] * 2, ['a', 'b'], [[1], [2]], {}, known={'helpful': bad})


@pytest.mark.parametrize(
  'settings, wanted',
  [
    ({'functions': ('acuracy',)}, "config key 'rewards.functions': 'acuracy' is none of"),
    ({'functions': ('__main__:f',)}, "config key 'rewards.functions'"),
    ({'options': {'acuracy': {}}}, "config key 'rewards.options.acuracy': 'acuracy' is none of rewards.functions"),
    ({'options': {'format_tags': {}}}, "config key 'rewards.options.format_tags'"),
    ({'options': {'accuracy': 3}}, "config key 'rewards.options.accuracy': 3 is not a mapping"),
    ({'options': {'accuracy': {'speed': 3}}}, "config key 'rewards.options.accuracy.speed' is unknown"),
    ({'functions': ('tests.test_rewards:weighs',), 'options': {'tests.test_rewards:weighs': {'fctor': 3}}},
     "config key 'rewards.options.tests.test_rewards:weighs.fctor' is unknown: no option of 'tests.test_rewards:weighs'; it has factor"),
    ({'functions': ('tests.test_rewards:weighs',), 'options': {'tests.test_rewards:weighs': {'max_completion_length': 3}}},
     "config key 'rewards.options.tests.test_rewards:weighs.max_completion_length' is unknown"),
    ({'functions': ('overlong',), 'options': {'overlong': {'buffer': 99}}}, 'buffer'),
    ({'functions': ('language',), 'options': {'language': {'language': 'klingon'}}}, 'klingon'),
    ({'functions': ('helpfull',)}, f"'helpfull' is none of {', '.join(REWARDS)}, helpful, and no 'module:function'"),
    ({'functions': ('helpful',), 'options': {'helpful': {'k': 2}}},
     "config key 'rewards.options.helpful': it has no options; its keys are those of roles.reward.helpful"),
    ({'functions': ('format',), 'combinations': {'format': {}}}, "config key 'rewards.combinations.format': a rule reward has that name"),
  ],
)  # fmt: skip
def test_check_rewards(settings, wanted):
  """Failure: a mistake in the rewards section is found in the middle of a run, or does not name its key."""
  with pytest.raises(ConfigError) as caught:
    rewards.check_rewards(Rewards(**settings), 16, ['helpful'])
  assert wanted in str(caught.value)


def test_check_rewards_accepts():
  """Failure: a section that works is refused."""
  rewards.check_rewards(Rewards(), 16)
  names = (*REWARDS, 'tests.test_rewards:weighs')
  rewards.check_rewards(Rewards(names, options={'tests.test_rewards:weighs': {'factor': 3}, 'accuracy': {}}), 16)
  both = Rewards(('both', 'helpful', 'accuracy'), combinations={'both': {}}, options={'accuracy': {}})
  rewards.check_rewards(both, 16, ['helpful', 'safe'])


def test_one_reward_for_a_mixture_of_tasks():
  """Failure: rows of several tasks in a batch are graded by each other's columns."""
  texts = [
    '<answer>(7-3)*5</answer>',
    '<answer>5</answer>',
    '<answer>(B)</answer>',
    r'\boxed{\frac{2\pi}{4}}',
    '<answer>b, a</answer>',
    '5',
  ]
  columns = {
    'numbers': [[3, 5, 7], None, None, None, None, None], 'target': [20, None, None, None, None, None],
    'answer': [None, '5', 'B', r'\frac{\pi}{2}', 'a, b', None], 'answer_kind': [None, 'number', None, 'math', 'set', None],
  }  # fmt: skip
  assert reward('accuracy', texts, **columns) == [1, 1, 1, 1, 1, None]
  order = [3, 5, 0, 4, 2, 1]
  moved = {k: [v[i] for i in order] for k, v in columns.items()}
  assert reward('accuracy', [texts[i] for i in order], **moved) == [1, None, 1, 1, 1, 1]
  wrong = {**columns, 'answer': [None, '6', 'C', r'\frac{\pi}{3}', 'a, c', None], 'target': [21] + [None] * 5}
  assert reward('accuracy', texts, **wrong) == [0, 0, 0, 0, 0, None]


def test_code_in_a_mixture(monkeypatch):
  """Failure: rows with tests are graded by their answer column, or the code reward gets other rows' columns."""
  seen = []

  def code_binary(prompts, completions, completion_ids=None, *, unsafe, **columns):
    assert unsafe is False
    seen.append((list(prompts), list(completions), columns))
    return [0.0, None]

  monkeypatch.setattr(rule_rewards, 'code_binary', code_binary)
  tests = [None, ['assert f(1)'], None, ['assert f(2)']]
  found = REWARDS['accuracy'](list('abcd'), ['5', 'f=1', '6', 'f=2'], answer=['5', '5', '5', None], tests=tests, unsafe=[1] * 4)
  assert found == [1.0, 0.0, 0.0, None]
  assert seen == [(['', ''], ['f=1', 'f=2'], {'answer': ['5', None], 'tests': [['assert f(1)'], ['assert f(2)']]})]


def test_unknown_kind_of_answer():
  """Failure: a misspelt answer_kind is graded by some other rule."""
  with pytest.raises(RewardError, match=r"'accuracy' failed on row 1.*column 'answer_kind': 'maths' is none of number"):
    rewards.score(['accuracy'], 'raise', ['q'] * 2, ['5', '5'], [[1]] * 2, {'answer': ['5', '5'], 'answer_kind': [None, 'maths']})


def test_routes(where):
  """Failure: a function is called on rows that are none of its business, a value lands in another row, or a crash is told of another."""
  mixture = {name: {'task': 'dataset'} for name in ('math', 'chat')}
  names = ['tests.test_rewards:by_length', 'tests.test_rewards:crashes_on_bad']
  settings = {'data': {'mixture': mixture}, 'rewards': {'functions': names, 'only': {names[1]: ('chat',)}}}
  columns = {'dataset': ['chat', 'math', 'chat', 'math', None], 'bonus': [0, 1, 2, 3, 4]}
  texts = ['a', 'bad', 'ccc', 'bad', 'bad']

  def scores(settings, texts, on_error='raise'):
    routes = rewards.routes(config.resolve(settings), columns, 5)
    return rewards.score(names, on_error, ['q'] * 5, texts, [[1]] * 5, columns, routes=routes, **where)

  values, has, failed = scores(settings, texts)
  alone = rewards.score(names[1:], 'raise', ['q'] * 2, ['a', 'ccc'], [[1]] * 2, {'bonus': [0, 2]}, **where)
  assert has.tolist() == [[True, chat] for chat in (True, False, True, False, False)] and not failed.any()
  assert values[:, 0].tolist() == [1, 3, 3, 3, 3] and values[[0, 2], 1].tolist() == alone.values_NR[:, 0].tolist()
  with pytest.raises(RewardError, match='failed on row 2: '):
    scores(settings, ['a', 'b', 'bad', 'b', 'b'])
  _, has, failed = scores(settings, ['a', 'b', 'bad', 'b', 'b'], 'none')
  assert failed.tolist() == [[False, n == 2] for n in range(5)] and has[:, 1].tolist() == [True] + [False] * 4
  assert rewards.routes(config.resolve({'rewards': {'only': {'accuracy': ('chat',)}}}), columns, 5) == {}
  nobody = {**settings, 'data': {'mixture': {**mixture, 'none': {'task': 'dataset'}}}}
  nobody['rewards'] = {**settings['rewards'], 'only': {names[1]: ('none',)}}
  values, has, _ = scores(nobody, texts)  # of no row: it is not called at all
  assert not has[:, 1].any() and has[:, 0].all()


def test_mixed():
  """Failure: one language passes as several, several as one, or signs and what stands outside of the thinking count."""
  texts = ['then2+2=4;то4-1=3', 'then2+2=4', 'то4-1=3', '2+2=4', '']
  completions = [f'<think>{text}</think><answer>то, then</answer>' for text in texts]
  assert REWARDS['mixed'](prompts=['q'] * 5, completions=completions) == [1.0, 0.0, 0.0, 0.0, 0.0]
