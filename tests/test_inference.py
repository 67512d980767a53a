"""Inference-time scaling: what is drawn is what plain sampling draws, what is put in is told apart, and curves are expectations."""

import itertools
import json
import math
import random
import types

import jax
import numpy as np
import pytest

from rl_reasoning import config, inference, inference_methods, model, rollout, rounds, sharding, tokenizer
from rl_reasoning.build import Run
from rl_reasoning.config import ConfigError, Rollout
from rl_reasoning.estimates import best_at_k, maj_at_k, weighted_maj_at_k
from rl_reasoning.inference_methods import make_methods
from rl_reasoning.reward_models import RewardModel
from rl_reasoning.rounds import Beams, Budget, Chain, Source
from rl_reasoning.structs import Rollout as Rolled

TOKENIZER = tokenizer.ByteTokenizer()
ARCH = model.Arch(264, 16, 32, 1, 2, 2, 8)
END, OPEN, CLOSE = (TOKENIZER.ids[tag] for tag in ('<end>', '<think>', '</think>'))
SEMICOLON = ord(';')


def weights_after(context: tuple[int, ...]) -> np.ndarray:
  """What a language model of our own makes of the last two tokens: chances of the words."""
  return np.random.default_rng([SEED, *context]).dirichlet(np.full(len(WORDS), 0.7))


SEED = 50  # of a language in which tags, ends and separators all turn up in what is drawn below
WORDS = [END, CLOSE, SEMICOLON, *b'0123']


def speak(params, arch, prompts, *, settings, group, end_ids, key=None, u_BGC=None, prompt_ids=None, **rest) -> Rolled:
  """In place of rollout.generate: the same contract without a network."""
  C = settings.max_completion_length
  numbers = np.asarray(rollout.uniforms(key, np.asarray(prompt_ids), group, C) if u_BGC is None else u_BGC)
  assert numbers.shape == (len(prompts), group, C)
  ids, logp, length, cut = [np.zeros((len(prompts) * group, *more)) for more in ((C,), (C,), (), ())]
  for row, (prompt, g) in enumerate(itertools.product(range(len(prompts)), range(group))):
    said = list(prompts[prompt])
    for t in range(C):
      chances = weights_after(tuple(said[-2:]))
      word = int(np.searchsorted(np.cumsum(chances), numbers[prompt, g, t] * (1 - 1e-9)))
      said.append(WORDS[word])
      ids[row, t], logp[row, t], length[row] = WORDS[word], np.log(chances[word]), t + 1
      if said[-1] in end_ids:
        break
    cut[row] = said[-1] not in end_ids
  return Rolled(ids.astype(np.int32), logp, length.astype(np.int32), cut.astype(bool))


@pytest.fixture
def words(monkeypatch):
  monkeypatch.setattr(rollout, 'generate', speak)


def make_run(**keys) -> Run:
  settings = config.merge(
    {
      'rollout': {'max_completion_length': 24, 'chunk': 8}, 'eval': {'seed': 3, 'batch_size': 4}, 'data': {'max_prompt_length': 64},
      'roles': {'policy': {'template': 'plain'}}, 'rewards': {'functions': ()},
    },
    keys,
  )  # fmt: skip
  return Run(config.resolve(settings), None, ARCH, TOKENIZER, None, None, None)  # type: ignore[arg-type]


PROMPTS = [TOKENIZER.encode(text) for text in ('1+1=<think>', '12+7-5=<think>', '3=<think>', '22+2=<think>', '9-8=<think>')]
PROBLEMS = [4, 0, 7, 2, 3]


def source(length=24, params=None, chunk=8) -> Source:
  return Source(make_run(), params, Rollout(length, 1.0, chunk=chunk), 3)


def plain(length=24, group=1, params=None, chunk=8) -> Rolled:
  """What one call of the sampler draws."""
  return rollout.generate(
    params, ARCH, PROMPTS, settings=Rollout(length, 1.0, chunk=chunk), group=group, end_ids=TOKENIZER.end_ids, key=jax.random.key(3),
    prompt_ids=PROBLEMS,
  )  # fmt: skip


def tokens(rolled: Rolled) -> list[list[int]]:
  return [t[:n].tolist() for t, n in zip(rolled.tokens_NC, rolled.length_N)]


def test_stream_of_numbers():
  """Failure: a slot's numbers are not those of plain sampling, repeat within its stream, depend on the batch, or are another slot's."""
  key = jax.random.key(5)
  own = np.asarray(rollout.uniforms(key, np.asarray([6, 9]), 3, 8))

  def numbers(problems, slots, drawn):
    return np.asarray(rounds.numbers(key, *map(np.asarray, (problems, slots, drawn)), 8))

  whole = np.concatenate([numbers([6, 9], [[0, 1, 2]] * 2, [[n] * 3] * 2) for n in (0, 8, 16)], axis=-1)
  np.testing.assert_array_equal(whole[..., :8], own)
  assert len({*whole.ravel().tolist()}) == whole.size
  some = numbers([9], [[2, 0]], [[5, 13]])
  np.testing.assert_array_equal(some[0], [whole[1, 2, 5:13], whole[1, 0, 13:21]])


