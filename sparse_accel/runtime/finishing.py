"""How a run ends: scores, a plain Hugging Face folder, a check of what was written, and the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_accel.compress.census import Census
from sparse_accel.compress.layers import compressed_layers
from sparse_accel.compress.plan import CompressionPlan, fold, quantization_state
from sparse_accel.compress.ranges import Phase, quantizers, without_range
from sparse_accel.errors import InvariantError
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE
from sparse_accel.reports.run_files import FACTS_FILE, PAGE_FILE, render_report
from sparse_accel.runtime import outputs
from sparse_accel.runtime.checkpoint import write_text
from sparse_accel.runtime.evaluating import evaluate
from sparse_accel.runtime.gathering import whole_module
from sparse_accel.runtime.model_card import model_card
from sparse_accel.runtime.options import METRICS, QA, describe_command
from sparse_accel.runtime.run_facts import run_facts
from sparse_accel.runtime.together import on_main
from sparse_accel.runtime.tracking import LOG_FILE, TRACKERS_FOLDER, clock_time
from sparse_accel.tasks.base import prediction_file

if TYPE_CHECKING:
    from sparse_accel.runtime.pauses import Run
    from sparse_accel.tasks.base import Split

RECIPE_FILE = "recipe.yaml"
_COUNTERS = ("_samples", "_runtime")


def scores(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without sample counts and times."""
    return {name: value for name, value in metrics.items() if not any(counter in name for counter in _COUNTERS)}


def finish(run: Run) -> dict[str, Any]:
    """Evaluate, predict, fold, write and show; what `all_results.json` holds, on every rank: without training, what it held
    stays, but for the scores that are new. Raises InvariantError when what
    was written is not what was trained."""
    options, session, state = run.options, run.session, run.state
    files: dict[str, Any] = {}
    results: dict[str, Any] = {}
    if options.do_train:
        results |= _train_results(run)
        files["train_results.json"] = {"epoch": round(state.clock.epoch, 4), **results}
    if options.do_eval and run.data.validation is not None:
        if run.evaluation is None or run.evaluated_step != state.clock.step:
            run.evaluate_now(state.clock.step if run.held_step is None else run.held_step)
        assert run.evaluation is not None
        more = _evaluate_more(run, run.data.more_validation, "eval", files)
        results |= run.evaluation.metrics | more
        files["eval_results.json"] = {"epoch": round(state.clock.epoch, 4), **run.evaluation.metrics, **more}
        files |= {prediction_file("eval", name): content for name, content in run.evaluation.scored.files.items()}
    if options.do_predict and run.data.test is not None:
        prediction = evaluate(
            session, run.data.test, run.collate, prefix="predict", on_batch=run.screen.batches("predicting")
        )
        files |= {prediction_file("predict", name): content for name, content in prediction.scored.files.items()}
        files["predict_results.json"] = prediction.metrics | _evaluate_more(run, run.data.more_test, "predict", files)
        results |= files["predict_results.json"]
    if options.do_train:
        files[outputs.RESULTS_FILE] = {"epoch": round(state.clock.epoch, 4), **results}
    else:
        before = on_main(session.accelerator, lambda: outputs.earlier_results(run.output_dir))
        files[outputs.RESULTS_FILE] = before | results
    if options.do_train:
        files[outputs.STATES_FILE] = {
            "global_step": state.clock.step,
            "epoch": state.clock.epoch,
            "best_metric": state.best_metric,
            "best_model_checkpoint": state.best_checkpoint,
            "log_history": state.log_history,
        }

    module = whole_module(session)
    if module is not None:
        _publish(run, module, files, results)
    return dict(files[outputs.RESULTS_FILE])


def _evaluate_more(run: Run, splits: Mapping[str, Split], prefix: str, files: dict[str, Any]) -> dict[str, float]:
    """The metrics of further splits, each name followed by the split's suffix; their predictions go into `files`."""
    metrics: dict[str, float] = {}
    for suffix, split in splits.items():
        found = evaluate(run.session, split, run.collate, prefix=prefix, on_batch=run.screen.batches("evaluating"))
        metrics |= {f"{name}_{suffix}": value for name, value in found.metrics.items()}
        files |= {prediction_file(prefix, name, suffix): content for name, content in found.scored.files.items()}
    return metrics


