"""Reads a deployment folder: the facts that prediction needs and the tokenizer, without torch where there is a graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from sparse_accel.errors import ModelError, OptionError, suggestion
from sparse_accel.folders.sources import WEIGHT_FILES, neighbour
from sparse_accel.serving.engines import ENGINES, MODEL_FILES, Engine, TorchEngine, model_file, open_engine
from sparse_accel.tasks import TASKS, resolve_task

DEPLOYMENT_FILE: Final = "deployment.json"
# The version of that file's layout, under a key that tells it from any other JSON file.
FORMAT_KEY: Final = "sparse_accel_deployment"
FORMAT_VERSION: Final = 1
TORCH: Final = "torch"

# The end of a model class's name -> the task whose head it has.
_HEADS: Final = {
    "ForQuestionAnswering": "question_answering",
    "ForSequenceClassification": "text_classification",
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_language_modeling",
}
# Models that begin to count positions behind the padding index, so that they read that many tokens fewer.
_SHIFTED_POSITIONS: Final = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer", "mpnet", "xmod"}
)
_DEFAULT_LENGTH: Final = 384
# Tasks whose features are as long as the model reads, where nobody says otherwise, and a length for models without end.
_WHOLE_LENGTH: Final = frozenset({"token_classification", "masked_language_modeling"})
_LONG: Final = 512
_DEFAULT_STRIDE: Final = 128
# The record that training leaves in its folder, and what it tells of windows.
_RUN_FILE: Final = "run.json"
_TRAINING_FACTS: Final = ("max_seq_length", "doc_stride", "version_2_with_negative")
# The same for tasks that read columns: options of training which say how data is read and scored.
SETTINGS: Final = (
    "task_name",
    "input_column_names",
    "text_column_name",
    "label_column_name",
    "label_all_tokens",
    "return_entity_level_metrics",
    "line_by_line",
    "mlm_probability",
    "whole_word_mask",
    "seed",
)
_LEAST: Final = {"max_seq_length": 1, "doc_stride": 0, "n_best_size": 1, "max_answer_length": 1, "sequence_length": 1}


@dataclass(frozen=True)
class Facts:
    """How texts become features and logits become answers; names and meanings are those of training's options.

    `sequence_length` is the one length that a graph of fixed shape takes; None: any. `settings` are further options of the
    task's own, by name.
    """

    max_seq_length: int
    doc_stride: int
    n_best_size: int = 20
    max_answer_length: int = 30
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0
    sequence_length: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedTokenizer:
    """A tokenizer as its files describe it. The attributes are those of a transformers tokenizer, as far as windows and
    batches need them; reading it imports neither transformers nor torch."""

    is_fast: ClassVar[bool] = True

    backend: str
    pad_token_id: int | None
    cls_token_id: int | None
    bos_token_id: int | None
    mask_token_id: int | None
    unk_token_id: int | None
    pad_token_type_id: int
    padding_side: str
    truncation_side: str
    model_input_names: tuple[str, ...]
    model_max_length: int

    @property
    def backend_tokenizer(self) -> Self:
        """Itself: only `to_str` is asked of it."""
        return self

    def to_str(self) -> str:
        """The JSON of the `tokenizers` library."""
        return self.backend


@dataclass(frozen=True)
class Deployment:
    """A folder that can answer: an exported one (`has_graph`) or a plain model folder, which torch runs.

    `tokenizer` is a ServedTokenizer or one of transformers. `longest` is the most tokens that the model reads at once, None for
    no limit; `num_segments` is how many values of `token_type_ids` it knows; `labels` are the names of its classes, None
    where they have none; `problem_type` is the config's word for their kind.
    """

    folder: Path
    task: str
    has_graph: bool
    tokenizer: Any
    facts: Facts
    longest: int | None
    num_segments: int
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None

    def with_facts(self, **changes: Any) -> Deployment:
        """The same with other facts; None leaves one as it is. Raises OptionError for a number that cannot be."""
        given = {name: value for name, value in changes.items() if value is not None}
        for name, value in given.items():
            if name in _LEAST and value < _LEAST[name]:
                raise OptionError(f"--{name} should be {_LEAST[name]} or more, it is {value}")
        if self.longest is not None and given.get("max_seq_length", 0) > self.longest:
            raise OptionError(
                f"--max_seq_length {given['max_seq_length']}: {self.folder} reads at most {self.longest} tokens at once"
            )
        return replace(self, facts=replace(self.facts, **given))


@dataclass(frozen=True)
class Opened:
    """A deployment and the engine that runs it; `notes` are sentences for the person."""

    deployment: Deployment
    engine: Engine
    notes: tuple[str, ...] = ()


def read_deployment(folder: str | Path) -> Deployment:
    """What is known of a deployment or model folder before its model is opened.

    Facts come from `deployment.json`, else from the training run that wrote the folder, else they are defaults: features of
    384 tokens or what the model reads, windows that overlap by 128 or a third of that. Raises ModelError for a folder that is none,
    and for a task that there is not.
    """
    path = Path(folder)
    config = _read_config(path)
    graph = model_file(path)
    if graph is None:
        _check_weights(path)
    stated = training_facts(path) | _read_facts(path / DEPLOYMENT_FILE)
    task = _task(path, stated, config)
    tokenizer = _read_tokenizer(path, config)
    limits = [tokenizer.model_max_length, _positions(config), stated.get("sequence_length")]
    longest = min((limit for limit in limits if limit is not None), default=None)
    default = _DEFAULT_LENGTH if task not in _WHOLE_LENGTH else _LONG if longest is None or longest > 10**9 else longest
    length = stated.get("max_seq_length", default)
    asked, length = length, length if longest is None else min(length, longest)
    facts: dict[str, Any] = {"doc_stride": min(_DEFAULT_STRIDE, length // 3)} | {
        name: value for name, value in stated.items() if name in Facts.__dataclass_fields__
    }
    if length < asked:  # an overlap that suits training's windows may leave no room in shorter ones
        facts["doc_stride"] = min(facts["doc_stride"], length // 3)
    facts["settings"] = {name: stated[name] for name in SETTINGS if name in stated}
    return Deployment(
        path,
        task,
        graph is not None,
        tokenizer,
        Facts(**{**facts, "max_seq_length": length}),
        longest,
        config.get("type_vocab_size", 2),
        _label_names(config),
        config.get("problem_type"),
    )


def task_of(folder: str | Path) -> str:
    """The task of a deployment or model folder; raises ModelError as `read_deployment` does."""
    path = Path(folder)
    config = _read_config(path)
    return _task(path, _read_facts(path / DEPLOYMENT_FILE), config)


def training_facts(folder: Path) -> dict[str, Any]:
    """How the training run that wrote `folder` read its data; empty where none left its record."""
    try:
        command = json.loads((folder / _RUN_FILE).read_text("utf-8"))["command"]
        names = (*_TRAINING_FACTS, *SETTINGS)
        return {name: command[name] for name in names if command.get(name) is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def open_deployment(folder: str | Path, engine: str | None = None, threads: int | None = None) -> Opened:
    """Read a folder and open its model: by `engine`, or by what is in it (ONNX Runtime for a graph, else torch).

    Raises ModelError for a folder that cannot be opened, OptionError for an engine that is unknown, not installed, or
    cannot run what the folder holds.
    """
    if engine is not None and engine not in (*ENGINES, TORCH):
        raise OptionError(f"--engine: there is no engine {engine!r}{suggestion(engine, [*ENGINES, TORCH])}")
    if threads is not None and threads < 1:
        raise OptionError(f"--threads should be 1 or more, it is {threads}")
    deployment = read_deployment(folder)
    name = engine or (next(iter(ENGINES)) if deployment.has_graph else TORCH)
    if name != TORCH:
        return Opened(deployment, open_engine(deployment.folder, name, threads=threads))
    _check_weights(deployment.folder, f"; leave --engine {TORCH} out to run its graph" if deployment.has_graph else "")
    return _open_torch(deployment, threads)


def _open_torch(deployment: Deployment, threads: int | None) -> Opened:
    import torch

    from sparse_accel.folders.libraries import quiet_libraries
    from sparse_accel.folders.trained import open_trained

    quiet_libraries()
    task = resolve_task(deployment.task)
    trained = open_trained(deployment.folder, task)
    if threads is not None:
        torch.set_num_threads(threads)
    # The tokenizer as training had it, should transformers make another of the files than they say.
    deployment = replace(deployment, tokenizer=trained.tokenizer)
    return Opened(deployment, TorchEngine(trained.model, task.output_keys), trained.notes)


# --- the files --------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise ModelError(f"{folder}: there is no such folder{neighbour(folder)}")
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: is a file; expected a deployment folder ({MODEL_FILES[0]}, config.json, tokenizer)"
        )
    path = folder / "config.json"
    if not path.is_file():
        inner = sorted(entry.parent for entry in folder.glob("*/config.json"))
        hint = f"; but {', '.join(map(str, inner[:3]))} has one" if inner else ""
        raise ModelError(f"{folder}: has no config.json, so it is neither a deployment nor a model folder{hint}")
    return _read_object(path)


def _check_weights(folder: Path, hint: str = "") -> None:
    """That a folder holds what torch opens."""
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        graph = "" if hint else f"neither {' nor '.join(MODEL_FILES)} (`sparse_accel export` makes one) and "
        raise ModelError(f"{folder}: holds {graph}no weights ({', '.join(WEIGHT_FILES)}){hint}")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: should be a JSON object")
    return content


def _read_facts(path: Path) -> dict[str, Any]:
    """What `deployment.json` states, checked; nothing where there is no such file. An entry of null is not stated."""
    if not path.is_file():
        return {}
    content = {name: value for name, value in _read_object(path).items() if value is not None}
    version = content.get(FORMAT_KEY, FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: is of format {version!r}, and this version of sparse_accel reads format {FORMAT_VERSION}"
        )
    for name, least in _LEAST.items():
        value = content.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelError(f"{path}: {name} should be a whole number of {least} or more, it is {value!r}")
    threshold = content.get("null_score_diff_threshold", 0.0)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ModelError(f"{path}: null_score_diff_threshold should be a number, it is {threshold!r}")
    if not isinstance(content.get("version_2_with_negative", False), bool):
        raise ModelError(f"{path}: version_2_with_negative should be true or false")
    return content


def _task(folder: Path, stated: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if "task" in stated:
        if stated["task"] not in TASKS:
            raise ModelError(
                f"{folder / DEPLOYMENT_FILE}: there is no task {stated['task']!r}; known: {', '.join(TASKS)}"
            )
        return str(stated["task"])
    names = config.get("architectures") or []
    found = [task for name in names for ending, task in _HEADS.items() if str(name).endswith(ending)]
    if not found:
        raise ModelError(
            f"{folder}: its config.json names {', '.join(map(str, names)) or 'no architecture'}, whose task is not one of "
            f"{', '.join(_HEADS.values())}"
        )
    return found[0]


def _label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a model's classes in their order; None where they are transformers' own stand-ins."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    found = tuple(str(names[key]) for key in sorted(names, key=int))
    return None if found == tuple(f"LABEL_{index}" for index in range(len(found))) else found


def _positions(config: Mapping[str, Any]) -> int | None:
    """The longest sequence that the model can read, as far as its config tells."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        return None
    shifted = config.get("model_type") in _SHIFTED_POSITIONS
    return positions - (config.get("pad_token_id") or 0) - 1 if shifted else positions


def _read_tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        # A vocabulary alone: only transformers knows what to make of it.
        from sparse_accel.folders.loading import HUB_DEFAULTS, load_tokenizer

        return load_tokenizer(str(folder), HUB_DEFAULTS, "MODEL")
    backend = _read_object(path)
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= _read_object(folder / name)
    ids = {token["content"]: token["id"] for token in backend.get("added_tokens") or []}

    def token_id(name: str) -> int | None:
        token = settings.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        found: int | None = ids.get(content, config.get(f"{name}_id"))
        return found

    return ServedTokenizer(
        backend=path.read_text("utf-8"),
        pad_token_id=token_id("pad_token"),
        cls_token_id=token_id("cls_token"),
        bos_token_id=token_id("bos_token"),
        mask_token_id=token_id("mask_token"),
        unk_token_id=token_id("unk_token"),
        pad_token_type_id=settings.get("pad_token_type_id", 0),
        padding_side=settings.get("padding_side", "right"),
        truncation_side=settings.get("truncation_side", "right"),
        # Where they are not named, an engine takes of all three what its model wants.
        model_input_names=tuple(settings.get("model_input_names", ("input_ids", "token_type_ids", "attention_mask"))),
        model_max_length=int(settings.get("model_max_length", 1e30)),
    )