def test_one_round_is_plain_sampling(words):
  """Failure: samples are not those that an evaluator of the same seed draws, or their log-probabilities are others."""
  rolled = plain(group=2)
  found = [c for chains in rounds.sample(source(), PROMPTS, PROBLEMS, 2, 8) for c in chains]
  assert [c.ids for c in found] == tokens(rolled)
  np.testing.assert_allclose([c.logp for c in found], rolled.logp_NC.sum(axis=1), rtol=1e-5)
  assert [c.ended for c in found] == (~rolled.truncated_N).tolist() and all(set(c.sampled) == {1} for c in found)


def force(minimum, maximum, answer=6, end='</think>', wait='Wait', forced='', rows=5, at=slice(None)) -> list[Chain]:
  budget = Budget(minimum, maximum, answer, end, wait, forced)
  return rounds.force_budget(source(max(maximum, answer)), PROMPTS[at], PROBLEMS[at], budget, rows)


def test_no_budget_is_plain_sampling(words):
  """Failure: budget forcing changes what it has no reason to touch."""
  expected = tokens(plain(24))
  assert sum(CLOSE in ids for ids in expected) >= 2 and any(ids[-1] == END for ids in expected)  # else nothing was shown
  for chain, ids in zip(force(0, 24, answer=24), expected, strict=True):
    assert chain.ids[: len(ids)] == ids and chain.sampled[: len(ids)] == [1] * len(ids)
    if CLOSE in ids or ids[-1] == END:
      assert 0 not in chain.sampled and chain.thinking == next(n for n, i in enumerate(ids) if i in (CLOSE, END))


def runs(chain: Chain) -> list[tuple[bool, str]]:
  """(sampled?, text) of each stretch of a completion."""
  pairs = itertools.groupby(zip(chain.sampled, chain.ids), key=lambda pair: pair[0])
  return [(bool(flag), TOKENIZER.decode([i for _, i in group])) for flag, group in pairs]


@pytest.mark.parametrize('minimum, maximum', [(0, 3), (9, 12), (20, 23), (4, 7)])
def test_budget(minimum, maximum, words):
  """Failure: thinking is shorter than the minimum or longer than the maximum, the tag or an end stands in thinking that goes on, what was
  put in passes for sampled or is not counted, or an answer is longer than its limit."""
  found = force(minimum, maximum, forced='<answer>')
  waits = 0
  for chain in found:
    assert minimum <= chain.thinking <= maximum and len(chain.ids) == len(chain.sampled)
    thought, rest = chain.ids[: chain.thinking], chain.ids[chain.thinking :]
    assert not {CLOSE, *TOKENIZER.end_ids} & {*thought}
    if chain.ended and rest == [END]:
      assert chain.sampled[-1] == 1
      continue
    assert rest[0] == CLOSE and len(rest) <= 6 + 1 + 1
    put = [text for sampled, text in runs(chain) if not sampled]
    waits += sum(text.count('Wait') for text in put)
    closed = [text for text in put if text.endswith('</think><answer>')]
    assert len(closed) == (1 - chain.sampled[chain.thinking]) and (not closed or chain.thinking == maximum)
    assert all(set(text.removesuffix('</think><answer>').split('Wait')) == {''} for text in put)
    assert TOKENIZER.decode(thought).count('Wait') == sum(text.count('Wait') for text in put)
  assert bool(waits) == (minimum > 4) or minimum == 4
  if minimum == 0:
    assert any(chain.thinking == 3 for chain in found)


def test_budget_at_the_minimum(words):
  """Failure: "Wait" takes another place than that of the tag, or the numbers that gave the tag are used again."""
  free, held = force(0, 24, answer=1), force(12, 24, answer=1)
  changed = [(a, b) for a, b in zip(free, held) if a.thinking < 12]
  assert changed
  for a, b in changed:
    assert b.ids[: a.thinking + 4] == [*a.ids[: a.thinking], *TOKENIZER.encode('Wait')]
    assert b.sampled[: a.thinking + 4] == [1] * a.thinking + [0] * 4 and b.thinking >= 12
    assert b.used == sum(b.sampled) + sum(text.count('Wait') for drawn, text in runs(b) if not drawn)  # a number for each tag


