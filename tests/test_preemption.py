"""SIGTERM at any moment: exit code 42, and the same command again makes the run that nothing has interrupted."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import jax
import numpy as np
import pytest

from rl_reasoning import checkpoint, config, evaluators, metrics, pipeline, preemption, train
from rl_reasoning.preemption import Preempted
from tests.test_e2e import assert_same, everything, logged, run, settings

ROOT = pathlib.Path(__file__).parent.parent


def terminate(*_) -> None:
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler():
  """As in a command line; and nothing of it is left to other tests."""
  before = signal.signal(signal.SIGTERM, preemption.leave)
  preemption.flags.told = False
  yield
  signal.signal(signal.SIGTERM, before)
  preemption.flags.told = False


def test_signal():
  """Failure: a signal tears the work apart, is lost, comes through twice, or the handler that was there before is gone."""
  preemption.check()
  with pytest.raises(Preempted), preemption.watched():
    terminate()
    assert preemption.requested()
    terminate()  # while it saves
    preemption.check()
  assert not preemption.requested() and signal.getsignal(signal.SIGTERM) is preemption.leave
  terminate()  # while it leaves
  preemption.flags.told = False
  with pytest.raises(Preempted):  # nobody has asked: the handler before has it
    with preemption.watched():
      terminate()
    time.sleep(1)
  preemption.flags.told = False
  with pytest.raises(Preempted):
    terminate()
    time.sleep(1)
  with preemption.watched():
    preemption.check()  # what came before is over
  seen = []
  thread = threading.Thread(target=lambda: seen.append(preemption.watched().__enter__()))
  thread.start()
  thread.join()
  assert len(seen) == 1  # where Python sets no handlers, nothing is watched and nothing fails
  with pytest.raises(KeyboardInterrupt):
    raise Preempted


def test_exit_code(capsys):
  """Failure: a scheduler takes a preempted run for a crash or for one that is done, or the user does not read what happened."""

  def command(argv):
    raise Preempted('preempted: step 3 of 8 is saved')

  assert train.exit_code(command, []) == config.exit_code(command, []) == preemption.EXIT_CODE == 42
  said = capsys.readouterr().err.splitlines()
  assert said[0] == 'preempted: step 3 of 8 is saved; the same command goes on from the last checkpoint' and len(said) == 2


def once(patch, module, name, when) -> None:
  """The signal comes as soon as `module.name` is called with arguments of which `when` holds."""
  original = getattr(module, name)

  def patched(*arguments, **others):
    if when(*arguments, **others):
      terminate()
    return original(*arguments, **others)

  patch.setattr(module, name, patched)


def nth(number: int):
  calls = iter(range(1, 1_000_000))
  return lambda *_, **__: next(calls) == number


def cut(chosen: dict, workdir, module, name, when) -> tuple[str, set[str]]:
  """(what a run says that is preempted there, the functions that it was in)."""
  with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted) as caught:
    once(patch, module, name, when)
    run(chosen, workdir)
  preemption.flags.told = False
  inner = caught.value.__context__
  assert inner is not None
  return str(caught.value), {frame.name for frame in traceback.extract_tb(inner.__traceback__)}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('data'))


def test_phases(cache, tmp_path):
  """Failure: after a signal in the middle of a phase something is lost, made twice, or made from other weights or data; a step that has
  begun to update is thrown away, or a rollout or an evaluation runs to its end first."""
  chosen = settings(
    'grpo', cache, total_steps=6, checkpoint__every=4, eval__every=2, eval__size=16, eval__batch_size=8, eval__evaluators={'greedy': {}},
    data__train_size=48, objective__num_minibatches=2, objective__num_generations=4, model__arch={'num_hidden_layers': 1},
  )  # fmt: skip
  whole, workdir = tmp_path / 'whole', tmp_path / 'cut'
  run(chosen, whole)

  def evaluations():
    return [entry['step'] for entry in metrics.read_jsonl(workdir / 'eval.jsonl')]

  said, inside = cut(chosen, workdir, evaluators, 'judge', nth(1))
  assert said == 'preempted: before the first step was done' and 'in_batches' in inside
  assert evaluations() == [] and checkpoint.open_manager(str(workdir)).latest_step() is None
  said, inside = cut(chosen, workdir, train, 'collect', lambda run, rows, state, *_: state.step == 1)
  assert said == 'preempted: step 1 of 6 is saved' and 'decoding' in inside
  said, inside = cut(
    chosen, workdir, metrics, 'merge', nth(1)
  )  # after the first of two updates; the evaluation of this step is due
  assert said == 'preempted: step 2 of 6 is saved' and 'decoding' in inside
  assert evaluations() == [0] and [entry['step'] for entry in logged(workdir)] == [1, 2]
  said, inside = cut(chosen, workdir, checkpoint, 'save', lambda manager, state: state.step == 4)  # one that was due
  assert said == 'preempted: step 4 of 6 is saved' and 'collect' not in inside and evaluations() == [0, 2, 4]
  said, inside = cut(chosen, workdir, evaluators, 'judge', nth(2))  # the second batch of the last evaluation
  assert said == 'preempted: step 6 of 6 is saved' and 'in_batches' in inside and evaluations() == [0, 2, 4]
  assert len((workdir / 'samples' / 'step_000006' / 'greedy.jsonl').read_text().splitlines()) == 8  # whole batches
  assert not (workdir / 'summary.json').exists()
  collect, train.collect = train.collect, None  # no step is left
  try:
    run(chosen, workdir)
  finally:
    train.collect = collect
  assert_same(everything(workdir), everything(whole))
  samples = [{f.name: f.read_text() for f in (w / 'samples').glob('*/*.jsonl')} for w in (workdir, whole)]
  assert samples[0] == samples[1]


def test_weights_beyond_numbers_are_not_saved(cache, tmp_path, capsys):
  """Failure: the step that a preempted run saves has weights that are no numbers, and every start after it ends in divergence."""
  argv = ['--config=configs/tiny.py:objective=sft', f'--workdir={tmp_path / "run"}', f'--config.data.cache_dir={cache}',
          '--config.optim.name=sgd', '--config.optim.learning_rate=1e30', '--config.optim.grad_clip=0',
          "--config.model.arch={'num_hidden_layers': 1}"]  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    once(patch, metrics, 'merge', nth(1))
    assert train.main(argv) == 3
  assert 'the norm of the weights is inf at step 1' in capsys.readouterr().err
  assert checkpoint.open_manager(str(tmp_path / 'run')).latest_step() is None


def test_pipeline(cache, tmp_path, capsys):
  """Failure: a pipeline goes on with the next stage after the signal, gives another exit code, or begins the stage anew."""
  (tmp_path / 'stages.py').write_text(f"""
