"""Sweeps: entries and their order, runs that are skipped, resumed or fail alone, and the numbers of the report."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest
from scipy import stats

from launch import sweep, sweep_entries, sweep_report
from rl_reasoning import preemption
from rl_reasoning.config import ConfigError, product

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
def get_config(size=16, start=''):
  return {'data': {'batch_size': size}, 'roles': {'policy': {'init': start}}, 'eval': {'every': 1, 'evaluators': {'greedy': {}}}}

"""


@pytest.fixture
def file(tmp_path):
  """Text of sweep's return value -> path of a config file."""

  def write(entries: str, more: str = '') -> str:
    (tmp_path / 'c.py').write_text(f'{CONFIG}def sweep(base):\n  return {entries}\n{more}')
    return str(tmp_path / 'c.py')

  return write


def refusal(call, *arguments) -> str:
  with pytest.raises(ConfigError) as caught:
    call(*arguments)
  return str(caught.value)


def test_names():
  """Failure: an entry's folder has another name than people are told, or two entries get one."""
  found = sweep_entries.config_lib.entry_name
  assert found({'objective.name': 'grpo'}) == 'grpo'
  assert found({'objective.name': 'dapo', 'optim.learning_rate': 1e-4}) == 'dapo-learning_rate=0.0001'
  assert found({'rewards.functions': ('accuracy', 'my:f'), 'arguments': {'stage': 'a/b'}}) == 'stage=a_b-functions=accuracy_my_f'
  assert found({'name': 'x', 'seed': 1}) == 'x' and found({}) == 'default'


def test_product():
  """Failure: a combination is missing, twice, or loses a key of its parts; or one part silently wins over another."""
  a = [{'objective.name': 'grpo'}, {'name': 'd', 'objective.name': 'dapo', 'report': False, 'arguments': {'x': 1}}]
  b = [{'optim.learning_rate': 1e-4}, {'optim.learning_rate': 3e-4, 'arguments': {'y': 2}}]
  assert product(a, b) == [
    {'name': 'grpo-learning_rate=0.0001', 'objective.name': 'grpo', 'optim.learning_rate': 1e-4},
    {'name': 'grpo-y=2-learning_rate=0.0003', 'objective.name': 'grpo', 'optim.learning_rate': 3e-4, 'arguments': {'y': 2}},
    {'name': 'd-learning_rate=0.0001', 'objective.name': 'dapo', 'optim.learning_rate': 1e-4, 'report': False, 'arguments': {'x': 1}},
    {'name': 'd-y=2-learning_rate=0.0003', 'objective.name': 'dapo', 'optim.learning_rate': 3e-4, 'report': False,
     'arguments': {'x': 1, 'y': 2}},
  ]  # fmt: skip
  assert len(product(b, [{'eval.size': n} for n in (1, 2, 3)], [{'data.task': 't'}])) == 6
  assert "'eval.size' is set by two" in refusal(product, [{'eval.size': 1}], [{'eval.size': 1}])
  assert 'argument x is set by two' in refusal(product, [{'arguments': {'x': 1}}], [{'arguments': {'x': 2}}])


def test_expansion(file):
  """Failure: a run is another one than its entry, its arguments and its seed say, or its command line says something else again."""
  path = file("""[
    {'name': 'base', 'report': False},
    {'name': 'rl', 'arguments': {'start': '{workdir}/base/seed{seed}'}, 'objective': {'name': 'grpo', 'beta': 0.5}, 'data.task': '3'},
  ]""")
  got = sweep_entries.read_sweep(f'{path}:size=8', [4, 7])
  assert list(got.runs) == [('base', 4), ('rl', 4), ('base', 7), ('rl', 7)]  # seed by seed
  assert got.order == ('base', 'rl') and got.reported == ('rl',) and got.metrics == ('eval/greedy/accuracy',)
  run = got.runs['rl', 7]
  assert run.settings['data'] == {'batch_size': 8, 'task': '3'} and run.settings['seed'] == 7
  assert run.settings['objective'] == {'name': 'grpo', 'beta': 0.5} and run.needs == {('base', 7)}
  assert run.command('my runs') == [
    sys.executable, '-m', 'rl_reasoning.train', f'--config={path}:size=8,start={{workdir}}/base/seed{{seed}}',
    '--config.roles.policy.init=my runs/base/seed7', "--config.objective={'name': 'grpo', 'beta': 0.5}", "--config.data.task='3'",
    '--config.seed=7', '--workdir=my runs/rl/seed7',
  ]  # fmt: skip
  assert got.runs['base', 4].needs == frozenset()


