"""Weights of other programs: logits as PyTorch computes them, files written and read back, and every bad file refused by name."""

import dataclasses
import json
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

from rl_reasoning import model, rope, sharding, tokenizer, weights
from rl_reasoning.arch import RopeScaling
from rl_reasoning.config import ConfigError
from rl_reasoning.gguf_tokenizer import load_gguf_tokenizer

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
NAMES = ('llama', 'qwen2', 'qwen3')
Q = 'model.layers.1.self_attn.q_proj.weight'


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def copy(tmp_path, name='llama', config=(), tensors=None):
  """A fixture to spoil: config keys changed (None: removed), tensors passed through a function."""
  folder = tmp_path / name
  shutil.copytree(FIXTURES / name, folder)
  settings = {**json.loads((folder / 'config.json').read_text()), **dict(config)}
  (folder / 'config.json').write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
  if tensors:
    save_file(tensors(load_file(folder / 'model.safetensors')), folder / 'model.safetensors')
  return str(folder)


def read(path):
  return weights.load(path, weights.read_arch(path))


def trunk_of(params):
  return {name: params[name] for name in ('embed', 'layers', 'final_norm')}


def placed(table, mesh):
  return jax.tree.map(lambda w: sharding.named(mesh, w.shape, w.axes, w.hf), table, is_leaf=model.is_weight)


def test_scores_are_those_of_transformers():
  """Failure: another network than the published reward model, or its score is read beside the last token."""
  path, golden = str(FIXTURES / 'classifier'), np.load(FIXTURES / 'classifier' / 'golden.npz')
  arch, tokens = weights.read_arch(path), golden['tokens']
  assert weights.source_heads(path) == ('scalar',) and not arch.tie_word_embeddings
  params = weights.load(path, arch, heads=('scalar',))
  assert params.keys() == {*trunk_of(params), 'score'}
  segment, position = (tokens > 0).astype(np.int32), np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  hidden, _ = jax.jit(model.forward, static_argnums=1)(params, arch, tokens, segment, position)
  found = np.asarray(model.scores(params, hidden, segment))
  last = segment.sum(axis=1) - 1
  np.testing.assert_allclose(found[np.arange(4), last], golden['logits'][:, 0], atol=1e-5)
  assert (np.abs(found[np.arange(3), last[:3] - 1] - golden['logits'][:3, 0]) > 0.01).all()


def test_heads_that_the_source_lacks_or_has_too_many():
  """Failure: a critic cannot start from a language model (or a policy from a reward model), or gets the head of the other kind."""
  mesh = sharding.make_mesh(8, 1, 1)
  for name, lm, scalar in (('llama', {'lm_head'}, set()), ('qwen3', set(), set()), ('classifier', set(), {'score'})):
    path = str(FIXTURES / name)
    arch = weights.read_arch(path)
    whole = weights.load(path, arch, heads=weights.source_heads(path))
    for heads, own in ((('lm',), lm), (('scalar',), scalar), (('lm', 'scalar'), lm | scalar)):
      table = model.weight_table(arch, tuple(h for h in heads if h in weights.source_heads(path)))
      params = weights.load(path, arch, placed(table, mesh), heads)
      assert params.keys() == {*trunk_of(params)} | own
      assert_same(params, {key: whole[key] for key in params})