from rl_reasoning.config import merge, read_file
SMALL = {{'total_steps': 3, 'data': {{'cache_dir': {cache!r}}}, 'model': {{'arch': {{'num_hidden_layers': 1}}}}}}
def get_config():
  base = merge(read_file('configs/tiny.py:objective=sft'), SMALL)
  return {{'stages': {{'one': base, 'two': {{**base, 'total_steps': 1}}}}}}
""")
  argv = [f'--config={tmp_path}/stages.py', f'--workdir={tmp_path}/w']
  with pytest.MonkeyPatch.context() as patch:
    once(patch, metrics, 'merge', nth(2))
    assert pipeline.main(argv) == 42
  assert 'preempted: step 2 of 3 is saved' in capsys.readouterr().err and not (tmp_path / 'w' / 'two').exists()
  preemption.flags.told = False
  with pytest.MonkeyPatch.context() as patch:  # outside of a stage
    once(patch, pipeline, 'summarise', nth(1))
    assert pipeline.main(argv) == 42
  preemption.flags.told = False
  assert pipeline.main(argv) == 0
  assert [entry['step'] for entry in logged(tmp_path / 'w' / 'one')] == [
    1,
    2,
    3,
  ] and 'one: done before' in capsys.readouterr().out


def command(objective: str, workdir, cache, *more: str) -> list[str]:
  return [sys.executable, '-m', 'rl_reasoning.train', f'--config=configs/tiny.py:objective={objective}', f'--workdir={workdir}',
          f'--config.data.cache_dir={cache}', *more]  # fmt: skip


def start(arguments: list[str], devices: int = 1, **others) -> subprocess.Popen:
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)}
  return subprocess.Popen(
    arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, text=True, start_new_session=True, **others
  )


def test_process(cache, tmp_path):
  """Failure: the command line does not listen to a scheduler, or what it leaves cannot be gone on from."""
  arguments = command('sft', tmp_path / 'cut', cache, '--config.total_steps=40', '--config.checkpoint.every=1000')
  run(settings('sft', cache, total_steps=40, checkpoint__every=1000), tmp_path / 'whole')
  process = start(arguments, jax.device_count(), stderr=subprocess.PIPE)
  while len(logged(tmp_path / 'cut')) < 5:
    assert process.poll() is None
    time.sleep(0.005)
  process.terminate()
  assert process.wait(60) == 42
  step = checkpoint.open_manager(str(tmp_path / 'cut')).latest_step()
  assert step == logged(tmp_path / 'cut')[-1]['step'] and f'preempted: step {step} of 40 is saved' in process.stderr.read()
  assert start(arguments, jax.device_count()).wait() == 0
  assert_same(everything(tmp_path / 'cut'), everything(tmp_path / 'whole'))


AGREE = """
import os, sys, time
import jax
from rl_reasoning import preemption
port, me, last = sys.argv[1], int(sys.argv[2]), 400
jax.distributed.initialize(f'localhost:{port}', 2, me)
with preemption.watched():
  for count in range(last):
    if me == 1 and count == 3:
      os.kill(os.getpid(), 15)
    if preemption.requested():
      break
    time.sleep(0.01)
  print(count, flush=True)
  preemption.flags.told = False
