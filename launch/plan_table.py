"""The plans that the README shows: published models on TPU slices, one after the other.

  python -m launch.plan_table --json=FILE [--only=NAME,NAME]

Plans that FILE holds already, of the same code and libraries, are not made again (launch/plan.py keeps them).
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

from launch import plan
from rl_reasoning import config as config_lib
from rl_reasoning.config import Parser, check

MATH = 'configs/grpo_math.py:'
PLANS = {  # name -> (config, topology, slices)
  'Qwen2.5-1.5B GRPO': (MATH + 'model=qwen2.5-1.5b,fsdp=16,micro_batch=64', 'v5e:4x4', 1),
  'Llama-3.1-8B GRPO': (MATH + 'model=llama-3.1-8b,fsdp=16,micro_batch=64', 'v5p:2x2x4', 1),
  'Llama-3.1-8B PPO': (MATH + 'model=llama-3.1-8b,objective=ppo,prompts=512,fsdp=32,micro_batch=128', 'v5p:2x4x4', 1),
  'Llama-3.1-70B GRPO': (MATH + 'model=llama-3.1-70b,prompts=256,fsdp=64,tensor=8,micro_batch=256', 'v5p:8x8x8', 1),
  'Qwen3-30B-A3B GRPO': (MATH + 'model=qwen3-30b-a3b,fsdp=8,expert=8,micro_batch=256', 'v5p:4x4x4', 1),
  'DeepSeek-V3 GRPO': (MATH + 'model=deepseek-v3,prompts=256,fsdp=8,tensor=8,expert=8,micro_batch=512', 'v5p:8x8x8', 1),
  'Qwen2.5-7B GRPO, two slices': (MATH + 'model=qwen2.5-7b,prompts=512,fsdp=256,micro_batch=512', 'v5e:16x16', 2),
  'Llama-3.1-70B SFT': (MATH + 'model=llama-3.1-70b,objective=sft,length=3840,prompts=256,fsdp=64,micro_batch=256', 'v5p:4x4x4', 1),
  'Llama-3.1-8B GRPO, 32k tokens': (
    MATH + 'model=llama-3.1-8b,length=32256,prompt_length=512,prompts=64,fsdp=8,sequence=8,micro_batch=8', 'v5p:4x4x4', 1
  ),
}  # fmt: skip


def commit() -> str:
  return subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()


def table(found: dict[str, dict]) -> str:
  lines = ['| run | slice | phase | HBM GiB | of | bound | tokens/s/chip | MFU |', '|---|---|---|---|---|---|---|---|']
  for name, p in found.items():
    where = f'{p["topology"]} x {p["slices"]}' if p['slices'] > 1 else p['topology']
    for phase in p['phases']:
      if phase['phase'] in ('relayout', 'prepare'):
        continue
      if 'seconds' not in phase:
        lines.append(f'| {name} | {where} | {phase["phase"]} | over | {phase["limit"] / 2**30:.1f} | | | |')
        continue
      rate, mfu = phase['tokens_per_second_per_device'], phase['mfu']
      lines.append(
        f'| {name} | {where} | {phase["phase"]} | {phase["peak"] / 2**30:.1f} | {phase["limit"] / 2**30:.1f} | {phase["bound"]} | '
        f'{rate:,.0f} | {f"{mfu:.0%}" if mfu is not None else ""} |'
      )
      name = where = ''
  return '\n'.join(lines)


def command(argv: list[str]) -> None:
  parser = Parser(prog='launch.plan_table')
  parser.add_argument('--json', required=True)
  parser.add_argument('--only', default=','.join(PLANS), help='names, by | where a name has a comma')
  flags = parser.parse_args(argv)
  path = pathlib.Path(flags.json)
  held = json.loads(path.read_text()) if path.exists() else {'plans': {}}
  chosen = list(PLANS) if flags.only == ','.join(PLANS) else flags.only.split('|')
  for name in chosen:
    check(name in PLANS, f'--only={name}: none of {", ".join(PLANS)}')
    spec, topology, slices = PLANS[name]
    settings = config_lib.read_file(spec)
    found = plan.plan(config_lib.resolve(settings), set(config_lib.flatten(settings)), topology, slices)
    more = f' --slices={slices}' if slices > 1 else ''
    held['plans'][name] = {
      **found,
      'command': f'python -m launch.plan --config={spec} --topology={topology}{more}',
      'commit': commit(),
    }
    held['plans'] = {name: held['plans'][name] for name in PLANS if name in held['plans']}
    held |= {'note': 'Predicted, not measured: memory is what the TPU compiler says, times are those of a roofline.'}
    path.write_text(json.dumps(held, indent=1))
    print(name, plan.text_of(found), sep='\n', end='\n\n', flush=True)
  print(table(held['plans']))


if __name__ == '__main__':
  sys.exit(config_lib.exit_code(command, sys.argv[1:]))
