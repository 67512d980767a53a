"""Programs compiled for TPU slices by their own compiler, which needs no TPU; what their text says; and what a plan makes of it."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from rl_reasoning import build, config, families, hlo, model, phases, roofline, sharding, stored
from rl_reasoning.presets import PRESETS
from tests.slices import needs_compiler

OBJECTIVES = ('sft', 'reward_model', 'dpo', 'ppo', 'grpo', 'distill')
V, TEACHER = PRESETS['tiny'].vocab_size, ''


@pytest.fixture(scope='module')
def planner(tmp_path_factory):
  from launch import plan

  plan.CACHE, teacher = tmp_path_factory.mktemp('plans'), tmp_path_factory.mktemp('teacher')
  (teacher / 'config.json').write_text(json.dumps(families.hf_config(PRESETS['tiny'], 'lm')))
  global TEACHER
  TEACHER = str(teacher)
  jax.config.update('jax_enable_compilation_cache', False)  # programs for devices that are not there cannot be read back
  yield plan
  jax.config.update('jax_enable_compilation_cache', True)


def settings_of(objective, **mesh):
  """Of a tiny run; the weights of a teacher are never read."""
  settings = config.read_file(f'configs/tiny.py:objective={objective}')
  if objective == 'distill':
    settings = config.merge(settings, {'roles': {'teacher': {'init': TEACHER, 'tokenizer': 'bytes'}}})
  return config.merge(settings, {'model': {'dtype': 'bfloat16', 'remat': 'full'}, 'mesh': mesh})


def run_for(planner, objective, topology, **mesh):
  settings = settings_of(objective, **mesh)
  return build.build(config.resolve(settings), set(config.flatten(settings)), planner.devices_of(topology, 1), stored.SHAPES)


def compiled(run):
  """name -> (phase, compiled)."""
  state, found = run.init(), {}
  with jax.set_mesh(run.mesh):
    for phase in phases.phases(run, state):
      found[phase.name] = phase, phase.program.lower().compile()
  return found


@needs_compiler
@pytest.mark.parametrize(
  ('topology', 'objective'),
  [
    *(('v5e:2x4', name) for name in OBJECTIVES),
    *(pytest.param('v6e:2x4', name, marks=pytest.mark.prove) for name in OBJECTIVES),
  ],
)
def test_every_phase_compiles(planner, topology, objective):
  """Failure: a program of a step does not compile for a TPU slice, or gathers the logits, or the weights of more than a layer at once, or
  keeps a whole cache on every device."""
  run = run_for(planner, objective, topology, data=1, fsdp=4, tensor=2)
  found = compiled(run)
  rolls = 'rollout' in run.objective.sources
  wanted = {'prepare', 'update'} | ({'prefill', 'relayout', 'decode'} if rolls else set())
  assert wanted <= found.keys() <= wanted | {'score'}
  table = model.weight_table(run.arch, run.objective.heads['policy'])
  of_a_layer = max(math.prod(w.shape[1:]) for stack in run.arch.stacks for w in table[stack].values())
  largest = 2 * max(of_a_layer, V // 2 * run.arch.hidden_size)  # bytes; along tensor nothing is gathered
  for name, (_, program) in found.items():
    for one in hlo.collectives(program.as_text(), run.mesh):
      assert str(V) not in one.shapes.replace('[', ',').replace(']', ',').split(','), (name, one)
      if one.kind == 'all-gather' and one.axes == ('fsdp',) and 's32' not in one.shapes:
        assert one.size <= largest, (name, one)
  if rolls:
    phase, program = found['decode']
    shards = program.input_shardings[0]
    for x, sharding_of in zip(jax.tree.leaves(phase.arguments[2:]), jax.tree.leaves(shards[2:6]), strict=True):
      if len(x.shape) in (4, 5):
        assert math.prod(sharding_of.shard_shape(x.shape)) * run.mesh.size == math.prod(x.shape)


HLO = """
%cond.1 (arg: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[] constant(28)
  ROOT %compare.1 = pred[] compare(%gte, %constant.3), direction=LT
}
%all-reduce-scatter.2 (input: bf16[64,64]) -> bf16[16,64] {
  %all-reduce.9 = bf16[64,64]{1,0} all-reduce(%input), channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
}
%body.1 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather.1 = bf16[64,16]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %fusion.7 = bf16[16,64] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.2
}
%beside.1 (arg: bf16[2]) -> bf16[64,16] {
  %all-gather.1 = bf16[64,16]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%tuple), condition=%cond.1, body=%body.1
  %all-reduce.2 = (f32[32,48], f32[]) all-reduce(%a, %b), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add
  %all-to-all.1 = bf16[4,2] all-to-all(%c), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  %all-reduce.3 = f32[5] all-reduce(%c), channel_id=6, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}
  %all-reduce.4 = f32[5] all-reduce(%c), channel_id=7, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}
