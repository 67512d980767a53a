"""The command line of text: what is streamed is what is sampled, thinking is folded, and mistakes are one line."""

import io
import itertools
import sys

import jax
import pytest

from rl_reasoning import chat, config, generate, inference, model, rollout, sharding, tokenizer
from rl_reasoning.build import Run
from rl_reasoning.config import Rollout

TOKENIZER = tokenizer.ByteTokenizer()
ARCH = model.Arch(264, 16, 32, 1, 2, 2, 8)
END = TOKENIZER.end_id


def make_talker(template='chat', **settings) -> chat.Talker:
  chosen = config.resolve({'roles': {'policy': {'template': template}}, 'rewards': {'functions': ()}})
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  run = Run(chosen, None, ARCH, tokenizer.ByteTokenizer(), mesh, None, None)  # type: ignore[arg-type]
  return chat.Talker(run, None, Rollout(**{'max_completion_length': 18, 'temperature': 0.0, 'chunk': 6, **settings}), 5)


@pytest.mark.parametrize('temperature, chunk, ends', [(0.0, 6, (END,)), (1.0, 12, (END, *range(32)))])
def test_stream(temperature, chunk, ends):
  """Failure: the chat shows other tokens than sampling gives, some twice or late, or what follows the end token."""
  params = jax.device_get(jax.jit(model.init, static_argnums=1)(jax.random.key(1), ARCH))
  talker = make_talker(max_completion_length=12, temperature=temperature, chunk=chunk)._replace(params=params)
  talker.run.tokenizer.end_ids = ends
  prompt = TOKENIZER.encode('1+1=')
  rolled = rollout.generate(
    params, ARCH, [prompt], settings=talker.settings, group=1, end_ids=ends, key=jax.random.fold_in(jax.random.key(5), 2),
    mesh=talker.run.mesh,
  )  # fmt: skip
  got = list(chat.stream(talker, prompt, 2))
  assert got[-1] == rolled.tokens_NC[0, : rolled.length_N[0]].tolist() and rolled.truncated_N[0] == (temperature == 0)
  assert len(got) > 1 and all(b[: len(a)] == a and len(b) - len(a) <= chat.PACE for a, b in itertools.pairwise(got))


def spoken(text: str, prompt='q', pieces=1, **how) -> tuple[str, str]:
  """(what the terminal shows, what is returned) of a text that comes some tokens at a time."""
  ids, out = [*TOKENIZER.encode(text), END], io.StringIO()
  states = [ids[:n] for n in (*range(1, len(ids), pieces), len(ids))]
  said = chat.say(iter(states), prompt, TOKENIZER, out, **{'unfold': False, 'live': False, **how})
  return out.getvalue(), said


@pytest.mark.parametrize('pieces', [1, 3, 50])
def test_folded(pieces):
  """Failure: thinking is shown, or hidden for good, a tag flickers through, tokens are counted wrong, or half a character is shown."""
  text = '<think>a é b</think>\nfour ½'
  assert spoken(text, pieces=pieces) == ('thinking… 7 tokens\nfour ½\n', text)
  assert spoken('a</think>four', 'q<think>', pieces) == ('thinking… 1 tokens\nfour\n', 'a</think>four')
  assert spoken(text, pieces=pieces, unfold=True)[0] == 'a é b\nthinking… 7 tokens\nfour ½\n'
  assert spoken('four <b> < é', pieces=pieces)[0] == 'four <b> < é\n'
  assert spoken('<thi', pieces=pieces)[0] == '<thi\n' and spoken('', pieces=pieces)[0] == '\n'
  assert spoken('<think>so it', pieces=pieces)[0] == 'thinking… 7 tokens\n\n'
  assert spoken('a\x1b[2Jb', pieces=pieces)[0] == 'a\ufffd[2Jb\n'


def test_live():
  """Failure: at a terminal the count of tokens stands still or leaves its traces, or a file is written to as if it were a screen."""
  shown, _ = spoken('<think>abc</think>d', live=True)
  assert shown == ''.join(f'\r\033[Kthinking… {n} tokens' for n in (1, 2, 3, 4)) + '\r\033[Kthinking… 4 tokens\nd\n'
  assert '\033' not in spoken('<think>abc</think>d')[0]


