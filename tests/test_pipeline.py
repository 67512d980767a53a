"""Pipelines: what runs, what is skipped, what is refused, and that a chain of all kinds of stages goes on from wherever it was cut."""

import json
import os
import pathlib
import random
import shutil
import sys
import time

import jax
import pytest

from rl_reasoning import (
  build,
  config,
  evaluators,
  filters,
  manifest,
  metrics,
  pipeline,
  resolution,
  sharding,
  stages,
  stored,
  weights,
)
from rl_reasoning.config import ConfigError
from tests.test_e2e import WALL_CLOCK, assert_same, everything
from tests.test_filters import read, row, write
from tests.test_kill import kill_when, start


def chain(source: str) -> dict:
  """Three stages without networks: b filters what a gives, c what b gives."""

  def stage(path: str, *steps: dict, **more) -> dict:
    return {'filter': {'inputs': {'rows': path}, 'steps': steps, **more}}

  a, b = ('{workdir}/' + name + '/data.jsonl' for name in 'ab')
  return {'a': stage(source), 'b': stage(a, {'name': 'length', 'max_characters': 3}), 'c': stage(b, {'name': 'duplicates'})}


@pytest.fixture
def source(tmp_path):
  return write(tmp_path / 'source.jsonl', [row('a' * n, f'q{n}') for n in (1, 2, 3, 4, 5)])


@pytest.fixture
def made(monkeypatch):
  """The stages that run, in order."""
  names, run = [], filters.run

  def spy(f, workdir):
    names.append(workdir.rpartition('/')[2])
    return run(f, workdir)

  monkeypatch.setattr(filters, 'run', spy)
  return names


def runner(chosen, workdir, made):
  """run(rerun...) -> the stages that ran."""

  def run(*rerun, chosen=chosen):
    made.clear()
    pipeline.run_pipeline(chosen, str(workdir), rerun=rerun)
    return list(made)

  return run


def refused(call, *arguments, **keys) -> str:
  with pytest.raises(ConfigError) as caught:
    call(*arguments, **keys)
  return str(caught.value)


def changed(chosen: dict, stage: str, **section) -> dict:
  return {**chosen, stage: {'filter': {**chosen[stage]['filter'], **section}}}


def words(chosen, workdir) -> dict[str, str]:
  return {r[0]: r[3] for r in pipeline.plan(chosen, str(workdir))[1]}


def test_manifest(source, tmp_path, made):
  """Failure: the manifest does not tell what a stage was made from, or what came of it."""
  chosen = chain(source)
  runner(chosen, tmp_path / 'run', made)()
  entries = json.loads((tmp_path / 'run' / 'manifest.json').read_text())['stages']
  assert list(entries) == ['a', 'b', 'c'] == made
  assert entries['a']['inputs'] == {
    'filter.inputs.rows': {'path': source, 'identity': entries['a']['inputs']['filter.inputs.rows']['identity']}
  }
  assert entries['b']['inputs']['filter.inputs.rows'] == {'path': '{workdir}/a/data.jsonl', 'identity': entries['a']['output']}
  assert entries['c']['inputs']['filter.inputs.rows']['identity'] == entries['b']['output'] != entries['a']['output']
  assert entries['b']['config']['filter.steps'] == [{'name': 'length', 'max_characters': 3}]
  assert entries['b']['metrics']['dropped'] == {'length: too long': 2} and entries['b']['kind'] == 'filter'
  assert all(
    e['config_hash'] == config.digest(e['config']) and e['wall_s'] >= 0 and e['began'] <= e['finished'] for e in entries.values()
  )
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert list(summary) == ['a', 'b', 'c', 'final'] and summary['final'] == summary['c'] and summary['b']['rows'] == 3


