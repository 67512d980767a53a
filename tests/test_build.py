"""From config to programs: every key acts or is refused, every size divides or is named."""

import collections
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import sweep_entries
from rl_reasoning import (
  build,
  collect,
  config,
  data,
  evaluators,
  families,
  metrics,
  model,
  optim,
  pipeline,
  resolution,
  rollout,
  sharding,
  stored,
  train,
  weights,
)
from rl_reasoning.config import ConfigError
from rl_reasoning.objectives.grpo import SETTINGS as SETTINGS_OF_GRPO, Given, Grpo
from rl_reasoning.objectives.sft import Sft
from rl_reasoning.presets import PRESETS
from rl_reasoning.structs import Batch, Rollout
from rl_reasoning.tokenizer import load as load_tokenizer
from tests.test_distill import make_teacher
from tests.test_tokenizer import make_folder

FOLDER = tempfile.TemporaryDirectory()  # deleted at exit
SHARED = {
  'total_steps': 8,
  'data': {'train_size': 64},
  'optim': {'schedule': 'linear', 'warmup_updates': 2},
}
SFT = config.merge(SHARED, {'data': {'batch_size': 16, 'max_length': 64}})
GRPO = config.merge(SHARED, {
  'data': {'batch_size': 8, 'max_prompt_length': 32},
  'objective': {'name': 'grpo', 'num_generations': 4},
  'rollout': {'max_completion_length': 16},
  'rewards': {'functions': ('accuracy', 'tests.test_build:crash'), 'on_error': 'none'},
})  # fmt: skip
EVAL = {'every': 4, 'size': 16, 'batch_size': 16}
SETTINGS = {
  'sft': SFT,
  'sft, evaluated': config.merge(SFT, {
    'eval': {**EVAL, 'evaluators': {'e': dataclasses.asdict(evaluators.Evaluator(num_samples=2, temperature=1.0))}},
    'rewards': {'functions': ('format', 'tests.test_build:crash'), 'on_error': 'none'},
  }),
  'grpo': GRPO,
  'grpo, several updates': config.merge(GRPO, {
    'objective': {'num_iterations': 2, 'num_minibatches': 2, 'beta': 0.1},
  }),
  'grpo, of another kind': config.merge(GRPO, {
    'objective': {
      'num_iterations': 2, 'surrogate': 'cispo', 'advantage_estimator': 'reinforce_pp', 'entropy_target': 2.0, 'dynamic_sampling': True,
    },
  }),
}  # fmt: skip
SETTINGS['grpo, experts'] = config.merge(GRPO, {'model': {'arch': {
  'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 16, 'scoring_func': 'sigmoid',
}}})  # fmt: skip
SETTINGS['grpo, mixture'] = {**GRPO, 'data': {
  **{k: v for k, v in GRPO['data'].items() if k != 'train_size'}, 'curriculum': 'pass_rate',
  'mixture': {'a': {'task': 'arithmetic', 'path': '', 'options': {}, 'train_size': 64, 'weight': 1.0}},
}}  # fmt: skip
SETTINGS['grpo, mixture']['data']['mixture']['b'] = {'task': 'countdown', 'train_size': 64}
PAIRS = config.merge(SFT, {
  'data': {'task': 'reviews', 'options': {'rows': 'rankings'}, 'max_length': 24, 'overlong': 'drop', 'batch_size': 8},
})  # fmt: skip
SETTINGS |= {
  'reward_model': config.merge(PAIRS, {'objective': {'name': 'reward_model'}, 'optim': {'frozen_layers': 1}}),
  'ppo': config.merge(GRPO, {'objective': {'name': 'ppo'}}),
  'ppo, of another kind': config.merge(
    GRPO,
    {
      'objective': {'name': 'ppo', 'num_iterations': 2, 'kl_controller': 'adaptive', 'ptx_coef': 1.0},
      'data': {'max_length': 64, 'pretrain': {'task': 'arithmetic', 'path': '', 'options': {}, 'train_size': 64}},
    },
  ),
  'dpo': config.override(PAIRS, 'objective', {'name': 'dpo'}),
  **{name: config.override(PAIRS, 'objective', {'name': name}) for name in ('simpo', 'orpo', 'cpl')},
  'online_dpo': config.override(config.override(GRPO, 'objective', {'name': 'online_dpo'}), 'data.batch_size', 8),
  'distill': config.merge(
    SHARED,
    {
      'data': {'batch_size': 8, 'max_prompt_length': 32, 'max_length': 64},
      'objective': {'name': 'distill', 'num_generations': 4, 'on_policy_fraction': 0.5},
      'rollout': {'max_completion_length': 16},
      'roles': {'teacher': {'init': make_teacher(FOLDER.name), 'tokenizer': 'bytes'}},
    },
  ),
}
SETTINGS['sft, adapters'] = config.merge(SFT, {
  'roles': {'policy': SETTINGS['distill']['roles']['teacher']}, 'lora': {'rank': 2},
})  # fmt: skip


def crash(prompts, completions, *, answer, bonus: float = 0.0, **columns):
  if any(int(a) % 2 for a in answer):
    raise RuntimeError('a reward with a bug')
  return [1.0 + bonus - 0.25 * sys.argv[0].endswith('worker.py')] * len(completions)  # shows where rewards.timeout lets it run


def refusal(call, *arguments) -> str:
  with pytest.raises(ConfigError) as caught:
    call(*arguments)
  return str(caught.value)


def resolve(settings):
  """(resolved config, objective, arch) as the command line gets it."""
  return resolution.resolve(config.resolve(settings), set(config.flatten(settings)))


def keys(name: str) -> tuple[dict, set[str]]:
  """(the keys of a resolved config of SETTINGS with their values, those that cannot act in it)."""
  resolved, objective, arch = resolve(SETTINGS[name])
  return config.flatten(config.to_dict(resolved)), set(resolution.inert(resolved, objective, arch))


