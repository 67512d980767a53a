"""Rule rewards that read texts and lengths: closed forms, what must not be gamed, and hostile texts in linear time."""

import gzip
import itertools
import json
import math
import pathlib
import random
import re
import time

import pytest

from rl_reasoning import rule_rewards
from rl_reasoning.config import ConfigError
from rl_reasoning.verify import text

DATA = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data'
L = 100  # max_completion_length


def reward(name, completions, lengths=None, prompts=None, **arguments):
  """`lengths` stand for completion_ids of so many distinct tokens."""
  ids = None if lengths is None else [list(range(n)) for n in lengths]
  return getattr(rule_rewards, name)(prompts or ['q'] * len(completions), completions, ids, **arguments)


def think(chain: str) -> str:
  return f'<think>{chain}</think><answer>5</answer>'


RIGHT, WRONG = '<answer>5</answer>', '<answer>6</answer>'


# The chain of thought.


@pytest.mark.parametrize(
  'completion, chain',
  [
    ('<think>a</think>b', 'a'), ('a</think>b', 'a'), ('<think>a', 'a'), ('a', ''), ('', ''), ('<answer>5</answer>', ''),
    ('<think></think>a', ''), ('before <think>a</think>', 'before  a'), ('<think>a</think>b</think>c', 'a b'),
    ('<think>a<think>b', 'a b'), ('<think>a<answer>5</answer>', 'a 5'), ('<think>a<answer>5</think>', 'a 5'),
  ],
)  # fmt: skip
def test_chain_of_thought(completion, chain):
  """Failure: the answer is judged as thinking, a chain that was cut is lost, or a decoy <think> hides the real one."""
  assert text.chain_of_thought(completion).strip() == chain


# Language.

SENTENCES = {
  'en': 'First we need to add both numbers, because the question asks for their total.',
  'de': 'Zuerst müssen wir beide Zahlen addieren, weil nach der Größe gefragt wird.',
  'vi': 'Trước hết chúng ta cộng hai số này vì câu hỏi yêu cầu tổng của chúng.',
  'tr': 'Önce iki sayıyı toplamalıyız, çünkü soru bizden toplamı istiyor.',
  'zh': '首先，我们需要把这两个数相加，因为题目要求它们的总和。',
  'ja': 'まず二つの数を足す必要があります。問題では合計を求めているからです。',
  'ko': '먼저 두 수를 더해야 합니다. 문제에서 합계를 묻고 있기 때문입니다.',
  'ru': 'Сначала нужно сложить оба числа, так как в задаче спрашивают их сумму.',
  'ar': 'أولاً نحتاج إلى جمع العددين لأن السؤال يطلب المجموع.',
  'hi': 'पहले हमें दोनों संख्याओं को जोड़ना होगा क्योंकि प्रश्न में योग पूछा गया है।',
  'el': 'Πρώτα πρέπει να προσθέσουμε τους δύο αριθμούς, γιατί ζητείται το άθροισμα.',
  'he': 'קודם נחבר את שני המספרים, כי השאלה מבקשת את הסכום.',
  'th': 'ก่อนอื่นเราต้องบวกตัวเลขทั้งสองเพราะโจทย์ถามหาผลรวม',
}


@pytest.mark.parametrize('language, target', itertools.product(SENTENCES, SENTENCES))
def test_language(language, target):
  """Failure: a chain is paid for another script than the target's, or not for its own. (One script is one language.)"""
  share = text.language_share(SENTENCES[language], target)
  if text.LANGUAGES[language] == text.LANGUAGES[target]:
    assert share == 1.0
  elif (language, target) == ('ja', 'zh'):
    assert share == pytest.approx(10 / 32)  # its kanji
  else:
    assert share == 0.0


