"""PPO and GRPO on the demo's task with the demo's rule rewards: the same bases, rollouts, updates and learning rate.

Command:  python -m launch.sweep --config=configs/sweeps/ppo_grpo.py --workdir=runs/ppo_grpo --seeds=0,1,2
Hardware: 2 CPU cores. Duration, shared: 173 s for grpo, 243 s for ppo, the base apart.
Measured, seed 0, greedy accuracy on 500 held-out problems: base .300, grpo .812, ppo .812. See docs/results/ppo_grpo.json.

PPO has a critic of its own, of the policy's size, born with a random head: it costs a second forward and backward pass an update.
"""

import pathlib

from rl_reasoning import config

REPORT = (
  'eval/greedy/accuracy',
  'eval/sampled/accuracy',
  'reward',
  'entropy',
  'completions/mean_length',
  'val/explained_variance',
  'step_time',
)
COMPARE = (('ppo', 'grpo'),)


def get_config(seed: int = 0, stage: str = 'rl', steps: int = 80) -> dict:
  demo = config.read_file(str(pathlib.Path(__file__).parent.parent / 'demo.py') + f':seed={seed}')['stages']
  if stage == 'base':
    return config.merge(demo['base'], {'eval': {'size': 500, 'seed': 1}})
  sampled = {'num_samples': 4, 'temperature': 1.0}
  return {
    **demo['rl'],
    'total_steps': steps,
    'roles': {'policy': {'init': '{workdir}/base/seed{seed}'}},
    'log_every': 1,
    'eval': {'every': 20, 'size': 500, 'batch_size': 250, 'seed': 1, 'evaluators': {'greedy': {}, 'sampled': sampled}},
    'checkpoint': {'every': 40, 'keep': 1},
  }


def sweep(base: dict) -> list[dict]:
  ppo = {
    'objective.name': 'ppo',
    'objective.kl_coef': 0.0,
    'objective.lam': 1.0,
    'roles.critic.learning_rate': 1e-3,
  }
  return [
    {'name': 'base', 'arguments': {'stage': 'base'}, 'report': False},
    {'name': 'grpo', 'objective.name': 'grpo'},
    {'name': 'ppo', **ppo},
  ]
