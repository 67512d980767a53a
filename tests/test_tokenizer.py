"""Text and token ids: round trips, end tokens, chat templates, templates of prompts, and where thinking and answer lie."""

import json
import pathlib

import pytest
import tokenizers
import transformers
from tokenizers import decoders, pre_tokenizers

from rl_reasoning import weights
from rl_reasoning.config import ConfigError
from rl_reasoning.tokenizer import (
  THINK_INSTRUCTION,
  ByteTokenizer,
  HFTokenizer,
  Parts,
  from_thinking,
  load,
  render_completion,
  render_messages,
  render_prompt,
  split_completion,
)  # fmt: skip

CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
# As templates of reasoning models do: only the last turn keeps its thinking.
FORGETFUL = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
  "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|pad|>', '<s>']


def make_folder(path, eos='<|im_end|>', pad='<|pad|>', generation_eos=None, template=CHATML):
  """A byte-level tokenizer as a Hugging Face folder; it puts <s> first where special tokens are asked for."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
  inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  inner.add_special_tokens(SPECIALS)
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', inner.token_to_id('<s>'))]
  )
  names = {k: v for k, v in (('eos_token', eos), ('pad_token', pad)) if v}
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
  fast.chat_template = template
  fast.save_pretrained(path)
  if generation_eos is not None:
    (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': generation_eos}))
  return str(path)


TEXTS = ['', 'plain', 'Größe 数学 🙂 é', 'a\x00b\r\n\t ', ' two  spaces ', '{prompt} %s \\boxed{1}']


@pytest.mark.parametrize('text', TEXTS, ids=repr)
def test_round_trip(text, tmp_path):
  """Failure: what a model reads or writes is another text than the one that was meant or that is graded."""
  for tokenizer in (ByteTokenizer(), load(make_folder(tmp_path))):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert len(ids) == len(text.encode())  # no special token is added


def test_byte_tokenizer():
  """Failure: a tag is more than one token, is lost in decoding, or ids that no text has break the decoding."""
  tok = ByteTokenizer()
  text = '<user>q<end><assistant><think>é</think><answer>5</answer>'
  ids = tok.encode(text)
  assert [i for i in ids if i >= 256] == [
    tok.ids[t] for t in ('<user>', '<end>', '<assistant>', '<think>', '</think>', '<answer>', '</answer>')
  ]
  assert tok.decode(ids) == text.replace('<end>', '')
  assert tok.vocab_size == 264 and sorted(tok.texts) == list(range(256, 264)) and tok.end_ids == (tok.end_id,) != (tok.pad_id,)
  assert tok.decode([0xC3, tok.pad_id, 0xA9]) == '\ufffd\ufffd' and tok.decode([65, 300, 66]) == 'A\ufffdB'
  assert tok.decode([0xC3, 0xA9, 0xC3]) == 'é\ufffd'
  assert tok.encode('<thin') == list(b'<thin')


def test_byte_chat():
  """Failure: a role is rendered as another, or a turn has no end."""
  turns = [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'}, {'role': 'assistant', 'content': 'a'}]
  assert ByteTokenizer().chat(turns, False) == '<user>s<end><user>u<end><assistant>a<end>'
  assert ByteTokenizer().chat(turns[:2], True) == '<user>s<end><user>u<end><assistant>'


@pytest.mark.parametrize(
  'settings,end,ends',
  [
    ({}, '<|im_end|>', {'<|im_end|>'}),
    ({'generation_eos': 'both'}, '<|im_end|>', {'<|im_end|>', '<|endoftext|>'}),
    ({'generation_eos': 'one', 'eos': '<|im_end|>'}, '<|im_end|>', {'<|im_end|>', '<|endoftext|>'}),
    ({'generation_eos': 'one', 'eos': None}, '<|endoftext|>', {'<|endoftext|>'}),
  ],
)
def test_end_ids(tmp_path, settings, end, ends):
  """Failure: one of several end tokens is not honoured, and completions run on to the limit (trl#7039)."""
  both = [256 + SPECIALS.index('<|im_end|>'), 256 + SPECIALS.index('<|endoftext|>')]
  numbers = {'both': both, 'one': both[1], None: None}[settings.get('generation_eos')]
  tok = HFTokenizer(make_folder(tmp_path, **{**settings, 'generation_eos': numbers}))
  assert tok.end_id == tok.inner.convert_tokens_to_ids(end)
  assert set(tok.end_ids) == {tok.inner.convert_tokens_to_ids(t) for t in ends} and tok.end_id in tok.end_ids
  assert tok.vocab_size == 256 + len(SPECIALS)
  assert tok.decode(tok.encode('a<|im_start|>b') + [tok.end_id]) == 'a<|im_start|>b'


def test_end_ids_of_config_json(tmp_path):
  """Failure: where there is no generation_config.json, what config.json says is not heard, or a damaged one is taken for none."""
  other = 256 + SPECIALS.index('<|endoftext|>')
  folder = pathlib.Path(make_folder(tmp_path))
  (folder / 'config.json').write_text(json.dumps({'model_type': 'qwen2', 'eos_token_id': [other]}))
  assert other in load(str(folder)).end_ids
  (folder / 'generation_config.json').write_text('{}')
  assert other not in load(str(folder)).end_ids
  (folder / 'generation_config.json').write_text('{"eos_token_id": ')
  with pytest.raises(ValueError, match=r'generation_config\.json: no JSON object'):
    load(str(folder))


def test_no_end_id(tmp_path):
  """Failure: a tokenizer that cannot say where a completion ends is taken."""
  with pytest.raises(ValueError, match='no end id'):
    HFTokenizer(make_folder(tmp_path, eos=None))


@pytest.mark.parametrize('pad', ['<|im_end|>', None])
def test_pad_equals_end(tmp_path, pad):
  """Failure: with pad == eos the end token is lost from what is imitated, or a tokenizer without padding cannot be used."""
  tok = HFTokenizer(make_folder(tmp_path, pad=pad))
  assert tok.pad_id == tok.end_id
  pieces = render_messages([{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}], tok)
  assert pieces == [('<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n', False), ('a<|im_end|>\n', True)]
  assert tok.encode(pieces[1][0])[1] == tok.end_id


def test_ids_past_the_vocabulary(tmp_path):
  """Failure: a model with a padded embedding samples an id without text, and the run crashes."""
  tok = HFTokenizer(make_folder(tmp_path))
  assert tok.decode([tok.encode('a')[0], 5000]).startswith('a')


def test_load(tmp_path, monkeypatch):
  """Failure: '~' is not the home folder, or 'bytes' is looked for as a folder."""
  monkeypatch.setenv('HOME', str(tmp_path))
  make_folder(tmp_path / 'tok')
  assert isinstance(load('~/tok'), HFTokenizer) and isinstance(load('bytes'), ByteTokenizer)


def test_render_prompt(tmp_path):
  """Failure: the model is asked something other than the template says."""
  tok, hf = ByteTokenizer(), HFTokenizer(make_folder(tmp_path))
  chat = '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n'
  assert render_prompt('1+1=', 'plain', tok) == '1+1='
  assert render_prompt('1+1=', 'Q: {prompt}\nA: {{}}', tok) == 'Q: 1+1=\nA: {{}}'
  assert render_prompt('1+1=', 'r1_zero', tok).endswith('User: 1+1=. Assistant:')
  assert render_prompt('1+1=', 'chat', tok) == '<user>1+1=<end><assistant>'
  assert render_prompt('1+1=', 'chat', hf) == chat.format('1+1=')
  assert render_prompt('1+1=', 'chat_think', hf) == chat.format('1+1=' + THINK_INSTRUCTION)
  assert render_prompt([{'role': 'user', 'content': 'hi'}], 'plain', hf) == chat.format('hi')


@pytest.mark.parametrize('prompt', ['{prompt}', 'say {prompt} twice', '{0} {x} }{', '%s \\1 {{prompt}}'])
@pytest.mark.parametrize('template', ['plain', 'Q: {prompt} A:', 'r1_zero'])
def test_prompt_with_braces_stands_as_it_is(prompt, template):
  """Failure: the user's text is itself taken for a template."""
  before, after = render_prompt('@', template, ByteTokenizer()).split('@')
  assert render_prompt(prompt, template, ByteTokenizer()) == before + prompt + after


def test_template_without_prompt_is_refused():
  """Failure: a mistyped template name becomes every prompt of the run."""
  with pytest.raises(ConfigError, match=r"'roles\.policy\.template': 'r1zero' is none of plain, r1_zero, chat"):
    render_prompt('1+1=', 'r1zero', ByteTokenizer())


def test_render_completion():
  """Failure: the demonstrations are not in the format that is rewarded."""
  assert render_completion({'completion': '5'}) == '5'
  assert render_completion({'completion': '5', 'chain_of_thought': ''}) == '<answer>5</answer>'
  full = render_completion({'completion': '5', 'chain_of_thought': '2+3=5'})
  assert full == '<think>2+3=5</think><answer>5</answer>'
  assert split_completion(full) == Parts('2+3=5', '5', True)


def turns(*texts):
  return [{'role': ('user', 'assistant')[n % 2], 'content': text} for n, text in enumerate(texts)]


def test_render_messages(tmp_path):
  """Failure: an assistant turn is not imitated, a user turn is, or text is lost between the pieces."""
  for tok in (ByteTokenizer(), HFTokenizer(make_folder(tmp_path))):
    messages = [{'role': 'system', 'content': 'S'}, *turns('q1', 'a1', 'q2', 'a2', 'q3')]
    pieces = render_messages(messages, tok)
    assert ''.join(text for text, _ in pieces) == tok.chat(messages[:-1], False)
    assert [imitate for _, imitate in pieces] == [False, True, False, True]
    assert [text.startswith(a) for (text, _), a in zip(pieces[1::2], ('a1', 'a2'), strict=True)] == [True, True]
    assert 'q2' in pieces[2][0] and not any('q' in text for text, imitate in pieces if imitate)


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path):
  """Failure: a conversation is trained on that the model will never see."""
  tok = HFTokenizer(make_folder(tmp_path, template=FORGETFUL))
  one, two = turns('q', '<think>t</think>a'), turns('q', '<think>t</think>a', 'q', 'a')
  assert [imitate for _, imitate in render_messages(one, tok)] == [False, True]
  with pytest.raises(ValueError, match='rewrites earlier turns'):
    render_messages(two, tok)
  with pytest.raises(ValueError, match='no assistant turn'):
    render_messages(turns('q'), tok)


