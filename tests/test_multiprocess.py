"""Several processes, each with two devices of its own, are one run: real sockets on loopback, gloo between them."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rl_reasoning import data, distributed, metrics, sharding
from rl_reasoning.config import ConfigError
from tests.test_e2e import assert_same, everything, logged, make_judge, run, settings

ROOT = pathlib.Path(__file__).parent.parent
DEATH_S = 60  # within which a dead process has ended the others


def judged(prompts, completions, completion_ids, **columns):
  """A reward that some completions get; notes, in a file of the process, which ones it was asked about."""
  with open(pathlib.Path(os.environ['JUDGED']) / f'{os.getpid()}.jsonl', 'a') as file:
    file.writelines(json.dumps([prompt, list(ids)]) + '\n' for prompt, ids in zip(prompts, completion_ids, strict=True))
  return [float(sum(ids) % 4 == 0) for ids in completion_ids]


# SGD, whose steps are the gradients: Adam makes a step of any difference.
SGD = {'model__arch': {'num_hidden_layers': 1}, 'optim__name': 'sgd', 'optim__learning_rate': 0.5}
TINY = {**SGD, 'rollout__max_completion_length': 8}
JUDGED = {'rewards': {'functions': ('tests.test_multiprocess:judged', 'accuracy'), 'weights': (1.0, 1.0), 'timeout': 0}}
# Of so many problems that the last batch is half full: see `compare`.
EVALUATED = {'eval__every': 2, 'eval__evaluators': {'sampled': {'temperature': 1.0, 'num_samples': 2}}}
# What moves between hosts: groups that are accepted elsewhere than they belong, pass rates, evaluations.
DAPO = {
  **TINY, **JUDGED, **EVALUATED, 'total_steps': 2, 'checkpoint__every': 2, 'objective__num_generations': 2, 'objective__max_refills': 2,
  'data': {
    'max_prompt_length': 64, 'curriculum': 'pass_rate',
    'mixture': {'sums': {'task': 'arithmetic', 'train_size': 64}, 'games': {'task': 'countdown', 'train_size': 64}},
  },
}  # fmt: skip
SFT = {**SGD, **EVALUATED, 'total_steps': 4, 'rollout__chunk': 8}
GRPO = {
  **TINY, **JUDGED, 'objective__num_generations': 4, 'objective__num_minibatches': 2, 'objective__beta': 0.1, 'total_steps': 4,
}  # fmt: skip
PPO = {
  **TINY, 'objective__num_generations': 2, 'objective__num_minibatches': 2, 'objective__ptx_coef': 0.1, 'data__max_length': 64,
  'objective__score_normalization': 'running', 'data__pretrain': {'task': 'arithmetic', 'train_size': 24}, 'total_steps': 4,
  'rewards': {'functions': ('tests.test_multiprocess:judged', 'judge'), 'weights': (1.0, 0.5), 'timeout': 0},
}  # fmt: skip
PAIRS = {**SGD, 'total_steps': 2}


def free_port() -> int:
  with contextlib.closing(socket.socket()) as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


def write_config(chosen: dict, path: pathlib.Path) -> pathlib.Path:
  path.write_text(f'def get_config():\n  return {chosen!r}\n')
  return path


def start(count: int, workdir: pathlib.Path, chosen: dict, *flags: str, each=lambda process: ()) -> list[SimpleNamespace]:
  """The processes of a run, their judgements under `workdir`_judged and what they tell in `workdir`_I.log."""
  port, folder = free_port(), workdir.parent / f'{workdir.name}_judged'
  folder.mkdir(exist_ok=True)
  path = write_config(chosen, workdir.parent / f'{workdir.name}.py')
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '2', 'JUDGED': str(folder), 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}
  started = []
  for process in range(count):
    log = workdir.parent / f'{workdir.name}_{process}.log'
    command = [sys.executable, '-m', 'rl_reasoning.train', f'--config={path}', f'--workdir={workdir}', f'--coordinator=localhost:{port}',
               f'--processes={count}', f'--process={process}', *flags, *each(process)]  # fmt: skip
    with log.open('w') as file:
      running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    started.append(SimpleNamespace(process=running, log=log, judged=folder / f'{running.pid}.jsonl'))
  return started


def codes(started: list[SimpleNamespace], limit_s: float = 600) -> list[int]:
  try:
    return [one.process.wait(limit_s) for one in started]
  finally:
    for one in started:
      one.process.kill()


def run_many(count: int, workdir: pathlib.Path, chosen: dict) -> list[SimpleNamespace]:
  started = start(count, workdir, chosen)
  found = codes(started)
  assert found == [0] * count, '\n'.join(one.log.read_text()[-2000:] for one in started)
  return started


def read_judged(path: pathlib.Path) -> list[tuple]:
  return (
    [(json.dumps(prompt), tuple(ids)) for prompt, ids in map(json.loads, path.read_text().splitlines())] if path.exists() else []
  )


def close(a, b) -> None:
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def assert_equal_run(many: pathlib.Path, one: pathlib.Path, shards: int) -> None:
  """Weights and metrics to 1e-5 (sums go over the devices in another order), tokens and the cursor exactly."""
  a, b = everything(many), everything(one)
  assert a['step'] == b['step'] and a['position']['cursor'].keys() == b['position']['cursor'].keys()
  for key, value in b['position']['cursor'].items():
    assert a['position']['cursor'][key] == value, key
  jax.tree.map(close, (a['params'], a['aux']), (b['params'], b['aux']))
  for mine, whole in zip(a['metrics'], b['metrics'], strict=True):
    assert mine.keys() == whole.keys()
    for name in whole:
      close(mine[name], whole[name])
  assert len(a['evaluations']) == len(b['evaluations'])
  for mine, whole in zip(a['evaluations'], b['evaluations'], strict=True):
    jax.tree.map(close, mine, whole)
  for name, text in b['completions'].items():  # the first process writes its own: of a batch the first rows
    mine, whole = ([json.loads(line) for line in x.splitlines()] for x in (a['completions'][name], text))
    assert len(mine) == len(whole) // shards
    for x, y in zip(mine, whole):
      close(x.pop('advantage', 0), y.pop('advantage', 0))
      close(list(x.pop('rewards').values()), list(y.pop('rewards').values()))
      assert x == y
  for path in (one / 'samples').rglob('*.jsonl'):
    assert (many / path.relative_to(one)).read_text() == path.read_text()


def compare(objective: str, keys: dict, count: int, folder: pathlib.Path, monkeypatch, roles: dict | None = None) -> None:
  chosen = settings(objective, str(folder / 'data'), **keys)
  if 'eval__every' in keys:
    chosen['eval'] |= {'batch_size': 2 * count, 'size': 5 * count}
  if 'data' in keys:
    chosen['data'] = {'batch_size': 2 * count, **keys['data']}  # refills are of one size: fewer programs
  if roles:
    chosen['roles'] = roles
  alone = folder / 'alone_judged'
  alone.mkdir()
  monkeypatch.setenv('JUDGED', str(alone))
  devices = jax.devices()[: 2 * count]
  with monkeypatch.context() as patch:  # as many devices: the size of a refill goes by them
    patch.setattr(jax, 'devices', lambda: devices)
    run({**chosen, 'data': {**chosen['data'], 'cache_dir': str(folder / 'data')}}, folder / 'alone')
  # Their data are prepared by all of them at once.
  started = run_many(count, folder / 'many', {**chosen, 'data': {**chosen['data'], 'cache_dir': str(folder / 'their_data')}})
  whole = read_judged(alone / f'{os.getpid()}.jsonl')
  parts = [read_judged(one.judged) for one in started]
  assert sum(map(collections.Counter, parts), collections.Counter()) == collections.Counter(whole)
  # Two samples of each problem; every process has two places of a batch, and half of them none of the last one.
  places, evaluations = np.split(np.arange(2 * count), count), len(metrics.read_jsonl(folder / 'alone' / 'eval.jsonl'))
  evaluated = [evaluations * 2 * (4 + int(sum(own < count))) for own in places]
  trained = [len(part) - more for part, more in zip(parts, evaluated, strict=True)]
  assert len({*trained}) == 1 or not whole, (trained, evaluated)
  assert_equal_run(folder / 'many', folder / 'alone', count)
  for one in started[1:]:
    assert not any(word in one.log.read_text() for word in ('loss', 'eval ', 'steps done'))


def test_two_processes(tmp_path, monkeypatch):
  """Failure: a run is another one where its rows lie on two hosts, or a host judges rows that are not its own. Groups that are accepted
  on one host and belong on the other, a curriculum, minibatches and an evaluation whose last batch is not full are in it."""
  compare('dapo', DAPO, 2, tmp_path, monkeypatch)
  moved = [entry['dynamic_sampling/refills'] for entry in logged(tmp_path / 'many')]
  assert max(moved) > 0  # else no group had another place than the one it was rolled out at


@pytest.mark.prove
@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('objective, keys', [('sft', SFT), ('grpo', GRPO), ('dapo', DAPO), ('dpo', PAIRS)])
def test_objectives(objective, keys, count, tmp_path, monkeypatch):
  """Failure: as above, for another objective or number of processes."""
  compare(objective, keys, count, tmp_path, monkeypatch)


@pytest.mark.prove
@pytest.mark.parametrize('count', [2, 4])
def test_ppo(count, tmp_path, monkeypatch):
  """Failure: as above. The critic, a reward model, running statistics of scores and rows from a second stream are in it."""
  judge = make_judge(str(tmp_path / 'data'), tmp_path)
  compare('ppo', PPO, count, tmp_path, monkeypatch, roles={'reward': {'judge': {'init': judge}}})


def test_other_code_or_config_is_refused(tmp_path):
  """Failure: hosts run different things under one name, and nobody is told which host it is. No process gets to build anything."""
  chosen = settings('sft', str(tmp_path / 'data'))
  started = start(2, tmp_path / 'run', chosen, each=lambda process: (f'--config.optim.learning_rate={0.25 + process}',))
  assert codes(started) == [2, 2]
  for one in started:
    assert 'process 1 runs with another config than process 0: optim.learning_rate: 0.25 -> 1.25' in one.log.read_text()
  assert not (tmp_path / 'run').exists()


def test_what_differs_is_named(monkeypatch):
  """Failure: of many hosts the one with old code must be looked for by hand."""
  ours = {'config': {'optim': {'learning_rate': 1.0}}, 'code': 'abc'}
  told = [ours, ours, {**ours, 'code': 'abd'}, {'config': {'optim': {'learning_rate': 2.0}}, 'code': 'abc'}]
  monkeypatch.setattr(distributed, 'exchange', lambda name, text: [json.dumps(one) for one in told])
  with pytest.raises(ConfigError) as caught:
    distributed.check_same(ours)
  assert str(caught.value).splitlines() == [
    'process 2 runs with another code than process 0: abc and abd',
    '  process 3 runs with another config than process 0: optim.learning_rate: 1.0 -> 2.0',
  ]
  told[2:] = [ours, ours]
  distributed.check_same(ours)


def wait_until(ready, limit_s: float) -> None:
  end = time.time() + limit_s
  while not ready():
    assert time.time() < end
    time.sleep(0.02)


def killed(count: int, victim: int, sign: int, workdir: pathlib.Path, chosen: dict, step: int) -> float:
  """Runs until the step is logged, then sends the signal to one process; seconds until the last of the others has ended, each with a
  message and a code that a launcher takes for a crash."""
  started = start(count, workdir, chosen)
  try:
    wait_until(lambda: bool(entries := logged(workdir)) and entries[-1]['step'] >= step, 600)
    started[victim].process.send_signal(sign)
    began = time.time()
    for process, one in enumerate(started):
      if process != victim:
        assert one.process.wait(DEATH_S + 30) not in (0, 2, 3, 42)
        text = one.log.read_text()
        assert f'process {process} of {count} ends with code 1' in text or 'another task died' in text
    return time.time() - began
  finally:
    for one in started:
      one.process.kill()
      one.process.wait()


@pytest.mark.prove
@pytest.mark.parametrize('victim, sign', [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
@pytest.mark.parametrize('count', [2, 4])
def test_a_dead_process_ends_the_others(victim, sign, count, tmp_path, monkeypatch):
  """Failure: the others wait for a dead process (or, SIGSTOP, for one whose machine hangs) and pay for their chips, or the run that is
  started again is another run than one that was never interrupted."""
  chosen = settings('grpo', str(tmp_path / 'data'), **{**TINY, 'total_steps': 12, 'checkpoint__every': 2})
  chosen['data']['cache_dir'] = str(tmp_path / 'data')
  assert killed(count, victim, sign, tmp_path / 'cut', chosen, 5) < DEATH_S
  run_many(count, tmp_path / 'cut', chosen)
  run_many(count, tmp_path / 'whole', chosen)
  assert_same(everything(tmp_path / 'cut'), everything(tmp_path / 'whole'))


def test_flags():
  """Failure: flags that do not go together start a run of one process, or a number is taken for another."""
  for flags, text in [
    ({'processes': '2'}, 'go together'),
    ({'coordinator': 'a:1', 'processes': '2', 'process': '2'}, 'counted from 0'),
    ({'coordinator': 'a', 'processes': '2', 'process': '1'}, 'HOST:PORT'),
    ({'coordinator': 'a:1', 'processes': 'two', 'process': '1'}, '--processes=two'),
    ({'coordinator': 'a:1', 'processes': '2', 'process': '1', 'distributed': ''}, 'detects'),
    ({'distributed': 'yes'}, 'takes no value'),
  ]:
    with pytest.raises(ConfigError, match=text):
      distributed.initialize(flags)
  distributed.initialize({'workdir': 'x'})
  assert distributed.count() == 1 and distributed.is_main()


def test_slurm_devices():
  """Failure: with one task a node JAX sees the first GPU alone, and seven idle; or a choice of the user's is overruled."""
  job = {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_NODES': '4', 'SLURM_GPUS_ON_NODE': '8'}
  assert distributed.slurm_devices(job) == [0, 1, 2, 3, 4, 5, 6, 7]
  assert distributed.slurm_devices({**job, 'SLURM_NTASKS': '32'}) is None  # a task a GPU: as JAX has it
  assert distributed.slurm_devices({**job, 'JAX_LOCAL_DEVICE_IDS': '0,1'}) is None
  assert distributed.slurm_devices({}) is None


def mesh_of(processes: list[int], **sizes) -> SimpleNamespace:
  """As sharding reads a mesh: its devices, in order, are of these processes."""
  mesh = sharding.make_mesh(sizes.get('data', 1), sizes.get('fsdp', 1), sizes.get('tensor', 1), jax.devices()[: len(processes)],
                            expert=sizes.get('expert', 1))  # fmt: skip
  devices = np.asarray([SimpleNamespace(process_index=p) for p in processes], object).reshape(mesh.devices.shape)
  return SimpleNamespace(axis_names=mesh.axis_names, devices=devices, shape=dict(mesh.shape))


@pytest.mark.parametrize(
  'processes, sizes, rows',
  [
    ([0, 0, 1, 1], {'fsdp': 4}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([0, 1, 0, 1], {'fsdp': 4}, [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ([0, 0, 1, 1], {'data': 2, 'tensor': 2}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ([0, 1, 0, 1], {'data': 2, 'tensor': 2}, [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),  # the tensor axis goes over both
    ([0, 0, 1, 1], {'data': 2, 'expert': 2}, [[0, 1, 4, 5], [2, 3, 6, 7]]),  # expert is the outer axis of rows
  ],
)
def test_own_rows(processes, sizes, rows, monkeypatch):
  """Failure: a process reads rows that another one's devices hold, or a row is nobody's."""
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  mesh = mesh_of(processes, **sizes)
  sharding.check_processes(mesh)
  assert [sharding.own(mesh, 8, process).tolist() for process in (0, 1)] == rows
  for process in (0, 1):
    monkeypatch.setattr(distributed, 'index', lambda process=process: process)
    assert sharding.whole(mesh, len(rows[process])) == 8
  monkeypatch.setattr(distributed, 'gather', lambda x: np.stack([np.asarray(rows[0]) * 10, np.asarray(rows[1]) * 10 + 1]))
  told = sharding.all_rows(mesh, np.asarray(rows[1]))  # where both have a row, the first one speaks
  assert told.tolist() == [10 * n + (n not in rows[0]) for n in range(8)]


def test_uneven_processes_are_refused(monkeypatch):
  """Failure: two processes tell each other arrays of different shapes, which hangs or mixes their rows."""
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  with pytest.raises(ConfigError, match=r"section 'mesh'.*'tensor': 2"):
    sharding.check_processes(mesh_of([0, 0, 0, 1], data=2, tensor=2))


def test_draws_of_chosen_rows(tmp_path):
  """Failure: a process reads other rows than its own, or its cursor differs from the others'."""
  mixture = {'a': {'task': 'arithmetic', 'train_size': 9}, 'b': {'task': 'countdown', 'train_size': 7}}
  for chosen in (
    data.Data(task='arithmetic', train_size=9, cache_dir=str(tmp_path)),
    data.Data(mixture=mixture, cache_dir=str(tmp_path)),
  ):
    train = data.open_train(chosen, 3)
    whole, after = train.draw(train.first(), 20)
    assert train.draw(train.first(), 20, [3, 4, 17]) == ([whole[3], whole[4], whole[17]], after)


def test_a_wider_batch_is_the_same_rows():
  """Failure: padding to the widest process changes what a row says, or takes a column for a token."""
  batch = data.pad_rows([([1, 2, 3], [0, 1, 1])] * 2, np.arange(2)).replace(rewards_NR=np.ones((2, 16), np.float32))
  batch = batch.replace(extras={'chosen': np.zeros((2, 16, 1, 1), np.int16), 'step': np.ones((2, 16)), 'label': np.ones(2)})
  wide = sharding.widened(batch, 24)
  assert wide.tokens.shape == wide.mask_NT.shape == wide.extras['step'].shape == (2, 24) and wide.rewards_NR.shape == (2, 16)
  assert not wide.segment_NT[:, 3:].any() and (wide.extras['chosen'][:, 16:] == -1).all() and wide.extras['label'].shape == (2,)
  for name in ('tokens', 'mask_NT', 'position_NT'):
    np.testing.assert_array_equal(getattr(wide, name)[:, :16], getattr(batch, name))


def test_watch(capfd, monkeypatch):
  """Failure: a hang is silent, is told every few seconds, or does not say where."""
  monkeypatch.setattr(distributed, 'progress', ('rollout, token 9', time.monotonic() - 3600))
  watch, told = distributed.Watch(0.2), ''
  watch.start()
  for _ in range(200):
    told += capfd.readouterr().err
    if 'test_watch' in told:
      break
    time.sleep(0.02)
  assert 'no progress for 3600 s in rollout, token 9' in told and 'test_watch' in told  # this very stack
  time.sleep(0.3)
  assert 'no progress' not in capfd.readouterr().err
  with metrics.PhaseTimer()('update'):
    assert distributed.progress[0] == 'update'
  watch.seconds = float('inf')