def test_seed_as_an_argument(tmp_path):
  """Failure: a get_config that makes its own use of the seed does not get it, or gets it twice."""
  (tmp_path / 'c.py').write_text(
    'def get_config(seed):\n  return {"seed": seed + 1000}\n'
    'def sweep(base):\n  return [{"total_steps": base["seed"]}, {"total_steps": 3}]\n'
    'REPORT = ["loss", "rewards/accuracy/mean", "loss"]\n'
  )
  got = sweep_entries.read_sweep(str(tmp_path / 'c.py'), [5, 6])
  run = got.runs['total_steps=1005', 6]
  assert run.settings == {'seed': 1006, 'total_steps': 1005} and got.metrics == ('loss', 'rewards/accuracy/mean')
  assert run.flags('w') == [f'--config={tmp_path}/c.py:seed=6', '--config.total_steps=1005']


@pytest.mark.parametrize(
  'entries, wanted',
  [
    ('3', 'sweep returns 3, not a list of dicts'), ('[]', 'sweep returns [], not a list'), ('[3]', '3 is no dict of overrides'),
    ('[{3: 4}]', '{3: 4} is no dict of overrides'), ('base.x', "c.py:6: AttributeError: 'dict' object has no attribute 'x'"),
    ("[{'name': 'a/b'}]", "'a/b' cannot name an entry"), ("[{'name': 3}]", '3 cannot name an entry'),
    ("[{'name': 'a,b'}]", "'a,b' cannot name an entry"), ("[{'name': '..'}]", "'..' cannot name an entry"),
    ("[{'eval.size': 1, 'name': 'a'}, {'name': 'a'}]", "two entries are called 'a'"),
    ("[{'arguments': 3}]", 'arguments 3 are no dict'), ("[{'arguments': {'sise': 3}}]", "unexpected keyword argument 'sise'"),
    ("[{'arguments': {'start': 'a,b'}}]", 'argument start=a,b: a comma'), ("[{'seed': 3}]", 'seeds are given by --seeds'),
    ("[{'arguments': {'seed': 3}}]", 'seeds are given by --seeds'), ("[{'report': 0}]", 'report is 0, not True or False'),
    ("[{'name': 'a', 'optim.learning_rat': 1.0}]", "entry 'a', seed 0: config key 'optim.learning_rat' is unknown"),
    ("[{'optim.learning_rate': 'x'}]", "'optim.learning_rate': 'x' is not of type float"),
    ("[{'optim.learning_rate': float('nan')}]", "'optim.learning_rate': nan cannot be written on a command line"),
    ("[{'name': 'a'}, {'name': 'b', 'data.batch_size': 16}]", "entries 'a' and 'b' set the same"),
    ("[{'roles.policy.init': '{workdir}/base'}]", "'{workdir}/base': write {workdir}/NAME/seed{seed}"),
    ("[{'name': 'a', 'roles.policy.init': '{workdir}/b/seed{seed}'}]", "entry 'a' needs 'b', which is no entry; there are a"),
    ("[{'name': 'a'}, {'name': 'b', 'data.path': '{workdir}/a/seed3'}]", "needs seed 3 of 'a', which is not among --seeds"),
    ("[{'name': 'a', 'data.path': '{workdir}/a/seed{seed}'}]", 'in a circle: a needs a'),
    ("[{'name': 'a', 'data.path': '{workdir}/b/seed{seed}'}, {'name': 'b', 'data.path': '{workdir}/a/seed{seed}'}]", 'in a circle'),
  ],
)  # fmt: skip
def test_refused_sweeps(file, entries, wanted):
  """Failure: a mistake in a sweep is found by a run, hours later, or told without the entry, the key or the line."""
  assert wanted in refusal(sweep_entries.read_sweep, file(entries), [0])


