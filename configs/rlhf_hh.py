"""A few updates of GRPO against two reward models of human rankings, helpful and harmless, combined as in Llama 2 (2307.09288).

Commands (RM_HELPFUL, RM_HARMLESS, RM_JUDGE: runs of configs/rm_hh.py; WEIGHTS: SmolLM2-135M-Instruct; HH: the folder of the rankings)
  python -m rl_reasoning.train --config=configs/rlhf_hh.py:weights=WEIGHTS,helpful=RM_HELPFUL,harmless=RM_HARMLESS,data=HH
    --workdir=runs/rlhf_hh
  python -m rl_reasoning.evaluate --config=configs/rlhf_hh.py:judge=RM_JUDGE,helpful=RM_HELPFUL,harmless=RM_HARMLESS,data=HH
    --checkpoint=runs/rlhf_hh --workdir=runs/rlhf_hh_after                         (and --checkpoint=WEIGHTS --workdir=runs/rlhf_hh_before)
  python -m rl_reasoning.win_rate runs/rlhf_hh_after/samples/samples.jsonl runs/rlhf_hh_before/samples/samples.jsonl --judge=judge
Hardware: 2 CPU cores. Duration: 14 minutes, and 5 for each evaluation with size=120.
Measured, seed 0, 120 prompts, before -> after: helpful -2.23 -> -1.79, harmless -2.93 -> -2.17, held-out judge -2.33 -> -1.75, tokens
44.0 -> 39.2; win rate .550 [.463, .637], at equal lengths .505 [.400, .601]. See docs/results/rlhf_hh.json.
"""


def get_config(
  weights: str = '', helpful: str = '', harmless: str = '', judge: str = '', data: str = '', steps: int = 12, size: int = 60
) -> dict:
  def prompts(subset: str, **more) -> dict:
    return {'task': 'hh_rlhf', 'path': data, 'options': {'subset': subset, 'max_chars': 450, 'safety': True, **more}}

  models = {'helpful': {'init': helpful}, 'harmless': {'init': harmless}, **({'judge': {'init': judge}} if judge else {})}
  names = ('combined', 'helpful', 'harmless', *(('judge',) if judge else ()))
  shared = {
    'data': {
      'mixture': {'helpful': prompts('helpful', part='gt'), 'harmless': prompts('harmless', test_share=0.3)},
      'max_prompt_length': 256,
    },
    'rollout': {'max_completion_length': 48, 'chunk': 48},
    'rewards': {
      'functions': names,
      'weights': (1.0, *(0.0 for _ in names[1:])),
      'combinations': {'combined': {'rule': 'llama2', 'of': ('helpful', 'harmless')}},
    },
  }
  if judge:  # an evaluation
    evaluators = {'samples': {'temperature': 0.7}}
    return {
      **shared,
      'roles': {'policy': {'template': 'chat'}, 'reward': models},
      'eval': {'size': size, 'batch_size': 20, 'evaluators': evaluators},
    }
  return {
    **shared,
    'total_steps': steps,
    'roles': {'policy': {'init': weights, 'template': 'chat'}, 'reward': models},
    'data': {**shared['data'], 'batch_size': 8},
    'objective': {'name': 'grpo', 'num_generations': 4, 'aggregation': 'token_mean'},
    'optim': {'learning_rate': 5e-5, 'warmup_updates': 2, 'frozen_layers': 22, 'micro_batch': 16},
    'checkpoint': {'every': 6, 'keep': 1},
  }
