"""What a run tells: numbers merged right, files that survive a kill, tables that show what was sampled."""

import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rl_reasoning import metrics
from rl_reasoning.config import ConfigError
from rl_reasoning.structs import Max, Mean, Min, Sum


def test_merge_and_summarise():
  """Failure: a mean is a mean of means, a maximum is averaged, or a metric that only one part has is lost."""
  a = {
    'mean': Mean(6.0, 3.0),
    'max': Max(2.0),
    'min': Min(2.0),
    'sum': Sum(1.5),
    'mine': Mean(4.0, 1.0),
    'nothing': Mean(0.0, 0.0),
  }
  b = {'mean': Mean(10.0, 1.0), 'max': Max(-5.0), 'min': Min(-5.0), 'sum': Sum(2.0), 'yours': Max(7.0), 'nothing': Mean(0.0, 0.0)}
  expected = {'mean': 4.0, 'max': 2.0, 'min': -5.0, 'sum': 3.5, 'mine': 4.0, 'yours': 7.0}
  for one, other in ((a, b), (b, a)):
    assert metrics.summarise(metrics.merge(one, other)) == expected  # a mean over nothing is left out, not zero
  on_device = jax.jit(metrics.merge)(*(jax.tree.map(jnp.float32, x) for x in (a, b)))
  values = metrics.summarise(on_device)
  assert values == expected and all(type(v) is float for v in values.values())
  assert metrics.summarise(metrics.merge(a, {'nothing': Mean(3.0, 2.0)}))['nothing'] == 1.5


def test_phase_timer(monkeypatch):
  """Failure: the phases of a step hide one another, or tokens a second is not tokens over seconds."""
  clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0])
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(clock))
  timer = metrics.PhaseTimer()
  for name, tokens in (('rollout', 30), ('score', 0), ('rollout', 50)):
    with timer(name) as phase:
      phase.tokens = tokens
  assert timer.metrics() == {'time/rollout': 4.0, 'time/score': 2.0, 'tokens_per_second/rollout': 20.0}


def test_mfu(monkeypatch):
  """Failure: utilisation is invented for hardware whose peak is unknown, or is not 6 N tokens / (seconds, peak, devices)."""
  assert metrics.mfu(10**6, 1000, 1.0) == {}
  monkeypatch.setattr(jax, 'devices', lambda: [SimpleNamespace(device_kind='NVIDIA H100 80GB HBM3')])
  monkeypatch.setattr(jax, 'device_count', lambda: 2)
  assert metrics.mfu(6 * 500_000_000, 100_000, 2.0) == {'mfu': pytest.approx(6 * 5e8 * 1e5 / 2 / (2 * 989e12))}