@pytest.mark.parametrize(
  'text, wanted',
  [
    ('def get_config():\n  return {}\n', 'c.py: defines no sweep(base)'),
    ('def get_config():\n  return {"stages": {}}\ndef sweep(base):\n  return [{}]\n', 'c.py is a pipeline config'),
    ('def get_config(seed):\n  return {}\ndef sweep(base):\n  return [{}]\n', 'takes a seed and returns the same for 0 and 1'),
    (CONFIG + 'def sweep(base):\n  return [{}]\nREPORT = "loss"\n', "REPORT is 'loss', not a list"),
    (
      CONFIG + 'def sweep(base):\n  return [{"name": "a"}]\nCOMPARE = [("a", "b")]\n',
      'not a list of pairs of reported entries: a',
    ),
    (CONFIG + 'def sweep(base):\n  return [{}]\nREPORT = ["eval/gredy/accuracy"]\n', 'of an evaluator here: greedy'),
  ],
)
def test_refused_files(tmp_path, text, wanted):
  """Failure: a file that cannot be swept, or a report of nothing, is found after the runs."""
  (tmp_path / 'c.py').write_text(text)
  assert wanted in refusal(sweep_entries.read_sweep, str(tmp_path / 'c.py'), [0, 1])


@pytest.mark.parametrize(
  'flags, wanted',
  [
    (['--seeds=0,x'], '--seeds=0,x: write whole numbers'), (['--seeds=0,0'], 'a seed is given twice'), (['--seeds='], 'whole numbers'),
    (['--jobs=0'], '--jobs=0: at least one'), (['--only=b'], '--only=b: no such entry; there are a'), (['--sed=1'], '--sed=1'),
    (['--workdir=gs://x'], 'a local folder is needed'), (['--report', '--dry-run'], 'one of them'),
    (['--jobs=x'], "invalid int value: 'x'"),
    (['--report'], 'nothing to report, no run is finished'), (['--config=c.py:seed=1'], "no file 'c.py'"), (['--config='], "no file ''"),
  ],
)  # fmt: skip
def test_command_line(file, tmp_path, capsys, flags, wanted):
  """Failure: a mistake on the command line is a traceback, has another exit code than 2, or leaves files."""
  defaults = {'--config': file("[{'name': 'a'}]"), '--workdir': str(tmp_path / 'w'), '--seeds': '0'}
  given = [f'{key}={value}' for key, value in defaults.items() if not any(flag.startswith(key + '=') for flag in flags)]
  try:
    code = sweep.main([*given, *flags])
  except SystemExit as stopped:
    code = stopped.code
  assert code == 2 and wanted in capsys.readouterr().err and not (tmp_path / 'w').exists()


def test_select(file):
  """Failure: --only leaves out what an entry starts from, or runs what nobody asked for."""
  got = sweep_entries.read_sweep(
    file("""[{'name': 'rl', 'roles.policy.init': '{workdir}/more/seed{seed}'}, {'name': 'base', 'eval.size': 1},
    {'name': 'more', 'roles.policy.init': '{workdir}/base/seed0'}, {'name': 'x', 'eval.size': 2}]"""),
    [0, 1],
  )
  assert [run.key for run in sweep_entries.select(got, ['more'])] == [('base', 0), ('more', 0), ('more', 1)]
  assert [run.name for run in sweep_entries.select(got, ['rl'])] == ['rl', 'base', 'more', 'rl', 'more']
  assert sweep_entries.select(got, []) == list(got.runs.values()) and got.order.index('base') < got.order.index('more')


# Processes, without training: a run is a Python program of a line.


FOUR = """[{'name': 'rl', 'roles.policy.init': '{workdir}/base/seed{seed}'}, {'name': 'base', 'eval.size': 1},
  {'name': 'last', 'data.path': '{workdir}/rl/seed{seed}'}, {'name': 'other', 'eval.size': 2}]"""
DONE = 'import pathlib, sys, time; f = pathlib.Path(sys.argv[1]); f.mkdir(parents=True); (f / "summary.json").write_text("{}")'


@pytest.fixture
def programs(monkeypatch):
  """{'NAME seed S': program}; the others end well at once."""
  chosen: dict[str, str] = {}

  def command(self, workdir):
    return [sys.executable, '-c', chosen.get(str(self), DONE), str(self.folder(workdir))]

  monkeypatch.setattr(sweep_entries.Run, 'command', command)
  return chosen


def run_all(path: str, workdir, jobs: int = 1, seeds=(0, 1)) -> dict:
  runs = list(sweep_entries.read_sweep(path, list(seeds)).runs.values())
  with sweep.locked(str(workdir)) as lock:
    return sweep.run_all(runs, str(workdir), jobs, lock)


