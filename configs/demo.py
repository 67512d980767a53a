"""R1-Zero at nano scale, from nothing: a weak base, then GRPO with accuracy and format rewards alone.

Command:  make demo      (python -m rl_reasoning.pipeline --config=configs/demo.py:seed=0 --workdir=runs/demo)
Hardware: 2 CPU cores. Duration: 8 minutes (7 min 49 s from a fresh clone, set-up excluded).
Measured, seeds 0, 1, 2, accuracy on 1,000 held-out problems: base greedy .275 .379 .351, forced chain .442 .439 .450, pass@8 .708 .704
.721; after RL greedy .916 .825 .956. See docs/results/demo.json.

The task is chained arithmetic, '7+9-3-8=' -> <think>7+9=16;16-3=13;13-8=5</think><answer>5</answer>, split into train and test by a hash of
the problem. The base learns from a careless author: half of its rows answer at once, and every sum in its rows forgets to carry or to
borrow with probability `sloppiness` where there is something to carry. So the base can think and rarely does, and when it does it prefers
the wrong sum: its greedy chain is wrong wherever a carry stands, while one sample in three has it right. RL has to find both.

`control=True` adds a stage that spends the time of the RL stage on more of the base's own training instead.
"""


def get_config(
  seed: int = 0, sft_steps: int = 700, rl_steps: int = 200, eval_seed: int = 2, sloppiness: float = 0.65, control: bool = False
) -> dict:
  task = {'operands': 4, 'low': 3, 'high': 9}
  evaluation = {
    'size': 1000,
    'batch_size': 250,
    'seed': eval_seed,
    'evaluators': {
      'greedy': {},
      'forced chain': {'prefix': '<think>'},
      '8 samples': {'num_samples': 8, 'temperature': 1.0},
    },
  }
  shared = {
    'seed': seed,
    'rollout': {'max_completion_length': 48},
    'rewards': {'functions': ('accuracy', 'format'), 'weights': (1.0, 0.2)},
  }
  base = {
    **shared,
    'total_steps': sft_steps,
    'log_every': 50,
    'model': {'preset': 'nano'},
    'data': {
      'task': 'arithmetic',
      'train_size': 40_000,
      'options': {**task, 'styles': {'direct': 0.5, 'sloppy': 0.5}, 'sloppiness': sloppiness},
      'batch_size': 128,
      'max_length': 64,
      'max_prompt_length': 16,
    },
    'objective': {'name': 'sft'},
    'optim': {'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_updates': 20},
    'eval': {'every': sft_steps, 'at_start': False, **evaluation},
    'checkpoint': {'every': 200},
  }
  more = {**base, 'roles': {'policy': {'init': '{workdir}/base'}}, 'seed': seed + 1000}  # other rows first, the same author
  more.pop('model')
  rl = {
    **shared,
    'total_steps': rl_steps,
    'log_every': 10,
    'roles': {'policy': {'init': '{workdir}/base'}},
    'data': {'task': 'arithmetic', 'train_size': 20_000, 'options': task, 'batch_size': 32, 'max_prompt_length': 16},
    'objective': {'name': 'grpo', 'aggregation': 'token_mean'},
    'optim': {'learning_rate': 3e-4, 'warmup_updates': 10},
    'eval': {'every': 50, **evaluation},
    'checkpoint': {'every': 50},
  }
  return {'stages': {'base': base, **({'control': more} if control else {}), 'rl': rl}}
