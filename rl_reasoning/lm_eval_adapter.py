"""EleutherAI's lm-evaluation-harness on our checkpoints: pip install -e .[lm-eval], then

  python -m rl_reasoning.lm_eval_adapter --checkpoint=RUN_OR_WEIGHTS [--dtype=bfloat16] --tasks=gsm8k [every flag of `lm-eval run`]

The checkpoint is a run's workdir, a Hugging Face folder or a .gguf file. The model is registered as `rl_reasoning`; its arguments are those
of JaxLM. Nothing else imports this module, and it needs no PyTorch.
"""

from __future__ import annotations

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.lm_eval_adapter')

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_reasoning import config as config_lib, environment, model, rollout, sharding, train
from rl_reasoning.config import check
from rl_reasoning.evaluate import open_run
from rl_reasoning.structs import Array, PyTree

try:
  from lm_eval import utils  # pyright: ignore[reportMissingImports]
  from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
  from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
  from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
except ImportError as missing:
  if __name__ == '__main__':
    print(f'error: lm-eval is not installed ({missing}): pip install -e .[lm-eval]', file=sys.stderr)
    sys.exit(2)
  raise

PIECE = 64  # positions whose logits exist at once


@functools.partial(jax.jit, static_argnames=('arch', 'dtype'))
def score(
  params: PyTree, arch: model.Arch, tokens_NT: Array, segment_NT: Array, position_NT: Array, dtype: str
) -> tuple[Array, Array]:
  """(log-probability, whether greedy decoding gives it) of every token given those before it, [N, T - 1]: the first has none."""
  hidden, _ = model.forward(params, arch, tokens_NT, segment_NT, position_NT, dtype=dtype)
  head, (N, T) = model.head(params), tokens_NT.shape
  pieces = -(-T // PIECE)
  target = jnp.pad(tokens_NT[:, 1:], ((0, 0), (0, pieces * PIECE - T + 1)))
  hidden = jnp.pad(hidden, ((0, 0), (0, pieces * PIECE - T), (0, 0)))

  def piece(x):
    part, wanted = x
    logp = jax.nn.log_softmax(model.logits(part, head, arch.final_logit_softcapping), axis=-1)
    return jnp.take_along_axis(logp, wanted[..., None], axis=-1)[..., 0], jnp.argmax(logp, axis=-1) == wanted

  split = [jnp.moveaxis(x.reshape(N, pieces, PIECE, *x.shape[2:]), 1, 0) for x in (hidden, target)]
  logp, greedy = (jnp.moveaxis(x, 0, 1).reshape(N, -1)[:, : T - 1] for x in jax.lax.map(piece, tuple(split)))
  return logp, greedy


def cut(text: str, stops: Sequence[str]) -> str:
  """Up to the first stop sequence."""
  for stop in stops:
    text = text.split(stop)[0] if stop else text
  return text


@register_model('rl_reasoning')
class JaxLM(TemplateLM):
  """A checkpoint as the harness sees a model. Prompts come as the tasks make them: roles.policy.template plays no part; with
  --apply_chat_template the tokenizer's own chat template does."""

  def __init__(self, checkpoint: str, batch_size: int | str = 16, max_length: int = 2048, dtype: str = 'float32', tokenizer: str = '',
               max_gen_toks: int = 256, seed: int = 0, **harness: Any):  # fmt: skip
    super().__init__()
    left = {key for key, value in harness.items() if value is not None} - {
      'device',
      'max_batch_size',
    }  # what the harness always hands over
    check(not left, f'--model_args: {", ".join(sorted(left))} is unknown to the model rl_reasoning')
    check(str(batch_size).isdigit() and int(batch_size) > 0, f'--batch_size={batch_size}: a positive number of rows')
    for key, value in (('max_length', max_length), ('max_gen_toks', max_gen_toks), ('seed', seed)):
      check(str(value).isdigit(), f'{key}={value}: a whole number is needed')
    settings = {'model': {'dtype': dtype}, 'roles': {'policy': {'tokenizer': tokenizer}}}
    self.run, self.params, _ = open_run(config_lib.resolve(settings), checkpoint)
    devices = sharding.axis_size(self.run.mesh, 'rows')
    self.rows = -(-int(batch_size) // devices) * devices
    self.max_length, self.max_gen_toks, self.seed, self.dtype = int(max_length), int(max_gen_toks), int(seed), dtype
    check(
      0 < self.max_gen_toks < self.max_length,
      f'max_gen_toks={max_gen_toks} leaves no room for a prompt in max_length={max_length}',
    )

  @property
  def eot_token_id(self) -> int:
    return self.run.tokenizer.end_id

  @property
  def prefix_token_id(self) -> int:
    """What a text without context comes after: the begin token where the tokenizer has one, else the end token."""
    begin = getattr(getattr(self.run.tokenizer, 'inner', None), 'bos_token_id', None)
    return self.eot_token_id if begin is None else begin

  @property
  def tokenizer_name(self) -> str:
    return self.run.config.roles.policy.tokenizer.replace('/', '__')

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    return self.run.tokenizer.encode(string)

  def chat_template(self, chat_template: bool | str = False) -> str:
    """Kept in the harness's results, so that they say what was asked."""
    check(
      isinstance(chat_template, bool), f'--apply_chat_template={chat_template}: the tokenizer has one template, without a name'
    )
    return getattr(getattr(self.run.tokenizer, 'inner', None), 'chat_template', '') or ''

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    text = self.run.tokenizer.chat(chat_history, add_generation_prompt)
    if add_generation_prompt:
      return text
    last = chat_history[-1]['content'].strip()  # its turn goes on: without what the template closes it with
    return text[: text.rindex(last) + len(last)]

  def batches(self, lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of rows of like length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + self.rows] for start in range(0, len(order), self.rows)]

  def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
                            ) -> list[tuple[float, bool]]:  # fmt: skip
    """Contexts are cut on the left to max_length."""
    whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    with jax.set_mesh(self.run.mesh):
      for ids in self.batches([len(tokens) for tokens in whole]):
        T = sharding.size_class(len(whole[ids[0]]))
        tokens, segment = np.zeros((self.rows, T), np.int32), np.zeros((self.rows, T), np.int32)
        for row, i in enumerate(ids):
          tokens[row, : len(whole[i])], segment[row, : len(whole[i])] = whole[i], 1
        position = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
        rows = sharding.put_rows(self.run.mesh, (tokens, segment, position))
        logp, greedy = jax.device_get(score(self.params, self.run.arch, *rows, self.dtype))
        for row, i in enumerate(ids):
          end = len(whole[i]) - 1
          start = end - len(requests[i][2])
          check(start >= 0, f'a continuation of {len(requests[i][2])} tokens is longer than max_length={self.max_length}')
          found[i] = float(logp[row, start:end].astype(np.float64).sum()), bool(greedy[row, start:end].all())
          if requests[i][0] is not None:
            self.cache_hook.add_partial('loglikelihood', requests[i][0], found[i])
    return found

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Every token once, in windows of max_length."""
    windows, owners = [], []
    for owner, request in enumerate(requests):
      pieces = utils.get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1)
      for context, continuation in map(utils.make_disjoint_window, pieces):
        windows.append((None, context, continuation))
        owners.append(owner)
    totals = [0.0] * len(requests)
    for owner, (logp, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
      totals[owner] += logp
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Completions up to the end token, a stop sequence or max_gen_toks, greedy unless the task samples. Random numbers are a function of
    (seed, request). Prompts are cut on the left to what max_length leaves."""
    found = [''] * len(requests)
    groups: dict[tuple[config_lib.Rollout, tuple[str, ...]], list[int]] = {}
    for i, request in enumerate(requests):
      options = normalize_gen_kwargs(dict(request.args[1]), default_max_gen_toks=self.max_gen_toks)
      stops, do_sample = tuple(options.pop('until')), options.pop('do_sample')
      sampled = {key: options.pop(key, default) for key, default in (('top_k', 0), ('top_p', 1.0), ('min_p', 0.0))}
      longest, temperature = options.pop('max_gen_toks'), options.pop('temperature', 1.0)
      check(not options, f'generation_kwargs: {", ".join(options)} is unknown to the model rl_reasoning')
      check(0 < longest < self.max_length, f'max_gen_toks: {longest} leaves no room for a prompt in max_length={self.max_length}')
      draws: dict[str, Any] = {'temperature': float(temperature), **sampled} if do_sample else {'temperature': 0.0}
      settings = config_lib.Rollout(max_completion_length=longest, **draws)
      groups.setdefault((settings, stops), []).append(i)
    tok = self.run.tokenizer
    with jax.set_mesh(self.run.mesh):
      for (settings, stops), members in groups.items():
        room = self.max_length - settings.max_completion_length
        prompts = [(tok.encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in members]
        for batch in self.batches([len(p) for p in prompts]):
          padded = batch + [batch[-1]] * (self.rows - len(batch))
          rolled = rollout.generate(
            self.params, self.run.arch, [prompts[n] for n in padded], settings=settings, group=1, end_ids=tok.end_ids,
            key=jax.random.key(self.seed), dtype=self.dtype, mesh=self.run.mesh, prompt_ids=[members[n] for n in padded],
          )  # fmt: skip
          for row, n in enumerate(batch):
            i = members[n]
            found[i] = cut(tok.decode(rolled.tokens_NC[row, : rolled.length_N[row]].tolist()), stops)
            self.cache_hook.add_partial('generate_until', requests[i].args, found[i])
    return found


def command(argv: list[str]) -> None:
  from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

  own = {'checkpoint': '', 'dtype': 'float32', 'tokenizer': '', 'max_length': '2048'}
  rest = []
  for argument in argv:
    name, equals, value = argument.removeprefix('--').partition('=')
    if argument.startswith('--') and equals and name in own:
      own[name] = value
    else:
      rest.append(argument)
  check(bool(own['checkpoint']), '--checkpoint=RUN_OR_WEIGHTS is missing')
  environment.cache_compilations()
  arguments = [f'{name}={value}' for name, value in own.items() if value]
  sys.argv = ['lm-eval', 'run', '--model', 'rl_reasoning', '--model_args', *arguments, *rest]
  cli_evaluate()


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
