"""The GRPO family on the demo's task, and three published effects, from the demo's own bases: three seeds each.

Command:  python -m launch.sweep --config=configs/sweeps/grpo_family.py --workdir=runs/grpo_family --seeds=0,1,2 --jobs=2
          (two jobs on two cores; --jobs=1 gives each run both)
Hardware: 2 CPU cores, shared with tests. Duration: 70 minutes in all; 2.2 to 4 a run, 7 to 11 a base.
Measured: greedy accuracy on 500 held-out problems, mean over seeds 0, 1, 2 (base .355): grpo .81, dr_grpo .75, dapo .90, gspo .81,
cispo .71, reinforce_pp .78, rloo .87, dynamic_sampling .89; all numbers in docs/results/grpo_family.json.

Every entry starts from the base of its seed (configs/demo.py: chained arithmetic learned from a careless author, which prefers wrong sums)
and makes four updates a rollout, so that ratios leave 1 and clips act; REINFORCE (rloo) makes one, as it must. The effects, each a
difference from `grpo`:
  clip_higher       DAPO: a higher upper clip keeps the entropy up; tight_clip_higher against tight_clip asks the same where more is clipped
  dr_grpo           Dr. GRPO: without division by length and by std, wrong answers get shorter (eval/sampled/length_wrong)
  dynamic_sampling  DAPO: groups without spread replaced by new prompts: fewer updates to the same accuracy
"""

import pathlib

from rl_reasoning import config

REPORT = (
  'eval/greedy/accuracy',
  'eval/sampled/accuracy',
  'eval/sampled/length_wrong',
  'entropy',
  'completions/mean_length',
  'clip_ratio/region_mean',
  'frac_reward_zero_std',
)
COMPARE = (
  ('clip_higher', 'grpo'),
  ('tight_clip_higher', 'tight_clip'),
  ('dr_grpo', 'grpo'),
  ('dynamic_sampling', 'grpo'),
)


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
    'objective': {'name': 'grpo', 'num_minibatches': 4},
    'optim': {'learning_rate': 2e-4, 'warmup_updates': 10},
    'eval': {'every': 20, 'size': 500, 'batch_size': 250, 'seed': 1, 'evaluators': {'greedy': {}, 'sampled': sampled}},
    'checkpoint': {'every': 25, 'keep': 1},
  }


def sweep(base: dict) -> list[dict]:
  family = [{'name': name, 'objective.name': name} for name in ('grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo', 'reinforce_pp')]
  return [
    {'name': 'base', 'arguments': {'stage': 'base'}, 'report': False},
    *family,
    {'name': 'rloo', 'objective.name': 'rloo', 'objective.num_minibatches': 1},
    {'name': 'clip_higher', 'objective.epsilon_high': 0.28},
    {'name': 'tight_clip', 'objective.epsilon': 0.05},
    {'name': 'tight_clip_higher', 'objective.epsilon': 0.05, 'objective.epsilon_high': 0.2},
    {'name': 'dynamic_sampling', 'objective.dynamic_sampling': True},
  ]
