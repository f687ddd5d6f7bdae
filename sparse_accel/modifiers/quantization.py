"""Quantization-aware training: which tensors are fake-quantized from when on, in SparseML's two spellings.

The legacy spelling names submodules and flags (`submodules`, `quantize_embeddings`, ...), the current one a scheme
(`scheme`, `ignore`, ...). `legacy_compressions` and `scheme_compressions` translate each into specs, module by module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictInt,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sparse_accel.compress.attention import MATMULS, self_attention_modules
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.plan import Compression, CompressionPlan
from sparse_accel.compress.ranges import Phase, set_phase
from sparse_accel.errors import RecipeError, TargetError, suggestion
from sparse_accel.modifiers.base import Epoch, Modifier
from sparse_accel.session import Session
from sparse_accel.targets import is_pattern, match_modules, pattern_problem
from sparse_accel.timeline import Clock

_log = logging.getLogger(__name__)

# What SparseML calls the wrapper around an attention product; users name it in exclude_module_types and ignore.
_PRODUCT_TYPE = "QATMatMul"

# The one observer setting that means the same here: how fast a range moves.
_OBSERVER_SETTINGS = ("averaging_constant",)


def _as_flag(value: Any) -> Any:
    """Numbers and words that mean yes or no, as recipe arguments give them; ints stay ints, so that they print as
    such."""
    if isinstance(value, float) and value in (0.0, 1.0):
        return int(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return value


Flag = Annotated[StrictBool | Annotated[StrictInt, Field(ge=0, le=1)], BeforeValidator(_as_flag)]
Bits = Annotated[int, Field(ge=2, le=8)]


def _check_observer_settings(settings: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    for name in settings or {}:
        if name not in _OBSERVER_SETTINGS:
            raise ValueError(f"observer setting {name!r} is not offered; only averaging_constant is")
    constant = (settings or {}).get("averaging_constant", 1)
    if isinstance(constant, bool) or not isinstance(constant, int | float) or not 0 < constant <= 1:
        raise ValueError(f"averaging_constant is a number above 0 and at most 1; got {constant!r}")
    return settings


class QuantizationArgs(BaseModel):
    """How one tensor of a scheme is quantized: SparseML's QuantizationArgs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bits: Bits = 8
    symmetric: bool = False
    strategy: Literal["tensor", "channel"] = "tensor"
    kwargs: dict[str, Any] = Field(default_factory=dict)

    _observer_settings = field_validator("kwargs")(_check_observer_settings)

    def spec(self, *, symmetric: bool | None = None) -> QuantSpec:
        """The grid; schemes are signed throughout. A scale per channel has one per output row."""
        return QuantSpec(
            bits=self.num_bits,
            symmetric=self.symmetric if symmetric is None else symmetric,
            signed=True,
            channel_axis=0 if self.strategy == "channel" else None,
            **self.kwargs,
        )