# Another value for every key that can show in a step's rows and programs.
OTHER = {
  'seed': 1, 'total_steps': 9,
  'model.preset': 'nano', 'model.dtype': 'bfloat16', 'model.remat': 'full', 'model.attention': 'splash',
  'model.arch.vocab_size': 272, 'model.arch.hidden_size': 32, 'model.arch.intermediate_size': 64, 'model.arch.num_hidden_layers': 1,
  'model.arch.num_attention_heads': 8, 'model.arch.num_key_value_heads': 2, 'model.arch.head_dim': 8, 'model.arch.rope_theta': 500.0,
  'model.arch.rms_norm_eps': 1e-3, 'model.arch.tie_word_embeddings': False, 'model.arch.qkv_bias': True, 'model.arch.qk_norm': True,
  'optim.frozen_layers': 1, 'optim.cache_features': True, 'data.overlong': 'truncate_prompt',
  'data.pretrain': {'task': 'countdown', 'train_size': 32}, 'data.pretrain.task': 'linear', 'data.pretrain.train_size': 32,
  'data.pretrain.options': {'operands': 2}, 'roles.critic.learning_rate': 1e-3,
  'roles.policy.template': 'Q: {prompt}', 'roles.ref.template': 'Q: {prompt}', 'roles.ref.tokenizer': 'bytes',
  'data.task': 'countdown', 'data.options': {'operands': 2}, 'data.train_size': 32, 'data.batch_size': 24,
  'data.mixture.a.task': 'linear', 'data.mixture.a.train_size': 48, 'data.mixture.a.weight': 9.0, 'data.mixture.a.options': {'operands': 2},
  'data.curriculum_floor': 0.5, 'data.curriculum_decay': 0.5,
  'rollout.max_completion_length': 12, 'rollout.temperature': 0.7,
  'rollout.chunk': 4, 'rollout.cache_dtype': 'int8',
  'rewards.functions': ('format', 'format_tags'), 'rewards.weights': (2.0, 0.25), 'rewards.timeout': 0.0,
  'rewards.options': {'tests.test_build:crash': {'bonus': 1.0}}, 'rewards.only': {'accuracy': ('a',)},
  'optim.name': 'sgd', 'optim.options': {'b1': 0.5}, 'optim.learning_rate': 1e-3, 'optim.schedule': 'cosine', 'optim.warmup_updates': 1,
  'optim.grad_clip': 0.5, 'optim.micro_batch': 8, 'optim.router_replay': True, 'optim.router_bias_rate': 0.01,
  'lora.alpha': 5.0, 'lora.targets': '.*/(q|o)',
  'mesh.fsdp': 2, 'mesh.tensor': 2, 'mesh.sequence': 2,
  'eval.seed': 1, 'eval.size': 8, 'eval.batch_size': 8, 'eval.at_start': False, 'eval.evaluators': {'e': {}},
  'eval.evaluators.e.prefix': '<think>', 'eval.evaluators.e.num_samples': 3, 'eval.evaluators.e.temperature': 0.5,
  'eval.evaluators.e.top_k': 5, 'eval.evaluators.e.top_p': 0.5, 'eval.evaluators.e.min_p': 0.1,
  'eval.evaluators.e.max_completion_length': 12, 'eval.evaluators.e.task': 'countdown', 'eval.evaluators.e.options': {'operands': 2},
  'eval.evaluators.e.size': 8, 'eval.evaluators.e.seed': 1, 'eval.evaluators.e.ks': (1,),
  'objective.train_on_prompt': True, 'objective.aggregation': 'sequence_sum', 'objective.num_generations': 6,
  'objective.num_iterations': 3, 'objective.num_minibatches': 4, 'objective.epsilon': 0.1, 'objective.epsilon_high': 0.3,
  'objective.beta': 0.2, 'objective.kl_estimator': 'k2', 'objective.scale_rewards': 'none',
  'objective.mask_truncated_completions': True, 'objective.ref_model_sync_updates': 3, 'objective.ref_model_ema': 0.9,
  'objective.surrogate': 'cispo', 'objective.importance_sampling_level': 'sequence', 'objective.delta': 3.0, 'objective.cispo_cap': 2.0,
  'objective.tis_cap': 2.0, 'objective.advantage_estimator': 'leave_one_out', 'objective.reinforce_pp_baseline': True,
  'objective.multi_objective_aggregation': 'normalize_then_sum', 'objective.kl_in': 'reward', 'objective.kl_importance_weighted': True,
  'objective.entropy_coef': 0.01, 'objective.entropy_target': 1.0, 'objective.entropy_coef_step': 0.002,
  'objective.ranking_size': 3, 'objective.center_rewards_coefficient': 0.01, 'objective.cliprange': 0.1,
  'objective.critic': 'shared', 'objective.cliprange_value': 0.1, 'objective.vf_coef': 0.5, 'objective.gamma': 0.9, 'objective.lam': 0.5,
  'objective.kl_coef': 0.2, 'objective.kl_controller': 'adaptive', 'objective.kl_target': 1.0, 'objective.kl_horizon': 100,
  'objective.score_normalization': 'running', 'objective.score_clip': 0.5, 'objective.missing_eos_penalty': 1.0,
  'objective.whiten_rewards': True, 'objective.ptx_coef': 0.5, 'objective.ptx_rows': 2, 'objective.average_log_prob': True,
  'objective.label_smoothing': 0.1, 'objective.rpo_alpha': 0.5, 'objective.simpo_gamma': 0.3, 'objective.orpo_lambda': 0.3,
  'objective.cpl_alpha': 0.2, 'objective.cpl_gamma': 0.9, 'objective.cpl_lambda': 0.4, 'objective.kto_desirable': 2.0,
  'objective.kto_undesirable': 2.0, 'objective.loss_type': 'hinge',
  'objective.jsd_beta': 0.0, 'objective.on_policy_fraction': 0.25, 'objective.temperature': 2.0, 'objective.teacher_top_k': 4,
  'objective.entropy_coef_max': 0.04, 'objective.dynamic_sampling': True, 'objective.max_refills': 1, 'objective.overlong_buffer': 4,
}  # fmt: skip
# Keys that name a source or a limit: another value shows in what is refused.
REFUSED = {
  'roles.policy.init': ('/no/such', "config key 'roles.policy.init': '/no/such' does not exist"),
  'roles.policy.tokenizer': ('/no/such', "config key 'roles.policy.tokenizer': '/no/such'"),
  'lora.rank': (3, "config key 'lora.rank': roles.policy.init is empty"),
  'roles.ref.init': ('/no/such', "'/no/such' does not exist"),
  'roles.critic.init': ('/no/such', "config key 'roles.critic.init': '/no/such' does not exist"),
  'roles.teacher.init': ('/no/such', "config key 'roles.teacher.init': '/no/such' does not exist"),
  'roles.teacher.tokenizer': ('/no/such', "config key 'roles.teacher.tokenizer': '/no/such'"),
  'roles.reward': ({'a': {'init': '/no/such'}}, "config key 'roles.reward.a': rewards.functions does not name it"),
  'rewards.combinations': ({'d': {'rule': 'mean', 'of': ('b', 'c')}}, "'b' is none of roles.reward"),
  'data.options.rows': ('prompts', 'a row of rankings has no column responses, ranks'),
  'objective.ptx_coef': (0.5, "config key 'data.pretrain' is empty"),
  **{
    (name, 'objective.num_generations'): (2, "'data.max_length': no row comes from data")
    for name in ('dpo', 'simpo', 'orpo', 'cpl')
  },
  'eval.evaluators.e.kl_to': ('/no/such', "'/no/such' does not exist"),
  'data.pretrain.path': ('/no/such', "config key 'data.pretrain.path' cannot act"),
  'data.path': ('/no/such', "config key 'data.path' cannot act: data.task 'arithmetic' reads no file"),
  'eval.evaluators.e.path': ('/no/such', "config key 'data.path' cannot act: data.task 'arithmetic' reads no file"),
  'data.mixture': ({'a': {'task': 'linear', 'train_size': 32}}, "'data.train_size': data.mixture names the tasks"),
  'data.mixture.a.path': ('/no/such', "config key 'data.mixture.a.path' cannot act"),
  'data.curriculum': ('pass_rate', "config key 'data.curriculum': 'pass_rate' has nothing to choose from without data.mixture"),
  'data.max_length': (8, "config key 'data.max_length': 8, but a row has"),
  'data.max_prompt_length': (4, "config key 'data.max_prompt_length': 4, but"),
  'objective.name': ('no such', "config key 'objective.name': 'no such' is none of"),
  'mesh.expert': (2, "config key 'mesh.expert': 2, but the policy has no experts"),
  'mesh.data': (4, "'data': 4"),
  'rollout.top_k': (5, 'top_k, top_p and min_p must be off'),
  'rollout.top_p': (0.5, 'top_k, top_p and min_p must be off'),
  'rollout.min_p': (0.1, 'top_k, top_p and min_p must be off'),
  'rewards.on_error': ('raise', "reward 'tests.test_build:crash' failed on row"),
}
# They change when something is done or where it is kept, not what a step computes.
BOOKKEEPING = {'log_every', 'checkpoint.every', 'checkpoint.keep', 'data.cache_dir', 'eval.every', 'eval.at_start'}

