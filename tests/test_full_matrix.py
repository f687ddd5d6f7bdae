"""The table of all backends in docs/distributed.md is that of the committed measurement, and the measurement is whole."""

from __future__ import annotations

import itertools
import json

from tests.distributed import full_matrix

MEASURED = json.loads(full_matrix.JSON.read_text("utf-8"))


def test_the_table_in_the_document_is_the_measurements() -> None:
    found = full_matrix.BLOCK.search(full_matrix.DOCUMENT.read_text("utf-8"))
    assert found is not None
    assert found[0] == full_matrix.table(MEASURED), f"run: {full_matrix.COMMAND}"


def test_every_combination_was_measured() -> None:
    combinations = itertools.product(full_matrix.BACKENDS, full_matrix.PRECISIONS, full_matrix.RECIPES)
    assert [(row["backend"], row["precision"], row["recipe"]) for row in MEASURED["rows"]] == [*combinations]
    assert set(MEASURED["versions"]) == set(full_matrix.PACKAGES)


def test_no_zero_came_back_under_any_backend() -> None:
    assert {row["revived"] for row in MEASURED["rows"]} == {0}


def test_storages_give_the_same_bits_where_nothing_is_clipped() -> None:
    unclipped = [name for name, flags in full_matrix.PRECISIONS.items() if not flags["max_grad_norm"]]
    apart = {row["compact_to_masked"] for row in MEASURED["rows"] if row["precision"] in unclipped}
    assert apart == {0.0}
