"""The program on a machine without GPUs, with FSDP2 or DeepSpeed: its processes, joined by gloo, stand for GPUs. With
ACCELERATE_USE_CPU they are what they are, which DDP is content with.

    accelerate launch --config_file launch_configs/fsdp2.yaml tests/distributed/on_cpu.py train question_answering ...

accelerate takes a group for one of GPUs only where it finds some; everything behind that choice is the real thing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}

from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402


def stand_for_gpus() -> None:
    """Let accelerate present this process's group as one of GPUs, and DeepSpeed do without an op that it would compile."""

    def gloo(self: PartialState, *args: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_CPU") != "1":
        stand_for_gpus()
    if sys.argv[1:2] == ["cases"]:
        from tests.distributed.cases import run_cases

        sys.exit(run_cases(Path(sys.argv[2])))
    from sparse_accel.cli import main

    sys.exit(main())
