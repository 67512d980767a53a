"""The report of configs/rlhf_nano.py: what stands in the table and the figure is what the runs say."""

import json

import pytest

from launch import rlhf_report

STAGES = ('sft', 'rm', 'ppo', 'grpo_ensemble', 'dpo')
COURSE = {0: (2.0, -1.0, 0.0), 4: (3.0, 0.5, 1.0), 8: (1.0, 2.0, 4.0)}  # step -> gold, proxy, KL


def make_run(root, seed, shift=0.0):
  for name in STAGES:
    (root / name).mkdir(parents=True)
    (root / name / 'summary.json').write_text(json.dumps({'seed': seed}))
    lines = []
    for step, (gold, proxy, kl) in COURSE.items() if name not in ('sft', 'rm') else ():
      numbers = {'rewards/gold_reviews': gold + shift, 'rewards/proxy': proxy, 'kl': kl}
      lines.append(json.dumps({'step': step, 'evaluators': {'samples': numbers}}))
    (root / name / 'eval.jsonl').write_text('\n'.join(lines))
  entries = {
    name: {'evaluators': {'held_out': {'accuracy': 0.9 + shift / 100}} if name == 'rm' else {}, 'wall_s': 10.4} for name in STAGES
  }
  (root / 'summary.json').write_text(json.dumps({**entries, 'final': entries['dpo']}))
  return str(root)


def test_report(tmp_path, capsys):
  """Failure: the table shows the number of another seed or step, the best gold is not that of the way, or a stage is left out."""
  runs = [make_run(tmp_path / str(seed), seed, shift) for seed, shift in ((5, 0.0), (6, 1.0))]
  assert rlhf_report.main([*runs, f'--out={tmp_path}/out/nano']) == 0
  lines = [
    [cell.strip() for cell in line.split('|')[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith('|')
  ]
  assert lines[2] == ['sft (start)', '2.50 (2.00 to 3.00)', '-1.00 (-1.00 to -1.00)', '0.00 (0.00 to 0.00)', '', '']
  for line, name in zip(lines[3:], ('ppo', 'grpo_ensemble', 'dpo'), strict=True):
    gold, best = ('1.50 (1.00 to 2.00)', '3.50 (3.00 to 4.00)')
    assert line == [name, gold, '2.00 (2.00 to 2.00)', '4.00 (4.00 to 4.00)', best, '1.00 (1.00 to 1.00)']
  found = json.loads((tmp_path / 'out' / 'nano.json').read_text())
  assert found['seeds'] == [5, 6] and found['seconds'] == [52, 52] and found['reward_model_accuracy'] == {'rm': [0.9, 0.91]}
  assert found['curves']['ppo'][1] == [{'step': s, 'gold': g + 1, 'proxy': p, 'kl': k} for s, (g, p, k) in COURSE.items()]
  assert (tmp_path / 'out' / 'nano.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
  'spoil,wanted',
  [
    (lambda run: (run / 'summary.json').unlink(), 'summary.json: no such file: is the pipeline at its end?'),
    (lambda run: (run / 'ppo' / 'eval.jsonl').write_text('{"step": 1'), 'eval.jsonl: damaged'),
    (lambda run: (run / 'summary.json').write_text('{"sft": {}}'), 'other stages than'),
  ],
  ids=['unfinished', 'damaged', 'another pipeline'],
)
def test_bad_workdirs(tmp_path, capsys, spoil, wanted):
  """Failure: a report is made of half a run, or of runs that are not comparable."""
  runs = [make_run(tmp_path / str(seed), seed) for seed in (0, 1)]
  spoil(tmp_path / '1')
  assert rlhf_report.main([*runs, f'--out={tmp_path}/nano']) == 2
  assert wanted in capsys.readouterr().err and not (tmp_path / 'nano.json').exists()


@pytest.mark.parametrize(
  'argv', [[], ['DIR'], ['DIR', '--out=a', '--out=b'], ['--out=a'], ['DIR', '--out=a', '--seed=1']], ids=str
)
def test_command_line(argv, capsys):
  """Failure: a flag is passed over in silence."""
  assert rlhf_report.main(argv) == 2
  assert capsys.readouterr().err.startswith('error: ')