def _publish(run: Run, module: nn.Module, files: dict[str, Any], results: dict[str, Any]) -> None:
    """Fold the whole model, write the folder, check it and show the table; on the main process."""
    options, session = run.options, run.session
    unused = without_range(module) if options.do_train and present_ranges(module) else []
    folded = fold_to_publish(module, session.plan)
    plan, ranges = folded.plan, folded.ranges
    census = Census.of(module, plan)
    if options.do_train:
        matrices = {name for name, parameter in module.named_parameters() if parameter.dim() > 1}
        files[FACTS_FILE] = run_facts(run, type(module).__name__, census, matrices)
    card = model_card(run, plan, census, results, describe_command(options)) if options.do_train else None
    outputs.publish(
        run.output_dir,
        lambda folder: _write_all(run, module, folder, files, card, plan, ranges),
        # Where nothing was trained, they are those of the model that stays.
        replaced=(PLAN_FILE, RANGES_FILE, RECIPE_FILE) if options.do_train else (),
    )
    outputs.record_files(run.output_dir, [LOG_FILE, TRACKERS_FOLDER])
    if options.do_train:
        check_saved(run.output_dir, folded.masks)
        unreported = _publish_report(run.output_dir)
        if unreported is not None:
            run.screen.warn(unreported)
    if not ranges and session.plan.num_quantizers:
        run.screen.warn(
            "the model that is written is from before quantization began: it is a float model"
            + ("" if run.held_step is None else "; --best_model_after_epoch leaves the first epochs out of the choice")
        )
    if unused:
        run.screen.warn(
            f"{len(unused)} quantizers never saw a tensor, among them {unused[0]}: that module is not used by the task"
        )
    run.screen.console.print(summary(run, census, results))
    run.screen.say(f"written to {run.output_dir}")


@dataclass(frozen=True)
class Folded:
    """What a model was before it became a plain one: the plan that is published, its ranges, and the masks that hold."""

    plan: CompressionPlan
    ranges: dict[str, Tensor]
    masks: dict[str, Tensor]


def fold_to_publish(module: nn.Module, plan: CompressionPlan) -> Folded:
    """Take masks and quantizers off a whole model that carries `plan`."""
    ranges = present_ranges(module)
    masks = {
        f"{name}.weight": layer.mask.cpu()
        for name, layer in compressed_layers(module).items()
        if layer.mask is not None and layer.mask_request is not None
    }
    fold(module)
    # Before quantization has begun that is a float model, whatever the recipe had in mind.
    return Folded((plan if ranges else plan.masks_only()).with_whole_weights(), ranges, masks)


def _train_results(run: Run) -> dict[str, Any]:
    state, session = run.state, run.session
    # A stream has as many in an epoch as its steps take.
    in_steps = session.loader.features_per_step * session.loader.steps_per_epoch
    num_samples = len(run.data.train) if run.data.train is not None else in_steps
    results: dict[str, Any] = {"train_samples": num_samples}
    if state.total_loss is not None and state.clock.step:
        total = session.reduce_sum(state.total_loss).item()
        done = num_samples * state.clock.epoch
        results |= {
            "train_loss": total / state.clock.step,
            "train_runtime": round(state.seconds, 4),
            "train_samples_per_second": round(done / state.seconds, 3),
            "train_steps_per_second": round(state.clock.step / state.seconds, 3),
        }
    return results


def _write_all(
    run: Run,
    module: Any,
    folder: Path,
    files: dict[str, Any],
    card: str | None,
    plan: CompressionPlan,
    ranges: dict[str, Tensor],
) -> None:
    for name, content in files.items():
        is_json = name.endswith(".json")
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n" if is_json else content
        (folder / name).write_text(text, "utf-8")
    if card is None:  # nothing was trained: the model stays where it is
        return
    module.save_pretrained(folder)
    write_companions(run, folder, plan, ranges)
    (folder / "README.md").write_text(card, "utf-8")


def _publish_report(output_dir: Path) -> str | None:
    """The report of the run whose files lie in `output_dir`; a sentence on what hindered it, for the model is whole without.
    An earlier run's report does not stay then."""
    try:
        text = render_report(output_dir)
        outputs.publish(output_dir, lambda folder: _write_text(folder / PAGE_FILE, text))
    except Exception as error:  # whatever is wrong with a page, days of training end with their scores and exit code 0
        (output_dir / PAGE_FILE).unlink(missing_ok=True)
        return f"the model is written, but no {PAGE_FILE}: {type(error).__name__}: {error}".partition("\n")[0]
    return None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def write_companions(run: Run, folder: Path, plan: CompressionPlan, ranges: Mapping[str, Tensor]) -> None:
    """What stands beside weights, in a checkpoint as in the final folder: config, tokenizer, plan, ranges and resolved
    recipe. `ranges` is empty before quantization has begun."""
    module: Any = run.session.module
    module.config.save_pretrained(folder)
    try:
        run.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception, also for a disk that is full
        raise OSError(str(error)) from error
    write_compression(folder, plan, ranges, run.recipe_text)


