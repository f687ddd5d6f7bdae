"""Brings a command line into the one spelling that the parser reads: `command --some_option=value`.

People write options with `_` or `-`, give booleans in Hugging Face's ways, numbers that begin with a minus and recipes
that begin with `---`; all of it is settled here, as pure functions on lists of words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from sparse_accel.errors import OptionError, suggestion
from sparse_accel.runtime.option_parsing import did_you_mean
from sparse_accel.runtime.options import BOOLEAN_WORDS

# What can only be an option, so that it is not the value of the one before; `---\nversion: 1` is none.
_LOOKS_LIKE_AN_OPTION: Final = re.compile(r"--[A-Za-z][\w-]*(=.*)?", re.DOTALL)
_HELP: Final = ("--help", "-h")


@dataclass(frozen=True)
class Flag:
    """One option of a command. A switch may stand alone; a list takes as many words as are among its `choices`. An option
    whose value may be left out stands for `alone` then, and takes the word behind it only if that ends in `ending`."""

    name: str
    is_switch: bool = False
    choices: Collection[str] = ()
    alone: str | None = None
    ending: str = ""


@dataclass(frozen=True)
class CommandLine:
    """The options of one command: every spelling (with `_`) -> its flag. `unknown` is called with the spelling, the
    value and the text of an option that is not there: it raises, or returns where the option may be left out."""

    flags: Mapping[str, Flag]
    unknown: Callable[[str, str, str], None]


def unknown_option(known: Collection[str]) -> Callable[[str, str, str], None]:
    """The plain answer to an unknown option: an error with the nearest names."""

    def refuse(spelling: str, value: str, where: str) -> None:
        raise OptionError(f"{where}: no such option{did_you_mean(spelling, known)}")

    return refuse


def command_name(word: str, known: Mapping[str, object], what: str = "command") -> str:
    """The command that a word stands for, with `-` or `_`. Raises OptionError with the nearest names."""
    name = word.replace("-", "_")
    if name not in known:
        raise OptionError(f"{word!r}: no such {what}{suggestion(name, known)}")
    return name


def normalise(words: list[str], line: CommandLine) -> list[str]:
    """The words after a command as positional words and `--name=value`; switches become `--name=true` or `=false`.
    Raises OptionError for an option that is unknown or lacks its value."""
    return list(_normalised(words, line))


def _normalised(words: list[str], line: CommandLine) -> Iterator[str]:
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word in _HELP:
            yield "--help"
            continue
        if word == "--":
            yield from words[position - 1 :]
            return
        if not _LOOKS_LIKE_AN_OPTION.fullmatch(word):
            if word.startswith("-") and len(word) > 1:
                raise OptionError(f"{word}: no such option; options begin with two dashes")
            yield word
            continue
        written, equals, value = word[2:].partition("=")
        spelling = written.replace("-", "_")
        flag = line.flags.get(spelling)
        negated = flag is None and spelling.startswith("no_") and _is_switch(line, spelling.removeprefix("no_"))
        if negated:
            flag = line.flags[spelling.removeprefix("no_")]
        following = words[position] if position < len(words) else None
        if flag is None:
            if not equals and following is not None and not _LOOKS_LIKE_AN_OPTION.fullmatch(following):
                value, position = following, position + 1
            elif not equals:
                value = "true"
            line.unknown(spelling, value, f"--{written}")
        elif negated:
            if equals or (following or "").lower() in BOOLEAN_WORDS:
                raise OptionError(f"--{written}: takes no value; or write --{flag.name} True|False")
            yield f"--{flag.name}=false"
        elif flag.is_switch:
            if not equals:
                value = "true"
                if following is not None and following.lower() in BOOLEAN_WORDS:
                    value, position = following, position + 1
            yield f"--{flag.name}={value}"
        elif flag.alone is not None:
            if not equals:
                value = flag.alone
                if following is not None and following.endswith(flag.ending):
                    value, position = following, position + 1
            yield f"--{flag.name}={value}"
        else:
            if not equals:
                if following is None or _LOOKS_LIKE_AN_OPTION.fullmatch(following):
                    behind = f", but {following} follows" if following is not None else ""
                    raise OptionError(f"--{written}: needs a value{behind}")
                value, position = following, position + 1
            more = [value]
            while flag.choices and position < len(words) and words[position] in flag.choices:
                more.append(words[position])
                position += 1
            yield f"--{flag.name}={','.join(more)}"


def _is_switch(line: CommandLine, spelling: str) -> bool:
    flag = line.flags.get(spelling)
    return flag is not None and flag.is_switch
