"""YAML with `!Tags` into a plain tree in which every value knows its file and line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparse_accel.errors import RecipeError, ZooError, nearest, suggestion
from sparse_accel.recipe import shipped
from sparse_accel.zoo.resolving import open_zoo, resolve
from sparse_accel.zoo.stubs import is_stub

RAW_NAME = "<recipe>"
_SUFFIXES = (".yaml", ".yml", ".md")
_PREFIX = "pytorch."
_STANDARD = "tag:yaml.org,2002:"
_FENCE = re.compile(r"^[ \t]*(?:---|\+\+\+)[ \t]*$", re.MULTILINE)
_HTML_COMMENTS = re.compile(r"\s*(?:<!--.*?-->\s*)*", re.DOTALL)
# YAML 1.1 takes a float without a dot (5e-5) for text.
_EXPONENT_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+")
_TAGGED_ITEM = re.compile(r"(?P<indent> +)- +![\w.]+\s*(?:#.*)?")
# Aliases of aliases grow without bound; no recipe is this large.
_MAX_VALUES = 100_000


def looks_like_a_number(text: str) -> bool:
    """Whether a plain scalar is read as a number here though YAML 1.1 takes it for a word."""
    return _EXPONENT_NUMBER.fullmatch(text) is not None


@dataclass(frozen=True)
class Value:
    """A scalar, a list[Value] or a dict of Values, with its place (`file:line`) and its tag (a modifier's name).

    A value under an anchor and its aliases share `anchor`; `is_alias` tells them apart.
    """

    data: Any
    where: str
    tag: str | None = None
    anchor: int | None = None
    is_alias: bool = False

    def walk(self) -> Iterator[Value]:
        """This value and all inside it."""
        yield self
        children = (
            self.data if isinstance(self.data, list) else self.data.values() if isinstance(self.data, dict) else ()
        )
        for child in children:
            yield from child.walk()


def read(source: str) -> Value:
    """The tree of a recipe: the path of a .yaml, .yml or .md file, a shipped recipe's name, a `zoo:` stub, or the
    recipe's own text.

    Text is told from a name by its line break. Raises RecipeError for what cannot be read, with file:line.
    """
    if "\n" in source or "\r" in source:
        text = _with_plain_line_ends(source.removeprefix("\ufeff"))
        inner = _front_matter(text) if _opens_with_fence(text) else None
        return parse(text if inner is None else inner, RAW_NAME)
    path = _find(source)
    text = _with_plain_line_ends(_read_text(path))
    if path.suffix.lower() == ".md":
        inner = _front_matter(text)
        if inner is None:
            raise RecipeError(
                "no recipe found: a .md file holds it at the top between two lines of --- (or +++)", str(path)
            )
        text = inner
    return parse(text, str(path))


def read_raw(source: str) -> str:
    """A recipe's file as it is, comments and all; `source` is as for `read`."""
    return source if "\n" in source or "\r" in source else _read_text(_find(source))


def parse(text: str, name: str) -> Value:
    """The tree of YAML text; `name` is the file in error messages. Raises RecipeError with file:line."""
    try:
        return _Tree(text, name).root()
    except RecipeError as error:
        shifted = _with_fields_below_tags(text)
        if shifted == text:
            raise
        try:
            return _Tree(shifted, name).root()
        except RecipeError:
            raise error from None


def _find(source: str) -> Path:
    if is_stub(source):
        source = _of_stub(source)
    if not source.strip():
        raise RecipeError("the recipe's name is empty")
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot look up the recipe {source[:60]!r}: {reason}") from None
    if not is_file:
        found = shipped.find(source)
        if found is not None:
            return found
        if is_folder:
            raise RecipeError("is a folder; a recipe is a file (.yaml, .yml or .md)", source)
        if path.exists():
            raise RecipeError("is not a regular file", source)
        raise RecipeError(f"there is no such recipe{_nearest_file(path)}", source)
    if path.suffix.lower() not in _SUFFIXES:
        raise RecipeError(f"a recipe's file name ends in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}", source)
    return path


def _of_stub(stub: str) -> str:
    """The file or the shipped name that a `zoo:` stub stands for, by the environment's catalogues and what ships."""
    try:
        return resolve(stub, "recipe", open_zoo(None, shipped.names(), os.environ)).value
    except ZooError as error:
        raise RecipeError(str(error)) from None


def _nearest_file(path: Path) -> str:
    try:
        siblings = [entry for entry in path.parent.iterdir() if entry.suffix.lower() in _SUFFIXES]
    except OSError:
        siblings = []
    close = nearest(path.name, [entry.name for entry in siblings], count=1)
    if close:
        return f"; did you mean {str(path.with_name(close[0]))!r}?"
    hint = suggestion(str(path), shipped.names())
    return hint.replace("; known:", "; recipes that come with sparse_accel:")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not a text file in UTF-8 (byte {error.start})", str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", str(path)) from None


def _with_plain_line_ends(text: str) -> str:
    """Only `\\n` ends a line, and nothing invisible stands before it (YAML trips over a tab there)."""
    return re.sub(r"[ \t]+$", "", text.replace("\r\n", "\n").replace("\r", "\n"), flags=re.MULTILINE)


def _opens_with_fence(text: str) -> bool:
    content = _HTML_COMMENTS.sub("", text, count=1)
    return _FENCE.fullmatch(content.partition("\n")[0]) is not None


