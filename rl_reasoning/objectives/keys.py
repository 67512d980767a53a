"""What the objectives refuse of their own keys."""

from __future__ import annotations


def check_key(condition: bool, key: str, message: str) -> None:
  """Raises ValueError naming the key of the section objective; resolution.py makes the user's error of it."""
  if not condition:
    raise ValueError(f'config key {"objective." + key!r}: {message}')
