"""The deployment folder: the graph, and what a program that has never heard of us needs beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparse_accel.errors import InvariantError, OutputError
from sparse_accel.folders.trained import TrainedModel
from sparse_accel.onnx_export.report import REPORT_FILE
from sparse_accel.serving.deployment import DEPLOYMENT_FILE, FORMAT_KEY, FORMAT_VERSION, training_facts

if TYPE_CHECKING:
    from sparse_accel.tasks.base import Task

# Where the graph lies: at the top, or as transformers.js looks for it.
LAYOUTS: Final = {"flat": "", "transformers.js": "onnx"}
# Files of the tokenizer that transformers may not write again, but that others read.
_TOKENIZER_FILES: Final = (
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tokenizer.model",
)  # fmt: skip


def write_companions(trained: TrainedModel, task: Task, sequence_length: int | None, layout: str, folder: Path) -> None:
    """Write config, tokenizer and deployment.json into `folder`."""
    trained.model.config.save_pretrained(folder)
    if layout == "transformers.js":
        # Which file it opens follows from this: "fp32" is model.onnx, whose weights may well be int8.
        _edit_json(folder / "config.json", lambda config: {**config, "transformers.js_config": {"dtype": "fp32"}})
    trained.tokenizer.save_pretrained(folder)
    _edit_json(folder / "tokenizer_config.json", _for_older_readers)
    for name in _TOKENIZER_FILES:
        if (trained.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(trained.folder / name, folder / name)
    facts = {FORMAT_KEY: FORMAT_VERSION, "task": task.name, **training_facts(trained.folder)}
    if sequence_length is not None:
        facts["sequence_length"] = sequence_length
    (folder / DEPLOYMENT_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text("utf-8"))), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _for_older_readers(settings: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's settings in words that transformers 4 (which optimum pins) knows as well as 5 does."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def check_target(target: Path, model_dir: Path, overwrite: bool) -> None:
    """Raise OutputError where `target` is not free for a deployment. With `overwrite`, an earlier one of ours is."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"--deployment_dir {target} is a file; name a folder")
    if target.exists() and model_dir.exists() and target.samefile(model_dir):
        raise OutputError(f"--deployment_dir {target} is the model's own folder; name another")
    if target.is_dir() and any(target.iterdir()):
        if not (target / DEPLOYMENT_FILE).is_file():
            raise OutputError(
                f"--deployment_dir {target} is not empty and holds no {DEPLOYMENT_FILE}, so it is not a deployment of "
                "ours; name another"
            )
        if not overwrite:
            raise OutputError(f"{target} holds a deployment already; name another, or pass --overwrite to replace it")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"--deployment_dir {target}: {parent} cannot be written")


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` in one rename when all went well; an earlier deployment goes then.

    An InvariantError leaves what was written beside the target, as `<target>.failed`, for a person to look at; after
    any other error nothing is left.
    """
    target = target.absolute()
    partial, earlier = (
        target.with_name(f".{target.name}.partial-{os.getpid()}"),
        target.with_name(f".{target.name}.earlier-{os.getpid()}"),
    )
    failed = target.with_name(f"{target.name}.failed")
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
        except InvariantError:
            if not failed.exists() or (failed / REPORT_FILE).is_file():
                shutil.rmtree(failed, ignore_errors=True)
                partial.rename(failed)
            raise
        if target.exists():
            target.rename(earlier)
        partial.rename(target)
    except OSError as error:
        if earlier.exists() and not target.exists():
            earlier.rename(target)
        raise OutputError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)