def test_interrupted_answer():
  """Failure: Ctrl-C ends the conversation, or loses what was said."""

  def states():
    yield TOKENIZER.encode('ab')
    raise KeyboardInterrupt

  out = io.StringIO()
  assert chat.say(states(), 'q', TOKENIZER, out, unfold=False, live=False) == 'ab' and out.getvalue() == 'ab [interrupted]\n'


@pytest.fixture
def answers(monkeypatch):
  """A model that thinks, and then repeats how long its prompt is; what it is asked."""
  asked = []

  def stream(talker, prompt, turn):
    asked.append((TOKENIZER.decode(prompt).replace('<user>', '|U:').replace('<assistant>', '|A:'), turn))
    yield [*TOKENIZER.encode(f'<think>hm</think>no. {turn}'), END]

  monkeypatch.setattr(chat, 'stream', stream)
  return asked


def test_conversation(answers):
  """Failure: the model does not see what was said before, sees its own thinking, or a command is asked as a question."""
  out = io.StringIO()
  lines = ['hi\n', '\n', '/unfold\n', 'why?\n', '/nothing\n', '/new\n', '/fold\n', 'bye\n', '/quit\n', 'never\n']
  told = chat.chat(make_talker(), iter(lines), out, unfold=False, live=False)
  assert answers == [('|U:hi|A:', 0), ('|U:hi|A:no. 0|U:why?|A:', 1), ('|U:bye|A:', 2)]
  assert told == [{'role': 'user', 'content': 'bye'}, {'role': 'assistant', 'content': 'no. 2'}]
  fold = 'thinking… 3 tokens\n'
  help_, *rest = out.getvalue().split('\n', 1)
  assert help_ == chat.HELP
  assert rest == [f'{fold}no. 0\nhm\n{fold}no. 1\n/nothing is no command: {chat.HELP}\n{fold}no. 2\n']


def test_templates(answers):
  """Failure: a template that knows no turns is handed some, or the instruction to think is missing from a turn."""
  out = io.StringIO()
  chat.chat(make_talker('Q: {prompt}'), ['hi', 'why?'], out, unfold=False, live=False)
  assert [asked for asked, _ in answers] == ['Q: hi', 'Q: why?'] and 'every question stands alone' in out.getvalue()
  answers.clear()
  chat.chat(make_talker('chat_think'), ['hi', 'why?'], out, unfold=False, live=False)
  assert [asked.count('Think step by step') for asked, _ in answers] == [1, 1]  # of the question that stands


@pytest.fixture
def opened(monkeypatch):
  """generate.evaluate.open_run gives a network of nobody; what it was asked for."""
  asked = []

  def open_run(chosen, source):
    asked.append((chosen, source))
    talker = make_talker(chosen.roles.policy.template or 'chat')
    return talker.run._replace(speaks=source != 'scores'), None, {}

  monkeypatch.setattr(generate.evaluate, 'open_run', open_run)
  return asked


def test_command_line(answers, opened, monkeypatch, capsys):
  """Failure: chat does not read what is piped into it, ask asks something else, or a flag is lost on the way."""
  monkeypatch.setattr(sys, 'stdin', io.StringIO('one\ntwo'))
  assert generate.main(['chat', '--checkpoint=folder', '--seed=3', '--temperature=0', '--max-tokens=9', '--dtype=bfloat16']) == 0
  assert [turn for _, turn in answers] == [0, 1] and capsys.readouterr().out.count('thinking… 3 tokens') == 2
  chosen, source = opened[0]
  assert source == 'folder' and chosen.model.dtype == 'bfloat16' and chosen.roles.policy.template == 'chat'
  answers.clear()
  assert generate.main(['ask', '--checkpoint=folder', '--unfold', '--template=plain', 'what', 'is']) == 0
  assert answers == [('what is', 0)] and capsys.readouterr().out == 'hm\nthinking… 3 tokens\nno. 0\n'