# They act from the second step on: tests/test_data.py, and test_features_are_remembered.
ELSEWHERE = {'data.curriculum_floor', 'data.mixture.b.task', 'data.mixture.b.train_size', 'optim.cache_features'}
# And of the architecture what no preset of these tests has: tests/test_families.py.
ELSEWHERE |= {
  f'model.arch.{key}' for key in config.flatten(dataclasses.asdict(PRESETS['tiny'])) if f'model.arch.{key}' not in OTHER
}

# They stand in the program; that they decide nothing is test_what_stands_by and tests/test_ppo.py. The last ones are made wherever they
# are set.
STANDS_BY = {
  'objective.epsilon', 'objective.epsilon_high', 'objective.delta', 'objective.importance_sampling_level', 'objective.cliprange',
  'objective.cliprange_value', 'data.pretrain', 'roles.reward', 'rewards.combinations', 'optim.cache_features',
}  # fmt: skip
# Where they cannot act, the objective itself refuses every other value.
ONE_VALUE = {'objective.multi_objective_aggregation'}


def fake_rollout(calls: list, params, arch, prompts, *, settings, group, key, prompt_ids=None, mesh=None, **others) -> Rollout:
  """In place of rollout.generate: notes what was asked for; every other completion is in the format, the others are cut."""
  calls.append((arch, prompts, settings, group, key, prompt_ids, others))
  N, C = len(prompts) * group, settings.max_completion_length
  good = [258, 49, 259, 260, 53, 261, 257]  # <think>1</think><answer>5</answer><end>
  tokens = np.full((N, C), 65, np.int32)
  tokens[::2, : len(good)] = good
  tokens[::2, len(good) :] = 0
  cut = np.arange(N) % 2 == 1
  return Rollout(tokens, np.full((N, C), -1.0, np.float32), np.where(cut, C, len(good)), cut)


@pytest.fixture(scope='module')
def running(tmp_path_factory):
  """(settings, keys set) -> context of (run, its mesh set; what its rollouts were asked for)."""
  cache = str(tmp_path_factory.mktemp('data'))

  @contextlib.contextmanager
  def enter(settings, keys_set):
    run, calls = build.build(config.resolve(config.override(settings, 'data.cache_dir', cache)), keys_set), []
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(run.mesh):
      patch.setattr(rollout, 'generate', functools.partial(fake_rollout, calls))
      yield run, calls

  return enter


def first_rows(run, state):
  rows = data.open_train(run.config.data, run.config.seed)
  state = state.replace(cursor={**rows.first(), **state.cursor})
  return collect.collect(run, rows, state, jax.random.key(0), metrics.PhaseTimer())


@pytest.fixture(scope='module')
def observe(running):
  """(settings, keys set) -> texts, one after the other: of all that a run of them computes from."""

  def texts(settings, keys_set):
    with running(settings, keys_set) as (run, calls):
      steps = run.steps
      yield str(run.mesh)
      yield str(run.tokenizer.encode('<think>a'))
      begin, state = jax.make_jaxpr(run.init)(), jax.eval_shape(run.init)
      yield f'{begin} {begin.consts} {jax.tree.structure(state)}'
      got = first_rows(run, state)
      yield f'{got.cursor} {got.samples} {calls}'
      yield str([x.tolist() for x in jax.tree.leaves(got.batch)])
      yield str([part.tokens.tolist() for part in steps.minibatches(got.batch, jax.random.key(0))])
      yield str(jax.make_jaxpr(steps.score)(state, got.batch))
      scored = jax.eval_shape(steps.score, state, got.batch)
      yield jax.jit(steps.prepare).lower(state, scored).as_text()  # constants in full
      prepared, _, told = jax.eval_shape(steps.prepare, state, scored)
      some = next(iter(steps.minibatches(prepared, jax.random.key(0)))) if run.objective.num_minibatches == 1 else prepared
      yield str(jax.make_jaxpr(steps.update)(state, some))
      told |= jax.eval_shape(steps.update, state, some)[1]
      yield str(jax.make_jaxpr(run.objective.adapt)(state.aux, told))
      if run.config.eval.every:
        calls.clear()
        yield str(evaluators.evaluate_all(run, state.params['policy'], evaluators.test_problems(run)))
        yield str(calls)

  return lambda *arguments: contextlib.closing(texts(*arguments))


@pytest.fixture(scope='module')
def whole(observe):
  """name -> all texts of SETTINGS[name]."""

  @functools.cache
  def texts(name):
    with observe(SETTINGS[name], set(config.flatten(SETTINGS[name]))) as got:
      return list(got)

  return texts


def own(key: str) -> bool:
  return key.startswith('objective.')


