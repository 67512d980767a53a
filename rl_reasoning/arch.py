"""The architecture record: everything that sets one decoder-only transformer apart from another. Field names follow Hugging Face's.

What a family is called plays no part in the forward function; `families.py` maps families to records and back.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

ROPE_TYPES = ('default', 'linear', 'dynamic', 'yarn', 'longrope', 'llama3')
ACTIVATIONS = ('silu', 'gelu_pytorch_tanh')
ATTENTION = ('xla', 'splash', 'splash_interpret', 'cudnn')
FULL, SLIDING = 'full_attention', 'sliding_attention'
OF_EXPERTS = (
  'num_experts_per_tok', 'moe_intermediate_size', 'n_shared_experts', 'first_k_dense_replace', 'norm_topk_prob', 'scoring_func', 'n_group',
  'topk_group', 'routed_scaling_factor',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How the rotary frequencies are stretched beyond the lengths of pretraining. A type reads the fields that name it; 0 means none."""

  rope_type: str = 'default'  # default | linear | dynamic | yarn | longrope | llama3
  factor: float = 1.0
  original_max_position_embeddings: int = 0  # tokens of the sequences of pretraining (all but default and linear)
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  truncate: bool = True  # yarn: the ramp begins and ends at whole dimensions
  mscale: float = 0.0  # yarn, DeepSeek
  mscale_all_dim: float = 0.0  # yarn, DeepSeek
  attention_factor: float = 0.0  # yarn and longrope: what sin and cos are multiplied by; 0: the type's own rule
  short_factor: tuple[float, ...] = ()  # longrope, one a frequency: up to the original length
  long_factor: tuple[float, ...] = ()  # longrope: beyond it
  # dynamic and longrope: tokens of the longest sequence of the run. One rule for all of its tokens: a sampler that changed the rotation as
  # a completion grows would not be the policy that the trainer scores.
  length: int = 0

  def __post_init__(self):
    if self.rope_type not in ROPE_TYPES:
      raise ValueError(f'model.rope_scaling.rope_type: {self.rope_type!r} is none of {", ".join(ROPE_TYPES)}')
    if self.rope_type not in ('default', 'linear') and self.original_max_position_embeddings < 1:
      raise ValueError(f'model.rope_scaling.original_max_position_embeddings is missing: rope_type {self.rope_type!r} reads it')
    if not self.factor > 0:
      raise ValueError(f'model.rope_scaling.factor: {self.factor} must be positive')
    if self.rope_type == 'llama3' and not self.high_freq_factor > self.low_freq_factor:
      raise ValueError('model.rope_scaling: high_freq_factor must be above low_freq_factor')


class Kind(NamedTuple):
  """What sets a layer apart from others of its shapes."""

  window: int  # tokens that it attends to, its own included; 0: all
  rope: str  # global | local | none