@pytest.mark.parametrize('jobs', [1, 2])  # two are pinned to cores of their own, where there are as many
def test_order(file, tmp_path, programs, capsys, jobs):
  """Failure: a run starts before what it needs is done, or does not say how to run it alone."""
  for seed in (0, 1):
    slow = f'{DONE}; time.sleep(0.3)' if jobs == 1 else DONE.replace('; f.mkdir', '; time.sleep(0.3); f.mkdir')
    needy = 'import os; assert os.path.exists(sys.argv[1].replace({!r}, {!r}) + "/summary.json"); '
    programs[f'base seed {seed}'] = slow
    programs[f'rl seed {seed}'] = DONE.replace('f =', needy.format('/rl/', '/base/') + 'f =')
    programs[f'last seed {seed}'] = DONE.replace('f =', needy.format('/last/', '/rl/') + 'f =')
  assert run_all(file(FOUR), tmp_path / 'w', jobs) == {}
  text = capsys.readouterr().out
  assert text.count(': done in') == 8 and '[8/8]' in text
  if jobs == 1:
    started = [line.split('] ')[1].split(':')[0] for line in text.splitlines() if line.startswith('[')]
    assert started == [f'{name} seed {seed}' for seed in (0, 1) for name in ('base', 'rl', 'last', 'other')]
  assert (tmp_path / 'w/rl/seed0.log').read_text().startswith(f'$ {sys.executable} -c ')
  record = json.loads((tmp_path / 'w/rl/seed0.json').read_text())
  assert record['settings']['roles'] == {'policy': {'init': '{workdir}/base/seed{seed}'}} and len(record['starts']) == 1


def test_failures_stay_alone(file, tmp_path, programs, capsys):
  """Failure: one bad run stops the sweep, takes with it what does not need it, or is counted as a result; or its reason is lost."""
  programs['base seed 0'] = 'import sys; print("error: of mine"); sys.exit(2)'
  programs['base seed 1'] = 'import os; os.kill(os.getpid(), 9)'
  programs['other seed 0'] = 'import sys; sys.exit(3)'
  programs['other seed 1'] = 'pass'
  failed = run_all(file(FOUR), tmp_path / 'w', seeds=(0, 1, 2))
  assert failed.pop(('base', 0)) == "exit code 2 (the user's error): error: of mine"
  assert failed.pop(('base', 1)).startswith('killed by signal 9')
  assert failed.pop(('other', 0)).startswith('exit code 3 (diverged)')
  assert failed.pop(('other', 1)) == 'exit code 0, but no summary.json'
  assert failed == {(n, s): f'needs {of} seed {s}' for n, of in (('rl', 'base'), ('last', 'rl')) for s in (0, 1)}
  assert all((tmp_path / f'w/{name}/seed2/summary.json').exists() for name in ('base', 'rl', 'last', 'other'))
  text = capsys.readouterr().out
  assert 'rl seed 0: skipped: needs base seed 0, which failed' in text and 'other seed 0: failed after' in text
  programs.clear()
  assert run_all(file(FOUR), tmp_path / 'w', seeds=(0, 1, 2)) == {}
  text = capsys.readouterr().out
  assert text.count('finished before') == 4 and text.count('done in') == 8  # what was done is not done again


def test_interruption_stops_the_runs(file, tmp_path, programs, monkeypatch):
  """Failure: runs live on after Ctrl-C, even one that does not listen, and the next sweep writes into the same folders."""
  ready, sleep, processes, start = tmp_path / 'ready', time.sleep, [], sweep.start
  programs['base seed 0'] = 'import time; time.sleep(60)'
  programs['other seed 0'] = (
    f'import signal; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, "w"); import time; time.sleep(60)'
  )

  def interrupted(seconds):
    sleep(seconds)
    if ready.exists():
      monkeypatch.setattr(time, 'sleep', sleep)
      raise KeyboardInterrupt

  monkeypatch.setattr(time, 'sleep', interrupted)
  monkeypatch.setattr(sweep, 'STOP_S', 1.0)
  monkeypatch.setattr(sweep, 'start', lambda *arguments: processes.append(start(*arguments)) or processes[-1])
  with pytest.raises(KeyboardInterrupt):
    run_all(file(FOUR), tmp_path / 'w', jobs=2)
  assert [process.returncode for process in processes] == [-15, -9]


