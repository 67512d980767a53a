"""The DPO family against objectives.md, written once more as plain loops in float64; its invariances, its refusals, its words."""

import dataclasses
import functools
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rl_reasoning import evaluators, metrics
from rl_reasoning.advantages import weigh
from rl_reasoning.config import Config, Role, Roles
from rl_reasoning.objectives.grpo import Given
from rl_reasoning.objectives.preference import SETTINGS, Preference
from rl_reasoning.structs import DATA, ROLLOUT, Batch
from tests.test_grpo import BANDIT, learn

U, N, T = 6, 12, 14  # four columns at the end are padding in every row
TIE, ABSENT, TURNED = 2, 4, 3  # units: equal ranks; too long; the data name the worse response first

# objectives.md, and what the papers and TRL use.
DEFAULTS = {
  'loss_type': 'sigmoid', 'beta': 0.1, 'num_generations': None, 'average_log_prob': False, 'label_smoothing': 0.0, 'rpo_alpha': 0.0,
  'simpo_gamma': 1.0, 'orpo_lambda': 0.1, 'kto_desirable': 1.0, 'kto_undesirable': 1.0, 'cpl_alpha': 0.1, 'cpl_gamma': 1.0,
  'cpl_lambda': 0.5, 'ref_model_sync_updates': None, 'ref_model_ema': None,
}  # fmt: skip
TABLE = {
  'dpo': {}, 'ipo': {'loss_type': 'ipo'}, 'hinge': {'loss_type': 'hinge'}, 'simpo': {'loss_type': 'simpo', 'beta': 2.0},
  'orpo': {'loss_type': 'orpo'}, 'kto': {'loss_type': 'kto'}, 'cpl': {'loss_type': 'cpl'}, 'online_dpo': {'num_generations': 2},
}  # fmt: skip


def make(name: str = 'dpo', **keys) -> Preference:
  return Preference(**{'name': name, **SETTINGS[name], **keys})


def ragged(rng, rows: int) -> tuple[np.ndarray, np.ndarray]:
  """(segment, mask) of prompts and completions; a token inside some completions was not sampled by the policy."""
  prompt, length = rng.integers(1, 4, rows), rng.integers(2, 7, rows)
  place = np.arange(T)
  segment = place < (prompt + length)[:, None]
  mask = segment & (place >= prompt[:, None])
  mask[0, prompt[0]] = mask[3, prompt[3] + 1] = False
  return segment.astype(np.int32), mask.astype(np.float64)


@functools.cache
def make_rows(kto: bool = False) -> SimpleNamespace:
  """float64. What a token outside the mask holds would be seen in any sum. The first token of a row is its number in the net's table."""
  rng = np.random.default_rng(7)
  segment, mask = ragged(rng, N)
  logp, ref = rng.normal(-2, 0.7, (N, T)), rng.normal(-2, 0.7, (N, T))
  extras = {'present': np.ones(N), 'rank': np.tile([0.0, 1.0], U), 'margin': np.full(N, 7.0)}
  gone = [2 * ABSENT, 2 * ABSENT + 1]
  if kto:  # rows 2 n + 1 are mismatched: one of them is absent by itself
    extras = {'present': np.ones(N), 'label': np.repeat([1.0, 0.0, 1.0, 0.25, 1.0, 0.0], 2)}
    gone.append(3)
  else:
    extras['rank'][[2 * TIE, 2 * TIE + 1]] = 3.0
    extras['rank'][[2 * TURNED, 2 * TURNED + 1]] = 1.0, 0.0
  segment[gone], mask[gone], extras['present'][gone] = 0, 0.0, 0.0
  tokens = np.tile(np.arange(N, dtype=np.int32)[:, None], (1, T))

  def outside(x, value):
    return np.where(mask > 0, x, value)

  return SimpleNamespace(
    tokens=tokens, segment=segment, mask=mask, extras=extras, logp=outside(logp, -40.0), ref=outside(ref, 3.0),
    old=outside(logp + 0.5, 9.0),
  )  # fmt: skip


def to_batch(rows, kto: bool) -> Batch:
  return Batch(
    tokens=rows.tokens, segment_NT=rows.segment, position_NT=np.tile(np.arange(T, dtype=np.int32), (N, 1)), mask_NT=rows.mask,
    source_N=np.full(N, DATA, np.int32), group_N=np.repeat(np.arange(U, dtype=np.int32), 2), logp_ref_NT=rows.ref,
    logp_old_NT=rows.old if kto else None, extras=rows.extras,
  )  # fmt: skip


