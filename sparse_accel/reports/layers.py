"""Sections that a model's page and a run's page share: zeros and quantizers by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparse_accel.compress.census import kind_of_name
from sparse_accel.compress.inspection import QuantizerFacts, place_of
from sparse_accel.reports.charts import Dot, dot_chart, heat_map, heat_scale
from sparse_accel.reports.page import details, short, table

# Tables with more rows than this are folded away.
_MANY = 40


@dataclass(frozen=True)
class LayerZeros:
    """A matrix in the picture of its kind: see `compress.inspection.MatrixFacts`."""

    name: str
    kind: str
    row: str
    column: str
    numel: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in [0, 1]."""
        return self.zeros / self.numel if self.numel else 0.0


def heat_maps(matrices: Sequence[LayerZeros], suffix: str = "") -> str:
    """A heat map of zeros for each kind of layer; `suffix` ends its title."""
    maps = []
    for kind in dict.fromkeys(matrix.kind for matrix in matrices):
        members = [matrix for matrix in matrices if matrix.kind == kind]
        # Two matrices in one place are told apart by their whole names.
        places = [(matrix.row, matrix.column) for matrix in members]
        cells = {
            (matrix.row, matrix.column if places.count((matrix.row, matrix.column)) == 1 else matrix.name): matrix
            for matrix in members
        }
        maps.append(
            heat_map(
                kind + suffix,
                list(dict.fromkeys(row for row, _ in cells)),
                list(dict.fromkeys(column for _, column in cells)),
                {
                    place: (matrix.sparsity, f"{matrix.name}: {matrix.zeros:,} of {matrix.numel:,} are zero")
                    for place, matrix in cells.items()
                },
            )
        )
    return '<div class="maps">' + "".join(maps) + "</div>" + heat_scale("zeros") if maps else ""


def scale_chart(quantizers: Iterable[QuantizerFacts]) -> str:
    """The scale of every quantizer that has one, in the order of the layers, on a logarithmic axis."""
    known = [quantizer for quantizer in quantizers if quantizer.scale is not None]
    modules = {module: index for index, module in enumerate(dict.fromkeys(quantizer.module for quantizer in known))}
    groups: dict[str, list[Dot]] = {}
    for quantizer in known:
        assert quantizer.scale is not None
        low, high = quantizer.scale
        title = f"{quantizer.module} {quantizer.role}: {_span(quantizer.scale)}"
        groups.setdefault(quantizer.role, []).append(Dot(modules[quantizer.module], low, high, title))
    ticks: list[tuple[float, str]] = []
    for module, index in modules.items():
        row = place_of(module)[0]
        if row and (not ticks or ticks[-1][1] != row):
            ticks.append((float(index), row))
    every = -(-len(ticks) // 14) if ticks else 1
    return dot_chart(
        "Scale of each quantized tensor", groups, x_ticks=ticks[::every], x_name="layer", y_name="scale (logarithmic)"
    )


def quantizer_tables(quantizers: Sequence[QuantizerFacts]) -> str:
    """Quantizers of one sort summed up, then each of them."""
    each = table(*each_quantizer(quantizers), num_words=5, is_tall=len(quantizers) > _MANY)
    return table(*quantizer_sorts(quantizers), num_words=4) + details(
        f"each of the {len(quantizers):,} quantized tensors", each
    )


def quantizer_sorts(quantizers: Sequence[QuantizerFacts]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: quantizers of one sort, with the extremes of their numbers."""
    sorts: dict[tuple[str, ...], list[QuantizerFacts]] = {}
    for quantizer in quantizers:
        sorts.setdefault(_sort(quantizer), []).append(quantizer)
    rows = [[*sort, f"{len(members):,}", *_extremes(members)] for sort, members in sorts.items()]
    return ["tensor", "integers", "grid", "scales", "tensors", "scale from", "to", "zero point from", "to"], rows


def each_quantizer(quantizers: Sequence[QuantizerFacts]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: every quantized tensor."""
    rows = [[one.module, *_sort(one), _num_scales(one), *_extremes([one])] for one in quantizers]
    headings = ["module", "tensor", "integers", "grid", "scales", "number"]
    return [*headings, "scale from", "to", "zero point from", "to"], rows


def quantizer_places(quantizers: Sequence[QuantizerFacts]) -> tuple[list[str], list[list[str]]]:
    """The same by the place of each module, narrow enough for a terminal."""
    rows = []
    names = short_names([(kind_of_name(one.module), place_of(one.module)[1]) for one in quantizers])
    for one in quantizers:
        row, column = place_of(one.module)
        ends = [_span(numbers) if numbers is not None else "-" for numbers in (one.scale, one.zero_point)]
        rows.append([row or "-", names[kind_of_name(one.module), column], *_sort(one), _num_scales(one), *ends])
    return ["layer", "module", "tensor", "integers", "grid", "scales", "number", "scale", "zero point"], rows


def short_names(places: Sequence[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What is called the same in two kinds of layer gets its kind before its name.

    >>> short_names([("attention", "query"), ("attention", "output"), ("feed-forward", "output")])[("attention", "output")]
    'attention output'
    """
    kinds: dict[str, set[str]] = {}
    for kind, name in places:
        kinds.setdefault(name, set()).add(kind)
    return {(kind, name): f"{kind} {name}" if len(kinds[name]) > 1 else name for kind, name in places}


def _sort(quantizer: QuantizerFacts) -> tuple[str, ...]:
    return (
        quantizer.role,
        quantizer.grid,
        "symmetric" if quantizer.symmetric else "affine",
        "per channel" if quantizer.per_channel else "per tensor",
    )


def _num_scales(quantizer: QuantizerFacts) -> str:
    if quantizer.is_dynamic:
        return "one an input"
    return "-" if quantizer.num_scales is None else f"{quantizer.num_scales:,}"


def _extremes(quantizers: Sequence[QuantizerFacts]) -> list[str]:
    """Least and largest scale, least and largest zero point, of those that are known."""
    cells = []
    for spans in (
        [one.scale for one in quantizers if one.scale is not None],
        [one.zero_point for one in quantizers if one.zero_point is not None],
    ):
        ends = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else ()
        cells += [short(end) for end in ends] or ["-", "-"]
    return cells


def _span(ends: Sequence[float]) -> str:
    low, high = ends
    return short(low) if low == high else f"{short(low)} to {short(high)}"
