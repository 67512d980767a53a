"""Schedules update by update, clipping, what decays, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_reasoning import model, optim
from rl_reasoning.config import ConfigError, Optim

LR = 0.3


def make(total=10, **keys):
  return optim.make(
    Optim(**{'learning_rate': LR, 'grad_clip': 0.0, **keys}), total, {'dense_layers': range(1), 'layers': range(1, 4)}
  )


def by_hand(schedule: str, warmup: int, total: int, update: int) -> float:
  if update < warmup:
    return LR * (update + 1) / (warmup + 1)
  done = (update - warmup) / (total - warmup)
  return LR * {'constant': 1.0, 'linear': 1 - done, 'cosine': (1 + math.cos(math.pi * done)) / 2}[schedule]


@pytest.mark.parametrize('warmup', [0, 1, 4])
@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine'])
def test_schedule(schedule, warmup):
  """Failure: the rate is off by an update, the first or the last update moves nothing, or the peak is never reached."""
  rate = make(total=10, schedule=schedule, warmup_updates=warmup)[1]
  rates = [float(rate(update)) for update in range(10)]
  assert rates == pytest.approx([by_hand(schedule, warmup, 10, update) for update in range(10)], rel=1e-5)
  assert max(rates) == pytest.approx(LR) and min(rates) > 0
  if schedule != 'constant':
    assert float(rate(10)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize('keys', [{'schedule': 'linear', 'warmup_updates': 2}, {'schedule': 'cosine'}], ids=str)
def test_optimizer_follows_the_schedule(keys):
  """Failure: the logged learning rate is another than the one that moves the weights."""
  optimizer, rate = make(total=6, name='sgd', **keys)
  params = {'w': jnp.zeros((2, 3))}
  state = optimizer.init(params)
  for update in range(6):
    change, state = optimizer.update({'w': jnp.ones((2, 3))}, state, params)
    np.testing.assert_allclose(change['w'], -float(rate(update)), rtol=1e-6)


def test_clipping_is_by_the_norm_of_all():
  """Failure: each array is clipped by itself, a small gradient is scaled, or grad_clip 0 clips to nothing."""
  grads = {'a': jnp.full((2, 2), 3.0), 'b': jnp.full((4,), 4.0)}  # norm 10
  for clip, factor in ((5.0, 0.5), (20.0, 1.0), (0.0, 1.0)):
    optimizer, _ = make(name='sgd', grad_clip=clip)
    change, _ = optimizer.update(grads, optimizer.init(grads), grads)
    for name, grad in grads.items():
      np.testing.assert_allclose(change[name], -LR * factor * grad, rtol=1e-6)


def test_frozen_layers_of_two_stacks():
  """Failure: layers are counted within their stack: a layer that is trained stays as it is, or decay moves a frozen one."""
  params = {name: {'up': jnp.ones((n, 2, 2))} for name, n in (('dense_layers', 1), ('layers', 3))} | {'embed': jnp.ones((4, 2))}
  for frozen, still in ((1, 0), (2, 1), (3, 2)):
    optimizer, _ = make(frozen_layers=frozen, options={'weight_decay': 0.1})
    change, _ = optimizer.update(params, optimizer.init(params), params)
    moved = {name: np.abs(change[name]['up']).max(axis=(1, 2)) > 0 for name in ('dense_layers', 'layers')}
    assert not moved['dense_layers'].any() and moved['layers'].tolist() == [n >= still for n in range(3)]
    assert not np.asarray(change['embed']).any()


ARCH = model.Arch(24, 8, 16, 2, 2, 2, 4, qkv_bias=True, qk_norm=True, tie_word_embeddings=False)
MATRICES = {'embed', 'lm_head', 'q', 'k', 'v', 'o', 'gate', 'up', 'down'}
VECTORS = {'attn_norm', 'mlp_norm', 'q_norm', 'k_norm', 'q_bias', 'k_bias', 'v_bias', 'final_norm'}


def names_where(tree) -> set[str]:
  return {path[-1].key for path, value in jax.tree_util.tree_leaves_with_path(tree) if value}


@pytest.mark.parametrize('name', ['adamw', 'lion', 'lamb'])
def test_weight_decay(name):
  """Failure: norms or biases decay (stacked by layer they are matrices too), a matrix does not, or decay is on without being asked."""
  params = jax.tree.map(lambda w: jnp.ones(w.shape), model.weight_table(ARCH), is_leaf=model.is_weight)
  zero = jax.tree.map(jnp.zeros_like, params)

  def moved(**options):
    optimizer, _ = make(name=name, options=options)
    change, _ = optimizer.update(zero, optimizer.init(params), params)
    return change

  change = moved(weight_decay=0.01)
  assert names_where(jax.tree.map(lambda x: np.any(x != 0), change)) == MATRICES
  assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)} == MATRICES | VECTORS
  if name != 'lamb':  # which scales by the norm of the weights
    np.testing.assert_allclose(change['layers']['q'], -LR * 0.01, rtol=1e-6)
  assert names_where(jax.tree.map(lambda x: np.any(x != 0), moved())) == set()


@pytest.mark.parametrize(
  ('name', 'options'), [('sgd', {'momentum': 0.9}), ('adam', {'b1': 0.8}), ('adafactor', {}), ('rmsprop', {})]
)
def test_without_weight_decay(name, options):
  """Failure: an optimizer that knows no weight decay is handed one."""
  optimizer, _ = make(name=name, options=options)
  params = {'w': jnp.ones((2, 3))}
  change, _ = optimizer.update(params, optimizer.init(params), params)
  assert np.all(np.isfinite(change['w'])) and np.all(np.asarray(change['w']) < 0)


def test_options_reach_the_optimizer():
  """Failure: an option is taken and ignored."""
  params, grads = {'w': jnp.zeros(3)}, [{'w': jnp.ones(3)}, {'w': jnp.zeros(3)}]
  optimizer, _ = make(name='sgd', options={'momentum': 0.5})
  state, moves = optimizer.init(params), []
  for grad in grads:
    change, state = optimizer.update(grad, state, params)
    moves.append(float(change['w'][0]))
  assert moves == pytest.approx([-LR, -LR / 2])


@pytest.mark.parametrize(
  ('keys', 'says'),
  [({'name': 'adamz'}, "'optim.name': .*'adamz'"), ({'name': 'chain'}, "'optim.name': .*'chain'"), ({'name': 'tree'}, "'optim.name'"),
   ({'options': {'beta1': 0.9}}, r"'optim.options.beta1' is unknown to optax.adamw; known: .*b1"),
   ({'name': 'sgd', 'options': {'weight_decay': 0.1}}, "'optim.options.weight_decay' is unknown to optax.sgd"),
   ({'options': {'learning_rate': 1.0}}, "'optim.options.learning_rate'"), ({'options': {'b1': 'high'}}, 'high')],
)  # fmt: skip
def test_refused(keys, says):
  """Failure: a misspelt optimizer or option is ignored, or ends in a traceback."""
  with pytest.raises(ConfigError, match=says):
    make(**keys)
