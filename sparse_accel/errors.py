"""The errors that a person reads.

SparseAccelError            bad input: one message, exit code 2
├── OptionError             a command-line option or an argument file
├── RecipeError             a recipe: carries file:line
│   └── TargetError         a target that matches no parameter or module
├── DataError               a data file or one of its rows
├── ModelError              a model, teacher or tokenizer folder
├── ZooError                a `zoo:` stub, or a catalogue that says what one stands for
├── LaunchError             the launch is not what was asked for
├── OutputError             the output folder or the disk
├── LoopError               a call of one's own loop: in another order, or with what it cannot use
└── InvariantError          training broke a promise (a revived zero, a non-finite loss); exit code 3
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseAccelError(Exception):
    """Something that the person who started the program can put right."""

    exit_code = 2


class OptionError(SparseAccelError):
    """An option that is unknown, malformed or contradicts another."""


class RecipeError(SparseAccelError):
    """A recipe that cannot be read or cannot be carried out; `where` is `file:line` when it is known."""

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where

    def at(self, where: str) -> RecipeError:
        """The same error with its place, unless it has one already."""
        if self.where is None:
            self.where = where
        return self

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class TargetError(RecipeError):
    """A target (`params`, `submodules`, `ignore`) that matched nothing."""


class DataError(SparseAccelError):
    """A data file that is missing, malformed or holds a bad row."""


class ModelError(SparseAccelError):
    """A model, teacher or tokenizer that is missing or does not fit."""


class ZooError(SparseAccelError):
    """A `zoo:` stub that is malformed or stands for nothing, or a catalogue of stubs that is wrong."""


class LaunchError(SparseAccelError):
    """The processes that run are not the ones that were asked for."""


class OutputError(SparseAccelError):
    """The output folder may not be written, or the disk is too small."""


class LoopError(SparseAccelError):
    """A call from one's own training loop that comes at the wrong moment, or brings what cannot be used."""


class InvariantError(SparseAccelError):
    """Training broke a promise that it makes; the run stops."""

    exit_code = 3


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The choices that look most like `name`, closest first; empty when none is close."""
    return difflib.get_close_matches(name, list(choices), n=count, cutoff=0.5)


def suggestion(name: str, choices: Iterable[str]) -> str:
    """A clause for the end of a message: `; did you mean 'a' or 'b'?`, or the choices themselves when none is close."""
    choices = list(choices)
    close = nearest(name, choices)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    listed = ", ".join(sorted(choices)[:20])
    return f"; known: {listed}" if listed else ""