class QuantizationScheme(BaseModel):
    """What is quantized of a module: SparseML's QuantizationScheme. None leaves a tensor float."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_activations: QuantizationArgs | None = QuantizationArgs()
    weights: QuantizationArgs | None = QuantizationArgs(symmetric=True)
    output_activations: QuantizationArgs | None = None

    @model_validator(mode="after")
    def _activations_have_one_scale(self) -> Self:
        for name in ("input_activations", "output_activations"):
            args = getattr(self, name)
            if args is not None and args.strategy == "channel":
                raise ValueError(f"{name}: strategy must be tensor; integer kernels have one scale for an activation")
        return self


_DEFAULT_SCHEME = QuantizationScheme()
NAMED_SCHEMES: dict[str, QuantizationScheme] = {
    "default": _DEFAULT_SCHEME,
    "deepsparse": _DEFAULT_SCHEME,
    "tensorrt": QuantizationScheme(input_activations=QuantizationArgs(symmetric=True)),
}


def _known_scheme(value: Any) -> Any:
    if isinstance(value, str) and value not in NAMED_SCHEMES:
        raise ValueError(f"there is no scheme {value!r}{suggestion(value, NAMED_SCHEMES)}; a mapping is a scheme too")
    return value


Scheme = Annotated[str | QuantizationScheme | None, BeforeValidator(_known_scheme)]

_LEGACY_FIELDS = (
    "submodules",
    "quantize_embeddings",
    "quantize_embedding_activations",
    "quantize_linear_activations",
    "quantize_conv_activations",
    "activation_bits",
    "weight_bits",
    "tensorrt",
    "reduce_range",
    "exclude_batchnorm",
    "exclude_module_types",
    "custom_quantizable_module_types",
    "activation_qconfig_kwargs",
    "weight_qconfig_kwargs",
)
_SCHEME_FIELDS = ("scheme", "scheme_overrides", "ignore", "strict")


@final
class QuantizationModifier(Modifier):
    """Fake-quantizes weights and activations from `start_epoch` to the end, following their ranges until
    `disable_quantization_observer_epoch`, from where on scales are fixed (those of the head too).

    A recipe uses the legacy fields or the scheme's, not both; which of them decides the meaning, as in SparseML.
    """

    idle_fields: ClassVar = {
        "model_fuse_fn_name": "there are no convolutions to fuse with batch norms",
        "quantize_conv_activations": "convolutions are not quantized",
        "exclude_batchnorm": "batch norms are never quantized",
        "num_calibration_steps": "in training, ranges follow the training batches; it counts with --one_shot only",
    }

    # Both spellings.
    disable_quantization_observer_epoch: Epoch = None
    freeze_bn_stats_epoch: Epoch = None
    num_calibration_steps: int | None = Field(None, ge=1)
    model_fuse_fn_name: str | None = None
    model_fuse_fn_kwargs: dict[str, Any] = Field(default_factory=dict)

    # Legacy.
    submodules: tuple[str, ...] | None = None
    quantize_embeddings: Flag = True
    quantize_embedding_activations: Flag = True
    quantize_linear_activations: Flag = True
    quantize_conv_activations: Flag = True
    activation_bits: Bits = 8
    weight_bits: Bits = 8
    tensorrt: Flag = False
    reduce_range: Flag = False
    exclude_batchnorm: Flag = True
    exclude_module_types: tuple[str, ...] | None = None
    custom_quantizable_module_types: tuple[str, ...] | None = None
    activation_qconfig_kwargs: dict[str, Any] | None = None
    weight_qconfig_kwargs: dict[str, Any] | None = None

    # Current.
    scheme: Scheme = None
    scheme_overrides: dict[str, Scheme] = Field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    strict: Flag = True

    _observer_settings = field_validator("activation_qconfig_kwargs", "weight_qconfig_kwargs")(_check_observer_settings)

    @field_validator("submodules")
    @classmethod
    def _are_patterns(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for problem in filter(None, map(pattern_problem, names or ())):
            raise ValueError(f"has a bad pattern: {problem}")
        return names

    @field_validator("ignore", "scheme_overrides", "exclude_module_types")
    @classmethod
    def _are_no_patterns(cls, names: Any) -> Any:
        for name in filter(is_pattern, names or ()):
            raise ValueError(f"takes no patterns, only names of modules or of their types: {name!r} can mean none")
        return names

    @model_validator(mode="after")
    def _can_be_carried_out(self) -> Self:
        if self.end_epoch is not None:
            raise ValueError(f"end_epoch must be -1 (quantization stays on); got {self.end_epoch}")
        legacy, current = self._written(_LEGACY_FIELDS), self._written(_SCHEME_FIELDS)
        if legacy and current:
            raise ValueError(
                f"{current[0]} and {legacy[0]} belong to two spellings of this modifier: use "
                f"{', '.join(_SCHEME_FIELDS)} or SparseML's older fields, not both"
            )
        if self.model_fuse_fn_name not in (None, "no_fuse", "conv_bn_relus") or self.model_fuse_fn_kwargs:
            raise ValueError(
                "model_fuse_fn_name: only no_fuse and conv_bn_relus are known, without kwargs; leave it out"
            )
        if self.custom_quantizable_module_types:
            raise ValueError(
                "custom_quantizable_module_types: linear layers, embeddings, layer norms and attention products can be "
                "quantized, other modules cannot; leave it out"
            )
        if not self.exclude_batchnorm:
            raise ValueError("exclude_batchnorm: batch norms are never quantized here; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _in_one_spelling(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Printed with its defaults, a modifier must still be readable: the other spelling's fields stay out.
        others = _SCHEME_FIELDS if self.is_legacy else _LEGACY_FIELDS
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in others}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def is_legacy(self) -> bool:
        """Whether SparseML would read this with its legacy class: some field of that class is written."""
        return bool(self._written(_LEGACY_FIELDS))

    def owns(self) -> frozenset[str]:
        return frozenset({"quant"})

    def problems(self, num_epochs: float) -> Iterator[str]:
        start = self.interval.start
        if start >= num_epochs:
            yield f"starts at epoch {start:g}, and training does not go on beyond that: nothing would be quantized"
        for name in ("disable_quantization_observer_epoch", "freeze_bn_stats_epoch"):
            epoch = getattr(self, name)
            if epoch is not None and epoch < start:
                yield f"{name} must be start_epoch ({start}) or later; got {epoch}"

    def plan(self, plan: CompressionPlan, model: nn.Module) -> None:
        translate = legacy_compressions if self.is_legacy else scheme_compressions
        compressions = translate(self, model)
        if not compressions:
            raise TargetError("QuantizationModifier: nothing in the model is left to quantize with these settings")
        for name, compression in compressions.items():
            plan.add_quantization(name, compression.weight, compression.inputs, compression.output)
        if self.freeze_bn_stats_epoch is not None and not _batch_norms(model):
            _log.info("freeze_bn_stats_epoch has nothing to do: %s has no batch norm", type(model).__name__)

    def on_step_start(self, session: Session, clock: Clock) -> None:
        set_phase(session.module, self.phase(clock))
        if self.freeze_bn_stats_epoch is not None and clock.has_reached(self.freeze_bn_stats_epoch):
            for module in _batch_norms(session.module):
                module.eval()

    def phase(self, clock: Clock) -> Phase:
        """What the quantizers do at this moment."""
        if not clock.has_reached(self.interval.start):
            return Phase.OFF
        frozen = self.disable_quantization_observer_epoch
        return Phase.FROZEN if frozen is not None and clock.has_reached(frozen) else Phase.OBSERVE

    def _written(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.model_fields_set]


def legacy_compressions(modifier: QuantizationModifier, model: nn.Module) -> dict[str, Compression]:
    """What the legacy fields mean, module by module.

    Below `submodules` (the whole model without it), except `exclude_module_types`:

    - Linear: weight int8 symmetric, input uint8 affine, output the same if `quantize_linear_activations`
    - Embedding: weight see below, output uint8 affine if `quantize_embedding_activations`
    - LayerNorm: output uint8 affine
    - attention products: left operand and product uint8 affine, right operand uint8 symmetric (zero point 128)

    `quantize_embeddings` reaches every embedding of the model: int8 symmetric below the submodules, int8 affine
    elsewhere. `weight_bits` and `activation_bits` stand in for the 8s. `tensorrt` makes activations int8 symmetric and
    leaves the embeddings' outputs float. `reduce_range` takes one bit from the activations.

    Raises TargetError for a submodule that the model lacks, RecipeError for what cannot be quantized.
    """
    modules = dict(model.named_modules())
    excluded = frozenset(modifier.exclude_module_types or ())
    roots = match_modules(modifier.submodules, list(modules), what="submodules") if modifier.submodules else [""]
    below = {name for name in modules if any(_is_below(name, root) for root in roots)}

    tensorrt = bool(modifier.tensorrt)
    activation_settings = modifier.activation_qconfig_kwargs or {}
    weight_settings = modifier.weight_qconfig_kwargs or {}
    bits = modifier.activation_bits - (1 if modifier.reduce_range else 0)
    activation = QuantSpec(bits, symmetric=tensorrt, signed=tensorrt, **activation_settings)
    right_operand = QuantSpec(bits, symmetric=True, signed=tensorrt, **activation_settings)
    weight = QuantSpec(modifier.weight_bits, symmetric=True, signed=True, **weight_settings)
    outside_weight = QuantSpec(modifier.weight_bits, symmetric=False, signed=True, **weight_settings)

    found: dict[str, Compression] = {}
    for name, module in modules.items():
        kind = type(module).__name__
        if kind in excluded:
            continue
        if isinstance(module, nn.Embedding):
            table = (weight if name in below else outside_weight) if modifier.quantize_embeddings else None
            observed = name in below and modifier.quantize_embedding_activations and not tensorrt
            found[name] = Compression(weight=table, output=activation if observed else None)
        elif name not in below:
            continue
        elif isinstance(module, nn.Linear):
            output = activation if modifier.quantize_linear_activations else None
            found[name] = Compression(weight=weight, inputs=(activation,), output=output)
        elif isinstance(module, nn.LayerNorm):
            found[name] = Compression(output=activation)
        elif isinstance(module, _ConvNd):
            raise RecipeError(f"{name}: convolutions cannot be quantized; add {kind} to exclude_module_types")
    if _PRODUCT_TYPE not in excluded:
        for attention in self_attention_modules(model):
            if attention in below:
                if modifier.reduce_range:
                    raise RecipeError("reduce_range cannot be had with quantized attention products; leave it out")
                for product in MATMULS:
                    found[f"{attention}.{product}"] = Compression(inputs=(activation, right_operand), output=activation)
    return {name: compression for name, compression in found.items() if compression.is_quantized}


def scheme_compressions(modifier: QuantizationModifier, model: nn.Module) -> dict[str, Compression]:
    """What a scheme means, module by module: linear layers, embeddings (their input is ids and stays), the outputs of
    layer norms, and the attention products (type QATMatMul; the right operand symmetric).

    `scheme_overrides` and `ignore` name module types or modules with all below them; a type comes before a name, and of
    names the longest wins. Raises TargetError for an `ignore` or override that matches nothing (`strict: false` lets an
    ignore pass), RecipeError for what cannot be quantized.
    """
    modules = dict(model.named_modules())
    products = [f"{attention}.{product}" for attention in self_attention_modules(model) for product in MATMULS]
    kinds = {name: type(module).__name__ for name, module in modules.items()} | dict.fromkeys(products, _PRODUCT_TYPE)
    known = {*kinds, *kinds.values()}
    must_match = {"ignore": modifier.ignore if modifier.strict else (), "scheme_overrides": modifier.scheme_overrides}
    for field, targets in must_match.items():
        for target in targets:
            if target not in known:
                raise TargetError(f"{field}: {target!r} is no module and no module type{suggestion(target, known)}")

    found: dict[str, Compression] = {}
    for name, kind in kinds.items():
        if _matching(name, kind, modifier.ignore) is not None:
            continue
        override = _matching(name, kind, tuple(modifier.scheme_overrides))
        scheme = _resolve(modifier.scheme if override is None else modifier.scheme_overrides[override])
        inputs, weights, output = scheme.input_activations, scheme.weights, scheme.output_activations
        input_spec = inputs.spec() if inputs else None
        output_spec = output.spec() if output else None
        module = modules.get(name)
        if module is None:
            if inputs is not None:
                found[name] = Compression(inputs=(inputs.spec(), inputs.spec(symmetric=True)), output=output_spec)
        elif isinstance(module, nn.Linear):
            found[name] = Compression(
                weight=weights.spec() if weights else None,
                inputs=(input_spec,) if input_spec else (),
                output=output_spec,
            )
        elif isinstance(module, nn.Embedding):
            if weights is not None and weights.strategy == "channel":
                raise RecipeError(
                    f"{name}: an embedding has one scale for its table; override Embedding with strategy tensor, "
                    "or ignore it"
                )
            found[name] = Compression(weight=weights.spec() if weights else None, output=output_spec)
        elif isinstance(module, nn.LayerNorm):
            found[name] = Compression(output=output_spec)
        elif isinstance(module, _ConvNd):
            raise RecipeError(f"{name}: convolutions cannot be quantized; add {kind} to ignore")
    return {name: compression for name, compression in found.items() if compression.is_quantized}


def _resolve(scheme: str | QuantizationScheme | None) -> QuantizationScheme:
    if isinstance(scheme, QuantizationScheme):
        return scheme
    return NAMED_SCHEMES[scheme or "default"]


def _matching(name: str, kind: str, targets: Sequence[str]) -> str | None:
    """The target that means this module: its type, else the longest name at or above it."""
    if kind in targets:
        return kind
    return max((target for target in targets if _is_below(name, target)), key=len, default=None)


def _is_below(name: str, root: str) -> bool:
    """Whether module `name` is `root` or lies under it; every module lies under the empty name."""
    return not root or name == root or name.startswith(root + ".")


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