def _front_matter(text: str) -> str | None:
    """What stands between the first two fences, preceded by as many empty lines as there are above it."""
    opening = _FENCE.search(text)
    closing = _FENCE.search(text, opening.end()) if opening else None
    if opening is None or closing is None:
        return None
    return "\n" * text.count("\n", 0, opening.end()) + text[opening.end() : closing.start()]


def _with_fields_below_tags(text: str) -> str:
    """Fields at the column of a tag's dash, which YAML refuses, moved below the tag; line numbers stay."""
    lines = text.split("\n")
    index = 0
    while index < len(lines):
        item = _TAGGED_ITEM.fullmatch(lines[index])
        index += 1
        if item is None:
            continue
        column = len(item["indent"])
        end = next((i for i in range(index, len(lines)) if _ends_item(lines[i], column)), len(lines))
        fields = [i for i in range(index, end) if lines[i].strip() and not lines[i].lstrip().startswith("#")]
        if fields and _indent(lines[fields[0]]) == column:
            for i in fields:
                lines[i] = "  " + lines[i]
        index = end
    return "\n".join(lines)


def _ends_item(line: str, column: int) -> bool:
    content = line.strip()
    if not content or content.startswith("#"):
        return False
    starts_another = content.startswith("- ") or re.match(r"[^:]*modifiers[^:]*:", content) is not None
    return _indent(line) < column or (_indent(line) == column and starts_another)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


class _Tree:
    """One document of YAML, from the parser's nodes to Values."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._text = text
        self._seen: set[int] = set()
        self._open: set[int] = set()
        self._count = 0

    def root(self) -> Value:
        try:
            self._loader = yaml.SafeLoader(self._text)
            node = self._loader.get_single_node()
            if node is None:
                raise RecipeError("the recipe is empty", self._name)
            return self._value(node, self._line(node))
        except yaml.MarkedYAMLError as error:
            raise self._readable(error) from None
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise RecipeError(
                f"is not a text file: it holds the character {error.character!r}", f"{self._name}:{line}"
            ) from None
        except RecursionError:
            raise RecipeError("nested too deeply", self._name) from None

    def _readable(self, error: yaml.MarkedYAMLError) -> RecipeError:
        mark = error.problem_mark or error.context_mark
        if mark is None:
            return RecipeError(f"not valid YAML: {error.problem}", self._name)
        where = f"{self._name}:{mark.line + 1}"
        if "\\t" in (error.problem or ""):
            return RecipeError(
                "there is a tab in the indentation or between values; YAML allows only spaces there", where
            )
        if "single document" in (error.context or ""):
            return RecipeError("a recipe is one YAML document, here a second one begins", where)
        context = f" ({error.context})" if error.context else ""
        return RecipeError(f"not valid YAML, column {mark.column + 1}: {error.problem}{context}", where)

    def _line(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}"

    def _value(self, node: yaml.Node, where: str) -> Value:
        self._count += 1
        if self._count > _MAX_VALUES:
            raise RecipeError(f"the recipe expands to more than {_MAX_VALUES} values", where)
        if id(node) in self._open:
            raise RecipeError("a YAML alias stands inside its own anchor", where)
        is_alias = id(node) in self._seen
        self._seen.add(id(node))
        self._open.add(id(node))
        tag = self._modifier_name(node, where)
        data: Any = None
        if isinstance(node, yaml.MappingNode):
            data = self._mapping(node)
        elif isinstance(node, yaml.SequenceNode):
            if tag is not None:
                raise RecipeError(f"{tag}: needs fields (name: value), not a list", where)
            data = [self._value(item, self._line(item)) for item in node.value]
        elif tag is not None:
            if node.value.strip():
                raise RecipeError(f"{tag}: needs fields (name: value) on the lines below, not {node.value!r}", where)
            data = {}
        elif isinstance(node, yaml.ScalarNode):
            data = self._scalar(node, where)
        self._open.remove(id(node))
        return Value(data, where, tag, anchor=id(node), is_alias=is_alias)

    def _modifier_name(self, node: yaml.Node, where: str) -> str | None:
        """The name in a `!Name` or `!pytorch.Name` tag; None for a value without one."""
        tag = str(node.tag)
        if tag.startswith(_STANDARD) or tag == "!":
            return None
        name = tag.removeprefix("!").removeprefix(_PREFIX)
        if not name.isidentifier():
            if name.endswith(":"):
                raise RecipeError(f"write the tag without a colon: {tag.rstrip(':')}", where)
            raise RecipeError(f"the tag {tag} names no modifier; tags look like !EpochRangeModifier", where)
        return name

    def _mapping(self, node: yaml.MappingNode) -> dict[Any, Value]:
        own: dict[Any, Value] = {}
        merged: dict[Any, Value] = {}
        for key_node, value_node in node.value:
            where = self._line(key_node)
            if key_node.tag == _STANDARD + "merge":
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    if not isinstance(source, yaml.MappingNode):
                        raise RecipeError("'<<' merges mappings only", where)
                    for name, value in self._value(source, where).data.items():
                        merged.setdefault(name, value)
                continue
            key: Any = self._scalar(key_node, where) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise RecipeError("a key must be a plain word", where)
            if key in own:
                raise RecipeError(f"{key!r} stands here twice; the first is at {own[key].where}", where)
            own[key] = self._value(value_node, where)
        return {**merged, **own}

    def _scalar(self, node: yaml.ScalarNode, where: str) -> Any:
        if node.style is None and node.tag == _STANDARD + "str" and looks_like_a_number(node.value):
            return float(node.value)
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            reason = getattr(error, "problem", None) or error
            raise RecipeError(f"{node.value!r} is not a valid value: {reason}", where) from None
