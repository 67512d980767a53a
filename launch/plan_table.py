"""The plans that the README shows: published models on TPU slices, one after the other.

  python -m launch.plan_table --json=FILE [--only=NAME|NAME]

What FILE holds of others stays.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

from rl_reasoning.config import Parser, check, exit_code

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


def planned(spec: str, topology: str, slices: int) -> dict:
  """The plan of a process of its own: a compiler that crashes takes nobody with it."""
  argv = ['-m', 'launch.plan', f'--config={spec}', f'--topology={topology}', *([f'--slices={slices}'] if slices > 1 else [])]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'plan.json'
    code = subprocess.run([sys.executable, *argv, f'--json={path}']).returncode
    check(path.exists(), f'python {" ".join(argv)} ended with {code}')
    return {**json.loads(path.read_text()), 'command': ' '.join(['python', *argv]), 'commit': commit()}


def command(argv: list[str]) -> None:
  parser = Parser(prog='launch.plan_table')
  parser.add_argument('--json', required=True)
  parser.add_argument('--only', help='names, with | between them')
  flags = parser.parse_args(argv)
  path = pathlib.Path(flags.json)
  plans = json.loads(path.read_text())['plans'] if path.exists() else {}
  for name in flags.only.split('|') if flags.only else PLANS:
    check(name in PLANS, f'--only={name}: none of {", ".join(PLANS)}')
    plans[name] = planned(*PLANS[name])
    plans = {name: plans[name] for name in PLANS if name in plans}
    note = 'Predicted, not measured: memory is what the TPU compiler says, times are those of a roofline.'
    path.write_text(json.dumps({'note': note, 'plans': plans}, indent=1))
  print(table(plans))


if __name__ == '__main__':
  sys.exit(exit_code(command, sys.argv[1:]))
