"""Loading while a backend is alive that would have weights arrive empty."""

from __future__ import annotations

import os

import pytest

from sparse_accel.folders.whole_weights import whole_weights


class Zero3Config:
    """What transformers looks at while a ZeRO-3 run is alive."""

    def is_zero3(self) -> bool:
        return True


def test_what_leaves_weights_empty_is_off_inside_and_on_again_after(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import deepspeed

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    config = Zero3Config()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    deepspeed.set_hf_deepspeed_config(config)
    with pytest.raises(RuntimeError), whole_weights():
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        assert not deepspeed.is_deepspeed_zero3_enabled()
        raise RuntimeError
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_nothing_is_left_behind_where_nothing_was_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    with whole_weights():
        pass
    assert "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
