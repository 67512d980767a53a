"""Accuracy against tokens at nano scale: every method of rl_reasoning.inference on a run of configs/demo.py.

Command:  python -m rl_reasoning.pipeline --config=configs/scale.py:stage=all,base=runs/demo/base --workdir=runs/scale
          (trains an outcome and a process reward model on the base's own samples, then draws the curves)
Or:       python -m rl_reasoning.generate scale --config=configs/scale.py --checkpoint=runs/demo/base --workdir=runs/scale_alone
          (the curves of the methods that go by no reward model)
Hardware: 2 CPU cores, of which it had one. Duration: 10 minutes.
Measured, seed 0, from the base of configs/best_of_k.py, accuracy on 500 held-out problems: direct .280, step by step .426; of 16 samples:
vote .469, outcome model's best .708, vote weighted by it .802, by the process model .742, verifier .874. All: docs/results/scale.json.

The model has read no English and no second problem: "step by step" is an opened <think>, few-shot examples are strange to it, and what
takes the place of the tag below the minimum is the ';' that its chains go on by, not "Wait" (`wait=Wait` asks for that).
"""


def get_config(
  stage: str = 'scale', base: str = '', outcome: str = '', process: str = '', size: int = 500, eval_seed: int = 2, seed: int = 0,
  wait: str = ';', train_size: int = 1000, steps: int = 300,
) -> dict:  # fmt: skip
  assert stage in ('scale', 'all'), stage
  task = {'task': 'arithmetic', 'options': {'operands': 4, 'low': 3, 'high': 9}}
  if stage == 'all':
    models = '{workdir}/outcome', '{workdir}/process'
    curve = get_config('scale', '', *models, size, eval_seed, seed, wait)
    curve['roles'] |= {'policy': {'init': base}}
    return {'stages': {**reward_models(task, base, seed, train_size, steps), 'curve': curve}}
  forced = {'prefix': '<think>'}
  budgets = {'method': 'budget_forcing', 'max_answer': 12, 'wait': wait}
  sampled = {**forced, 'num_samples': (1, 2, 4, 8, 16)}
  methods = {
    'direct': {'method': 'zero_shot', 'instruction': ''},
    'step by step': {'method': 'zero_shot', 'instruction': '', **forced},
    'few-shot': {'method': 'few_shot', 'shots': 2, 'separator': '\n'},
    'voting': {'method': 'vote', **sampled},
    'by likelihood': {'method': 'weighted_vote', 'by': 'likelihood', **sampled},
    'by likelihood a token': {'method': 'weighted_vote', 'by': 'likelihood_per_token', **sampled},
    'verifier': {'method': 'best_of_n', 'by': 'oracle', **sampled},
    'at most': {**budgets, 'budgets': ((0, 5), (0, 10), (0, 15), (0, 20), (0, 32))},
    'at least': {**budgets, 'budgets': ((24, 48), (32, 48), (40, 48))},
  }
  for name, given in (('outcome', outcome), ('process', process)):
    if given:
      methods |= {
        f'best by {name}': {'method': 'best_of_n', 'by': name, **sampled},
        f'vote by {name}': {'method': 'weighted_vote', 'by': name, **sampled},
        f'beam by {name}': {'method': 'beam_search', 'by': name, 'beams': (1, 2, 4), 'step_separator': ';', **forced},
      }
  known = {name: {'init': given} for name, given in (('outcome', outcome), ('process', process)) if given}
  return {
    'seed': seed,
    **({'roles': {'reward': known}} if known else {}),
    'data': {**task, 'train_size': 64, 'max_prompt_length': 128},
    'rollout': {'max_completion_length': 48},
    'eval': {'size': size, 'batch_size': 100, 'seed': eval_seed},
    'scale': methods,
  }


def reward_models(task: dict, base: str, seed: int, train_size: int, steps: int) -> dict:
  """An outcome and a process reward model, of other training problems than each other."""
  sample = {
    'seed': seed,
    'roles': {'policy': {'init': base}},
    'data': {**task, 'train_size': 2 * train_size, 'max_prompt_length': 16},
    'rollout': {'max_completion_length': 48},
    'rewards': {'functions': ('accuracy',)},
  }
  drawn = {'size': train_size, 'num_samples': 8, 'batch_size': 100, 'seed': seed}

  def train(name: str, data: str) -> dict:
    return {
      'seed': seed,
      'total_steps': steps,
      'log_every': 20,
      'roles': {'policy': {'init': base}},
      'data': {'task': 'preference', 'path': f'{{workdir}}/{data}/data.jsonl', 'batch_size': 64, 'max_length': 80},
      'objective': {'name': f'{name}_reward_model'},
      'optim': {'learning_rate': 5e-4, 'schedule': 'cosine', 'warmup_updates': 20},
    }

  return {
    'labels': {**sample, 'generate': {'keep': 'labels', **drawn}},
    'outcome': train('outcome', 'labels'),
    'steps': {
      **sample,
      'generate': {'keep': 'steps', 'step_separator': ';', 'max_per_prompt': 2, 'first': train_size, **drawn},
    },
    'process': train('process', 'steps'),
  }