jax.distributed.shutdown()
"""


def test_processes_agree():
  """Failure: one process of a job leaves and the others wait for it in a collective for ever; or JAX's own handler keeps the signal."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', AGREE, str(port), str(me)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    for me in range(2)
  ]
  assert [process.communicate(timeout=120)[0].split()[-1] for process in processes] == ['3', '3']


LONG = (
  '--config.total_steps=12', '--config.checkpoint.every=3', '--config.eval.every=2', '--config.eval.size=32', '--config.eval.batch_size=16',
  "--config.eval.evaluators={'greedy': {}}", '--config.rollout.max_completion_length=96', '--config.objective.num_minibatches=2',
)  # fmt: skip
OCCURRENCE = {'rollout': 2, 'update': 2, 'evaluation': 2, 'checkpoint': 1}  # the first one compiles
GRACE_S = 20


@pytest.fixture(scope='module')
def uninterrupted(cache, tmp_path_factory):
  """(workdir, seconds that a phase takes)."""
  workdir = tmp_path_factory.mktemp('uninterrupted')
  assert start(command('grpo', workdir, cache, *LONG)).wait() == 0
  entries = metrics.read_jsonl(workdir / 'metrics.jsonl')
  spans = {phase: min(entry[f'time/{phase}'] for entry in entries) for phase in ('rollout', 'update')}
  evaluation = min(json.loads(path.read_text())['seconds'] for path in (workdir / 'samples').glob('*/greedy.json'))
  return workdir, {**spans, 'evaluation': evaluation, 'checkpoint': 0.3}


@pytest.mark.prove
@pytest.mark.parametrize('chain', range(5))
def test_random_moments(chain, cache, uninterrupted, tmp_path):
  """Failure: after a signal at some moment of a phase (a run has one in each, in some order, and goes on after it) the process does not
  leave in the grace period, or does not leave cleanly, or the run that goes on is another run."""
  rng, arguments, (whole, spans) = random.Random(chain), command('grpo', tmp_path / 'run', cache, *LONG), uninterrupted
  for phase in rng.sample(sorted(OCCURRENCE), 4):
    said, moment = tmp_path / f'{phase}.json', rng.random() * spans[phase]
    place = [phase, str(OCCURRENCE[phase]), str(moment), str(said)]
    process = start([sys.executable, '-m', 'tests.preempted_run', *place, *arguments[3:]], stderr=subprocess.PIPE)
    text = process.communicate()[1]
    ended = time.time()
    assert process.returncode == 42, text
    signalled = json.loads(said.read_text())
    seconds, step = ended - signalled['signal'], checkpoint.open_manager(str(tmp_path / 'run')).latest_step()
    print(json.dumps({'chain': chain, 'phase': phase, 'after_s': signalled['after_s'], 'left_s': seconds, 'step': step}))
    assert seconds < GRACE_S
    assert f'step {step} of 12 is saved' in text and step == logged(tmp_path / 'run')[-1]['step']
    assert not any(tmp_path.rglob('*orbax-checkpoint-tmp*'))
  assert start(arguments).wait() == 0
  assert_same(everything(tmp_path / 'run'), everything(whole))


@pytest.mark.prove
def test_fewer_devices(cache, tmp_path):
  """Failure: a run that was preempted on eight devices does not go on on two, and then on one, or goes on from other weights."""
  more = '--config.total_steps=90', '--config.checkpoint.every=1000', '--config.optim.learning_rate=1e-4'
  assert start(command('sft', tmp_path / 'whole', cache, *more), 8).wait() == 0
  for devices, until in ((8, 20), (2, 50), (1, None)):
    process = start(command('sft', tmp_path / 'cut', cache, *more), devices)
    while until and (not logged(tmp_path / 'cut') or logged(tmp_path / 'cut')[-1]['step'] < until):
      assert process.poll() is None
      time.sleep(0.005)
    if until:
      process.terminate()
    assert process.wait(60) == (42 if until else 0)
  losses = [[entry['loss'] for entry in logged(tmp_path / name)] for name in ('cut', 'whole')]
  np.testing.assert_allclose(*losses, rtol=1e-4)