@pytest.mark.parametrize(
  'chain, language, share',
  [
    ('We need 加法 here', 'en', 8 / 10), ('We need 加法 here', 'zh', 2 / 10), ('然后 hence 因此', 'zh', 4 / 9),
    ('так hence', 'ru', 3 / 8), ('так hence', 'en', 5 / 8),  # short words of other scripts count
    ('数える' * 10, 'ja', 1.0), ('数学数学数学数学が', 'ja', 4 / 9), ('中文思维链很长', 'ja', 0.0),  # Chinese is no Japanese
    ('먼저 漢字', 'ko', 2 / 4), ('de\u0301ja\u0300 так', 'fr', 4 / 7), ('բարեւ hello', 'en', 5 / 10),  # a script of no target language here
  ],
)  # fmt: skip
def test_mixed_language(chain, language, share):
  """Failure: mixing is paid as if it were none: foreign words are short, or of a script that nobody listed."""
  assert text.language_share(chain, language) == pytest.approx(share)


@pytest.mark.parametrize('target', sorted(text.LANGUAGES))
def test_nothing_to_judge(target):
  """Failure: a chain without a word is paid, so that saying nothing is the best language."""
  for chain in (
    '',
    ' \n',
    '12 + 30 = 42',
    '😀🎉',
    '𝑥 + ℝ ≤ ∞',
    '\u200f\u202e',
    '$x+y$',
    '```python\nprint(1)\n```',
    '\\[ a = b \\]',
    '٣',
  ):
    assert text.language_share(chain, target) == 0.0
  assert reward('language', ['<think></think>', 'no tags at all', 'Hello <answer>5</answer>'], language=target) == [0, 0, 0]


MATHS_AND_CODE = [
  r'$\frac{width}{height} = \text{ratio}$', r'\(\alpha_{total} \leq \sqrt{length}\)', '\\[\nspeed = distance / time\n\\]',
  '$$\\begin{aligned} speed &= distance \\end{aligned}$$', '\\begin{align*}\nspeed = \\mathrm{distance}\n\\end{align*}',
  '```python\nfor number in range(length):\n  print(number)\n```', '`numbers.append(value)`', r'\boxed{42} \times \cdot',
  'x, ABC, cos, km', r'\frac{1}{2}', 'αβγ', '\\mathbb{R}', '𝑥𝑦 ∈ ℝⁿ', '\\begin{align}', '\\end{align}',
]  # fmt: skip


@pytest.mark.parametrize('piece', MATHS_AND_CODE)
def test_maths_and_code_are_no_language(piece):
  """Failure: formulas and code, which are the same in every language, lower a chain that is all Chinese, or Russian."""
  for language in ('zh', 'ru', 'ar'):
    assert text.language_share(f'{SENTENCES[language]} {piece} {SENTENCES[language]}', language) == 1.0


@pytest.mark.parametrize(
  'piece', ['```\n{}\n```', '`{}`', '${}$', '$$\\text{{{}}}$$', '\\[ \\text{{{}}} \\]', '\\begin{{a}}{}\\end{{a}}', '```{}']
)
def test_code_is_no_hiding_place(piece):
  """Failure: thinking in another language is free of charge inside a code fence or a formula."""
  hidden = piece.format('因此我们需要')
  assert text.language_share('hence ' + hidden, 'en') == pytest.approx(5 / 11)


def test_money_is_no_formula():
  """Failure: the words between two prices are taken for a formula."""
  chain = 'Она заплатила $5 потом hence $10, и $7 hence $9 together'
  russian = len('Оназаплатилапотоми')
  assert text.language_share(chain, 'ru') == pytest.approx(russian / (russian + 18))


def test_letters_of_every_kind():
  """Failure: accents written apart, wide letters or vowel signs tear words into fragments that are skipped or count as another script."""
  for chain, language in (
    ('cafe\u0301 de\u0301ja\u0300', 'fr'), ('ｈｅｌｌｏ', 'en'), ('naïve Œuvre ﬁnal', 'fr'), ('हिन्दी में', 'hi'), ('น้ำ', 'th'),
    ('שָׁלוֹם', 'he'), ('مَرْحَبًا', 'ar'), ('人々', 'zh'), ('ラーメン', 'ja'), ('\u1112\u1161\u11ab', 'ko'), ('ε ἐστίν', 'el'),
  ):  # fmt: skip
    assert text.language_share(chain, language) == 1.0
  assert text.language_share('I add 2 to it', 'en') == 1.0  # no long word: then the short ones count
  assert text.language_share('I add 2 to it', 'ru') == 0.0


