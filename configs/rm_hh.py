"""Reward models from human rankings: SmolLM2-135M on HH-RLHF, helpful and harmless.

Commands (WEIGHTS: SmolLM2-135M-Instruct; HH: the folder of the rankings; PANDALM: its testset-v1.json)
  python -m rl_reasoning.train --config=configs/rm_hh.py:subset=helpful,weights=WEIGHTS,data=HH,pandalm=PANDALM --workdir=runs/rm_helpful
  python -m rl_reasoning.train --config=configs/rm_hh.py:subset=harmless,weights=WEIGHTS,data=HH,pandalm=PANDALM --workdir=runs/rm_harmless
  (subset=judge: a helpful model from other pairs, for win rates)
HH holds helpful_train_gt.jsonl, helpful_train_w2s.jsonl and helpful_test.jsonl (single turns of hh-rlhf as github.com/Gengze/W2SG-Bregman
@ 86573c3 has selected them, data/helpful/), and harmless_base_test.jsonl.gz (github.com/anthropics/hh-rlhf @ 354e5c3), gzipped or not.
PANDALM: data/testset-v1.json of github.com/WeOpenML/PandaLM @ 3871806.
Hardware: 2 CPU cores. Duration with both evaluations: helpful 53 minutes, harmless 28, judge 13, with low-priority tests beside.
Measured, seed 0, accuracy on held-out pairs: helpful .701 (583 pairs; longer is better: .604), harmless .612 (627; .493), judge
.669 (166; .590); on PandaLM helpful .713, harmless .355. See docs/results/rm_hh_*.json.

Texts of at most 128 tokens: a prompt loses its beginning, a pair with a longer answer is left out. The first 26 of 30 layers and the
embedding stay as they are, and what they give of a text is computed once; the last four layers and the head are trained.
"""

SUBSETS = {  # subset, part of its training files, pairs before those that are too long, steps
  'helpful': ('helpful', 'gt', 0, 150),
  'harmless': ('harmless', '', 0, 50),
  'judge': ('helpful', 'w2s', 1000, 30),
}


def get_config(subset: str = 'helpful', weights: str = '', data: str = '', pandalm: str = '', seed: int = 0) -> dict:
  files, part, pairs, steps = SUBSETS[subset]
  options = {'subset': files, **({'part': part} if part else {'test_share': 0.3})}
  transfer = {'kind': 'ranking', 'task': 'pandalm', 'path': pandalm, 'size': 300}
  return {
    'seed': seed,
    'total_steps': steps,
    'roles': {'policy': {'init': weights, 'template': 'chat'}},
    'data': {
      'task': 'hh_rlhf', 'path': data, 'options': options, 'train_size': pairs,
      'batch_size': 32, 'max_length': 128, 'overlong': 'truncate_prompt',
    },
    'objective': {'name': 'reward_model'},
    'optim': {'learning_rate': 1e-4, 'schedule': 'linear', 'warmup_updates': 10, 'frozen_layers': 26, 'cache_features': True},
    'eval': {
      'every': steps, 'at_start': False, 'size': 200 if subset == 'judge' else 700, 'batch_size': 8,
      'evaluators': {'held out': {'kind': 'ranking'}, **({'pandalm': transfer} if pandalm and subset != 'judge' else {})},
    },
    'checkpoint': {'every': 25, 'keep': 1},
  }  # fmt: skip