SPLITS = {
  '<think>t</think><answer>5</answer>': Parts('t', '5', True),
  ' <think>a\nb</think>\n\n<answer>\n5\n</answer>\n': Parts(' a\nb', '\n5\n', True),
  '<think></think><answer></answer>': Parts('', '', True),
  '<answer>5</answer>': Parts(None, '5', False),
  't</think><answer>5</answer>': Parts('t', '5', False),
  '<think>t</think>x<answer>5</answer>': Parts('t', '5', False),
  '<think>t</think><answer>5</answer>x': Parts('t', '5', False),
  'x<think>t</think><answer>5</answer>': Parts('xt', '5', False),
  '<think>t</think><answer>5</answer><answer>6</answer>': Parts('t', None, False),
  '<think>t<think>u</think><answer>5</answer>': Parts('tu', '5', False),
  '<think>t</think></think><answer>5</answer>': Parts('t', '5', False),
  '<think><answer>4</answer></think><answer>5</answer>': Parts('<answer>4</answer>', '5', False),
  '<answer>5</answer><think>t</think>': Parts('<answer>5</answer>t', None, False),
  '<think><answer>5</answer>': Parts(None, None, False),
  '<think>t</think><answer>5': Parts('t', None, False),
  '<think>t</think>5': Parts('t', None, False),
  '<Think>t</Think><answer>5</answer>': Parts(None, '5', False),
  '': Parts(None, None, False),
}