def test_preempted(file, tmp_path, programs, monkeypatch, capsys):
  """Failure: SIGTERM ends the sweep before its runs have saved themselves, or its exit code does not tell a scheduler to start it again."""
  ready, saved, sleep = tmp_path / 'ready', tmp_path / 'saved', time.sleep
  programs['base seed 0'] = (
    'import signal, sys, time\n'
    f'def save(*_):\n  time.sleep(0.5); open({str(saved)!r}, "w"); sys.exit(42)\n'
    f'signal.signal(15, save); open({str(ready)!r}, "w"); time.sleep(60)'
  )

  def told(seconds):
    sleep(seconds)
    if ready.exists():
      monkeypatch.setattr(time, 'sleep', sleep)
      preemption.leave()

  monkeypatch.setattr(time, 'sleep', told)
  monkeypatch.setattr(sweep, 'check_configs', lambda *arguments: None)
  monkeypatch.setattr(preemption.flags, 'told', False)
  assert sweep.main([f'--config={file(FOUR)}', f'--workdir={tmp_path / "w"}', '--seeds=0', '--only=base']) == 42
  assert saved.exists() and 'preempted; the same command goes on' in capsys.readouterr().err


def test_one_sweep_at_a_time(file, tmp_path, programs):
  """Failure: two sweeps, or a sweep and a run that a killed one left behind, write into the same folders."""
  with sweep.locked(str(tmp_path / 'w')) as lock:
    assert 'another sweep is at work' in refusal(lambda: sweep.locked(str(tmp_path / 'w')).__enter__())
    programs['base seed 0'] = 'import time; time.sleep(60)'
    [run] = [r for r in sweep_entries.read_sweep(file(FOUR), [0]).runs.values() if r.name == 'base']
    process = sweep.start(run, str(tmp_path / 'w'), [], lock)
  with pytest.raises(ConfigError, match='left behind'), sweep.locked(str(tmp_path / 'w')):
    pass
  process.kill()
  process.wait()
  with sweep.locked(str(tmp_path / 'w')):
    pass
  (tmp_path / 'file').touch()
  assert '--workdir=' in refusal(lambda: sweep.locked(f'{tmp_path}/file/w').__enter__())


def test_cores(monkeypatch):
  """Failure: jobs at once share cores, so that each runs as many threads as the machine has, or one gets none."""
  monkeypatch.setattr(sweep, 'cores_here', lambda: [0, 1, 2, 5, 7])
  monkeypatch.setattr(sweep.shutil, 'which', lambda name: f'/bin/{name}')
  assert [sweep.cores(slot, 2) for slot in range(2)] == [['taskset', '-c', '0,1'], ['taskset', '-c', '2,5,7']]
  assert sweep.cores(0, 1) == [] and sweep.cores(3, 6) == []
  monkeypatch.setattr(sweep.shutil, 'which', lambda name: None)
  assert sweep.cores(0, 2) == []


def test_another_config_is_not_taken_for_this_one(file, tmp_path):
  """Failure: after a change of the file, old results are shown under the new settings (a key that was removed, too)."""
  path, folder = file("[{'name': 'a', 'optim.learning_rate': 0.5, 'objective.beta': 0.1}]"), tmp_path / 'w/a'
  (folder / 'seed0').mkdir(parents=True)
  [run] = sweep_entries.read_sweep(path, [0]).runs.values()
  whole = json.loads(sweep_entries.config_lib.to_json(sweep_entries.config_lib.resolve(run.settings)))
  whole['objective'] |= {'name': 'sft', 'more': 1}  # as the run fills in its defaults
  for name, value in (('config.json', whole), ('summary.json', {})):
    (folder / 'seed0' / name).write_text(json.dumps(value))
  record = {'command': '', 'settings': {**run.settings, 'mesh': {'fsdp': 2}}, 'starts': []}
  for text in (None, json.dumps(record)):  # started by hand, started by a sweep
    if text:
      (folder / 'seed0.json').write_text(text)
    sweep_entries.check_unchanged([run], str(tmp_path / 'w'))
    [other] = sweep_entries.read_sweep(
      file("[{'name': 'a', 'optim.learning_rate': 0.25, 'objective.beta': 0.1}]"), [0]
    ).runs.values()
    wanted = f'{folder}/seed0 is a run of other settings'
    assert wanted in (told := refusal(sweep_entries.check_unchanged, [other], str(tmp_path / 'w')))
    assert 'optim.learning_rate: 0.5 -> 0.25' in told
  [less] = sweep_entries.read_sweep(file("[{'name': 'a', 'optim.learning_rate': 0.5}]"), [0]).runs.values()
  assert "objective.beta: 0.1 -> 'absent'" in refusal(sweep_entries.check_unchanged, [less], str(tmp_path / 'w'))