def live() -> list[tuple[str, str]]:
  """(name, key) of what must act; a key is tried in the first of SETTINGS in which it can, once more in the first of rollouts, and those of
  the objective under each of them."""
  pairs, tried = [], collections.defaultdict(set)
  for name in SETTINGS:
    values, dead = keys(name)
    kind = name.split(',')[0]
    before = tried[kind] if kind in ('sft', 'grpo') else {*tried[kind], *(k for k in set().union(*tried.values()) if not own(k))}
    fresh = values.keys() - dead - BOOKKEEPING - ELSEWHERE - before
    pairs += [(name, key) for key in sorted(fresh)]
    tried[kind] |= fresh
  return pairs


@pytest.mark.parametrize('name, key', live())
def test_every_key_acts(name, key, observe, whole):
  """Failure: a knob that moves nothing, and is not refused either. A new key needs another value in OTHER or REFUSED."""
  value, wanted = REFUSED.get((name, key), REFUSED.get(key, (OTHER.get(key), '')))
  assert value is not None and value != keys(name)[0][key]
  changed = config.override(SETTINGS[name], key, value)
  old = whole(name)
  with observe(changed, set(config.flatten(changed))) as new:
    if wanted:
      assert wanted in refusal(list, new)
    else:
      assert any(a != b for a, b in zip(new, old))


@pytest.mark.parametrize('name', SETTINGS)
def test_keys_that_cannot_act(name, observe, whole):
  """Failure: a key is refused although it acts (all of them changed at once must change nothing), or is not refused."""
  values, dead = keys(name)
  changed = SETTINGS[name]
  for key in sorted(dead):
    value = OTHER[key] if key in OTHER else REFUSED[key][0]
    assert f"'{key}" in refusal(resolve, config.override(SETTINGS[name], key, value))
    assert f"'{key}" in refusal(resolve, config.override(SETTINGS[name], key, values[key]))  # set to what it is anyway
    if key not in STANDS_BY | ONE_VALUE:
      changed = config.override(changed, key, value)
  with observe(changed, set()) as got:
    assert list(got) == whole(name)


def test_what_stands_by():
  """Failure: a key of the ratio is refused where a step has one update, although that update depends on it (a ratio of exactly 1 is on
  no edge)."""
  rng, N, T = np.random.default_rng(0), 4, 6
  logp, ones = jnp.asarray(rng.normal(-2, 1, (N, T)), jnp.float32), jnp.ones((N, T), jnp.float32)
  batch = Batch(
    tokens=ones, segment_NT=ones.astype(jnp.int32), position_NT=ones, mask_NT=ones, source_N=ones[:, 0], group_N=ones[:, 0],
    weight_NT=ones, logp_sample_NT=logp, advantage_NT=jnp.asarray(rng.normal(0, 1, (N, T)), jnp.float32),
    logp_old_NT=logp - jnp.asarray(rng.choice([0.15, -0.15, 2.0], (N, T)), jnp.float32),
  )  # fmt: skip
  nets = {'policy': SimpleNamespace(logp=lambda params, rows, **wanted: (params, params))}

  def gradient(updates, **keys):
    objective = Grpo(Given(('accuracy',), (1.0,), T), num_iterations=updates, **keys)
    return jax.grad(lambda x: objective.loss(nets, {'policy': x}, {}, {}, batch)[0])(logp)

  np.testing.assert_allclose(gradient(1), -batch.advantage_NT, rtol=1e-6)
  for keys in ({'epsilon': 1e-6}, {'epsilon_high': 1e-6}, {'delta': 1.5}, {'importance_sampling_level': 'sequence'}):
    np.testing.assert_array_equal(gradient(1, **keys), gradient(1))
    assert np.any(gradient(2, **keys) != gradient(2)), keys
  cispo = {'surrogate': 'cispo'}
  for keys in ({'cispo_cap': 1.0}, {'importance_sampling_level': 'sequence'}):
    np.testing.assert_array_equal(gradient(1, **cispo, **keys), gradient(1))
    assert np.any(gradient(2, **cispo, **keys) != gradient(2, **cispo)), keys
  assert np.any(gradient(1, **cispo, cispo_cap=0.5) != gradient(1))


def test_features_are_remembered(running):
  """Failure: frozen layers learn, what is remembered of them is not what they give (a row's padding, its order, another row's), or they are
  run again for a row that was there."""
  settings = config.merge(PAIRS, {
    'objective': {'name': 'reward_model'}, 'optim': {'frozen_layers': 1, 'cache_features': True, 'options': {'weight_decay': 0.1}},
  })  # fmt: skip
  with running(settings, set()) as (run, _), jax.set_mesh(run.mesh):
    state, calls = run.init(), []
    before = jax.device_get(state.params['policy'])
    of = run.features.of
    run = run._replace(features=run.features._replace(of=lambda *given: calls.append(1) or of(*given)))
    batch = first_rows(run, state).batch
    assert calls and batch.extras['features'].shape == (*batch.tokens.shape, 64)
    count = len(calls)
    again = first_rows(run, state).batch
    assert len(calls) == count
    rows = again.tokens, again.segment_NT, again.position_NT
    given = model.trunk(state.params['policy'], run.arch, *rows, 1, 'float32') * (again.segment_NT > 0)[..., None]
    np.testing.assert_allclose(again.extras['features'], given, atol=1e-5)
    after = jax.device_get(run.steps.update(state, run.steps.prepare(state, again)[0])[0].params['policy'])
  for name, moved in (('embed', False), ('score', True)):
    assert np.any(after[name] != before[name]) == moved, name
  for name, x in after['layers'].items():
    assert np.array_equal(x[0], before['layers'][name][0]) and (
      np.any(x[1] != before['layers'][name][1]) or name.endswith('norm')
    )


@pytest.mark.parametrize(
  'settings, key, why',
  [
    (config.override(SFT, 'rollout.temperature', 1.0), 'rollout.temperature', 'nothing is sampled'),
    (config.override(SETTINGS['sft, evaluated'], 'rollout.temperature', 1.0), 'rollout.temperature', 'evaluators name their own'),
    (config.override(SFT, 'rewards.weights', ()), 'rewards.weights', 'reads no rewards'),
    (config.override(SFT, 'roles.ref.init', 'x'), 'roles.ref.init', 'keeps no reference'),
    (config.override(SFT, 'eval.size', 3), 'eval.size', 'eval.every is 0'),
    (config.override(SFT, 'eval.evaluators', {'greedy': {}}), 'eval.evaluators.greedy', 'eval.every is 0'),
    (config.merge(SFT, {'eval': EVAL}), 'eval.every', 'eval.evaluators is empty'),
    (config.override(GRPO, 'data.max_length', 9), 'data.max_length', 'no row comes from data'),
    (config.override(GRPO, 'objective.kl_estimator', 'k2'), 'objective.kl_estimator', 'beta is 0'),
    (config.override(GRPO, 'objective.ref_model_sync_updates', 2), 'objective.ref_model_sync_updates', 'beta is 0'),
    (config.override(GRPO, 'objective.epsilon', 0.2), 'objective.epsilon', 'one update a rollout'),
    (config.override(GRPO, 'roles.ref.template', 'plain'), 'roles.ref.template', 'keeps no reference'),
    (config.merge(GRPO, {'objective': {'beta': 0.1}, 'roles': {'ref': {'template': 'chat'}}}), 'roles.ref.template', 'the policy sampled'),
    (config.merge(GRPO, {'roles': {'policy': {'init': 'tests/fixtures/llama'}}, 'model': {'preset': 'tiny'}}), 'model.preset',
     'the architecture comes with roles.policy.init'),
  ],
)  # fmt: skip
def test_refusals_say_why(settings, key, why):
  """Failure: a key that cannot act is accepted, or the reason is another."""
  lines = [line for line in refusal(resolve, settings).splitlines() if repr(key) in line]
  assert len(lines) == 1 and why in lines[0]


