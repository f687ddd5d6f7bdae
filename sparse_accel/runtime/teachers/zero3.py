"""A teacher whose weights DeepSpeed (ZeRO-3, without an optimizer) spreads over all ranks."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_accel.runtime.teachers.placed import PlacedTeacher, freeze
from sparse_accel.runtime.teachers.units import largest_gather, units


def zero3(model: nn.Module, accelerator: Any, accepted: frozenset[str]) -> PlacedTeacher:
    """Each rank keeps a slice of every weight but the smallest; a call gathers module after module, about one unit ahead.

    The student may be trained in any way, by DeepSpeed or not. Raises ModelError for a model without a list of layers.
    """
    import deepspeed

    freeze(model)
    units(model)  # without any, ZeRO would have to hold the model whole too
    config = inference_config(largest_gather(model) // 4)
    deepspeed.init_distributed(verbose=False)
    # Parameter after parameter goes to the device and is cut up there; `initialize` alone would first move the whole model.
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    model.to(accelerator.device)  # the buffers
    engine, *_ = deepspeed.initialize(model=model, config=config)
    # Not the engine itself, whose forward switches our autocast off; but when it goes, so do the hooks that gather.
    return PlacedTeacher(engine.module, accelerator, accepted, spreader=engine)


def inference_config(num_gathered: int) -> dict[str, Any]:
    """DeepSpeed's config for a frozen model in fp32 of which `num_gathered` parameters may be whole at one time."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # demanded, and without a meaning here
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": num_gathered,
            "stage3_max_live_parameters": num_gathered,
            "stage3_max_reuse_distance": num_gathered,
            # Biases and norms stay: to gather them would cost more than they weigh.
            "stage3_param_persistence_threshold": min(10_000, num_gathered // 100),
            # On, it would put another `linear` into torch.nn.functional, and so into the student.
            "memory_efficient_linear": False,
        },
    }