@pytest.mark.parametrize('name', NAMES)
def test_save_a_classifier_and_load_it(tmp_path, name):
  """Failure: a reward model comes back from its export with other weights or another zero, or transformers builds another class from it."""
  from transformers import AutoConfig

  arch = weights.read_arch(str(FIXTURES / name))
  params = weights.load(str(FIXTURES / name), arch) | {'score': jax.random.normal(jax.random.key(1), (1, arch.hidden_size))}
  target = str(tmp_path / 'saved')
  weights.save(params, arch, target, heads=('scalar',), score_shift=-1.25)
  assert (
    weights.read_arch(target) == arch and weights.source_heads(target) == ('scalar',) and weights.score_shift(target) == -1.25
  )
  assert_same(weights.load(target, arch, heads=('scalar',)), trunk_of(params) | {'score': params['score']})
  assert set(load_file(f'{target}/model.safetensors')) == {
    *(set(load_file(FIXTURES / name / 'model.safetensors')) - {'lm_head.weight'}), 'score.weight'}  # fmt: skip
  config = AutoConfig.from_pretrained(target)
  assert config.architectures == [{'llama': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}[name] + 'ForSequenceClassification']
  assert (config.num_labels, config.problem_type, config.pad_token_id) == (1, 'regression', None)
  with pytest.raises(ConfigError, match='both: transformers has no class with the heads lm, scalar'):
    weights.save(params, arch, str(tmp_path / 'both'), heads=('lm', 'scalar'))
  weights.save(params, arch, str(tmp_path / 'lm'))
  assert_same(read(str(tmp_path / 'lm')), {key: x for key, x in params.items() if key != 'score'})
  assert weights.score_shift(str(tmp_path / 'lm')) == 0


def test_a_classifier_pads_with_a_token_of_its_own(tmp_path, llama):
  """Failure: transformers takes the end token for padding and reads the score one token too early, or its tokenizer pads with another
  token than the model looks for."""
  from transformers import AutoTokenizer

  path = write_gguf(tmp_path / 'tiny.gguf', llama)
  arch = weights.read_arch(path)
  params = read(path) | {'score': np.zeros((1, arch.hidden_size), np.float32)}
  source = tmp_path / 'tokenizer'
  load_gguf_tokenizer(path)[0].save_pretrained(source)
  file = source / 'tokenizer_config.json'
  settings = json.loads(file.read_text())

  def exported(tokenizer, name):
    weights.save(params, arch, str(tmp_path / name), str(tokenizer), ('scalar',))
    return json.loads((tmp_path / name / 'config.json').read_text())['pad_token_id'], AutoTokenizer.from_pretrained(
      tmp_path / name
    )

  pad, new = exported(path, 'of_gguf')
  assert pad == new.pad_token_id == 1  # the tokenizer's own
  for n, bad in enumerate(({'pad_token': '<|end|>'}, {'pad_token': None})):
    file.write_text(json.dumps({**settings, **bad}))
    pad, new = exported(source, f'spare{n}')
    assert pad == new.pad_token_id == 1 and new.pad_token == '<|user|>' and new.eos_token_id == 0
    assert new.encode('<|user|>he<|end|>') == load_gguf_tokenizer(path)[0].encode('<|user|>he<|end|>')
  file.write_text(json.dumps({**settings, 'pad_token': '<|end|>'}))
  (source / 'generation_config.json').write_text('{"eos_token_id": [0, 1]}')
  assert exported(source, 'none')[0] is None  # all special tokens end a text: better no padding than a wrong one


def test_arch_of_fixtures():
  llama, qwen2, qwen3 = (weights.read_arch(str(FIXTURES / name)) for name in NAMES)
  assert llama == model.Arch(64, 32, 48, 2, 4, 2, 8, rope_theta=500.0, rms_norm_eps=1e-5, tie_word_embeddings=False)
  assert qwen2 == model.Arch(64, 32, 48, 2, 4, 2, 8, rope_theta=300.0, rms_norm_eps=1e-6, qkv_bias=True)
  assert qwen3 == model.Arch(64, 32, 48, 2, 4, 2, 16, rope_theta=700.0, rms_norm_eps=1e-6, qk_norm=True)


@pytest.mark.parametrize('rope', [
  {'rope_parameters': None, 'rope_theta': 500.0},
  {'rope_parameters': None, 'rope_theta': 500.0, 'rope_scaling': {'type': 'default'}},
  {'rope_parameters': None, 'rope_scaling': {'rope_type': 'default', 'rope_theta': 500.0}},
])  # fmt: skip
def test_rope_theta_wherever_it_is_written(tmp_path, rope):
  assert weights.read_arch(copy(tmp_path, config=rope)) == weights.read_arch(str(FIXTURES / 'llama'))


def test_defaults_of_old_configs(tmp_path):
  arch = weights.read_arch(copy(tmp_path, config=dict.fromkeys(('head_dim', 'num_key_value_heads', 'rope_parameters'))))
  assert (arch.head_dim, arch.num_key_value_heads, arch.rope_theta) == (8, 4, 10_000.0)


