"""Quantizers that follow the range of one tensor, once per optimizer step and equally on all ranks.

Activation quantizers collect what a step's micro-batches show them and move their range once, at `end_step`, over all
ranks; within the step they use the scale known at its start. So the ranges do not depend on how a batch is split. A
weight is the same for every micro-batch and rank: its range moves in the first forward of a step and is used at once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparse_accel.compress.fakequant import QuantSpec, fake_quantize, kernel_for, round_to_grid, scale_and_zero_point
from sparse_accel.compress.kept_weights import KeptWeight, versions
from sparse_accel.compress.kernels.rows import RowExtremes, rounded, row_extremes
from sparse_accel.compress.kernels.straight_through import Rounded, straight_through
from sparse_accel.errors import ModelError
from sparse_accel.packing import BOUNDS

ReduceMax = Callable[[Tensor], Tensor]


class Phase(Enum):
    """What quantizers do: nothing; fake-quantize and follow the range; fake-quantize with the range as it is."""

    OFF = "off"
    OBSERVE = "observe"
    FROZEN = "frozen"


class ObservationContext:
    """What the quantizers of one model share: the optimizer step, and which tokens of the micro-batch are real.

    It is itself the forward pre-hook of the root model, so that a deep copy of the model copies hook and quantizers
    with one context. The tokens stay after the forward: activation recomputation needs them during backward.
    """

    def __init__(self, observe_padding: bool = False) -> None:
        self.observe_padding = observe_padding
        # False for a micro-batch that only keeps a rank in step with the others: its features count for nothing.
        self.counts = True
        self.step = 0
        self.tokens: Tensor | None = None
        # Whether layers may keep the form of their weight from a step's first micro-batch to its last. Only for whom
        # weights are whole outside forward, and change at the end of the step alone.
        self.keeps_weights = False
        self.kept_weights: dict[nn.Module, KeptWeight] = {}

        self._met: _Met | None = None

    def meet(self, x: Tensor) -> _Met:
        """What is known of the activation `x`, which several quantizers may be given one after the other."""
        met, version = self._met, None if x.is_inference() else x._version
        if met is None or version is None or met.version != version or met.tensor() is not x:
            met = self._met = _Met(weakref.ref(x), version, row_extremes(x))
        return met

    def forget(self) -> None:
        """Let go of all tensors that are held for a forward or a step."""
        self._met = None
        self.kept_weights.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model finds out for itself.
        return {**self.__dict__, "_met": None, "kept_weights": {}}

    def keeps_weight_of(self, layer: nn.Module) -> bool:
        """Whether the form of this layer's weight is to be kept in this forward."""
        return self.keeps_weights and layer.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if BOUNDS in kwargs:
            self.tokens = None  # a packed batch has no padding
            return
        mask = None if self.observe_padding else kwargs.get("attention_mask")
        self.tokens = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@dataclass
class _Met:
    """An activation that a quantizer was given last: the extremes of its rows (None where there is no form for it), and
    the last grid that it was put on on a CPU, with the result."""

    tensor: weakref.ref[Tensor]
    version: int | None
    extremes: RowExtremes | None
    grid: tuple[float, ...] | None = None
    rounded: Rounded | None = None


