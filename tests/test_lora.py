"""Adapters: what they compute, what they leave alone, and whole runs with them."""

import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from rl_reasoning import (
  build,
  checkpoint,
  config,
  data,
  lora,
  metrics,
  model,
  resolution,
  rollout,
  sharding,
  stored,
  train,
  weights,
)
from rl_reasoning.collect import collect
from rl_reasoning.config import ConfigError, Lora
from tests.test_distill import make_teacher
from tests.test_e2e import assert_same, everything, logged, make_judge, run, settings
from tests.test_families import logits_of, read

LORA = Lora(rank=3, alpha=6.0)


def adapters(arch, heads=('lm',), chosen=LORA, seed=0):
  """Random ones: those at the start of a run change nothing."""
  rng = np.random.default_rng(seed)
  table = lora.table(model.weight_table(arch, heads), chosen)
  return jax.tree.map(lambda w: jnp.asarray(rng.normal(0, 0.3, w.shape), jnp.float32), table, is_leaf=model.is_weight)


@pytest.mark.parametrize('name', ['qwen2', 'gemma2', 'phi3', 'mixtral', 'deepseek_v3'])
def test_an_adapter_is_a_sum(name):
  """Failure: a projection is computed without its adapter, or merging is another function. Decode runs on merged weights."""
  arch, base, tokens, golden = read(name)
  joined = lora.join(base, adapters(arch), LORA)
  with jax.default_matmul_precision('highest'):
    beside, merged = logits_of(joined, arch, tokens), logits_of(lora.merge(joined), arch, tokens)
  np.testing.assert_allclose(beside, merged, atol=2e-4)
  assert np.abs(beside - golden).max() > 0.1
  prompts = [row[:5].tolist() for row in tokens[:2]]
  sampled = [
    rollout.generate(
      params, arch, prompts, settings=config.Rollout(max_completion_length=8), group=2, end_ids=(0,), key=jax.random.key(0)
    )
    for params in (joined, lora.merge(joined), base)
  ]
  np.testing.assert_array_equal(sampled[0].tokens_NC, sampled[1].tokens_NC)
  np.testing.assert_allclose(sampled[0].logp_NC, sampled[1].logp_NC, atol=1e-4)
  assert (sampled[0].tokens_NC != sampled[2].tokens_NC).any()


def test_gradients_are_those_of_the_product():
  """Failure: with G the gradient of W, those of the factors are not s G B' and s A' G: a factor's path misses the backward pass."""
  arch, base, tokens, _ = read('qwen2')
  own, scale = adapters(arch), LORA.alpha / LORA.rank

  def loss(params):
    return jnp.sum(jnp.tanh(logits_of(params, arch, tokens)))

  got = jax.grad(lambda a: loss(lora.join(base, a, LORA)))(own)['layers']
  whole = jax.grad(loss)(lora.merge(lora.join(base, own, LORA)))['layers']
  for name in ('q', 'o', 'down'):
    A, B, G = own['layers'][name + lora.A], own['layers'][name + lora.B], whole[name]
    L, r = A.shape[0], LORA.rank
    flat_a, flat_b = A.reshape(L, -1, r), B.reshape(L, r, -1)
    flat = G.reshape(L, flat_a.shape[1], flat_b.shape[2])
    np.testing.assert_allclose(got[name + lora.A].reshape(L, -1, r), scale * flat @ flat_b.mT, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got[name + lora.B].reshape(L, r, -1), scale * flat_a.mT @ flat, rtol=1e-3, atol=1e-3)


