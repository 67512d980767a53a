"""Filters: what stays, what is dropped and why, and what a join draws."""

import collections
import json

import pytest

from rl_reasoning import data, filters, tokenizer
from rl_reasoning.config import ConfigError, Data

NUMBERS = ' '.join(map(str, range(20)))
GOOD = '<think>Two and two are four.</think><answer>4</answer>'


def row(completion: str, prompt: str = 'q', **more) -> dict:
  return {'prompt': prompt, 'completion': completion, **more}


def reasons(rows: list[dict], **step) -> list[str]:
  judge = filters.make_filter(step, 'filter.steps[0]')[1]
  return [judge(r) for r in rows]


def write(path, rows: list[dict]) -> str:
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  return str(path)


def read(folder) -> list[dict]:
  return [json.loads(line) for line in (folder / 'data.jsonl').read_text().splitlines()]


def filtered(inputs: dict, folder, **section) -> dict:
  return filters.run(filters.resolve({'filter': {'inputs': inputs, **section}}), str(folder))


JUDGED = [  # step, (row, why it is dropped)
  (
    {'name': 'format'},
    [(row(GOOD), ''), (row(f'Well: {GOOD}'), 'no format'), (row('4'), 'no format'), (row(GOOD + GOOD), 'no format'),
     (row('<think> </think><answer>4</answer>'), 'empty'), (row('<think>a</think><answer>\n</answer>'), 'empty'),
     (row('4', chain_of_thought='2+2=4'), ''), (row('4', chain_of_thought=''), 'no format')],
  ),
  (
    {'name': 'answered'},
    [(row(GOOD), ''), (row('<think>a</think> so \\boxed{4}'), ''), (row('So it is clearly the number 4 and no other one.'), 'no answer'),
     (row('<think>\\boxed{4} and'), 'no answer'), (row('\\boxed{4} or \\boxed{5}'), 'no answer')],
  ),
  (
    {'name': 'language', 'least': 0.8},
    [(row(GOOD), ''), (row('<think>2+2=4</think><answer>4</answer>'), ''), (row('<think>我们先把两个数字加起来</think>4'), 'mixed'),
     (row('<think>Twenty letters of English here 数</think>'), ''), (row('<think>Twenty letters 我们先把两个数字加起来</think>'), 'mixed'),
     (row('好', chain_of_thought='All of this is English'), '')],
  ),
  ({'name': 'language', 'language': 'zh'}, [(row(GOOD), 'mixed'), (row('我们'), ''), (row('<think></think>'), '')]),
  (
    {'name': 'length', 'min_characters': 2, 'max_characters': 4},
    [(row('1'), 'too short'), (row('22'), ''), (row('4444'), ''), (row('55555'), 'too long'), (row('1' * 9), 'too long')],
  ),
  (
    {'name': 'length', 'max_tokens': 3, 'tokenizer': 'bytes'},
    [(row('<think>1</think>'), ''), (row('<think>12</think>'), 'too long'), (row('é1'), ''), (row('éé'), 'too long')],
  ),
  (
    {'name': 'repetition', 'ngram_size': 2, 'most': 0.5},
    [(row('a b a b a b a b'), 'repeats'), (row('A b a B a b A B'), 'repeats'), (row('the cat sat on the mat'), ''),
     (row('一二一二一二一二'), 'repeats'), (row('一二三四五六七八'), ''), (row('a'), ''), (row('ab ab ab'), '')],
  ),
  (
    {'name': 'paragraphs', 'max_characters': 5},
    [(row('<think>12345\n\n12345</think>1234567'), ''), (row('<think>12345\n6</think>'), 'long'), (row('<think>a\n \nb'), '')],
  ),
  (
    {'name': 'code_blocks'},
    [(row('<think>`x`</think>```\nx\n```'), ''), (row('<think>```\nx\n```</think>x'), 'has one'), (row('```\nx\n```'), '')],
  ),
  (
    {'name': 'reward', 'least': 0.7},
    [(row('a', reward=0.7 - 1e-8), ''), (row('a', reward=0.6), 'too low'), (row('a'), 'none'), (row('a', reward=None), 'none')],
  ),
  (
    {'name': 'duplicates'},
    [(row('a b'), ''), (row('a  b\n'), 'seen'), (row('A b'), ''), (row('a b', 'Q '), 'seen'), (row('a b', 'p'), ''), (row('ab'), '')],
  ),
  (
    {'name': 'near_duplicates', 'threshold': 0.6},
    [(row(f'First add {NUMBERS} and stop.'), ''), (row(f'first, add {NUMBERS} and go.'), 'seen'), (row('Something else'), ''),
     ({'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': f'First add {NUMBERS} and stop.'}]}, 'seen')],
  ),
  ({'name': 'per_prompt', 'most': 2}, [(row('a'), ''), (row('b', 'Q'), ''), (row('c'), 'over'), (row('a', 'p'), ''), (row('d'), 'over')]),
]  # fmt: skip