def test_tag_of_several_tokens(words):
  """Failure: a tag that no single token holds is not seen, is left in half, or text behind it is kept."""
  found = force(6, 12, end=';\x00', answer=4)  # no id holds both
  assert rounds.ids_with(TOKENIZER, ';\x00') == () and all(6 <= c.thinking <= 12 for c in found)
  ids = TOKENIZER.encode('ab</think>cd')
  assert rounds.upto(TOKENIZER, ids, '</think>') == 3 and rounds.before(TOKENIZER, ids, '</think>') == 2
  ids = TOKENIZER.encode('ab;;cd;;')
  assert (
    rounds.upto(TOKENIZER, ids, ';;') == 4
    and rounds.before(TOKENIZER, ids, ';;') == 2
    and rounds.upto(TOKENIZER, ids, ';a') is None
  )
  assert rounds.ids_with(TOKENIZER, ';') == (SEMICOLON,)


@pytest.mark.parametrize('limit', [3, 9, 24])
def test_labels_before_steps(limit, words):
  """Failure: a step has no label or two, the policy goes on from a text without them, a number is drawn twice, or the limit is passed."""
  chains = rounds.put_before_steps(source(limit), PROMPTS, PROBLEMS, 'GO', ';', 5)
  for chain in chains:
    text = ''.join(word if drawn else '|' for drawn, word in runs(chain))
    assert text[0] == '|' and all(piece.endswith(';') and piece.count(';') == 1 for piece in text[1:].split('|')[:-1])
    assert all(word == 'GO' for drawn, word in runs(chain) if not drawn) and len(chain.ids) <= limit
    assert chain.ended == (chain.ids[-1] == END) and chain.used == sum(chain.sampled)
    assert chain.ended or limit - len(chain.ids) <= 2  # no room for a label and a step
    log = [weights_after(tuple(chain.whole[n - 2 : n]))[WORDS.index(i)] for n, i in enumerate(chain.whole) if n >= len(chain.prompt)
           and chain.sampled[n - len(chain.prompt)]]  # fmt: skip
    assert chain.logp == pytest.approx(np.log(log).sum(), rel=1e-6)
  assert limit < 24 or any(chain.sampled.count(0) > 4 for chain in chains)


def search(beams, expansions, score, max_steps=40, rows=5, at=slice(None), drawn=None, separator=';'):
  how = Beams(beams, expansions, separator, max_steps)
  return rounds.beam_search(drawn or source(), PROMPTS[at], PROBLEMS[at], how, score, rows * beams)


@pytest.mark.parametrize('max_steps', [1, 2, 40])
def test_one_beam_is_plain_sampling(max_steps, words):
  """Failure: continuing step by step draws other tokens than one go, or tokens are counted twice."""
  expected = plain()
  kept, counts = search(1, 1, lambda found: [0.0] * len(found), max_steps)
  assert [chains[0].ids for chains in kept] == tokens(expected) and counts == expected.length_N.tolist()
  assert [chains[0].ended for chains in kept] == (~expected.truncated_N).tolist()
  assert any(ids.count(SEMICOLON) > 1 for ids in tokens(expected))  # else there were no steps
  np.testing.assert_allclose([chains[0].logp for chains in kept], expected.logp_NC.sum(axis=1), rtol=1e-4)


def test_rounds_of_a_network():
  """Failure: a network that goes on from token ids says something else than in one go: positions, cache, or the numbers it is handed."""
  params = jax.device_get(jax.jit(model.init, static_argnums=1)(jax.random.key(0), ARCH))
  expected = plain(16, params=params, chunk=16)
  separator = next(i for ids in tokens(expected) for i in ids[3:12] if 32 < i < 127)
  kept, _ = search(1, 1, lambda found: [0.0] * len(found), 3, drawn=source(16, params, 16), separator=chr(separator))
  assert [chains[0].ids for chains in kept] == tokens(expected)
  np.testing.assert_allclose([chains[0].logp for chains in kept], expected.logp_NC.sum(axis=1), rtol=1e-4)


def test_beam_finds_what_is_preferred(words):
  """Failure: beams are kept by another order than the score's, or a beginning that was dropped comes back."""
  asked: list = []

  def score(found):
    asked.append([(p, tuple(chain.ids)) for p, chain in found])
    return [-sum(i != SEMICOLON for i in chain.ids) for _, chain in found]  # the shortest steps

  kept, counts = search(2, 4, score, max_steps=3)
  for p, chains in enumerate(kept):
    seen = {ids for call in asked for q, ids in call if q == p}
    assert len(chains) == 2 and chains[0].score >= chains[1].score and tuple(chains[0].ids) in seen
    assert counts[p] >= sum(len(c.ids) for c in chains)
  first = {}
  for p, ids in asked[0]:
    first.setdefault(p, []).append(ids)
  assert all(len({*ids}) == len(ids) <= 8 for ids in first.values())  # eight candidates, equal ones once
  for p, ids in asked[1]:
    best = sorted(first[p], key=lambda ids: sum(i != SEMICOLON for i in ids))[:2]
    assert any(ids[: len(b)] == b for b in best)
  worst, _ = search(2, 4, lambda found: [-s for s in score(found)], max_steps=3)
  mean = [np.mean([sum(i != SEMICOLON for i in c.ids) for chains in k for c in chains]) for k in (kept, worst)]
  assert mean[0] < mean[1]