def test_only_what_changed_runs_again(source, tmp_path, made, capsys):
  """Failure: a finished stage is repeated, an edit deletes work without being told to, a stage is not made again although what it reads
  has changed, or is although that came out the same."""
  chosen, folder = chain(source), tmp_path / 'run'
  run = runner(chosen, folder, made)
  assert run() == ['a', 'b', 'c'] and run() == []
  os.utime(source)  # touched, not changed
  assert run() == []
  shorter = changed(chosen, 'b', steps=({'name': 'length', 'max_characters': 2},))
  text = refused(run, chosen=shorter)
  assert "b: filter.steps: ({'name': 'length', 'max_characters': 3},) -> ({'name': 'length', 'max_characters': 2},)" in text
  assert '--rerun=b deletes them' in text and '  a:' not in text and '  c:' not in text
  assert refused(run, 'c', chosen=shorter) == text and len(read(folder / 'b')) == 3 and made == []
  capsys.readouterr()
  assert run('b', chosen=shorter) == ['b', 'c'] and len(read(folder / 'c')) == 2
  out = capsys.readouterr().out
  assert 'stage b: its old output is deleted' in out and 'stage c: its old output' in out and 'stage a: done before' in out
  assert run('b', chosen=shorter) == [] == run(chosen=shorter)
  same = changed(shorter, 'b', steps=(*shorter['b']['filter']['steps'], {'name': 'code_blocks'}))
  assert run('b', chosen=same) == ['b']  # another config, the same rows
  both = changed(changed(same, 'b', seed=1), 'c', seed=1)
  text = refused(run, 'b', chosen=both)
  assert '  c: filter.seed: 0 -> 1' in text and '--rerun=b,c deletes them' in text and made == []
  assert run('b', 'c', chosen=both) == ['b', 'c']


def test_changed_files(source, tmp_path, made):
  """Failure: data from elsewhere changes under a pipeline, or its own output does, and nobody is told."""
  chosen, folder = chain(source), tmp_path / 'run'
  run = runner(chosen, folder, made)
  run()
  write(tmp_path / 'source.jsonl', [row('a' * n, f'q{n}') for n in (1, 2, 3, 4)])
  assert f'  a: filter.inputs.rows: {source} is not what it was' in refused(run)
  assert run('a') == ['a', 'b', 'c']
  write(folder / 'b' / 'data.jsonl', [row('edited')])
  text = refused(run)
  assert (
    '  b: its output is not what it left' in text
    and '  c: filter.inputs.rows: {workdir}/b/data.jsonl is not what it was' not in text
  )
  assert run('b') == ['b'] and len(read(folder / 'b')) == 3
  shutil.rmtree(folder / 'b')
  assert words(chosen, folder)['b'] == 'to do' and run() == ['b']  # what is gone costs nothing to make again, and c is as it was


def test_what_may_go_on(source, tmp_path, made, monkeypatch):
  """Failure: a stage whose budget ended is done for good, or counts as changed where only who sells it or for how much has."""
  chosen, folder = chain(source), tmp_path / 'run'
  run, whole = runner(chosen, folder, made), filters.run
  monkeypatch.setattr(filters, 'run', lambda f, workdir: whole(f, workdir) | {'not_asked': 3 * workdir.endswith('/b')})
  run()
  assert words(chosen, folder) == {'a': 'done', 'b': 'partly', 'c': 'done (again, where b comes out different)'}
  monkeypatch.setattr(filters, 'run', whole)
  run()
  assert words(chosen, folder) == dict.fromkeys('abc', 'done')
  api = {
    **GENERATE,
    'generate': {'source': 'api', 'keep': 'reasoning', 'api': {'url': 'http://a', 'model': 'm', 'max_cost': 1.0}},
  }
  asked = {key: value for key, value in api.items() if key != 'roles'}
  dearer = config.override(config.override(asked, 'generate.api.max_cost', 9.0), 'generate.api.url', 'http://b')
  assert stages.deciding(asked) == stages.deciding(dearer) != stages.deciding(config.override(asked, 'generate.api.model', 'n'))


def test_moved(source, tmp_path, made):
  """Failure: a workdir that was moved is made again, or one without a manifest is not taken up."""
  run = runner(chain(source), tmp_path / 'run', made)
  run()
  folder = (tmp_path / 'run').rename(tmp_path / 'elsewhere')
  run = runner(chain(source), folder, made)
  assert run() == []
  (folder / 'manifest.json').unlink()  # a workdir from before there was one: its stages tell by themselves what they are
  before = (folder / 'a' / 'data.jsonl').stat().st_mtime_ns
  assert all(word.startswith('partly') for word in words(chain(source), folder).values()) and run() == ['a', 'b', 'c']
  assert (
    words(chain(source), folder) == dict.fromkeys('abc', 'done') and (folder / 'a' / 'data.jsonl').stat().st_mtime_ns == before
  )


