"""Models and tokenizers from folders or the hub, with errors that say what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from sparse_accel.errors import ModelError
from sparse_accel.folders.sources import check_source

_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


class HubOptions(Protocol):
    """How the hub is asked, where a name is not a folder; Hugging Face's own options."""

    @property
    def cache_dir(self) -> str | None: ...
    @property
    def model_revision(self) -> str: ...
    @property
    def use_auth_token(self) -> bool: ...


@dataclass(frozen=True)
class HubDefaults:
    """What the hub is asked with when nobody says otherwise."""

    cache_dir: str | None = None
    model_revision: str = "main"
    use_auth_token: bool = False


HUB_DEFAULTS: Final = HubDefaults()


def has_tokenizer(name: str) -> bool:
    """Whether a local folder brings a tokenizer; a hub id is taken to."""
    path = Path(name).expanduser()
    return not path.is_dir() or any((path / file).is_file() for file in _TOKENIZER_FILES)


def load_tokenizer(name: str, options: HubOptions, what: str) -> Any:
    """A fast tokenizer. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    if not has_tokenizer(name):
        raise ModelError(
            f"{what} {name}: the folder has no tokenizer ({' or '.join(_TOKENIZER_FILES[:3])}); pass --tokenizer_name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **_hub(options))
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelError(f"{what} {name}: the tokenizer cannot be read: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{what} {name}: a fast tokenizer is needed (tokenizer.json); {type(tokenizer).__name__} is a slow one"
        )
    return tokenizer


def load_config(name: str, options: HubOptions, what: str) -> Any:
    """The config of a model folder or hub id. Raises ModelError when there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **_hub(options))
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelError(f"{what} {name} cannot be loaded: {_first_line(error)}") from error


def label_names(config: Any) -> list[str] | None:
    """What a model's config calls its labels, in their order; None where the names are transformers' own stand-ins."""
    names = getattr(config, "id2label", None) or {}
    found = [str(names[index]) for index in sorted(names)]
    return None if not found or found == [f"LABEL_{index}" for index in range(len(found))] else found


def load_model(
    name: str,
    task: Any,
    options: HubOptions,
    what: str,
    *,
    config_name: str | None = None,
    head: Mapping[str, Any] | None = None,
) -> tuple[Any, list[str]]:
    """The model with the task's head in fp32, and the names of the head's parameters that the folder did not have.

    `head` is what the config must say of the head: a head in the folder that has another shape counts as absent. Raises
    ModelError when the folder is unreadable or its weights are not those of the architecture.
    """
    from transformers import AutoConfig

    from sparse_accel.folders.storage import is_compressed, read_compressed  # which builds on this module

    compressed = is_compressed(name)
    if not compressed:
        check_source(name, what, weights=True)
        _refuse_pointers(name, what)
    # Compressed weights are unpacked in memory; transformers then gets them as it gets those that it reads itself.
    state = read_compressed(name) if compressed else None
    source, hub = (None, {"state_dict": state}) if compressed else (name, _hub(options))
    try:
        config = AutoConfig.from_pretrained(config_name or name, **_hub(options))
        for key, value in (head or {}).items():
            setattr(config, key, value)
        model, info = task.model_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(head),
            **hub,
        )
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelError(f"{what} {name} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    prefix = model.base_model_prefix + "."
    # A pooler is trained with the head that reads it: models for masked words or answers have none.
    torn = [key for key in missing if key.startswith(prefix) and ".pooler." not in key]
    if torn:
        raise ModelError(
            f"{what} {name}: {len(torn)} weights of {type(model).__name__} are not in the folder ({', '.join(torn[:3])} ...); "
            "is it a model of another architecture?"
        )
    mismatched = sorted(info.get("mismatched_keys") or [])
    of_head = {str(entry[0]) for entry in mismatched if not str(entry[0]).startswith(prefix)} if head else set()
    if len(of_head) < len(mismatched):
        raise ModelError(f"{what} {name}: weights of another shape than config.json says: {mismatched[:3]}")
    return model, sorted({*missing, *of_head})


def _refuse_pointers(name: str, what: str) -> None:
    """A checkout without git-lfs holds small text files in place of the weights."""
    for file in Path(name).expanduser().glob("*.*"):
        if file.suffix in (".safetensors", ".bin") and file.stat().st_size < 1024:
            if file.read_bytes().startswith(b"version https://git-lfs"):
                raise ModelError(
                    f"{what} {name}: {file.name} is a git-lfs pointer, not the weights; run `git lfs pull` there"
                )


def _hub(options: HubOptions) -> dict[str, Any]:
    return {
        "cache_dir": options.cache_dir,
        "revision": options.model_revision,
        "token": True if options.use_auth_token else None,
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