def test_rows_do_not_matter(words):
  """Failure: what a problem gets depends on which others share its batch."""
  alone = [force(9, 12, rows=8, at=slice(p, p + 1))[0] for p in range(2)]
  assert [c.ids for c in alone] == [c.ids for c in force(9, 12)[:2]]
  score = lambda found: [-len(chain.ids) for _, chain in found]  # noqa: E731
  together = search(2, 2, score)
  alone = [search(2, 2, score, rows=3, at=slice(p, p + 1)) for p in range(2)]
  assert [[c.ids for c in chains] for chains in together[0][:2]] == [[c.ids for c in kept[0]] for kept, _ in alone]
  assert together[1][:2] == [counts[0] for _, counts in alone]


def brute(samples, k, pick) -> float:
  choices = list(itertools.combinations(samples, k))
  return sum(pick(choice) for choice in choices) / len(choices)


def logs(weights):
  return [math.log(w) if w else -math.inf for w in weights]


def test_best_and_weighted():
  """Failure: the best of k or a weighted vote is not the mean over all choices of k, ties are not shared, or equal weights are not a plain
  vote."""
  rng = random.Random(0)
  for _ in range(40):
    n = rng.randint(1, 7)
    value = [rng.choice([0.0, 0.5, 1.0]) for _ in range(4)]
    groups = [rng.choice([None, 0, 1, 2, 3]) for _ in range(n)]
    weight, score = [rng.choice([0.0, 0.1, 0.2, 0.3]) for _ in range(n)], [rng.choice([1.0, 2.0, -math.inf]) for _ in range(n)]
    right = [0.0 if g is None else value[g] for g in groups]

    def best(choice):
      top = max(score[i] for i in choice)  # noqa: B023
      return np.mean([right[i] for i in choice if score[i] == top])  # noqa: B023

    def heaviest(choice):
      sums = {g: sum(round(10 * weight[i]) for i in choice if groups[i] == g) for g in {groups[i] for i in choice} - {None}}  # noqa: B023
      top = max(sums.values(), default=0)
      return np.mean([value[g] for g in sums if sums[g] == top]) if top else 0.0  # noqa: B023

    for k in range(1, n + 1):
      assert best_at_k(score, right, k) == pytest.approx(brute(range(n), k, best))
      assert weighted_maj_at_k(groups, logs(weight), right, k) == pytest.approx(brute(range(n), k, heaviest))
      poll = tuple((groups.count(g), value[g]) for g in sorted({*groups} - {None}))
      assert weighted_maj_at_k(groups, logs([0.1] * n), right, k) == pytest.approx(maj_at_k(n, poll, k))
  # Long completions: weights that no float holds still compare, in every choice by themselves.
  assert weighted_maj_at_k([0, 1], [-100.0, -900.0], [1.0, 1.0], 1) == 1.0
  assert weighted_maj_at_k([0, 1, 1], [-2000.0, -2000.5, -2000.5], [0.0, 1.0, 1.0], 3) == 1.0
  many = [0] * 20 + [1] * 20
  drawn = weighted_maj_at_k(many, [0.0] * 40, [1.0] * 20 + [0.0] * 20, 9)
  assert drawn == pytest.approx(0.5, abs=0.02) and drawn == weighted_maj_at_k(many, [0.0] * 40, [1.0] * 20 + [0.0] * 20, 9)


def one(**options):
  return make_methods({'it': options}, ['rm'])['it']


def said(answer, accuracy, logp=-1.0, length=2, **rewards) -> dict:
  return {'answer': answer, 'accuracy': accuracy, 'logp': logp, 'length': length, 'tokens': length, 'rewards': rewards}


def test_points():
  """Failure: a method's point is another's, a sample without a verdict counts, or tokens at k are not those of k samples."""
  samples = [
    said('7', 1.0, -4.0, 8, rm=-1.0),
    said('8', 0.0, -1.0, 1, rm=2.0),
    said('8.0', 0.0, -3.0, 2, rm=None),
    said(None, 0.0, 0.0, 1, rm=0.0),
  ]
  other = [said('7', 1.0, rm=0.0)] * 3 + [said('7', None, rm=0.0)]

  def right(**options):
    points = one(num_samples=(4, 1), **options).points('', [samples, other])
    assert [p.label for p in points] == ['1', '4'] and [p.tokens for p in points] == [[3.0, 2.0], [12.0, 8.0]]
    assert all(p.right[1] is None for p in points)
    return [p.right[0] for p in points]

  assert right(method='vote') == pytest.approx([0.25, 0.0])
  assert right(method='best_of_n', by='oracle') == pytest.approx([0.25, 1.0])
  assert right(method='best_of_n', by='rm') == pytest.approx([0.25, 0.0])
  sigmoid = 1 / (1 + math.exp(1))
  assert np.exp(one(method='weighted_vote', by='rm').log_weights(samples)[:3]) == pytest.approx(
    [sigmoid, 1 / (1 + math.exp(-2)), 0.0]
  )
  assert right(method='weighted_vote', by='rm') == pytest.approx([0.25, 0.0])
  assert right(method='weighted_vote', by='likelihood') == pytest.approx([0.25, 0.0])
  assert right(method='weighted_vote', by='likelihood_per_token') == pytest.approx([0.25, 1.0])  # e^-.5 against e^-1 + e^-1.5
  (point,) = one(method='zero_shot').points('', [samples[:1], other[3:]])
  assert point == inference_methods.Point('', [1.0, None], [8.0, 2.0])