def test_which_weights_have_one():
  """Failure: a router or an expert is adapted, a norm or the embedding, or the regular expression does not choose."""
  arch = weights.read_arch('tests/fixtures/deepseek_v3')
  table = lora.table(model.weight_table(arch), LORA)
  names = {stack: {name.removesuffix(lora.A) for name in own if name.endswith(lora.A)} for stack, own in table.items()}
  attention = {'q_down', 'q_up', 'kv_down', 'kv_up', 'o'}
  assert names == {
    'dense_layers': {*attention, 'gate', 'up', 'down'},
    'layers': {*attention, 'shared_gate', 'shared_up', 'shared_down'},
  }
  assert list(lora.table(model.weight_table(arch), Lora(2, targets='layers/(q_up|o)'))) == ['layers']
  with pytest.raises(ConfigError, match=r"'lora.targets': 'q' matches none of dense_layers/"):
    lora.table(model.weight_table(arch), Lora(2, targets='q'))
  assert 'score' in lora.table(model.weight_table(arch, ('scalar',)), LORA)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return str(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def start(cache, tmp_path_factory):
  """A run to begin from."""
  folder = tmp_path_factory.mktemp('start')
  run(settings('sft', cache, total_steps=30, log_every=30, optim__learning_rate=5e-3), folder / 'run')
  return str(folder / 'run')


def adapted(objective, cache, start, **keys):
  chosen = settings(objective, cache, roles__policy__init=start, lora__rank=4, **keys)
  chosen.pop('model', None)
  return chosen


EACH = {
  'sft': {},
  'grpo': {'objective__beta': 0.1, 'data__batch_size': 8},
  'ppo': {'data__batch_size': 8},
  'reward_model': {},
  'dpo': {},
  'cpl': {},
  'distill': {'data__batch_size': 8, 'objective__num_generations': 2},
}  # fmt: skip


@pytest.mark.parametrize('objective', EACH)
def test_every_objective(objective, cache, start, tmp_path):
  """Failure: an objective runs on the adapters alone, or trains more than them; the reference is a copy, or not the base."""
  chosen = adapted(objective, cache, start, **EACH[objective])
  if objective == 'distill':
    chosen = config.override(chosen, 'roles.teacher', {'init': make_teacher(tmp_path), 'tokenizer': 'bytes'})
  job = build.build(config.resolve(chosen), set(config.flatten(chosen)))
  with jax.set_mesh(job.mesh):
    rows = data.open_train(job.config.data, job.config.seed)
    state = job.init()
    state = state.replace(cursor={**rows.first(), **state.cursor})
    _, others = job.weights(state)
    if objective in ('grpo', 'dpo'):
      assert others['ref'] is state.frozen['base'] and 'ref' not in state.frozen
    names = {name for own in state.params.values() for stack in own.values() if isinstance(stack, dict) for name in stack}
    assert names and all(name.endswith((lora.A, lora.B)) for name in names)
    first = jax.device_get(state.params)
    got = collect(job, rows, state, jax.random.key(0), metrics.PhaseTimer())
    batch, _, _ = job.steps.prepare(state, job.steps.score(state, got.batch))
    new, told = job.steps.update(state, batch)
  values = metrics.summarise(told)
  assert jax.tree.structure(new.params) == jax.tree.structure(first)
  assert values['grad_norm'] > 0 and np.isfinite(values['loss'])
  for role in new.params:
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(first[role]), jax.tree.leaves(jax.device_get(new.params[role])))]
    assert max(moved) > 0, role
  if objective == 'grpo':  # the adapters have changed nothing yet
    assert abs(values['kl']) < 1e-6
  if objective in ('ppo', 'reward_model'):
    role = 'critic' if objective == 'ppo' else 'policy'
    assert set(new.params[role]) == {'layers', 'score'}


@pytest.mark.parametrize('kind', ['moving reference', 'critic of its own'])
def test_resume_is_bit_for_bit(kind, cache, start, tmp_path, monkeypatch):
  """Failure: something of a run with adapters is neither in its checkpoint nor in what it reloads."""
  chosen = adapted('grpo', cache, start, objective__num_minibatches=2, objective__beta=0.1, objective__ref_model_sync_updates=6)
  if kind != 'moving reference':
    chosen = adapted('ppo', cache, start, data__batch_size=16, rewards={'functions': ('judge',), 'weights': (1.0,)})
    chosen = config.override(chosen, 'roles.reward', {'judge': {'init': make_judge(cache, tmp_path)}})
    chosen = config.override(chosen, 'roles.critic', {'init': str(tmp_path / 'judge')})
  run(chosen, tmp_path / 'whole')
  write = metrics.Writer.write

  def crash(self, step, values):
    write(self, step, values)
    if step == 7:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Writer, 'write', crash)
    with pytest.raises(KeyboardInterrupt):
      run(chosen, tmp_path / 'cut')
  run(chosen, tmp_path / 'cut')
  assert_same(everything(tmp_path / 'cut'), everything(tmp_path / 'whole'))
  frozen = set(json.loads((tmp_path / 'whole' / 'frozen.json').read_text()))
  if kind == 'moving reference':
    assert frozen == {'base'} and logged(tmp_path / 'whole')[-1]['kl'] > 0
  else:
    assert frozen >= {'base', 'base.critic', 'reward.judge'}


