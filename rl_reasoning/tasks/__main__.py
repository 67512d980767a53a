"""Preferences by hand: shows prompts and responses, and writes the ranking that is typed as a row to train on (see tasks/rank.py).

  python -m rl_reasoning.tasks rank FILE [--out=RANKED.jsonl] [--seed=0] [--ranked-by=NAME]

FILE has rows of prompt and responses (JSON lines, JSON or Parquet). Every ranking is saved when it is typed; the same command goes on where
a session has ended, also by Ctrl-C. Without --out the rankings of data.jsonl are in ranked_data.jsonl beside it. Exit codes: 0, 2, 130
interrupted.
"""

from __future__ import annotations

import getpass
import io
import pathlib
import sys
from collections.abc import Sequence

from rl_reasoning.config import Parser, check, exit_code
from rl_reasoning.tasks import dataset
from rl_reasoning.tasks.rank import rank


def default_out(path: pathlib.Path) -> pathlib.Path:
  """Its name must not begin with 'train' or 'test', or a data set of that folder would hold the rankings too."""
  ending = next((ending for ending in dataset.ENDINGS if path.name.endswith(ending)), path.suffix)
  return path.with_name(f'ranked_{path.name.removesuffix(ending)}.jsonl')


def user() -> str:
  try:
    return getpass.getuser()
  except (OSError, KeyError):  # a number that no name belongs to, as in containers
    return ''


def command(argv: Sequence[str]) -> None:
  parser = Parser(prog='python -m rl_reasoning.tasks', allow_abbrev=False)
  commands = parser.add_subparsers(required=True, metavar='rank')
  ranks = commands.add_parser('rank', help='rank completions by hand', allow_abbrev=False)
  ranks.add_argument('file', metavar='FILE', type=pathlib.Path, help='rows of prompt and responses')
  ranks.add_argument('--out', default='', metavar='RANKED.jsonl', help='default: ranked_NAME.jsonl beside NAME.jsonl')
  ranks.add_argument('--seed', type=int, default=0, help='of the order in which responses are shown')
  ranks.add_argument('--ranked-by', default='', metavar='NAME', help='whose rankings these are; default: the user')
  flags = parser.parse_args(argv)
  path = flags.file.expanduser()
  out = pathlib.Path(flags.out).expanduser() if flags.out else default_out(path)
  check('://' not in flags.out, f'--out={flags.out}: a local file is needed')
  check(out.name.endswith('.jsonl'), f'--out={out}: the name must end with .jsonl')
  check(out.resolve() != path.resolve(), f'--out={out}: it is the file that is read')
  rank(path, out, flags.seed, flags.ranked_by or user())


def main(argv: Sequence[str]) -> int:
  for stream in (sys.stdin, sys.stdout):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')  # a terminal that is not of UTF-8 ends no session
  return exit_code(command, argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
