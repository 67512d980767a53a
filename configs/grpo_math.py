"""GRPO, PPO or SFT of a published model on mathematics, on TPUs: what `make plan` compiles for slices of them.

Command:  python -m rl_reasoning.train --config=configs/grpo_math.py:weights=FOLDER,data=FOLDER --workdir=gs://BUCKET/run
Plan:     python -m launch.plan --config=configs/grpo_math.py:model=qwen2.5-1.5b,fsdp=16 --topology=v5e:4x4
Hardware: a TPU slice. Not run: there was none. The plans of the README are the compiler's own numbers and a roofline.

`weights`: a Hugging Face folder; without one the model is that of the preset, at random, which is enough to plan. `length`: of completions.
"""

from ml_collections import ConfigDict


def get_config(
  model: str = 'qwen2.5-1.5b', objective: str = 'grpo', weights: str = '', data: str = '', prompts: int = 64, length: int = 1024,
  prompt_length: int = 256, micro_batch: int = 0, fsdp: int = 1, tensor: int = 1, sequence: int = 1, expert: int = 1,
) -> ConfigDict:  # fmt: skip
  config = {
    'total_steps': 500,
    'model': {'dtype': 'bfloat16', 'remat': 'full', **({} if weights else {'preset': model})},
    'data': {'task': 'gsm8k', 'path': data, 'batch_size': prompts},
    'objective': {'name': objective},
    'optim': {'learning_rate': 1e-6, 'warmup_updates': 10, 'micro_batch': micro_batch},
    'mesh': {'fsdp': fsdp, 'tensor': tensor, 'sequence': sequence, 'expert': expert},
    'checkpoint': {'every': 50},
  }
  if weights:
    config['roles'] = {'policy': {'init': weights, 'template': 'chat_think'}}
  if objective == 'sft':
    config['data']['max_length'] = prompt_length + length
    return ConfigDict(config)
  config['data']['max_prompt_length'] = prompt_length
  config['rollout'] = {'max_completion_length': length}
  config['rewards'] = {'functions': ('accuracy', 'format')}
  if objective == 'grpo':
    config['objective'] |= {'num_generations': 8, 'beta': 0.001}
  return ConfigDict(config)
