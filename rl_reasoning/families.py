"""Published families of models: config.json of Hugging Face -> architecture record and back, and the names of their tensors.

A family is data: what its config.json calls things, what it fills in where it is silent, and how its tensors are named. Nothing of it
reaches the forward function.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from rl_reasoning.arch import FULL, ROPE_TYPES, SLIDING, Arch, RopeScaling
from rl_reasoning.config import ConfigError, check, from_mapping

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
  """What sets a family apart."""

  classes: str  # what the classes of transformers begin with
  traits: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the record, in every model of it
  defaults: dict[str, Any] = dataclasses.field(
    default_factory=dict
  )  # of transformers' class, for keys that config.json leaves out
  act: str = 'hidden_act'  # the key of the activation
  renamed: tuple[tuple[str, str], ...] = ()  # (in our names, in the family's)


GEMMA: dict[str, Any] = {'norm_offset': True, 'post_norms': True, 'scale_embeddings': True}
MIXTRAL_NAMES = (
  ('.mlp.gate.', '.block_sparse_moe.gate.'), ('.mlp.experts.', '.block_sparse_moe.experts.'),
  ('.gate_proj.', '.w1.'), ('.up_proj.', '.w3.'), ('.down_proj.', '.w2.'),
)  # fmt: skip
GEMMA_DEFAULTS: dict[str, Any] = {
  'num_key_value_heads': 4, 'head_dim': 256, 'sliding_window': 4096, 'query_pre_attn_scalar': 256, 'tie_word_embeddings': True,
}  # fmt: skip
FAMILIES: dict[str, Family] = {
  'llama': Family('Llama', {}, {'max_position_embeddings': 2048}),
  'mistral': Family('Mistral', {}, {'num_key_value_heads': 8, 'sliding_window': 4096, 'max_position_embeddings': 131_072}),
  'smollm3': Family('SmolLM3', {}, {
    'num_key_value_heads': 4, 'rope_theta': 2e6, 'tie_word_embeddings': True, 'max_position_embeddings': 32_768,
  }),
  'qwen2': Family('Qwen2', {'qkv_bias': True}, {'num_key_value_heads': 32, 'max_position_embeddings': 32_768}),
  'qwen3': Family('Qwen3', {'qk_norm': True}, {'num_key_value_heads': 32, 'head_dim': 128, 'max_position_embeddings': 32_768}),
  'gemma2': Family('Gemma2', GEMMA, {
    **GEMMA_DEFAULTS, 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0, 'max_position_embeddings': 8192,
  }, act='hidden_activation'),
  'gemma3_text': Family('Gemma3', {**GEMMA, 'qk_norm': True}, {  # published ones rely on these
    **GEMMA_DEFAULTS, 'rope_theta': 1e6, 'max_position_embeddings': 131_072, 'vocab_size': 262_208, 'num_attention_heads': 8,
    'rms_norm_eps': 1e-6,
  }, act='hidden_activation'),
  'phi3': Family('Phi3', {}, {
    'num_key_value_heads': 32, 'max_position_embeddings': 4096, 'original_max_position_embeddings': 4096,
  }),
  'mixtral': Family('Mixtral', {}, {
    'num_key_value_heads': 8, 'rope_theta': 1e6, 'num_local_experts': 8, 'num_experts_per_tok': 2, 'max_position_embeddings': 131_072,
  }, renamed=MIXTRAL_NAMES),
  'qwen3_moe': Family('Qwen3Moe', {'qk_norm': True}, {
    'num_key_value_heads': 4, 'num_local_experts': 128, 'num_experts_per_tok': 8, 'moe_intermediate_size': 768,
    'max_position_embeddings': 32_768,
  }),
  'deepseek_v3': Family('DeepseekV3', {'scoring_func': 'sigmoid'}, {
    'num_key_value_heads': 128, 'num_local_experts': 256, 'num_experts_per_tok': 8, 'moe_intermediate_size': 2048, 'n_shared_experts': 1,
    'first_k_dense_replace': 3, 'n_group': 8, 'topk_group': 4, 'routed_scaling_factor': 2.5, 'q_lora_rank': 1536, 'kv_lora_rank': 512,
    'qk_rope_head_dim': 64, 'qk_nope_head_dim': 128, 'v_head_dim': 128, 'max_position_embeddings': 4096,
  }),
}  # fmt: skip
ENDINGS = {'lm': 'ForCausalLM', 'scalar': 'ForSequenceClassification'}  # of the classes with either head
WINDOWED = ('mistral', 'mixtral', 'phi3', 'qwen3_moe')  # all of their layers have the window, or none
ROPE_KEYS = {
  'default': (), 'linear': (), 'dynamic': (), 'llama3': ('low_freq_factor', 'high_freq_factor'),
  'yarn': ('beta_fast', 'beta_slow', 'truncate', 'mscale', 'mscale_all_dim', 'attention_factor'),
  'longrope': ('short_factor', 'long_factor', 'attention_factor'),
}  # fmt: skip
NO_BIAS = ('attention_bias', 'mlp_bias', 'use_bidirectional_attention')


def read_json(file: pathlib.Path) -> dict[str, Any]:
  check(file.is_file(), f'{file}: no such file')
  try:
    value = json.loads(file.read_text())
  except ValueError as error:
    raise ConfigError(f'{file}: not JSON: {error}') from None
  check(isinstance(value, dict), f'{file}: holds no JSON object')
  return value


def make_arch(file: str, settings: Mapping[str, Any]) -> Arch:
  try:
    return from_mapping(Arch, settings)
  except ValueError as error:
    raise ConfigError(f'{file}: {error}') from None


class Reader:
  """The keys of a config.json; what is wrong names the file and the key."""

  def __init__(self, file: pathlib.Path, config: Config):
    self.file, self.config = file, config

  def check(self, good: bool, text: str) -> None:
    check(good, f'{self.file}: {text}')

  def get(self, key: str, default: Any = None) -> Any:
    """`default` also where it is null."""
    value = self.config.get(key)
    return default if value is None else value

  def need(self, key: str) -> Any:
    self.check(self.config.get(key) is not None, f'no key {key!r}')
    return self.config[key]

  def count(self, key: str, default: int | None = None) -> int:
    value = self.need(key) if default is None else self.get(key, default)
    self.check(isinstance(value, int) and not isinstance(value, bool) and value >= 0, f'{key} {value!r} is no count')
    return value

  def positive(self, key: str, default: int) -> int:
    value = self.count(key, default)
    self.check(value > 0, f'{key} 0 must be positive')
    return value

  def numbers(self, key: str) -> list:
    value = self.need(key)
    self.check(isinstance(value, list), f'{key} {value!r} is no list')
    return value


def rope_type(given: Mapping[str, Any]) -> str:
  kind = str(given.get('rope_type') or given.get('type') or 'default')
  return 'longrope' if kind == 'su' else kind


def read_rope(r: Reader, given: Mapping[str, Any], theta: float) -> tuple[float, RopeScaling]:
  """(theta, scaling) of one set of rope parameters, of transformers 4 or 5."""
  kind = rope_type(given)
  r.check(kind in ROPE_TYPES, f'rope type {kind!r} is none of {", ".join(ROPE_TYPES)}')
  known = {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings', *ROPE_KEYS[kind]}
  known |= set() if kind == 'default' else {'factor'}
  r.check(not given.keys() - known, f'rope parameters {sorted(given.keys() - known)} are not known to type {kind!r}')
  theta = given.get('rope_theta') or r.get('rope_theta', theta)
  if kind == 'default':
    return theta, RopeScaling()
  longest = r.count('max_position_embeddings', 0)
  original = given.get('original_max_position_embeddings') or r.count('original_max_position_embeddings', longest)
  original = longest if kind == 'dynamic' else original
  factor = given.get('factor')
  if factor is None:
    told = given.get('original_max_position_embeddings') or r.get('original_max_position_embeddings')
    r.check(kind in ('yarn', 'longrope') and bool(longest) and bool(told), f'rope type {kind!r} needs a factor')
    factor = longest / original
  for key in (
    ('low_freq_factor', 'high_freq_factor') if kind == 'llama3' else ('short_factor', 'long_factor') if kind == 'longrope' else ()
  ):
    r.check(given.get(key) is not None, f'rope type {kind!r} needs {key}')
  own = {key: given[key] for key in ROPE_KEYS[kind] if given.get(key) is not None}
  own |= {key: tuple(map(float, own[key])) for key in ('short_factor', 'long_factor') if key in own}
  own |= {} if kind == 'linear' else {'original_max_position_embeddings': original}
  try:
    return theta, from_mapping(RopeScaling, {'rope_type': kind, 'factor': factor, **own}, 'rope_scaling.')
  except ValueError as error:
    raise ConfigError(f'{r.file}: {error}') from None


def read_ropes(r: Reader, family: Family) -> dict[str, Any]:
  for key in ('rope_scaling', 'rope_parameters'):
    r.check(isinstance(r.get(key, {}), dict), f'{key} {r.get(key)!r} is no JSON object')
  old, given = r.get('rope_scaling', {}), r.get('rope_parameters', {})
  beside = given.get(FULL, given) if given else old  # transformers 4 reads the one, 5 the other: both together must say the same
  same = {'rope_type': rope_type(old)} | {key: x for key, x in old.items() if key != 'type'}
  r.check(not old or (isinstance(beside, dict) and same.items() <= {**beside, 'rope_type': rope_type(beside)}.items()),
          f'rope_scaling {old} is not what rope_parameters {given} has: leave one out')  # fmt: skip
  given, local = given or old, {}
  if FULL in given or SLIDING in given:  # a set a kind of layers, as transformers 5 writes Gemma 3
    r.check(all(isinstance(part, dict) for part in given.values()), 'rope_parameters: one set a kind of layers, or one for all')
    local_theta, scaling = read_rope(r, given.get(SLIDING) or {}, 10_000.0)
    r.check(scaling == RopeScaling(), f'rope_parameters.{SLIDING}: only the default type is built')
    local, given = {'local_rope_theta': local_theta}, given.get(FULL) or {}
  elif r.get('model_type') == 'gemma3_text':
    local = {'local_rope_theta': r.get('rope_local_base_freq', 10_000.0)}
  theta, scaling = read_rope(r, given, 10_000.0)
  turned = given.get('partial_rotary_factor') or r.get('partial_rotary_factor', 1.0)
  r.check(turned == 1 or family.classes == 'Phi3', f'partial_rotary_factor {turned}: only phi3 has it')
  return {'rope_theta': theta, 'rope_scaling': dataclasses.asdict(scaling), 'partial_rotary_factor': turned, **local}


def read_layers(r: Reader, name: str, layers: int) -> dict[str, Any]:
  """Which layers have a window, and which turn nothing."""
  window, found = r.count('sliding_window', 0), {}
  asked = name in ('mistral', 'mixtral', 'phi3', 'gemma2', 'gemma3_text') or bool(r.get('use_sliding_window', False))
  on = bool(window) and asked
  r.check(
    not on or name not in ('llama', 'deepseek_v3'), f'use_sliding_window: a model of type {name!r} has no layers with a window'
  )
  if name == 'smollm3':
    every = r.positive('no_rope_layer_interval', 4)
    turns = r.get('no_rope_layers') or [int((i + 1) % every != 0) for i in range(layers)]
    r.check(len(turns) == layers, f'no_rope_layers: {len(turns)} for {layers} layers')
    found['no_rope_layers'] = tuple(i for i, turn in enumerate(turns) if not turn)  # 1 means that it turns
  if name in WINDOWED:
    types = (SLIDING if on else FULL,) * layers
    r.check(tuple(r.get('layer_types') or types) == types, f'layer_types: all layers of a {name} have the window, or none')
  elif r.get('layer_types'):
    types = tuple(r.numbers('layer_types'))
    other = sorted({str(kind) for kind in types} - {FULL, SLIDING})
    r.check(not other, f'layer_types {", ".join(other)}: only full and sliding attention are built')
  elif name in ('gemma2', 'gemma3_text'):
    every = 2 if name == 'gemma2' else r.positive('sliding_window_pattern', 6)
    types = tuple(SLIDING if (i + 1) % every else FULL for i in range(layers))
  elif name in ('qwen2', 'qwen3'):
    first = r.count('max_window_layers', 28)
    types = tuple(SLIDING if i >= first else FULL for i in range(layers))
  elif name == 'smollm3':
    types = tuple(SLIDING if i in found['no_rope_layers'] else FULL for i in range(layers))
  else:
    types = (SLIDING,) * layers
  if on and SLIDING in types:
    found |= {'sliding_window': window, 'layer_types': types}
  else:
    r.check(SLIDING not in (r.get('layer_types') or ()), f'layer_types has {SLIDING}, and no sliding_window is in use')
  return found


def read_experts(r: Reader, name: str) -> dict[str, Any]:
  if name == 'mixtral':
    return {
      'num_experts': r.count('num_local_experts'), 'num_experts_per_tok': r.count('num_experts_per_tok'),
      'moe_intermediate_size': r.count('intermediate_size'),
    }  # fmt: skip
  if name == 'qwen3_moe':
    r.check(
      r.get('decoder_sparse_step', 1) == 1 and not r.get('mlp_only_layers'),
      'dense layers between those with experts are not built',
    )
    experts = r.get('num_experts') or r.get('num_local_experts')
    return {
      'num_experts': experts, 'num_experts_per_tok': r.count('num_experts_per_tok'),
      'moe_intermediate_size': r.count('moe_intermediate_size'), 'norm_topk_prob': bool(r.get('norm_topk_prob', False)),
    }  # fmt: skip
  if name == 'deepseek_v3':
    r.check(r.get('scoring_func', 'sigmoid') == 'sigmoid', f'scoring_func {r.get("scoring_func")!r} is not sigmoid')
    r.check(r.get('topk_method', 'noaux_tc') == 'noaux_tc', f'topk_method {r.get("topk_method")!r} is not noaux_tc')
    r.check(r.get('moe_layer_freq', 1) == 1, 'moe_layer_freq: dense layers between those with experts are not built')
    return {
      'num_experts': r.get('n_routed_experts') or r.get('num_local_experts'), 'num_experts_per_tok': r.count('num_experts_per_tok'),
      'moe_intermediate_size': r.count('moe_intermediate_size'), 'n_shared_experts': r.count('n_shared_experts', 0),
      'first_k_dense_replace': r.count('first_k_dense_replace', 0), 'norm_topk_prob': bool(r.get('norm_topk_prob', True)),
      'n_group': r.count('n_group', 1), 'topk_group': r.count('topk_group', 1),
      'routed_scaling_factor': r.get('routed_scaling_factor', 1.0),
    }  # fmt: skip
  return {}


def read_latent(r: Reader) -> dict[str, Any]:
  turned = r.count('qk_rope_head_dim')
  return {
    'kv_lora_rank': r.count('kv_lora_rank'), 'q_lora_rank': r.count('q_lora_rank', 0), 'qk_rope_head_dim': turned,
    'v_head_dim': r.count('v_head_dim'), 'head_dim': r.count('qk_nope_head_dim') + turned,
    'rope_interleave': bool(r.get('rope_interleave', True)),
  }  # fmt: skip


def hf_arch(file: pathlib.Path) -> Arch:
  """The architecture of a config.json. Raises ConfigError for what this model cannot be."""
  try:
    return read_config(read_json(file), file)
  except (TypeError, ValueError, AttributeError) as error:  # a value of another kind than any published one
    raise error if isinstance(error, ConfigError) else ConfigError(f'{file}: a value of a wrong type: {error}') from None


def read_config(config: Config, file: pathlib.Path) -> Arch:
  r = Reader(file, config)
  classes = r.get('architectures', [])
  if r.get('model_type') == 'gemma3':  # text and pictures: the language model alone
    r.check(isinstance(r.get('text_config'), dict), "no key 'text_config'")
    r = Reader(file, {**r.config['text_config'], 'model_type': 'gemma3_text'})
  name = r.need('model_type')
  r.check(isinstance(name, str) and name in FAMILIES, f'model_type {name!r} is none of {", ".join(FAMILIES)}')
  family = FAMILIES[name]
  endings = (*ENDINGS.values(), 'ForConditionalGeneration')
  r.check(isinstance(classes, list), f'architectures {classes!r} is no list')
  built = [c for c in classes if str(c).startswith(family.classes) and str(c).endswith(endings)]
  r.check(not classes or bool(built), f'architectures {classes}: none is {family.classes} with a head for text or for scores')
  r = Reader(file, {**family.defaults, **r.config})
  for key in NO_BIAS:
    r.check(not r.get(key, False), f'{key} is on, which is not built')
  for key in ('num_hidden_layers', 'num_attention_heads', 'hidden_size'):
    r.check(isinstance(r.need(key), int) and r.need(key) > 0, f'{key} {r.config[key]!r} is no positive integer')
  layers, heads = r.count('num_hidden_layers'), r.count('num_attention_heads')
  act = r.get(family.act) or r.get('hidden_act', 'gelu_pytorch_tanh' if family.act == 'hidden_activation' else 'silu')
  settings = {
    **{key: r.need(key) for key in ('vocab_size', 'hidden_size', 'intermediate_size', 'rms_norm_eps')},
    'model_type': name,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': r.count('num_key_value_heads', heads),
    'head_dim': r.get('head_dim', r.need('hidden_size') // heads),
    'tie_word_embeddings': bool(r.get('tie_word_embeddings', False)),
    'max_position_embeddings': r.count('max_position_embeddings', 0),
    'hidden_act': 'gelu_pytorch_tanh' if act == 'gelu_new' else act,
    **read_ropes(r, family),
    **read_layers(r, name, layers),
    **read_experts(r, name),
    **family.traits,
  }
  if name.startswith('gemma'):
    settings |= {key: float(r.get(key, 0.0)) for key in ('attn_logit_softcapping', 'final_logit_softcapping')}
    settings['query_pre_attn_scalar'] = float(r.get('query_pre_attn_scalar', 256))
  if name == 'deepseek_v3':
    settings |= read_latent(r)
  return make_arch(str(file), settings)


def family_of(arch: Arch) -> str:
  """The model_type of an architecture: its own, or the first family that has all of it. Raises ConfigError where none has."""
  if arch.model_type:
    return arch.model_type
  a = arch
  if a.kv_lora_rank:
    return 'deepseek_v3'
  if a.num_experts:
    return 'qwen3_moe' if a.qk_norm else 'mixtral'
  if a.post_norms:
    return 'gemma3_text' if a.qk_norm else 'gemma2'
  if a.qkv_bias and a.qk_norm:
    raise ConfigError('an architecture with both qkv_bias and qk_norm has no model_type in transformers')
  if a.qkv_bias or a.qk_norm:
    return 'qwen2' if a.qkv_bias else 'qwen3'
  if a.no_rope_layers:
    return 'smollm3'
  if a.partial_rotary_factor < 1 or a.rope_scaling.rope_type == 'longrope':
    return 'phi3'
  return 'mistral' if a.sliding_window else 'llama'


def rope_config(arch: Arch) -> dict[str, Any]:
  s = arch.rope_scaling
  own: dict[str, Any] = {key: getattr(s, key) for key in ROPE_KEYS[s.rope_type] if bool(getattr(s, key)) != (key == 'truncate')}
  if s.rope_type != 'default':
    own['factor'] = s.factor
  if s.rope_type not in ('default', 'linear', 'dynamic'):
    own['original_max_position_embeddings'] = s.original_max_position_embeddings
  if arch.partial_rotary_factor != 1:
    own['partial_rotary_factor'] = arch.partial_rotary_factor
  given = {
    'rope_type': s.rope_type,
    'rope_theta': arch.rope_theta,
    **{k: list(v) if isinstance(v, tuple) else v for k, v in own.items()},
  }
  if family_of(arch) != 'gemma3_text':
    return given
  return {FULL: given, SLIDING: {'rope_type': 'default', 'rope_theta': arch.local_rope_theta}}


def old_rope_config(arch: Arch, name: str) -> dict[str, Any]:
  """What rope_parameters says, where transformers 4 and other readers look for it."""
  found: dict[str, Any] = {'rope_theta': arch.rope_theta}
  if name == 'gemma3_text':
    found['rope_local_base_freq'] = arch.local_rope_theta
  if arch.rope_scaling.rope_type != 'default':
    every = rope_config(arch)
    given = {key: value for key, value in every.get(FULL, every).items() if key not in ('rope_theta', 'partial_rotary_factor')}
    s = arch.rope_scaling
    follows = s.factor * s.original_max_position_embeddings == arch.max_position_embeddings and not s.attention_factor
    if name == 'phi3' and follows:  # transformers 4 takes exactly these three keys, and the rest from the lengths
      given = {key: given[key] for key in ('short_factor', 'long_factor')} | {'type': 'longrope'}
    found['rope_scaling'] = given
  return found


def layer_config(a: Arch, family: str) -> dict[str, Any]:
  types = list(a.layer_types or (FULL,) * a.num_hidden_layers)
  found: dict[str, Any] = {'sliding_window': a.sliding_window or None}
  if family in ('qwen2', 'qwen3', 'smollm3', 'gemma2', 'gemma3_text'):
    found['layer_types'] = types
  if family in ('qwen2', 'qwen3', 'qwen3_moe', 'smollm3'):
    found['use_sliding_window'] = bool(a.sliding_window)
  if family in ('qwen2', 'qwen3'):
    found['max_window_layers'] = types.index(SLIDING) if a.sliding_window else a.num_hidden_layers
  if family == 'smollm3':
    found['no_rope_layers'] = [int(i not in a.no_rope_layers) for i in range(a.num_hidden_layers)]
  return found


def expert_config(a: Arch, family: str) -> dict[str, Any]:
  fields = {
    'mixtral': ('num_experts_per_tok',),
    'qwen3_moe': ('num_experts', 'num_experts_per_tok', 'moe_intermediate_size', 'norm_topk_prob'),
    'deepseek_v3': (
      'num_experts_per_tok', 'moe_intermediate_size', 'norm_topk_prob', 'n_shared_experts', 'first_k_dense_replace', 'n_group',
      'topk_group', 'routed_scaling_factor', 'kv_lora_rank', 'qk_rope_head_dim', 'v_head_dim', 'rope_interleave',
    ),
  }.get(family, ())  # fmt: skip
  found = {name: getattr(a, name) for name in fields}
  if family == 'mixtral':
    found['num_local_experts'] = a.num_experts
  if family == 'deepseek_v3':
    found |= {
      'n_routed_experts': a.num_experts, 'q_lora_rank': a.q_lora_rank or None, 'qk_nope_head_dim': a.head_dim - a.qk_rope_head_dim,
      'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc', 'num_nextn_predict_layers': 0,
    }  # fmt: skip
  return found


def hf_config(arch: Arch, head: str) -> dict[str, Any]:
  """config.json of an architecture with the head 'lm' or 'scalar'. Raises ConfigError for one that no family has all of."""
  name = family_of(arch)
  family, fields = FAMILIES[name], ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
                                    'num_key_value_heads', 'rms_norm_eps', 'tie_word_embeddings')  # fmt: skip
  original = arch.rope_scaling.original_max_position_embeddings
  config = {
    'architectures': [('Gemma3Text' if name == 'gemma3_text' and head == 'scalar' else family.classes) + ENDINGS[head]],
    'model_type': name,
    'dtype': 'float32',
    family.act: arch.hidden_act,
    **{key: getattr(arch, key) for key in fields},
    'head_dim': arch.qk_rope_head_dim if arch.kv_lora_rank else arch.head_dim,
    **({'max_position_embeddings': arch.max_position_embeddings} if arch.max_position_embeddings else {}),
    **({'original_max_position_embeddings': original} if name == 'phi3' and original else {}),
    **({'partial_rotary_factor': arch.partial_rotary_factor} if arch.partial_rotary_factor != 1 else {}),
    **old_rope_config(arch, name),
    'rope_parameters': rope_config(arch),
    **layer_config(arch, name),
    **expert_config(arch, name),
    # The tokenizer and generation_config.json know; a class's defaults would be wrong, or beyond the vocabulary.
    **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')),
  }
  if name.startswith('gemma'):
    scalar = arch.query_pre_attn_scalar or arch.head_dim
    config |= {
      'attn_logit_softcapping': arch.attn_logit_softcapping or None, 'final_logit_softcapping': arch.final_logit_softcapping or None,
      'query_pre_attn_scalar': int(scalar) if scalar == int(scalar) else scalar,
    }  # fmt: skip
  return config


def check_exports(arch: Arch, config: Config) -> None:
  """Raises ConfigError where config.json does not hold all of an architecture."""
  from_it = dataclasses.asdict(read_config(config, pathlib.Path('config.json')))
  own = dataclasses.asdict(arch) | {'model_type': from_it['model_type']}
  own['rope_scaling'] |= {'length': 0}
  own['max_position_embeddings'] = own['max_position_embeddings'] or from_it['max_position_embeddings']
  lost = [f'{key} {own[key]!r}' for key in own if own[key] != from_it[key] and (own[key] or from_it[key])]
  check(not lost, f'transformers has no model of type {config["model_type"]} with {", ".join(lost)}')


def ignored(arch: Arch) -> str:
  """A regular expression of the tensors that a folder may hold beside the weights: buffers; DeepSeek's layers behind the last, which
  predict further tokens; of Gemma 3 what sees pictures."""
  names = [r'.*rotary_emb\.inv_freq']
  if family_of(arch) == 'deepseek_v3':
    names.append(rf'model\.layers\.{arch.num_hidden_layers}\..*')
  if family_of(arch) == 'gemma3_text':
    names.append(r'(model\.)?(vision_tower|multi_modal_projector)\..*')
  return '|'.join(names)


def rename(family: str) -> tuple[Callable[[str], str], Callable[[str], str]]:
  """(the family's name of a tensor -> ours, ours -> the family's)."""
  pairs = FAMILIES[family].renamed

  def ours(name: str) -> str:
    if '.block_sparse_moe.' in name:
      for own, theirs in pairs:
        name = name.replace(theirs, own)
    return re.sub(r'^(language_model\.model\.|model\.language_model\.)', 'model.', name)

  def theirs(name: str) -> str:
    if pairs and '.mlp.' in name:
      for own, their in pairs:
        name = name.replace(own, their)
    return name

  return ours, theirs
