"""Configs and the command line: read, overridden, checked key by key, hashed; no field that nobody reads, no mistake that leaves traces."""

import ast
import collections.abc
import dataclasses
import inspect
import json
import os
import pathlib
import subprocess
import sys

import pytest
from etils import epath
from ml_collections import ConfigDict

from rl_reasoning import config, resolution, sharding, train
from rl_reasoning.config import Config, ConfigError

SOURCES = pathlib.Path(config.__file__).parent


def refusal(call, *arguments) -> str:
  with pytest.raises(ConfigError) as caught:
    call(*arguments)
  return str(caught.value)


@pytest.mark.parametrize(
  'text, value',
  [
    ('1e-4', 1e-4), ('3', 3), ('-3', -3), ('True', True), ('true', True), ('False', False), ('FALSE', False), ('None', None),
    ("('a', 'b')", ('a', 'b')), ("{'b1': 0.5}", {'b1': 0.5}), ("'3'", '3'), ('cosine', 'cosine'), ('runs/a b', 'runs/a b'),
    ('', ''), ('none', 'none'), ('{[]: 1}', '{[]: 1}'), ('1 +', '1 +'), ('nan', 'nan'),
  ],
)  # fmt: skip
def test_parse_value(text, value):
  """Failure: a value of the command line arrives as another value or type ('none' is a choice of model.remat and rewards.on_error)."""
  assert config.parse_value(text) == value and type(config.parse_value(text)) is type(value)


@pytest.fixture
def file(tmp_path):
  """text -> path of a config file that holds it."""

  def write(text: str) -> str:
    (tmp_path / 'c.py').write_text(text)
    return str(tmp_path / 'c.py')

  return write


GOOD = """
from ml_collections import ConfigDict

def get_config(size=1, name='x'):
  return ConfigDict({'seed': size, 'data': {'task': name, 'options': {'styles': [1, 2]}}})
"""


def test_read_file(file):
  """Failure: arguments do not reach get_config, or a ConfigDict does not become plain dicts and tuples."""
  path = file(GOOD)
  assert config.read_file(path) == {'seed': 1, 'data': {'task': 'x', 'options': {'styles': (1, 2)}}}
  got = config.read_file(f'{path}:size=7,name=a:b')
  assert got['seed'] == 7 and got['data']['task'] == 'a:b'
  assert type(got) is type(got['data']) is dict
  assert config.resolve(got).data.options == {'styles': (1, 2)}


@pytest.mark.parametrize(
  'text, arguments, wanted',
  [
    (GOOD, ':size', "'size' is not name=value"),
    (GOOD, ':sizes=3', "get_config: got an unexpected keyword argument 'sizes'"),
    (GOOD, ':size=1,size=2', 'size is given twice'),
    ('x = 1\n', '', 'c.py: defines no get_config'),
    ('get_config = 3\n', '', 'c.py: defines no get_config'),
    ('def get_config(a):\n  return {}\n', '', "missing a required argument: 'a'"),
    ('x = 1\ndef get_config(:\n  return {}\n', '', 'c.py:2: SyntaxError'),
    ('x = 1\n\nx = undefined\n', '', "c.py:3: NameError: name 'undefined' is not defined"),
    ('import json\ndef get_config():\n  return inner()\ndef inner():\n  return json.loads("{")\n', '', 'c.py:5: JSONDecodeError'),
    # Not mistaken for a wrong argument.
    ('def get_config():\n  return get_config(1)\n', '', 'c.py:2: TypeError: get_config() takes 0 positional arguments'),
    ('def get_config():\n  return None\n', '', 'c.py: get_config returns None, not a mapping'),
  ],
)  # fmt: skip
def test_read_file_refuses(file, text, arguments, wanted):
  """Failure: a mistake in the user's own config file ends in a traceback through ours, or does not say where it is."""
  assert wanted in refusal(config.read_file, file(text) + arguments)


def test_read_file_that_does_not_exist():
  """Failure: a misspelt path is a traceback."""
  assert "no file 'configs/nothing.py'" in refusal(config.read_file, 'configs/nothing.py:size=3')