@pytest.mark.parametrize(('step', 'cases'), JUDGED, ids=lambda x: x['name'] if isinstance(x, dict) else '')
def test_filters(step, cases):
  """Failure: a filter drops what is good, keeps what it is there for, or gives another reason."""
  assert reasons([r for r, _ in cases], **step) == [why for _, why in cases]


def test_conversations():
  """Failure: a conversation is judged by what its user says, or two of them are one."""

  def talk(question: str, answer: str) -> dict:
    return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]}

  assert reasons([talk('数字是什么意思', GOOD), talk('What is it', '数字')], name='language') == ['', 'mixed']
  assert reasons([talk('q', 'a'), talk('Q', 'a'), talk('r', 'a'), row('a', 'q')], name='duplicates') == ['', 'seen', '', 'seen']


def test_join(tmp_path):
  """Failure: a row is lost, comes twice or from the wrong input, a size is not met, or counts do not add up."""
  reasoning = [row(f'a{n // 2}', f'q{n}', answer='x') for n in range(40)]
  general = [{'prompt': f'g{n}', 'chain_of_thought': 'c', 'completion': f'b{n}', 'reward': n} for n in range(30)]
  inputs = {'reasoning': write(tmp_path / 'r.jsonl', reasoning), 'general': write(tmp_path / 'g.jsonl', general)}
  steps = ({'name': 'length', 'max_characters': 40}, {'name': 'per_prompt', 'most': 1})
  got = filtered(inputs, tmp_path / 'out', steps=steps, sizes={'general': 8, 'reasoning': 50}, seed=3)
  rows = read(tmp_path / 'out')
  own = [r for r in rows if r in reasoning]
  assert sorted(map(str, own)) == sorted(map(str, reasoning)) and own != reasoning  # all, shuffled
  others = [r for r in rows if r in general]
  assert len(others) == 8 == len(rows) - 40 and len({r['prompt'] for r in others}) == 8
  kinds = ''.join('r' if r in reasoning else 'g' for r in rows)
  assert 'rg' in kinds and 'gr' in kinds and kinds.strip('g') != 'r' * 40
  assert got['rows'] == 48 and got['missing'] == {'reasoning': 10} and got['dropped'] == {}
  assert got['inputs'] == {
    'general': {'read': 30, 'passed': 30, 'rows': 8}, 'reasoning': {'read': 40, 'passed': 40, 'rows': 40},
  }  # fmt: skip
  assert '10 of reasoning' in filters.describe(got)
  assert json.loads((tmp_path / 'out' / 'summary.json').read_text()) == got
  assert sorted(f.name for f in (tmp_path / 'out').iterdir()) == ['data.jsonl', 'summary.json']
  filtered(dict(reversed(inputs.items())), tmp_path / 'same', steps=steps, sizes={'reasoning': 50, 'general': 8}, seed=3)
  assert read(tmp_path / 'same') == rows  # the order of keys is no matter
  filtered(inputs, tmp_path / 'other', steps=steps, sizes={'general': 8}, seed=4)
  assert read(tmp_path / 'other') != rows


