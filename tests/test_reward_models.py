"""Reward models: where a score is read, what the model is shown, and how several are combined."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from rl_reasoning import model, reward_models, sharding, weights
from rl_reasoning.config import Combination, ConfigError, Reward
from rl_reasoning.reward_models import RewardModel
from rl_reasoning.tokenizer import ByteTokenizer, split_completion

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
ARCH = model.Arch(264, 16, 16, 1, 2, 1, 8, tie_word_embeddings=False)
BYTES = ByteTokenizer()
PLAIN = RewardModel('r', ARCH, BYTES, 'plain', 'whole', 0.0, 'float32')
TEXTS = ['a', 'bb', 'a longer one', 'c' * 20, 'd', 'ee', '']
SHORT = [text for text in TEXTS if len(text) < 20]


@pytest.fixture(scope='module')
def params():
  draw = np.random.default_rng(0)
  table = model.weight_table(ARCH, ('scalar',))
  return jax.tree.map(lambda w: draw.normal(size=w.shape).astype(np.float32) * 0.5, table, is_leaf=model.is_weight)


def after_last(params, ids):
  """The score of one row without any padding, from the hidden state itself."""
  tokens = np.asarray([ids], np.int32)
  hidden, _ = jax.jit(model.forward, static_argnums=1)(params, ARCH, tokens, np.ones_like(tokens), np.arange(len(ids))[None])
  return float(np.asarray(hidden)[0, -1].astype(np.float64) @ params['score'][0].astype(np.float64))


def scored(params, texts, made=PLAIN, prompt='q', ended=True, mesh=None):
  scores, has = reward_models.score_texts(made, params, [prompt] * len(texts), texts, [ended] * len(texts), mesh)
  assert has.all() and scores.dtype == np.float32
  return scores


def test_score_is_read_after_the_last_token(params):
  """Failure: off by one: the score is that before the end token, of the padding, or an end is put where the completion was cut."""
  ended, cut = scored(params, ['abc', 'abcd']), scored(params, ['abcd'], ended=False)
  assert ended[0] == pytest.approx(after_last(params, [*b'qabc', BYTES.end_id]), abs=1e-5)
  assert cut[0] == pytest.approx(after_last(params, [*b'qabcd']), abs=1e-5)
  assert abs(ended[1] - cut[0]) > 0.01  # the end token counts
  shifted = scored(params, ['abc', 'abcd'], dataclasses.replace(PLAIN, shift=2.5))
  np.testing.assert_allclose(shifted, ended - 2.5, atol=1e-6)


def test_score_does_not_depend_on_the_batch(params, monkeypatch):
  """Failure: a score moves with padding, with whom a row shares a micro-batch, or with the mesh; rows come back in another order; or
  every number of rows is a program of its own."""
  shapes, run = [], reward_models.last_scores

  def spy(params, batch, *more):
    shapes.append(batch.tokens.shape)
    return run(params, batch, *more)

  monkeypatch.setattr(reward_models, 'last_scores', spy)
  together = scored(params, TEXTS)
  assert shapes == [(16, 24)]
  alone = np.concatenate([scored(params, [text]) for text in TEXTS])
  np.testing.assert_allclose(together, alone, atol=1e-5)
  assert np.abs(together[:, None] - together)[np.triu_indices(len(TEXTS), 1)].min() > 1e-3
  monkeypatch.setattr(reward_models, 'ROWS', 4)
  shapes.clear()
  mesh = sharding.make_mesh(4, 2, 1)
  places = jax.tree.map(
    lambda w: sharding.named(mesh, w.shape, w.axes, w.hf), model.weight_table(ARCH, ('scalar',)), is_leaf=model.is_weight
  )
  with jax.set_mesh(mesh):
    on_mesh = scored(jax.device_put(params, places), [*SHORT, *SHORT[::-1]], mesh=mesh)
  expected = [score for score, text in zip(together, TEXTS, strict=True) if text in SHORT]
  np.testing.assert_allclose(on_mesh, [*expected, *expected[::-1]], atol=1e-5)
  assert shapes == [(8, 16), (8, 16)]  # eight rows where four do not divide over the devices


def test_fewer_rows_where_they_are_long(monkeypatch):
  """Failure: long rows are scored as many at a time as short ones, and run out of memory."""
  shapes = []

  def fake(params, batch, *more):
    shapes.append(batch.tokens.shape)
    return np.zeros(len(batch.tokens))

  monkeypatch.setattr(reward_models, 'last_scores', fake)
  scored(None, ['x' * 4000] * 5 + ['y'] * 17)
  assert shapes == [(4, 4096), (4, 4096), (16, 16)]


class Other(ByteTokenizer):
  """A tokenizer of its own: other ids, another end, other turns."""

  def __init__(self):
    self.end_id, self.end_ids, self.vocab_size = 7, (7,), 200

  def encode(self, text):
    return [ord(c) + 10 for c in text]

  def chat(self, messages, add_generation_prompt):
    return ''.join(f'[{m["role"]}]{m["content"]}' for m in messages) + '[assistant]' * add_generation_prompt


def test_own_tokenizer_and_template():
  """Failure: a reward model reads the policy's tokens, template or end token instead of its own."""
  made = dataclasses.replace(PLAIN, tokenizer=Other(), template='Q {prompt} A')

  def read(prompt, text, ended=True, **changes):
    return reward_models.encode(dataclasses.replace(made, **changes), prompt, text, ended)

  assert read('why', 'so') == [*Other().encode('Q why Aso'), 7]
  assert read('why', 'so', False) == Other().encode('Q why Aso')
  talk = [{'role': 'user', 'content': 'why'}]
  assert read(talk, 'so', template='chat') == [*Other().encode('[user]why[assistant]so'), 7]
  with pytest.raises(ConfigError, match=r"'roles\.reward\.r\.template': 'Q \{prompt\} A' cannot act on a prompt of chat"):
    read(talk, 'so')
  thinking = '<think>x</think>so'
  assert read('why', thinking, template='{prompt}<think>\n') == [*Other().encode('why<think>\nx</think>so'), 7]
  assert read('why', thinking, template='{prompt}') == [*Other().encode('why' + thinking), 7]
  assert read('why', thinking, reads='answer') == [*Other().encode('Q why Aso'), 7]
  assert read('why', '<think>x', reads='answer') == []