def test_scripts_do_not_overlap():
  """Failure: a letter counts for the script that happens to stand first in the table."""
  everything = ''.join(map(chr, range(0x34000)))
  letters = {name: set(re.findall(f'[{kind}]', everything)) for name, kind in text.SCRIPTS.items()}
  for a, b in itertools.combinations(letters, 2):
    assert not letters[a] & letters[b], f'{a} and {b}'
  assert not [c for kind in letters.values() for c in kind if c.isdigit()]


def test_language_of_published_chains():
  """Failure: the share calls English chains of thought foreign, or misses those of marco-o1 that are in Chinese."""
  path = DATA / 'marco_o1_cot' / 'CoT_demo.json'
  if not path.exists():
    pytest.skip(f'{path} is absent')
  chains = [row['response'].replace('<Thought>', ' ').replace('</Thought>', ' ') for row in json.loads(path.read_text())]
  shares = [text.language_share(chain, 'en') for chain in chains]
  assert [n for n, share in enumerate(shares) if share < 0.9] == [1, 53, 58]  # a mixed one and two Chinese ones
  assert max(shares[53], shares[58]) < 0.05 and min(text.language_share(chains[n], 'zh') for n in (53, 58)) > 0.95
  assert sum(share > 0.99 for share in shares) >= 0.9 * len(shares)


def test_language_of_english_dialogues():
  """Failure: everyday English is not recognised."""
  path = DATA / 'hh_rlhf' / 'helpful_test.jsonl.gz'
  if not path.exists():
    pytest.skip(f'{path} is absent')
  with gzip.open(path, 'rt') as file:
    texts = [json.loads(line)['chosen'] for line in itertools.islice(file, 1000)]
  assert sum(text.language_share(t, 'en') > 0.99 for t in texts) >= 997
  assert max(text.language_share(t, 'zh') for t in texts) < 0.1


def test_language_reward():
  """Failure: the reward reads the answer, or its option moves nothing."""
  texts = ['<think>hence 因此</think>中文回答', '<think>hence</think>回答', '<think>回答，然后</think>hence', '<think>hence']
  assert reward('language', texts) == pytest.approx([5 / 7, 1, 0, 1])
  assert reward('language', texts, language='zh') == pytest.approx([2 / 7, 0, 1, 0])
  assert reward('language', ['因此</think>hence', '因此'], prompts=['q <think>'] * 2, language='zh') == [1, 1]
  with pytest.raises(ConfigError, match=r"'rewards.options.language.language': 'english' is none of en, "):
    reward('language', [], language='english')


# Steps.

STEPS = {
  '': 0, 'I add two and three.': 0, 'Step 1: add\nStep 2: double\nStep 3: stop': 3, '1. add\n2. double': 2, '1) add\n2) double': 2,
  '- add\n- double\n* halve': 3, '• add': 1, 'First, add it. Then, double it. Next, halve it. Finally, stop.': 4,
  '**Step 1:** add\n**Step 2:** double': 2, '### Step 1: add': 1, '  1. add\n    - now double': 2, '> 1. quoted': 1,
  # Inside a line, a number or a hyphen is no step.
  'it is 1. add': 0, '1.5 litres\n2.5 litres': 0, '-5 is less\n-7 too': 0, '---\n***': 0, 'the first, the next, and then, finally': 0,
  # Not gamed by marks alone, by saying a step again, or by nested marks.
  'Step 1: Step 2: Step 3: Step 4:': 0, '1.\n2.\n3.': 0, '- \n- \n- ': 0, 'First, Second, Third, Finally,': 0, '1. a\n2. b\n3. c': 0,
  '1. add\n2. Add!\n3.  ADD.': 1, '1. First, add it': 1, '- 3 + 4 = 7\n- 7 * 2 = 14': 2,
  # Any language, right to left too.
  '1. 先把两个数相加\n2. 再乘以二': 2, '1. نجمع العددين\n2. نضرب في اثنين': 2, '- 😀😀😀\n- 🎉🎉🎉': 0,
}  # fmt: skip


@pytest.mark.parametrize('chain', STEPS, ids=repr)
def test_count_steps(chain):
  """Failure: a list is not seen as steps, or bare and repeated marks are paid as steps."""
  assert text.count_steps(chain) == STEPS[chain]