def test_last_beams_vote():
  """Failure: the answer is not that of the largest sum of probabilities, or not its best text."""
  chains = [Chain([], score=s) for s in (2.0, 1.5, 1.0, -9.0)]
  texts = ['<answer>1</answer>', '<answer>2</answer>', '<answer>2.0</answer>', 'hm']
  assert inference_methods.chosen(chains, texts) is chains[1]
  assert (
    inference_methods.chosen(chains[:2], texts[:2]) is chains[0] and inference_methods.chosen(chains, ['hm'] * 4) is chains[0]
  )


ROW = {'prompt': '2+2=', 'chain_of_thought': '2+2=4', 'completion': '4', 'answer': '4'}
EXAMPLES = [{'prompt': '1+1=', 'completion': '2'}, {'prompt': '1+2=', 'chain_of_thought': '1+2=3', 'completion': '3'}]


def test_prompts():
  """Failure: an instruction, an example or the beginning of the answer stands in the wrong place, or a tag twice."""

  def text(template, row=ROW, **options):
    return inference.render(one(**options), row, EXAMPLES, template, TOKENIZER)

  assert text('Q: {prompt}', method='zero_shot', prefix='<think>') == "Q: 2+2=\nLet's think step by step.<think>"
  assert text('plain', method='zero_shot', instruction='') == '2+2='
  few = {'method': 'few_shot', 'shots': 2, 'separator': '|'}
  assert text('plain', **few) == '1+1=2|1+2=<think>1+2=3</think><answer>3</answer>|2+2='
  assert text('{prompt}<think>', **few) == '1+1=<think>2|1+2=<think>1+2=3</think><answer>3</answer>|2+2=<think>'
  chat = text('chat', method='few_shot', shots=1)
  assert chat == '<user>1+1=<end><assistant>2<end><user>2+2=<end><assistant>'
  asked = {**ROW, 'prompt': [{'role': 'user', 'content': 'hi'}]}
  assert text('plain', asked, method='few_shot', shots=1) == '<user>1+1=<end><assistant>2<end><user>hi<end><assistant>'
  assert text('plain', asked, method='zero_shot', instruction='!') == '<user>hi!<end><assistant>'
  assert text('chat_think', method='few_shot', shots=1).count('Think step by step inside') == 2


REFUSED = [
  ({}, "'scale.it.method': None is none of zero_shot, few_shot"),
  ({'method': 'votes'}, "'scale.it.method': 'votes' is none of"),
  ({'method': 'vote', 'num_sample': 3}, "'scale.it.num_sample' is unknown; did you mean 'scale.it.num_samples'"),
  ({'method': 'vote', 'num_samples': (2, 2)}, "'scale.it.num_samples': (2, 2) is out of range"),
  ({'method': 'vote', 'num_samples': ()}, "'scale.it.num_samples': () is out of range"),
  ({'method': 'vote', 'temperature': 0.0}, "'scale.it.temperature': 0.0 is out of range"),
  ({'method': 'vote', 'by': 'rm'}, "'scale.it.by' is unknown"),
  ({'method': 'zero_shot', 'top_k': 3}, "'scale.it.top_k' cannot act: temperature 0 is greedy"),
  ({'method': 'zero_shot', 'top_p': 0.0}, "'scale.it.top_p': 0.0 is out of range"),
  ({'method': 'few_shot', 'shots': 0}, "'scale.it.shots': 0 is out of range"),
  ({'method': 'best_of_n'}, "'scale.it.by' is missing"),
  ({'method': 'best_of_n', 'by': 'likelihood'}, "'scale.it.by': 'likelihood' is none of oracle, roles.reward: rm"),
  (
    {'method': 'weighted_vote', 'by': 'oracle'},
    "'scale.it.by': 'oracle' is none of likelihood, likelihood_per_token, roles.reward: rm",
  ),
  ({'method': 'beam_search'}, "'scale.it.by' is missing"),
  ({'method': 'beam_search', 'by': 'oracle'}, "'scale.it.by': 'oracle' is none of roles.reward: rm"),
  ({'method': 'beam_search', 'by': 'rm', 'beams': (0,)}, "'scale.it.beams': (0,) is out of range"),
  ({'method': 'beam_search', 'by': 'rm', 'expansions': 0}, "'scale.it.expansions': 0 is out of range"),
  ({'method': 'beam_search', 'by': 'rm', 'step_separator': ''}, "'scale.it.step_separator': '' is out of range"),
  ({'method': 'conditioned'}, "'scale.it.label' is missing"),
  ({'method': 'conditioned', 'label': ''}, "'scale.it.label': '' is out of range"),
  ({'method': 'budget_forcing'}, "'scale.it.budgets' is missing"),
  ({'method': 'budget_forcing', 'budgets': ((4, 3),)}, "'scale.it.budgets': ((4, 3),) is out of range"),
  ({'method': 'budget_forcing', 'budgets': (3,)}, "'scale.it.budgets[0]': 3 is not a tuple"),
  ({'method': 'budget_forcing', 'budgets': ((0, 3),), 'wait': ''}, "'scale.it.wait': '' is out of range"),
]