def test_config_files_choose_their_own_python(file):
  """Failure: the future imports of config.py change what a config file means (annotations would be texts)."""
  config.read_file(file('def get_config():\n  def f(x: int): ...\n  return {"seed": f.__annotations__["x"](3)}\n'))


def test_overriding_one_key_keeps_its_section():
  """Failure: an override or a sweep drops the other keys of the section (a bug of several published trainers)."""
  base = {'seed': 1, 'optim': {'name': 'sgd', 'options': {'momentum': 0.9, 'nesterov': True}}}
  got = config.override(base, 'optim.options.momentum', 0.5)
  assert got == {'seed': 1, 'optim': {'name': 'sgd', 'options': {'momentum': 0.5, 'nesterov': True}}}
  assert base['optim']['options']['momentum'] == 0.9  # the base of a sweep stays
  assert config.override(base, 'eval.size', 3) == {**base, 'eval': {'size': 3}}
  merged = config.merge(base, {'optim': {'learning_rate': 1.0, 'options': {'momentum': 0.1}}, 'data': {'task': 'x'}})
  assert merged == {
    'seed': 1, 'optim': {'name': 'sgd', 'options': {'momentum': 0.1, 'nesterov': True}, 'learning_rate': 1.0},
    'data': {'task': 'x'},
  }  # fmt: skip
  # A section over a value and a value over a section are kept as they are, for `resolve` to refuse.
  assert config.override({'optim': 3}, 'optim.name', 'sgd') == {'optim': {'name': 'sgd'}}
  assert "'optim': 3 is not a section" in refusal(config.resolve, config.override(base, 'optim', 3))
  assert "'seed': {'x': 3} is not of type int" in refusal(config.resolve, config.override(base, 'seed.x', 3))


def test_flatten():
  """Failure: a key that was set is not among the keys set (it would not be refused where it cannot act)."""
  nested = {'a': 1, 'b': {'c': {'d': 2}, 'e': {}}, 'f': ()}
  assert config.flatten(nested) == {'a': 1, 'b.c.d': 2, 'b.e': {}, 'f': ()}


def test_coerce():
  """Failure: a good value is refused, or loses its type."""
  got = config.resolve({
    'seed': 3, 'optim': {'learning_rate': 1, 'options': {'b1': 0.5, 'names': ['a', {'x': None}]}}, 'eval': {'at_start': False},
    'rewards': {'functions': ['accuracy', 'format'], 'weights': [1, 0.5]},
  })  # fmt: skip
  assert type(got.seed) is int and got.eval.at_start is False
  assert got.optim.learning_rate == 1.0 and type(got.optim.learning_rate) is float
  assert got.rewards.functions == ('accuracy', 'format') and got.rewards.weights == (1.0, 0.5)
  assert type(got.rewards.weights[0]) is float and got.optim.options == {'b1': 0.5, 'names': ('a', {'x': None})}
  assert config.coerce(None, float | None, 'x') is None and config.coerce(2, float | None, 'x') == 2.0
  either = float | collections.abc.Mapping[str, float | collections.abc.Mapping[str, float]]
  assert config.coerce(1, either, 'x') == 1.0 and config.coerce({'a': 1, 'b': {'c': 2}}, either, 'x') == {
    'a': 1.0,
    'b': {'c': 2.0},
  }
  assert "'x.b.c': 'y' is not of type float" in refusal(config.coerce, {'b': {'c': 'y'}}, either, 'x')


@pytest.mark.parametrize(
  'key, value, wanted',
  [
    ('seed', True, 'True is not of type int'), ('seed', 1.0, '1.0 is not of type int'), ('seed', 'x', "'x' is not of type int"),
    ('eval.at_start', 1, '1 is not of type bool'), ('optim.learning_rate', True, 'True is not of type float'),
    ('optim.learning_rate', '1e-4 ', "'1e-4 ' is not of type float"), ('optim.grad_clip', float('nan'), 'nan is not finite'),
    ('optim.learning_rate', float('inf'), 'inf is not finite'), ('data.path', 3, '3 is not of type str'),
    ('rewards.functions', 'accuracy', "'accuracy' is not a tuple, write ('accuracy',)"), ('data', 'x', "'x' is not a section"),
    ('optim.options', 3, '3 is not a mapping'), ('objective', ('grpo',), 'is not a mapping'),
  ],
)  # fmt: skip
def test_coerce_refuses(key, value, wanted):
  """Failure: a value of a wrong type is converted in silence or refused without its key."""
  text = refusal(config.resolve, config.override({}, key, value))
  assert f'config key {key!r}: ' in text and wanted in text