def test_reasoning_steps():
  """Failure: steps outside the chain of thought are paid, or the reward does not stop at three."""
  listed = '1. add\n2. double\n3. halve\n4. stop'
  texts = [
    think(listed),
    think('1. add\n2. double'),
    think('1. add'),
    think('add'),
    listed,
    f'<think></think>{listed}',
    f'<think>{listed}',
  ]
  assert reward('reasoning_steps', texts) == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0, 1])
  assert reward('reasoning_steps', [[{'role': 'assistant', 'content': think(listed)}]]) == [1]


# The soft format.

SOFT = {
  think('a'): 1, f'x {think("a")} y': 1, '<think>a</think> so <answer>5</answer>.': 1, think('a') * 2: 1,
  '<think></think><answer></answer>': 1,
  '<think>a <answer> b</think><answer>5</answer>': 1, '<think>a<think>b</think><answer>5</answer>': 1,
  '': 0, 'x': 0, '<think>a</think><answer>5': 0, '<think>a<answer>5</answer>': 0, 'a</think><answer>5</answer>': 0,
  '<answer>5</answer><think>a</think>': 0, '<answer>5</answer></think><think>': 0, '<think>a</think>5</answer>': 0,
  '<THINK>a</THINK><ANSWER>5</ANSWER>': 0,
}  # fmt: skip


@pytest.mark.parametrize('completion', SOFT, ids=repr)
def test_format_soft(completion):
  """Failure: text around the elements costs the soft format, or a missing or early tag does not."""
  assert reward('format_soft', [completion]) == [SOFT[completion]]
  assert reward('format', [completion])[0] <= SOFT[completion]


def test_format_soft_after_an_opened_think():
  """Failure: the <think> that the template has opened is asked for a second time."""
  assert reward('format_soft', ['a</think> so <answer>5</answer>'], prompts=['q <think>\n']) == [1]


# Repetition.


def test_repeated_share_against_a_count():
  """Failure: doubling miscounts for sizes that are no power of two, or at the edges."""
  rng = random.Random(0)
  for _ in range(300):
    size, tokens = rng.randint(1, 9), [rng.randrange(3) for _ in range(rng.randint(0, 40))]
    grams = [tuple(tokens[n : n + size]) for n in range(len(tokens) - size + 1)]
    assert text.repeated_share(tokens, size) == (1 - len(set(grams)) / len(grams) if grams else 0)


def test_repetition():
  """Failure: the penalty is of another sign or scale, is of words (so that a loop without spaces is free), or a short text pays."""

  def penalty(ids, **options):
    return rule_rewards.repetition(['q'] * len(ids), ['x'] * len(ids), ids, **options)

  ids = [[], [7], [1, 2, 3], [1, 2, 1, 2, 1], [5] * 9, list(range(50))]
  assert penalty(ids, ngram_size=2) == pytest.approx([0, 0, 0, -1 / 2, -7 / 8, 0])
  assert penalty(ids, ngram_size=2, max_penalty=0.5) == pytest.approx([0, 0, 0, -1 / 4, -7 / 16, 0])
  assert penalty(ids, ngram_size=3, max_penalty=0.0) == [0] * 6
  assert penalty([[5] * 19, [5] * 21, [5] * 1019]) == pytest.approx([0, -1 / 2, -0.999])  # 20-grams
  assert [math.copysign(1, v) for v in penalty(ids[:1])] == [1]  # no -0.0 in the logs
  for key, value in (('ngram_size', 0), ('ngram_size', -1), ('ngram_size', 2.5), ('max_penalty', -1.0)):
    with pytest.raises(ConfigError, match=f"'rewards.options.repetition.{key}': {value}"):
      penalty([], **{key: value})


def test_repetition_grows_with_the_loop():
  """Failure: a longer loop after the same text costs less."""
  start = list(range(100, 150))
  ids = [start + [1, 2, 3] * n for n in range(60)]
  values = rule_rewards.repetition(['q'] * 60, ['x'] * 60, ids, ngram_size=4)
  assert values == sorted(values, reverse=True) and values[0] == 0 > values[-1] > -1


# Lengths.