def test_cut_and_changed(source, tmp_path, made, monkeypatch):
  """Failure: a stage goes on with what an interruption has left of another config, or of other inputs; or a --rerun that was cut starts
  from the beginning, or not at all."""
  chosen, folder = chain(source), tmp_path / 'run'
  run = runner(chosen, folder, made)
  whole, cut_at = filters.run, 'c'

  def cut(f, workdir):
    if workdir.endswith(cut_at):
      (tmp_path / 'run' / cut_at).mkdir(exist_ok=True)
      raise KeyboardInterrupt
    return whole(f, workdir)

  monkeypatch.setattr(filters, 'run', cut)
  with pytest.raises(KeyboardInterrupt):
    run()
  assert {name: word.split(':')[0] for name, word in words(chosen, folder).items()} == {'a': 'done', 'b': 'done', 'c': 'partly'}
  assert 'c: filter.seed: 0 -> 1' in refused(run, chosen=changed(chosen, 'c', seed=1))
  shorter = changed(chosen, 'b', steps=({'name': 'length', 'max_characters': 2},))
  with pytest.raises(KeyboardInterrupt):  # b is made again, and what there is of c was made from the old one
    run('b', chosen=shorter)
  assert len(read(folder / 'b')) == 2
  monkeypatch.setattr(filters, 'run', whole)
  assert words(shorter, folder)['c'] == 'partly'
  run('b', chosen=shorter)
  assert len(read(folder / 'c')) == 2
  cut_at = 'b'
  monkeypatch.setattr(filters, 'run', cut)
  with pytest.raises(KeyboardInterrupt):
    run('b')
  monkeypatch.setattr(filters, 'run', whole)
  assert 'c: filter.inputs.rows: {workdir}/b/data.jsonl is not what it was' in refused(run)  # b went on; c was not agreed to
  run('b')
  assert len(read(folder / 'c')) == 3
  assert words(chosen, folder) == dict.fromkeys('abc', 'done')


def test_plan(source, tmp_path, made, capsys):
  """Failure: --plan runs or writes something, or tells another state than the next run finds."""
  chosen, folder = chain(source), tmp_path / 'run'
  (tmp_path / 'p.py').write_text(
    f'def get_config(seed=0):\n  stages = {chosen!r}\n  stages["b"]["filter"]["seed"] = seed\n  return {{"stages": stages}}\n'
  )
  argv = [f'--config={tmp_path / "p.py"}', f'--workdir={folder}']
  assert pipeline.main([*argv, '--plan']) == 0 and not folder.exists() and made == []
  out = capsys.readouterr().out
  assert out.count('to do') == 3 and out.count('filter') == 3
  assert pipeline.main(argv) == 0 and made == ['a', 'b', 'c']
  before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
  assert pipeline.plan(chosen, str(folder)) == (
    ['stage', 'kind', 'reads', 'status'],
    [['a', 'filter', source, 'done'], ['b', 'filter', 'a', 'done'], ['c', 'filter', 'b', 'done']],
  )
  assert words(changed(chosen, 'b', seed=1), folder) == {
    'a': 'done', 'b': 'changed: filter.seed: 0 -> 1', 'c': 'done (again, where b comes out different)',
  }  # fmt: skip
  capsys.readouterr()
  assert pipeline.main([argv[0] + ':seed=1', argv[1]]) == 2 and '--rerun=b deletes them' in capsys.readouterr().err
  assert before == {path: path.stat().st_mtime_ns for path in folder.rglob('*')} and made == ['a', 'b', 'c']
  assert pipeline.main([argv[0] + ':seed=1', argv[1], '--rerun=b']) == 0 and made[3:4] == ['b']
  assert pipeline.main([*argv, '--overwrite']) == 0 and made[-3:] == ['a', 'b', 'c']
  for flags, wanted in (
    (['--rerun=d'], '--rerun=d: no stage is called d; stages: a, b, c'),
    (['--rerun'], '--rerun: say which stages'),
    (['--plan=x'], 'the flag takes no value'),
    (['--plan', '--overwrite'], '--overwrite cannot act beside --plan'),
    (['--rerun=a', '--overwrite'], '--rerun cannot act beside --overwrite'),
  ):
    assert pipeline.main([*argv, *flags]) == 2 and wanted in capsys.readouterr().err


