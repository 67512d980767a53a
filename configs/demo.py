"""R1-Zero at nano scale, from nothing: a weak base, then GRPO with accuracy and format rewards alone.

Command:  make demo      (python -m rl_reasoning.pipeline --config=configs/demo.py:seed=0 --workdir=runs/demo)
"""


def get_config(
  seed: int = 0,
  sft_steps: int = 700,
  rl_steps: int = 250,
  high: int = 9,
  sloppiness: float = 0.8,
  direct: float = 0.5,
  lr: float = 3e-4,
) -> dict:
  model = {'preset': 'nano'}
  task = {'operands': 4, 'low': 3, 'high': high}
  evaluators = {
    'greedy': {},
    'forced': {'prefix': '<think>'},
    'pass@8': {'num_samples': 8, 'temperature': 1.0},
  }
  base = {
    'seed': seed,
    'total_steps': sft_steps,
    'log_every': 50,
    'model': model,
    'data': {
      'task': 'arithmetic',
      'train_size': 40_000,
      'options': {**task, 'styles': {'direct': direct, 'sloppy': 1 - direct}, 'sloppiness': sloppiness},
      'batch_size': 128,
      'max_length': 64,
      'max_prompt_length': 16,
    },
    'objective': {'name': 'sft'},
    'rollout': {'max_completion_length': 48},
    'optim': {'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_updates': 20},
    'eval': {'every': sft_steps, 'at_start': False, 'size': 1000, 'batch_size': 250, 'seed': 1, 'evaluators': evaluators},
    'checkpoint': {'every': 200},
  }
  rl = {
    'seed': seed,
    'total_steps': rl_steps,
    'log_every': 10,
    'roles': {'policy': {'init': '{workdir}/base'}},
    'data': {'task': 'arithmetic', 'train_size': 20_000, 'options': task, 'batch_size': 32, 'max_prompt_length': 16},
    'objective': {'name': 'grpo', 'aggregation': 'token_mean'},
    'rollout': {'max_completion_length': 48},
    'rewards': {'functions': ('accuracy', 'format'), 'weights': (1.0, 0.2)},
    'optim': {'learning_rate': lr, 'warmup_updates': 10},
    'eval': {'every': rl_steps, 'size': 1000, 'batch_size': 250, 'seed': 1, 'evaluators': evaluators},
    'checkpoint': {'every': 50},
  }
  return {'stages': {'base': base, 'rl': rl}}