"""


def test_collectives_of_a_text():
  """Failure: a collective is missed or counted twice, its loop, bytes or axes are misread, or what talks to nobody is counted."""
  mesh = sharding.make_mesh(1, 4, 2)
  found = {(c.kind, c.shapes): c for c in hlo.collectives(HLO, mesh)}
  assert len(found) == 5
  gather = found['all-gather', 'bf16[64,16]']
  assert (gather.axes, gather.devices, gather.size, gather.count) == (('fsdp',), 4, 2048, 28)
  assert gather.wire == pytest.approx(28 * 2048 * 3 / 4)
  scatter = found['reduce-scatter', 'bf16[64,64]']
  assert (scatter.axes, scatter.size, scatter.count, scatter.wire) == (('fsdp',), 8192, 28, 28 * 8192 * 3 / 4)
  both = found['all-reduce', 'f32[32,48] f32[]']
  assert (both.axes, both.size, both.wire) == (('tensor',), 6148, 6148)
  assert found['all-to-all', 'bf16[4,2]'].axes == ('fsdp',)
  assert found['all-reduce', 'f32[5]'].axes == ('tensor',)


def test_flops():
  """Failure: a matmul in a scan, a branch, a recomputation or a shard_map is counted once too often or too rarely."""

  def layer(x, w):
    return jnp.tanh(x @ w), None

  x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
  once = 2 * 8 * 16 * 16
  assert roofline.flops(jax.make_jaxpr(lambda x, w: jax.lax.scan(layer, x, w))(x, w).jaxpr) == 5 * once
  either = jax.make_jaxpr(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0]))(x)
  assert roofline.flops(either.jaxpr) == 2 * once
  loss = lambda w: jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()  # noqa: E731
  assert roofline.flops(jax.make_jaxpr(jax.grad(loss))(w).jaxpr) == 5 * 4 * once  # forward, again, and two matmuls backward
  mesh = sharding.make_mesh(8, 1, 1)
  with jax.set_mesh(mesh):
    cut = jax.shard_map(lambda x: x @ w[0], in_specs=jax.P('data'), out_specs=jax.P('data'), axis_names={'data'})
    assert roofline.flops(jax.make_jaxpr(cut)(x).jaxpr) == once


def test_batch_shapes_are_those_of_a_step(planner):
  """Failure: a plan is of other rows than those that the run collects."""
  from rl_reasoning import collect, data, metrics

  for objective in ('grpo', 'dpo', 'sft'):
    settings = config.merge(settings_of(objective, data=8), {'model': {'dtype': 'float32', 'remat': 'none'}})
    settings['data'] |= {'batch_size': 8}
    run = build.build(config.resolve(settings), set(config.flatten(settings)))
    with jax.set_mesh(run.mesh):
      rows, state = data.open_train(run.config.data, 0), run.init()
      state = state.replace(cursor={**rows.first(), **state.cursor})
      got = collect.collect(run, rows, state, jax.random.key(0), metrics.PhaseTimer()).batch
    planned = phases.batch_shapes(run)
    assert jax.tree.structure(got) == jax.tree.structure(planned)
    T = got.tokens.shape[1]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(planned), strict=True):
      like = tuple(phases.row_length(run) if n == T and i == 1 else n for i, n in enumerate(x.shape))
      assert (like, x.dtype) == (y.shape, y.dtype) and phases.row_length(run) >= T


@needs_compiler
def test_plan(planner, tmp_path, capsys, monkeypatch):
  """Failure: the command does not say whether a run fits, its parts do not add up, or a second look compiles again."""
  path = tmp_path / 'plan.json'
  argv = ['--config=configs/tiny.py:objective=sft', '--topology=v5e:2x4', f'--json={path}', '--config.mesh.fsdp=8']
  assert planner.command(argv) == 0
  found = json.loads(path.read_text())
  text = capsys.readouterr().out
  assert 'predicted, not measured' in text and text.rstrip().endswith('fits') and len(list(planner.CACHE.glob('*.json'))) == 1
  update = found['phases'][-1]
  assert update['phase'] == 'update' and sum(update['memory'].values()) == pytest.approx(update['peak'], rel=0.01)
  assert update['memory']['optimizer'] == pytest.approx(2 * update['memory']['params'], rel=0.01)
  assert update['bound'] in update['seconds'] and 0 < update['mfu'] < 1
  path.unlink()
  monkeypatch.setattr(planner, 'measured', None)
  assert planner.command(argv) == 0 and json.loads(path.read_text()) == found


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--topology=v9z:2x2'], 'v5e'),
    (['--topology=v5e:5x5'], '--topology=v5e:5x5'),
    ([], '--topology=NAME is missing'),
    (['--topology=v5e:2x4', '--slices=none'], '--slices=none'),
    (['--topology=v5e:2x4', '--config.mesh.fsdp=3'], "'fsdp': 3"),
  ],
)
@needs_compiler
def test_bad_plans(planner, flags, says):
  """Failure: what is wrong of a slice or a mesh is not named."""
  with pytest.raises(config.ConfigError, match=says):
    planner.command(['--config=configs/tiny.py', *flags])


@needs_compiler
def test_too_large(planner, capsys):
  """Failure: a run that cannot fit is said to fit, or nothing is said of what would help."""
  argv = ['--config=configs/grpo_math.py:model=llama-3.1-70b,objective=sft,fsdp=8,prompts=8', '--topology=v5e:2x4']
  assert planner.command(argv) == 1
  out = capsys.readouterr().out
  assert 'does not fit' in out and 'try mesh.fsdp=16' in out


@needs_compiler
@pytest.mark.prove
def test_weak_scaling(planner):
  """Failure: with more devices, and rows as many times more, a device computes more, or gathers more bytes than those
  weights once a pass."""
  told = {}
  for topology, fsdp in (('v5e:2x4', 8), ('v5e:4x8', 32), ('v5e:16x16', 256)):
    settings = config.merge(settings_of('sft', data=1, fsdp=fsdp), {'data': {'batch_size': 2 * fsdp, 'train_size': 1024}})
    settings['model'] = {**settings['model'], 'arch': {'hidden_size': 256}}
    run = build.build(config.resolve(settings), set(config.flatten(settings)), planner.devices_of(topology, 1), stored.SHAPES)
    phase, program = compiled(run)['update']
    moved = [one for one in hlo.collectives(program.as_text(), run.mesh) if one.axes == ('fsdp',)]
    gathered = sum(one.size * one.count for one in moved if one.kind == 'all-gather')
    told[fsdp] = roofline.flops(phase.program.jaxpr.jaxpr) / fsdp, program.cost_analysis()['flops'], gathered
  for flops, by_compiler, gathered in told.values():
    assert flops == pytest.approx(told[8][0], rel=1e-6)
    assert by_compiler == pytest.approx(told[8][1], rel=0.05)
    assert gathered == pytest.approx(told[8][2], rel=0.05)
