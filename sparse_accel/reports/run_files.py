"""report.html of a model folder, made of the files that lie beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file

from sparse_accel.compress.inspection import quantizer_facts, quantizers_in_order
from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import SparseAccelError
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.recipe.timeline_plan import timeline
from sparse_accel.recipe.timeline_shapes import courses, curves, lanes
from sparse_accel.reports.run_page import RunStory, Shapes, run_page

PAGE_FILE: Final = "report.html"
# What the page tells and no other file of the folder does.
FACTS_FILE: Final = "report.json"
FACTS_FORMAT: Final = 1
_STATE_FILE: Final = "trainer_state.json"
_RESULTS_FILE: Final = "all_results.json"
_RECIPE_FILE: Final = "recipe.yaml"
# A curve of the page needs no more: it is some hundred pixels wide.
_NUM_POINTS: Final = 300


def render_report(folder: Path, *, deployment: Path | None = None, export_report: Path | None = None) -> str:
    """The page of the run that wrote `folder`, with an export's report where there was one."""
    exported = _read(export_report) if export_report is not None else None
    return run_page(read_story(folder, exported=exported, deployment="" if deployment is None else str(deployment)))


def tell_of_export(folder: Path, deployment: Path, export_report: Path) -> str | None:
    """Make the report that training left in `folder` anew, with the export's; a sentence on what hindered that. A folder without
    such a report stays without."""
    page, partial = folder / PAGE_FILE, folder / f".{PAGE_FILE}.partial"
    try:
        if page.is_file() and _facts(folder) is not None:
            partial.write_text(render_report(folder, deployment=deployment, export_report=export_report), "utf-8")
            partial.replace(page)
    except (OSError, ValueError, KeyError, TypeError, SparseAccelError) as error:  # files that somebody changed
        partial.unlink(missing_ok=True)
        return f"{page} does not tell of this export: {type(error).__name__}: {error}".partition("\n")[0]
    return None


def read_story(folder: Path, *, exported: Mapping[str, Any] | None = None, deployment: str = "") -> RunStory:
    """What the files of a finished run tell."""
    facts = _facts(folder)
    assert facts is not None, f"{folder} has a {FACTS_FILE}"
    plan = CompressionPlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else CompressionPlan()
    ranges = load_file(folder / RANGES_FILE) if (folder / RANGES_FILE).is_file() else {}
    recipe = folder / _RECIPE_FILE
    text = recipe.read_text("utf-8") if recipe.is_file() else ""
    return RunStory(
        facts=facts,
        history=_read(folder / _STATE_FILE)["log_history"],
        results=_read(folder / _RESULTS_FILE),
        shapes=_shapes(str(recipe), facts, plan) if text and not facts["one_shot"] else None,
        quantizers=quantizers_in_order(quantizer_facts(plan, ranges)) if ranges else (),
        recipe_text=text,
        exported=exported,
        deployment=deployment,
    )


def _shapes(recipe_file: str, facts: Mapping[str, Any], plan: CompressionPlan) -> Shapes:
    recipe = Recipe.load(recipe_file)
    per_epoch = facts["steps"]["per_epoch"]
    found = timeline(recipe, facts["steps"]["last"] / per_epoch, per_epoch)
    # Who holds which zeros is no part of the files; where one modifier holds all, its share is known.
    holders = recipe.of(ConstantPruningModifier)
    held = {holders[0]: _masked_share(facts, plan)} if len(holders) == 1 else None
    groups = tuple("" if group is None else f", group {group}" for group in found.groups)
    pruning = tuple(courses(found, _NUM_POINTS))
    return Shapes(found.num_epochs, groups, tuple(curves(found, _NUM_POINTS)), tuple(lanes(found, held)), pruning)


def _masked_share(facts: Mapping[str, Any], plan: CompressionPlan) -> float:
    masked = {f"{name}.weight" for name, compression in plan.modules.items() if compression.mask}
    members = [entry for entry in facts["matrices"] if entry["name"] in masked]
    total = sum(entry["numel"] for entry in members)
    return sum(entry["zeros"] for entry in members) / total if total else 0.0


def _facts(folder: Path) -> dict[str, Any] | None:
    path = folder / FACTS_FILE
    document = _read(path) if path.is_file() else {}
    return document if document.get("sparse_accel_report") == FACTS_FORMAT else None


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return document