def test_overlong():
  """Failure: DAPO's punishment begins, ends or slopes elsewhere."""
  lengths = [0, 1, 59, 60, 61, 80, 99, 100, 101, 10_000]
  values = reward('overlong', ['x'] * 10, lengths, max_completion_length=L, buffer=40)
  assert values == pytest.approx([0, 0, 0, 0, -1 / 40, -0.5, -39 / 40, -1, -1, -1])
  assert reward('overlong', ['x'] * 4, [80, 90, 100, 0], max_completion_length=L) == pytest.approx([0, -0.5, -1, 0])  # a fifth
  assert reward('overlong', ['x'] * 2, [50, 100], max_completion_length=L, buffer=L) == pytest.approx([-0.5, -1])
  assert reward('overlong', ['x'] * 3, [1, 2, 3], max_completion_length=3) == [0, 0, -1]
  for buffer in (0, -1, L + 1):
    with pytest.raises(ConfigError, match=f"'rewards.options.overlong.buffer': {buffer} is not from 1 to .*, 100"):
      reward('overlong', [], [], max_completion_length=L, buffer=buffer)


def test_cosine():
  """Failure: short right answers are not the best, wrong ones are not mirrored, or beyond the limit the cosine turns back."""
  lengths = [0, 25, 50, 75, 100, 150, 200]
  quarter = math.sqrt(0.5) / 4
  right = [1, 0.75 + quarter, 0.75, 0.75 - quarter, 0.5, 0.5, 0.5]
  assert reward('cosine', [RIGHT] * 7, lengths, answer=['5'] * 7, max_completion_length=L) == pytest.approx(right)
  wrong = [-1, -0.75 - quarter, -0.75, -0.75 + quarter, -0.5, -0.5, -0.5]
  assert reward('cosine', [WRONG] * 7, lengths, answer=['5'] * 7, max_completion_length=L) == pytest.approx(wrong)
  options = {'min_value_wrong': -10.0, 'max_value_wrong': 0.0, 'min_value_correct': 1.0, 'max_value_correct': 2.0}  # the paper's
  values = reward('cosine', [RIGHT, WRONG] * 3, [0, 0, 50, 50, 100, 100], answer=['5'] * 6, max_completion_length=L, **options)
  assert values == pytest.approx([2, -10, 1.5, -5, 1, 0])
  assert reward('cosine', [RIGHT] * 2, [5, 6], answer=[None, 'see above'], max_completion_length=L) == [None, None]
  for kind, value in (('wrong', 0.0), ('correct', 1.5)):
    with pytest.raises(ConfigError, match=f"'rewards.options.cosine.min_value_{kind}': {value} is above max_value_{kind}"):
      reward('cosine', [], [], max_completion_length=L, **{f'min_value_{kind}': value})


def test_length():
  """Failure: Kimi's reward is not of the group, pays long wrong answers, or divides by nothing."""
  texts, lengths = [RIGHT, WRONG, RIGHT, WRONG, RIGHT, WRONG], [10, 10, 20, 20, 30, 30]
  assert reward('length', texts, lengths, answer=['5'] * 6) == pytest.approx([0.5, 0, 0, 0, -0.5, -0.5])
  assert reward('length', [WRONG, WRONG, WRONG], [10, 27, 30], answer=['5'] * 3) == pytest.approx([0, -0.35, -0.5])
  assert reward('length', [RIGHT, WRONG, RIGHT], [7, 7, 7], answer=['5'] * 3) == [0, 0, 0]
  assert reward('length', [RIGHT], [7], answer=['5']) == [0]
  # Each prompt by itself, texts or messages.
  for prompts in (['a', 'a', 'b', 'b'], [[{'role': 'user', 'content': c}] for c in 'aabb']):
    assert reward('length', [RIGHT] * 4, [1, 3, 100, 300], prompts, answer=['5'] * 4) == [0.5, -0.5, 0.5, -0.5]


def test_length_without_verdict():
  """Failure: a row that is taken out of the step shifts the others, or is paid."""
  texts, gold = [RIGHT] * 4, ['5', None, '5', '5']
  assert reward('length', texts, [10, 1000, 20, 30], answer=gold) == [0.5, None, 0, -0.5]
  assert reward('length', texts, [1, 2, 3, 4]) == [None] * 4