@pytest.mark.parametrize(('options', 'wanted'), REFUSED)
def test_refused(options, wanted):
  """Failure: a key that is misspelt, impossible or without effect is ignored, or refused without its name."""
  with pytest.raises(ConfigError) as caught:
    one(**options)
  assert wanted in str(caught.value)


SETTINGS = {
  'data': {'task': 'arithmetic', 'options': {'operands': 2, 'high': 9}, 'max_prompt_length': 64},
  'rollout': {'max_completion_length': 16, 'chunk': 8},
  'eval': {'size': 10, 'batch_size': 8, 'seed': 2},
}
SCALE = {
  'voting': {'method': 'vote', 'num_samples': (1, 4)},
  'best': {'method': 'best_of_n', 'by': 'rm', 'num_samples': (2,)},
  'budget': {'method': 'budget_forcing', 'budgets': ((0, 4), (8, 12)), 'max_answer': 4},
  'beam': {'method': 'beam_search', 'by': 'rm', 'beams': (2,), 'expansions': 2, 'step_separator': ';', 'max_steps': 2},
  'shown': {'method': 'few_shot', 'shots': 2},
  'told': {'method': 'conditioned', 'label': '!', 'step_separator': ';'},
}


def settings_of(cache, scale=SCALE, **keys) -> dict:
  rm = {'init': 'tests/fixtures/classifier', 'tokenizer': 'bytes'}
  found = config.merge(SETTINGS, {'data': {'cache_dir': str(cache), 'train_size': 16}, 'roles': {'reward': {'rm': rm}}})
  return {**config.merge(found, keys), 'scale': scale}


@pytest.mark.parametrize(
  ('change', 'wanted'),
  [
    (lambda s: s.pop('scale'), "section 'scale' is missing"),
    (lambda s: s['scale'].clear(), "section 'scale' is empty"),
    (lambda s: s.update(rewards={'functions': ()}), "cannot act beside a section scale:\n  'rewards.functions'"),
    (lambda s: s['roles'].update(policy={'init': 'x'}), "'roles.policy.init' cannot act here: --checkpoint stands"),
    (lambda s: s['scale'].pop('shown'), "beside a section scale:\n  'data.train_size'"),
    (
      lambda s: s['roles']['reward'].update(other={'init': 'x'}),
      "'roles.reward.other' cannot act: no method of scale goes by it",
    ),
    (lambda s: s.update(roles={}), "'scale.best.by': 'rm' is none of oracle, roles.reward: it is empty"),
    (lambda s: s['scale'].update({'a/b': {'method': 'vote'}}), "'scale.a/b': the name is that of a file"),
    (lambda s: s['scale'].update(x=3), "'scale.x': 3 is not a mapping"),
    (lambda s: s['data'].update(mixture={'a': {'task': 'linear'}}), "'data.options.high': data.mixture names the tasks"),
  ],
)
def test_sections_refused(change, wanted, tmp_path):
  """Failure: a section that cannot act is ignored, or a method runs without the reward model that it goes by."""
  chosen = json.loads(json.dumps(settings_of(tmp_path)))
  change(chosen)
  with pytest.raises(ConfigError) as caught:
    inference.resolve(config.plain(chosen))
  assert wanted in str(caught.value)


class Speaker(types.SimpleNamespace):
  """In place of a policy and a reward model: completions of known texts, scores by their length; dies at one of the calls."""

  dies = 0

  def generate(self, params, arch, prompts, *, settings, group, u_BGC, end_ids, **rest):
    self.calls.append([TOKENIZER.decode(p) for p in prompts])
    if len(self.calls) == self.dies:
      raise KeyboardInterrupt
    C = settings.max_completion_length
    numbers = np.asarray(u_BGC)[:, :, :C].reshape(-1, C)
    ids = np.where(
      numbers < 0.2,
      END,
      np.where(numbers < 0.35, CLOSE, np.where(numbers < 0.6, SEMICOLON, ord('0') + (numbers * 10).astype(int))),
    )
    ends = np.isin(ids, end_ids)
    length = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, C)
    return Rolled(ids, np.log(numbers), length, ~ends.any(axis=1))

  def score_texts(self, made, params, prompts, completions, ended, mesh=None):
    assert all('=' in p for p in prompts)
    return np.asarray([len(''.join(c)) for c in completions], np.float32), np.ones(len(completions), bool)


