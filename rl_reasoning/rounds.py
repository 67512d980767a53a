"""Completions made in rounds: a round goes on from the token ids of the one before, with text put in between (budget forcing, labels
before steps) or only the best beginnings kept (beam search).

Exact: a round continues ids and never text that was encoded anew, and a slot's random numbers are one stream, consumed token by token, so
that a completion that nothing interferes with is the one that a single round would have given (to rounding: its keys and values come from a
prefill instead of the decode loop). A round ends at the first token whose own text holds the tag or separator that is waited for. Not
exact: one that is spread over several tokens is found afterwards; what was drawn past it is dropped, and where the tag is to be taken back,
every token that holds a part of it goes, with whatever else that token says.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_reasoning import rollout, sharding
from rl_reasoning.build import Run
from rl_reasoning.config import Rollout
from rl_reasoning.structs import Array, PyTree
from rl_reasoning.tokenizer import Tokenizer


@functools.partial(jax.jit, static_argnames=('block',))
def numbers(key: jax.Array, problem_N: Array, slot_NG: Array, drawn_NG: Array, block: int) -> Array:
  """[N, G, block] uniform numbers: those that slot `slot` of a problem comes to after `drawn` others. Its stream has no end, and its first
  `block` numbers are those of rollout.uniforms for that member."""

  def row(problem, slot, drawn):
    own = jax.random.fold_in(jax.random.fold_in(key, problem), slot)

    def piece(n):
      return jnp.where(n == 0, jax.random.uniform(own, (block,)), jax.random.uniform(jax.random.fold_in(own, n), (block,)))

    two = jnp.concatenate([piece(drawn // block), piece(drawn // block + 1)])
    return jax.lax.dynamic_slice_in_dim(two, drawn % block, block)

  return jax.vmap(lambda p, slots, drawn: jax.vmap(lambda s, d: row(p, s, d))(slots, drawn))(problem_N, slot_NG, drawn_NG)


class Drawn(NamedTuple):
  ids: list[int]
  logp: list[float]
  ended: bool  # by one of the ids that a round ends at


@dataclasses.dataclass
class Chain:
  """A completion in the making."""

  prompt: list[int]
  ids: list[int] = dataclasses.field(default_factory=list)
  sampled: list[int] = dataclasses.field(default_factory=list)  # 1 where the policy drew the token, 0 where it was put in
  logp: float = 0.0  # of the drawn ones, under the distribution that they were drawn from
  used: int = 0  # random numbers
  ended: bool = False  # by an end token
  thinking: int | None = None  # tokens before the tag that ends it, where they were counted
  score: float = 0.0
  done: bool = False  # a beam that is not continued

  @property
  def whole(self) -> list[int]:
    return self.prompt + self.ids

  def add(self, drawn: Drawn, count: int) -> None:
    """The first tokens of a draw."""
    self.ids += drawn.ids[:count]
    self.sampled += [1] * count
    self.logp += sum(drawn.logp[:count])
    self.used += count

  def put(self, ids: Sequence[int]) -> None:
    self.ids += ids
    self.sampled += [0] * len(ids)

  def copy(self) -> Chain:
    return dataclasses.replace(self, ids=[*self.ids], sampled=[*self.sampled])


class Source(NamedTuple):
  """What tokens are drawn from: they are a function of (seed, problem, slot, numbers that the slot has used)."""

  run: Run
  params: PyTree
  settings: Rollout  # max_completion_length is the block of `numbers`
  seed: int

  def draw(
    self, prompts: Sequence[Sequence[int]], problems: Sequence[int], slots: Sequence[Sequence[int]], used: Sequence[Sequence[int]],
    length: int, end_ids: tuple[int, ...], rows: int,
  ) -> list[list[Drawn]]:  # fmt: skip
    """For each prompt a draw of each of its slots, of up to `length` tokens. There are `rows` prompts at most; fewer are filled up by the
    last one, so that one shape is compiled and rows divide over the mesh."""
    run, group = self.run, len(slots[0])
    index = [*range(len(prompts)), *[len(prompts) - 1] * (rows - len(prompts))]
    problem_N, slot_NG, used_NG = (np.asarray(x, np.int32)[index] for x in (problems, slots, used))
    block = self.settings.max_completion_length
    rolled = rollout.generate(
      self.params, run.arch, [prompts[i] for i in index], settings=dataclasses.replace(self.settings, max_completion_length=length),
      group=group, end_ids=end_ids, dtype=run.config.model.dtype, mesh=run.mesh,
      u_BGC=numbers(jax.random.key(self.seed), problem_N, slot_NG, used_NG, block)[:, :, :length],
    )  # fmt: skip

    def one(row: int) -> Drawn:
      count = int(rolled.length_N[row])
      return Drawn(rolled.tokens_NC[row, :count].tolist(), rolled.logp_NC[row, :count].tolist(), not rolled.truncated_N[row])

    return [[one(n * group + g) for g in range(group)] for n in range(len(prompts))]


@functools.lru_cache(maxsize=16)
def ids_with(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
  """Every id whose own text holds `text`."""
  return tuple(i for i in range(tokenizer.vocab_size) if text in tokenizer.decode([i]))


def upto(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> int | None:
  """How many of the ids it takes until their text holds `text`; None: it never does."""
  if text not in tokenizer.decode(ids):
    return None
  return 1 + bisect.bisect_left(range(1, len(ids) + 1), True, key=lambda n: text in tokenizer.decode(ids[:n]))


def before(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> int:
  """How many of the ids come before any part of `text`, which is in them."""
  start = tokenizer.decode(ids).index(text)
  return bisect.bisect_right(range(len(ids) + 1), start, key=lambda n: len(tokenizer.decode(ids[:n]))) - 1


def sample(
  source: Source, prompts: Sequence[list[int]], problems: Sequence[int], num_samples: int, rows: int
) -> list[list[Chain]]:
  """`num_samples` completions of each prompt, in one round."""
  slots, used = [[*range(num_samples)]] * len(prompts), [[0] * num_samples] * len(prompts)
  limit, end_ids = source.settings.max_completion_length, source.run.tokenizer.end_ids
  found = []
  for prompt, drawn in zip(prompts, source.draw(prompts, problems, slots, used, limit, end_ids, rows), strict=True):
    chains = [Chain(prompt, ended=d.ended) for d in drawn]
    for chain, d in zip(chains, drawn, strict=True):
      chain.add(d, len(d.ids))
    found.append(chains)
  return found


class Budget(NamedTuple):
  minimum: int  # tokens of thinking
  maximum: int
  answer: int  # tokens at most after it
  end: str  # the tag that ends it
  wait: str  # what takes the tag's place before the minimum
  forced: str  # what follows the tag that the maximum forces


def force_budget(source: Source, prompts: Sequence[list[int]], problems: Sequence[int], budget: Budget, rows: int) -> list[Chain]:
  """Budget forcing (s1, 2501.19393) of prompts that have opened the thinking.

  Thinking that ends before the minimum, by the tag or by an end token, does not: `wait` takes the place of what ended it, and the policy
  goes on. At the maximum the tag and what follows it are put in. All tokens before the tag count, those put in too, so the thinking of a
  completion that has an answer is never shorter than the minimum, and never longer than the maximum. Past the minimum an end token ends
  the completion, as it does without a budget.
  """
  tok, (minimum, maximum, answer, end, _, _) = source.run.tokenizer, budget
  wait, forced = tok.encode(budget.wait), tok.encode(end + budget.forced)
  stops = tuple(sorted({*tok.end_ids, *ids_with(tok, end)}))
  chains = [Chain(prompt) for prompt in prompts]

  def draw(some: Sequence[int], length: int, end_ids: tuple[int, ...]) -> list[Drawn]:
    asked, used = [chains[i].whole for i in some], [[chains[i].used] for i in some]
    return [d for (d,) in source.draw(asked, [problems[i] for i in some], [[0]] * len(some), used, length, end_ids, rows)]

  def close(chain: Chain) -> None:
    chain.thinking = len(chain.ids)
    chain.put(forced)

  thinking = list(range(len(chains)))
  while thinking:
    rest = [maximum - len(chains[i].ids) for i in thinking]
    still = []
    for i, room, drawn in zip(thinking, rest, draw(thinking, min(maximum, sharding.size_class(max(rest))), stops), strict=True):
      chain, ids = chains[i], drawn.ids[:room]
      closed, ended = upto(tok, ids, end), ids[-1] in tok.end_ids
      if closed is None and not ended:
        chain.add(drawn, len(ids))
        close(chain)
        continue
      last, thought = closed or len(ids), len(ids) - 1 if closed is None else before(tok, ids, end)
      if len(chain.ids) + thought >= minimum:
        chain.thinking, chain.ended = len(chain.ids) + thought, closed is None
        chain.add(drawn, last)
        continue
      chain.add(drawn, thought)
      chain.used += last - thought  # a number that gave the tag would give it again
      chain.put(wait)
      if len(chain.ids) < maximum:
        still.append(i)
      else:
        close(chain)
    thinking = still
  left = [i for i, chain in enumerate(chains) if not chain.ended]
  for i, drawn in zip(left, draw(left, answer, tok.end_ids) if left else [], strict=True):
    chains[i].add(drawn, len(drawn.ids))
    chains[i].ended = drawn.ended
  return chains


def put_before_steps(
  source: Source, prompts: Sequence[list[int]], problems: Sequence[int], text: str, separator: str, rows: int
) -> list[Chain]:
  """One completion of each prompt, in which `text` is put in before every step: what a policy that learned from labelled steps is told to
  expect of the next one (2403.04642). It is part of the completion and of its limit."""
  tok, limit = source.run.tokenizer, source.settings.max_completion_length
  label, stops = tok.encode(text), tuple(sorted({*tok.end_ids, *ids_with(tok, separator)}))
  chains = [Chain(prompt) for prompt in prompts]
  going = [i for i in range(len(chains)) if len(label) < limit]
  while going:
    for i in going:
      chains[i].put(label)
    asked, used = [chains[i].whole for i in going], [[chains[i].used] for i in going]
    drawn = source.draw(asked, [problems[i] for i in going], [[0]] * len(going), used, limit, stops, rows)
    for i, (d,) in zip(going, drawn, strict=True):
      ids = d.ids[: limit - len(chains[i].ids)]
      chains[i].add(d, upto(tok, ids, separator) or len(ids))
      chains[i].ended = chains[i].ids[-1] in tok.end_ids
    going = [i for i in going if not chains[i].ended and len(chains[i].ids) + len(label) < limit]
  return chains


class Beams(NamedTuple):
  beams: int  # that are kept
  expansions: int  # of each
  separator: str  # ends a step
  max_steps: int  # the last one goes on to the end


# What a beginning is worth: of (which prompt, completion so far) pairs.
Score = Callable[[Sequence[tuple[int, Chain]]], Sequence[float]]


def beam_search(
  source: Source, prompts: Sequence[list[int]], problems: Sequence[int], how: Beams, score: Score, rows: int
) -> tuple[list[list[Chain]], list[int]]:
  """(the beams of each prompt, best first; the tokens that all its expansions took): beam search over steps (2408.03314, appendix D).

  In each round every beam that has not ended is continued by `expansions` samples of its next step; of these and of the beams that have
  ended the `beams` with the best scores are kept, of equal texts one, of equal scores the first. (That paper's N candidates and beam width
  M are `beams` * `expansions` and `expansions` here.) One beam of one expansion is plain sampling.
  """
  tok, limit, (N, M, separator, max_steps) = source.run.tokenizer, source.settings.max_completion_length, how
  stops = tuple(sorted({*tok.end_ids, *ids_with(tok, separator)}))
  kept = [[Chain(prompt)] * N for prompt in prompts]
  used, tokens = [[0] * (N * M) for _ in prompts], [0] * len(prompts)
  for step in range(1, max_steps + 1):
    places = [(p, b) for p, chains in enumerate(kept) for b, chain in enumerate(chains) if not chain.done]
    if not places:
      break
    slots = [[*range(b * M, b * M + M)] for _, b in places]
    drawn = source.draw(
      [kept[p][b].whole for p, b in places], [problems[p] for p, _ in places], slots,
      [[used[p][slot] for slot in row] for (p, _), row in zip(places, slots)], limit, stops if step < max_steps else tok.end_ids,
      rows,
    )  # fmt: skip
    fresh: dict[tuple[int, tuple[int, ...]], Chain] = {}
    for (p, b), row, draws in zip(places, slots, drawn, strict=True):
      for slot, d in zip(row, draws, strict=True):
        chain = kept[p][b].copy()
        ids = d.ids[: limit - len(chain.ids)]
        count = (upto(tok, ids, separator) if step < max_steps else None) or len(ids)
        chain.add(d, count)
        chain.ended = chain.ids[-1] in tok.end_ids
        chain.done = chain.ended or len(chain.ids) == limit or step == max_steps
        used[p][slot] += count
        tokens[p] += count
        fresh.setdefault((p, tuple(chain.ids)), chain)
    found = [(p, chain) for (p, _), chain in fresh.items()]
    for (_, chain), value in zip(found, score(found), strict=True):
      chain.score = float(value)
    for p in {p for p, _ in places}:
      pool = [chain for chain in kept[p] if chain.done] + [chain for q, chain in found if q == p]
      kept[p] = sorted(pool, key=lambda chain: -chain.score)[:N]
  return kept, tokens
