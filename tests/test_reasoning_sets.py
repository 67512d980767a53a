"""Published sets in their own columns: every layout gives the same three columns, and what does not fit is refused or counted."""

import json
import pathlib

import pytest

from rl_reasoning import data, tokenizer
from rl_reasoning.config import ConfigError, Data
from rl_reasoning.tasks import reasoning_sets
from rl_reasoning.tasks.preference import Unusable

THOUGHT = (
  '<|begin_of_thought|>\n\nWell, 2+2.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nIt is \\boxed{4}.\n\n<|end_of_solution|>'
)
THINK = '<think>\nWell, 2+2.\n</think>\n\nIt is \\boxed{4}.'
MARCO = '<Thought>\nWell, 2+2.\n</Thought>\n<Output>\nIt is \\boxed{4}.\n</Output>'
TOLD = {'from': 'system', 'value': 'Think in the marks.'}
MADE = {'prompt': 'What is 2+2?', 'chain_of_thought': 'Well, 2+2.', 'completion': 'It is \\boxed{4}.'}
GOLD = {'answer': '4', 'answer_kind': 'math'}


def turns(said, user='user', assistant='assistant'):
  return [{'from': user, 'value': 'What is 2+2?'}, {'from': assistant, 'value': said}]


OPENR1 = {
  'problem': 'What is 2+2?', 'solution': 'Four.', 'answer': '4', 'problem_type': 'Algebra', 'question_type': 'math-word-problem',
  'source': 'olympiads', 'uuid': 'x', 'is_reasoning_complete': [True, False, True, True],
  'generations': ['<think>No.</think>5', '<think>Well', THINK, '<think>Sum.</think>4'],
  'correctness_math_verify': [False, True, True, True],
  'correctness_llama': None, 'finish_reasons': None, 'correctness_count': 2, 'messages': [{'role': 'user', 'content': 'What is 2+2?'}],
}  # fmt: skip
PUBLISHED = {
  'openr1_math': (OPENR1, {**MADE, **GOLD}),
  'openr1_math, by Llama': (
    {**OPENR1, 'correctness_math_verify': None, 'correctness_llama': [False, False, True, False]},
    {**MADE, **GOLD},
  ),
  'openthoughts_metadata': (
    {'problem': 'What is 2+2?', 'deepseek_reasoning': 'Well, 2+2.', 'deepseek_solution': 'It is \\boxed{4}.', 'domain': 'math'},
    MADE,
  ),
  'conversations': ({'system': 'Think in the marks.', 'conversations': turns(THOUGHT)}, MADE),
  'conversations, human': ({'conversations': [TOLD, *turns(THINK, 'human', 'gpt')]}, MADE),
  's1k': (
    {'solution': '4', 'question': 'What is 2+2?', 'cot_type': 'math', 'metadata': '{}', 'cot': None,
     'thinking_trajectories': ['Well, 2+2.'], 'attempt': 'It is \\boxed{4}.'},
    {**MADE, **GOLD},
  ),
  's1k_1_1': (
    {'solution': 'By induction.', 'question': 'What is 2+2?', 'gemini_thinking_trajectory': 'x', 'gemini_attempt': 'y',
     'deepseek_thinking_trajectory': 'Well, 2+2.', 'deepseek_attempt': 'It is \\boxed{4}.', 'deepseek_grade': 'Yes'},
    MADE,
  ),
  'marco_o1': ({'instruction': 'What is 2+2?', 'response': MARCO}, MADE),
  'marco_o1, output': ({'instruction': 'What is 2+2?', 'output': MARCO}, MADE),
  'marco_o1_messages': (
    {'messages': [{'role': 'user', 'content': 'What is 2+2?'}, {'role': 'assistant', 'content': MARCO}]},
    MADE,
  ),
  'numina_cot': (
    {'source': 'olympiads', 'problem': 'What is 2+2?', 'solution': 'Well, $\\boxed{4}$.', 'messages': [{'role': 'user', 'content': '?'}]},
    {'prompt': 'What is 2+2?', 'chain_of_thought': 'Well, $\\boxed{4}$.', 'completion': '4', **GOLD},
  ),
  'limo': (
    {'question': 'What is 2+2?', 'solution': 'Well. **Final Answer** \\boxed{4}', 'answer': 4},
    {'prompt': 'What is 2+2?', 'chain_of_thought': 'Well. **Final Answer** \\boxed{4}', 'completion': '4', **GOLD},
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_layouts(name):
  """Failure: a layout is taken for another one, a part is lost or dressed, or a row cannot be trained on in the format."""
  row, wanted = PUBLISHED[name]
  (made, *_) = reasoning_sets.convert(row, 'f:1')
  assert made == wanted == reasoning_sets.convert(row, 'f:1', name.partition(',')[0])[0]
  assert tokenizer.split_completion(tokenizer.render_completion(made)).well_formed


def test_every_verified_generation():
  """Failure: a wrong or cut generation is imitated, or one whose text breaks the format takes the others with it."""
  assert [m['completion'] for m in reasoning_sets.convert(OPENR1, 'f:1')] == ['It is \\boxed{4}.', '4']
  broken = {**OPENR1, 'generations': ['', '', '<think>so <answer></think>4', '<think>Sum.</think>4']}
  assert [m['chain_of_thought'] for m in reasoning_sets.convert(broken, 'f:1')] == ['Sum.']


LEFT_OUT = [
  ({'conversations': turns('It is 4.')}, reasoning_sets.NO_MARKS),
  ({'conversations': turns(THOUGHT.replace('<|end_of_thought|>', ''))}, reasoning_sets.NO_MARKS),
  ({'conversations': turns(THOUGHT + THOUGHT)}, reasoning_sets.NO_MARKS),
  ({'conversations': turns('<think>a</think>b</think>c')}, reasoning_sets.NO_MARKS),
  ({'instruction': 'q', 'response': MARCO.removesuffix('</Output>')}, reasoning_sets.NO_MARKS),
  ({'instruction': 'q', 'response': '<Thought> </Thought><Output>4</Output>'}, reasoning_sets.EMPTY),
  ({'instruction': ' ', 'response': MARCO}, reasoning_sets.EMPTY),
  ({'conversations': turns('<think>I write <answer> now</think>4')}, reasoning_sets.OUR_TAGS),
  ({**OPENR1, 'correctness_math_verify': [False] * 4}, reasoning_sets.UNVERIFIED),
  ({**OPENR1, 'correctness_math_verify': None}, reasoning_sets.UNVERIFIED),
  ({**PUBLISHED['numina_cot'][0], 'solution': 'Hence proved.'}, reasoning_sets.NO_BOX),
]  # fmt: skip


@pytest.mark.parametrize('row, why', LEFT_OUT)
def test_left_out(row, why):
  """Failure: a row that teaches no thinking, or the wrong format, is trained on."""
  with pytest.raises(Unusable, match='^' + why.replace('(', r'\(')):
    reasoning_sets.convert(row, 'f:1')


REFUSED = [
  ({'text': 'x'}, 'no known layout .* has the columns text'),
  ({'conversations': 'x'}, "column 'conversations' is no list"),
  ({'conversations': [{'from': 'me', 'value': 'x'}]}, "column 'conversations' is no list"),
  ({'conversations': turns(THINK) + turns(THINK)}, 'has turns of user, assistant, user, assistant, not of user, assistant'),
  ({'conversations': []}, 'has turns of nobody'),
  ({'instruction': 'q', 'response': 3}, "column 'response' is int, not text"),
  ({**OPENR1, 'generations': 'x'}, "column 'generations' is no list of texts"),
  ({**OPENR1, 'correctness_math_verify': [True]}, "'correctness_math_verify' is no list of 4"),
  ({**PUBLISHED['s1k'][0], 'thinking_trajectories': []}, "'thinking_trajectories' is no list of texts"),
  ({'messages': [{'role': 'user'}]}, "column 'messages' is not a list"),
]  # fmt: skip


@pytest.mark.parametrize('row, why', REFUSED)
def test_refused(row, why):
  """Failure: a file of another layout is converted to nonsense, or refused without file and line."""
  with pytest.raises(ConfigError, match=f'^f:1: .*{why}'):
    reasoning_sets.convert(row, 'f:1')
  with pytest.raises(ConfigError, match="layout 'limo' wants other columns"):
    reasoning_sets.convert(OPENR1, 'f:1', 'limo')


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def asked(n):
  return [{'question': f'What is {i}+1?', 'solution': f'Well, {i}+1.', 'answer': str(i + 1)} for i in range(n)]


def test_splits(tmp_path, capsys):
  """Failure: a set without a test split has none here or trains on it, its second copy is read too, or what is left out is not told."""

  def prompts(split, path, **options):
    return [row['prompt'] for row in reasoning_sets.rows(split, 0, None, str(path), **options)]

  path = write(tmp_path / 'limo' / 'limo.jsonl', [*asked(200), {'question': 'q', 'solution': 's', 'answer': ' '}])
  train, test = prompts('train', path.parent), prompts('test', path.parent)
  assert len(train) + len(test) == 200 and 5 < len(test) < 40 and not {*train} & {*test}
  assert (train, test) == (prompts('train', path), prompts('test', path))
  assert '1 of 201 rows are left out: 1 ' + reasoning_sets.EMPTY in capsys.readouterr().err
  assert len(prompts('train', path, test_share=0)) == 200 and prompts('test', path, test_share=0) == []

  write(tmp_path / 'hub' / 'data' / 'train-00000-of-00001.jsonl', asked(50))
  write(tmp_path / 'hub' / 'all' / 'train-00000-of-00001.jsonl', asked(50))
  assert len(prompts('train', tmp_path / 'hub', test_share=0)) == 50
  write(tmp_path / 'hub' / 'data' / 'test-00000-of-00001.jsonl', asked(3))
  assert prompts('train', tmp_path / 'hub') == [row['question'] for row in asked(50)[3:]]
  with pytest.raises(ConfigError, match=r"'data\.options\.test_share' cannot act"):
    prompts('train', tmp_path / 'hub', test_share=0)
  with pytest.raises(ConfigError, match=r"'data\.options\.layout': 'lima' is none of"):
    prompts('train', tmp_path / 'hub', layout='lima')
  write(tmp_path / 'bad.jsonl', [*asked(1), {'x': 1}])
  with pytest.raises(ConfigError, match=r'bad\.jsonl:2: no known layout'):
    prompts('train', tmp_path / 'bad.jsonl')


def test_generations_as_rows(tmp_path):
  """Failure: `all_generations` gives one, or a size counts problems in the place of rows."""
  path = str(write(tmp_path / 'r1.jsonl', [OPENR1]))
  for count, options in ((1, {}), (2, {'all_generations': True})):
    rows = list(reasoning_sets.rows('train', 0, None, path, test_share=0, **options))
    assert len(rows) == count and all(set(row) == {*MADE, *GOLD} for row in rows)
  assert len(list(reasoning_sets.rows('train', 0, 1, path, test_share=0, all_generations=True))) == 1


def test_trained_on(tmp_path):
  """Failure: SFT cannot read the task, or imitates other text than thought and answer in their tags."""
  path = write(tmp_path / 'rows.jsonl', [PUBLISHED['conversations'][0]])
  options = {'test_share': 0.0, 'layout': 'conversations'}
  source = data.load(
    Data(task='reasoning_sets', path=str(path), options=options, cache_dir=str(tmp_path / 'c')), 'train', 0, None
  )
  assert source[0] == MADE
  tok = tokenizer.ByteTokenizer()
  tokens, flags = data.encode_row(source[0], tok, 'plain')
  said = tok.decode([token for token, flag in zip(tokens, flags) if flag])
  assert said == '<think>Well, 2+2.</think><answer>It is \\boxed{4}.</answer>'


MARCO_SAMPLE = pathlib.Path(__file__).parent.parent.parent / 'shared' / 'data' / 'marco_o1_cot' / 'CoT_demo.json'


@pytest.mark.skipif(not MARCO_SAMPLE.exists(), reason=f'no {MARCO_SAMPLE}')
def test_marco_o1_as_published(capsys):
  """Failure: the published sample is not read: 123 of its 125 rows are well formed."""
  rows = list(reasoning_sets.rows('train', 0, None, str(MARCO_SAMPLE), test_share=0))
  assert len(rows) == 123 and f'2 of 125 rows are left out: 2 {reasoning_sets.NO_MARKS}' in capsys.readouterr().err
  assert rows[0]['completion'] == 'yes' and rows[0]['chain_of_thought'].startswith('ok, i need')
  assert all(tokenizer.split_completion(tokenizer.render_completion(row)).well_formed for row in rows)
