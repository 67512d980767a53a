"""Whole runs of the tiny config: learning, resuming bit for bit, divergence, and what a workdir holds."""

import json

import jax
import numpy as np
import pytest

from rl_reasoning import build, checkpoint, config, metrics, pipeline, train
from rl_reasoning.structs import TrainState
from tests.test_distill import make_teacher

WALL_CLOCK = ('time/', 'tokens_per_second/', 'step_time', 'mfu')


def letter_a(prompts, completions, completion_ids, **columns):
  """A reward that any policy can climb: the share of the token a (of the text's letters, '<assistant>' would give two)."""
  return [ids.count(ord('a')) / len(ids) for ids in completion_ids]


def settings(objective: str, cache: str, **keys) -> dict:
  result = config.override(config.read_file(f'configs/tiny.py:objective={objective}'), 'data.cache_dir', cache)
  for key, value in keys.items():
    result = config.override(result, key.replace('__', '.'), value)
  return result


def run(chosen: dict, workdir) -> dict:
  return train.train(config.resolve(chosen), str(workdir), keys_set=set(config.flatten(chosen)))


def logged(workdir) -> list[dict]:
  entries = metrics.read_jsonl(workdir / 'metrics.jsonl')
  return [{k: v for k, v in entry.items() if not k.startswith(WALL_CLOCK)} for entry in entries]


def everything(workdir) -> dict:
  """What two runs must share: weights, optimizer state, metrics, completions, evaluations."""
  manager = checkpoint.open_manager(str(workdir))
  step = manager.latest_step()
  position = json.loads((workdir / 'checkpoints' / str(step) / 'position' / 'metadata').read_text())
  return {
    'step': step,
    'position': position,  # holds a fingerprint of every array's bits
    'params': jax.tree.map(np.asarray, checkpoint.restore_params(str(workdir), 'policy')),
    'aux': checkpoint.restore_aux(str(workdir)),
    'metrics': logged(workdir),
    'completions': {f.name: f.read_text() for f in sorted((workdir / 'completions').iterdir())},
    'evaluations': metrics.read_jsonl(workdir / 'eval.jsonl'),
  }


def assert_same(a: dict, b: dict) -> None:
  for part in ('params', 'aux'):
    jax.tree.map(np.testing.assert_array_equal, a.pop(part), b.pop(part))
  assert a == b


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('data'))


RESUMED = {
  'sft': {'eval__every': 4, 'eval__size': 16, 'eval__batch_size': 16, 'eval__evaluators': {'greedy': {}}, 'rollout__chunk': 8},
  # Everything that has a state: two passes over two minibatches, a reference that moves, a schedule.
  'grpo': {
    'objective__num_iterations': 2, 'objective__num_minibatches': 2, 'objective__beta': 0.1, 'objective__ref_model_sync_updates': 6,
    'optim__schedule': 'linear', 'optim__warmup_updates': 3, 'data__train_size': 48,
  },
  # A reference that is a moving average, and the controller of the entropy.
  'reinforce_pp': {
    'objective__num_minibatches': 2, 'objective__ref_model_ema': 0.9, 'objective__entropy_target': 6.0,
    'objective__entropy_coef': 0.01, 'objective__entropy_coef_step': 0.004, 'data__train_size': 48, 'data__batch_size': 8,
    'objective__num_generations': 4,
  },
  # A reward model beside rules, whose weights are frozen and begin the critic; its optimizer, the controller of the KL, statistics of the
  # scores, and a second stream of data.
  'ppo': {
    'rewards': {'functions': ('accuracy', 'format_tags', 'judge'), 'weights': (1.0, 0.2, 0.5)},
    'objective__num_generations': 2, 'objective__num_minibatches': 2, 'objective__kl_controller': 'adaptive', 'objective__kl_horizon': 64,
    'objective__kl_target': 0.05, 'objective__score_normalization': 'running', 'objective__ptx_coef': 0.1, 'data__batch_size': 16,
    'model__arch': {'num_hidden_layers': 1}, 'data__max_length': 64,
    'data__pretrain': {'task': 'arithmetic', 'train_size': 24}, 'data__train_size': 48,
  },
  # A frozen role of another architecture, and rows of both kinds from one stream.
  'distill': {
    'objective__num_generations': 2, 'objective__on_policy_fraction': 0.5, 'objective__teacher_top_k': 16, 'data__batch_size': 8,
    'model__arch': {'num_hidden_layers': 1}, 'data__max_length': 64, 'data__train_size': 48, 'optim__learning_rate': 5e-3,
  },
}  # fmt: skip