# The report.


@pytest.mark.parametrize('df', [1, 2, 3, 4, 5, 9, 10, 30, 99, 100])
def test_t_quantile(df):
  """Failure: intervals are those of the normal distribution, or of another level: with 3 seeds less than half as wide."""
  assert sweep_report.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)


def test_over_seeds():
  """Failure: the interval is that of one run instead of their mean, or divides by n where it must by n - 1."""
  got = sweep_report.over_seeds([0.5, 0.7, 0.6])
  assert got == pytest.approx({'n': 3, 'mean': 0.6, 'interval': 4.302652729911275 * 0.1 / math.sqrt(3), 'min': 0.5, 'max': 0.7})
  low, high = stats.t.interval(0.95, 2, loc=0.6, scale=stats.sem([0.5, 0.7, 0.6]))
  assert got['interval'] == pytest.approx((high - low) / 2)
  assert sweep_report.over_seeds([0.5]) == {'n': 1, 'mean': 0.5, 'interval': None, 'min': 0.5, 'max': 0.5}


def test_shown():
  """Failure: digits that the seeds do not support, or a lone seed that looks like an exact result."""
  shown = sweep_report.shown
  assert shown(sweep_report.over_seeds([0.5, 0.7, 0.6]), 3) == '0.60 ± 0.25'
  assert shown(sweep_report.over_seeds([151.0, 148.0]), 2) == '150 ± 19'  # 149.5 ± 19.06
  assert shown(sweep_report.over_seeds([0.123456]), 1) == '0.1235' and shown(None, 3) == ''
  assert shown(sweep_report.over_seeds([2.0, 2.0]), 3) == '2 ± 0 (n=2)'


def hand_made(workdir: pathlib.Path, name: str, seed: int, accuracies, losses) -> None:
  """The files of a finished run."""
  folder = workdir / name / f'seed{seed}'
  folder.mkdir(parents=True)
  evaluations = [{'step': 10 * i, 'evaluators': {'greedy': {'accuracy': a}}} for i, a in enumerate(accuracies)]
  entries = [{'step': i, 'loss': loss} for i, loss in enumerate(losses, 1)]
  for file, found in (('eval.jsonl', evaluations), ('metrics.jsonl', entries)):
    (folder / file).write_text(''.join(json.dumps(entry) + '\n' for entry in found))
  (folder / 'summary.json').write_text(json.dumps({'config_hash': f'h{seed}', 'steps': 20, 'wall_s': 1.5}))