@pytest.mark.parametrize(
  'settings, key',
  [
    ({'rewards': {'functions': ('a', 3)}}, 'rewards.functions[1]'),
    ({'rewards': {'weights': (1.0, float('nan'))}}, 'rewards.weights[1]'),
    ({'optim': {'options': {'b1': float('nan')}}}, 'optim.options.b1'),
    ({'optim': {'options': {'b': (1, {'c': float('inf')})}}}, 'optim.options.b[1].c'),
    ({'data': {'options': {'f': len}}}, 'data.options.f'),
  ],
)
def test_what_config_json_cannot_hold(settings, key):
  """Failure: NaN or an object inside a tuple or a free mapping gets into a config whose JSON it breaks."""
  assert repr(key) in refusal(config.resolve, settings)


@pytest.mark.parametrize(
  'settings, wanted',
  [
    ({'optim': {'learning_rat': 1}}, "config key 'optim.learning_rat' is unknown; did you mean 'optim.learning_rate'?"),
    ({'optimizer': {}}, "config key 'optimizer' is unknown; did you mean 'optim'?"),
    ({'roles': {'policy': {'inti': ''}}}, "'roles.policy.inti' is unknown; did you mean 'roles.policy.init'?"),
    ({'mesh': {'zzz': 1}}, "config key 'mesh.zzz' is unknown; known here: data, expert, fsdp, sequence, tensor"),
    ({'': 1}, "config key '' is unknown"),
  ],
)
def test_unknown_key(settings, wanted):
  """Failure: a misspelt key is ignored, or the right one is not shown."""
  assert wanted in refusal(config.resolve, settings)


@dataclasses.dataclass(frozen=True)
class Example:
  size: int
  given: str = ''

  def __post_init__(self):
    if self.size == 13:
      raise ValueError('size 13')


def test_from_mapping():
  """Failure: what resolution.py fills in can be set by a config, or a class's own refusal is a traceback."""
  assert config.from_mapping(Example, {'size': 3}, given='x') == Example(3, 'x')
  assert "'a.given' is unknown" in refusal(lambda: config.from_mapping(Example, {'size': 3, 'given': 'y'}, 'a.', given='x'))
  assert "'a.size' is missing" in refusal(config.from_mapping, Example, {}, 'a.')
  assert refusal(config.from_mapping, Example, {'size': 13}) == 'size 13'


BAD = [(key, 0, 'must be positive') for key in config.POSITIVE] + [(key, -1, 'must be positive') for key in config.POSITIVE]
BAD += [(key, -1, 'must not be negative') for key in config.NOT_NEGATIVE]
BAD += [(key, 'no such', 'is none of ' + ', '.join(choices)) for key, choices in config.CHOICES.items()]
BAD += [
  ('rollout.top_p', 0.0, 'is not in (0, 1]'), ('rollout.top_p', 1.5, 'is not in (0, 1]'), ('rollout.min_p', 1.0, 'is not in [0, 1)'),
  ('rewards.weights', (1.0,), '1 weights for 2 functions'),
  ('rewards.functions', ('format', 'accuracy', 'format'), 'format is named twice'),
  ('data.curriculum_floor', 1.0, 'must be below 1'), ('data.curriculum_decay', 1.0, 'must be below 1'),
  ('data.curriculum', 'pass_rate', 'has nothing to choose from without data.mixture'),
]  # fmt: skip


@pytest.mark.parametrize('key, value, wanted', BAD)
def test_ranges(key, value, wanted):
  """Failure: a value that some module cannot work with reaches it."""
  text = refusal(config.resolve, config.override({}, key, value))
  assert text.startswith(f'config key {key!r}') and wanted in text


