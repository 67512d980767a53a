"""Win rates: what is counted, what length is worth, and which files cannot be compared."""

import json
import math

import numpy as np
import pytest

from rl_reasoning import win_rate
from rl_reasoning.config import ConfigError
from rl_reasoning.estimates import bootstrap_interval


def sample(problem, reward, length=5, **other):
  return {'problem': problem, 'prompt': f'p{problem}', 'completion': 'c', 'length': length, 'rewards': {'judge': reward}} | other


def write(path, samples):
  path.write_text(''.join(json.dumps(s) + '\n' for s in samples))
  return str(path)


def of(tmp_path, a, b):
  """The result for samples (reward, length) of one completion a problem."""
  a, b = ([sample(n, *x) for n, x in enumerate(side)] for side in (a, b))
  return win_rate.win_rate(write(tmp_path / 'a.jsonl', a), write(tmp_path / 'b.jsonl', b), 'judge')


def logit(p):
  return math.log(p / (1 - p))


def test_counts(tmp_path):
  """Failure: a tie is no half, a problem with more samples weighs more, or comparisons without a verdict count as lost."""
  a = [sample(4, 1.0), sample(4, 3.0, 9), sample(7, 0.5), sample(9, None), sample(8, 2.0), sample(8, None)]
  b = [sample(7, 0.5), sample(9, 1.0), sample(4, 2.0, 1), sample(4, 1.0, 1), sample(8, 9.0)]
  result = win_rate.win_rate(write(tmp_path / 'a.jsonl', a), write(tmp_path / 'b.jsonl', b), 'judge')
  # Problem 4: 1 loses and ties, 3 wins twice: 2.5 of 4; problem 7: a tie; problem 8: lost; problem 9: nothing said.
  assert result['win_rate'] == pytest.approx((0.625 + 0.5 + 0) / 3) and result['ties'] == pytest.approx((0.25 + 1) / 3)
  assert (result['problems'], result['comparisons'], result['no_verdict']) == (3, 6, 2)
  assert result['length_a'] == pytest.approx(34 / 6) and result['length_b'] == pytest.approx(17 / 5)
  assert result['win_rate_ci95'] == bootstrap_interval([0.625, 0.5, 0])


def test_length_controlled_in_closed_form(tmp_path, monkeypatch):
  """Failure: the regression is not AlpacaEval's (sign, tanh, the standard deviation, the intercept), or does not converge."""
  monkeypatch.setattr(win_rate, 'RIDGE', 1e-7)
  # A is 6 tokens longer in half of the problems and wins 9 of 10 of them, and 6 shorter in the others, of which it wins 3 of 10.
  a = [(float(n % 10 < (9 if n < 20 else 3)), 10 if n < 20 else 4) for n in range(40)]
  b = [(0.5, 4 if n < 20 else 10) for n in range(40)]
  result = of(tmp_path, a, b)
  assert result['win_rate'] == pytest.approx(0.6)
  theta, phi = (logit(0.9) + logit(0.3)) / 2, (logit(0.9) - logit(0.3)) / 2 / math.tanh(1)
  assert result['length_controlled_win_rate'] == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-7)
  assert result['length_coefficient'] == pytest.approx(phi, abs=1e-6)


def test_fit_is_the_minimum():
  """Failure: Newton stops elsewhere than at the minimum of the penalised loss, with ties, unequal weights or separable data."""
  rng = np.random.default_rng(0)
  x = np.tanh(rng.normal(size=60))
  for win in (rng.choice([0, 0.5, 1], 60), (x > 0.1).astype(float)):
    weight = rng.choice([0.0, 0.25, 1, 2], (3, 60))
    for w, (theta, phi) in zip(weight, win_rate.fit(x, win, weight), strict=True):
      p = 1 / (1 + np.exp(-(theta + phi * x)))
      assert abs((w * (p - win)).sum()) < 1e-7 and abs((w * (p - win) * x).sum() + win_rate.RIDGE * phi) < 1e-7


def test_length_is_taken_out(tmp_path):
  """Failure: a judge that pays length alone still shows a winner, or a real advantage is taken out with it."""
  rng = np.random.default_rng(1)
  length_a, length_b = rng.integers(10, 40, 300).tolist(), rng.integers(5, 30, 300).tolist()
  noise = rng.normal(0, 4, (2, 300))
  for bonus, low, high in ((0, 0.4, 0.6), (9, 0.75, 0.97)):
    a = [(n + bonus + float(e), n) for n, e in zip(length_a, noise[0], strict=True)]
    b = [(n + float(e), n) for n, e in zip(length_b, noise[1], strict=True)]
    result = of(tmp_path, a, b)
    assert result['win_rate'] > 0.65 and result['length_coefficient'] > 2
    assert low < result['length_controlled_win_rate'] < high
    first, last = result['length_controlled_win_rate_ci95']
    assert first < result['length_controlled_win_rate'] < last and 0.02 < last - first < 0.3


