"""Tiny random models of every family with the logits that transformers' own PyTorch code gives them: tests/fixtures.

The tests only read the files, so they need no PyTorch. To make them again, in an environment of its own:

  python -m venv fixtures-venv && fixtures-venv/bin/pip install torch==2.13.0 transformers==5.23.0 numpy
  fixtures-venv/bin/python tests/make_fixtures.py
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers

COMMON = dict(
  vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
  max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def rope(theta):
  return {'rope_parameters': {'rope_type': 'default', 'rope_theta': theta}}


MODELS = {
  'llama': transformers.LlamaConfig(**COMMON, **rope(500.0), rms_norm_eps=1e-5, tie_word_embeddings=False),
  'qwen2': transformers.Qwen2Config(**COMMON, **rope(300.0), rms_norm_eps=1e-6, tie_word_embeddings=True),
  'qwen3': transformers.Qwen3Config(**COMMON, **rope(700.0), rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=16),
}
PAD = 0
CLASSIFIER = transformers.LlamaConfig(
  **{**COMMON, **dict(vocab_size=32, hidden_size=16, intermediate_size=24, pad_token_id=PAD)}, **rope(500.0), rms_norm_eps=1e-5,
  tie_word_embeddings=False, num_labels=1, problem_type='regression',
)  # fmt: skip


def randomise(model):
  with torch.no_grad():
    for key, p in model.named_parameters():  # biases and norms of their own, and attention far from uniform
      spread, centre = (0.3, 1.0) if 'norm' in key else (0.3, 0.0)
      p.copy_(centre + spread * torch.randn_like(p))


def make(name, config, folder):
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation='eager').eval()
  randomise(model)
  tokens = torch.randint(config.vocab_size, (2, 12))
  with torch.no_grad():
    logits = model(tokens).logits
  write(model, folder, tokens, logits)


def make_classifier(config, folder):
  """One score a row, after its last token that is not padding."""
  torch.manual_seed(0)
  model = transformers.AutoModelForSequenceClassification.from_config(
    config, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  randomise(model)
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
  for name, config in MODELS.items():
    make(name, config, fixtures / name)
  make_classifier(CLASSIFIER, fixtures / 'classifier')