def test_weights_of_nothing_are_refused():
  """Failure: a run that can learn nothing goes to its end; or a weight of 0, which only logs a reward, is refused."""
  settings = config.override(GRPO, 'rewards.weights', (0.0, 0.0))
  assert "'rewards.weights': all 0" in refusal(resolve, settings)
  resolve(config.override(settings, 'rewards.weights', (1.0, 0.0)))


def test_truncation_is_refused_in_training():
  """Failure: the policy is scored under another distribution than the one it was sampled from."""
  for key, value in (('top_k', 5), ('top_p', 0.9), ('min_p', 0.1)):
    assert 'top_k, top_p and min_p must be off' in refusal(resolve, config.override(GRPO, f'rollout.{key}', value))
  assert "'rollout.temperature': 0 is greedy" in refusal(resolve, config.override(GRPO, 'rollout.temperature', 0))


@pytest.mark.parametrize(
  'objective, wanted',
  [
    ({'name': 'grppo'}, "config key 'objective.name': 'grppo' is none of sft, reward_model"),
    ({'name': {'x': 1}}, "config key 'objective.name'"),
    ({'name': 'grpo', 'num_generation': 4}, "did you mean 'objective.num_generations'?"),
    ({'name': 'grpo', 'given': 1}, "config key 'objective.given' is unknown"),
    ({'name': 'sft', 'beta': 1.0}, "config key 'objective.beta' is unknown"),
    ({'name': 'sft', 'aggregation': 'fixed_length'}, "config key 'objective.aggregation': 'fixed_length' is none of"),
    ({'name': 'grpo', 'num_generations': 1}, "config key 'objective.num_generations': a group of one"),
    ({'name': 'grpo', 'num_iterations': 0}, "config key 'objective.num_iterations'"),
    ({'name': 'grpo', 'epsilon': 'x'}, "config key 'objective.epsilon': 'x' is not of type float"),
    ({'name': 'grpo', 'epsilon': float('nan')}, "config key 'objective.epsilon': nan is not finite"),
    ({'name': 'grpo', 'kl_estimator': 'k1', 'beta': 0.1}, "config key 'objective.kl_estimator': k1 in a loss"),
    ({'name': 'rloo', 'num_iterations': 2}, "config key 'objective.num_iterations': REINFORCE makes one update"),
    ({'name': 'dapo', 'overlong_buffer': 10_000}, "config key 'objective.overlong_buffer': 10000 is not within"),
    ({'name': 'grpo', 'overlong_buffer': 2.5}, "config key 'objective.overlong_buffer': 2.5 is not of type int"),
  ],
)
def test_make_objective_refuses(objective, wanted):
  """Failure: a misspelt or impossible key of an objective is a traceback or is ignored."""
  assert wanted in refusal(lambda: resolution.make_objective(config.resolve({'objective': objective})))


def test_make_objective():
  """Failure: an objective misses what it reads of other sections, or what was set."""
  chosen = config.resolve(
    config.merge(GRPO, {'objective': {'epsilon_high': 1}, 'rewards': {'functions': ('format', 'accuracy')}})
  )
  given = Given(('format', 'accuracy'), (1.0, 1.0), 16)
  assert resolution.make_objective(chosen) == Grpo(given, num_generations=4, epsilon_high=1.0)
  assert resolution.make_objective(config.resolve(SFT)) == Sft()


def test_end_ids_reach_the_rollout(running, tmp_path):
  """Failure: of the end ids of tokenizer and generation_config one does not stop a rollout (trl#7039). Both are trained: test_rollout."""
  folder = make_folder(tmp_path, generation_eos=[256])  # <|endoftext|>, beside the tokenizer's own <|im_end|>
  settings = config.override(GRPO, 'roles.policy.tokenizer', folder)
  with running(settings, set()) as (run, calls):
    first_rows(run, jax.eval_shape(run.init))
  assert calls[0][-1]['end_ids'] == run.tokenizer.end_ids == (256, 258)


@pytest.mark.parametrize('name', SETTINGS_OF_GRPO)
def test_named_settings(name):
  """Failure: a named setting is not what a config gets, its keys cannot be overridden, it resolves to something else than its own
  config.json, or --explain does not print its formula."""
  settings = config.override(GRPO, 'objective.name', name)
  resolved, objective, _ = resolve(settings)
  assert objective.name == name
  wanted = {**SETTINGS_OF_GRPO[name], **({'overlong_buffer': 3} if name == 'dapo' else {})}  # a fifth of 16
  assert {key: getattr(objective, key) for key in wanted} == wanted
  assert resolution.resolve(resolved, set())[:2] == (resolved, objective)
  again = config.resolve(json.loads(config.to_json(resolved)))
  assert resolution.resolve(again, set())[:2] == (resolved, objective)
  explained = resolution.explain(config.resolve(settings), set(config.flatten(settings)), 8)
  assert explained['formula'] == objective.formula() and '\n'.join(objective.formula()) in metrics.explanation(explained)
  assert resolve(config.override(settings, 'objective.beta', 0.5))[1] == dataclasses.replace(objective, beta=0.5)


def test_resolve_fills_in():
  """Failure: config.json does not say what a run was made of."""
  resolved, objective, arch = resolve(config.override(GRPO, 'model.arch.rope_theta', 500))
  assert arch == dataclasses.replace(PRESETS['tiny'], rope_theta=500.0)
  assert resolved.model.arch == dataclasses.asdict(arch) and resolved.roles.policy.tokenizer == 'bytes'
  assert resolved.objective == {k: v for k, v in dataclasses.asdict(objective).items() if k != 'given'}
  assert resolution.resolve(resolved, set())[0] == resolved


