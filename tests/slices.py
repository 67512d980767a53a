"""TPU slices that need not be there: the TPU compiler works for them on any machine that has its library."""

import importlib.util

import pytest

from launch import plan

needs_compiler = pytest.mark.skipif(
  not plan.LIBRARY.exists() and importlib.util.find_spec('libtpu') is None, reason='there is no TPU compiler: make .venv/.tpu'
)


def slice_of(topology):
  return plan.devices_of(topology, 1)