def make_judge(cache: str, folder) -> str:
  run(settings('reward_model', cache, total_steps=2, model__arch={'num_hidden_layers': 1}), folder / 'judge')
  return str(folder / 'judge')


@pytest.mark.parametrize('objective', RESUMED)
def test_resume_is_bit_for_bit(objective, cache, tmp_path, monkeypatch):
  """Failure: something that a step depends on is not in the checkpoint, or is not a function of (seed, step)."""
  chosen = settings(objective, cache, **RESUMED[objective])
  if objective == 'distill':
    chosen = config.override(chosen, 'roles.teacher', {'init': make_teacher(tmp_path), 'tokenizer': 'bytes'})
  if objective == 'ppo':
    judge = make_judge(cache, tmp_path)
    chosen = config.override(chosen, 'roles.reward', {'judge': {'init': judge}})
    critic, head = (
      build.build(config.resolve(chosen)).init().params['critic'],
      checkpoint.restore_params(judge, 'policy')['score'],
    )
    np.testing.assert_array_equal(critic['score'], head)
  run(chosen, tmp_path / 'whole')
  write = metrics.Writer.write

  def crash(self, step, values):
    write(self, step, values)
    if step == 7:  # past the checkpoint of step 4: steps 5 to 7 are cut and made again
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Writer, 'write', crash)
    with pytest.raises(KeyboardInterrupt):
      run(chosen, tmp_path / 'cut')
  assert logged(tmp_path / 'cut')[-1]['step'] == 7
  run(chosen, tmp_path / 'cut')
  assert_same(everything(tmp_path / 'cut'), everything(tmp_path / 'whole'))
  if objective == 'reinforce_pp':  # else there was nothing to resume
    entries = logged(tmp_path / 'whole')
    assert len({entry['entropy_coef'] for entry in entries}) == len(entries) == 8 and entries[-1]['kl'] > 0
  if objective == 'distill':
    entries = logged(tmp_path / 'whole')
    assert entries[-1]['divergence'] < 0.9 * entries[0]['divergence'] and {e['frac_on_policy'] for e in entries} == {0.5}
    assert set(json.loads((tmp_path / 'whole' / 'frozen.json').read_text())) == {'teacher'}
  if objective == 'ppo':
    entries = logged(tmp_path / 'whole')
    assert len({entry['objective/kl_coef'] for entry in entries}) == 8 and entries[-1]['grad_norm/critic'] > 0
    assert len({entry['rewards/judge/mean'] for entry in entries}) == 8
    assert set(json.loads((tmp_path / 'whole' / 'frozen.json').read_text())) >= {'reward.judge'}


def test_sft_learns(cache, tmp_path):
  """Failure: gradients, masks or data are wrong: next-token loss on worked chains does not fall."""
  run(settings('sft', cache, total_steps=60, log_every=5, optim__learning_rate=5e-3), tmp_path / 'run')
  losses = [entry['loss'] for entry in logged(tmp_path / 'run')]
  assert losses[0] > 2.5 and losses[-1] < 1.2


def test_grpo_learns(cache, tmp_path):
  """Failure: the policy gradient does not climb a reward that the policy can reach."""
  chosen = settings('grpo', cache, total_steps=20, optim__learning_rate=3e-3)
  chosen = config.override(chosen, 'rewards', {'functions': ('tests.test_e2e:letter_a',), 'weights': (1.0,)})
  run(chosen, tmp_path / 'run')
  rewards = [entry['reward'] for entry in logged(tmp_path / 'run')]
  assert rewards[0] < 0.1 and rewards[-1] > 0.5


