"""What happens to rows that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sparse_accel.errors import DataError, suggestion

# How many of the dropped rows a note names.
NUM_ROWS_NAMED = 5
# Rows that a stream leaves out are counted up to here: each is remembered.
MOST_COUNTED = 1_000_000


@dataclass(frozen=True)
class KnownColumns:
    """The columns that the first data of a run was read from, by what they hold, and where that data is from. All other data
    is read from the same ones: a guess is made once."""

    names: Mapping[str, str]
    source: str

    def require(self, holds: str, where: str, there: Iterable[str], flag: str) -> str:
        """The name of the column that holds it. Raises DataError with the nearest where it is not among those at `where`."""
        name, there = self.names[holds], list(there)
        if name not in there:
            raise DataError(
                f"{where}: there is no column {name!r}, from which the {holds} of {self.source} "
                f"{'are' if holds.endswith('s') else 'is'} taken{suggestion(name, there)} ({flag} names one for all data)"
            )
        return name


@dataclass
class BadRows:
    """What happens to a row that is bad: `error` raises DataError at once, `skip` remembers it and goes on."""

    policy: str
    messages: list[str] = field(default_factory=list)

    def add(self, where: str, problem: str) -> None:
        """Take note of a bad row, or raise."""
        if self.policy != "skip":
            raise DataError(f"{where}: {problem} (--on_bad_rows skip leaves such rows out)")
        self.messages.append(f"{where}: {problem}")

    def note(self, source: str) -> str:
        """A sentence that counts what was dropped and names the first few."""
        return f"{source}: left out {counted_and_named(self.messages)}"


def counted_and_named(messages: Sequence[str]) -> str:
    """How many bad rows there are, and what the first few are."""
    named = "; ".join(messages[:NUM_ROWS_NAMED])
    more = f"; and {len(messages) - NUM_ROWS_NAMED:,} more" if len(messages) > NUM_ROWS_NAMED else ""
    rows = "1 bad row" if len(messages) == 1 else f"{len(messages):,} bad rows"
    return f"{rows}: {named}{more}"
