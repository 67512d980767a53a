"""Published architectures, and the small ones that tests and the demo train. Numbers are the checkpoints' own config.json."""

from typing import Any

from rl_reasoning.arch import FULL, SLIDING, Arch, RopeScaling

GEMMA: dict[str, Any] = {'hidden_act': 'gelu_pytorch_tanh', 'norm_offset': True, 'post_norms': True, 'scale_embeddings': True}


def llama3_rope(factor: float) -> RopeScaling:
  return RopeScaling('llama3', factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


def alternating(layers: int, every: int) -> tuple[str, ...]:
  """Windows, but for each last of `every` layers."""
  return tuple(SLIDING if (i + 1) % every else FULL for i in range(layers))


PRESETS: dict[str, Arch] = {
  # Tests: every axis is divisible by 8 virtual devices or by a mixture of mesh axes over them.
  'tiny': Arch(264, 64, 128, 2, 4, 4, 16),
  # The demo's model.
  'nano': Arch(264, 96, 256, 3, 4, 4, 24),
  'smollm2-135m': Arch(49152, 576, 1536, 30, 9, 3, 64, rope_theta=100_000.0),
  'smollm2-360m': Arch(49152, 960, 2560, 32, 15, 5, 64, rope_theta=100_000.0),
  'qwen2.5-0.5b': Arch(151936, 896, 4864, 24, 14, 2, 64, rope_theta=1_000_000.0, rms_norm_eps=1e-6, qkv_bias=True),
  'qwen2.5-1.5b': Arch(151936, 1536, 8960, 28, 12, 2, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, qkv_bias=True),
  'qwen2.5-7b': Arch(
    152064, 3584, 18944, 28, 28, 4, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False, qkv_bias=True
  ),
  'qwen3-0.6b': Arch(151936, 1024, 3072, 28, 16, 8, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, qk_norm=True),
  'qwen3-1.7b': Arch(151936, 2048, 6144, 28, 16, 8, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, qk_norm=True),
  'qwen2.5-14b': Arch(
    152064, 5120, 13824, 48, 40, 8, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-5, tie_word_embeddings=False, qkv_bias=True
  ),
  'qwen2.5-32b': Arch(
    152064, 5120, 27648, 64, 40, 8, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-5, tie_word_embeddings=False, qkv_bias=True
  ),
  'qwen3-4b': Arch(151936, 2560, 9728, 36, 32, 8, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, qk_norm=True),
  'qwen3-8b': Arch(
    151936, 4096, 12288, 36, 32, 8, 128, rope_theta=1_000_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False, qk_norm=True
  ),
  'qwen3-30b-a3b': Arch(
    151936,
    2048,
    6144,
    48,
    32,
    4,
    128,
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    qk_norm=True,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
  ),
  'llama-3.2-1b': Arch(128256, 2048, 8192, 16, 32, 8, 64, rope_theta=500_000.0, rope_scaling=llama3_rope(32.0)),
  'llama-3.1-8b': Arch(
    128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500_000.0, tie_word_embeddings=False, rope_scaling=llama3_rope(8.0)
  ),
  'llama-3.1-70b': Arch(
    128256, 8192, 28672, 80, 64, 8, 128, rope_theta=500_000.0, tie_word_embeddings=False, rope_scaling=llama3_rope(8.0)
  ),
  'mistral-7b-v0.3': Arch(32768, 4096, 14336, 32, 32, 8, 128, rope_theta=1_000_000.0, tie_word_embeddings=False),
  'mixtral-8x7b': Arch(
    32000,
    4096,
    14336,
    32,
    32,
    8,
    128,
    rope_theta=1_000_000.0,
    tie_word_embeddings=False,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=14336,
  ),
  'smollm3-3b': Arch(
    128256, 2048, 11008, 36, 16, 4, 128, rope_theta=5_000_000.0, rms_norm_eps=1e-6, no_rope_layers=tuple(range(3, 36, 4))
  ),
  'gemma-2-2b': Arch(
    256000,
    2304,
    9216,
    26,
    8,
    4,
    256,
    rms_norm_eps=1e-6,
    sliding_window=4096,
    layer_types=alternating(26, 2),
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    query_pre_attn_scalar=256.0,
    **GEMMA,
  ),
  'gemma-3-1b': Arch(
    262144,
    1152,
    6912,
    26,
    4,
    1,
    256,
    rope_theta=1_000_000.0,
    local_rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    qk_norm=True,
    sliding_window=512,
    layer_types=alternating(26, 6),
    query_pre_attn_scalar=256.0,
    **GEMMA,
  ),
  'phi-3-mini-4k': Arch(
    32064,
    3072,
    8192,
    32,
    32,
    32,
    96,
    tie_word_embeddings=False,
    sliding_window=2047,
    layer_types=(SLIDING,) * 32,
    model_type='phi3',
  ),
  'deepseek-v3': Arch(  # and DeepSeek-R1
    129280,
    7168,
    18432,
    61,
    128,
    128,
    192,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_interleave=True,
    num_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    n_shared_experts=1,
    first_k_dense_replace=3,
    scoring_func='sigmoid',
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    rope_scaling=RopeScaling('yarn', 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
  ),
}