def test_save_and_load(tmp_path):
  """Failure: files of the tokenizer are lost, an export is not where it was asked for, or one that is there is written over."""
  source = copy(tmp_path, 'qwen2')
  for file in ('tokenizer.json', 'generation_config.json'):
    (pathlib.Path(source) / file).write_text(f'{{"{file}": 1}}')
  params, arch, target = read(source), weights.read_arch(source), str(tmp_path / 'new' / 'saved')
  weights.save(params, arch, target, source)
  assert_same(weights.load(target, arch), params)
  files = {'config.json', 'model.safetensors', 'tokenizer.json', 'generation_config.json'}
  assert {p.name for p in pathlib.Path(target).iterdir()} == files
  written = json.loads((pathlib.Path(target) / 'config.json').read_text())
  assert written['rope_theta'] == written['rope_parameters']['rope_theta'] == arch.rope_theta
  with pytest.raises(ConfigError, match='saved: exists already'):
    weights.save(params, arch, target)


def test_failed_save_leaves_nothing(tmp_path):
  arch = weights.read_arch(str(FIXTURES / 'llama'))
  params = weights.load(str(FIXTURES / 'llama'), arch)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match='empty: no tokenizer files'):
    weights.save(params, arch, str(tmp_path / 'out'), str(tmp_path / 'empty'))
  with pytest.raises(ConfigError, match='no model of type llama with qkv_bias True, qk_norm True'):
    weights.save(params, dataclasses.replace(arch, qkv_bias=True, qk_norm=True), str(tmp_path / 'out'))
  assert [p.name for p in tmp_path.iterdir()] == ['empty']


def test_onto_a_mesh_and_back(tmp_path):
  path = str(FIXTURES / 'qwen2')
  arch = weights.read_arch(path)
  mesh = sharding.make_mesh(1, 4, 2)
  places = placed(model.weight_table(arch), mesh)
  params = weights.load(path, arch, places)
  assert jax.tree.map(lambda x: x.sharding, params) == places
  assert params['layers']['q'].addressable_shards[0].data.shape == (2, 32 // 4, 4 // 2, arch.head_dim)
  assert_same(params, weights.load(path, arch))
  weights.save(params, arch, str(tmp_path / 'saved'))
  assert_same(params, read(str(tmp_path / 'saved')))


def test_shards_and_bfloat16(tmp_path):
  folder = pathlib.Path(copy(tmp_path))
  tensors = {k: x.astype(ml_dtypes.bfloat16) for k, x in load_file(folder / 'model.safetensors').items()}
  (folder / 'model.safetensors').unlink()
  parts = {'a.safetensors': sorted(tensors)[:7], 'b.safetensors': sorted(tensors)[7:]}
  for file, names in parts.items():
    save_file({name: tensors[name] for name in names}, folder / file)
  where = {name: file for file, names in parts.items() for name in names}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), read(str(FIXTURES / 'llama')))
  assert_same(read(str(folder)), rounded)
  (folder / 'b.safetensors').unlink()
  with pytest.raises(ConfigError, match=r'b\.safetensors: no such file'):
    read(str(folder))


def without(name):
  return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def plus(name, value):
  return lambda tensors: {**tensors, name: value(tensors)}


