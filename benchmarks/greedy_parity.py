"""Greedy continuations of ours against transformers' on the same weights, token for token.

  python -m benchmarks.greedy_parity ours RUN_OR_FOLDER_OR_GGUF --out=ours.json
  python -m benchmarks.greedy_parity theirs FOLDER [--adapter=FOLDER] --out=theirs.json      (where PyTorch, transformers and peft are)
  python -m benchmarks.greedy_parity compare ours.json theirs.json

20 prompts, 64 tokens each, float32. FOLDER is ours, by `python -m rl_reasoning.weights convert`; with --adapter, peft puts ours on it.
Where the two part, the gap between the two best logits of theirs is told: below 1e-4 it is a tie.
"""

import argparse
import json
import pathlib

PROMPTS = (
  'The capital of France is', 'Once upon a time', 'def fibonacci(n):', 'Water boils at', 'The quick brown fox', '2 + 2 =',
  'In 1969, people', 'To make bread, you need', 'The opposite of hot is', 'My favourite season is', 'A prime number is',
  'The sun rises in the', 'import numpy as np\n', 'Roses are red,', 'The largest planet is', 'He opened the door and',
  'Dear Sir or Madam,', 'The meaning of life', 'SELECT name FROM', 'Question: what is 7 times 8?\nAnswer:',
)  # fmt: skip
TOKENS = 64


def ours(path: str) -> list:
  import jax

  from rl_reasoning import config, resolution, rollout, sharding, stored, tokenizer

  tok, arch = tokenizer.load(resolution.resolve_tokenizer(config.Role(path))), stored.read_arch(path)
  params = stored.load_params(path, arch, jax.random.key(0), sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  ids = [tok.encode(prompt) for prompt in PROMPTS]
  arch = arch.for_length(max(map(len, ids)) + TOKENS)
  settings = config.Rollout(max_completion_length=TOKENS, temperature=0.0)
  rolled = rollout.generate(params, arch, ids, settings=settings, group=1, end_ids=tok.end_ids, key=jax.random.key(0))
  return [[prompt, tokens[:length].tolist()] for prompt, tokens, length in zip(ids, rolled.tokens_NC, rolled.length_N)]


def theirs(path: str, adapter: str | None) -> list:
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
  if adapter:
    import peft

    model = peft.PeftModel.from_pretrained(model, adapter)
  model.eval()
  tok = transformers.AutoTokenizer.from_pretrained(path)
  found = []
  for prompt in PROMPTS:
    ids = tok(prompt, return_tensors='pt', add_special_tokens=False)
    with torch.no_grad():
      out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    best = [torch.topk(logits[0].float(), 2).values for logits in out.logits]
    start = ids['input_ids'].shape[1]
    found.append([out.sequences[0, :start].tolist(), out.sequences[0, start:].tolist(), [float(b[0] - b[1]) for b in best]])
  return found


def compare(a: list, b: list) -> dict:
  same, parted, tokens = 0, [], 0
  for n, ((prompt, mine), (their_prompt, their, gaps)) in enumerate(zip(a, b, strict=True)):
    assert prompt == their_prompt, 'the two tokenizers disagree'
    at = next((i for i, (x, y) in enumerate(zip(mine, their)) if x != y), None)
    same, tokens = same + (at is None and len(mine) == len(their)), tokens + (len(mine) if at is None else at)
    if at is not None:
      parted.append({'prompt': PROMPTS[n], 'token': at, 'gap': gaps[at]})
  return {'prompts': len(a), 'equal': same, 'tokens_equal': tokens, 'parted': parted}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('what', choices=('ours', 'theirs', 'compare'))
  parser.add_argument('paths', nargs='+')
  parser.add_argument('--out')
  parser.add_argument('--adapter')
  flags = parser.parse_args()
  if flags.what == 'compare':
    print(json.dumps(compare(*(json.loads(pathlib.Path(path).read_text()) for path in flags.paths))))
  else:
    found = ours(flags.paths[0]) if flags.what == 'ours' else theirs(flags.paths[0], flags.adapter)
    pathlib.Path(flags.out).write_text(json.dumps(found))


if __name__ == '__main__':
  main()
