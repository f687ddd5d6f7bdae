"""Targets: exact names, patterns, keywords, SparseML's wrapped names, and what is said when nothing matches."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.errors import TargetError
from sparse_accel.targets import match_modules, match_parameters

NAMES = [
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.0.attention.self.query.bias",
    "bert.encoder.layer.0.output.dense.weight",
    "bert.encoder.layer.0.output.dense.bias",
    "qa_outputs.weight",
    "qa_outputs.bias",
]
PRUNABLE = [NAMES[1], NAMES[3], NAMES[5]]
MODULES = ["", "bert", "bert.encoder", "bert.encoder.layer.0.attention.self.query", "qa_outputs"]


@pytest.mark.parametrize("keyword", ["__ALL_PRUNABLE__", "__all_prunable__", "__All_Prunable__"])
def test_all_prunable_is_a_keyword_in_any_case_alone_or_in_a_list(keyword: str) -> None:
    assert match_parameters(keyword, NAMES, PRUNABLE) == PRUNABLE
    assert match_parameters([keyword, "qa_outputs.bias"], NAMES, PRUNABLE) == [*PRUNABLE, "qa_outputs.bias"]


def test_all_means_every_parameter() -> None:
    assert match_parameters("__all__", NAMES, PRUNABLE) == NAMES


def test_a_pattern_is_anchored_at_the_start_and_open_at_the_end() -> None:
    assert match_parameters(["re:qa_outputs"], NAMES, PRUNABLE) == ["qa_outputs.weight", "qa_outputs.bias"]
    assert match_parameters([r"re:.*query\.weight"], NAMES, PRUNABLE) == [NAMES[1]]
    with pytest.raises(TargetError):
        match_parameters(["re:query"], NAMES, PRUNABLE)


def test_matches_come_once_and_in_the_models_order() -> None:
    targets = ["qa_outputs.weight", "re:.*weight", NAMES[0]]
    assert match_parameters(targets, NAMES, PRUNABLE) == [name for name in NAMES if name.endswith("weight")]


def test_names_of_sparsemls_quantized_model_are_understood() -> None:
    wrapped = "bert.encoder.layer.0.attention.self.query.module.weight"
    assert match_parameters([wrapped], NAMES, PRUNABLE) == [NAMES[1]]
    assert match_parameters([r"re:.*\.dense\.module\.weight"], NAMES, PRUNABLE) == [NAMES[3]]
    assert match_modules(["qa_outputs.module"], MODULES) == ["qa_outputs"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("qa_outputs.weight", r"go in a list: \['qa_outputs.weight'\]"),
        ([], "the list is empty"),
        (["re:["], "not a regular expression"),
        (["encoder.layer.0.output.dense.weight"], "nearest: 'bert.encoder.layer.0.output.dense.weight'"),
        ([r"re:.*self\.quer.\.wight"], "nearest: 'bert.encoder.layer.0.attention.self.query.weight'"),
        ([".*query.weight"], "did you mean 're:.*query.weight'"),
        (["zzz"], "there are 7, such as"),
        (["qa_outputs.weight", "classifier.weight"], "'classifier.weight' matched no parameter"),
    ],
)
def test_a_target_without_a_match_is_an_error_that_helps(target: str | list[str], said: str) -> None:
    with pytest.raises(TargetError, match=said):
        match_parameters(target, NAMES, PRUNABLE)


def test_all_prunable_of_a_model_without_prunable_weights_is_an_error() -> None:
    with pytest.raises(TargetError, match="no parameter for __ALL_PRUNABLE__"):
        match_parameters("__ALL_PRUNABLE__", NAMES, [])


def test_modules_are_matched_like_parameters_and_an_empty_list_means_none() -> None:
    assert match_modules(["re:bert\\.enc", "qa_outputs"], MODULES) == MODULES[2:]
    assert match_modules([], MODULES) == []
    with pytest.raises(TargetError, match=r"submodules: 'bert.encodr' matched no module; nearest: 'bert.encoder'"):
        match_modules(["bert.encodr"], MODULES, what="submodules")


@settings(deadline=None)  # the machine may be busy
@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_exact_names_mean_themselves_also_as_escaped_patterns(chosen: set[str]) -> None:
    expected = [name for name in NAMES if name in chosen]
    assert match_parameters(sorted(chosen), NAMES, PRUNABLE) == expected
    assert match_parameters([f"re:{re.escape(name)}$" for name in sorted(chosen)], NAMES, PRUNABLE) == expected