@pytest.mark.parametrize('text', SPLITS, ids=repr)
def test_split_completion(text):
  """Failure: thinking is taken for the answer, or a malformed completion for a well-formed one."""
  assert split_completion(text) == SPLITS[text]


def test_thinking_opened_by_the_prompt():
  """Failure: a completion is judged as if its prompt had not opened the thinking, or as if any prompt had."""
  for prompt in ('<think>', 'q <think>\n'):
    assert from_thinking(prompt, 't</think>') == '<think>t</think>'
  for prompt in ('q', '<think> q', '', [{'role': 'user', 'content': '<think>'}]):
    assert from_thinking(prompt, 't</think>') == 't</think>'


def test_added_tokens(tmp_path):
  """Failure: an added token comes out as several ids, moves the others, or is lost when the tokenizer is saved."""
  folder = make_folder(tmp_path / 'own')
  plain, more = load(folder), load(f'{folder} + <think> </think>')
  text = 'he <think>he</think> he'
  ids = more.encode(text)
  assert more.decode(ids) == text and more.vocab_size == plain.vocab_size + 2
  assert [ids.count(plain.vocab_size + i) for i in (0, 1)] == [1, 1] and more.encode('he he') == plain.encode('he he')
  (tmp_path / 'saved').mkdir()
  weights.save_tokenizer(f'{folder} + <think> </think>', (tmp_path / 'saved').absolute())
  assert load(str(tmp_path / 'saved')).encode(text) == ids
  with pytest.raises(ValueError, match="'bytes' takes no further tokens"):
    load('bytes + <x>')