def test_every_number_has_a_range():
  """Failure: a new number of the config is neither in POSITIVE nor in NOT_NEGATIVE, nor checked elsewhere."""
  numbers = {key for key, value in config.flatten(config.to_dict(Config())).items() if type(value) in (int, float)}
  elsewhere = {
    'rollout.top_p',
    'mesh.data',
    'mesh.fsdp',
    'mesh.tensor',
    'mesh.sequence',
    'mesh.expert',
  }  # in resolve, and by sharding.make_mesh
  assert numbers == {*config.POSITIVE, *config.NOT_NEGATIVE, *elsewhere}
  assert not set(config.POSITIVE) & set(config.NOT_NEGATIVE)


def test_digest():
  """Failure: the hash of a config depends on how it was written down, or misses a change."""
  a = {'seed': 1, 'optim': {'name': 'sgd', 'options': {'x': [1, 2]}}}
  b = ConfigDict({'optim': {'options': {'x': (1, 2)}, 'name': 'sgd'}, 'seed': 1})
  assert config.digest(a) == config.digest(b) and len(config.digest(a)) == 12
  assert config.digest(a) != config.digest(config.override(a, 'optim.options.x', (2, 1)))
  # As other processes (launchers, a run's summary) compute it from the JSON.
  resolved = config.resolve(config.plain(b))
  assert config.digest(config.to_dict(resolved)) == config.digest(json.loads(config.to_json(resolved)))


def test_round_trip():
  """Failure: the config.json of a run does not give the run's config back."""
  resolved = config.resolve({'objective': {'name': 'grpo', 'epsilon_high': None}, 'rewards': {'weights': (1, 2)}})
  assert config.resolve(json.loads(config.to_json(resolved))) == resolved


def test_differences():
  """Failure: a run that is resumed under another config is not told which keys differ."""
  old = json.loads(config.to_json(Config()))
  assert config.differences(old, json.loads(config.to_json(Config()))) == []
  new = config.merge(old, {'optim': {'learning_rate': 1.0}, 'data': {'options': {'a': None}}})
  del new['seed']
  assert config.differences(old, new) == [
    "data.options: {} -> 'absent'", "data.options.a: 'absent' -> None", 'optim.learning_rate: 0.0001 -> 1.0', "seed: 0 -> 'absent'",
  ]  # fmt: skip


# Under which names, beside its own, code holds a section.
ALIASES = {'rollout': ('settings', 's'), 'checkpoint': ('settings',), 'policy': ('role',), 'ref': ('role',)}


def sections(cls=Config, name='config'):
  """(section, field) of every leaf of the config."""
  for field in dataclasses.fields(cls):
    default = getattr(cls(), field.name)
    if dataclasses.is_dataclass(default):
      yield from sections(type(default), field.name)
    else:
      yield name, field.name


def attributes_read() -> set[tuple[str, str]]:
  """(a, b) for every `a.b` or `x.a.b` that rl_reasoning, the checks of config.py aside, reads."""
  found = set()
  for path in set(SOURCES.rglob('*.py')) - {SOURCES / 'config.py'}:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        owner = getattr(node.value, 'attr', getattr(node.value, 'id', None))
        found.add((owner, node.attr))
  return found


READ = attributes_read()


@pytest.mark.parametrize('section, field', [pair for pair in sections() if pair[0] not in ('mesh', 'ref')])
def test_no_dead_knob(section, field):
  """Failure: a field of the config that no code reads."""
  assert any((owner, field) in READ for owner in (section, *ALIASES.get(section, ())))


def test_no_dead_knob_in_what_is_passed_whole():
  """Failure: a mesh size that make_mesh does not take, or a field of roles.ref that is neither read nor refused."""
  taken = [name for name in inspect.signature(sharding.make_mesh).parameters if name != 'devices']
  assert [field.name for field in dataclasses.fields(config.MeshSizes)] == taken
  assert ('ref', 'init') in READ  # its tokenizer and template are inert, see resolution.inert


# The command line.