@pytest.mark.parametrize('name, change, message', [
  ('llama', without(Q), f'llama: 1 weights are missing: {Q}'),
  ('llama', without('lm_head.weight'), 'missing: lm_head.weight'),
  ('llama', plus('model.layers.0.self_attn.q_proj.bias', lambda t: np.zeros(32, np.float32)),
   r'model\.safetensors: 1 tensors that no weight reads: model\.layers\.0\.self_attn\.q_proj\.bias'),
  ('llama', plus('model.layers.2.mlp.up_proj.weight', lambda t: t['model.layers.1.mlp.up_proj.weight']), r'reads: model\.layers\.2'),
  ('llama', plus(Q, lambda t: np.zeros((32, 31), np.float32)), rf'safetensors: tensor {Q} has shape \(32, 31\).*needs \(32, 32\)'),
  ('llama', plus(Q, lambda t: np.zeros((32, 32), np.int8)), rf'safetensors: tensor {Q}: dtype I8'),
  ('qwen2', plus('model.layers.0.self_attn.k_proj.bias', lambda t: np.zeros((16, 1), np.float32)), r'k_proj\.bias has shape \(16, 1\)'),
  ('qwen3', plus('lm_head.weight', lambda t: t['model.embed_tokens.weight'] + 1), r'safetensors: tensor lm_head\.weight differs'),
  ('qwen3', plus('score.weight', lambda t: np.zeros((1, 32), np.float32)), r'safetensors: 1 tensors that no weight reads: score\.weight'),
  ('classifier', without('score.weight'), 'classifier: 1 weights are missing: score.weight'),
  ('classifier', plus('score.weight', lambda t: np.zeros((2, 16), np.float32)), r'score\.weight has shape \(2, 16\).*needs \(1, 16\)'),
])  # fmt: skip
def test_wrong_tensors_are_named(tmp_path, name, change, message):
  with pytest.raises(ConfigError, match=message):
    read(copy(tmp_path, name, tensors=change))


def test_tensors_that_say_nothing_are_ignored(tmp_path):
  def change(tensors):
    frequencies = {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32)}
    return {**tensors, **frequencies, 'lm_head.weight': tensors['model.embed_tokens.weight'].copy()}

  assert_same(read(copy(tmp_path, 'qwen3', tensors=change)), read(str(FIXTURES / 'qwen3')))


@pytest.mark.parametrize('config, message', [
  ({'model_type': 'gpt2'}, r"config\.json: model_type 'gpt2' is none of llama, mistral, smollm3, qwen2"),
  ({'model_type': None}, "config.json: no key 'model_type'"),
  ({'vocab_size': None}, "no key 'vocab_size'"),
  ({'num_attention_heads': None}, "no key 'num_attention_heads'"),
  ({'num_attention_heads': '4'}, "num_attention_heads '4' is no positive integer"),
  ({'intermediate_size': 'x'}, 'intermediate_size.*not of type int'),
  ({'num_key_value_heads': 3}, 'config.json: .*not a multiple'),
  ({'hidden_act': 'gelu'}, "hidden_act: 'gelu' is none of"),
  ({'attention_bias': True}, 'attention_bias'),
  ({'mlp_bias': True}, 'mlp_bias'),
  ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}, 'rope_parameters': None}, "rope type 'llama3' needs low_freq_factor"),
  ({'rope_scaling': {'type': 'linear'}, 'rope_parameters': None}, "rope type 'linear' needs a factor"),
  ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, "rope type 'yarn' needs a factor"),
  ({'rope_parameters': {'full_attention': {'rope_theta': 1e4}}}, 'local_rope_theta cannot act: no layer has a window'),
  ({'layer_types': ['full_attention', 'sliding_attention']}, 'sliding_attention'),
  ({'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1}, "a model of type 'llama' has no layers"),
])  # fmt: skip
def test_config_that_is_not_this_model(tmp_path, config, message):
  with pytest.raises(ConfigError, match=message):
    weights.read_arch(copy(tmp_path, config=config))


def test_classifiers_that_are_no_reward_model(tmp_path):
  """Failure: the first of several labels is taken for a reward, or a shift that is no number stops a run at its first step."""
  path = copy(tmp_path, 'classifier', {'id2label': {'0': 'good', '1': 'bad'}, 'score_shift': 'x'})
  with pytest.raises(ConfigError, match=r'classifier/config\.json: a classifier of 2 labels'):
    weights.source_heads(path)
  with pytest.raises(ConfigError, match=r"classifier/config\.json: score_shift 'x' is no finite number"):
    weights.score_shift(path)


def test_sliding_window_that_is_not_in_use(tmp_path):
  qwen2 = {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 2, 'layer_types': None}
  assert weights.read_arch(copy(tmp_path, 'qwen2', qwen2)) == weights.read_arch(str(FIXTURES / 'qwen2'))


