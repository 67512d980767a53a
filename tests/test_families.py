"""Every family of models against transformers' own PyTorch code (tests/make_fixtures.py), whose special features are all switched on."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rl_reasoning import config, families, model, rollout, sharding, tensors as tensors_lib, weights
from rl_reasoning.arch import RopeScaling
from rl_reasoning.config import ConfigError
from rl_reasoning.presets import PRESETS

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
NAMES = (
  'llama', 'llama_linear', 'llama_dynamic', 'llama_yarn', 'llama3', 'mistral', 'smollm3', 'qwen2', 'qwen2_window', 'qwen3', 'gemma2',
  'gemma3', 'phi3', 'phi3_partial', 'mixtral', 'qwen3_moe', 'deepseek_v3',
)  # fmt: skip


def read(name, path=None):
  """(architecture, parameters, tokens, logits)."""
  golden, path = np.load(FIXTURES / name / 'golden.npz'), str(path or FIXTURES / name)
  arch = weights.read_arch(path)
  if arch.rope_scaling.rope_type in ('dynamic', 'longrope'):
    arch = with_rope(arch, length=golden['tokens'].shape[1])
  return arch, weights.load(path, arch), golden['tokens'], golden['logits']


def with_rope(arch, **changes):
  return dataclasses.replace(arch, rope_scaling=dataclasses.replace(arch.rope_scaling, **changes))


def logits_of(params, arch, tokens):
  position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  hidden, _ = model.forward(params, arch, tokens, jnp.ones_like(tokens), position)
  return model.logits(hidden, model.head(params), arch.final_logit_softcapping)


@pytest.mark.parametrize('name', NAMES)
def test_logits_and_gradients(name):
  """Failure: another function than the published model, or a weight that its gradient does not reach."""
  arch, params, tokens, golden = read(name)

  def loss(params):
    logits = logits_of(params, arch, tokens)
    return jnp.sum(jnp.square(logits)), logits

  (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logits, golden, atol=1e-4)
  for path, g in jax.tree_util.tree_leaves_with_path(gradient):
    reached = np.abs(np.asarray(g)).max() > 0
    assert np.isfinite(g).all() and reached != str(path[-1].key).endswith('router_bias'), path


MATTERS = {
  'llama': ({'rope_theta': 900.0}, {'rms_norm_eps': 0.1}),
  'llama_linear': ({'factor': 2.0},),
  'llama_dynamic': ({'factor': 2.0}, {'length': 16}, {'original_max_position_embeddings': 12}),
  'llama_yarn': (
    {'factor': 2.0}, {'beta_fast': 0.5}, {'beta_slow': 0.5}, {'original_max_position_embeddings': 4}, {'attention_factor': 0.5},
    {'truncate': False}, {'mscale': 2.0, 'mscale_all_dim': 0.5},
  ),
  'llama3': ({'factor': 2.0}, {'low_freq_factor': 0.5}, {'high_freq_factor': 2.0}, {'original_max_position_embeddings': 64}),
  'mistral': ({'sliding_window': 6}, {'sliding_window': 0, 'layer_types': ()}),
  'smollm3': ({'no_rope_layers': ()}, {'no_rope_layers': (0,)}, {'sliding_window': 7}),
  'qwen2_window': ({'sliding_window': 5}, {'layer_types': ('full_attention', 'full_attention', 'sliding_attention')}),
  'gemma2': (
    {'attn_logit_softcapping': 4.0}, {'attn_logit_softcapping': 0.0}, {'final_logit_softcapping': 5.0}, {'sliding_window': 6},
    {'query_pre_attn_scalar': 8.0}, {'scale_embeddings': False}, {'norm_offset': False}, {'hidden_act': 'silu'},
    {'layer_types': ('full_attention', 'sliding_attention', 'sliding_attention')},
  ),
  'gemma3': ({'local_rope_theta': 90.0}, {'rope_theta': 60.0}, {'factor': 3.0}, {'sliding_window': 6}),
  'phi3': (
    {'long_factor': (1.5, 2.0, 3.0, 6.0)}, {'length': 16}, {'attention_factor': 1.0}, {'factor': 2.0}, {'sliding_window': 8},
  ),
  'phi3_partial': ({'partial_rotary_factor': 0.5}, {'partial_rotary_factor': 1.0}),
  'mixtral': ({'num_experts_per_tok': 1}, {'norm_topk_prob': False}),
  'qwen3_moe': ({'num_experts_per_tok': 2}, {'norm_topk_prob': False}),
  'deepseek_v3': (
    {'n_group': 1, 'topk_group': 1}, {'topk_group': 1, 'n_group': 2}, {'routed_scaling_factor': 1.0}, {'norm_topk_prob': False},
    {'rope_interleave': False}, {'mscale_all_dim': 0.0}, {'factor': 2.0}, {'n_shared_experts': 0}, {'num_experts_per_tok': 2},
    {'scoring_func': 'softmax'},
  ),
}  # fmt: skip


SHAPES = {  # what changes the weights themselves
  'gemma2': {'post_norms': False, 'qk_norm': True, 'qkv_bias': True, 'tie_word_embeddings': False},
  'deepseek_v3': {
    'kv_lora_rank': 12, 'q_lora_rank': 0, 'qk_rope_head_dim': 6, 'v_head_dim': 8, 'num_experts': 16, 'moe_intermediate_size': 8,
    'first_k_dense_replace': 2,
  },
}  # fmt: skip


def test_every_field_is_shown_to_matter():
  """Failure: a new field of the record that nothing reads."""
  shown = {key for changes in MATTERS.values() for change in changes for key in change}
  for name, changes in SHAPES.items():
    arch = weights.read_arch(str(FIXTURES / name))
    for key, value in changes.items():
      assert model.weight_table(dataclasses.replace(arch, **{key: value})) != model.weight_table(arch), key
      shown.add(key)
  optional = [f.name for f in dataclasses.fields(model.Arch) if f.default is not dataclasses.MISSING and f.compare]
  optional += [f.name for f in dataclasses.fields(RopeScaling)]
  # Its fields; the fixtures; the round trip; tests/test_splash.py
  assert set(optional) - shown == {'rope_scaling', 'rope_type', 'short_factor', 'attn_implementation'}


@pytest.mark.parametrize('name', MATTERS)
def test_features_matter(name):
  """Failure: a field of the record is read and plays no part, so that the fixture would agree without it."""
  arch, params, tokens, golden = read(name)
  rope = {field.name for field in dataclasses.fields(arch.rope_scaling)}
  for change in MATTERS[name]:
    inner = {key: value for key, value in change.items() if key in rope}
    other = with_rope(dataclasses.replace(arch, **{k: v for k, v in change.items() if k not in rope}), **inner)
    assert np.abs(jax.jit(logits_of, static_argnums=1)(params, other, tokens) - golden).max() > 1e-3, change


@pytest.mark.parametrize('name', NAMES)
def test_decode_is_the_full_forward(name):
  """Failure: the sampler's cache, windows or latents are not those of the trainer. Prompts of unequal length share a batch."""
  arch, params, tokens, _ = read(name)
  arch = with_rope(arch, length=28) if arch.rope_scaling.length else arch
  prompts = [tokens[0, :12].tolist(), tokens[1, :3].tolist()]
  settings = config.Rollout(max_completion_length=16, chunk=4)
  rolled = rollout.generate(params, arch, prompts, settings=settings, group=2, end_ids=(), key=jax.random.key(0))
  rows = np.zeros((4, 28), np.int32)
  segment = np.zeros((4, 28), np.int32)
  for n in range(4):
    ids = prompts[n // 2] + rolled.tokens_NC[n].tolist()
    rows[n, : len(ids)], segment[n, : len(ids)] = ids, 1

  @jax.jit
  def logp_of(params):
    hidden, _ = model.forward(params, arch, rows, segment, np.broadcast_to(np.arange(28, dtype=np.int32), (4, 28)))
    return jax.nn.log_softmax(model.logits(hidden, model.head(params), arch.final_logit_softcapping))

  logp = np.asarray(logp_of(params))
  for n in range(4):
    first = len(prompts[n // 2])
    known = logp[n, first - 1 : first + 15][np.arange(16), rolled.tokens_NC[n]]
    # The last bit of the weights of phi3_partial moves a log-probability by 2.6e-5: no two orders of summation agree to 1e-5.
    np.testing.assert_allclose(rolled.logp_NC[n], known, atol=2e-5 if name == 'phi3_partial' else 1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_round_trip(tmp_path, name):
  """Failure: a tensor comes back under another name or with other bits, or config.json loses a feature."""
  arch, params, *_ = read(name)
  weights.save(params, arch, str(tmp_path / 'saved'))
  old, new = (load_file(folder / 'model.safetensors') for folder in (FIXTURES / name, tmp_path / 'saved'))
  assert old.keys() == new.keys()
  for key in old:
    np.testing.assert_array_equal(old[key], new[key])
  back = weights.read_arch(str(tmp_path / 'saved'))
  assert with_rope(back, length=arch.rope_scaling.length) == arch
  assert (back.model_type, back.max_position_embeddings) == (arch.model_type, arch.max_position_embeddings)


SIZES = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'rms_norm_eps')


@pytest.mark.parametrize('name', families.FAMILIES)
def test_keys_left_out_are_the_class_defaults(name):
  """Failure: a config.json that is silent about a key gives another model here than in transformers."""
  from transformers import AutoConfig

  file, whole = pathlib.Path('config.json'), AutoConfig.for_model(name).to_dict()
  silent = {'model_type': name, **{key: whole[key] for key in SIZES}}
  got, wanted = families.read_config(silent, file), families.read_config({**whole, 'architectures': None}, file)
  assert got == wanted and got.max_position_embeddings == wanted.max_position_embeddings
  if name != 'gemma3_text':
    return
  # config.json of the larger Gemma 3 models holds no more of the text model than this.
  text = {
    'hidden_size': 2560, 'intermediate_size': 10_240, 'model_type': 'gemma3_text', 'num_hidden_layers': 34,
    'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024,
  }  # fmt: skip
  both = {'architectures': ['Gemma3ForConditionalGeneration'], 'model_type': 'gemma3', 'text_config': text}
  theirs = AutoConfig.for_model(name, **{k: v for k, v in text.items() if k != 'model_type'}).to_dict()
  arch = families.read_config(both, file)
  assert arch == families.read_config({**theirs, 'architectures': None}, file)
  assert (arch.head_dim, arch.num_attention_heads, arch.rope_scaling.factor, arch.sliding_window) == (256, 8, 8.0, 1024)


def to_old_form(settings):
  """As transformers 4 writes rope parameters."""
  given = settings.pop('rope_parameters')
  if 'full_attention' in given:
    settings['rope_local_base_freq'] = given['sliding_attention']['rope_theta']
    given = given['full_attention']
  given = dict(given)
  settings['rope_theta'] = given.pop('rope_theta')
  settings['partial_rotary_factor'] = given.pop('partial_rotary_factor', 1.0)
  settings['rope_scaling'] = {**given, 'type': given.pop('rope_type')}


@pytest.mark.parametrize('name', ['llama_linear', 'llama_yarn', 'llama3', 'gemma3', 'phi3', 'phi3_partial', 'deepseek_v3'])
def test_both_forms_of_rope_parameters(tmp_path, name):
  """Failure: the older form gives another model, or where both are given, one of them is silently dropped. Exports hold both."""
  arch = weights.read_arch(str(FIXTURES / name))
  assert weights.read_arch(str(copied(tmp_path, name, to_old_form))) == arch
  exported = families.hf_config(arch, 'lm')
  assert ('rope_scaling' in exported) == (arch.rope_scaling.rope_type != 'default')
  without = {key: value for key, value in exported.items() if key != 'rope_parameters'}
  read = families.read_config(without, pathlib.Path('config.json'))
  assert dataclasses.replace(read, partial_rotary_factor=arch.partial_rotary_factor) == arch
  other = {**exported, 'rope_scaling': {'rope_type': 'yarn', 'factor': 9.0, 'original_max_position_embeddings': 16}}
  with pytest.raises(ConfigError, match=r'rope_scaling .* is not what rope_parameters .* has: leave one out'):
    families.read_config(other, pathlib.Path('config.json'))


def test_transformers_builds_the_same_model(tmp_path):
  """Failure: transformers reads another configuration from our export than from the published one."""
  from transformers import AutoConfig

  ignored = {
    'max_window_layers',
    '_name_or_path',
    'transformers_version',
    'dtype',
    'initializer_range',
    'architectures',
    'num_mtp_layers',
  }
  for name in NAMES:
    arch, params, *_ = read(name)
    weights.save(params, arch, str(tmp_path / name))
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / name, FIXTURES / name))
    ours['rope_parameters'].pop('type', None)  # transformers 4's name of rope_type
    wrong = {k: (ours.get(k), v) for k, v in theirs.items() if k not in ignored and ours.get(k) != v and (k != 'head_dim' or v)}
    # DeepSeek's layer for a further token is not read, so an export has none.
    assert wrong == ({'num_nextn_predict_layers': (0, 1)} if name == 'deepseek_v3' else {}), (name, wrong)


@pytest.mark.parametrize('name', ['llama', 'phi3', 'deepseek_v3', 'qwen3_moe'])
def test_onto_a_mesh(name):
  """Failure: a device gets another part of a weight than its own."""
  arch, params, *_ = read(name)
  mesh = sharding.make_mesh(2, 2, 2)
  places = jax.tree.map(lambda w: sharding.named(mesh, w.shape, w.axes, w.hf), model.weight_table(arch), is_leaf=model.is_weight)
  spread = weights.load(str(FIXTURES / name), arch, places)
  jax.tree.map(np.testing.assert_array_equal, spread, params)


@pytest.mark.parametrize('name', ['llama', 'deepseek_v3'])
def test_loading_piece_by_piece(name, monkeypatch):
  """Failure: a large weight, which the host reads in pieces, has one in a wrong place."""
  arch, params, *_ = read(name)
  mesh = sharding.make_mesh(2, 2, 2)
  places = jax.tree.map(lambda w: sharding.named(mesh, w.shape, w.axes, w.hf), model.weight_table(arch), is_leaf=model.is_weight)
  lengths, read_part = [], weights.read_part
  monkeypatch.setattr(weights, 'read_part', lambda *given: lengths.append(read_part(*given).nbytes) or read_part(*given))
  for limit in (1000, 4000):
    monkeypatch.setattr(weights, 'HOST_BYTES', limit)
    lengths.clear()
    spread = weights.load(str(FIXTURES / name), arch, places)
    jax.tree.map(np.testing.assert_array_equal, spread, params)
    assert max(lengths) <= max(limit, 4 * max(np.prod(weights.hf_shape(w)) for w in jax.tree.leaves(
      model.weight_table(arch), is_leaf=model.is_weight)))  # fmt: skip


def copied(tmp_path, name, change_config=None, change=None):
  folder = tmp_path / name
  shutil.copytree(FIXTURES / name, folder)
  settings = json.loads((folder / 'config.json').read_text())
  if change_config:
    change_config(settings)
    (folder / 'config.json').write_text(json.dumps(settings))
  if change:
    save_file(change(load_file(folder / 'model.safetensors')), folder / 'model.safetensors')
  return folder


def to_fp8(tensors):
  """As DeepSeek publishes: matrices of 8 bits with a scale a block."""
  found = {}
  for name, x in tensors.items():
    if not name.endswith(('proj.weight', 'kv_a_proj_with_mqa.weight')):
      found[name] = x
      continue
    blocks = [-(-size // 128) for size in x.shape]
    scale = np.random.default_rng(0).uniform(0.01, 0.02, blocks).astype(np.float32)
    found[name] = (x / scale[0, 0]).astype(ml_dtypes.float8_e4m3fn)
    found[name + '_scale_inv'] = scale
  return found


def test_fp8_blocks(tmp_path):
  """Failure: a checkpoint of 8 bits is read without its scales, or a block takes its neighbour's."""
  fp8 = {'quant_method': 'fp8', 'weight_block_size': [128, 128], 'activation_scheme': 'dynamic', 'fmt': 'e4m3'}
  folder = copied(tmp_path, 'deepseek_v3', lambda c: c.update(quantization_config=fp8), to_fp8)
  arch = weights.read_arch(str(folder))
  name = 'model.layers.2.mlp.experts.3.up_proj.weight'
  params, stored = weights.load(str(folder), arch), to_fp8(load_file(FIXTURES / 'deepseek_v3' / 'model.safetensors'))
  wanted = stored[name].astype(np.float32) * stored[name + '_scale_inv']
  np.testing.assert_array_equal(params['layers']['experts_up'][1, 3], wanted.T)

  mesh = sharding.make_mesh(2, 2, 2)
  places = jax.tree.map(lambda w: sharding.named(mesh, w.shape, w.axes, w.hf), model.weight_table(arch), is_leaf=model.is_weight)
  jax.tree.map(np.testing.assert_array_equal, weights.load(str(folder), arch, places), params)
  weights.save(params, arch, str(tmp_path / 'out'))
  for name, x in load_file(tmp_path / 'out' / 'model.safetensors').items():
    scale = stored.get(name + '_scale_inv', np.ones((1, 1), np.float32))  # no matrix of it is larger than a block
    assert scale.size == 1 and (x == stored[name].astype(np.float32) * scale.reshape(())).all(), name

  x = np.random.default_rng(1).normal(size=(300, 200)).astype(ml_dtypes.float8_e4m3fn)
  scale = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
  tensors = {k: tensors_lib.Tensor('f', a.shape, lambda at, a=a: a[at]) for k, a in {'w': x, 'w_scale_inv': scale}.items()}
  found = tensors_lib.dequantised(tensors, {'w'}, tmp_path)
  every = x.astype(np.float32) * np.repeat(np.repeat(scale, 128, 0), 128, 1)[:300, :200]
  assert found.keys() == {'w'}
  np.testing.assert_array_equal(tensors_lib.whole(found['w']), every)
  np.testing.assert_array_equal(found['w'].read((slice(120, 260), slice(100, 140))), every[120:260, 100:140])


def test_shards_of_an_export(tmp_path):
  """Failure: parts of a large export overlap, lose a tensor or grow beyond their size."""
  arch, params, *_ = read('mixtral')
  table = model.weight_table(arch)
  (tmp_path / 'out').mkdir()
  weights.write_tensors(weights.published(params, table, arch), tmp_path / 'out', shard_bytes=40_000)
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  files = sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
  assert files == sorted(set(index['weight_map'].values())) and len(files) > 2
  parts = [load_file(tmp_path / 'out' / name) for name in files]
  assert all(sum(x.nbytes for x in part.values()) <= 40_000 for part in parts)
  assert {t: f for f, part in zip(files, parts) for t in part} == index['weight_map']
  shutil.copy(FIXTURES / 'mixtral' / 'config.json', tmp_path / 'out')
  jax.tree.map(np.testing.assert_array_equal, weights.load(str(tmp_path / 'out'), arch), params)
  assert index['metadata']['total_size'] == sum(x.nbytes for part in parts for x in part.values())


def test_tensors_that_a_family_ignores(tmp_path):
  """Failure: DeepSeek's layer for further tokens, or the part of Gemma 3 that sees, is refused or read; another's is ignored."""
  extra = {'model.layers.3.eh_proj.weight': np.zeros((2, 2), np.float32)}
  folder = copied(tmp_path, 'deepseek_v3', change=lambda t: {**t, **extra})
  jax.tree.map(np.testing.assert_array_equal, weights.load(str(folder), weights.read_arch(str(folder))), read('deepseek_v3')[1])
  folder = copied(tmp_path, 'llama', change=lambda t: {**t, **extra})
  with pytest.raises(ConfigError, match=r'1 tensors that no weight reads: model\.layers\.3\.eh_proj'):
    weights.load(str(folder), weights.read_arch(str(folder)))

  def nested(settings):
    text = dict(settings)
    settings.clear()
    settings |= {'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}

  def within(tensors):
    return {'language_model.' + k: x for k, x in tensors.items()} | {'vision_tower.x': np.zeros(3, np.float32)}

  folder = copied(tmp_path, 'gemma3', nested, within)
  arch = weights.read_arch(str(folder))
  assert arch == read('gemma3')[0]
  jax.tree.map(np.testing.assert_array_equal, weights.load(str(folder), arch), read('gemma3')[1])


def rope(**changes):
  return lambda settings: settings['rope_parameters'].update(changes)


@pytest.mark.parametrize(('name', 'change', 'message'), [
  ('llama', rope(rope_type='cubic'), "rope type 'cubic' is none of default, linear"),
  ('llama', rope(rope_type=['a']), r"rope type .* is none of default, linear"),
  ('llama', rope(factor=4.0), r"rope parameters \['factor'\] are not known to type 'default'"),
  ('llama', rope(rope_type='yarn', original_max_position_embeddings='x'), 'a value of a wrong type'),
  ('llama', rope(partial_rotary_factor=0.5), 'partial_rotary_factor 0.5: only phi3 has it'),
  ('llama', lambda c: c.update(model_type=['a']), r"model_type \['a'\] is none of"),
  ('llama', lambda c: c.update(architectures=['GPT2LMHeadModel']), 'none is Llama with a head for text or for scores'),
  ('llama', lambda c: c.update(architectures=['LlamaForTokenClassification']), 'none is Llama with a head for text'),
  ('llama', lambda c: c.update(architectures='Llama'), "architectures 'Llama' is no list"),
  ('mistral', lambda c: c.update(layer_types=['full_attention', 'sliding_attention']), 'all layers of a mistral have the window'),
  ('smollm3', lambda c: c.update(no_rope_layers=None, no_rope_layer_interval=0), 'no_rope_layer_interval 0 must be positive'),
  ('phi3', rope(short_factor=1.0), 'a value of a wrong type'),
  ('llama', rope(rope_type='llama3', factor=8.0, high_freq_factor=4.0), "'llama3' needs low_freq_factor"),
  ('llama', rope(rope_type='linear'), "'linear' needs a factor"),
  ('llama', rope(rope_type='yarn', factor=-1.0), 'rope_scaling.factor: -1.0 must be positive'),
  ('llama', rope(beta_fast=3), r"rope parameters \['beta_fast'\] are not known to type 'default'"),
  ('phi3', rope(short_factor=None), "'longrope' needs short_factor"),
  ('phi3', rope(short_factor=[1.0]), 'short_factor: 1 numbers for 4 frequencies'),
  ('deepseek_v3', lambda c: c.update(topk_method='greedy'), "topk_method 'greedy' is not noaux_tc"),
  ('deepseek_v3', lambda c: c.update(n_group=3), '8 experts in 3 groups'),
  ('deepseek_v3', lambda c: c.update(kv_lora_rank=None), "no key 'kv_lora_rank'"),
  ('qwen3_moe', lambda c: c.update(mlp_only_layers=[1]), 'dense layers between those with experts'),
  ('mixtral', lambda c: c.update(num_experts_per_tok=9), 'num_experts_per_tok'),
  ('smollm3', lambda c: c.update(no_rope_layers=[1]), 'no_rope_layers: 1 for 3 layers'),
  ('gemma2', lambda c: c.update(layer_types=['chunked_attention'] * 3), 'chunked_attention: only full and sliding'),
  ('gemma2', lambda c: c.update(hidden_activation='relu'), "hidden_act: 'relu' is none of"),
  ('mistral', lambda c: c.update(sliding_window='x'), "sliding_window 'x' is no count"),
])  # fmt: skip
def test_what_is_not_built_is_named(tmp_path, name, change, message):
  with pytest.raises(ConfigError, match=message):
    weights.read_arch(str(copied(tmp_path, name, change)))


def test_quantisation_that_is_not_read(tmp_path):
  folder = copied(tmp_path, 'llama', lambda c: c.update(quantization_config={'quant_method': 'awq', 'bits': 4}))
  with pytest.raises(ConfigError, match=r"config\.json: quantization 'awq' with blocks of None is not read"):
    weights.load(str(folder), weights.read_arch(str(folder)))
  for value, message in (
    ('fp8', "quantization_config 'fp8' is no"),
    ({'quant_method': 'fp8', 'weight_block_size': 128}, 'blocks of 128'),
  ):
    settings = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**settings, 'quantization_config': value}))
    with pytest.raises(ConfigError, match=message):
      weights.load(str(folder), weights.read_arch(str(folder)))


def test_scales_without_their_numbers(tmp_path):
  """Failure: weights that were cast from 8 bits without their scales are read as they are."""
  name = 'model.layers.0.mlp.up_proj.weight_scale_inv'
  folder = copied(tmp_path, 'llama', change=lambda t: {**t, name: np.ones((1, 1), np.float32)})
  with pytest.raises(ConfigError, match=rf'1 tensors that no weight reads: {name}'):
    weights.load(str(folder), weights.read_arch(str(folder)))


def test_exports_that_no_family_holds(tmp_path):
  arch, params, *_ = read('gemma2')
  with pytest.raises(ConfigError, match=r'no model of type gemma2 with local_rope_theta 10\.0'):
    weights.save(params, dataclasses.replace(arch, local_rope_theta=10.0), str(tmp_path / 'out'))
  assert families.family_of(dataclasses.replace(read('mixtral')[0], model_type='')) == 'mixtral'
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('name', 'billions'), [
  ('smollm2-135m', 0.1345), ('qwen2.5-0.5b', 0.494), ('qwen2.5-7b', 7.616), ('qwen2.5-14b', 14.77), ('qwen2.5-32b', 32.76),
  ('qwen3-0.6b', 0.596), ('qwen3-4b', 4.022), ('qwen3-8b', 8.191), ('qwen3-30b-a3b', 30.53), ('llama-3.2-1b', 1.236),
  ('llama-3.1-8b', 8.030), ('llama-3.1-70b', 70.55), ('mistral-7b-v0.3', 7.248), ('mixtral-8x7b', 46.70), ('smollm3-3b', 3.075),
  ('gemma-2-2b', 2.614), ('gemma-3-1b', 0.9999), ('phi-3-mini-4k', 3.821), ('deepseek-v3', 671.03),
])  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, billions):
  """Failure: a preset is of another size than the model that it is called after."""
  table = jax.tree.leaves(model.weight_table(PRESETS[name]), is_leaf=model.is_weight)
  assert sum(np.prod(w.shape, dtype=float) for w in table) / 1e9 == pytest.approx(billions, rel=6e-4)
