"""One round of rejection sampling with SmolLM2-135M-Instruct on GSM8K, and what voting and best-of-n add: R1's stages on real questions.

Weights and data as in configs/grpo_gsm8k.py.
Command:  python -m rl_reasoning.pipeline --config=configs/gsm8k_rounds.py:weights=FILE.gguf,data=FOLDER --workdir=runs/gsm8k_rounds
Hardware: 2 CPU cores. Duration: 68 minutes beside other work.
Measured, seed 0, 4-bit weights, 200 test questions greedy (95 %): accuracy .015 [.000, .035] before and after the round, in which
8 of 1,200 samples are accepted; format .470 -> .755. 4 samples on 100: vote .016, by likelihood .040, verifier .060. See
docs/results/gsm8k_rounds.json.

  sft         one pass over `chains` of GSM8K's training chains, in the format
  sft_eval    held-out accuracy, greedy
  sft_curve   of voting and best-of-n over 4 samples
  sampled     4 samples each on 300 other training questions; those that are right and in the format stay
  kept        of these what does not loop, each text once
  again       SFT goes on with them
  again_eval  the same as sft_eval
"""


def get_config(
  weights: str = '',
  data: str = '',
  seed: int = 0,
  chains: int = 200,
  questions: int = 300,
  eval_size: int = 200,
  curve_size: int = 100,
) -> dict:
  assert weights, 'weights= names the model'
  asked = {'task': 'gsm8k', 'path': data, 'train_size': chains + questions, 'max_prompt_length': 384}  # in one order of the seed
  template = {'template': 'chat_think'}
  rollout = {'max_completion_length': 160, 'chunk': 160}

  def sft(init: str, rows: dict, steps: int, learning_rate: float) -> dict:
    return {
      'seed': seed,
      'total_steps': steps,
      'log_every': 5,
      'roles': {'policy': {'init': init, **template}},
      'data': {**rows, 'batch_size': 8, 'max_length': 640},
      'objective': {'name': 'sft'},
      'optim': {'learning_rate': learning_rate, 'schedule': 'linear', 'warmup_updates': 5, 'micro_batch': 4},
      'checkpoint': {'every': 25, 'keep': 1},
    }

  tested = {'data': {'task': 'gsm8k', 'path': data, 'max_prompt_length': 384}, 'rollout': rollout}

  def greedy(stage: str) -> dict:
    return {
      **tested,
      'roles': {'policy': template},
      'rewards': {'functions': ('accuracy', 'format')},
      'eval': {'size': eval_size, 'batch_size': 100, 'evaluators': {'greedy': {}}},
      'evaluate': {'checkpoint': f'{{workdir}}/{stage}'},
    }

  def curve(stage: str) -> dict:
    sampled = {'temperature': 0.7, 'num_samples': (1, 2, 4)}
    return {
      **tested,
      'roles': {'policy': {'init': f'{{workdir}}/{stage}', **template}},
      'eval': {'size': curve_size, 'batch_size': 50},
      'scale': {
        'voting': {'method': 'vote', **sampled},
        'by likelihood': {'method': 'weighted_vote', 'by': 'likelihood_per_token', **sampled},
        'verifier': {'method': 'best_of_n', 'by': 'oracle', **sampled},
      },
    }

  return {
    'stages': {
      'sft': sft(weights, {k: v for k, v in asked.items() if k != 'max_prompt_length'}, chains // 8, 2e-4),
      'sft_eval': greedy('sft'),
      'sft_curve': curve('sft'),
      'sampled': {
        'seed': seed,
        'roles': {'policy': {'init': '{workdir}/sft', **template}},
        'data': asked,
        'rollout': rollout,
        'rewards': {'functions': ('accuracy', 'format')},
        'generate': {
          'keep': 'reasoning', 'verify': 'always', 'first': chains, 'size': questions, 'num_samples': 4, 'temperature': 0.7,
          'batch_size': 50, 'seed': seed,
        },
      },
      'kept': {'filter': {
        'inputs': {'sampled': '{workdir}/sampled/data.jsonl'},
        'steps': ({'name': 'repetition', 'ngram_size': 10, 'most': 0.2}, {'name': 'duplicates'}),
      }},
      'again': sft('{workdir}/sft', {'task': 'dataset', 'path': '{workdir}/kept/data.jsonl'}, 12, 5e-5),
      'again_eval': greedy('again'),
    }
  }  # fmt: skip
