"""What must hold all through a training, checked every now and then and at its end; a violation stops the run.

Every rank calls these together, so that all of them stop.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor, nn

from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import compressed_layers
from sparse_accel.compress.plan import check_masks
from sparse_accel.compress.ranges import quantizers
from sparse_accel.errors import InvariantError
from sparse_accel.runtime.training import NOT_FINITE, TrainState
from sparse_accel.session import Session


def require_promises(session: Session, state: TrainState) -> None:
    """Everything: a finite loss, zeros under the masks, masks and ranges that are the same on all ranks."""
    require_finite(session, state)
    require_zeros(session)
    require_agreement(session)


def require_zeros(session: Session) -> None:
    """Raise InvariantError when a pruned weight is no longer zero; looks at whole weights."""
    weights = session.backend.whole_parameters(session.module) if session.backend.shards_weights else None
    revived = {name: count for name, count in check_masks(session.module, weights).items() if count}
    if revived:
        name, count = next(iter(revived.items()))
        raise InvariantError(
            f"{count} pruned weights of {name} are no longer zero ({len(revived)} layers in all, rank "
            f"{session.accelerator.process_index}); this must not happen: please report it"
        )


def require_agreement(session: Session) -> None:
    """Raise InvariantError when a mask or a range differs between ranks."""
    if session.accelerator.num_processes == 1:
        return
    gathered: list[dict[str, int]] = [{}] * session.accelerator.num_processes
    torch.distributed.all_gather_object(gathered, checksums(session.module))
    for rank, theirs in enumerate(gathered):
        differing = [name for name, checksum in gathered[0].items() if theirs.get(name) != checksum]
        if differing:
            raise InvariantError(
                f"{differing[0]} is another on rank {rank} than on rank 0 ({len(differing)} masks and ranges differ); this must "
                "not happen: please report it"
            )


def require_finite(session: Session, state: TrainState) -> None:
    """Raise InvariantError when a loss since the start was not finite: what it led to must not take a checkpoint's place."""
    if state.total_loss is None:
        return
    own = state.total_loss.detach().double().reshape(1)
    losses = [own]
    if session.accelerator.num_processes > 1:
        losses = [torch.zeros_like(own) for _ in range(session.accelerator.num_processes)]
        torch.distributed.all_gather(losses, own)
    ranks = [rank for rank, loss in enumerate(torch.cat(losses).tolist()) if not math.isfinite(loss)]
    if ranks:
        where = f" (rank {', '.join(map(str, ranks))})" if len(losses) > 1 else ""
        raise InvariantError(NOT_FINITE.format(step=state.clock.step, epoch=state.clock.epoch) + where)


def checksums(module: nn.Module) -> dict[str, int]:
    """A checksum of each mask, by layer, and of each quantizer's range; reads the device."""
    found = {}
    for name, layer in compressed_layers(module).items():
        mask = layer.positions if isinstance(layer, CompactLinear) else layer.mask
        if mask is not None:
            found[f"the mask of {name}"] = _checksum(mask)
    return found | {
        f"the range of {name}": _checksum(*(buffer for _, buffer in quantizer.named_buffers(recurse=False)))
        for name, quantizer in quantizers(module).items()
    }


def _checksum(*tensors: Tensor) -> int:
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), value)
    return value