@pytest.fixture
def command(tmp_path, capsys):
  """(flags, workdir) -> (exit code, stdout, stderr) of a run of configs/tiny.py."""

  def call(*flags, workdir='run', base='configs/tiny.py'):
    code = train.main(
      [f'--config={base}', f'--workdir={tmp_path / workdir}', f'--config.data.cache_dir={tmp_path / "cache"}', *flags]
    )
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return call


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize(
  'flags, wanted',
  [
    (['--frobnicate'], 'flag --frobnicate is unknown'),
    (['--seed=3'], 'flag --seed is unknown'),
    (['-v'], "argument '-v' is not understood"),
    (['eval'], "argument 'eval' is not understood"),
    (['--config=configs/demo.py'], 'flag --config is given twice'),
    (['--config.seed=1', '--config.seed=2'], 'flag --config.seed is given twice'),
    (['--overwrite=false'], '--overwrite=false: the flag takes no value'),
    (['--explain=yaml'], '--explain=yaml'),
    (['--config.seed'], '--config.seed: no value'),
    (['--config.=3'], "config key '' is unknown"),
    (['--config.seed='], "config key 'seed': '' is not of type int"),
    (['--config.optim.learning_rat=1'], "did you mean 'optim.learning_rate'?"),
    (['--config.optim=3'], "config key 'optim': 3 is not a section"),
    (['--config.eval.every=abc'], "config key 'eval.every': 'abc' is not of type int"),
    (['--config.total_steps=1e3'], "config key 'total_steps': 1000.0 is not of type int"),
    (['--config.optim.learning_rate=nan'], "config key 'optim.learning_rate': 'nan' is not of type float"),
    (['--config.optim.learning_rate=1e999'], "config key 'optim.learning_rate': inf is not finite"),
    (['--config.objective.nme=sft'], "did you mean 'objective.name'?"),
    (['--config.data.batch_size=12'], "config key 'data.batch_size': 12 does not divide over the 8 row shards"),
    (['--config.roles.policy.init=/no/such', '--config.model={}'], "'/no/such' does not exist"),
    (['--config.eval.every=1', '--config.eval.evaluators.e.prefx=x'], "did you mean 'eval.evaluators.e.prefix'?"),
    (['--config.data.task=arithmetics'], "config key 'data.task': 'arithmetics' is none of"),
    (['--config.data.train_size=0'], "config key 'data.train_size'"),
  ],
)  # fmt: skip
def test_mistakes_on_the_command_line(flags, wanted, command, tmp_path):
  """Failure: a mistake is a traceback, has another exit code, does not name the culprit in one line, or leaves something behind."""
  code, out, err = command(*flags)
  assert code == 2 and out == '' and wanted in err
  assert err.startswith('error: ') and len(err.splitlines()) == 1
  assert contents(tmp_path) == {}


@pytest.mark.parametrize(
  'argv, wanted',
  [
    ([], '--config=FILE.py is missing'),
    (['--workdir=x'], '--config=FILE.py is missing'),
    (['--config'], "no file ''"),
    (['--config=configs/no.py', '--workdir=x'], "no file 'configs/no.py'"),
    (['--config=configs/tiny.py'], '--workdir=DIR is missing'),
    (['--config=configs/tiny.py', '--workdir='], '--workdir=DIR is missing'),
    (['--config=configs/tiny.py:objectiv=sft', '--workdir=x'], "get_config: got an unexpected keyword argument 'objectiv'"),
  ],
)
def test_missing_flags(argv, wanted, capsys):
  """Failure: what is missing is not named."""
  assert train.main(argv) == 2
  assert wanted in capsys.readouterr().err and not pathlib.Path('x').exists()


def test_keys_that_cannot_act_are_listed(command, tmp_path):
  """Failure: the first of several dead keys hides the others."""
  code, _, err = command('--config.rollout.chunk=4', '--config.eval.size=4')
  assert code == 2 and "'rollout.chunk'" in err and "'eval.size'" in err and contents(tmp_path) == {}


