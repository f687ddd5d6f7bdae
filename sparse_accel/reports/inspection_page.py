"""The page of a model: zeros and their structure by layer, quantizers, sizes."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_accel.compress.inspection import Inspection, MatrixFacts
from sparse_accel.reports.charts import bars
from sparse_accel.reports.layers import LayerZeros, heat_maps, quantizer_tables, scale_chart, short_names
from sparse_accel.reports.page import details, page, paragraph, percent, section, size, table, tiles


def inspection_page(found: Inspection) -> str:
    """One self-contained HTML document."""
    return page(
        found.model or found.source.rstrip("/").rpartition("/")[2],
        f"{found.source} ({found.form})",
        [
            tiles(_headline(found)),
            section("Notes", *(paragraph(note) for note in found.notes)),
            section(
                "Zeros by layer",
                heat_maps([layer_zeros(matrix) for matrix in found.matrices]),
                table(*kind_table(found), total=True),
            ),
            section("Structure of the zeros", *_structure(found.matrices)),
            section("Size", bars(size_rows(found)), paragraph(_SIZE_NOTE, "muted")),
            section("Quantized tensors", scale_chart(found.quantizers), quantizer_tables(found.quantizers))
            if found.quantizers
            else "",
        ],
    )


_SIZE_NOTE = (
    "Without zeros: each tensor as a bit for every number and the numbers that are not zero, or as it is where that is "
    "less; computed from the counts, as `export --compress` stores them but for signs of zeros and the file's header."
)
_STRUCTURE_NOTE = (
    "Along the inputs of a layer. N:M: at most N of M neighbouring weights are not zero; a pattern is named where every "
    "group of the matrix holds it (all groups hold 1:4, 2:4 or 4:8, the tightest counts). Blocks are 4 neighbouring weights."
)


def layer_zeros(matrix: MatrixFacts) -> LayerZeros:
    """A matrix as the heat maps take it."""
    return LayerZeros(matrix.name, matrix.kind, matrix.row, matrix.column, matrix.count.numel, matrix.count.zeros)


def kind_table(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: parameters, zeros and quantized modules of each kind of layer, the prunable ones last."""
    rows = [
        [row.kind, f"{row.numel:,}", f"{row.zeros:,}", percent(row.sparsity), str(row.quantized or "-")]
        for row in found.census.kinds()
    ]
    prunable = found.census.prunable
    quantized = str(len(found.census.quantized_modules) or "-")
    rows.append(
        ["prunable weights", f"{prunable.numel:,}", f"{prunable.zeros:,}", percent(prunable.sparsity), quantized]
    )
    return ["layers", "parameters", "zeros", "share", "quantized modules"], rows


def pattern_summary(matrices: Sequence[MatrixFacts]) -> str:
    """The N:M pattern that the matrices hold, in few words."""
    structures = [matrix.structure for matrix in matrices if matrix.structure is not None]
    held = [structure.pattern for structure in structures if structure.pattern is not None]
    if not held:
        return "none"
    counts = {pattern: held.count(pattern) for pattern in dict.fromkeys(held)}
    if len(counts) == 1 and len(held) == len(structures):
        return f"{held[0]} in all"
    return ", ".join(f"{pattern} in {count} of {len(structures)}" for pattern, count in counts.items())


def block_summary(matrices: Sequence[MatrixFacts]) -> str:
    """Whether zeros lie in wholly zero blocks, in few words."""
    structures = [matrix.structure for matrix in matrices if matrix.structure is not None and matrix.structure.zeros]
    blocked = sum(structure.is_blocked for structure in structures)
    if not structures:
        return "no zeros"
    return (
        "all zeros"
        if blocked == len(structures)
        else f"all zeros in {blocked} of {len(structures)}"
        if blocked
        else "no"
    )