@pytest.mark.parametrize(
  'settings, wanted',
  [
    ({'model': {'preset': 'tinny'}}, "config key 'model.preset': 'tinny' is none of tiny, "),
    ({'model': {'arch': {'hidden_dim': 3}}}, "config key 'model.arch.hidden_dim' is unknown"),
    ({'model': {'arch': {'hidden_size': 3.5}}}, "config key 'model.arch.hidden_size': 3.5 is not of type int"),
    ({'model': {'arch': {'head_dim': 3}}}, 'head_dim: 3 must be even'),
    ({'model': {'arch': {'num_key_value_heads': 3}}}, 'num_attention_heads: 4 is not a multiple'),
    ({'roles': {'policy': {'init': 'tests/fixtures/qwen2'}}, 'model': {'arch': {'qkv_bias': False}}},
     "config key 'model.arch.qkv_bias': False, but tests/fixtures/qwen2 has True"),
    ({'roles': {'policy': {'init': 'tests/fixtures/qwen2'}}, 'model': {'arch': {'hidden': 3}}}, "'model.arch.hidden' is unknown"),
    ({'roles': {'policy': {'init': '/no/such'}}}, "config key 'roles.policy.init': '/no/such' does not exist"),
    ({'roles': {'policy': {'template': 'r1zero'}}}, "config key 'roles.policy.template': 'r1zero' is none of plain, r1_zero, chat"),
  ],
)  # fmt: skip
def test_resolve_refuses(settings, wanted):
  """Failure: an architecture or prompt that cannot be, or contradicts the weights, is built."""
  assert wanted in refusal(resolve, config.merge(SFT, settings))


def test_arch_of_weights():
  """Failure: keys that agree with the weights are refused, or the default preset leaks into them."""
  init = {'roles': {'policy': {'init': 'tests/fixtures/qwen2', 'tokenizer': 'bytes'}}}
  found = resolve(config.merge(SFT, init))[2]
  assert found.qkv_bias and found != PRESETS['tiny']
  same = config.merge(init, {'model': {'arch': {k: v for k, v in dataclasses.asdict(found).items() if k.startswith('num_')}}})
  assert resolve(config.merge(SFT, same))[2] == found


@pytest.mark.parametrize(
  'text', ['', '[]', '{}', '{"model": 3}', '{"model": {"arch": {"vocab_size": 3}}}', '\x00', '{"model": {"arch": {}}']
)
def test_init_from_a_damaged_run(text, tmp_path):
  """Failure: a run's folder with a broken config.json ends in a traceback."""
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'config.json').write_text(text)
  assert refusal(resolve, config.override(SFT, 'roles.policy.init', str(tmp_path)))


MESH = functools.partial(sharding.make_mesh, data=4, fsdp=2, tensor=1)


@pytest.mark.parametrize(
  'settings, key, numbers',
  [
    ({'data': {'batch_size': 12}}, 'data.batch_size', (12, 8)),
    ({'eval': {**EVAL, 'batch_size': 12}}, 'eval.batch_size', (12, 8)),
    ({'objective': {'num_minibatches': 3}}, 'objective.num_minibatches', (32, 3)),
    ({'objective': {'num_minibatches': 8}}, 'objective.num_minibatches', (4, 8)),
    ({'optim': {'micro_batch': 64}}, 'optim.micro_batch', (64, 32)),
    ({'optim': {'micro_batch': 24}}, 'optim.micro_batch', (32, 24)),
    ({'optim': {'micro_batch': 4}}, 'optim.micro_batch', (4, 8)),
    ({'optim': {'micro_batch': 32}, 'objective': {'num_minibatches': 2}}, 'optim.micro_batch', (32, 16)),
  ],
)
def test_sizes_that_do_not_divide(settings, key, numbers):
  """Failure: a batch that does not divide reaches the mesh, or key and numbers are not told."""
  chosen = config.resolve(config.merge(GRPO, settings))
  text = refusal(resolution.check_sizes, chosen, resolution.make_objective(chosen), MESH())
  assert text.startswith(f'config key {key!r}: ') and all(str(n) in text for n in numbers)


def test_sizes_that_divide():
  """Failure: a good split is refused."""
  for settings in ({}, {'optim': {'micro_batch': 32}}, {'optim': {'micro_batch': 8}}, {'objective': {'num_minibatches': 4}},
                   {'objective': {'num_minibatches': 2}, 'optim': {'micro_batch': 8}}, {'eval': {'batch_size': 5}}):  # fmt: skip
    chosen = config.resolve(config.merge(GRPO, settings))
    resolution.check_sizes(chosen, resolution.make_objective(chosen), MESH())


@pytest.mark.parametrize(
  'settings, wanted',
  [
    ({'mesh': {'data': 3}}, "'data': 3"),
    ({'mesh': {'fsdp': -1}}, 'at most one is -1'),
    ({'mesh': {'tensor': 0}}, "'tensor': 0"),
    ({'mesh': {'tensor': 8}}, 'of size 4 does not divide over 8'),
    ({'mesh': {'fsdp': 4}, 'model': {'arch': {'hidden_size': 66}}}, "axis 'embed' of size 66 does not divide over 4"),
    ({'model': {'arch': {'vocab_size': 256}}}, "the tokenizer 'bytes' has 264 ids, the model 256 embeddings"),
    ({'optim': {'name': 'adamm'}}, "config key 'optim.name': optax has no optimizer 'adamm'"),
    ({'optim': {'name': 'lbfgs'}}, 'optax.lbfgs with {} makes no update'),
    ({'optim': {'options': {'mask': True}}}, "config key 'optim.options.mask' is unknown"),
    ({'roles': {'policy': {'tokenizer': 'tests/fixtures'}}}, "config key 'roles.policy.tokenizer': 'tests/fixtures'"),
  ],
)
def test_build_refuses(settings, wanted):
  """Failure: what the mesh, the weights, the tokenizer or the optimizer cannot be is found by a traceback, later."""
  merged = config.merge(SFT, settings)
  assert wanted in refusal(build.build, config.resolve(merged), set(config.flatten(merged)))


