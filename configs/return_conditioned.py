"""Return-conditioned RL (2403.04642) at nano scale: SFT on one's own samples, every step behind a label that says what came of it.

Command:  python -m rl_reasoning.pipeline --config=configs/return_conditioned.py:seed=0 --workdir=runs/return_conditioned
Hardware: 2 CPU cores of an AMD EPYC, shared. Duration: 4 minutes, the base apart.
Measured, seeds 0, 1, 2, from the bases of configs/best_of_k.py, greedy accuracy on 1,000 held-out problems: base .294, .375, .400; trained,
every step to be good .619, .513, .718; to be bad .133, .199, .173 (docs/results/return_conditioned.json).

  base       that of configs/demo.py (`base=DIR` takes one that is trained already, say runs/demo/base)
  labelled   its samples, right or wrong; a step is good where at least half of the continuations from its end reach the right answer
  trained    SFT of the base on them
  before     held-out accuracy of the base
  after      of what was trained, when every step is to be good, and when every step is to be bad

What it is told to expect of a step stands before it: a policy that has learned the difference is right more often behind `^` than behind
`~`. The paper's labels are [GOOD] and [BAD]; a character each is less to read for a model that reads bytes.
"""


def get_config(
  seed: int = 0,
  base: str = '',
  size: int = 1500,
  num_samples: int = 4,
  sft_steps: int = 700,
  steps: int = 300,
  eval_size: int = 1000,
) -> dict:
  task = {'task': 'arithmetic', 'options': {'operands': 4, 'low': 3, 'high': 9}}
  training = {
    'seed': seed,
    'log_every': 50,
    'objective': {'name': 'sft'},
    'checkpoint': {'every': 100, 'keep': 1},
  }
  start, stages = base or '{workdir}/base', {}
  if not base:
    author = {**task['options'], 'styles': {'direct': 0.5, 'sloppy': 0.5}, 'sloppiness': 0.65}
    stages['base'] = {
      **training,
      'total_steps': sft_steps,
      'model': {'preset': 'nano'},
      'data': {**task, 'options': author, 'train_size': 40_000, 'batch_size': 128, 'max_length': 64},
      'optim': {'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_updates': 20},
    }
  stages['labelled'] = {
    'seed': seed,
    'roles': {'policy': {'init': start}},
    'data': {**task, 'train_size': size, 'max_prompt_length': 16},
    'rollout': {'max_completion_length': 48},
    'rewards': {'functions': ('accuracy',)},
    'generate': {
      'keep': 'conditioned', 'good': '^', 'bad': '~', 'step_separator': ';', 'rollouts_per_step': 8,
      'size': size, 'num_samples': num_samples, 'max_per_prompt': num_samples, 'batch_size': 250, 'seed': seed,
    },
  }  # fmt: skip
  stages['trained'] = {
    **training,
    'total_steps': steps,
    'roles': {'policy': {'init': start}},
    'data': {'task': 'dataset', 'path': '{workdir}/labelled/data.jsonl', 'batch_size': 128, 'max_length': 80},
    'optim': {'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_updates': 20},
  }

  def curve(init: str, methods: dict) -> dict:
    return {
      'roles': {'policy': {'init': init}},
      'data': {**task, 'max_prompt_length': 16},
      'rollout': {'max_completion_length': 56},
      'eval': {'size': eval_size, 'batch_size': 250, 'seed': 2},
      'scale': methods,
    }

  asked = {'method': 'conditioned', 'step_separator': ';'}
  stages['before'] = curve(start, {'base': {'method': 'zero_shot', 'instruction': ''}})
  stages['after'] = curve('{workdir}/trained', {'good': {**asked, 'label': '^'}, 'bad': {**asked, 'label': '~'}})
  return {'stages': stages}
