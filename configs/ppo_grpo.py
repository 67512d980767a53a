"""PPO and GRPO on the demo's task with the demo's rule rewards: the same base, rollouts, updates and learning rate.

Command:  python -m rl_reasoning.pipeline --config=configs/ppo_grpo.py:seed=0 --workdir=runs/ppo_grpo_0      (base=RUN: from that base)
Hardware: 2 CPU cores.

PPO has a critic of its own, of the policy's size, born with a random head: it costs a second forward and backward pass an update.
"""

import pathlib

from rl_reasoning import config


def get_config(seed: int = 0, steps: int = 80, base: str = '') -> dict:
  demo = config.read_file(str(pathlib.Path(__file__).parent / 'demo.py') + f':seed={seed}')['stages']
  sampled = {'num_samples': 4, 'temperature': 1.0}
  shared = {
    **demo['rl'],
    'total_steps': steps,
    'log_every': 1,
    'roles': {'policy': {'init': base or '{workdir}/base'}},
    'eval': {'every': 20, 'size': 500, 'batch_size': 250, 'seed': 1, 'evaluators': {'greedy': {}, 'sampled': sampled}},
  }
  critic = {'roles': {'critic': {'learning_rate': 1e-3}}}
  ppo = {'name': 'ppo', 'kl_coef': 0.0, 'lam': 1.0}
  stages = {'grpo': shared, 'ppo': {**config.merge(shared, critic), 'objective': ppo}}
  return {'stages': stages if base else {'base': demo['base'], **stages}}
