"""The command line of weights: what it tells, and what it writes."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from rl_reasoning import config, resolution, stored, weights
from rl_reasoning.config import exit_code
from rl_reasoning.weights.__main__ import command
from tests.test_e2e import run, settings
from tests.test_tokenizer import make_folder


def told(capsys, *argv) -> str:
  assert exit_code(command, argv) == 0
  return capsys.readouterr().out


def refused(capsys, *argv) -> str:
  assert exit_code(command, argv) == 2
  text = capsys.readouterr().err
  assert text.startswith('error: ') and text.count('\n') == 1
  return text


def test_inspect(capsys):
  """Failure: a number that people plan memory by is wrong, or a folder with a missing tensor passes."""
  text = told(capsys, 'inspect', 'tests/fixtures/deepseek_v3')
  arch = weights.read_arch('tests/fixtures/deepseek_v3')
  tensors = load_file('tests/fixtures/deepseek_v3/model.safetensors')
  total = sum(x.size for x in tensors.values())
  per_expert = 3 * arch.hidden_size * arch.moe_intermediate_size
  idle = len(arch.stacks['layers']) * (arch.num_experts - arch.num_experts_per_tok) * per_expert
  assert f'parameters: {total:,}, of which a token meets {total - idle:,}' in text
  assert f'stored: {len(tensors)} tensors of F32, {total:,} numbers' in text and 'every tensor is accounted for' in text
  numbers = arch.num_hidden_layers * (arch.kv_lora_rank + arch.qk_rope_head_dim)
  assert f'cache: {2 * numbers / 1024:.1f} KiB a token' in text or f'cache: {2 * numbers:.1f} B a token' in text
  assert 'kv_lora_rank' in text and 'a Hugging Face folder, head for text' in text
  assert 'head for a score' in told(capsys, 'inspect', 'tests/fixtures/classifier')


def test_convert(capsys, tmp_path):
  """Failure: numbers change on the way, beyond what the dtype rounds."""
  assert 'no tokenizer' in told(capsys, 'convert', 'tests/fixtures/qwen2', str(tmp_path / 'same'))
  a, b = (load_file(f'{folder}/model.safetensors') for folder in ('tests/fixtures/qwen2', tmp_path / 'same'))
  assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
  told(capsys, 'convert', str(tmp_path / 'same'), str(tmp_path / 'half'), '--dtype=bfloat16')
  half = load_file(tmp_path / 'half' / 'model.safetensors')
  assert all(str(x.dtype) == 'bfloat16' and (x == a[name].astype(x.dtype)).all() for name, x in half.items())
  assert json.loads((tmp_path / 'half' / 'config.json').read_text())['dtype'] == 'bfloat16'
  told(capsys, 'convert', str(tmp_path / 'half'), str(tmp_path / 'again'), '--dtype=bfloat16')
  again = load_file(tmp_path / 'again' / 'model.safetensors')
  assert all((again[name] == x).all() for name, x in half.items())


def test_a_run(capsys, tmp_path):
  """Failure: a run of ours is not told from a folder, or its adapters are not."""
  cache = str(tmp_path / 'cache')
  run(settings('sft', cache, total_steps=1), tmp_path / 'base')
  adapted = settings('sft', cache, total_steps=1, roles__policy__init=str(tmp_path / 'base'), lora__rank=2)
  adapted.pop('model')
  run(adapted, tmp_path / 'lora')
  assert 'a run of ours, head for text' in told(capsys, 'inspect', str(tmp_path / 'base'))
  text = told(capsys, 'inspect', str(tmp_path / 'lora'))
  assert 'adapters: rank 2, alpha 32, ' in text and str(tmp_path / 'base') in text
  told(capsys, 'convert', str(tmp_path / 'lora'), str(tmp_path / 'adapter'), '--adapter')
  assert (tmp_path / 'adapter' / 'adapter_model.safetensors').is_file()
  told(capsys, 'convert', str(tmp_path / 'base'), str(tmp_path / 'out'))
  arch = stored.read_arch(str(tmp_path / 'base'))
  params = weights.load(str(tmp_path / 'out'), arch)
  trained = stored.restore_policy(str(tmp_path / 'base'), arch, resolution.make_mesh(config.resolve({})))
  np.testing.assert_array_equal(params['embed'], trained['embed'])


@pytest.mark.parametrize('argv, wanted', [
  (('inspect', '/no/such'), '/no/such: does not exist'),
  (('convert', 'tests/fixtures/qwen2', 'tests/fixtures/llama'), 'tests/fixtures/llama: exists already'),
  (('convert', 'tests/fixtures/qwen2', '/tmp/x', '--adapter'), '--adapter: tests/fixtures/qwen2 is no run of ours'),
  (('convert', 'tests/fixtures/qwen2', '/tmp/x', '--dtype=int8'), 'invalid choice'),
])  # fmt: skip
def test_refusals(argv, wanted, capsys):
  """Failure: a mistake ends in a traceback, or in a folder that is half written."""
  assert wanted in refused(capsys, *argv)


def test_damaged_folders(capsys, tmp_path):
  """Failure: a truncated shard, a file that the index names and that is not there, or a tokenizer with too many ids passes, or is a
  traceback."""
  folder = tmp_path / 'llama'
  shutil.copytree('tests/fixtures/llama', folder)
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    (folder / file).unlink(missing_ok=True)
  content = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(content[:-10])
  for words in (('inspect', str(folder)), ('convert', str(folder), str(tmp_path / 'out'))):
    assert 'model.safetensors: truncated or no safetensors file' in refused(capsys, *words)
  (folder / 'model.safetensors').write_bytes(content)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': 'other.safetensors'}}))
  for words in (('inspect', str(folder)), ('convert', str(folder), str(tmp_path / 'out'))):
    assert 'other.safetensors: no such file, but model.safetensors.index.json names it' in refused(capsys, *words)
  (folder / 'model.safetensors.index.json').unlink()
  tokens = make_folder(tmp_path / 'tokens')
  assert 'has 261 ids' in refused(capsys, 'convert', str(folder), str(tmp_path / 'out'), f'--tokenizer={tokens}')
  for file in ('tokenizer.json', 'tokenizer_config.json'):
    shutil.copy(tmp_path / 'tokens' / file, folder)
  assert '261 ids, MORE than the 64 embeddings' in told(capsys, 'inspect', str(folder))
  assert not (tmp_path / 'out').exists()
