"""An evaluation: greedy and eight samples a problem, of whatever checkpoint is given.

Command:  python -m rl_reasoning.evaluate --config=configs/eval.py --checkpoint=runs/tiny
Hardware: 2 CPU cores. Duration: half a minute, most of it compilation.
Measured on the 8 steps of configs/tiny.py:objective=sft, seed 0: greedy 0.000; 8 samples 0.006 [0.002, 0.011], pass@8 0.040 [0.015, 0.070],
maj@8 0.013 [0.003, 0.027] (95 % bootstrap intervals over 200 problems): too few steps to learn anything.
Another task: --config=configs/eval.py:task=gsm8k,path=FOLDER,max_prompt_length=384
"""


def get_config(
  task: str = 'arithmetic', path: str = '', size: int = 200, samples: int = 8, batch_size: int = 40, max_prompt_length: int = 128,
  max_completion_length: int = 128,
) -> dict:  # fmt: skip
  return {
    'data': {'task': task, 'path': path, 'max_prompt_length': max_prompt_length},
    'rollout': {'max_completion_length': max_completion_length},
    'eval': {
      'size': size,
      'batch_size': batch_size,
      'evaluators': {'greedy': {}, f'{samples} samples': {'num_samples': samples, 'temperature': 1.0}},
    },
  }
