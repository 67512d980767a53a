"""kill -9 at any moment, the same command again: nothing tells the run from one that was never interrupted."""

import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from rl_reasoning import checkpoint
from tests.test_e2e import assert_same, everything, logged

ROOT = pathlib.Path(__file__).parent.parent


def command(objective: str, workdir, cache) -> list[str]:
  return [sys.executable, '-m', 'rl_reasoning.train', f'--config=configs/tiny.py:objective={objective}', f'--workdir={workdir}',
          f'--config.data.cache_dir={cache}', '--config.checkpoint.every=2', '--config.total_steps=12']  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen:
  """In a group of its own: the command line restarts itself to get huge pages, and the kill must reach what it became."""
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '1'}
  return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def kill_when(process: subprocess.Popen, ready, limit_s: float = 300) -> None:
  """kill -9 as soon as `ready()`; it must not have ended by itself."""
  end = time.time() + limit_s
  while not ready() and time.time() < end:
    assert process.poll() is None, 'the run ended before it could be killed'
    time.sleep(0.002)
  os.killpg(process.pid, 9)
  assert process.wait() == -9


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Uninterrupted runs, by objective."""
  cache, made = tmp_path_factory.mktemp('data'), {}

  def get(objective: str):
    if objective not in made:
      made[objective] = tmp_path_factory.mktemp(objective)
      assert start(command(objective, made[objective], cache)).wait() == 0
    return made[objective], cache

  return get


@pytest.mark.prove
@pytest.mark.parametrize('objective', ['sft', 'grpo'])
@pytest.mark.parametrize('attempt', range(2))
def test_kill_at_a_random_step(objective, attempt, whole, tmp_path):
  """Failure: a run that was killed and started again is another run."""
  expected, cache = whole(objective)
  step = random.Random(f'{objective}{attempt}').randint(1, 11)
  kill_when(start(command(objective, tmp_path, cache)), lambda: bool(logged(tmp_path)) and logged(tmp_path)[-1]['step'] >= step)
  assert start(command(objective, tmp_path, cache)).wait() == 0
  assert_same(everything(tmp_path), everything(expected))


@pytest.mark.prove
@pytest.mark.parametrize('attempt', range(3))
def test_kill_while_a_checkpoint_is_written(attempt, whole, tmp_path):
  """Failure: half a checkpoint is taken for a whole one, or stands in the way of the next."""
  expected, cache = whole('sft')
  folder, wanted = tmp_path / 'checkpoints', (2, 4, 8)[attempt]
  kill_when(start(command('sft', tmp_path, cache)), lambda: any(folder.glob(f'{wanted}.*tmp*')))
  assert any(folder.glob(f'{wanted}.*tmp*')) and not (folder / str(wanted)).exists(), 'the kill came after the rename'
  assert checkpoint.open_manager(str(tmp_path)).latest_step() == (wanted - 2 or None)
  assert start(command('sft', tmp_path, cache)).wait() == 0
  assert_same(everything(tmp_path), everything(expected))
  assert not any(folder.glob('*tmp*'))