def test_folders_that_are_no_model(tmp_path):
  folder = pathlib.Path(copy(tmp_path))
  arch, file = weights.read_arch(str(folder)), folder / 'model.safetensors'
  content = file.read_bytes()
  for bad in (content[:-1], content[:100], b'', b'\xff' * 200):
    file.write_bytes(bad)
    with pytest.raises(ConfigError, match=r'llama/model\.safetensors: truncated or no safetensors'):
      weights.load(str(folder), arch)
  file.unlink()
  with pytest.raises(ConfigError, match='llama: no weights'):
    weights.load(str(folder), arch)
  (folder / 'pytorch_model.bin').write_bytes(content)
  with pytest.raises(ConfigError, match=r'llama: only pytorch_model\.bin: pickle is not read; convert .* to safetensors'):
    weights.load(str(folder), arch)
  (folder / 'config.json').write_text('{"model_type": ')
  with pytest.raises(ConfigError, match=r'llama/config\.json: not JSON'):
    weights.read_arch(str(folder))
  (folder / 'config.json').unlink()
  with pytest.raises(ConfigError, match=r'llama/config\.json: no such file'):
    weights.read_arch(str(folder))


MERGES = ['e !', 'h e', 'l l', 'he ll', 'hell o', 'Ġ w', '1 2']
TOKENS = ['<|end|>', '<|user|>', '<tool>', *sorted(pre_tokenizers.ByteLevel.alphabet())] + [m.replace(' ', '') for m in MERGES]
TEMPLATE = "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}"


def permuted(x, heads):
  """As llama.cpp's convert_hf_to_gguf.py writes Q and K."""
  return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(
  path, tensors, pre='smollm', kind='gpt2', architecture='llama', eps=True, heads=4, rope=(), more=(), theta=500.0, head_dim=None,
  turn=None,
):  # fmt: skip
  """The llama fixture as llama.cpp would convert it: matrices float16, norms float32, and a tokenizer of bytes and a few merges."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(2)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(48)
  writer.add_head_count(heads)
  writer.add_head_count_kv(2)
  writer.add_rope_freq_base(theta)
  if head_dim:
    writer.add_key_length(head_dim)
  if 'dimension' in rope:
    writer.add_rope_dimension_count(rope['dimension'])
  if 'context' in rope:
    writer.add_context_length(rope['context'])
  if 'scaling' in rope:
    writer.add_rope_scaling_type(rope['scaling'])
  if eps:
    writer.add_layer_norm_rms_eps(1e-5)
  writer.add_tokenizer_model(kind)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 3, 4] + [1] * (len(TOKENS) - 3))
  writer.add_token_merges(MERGES)
  writer.add_eos_token_id(0)
  writer.add_pad_token_id(1)
  if turn is not None:
    writer.add_eot_token_id(turn)
  writer.add_chat_template(TEMPLATE)
  short = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output', 'input_layernorm': 'attn_norm',
           'post_attention_layernorm': 'ffn_norm', 'self_attn.': 'attn_', 'mlp.': 'ffn_', 'o_proj': 'output', '_proj': '',
           'model.layers': 'blk'}  # fmt: skip
  for name, x in tensors.items():
    if architecture == 'llama' and ('q_proj' in name or 'k_proj' in name):
      x = permuted(x, 4 if 'q_proj' in name else 2)
    for old, new in short.items():
      name = name.replace(old, new)
    writer.add_tensor(name, x.astype(np.float16) if x.ndim == 2 else x)
  for name, x in dict(more).items():
    writer.add_tensor(name, x)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


@pytest.fixture
def llama():
  return load_file(FIXTURES / 'llama' / 'model.safetensors')


def test_gguf_loads_what_it_was_made_from(tmp_path, llama):
  path = write_gguf(tmp_path / 'tiny.gguf', llama)
  assert weights.read_arch(path) == weights.read_arch(str(FIXTURES / 'llama'))
  halved = copy(tmp_path, tensors=lambda t: {k: x.astype(np.float16) if x.ndim == 2 else x for k, x in t.items()})
  assert_same(read(path), read(halved))
  tied = write_gguf(tmp_path / 'tied.gguf', without('lm_head.weight')(llama))
  assert weights.read_arch(tied) == dataclasses.replace(weights.read_arch(path), tie_word_embeddings=True)
  assert 'lm_head' not in read(tied)


def test_gguf_with_llama_3s_rope(tmp_path, llama):
  """Failure: the frequencies of Llama 3.1, which no metadata tell of, are those of Llama 2, or the length that it was made for is lost."""
  plain = dataclasses.replace(weights.read_arch(str(FIXTURES / 'llama')), rope_theta=500_000.0)
  scaling = RopeScaling('llama3', 32.0, 8192)
  stretched = dataclasses.replace(plain, rope_scaling=scaling)
  divisors = np.asarray(rope.frequencies(plain) / rope.frequencies(stretched))
  assert divisors[-1] == 32 and divisors[0] == 1
  path = write_gguf(
    tmp_path / 'llama3.gguf',
    llama,
    theta=500_000.0,
    rope={'context': 131_072},
    more={'rope_freqs.weight': divisors},
    pre='llama-bpe',
  )
  arch = weights.read_arch(path)
  assert arch == stretched and arch.max_position_embeddings == 131_072
  assert_same(read(path), read(write_gguf(tmp_path / 'plain.gguf', llama)))


@pytest.mark.parametrize('name', ['qwen2', 'qwen3'])
def test_gguf_of_other_families(name, tmp_path):
  """Failure: their rows are put in llama's order, or biases and norms of heads are lost."""
  arch = weights.read_arch(str(FIXTURES / name))
  tensors = load_file(FIXTURES / name / 'model.safetensors')
  path = write_gguf(tmp_path / 'one.gguf', tensors, 'qwen2', architecture=name, theta=arch.rope_theta, head_dim=arch.head_dim)
  assert weights.read_arch(path) == dataclasses.replace(arch, rms_norm_eps=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), read(path), weights.load(str(FIXTURES / name), arch))
  tok, _ = load_gguf_tokenizer(path)
  assert tok.decode(tok.encode("he's 123")) == "he's 123"


