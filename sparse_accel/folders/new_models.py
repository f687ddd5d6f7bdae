"""Models that begin with random weights: an architecture, and what its config says otherwise."""

from __future__ import annotations

from typing import Any

from sparse_accel.errors import OptionError, suggestion


def new_config(model_type: str, overrides: str | None, task: Any, tokenizer: Any) -> Any:
    """The config of a new model for `task`, with the tokenizer's vocabulary and padding. `overrides` are values as
    `hidden_size=128,num_hidden_layers=2`. Raises OptionError for an architecture that cannot do the task, an unknown name and
    a value of another kind."""
    from transformers import CONFIG_MAPPING

    able = {config.model_type for config in task.model_class._model_mapping}
    if model_type not in able:
        exists = "" if model_type in CONFIG_MAPPING else "there is no such architecture"
        why = exists or f"has no model for {task.name.replace('_', ' ')}"
        raise OptionError(f"--model_type {model_type}: {why}{suggestion(model_type, sorted(able))}")
    config = CONFIG_MAPPING[model_type]()
    config.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(config, name):
            setattr(config, name, getattr(tokenizer, name))
    for pair in (overrides or "").split(","):
        if pair.strip():
            _override(config, pair.strip())
    if config.vocab_size < len(tokenizer):
        raise OptionError(
            f"--config_overrides: vocab_size {config.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens"
        )
    return config


def _override(config: Any, pair: str) -> None:
    from transformers.activations import ACT2FN

    name, found, value = (part.strip() for part in pair.partition("="))
    if not found:
        raise OptionError(f"--config_overrides: {pair!r} should be name=value, several with commas between")
    known = config.to_dict()
    if name not in known:
        raise OptionError(f"--config_overrides: a {config.model_type} config has no {name!r}{suggestion(name, known)}")
    if "act" in name and str(known[name]) in ACT2FN and value not in ACT2FN:
        raise OptionError(f"--config_overrides: {name}: there is no activation {value!r}{suggestion(value, ACT2FN)}")
    try:
        config.update_from_string(f"{name}={value}")
    except ValueError as error:
        kind = type(known[name]).__name__
        raise OptionError(
            f"--config_overrides: {name} is {known[name]!r} ({kind}) by default, got {value!r}"
        ) from error


def new_model(config: Any, task: Any) -> Any:
    """A model with random weights, drawn from torch's generator. Raises OptionError for a config that makes none."""
    try:
        return task.model_class.from_config(config).float()
    except Exception as error:  # a config whose numbers do not go together raises whatever its model does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(f"--config_overrides: no {config.model_type} model can be made so: {reason}") from error