ANSWERS = {
  '<think>a</think><answer> b </answer>': 'b', '<think>a</think> b\n': 'b', 'a</think>b': 'b', 'b': 'b', ' b ': 'b',
  '<answer>b</answer>': 'b', '<think>a <answer>x</answer></think>b': 'b', 'x</think><answer>b</answer> c': 'b',
  '': None, '<think>a': None, '<think>a</think>': None, '<think>a</think> ': None, '<answer>b': None, '<answer></answer>': None,
  '<think>a</think><answer>b': None, '<answer>a</answer><answer>b</answer>': None, '<think><answer>b</answer>': None,
}  # fmt: skip


@pytest.mark.parametrize('text', ANSWERS, ids=repr)
def test_answer_of(text):
  """Failure: a helpful answer is judged by its thinking, or a completion that never came to an answer is judged at all."""
  assert reward_models.answer_of(text) == ANSWERS[text]
  assert split_completion(text).answer in (None, '', ' b ', 'b')  # the same elements


def test_no_answer_is_no_verdict(params):
  """Failure: a row that has nothing to score gets a score, or moves those beside it."""
  made = dataclasses.replace(PLAIN, reads='answer', shift=1.0)
  texts = ['<think>a', '<think>a</think>bb', 'c']
  scores, has = reward_models.score_texts(made, params, ['q'] * 3, texts, [True] * 3)
  assert has.tolist() == [False, True, True] and scores[0] == 0
  np.testing.assert_allclose(scores[1:], scored(params, ['bb', 'c']) - 1, atol=1e-5)
  scores, has = reward_models.score_texts(made, params, [''], [''], [False])
  assert scores.tolist() == [0] and has.tolist() == [False]


def combined(rule, scores, has=None, safety=None, **options):
  scores = np.asarray(scores)
  has = np.ones(scores.shape, bool) if has is None else np.asarray(has)
  values, known = reward_models.combine(rule, scores, has, np.zeros(scores.shape[1]) if safety is None else safety, **options)
  return values.tolist(), known.tolist()


def test_ensembles():
  """Failure: an ensemble is combined over rows instead of members, or with another spread than the definition's."""
  scores = [[1.0, -2.0], [3.0, 0.0], [8.0, -1.0]]
  assert combined('mean', scores) == ([4, -1], [True, True])
  assert combined('minimum', scores) == ([1, -2], [True, True])
  std = [(26 / 3) ** 0.5, (2 / 3) ** 0.5]
  np.testing.assert_allclose(combined('mean_minus_std', scores, k=0.5)[0], [4 - 0.5 * std[0], -1 - 0.5 * std[1]], rtol=1e-12)
  assert combined('mean_minus_std', scores, k=0.0)[0] == [4, -1]
  has = [[True, True], [True, False], [True, True]]
  for rule in ('mean', 'minimum', 'mean_minus_std'):
    values, known = combined(rule, scores, has)
    assert known == [True, False] and values[1] == 0 and values[0] == combined(rule, scores)[0][0]
  with pytest.raises(ValueError, match='no rule'):
    combined('median', scores)