def half(x):
  return np.frombuffer(np.float16(x).tobytes(), np.uint8)


def q4_k(rng):
  """(144 bytes, the 256 numbers that they are) by llama.cpp's ggml-quants.c."""
  d, least, packed, qs = (
    np.float16(0.01),
    np.float16(0.02),
    rng.integers(0, 256, 12, np.uint8),
    rng.integers(0, 256, 128, np.uint8),
  )
  q, y = packed.astype(int), []
  for j in range(8):
    scale, low = (q[j] & 63, q[j + 4] & 63) if j < 4 else (
      (q[j + 4] & 15) | (q[j - 4] >> 6) << 4, (q[j + 4] >> 4) | (q[j] >> 6) << 4)  # fmt: skip
    part = qs[32 * (j // 2) : 32 * (j // 2) + 32].astype(int)
    y.append(np.float32(d) * scale * (part >> 4 if j % 2 else part & 15) - np.float32(least) * low)
  return np.concatenate([half(d), half(least), packed, qs]), np.concatenate(y)


def q6_k(rng):
  """(210 bytes, the 256 numbers that they are)."""
  ql, qh = (rng.integers(0, 256, n, np.uint8) for n in (128, 64))
  scales, d, y = rng.integers(-128, 128, 16).astype(np.int8), np.float16(0.001), []
  for n in range(2):
    low, high = ql[64 * n : 64 * n + 64].astype(int), qh[32 * n : 32 * n + 32].astype(int)
    for part in range(4):
      nibble = low[32 * (part % 2) : 32 * (part % 2) + 32] >> 4 * (part // 2) & 15
      value = (nibble | (high >> 2 * part & 3) << 4) - 32
      y.append(np.float32(d) * np.repeat(scales[8 * n + 2 * part : 8 * n + 2 * part + 2].astype(int), 16) * value)
  return np.concatenate([ql, qh, scales.view(np.uint8), half(d)]), np.concatenate(y)


def quantised(kind, shape, rng):
  """(bytes [rows, bytes a row], numbers [rows, columns]) of random weights; of the types that the library cannot write, by their layout."""
  if kind in ('Q4_K', 'Q6_K'):
    blocks = [{'Q4_K': q4_k, 'Q6_K': q6_k}[kind](rng) for _ in range(shape[0] * shape[1] // 256)]
    return tuple(np.stack(part).reshape(shape[0], -1) for part in zip(*blocks))
  x = rng.normal(size=shape).astype(np.float32)
  stored = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
  return stored, gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize('kind, error', [
  ('F32', 0), ('F16', 2e-3), ('Q8_0', 0.03), ('Q4_0', 0.5), ('Q4_1', 0.4), ('Q4_K', None), ('Q6_K', None),
])  # fmt: skip
def test_quantised_gguf(kind, error, tmp_path):
  """Failure: a quantisation is read as another, or its rows are mixed up when heads are put in order."""
  rng, D, heads, types = np.random.default_rng(0), 256, 4, gguf.GGMLQuantizationType
  path = tmp_path / 'one.gguf'
  writer = gguf.GGUFWriter(path, 'llama')
  for add, value in ((writer.add_block_count, 1), (writer.add_embedding_length, D), (writer.add_feed_forward_length, D),
                     (writer.add_head_count, heads), (writer.add_head_count_kv, heads), (writer.add_layer_norm_rms_eps, 1e-5)):  # fmt: skip
    add(value)
  numbers = {}
  parts = ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down')
  for name in ('token_embd', *(f'blk.0.{part}' for part in parts)):
    stored, numbers[name] = quantised(kind, (D, D), rng)
    writer.add_tensor(f'{name}.weight', stored, raw_dtype=types[kind])
  for name in ('output_norm', 'blk.0.attn_norm', 'blk.0.ffn_norm'):
    writer.add_tensor(f'{name}.weight', np.ones(D, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  params = read(str(path))
  np.testing.assert_allclose(params['embed'], numbers['token_embd'], rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(params['layers']['down'][0], numbers['blk.0.ffn_down'].T, rtol=1e-6, atol=1e-7)
  q = numbers['blk.0.attn_q'].reshape(heads, 32, 2, D).swapaxes(1, 2).reshape(heads, 64, D)
  np.testing.assert_allclose(params['layers']['q'][0], np.moveaxis(q, 2, 0), rtol=1e-6, atol=1e-7)
  if error is not None:  # what the library wrote is near what was to be written
    again = np.random.default_rng(0).normal(size=(D, D)).astype(np.float32)
    assert np.abs(params['embed'] - again).max() <= error


def test_bad_gguf_is_refused_by_name(tmp_path, llama):
  content = pathlib.Path(write_gguf(tmp_path / 'whole.gguf', llama)).read_bytes()
  for size in (0, 100, len(content) // 2, len(content) - 64):
    (tmp_path / f'cut{size}.gguf').write_bytes(content[:size])
    with pytest.raises(ConfigError, match=rf'cut{size}\.gguf: truncated or no GGUF file'):
      read(str(tmp_path / f'cut{size}.gguf'))
  cases = [
    (dict(architecture='gemma'), r"1\.gguf: general\.architecture 'gemma'"),
    (dict(eps=False), r"2\.gguf: no metadata key 'llama\.attention\.layer_norm_rms_epsilon'"),
    (
      dict(more={'rope_freqs.weight': np.arange(1, 5, dtype=np.float32)}),
      r"3\.gguf: rope_freqs\.weight is not what Llama 3's scaling",
    ),
    (dict(tensors=without(Q)(llama)), rf'4\.gguf: 1 weights are missing: {Q}'),
    (dict(tensors=plus(Q, lambda t: np.ones((16, 32), np.float32))(llama)), rf'5\.gguf: tensor {Q} has shape \(16, 32\)'),
    (dict(tensors=without('model.embed_tokens.weight')(llama)), r'6\.gguf: no tensor token_embd\.weight'),
    (dict(rope={'dimension': 4}), r'7\.gguf: llama\.rope\.dimension_count 4 is not the head dimension 8'),
    (dict(rope={'scaling': gguf.RopeScalingType.YARN}), r"8\.gguf: llama\.rope\.scaling\.type 'yarn'"),
    (dict(heads=0), r'9\.gguf: llama\.attention\.head_count 0 is no positive integer'),
  ]
  for number, (settings, message) in enumerate(cases, 1):
    with pytest.raises(ConfigError, match=message):
      read(write_gguf(tmp_path / f'{number}.gguf', **{'tensors': llama, **settings}))
  with pytest.raises(ConfigError, match=r'absent\.gguf: no such file'):
    weights.read_arch(str(tmp_path / 'absent.gguf'))


def test_gguf_tokenizer(tmp_path, llama):
  path = write_gguf(tmp_path / 'tiny.gguf', llama)
  (tokenizer, _), ids = load_gguf_tokenizer(path), {token: i for i, token in enumerate(TOKENS)}
  assert len(tokenizer) == len(TOKENS) and tokenizer.chat_template == TEMPLATE
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1, None)
  assert tokenizer.encode('hello w') == [ids['hello'], ids['Ġw']]
  assert tokenizer.encode('12') == [ids['1'], ids['2']]  # digits stand alone, whatever the merges say
  assert tokenizer.encode('he!') == [ids['he'], ids['!']]  # letters and punctuation do not merge
  assert tokenizer.encode('<|user|>he<tool><|end|>') == [1, ids['he'], 2, 0]
  for text in ('hello world', '  two  spaces\n\tand 1234.5', 'naïve 你好 🙂', '<|user|>hi<|end|>\n'):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode(tokenizer.encode('hello<tool><|end|>'), skip_special_tokens=True) == 'hello<tool>'
  with pytest.raises(ConfigError, match=r"pre\.gguf: pre-tokenizer 'refact' is none of smollm"):
    load_gguf_tokenizer(write_gguf(tmp_path / 'pre.gguf', llama, pre='refact'))
  with pytest.raises(ConfigError, match=r"kind\.gguf: tokenizer model 'llama'"):
    load_gguf_tokenizer(write_gguf(tmp_path / 'kind.gguf', llama, kind='llama'))


def test_export_of_a_gguf_takes_its_tokenizer_along(tmp_path, llama):
  from transformers import AutoTokenizer

  path = write_gguf(tmp_path / 'tiny.gguf', llama)
  weights.save(read(path), weights.read_arch(path), str(tmp_path / 'saved'), path)
  new, old = AutoTokenizer.from_pretrained(tmp_path / 'saved'), load_gguf_tokenizer(path)[0]
  text = '<|user|>hello 12 naïve<tool><|end|>'
  assert new.encode(text) == old.encode(text) and new.eos_token_id == 0 and new.chat_template == TEMPLATE
  assert json.loads((tmp_path / 'saved' / 'generation_config.json').read_text()) == {'eos_token_id': 0, 'pad_token_id': 1}
  turn = write_gguf(tmp_path / 'turn.gguf', llama, turn=2)
  assert tokenizer.load(turn).end_ids == (0, 2)
  weights.save(read(turn), weights.read_arch(turn), str(tmp_path / 'turns'), turn)
  assert tokenizer.load(str(tmp_path / 'turns')).end_ids == (0, 2)


def test_float16_that_overflows(tmp_path):
  """Failure: infinity is written."""
  arch, params = weights.read_arch(str(FIXTURES / 'llama')), read(str(FIXTURES / 'llama'))
  params['final_norm'] = params['final_norm'].at[3].set(1e5)
  with pytest.raises(ConfigError, match=r'model\.norm\.weight: numbers beyond those of float16; use bfloat16'):
    weights.save(params, arch, str(tmp_path / 'out'), dtype='float16')
  assert not (tmp_path / 'out').exists()


def test_a_tensor_in_two_files(tmp_path):
  """Failure: the file that happens to be read last wins."""
  folder = pathlib.Path(copy(tmp_path))
  shutil.copy(folder / 'model.safetensors', folder / 'a.safetensors')
  names = list(load_file(folder / 'a.safetensors'))
  index = {names[0]: 'a.safetensors', **dict.fromkeys(names[1:], 'model.safetensors')}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  with pytest.raises(ConfigError, match=r'model\.safetensors: tensor .* is in .*a\.safetensors, too'):
    read(str(folder))