ROW = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
  'text, wanted',
  [
    ('', 'is empty'),
    ('\n\n', 'is empty'),
    (ROW + '{"prompt": \n', 'rows.jsonl:2: not JSON'),
    (ROW + '\n[1]\n', 'rows.jsonl:3: not a JSON object'),
    (ROW + '{"prompt": 3}\n', "rows.jsonl:2: column 'prompt' is int, not text"),
    (ROW + '{"answer": "3"}\n', 'rows.jsonl:2: no column prompt, messages or text'),
  ],
)
def test_bad_files(text, wanted, command, tmp_path):
  """Failure: a malformed row is skipped, or file and line are not told; a workdir or half a data set is left behind."""
  (tmp_path / 'rows.jsonl').write_text(text)
  flags = ['--config.data.task=dataset', f'--config.data.path={tmp_path / "rows.jsonl"}', '--config.data.train_size=0']
  for _ in range(2):  # the second call must not find prepared rows
    code, _, err = command(*flags)
    assert code == 2 and wanted in err and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'objective, flag, wanted',
  [
    ('grpo', '--config.data.max_prompt_length=4', "config key 'data.max_prompt_length': 4, but a prompt has"),
    ('sft', '--config.data.max_length=8', "config key 'data.max_length': 8, but a row has"),
  ],
)
def test_rows_that_are_too_long(objective, flag, wanted, command, tmp_path):
  """Failure: a prompt or row beyond the limit is cut in silence or a traceback, or a checkpoint is made of it."""
  code, _, err = command(flag, base=f'configs/tiny.py:objective={objective}')
  assert code == 2 and err.startswith('error: ' + wanted) and len(err.splitlines()) == 1
  assert not any((tmp_path / 'run').rglob('checkpoints/*')) and not (tmp_path / 'run' / 'metrics.jsonl').exists()


def test_workdir_of_another_config(command, tmp_path):
  """Failure: two configs share a workdir, what differs is not named, or a refusal touches what is there."""
  short = ['--config.total_steps=1', '--config.optim.name=sgd', '--config.data.batch_size=8']
  code, out, _ = command(*short)
  before = contents(tmp_path / 'run')
  assert code == 0 and '1 steps done' in out and 'summary.json' in before
  code, _, err = command(*short, '--config.seed=5')
  assert code == 2 and 'seed: 0 -> 5' in err and '--overwrite' in err and 'optim' not in err
  assert contents(tmp_path / 'run') == before
  assert command(*short)[0] == 0 and contents(tmp_path / 'run') == before  # finished: nothing is done again
  assert command(*short, '--config.seed=5', '--overwrite')[0] == 0
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['seed'] == 5


def test_open_workdir(tmp_path):
  """Failure: a run goes on under a config that nobody can read, or may not go on on another mesh, or --overwrite leaves files."""
  workdir = epath.Path(tmp_path / 'run')
  train.open_workdir(workdir, Config(), False)
  train.open_workdir(workdir, dataclasses.replace(Config(), mesh=config.MeshSizes(fsdp=2)), False)
  assert json.loads((workdir / 'config.json').read_text()) == json.loads(config.to_json(Config()))
  (workdir / 'checkpoints').mkdir()
  for damage, wanted in (('{"seed": ', 'config.json: '), ('[]', 'damaged: no JSON object'), ('\udcff', 'config.json: ')):
    (tmp_path / 'run' / 'config.json').write_text(damage, errors='surrogateescape')
    before = contents(tmp_path)
    text = refusal(train.open_workdir, workdir, Config(), False)
    assert wanted in text and '--overwrite' in text and contents(tmp_path) == before
  (workdir / 'config.json').unlink()
  assert 'has checkpoints but no config.json' in refusal(train.open_workdir, workdir, Config(), False)
  for name in (*train.RUN_FILES, 'notes.txt', 'checkpoints/4', 'completions', 'tensorboard/x'):
    (tmp_path / 'run' / name).parent.mkdir(exist_ok=True)
    (tmp_path / 'run' / name).touch() if '.' in name else (tmp_path / 'run' / name).mkdir()
  train.open_workdir(workdir, Config(), True)
  assert {path.name for path in workdir.iterdir()} == {'config.json', 'notes.txt'}


def test_workdir_that_is_a_file(command, tmp_path):
  """Failure: a workdir that cannot be made is a traceback."""
  (tmp_path / 'run').write_text('mine')
  for workdir in ('run', 'run/below'):
    code, _, err = command(workdir=workdir)
    assert code == 2 and '--workdir=' in err and contents(tmp_path)['run'] == b'mine'