def size_rows(found: Inspection) -> list[tuple[str, float, str]]:
    """The model's sizes, as `bars` takes them."""
    sizes = found.sizes
    rows = [
        ("every parameter in float32", sizes.dense_bytes),
        ("the files on disk", sizes.disk_bytes),
        ("without zeros", sizes.packed_bytes),
    ]
    if sizes.integer_bytes is not None:
        rows.append(("without zeros, quantized weights as int8", sizes.integer_bytes))
    whole = sizes.dense_bytes or 1
    return [(name, float(value), f"{size(value)} ({value / whole:.0%})") for name, value in rows]


def structure_table(matrices: Sequence[MatrixFacts]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the structure of the matrices of each kind that has products."""
    rows = []
    for kind in dict.fromkeys(matrix.kind for matrix in matrices):
        members = [matrix for matrix in matrices if matrix.kind == kind and matrix.structure is not None]
        structures = [matrix.structure for matrix in members if matrix.structure is not None]
        groups = sum(structure.num_groups for structure in structures)
        if not groups:
            continue
        rows.append(
            [
                kind,
                f"{len(members):,}",
                pattern_summary(members),
                percent(sum(structure.groups_2_of_4 for structure in structures) / groups),
                percent(sum(structure.zero_blocks for structure in structures) / groups),
                block_summary(members),
            ]
        )
    return ["layers", "matrices", "N:M pattern", "groups that are 2:4", "zero 1x4 blocks", "zeros only in blocks"], rows


def matrix_table(found: Inspection) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: every matrix, by its place, narrow enough for a terminal."""
    rows = []
    names = short_names([(matrix.kind, matrix.column) for matrix in found.matrices])
    for matrix in found.matrices:
        structure = matrix.structure
        quantizers = " ".join(f"{one.role[0]}{one.bits}" for one in found.quantizers_of(matrix.name))
        cells = ["-", "-", "-", "-"]
        if structure is not None:
            cells = [
                structure.pattern or "none",
                percent(structure.share_2_of_4),
                percent(structure.share_zero_blocks),
                "yes" if structure.is_blocked else "no",
            ]
        rows.append(
            [
                matrix.row or "-",
                names[matrix.kind, matrix.column],
                "x".join(str(length) for length in matrix.shape),
                percent(matrix.count.sparsity),
                *cells,
                quantizers or "-",
                size(matrix.packed_bytes if matrix.integer_bytes is None else matrix.integer_bytes),
            ]
        )
    headings = ["layer", "matrix", "shape", "zeros", "N:M", "2:4", "1x4 zero", "only 1x4", "bits"]
    return [*headings, "without zeros"], rows


def _headline(found: Inspection) -> list[tuple[str, str]]:
    prunable = found.census.prunable
    products = [matrix for matrix in found.matrices if matrix.structure is not None]
    return [
        ("parameters", f"{found.census.num_parameters:,}"),
        ("zeros of the prunable weights", percent(prunable.sparsity)),
        ("N:M pattern", pattern_summary(products)),
        ("quantized tensors", f"{len(found.quantizers):,}" if found.quantizers else "none"),
        ("on disk", size(found.sizes.disk_bytes)),
    ]


def _structure(matrices: Sequence[MatrixFacts]) -> list[str]:
    headings, rows = structure_table(matrices)
    if not rows:
        return []
    each = [
        [
            matrix.name,
            f"{matrix.structure.zeros:,}",
            matrix.structure.pattern or "none",
            percent(matrix.structure.share_2_of_4),
            percent(matrix.structure.share_zero_blocks),
            "yes" if matrix.structure.is_blocked else "no",
        ]
        for matrix in matrices
        if matrix.structure is not None
    ]
    listed = table(
        ["matrix", "zeros", "N:M", "groups that are 2:4", "zero 1x4 blocks", "only in blocks"], each, is_tall=True
    )
    return [
        table(headings, rows),
        details(f"each of the {len(each):,} matrices", listed),
        paragraph(_STRUCTURE_NOTE, "muted"),
    ]
