"""What happens to rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_accel.errors import DataError

# How many of the dropped rows a note names.
NUM_ROWS_NAMED = 5


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
        named = "; ".join(self.messages[:NUM_ROWS_NAMED])
        more = f"; and {len(self.messages) - NUM_ROWS_NAMED} more" if len(self.messages) > NUM_ROWS_NAMED else ""
        rows = "1 bad row" if len(self.messages) == 1 else f"{len(self.messages)} bad rows"
        return f"{source}: left out {rows}: {named}{more}"