def test_symmetry_and_equal_lengths(tmp_path):
  """Failure: A against B and B against A do not add up to 1, or lengths that are equal change the rate or its interval."""
  rng = np.random.default_rng(2)
  a, b = ([(float(r), int(n)) for r, n in zip(rng.integers(0, 4, 90), rng.integers(3, 30, 90), strict=True)] for _ in range(2))
  one, other = of(tmp_path, a, b), of(tmp_path, b, a)
  assert one['win_rate'] + other['win_rate'] == pytest.approx(1)
  assert one['length_controlled_win_rate'] + other['length_controlled_win_rate'] == pytest.approx(1, abs=1e-9)
  assert one['length_coefficient'] == pytest.approx(other['length_coefficient'], abs=1e-9)
  same = of(tmp_path, [(r, 7) for r, _ in a], [(r, 7) for r, _ in b])
  assert same['length_controlled_win_rate'] == pytest.approx(same['win_rate'] + 0.0, abs=1e-9)
  assert same['length_controlled_win_rate_ci95'] == pytest.approx(same['win_rate_ci95'], abs=0.03)


@pytest.mark.parametrize('reward,rate', [(2.0, 1.0), (0.0, 0.0), (1.0, 0.5)])
def test_all_alike(tmp_path, reward, rate):
  """Failure: a policy that always wins, loses or ties gets NaN or a rate that the penalty has drawn towards one half."""
  result = of(tmp_path, [(reward, n) for n in range(7)], [(1.0, 3)] * 7)
  assert result['win_rate'] == rate and result['length_controlled_win_rate'] == pytest.approx(rate, abs=1e-9)
  assert result['length_controlled_win_rate_ci95'] == pytest.approx([rate, rate], abs=1e-9)
  assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize(
  'a,b,message',
  [
    ([sample(0, 1.0)], [], r'b\.jsonl: holds no samples'),
    ([sample(0, 1.0)], None, r'b\.jsonl: no such file'),
    ([sample(0, 1.0), sample(1, 1.0)], [sample(0, 1.0)], r'b\.jsonl: lacks 1 of the problems, the first is problem \[1\]'),
    ([sample(0, 1.0)], [sample(0, 1.0), sample(2, 1.0)], r'a\.jsonl: lacks 1 of the problems, the first is problem \[2\]'),
    ([sample(0, 1.0)], [sample(0, 1.0, prompt='q')], r'problem 0 has different prompts'),
    ([sample(0, 1.0), sample(1, 1.0, rewards={'format': 1.0})], [], r"a\.jsonl:2: no reward 'judge'; it has format"),
    ([{'step': 3}], [], r'a\.jsonl:1: no problem: not a sample of an evaluation'),
    ([sample(0, 1.0), sample(0, float('nan'))], [], r"a\.jsonl:2: reward 'judge' is nan, no finite number"),
    ([sample(0, 'won')], [], r"a\.jsonl:1: reward 'judge' is 'won', no finite number"),
    ([sample(0, 1.0, rewards=None)], [], r'a\.jsonl:1: rewards is NoneType: not a sample'),
    ([sample(0, 1.0, prompt=[])], [], r'a\.jsonl:1: prompt is list: not a sample'),
    ([sample(0, None)], [sample(0, 1.0)], r"reward 'judge' gave no verdict"),
  ],
)
def test_what_cannot_be_compared(tmp_path, a, b, message):
  """Failure: files that do not belong together give a number, or the error does not name file and line."""
  files = write(tmp_path / 'a.jsonl', a), str(tmp_path / 'b.jsonl')
  if b is not None:
    write(tmp_path / 'b.jsonl', b)
  with pytest.raises(ConfigError, match=message):
    win_rate.win_rate(*files, 'judge')


def test_command(tmp_path, capsys):
  """Failure: the command prints or writes other numbers, takes a flag that it does not know, or fails with a traceback."""
  files = [write(tmp_path / f'{name}.jsonl', [sample(n, r) for n in range(3)]) for name, r in (('a', 2.0), ('b', 1.0))]
  out = tmp_path / 'rates.json'
  assert win_rate.main([*files, '--judge=judge', f'--out={out}']) == 0
  assert json.loads(out.read_text()) == win_rate.win_rate(*files, 'judge')
  assert '1.000 [1.000, 1.000]' in capsys.readouterr().out
  wrong = (([files[0], '--judge=judge'], 'B.jsonl'), (files, '--judge'), ([*files, '--judge=judge', '--seed=1'], '--seed'),
           ([*files, '--judge=judge', f'--out={tmp_path}/no/x.json'], 'no folder'),
           ([*files, '--judge=judge', f'--out={tmp_path}'], 'itself'))  # fmt: skip
  for arguments, message in wrong:
    assert win_rate.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith('error: ') and told.count('\n') == 1