def test_steps_come_in_order(tmp_path):
  """Failure: what a step counts or remembers are rows that an earlier one has dropped, or the reasons do not add up."""
  rows = [row('aaaa'), row('b'), row('b'), row('c'), row('d', 'p')]
  inputs = {'x': write(tmp_path / 'x.jsonl', rows)}
  steps = [{'name': 'length', 'max_characters': 3}, {'name': 'duplicates'}, {'name': 'per_prompt', 'most': 2}]
  got = filtered(inputs, tmp_path / 'one', steps=tuple(steps))
  assert sorted(r['completion'] for r in read(tmp_path / 'one')) == ['b', 'c', 'd']
  assert got['dropped'] == {'duplicates: seen': 1, 'length: too long': 1}
  got = filtered(inputs, tmp_path / 'two', steps=tuple(reversed(steps)))
  assert sorted(r['completion'] for r in read(tmp_path / 'two')) == ['b', 'd']
  assert got['dropped'] == {'length: too long': 1, 'per_prompt: over': 2}
  assert got['rows'] + sum(got['dropped'].values()) == 5 == sum(n['read'] for n in got['inputs'].values())


def test_trains(tmp_path):
  """Failure: SFT does not read the rows, or imitates another text than was filtered."""
  rows = [row(GOOD, f'q{n}') for n in range(20)] + [row('4', f'p{n}', chain_of_thought='Two') for n in range(20)]
  filtered({'x': write(tmp_path / 'x.jsonl', rows)}, tmp_path / 'out', steps=({'name': 'format'},))
  chosen = Data(task='dataset', path=str(tmp_path / 'out' / 'data.jsonl'), cache_dir=str(tmp_path / 'cache'))
  tok = tokenizer.ByteTokenizer()
  train = data.open_train(chosen, 0)
  read_back = train.draw(train.first(), len(train))[0]
  texts = {tok.decode(data.encode_row(r, tok, 'plain')[0]).removeprefix(r['prompt']) for r in read_back}
  assert texts == {GOOD, '<think>Two</think><answer>4</answer>'} == {filters.text_of(r) for r in rows}


def test_done_is_not_done_again(tmp_path, monkeypatch):
  """Failure: hours of filtering are repeated, or an old output is taken for that of other rows or settings."""
  path = tmp_path / 'x.jsonl'
  inputs = {'x': write(path, [row('a'), row('bb')])}
  first, made = filtered(inputs, tmp_path / 'out'), (tmp_path / 'out' / 'data.jsonl').stat().st_mtime_ns
  assert filtered(inputs, tmp_path / 'out') == first and (tmp_path / 'out' / 'data.jsonl').stat().st_mtime_ns == made
  write(path, [row('a')])
  assert filtered(inputs, tmp_path / 'out')['rows'] == 1
  assert filtered(inputs, tmp_path / 'out', seed=1)['filter']['seed'] == 1
  calls = collections.Counter()

  def cut(*arguments):
    calls['cut'] += 1
    raise KeyboardInterrupt

  monkeypatch.setattr(filters.train, 'write_atomically', cut)
  with pytest.raises(KeyboardInterrupt):
    filtered(inputs, tmp_path / 'out', seed=2)
  monkeypatch.undo()
  assert calls['cut'] and not (tmp_path / 'out' / 'summary.json').exists()
  assert filtered(inputs, tmp_path / 'out', seed=2)['rows'] == 1


def test_folders(tmp_path):
  """Failure: the shards of a data set are not all read."""
  (tmp_path / 'set').mkdir()
  for n in range(3):
    write(tmp_path / 'set' / f'part-{n}.jsonl', [row(f'a{n}')])
  (tmp_path / 'set' / 'README.md').write_text('no rows')
  assert filtered({'x': str(tmp_path / 'set')}, tmp_path / 'out')['rows'] == 3


