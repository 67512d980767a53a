"""RLHF at nano scale, with a gold reward that is known: what is gained, and what is lost when the reward model is optimised too hard.

Command:  python -m rl_reasoning.pipeline --config=configs/rlhf_nano.py:seed=0 --workdir=runs/rlhf_nano_0
Hardware: 2 CPU cores. Duration: 13 minutes alone, nothing compiled before.
Measured, seeds 0, 1, 2: reward models .905 to .958 on held-out comparisons; gold reward 2.06 to 2.17 after sft, at the end ppo 1.49 to
2.58, grpo -.14 to 2.98, ppo_ensemble 1.58 to 2.55, grpo_ensemble 2.50 to 2.96, dpo 2.65 to 3.12, cpl 2.99 to 3.09. See
docs/results/rlhf_nano.json.

The task is `reviews`: a mediocre author reviews what he is asked to, and comparisons of his reviews are made by a gold reward that no
stage sees but in evaluation. Stages: sft imitates him; rm, rm2 and rm3 learn rewards from comparisons, each from others; ppo and grpo
optimise rm, ppo_ensemble and grpo_ensemble the mean - k std of all three; dpo and cpl learn from the comparisons themselves. All policies
start from sft. Their evaluations give gold reward, proxy reward (rm's) and KL from sft, whose curves against the square root of KL are
those of Gao et al. (2210.10760); ensembles as in Coste et al. (2310.02743).
"""

MEMBERS = ('rm', 'rm2', 'rm3')


def get_config(
  seed: int = 0, sft_steps: int = 350, rm_steps: int = 220, rl_steps: int = 32, preference_steps: int = 80, k: float = 1.0,
  eval_size: int = 100, eval_seed: int = 2,
) -> dict:  # fmt: skip
  pairs = {'rows': 'rankings'}

  def section(rows: dict, batch_size: int, size: int, **more) -> dict:
    return {'task': 'reviews', 'options': rows, 'train_size': size, 'batch_size': batch_size, **more}

  def evaluation(every: int, **samples) -> dict:
    sampled = {'options': {'rows': 'prompts'}, 'temperature': 1.0, 'num_samples': 2, **samples}
    return {'every': every, 'size': eval_size, 'batch_size': eval_size, 'seed': eval_seed, 'evaluators': {'samples': sampled}}

  rollout = {'max_completion_length': 40, 'chunk': 16}
  sft = {
    'seed': seed,
    'total_steps': sft_steps,
    'log_every': 50,
    'model': {'preset': 'nano'},
    'data': section({'rows': 'demonstrations'}, 64, 20_000, max_length=48, max_prompt_length=16),
    'objective': {'name': 'sft'},
    'optim': {'learning_rate': 2e-3, 'schedule': 'cosine', 'warmup_updates': 20},
    'rollout': rollout,
    'rewards': {'functions': ('gold_reviews',)},
    'eval': {**evaluation(sft_steps), 'size': 200, 'batch_size': 200, 'at_start': False},
    'checkpoint': {'every': 200},
  }

  def reward_model(member: int) -> dict:
    """Members differ in their comparisons, in the order of them and in the head that they start from: all three follow the seed."""
    held_out = {'kind': 'ranking', 'size': 400, 'seed': eval_seed}
    return {
      'seed': seed + 1000 * member,
      'total_steps': rm_steps,
      'log_every': 25,
      'roles': {'policy': {'init': '{workdir}/sft'}},
      'data': section(pairs, 64, 8000, max_length=48),
      'objective': {'name': 'reward_model', 'center_rewards_coefficient': 0.01},
      'optim': {'learning_rate': 1e-3, 'schedule': 'cosine', 'warmup_updates': 20},
      'eval': {'every': rm_steps, 'at_start': False, 'batch_size': 100, 'evaluators': {'held_out': held_out}},
      'checkpoint': {'every': 200},
    }

  def policy(steps: int, data: dict, objective: dict, learning_rate: float, ensemble: bool = False, critic: bool = False) -> dict:
    models = {'proxy': {'init': '{workdir}/rm'}}
    rewards = {'functions': ('proxy', 'gold_reviews'), 'weights': (1.0, 0.0)}
    if ensemble:
      models |= {member: {'init': f'{{workdir}}/{member}'} for member in MEMBERS[1:]}
      rewards = {
        'functions': ('ensemble', 'proxy', 'gold_reviews'),
        'weights': (1.0, 0.0, 0.0),
        'combinations': {'ensemble': {'rule': 'mean_minus_std', 'of': ('proxy', *MEMBERS[1:]), 'k': k}},
      }
    roles = {'policy': {'init': '{workdir}/sft'}, 'reward': models}
    return {
      'seed': seed,
      'total_steps': steps,
      'log_every': 5,
      'roles': {**roles, 'critic': {'init': '{workdir}/rm', 'learning_rate': 3e-4}} if critic else roles,
      'data': data,
      'objective': objective,
      'rollout': rollout,
      'rewards': rewards,
      'optim': {'learning_rate': learning_rate, 'warmup_updates': 5},
      'eval': evaluation(steps // 8, kl_to='{workdir}/sft'),
      'checkpoint': {'every': 50, 'keep': 1},
    }

  # The weights of the KL are small: a large one would end the curve before it turns.
  prompts = section({'rows': 'prompts'}, 16, 8000, max_prompt_length=16)
  ppo = {'name': 'ppo', 'kl_coef': 0.005, 'num_minibatches': 2, 'missing_eos_penalty': 1.0}
  grpo = {'name': 'grpo', 'beta': 0.005, 'aggregation': 'token_mean'}
  compared = section(pairs, 64, 8000, max_length=48, max_prompt_length=16)
  stages = {
    'sft': sft,
    **{name: reward_model(member) for member, name in enumerate(MEMBERS)},
    'ppo': policy(rl_steps, prompts, ppo, 1.5e-4, critic=True),
    'grpo': policy(rl_steps, prompts, grpo, 1.5e-4),
    'dpo': policy(preference_steps, compared, {'name': 'dpo', 'beta': 0.1}, 1e-4),
    'cpl': policy(preference_steps, compared, {'name': 'cpl', 'cpl_alpha': 0.1, 'cpl_lambda': 0.5}, 1e-4),
    'ppo_ensemble': policy(rl_steps, prompts, ppo, 1.5e-4, ensemble=True, critic=True),
    'grpo_ensemble': policy(rl_steps, prompts, grpo, 1.5e-4, ensemble=True),
  }
  return {'stages': stages}