def test_settings_of_a_talk(answers, opened, monkeypatch):
  """Failure: a flag does not reach the sampler."""
  seen = []
  monkeypatch.setattr(chat, 'answer', lambda talker, *rest, **how: seen.append((talker.settings, talker.seed)) or [])
  generate.main(['ask', '--checkpoint=x', '--seed=3', '--temperature=0.5', '--top-p=0.8', '--max-tokens=9', 'q'])
  generate.main(['ask', '--checkpoint=x', '--temperature=0', 'q'])
  assert seen == [
    (Rollout(max_completion_length=9, temperature=0.5, top_p=0.8, chunk=256), 3),
    (Rollout(max_completion_length=1024, temperature=0.0, chunk=256), 0),
  ]


@pytest.mark.parametrize(
  ('argv', 'wanted'),
  [
    ([], "'' is no command; python -m rl_reasoning.generate scale | chat | ask"),
    (['talk'], "'talk' is no command"),
    (['chat'], '--checkpoint'),
    (['ask', '--checkpoint=x'], 'question'),
    (['chat', '--checkpoint=x', '--temprature=1'], '--temprature=1'),
    (['chat', '--checkpoint=x', '--temperature=-1'], '--temperature=-1.0 is out of range'),
    (['chat', '--checkpoint=x', '--top-p=0'], '--top-p=0.0 is out of range'),
    (['chat', '--checkpoint=x', '--max-tokens=0'], '--max-tokens=0 is out of range'),
    (['chat', '--checkpoint=x', '--dtype=float3'], "'model.dtype': 'float3' is none of"),
    (['chat', '--checkpoint=scores'], '--checkpoint=scores: is a reward model'),
    (['scale', '--config=configs/scale.py', '--workdir=x'], '--checkpoint=RUN_OR_WEIGHTS is missing'),
    (['scale', '--config=configs/scale.py', '--checkpoint=x'], '--workdir=DIR is missing'),
    (['scale', '--config=configs/demo.py', '--checkpoint=x', '--workdir=x'], 'the stages of a pipeline'),
    (['scale', '--config=configs/tiny.py', '--checkpoint=x', '--workdir=x'], "section 'scale' is missing"),
    (
      ['scale', '--config=configs/scale.py', '--checkpoint=x', '--workdir=x', '--config.optim.learning_rate=1'],
      "\n  'optim.learning_rate'",
    ),
  ],
)
def test_refused(argv, wanted, opened, capsys):
  """Failure: a mistake on the command line is ignored, or is a traceback."""
  assert generate.main(argv) == 2 and wanted in capsys.readouterr().err


def test_missing_checkpoint(capsys):
  """Failure: a checkpoint that is not there is a traceback."""
  assert generate.main(['ask', '--checkpoint=/no/such', 'q']) == 2
  assert '--checkpoint=/no/such: does not exist' in capsys.readouterr().err


def test_scale(monkeypatch, tmp_path, capsys):
  """Failure: the command forgets an override or what it has found."""
  point = {'label': '4', 'accuracy': 0.5, 'accuracy_ci95': [0.4, 0.6], 'tokens': 12.0}
  seen = []

  def scale(job, source, workdir, overwrite):
    seen.append((job.config.eval.size, list(job.methods), source, workdir, overwrite))
    return {'methods': {'best': {'method': 'best_of_n', 'by': 'oracle', 'points': [point]}}}

  monkeypatch.setattr(inference, 'scale', scale)
  argv = ['scale', '--config=configs/scale.py', '--checkpoint=x', '--workdir=y', '--config.eval.size=7', '--overwrite']
  assert generate.main([*argv, "--config.scale.more={'method': 'vote'}"]) == 0
  assert seen[0][0] == 7 and 'more' in seen[0][1] and seen[0][2:] == ('x', 'y', True)
  shown = capsys.readouterr().out
  assert 'best: best_of_n by oracle' in shown and '0.500 [0.400, 0.600]' in shown and 'y/scale.md, scale.png' in shown