def test_report(file, tmp_path, capsys):
  """Failure: the table, the JSON or the figure says something else than the runs' own files, or hides that runs are missing."""
  path = file(
    "[{'name': 'base', 'report': False}, {'name': 'a', 'eval.size': 1}, {'name': 'b', 'eval.size': 2}, {'name': 'c', 'eval.size': 3}]",
    "REPORT = ('eval/greedy/accuracy', 'loss', 'reward')\nCOMPARE = [('a', 'b'), ('c', 'a')]\n",
  )
  workdir = tmp_path / 'w'
  for seed, last in enumerate((0.5, 0.7, 0.6)):
    hand_made(workdir, 'a', seed, [0.1, 0.9, last], [9.0] * 18 + [1.0 + seed, 3.0 + seed])  # the last tenth: 2, 3, 4
  hand_made(workdir, 'b', 1, [0.25, None], [4.0, None])
  hand_made(workdir, 'base', 0, [0.5], [1.0])
  (workdir / 'b' / 'seed1.json').write_text(json.dumps({'settings': {}, 'starts': [{'commit': 'abc'}]}))
  argv = [f'--config={path}', f'--workdir={workdir}', '--seeds=0,1,2', '--report']
  assert sweep.main(argv) == 0
  table = """
| entry | runs | eval/greedy/accuracy | loss |
| --- | --- | --- | --- |
| a | 3/3 | 0.60 ± 0.25 | 3.0 ± 2.5 |
| b | 1/3 | 0.25 | 4 |
| c | 0/3 |  |  |

| difference, paired by seed | eval/greedy/accuracy | loss |
| --- | --- | --- |
| a - b | 0.45 (n=1) | -1 (n=1) |
| c - a |  |  |
"""
  text = (workdir / 'sweep.md').read_text()
  assert text.startswith(table.lstrip()) and table in '\n' + capsys.readouterr().out
  assert 'b seed 0 is not in the table: not finished' in text and 'no run has the metric reward' in text
  assert '--seeds=0,1,2 --report`' in text
  got = json.loads((workdir / 'sweep.json').read_text())
  assert got['entries']['a']['eval/greedy/accuracy'] == sweep_report.over_seeds([0.5, 0.7, 0.6])
  assert got['entries']['b'] == {'eval/greedy/accuracy': sweep_report.over_seeds([0.25]), 'loss': sweep_report.over_seeds([4.0])}
  assert got['entries']['c'] == {} and 'base' not in got['entries'] and got['metrics_missing'] == ['reward']
  assert [(run['name'], run['seed']) for run in got['runs']] == [('base', 0), ('a', 0), ('a', 1), ('b', 1), ('a', 2)]
  assert got['differences'] == {
    'a - b': {m: sweep_report.over_seeds([x]) for m, x in (('eval/greedy/accuracy', 0.7 - 0.25), ('loss', -1.0))},
    'c - a': {},
  }
  assert got['runs'][1]['evaluations'] == {'eval/greedy/accuracy': [[0, 0.1], [10, 0.9], [20, 0.5]]}
  run = got['runs'][3]
  assert run['values'] == {'eval/greedy/accuracy': 0.25, 'loss': 4.0} and run['starts'] == [{'commit': 'abc'}]
  assert (run['config_hash'], run['steps'], run['wall_s'], run['overrides']) == ('h1', 20, 1.5, {'eval.size': 2, 'seed': 1})
  assert got['seeds'] == [0, 1, 2] and got['commit'] and got['date'] and got['hardware']
  assert len(got['unfinished']) == 7 and (workdir / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  (workdir / 'a/seed0/metrics.jsonl').write_text('{"step": 1}\n{"ste\n')
  assert sweep.main(argv) == 2 and 'a/seed0/metrics.jsonl:2: damaged' in capsys.readouterr().err


def test_curve(tmp_path):
  """Failure: a metric below another one (accuracy by difficulty) or with a slash in its name cannot be reported, or a list is."""
  greedy = {'by level': {'3': {'accuracy': 0.5}}, 'ci95': [0.1, 0.2], 'a/b': 1.0}
  (tmp_path / 'eval.jsonl').write_text(json.dumps({'step': 4, 'evaluators': {'greedy': greedy}}) + '\n')
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "a/b": 2.0, "c": null}\n{"step": 2, "a/b": 3.0}\n')
  assert sweep_report.curve(tmp_path, 'eval/greedy/by level/3/accuracy') == [(4, 0.5)]
  assert sweep_report.curve(tmp_path, 'eval/greedy/a/b') == [(4, 1.0)] and sweep_report.curve(tmp_path, 'a/b') == [
    (1, 2.0),
    (2, 3.0),
  ]
  for metric in ('eval/greedy/ci95', 'eval/greedy/by level', 'eval/greedy', 'c', 'd'):
    assert sweep_report.curve(tmp_path, metric) == []


def test_figure(file, tmp_path, monkeypatch):
  """Failure: a line is not the mean over the seeds, its band not their range, or a step that one seed lacks is averaged over the others."""
  import matplotlib.axes

  drawn = []
  fill_between = matplotlib.axes.Axes.fill_between
  monkeypatch.setattr(matplotlib.axes.Axes, 'fill_between', lambda axis, *a, **k: drawn.append(a) or fill_between(axis, *a, **k))
  got = sweep_entries.read_sweep(file("[{'name': 'a'}]"), [0, 1, 2])
  curves = {(('a', 0), 'loss'): [(1, 5.0), (2, 1.0)], (('a', 1), 'loss'): [(1, 9.0), (2, 3.0), (3, 0.0)], (('a', 2), 'loss'): []}
  sweep_report.figure(got, ['loss'], curves, tmp_path / 'x.png')
  assert drawn == [([1, 2], [5.0, 1.0], [9.0, 3.0])]


# With training.


def launched(*argv: str) -> list[str]:
  return [sys.executable, '-m', 'launch.sweep', *argv]


