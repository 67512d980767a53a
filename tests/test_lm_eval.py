"""Our checkpoints in lm-evaluation-harness: its numbers are those of our own model."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip('lm_eval', reason='lm-eval is not installed: pip install -e .[lm-eval]')

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from rl_reasoning import config, model, rollout, tokenizer, weights
from rl_reasoning.config import ConfigError
from rl_reasoning.lm_eval_adapter import JaxLM, cut
from rl_reasoning.structs import Batch

ARCH, TOKENIZER = model.Arch(264, 32, 64, 2, 4, 2, 8), tokenizer.ByteTokenizer()


@pytest.fixture(scope='module')
def params():
  # Sharp enough that greedy completions differ from prompt to prompt.
  return jax.tree.map(lambda x: x * 2, jax.jit(model.init, static_argnums=1)(jax.random.key(0), ARCH))


@pytest.fixture(scope='module')
def checkpoint(params, tmp_path_factory) -> str:
  path = str(tmp_path_factory.mktemp('weights') / 'hf')
  weights.save(params, ARCH, path)
  return path


@pytest.fixture(scope='module')
def lm(checkpoint):
  return JaxLM(checkpoint, batch_size=3, max_length=48, tokenizer='bytes', max_gen_toks=8)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
  return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def log_probs(params, ids: list[int]) -> np.ndarray:
  """Of every token but the first, by the model's own function, one row and no padding."""
  row, ones = np.asarray([ids], np.int32), np.ones((1, len(ids)), np.int32)
  batch = Batch(tokens=row, segment_NT=ones, position_NT=np.arange(len(ids), dtype=np.int32)[None], mask_NT=ones, source_N=ones[:, 0],
                group_N=ones[:, 0])  # fmt: skip
  return np.asarray(model.log_probs(params, ARCH, batch)[0])[0, 1:]


def best(params, ids: list[int]) -> list[int]:
  """What greedy decoding gives after each prefix."""
  row, ones = np.asarray([ids], np.int32), np.ones((1, len(ids)), np.int32)
  hidden, _ = model.forward(params, ARCH, row, ones, np.arange(len(ids), dtype=np.int32)[None])
  return np.asarray(model.logits(hidden, model.head(params)).argmax(-1))[0].tolist()


def test_loglikelihood(lm, params):
  """Failure: log-likelihoods are of other tokens, are mixed up by the batching, or `greedy` is not what greedy decoding gives."""
  pairs = [('3+4=', '7'), ('', 'ab'), ('a longer context, ', 'with a longer end'), ('x', 'yz'), ('The answer is ', '12'), ('12', '3'),
           ('q ', 'r')]  # fmt: skip
  follows = {c: best(params, TOKENIZER.encode(f'hi{c}'))[-1] for c in 'abcdefghijklmnopqrstuvwxyz'}
  pairs.append(next((f'hi{c}', chr(i)) for c, i in follows.items() if i < 128))
  got = lm.loglikelihood(requests('loglikelihood', pairs))
  for (context, continuation), (logp, is_greedy) in zip(pairs, got, strict=True):
    ids = TOKENIZER.encode(context + continuation)
    n = len(TOKENIZER.encode(continuation))
    if context.endswith(' '):
      n += 1  # the harness moves the space to the continuation
    if not context:
      ids = [TOKENIZER.end_id, *ids]
    assert logp == pytest.approx(log_probs(params, ids)[-n:].sum(), abs=1e-4)
    assert is_greedy == (best(params, ids)[-n - 1 : -1] == ids[-n:])
  assert got[-1][1] is True and not all(is_greedy for _, is_greedy in got)


def test_long_context_is_cut_on_the_left(lm, params):
  """Failure: a context beyond max_length loses its end, or the continuation."""
  ((logp, _),) = lm.loglikelihood(requests('loglikelihood', [('a' * 80 + 'bc', 'de')]))
  ids = TOKENIZER.encode('a' * 45 + 'bcde')
  assert len(ids) == 49 and logp == pytest.approx(log_probs(params, ids)[-2:].sum(), abs=1e-4)
  with pytest.raises(ConfigError, match='longer than max_length=48'):
    lm.loglikelihood(requests('loglikelihood', [('a', 'b' * 60)]))


def test_loglikelihood_rolling(lm, params):
  """Failure: a token of a long text is counted twice or not at all, or the first one after nothing."""
  short, long = 'abcdefgh', ''.join(chr(97 + i * 7 % 26) for i in range(100))
  got = lm.loglikelihood_rolling(requests('loglikelihood_rolling', [(short,), (long,)]))
  end, ids = TOKENIZER.end_id, TOKENIZER.encode(long)
  assert got[0] == pytest.approx(log_probs(params, [end, *TOKENIZER.encode(short)]).sum(), abs=1e-4)
  windows = [log_probs(params, [end, *ids[:48]]), log_probs(params, ids[47:96]), log_probs(params, ids[51:100])[-4:]]
  assert got[1] == pytest.approx(sum(w.sum() for w in windows), abs=1e-3)


def generate(lm, *pairs) -> list[str]:
  return lm.generate_until(requests('generate_until', list(pairs)))