@pytest.fixture
def speaker(monkeypatch):
  found = Speaker(calls=[])
  bare = Run(make_run().config, None, ARCH, TOKENIZER, None, None, None)  # type: ignore[arg-type]

  def opened(chosen, where):
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    policy = config.Role(where, 'bytes', 'plain')
    roles = config.Roles(policy=policy)
    chosen = chosen.__class__(**{**chosen.__dict__, 'roles': roles})
    return bare._replace(config=chosen, mesh=mesh), {'w': np.ones(3, np.float32)}, {}

  def models(chosen, mesh, process):
    assert process
    names = list(chosen.roles.reward)
    return {n: RewardModel(n, ARCH, TOKENIZER, 'plain', 'whole', 0.0, 'float32') for n in names}, {
      f'reward.{n}': {'w': np.ones(2)} for n in names
    }

  monkeypatch.setattr(rollout, 'generate', found.generate)
  monkeypatch.setattr(inference.reward_models, 'score_texts', found.score_texts)
  monkeypatch.setattr(inference.evaluate, 'open_run', opened)
  monkeypatch.setattr(inference.build, 'load_reward_models', models)
  return found


def contents(folder) -> dict[str, bytes]:
  return {f.name: f.read_bytes() for f in sorted((folder / 'samples').iterdir()) if f.suffix == '.jsonl'}


def test_interrupted_and_finished(speaker, tmp_path, capsys):
  """Failure: what a kill left is drawn again or changes a number, numbers depend on how problems are batched, methods that sample alike
  sample twice, or curves of another config are overwritten."""
  job = inference.resolve(settings_of(tmp_path / 'cache'))
  whole = inference.scale(job, 'policy', str(tmp_path / 'whole'))
  calls = len(speaker.calls)
  assert {f.name for f in (tmp_path / 'whole').iterdir()} == {
    'scale_config.json',
    'scale.json',
    'scale.md',
    'scale.png',
    'samples',
  }
  assert json.loads((tmp_path / 'whole' / 'scale.json').read_text()) == whole and list(whole['methods']) == list(SCALE)
  assert set(contents(tmp_path / 'whole')) == {
    f'{n}.jsonl' for n in ('voting', 'budget 0-4', 'budget 8-12', 'beam 2', 'shown', 'told')
  }
  for dies in (2, calls - 1):
    speaker.calls.clear()
    speaker.dies, folder = dies, tmp_path / f'cut{dies}'
    with pytest.raises(KeyboardInterrupt):
      inference.scale(job, 'policy', str(folder))
    speaker.dies = 0
    assert not (folder / 'scale.json').exists()
    again = inference.scale(job, 'policy', str(folder))
    assert {**again, 'seconds': 0} == {**whole, 'seconds': 0} and contents(folder) == contents(tmp_path / 'whole')
    assert dies < len(speaker.calls) <= calls + 8  # a batch was tried twice
  count = len(speaker.calls)
  assert inference.scale(job, 'policy', str(folder)) == again and len(speaker.calls) == count
  for size in (4,):
    other = inference.scale(
      inference.resolve(settings_of(tmp_path / 'cache', eval={'batch_size': size})), 'policy', str(tmp_path / f'size{size}')
    )
    assert other['methods'] == whole['methods'] and contents(tmp_path / f'size{size}') == contents(folder)
  changed = inference.resolve(settings_of(tmp_path / 'cache', scale={**SCALE, 'shown': {'method': 'few_shot', 'shots': 1}}))
  with pytest.raises(ConfigError, match=r'the curves of another config .*\n  config.scale.shown.shots: 2 -> 1'):
    inference.scale(changed, 'policy', str(folder))
  assert inference.scale(changed, 'policy', str(folder), overwrite=True)['methods']['voting'] == whole['methods']['voting']


