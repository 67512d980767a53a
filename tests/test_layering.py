"""Who imports whom: the levels of the design, read from the sources."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LEVELS = (
  ('structs', 'config', 'environment', 'preemption', 'arch'),
  (
    'distributed',
    'sharding',
    'tokenizer',
    'gguf_tokenizer',
    'sampling',
    'losses',
    'advantages',
    'estimates',
    'rank_metrics',
    'answer_file',
    'api',
    'hlo',
    'verify',
  ),
  (
    'tasks',
    'lora',
    'rope',
    'splash',
    'attention',
    'kv_cache',
    'decode_attention',
    'experts',
    'model',
    'data',
    'preferences',
    'dedup',
    'optim',
  ),
  ('presets', 'families', 'tensors', 'weights', 'rollout', 'rule_rewards', 'rewards', 'reward_models', 'objectives', 'roofline'),
  ('train_step', 'stored', 'resolution', 'build', 'collect', 'checkpoint', 'metrics', 'tables'),
  (
    'evaluators',
    'ranking_evaluator',
    'evaluate',
    'win_rate',
    'rounds',
    'inference_methods',
    'inference',
    'train',
    'phases',
    'chat',
    'generate',
    'data_settings',
    'data_kept',
    'data_from_checkpoint',
    'data_from_api',
    'data_from_sets',
    'data_written',
    'datagen',
    'filters',
    'judge',
    'verified_pairs',
    'lm_eval_adapter',
  ),
  ('manifest', 'stages', 'pipeline', 'report'),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_name(path: pathlib.Path) -> str:
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module_name(path): path for path in sorted((ROOT / 'rl_reasoning').rglob('*.py'))}


def part(module: str) -> str:
  """The name in the table: that of a module, or of the folder it is in. A folder's command line stands with the other commands."""
  return 'evaluate' if module.endswith('.__main__') else module.split('.')[1]


def named(path: pathlib.Path) -> set[str]:
  """Every name that a file imports anywhere, inside functions too: of `from a import b` both a and a.b."""
  found: set[str] = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno}: a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names} | {str(node.module)}
  return found


def imports(module: str) -> set[str]:
  """Our modules that this one imports. What holds them (the package, a folder's __init__) counts only by itself."""
  found = named(MODULES[module]) & MODULES.keys()
  return {name for name in found if not any(other.startswith(name + '.') for other in found)}


@pytest.mark.parametrize('module', [name for name in MODULES if name != 'rl_reasoning'])
def test_imports_go_down(module):
  """Failure: a module is missing from the table of levels, or knows of one above it."""
  assert part(module) in LEVEL, f'{module} has no level in tests/test_layering.py'
  upward = {other for other in imports(module) if LEVEL[part(other)] > LEVEL[part(module)]}
  assert not upward, f'{module} imports {sorted(upward)}'


def test_no_cycle():
  """Failure: modules import one another in a circle, so that none can be read first."""
  order = list(graphlib.TopologicalSorter({module: imports(module) for module in MODULES}).static_order())
  assert set(order) == MODULES.keys()
  assert order.index('rl_reasoning.structs') < order.index('rl_reasoning.train')  # the parser sees imports at all


def test_package_is_empty():
  """Failure: importing any module runs code of the package, which may import jax."""
  assert not MODULES['rl_reasoning'].read_text().strip()


LAUNCH = {module_name(path): path for path in sorted((ROOT / 'launch').rglob('*.py'))}
LIGHT = {name: path for name, path in {**MODULES, **LAUNCH}.items() if name.startswith(('rl_reasoning.verify', 'launch'))}
LIGHT.pop('launch.plan', None)


@pytest.mark.parametrize('module', LIGHT)
def test_no_jax(module):
  """Failure: a reward worker or a launcher takes seconds to start, or grabs the accelerator."""
  assert not {name for name in named(LIGHT[module]) if name.split('.')[0] in ('jax', 'flax', 'optax', 'orbax')}
  code = f'import sys, {module}; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