SFT = {'total_steps': 1, 'model': {'preset': 'tiny'}, 'data': {'train_size': 8, 'batch_size': 8}, 'objective': {'name': 'sft'}}
BASE = {'roles': {'policy': {'init': '{workdir}/base'}}}
GENERATE = {**BASE, 'data': {'train_size': 8}, 'generate': {'size': 4}}
DATA = "it takes '{workdir}/STAGE/data.jsonl' of a stage that is generate or filter; "
BAD = [
  ({'x': {'evaluate': {'checkpoint': '{workdir}/bose'}}}, "x: config key 'evaluate.checkpoint': '{workdir}/bose' does not exist, and no"),
  ({'x': {**GENERATE, 'roles': {'policy': {'init': '{workdir}/z'}}}, 'z': SFT}, "no earlier stage is called 'z': it comes later"),
  ({'x': {**GENERATE, 'roles': {'policy': {'init': '{workdir}/x'}}}}, "no earlier stage is called 'x': it comes later"),
  (
    {'x': {**SFT, 'data': {'task': 'dataset', 'path': '{workdir}/base/data.jsonl'}}},
    f"'data.path': '{{workdir}}/base/data.jsonl': {DATA}'base' is train",
  ),
  ({'g': GENERATE, 'x': {'filter': {'inputs': {'r': '{workdir}/g'}}}}, f"'filter.inputs.r': '{{workdir}}/g': {DATA}'g' is generate"),
  (
    {'g': GENERATE, 'x': {'evaluate': {'checkpoint': '{workdir}/g'}}},
    "it takes '{workdir}/STAGE' of a stage that is train or export; 'g' is generate",
  ),
  ({'e': {'export': {'checkpoint': '{workdir}/base'}}, 'x': {'export': {'checkpoint': '{workdir}/e'}}}, "is train; 'e' is export"),
  ({'x': {'export': {'checkpoint': '{workdir}/base'}, 'seed': 1}}, 'cannot act beside a section export: seed'),
  ({'x': {'export': {'checkpoint': '/no/such'}}}, "'export.checkpoint': '/no/such' does not exist"),
  ({'x': {'export': {'checkpoint': 'tests/fixtures/llama'}}}, 'tests/fixtures/llama is no run of ours'),
  ({'x': {'export': {'chekpoint': 'x'}}}, "'export.chekpoint' is unknown; did you mean 'export.checkpoint'"),
  (
    {'x': {'evaluate': {'checkpoint': '{workdir}/base'}, 'eval': {'evaluators': {'e': {}}}, 'total_steps': 3}},
    "in an evaluation:\n  'total_steps'",
  ),
  ({'x': {'evaluate': {'checkpoint': '{workdir}/base'}}}, "'eval.evaluators' is empty"),
  ({'x': {'scale': {'v': {'method': 'vote'}}}}, "'roles.policy.init' is empty: it names what the methods"),
  (
    {'x': {'scale': {'v': {'method': 'vote'}}, 'roles': {'policy': {'init': '/no/such'}}}},
    "'roles.policy.init': '/no/such' does not exist",
  ),
  ({'x': {'scale': {'v': {'method': 'bote'}}, **BASE}}, "'scale.v.method': 'bote' is none of"),
  ({'x': {**GENERATE, 'filter': {'inputs': {'r': 'x'}}}}, 'sections generate and filter: a stage is one of them'),
  (
    {'x': {**SFT, 'roles': {'policy': {'init': '{workdir}/base', 'tokenizer': '{workdir}/base'}}}},
    "'roles.policy.tokenizer': '{workdir}/base'",
  ),
  ({'a b': SFT}, "stage 'a b': a name is of letters"),
  ({'final': SFT}, "no stage may be called 'final'"),
  ({'x': 3}, "'stages' is no mapping"),
  ({'x': {**SFT, 'data': {**SFT['data'], 'options': {'mixing': 2.0}}}}, "x: config key 'data.options.mixing': 2.0 is not in [0, 1]"),
  (
    {'x': {**SFT, 'data': {'mixture': {'a': {'task': 'arithmetic', 'train_size': 8, 'options': {'operands': 'x'}}}}}},
    "'data.mixture.a.options.operands': 'x' is not of type int",
  ),
  ({'x': {**GENERATE, 'data': {'train_size': 8, 'options': {'operants': 3}}}}, "'data.options.operants' is unknown to data.task"),
  (
    {'x': {'evaluate': {'checkpoint': '{workdir}/base'}, 'eval': {'evaluators': {'e': {'task': 'sums'}}}}},
    "'data.task': 'sums' is none of",
  ),
]  # fmt: skip


