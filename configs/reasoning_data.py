"""Reasoning data for a cold start or distillation: a published set, converted, or a teacher's answers, bought. Without near duplicates, and
without the test questions of GSM8K where `gsm8k` names a folder that holds them.

Commands: DATAGEN='python -m rl_reasoning.datagen --config=configs/reasoning_data.py'
          $DATAGEN:path=CoT_demo.json,licence=Apache-2.0 --workdir=runs/marco
          $DATAGEN:path=open-r1/OpenR1-Math-220k,licence=Apache-2.0 --workdir=runs/openr1
          $DATAGEN:source=api,path=PROBLEMS.jsonl,url=https://api.deepseek.com/v1,model=deepseek-reasoner,key_env=DEEPSEEK_API_KEY,\\
          price_in=0.55,price_out=2.19,max_cost=5.0 --workdir=runs/teacher      # with the prices of the day
Hardware: 2 CPU cores. Duration: 5 s of processor time for the first command.
Measured, with gsm8k=: 123 of the 125 rows of Marco-o1's sample (two have no end of their output); none shares 13 words with a question of
GSM8K's test split, none is a near duplicate. The other commands need the hub or a key: what they do is tested on rows of the published
columns, and against a server of the tests' own.
"""


def get_config(
  source: str = 'published', path: str = '', layout: str = '', gsm8k: str = '', licence: str = '', size: int = 0, num_samples: int = 4,
  url: str = '', model: str = '', key_env: str = '', price_in: float = 0.0, price_out: float = 0.0, max_cost: float = 0.0,
  max_tokens: int = 16384, seed: int = 0,
) -> dict:  # fmt: skip
  assert source in ('published', 'api'), source
  made = {'source': source, 'keep': 'reasoning', 'size': size, 'licence': licence, 'near_duplicates': 0.8}
  if gsm8k:
    made['decontaminate'] = {'gsm8k': {'task': 'gsm8k', 'path': gsm8k}}
  if source == 'published':
    task = {'task': 'reasoning_sets', 'path': path, 'options': {'layout': layout, 'test_share': 0.0}}
    return {'seed': seed, 'data': task, 'generate': made}
  teacher = {
    'url': url, 'model': model, 'key_env': key_env, 'max_cost': max_cost,
    'prices': {model: {'input': price_in, 'output': price_out}},
    'options': {'max_tokens': max_tokens},
    'template': '{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}.',  # as DeepSeek advises for R1
  }  # fmt: skip
  task = {'task': 'dataset', 'path': path, 'options': {'test_share': 0.0}}
  return {'seed': seed, 'data': task, 'generate': {**made, 'num_samples': num_samples, 'api': teacher}}
