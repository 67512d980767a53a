"""A few seconds of each objective on a model of 0.1 M parameters: for trying a key, and for the tests.

Command:  python -m rl_reasoning.train --config=configs/tiny.py:objective=grpo --workdir=runs/tiny
          (distill wants a teacher, such as a run of the command with sft: objective=distill,teacher=runs/tiny_sft)
Hardware: any CPU. Duration: under a minute, most of it compilation. Expected: loss falls (sft); too few steps to learn anything (others).
"""

from ml_collections import ConfigDict

PAIRS = ('reward_model', 'dpo', 'ipo', 'hinge', 'simpo', 'orpo', 'cpl')  # learn from rankings of two; the others of rollouts


def get_config(objective: str = 'sft', teacher: str = '') -> ConfigDict:
  config: dict = {
    'total_steps': 8,
    'model': {'preset': 'tiny'},
    'data': {'task': 'arithmetic', 'train_size': 512, 'batch_size': 16},
    'objective': {'name': objective},
    'optim': {'learning_rate': 1e-3},
    'checkpoint': {'every': 4},
  }
  if objective == 'sft':
    config['data']['max_length'] = 64
  elif objective in PAIRS:
    config['data'] |= {'task': 'reviews', 'options': {'rows': 'rankings'}, 'max_length': 48}
  else:
    config['data']['max_prompt_length'] = 32
    config['rollout'] = {'max_completion_length': 16, 'chunk': 8}
    if objective == 'distill':
      config['roles'] = {'teacher': {'init': teacher}}
    else:
      config['rewards'] = {'functions': ('accuracy', 'format_tags'), 'weights': (1.0, 0.2)}
  return ConfigDict(config)