def test_helpful_and_safe():
  """Failure: Llama 2 takes the helpful score of an unsafe answer or of a safety prompt, takes the threshold for a logit, whitens over rows
  without a verdict, or whitens where nothing is trained."""
  helpful, safe = [5.0, 6.0, 7.0, 8.0, 100.0], [-1.73, -1.74, 2.0, 3.0, 0.0]  # sigmoid(-1.7346) = 0.15
  safety, has = [0, 0, 1, None, 0], [[True] * 5, [True] * 4 + [False]]
  raw = np.asarray([5.0, -1.74, 2.0, 8.0])
  expected = (raw - raw.mean()) / (np.sqrt(((raw - raw.mean()) ** 2).mean()) + 1e-4)
  values, known = combined('llama2', [helpful, safe], has, safety)
  np.testing.assert_allclose(values[:4], expected, rtol=1e-12)
  assert values[4] == 0 and known == [True] * 4 + [False]
  lower = combined('llama2', [helpful, safe], has, safety, threshold=0.1)[0]
  assert lower[1] > lower[2]  # -1.74 is safe enough, and the helpful 6 counts
  assert combined('llama2', [[0.7] * 3, [1e4, 5.0, 5.0]]) == ([0, 0, 0], [True] * 3)  # no spread: exactly 0, whatever std says
  assert combined('llama2', [[1.0], [-1e4]], [[False], [True]]) == ([0], [False])
  plain, known = combined('llama2', [helpful, safe], has, safety, whitened=False)
  assert plain[:4] == [5.0, -1.74, 2.0, 8.0] and plain[4] == 0 and known == [True] * 4 + [False]


def test_known_rewards(monkeypatch):
  """Failure: a model that nobody asked for is run, one is run twice in a step, or a missing score becomes a number."""
  ran, mesh = [], object()

  def fake(made, params, prompts, completions, ended, given):
    ran.append(made)
    assert (prompts, completions, ended, given) == (['p'] * 3, list('abc'), [True] * 3, mesh)
    return np.asarray(params, np.float32), np.asarray([True, True, made != 'b'])

  monkeypatch.setattr(reward_models, 'score_texts', fake)
  frozen = {'reward.a': [1, 2, 3], 'reward.b': [3, -2, 7], 'reward.c': [0, 0, 0]}
  combinations = {'low': Combination('minimum', ('a', 'b')), 'safe': Combination('llama2', ('a', 'b'), threshold=0.4)}

  def known(*functions, **columns):
    ran.clear()
    models = {name: name for name in 'abc'}
    return reward_models.known_rewards(functions, models, frozen, combinations, ['p'] * 3, list('abc'), [True] * 3, columns, mesh)

  assert known('accuracy', 'low', 'a') == {'low': [1, -2, None], 'a': [1, 2, 3]} and ran == ['a', 'b']
  assert known('low') == {'low': [1, -2, None]} and ran == ['a', 'b']
  assert known('c') == {'c': [0, 0, 0]} and ran == ['c']
  assert known('accuracy') == {} and ran == []
  assert known('safe')['safe'] == pytest.approx([1, -1, None], abs=1e-3)  # raw 1, -2
  assert known('safe', safety=[None, None, None]) == known('safe')
  with pytest.raises(ConfigError, match=r"'safety' of the data: 'false' is neither"):
    known('safe', safety=[True, 'false', None])
  marked = known('safe', safety=[True, False, True])['safe']  # raw 3, -2
  assert marked[0] > known('safe')['safe'][0] and marked[2] is None


