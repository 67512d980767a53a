"""Eight virtual CPU devices for every test; what the machine lacks is listed at the end of the run."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
# Two programs in flight, each with collectives over eight devices, wait for each other's threads where there are two cores.
os.environ['JAX_CPU_ENABLE_ASYNC_DISPATCH'] = 'false'
# Many tests build the same programs.
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'xla')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'


def pytest_terminal_summary(terminalreporter):
  skipped = terminalreporter.stats.get('skipped', [])
  if skipped:
    terminalreporter.section('not run here')
    for report in skipped:
      terminalreporter.line(f'{report.nodeid}: {report.longrepr[2]}')
