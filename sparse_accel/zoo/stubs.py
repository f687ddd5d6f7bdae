"""The grammar of `zoo:` stubs, read strictly: SparseZoo itself matched beginnings and let anything follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from sparse_accel.errors import ZooError, suggestion

PREFIX: Final = "zoo:"
_FORM: Final = "zoo:DOMAIN/SUB_DOMAIN/ARCHITECTURE/FRAMEWORK/REPOSITORY/DATASET/TAG"
_PARTS: Final = ("domain", "sub_domain", "architecture", "framework", "repository", "dataset", "tag")

_WORD: Final = r"[.A-Za-z0-9_]+"
_LONG: Final = re.compile(
    rf"{_WORD}/{_WORD}/{_WORD}(?:-{_WORD})?/{_WORD}/{_WORD}/{_WORD}(?:-{_WORD})?/{_WORD}(?:-{_WORD})*"
)
# architecture[-sub]-source_dataset[-training_dataset]-tag
_SHORT: Final = re.compile(rf"{_WORD}(?:-{_WORD}){{2,4}}")

# The keys of a query. What the last two chose were files of the service's, of which there is one here.
_RECIPE_KEYS: Final = ("recipe_type", "recipe")
_FILE_KEYS: Final = ("checkpoint", "deployment")

# Sub-domains of the long form -> the task whose recipes they take.
TASK_OF_SUB_DOMAIN: Final = {
    "question_answering": "question_answering",
    "text_classification": "text_classification",
    "sentiment_analysis": "text_classification",
    "document_classification": "text_classification",
    "multilabel_text_classification": "text_classification",
    "token_classification": "token_classification",
    "masked_language_modeling": "masked_language_modeling",
}

# Data sets by whose names the short form tells its task; several are joined by `_`, the last trained on first.
_TASK_OF_DATASET: Final = {
    "squad": "question_answering",
    "mnli": "text_classification",
    "qqp": "text_classification",
    "sst2": "text_classification",
    "goemotions": "text_classification",
    "conll2003": "token_classification",
    "wikipedia": "masked_language_modeling",
}


@dataclass(frozen=True)
class Stub:
    """A stub taken apart. `name` is what stands between `zoo:` and `?`; `task` is None where none of ours fits."""

    name: str
    task: str | None
    dataset: str
    tag: str
    recipe_type: str | None = None
    query: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def text(self) -> str:
        """The stub without its query, as it is written."""
        return PREFIX + self.name


def is_stub(text: object) -> bool:
    """Whether a value is meant as a stub. Only `zoo:` tells: by its grammar alone `bert-base-uncased` would be one."""
    return isinstance(text, str) and text.startswith(PREFIX) and "\n" not in text and "\r" not in text


def parse_stub(text: str) -> Stub:
    """Take a stub apart, with or without `zoo:`. Raises ZooError that says which part is wrong."""
    name, *queries = text.removeprefix(PREFIX).split("?")
    if len(queries) > 1:
        raise ZooError(f"{text}: more than one '?'; several keys of a query are joined by '&'")
    _check_name(text, name)
    query = _query(text, queries[0]) if queries else {}
    kinds = {query[key] for key in _RECIPE_KEYS if key in query}
    if len(kinds) > 1:
        raise ZooError(f"{text}: recipe_type and recipe choose different recipes, {' and '.join(sorted(kinds))}")
    recipe_type = next(iter(kinds), None)
    if "/" in name:
        parts = dict(zip(_PARTS, name.split("/"), strict=True))
        task = TASK_OF_SUB_DOMAIN.get(parts["sub_domain"])
        return Stub(name, task, parts["dataset"], parts["tag"], recipe_type, MappingProxyType(query))
    words = name.split("-")
    dataset = next((word for word in words[1:-1] if _task_of_dataset(word) is not None), words[-2])
    return Stub(name, _task_of_dataset(dataset), dataset, words[-1], recipe_type, MappingProxyType(query))


def _task_of_dataset(word: str) -> str | None:
    return _TASK_OF_DATASET.get(word.partition("_")[0])


def _check_name(text: str, name: str) -> None:
    """Raises ZooError unless all of `name` is a stub of either form."""
    if any(set(part) == {"."} for part in name.split("/")):
        raise ZooError(f"{text}: a stub has no part of dots alone; it is {_FORM}")
    if _LONG.fullmatch(name) or _SHORT.fullmatch(name):
        return
    longest = _LONG.match(name)
    if longest is not None:
        junk = name[longest.end() :]
        raise ZooError(f"{text}: {junk!r} follows the end of the stub; leave it out: {PREFIX}{longest[0]}")
    short = _SHORT.match(name)
    if short is not None and "/" not in name:
        raise ZooError(f"{text}: {name[short.end() :]!r} follows the end of the stub; leave it out: {PREFIX}{short[0]}")
    if "/" not in name:
        raise ZooError(f"{text}: is no stub; a stub is {_FORM}, or ARCHITECTURE-DATASET-TAG")
    parts = name.split("/")
    for part, label in zip(parts, _PARTS, strict=False):
        if not re.fullmatch(rf"{_WORD}(?:-{_WORD})*", part):
            raise ZooError(
                f"{text}: the {label}, {part!r}, should be letters, digits, '.', '_' and '-'; a stub is {_FORM}"
            )
    if len(parts) < len(_PARTS):
        raise ZooError(f"{text}: has no {' and no '.join(_PARTS[len(parts) :])}; a stub is {_FORM}")
    raise ZooError(f"{text}: only the architecture, the data set and the tag may hold '-'; a stub is {_FORM}")


def _query(text: str, written: str) -> dict[str, str]:
    query: dict[str, str] = {}
    for pair in written.split("&"):
        key, equals, value = pair.partition("=")
        if key in _FILE_KEYS:
            raise ZooError(f"{text}: {key}= chose among files of SparseZoo's service, which has ended; leave it out")
        if key not in _RECIPE_KEYS:
            raise ZooError(f"{text}: a query has no key {key!r}{suggestion(key, _RECIPE_KEYS)}")
        if not equals or not re.fullmatch(rf"{_WORD}(?:-{_WORD})*", value):
            raise ZooError(f"{text}: {key}= should be followed by a recipe's type, such as transfer-question_answering")
        if key in query:
            raise ZooError(f"{text}: {key}= is given twice")
        query[key] = value
    return query