def test_generate_until(lm, params):
  """Failure: a completion belongs to another prompt, runs past its stop sequence or limit, or sampling is not what the task asks."""
  prompts = ['3+4=', 'b', 'some longer prompt', 'x y z', '12']
  settings = config.Rollout(max_completion_length=8, temperature=0.0)
  rolled = rollout.generate(params, ARCH, [TOKENIZER.encode(p) for p in prompts], settings=settings, group=1,
                            end_ids=TOKENIZER.end_ids, key=jax.random.key(0))  # fmt: skip
  whole = [TOKENIZER.decode(t[:n]) for t, n in zip(rolled.tokens_NC, rolled.length_N)]
  assert generate(lm, *[(p, {'until': []}) for p in prompts]) == whole and len(set(whole)) > 2
  stop = next(c for text in whole for c in text[2:] if c.isascii())
  stops = {'until': [stop, 'never']}
  assert generate(lm, *[(p, stops) for p in prompts]) == [text.split(stop)[0] for text in whole]
  short = generate(lm, (prompts[0], {'until': [], 'max_gen_toks': 3}), (prompts[1], {'until': 'never', 'max_new_tokens': 8}))
  assert short == [TOKENIZER.decode(rolled.tokens_NC[0][:3]), whole[1]]
  draw = {'until': [], 'do_sample': True, 'temperature': 3.0}
  first = generate(lm, *[('b', draw)] * 4)
  assert len(set(first)) > 1 and generate(lm, *[('b', draw)] * 4) == first
  assert generate(lm, ('b', {'until': [], 'do_sample': False, 'temperature': 3.0})) == [whole[1]]
  with pytest.raises(ConfigError, match='num_beams is unknown'):
    generate(lm, ('b', {'until': [], 'num_beams': 4}))
  with pytest.raises(ConfigError, match='max_gen_toks: 48 leaves no room'):
    generate(lm, ('b', {'until': [], 'max_gen_toks': 48}))
  assert cut('a b c', ['c', 'b', '']) == 'a '


def test_chat_template(lm):
  """Failure: chats are not rendered by the tokenizer's template, or a turn that the model is to go on with is closed."""
  user = {'role': 'user', 'content': 'hi'}
  assert lm.apply_chat_template([user]) == '<user>hi<end><assistant>'
  began = [user, {'role': 'assistant', 'content': 'The answer is'}]
  assert lm.apply_chat_template(began, add_generation_prompt=False) == '<user>hi<end><assistant>The answer is'
  assert lm.tokenizer_name == 'bytes'


def test_arguments(checkpoint):
  """Failure: a misspelt or impossible model argument is ignored."""
  for arguments, wanted in (
    ({'max_lenght': 3}, 'max_lenght is unknown'),
    ({'batch_size': 'auto'}, 'a positive number of rows'),
    ({'max_length': 'long'}, 'max_length=long: a whole number'),
    ({'max_length': 8, 'max_gen_toks': 8}, 'leaves no room'),
    ({'dtype': 'int8'}, "'model.dtype': 'int8'"),
  ):
    with pytest.raises(ConfigError, match=wanted):
      JaxLM(checkpoint, tokenizer='bytes', **arguments)


@pytest.fixture(scope='module')
def tasks(tmp_path_factory) -> str:
  """A folder of two tasks over a file of this test: no download."""
  folder = tmp_path_factory.mktemp('tasks')
  sums = [(a, b) for a in range(3) for b in range(2)]
  rows = [{'question': f'{a}+{b}=', 'choices': [str(a + b), 'zz', '-'], 'gold': 0, 'answer': str(a + b)} for a, b in sums]
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  shared = f'dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / "rows.jsonl"}\ntest_split: test\n'
  (folder / 'choice.yaml').write_text(
    f'task: our_choice\n{shared}output_type: multiple_choice\ndoc_to_text: "{{{{question}}}}"\ndoc_to_choice: choices\n'
    'doc_to_target: gold\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n'
  )
  (folder / 'answer.yaml').write_text(
    f'task: our_answer\n{shared}output_type: generate_until\ndoc_to_text: "{{{{question}}}}"\ndoc_to_target: "{{{{answer}}}}"\n'
    'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n'
  )
  return str(folder)


def test_harness(lm, params, tasks):
  """Failure: the harness cannot run its tasks on our model, or scores another model."""
  result = simple_evaluate(
    lm, tasks=['our_choice', 'our_answer'], task_manager=TaskManager(include_path=tasks), bootstrap_iters=0
  )
  rows = [json.loads(line) for line in pathlib.Path(tasks, 'rows.jsonl').read_text().splitlines()]

  def chosen(row) -> int:
    ids = [TOKENIZER.encode(row['question'] + choice) for choice in row['choices']]
    return int(np.argmax([log_probs(params, i)[-len(c) :].sum() for i, c in zip(ids, row['choices'])]))

  assert result['results']['our_choice']['acc,none'] == pytest.approx(np.mean([chosen(row) == 0 for row in rows]))
  assert 0 <= result['results']['our_answer']['exact_match,none'] <= 1
  said = [sample['filtered_resps'][0] for sample in result['samples']['our_answer']]
  stops = {'until': ['\n'], 'max_gen_toks': 4}
  assert said == generate(lm, *[(row['question'], stops) for row in rows])


def test_command_line(checkpoint, tasks, tmp_path):
  """Failure: the documented command does not run, loses a flag of the harness, or hides a mistake."""

  def call(*flags):
    command = [sys.executable, '-m', 'rl_reasoning.lm_eval_adapter', f'--checkpoint={checkpoint}', '--tokenizer=bytes', *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'GLIBC_TUNABLES': ''})

  done = call(
    '--tasks', 'our_choice', '--include_path', tasks, '--apply_chat_template', '--limit', '2', '--output_path', str(tmp_path)
  )
  assert done.returncode == 0, done.stderr
  (found,) = tmp_path.rglob('results*.json')
  result = json.loads(found.read_text())
  assert result['n-samples']['our_choice']['effective'] == 2 and 0 <= result['results']['our_choice']['acc,none'] <= 1
  wrong = call('--tasks', 'our_choice', '--include_path', tasks, '--dtype=int8')
  assert wrong.returncode == 2 and "error: config key 'model.dtype': 'int8'" in wrong.stderr