ENVIRONMENT = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}


def test_dead_keys_are_found_before_anything_runs(tmp_path):
  """Failure: a key that cannot act, in a run that starts from one that does not exist yet, is found when hours have passed."""
  (tmp_path / 'c.py').write_text(
    'def get_config():\n  return {"objective": {"name": "sft"}, "data": {"train_size": 64}}\n'
    'def sweep(base):\n  return [{"name": "rl", "roles.policy.init": "{workdir}/base/seed{seed}", "model.preset": "nano"},\n'
    '                          {"name": "base"}]\n'
  )
  argv = launched(f'--config={tmp_path}/c.py', f'--workdir={tmp_path}/w', '--seeds=0,1')
  got = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert got.returncode == 2 and got.stderr.startswith("error: entry 'rl': config keys that cannot act here:\n  'model.preset': ")
  assert not (tmp_path / 'w').exists()


TINY = """
from rl_reasoning import config

REPORT = ('eval/greedy/format', 'reward')

def get_config(objective='grpo', cache=''):
  tiny = config.read_file(f'configs/tiny.py:objective={objective}')
  tiny.pop('model')  # it comes with the base, and is tiny by default
  more = {'log_every': 2, 'rewards': {'functions': ('accuracy', 'format_tags'), 'weights': (1.0, 0.2)},
           'rollout': {'chunk': 8, 'max_completion_length': 16}, 'data': {'cache_dir': cache}, 'checkpoint': {'every': 20},
          'eval': {'every': 100, 'size': 16, 'batch_size': 16, 'evaluators': {'greedy': {}}}}
  return config.merge(tiny, more)

def sweep(base):
  start = {'roles.policy.init': '{workdir}/base/seed{seed}'}
  return [{'name': 'base', 'arguments': {'objective': 'sft'}, 'total_steps': 80, 'report': False},
          {'name': 'rl', 'total_steps': 2, **start}]
"""


def test_a_sweep(tmp_path):
  """Failure: what a sweep is for does not work: four runs from one command, killed in the middle, resumed, handed over and compared."""
  (tmp_path / 'c.py').write_text(TINY)
  workdir = tmp_path / 'w'
  argv = launched(f'--config={tmp_path}/c.py:cache={tmp_path}/cache', f'--workdir={workdir}', '--seeds=3,4')
  process = subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  while not (workdir / 'base/seed3/checkpoints/20').exists():
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.01)
  process.terminate()
  text = process.communicate()[0]
  assert process.returncode == 42 and 'preempted; the same command goes on' in text, text
  assert not (workdir / 'base/seed3/summary.json').exists()
  got = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert got.returncode == 0, got.stdout + got.stderr

  starts = {
    name: len(json.loads((workdir / f'{name}.json').read_text())['starts']) for name in ('base/seed3', 'base/seed4', 'rl/seed3')
  }
  assert starts == {'base/seed3': 2, 'base/seed4': 1, 'rl/seed3': 1}
  assert [e['step'] for e in sweep_report.read_jsonl(workdir / 'base/seed3/metrics.jsonl')] == list(range(2, 81, 2))
  evaluations = {
    (name, seed): sweep_report.read_jsonl(workdir / name / f'seed{seed}/eval.jsonl') for name in ('base', 'rl') for seed in (3, 4)
  }
  for seed in (3, 4):  # each starts from the base of its own seed
    assert evaluations['rl', seed][0]['evaluators'] == evaluations['base', seed][-1]['evaluators']
  assert evaluations['base', 3] != evaluations['base', 4]
  report = json.loads((workdir / 'sweep.json').read_text())
  last = [evaluations['rl', seed][-1]['evaluators']['greedy']['format'] for seed in (3, 4)]
  assert (
    report['entries']['rl']['eval/greedy/format'] == sweep_report.over_seeds(last) and report['entries']['rl']['reward']['n'] == 2
  )
  assert report['unfinished'] == {} and '| rl | 2/2 |' in got.stdout
  hashes = [json.loads((workdir / f'rl/seed{seed}/summary.json').read_text())['config_hash'] for seed in (3, 4)]
  assert [run['config_hash'] for run in report['runs'] if run['name'] == 'rl'] == hashes and len(set(hashes)) == 2

  again = subprocess.run([*argv, '--dry-run'], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert again.stdout.count(': finished: ') == 4