def test_known_rewards_by_route(monkeypatch):
  """Failure: a model scores rows that nobody asks it about, a row gets the score of another, or the llama2 rule whitens over rows that are
  not its own."""
  ran = {}

  def fake(made, params, prompts, completions, ended, mesh):
    ran[made] = completions
    assert [p.upper() for p in prompts] == completions and ended == [c != 'D' for c in completions]
    return np.asarray([float(ord(c)) for c in completions], np.float32), np.asarray([c != 'C' for c in completions], bool)

  monkeypatch.setattr(reward_models, 'score_texts', fake)
  combinations = {'both': Combination('llama2', ('helpful', 'safe')), 'low': Combination('minimum', ('safe', 'other'))}
  models = {name: name for name in ('helpful', 'safe', 'other')}

  def known(functions, **routes):
    ran.clear()
    masks = {name: np.asarray([letter in letters for letter in 'ABCDE']) for name, letters in routes.items()}
    ended = np.asarray([True, True, True, False, True])
    frozen = {f'reward.{name}': None for name in models}
    return reward_models.known_rewards(
      functions, models, frozen, combinations, list('abcde'), list('ABCDE'), ended, {}, None, masks
    )

  assert known(['helpful', 'safe'], helpful='BD', safe='') == {'helpful': [None, 66, None, 68, None], 'safe': [None] * 5}
  assert ran == {'helpful': ['B', 'D'], 'safe': []}
  got = known(['both', 'helpful', 'low'], both='ABC', low='E')
  assert ran == {'helpful': list('ABCDE'), 'safe': list('ABCE'), 'other': ['E']}
  assert got['helpful'] == [65, 66, None, 68, 69] and got['low'] == [None] * 4 + [69]
  assert got['both'][:2] == pytest.approx([-1, 1], abs=1e-3) and got['both'][2:] == [None] * 3  # of 65 and 66 alone
  assert known(['both'])['both'][4] is not None


RUN = {'objective': {'name': 'reward_model'}, 'roles': {'policy': {'tokenizer': 'bytes', 'template': 'r1_zero'}}}


def test_resolve(tmp_path):
  """Failure: a run that trained no reward model pays rewards, or a model loses the tokenizer and template that it was trained with."""
  assert reward_models.resolve('r', Reward('run'), RUN) == Reward('run', 'bytes', 'r1_zero')
  own = Reward('run', 'tok', '{prompt}', 'answer')
  assert reward_models.resolve('r', own, RUN) == own
  for name in ('sft', 'process_reward_model', 'grpo'):
    with pytest.raises(ConfigError, match=rf"'roles\.reward\.r\.init': run is a run of objective '{name}'; a reward model is"):
      reward_models.resolve('r', Reward('run'), {**RUN, 'objective': {'name': name}})
  folder = str(FIXTURES / 'classifier')
  assert reward_models.resolve('r', Reward(folder), None) == Reward(folder, folder, 'plain')
  (tmp_path / 'x.gguf').touch()
  for path in (FIXTURES / 'llama', tmp_path / 'x.gguf'):
    with pytest.raises(ConfigError, match=rf"'roles\.reward\.r\.init': {path} is a language model and scores nothing"):
      reward_models.resolve('r', Reward(str(path)), None)
  with pytest.raises(ConfigError, match=r"'roles\.reward\.r\.init': 'absent' does not exist"):
    reward_models.resolve('r', Reward('absent'), None)


def test_make():
  """Failure: a missing or alien tokenizer is found in the middle of a run, or the error does not name its key."""
  folder = str(FIXTURES / 'classifier')  # it has none
  made = reward_models.make('r', Reward(folder, 'bytes', 'plain', 'answer'), ARCH, 0.5, 'bfloat16')
  assert isinstance(made.tokenizer, ByteTokenizer)
  assert dataclasses.replace(made, tokenizer=BYTES) == RewardModel('r', ARCH, BYTES, 'plain', 'answer', 0.5, 'bfloat16')
  for role, message in (
    (Reward(folder, folder, 'plain'), rf"'roles\.reward\.r\.tokenizer': the reward model has no tokenizer at '{folder}'"),
    (Reward(folder, 'bytes', 'r1zero'), r"'roles\.reward\.r\.template': 'r1zero' is none of"),
  ):
    with pytest.raises(ConfigError, match=message):
      reward_models.make('r', role, ARCH, 0.0, 'float32')
  with pytest.raises(ConfigError, match=r"'roles\.reward\.r\.tokenizer': 'bytes' has 264 ids, the model 263 embeddings"):
    reward_models.make('r', Reward('x', 'bytes', 'plain'), dataclasses.replace(ARCH, vocab_size=263), 0.0, 'float32')


def test_export_scores_the_same(tmp_path, params):
  """Failure: a reward model that goes through a Hugging Face folder scores otherwise, in any bit."""
  path = str(tmp_path / 'saved')
  weights.save(params, ARCH, path, heads=('scalar',), score_shift=0.3)
  role = reward_models.resolve('r', Reward(path, 'bytes'), None)
  made = reward_models.make('r', role, weights.read_arch(path), weights.score_shift(path), 'float32')
  again = scored(weights.load(path, made.arch, heads=('scalar',)), TEXTS, made)
  np.testing.assert_array_equal(again, scored(params, TEXTS, dataclasses.replace(PLAIN, shift=0.3)))
