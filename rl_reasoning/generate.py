"""Text from a checkpoint: a run's workdir, a Hugging Face folder or a .gguf file.

  python -m rl_reasoning.generate scale --config=FILE.py:NAME=VALUE --checkpoint=RUN_OR_WEIGHTS --workdir=DIR [--config.KEY=VALUE ...]
    [--overwrite]
  python -m rl_reasoning.generate chat --checkpoint=RUN_OR_WEIGHTS [--unfold] [--temperature=0.6] [--top-p=0.95] [--max-tokens=1024]
    [--seed=0] [--template=NAME] [--tokenizer=PATH] [--dtype=float32]
  python -m rl_reasoning.generate ask --checkpoint=RUN_OR_WEIGHTS [the same] QUESTION

scale   accuracy against tokens for each method of the config's section `scale` (see rl_reasoning.inference). The config sets what that
        reads; DIR then holds scale.json, scale.md, scale.png and samples/, from which the same command goes on after an interruption
chat    a conversation (see rl_reasoning.chat); the template is that of the run, for published weights the tokenizer's chat template
ask     one question
Exit codes: 0, 2.
"""

if __name__ == '__main__':
  from rl_reasoning import environment

  environment.restart_with_huge_pages('rl_reasoning.generate')

import sys
from collections.abc import Iterator, Sequence

import jax

from rl_reasoning import chat, config as config_lib, environment, evaluate, inference, metrics, stored, tables, train
from rl_reasoning.config import Parser, Rollout, check

COMMANDS = ('scale', 'chat', 'ask')
CONVERSATION = 2048  # tokens of the turns before an answer, for ropes that stretch by the length of the run
CHUNK = 256  # of a talk: whenever the cache grows a program is compiled, and the person waits


def scale(argv: Sequence[str]) -> None:
  flags = train.read_flags(list(argv), ('config', 'checkpoint', 'workdir', 'overwrite', 'config.KEY'))
  for name, value in (('checkpoint', 'RUN_OR_WEIGHTS'), ('workdir', 'DIR')):
    check(bool(flags.get(name)), f'--{name}={value} is missing')
  settings = config_lib.read_file(flags['config'])
  check('stages' not in settings, f'{flags["config"]}: the stages of a pipeline: rl_reasoning.pipeline runs them')
  environment.cache_compilations()
  job = inference.resolve(train.overridden(settings, flags))
  result = inference.scale(job, flags['checkpoint'], flags['workdir'], 'overwrite' in flags)
  rows = [
    [tables.scale_title(name, method), point['label'], tables.cell(point, 'accuracy'), f'{point["tokens"]:.1f}']
    for name, method in result['methods'].items()
    for point in method['points']
  ]
  metrics.summary_table(flags['checkpoint'], ['method', 'at', 'accuracy', 'tokens a problem'], rows)
  print(f'{flags["workdir"]}/scale.md, scale.png, scale.json; samples: {flags["workdir"]}/samples/')


def typed() -> Iterator[str]:
  """Lines of the person: with a prompt at a terminal, else all that standard input holds."""
  if not sys.stdin.isatty():
    yield from sys.stdin
    return
  while True:
    try:
      yield input('> ')
    except EOFError:
      return


def talk(kind: str, argv: Sequence[str]) -> None:
  parser = Parser(prog=f'python -m rl_reasoning.generate {kind}', allow_abbrev=False, description='Talk with a checkpoint.')
  parser.add_argument('--checkpoint', required=True, metavar='RUN_OR_WEIGHTS')
  parser.add_argument('--unfold', action='store_true', help='show the thinking')
  parser.add_argument('--temperature', type=float, default=0.6, help='0 is greedy')
  parser.add_argument('--top-p', type=float, default=0.95)
  parser.add_argument('--max-tokens', type=int, default=1024, help='of an answer, thinking included')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--template', default='')
  parser.add_argument('--tokenizer', default='')
  parser.add_argument('--dtype', default='float32')
  if kind == 'ask':
    parser.add_argument('question', nargs='+')
  flags = parser.parse_args(argv)
  ranges = {'temperature': flags.temperature >= 0, 'top-p': 0 < flags.top_p <= 1, 'max-tokens': flags.max_tokens > 0,
            'seed': 0 <= flags.seed < 2**32}  # fmt: skip
  for name, good in ranges.items():
    check(good, f'--{name}={getattr(flags, name.replace("-", "_"))} is out of range')
  template = flags.template or ('' if stored.is_run(flags.checkpoint) else 'chat')
  policy = {'tokenizer': flags.tokenizer, 'template': template}
  config = config_lib.resolve({'model': {'dtype': flags.dtype}, 'roles': {'policy': policy}, 'rewards': {'functions': ()}})
  environment.cache_compilations()
  run, params, _ = evaluate.open_run(config, flags.checkpoint)
  check(run.speaks, f'--checkpoint={flags.checkpoint}: is a reward model: it has no head for text')
  run = run._replace(arch=run.arch.for_length(flags.max_tokens + CONVERSATION))
  top_p = flags.top_p if flags.temperature else 1.0  # greedy is greedy
  settings = Rollout(max_completion_length=flags.max_tokens, temperature=flags.temperature, top_p=top_p, chunk=CHUNK)
  talker, live = chat.Talker(run, params, settings, flags.seed), sys.stdout.isatty()
  with jax.set_mesh(run.mesh):
    if kind == 'ask':
      chat.answer(talker, [], ' '.join(flags.question), 0, sys.stdout, unfold=flags.unfold, live=live)
    else:
      chat.chat(talker, typed(), sys.stdout, unfold=flags.unfold, live=live)


def command(argv: list[str]) -> None:
  kind = argv[0] if argv else ''
  check(kind in COMMANDS, f'{kind!r} is no command; python -m rl_reasoning.generate {" | ".join(COMMANDS)} ...')
  if kind == 'scale':
    scale(argv[1:])
  else:
    talk(kind, argv[1:])


def main(argv: list[str]) -> int:
  return train.exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