@pytest.fixture(scope='module')
def tuned(cache, start, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tuned')
  chosen = adapted(
    'sft', cache, start, total_steps=40, log_every=1, optim__learning_rate=1e-2, data__options={'styles': {'direct': 1.0}}
  )
  run(chosen, folder / 'run')
  return str(folder / 'run')


def test_learns_and_stays_small(tuned):
  """Failure: adapters do not learn, or their checkpoint holds the weights that they adapt, too."""
  losses = [entry['loss'] for entry in logged(pathlib.Path(tuned))]
  assert losses[-1] < 0.75 * losses[0]
  job = build.build(config.resolve(stored.run_config(tuned)))
  assert model.count(lora.table(model.weight_table(job.arch), job.config.lora)) == sum(
    x.size for x in jax.tree.leaves(checkpoint.restore_params(tuned, 'policy'))
  )


def test_a_run_with_adapters_is_a_start(cache, start, tuned, tmp_path):
  """Failure: who starts from a run with adapters gets the base, or other weights than the run ended with; or the base may change."""
  job = build.build(config.resolve(stored.run_config(tuned)))
  with jax.set_mesh(job.mesh):
    state = job.init()
    trained = checkpoint.restore(checkpoint.open_manager(tuned), state)
    expected = jax.device_get(lora.merge(job.weights(trained)[0]))
    got = stored.load_params(tuned, job.arch, jax.random.key(0), job.mesh)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(got), expected)
  meshes = [sharding.make_mesh(1, 1, 1, jax.devices()[:1]), sharding.make_mesh(1, 2, 4)]
  elsewhere = {int(checkpoint.fingerprint(stored.load_params(tuned, job.arch, jax.random.key(0), mesh))) for mesh in meshes}
  assert elsewhere == {int(checkpoint.fingerprint(got))}  # else who adapts it once more could not go on elsewhere
  tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
  assert np.abs(logits_of(got, job.arch, tokens) - logits_of(job.weights(state)[0], job.arch, tokens)).max() > 0.1
  stored.export(tuned, str(tmp_path / 'merged'))
  read_back = weights.load(str(tmp_path / 'merged'), weights.read_arch(str(tmp_path / 'merged')))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(read_back), expected)
  frozen = pathlib.Path(tuned) / 'frozen.json'
  text = frozen.read_text()
  try:
    frozen.write_text(json.dumps({'base': 1}))
    with pytest.raises(ConfigError, match=r'holds adapters of .*, whose weights are not those of then'), jax.set_mesh(job.mesh):
      stored.load_params(tuned, job.arch, jax.random.key(0), job.mesh)
  finally:
    frozen.write_text(text)


def test_peft_folder(start, tuned, tmp_path):
  """Failure: W + alpha / r * B A, as peft adds it up, is not the merged weight."""
  stored.export(tuned, str(tmp_path / 'adapter'), adapter=True)
  stored.export(start, str(tmp_path / 'base'))
  stored.export(tuned, str(tmp_path / 'merged'))
  about = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
  base, merged = (load_file(tmp_path / name / 'model.safetensors') for name in ('base', 'merged'))
  factors = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
  for module in about['target_modules']:
    A, B = (factors.pop(f'base_model.model.{module}.lora_{x}.weight') for x in 'AB')
    own = base.pop(f'{module}.weight')
    assert A.shape == (4, own.shape[1]) and B.shape == (own.shape[0], 4) and np.abs(B).max() > 0
    np.testing.assert_allclose(own + about['lora_alpha'] / about['r'] * B @ A, merged[f'{module}.weight'], atol=1e-6)
  assert not factors and base and all((merged[name] == x).all() for name, x in base.items())
  with pytest.raises(ConfigError, match='a run without adapters'):
    stored.export(start, str(tmp_path / 'none'), adapter=True)
  phi = weights.read_arch('tests/fixtures/phi3')
  with pytest.raises(ConfigError, match=r'layers.0.mlp.gate_proj: phi3 has it in one matrix with others'):
    weights.save_adapter(adapters(phi), phi, LORA, str(tmp_path / 'phi'), 'base')
  apart = Lora(rank=3, targets='.*/(o|down)')
  weights.save_adapter(adapters(phi, chosen=apart), phi, apart, str(tmp_path / 'phi'), 'base')
  deepseek = weights.read_arch('tests/fixtures/deepseek_v3')
  with pytest.raises(ConfigError, match=r'adapter of model.layers.0.mlp.down_proj: peft takes it for one of an expert'):
    weights.save_adapter(adapters(deepseek), deepseek, LORA, str(tmp_path / 'deepseek'), 'base')
  attention = Lora(rank=3, targets='.*/(q_up|o)')
  weights.save_adapter(adapters(deepseek, chosen=attention), deepseek, attention, str(tmp_path / 'deepseek'), 'base')


def test_peft_folder_of_a_reward_model(tmp_path):
  """Failure: peft makes a language model of it, or trains no head."""
  arch = weights.read_arch('tests/fixtures/classifier')
  weights.save_adapter(adapters(arch, ('scalar',)), arch, LORA, str(tmp_path / 'it'), 'base', ('scalar',))
  about = json.loads((tmp_path / 'it' / 'adapter_config.json').read_text())
  assert (about['task_type'], about['modules_to_save']) == ('SEQ_CLS', ['score'])
  assert load_file(tmp_path / 'it' / 'adapter_model.safetensors')['base_model.model.score.weight'].shape == (1, arch.hidden_size)


