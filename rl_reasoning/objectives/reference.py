"""The reference of an objective that keeps one: frozen, or following the policy."""

from __future__ import annotations

from typing import Any


class Reference:
  """What follows from the keys `ref_model_sync_updates` and `ref_model_ema` and from `refers`, whether there is a reference at all."""

  ref_model_sync_updates: int | None
  ref_model_ema: float | None
  refers: Any  # a property of the objective

  @property
  def moves(self) -> bool:
    return self.ref_model_sync_updates is not None or self.ref_model_ema is not None

  @property
  def frozen(self) -> tuple[str, ...]:
    return ('ref',) if self.refers and not self.moves else ()

  @property
  def moving(self) -> tuple[str, ...]:
    return ('ref',) if self.refers and self.moves else ()

  def told(self) -> str:
    """What becomes of it, for --explain."""
    often = 'every step' if self.ref_model_sync_updates is None else (
      f'after a step in which the updates reach or cross a multiple of {self.ref_model_sync_updates}')  # fmt: skip
    told = f'moves {often}' if self.moves else 'frozen'
    ema = self.ref_model_ema
    return told if ema is None else f'{told} to {ema:g} reference + {1 - ema:g} policy'