def table_net(params, rows):
  """A network whose log-probabilities are its parameters, one row of them for each number of a row."""
  return params[rows.tokens[:, 0]], None


NETS = {role: SimpleNamespace(logp=table_net) for role in ('policy', 'ref')}


def weighed(objective, batch: Batch) -> Batch:
  return batch.replace(
    weight_NT=weigh(batch.mask_NT, batch.segment_NT, batch.source_N, objective.aggregation, 1, objective.rows_together)
  )


def learned(objective, params, batch):
  """((loss, metrics), gradient) of rows that are weighed."""
  return jax.value_and_grad(lambda p: objective.loss(NETS, {'policy': p}, {}, {}, batch), has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def prepared(objective, batch):
  batch, _, first = objective.prepare({}, batch)
  return weighed(objective, batch), first


def run(objective, params, batch):
  """(batch, metrics of prepare, what `learned` gives). Pairs of data are prepared by one program, whatever is learned from them; the
  learning is not compiled as a whole: its operations are, once for all losses."""
  batch, first = prepared(make('dpo' if objective.paired else 'kto'), batch)
  return batch, first, learned(objective, params, batch)


def sigmoid(x: float) -> float:
  return 1 / (1 + math.exp(-x))


def completion(rows, logp, n: int) -> dict:
  """What the loss may know of row n."""
  here = np.flatnonzero(rows.mask[n])
  lp = logp[n, here]
  return {'lp': lp, 'sum': lp.sum(), 'mean': lp.mean(), 'h': (lp - rows.ref[n, here]).sum(), 'length': len(here)}


def expected_pairs(k: dict, rows, logp) -> tuple[float, dict]:
  """(loss, metrics) as objectives.md says, in loops."""
  total, seen = [], []
  for u in range(U):
    if u in (TIE, ABSENT):
      continue
    w, loser = (completion(rows, logp, 2 * u + (i != (u == TURNED))) for i in (False, True))
    odds = [math.log(math.exp(c['mean']) / (1 - math.exp(c['mean']))) for c in (w, loser)]
    h = [c['h'] / (c['length'] if k['average_log_prob'] else 1) for c in (w, loser)]
    match k['loss_type']:
      case 'sigmoid' | 'ipo' | 'hinge':
        r = [k['beta'] * x for x in h]
      case 'simpo':
        r = [k['beta'] * c['mean'] for c in (w, loser)]
      case 'orpo':
        r = [k['orpo_lambda'] * c['mean'] for c in (w, loser)]
      case 'cpl':
        r = [k['cpl_alpha'] * sum(k['cpl_gamma'] ** t * x for t, x in enumerate(c['lp'])) for c in (w, loser)]
    D, e = r[0] - r[1], k['label_smoothing']
    loss = {
      'sigmoid': -(1 - e) * math.log(sigmoid(D)) - e * math.log(sigmoid(-D)),
      'ipo': (h[0] - h[1] - 1 / (2 * k['beta'])) ** 2,
      'hinge': max(0.0, 1 - D),
      'simpo': -math.log(sigmoid(D - k['simpo_gamma'])),
      'orpo': -w['mean'] - k['orpo_lambda'] * math.log(sigmoid(odds[0] - odds[1])),
      'cpl': -math.log(math.exp(r[0]) / (math.exp(r[0]) + math.exp(k['cpl_lambda'] * r[1]))),
    }[k['loss_type']]
    total.append(loss - k['rpo_alpha'] * w['mean'])
    seen.append([r[0], r[1], D, D > 0, w['sum'], loser['sum'], -w['mean'], odds[0] - odds[1]])
  names = ['rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies', 'logps/chosen', 'logps/rejected']
  names += ['nll_loss'] * bool(k['loss_type'] == 'orpo' or k['rpo_alpha']) + ['log_odds_chosen'] * (k['loss_type'] == 'orpo')
  return np.mean(total), dict(zip(names, np.mean(seen, axis=0)))


def expected_kto(k: dict, rows, logp) -> tuple[float, dict]:
  """z0 is of rows.old and stands still, whatever logp is."""
  alive = [n for n in range(1, N, 2) if rows.mask[n].any()]
  z0 = max(0.0, np.mean([completion(rows, rows.old, n)['h'] for n in alive]))
  total, sides = [], {'chosen': [], 'rejected': []}
  for n in range(0, N, 2):
    if not rows.mask[n].any():
      continue
    c, label = completion(rows, logp, n), rows.extras['label'][n]
    good = k['kto_desirable'] * (1 - sigmoid(k['beta'] * (c['h'] - z0)))
    bad = k['kto_undesirable'] * (1 - sigmoid(k['beta'] * (z0 - c['h'])))
    total.append(label * good + (1 - label) * bad)
    for side, share in (('chosen', label), ('rejected', 1 - label)):
      sides[side].append((share, share * k['beta'] * c['h'], share * c['sum']))
  seen = {'kl': z0}
  for side, values in sides.items():
    share, reward, logps = np.sum(values, axis=0)
    seen |= {f'rewards/{side}': reward / share, f'logps/{side}': logps / share}
  return np.mean(total), seen


CASES = {name: {'name': name} for name in TABLE if name != 'online_dpo'} | {
  'dpo, smoothed': {'label_smoothing': 0.2, 'beta': 0.7},
  'dpo, averaged, with an SFT term': {'average_log_prob': True, 'rpo_alpha': 0.3, 'beta': 2.0},
  'ipo, averaged': {'name': 'ipo', 'average_log_prob': True, 'beta': 0.4},
  'hinge, beyond its corner': {'name': 'hinge', 'beta': 1.5},
  'simpo, no margin': {'name': 'simpo', 'simpo_gamma': 0.0, 'rpo_alpha': 0.2},
  'orpo, heavy': {'name': 'orpo', 'orpo_lambda': 1.7},
  'kto, uneven': {'name': 'kto', 'kto_desirable': 1.3, 'kto_undesirable': 0.6, 'beta': 0.4},
  'cpl, discounted': {'name': 'cpl', 'cpl_gamma': 0.8, 'cpl_lambda': 0.9, 'cpl_alpha': 0.6},
}


@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradient(case):
  """Failure: loss, metrics or gradient are not those of objectives.md (the gradient by finite differences of the loops), a tie or an absent
  unit counts in a mean or has a gradient, or, in KTO, a mismatched row does, or z0 has one."""
  k = {**DEFAULTS, **TABLE[CASES[case].get('name', 'dpo')], **CASES[case]}
  kto = k['loss_type'] == 'kto'
  objective, rows, reference = make(**CASES[case]), make_rows(kto), expected_kto if kto else expected_pairs
  with jax.enable_x64(True):
    batch, first, ((value, more), grad) = jax.device_get(run(objective, rows.logp, to_batch(rows, kto)))
  wanted, seen = reference(k, rows, rows.logp)
  assert value == pytest.approx(wanted, rel=1e-10)
  assert metrics.summarise({**first, **more} if kto else more) == pytest.approx(
    {**seen, 'frac_absent': 1 / 6, 'frac_absent_mismatched': 2 / 6} if kto else seen, rel=1e-10
  )
  assert batch.weight_NT.sum() == pytest.approx(1) and batch.tokens.shape[0] == U * objective.update_rows
  counted = rows.mask.copy()
  counted[1::2] *= not kto
  counted[[2 * TIE, 2 * TIE + 1]] *= kto
  assert np.all(grad[counted == 0] == 0) and np.any(grad != 0)
  rng, eps = np.random.default_rng(0), 1e-5
  for _ in range(3):
    x = rng.normal(size=(N, T))
    slope = (reference(k, rows, rows.logp + eps * x)[0] - reference(k, rows, rows.logp - eps * x)[0]) / (2 * eps)
    assert np.sum(grad * x) == pytest.approx(slope, rel=1e-6, abs=1e-10)
  if kto:
    assert seen['kl'] > 0  # else the case has seen no z0
  else:
    found = metrics.summarise(first)
    assert found == pytest.approx({'frac_ties': 1 / 5, 'frac_absent': 1 / 6})
    assert batch.tokens[2 * TURNED : 2 * TURNED + 2, 0].tolist() == [2 * TURNED + 1, 2 * TURNED]


def test_the_corner_of_hinge_is_seen():
  """Failure: the golden case of hinge has no pair on the flat side, so its corner is not tried."""
  rows, margins = make_rows(), []
  for u in set(range(U)) - {TIE, ABSENT}:
    chosen, rejected = (completion(rows, rows.logp, 2 * u + (i != (u == TURNED)))['h'] for i in (False, True))
    margins.append(CASES['hinge, beyond its corner']['beta'] * (chosen - rejected))
  assert min(margins) < 1 < max(margins)


def shifted(batch: Batch, by: int) -> Batch:
  """Padding moves from the right to the left."""

  def roll(x):
    return np.roll(x, by, axis=1) if np.ndim(x) == 2 and x.shape == (N, T) else x

  return jax.tree.map(roll, batch).replace(tokens=batch.tokens)


@pytest.mark.parametrize('name', ['dpo', 'simpo', 'orpo', 'kto', 'cpl, discounted'])
def test_invariances(name):
  """Failure: loss or gradient depend on the side of the padding, on the order of the units, on the split into micro-batches, or on what
  tokens outside the mask hold (0 * inf of a padding token makes all of it NaN, OpenRLHF#1240)."""
  objective, kto = make(**CASES[name]), name == 'kto'
  rows = make_rows(kto)
  base = to_batch(rows, kto)
  order = (np.array([3, 5, 0, 4, 1, 2])[:, None] * 2 + np.arange(2)).reshape(-1)
  logp, ref, old = (np.where(rows.mask > 0, x, y) for x, y in ((rows.logp, np.inf), (rows.ref, -np.inf), (rows.old, np.nan)))
  variants = [
    (np.roll(rows.logp, 4, axis=1), shifted(base, 4), 4),
    (rows.logp, jax.tree.map(lambda x: x[order], base), 0),
    (logp, base.replace(logp_ref_NT=ref, logp_old_NT=old if kto else None), 0),
  ]
  with jax.enable_x64(True):
    batch, _, ((value, more), grad) = jax.device_get(run(objective, rows.logp, base))
    wanted = metrics.summarise(more)
    assert np.isfinite(value)
    for params, other, shift in variants:
      _, _, ((got, found), slope) = jax.device_get(run(objective, params, other))
      assert got == pytest.approx(float(value), rel=1e-9)
      np.testing.assert_allclose(np.roll(slope, -shift, axis=1), grad, rtol=1e-9, atol=1e-12)
      assert metrics.summarise(found) == pytest.approx(wanted, rel=1e-9)
    # A micro-batch holds some units and their weights; here the others are all zeros, which is one shape less to compile.
    parts = np.arange(len(batch.tokens)) // (2 * objective.rows_together) == np.arange(3)[:, None]
    parts = [jax.tree.map(lambda x, own=own: (x.T * own).T.astype(x.dtype), batch) for own in parts]
    results = [jax.device_get(learned(objective, rows.logp, part)) for part in parts]
  assert sum(r[0][0] for r in results) == pytest.approx(float(value), rel=1e-9)
  np.testing.assert_allclose(sum(r[1] for r in results), grad, rtol=1e-9, atol=1e-12)
  merged = functools.reduce(metrics.merge, [r[0][1] for r in results])
  assert metrics.summarise(merged) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize('name', ['dpo', 'kto'])
def test_sizes(name):
  """Failure: loss or gradient change with the columns of padding, or the rows of a smaller micro-batch add up to something else."""
  objective, kto = make(name), name == 'kto'
  rows, together = make_rows(kto), objective.rows_together
  with jax.enable_x64(True):
    batch, _, ((value, _), grad) = jax.device_get(run(objective, rows.logp, to_batch(rows, kto)))
    parts = [range(start, start + U // 2 * together) for start in (0, U // 2 * together)]
    narrow = [jax.tree.map(lambda x, part=part: x[part, ...] if x.ndim == 1 else x[part, :10], batch) for part in parts]
    compiled = jax.jit(learned, static_argnums=0)
    results = [jax.device_get(compiled(objective, rows.logp[:, :10], part)) for part in narrow]
  assert sum(r[0][0] for r in results) == pytest.approx(float(value), rel=1e-9)
  np.testing.assert_allclose(sum(r[1] for r in results), grad[:, :10], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', ['dpo', 'orpo', 'kto'])
def test_nothing_counts(name):
  """Failure: an update in which every pair is a tie, or every row was too long, divides by zero or moves the policy."""
  rows = make_rows(name == 'kto')
  batch = to_batch(rows, name == 'kto')
  if name == 'kto':
    empty = batch.replace(mask_NT=0 * batch.mask_NT, segment_NT=0 * batch.segment_NT)
  else:
    empty = batch.replace(extras={**batch.extras, 'rank': np.zeros(N)})
  with jax.enable_x64(True):
    _, first, ((value, more), grad) = jax.device_get(run(make(name), rows.logp, empty))
  assert value == 0 and np.all(grad == 0)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((first, more)))
  found = metrics.summarise({**first, **more})
  assert 'rewards/chosen' not in found and (found['frac_absent'] == 1 if name == 'kto' else found['frac_ties'] == 1)


def test_dpo_is_the_sigmoid_of_the_implicit_reward_margin():
  """Failure: a policy that is its reference does not lose log 2 with every pair undecided, or the loss is not that of the margin which the
  metrics tell."""
  rows = make_rows()
  with jax.enable_x64(True):
    _, _, ((value, more), _) = jax.device_get(run(make('dpo'), rows.ref, to_batch(rows, False)))
    alone = rows.extras | {'present': np.zeros(N)}
    alone['present'][:2] = 1
    one = to_batch(rows, False).replace(extras=alone)
    _, _, ((single, of_it), _) = jax.device_get(run(make('dpo'), rows.logp, one))
  found = metrics.summarise(more)
  assert value == pytest.approx(math.log(2)) and found['rewards/accuracies'] == 0.5 and found['rewards/margins'] == 0
  of_it = metrics.summarise(of_it)
  assert single == pytest.approx(-math.log(sigmoid(of_it['rewards/chosen'] - of_it['rewards/rejected']))) and single != value


@pytest.mark.parametrize(
  'keys', [{'average_log_prob': True}, {'name': 'simpo'}, {'name': 'orpo'}, {'name': 'cpl', 'cpl_gamma': 0.7}]
)
def test_held_out_pairs_are_ranked_by_the_same_reward(keys, monkeypatch):
  """Failure: an evaluator of kind ranking scores responses by something else than what the objective has trained (for SimPO, by a sum,
  which pays for brevity)."""
  objective, rows, told = make(**keys), make_rows(), []
  monkeypatch.setattr(evaluators, 'masked_logp', lambda params, arch, batch, *_: batch.mask_NT * params)
  monkeypatch.setattr(evaluators.ranking_evaluator, 'evaluate_rankings', lambda scores, *_, **__: told.append(scores) or ({}, []))
  config = Config(roles=Roles(policy=Role(template='plain')))
  seen = SimpleNamespace(config=config, speaks=True, objective=objective, arch=None, tokenizer=None, mesh=None)
  frozen = {'ref': rows.ref} if objective.refers else {}
  with jax.enable_x64(True):
    batch, _, ((_, more), _) = run(objective, rows.logp, to_batch(rows, False))
    evaluators.rank(
      seen, rows.logp[batch.tokens[:, 0]], [], 'held out', {k: v[batch.tokens[:, 0]] for k, v in frozen.items()}, None
    )
    scores = np.asarray(told[0](batch)).reshape(-1, 2)[np.asarray(batch.mask_NT).any(axis=1)[::2]]
  found = metrics.summarise(jax.device_get(more))
  assert scores.mean(axis=0) == pytest.approx([found['rewards/chosen'], found['rewards/rejected']], rel=1e-6)


def test_certain_completions_have_finite_odds():
  """Failure: a completion of probability 1 has infinite odds in ORPO, and the gradient is NaN."""
  rows = make_rows()
  with jax.enable_x64(True):
    for logp in (np.zeros((N, T)), np.where(np.arange(N)[:, None] % 2, rows.logp, 0.0)):
      _, _, ((value, _), grad) = jax.device_get(run(make('orpo'), logp, to_batch(rows, False)))
      assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_reference_point_of_kto():
  """Failure: z0 is negative, is not the mean over the mismatched completions that are present, or these are trained."""
  rows, objective = make_rows(True), make('kto')
  mismatched = [completion(rows, rows.old, n)['h'] for n in range(1, N, 2) if rows.mask[n].any()]
  assert len(mismatched) == 4
  with jax.enable_x64(True):
    batch, found = jax.device_get(prepared(objective, to_batch(rows, True)))
    below, at_zero = jax.device_get(prepared(objective, to_batch(rows, True).replace(logp_old_NT=rows.ref - rows.mask)))
  np.testing.assert_allclose(batch.extras['z0'], np.full((U, T), np.mean(mismatched)))
  assert np.all(below.extras['z0'] == 0) and metrics.summarise(at_zero)['kl'] == 0
  assert metrics.summarise(found)['kl'] == pytest.approx(np.mean(mismatched))
  np.testing.assert_array_equal(batch.tokens[:, 0], np.arange(0, N, 2))
  np.testing.assert_array_equal(batch.mask_NT, rows.mask[::2])
  assert batch.logp_old_NT is None


def test_kto_rows_may_be_packed():
  """Failure: a sum runs over a packed neighbour: two completions in one row lose something else than in two rows."""
  rows, objective = make_rows(True), make('kto')
  first, second, cut, end = 1, 3, 7, 12  # the tokens of both fit into one row
  with jax.enable_x64(True):
    batch, _, _ = jax.device_get(run(objective, rows.logp, to_batch(rows, True)))
    assert batch.segment_NT[first].sum() == cut and batch.segment_NT[second].sum() == end - cut

    def pack(x, a=first, b=second):
      packed = 0 * x
      packed[0, :cut], packed[0, cut:end] = x[a, :cut], x[b, : end - cut]
      return packed

    fields = {name: pack(getattr(batch, name)) for name in ('mask_NT', 'segment_NT', 'logp_ref_NT', 'weight_NT')}
    packed = batch.replace(tokens=0 * batch.tokens, extras={name: pack(batch.extras[name]) for name in ('z0', 'label')}, **fields)
    packed.segment_NT[0, cut:end] = 2
    only = np.isin(np.arange(U), (first, second))[:, None]
    apart = batch.replace(mask_NT=batch.mask_NT * only, weight_NT=batch.weight_NT * only)
    (one, found), slope = jax.device_get(learned(objective, pack(rows.logp, 2 * first, 2 * second), packed))
    (two, wanted), slopes = jax.device_get(learned(objective, rows.logp, apart))
  assert one == pytest.approx(float(two), rel=1e-12) and two != 0
  np.testing.assert_allclose(slope, pack(slopes, 2 * first, 2 * second), rtol=1e-9, atol=1e-15)
  assert metrics.summarise(found) == pytest.approx(metrics.summarise(wanted))


def test_score_reads_what_is_needed():
  """Failure: a pass is spent on a reference that nobody reads, or the reference, or the policy that z0 needs, is missing."""
  rows, calls = make_rows(), []

  def net(params, _):
    calls.append(params)
    return np.full((N, T), len(calls)), None

  nets = {role: SimpleNamespace(logp=net) for role in ('policy', 'ref')}
  bare = to_batch(rows, False).replace(logp_ref_NT=None)
  for name in TABLE:
    calls.clear()
    objective = make(name)
    got = objective.score(nets, {'policy': 'policy'}, {'ref': 'ref'}, bare)
    wanted = {'kto': ['policy', 'ref'], 'simpo': [], 'orpo': [], 'cpl': []}.get(name, ['ref'])
    assert calls == wanted, name
    assert (got.logp_ref_NT is not None) == ('ref' in wanted) and (got.logp_old_NT is not None) == ('policy' in wanted)
    assert objective.frozen == (('ref',) if 'ref' in wanted else ()) and objective.moving == ()
    moves = make(name, ref_model_ema=0.9), make(name, ref_model_sync_updates=3)
    assert all((m.frozen, m.moving) == ((), objective.frozen) for m in moves)


# Pairs of the policy's own samples.

GIVEN = Given(('a', 'b'), (1.0, 0.5), 10)
K = 3


def samples() -> Batch:
  """Four prompts of three: ordinary; two best and two worst ones; all equal; the best has no verdict; one verdict; none."""
  a = [[1, 3, 2], [4, 4, 0], [0.7, 0.7, 0.7], [1, 9, 2], [9, 5, 9], [9, 9, 9]]
  has = [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]
  rng = np.random.default_rng(3)
  rows = 6 * K
  segment, mask = np.ones((rows, 5), np.int32), np.tile(np.float32([0, 1, 1, 1, 0]), (rows, 1))
  rewards = np.stack([np.float32(a).reshape(-1), np.full(rows, 2.0, np.float32)], axis=1)
  verdicts = np.stack([np.float32(has).reshape(-1), np.ones(rows, np.float32)], axis=1)
  return Batch(
    tokens=np.tile(np.arange(rows, dtype=np.int32)[:, None], (1, 5)), segment_NT=segment,
    position_NT=np.tile(np.arange(5, dtype=np.int32), (rows, 1)), mask_NT=mask, source_N=np.full(rows, ROLLOUT, np.int32),
    group_N=np.repeat(np.arange(6, dtype=np.int32), K), logp_sample_NT=np.float32(rng.normal(-2, 0.5, (rows, 5))),
    logp_ref_NT=np.float32(rng.normal(-2, 0.5, (rows, 5))), rewards_NR=rewards, has_reward_NR=verdicts,
    failed_NR=1 - verdicts, truncated_N=np.zeros(rows, np.float32),
  )  # fmt: skip


def test_best_and_worst_of_the_samples():
  """Failure: the pair of a prompt is not the best and the worst of its judged samples (the first among equals), a prompt whose samples
  earned the same or that has fewer than two verdicts is trained, or the means are over the pairs and not over what was sampled."""
  objective, batch = make('online_dpo', num_generations=K, given=GIVEN), samples()
  pairs, first = jax.device_get(prepared(objective, batch))
  chosen, rejected = pairs.tokens[::2, 0].tolist(), pairs.tokens[1::2, 0].tolist()
  alive = [0, 1, 3]
  assert [chosen[u] for u in alive] == [1, 3, 11] and [rejected[u] for u in alive] == [0, 5, 9]
  assert pairs.mask_NT.any(axis=1).tolist() == [u in alive for u in range(6) for _ in range(2)]
  np.testing.assert_array_equal(pairs.group_N, np.repeat(np.arange(6), 2))
  np.testing.assert_array_equal(pairs.logp_ref_NT, batch.logp_ref_NT[pairs.tokens[:, 0]])
  np.testing.assert_allclose(pairs.reward_N[[0, 1]], [4, 2])  # both rewards, weighted
  found = metrics.summarise(first)
  assert (found['frac_ties'], found['frac_absent']) == (pytest.approx(1 / 4), pytest.approx(1 / 3))
  assert found['frac_no_verdict'] == pytest.approx(6 / 18) and found['completions/mean_length'] == 3
  assert found['reward'] == pytest.approx(np.mean([1, 3, 2, 4, 4, 0, 0.7, 0.7, 0.7, 1, 2, 5]) + 1)
  assert found['rewards/a/mean'] == pytest.approx(found['reward'] - 1)
  d = (batch.logp_sample_NT - batch.logp_ref_NT)[:, 1:4].astype(np.float64)
  assert found['kl'] == pytest.approx(np.mean(np.exp(-d) + d - 1), rel=1e-5)
  assert 'kl' not in jax.eval_shape(make('simpo', num_generations=K, given=GIVEN).prepare, {}, batch)[2]
  weights = pairs.weight_NT.reshape(6, -1).sum(axis=1)
  np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 0, 1 / 3, 0, 0], rtol=1e-6)


def test_learns_from_its_own_samples():
  """Failure: through the jitted steps of a run, pairs of the policy's own samples lower the reward by which they were ranked."""
  rewards, found = learn(make('online_dpo', num_generations=8, given=BANDIT), 30)
  assert np.mean(rewards[:2]) < 0.2 and np.mean(rewards[-5:]) > 0.38, rewards
  assert found['rewards/margins'] > 0 and found['loss'] > 0 and found['kl'] > 0


# Config.

REFUSALS = [
  ({'loss_type': 'dpo'}, 'loss_type', "'dpo' is none of sigmoid, ipo, hinge, simpo, orpo, kto, cpl"),
  ({'label_smoothing': 0.5}, 'label_smoothing', '0.5 is not in [0, 0.5)'),
  ({'cpl_gamma': 1.01}, 'cpl_gamma', '1.01 is not in (0, 1]'),
  ({'cpl_lambda': 1.01}, 'cpl_lambda', '1.01 is not in (0, 1]'),
  ({'num_generations': 1}, 'num_generations', '1 must be at least 2'),
  ({'name': 'kto', 'num_generations': 2}, 'num_generations', 'unpaired'),
  ({'ref_model_ema': 1.0}, 'ref_model_ema', 'not in (0, 1)'),
]
REFUSALS += [({f.name: -1}, f.name, '') for f in dataclasses.fields(Preference) if re.match('int|float', str(f.type))]
POSITIVE = ('beta', 'orpo_lambda', 'kto_desirable', 'kto_undesirable', 'cpl_alpha', 'cpl_gamma', 'cpl_lambda', 'ref_model_ema')
REFUSALS += [({key: 0}, key, '') for key in (*POSITIVE, 'ref_model_sync_updates')]


@pytest.mark.parametrize('keys, key, why', REFUSALS, ids=str)
def test_refusals(keys, key, why):
  """Failure: a setting that has no meaning trains something else without a word, or the key is not named."""
  with pytest.raises(ValueError, match=re.escape(f"config key 'objective.{key}'")) as caught:
    make(**keys)
  assert why in str(caught.value)


def test_settings():
  """Failure: a named setting or a default is not what the papers have, or a bound is refused that is within the range."""
  assert {name: {**settings} for name, settings in SETTINGS.items()} == TABLE
  assert {f.name: f.default for f in dataclasses.fields(Preference) if f.name not in ('given', 'name')} == DEFAULTS
  for keys in ({'label_smoothing': 0.49}, {'cpl_gamma': 0.01}, {'simpo_gamma': 0}, {'rpo_alpha': 0}, {'num_generations': 2}):
    make(**keys)


def test_rows():
  """Failure: the rows of a prompt, those that stay together, or how they are weighed are not those of the loss."""
  for name in TABLE:
    o = make(name, **({'num_generations': 5} if name == 'online_dpo' else {}))
    wanted = {'kto': ({'data': 2}, 1, 1, 'sequence_mean', 'unpaired'), 'online_dpo': ({'rollout': 5}, 2, 2, 'unit_mean', '')}
    rows = (o.sources, o.update_rows, o.rows_together, o.aggregation, o.reads)
    assert rows == wanted.get(name, ({'data': 2}, 2, 2, 'unit_mean', 'rankings')), name


OTHER = {
  'beta': 0.3, 'average_log_prob': True, 'label_smoothing': 0.1, 'rpo_alpha': 0.5, 'simpo_gamma': 0.25, 'orpo_lambda': 0.4,
  'kto_desirable': 1.25, 'kto_undesirable': 1.5, 'cpl_alpha': 0.2, 'cpl_gamma': 0.75, 'cpl_lambda': 0.25, 'ref_model_sync_updates': 4,
  'ref_model_ema': 0.9,
}  # fmt: skip


@pytest.mark.parametrize('name', [name for name in TABLE if name != 'online_dpo'])
def test_every_key_acts_or_is_inert(name):
  """Failure: a key that is called inert changes the loss or the roles, one that is not changes nothing, or --explain does not tell it."""
  rows = make_rows(name == 'kto')
  params, batch = rows.logp.astype(np.float32), to_batch(rows, name == 'kto')

  def shown(keys):
    objective = make(name, **keys)
    trace = jax.make_jaxpr(
      lambda p: objective.loss(NETS, {'policy': p}, {}, {}, weighed(objective, objective.prepare({}, batch)[0]))
    )
    moving = objective.moving and (objective.ref_model_sync_updates, objective.ref_model_ema)
    return str(trace(params)), objective.frozen, objective.moving, moving

  def text(keys):
    return '\n'.join(make(name, **keys).formula())

  dead = make(name).inert()
  assert shown({key: OTHER[key] for key in dead if key in OTHER}) == shown({})
  assert text({key: OTHER[key] for key in dead if key in OTHER}) == text({})
  for key in OTHER.keys() - dead.keys():
    assert shown({key: OTHER[key]}) != shown({}) and text({key: OTHER[key]}) != text({}), key
  assert ('num_generations' in dead) == (name == 'kto') and 'loss_type' not in dead


WORDS = {
  'dpo': ['loss: -log sigmoid(r_w - r_l)', 'r = 0.1 h, h = the sum over the completion of logp - logp_ref', 'reference: frozen'],
  'ipo': ['(h_w - h_l - 5)^2', 'reference: frozen'],
  'hinge': ['max(0, 1 - (r_w - r_l))'],
  'simpo': ['r = 2 mean over the completion of logp', '-log sigmoid(r_w - r_l - 1)', 'reference: none is kept'],
  'orpo': ['-lp_w - 0.1 log sigmoid(o_w - o_l)', 'reference: none is kept'],
  'kto': [
    '1 (1 - sigmoid(0.1 (h - z0))) where the label is 1',
    'z0 = max(0, mean of h over the mismatched',
    'N, the completions',
  ],
  'cpl': ['r = 0.1 sum over the completion of 1^t logp_t', '-log(e^r_w / (e^r_w + e^(0.5 r_l)))', 'reference: none is kept'],
  'online_dpo': ['the best and the worst of 2 samples of a prompt by R = 1 a + 0.5 b', '-log sigmoid(r_w - r_l)'],
}


def test_formula():
  """Failure: --explain names another loss, implicit reward, pairing or reference than the one computed."""
  for name in TABLE:
    text = '\n'.join(make(name, **({'given': GIVEN} if name == 'online_dpo' else {})).formula())
    assert all(word in text for word in WORDS[name]), text
    assert text.count('(') == text.count(')') and ('the pairs of the update' in text) == (name != 'kto')
  for keys, words in (
    ({'label_smoothing': 0.1}, '-0.9 log sigmoid(r_w - r_l) - 0.1 log sigmoid(r_l - r_w)'),
    ({'average_log_prob': True}, 'h = the mean over the completion'),
    ({'rpo_alpha': 0.5}, '- 0.5 mean over the preferred completion of logp'),
    ({'ref_model_sync_updates': 400}, 'reference: moves after a step in which the updates reach or cross a multiple of 400'),
    ({'ref_model_ema': 0.75}, 'reference: moves every step to 0.75 reference + 0.25 policy'),
  ):
    assert words in '\n'.join(make(**keys).formula())