def test_explain_in_a_process_of_its_own(tmp_path):
  """Failure: what sweeps and launchers read is not one JSON object on stdout, or a mistake is not exit code 2."""
  argv = [sys.executable, '-m', 'rl_reasoning.train', '--config=configs/tiny.py:objective=grpo']

  def call(*flags):
    return subprocess.run([*argv, *flags], capture_output=True, text=True, cwd=SOURCES.parent, env=os.environ)

  explained = json.loads(call('--explain=json', '--config.seed=7').stdout)
  settings = config.override(config.read_file('configs/tiny.py:objective=grpo'), 'seed', 7)
  assert explained['config'] == json.loads(config.to_json(resolution.resolve(config.resolve(settings), set())[0]))
  assert explained['hash'] == config.digest(explained['config']) and 'data.max_length' in explained['inert_defaults']
  wrong = call('--config.sed=7', '--explain=json')
  assert wrong.returncode == 2 and wrong.stdout == '' and wrong.stderr.startswith("error: config key 'sed' is unknown")


@pytest.mark.parametrize('flags, wanted', [
  (['--config.optim.micro_batch=5'], "config key 'optim.micro_batch': 16 rows an update do not divide by 5"),
  (['--config.eval.every=1', '--config.eval.evaluators.e.prefx=x'], "did you mean 'eval.evaluators.e.prefix'?"),
])  # fmt: skip
def test_explain_refuses(flags, wanted, capsys):
  """Failure: a sweep, which asks --explain before it begins, learns of a mistake when the run's turn comes."""
  assert train.main(['--config=configs/tiny.py', '--explain', *flags]) == 2
  found = capsys.readouterr()
  assert wanted in found.err and found.out == ''


def test_explain_reads_well(command, tmp_path):
  """Failure: --explain trains, needs a workdir, or leaves out the config, its hash, its sizes or what is inert."""
  code, out, err = command('--explain')
  assert code == 0 and err == '' and contents(tmp_path) == {}
  for part in ('"learning_rate": 0.001', 'hash: ', 'prompts_per_step: 16', 'eval.size: eval.every is 0'):
    assert part in out
  assert train.main(['--config=configs/tiny.py', '--explain']) == 0


def test_stages_of_a_config_dict(tmp_path):
  """Failure: stages run in alphabetical order, because a ConfigDict sorts its keys."""
  (tmp_path / 'p.py').write_text(
    'from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({"stages": {"sft": {}, "rl": {}}})\n'
  )
  with pytest.raises(ConfigError, match='a ConfigDict sorts its keys'):
    config.read_file(str(tmp_path / 'p.py'))


def test_values_of_a_mapping():
  """Failure: a value of the wrong kind inside a mapping with declared values gets through."""
  with pytest.raises(ConfigError, match=r"'k.clean': 'x' is not of type float"):
    config.coerce({'clean': 'x'}, collections.abc.Mapping[str, float], 'k')
  assert config.coerce({'clean': 1}, collections.abc.Mapping[str, float], 'k') == {'clean': 1.0}
  for key in ('seed', 'eval.seed'):
    with pytest.raises(ConfigError, match=f"'{key}': 4294967296 does not fit"):
      config.resolve(config.override({}, key, 2**32))


@pytest.mark.parametrize(
  ('only', 'wanted'),
  [
    ({'acuracy': ('a',)}, "'rewards.only.acuracy': 'acuracy' is none of rewards.functions: accuracy, format"),
    ({'accuracy': ('c',)}, "'rewards.only.accuracy': 'c' is none of data.mixture: a, b"),
    ({'accuracy': ()}, "'rewards.only.accuracy' is empty"),
    ({'accuracy': 'a'}, "'rewards.only.accuracy': 'a' is not a tuple"),
    ({'accuracy': ('a',), 'format': ('a',)}, "'rewards.only': none of rewards.functions speaks of data.mixture.b"),
  ],
)
def test_routes_of_rewards(only, wanted):
  """Failure: prompts whose rewards are routed by a misspelt name, or that no reward speaks of, are sampled for nothing."""
  mixture = {name: {'task': 'arithmetic', 'train_size': 8} for name in 'ab'}
  with pytest.raises(ConfigError) as caught:
    config.resolve({'data': {'mixture': mixture}, 'rewards': {'only': only}})
  assert wanted in str(caught.value)
  config.resolve({'data': {'mixture': mixture}, 'rewards': {'only': {'accuracy': ('a',), 'format': ('a', 'b')}}})