def test_small_adapters_in_bfloat16():
  """Failure: decode adds an adapter to weights that are so much larger that bfloat16 keeps nothing of it, and samples from another policy
  than the trainer's."""
  arch, base, tokens, _ = read('qwen2')
  base = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), base)
  own = jax.tree_util.tree_map_with_path(lambda path, x: x * (1e-3 if str(path[-1].key).endswith(lora.B) else 1), adapters(arch))
  joined = lora.join(base, own, LORA)
  decoded = model.decode_weights(joined, arch, 'bfloat16', True)[1]
  lost = model.decode_weights(lora.merge(joined), arch, 'bfloat16', True)[1]
  plain = model.decode_weights(base, arch, 'bfloat16', True)[1]
  same = np.mean(np.asarray(lost[0]['o']) == np.asarray(plain[0]['o']))
  assert same > 0.5 and 'o' + lora.A in decoded[0] and 'qkv' in plain[0] and 'qkv' not in decoded[0]
  prompts = [row[:5].tolist() for row in tokens[:2]]
  rolled = rollout.generate(
    joined, arch, prompts, settings=config.Rollout(max_completion_length=8), group=2, end_ids=(0,), key=jax.random.key(0),
    dtype='bfloat16',
  )  # fmt: skip
  assert rolled.length_N.min() > 1


@pytest.mark.parametrize('role, key', [('base', 'policy'), ('base.critic', 'critic'), ('ref', 'ref')])
def test_a_changed_base_is_named_by_its_key(role, key, tmp_path):
  """Failure: a run whose base has changed goes on, or the error names a key that no config has."""
  workdir, state = epath.Path(tmp_path), SimpleNamespace(frozen={role: {'w': jnp.ones(2)}})
  train.check_frozen(workdir, state)
  train.check_frozen(workdir, state)
  with pytest.raises(ConfigError, match=f'roles.{key}.init: its weights are not those that .* began with'):
    train.check_frozen(workdir, SimpleNamespace(frozen={role: {'w': jnp.zeros(2)}}))


@pytest.mark.parametrize('keys, wanted', [
  ({'lora': {'rank': 4}}, "'lora.rank': roles.policy.init is empty"),
  ({'lora': {'rank': -1}}, "'lora.rank': -1 must not be negative"),
  ({'lora': {'rank': 4, 'targets': '('}}, "'lora.targets': '(' is no regular expression"),
  ({'lora': {'alpha': 3.0}}, "'lora.alpha': lora.rank is 0"),
  ({'lora': {'rank': 4}, 'optim.frozen_layers': 1, 'roles.policy.init': 'START'}, "'optim.frozen_layers': with lora.rank"),
  ({'lora': {'rank': 4, 'targets': 'q'}, 'roles.policy.init': 'START'}, "'lora.targets': 'q' matches none of layers/q"),
  ({'lora': {'rank': 4}, 'roles.policy.init': 'START', 'objective': {'name': 'grpo', 'beta': 0.1, 'ref_model_ema': 0.5}},
   "'objective.ref_model_ema': the mean of two adapters' factors"),
])  # fmt: skip
def test_refusals(keys, wanted, cache, start):
  """Failure: adapters that cannot act, or a knob beside them that cannot."""
  chosen = settings('grpo' if 'objective' in keys else 'sft', cache)
  for key, value in keys.items():
    chosen = config.override(chosen, key, start if value == 'START' else value)
  if 'roles.policy.init' in keys:
    chosen.pop('model')
  with pytest.raises(ConfigError) as caught:
    resolution.resolve(config.resolve(chosen), set(config.flatten(chosen)))
  assert wanted in str(caught.value)


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2)], ids=str)
def test_devices(sizes, cache, start):
  """Failure: adapters lie on the mesh in another way than what they adapt, or their update depends on it."""

  def updated(data_, fsdp, tensor):
    chosen = adapted('sft', cache, start, mesh={'data': data_, 'fsdp': fsdp, 'tensor': tensor}, optim__name='sgd')
    job = build.build(config.resolve(chosen))
    with jax.set_mesh(job.mesh):
      state = job.init()
      rows = data.open_train(job.config.data, 0)
      state = state.replace(cursor={**rows.first(), **state.cursor})
      got = collect(job, rows, state, jax.random.key(0), metrics.PhaseTimer())
      first = jax.device_get(state.params)
      for _ in range(2):  # B is zero at first: A moves with the second
        batch, _, _ = job.steps.prepare(state, job.steps.score(state, got.batch))
        state, _ = job.steps.update(state, batch)
      return jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), first)

  make_mesh = sharding.make_mesh
  one = updated_on_one(updated, make_mesh)
  several = updated(*sizes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), several, one)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(one))


def updated_on_one(updated, make_mesh):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda **sizes: make_mesh(1, 1, 1, jax.devices()[:1]))
    return updated(1, 1, 1)