def test_workdir(cache, tmp_path):
  """Failure: a run leaves something out that the README promises."""
  summary = run(settings('grpo', cache, total_steps=2, checkpoint__every=1), tmp_path / 'run')
  names = {path.name for path in (tmp_path / 'run').iterdir()}
  assert {'config.json', 'metrics.jsonl', 'completions', 'checkpoints', 'summary.json', 'curves.png', 'tensorboard'} <= names
  assert summary['steps'] == 2 and json.loads((tmp_path / 'run' / 'summary.json').read_text()) == summary
  entries = logged(tmp_path / 'run')
  wanted = {
    'step', 'loss', 'policy_loss', 'grad_norm', 'learning_rate', 'reward', 'reward_std', 'frac_reward_zero_std', 'entropy',
    'rewards/accuracy/mean', 'rewards/accuracy/std', 'rewards/format_tags/mean', 'completions/mean_length', 'completions/min_length',
    'completions/max_length', 'completions/clipped_ratio', 'clip_ratio/low_mean', 'clip_ratio/high_mean', 'clip_ratio/region_mean',
    'sampling/logp_difference/mean', 'sampling/logp_difference/max', 'num_tokens',
  }  # fmt: skip
  assert [entry['step'] for entry in entries] == [1, 2] and wanted <= entries[0].keys()
  assert entries[0]['sampling/logp_difference/max'] < 1e-4  # sampler and trainer agree
  assert len(metrics.read_jsonl(tmp_path / 'run' / 'completions' / 'step_000002.jsonl')) == 16 * 8
  assert (tmp_path / 'run' / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_divergence_stops_the_run(cache, tmp_path, capsys):
  """Failure: a run goes on with NaN, or overwrites the last good checkpoint with it."""
  argv = ['--config=configs/tiny.py:objective=sft', f'--workdir={tmp_path / "run"}', f'--config.data.cache_dir={cache}',
          '--config.checkpoint.every=1', '--config.optim.name=sgd', '--config.optim.learning_rate=1e15',
          '--config.optim.grad_clip=0']  # fmt: skip
  assert train.main(argv) == 3
  text = capsys.readouterr().err
  assert 'at step 2' in text and 'the last good checkpoint is that of step 1' in text
  assert checkpoint.open_manager(str(tmp_path / 'run')).latest_step() == 1
  assert all('NaN' not in line for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines())


def test_weights_beyond_numbers_are_not_saved(cache, tmp_path, capsys):
  """Failure: the gradient was finite, the step was not: the ruined weights become the last good checkpoint, or the run's end."""
  argv = ['--config=configs/tiny.py:objective=sft', f'--workdir={tmp_path / "run"}', f'--config.data.cache_dir={cache}',
          '--config.total_steps=1', '--config.optim.name=sgd', '--config.optim.learning_rate=1e30',
          '--config.optim.grad_clip=0']  # fmt: skip
  assert train.main(argv) == 3 and 'the norm of the weights is inf at step 1' in capsys.readouterr().err
  assert checkpoint.open_manager(str(tmp_path / 'run')).latest_step() is None


def test_pipeline_skips_finished_stages(cache, tmp_path, monkeypatch):
  """Failure: a second call trains again, or the stages do not hand over their weights."""
  evaluation = {'every': 2, 'size': 16, 'batch_size': 16, 'evaluators': {'greedy': {}}}
  base = config.merge(settings('sft', cache, total_steps=2, rollout__max_completion_length=16), {'eval': evaluation})
  rl = config.merge(settings('grpo', cache, total_steps=2), {'eval': evaluation, 'roles': {'policy': {'init': '{workdir}/base'}}})
  rl.pop('model')
  monkeypatch.chdir(tmp_path)
  workdir = 'my runs/demo'  # relative, and with a space
  result = pipeline.run_pipeline({'base': base, 'rl': rl}, workdir)
  assert result == json.loads((tmp_path / workdir / 'summary.json').read_text())
  assert set(result) == {'base', 'rl', 'final'} and 0 <= result['final']['accuracy'] <= 1
  first = metrics.read_jsonl(tmp_path / workdir / 'rl' / 'eval.jsonl')[0]['evaluators']
  # Before its first step the second stage is the first stage's end, judged by its own reward functions.
  last, begun = (
    {k: v for k, v in e['greedy'].items() if not k.startswith(('rewards/', 'difficulty'))}
    for e in (result['base']['evaluators'], first)
  )
  assert begun == last
  monkeypatch.setattr(train, 'collect', None)  # training would crash
  assert pipeline.run_pipeline({'base': base, 'rl': rl}, workdir) == result


def test_frozen_source_cannot_change(cache, tmp_path):
  """Failure: a resumed run measures its KL against another reference than it began with."""
  state = TrainState(
    step=0, cursor={}, updates=0, params={}, opt={}, aux={}, moving={}, frozen={'ref': {'w': np.ones(3, np.float32)}}
  )
  train.check_frozen(train.epath.Path(tmp_path), state)
  train.check_frozen(train.epath.Path(tmp_path), state)
  with pytest.raises(config.ConfigError, match='ref'):
    train.check_frozen(train.epath.Path(tmp_path), state.replace(frozen={'ref': {'w': np.zeros(3, np.float32)}}))
