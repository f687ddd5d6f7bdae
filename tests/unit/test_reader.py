"""Reading: every place where a recipe may lie, every indentation in use, and errors with file and line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.errors import RecipeError
from sparse_accel.recipe import shipped
from sparse_accel.recipe.reader import Value, read

RECIPE = """\
num_epochs: 3
training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(num_epochs)
"""


def plain(value: Value) -> Any:
    """The tree without places; a modifier is a pair of its name and its fields."""
    data = value.data
    if isinstance(data, list):
        data = [plain(item) for item in data]
    elif isinstance(data, dict):
        data = {key: plain(item) for key, item in data.items()}
    return data if value.tag is None else (value.tag, data)


EXPECTED: dict[str, Any] = {
    "num_epochs": 3,
    "training_modifiers": [("EpochRangeModifier", {"start_epoch": 0.0, "end_epoch": "eval(num_epochs)"})],
}


def error_of(source: str | Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read(str(source))
    return str(caught.value)


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.yml", "RECIPE.YAML"])
@pytest.mark.parametrize("encode", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_file_reads_the_same_with_any_suffix_bom_and_line_ends(
    tmp_path: Path, name: str, encode: str, line_end: str
) -> None:
    path = tmp_path / name
    path.write_bytes(RECIPE.replace("\n", line_end).encode(encode))
    root = read(str(path))
    assert plain(root) == EXPECTED
    assert root.data["training_modifiers"].data[0].data["end_epoch"].where == f"{path}:5"


def test_text_is_a_recipe_too_and_its_places_say_so() -> None:
    assert plain(read(RECIPE)) == EXPECTED
    assert plain(read("\ufeff" + RECIPE)) == EXPECTED
    assert read(RECIPE).data["num_epochs"].where == "<recipe>:1"


@pytest.mark.parametrize("fence", ["---", "+++", "  ---"])
@pytest.mark.parametrize("before", ["", "\n\n", "<!--\nCopyright\n-->\n\n"])
def test_front_matter_of_markdown_is_read_with_the_lines_of_the_file(tmp_path: Path, fence: str, before: str) -> None:
    path = tmp_path / "recipe.md"
    path.write_text(f"{before}{fence}\n{RECIPE}{fence}\n# A title: [\n", encoding="utf-8")
    root = read(str(path))
    assert plain(root) == EXPECTED
    assert root.data["num_epochs"].where == f"{path}:{before.count(chr(10)) + 2}"
    assert plain(read(path.read_text(encoding="utf-8"))) == EXPECTED


def test_a_document_marker_in_yaml_is_no_front_matter(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("---\n" + RECIPE, encoding="utf-8")
    assert plain(read(str(path))) == EXPECTED
    assert plain(read("---\n" + RECIPE)) == EXPECTED
    path.write_text("---\n" + RECIPE + "---\ntext\n", encoding="utf-8")
    assert error_of(path) == f"{path}:7: a recipe is one YAML document, here a second one begins"


# At (0, 0) the fields would be keys of the recipe itself.
@pytest.mark.parametrize(("dash", "deeper"), [*itertools.product([0, 1, 2, 4], range(6))][1:])
@pytest.mark.parametrize("tag", ["!EpochRangeModifier", "!pytorch.EpochRangeModifier", "!EpochRangeModifier  # why"])
def test_fields_may_stand_at_any_indent_from_the_dash_on(dash: int, deeper: int, tag: str) -> None:
    fields = " " * (dash + deeper)
    text = "num_epochs: 3\ntraining_modifiers:\n"
    for _ in range(2):
        text += f"{' ' * dash}- {tag}\n\n{fields}# a comment\n{fields}start_epoch: 0.0\n"
        text += f"{fields}end_epoch: eval(num_epochs)\n"
    text += "later: [1]\n"
    root = read(text)
    assert plain(root) == {
        "num_epochs": 3,
        "training_modifiers": EXPECTED["training_modifiers"] * 2,
        "later": [1],
    }
    assert [item.where for item in root.data["training_modifiers"].data] == ["<recipe>:3", "<recipe>:8"]


def test_fields_below_the_dash_do_not_swallow_the_next_group() -> None:
    text = "a_modifiers:\n  - !One\n  x: 1\n  - !Two\n  y:\n    - 1\n    - 2\nb_modifiers:\n  - !Three\n    z: 3\n"
    assert plain(read(text)) == {
        "a_modifiers": [("One", {"x": 1}), ("Two", {"y": [1, 2]})],
        "b_modifiers": [("Three", {"z": 3})],
    }


@pytest.mark.parametrize("indent", ["", "  "])
def test_a_file_may_be_a_single_modifier(indent: str) -> None:
    root = read(f"!EpochRangeModifier\n{indent}start_epoch: 0\n{indent}end_epoch: 4\n")
    assert plain(root) == ("EpochRangeModifier", {"start_epoch": 0, "end_epoch": 4})


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-5", 5e-5), ("1E4", 1e4), ("1.75e-4", 1.75e-4), (".5e1", 5.0), ("'5e-5'", "5e-5"), ("13", 13), ("8.", 8.0)],
)
def test_numbers_mean_what_their_writer_meant(text: str, value: Any) -> None:
    data = read(f"x: {text}\n").data["x"].data
    assert data == value
    assert type(data) is type(value)


def test_merged_mappings_and_aliases_are_expanded_and_their_own_keys_win() -> None:
    text = "base: &base {start_epoch: 1, end_epoch: 3}\n"
    text += "modifiers:\n  - !EpochRangeModifier\n    <<: *base\n    start_epoch: 0\n"
    assert plain(read(text))["modifiers"] == [("EpochRangeModifier", {"start_epoch": 0, "end_epoch": 3})]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "<recipe>:3: 'a' stands here twice; the first is at <recipe>:1"),
        ("m:\n  - !X\n    a: 1\n    a: 2\n", "<recipe>:4: 'a' stands here twice"),
        ("m:\n  - !X:\n      a: 1\n", "<recipe>:2: write the tag without a colon: !X"),
        ("m:\n  - !keras.X\n    a: 1\n", "<recipe>:2: the tag !keras.X names no modifier"),
        ("m:\n  - !X text\n", "<recipe>:2: X: needs fields"),
        ("m:\n  - !X [1]\n", "<recipe>:2: X: needs fields"),
        ("m:\n\t- !X\n", "<recipe>:2: there is a tab"),
        ("m:\n  - !X\n    a: 1\n   b: 2\n", "<recipe>:4: not valid YAML, column 4"),
        ("m: [1\n", "<recipe>:2: not valid YAML"),
        ("a: *b\n", "<recipe>:1: not valid YAML, column 4: found undefined alias 'b'"),
        ("a: &a [*a]\n", "<recipe>:1: a YAML alias stands inside its own anchor"),
        ("a: !!python/object:os.system ls\n", "<recipe>:1: 'ls' is not a valid value"),
        ("a: 2001-99-99\n", "<recipe>:1: '2001-99-99' is not a valid value"),
        ("? [a]\n: 1\n", "<recipe>:1: a key must be a plain word"),
        ("a: \0\n", "<recipe>:1: is not a text file"),
        ("a: " + "[" * 5000 + "\n", "<recipe>: nested too deeply"),
        ("\n \n", "<recipe>: the recipe is empty"),
        ("# only a comment\n", "<recipe>: the recipe is empty"),
        ("<<: 3\nm: 1\n", "<recipe>:1: '<<' merges mappings only"),
    ],
)
def test_bad_yaml_is_one_error_with_its_line(text: str, said: str) -> None:
    assert error_of(text).startswith(said)


def test_aliases_of_aliases_cannot_eat_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "expands to more than" in error_of("\n".join(lines) + "\n")


def test_what_is_no_recipe_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for name, content in {
        "b.yaml": b"\x00\xff\xfe",
        "w.yaml": RECIPE.encode("utf-16"),
        "e.yaml": b"",
        "m.md": b"# hi\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.bin").write_bytes(b"\x80\x02")
    assert error_of(tmp_path / "b.yaml") == f"{tmp_path / 'b.yaml'}: is not a text file in UTF-8 (byte 1)"
    assert "is not a text file in UTF-8" in error_of(tmp_path / "w.yaml")
    assert error_of(tmp_path / "e.yaml") == f"{tmp_path / 'e.yaml'}: the recipe is empty"
    assert "two lines of ---" in error_of(tmp_path / "m.md")
    assert "ends in .yaml, .yml or .md" in error_of(tmp_path / "model.bin")
    assert error_of(tmp_path) == f"{tmp_path}: is a folder; a recipe is a file (.yaml, .yml or .md)"
    assert error_of(tmp_path / "recip.yaml").endswith(f"did you mean {str(tmp_path / 'recipe.yaml')!r}?")
    assert "the recipe's name is empty" in error_of(" ")
    assert "cannot look up the recipe" in error_of("x" * 5000)


def test_shipped_recipes_are_found_by_name_with_or_without_suffix() -> None:
    assert {"question_answering/dense", "question_answering/pruned_quant"} <= set(shipped.names())
    for name in shipped.names():
        assert shipped.find(name) == shipped.find(f"{name}.yaml")
        assert plain(read(name)) == plain(read(f"{name}.yaml"))
    assert shipped.find("../recipes/question_answering/dense") is None
    assert "did you mean 'question_answering/dense'" in error_of("question_answering/dens")


@settings(deadline=None)  # the machine may be busy
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(0, len(RECIPE)))
def test_no_text_gets_past_the_reader_except_as_a_tree_or_a_recipe_error(noise: str, position: int) -> None:
    try:
        read(RECIPE[:position] + noise + RECIPE[position:] + "\n")
    except RecipeError:
        pass