class Quantizer(nn.Module):
    """One tensor's range and grid: fp32 buffers min_val, max_val, scale and the int32 zero_point, all persistent.

    Shapes are () or [channels]. An empty range is (inf, -inf) with scale 1. `phase` says what forward does.
    """

    min_val: Tensor
    max_val: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, spec: QuantSpec, context: ObservationContext, channels: int | None = None, device: Any = None
    ) -> None:
        super().__init__()
        structure_changed()
        shape = () if channels is None else (channels,)
        self.spec = spec
        self.context = context
        self.phase = Phase.OFF
        self.calibrating = False
        low, high = (torch.inf, -torch.inf) if spec.fixed_range is None else spec.fixed_range
        self.register_buffer("min_val", torch.full(shape, low, dtype=torch.float32, device=device))
        self.register_buffer("max_val", torch.full(shape, high, dtype=torch.float32, device=device))
        scale, zero_point = scale_and_zero_point(self.min_val, self.max_val, spec)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    @property
    def is_idle(self) -> bool:
        """Whether forward hands its tensor on untouched and unseen."""
        return self.phase is Phase.OFF and not self.calibrating

    def fake_quantize(self, x: Tensor, extremes: RowExtremes | None = None) -> Tensor:
        """`x` on the present grid, whatever the phase."""
        return fake_quantize(x, self.scale, self.zero_point, self.spec, extremes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # model.half() or .bfloat16() must move ranges, not round them.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def extra_repr(self) -> str:
        sign = "int" if self.spec.signed else "uint"
        return f"{sign}{self.spec.bits}, {'symmetric' if self.spec.symmetric else 'affine'}, {self.phase.value}"


class WeightQuantizer(Quantizer):
    """Follows a weight: observes it in the first training forward of each step, and once when calibrating."""

    observed_step: int | None = None

    def observe(self, weight: Tensor, *, and_zeros: bool = False) -> None:
        """Let the range see the whole `weight`, if this forward is one that observes; `and_zeros` for one that is the
        given entries and zeros."""
        due = self.calibrating or (self.training and self.phase is Phase.OBSERVE)
        if not due or self.observed_step == self.context.step:
            return
        self.observed_step = self.context.step
        with torch.no_grad():
            if self.spec.channel_axis is None:
                low, high = torch.aminmax(weight.detach())
                if and_zeros:
                    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
            else:
                others = [dim for dim in range(weight.dim()) if dim != self.spec.channel_axis]
                low, high = weight.detach().amin(others), weight.detach().amax(others)
            # A frozen range that was never set takes what calibration shows; one that was set stays.
            constant = 0.0 if self.phase is Phase.FROZEN else self.spec.averaging_constant
            low, high = moved_range(self.min_val, self.max_val, low.float(), high.float(), constant)
            scale, zero_point = scale_and_zero_point(low, high, self.spec)
            for buffer, value in (
                (self.min_val, low),
                (self.max_val, high),
                (self.scale, scale),
                (self.zero_point, zero_point),
            ):
                buffer.copy_(value)

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` on its grid (observed before, when due)."""
        self.observe(weight)
        return self.quantize(weight)

    def quantize(self, part: Tensor) -> Tensor:
        """A part of the weight on the grid of the whole, which was observed before; float when off or calibrating."""
        return part if self.phase is Phase.OFF or self.calibrating else self.fake_quantize(part)

    def rounded(self, part: Tensor) -> Rounded:
        """The value of `quantize`, without a graph, and where its gradient passes."""
        if self.phase is Phase.OFF or self.calibrating:
            return Rounded(part, None)
        return round_to_grid(part, self.scale, self.zero_point, self.spec)

    def facts(self) -> Hashable:
        """What `rounded` depends on besides the weight, without looking at numbers."""
        return self.phase, self.calibrating, versions(self.scale, self.zero_point)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.observed_step = None


class ActivationQuantizer(Quantizer):
    """Follows an activation over the micro-batches of a step; the range moves in `end_step`."""

    pending: tuple[Tensor, Tensor] | None = None
    # Set on the host once the buffers are known to hold a range, so that asking costs no device sync in every step.
    has_range: bool = False

    def forward(self, x: Tensor, token_dims: tuple[int, ...] = (1,)) -> Tensor:
        """`x` on the present grid; `token_dims` are the dims of x that run over tokens (dim 0 runs over the batch)."""
        if self.is_idle:
            return x
        kernel = None if self.calibrating else kernel_for(x)
        if kernel is not None:
            return self._by_kernel(kernel, x, token_dims)
        met = self.context.meet(x)
        if self.observes:
            self._collect(x.detach(), token_dims, met.extremes)
        if self.calibrating:
            return x
        if met.extremes is None:
            return self.fake_quantize(x)
        # Query, key and value are made of one tensor, whose ranges move together.
        grid = (self.scale.item(), self.zero_point.item(), self.spec.quant_min, self.spec.quant_max)
        if met.grid != grid:
            limits = (self.spec.quant_min, self.spec.quant_max)
            met.grid, met.rounded = grid, rounded(x, self.scale, self.zero_point, *limits, met.extremes)
        assert met.rounded is not None
        return straight_through(x, met.rounded)

    def _by_kernel(self, kernel: Any, x: Tensor, token_dims: tuple[int, ...]) -> Tensor:
        """Fake-quantize and observe in one pass."""
        if x.shape[:1] != (1,) and x.dim() > 1 and x.stride(0) * x.shape[0] != x.numel():
            x = x.contiguous()  # the kernel counts through features that follow each other in memory
        observed = None
        if self.observes and self.context.counts:
            tokens = None if self.context.observe_padding else self.context.tokens
            observed = kernel.Observed(*observed_entries(x, tokens, token_dims))
        value, low, high = kernel.fake_quantize_and_observe(
            x, self.scale, self.zero_point, self.spec.quant_min, self.spec.quant_max, observed
        )
        if observed is not None:
            self._widen(low, high)
        return value  # type: ignore[no-any-return]

    @property
    def observes(self) -> bool:
        """Whether a forward lets the range see its tensor."""
        wants = self.calibrating or (self.training and self.phase is Phase.OBSERVE)
        return wants and self.spec.fixed_range is None

    @torch.no_grad()
    def see_rows(self, extremes: RowExtremes) -> None:
        """Let the range see a tensor without padding, whose rows have these `extremes`, if this forward observes."""
        if self.observes and self.context.counts:
            self._widen(extremes.low.amin(), extremes.high.amax())

    @torch.no_grad()
    def _collect(self, x: Tensor, token_dims: tuple[int, ...], extremes: RowExtremes | None) -> None:
        if not self.context.counts:
            return
        tokens = None if self.context.observe_padding else self.context.tokens
        self._widen(*observed_range(x, tokens, token_dims, extremes))

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if self.pending is not None:
            low, high = torch.minimum(low, self.pending[0]), torch.maximum(high, self.pending[1])
        self.pending = (low, high)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.pending = None
        self.has_range = False


def observed_range(
    x: Tensor, tokens: Tensor | None, token_dims: Sequence[int], extremes: RowExtremes | None = None
) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of `x` (fp32, shape ()) over the entries whose every token is real.

    `tokens` is bool [batch, length] or None for all. Dim 0 of x is the batch (of size 1 where all its rows share x, as
    for position embeddings: then a position counts if it is real in any row). A tensor that the tokens do not fit is
    observed whole. Returns (inf, -inf) when no token is real. `extremes` are those of x, where they are known.
    """
    if tokens is None or not _fits(x, tokens, token_dims):
        low, high = torch.aminmax(x) if extremes is None else (extremes.low.amin(), extremes.high.amax())
        return low.float(), high.float()
    if x.shape[0] == 1:
        tokens = tokens.any(0, keepdim=True)
    # Feature dims first: what is left to mask has one value per token, or per pair of tokens. Not aminmax: along a dim
    # it is ten times slower on CPU than amin and amax together.
    features = [dim for dim in range(1, x.dim()) if dim not in token_dims]
    if extremes is not None and _is_one_row_per_token(x, extremes, token_dims):
        low, high = extremes.low.view(tokens.shape), extremes.high.view(tokens.shape)
    else:
        low, high = x.amin(features), x.amax(features)
    real = tokens
    if len(token_dims) == 2:
        real = tokens.unsqueeze(2) & tokens.unsqueeze(1)
    return low.float().masked_fill(~real, torch.inf).amin(), high.float().masked_fill(~real, -torch.inf).amax()


def observed_entries(
    x: Tensor, tokens: Tensor | None, token_dims: Sequence[int]
) -> tuple[Tensor | None, int, int, int, int]:
    """`observed_range` said for a kernel that counts through the memory of a dense `x`: the fields of
    `kernels.triton_grid.Observed`."""
    if tokens is None or not _fits(x, tokens, token_dims):
        return None, 1, 1, 1, 1
    batch = x.numel() if x.shape[0] == 1 else x.stride(0)
    if batch * x.shape[0] != x.numel():
        raise ValueError(f"features follow each other in memory; got strides {x.stride()} for {tuple(x.shape)}")
    if x.shape[0] == 1:
        tokens = tokens.any(0, keepdim=True)
    return tokens.contiguous(), batch, tokens.shape[1], x.stride(token_dims[0]), x.stride(token_dims[-1])


def _fits(x: Tensor, tokens: Tensor, token_dims: Sequence[int]) -> bool:
    batch, length = tokens.shape
    return (
        x.dim() > max(*token_dims, len(token_dims) + 1)
        and x.shape[0] in (1, batch)
        and all(x.shape[dim] == length for dim in token_dims)
    )


def _is_one_row_per_token(x: Tensor, extremes: RowExtremes, token_dims: Sequence[int]) -> bool:
    """Whether the rows are the tokens of one feature after the other."""
    leading = (0, token_dims[0])
    return (
        len(token_dims) == 1
        and extremes.order[:2] == leading
        and extremes.low.numel() == x.shape[0] * x.shape[token_dims[0]]
    )


def moved_range(min_val: Tensor, max_val: Tensor, low: Tensor, high: Tensor, constant: float) -> tuple[Tensor, Tensor]:
    """The moving average after one observation, elementwise: the first initialises, then old + constant * (new - old).

    An observation that is empty or not finite (an overflow) changes nothing.
    """
    seen = torch.isfinite(low) & torch.isfinite(high)
    first = min_val > max_val
    new_min = torch.where(first, low, min_val + constant * (low - min_val))
    new_max = torch.where(first, high, max_val + constant * (high - max_val))
    return torch.where(seen, new_min, min_val), torch.where(seen, new_max, max_val)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of the model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Say what all quantizers of the model do from now on."""
    for quantizer in _parts(model).quantizers:
        if quantizer.phase is not phase:
            quantizer.phase = phase


def begin_step(model: nn.Module, step: int) -> None:
    """Tell the quantizers which optimizer step begins: weights are observed once in it."""
    for context in _parts(model).contexts:
        context.step = step


def observe_tokens(model: nn.Module, counts: bool) -> None:
    """Say whether the micro-batch that follows takes part in activation ranges."""
    for context in _parts(model).contexts:
        context.counts = counts


def keep_weights(model: nn.Module, keeps: bool) -> None:
    """Say whether layers may keep what they compute with from a step's first micro-batch to its last.

    For backends that have each weight whole outside forward, and change it only between `end_step` and the first forward
    after the next `begin_step`.
    """
    for context in _parts(model).contexts:
        context.keeps_weights = keeps
        context.kept_weights.clear()


def end_step(model: nn.Module, reduce_max: ReduceMax) -> None:
    """After the optimizer stepped (or after a calibration batch): move every observing range once, over all ranks.

    `reduce_max` takes one fp32 vector and gives its elementwise maximum over ranks; it is called once, with the same
    length on every rank, or not at all when nothing observes.
    """
    for context in _parts(model).contexts:
        context.forget()
    observing = [q for q in _activations(model) if q.calibrating or q.phase is Phase.OBSERVE]
    for group, lows, highs in _collected(observing, reduce_max):
        spec = group[0].spec
        old_min, old_max = torch.stack([q.min_val for q in group]), torch.stack([q.max_val for q in group])
        _store(group, *moved_range(old_min, old_max, lows, highs, spec.averaging_constant))


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Quantizers observe float tensors and hand them on unquantized, also in eval mode.

    For the first scales of a QAT run: run the step's micro-batches without gradient, then `end_calibration`. For
    one-shot quantization: after each batch, inside the context, `end_step`, which moves the ranges and keeps them.
    """
    held = list(quantizers(model).values())
    for quantizer in held:
        quantizer.calibrating = True
    try:
        yield
    finally:
        for quantizer in held:
            quantizer.calibrating = False


def end_calibration(model: nn.Module, reduce_max: ReduceMax) -> None:
    """Give activation quantizers without a range their first scale, from what they saw while calibrating.

    Where the range goes on being observed it stays empty, so that the step's own observation initialises the moving
    average as SparseML's first one does; a frozen quantizer keeps the range. Quantizers that have a range are left
    alone.
    """
    activations = _activations(model)
    for group, lows, highs in _collected(activations, reduce_max):
        old_min, old_max = torch.stack([q.min_val for q in group]), torch.stack([q.max_val for q in group])
        first_min, first_max = moved_range(old_min, old_max, lows, highs, 0.0)
        if group[0].phase is Phase.FROZEN:
            _store(group, first_min, first_max)
        else:
            _store_scale(group, first_min, first_max)
    for quantizer in activations:
        quantizer.has_range = True


def needs_first_range(model: nn.Module) -> bool:
    """Whether an active activation quantizer has no scale yet: before the first QAT step. Reads the device only until
    the answer is no; the same on every rank."""
    waiting = [q for q in _activations(model) if q.phase is not Phase.OFF and not q.has_range]
    if not waiting:
        return False
    if bool(torch.stack([q.min_val > q.max_val for q in waiting]).any()):
        return True
    for quantizer in waiting:
        quantizer.has_range = True
    return False


def without_range(model: nn.Module) -> list[str]:
    """Names of the quantizers that never saw a tensor: after a step of QAT, modules that are not used. Reads the
    device."""
    held = quantizers(model)
    if not held:
        return []
    empty = torch.stack([(q.min_val > q.max_val).any() for q in held.values()]).tolist()
    return [name for name, is_empty in zip(held, empty, strict=True) if is_empty]


def quantization_state(model: nn.Module) -> dict[str, Tensor]:
    """Every quantizer's numbers for a file: `<quantizer name>.{min_val,max_val,scale,zero_point}`, on the CPU."""
    return {
        f"{name}.{key}": buffer.detach().cpu().clone()
        for name, quantizer in quantizers(model).items()
        for key, buffer in quantizer.named_buffers(recurse=False)
    }


def load_quantization_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the numbers of `quantization_state` back. Raises ModelError for one that `state` lacks."""
    for name, quantizer in quantizers(model).items():
        keys = [key for key, _ in quantizer.named_buffers(recurse=False)]
        missing = [f"{name}.{key}" for key in keys if f"{name}.{key}" not in state]
        if missing:
            raise ModelError(f"the quantization file has no {missing[0]!r}: it belongs to another model or plan")
        quantizer.load_state_dict({key: state[f"{name}.{key}"] for key in keys})


class _Parts(NamedTuple):
    """What the functions of each step need of a model: found once, since walking all modules takes milliseconds."""

    quantizers: tuple[Quantizer, ...]
    # One, but for a model that was put together from installed parts.
    contexts: tuple[ObservationContext, ...]


_known_parts: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def structure_changed() -> None:
    """Say that a model may have gained or lost quantizers."""
    _known_parts.clear()


def _parts(model: nn.Module) -> _Parts:
    parts = _known_parts.get(model)
    if parts is None:
        contexts = {
            id(context): context
            for module in model.modules()
            if isinstance(context := getattr(module, "context", None), ObservationContext)
        }
        parts = _Parts(tuple(quantizers(model).values()), tuple(contexts.values()))
        if not isinstance(model, Quantizer):  # which the entry would keep alive itself
            _known_parts[model] = parts
    return parts


def _activations(model: nn.Module) -> list[ActivationQuantizer]:
    return [q for q in _parts(model).quantizers if isinstance(q, ActivationQuantizer)]


def _collected(
    observing: list[ActivationQuantizer], reduce_max: ReduceMax
) -> Iterator[tuple[list[ActivationQuantizer], Tensor, Tensor]]:
    """What `observing` saw since the last time, over all ranks: groups of equal spec and phase, lows and highs [group].

    The groups keep 200 quantizers at a handful of kernels. A quantizer that saw nothing sends -inf twice.
    """
    if not observing:
        return
    groups: defaultdict[tuple[QuantSpec, Phase], list[ActivationQuantizer]] = defaultdict(list)
    for quantizer in observing:
        groups[quantizer.spec, quantizer.phase].append(quantizer)
    nothing = torch.full((), torch.inf, device=observing[0].min_val.device)
    pending = [quantizer.pending or (nothing, -nothing) for group in groups.values() for quantizer in group]
    lows, highs = torch.stack([low for low, _ in pending]), torch.stack([high for _, high in pending])
    packed = reduce_max(torch.cat([-lows, highs]))
    sizes = [len(group) for group in groups.values()]
    lows, highs = -packed[: len(pending)], packed[len(pending) :]
    for group, low, high in zip(groups.values(), torch.split(lows, sizes), torch.split(highs, sizes), strict=True):
        for quantizer in group:
            quantizer.pending = None
        yield group, low, high


def _store(group: list[ActivationQuantizer], min_val: Tensor, max_val: Tensor) -> None:
    torch._foreach_copy_([q.min_val for q in group], list(min_val.unbind()))
    torch._foreach_copy_([q.max_val for q in group], list(max_val.unbind()))
    _store_scale(group, min_val, max_val)


def _store_scale(group: list[ActivationQuantizer], min_val: Tensor, max_val: Tensor) -> None:
    scale, zero_point = scale_and_zero_point(min_val, max_val, group[0].spec)
    torch._foreach_copy_([q.scale for q in group], list(scale.unbind()))
    torch._foreach_copy_([q.zero_point for q in group], list(zero_point.unbind()))