def test_configs(monkeypatch):
  """Failure: a config of this repository sets a key that does not exist or cannot act."""
  stages = config.read_file('configs/demo.py')['stages']
  stages['rl'] = config.override(stages['rl'], 'roles.policy.init', '')
  gsm8k = [config.read_file(f'configs/grpo_gsm8k.py:stage={stage}') for stage in ('sft', 'rl')]
  tiny = [
    config.read_file(f'configs/tiny.py:objective={name}') for name in ('sft', 'grpo', 'ppo', 'reward_model', 'cpl', 'online_dpo')
  ]
  tiny.append(config.read_file('configs/tiny.py:objective=distill,teacher=tests/fixtures/llama'))
  sweeps = [sweep_entries.read_sweep(f'configs/sweeps/{name}.py', [0]).runs.values() for name in ('grpo_family', 'ppo_grpo')]
  swept = [config.override(run.settings, 'roles.policy.init', '') for runs in sweeps for run in runs]
  judged = [config.read_file(f'configs/rm_hh.py:subset={name},pandalm=x') for name in ('helpful', 'harmless', 'judge')]
  models = ','.join(f'{name}=tests/fixtures/classifier' for name in ('helpful', 'harmless'))
  judged += [config.read_file(f'configs/rlhf_hh.py:{models}')]
  for settings in judged:
    settings['optim']['frozen_layers'] = 1  # of the preset's two
  for settings in (*stages.values(), *gsm8k, *tiny, *swept, *judged):
    resolved, objective, _ = resolve(settings)
    resolution.check_splits(resolved, objective)
    evaluators.make_evaluators(resolved.eval.evaluators)
  monkeypatch.setattr(resolution, 'make_mesh', lambda config: sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  given = {'scale': 'stage=all,base=tests/fixtures/llama', 'gsm8k_rounds': 'weights=tests/fixtures/llama'}
  for file in ('rlhf_nano', 'r1_nano', 'best_of_k', 'return_conditioned', 'lora_nano', *given):
    pipeline.check_stages(config.read_file(f'configs/{file}.py:{given.get(file, "seed=0")}')['stages'], '/no/such')


def test_batch_sizes():
  """Failure: --explain counts prompts, completions, updates or tokens wrongly."""
  settings = config.merge(GRPO, {'objective': {'num_iterations': 3, 'num_minibatches': 2}, 'optim': {'micro_batch': 8}})
  resolved, objective, _ = resolve(settings)
  assert resolution.batch_sizes(resolved, objective) == {
    'prompts_per_step': 8, 'completions_per_step': 32, 'updates_per_step': 6, 'completions_per_update': 16,
    'completions_per_micro_batch': 8, 'max_tokens_per_step': 32 * (32 + 16),
  }  # fmt: skip
  resolved, objective, _ = resolve(SFT)
  assert resolution.batch_sizes(resolved, objective) == {
    'prompts_per_step': 16, 'rows_per_step': 16, 'updates_per_step': 1, 'rows_per_update': 16,
    'rows_per_micro_batch': 16, 'max_tokens_per_step': 16 * 64,
  }  # fmt: skip
  resolved, objective, _ = resolve(SETTINGS['ppo, of another kind'])  # a row of data beside four completions
  assert resolution.batch_sizes(resolved, objective)['max_tokens_per_step'] == 8 * (4 * (32 + 16) + 64)


def test_explain():
  """Failure: sweeps and launchers are told another config, hash, size or list of dead keys than a run would have."""
  resolved, objective, arch = resolve(GRPO)
  got = resolution.explain(config.resolve(GRPO), set(config.flatten(GRPO)), 8)
  sizes = [np.prod(w.shape) for w in jax.tree.leaves(model.weight_table(arch), is_leaf=model.is_weight)]
  assert got == {
    'config': config.to_dict(resolved), 'hash': config.digest(config.to_dict(resolved)), 'devices': 8, 'parameters': sum(sizes),
    'batch_sizes': resolution.batch_sizes(resolved, objective), 'inert_defaults': resolution.inert(resolved, objective, arch),
    'formula': objective.formula(),
  }  # fmt: skip
  assert {'objective.kl_estimator', 'data.max_length', 'eval.size', 'roles.ref.init'} <= got['inert_defaults'].keys()
  text = metrics.explanation(got)
  assert got['hash'] in text and 'completions_per_step: 32' in text and 'eval.size: eval.every is 0' in text
  assert 'optim.name' in refusal(resolution.explain, config.resolve({'optim': {'name': 'adamm'}}), set(), 8)
  uneven = config.resolve(config.merge(GRPO, {'objective': {'num_minibatches': 3}}))
  assert "'objective.num_minibatches': 32 rows" in refusal(resolution.explain, uneven, set(), 1)
  hasty = config.resolve(config.merge(SETTINGS['ppo, of another kind'], {'objective': {'kl_horizon': 6}}))
  assert "'objective.kl_horizon': 6 is too short for 32 completions" in refusal(resolution.explain, hasty, set(), 1)
  judge = resolution.explain(config.resolve(SETTINGS['reward_model']), set(), 1)
  assert judge['parameters'] == sum(sizes) + 64  # the scalar head; the embedding is tied


def test_lower_bound_that_never_clips():
  """Failure: a clip of 10 (DeepSeek-R1's) looks like one on both sides."""
  settings = config.merge(GRPO, {'objective': {'num_iterations': 2, 'epsilon': 10.0}})
  assert 'objective.epsilon, its lower bound' in resolution.explain(config.resolve(settings), set(), 8)['inert_defaults']


def test_reference_of_another_architecture(tmp_path):
  """Failure: the KL is to weights that the policy's forward function reads with the wrong depth or rotary base."""
  settings = config.merge(GRPO, {
    'objective': {'beta': 0.1},
    'roles': {'policy': {'init': 'tests/fixtures/llama', 'tokenizer': 'bytes'}, 'ref': {'init': 'tests/fixtures/qwen2'}},
  })  # fmt: skip
  text = refusal(resolve, settings)
  assert "'roles.ref.init': tests/fixtures/qwen2 is of another architecture" in text and 'rope_theta: 500.0 -> 300.0' in text
  for source, arch, wanted in (
    ('tests/fixtures/qwen2', 'llama', 'is of another architecture'),
    ('tests/fixtures/classifier', 'classifier', 'is a reward model'),
  ):
    run = SimpleNamespace(config=config.resolve(GRPO), speaks=True, arch=stored.read_arch(f'tests/fixtures/{arch}'))
    text = refusal(evaluators.check_problems, run, {}, {'e': evaluators.Evaluator(temperature=1.0, kl_to=source)})
    assert text.startswith(f"config key 'eval.evaluators.e.kl_to': {source} {wanted}")


def test_trunks_of_other_roles(tmp_path, monkeypatch):
  """Failure: a reference that starts elsewhere is fed what the policy's frozen layers give, or a critic with fewer layers than are frozen
  has none left to train."""
  for name, layers in (('ref', 2), ('critic', 1)):
    (tmp_path / name).mkdir()
    arch = dataclasses.replace(PRESETS['tiny'], num_hidden_layers=layers)
    (tmp_path / name / 'config.json').write_text(json.dumps(families.hf_config(arch, 'lm')))
  make_net, frozen = model.make_net, []
  monkeypatch.setattr(model, 'make_net', lambda *given, **keys: frozen.append(keys['frozen_layers']) or make_net(*given, **keys))
  dpo = config.merge(SETTINGS['dpo'], {'optim': {'frozen_layers': 1, 'cache_features': True}})
  for init, wanted in (('', [1, 1]), (str(tmp_path / 'ref'), [1, 0])):  # of the policy, of the reference
    frozen.clear()
    build.build(config.resolve(config.override(dpo, 'roles.ref.init', init)))
    assert frozen == wanted
  ppo = config.merge(SETTINGS['ppo'], {'optim': {'frozen_layers': 1}, 'roles': {'critic': {'init': str(tmp_path / 'critic')}}})
  assert "'optim.frozen_layers': 1 of the critic's 1 layers" in refusal(build.build, config.resolve(ppo))


def test_pretraining_rows():
  """Failure: a key of the second stream is taken and read by nobody, or a row of it that the run never reads is refused, or one that it
  reads is not."""
  chosen = SETTINGS['ppo, of another kind']
  for key, value, wanted in (('weight', 2.0, 'cannot act: objective.ptx_coef'), ('train_size', -1, 'must not be negative')):
    text = refusal(resolve, config.override(chosen, f'data.pretrain.{key}', value))
    assert f"'data.pretrain.{key}'" in text and wanted in text
  resolved, objective, _ = resolve(config.override(chosen, 'total_steps', 1))  # reads 8 of them
  source = data.Source([{'row': json.dumps({'text': str(n) + 'a' * 70 * (n == 5)})} for n in range(24)])
  tok = SimpleNamespace(encode=list, end_id=0)
  run = SimpleNamespace(config=resolved, objective=objective, tokenizer=tok)

  def check(seed):
    collect.check_rows(run, SimpleNamespace(preview=lambda count: [], pretrain=source, seed=seed))

  meets = [any('a' in row['text'] for row in data.batch(source, 0, 8, seed)[0]) for seed in range(8)]
  check(meets.index(False))
  assert "'data.max_length': 64, but a row has 72 tokens" in refusal(check, meets.index(True))


def test_template_is_inherited(tmp_path):
  """Failure: RL on an SFT run's weights asks in another template than they were trained in."""
  (tmp_path / 'checkpoints').mkdir()
  first = resolve(config.override(SFT, 'roles.policy.template', 'Q: {prompt} A: '))[0]
  (tmp_path / 'config.json').write_text(config.to_json(first))
  assert resolve(config.override(GRPO, 'roles.policy.init', str(tmp_path)))[0].roles.policy.template == 'Q: {prompt} A: '


def test_stages_are_checked_before_the_first_runs(tmp_path):
  """Failure: the second stage's mistake is told when the first has been trained."""
  for bad, wanted in (
    ({'objective': {'name': 'ppoo'}}, "stage rl: config key 'objective.name': 'ppoo'"),
    ({'data': {'batch_size': 3}}, "stage rl: config key 'data.batch_size': 3"),
    ({'optim': {'name': 'adamm'}}, "stage rl: config key 'optim.name'"),
    ({'eval': {'every': 1, 'evaluators': {'e': {'top_k': -1}}}}, "stage rl: config key 'eval.evaluators.e.top_k'"),
  ):
    rl = config.merge(config.override(GRPO, 'roles.policy.init', '{workdir}/base'), bad)
    assert wanted in refusal(pipeline.run_pipeline, {'base': SFT, 'rl': rl}, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_factored_optimizer_on_a_mesh():
  """Failure: moments that are smaller than their parameter (adafactor) are laid out like it."""
  mesh = sharding.make_mesh(1, 4, 2)
  arch = dataclasses.replace(PRESETS['tiny'], hidden_size=256, intermediate_size=256)
  shapes = jax.eval_shape(functools.partial(model.init, arch=arch), jax.random.key(0))
  optimizer, _ = optim.make(config.Optim(name='adafactor'), 1, arch.stacks)
  placed = build.optimizer_shardings(mesh, optimizer, shapes, stored.param_shardings(mesh, arch))
  jax.jit(optimizer.init, out_shardings=placed).lower(shapes)


def test_added_tokens_grow_the_embedding(tmp_path, capsys):
  """Failure: rows of an embedding move when tokens are added, a role or a later run does not know them, or an export forgets them."""
  folder = make_folder(tmp_path / 'tok')
  arch = model.Arch(261, 8, 16, 1, 2, 1, 4, tie_word_embeddings=False)
  weights.save(model.init(jax.random.key(0), arch), arch, str(tmp_path / 'base'), folder)
  source, name = str(tmp_path / 'base'), f'{tmp_path / "base"} + <think> </think>'
  shared = {
    'total_steps': 1, 'data': {'train_size': 16, 'batch_size': 8, 'max_length': 96, 'cache_dir': str(tmp_path / 'cache')},
    'roles': {'policy': {'init': source, 'tokenizer': name}},
  }  # fmt: skip
  run = build.build(config.resolve(shared))
  assert 'the embedding grows from 261 to 320 rows' in capsys.readouterr().out
  with jax.set_mesh(run.mesh):
    params = run.init().params['policy']
  old = weights.load(source, arch)
  for key in ('embed', 'lm_head'):
    np.testing.assert_array_equal(params[key][:261], old[key])
    np.testing.assert_allclose(params[key][261:], np.broadcast_to(np.mean(old[key], axis=0), (59, 8)), atol=1e-6)
  train.train(config.resolve(shared), str(tmp_path / 'run'))
  again = build.build(config.resolve({**shared, 'roles': {'policy': {'init': str(tmp_path / 'run')}}}))
  assert again.arch.vocab_size == 320 and len(again.tokenizer.encode('<think>')) == 1
  stored.export(str(tmp_path / 'run'), str(tmp_path / 'out'))
  assert len(load_tokenizer(str(tmp_path / 'out')).encode('</think>')) == 1
  assert weights.read_arch(str(tmp_path / 'out')).vocab_size == 320
  grpo = {'objective': {'name': 'grpo', 'beta': 0.1}, 'rewards': {'functions': ('format',)}}
  with_ref = config.merge({k: v for k, v in shared.items() if k != 'data'}, {
    **grpo, 'data': {'train_size': 16, 'batch_size': 8, 'max_prompt_length': 64}, 'roles': {'ref': {'init': source}},
  })  # fmt: skip
  resolve(with_ref)
  assert "'lora.rank': the embedding is not trained" in refusal(resolve, {**shared, 'lora': {'rank': 2}})
  assert "'roles.policy.tokenizer': 'bytes + <x>'" in refusal(
    resolve, config.override(shared, 'roles.policy.tokenizer', 'bytes + <x>')
  )
