"""How much of the training data is held out for validation; a file of its own, since options are checked without torch."""

from __future__ import annotations

from typing import Protocol


class HoldsOut(Protocol):
    """The options that say it."""

    @property
    def validation_split_percentage(self) -> int | None: ...
    @property
    def validation_ratio(self) -> float | None: ...


def held_out_share(options: HoldsOut) -> float | None:
    """The share of the training rows that becomes validation data where there is none, None for none."""
    if options.validation_ratio is not None:
        return options.validation_ratio
    percentage = options.validation_split_percentage
    return None if percentage is None else percentage / 100
