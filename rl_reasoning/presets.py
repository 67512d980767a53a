"""Published architectures, and the small ones that tests and the demo train. Numbers are the checkpoints' own config.json."""

from rl_reasoning.model import Arch

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
}