@pytest.fixture(params=['here', 'gs'])
def store(request, tmp_path, monkeypatch):
  """A folder, on a disk or in a store that cannot append."""
  if request.param == 'here':
    yield epath.Path(tmp_path)
    return

  class Bucket(MemoryFileSystem):
    store, pseudo_dirs = {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(path.replace('gs://', 'memory://', 1))

    def _open(self, path, mode='rb', **options):
      assert mode in ('rb', 'wb')
      return super()._open(path, mode, **options)

  monkeypatch.setattr(epath.gpath.backend_lib.fsspec_backend, 'fs', lambda path: Bucket())
  folder = epath.Path('gs://bucket/run')
  folder.mkdir(parents=True)
  yield folder


def test_json_lines(store):
  """Failure: a resumed run repeats or loses lines, or a line that a kill cut stands in the way."""
  path = store / 'metrics.jsonl'
  assert metrics.read_jsonl(path) == []
  lines, entries = metrics.JsonLines(path, 0), [{'step': step, 'x': step / 3} for step in range(1, 7)]
  for entry in entries:
    lines.append(entry)
    assert metrics.read_jsonl(path) == entries[: entry['step']]
  path.write_text(path.read_text() + '{"step": 7, "x": 0.')
  assert metrics.read_jsonl(path) == entries
  resumed = metrics.JsonLines(path, 4)
  assert metrics.read_jsonl(path) == entries[:4]
  resumed.append({'step': 5, 'x': None})
  assert metrics.read_jsonl(path) == entries[:4] + [{'step': 5, 'x': None}]
  assert [p.name for p in store.iterdir()] == ['metrics.jsonl']


def row(completion: str, **rewards) -> dict:
  return {
    'prompt': '1+1=',
    'completion': completion,
    'rewards': rewards or {'accuracy': 1.0},
    'advantage': 0.5,
    'length': 3,
    'truncated': False,
  }


def events(folder) -> list[Event]:
  """Of every file of the folder, by a minimal reader of the format: length, checksum, event, checksum."""
  found = []
  for path in sorted(folder.glob('events.*'), key=lambda p: p.name.split('.')[::-1]):
    raw = path.read_bytes()
    while raw:
      length = struct.unpack('<Q', raw[:8])[0]
      assert len(raw) >= length + 16
      found.append(Event.FromString(raw[12 : 12 + length]))
      raw = raw[length + 16 :]
  return found


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
  """What TensorBoard shows: later steps are dropped where a session starts again."""
  shown: dict[str, list[tuple[int, float]]] = {}
  for event in events(folder):
    if event.session_log.status == SessionLog.START:
      shown = {name: [p for p in points if p[0] < event.step] for name, points in shown.items()}
    for value in event.summary.value:
      shown.setdefault(value.tag, []).append((event.step, value.simple_value))
  return shown


def test_writer(tmp_path):
  """Failure: a logged step is not one JSON object with its step, TensorBoard shows other numbers, or a resumed run doubles them."""
  writer = metrics.Writer(str(tmp_path), 6, 0)
  writer.evaluation(0, {'greedy': {'accuracy': 0.25, 'accuracy_stderr': float('nan'), 'problems': 1.0}})
  for step in (2, 4, 6):
    writer.write(step, {'loss': 1 / step, 'kl': float('inf')})
    writer.completions(step, [row(f'of {step}')])
  writer.close()
  entries = metrics.read_jsonl(tmp_path / 'metrics.jsonl')
  assert entries == [{'step': step, 'loss': 1 / step, 'kl': None} for step in (2, 4, 6)]
  evaluated = {'accuracy': 0.25, 'accuracy_stderr': None, 'problems': 1.0}
  assert metrics.read_jsonl(tmp_path / 'eval.jsonl') == [{'step': 0, 'evaluators': {'greedy': evaluated}}]
  shown = scalars(tmp_path / 'tensorboard')
  assert shown['loss'] == [(step, pytest.approx(1 / step)) for step in (2, 4, 6)]
  assert shown['eval/greedy/accuracy'] == [(0, 0.25)]
  again = metrics.Writer(str(tmp_path), 6, 4)
  assert sorted(path.name for path in (tmp_path / 'completions').iterdir()) == ['step_000002.jsonl', 'step_000004.jsonl']
  again.write(6, {'loss': 9.0})
  again.close()
  assert metrics.read_jsonl(tmp_path / 'metrics.jsonl') == [*entries[:2], {'step': 6, 'loss': 9.0}]
  assert metrics.read_jsonl(tmp_path / 'eval.jsonl') == [{'step': 0, 'evaluators': {'greedy': evaluated}}]
  assert scalars(tmp_path / 'tensorboard')['loss'] == [*shown['loss'][:2], (6, 9.0)]


def test_nothing_saved_yet(tmp_path):
  """Failure: a run that was killed before its first checkpoint evaluates step 0 twice."""
  for _ in range(2):
    writer = metrics.Writer(str(tmp_path), 6, 0)
    writer.evaluation(0, {'greedy': {'accuracy': 0.25}})
    writer.write(1, {'loss': 1.0})
    writer.close()
  assert len(metrics.read_jsonl(tmp_path / 'eval.jsonl')) == len(metrics.read_jsonl(tmp_path / 'metrics.jsonl')) == 1
  assert scalars(tmp_path / 'tensorboard')['loss'] == [(1, 1.0)]


WILD = ['[/red]', '[bold]x[/bold]', 'a[1]+[2]\\', ':smile: [link=x]', '<think>2</think>', 'ü€😀', 'two\nlines', '', 'tail ' * 100]


@pytest.mark.parametrize('terminal', [False, True], ids=['pipe', 'terminal'])
@pytest.mark.parametrize('text', WILD)
def test_completions_are_shown_as_they_are(text, terminal, tmp_path, capsys, monkeypatch):
  """Failure: what a model samples crashes the table, vanishes in it as markup, or is lost from the file."""
  if terminal:
    monkeypatch.setattr(metrics.rich.console.Console, 'is_terminal', property(lambda self: True))
    monkeypatch.setenv('COLUMNS', '150')
  writer = metrics.Writer(str(tmp_path), 1, 0)
  rows = [row(text, accuracy=None, **{'my.module:reward': 0.75}), row('plain', accuracy=0.0, **{'my.module:reward': 1.0})]
  writer.completions(1, rows)
  writer.close()
  assert metrics.read_jsonl(tmp_path / 'completions' / 'step_000001.jsonl') == rows
  shown = capsys.readouterr().out
  cells = [line.split('│') for line in shown.splitlines() if line.count('│') > 4]
  joined = ''.join(cell[2].strip() for cell in cells if 'plain' not in cell[2])
  expected = text if len(text) <= 300 else text[:150] + ' ... ' + text[-150:]
  assert joined.replace(' ', '') == expected.replace('\n', '').replace(' ', '')
  assert 'none' in cells[0][3] and '0.75' in cells[0][4] and '0.50' in cells[0][5] and 'my.module:reward' in shown


def test_terminal_is_not_steered(tmp_path, capsys):
  """Failure: an escape sequence that a model of bytes sampled clears the user's screen."""
  writer = metrics.Writer(str(tmp_path), 1, 0)
  writer.completions(1, [row('a\x1b[2Jb\rc\x07d\x00e')])
  writer.close()
  shown = capsys.readouterr().out
  assert 'a\ufffd[2Jb\ufffdc\ufffdd\ufffde' in shown and not set('\x1b\r\x07\x00') & set(shown)
  assert '\\u001b[2J' in (tmp_path / 'completions' / 'step_000001.jsonl').read_text()


def test_names_are_no_markup(tmp_path, capsys):
  """Failure: an evaluator or a workdir with brackets in its name crashes the summary of a run that is done."""
  writer = metrics.Writer(str(tmp_path), 1, 0)
  writer.evaluation(1, {'[/a] [bold]': {'accuracy': 0.5}})
  writer.close()
  metrics.summary_table('runs/[/b]', ('[/c]',), [['[bold]']])
  shown = capsys.readouterr().out
  assert all(text in shown for text in ('eval [/a] [bold] at step 1: accuracy 0.500', 'runs/[/b]', '[/c]', '[bold]'))


def test_four_of_many(tmp_path, capsys):
  """Failure: the screen fills with every completion, or shows several of one prompt and none of the others."""
  writer = metrics.Writer(str(tmp_path), 1, 0)
  writer.completions(1, [row(f'prompt{n // 8}member{n % 8}') for n in range(32)])
  writer.close()
  shown = capsys.readouterr().out
  assert [f'prompt{n}member0' in shown for n in range(4)] == [True] * 4 and shown.count('member') == 4


def test_progress_lines(tmp_path, capsys):
  """Failure: where output goes to a file, a user does not see how far a run is."""
  writer = metrics.Writer(str(tmp_path), 9, 3)
  writer.write(6, {'loss': 0.5, 'rewards/accuracy/mean': 0.25, 'other': 1.0})
  writer.close()
  assert capsys.readouterr().out == 'step 6/9 loss 0.5000 accuracy 0.250 left 0:00\n'


EVALUATION = {'greedy': {'accuracy': 0.5, 'accuracy_stderr': None}, 'pass': {'accuracy': 0.25, 'accuracy_stderr': 0.1}}
SFT = {'loss': 1.0, 'grad_norm': 0.5}
GRPO = {
  **SFT,
  'reward': 0.1,
  'rewards/accuracy/mean': 0.2,
  'rewards/m:f/mean': 0.1,
  'reward_std': 0.3,
  'entropy': 1.0,
  'kl': None,
}


@pytest.mark.parametrize('entries', [1, 3])
@pytest.mark.parametrize('evaluations', [0, 2])
@pytest.mark.parametrize(('values', 'panels'), [(SFT, 2), (GRPO, 5)], ids=['sft', 'grpo'])
def test_curves(values, panels, evaluations, entries, tmp_path):
  """Failure: a run that is done crashes at its picture, or the picture lacks a panel for what it measured."""
  import matplotlib.pyplot as plt

  lines = metrics.JsonLines(epath.Path(tmp_path / 'metrics.jsonl'), 0)
  for step in range(entries):
    lines.append({'step': step + 1, **values})
  if evaluations:
    lines = metrics.JsonLines(epath.Path(tmp_path / 'eval.jsonl'), 0)
    for step in range(evaluations):
      nothing = {'problems': 0.0, 'format': 0.5}  # no completion had a verdict: accuracy is left out
      lines.append({'step': step, 'evaluators': {**EVALUATION, 'none': nothing, 'once': EVALUATION['pass'] if step else nothing}})
  metrics.curves(str(tmp_path))
  picture = plt.imread(tmp_path / 'curves.png')
  panels += bool(evaluations)  # and none for a metric that never was a number
  width, height = min(3, panels) * 450, -(-panels // 3) * 288
  assert picture.shape[:2] == (height, width) and np.ptp(picture) > 0.5
  assert not plt.get_fignums()


def test_explanation():
  """Failure: --explain leaves out a size, the hash or a dead key that the JSON form has."""
  explained = {'config': {'seed': 3}, 'hash': 'abc', 'parameters': 1234567, 'devices': 8, 'formula': ['KL: none'],
               'batch_sizes': {'prompts_per_step': 4096},
               'inert_defaults': {'rollout.top_k': 'nothing is sampled'}}  # fmt: skip
  text = metrics.explanation(explained)
  for wanted in (
    '"seed": 3',
    'hash: abc',
    'parameters: 1,234,567',
    'devices: 8',
    'KL: none',
    'prompts_per_step: 4,096',
    'rollout.top_k: nothing is',
  ):
    assert wanted in text


FULL = """
import resource, sys
from rl_reasoning import metrics
from rl_reasoning.config import ConfigError
writer = metrics.Writer(sys.argv[1], 10**6, 0)
try:
  for step in range(1, 10**6):
    if sys.argv[2] == 'board':
      writer.board.write(step, {'loss': 1.0, 'grad_norm': 2.0})
    elif sys.argv[2] == 'metrics':
      writer.write(step, {'loss': 1.0})
    else:
      writer.completions(step, [{'prompt': '', 'completion': 'x' * 4000, 'rewards': {}, 'advantage': 0.0}])
except OSError as error:
  sys.exit(error.errno)
"""


@pytest.mark.parametrize('what', ['board', 'metrics', 'completions'])
def test_full_disk(what, tmp_path):
  """Failure: on a full disk a run hangs (as tensorboardX's own writer does) or goes on without its records, instead of saying so."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  if (
    os.getuid()
    or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=128k', 'tmpfs', str(folder)], capture_output=True).returncode
  ):
    pytest.skip('mounting is not permitted here, so no disk can be filled')
  try:
    command = [sys.executable, '-c', FULL, str(folder), what]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60).returncode == 28
    # What was there before can be read, and is cut and gone on from after some room was made.
    before = metrics.read_jsonl(folder / 'metrics.jsonl')
    assert before or what != 'metrics'
    for path in folder.glob('*/*'):
      path.unlink()
    writer = metrics.Writer(str(folder), 10**6, len(before))
    writer.write(len(before) + 1, {'loss': 2.0})
    writer.close()
    assert metrics.read_jsonl(folder / 'metrics.jsonl') == [*before, {'step': len(before) + 1, 'loss': 2.0}]
  finally:
    subprocess.run(['umount', str(folder)], check=True)


def test_damaged_line_is_named(tmp_path):
  """Failure: a file that somebody edited is a traceback, or its lines are dropped without a word."""
  for text in ('{"step": 1}\n[]\n{"step": 2}\n', '{"step": 1}\n{"st\n{"step": 2}\n'):
    (tmp_path / 'metrics.jsonl').write_text(text)
    with pytest.raises(ConfigError, match=r'metrics.jsonl:2: damaged'):
      metrics.read_jsonl(tmp_path / 'metrics.jsonl')