@dataclasses.dataclass(frozen=True)
class Arch:
  """Architecture record. The defaults of the optional fields are those of Llama 2."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int  # of queries and keys
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-5
  tie_word_embeddings: bool = True
  qkv_bias: bool = False  # Qwen2
  qk_norm: bool = False  # Qwen3, Gemma 3
  # What only an export reads: Hugging Face's name of the family ('': the first that fits), and the tokens it takes (0: not known).
  model_type: str = dataclasses.field(default='', compare=False)
  max_position_embeddings: int = dataclasses.field(default=0, compare=False)
  # Which code computes attention, one of ATTENTION. No part of the weights: a run sets it by the config key model.attention and the devices
  # of its mesh (see resolution.with_attention), and it lies here because whoever runs a network has the architecture at hand.
  attn_implementation: str = 'xla'
  rope_scaling: RopeScaling = RopeScaling()
  partial_rotary_factor: float = 1.0  # Phi-4 mini: only the first part of a head turns
  local_rope_theta: float = 0.0  # Gemma 3: that of the layers with a window, without scaling; 0: as the others
  sliding_window: int = 0  # tokens, one's own included
  layer_types: tuple[str, ...] = ()  # full_attention | sliding_attention, one a layer; (): all full
  no_rope_layers: tuple[int, ...] = ()  # SmolLM3: layers that turn nothing
  hidden_act: str = 'silu'  # silu | gelu_pytorch_tanh
  norm_offset: bool = False  # Gemma: a norm multiplies by 1 + its weight
  post_norms: bool = False  # Gemma 2: what a sublayer adds is normed, too
  scale_embeddings: bool = False  # Gemma: by the square root of hidden_size
  query_pre_attn_scalar: float = 0.0  # Gemma: scores are divided by its square root; 0: head_dim
  attn_logit_softcapping: float = 0.0  # Gemma 2
  final_logit_softcapping: float = 0.0
  # Multi-head latent attention (DeepSeek-V2, 2405.04434): head_dim is qk_nope_head_dim + qk_rope_head_dim.
  kv_lora_rank: int = 0  # 0: none
  q_lora_rank: int = 0  # 0: queries are projected at once
  qk_rope_head_dim: int = 0
  v_head_dim: int = 0
  rope_interleave: bool = False  # pairs that turn lie side by side
  # Mixture of experts
  num_experts: int = 0  # routed ones; 0: none
  num_experts_per_tok: int = 0
  moe_intermediate_size: int = 0
  n_shared_experts: int = 0  # run for every token, as one of n times the size
  first_k_dense_replace: int = 0  # so many layers in front have no experts
  norm_topk_prob: bool = True  # the weights of the experts chosen add up to 1
  scoring_func: str = 'softmax'  # softmax | sigmoid (DeepSeek-V3, with a bias that decides the choice and not the weight)
  n_group: int = 1  # experts are chosen from topk_group of so many groups
  topk_group: int = 1
  routed_scaling_factor: float = 1.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, required = getattr(self, field.name), field.default is dataclasses.MISSING
      must = required or field.name in ('rope_theta', 'rms_norm_eps', 'routed_scaling_factor', 'n_group', 'topk_group')
      if field.type in ('int', 'float') and not (value > 0 if must else value >= 0):
        raise ValueError(f'model.{field.name}: {value} must {"be positive" if must else "not be negative"}')
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f'model.num_attention_heads: {self.num_attention_heads} is not a multiple of '
        f'num_key_value_heads {self.num_key_value_heads}'
      )
    if not 0 < self.partial_rotary_factor <= 1:
      raise ValueError(f'model.partial_rotary_factor: {self.partial_rotary_factor} is not in (0, 1]')
    if self.rotary_dim % 2:
      raise ValueError(f'model.head_dim: {self.rotary_dim} must be even, rotary embedding turns pairs')
    if self.hidden_act not in ACTIVATIONS:
      raise ValueError(f'model.hidden_act: {self.hidden_act!r} is none of {", ".join(ACTIVATIONS)}')
    for name in ('short_factor', 'long_factor') if self.rope_scaling.rope_type == 'longrope' else ():
      count = len(getattr(self.rope_scaling, name))
      if count != self.rotary_dim // 2:
        raise ValueError(f'model.rope_scaling.{name}: {count} numbers for {self.rotary_dim // 2} frequencies')
    self._check_layers()
    if self.kv_lora_rank:
      self._check_latent()
    if self.num_experts:
      self._check_experts()
    elif set_in_vain := [f.name for f in dataclasses.fields(self) if f.name in OF_EXPERTS and getattr(self, f.name) != f.default]:
      raise ValueError(f'model.num_experts is 0, so {", ".join(set_in_vain)} cannot act')

  def _check_layers(self):
    if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
      raise ValueError(f'model.layer_types: {len(self.layer_types)} for {self.num_hidden_layers} layers')
    for kind in self.layer_types:
      if kind not in (FULL, SLIDING):
        raise ValueError(f'model.layer_types: {kind!r} is neither {FULL} nor {SLIDING}')
    if (SLIDING in self.layer_types) != bool(self.sliding_window):
      has = 'lacks' if self.sliding_window else 'has'
      raise ValueError(f'model.sliding_window: {self.sliding_window}, and layer_types {has} {SLIDING}')
    if self.local_rope_theta and not self.sliding_window:
      raise ValueError('model.local_rope_theta cannot act: no layer has a window')
    if any(not 0 <= layer < self.num_hidden_layers for layer in self.no_rope_layers):
      raise ValueError(f'model.no_rope_layers: {self.no_rope_layers} are not all below {self.num_hidden_layers}')

  def _check_latent(self):
    if not (0 < self.qk_rope_head_dim < self.head_dim and self.v_head_dim):
      raise ValueError(
        'model.kv_lora_rank: qk_rope_head_dim and v_head_dim are missing, or head_dim is not the sum of both parts'
      )
    if self.num_key_value_heads != self.num_attention_heads:
      raise ValueError('model.num_key_value_heads: latent attention has as many as num_attention_heads')
    if self.qkv_bias or self.qk_norm or self.sliding_window or self.attn_logit_softcapping:
      raise ValueError('model.kv_lora_rank: latent attention has no biases, norms of heads, windows or soft caps')

  def _check_experts(self):
    if not 0 < self.num_experts_per_tok <= self.num_experts or not self.moe_intermediate_size:
      raise ValueError('model.num_experts: num_experts_per_tok (at most all of them) and moe_intermediate_size are missing')
    if self.scoring_func not in ('softmax', 'sigmoid'):
      raise ValueError(f'model.scoring_func: {self.scoring_func!r} is neither softmax nor sigmoid')
    if not self.first_k_dense_replace < self.num_hidden_layers:
      raise ValueError(f'model.first_k_dense_replace: {self.first_k_dense_replace} leaves no layer with experts')
    if self.num_experts % self.n_group or self.topk_group > self.n_group:
      raise ValueError(
        f'model.n_group: {self.num_experts} experts in {self.n_group} groups, of which {self.topk_group} are chosen'
      )
    if self.num_experts == self.n_group > 1:
      raise ValueError(f'model.n_group: {self.n_group} groups of one expert; a group is judged by its best two')
    if self.n_group > 1 and self.topk_group * (self.num_experts // self.n_group) < self.num_experts_per_tok:
      raise ValueError(f'model.topk_group: {self.topk_group} groups have fewer than {self.num_experts_per_tok} experts')

  def for_length(self, tokens: int) -> Arch:
    """The same for sequences of at most so many tokens."""
    if self.rope_scaling.rope_type not in ('dynamic', 'longrope'):
      return self
    return dataclasses.replace(self, rope_scaling=dataclasses.replace(self.rope_scaling, length=tokens))

  @property
  def rotary_dim(self) -> int:
    """Dimensions of a head that turn."""
    return self.qk_rope_head_dim if self.kv_lora_rank else int(self.head_dim * self.partial_rotary_factor)

  @property
  def kinds(self) -> tuple[Kind, ...]:
    """One a layer."""

    def kind(layer: int) -> Kind:
      sliding = bool(self.layer_types) and self.layer_types[layer] == SLIDING
      rope = 'none' if layer in self.no_rope_layers else 'local' if sliding and self.local_rope_theta else 'global'
      return Kind(self.sliding_window if sliding else 0, rope)

    return tuple(kind(layer) for layer in range(self.num_hidden_layers))

  @property
  def stacks(self) -> dict[str, range]:
    """The stacks of layers of equal shapes, and which layers they are."""
    dense = self.first_k_dense_replace
    first = {'dense_layers': range(dense)} if dense else {}
    return {**first, 'layers': range(dense, self.num_hidden_layers)}