def write_compression(folder: Path, plan: CompressionPlan, ranges: Mapping[str, Tensor], recipe_text: str) -> None:
    """Plan, ranges and resolved recipe, each where there is any."""
    if plan.modules:
        plan.save(folder / PLAN_FILE)
    if ranges:
        save_file(dict(ranges), folder / RANGES_FILE)
    if recipe_text:
        write_text(folder / RECIPE_FILE, recipe_text)


def present_ranges(module: nn.Module) -> dict[str, Tensor]:
    """Ranges and scales of all quantizers; none while nothing is quantized yet."""
    is_quantized = any(quantizer.phase is not Phase.OFF for quantizer in quantizers(module).values())
    return quantization_state(module) if is_quantized else {}


def check_saved(folder: Path, masks: Mapping[str, Tensor]) -> None:
    """Raise InvariantError unless the saved file holds a zero wherever a mask says so."""
    if not masks:
        return
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        for name, mask in masks.items():
            revived = int(torch.count_nonzero(file.get_tensor(name)[~mask]))
            if revived:
                raise InvariantError(
                    f"{path}: {revived} pruned weights of {name} are not zero in the saved file; please report it"
                )


def summary(run: Run, census: Census, results: Mapping[str, Any]) -> Group:
    """What a person reads at the end: what the model is made of, then its scores and what they cost."""
    before = {row.kind: row.sparsity for row in run.census_at_start.kinds()}
    layers = Table(title=f"{run.options.task.replace('_', ' ')}: {run.output_dir}", title_justify="left")
    layers.add_column("layers")
    for column in ("parameters", "sparsity before", "after", "quantized"):
        layers.add_column(column, justify="right")
    for row in census.kinds():
        share = f"{before.get(row.kind, 0.0):.2%}", f"{row.sparsity:.2%}"
        layers.add_row(row.kind, f"{row.numel:,}", *share, _modules(row.quantized))
    layers.add_section()
    share = f"{run.census_at_start.sparsity:.2%}", f"{census.sparsity:.2%}"
    quantized = _modules(len(census.quantized_modules))
    layers.add_row("prunable weights", f"{census.prunable.numel:,}", *share, quantized)
    facts = Table(show_header=False)
    facts.add_column()
    facts.add_column(justify="right")
    for name, value in _facts(results, run.options.task):
        facts.add_row(name, value)
    return Group(layers, facts)


def _modules(count: int) -> str:
    return "-" if not count else f"{count} module{'s' if count > 1 else ''}"


_SCORES = {"exact_match": "EM", "exact": "EM", "f1": "F1"}
# What the line about an evaluation says at most.
_IN_HEADLINE = 4


def score_name(key: str) -> str:
    """What a person calls a metric."""
    prefix, _, name = key.partition("_")
    return ("test " if prefix == "predict" else "") + _SCORES.get(name, name)


def score_text(value: float, task: str) -> str:
    """A metric as it is shown: question answering counts in percent, the other tasks in shares of 1."""
    return f"{value:.2f}" if task == QA else f"{value:.4f}"


def headline(metrics: Mapping[str, float], task: str) -> str:
    """The scores that everybody asks for, in one line."""
    wanted = [name for name in METRICS[task] if f"eval_{name}" in metrics]
    if task == QA:
        wanted = [name for name in ("exact_match", "exact", "f1") if f"eval_{name}" in metrics]
    return "  ".join(
        f"{score_name(f'eval_{name}')} {score_text(metrics[f'eval_{name}'], task)}" for name in wanted[:_IN_HEADLINE]
    )


def _facts(results: Mapping[str, Any], task: str) -> list[tuple[str, str]]:
    """Scores, throughput and time as a person reads them."""
    facts = [
        (score_name(key), score_text(value, task) if isinstance(value, float) else f"{value:,}")
        for key, value in scores(results).items()
        if key.startswith(("eval_", "predict_"))
    ]
    units = {
        "train_loss": ("training loss", "{:.4f}"),
        "train_samples_per_second": ("training", "{:.1f} features/s"),
        "eval_samples_per_second": ("evaluation", "{:.1f} features/s"),
    }
    facts += [(name, form.format(results[key])) for key, (name, form) in units.items() if key in results]
    if "train_runtime" in results:
        facts.append(("training time", clock_time(results["train_runtime"])))
    return facts
