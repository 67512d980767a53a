"""The table of a pipeline over its seeds: numbers are those of the stage, the evaluator and the seed that they stand under."""

import json
import re

import pytest

from launch import stages_report
from launch.sweep_report import t_quantile


def make_run(root, seed):
  def entry(*values):
    return {'evaluators': {'greedy': {'accuracy': values[0], 'note': 'text'}, 'samples': {'pass@8': values[1]}}, 'wall_s': 3.0}

  stages = {
    'base': entry(0.1 + seed / 10, 0.5), 'data': {'evaluators': {}, 'rows': 7, 'seconds': 2.0},
    'rl': entry(0.6 + seed / 10, 0.5 + seed / 10),
    'rl_free': entry(0.5, 0.5),
  }  # fmt: skip
  root.mkdir()
  (root / 'summary.json').write_text(json.dumps({**stages, 'final': stages['rl_free']}))
  return str(root)


METRICS = '--metrics=greedy/accuracy,samples/pass@8'


def test_report(tmp_path, capsys):
  """Failure: a number of another stage, evaluator or seed, a stage without evaluation in the table, or an unpaired difference."""
  runs = [make_run(tmp_path / str(seed), seed) for seed in range(3)]
  assert stages_report.main([*runs, METRICS, '--compare=rl:base,rl:rl_free', f'--out={tmp_path}/out/it.json']) == 0
  told = json.loads((tmp_path / 'out' / 'it.json').read_text())
  assert list(told['stages']) == ['base', 'rl', 'rl_free'] and told['seconds']['data'] == [2.0] * 3
  half = t_quantile(2) * 0.1 / 3**0.5
  assert told['stages']['rl']['greedy/accuracy'] == pytest.approx({'n': 3, 'mean': 0.7, 'interval': half, 'min': 0.6, 'max': 0.8})
  assert told['differences']['rl - base']['greedy/accuracy'] == pytest.approx(
    {'n': 3, 'mean': 0.5, 'interval': 0, 'min': 0.5, 'max': 0.5}
  )
  assert told['differences']['rl - rl_free']['samples/pass@8']['mean'] == pytest.approx(0.1)
  out = capsys.readouterr().out
  assert '| rl | 0.70 ± 0.25 | 0.60 ± 0.25 |' in out and '| base | 0.20 ± 0.25 | 0.5 ± 0 |' in out and 'data' not in out


@pytest.mark.parametrize(
  'flags,wanted',
  [
    (['--metrics=greedy/strict'], "no stage of .* has 'greedy/strict'"),
    (['--metrics=greedy/note'], "no stage of .* has 'greedy/note'"),
    ([METRICS, '--compare=rl:data'], "no stage 'data' was evaluated; there are base, rl, rl_free"),
    ([METRICS, '--compare=rl'], 'write A:B,C:D'),
    ([], '--metrics'),
    ([METRICS, '--seeds=3'], 'unrecognized arguments: --seeds=3'),
  ],
  ids=str,
)
def test_refused(tmp_path, capsys, flags, wanted):
  """Failure: a table of nothing, or a flag that does nothing, is taken for a result."""
  assert stages_report.main([make_run(tmp_path / '0', 0), f'--out={tmp_path}/it.json', *flags]) == 2
  assert re.search(wanted, capsys.readouterr().err)
  assert not (tmp_path / 'it.json').exists()


def test_runs_of_two_pipelines(tmp_path, capsys):
  """Failure: seeds of different pipelines are averaged."""
  runs = [make_run(tmp_path / str(seed), seed) for seed in range(2)]
  (tmp_path / '1' / 'summary.json').write_text('{"base": {}}')
  assert stages_report.main([*runs, METRICS, f'--out={tmp_path}/it.json']) == 2
  assert 'other stages than' in capsys.readouterr().err