@pytest.mark.parametrize(('more', 'wanted'), BAD)
def test_the_graph_is_checked_first(more, wanted, tmp_path):
  """Failure: a mistake in a later stage, or in the name of what it reads, is told when the stages before it have run."""
  assert wanted in refused(pipeline.run_pipeline, {'base': SFT, **more}, str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_new_keys_of_newer_code():
  """Failure: a new key with its default makes every stage of an old workdir a changed one; or a real change is taken for one."""
  new = stages.deciding({**SFT, 'seed': 3})
  old = {key: value for key, value in new.items() if key not in ('rewards.only', 'seed')}
  assert manifest.changes(old, new) == ["seed: 'absent' -> 3"]
  assert manifest.changes({**old, 'seed': 3, 'data.batch_size': 4}, new) == ['data.batch_size: 4 -> 8']
  assert 'mesh.data' not in new


def test_the_full_recipe(tmp_path, monkeypatch):
  """Failure: configs/r1.py does not resolve, a stage reads another's output than it should, or its updates are not the paper's."""
  monkeypatch.setattr(resolution, 'make_mesh', lambda config: sharding.make_mesh(1, 1, 1, jax.devices()[:1]))
  general = write(tmp_path / 'general.jsonl', [row('a')])
  folders = [tmp_path / name for name in ('math', 'code', 'stem', 'logic', 'helpful', 'safe', 'helpful_pairs', 'safe_labels')]
  for folder in folders:
    folder.mkdir()
  given = f'base=tests/fixtures/qwen2,student=tests/fixtures/llama,data={tmp_path},general={general}'
  chosen = config.read_file(f'configs/r1.py:{given}')['stages']
  found = {}
  for name, kind, reads, _ in pipeline.plan(chosen, str(tmp_path / 'run'))[1]:
    found[name] = kind, ', '.join(path for path in reads.split(', ') if path not in map(str, folders))
  assert found == {
    'r1_zero': ('train', 'tests/fixtures/qwen2'), 'r1_zero_long': ('train', 'r1_zero'), 'cold_sampled': ('generate', 'r1_zero_long'),
    'cold': ('filter', 'cold_sampled'), 'sft1': ('train', 'tests/fixtures/qwen2, cold'), 'rl1': ('train', 'sft1'),
    'sampled': ('generate', 'rl1'), 'reasoning': ('filter', 'sampled'), 'sft2_data': ('filter', f'reasoning, {general}'),
    'sft2': ('train', 'tests/fixtures/qwen2, sft2_data'), 'rm_helpful': ('train', 'sft2'), 'rm_safe': ('train', 'sft2'),
    'rl2': ('train', 'sft2'), 'rl2_general': ('train', 'rl2, rm_helpful, rm_safe'), 'r1': ('export', 'rl2_general'),
    'student_distilled': ('train', 'tests/fixtures/llama, sft2_data'), 'student_rl': ('train', 'tests/fixtures/llama'),
    'student_exported': ('export', 'student_distilled'),
  }  # fmt: skip
  updates = {name: 16 * chosen[name]['total_steps'] for name in ('r1_zero', 'r1_zero_long', 'rl2', 'rl2_general')}
  assert updates == {'r1_zero': 8192, 'r1_zero_long': 2208, 'rl2': 1296, 'rl2_general': 400}
  cold = config.read_file(f'configs/r1.py:{given},cold_start={general},scale=0.01')['stages']
  name, kind, reads, stands = pipeline.plan(cold, str(tmp_path / 'run'))[1][0]
  assert (name, kind, stands) == ('sft1', 'train', 'to do') and reads.startswith(f'tests/fixtures/qwen2, {general}')


BOUGHT = {'data': {'task': 'arithmetic', 'train_size': 16}, 'generate': {
  'source': 'api', 'keep': 'reasoning', 'size': 4, 'api': {'url': 'http://localhost:1/v1', 'model': 'm'},
}}  # fmt: skip


def test_bought_answers_stay(tmp_path, monkeypatch):
  """Failure: a stage that is made anew buys its answers again, or a kill while it is completed makes that necessary."""
  asked, state = [], {'left': 0, 'crash': False}

  def buy(settings, folder, overwrite):
    answers, rows = pathlib.Path(folder) / 'answers.jsonl', pathlib.Path(folder) / 'data.jsonl'
    answers.parent.mkdir(parents=True, exist_ok=True)
    asked.append(not answers.exists())
    answers.touch()
    rows.write_text(json.dumps([settings['generate']['size'], state['left']]) + '\n')
    if state['crash']:
      raise KeyboardInterrupt
    return {'evaluators': {}, 'not_asked': state['left']}

  monkeypatch.setitem(stages.KINDS, 'generate', stages.KINDS['generate']._replace(run=buy))
  workdir, bought = str(tmp_path / 'run'), lambda **keys: {'buy': {**BOUGHT, 'generate': {**BOUGHT['generate'], **keys}}}
  pipeline.run_pipeline(bought(), workdir)
  assert asked == [True]
  changed = bought(size=5)
  assert '--rerun=buy deletes them' in refused(pipeline.run_pipeline, changed, workdir)
  pipeline.run_pipeline(changed, workdir, rerun=['buy'])
  pipeline.run_pipeline(changed, workdir, overwrite=True)
  assert asked == [True, False, False]
  (tmp_path / 'run' / 'buy').rename(tmp_path / 'run' / '.buy.deleted')  # a kill in the middle of a removal
  pipeline.run_pipeline(changed, workdir, rerun=['buy'])
  assert asked == [True, False, False, False] and not (tmp_path / 'run' / '.buy.deleted').exists()
  state['left'] = 3
  pipeline.run_pipeline(bought(size=6), workdir, rerun=['buy'])
  state |= {'left': 0, 'crash': True}  # what was left out is bought now, and a kill comes before that is entered
  with pytest.raises(KeyboardInterrupt):
    pipeline.run_pipeline(bought(size=6), workdir)
  state['crash'] = False
  assert words(bought(size=6), workdir) == {'buy': 'partly'}
  pipeline.run_pipeline(bought(size=6), workdir)
  assert words(bought(size=6), workdir) == {'buy': 'done'} and not any(asked[1:])


def micro(cache: str, general: str) -> dict:
  """All kinds of stages, as small as they get: a base of two tasks and two languages, a reward model, RL by both rules and that model, its
  samples filtered and joined with other rows, SFT of the base on them, an export, a student of a converted set, and evaluations of a run
  and of the export. Sizes are such that stages share their compiled programs."""
  sums = {'task': 'arithmetic', 'train_size': 256}
  rollout = {'max_completion_length': 24, 'chunk': 24}
  rewards = {'functions': ('accuracy', 'format_tags'), 'weights': (1.0, 0.2)}
  base = {'roles': {'policy': {'init': '{workdir}/base'}}}
  measured = {
    'data': {'task': 'arithmetic', 'max_prompt_length': 32, 'cache_dir': cache}, 'rollout': rollout, 'rewards': rewards,
    'eval': {'size': 16, 'batch_size': 8, 'evaluators': {'four': {'num_samples': 4, 'temperature': 1.0}}},
  }  # fmt: skip
  sft = {'objective': {'name': 'sft'}, 'optim': {'learning_rate': 5e-3}, 'log_every': 2}

  def mixed(rows: str, **options) -> dict:
    reviews = {'task': 'reviews', 'train_size': 64, 'options': {'rows': rows}}
    return {'mixture': {'sums': {**sums, 'options': options, 'weight': 3.0}, 'reviews': reviews}, 'cache_dir': cache}

  return {
    'base': {
      **sft, 'total_steps': 40, 'model': {'preset': 'tiny'}, 'checkpoint': {'every': 20},
      'data': {**mixed('demonstrations', languages={'en': 2, 'ru': 1}, mixing=0.3), 'batch_size': 16, 'max_length': 64},
    },
    'rm': {
      **base, 'total_steps': 4, 'objective': {'name': 'reward_model'}, 'optim': {'learning_rate': 1e-3}, 'checkpoint': {'every': 2},
      'data': {
        'task': 'reviews', 'train_size': 64, 'options': {'rows': 'rankings'}, 'batch_size': 16, 'max_length': 64, 'cache_dir': cache,
      },
    },
    'rl': {
      'roles': {**base['roles'], 'reward': {'helpful': {'init': '{workdir}/rm'}}},
      'total_steps': 4, 'data': {**mixed('prompts'), 'batch_size': 8, 'max_prompt_length': 32}, 'rollout': rollout,
      'rewards': {
        'functions': ('accuracy', 'format_tags', 'language', 'helpful'), 'weights': (1.0, 0.2, 0.5, 1.0),
        'only': dict.fromkeys(('accuracy', 'format_tags', 'language'), ('sums',)) | {'helpful': ('reviews',)},
      },
      'objective': {'name': 'grpo', 'num_generations': 4, 'beta': 0.01, 'ref_model_sync_updates': 2},
      'optim': {'learning_rate': 1e-3}, 'checkpoint': {'every': 2},
    },
    'sample': {
      'roles': {'policy': {'init': '{workdir}/rl'}},
      'data': {'task': 'arithmetic', 'train_size': 256, 'max_prompt_length': 32, 'cache_dir': cache},
      'rollout': rollout, 'rewards': rewards, 'generate': {'keep': 'best', 'size': 24, 'num_samples': 4, 'batch_size': 8},
    },
    'joined': {'filter': {
      'inputs': {'sampled': '{workdir}/sample/data.jsonl', 'general': general}, 'sizes': {'general': 8},
      'steps': ({'name': 'length', 'max_characters': 400}, {'name': 'repetition', 'most': 0.9}, {'name': 'duplicates'}),
    }},
    'tuned': {
      **sft, **base, 'total_steps': 4, 'checkpoint': {'every': 2},
      'data': {'task': 'dataset', 'path': '{workdir}/joined/data.jsonl', 'batch_size': 16, 'max_length': 64, 'cache_dir': cache},
    },
    'published': {
      'data': {'task': 'arithmetic', 'train_size': 256, 'cache_dir': cache},
      'generate': {'source': 'published', 'keep': 'reasoning', 'size': 64},
    },
    'student': {
      **sft, 'total_steps': 4, 'model': {'preset': 'tiny'}, 'checkpoint': {'every': 2},
      'data': {'task': 'dataset', 'path': '{workdir}/published/data.jsonl', 'batch_size': 16, 'max_length': 64, 'cache_dir': cache},
    },
    'measured': {**measured, 'evaluate': {'checkpoint': '{workdir}/tuned'}},
    'exported': {'export': {'checkpoint': '{workdir}/tuned'}},
    'curve': {
      'roles': {'policy': {'init': '{workdir}/tuned'}}, 'data': measured['data'], 'rollout': rollout, 'eval': {'size': 16, 'batch_size': 8},
      'scale': {'voting': {'method': 'vote', 'num_samples': (1, 4)}},
    },
    'again': {**measured, 'evaluate': {'checkpoint': '{workdir}/exported'}, 'roles': {'policy': {'tokenizer': 'bytes'}}},
  }  # fmt: skip


NOT_COMPARED = ('wall_s', 'seconds', 'workdir', 'began', 'finished', 'checkpoint', 'filter')


def timeless(value):
  """Without what tells of the wall clock, and of the place."""
  if isinstance(value, dict):
    return {k: timeless(v) for k, v in value.items() if k not in NOT_COMPARED and not k.startswith(WALL_CLOCK)}
  return [timeless(v) for v in value] if isinstance(value, list) else value


def outcome(workdir) -> dict:
  """All that two pipelines must share, but for the runs."""
  entries = json.loads((workdir / 'manifest.json').read_text())['stages']
  for name in ('measured', 'again', 'curve'):
    entries[name].pop('output')  # the hash of a file with seconds in it
  samples = {
    f'{d}/{f.name}': f.read_bytes()
    for d in ('sample', 'measured', 'again', 'curve')
    for f in (workdir / d / 'samples').glob('*.jsonl')
  }
  return {
    'entries': timeless(entries), 'summary': timeless(json.loads((workdir / 'summary.json').read_text())),
    'samples': samples, 'rows': {name: (workdir / name / 'data.jsonl').read_bytes() for name in ('sample', 'joined', 'published')},
    'weights': (workdir / 'exported' / 'model.safetensors').read_bytes(),
    'left': sorted(path.name for path in workdir.iterdir()),
  }  # fmt: skip


def assert_same_chain(a, b) -> None:
  for name in ('base', 'rm', 'rl', 'tuned', 'student'):
    assert_same(*({'evaluations': [], **everything(w / name)} for w in (a, b)))
  assert outcome(a) == outcome(b)


@pytest.fixture(scope='module')
def general(tmp_path_factory):
  rows = [row(f'<think>{n}</think><answer>{n}</answer>', f'say {n}') for n in range(20)]
  return write(tmp_path_factory.mktemp('general') / 'general.jsonl', rows)


def test_chain_goes_on_where_it_was_cut(general, tmp_path, monkeypatch):
  """Failure: a stage that was cut is another one afterwards, a finished one is repeated, or a kind of stage does not work in a chain."""
  chosen = micro(str(tmp_path / 'cache'), general)
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  result = pipeline.run_pipeline(chosen, str(whole))
  assert (
    result['measured']['evaluators'] == result['again']['evaluators'] == result['final']['evaluators']
  )  # an export is its run
  assert result['joined']['rows'] == 8 + result['sample']['rows'] and result['measured']['format'] > 0
  write_line, append = metrics.Writer.write, evaluators.SampleFile.append
  reached = []

  def once(place: str, condition: bool):
    if condition and place not in reached:
      reached.append(place)
      raise KeyboardInterrupt

  def write_and_crash(self, step, values):
    write_line(self, step, values)
    once('rl', 'rl' in str(self.workdir) and step == 3)

  def append_and_crash(self, samples, seconds):
    once('sample', 'sample/' in str(self.path) and bool(self.lines.lines))
    append(self, samples, seconds)

  monkeypatch.setattr(metrics.Writer, 'write', write_and_crash)
  monkeypatch.setattr(evaluators.SampleFile, 'append', append_and_crash)
  for place in ('rl', 'sample'):
    with pytest.raises(KeyboardInterrupt):
      pipeline.run_pipeline(chosen, str(cut))
    assert reached[-1] == place
  pipeline.run_pipeline(chosen, str(cut))
  assert_same_chain(cut, whole)
  for module, name in ((build, 'build'), (stored, 'load_params'), (weights, 'save')):
    monkeypatch.setattr(module, name, None)  # nothing is opened where all is done
  assert words(chosen, cut) == dict.fromkeys(chosen, 'done')
  assert pipeline.run_pipeline(chosen, str(cut)) == json.loads((cut / 'summary.json').read_text())


@pytest.mark.prove
def test_kill_at_random_moments(general, tmp_path):
  """Failure: a chain that was killed at some moment is another chain, or does some of its work again."""
  (tmp_path / 'micro.py').write_text(f'def get_config():\n  return {{"stages": {micro(str(tmp_path / "cache"), general)!r}}}\n')

  def command(workdir) -> list[str]:
    return [sys.executable, '-m', 'rl_reasoning.pipeline', f'--config={tmp_path / "micro.py"}', f'--workdir={workdir}']

  whole, took, draw, kills, chains = tmp_path / 'whole', 0.0, random.Random(0), 0, 0
  for workdir in (tmp_path / 'first', whole):  # the first one compiles
    began = time.time()
    assert start(command(workdir)).wait() == 0
    took = time.time() - began
  assert_same_chain(tmp_path / 'first', whole)
  while kills < 20:
    chains += 1
    workdir, process, made = tmp_path / f'killed{chains}', None, {}
    for _ in range(10):  # each gets on by a part of the chain, wherever that ends
      process, end = start(command(workdir)), time.time() + draw.uniform(0.1, 0.5) * took
      while process.poll() is None and time.time() < end:
        time.sleep(0.01)
      if process.poll() is not None:
        assert process.returncode == 0
        break
      kill_when(process, lambda: True)
      kills += 1
      made |= finished(workdir)
    assert process and (process.returncode == 0 or start(command(workdir)).wait() == 0)
    assert_same_chain(workdir, whole)
    assert made.items() <= finished(workdir).items()  # nothing that was done was done again
  print(f'{kills} kills in {chains} chains; uninterrupted: {took:.0f} s')


def finished(workdir) -> dict[str, str]:
  """When each stage was done that is."""
  path = workdir / 'manifest.json'
  entries = json.loads(path.read_text())['stages'] if path.exists() else {}
  return {name: entry['finished'] for name, entry in entries.items() if 'finished' in entry}
