"""Tiny random models of every family with the logits that transformers' own PyTorch code gives them: tests/fixtures.

The tests only read the files, so they need no PyTorch. To make them again, in an environment of its own:

  python -m venv fixtures-venv && fixtures-venv/bin/pip install torch==2.14.1 transformers==5.23.0 numpy
  fixtures-venv/bin/python tests/make_fixtures.py [NAME ...]
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

COMMON = dict(
  vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
  max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def rope(theta, kind='default', **more):
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': theta, **more}}


LLAMA = dict(**COMMON, rms_norm_eps=1e-5, tie_word_embeddings=False)
GEMMA = dict(
  **{**COMMON, 'num_hidden_layers': 3},
  rms_norm_eps=1e-6,
  head_dim=8,
  sliding_window=5,
  query_pre_attn_scalar=11,
  tie_word_embeddings=True,
)
SHORT, FULL = {'original_max_position_embeddings': 16}, 'full_attention'  # sequences of 24 tokens go beyond it
MODELS = {
  'llama': transformers.LlamaConfig(**COMMON, **rope(500.0), rms_norm_eps=1e-5, tie_word_embeddings=False),
  'qwen2': transformers.Qwen2Config(**COMMON, **rope(300.0), rms_norm_eps=1e-6, tie_word_embeddings=True),
  'qwen3': transformers.Qwen3Config(**COMMON, **rope(700.0), rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=16),
  'llama_linear': transformers.LlamaConfig(**LLAMA, **rope(500.0, 'linear', factor=3.0)),
  'llama_dynamic': transformers.LlamaConfig(**{**LLAMA, 'max_position_embeddings': 16}, **rope(500.0, 'dynamic', factor=3.0)),
  'llama_yarn': transformers.LlamaConfig(**LLAMA, **rope(20.0, 'yarn', factor=4.0, beta_fast=1.0, beta_slow=0.2, **SHORT)),
  'llama3': transformers.LlamaConfig(
    **LLAMA, **rope(500.0, 'llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **SHORT)
  ),
  'mistral': transformers.MistralConfig(**COMMON, **rope(500.0), rms_norm_eps=1e-5, sliding_window=5),
  'smollm3': transformers.SmolLM3Config(
    **{**COMMON, 'num_hidden_layers': 3},
    **rope(500.0),
    rms_norm_eps=1e-6,
    no_rope_layers=[1, 0, 1],
    use_sliding_window=True,
    sliding_window=5,
    tie_word_embeddings=True,
  ),
  'qwen2_window': transformers.Qwen2Config(
    **{**COMMON, 'num_hidden_layers': 3},
    **rope(300.0),
    rms_norm_eps=1e-6,
    use_sliding_window=True,
    sliding_window=6,
    max_window_layers=1,
  ),
  'gemma2': transformers.Gemma2Config(**GEMMA, **rope(500.0), attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
  'gemma3': transformers.Gemma3TextConfig(
    **GEMMA,
    layer_types=['sliding_attention', 'sliding_attention', FULL],
    rope_parameters={
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 60.0},
      FULL: {'rope_type': 'linear', 'rope_theta': 900.0, 'factor': 2.0},
    },
  ),
  'phi3': transformers.Phi3Config(
    **COMMON,
    original_max_position_embeddings=16,
    rms_norm_eps=1e-5,
    sliding_window=9,
    **rope(500.0, 'longrope', short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.5, 2.0, 3.0, 5.0], **SHORT),
  ),
  'phi3_partial': transformers.Phi3Config(
    **{**COMMON, 'hidden_size': 64, 'max_position_embeddings': 24},
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    **rope(500.0, partial_rotary_factor=0.75),
  ),
  'mixtral': transformers.MixtralConfig(
    **COMMON, **rope(500.0), rms_norm_eps=1e-5, num_local_experts=6, num_experts_per_tok=2, sliding_window=None
  ),
  'qwen3_moe': transformers.Qwen3MoeConfig(
    **COMMON,
    **rope(700.0),
    rms_norm_eps=1e-6,
    head_dim=8,
    num_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    norm_topk_prob=True,
  ),
  'deepseek_v3': transformers.DeepseekV3Config(
    **{**COMMON, 'num_hidden_layers': 3, 'num_key_value_heads': 4},
    rms_norm_eps=1e-2,  # the norms of latents have another one of their own
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    n_shared_experts=2,
    moe_intermediate_size=12,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
    norm_topk_prob=True,
    **rope(500.0, 'yarn', factor=4.0, beta_fast=4.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.7, **SHORT),
  ),
}
LONGER = 24  # tokens of all but the first three
PAD = 0
CLASSIFIER = transformers.LlamaConfig(
  **{**COMMON, **dict(vocab_size=32, hidden_size=16, intermediate_size=24, pad_token_id=PAD)}, **rope(500.0), rms_norm_eps=1e-5,
  tie_word_embeddings=False, num_labels=1, problem_type='regression',
)  # fmt: skip


def randomise(model):
  with torch.no_grad():
    for key, p in model.named_parameters():  # biases and norms of their own, and attention far from uniform
      centre = 1.0 if 'norm' in key and 'gemma' not in model.config.model_type else 0.0
      p.copy_(centre + 0.3 * torch.randn_like(p))
    for key, p in model.named_buffers():
      if key.endswith('e_score_correction_bias'):
        p.copy_(0.2 * torch.randn_like(p))


def build(kind, config):
  torch.manual_seed(0)
  eager = {'attn_implementation': 'eager', 'experts_implementation': 'eager'}
  model = kind.from_config(config, dtype=torch.float32, **eager).eval()
  randomise(model)
  return model


def make(name, config, folder):
  model = build(transformers.AutoModelForCausalLM, config)
  tokens = torch.randint(config.vocab_size, (2, 12 if name in ('llama', 'qwen2', 'qwen3') else LONGER))
  with torch.no_grad():
    logits = model(tokens).logits
  write(model, folder, tokens, logits)


def make_classifier(config, folder):
  """One score a row, after its last token that is not padding."""
  model = build(transformers.AutoModelForSequenceClassification, config)
  tokens = torch.randint(1, config.vocab_size, (4, 12))
  for row, length in enumerate((12, 11, 5, 1)):
    tokens[row, length:] = PAD
  with torch.no_grad():
    logits = model(tokens, attention_mask=(tokens != PAD).long()).logits
  write(model, folder, tokens, logits)


def write(model, folder, tokens, logits):
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  np.savez(folder / 'golden.npz', tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
  print(folder.name, sum(p.numel() for p in model.parameters()), 'parameters, logits within', float(logits.abs().max()))


if __name__ == '__main__':
  fixtures = pathlib.Path(__file__).parent / 'fixtures'
  wanted = sys.argv[1:] or [*MODELS, 'classifier']
  for name in wanted:
    if name == 'classifier':
      make_classifier(CLASSIFIER, fixtures / name)
    else:
      make(name, MODELS[name], fixtures / name)
