"""Learning from one's own samples, without a policy gradient: rounds of sampling, judging and training (best of K, expert iteration, DPO).

Command:  python -m rl_reasoning.pipeline --config=configs/best_of_k.py:seed=0 --workdir=runs/best_of_k
Hardware: 2 CPU cores. Duration: 3.5 minutes of processor time for both rounds, the base apart (12 minutes on a machine that others used).
Measured, seeds 0, 1, 2, greedy accuracy on 1,000 held-out problems: base .294, .375, .400; keep='correct', start='base': round 1 .844,
.855, .908, round 2 .891, .918, .961 (docs/results/best_of_k.json). keep='best', round 1, seed 0 from another base (.275): .627, since the
best of 8 wrong ones is imitated, too.

The task and the careless base are those of configs/demo.py. A round samples 8 completions of each of `size` new problems from the last
round's model, keeps what `keep` says, and trains on it, beginning from the base (`start='base'`: 2312.06585 finds that it overfits less) or
from where the last round ended (`start='last'`).

keep='correct'  every distinct completion that is right and well-formed (expert iteration)
keep='best'     of each problem the one with the highest reward, right or not (Llama 2's rejection sampling)
keep='ranking'  all of them, ranked by reward: DPO on their pairs (sampled, relabelled and retrained in every round), best with start='last'
`judge=RUN` is a reward model that judges in the place of the rules. `base=DIR` takes a base that is trained already, say runs/demo/base.
Not measured: keep='ranking', judge.
"""


def get_config(
  seed: int = 0, rounds: int = 2, size: int = 2000, keep: str = 'correct', start: str = 'base', base: str = '', judge: str = '',
  sft_steps: int = 700, round_steps: int = 150,
) -> dict:  # fmt: skip
  assert start in ('base', 'last') and keep in ('correct', 'best', 'ranking'), (start, keep)
  assert not judge or keep != 'correct', 'what is correct is no matter of a judge'
  task = {'operands': 4, 'low': 3, 'high': 9}
  here = {'task': 'arithmetic', 'options': task}
  shared = {
    'seed': seed,
    'rollout': {'max_completion_length': 48},
    'rewards': {'functions': ('accuracy', 'format'), 'weights': (1.0, 0.2)},
  }
  training = {
    **shared,
    'log_every': 50,
    'objective': {'name': 'sft'},
    'eval': {
      'at_start': False,
      'size': 1000,
      'batch_size': 200,
      'seed': 2,
      'evaluators': {'greedy': here, '8 samples': {**here, 'num_samples': 8, 'temperature': 1.0}},
    },
  }
  stages: dict = {}
  if not base:
    base = '{workdir}/base'
    styles = {'styles': {'direct': 0.5, 'sloppy': 0.5}, 'sloppiness': 0.65}
    stages['base'] = {
      **training,
      'total_steps': sft_steps,
      'model': {'preset': 'nano'},
      'data': {
        'task': 'arithmetic',
        'train_size': 40_000,
        'options': {**task, **styles},
        'batch_size': 128,
        'max_length': 64,
        'max_prompt_length': 16,
      },
      'optim': {'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_updates': 20},
      'eval': {**training['eval'], 'every': sft_steps},
    }
  last = base
  for n in range(1, rounds + 1):
    kept = {'keep': keep, 'min_reward': 1.2} if keep == 'correct' else {'keep': keep}
    ranked = keep == 'ranking'
    by = {'roles': {'policy': {'init': last}, 'reward': {'judge': {'init': judge}}}, 'rewards': {'functions': ('judge',)}}
    stages[f'round{n}_generate'] = {
      **shared,
      **(by if judge else {'roles': {'policy': {'init': last}}}),
      'data': {**here, 'train_size': rounds * size, 'max_prompt_length': 16},
      'generate': {**kept, 'first': (n - 1) * size, 'size': size, 'num_samples': 8, 'seed': seed + n, 'batch_size': 200},
    }
    stages[f'round{n}_train'] = {
      **training,
      'total_steps': round_steps,
      **({'objective': {'name': 'dpo'}} if ranked else {}),
      'roles': {'policy': {'init': base if start == 'base' else last}},
      'data': {
        **({'task': 'preference', 'options': {'pairs': True}} if ranked else {'task': 'dataset'}),
        'path': f'{{workdir}}/round{n}_generate/data.jsonl',
        'batch_size': 64 if ranked else 128,
        'max_length': 64,
        'max_prompt_length': 16,
      },
      'optim': {'learning_rate': 1e-4 if ranked else 5e-4, 'schedule': 'cosine', 'warmup_updates': 10},
      'eval': {**training['eval'], 'every': round_steps},
    }
    last = f'{{workdir}}/round{n}_train'
  return {'stages': stages}