def test_lengths_are_tokens():
  """Failure: an overlong penalty, a cosine or a length counts characters (open-r1, verl), so that long words cost more."""
  texts = [RIGHT, think('x' * 5000), think('因此' * 3000)]
  common = {'lengths': [90] * 3, 'answer': ['5'] * 3}
  for name in ('overlong', 'cosine'):
    values = reward(name, texts, max_completion_length=L, **common)
    assert len(set(values)) == 1 and -1 < values[0] < 1 and values[0] not in (0, 0.5)
  assert reward('length', texts, **common) == [0, 0, 0]
  assert reward('length', [RIGHT, RIGHT], [2, 1], answer=['5'] * 2) == [-0.5, 0.5]


@pytest.mark.parametrize('name', ['length', 'cosine', 'overlong', 'repetition'])
def test_tokens_are_needed(name):
  """Failure: without token ids a reward falls back to characters in silence."""
  limit = {'max_completion_length': L} if name in ('cosine', 'overlong') else {}
  with pytest.raises(ValueError, match=f"reward '{name}' counts tokens, and completion_ids is None"):
    reward(name, [RIGHT], answer=['5'], **limit)


def test_ranges_and_order():
  """Failure: somewhere a longer right answer is paid more, or a wrong one as much as a right one, or a value leaves its range."""
  rng = random.Random(1)
  for _ in range(100):
    limit, size = rng.randint(1, 300), rng.randint(2, 12)
    lengths = sorted(rng.randint(0, 2 * limit) for _ in range(size))
    gold = {'answer': ['5'] * size}
    overlong = reward('overlong', [RIGHT] * size, lengths, max_completion_length=limit, buffer=rng.randint(1, limit))
    right = reward('cosine', [RIGHT] * size, lengths, max_completion_length=limit, **gold)
    wrong = reward('cosine', [WRONG] * size, lengths, max_completion_length=limit, **gold)
    short, mixed = reward('length', [RIGHT] * size, lengths, **gold), [rng.choice((RIGHT, WRONG)) for _ in lengths]
    kimi = reward('length', mixed, lengths, **gold)
    assert all(column == sorted(column, reverse=True) for column in (overlong, right, short)) and wrong == sorted(wrong)
    assert all(-1 <= v <= 0 for v in overlong) and all(0.5 <= v <= 1 for v in right) and all(-1 <= v <= -0.5 for v in wrong)
    assert all(-0.5 <= v <= (0.5 if t == RIGHT else 0) and v <= s for v, s, t in zip(kimi, short, mixed, strict=True))


# Hostile texts.

MEGABYTE = 1_000_000
HOSTILE = [
  '$',
  '$a ',
  '`',
  '```',
  '\\[',
  '\\begin{',
  '\\end{',
  '我a',
  'ա',
  '1. \n',
  '*',
  '*******\n',
  '<think>',
  '</think>',
  '\\',
  ' ',
  '- a\n',
  '\u0301',
]


@pytest.mark.parametrize('piece', HOSTILE, ids=repr)
def test_hostile_texts(piece):
  """Failure: a megabyte of marks without an end stalls the step (0.1 to 0.6 s where linear; minutes where quadratic)."""
  hostile = '<think>' + piece * (MEGABYTE // len(piece))
  start = time.process_time()
  for completion in (hostile, hostile + '</think><answer>5</answer>'):
    for name in ('language', 'reasoning_steps', 'format_soft'):
      assert 0 <= reward(name, [completion])[0] <= 1
  assert time.process_time() - start < 5


def test_hostile_repetition():
  """Failure: n-grams of any size over a long completion take more than linear time or memory."""
  start = time.process_time()
  for size in (1, 20, 50_000):
    assert text.repeated_share([5] * 100_000, size) == pytest.approx(1 - 1 / (100_001 - size))
    assert text.repeated_share(range(100_000), size) == 0
  assert time.process_time() - start < 3


def test_no_rows():
  """Failure: a call without rows, which checks a function's options, crashes."""
  for name in ('format_soft', 'reasoning_steps', 'language', 'length', 'cosine', 'repetition', 'overlong'):
    limit = {'max_completion_length': L} if name in ('cosine', 'overlong') else {}
    assert reward(name, [], [], **limit) == []
