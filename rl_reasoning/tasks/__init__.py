"""TASKS: what `data.task` may pick. A task is a module of two functions:

rows(split, seed, size, path, **options) -> Iterator[dict]   options are the keys of `data.options`
files(path, split) -> list of files it reads                 only where it reads files
"""

from rl_reasoning.tasks import arithmetic, countdown, dataset, gsm8k

TASKS = {'arithmetic': arithmetic, 'countdown': countdown, 'gsm8k': gsm8k, 'dataset': dataset}