REFUSED = [
  ({'steps': ({'name': 'langauge'},)}, "'filter.steps[0].name': 'langauge' is none of format, answered"),
  ({'steps': ({'name': 'format'}, {'least': 1.0})}, "'filter.steps[1].name': None is none of"),
  ({'steps': ({'name': 'format', 'least': 1.0},)}, "'filter.steps[0].least' is unknown: format has no options"),
  ({'steps': ({'name': 'per_prompt'},)}, "'filter.steps[0].most' is missing"),
  ({'steps': ({'name': 'per_prompt', 'most': 0},)}, "'filter.steps[0]': per_prompt: most 0 must be at least 1"),
  ({'steps': ({'name': 'per_prompt', 'most': 1.5},)}, "'filter.steps[0].most': 1.5 is not of type int"),
  ({'steps': ({'name': 'language', 'language': 'xx'},)}, "language 'xx' is none of en"),
  ({'steps': ({'name': 'language', 'least': 0.0},)}, 'least 0.0 is not in (0, 1]'),
  ({'steps': ({'name': 'length'},)}, 'length: no limit is set'),
  ({'steps': ({'name': 'length', 'max_tokens': -1},)}, 'a limit is negative'),
  ({'steps': ({'name': 'length', 'max_tokens': 1},)}, 'tokenizer goes with min_tokens or max_tokens'),
  ({'steps': ({'name': 'length', 'max_characters': 1, 'tokenizer': 'bytes'},)}, 'tokenizer goes with min_tokens'),
  ({'steps': ({'name': 'length', 'max_tokens': 1, 'tokenizer': 'no.gguf'},)}, "filter length: tokenizer 'no.gguf'"),
  ({'steps': ({'name': 'repetition', 'ngram_size': 0},)}, 'ngram_size 0'),
  ({'steps': ({'name': 'repetition', 'most': 1.0},)}, 'most 1.0 is not in [0, 1)'),
  ({'steps': ({'name': 'paragraphs', 'max_characters': 0},)}, 'max_characters 0 must be positive'),
  ({'inputs': {}}, "'filter.inputs' is empty"),
  ({'inputs': {'x': '/no/such'}}, "'filter.inputs.x': '/no/such' does not exist"),
  ({'sizes': {'y': 1}}, "'filter.sizes.y': 'y' is none of filter.inputs: x"),
  ({'sizes': {'x': 0}}, "'filter.sizes.x': 0 must be at least 1"),
  ({'seed': -1}, "'filter.seed': -1 must not be negative"),
  ({'seeds': 1}, "'filter.seeds' is unknown; did you mean 'filter.seed'"),
  ({'steps': ({'name': 'reward', 'least': 1.0},)}, "the filters leave none of 1 rows: {'reward: none': 1}"),
]


@pytest.mark.parametrize(('section', 'wanted'), REFUSED)
def test_refused(section, wanted, tmp_path):
  """Failure: a key that is misspelt, impossible or without effect is ignored, or refused without its name."""
  inputs = {'x': write(tmp_path / 'x.jsonl', [row('a')])}
  with pytest.raises(ConfigError) as caught:
    filtered(**{'inputs': inputs, 'folder': tmp_path / 'out', **section})
  assert wanted in str(caught.value) and not (tmp_path / 'out' / 'data.jsonl').exists()


def test_rows_that_nobody_can_imitate(tmp_path):
  """Failure: a row that SFT cannot read is found when the run begins, days later, or without its file and line."""
  for bad, wanted in (
    ({'prompt': 'q', 'answer': '4'}, 'nothing to imitate'),
    ({'completion': 'a'}, 'no column prompt, messages or text'),
  ):
    path = write(tmp_path / 'x.jsonl', [row('a'), bad])
    with pytest.raises(ConfigError, match=f'{path}:2: .*{wanted}'):
      filtered({'x': path}, tmp_path / 'out')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match='holds no file that ends in'):
    filtered({'x': str(tmp_path / 'empty')}, tmp_path / 'out')
  with pytest.raises(ConfigError, match='cannot act beside a section filter: data'):
    filters.resolve({'filter': {'inputs': {'x': 'y'}}, 'data': {}})


def test_every_filter_is_tested():
  """Failure: a filter was added without a row above."""
  assert set(filters.FILTERS) == {case[0]['name'] for case in JUDGED}
