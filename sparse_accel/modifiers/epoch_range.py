"""How long a run lasts."""

from __future__ import annotations

from typing import final

from sparse_accel.modifiers.base import Epoch, Modifier


@final
class EpochRangeModifier(Modifier):
    """Says nothing but from when to when, in epochs: a recipe trains for as long as its last modifier names."""

    start_epoch: Epoch
    end_epoch: Epoch