def test_numbers_are_those_of_the_samples(speaker, tmp_path):
  """Failure: a point is not what its samples say, tokens leave out what was put in or dropped, or examples come from elsewhere."""
  result = inference.scale(inference.resolve(settings_of(tmp_path / 'cache')), 'policy', str(tmp_path / 'it'))

  def read(name):
    return [json.loads(line) for line in (tmp_path / 'it' / 'samples' / f'{name}.jsonl').read_text().splitlines()]

  voting, best = result['methods']['voting'], result['methods']['best']
  samples = read('voting')
  assert (
    len(samples) == 40
    and best['samples'] == voting['samples'] == ['voting']
    and (best['method'], best['by']) == ('best_of_n', 'rm')
  )
  assert [p['label'] for p in voting['points']] == ['1', '4'] and [p['label'] for p in best['points']] == ['2']
  length = np.mean([s['length'] for s in samples])
  assert [p['tokens'] for p in voting['points']] == pytest.approx([length, 4 * length])
  assert best['points'][0]['tokens'] == pytest.approx(2 * length)
  assert voting['points'][0]['accuracy'] == pytest.approx(np.mean([s['accuracy'] for s in samples]))
  assert all(s['rewards'] == {'rm': len(s['completion'])} for s in samples)
  for label, low, high in (('0-4', 0, 4), ('8-12', 8, 12)):
    forced = read(f'budget {label}')
    (point,) = [p for p in result['methods']['budget']['points'] if p['label'] == label]
    assert point['tokens'] == pytest.approx(np.mean([len(s['completion_ids']) for s in forced]))
    assert point['injected'] == pytest.approx(np.mean([s['sampled'].count(0) for s in forced])) and point['injected'] > 0
    assert all(low <= s['thinking'] <= high and s['prompt'].endswith('=<think>') and not s['rewards'] for s in forced)
  beams = read('beam 2')
  assert len(beams) == 10 and sum(s['tokens'] for s in beams) > sum(s['length'] for s in beams)
  assert result['methods']['beam']['points'][0]['tokens'] == pytest.approx(np.mean([s['tokens'] for s in beams]))
  shown = read('shown')
  assert (
    all(s['prompt'].count('</answer>\n\n') == 2 for s in shown) and len({s['prompt'].rpartition('\n\n')[0] for s in shown}) == 1
  )
  table = (tmp_path / 'it' / 'scale.md').read_text()
  assert '| best: best_of_n by rm | 2 | 10 |' in table and '| budget: budget_forcing | 8-12 |' in table
  assert (tmp_path / 'it' / 'scale.png').read_bytes().startswith(b'\x89PNG')


def test_what_only_a_run_can_tell(speaker, tmp_path):
  """Failure: a budget without room, a prompt beyond the limit or a split without enough examples is told after hours of sampling."""
  wanted = {
    r"'scale.it.budgets': \(4, 5\) leaves no room for the 4 tokens of 'Wait'": {'method': 'budget_forcing', 'budgets': ((4, 5),)},
    r"'data.max_prompt_length': 64, but scale.it has a prompt": {'method': 'zero_shot', 'instruction': 'x' * 64},
    r'20 shots, but the training split has \d+ different prompts': {'method': 'few_shot', 'shots': 20},
  }
  for message, method in wanted.items():
    few = method['method'] == 'few_shot'
    chosen = config.merge(SETTINGS, {'data': {'cache_dir': str(tmp_path / 'cache'), **({'train_size': 16} if few else {})}})
    with pytest.raises(ConfigError, match=message):
      inference.scale(inference.resolve({**chosen, 'scale': {'it': method}}), 'policy', str(tmp_path / 'it'))
  assert not speaker.calls and not (tmp_path / 'it').exists()


def test_process_models_read_steps():
  """Failure: a process model is shown an end token that it was never judged at, or steps joined before they are encoded."""

  class Merging(tokenizer.ByteTokenizer):
    def encode(self, text):
      return [300] if text == ';b' else super().encode(text)

  made = RewardModel('r', ARCH, Merging(), '{prompt}<think>', 'whole', 0.0, 'float32', process=True)
  assert inference.reward_models.encode(made, 'q', ['<think>a', ';b', 'c'], True) == [ord('q'), OPEN, ord('a'), 300, ord('c')]
  run = {'objective': {'name': 'process_reward_model'}, 'roles': {'policy': {'tokenizer': 'bytes', 'template': 'plain'}}}
  role = config.Reward('run')
  assert inference.reward_models.resolve('r', role, run, process=True) == config.Reward('run', 'bytes', 'plain')
  with pytest.raises(ConfigError, match='is a run of objective'):
    inference.reward_models.resolve('r', role, run)


def test_config_file():
  """Failure: configs/scale.py names a method or key that is not there."""
  for arguments in ('', ':outcome=a,process=b'):
    job = inference.resolve(config.read_file('configs/scale.py' + arguments))
    assert {type(m) for m in job.methods.values()} >= {
      inference_methods.ZeroShot, inference_methods.FewShot, inference_methods.Vote, inference_methods.BudgetForcing
    }  # fmt: skip
    assert ('beam by process' in job.methods) == bool(arguments) and set(job.config.roles.reward) == (
      {'outcome', 'process'} if arguments else set()
    )
  stages = config.read_file('configs/scale.py:stage=all,base=tests/fixtures/llama')['stages']
  assert list(stages) == ['labels', 'outcome', 'steps', 'process', 'curve']
