"""A training command from its options to its output folder."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from sparse_accel.compress.census import Census
from sparse_accel.compress.plan import check_masks, install
from sparse_accel.compress.ranges import Phase, calibrating, end_step, quantizers
from sparse_accel.errors import InvariantError, OptionError, OutputError
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import checkpoint, finishing, outputs, setup, tracking
from sparse_accel.runtime.evaluating import Evaluation, evaluate
from sparse_accel.runtime.libraries import quiet_libraries
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.training import TrainState, read_window
from sparse_accel.runtime.training import train as run_steps
from sparse_accel.session import Session
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import TaskData
from sparse_accel.timeline import Clock


def train(options: TrainOptions) -> None:
    """Carry out a `train` command. Raises SparseAccelError for everything that the user can put right."""
    quiet_libraries()
    accelerator = setup.start_accelerator(options)
    screen = tracking.Screen(Console(), is_shown=accelerator.is_main_process, use_bar=not options.disable_tqdm)
    run = prepare(options, accelerator, screen)
    try:
        if options.one_shot:
            apply_once(run)
        elif options.do_train:
            run_steps(run.session, run.state, run.after_step)
            run.finish_training()
        finishing.finish(run)
    finally:
        run.close()
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


@dataclass
class Run:
    """One command under way: the session, its data and what the loop's pauses need."""

    options: TrainOptions
    session: Session
    state: TrainState
    data: TaskData
    recipe_text: str
    tokenizer: Any
    screen: tracking.Screen
    output_dir: Path
    census_at_start: Census
    evaluation: Evaluation | None = None
    evaluated_step: int = -1
    loss_text: str = ""
    started: float = 0.0

    # ---- pauses of the loop

    def after_step(self, session: Session, state: TrainState) -> None:
        """Log, check, evaluate and save where their intervals say so; the clock stands after the step."""
        options, clock = self.options, state.clock
        self.screen.step(clock.step, self._status(clock))
        first = options.logging_first_step and clock.step == 1
        if first or self._is_due(options.logging_strategy, options.logging_steps, clock):
            self.log_window()
        if options.check_sparsity_every and clock.step % options.check_sparsity_every == 0:
            require_zeros(session)
        if self._evaluation_is_due(clock):
            self.evaluate_now()
        saves = self._is_due(options.save_strategy, options.save_steps, clock)
        if saves or (options.save_strategy == "steps" and clock.step == state.last_step):
            self.save_now()

    def _is_due(self, strategy: str, every: int | None, clock: Clock) -> bool:
        if strategy == "steps":
            return clock.step % (every or 1) == 0
        return strategy == "epoch" and (clock.step % clock.steps_per_epoch == 0 or clock.step == self.state.last_step)

    def _evaluation_is_due(self, clock: Clock) -> bool:
        options = self.options
        delay = options.eval_delay if options.eval_strategy == "epoch" else options.eval_delay / clock.steps_per_epoch
        return self._is_due(options.eval_strategy, options.eval_steps, clock) and clock.has_reached(delay)

    def _status(self, clock: Clock) -> str:
        phase = PHASE_NAMES[current_phase(self.session.module)]
        rate = self.session.optimizer.param_groups[0]["lr"]
        return f"epoch {clock.epoch:.2f}  {phase}  lr {rate:.3g}{self.loss_text}"

    def log_window(self) -> None:
        """Write one line of the log: the mean loss terms since the last one, the rate of the last step, the phase."""
        session, state, clock = self.session, self.state, self.state.clock
        means = read_window(session, state)
        if not means:
            return
        last = Clock(clock.step - 1, clock.steps_per_epoch)
        values: dict[str, Any] = {
            "epoch": round(clock.epoch, 4),
            **means,
            "learning_rate": session.optimizer.param_groups[0]["lr"],
            "phase": PHASE_NAMES[current_phase(session.module)],
            **session.recipe.metrics(session, last),
        }
        state.log_history.append({"step": clock.step, **values})
        terms = "  ".join(f"{name.removesuffix('_loss')} {means[name]:.4f}" for name in sorted(means) if name != "loss")
        self.loss_text = f"  loss {means['loss']:.4f}  ({terms})"
        self.screen.line(clock.step, self._status(clock))
        self._track(values)

    def _track(self, values: dict[str, Any]) -> None:
        for tracker in self.session.trackers:
            tracker.log(self.state.clock.step, values)

    def evaluate_now(self) -> Evaluation:
        """Score the model as it is on the validation set and remember the best."""
        assert self.data.validation is not None
        state, options = self.state, self.options
        self.evaluation = evaluate(
            self.session,
            self.data.validation,
            self.data.collate,
            prefix="eval",
            on_batch=self.screen.batches("evaluating"),
        )
        self.evaluated_step = state.clock.step
        scores = finishing.scores(self.evaluation.metrics)
        named = "  ".join(f"{finishing.score_name(key)} {value:.2f}" for key, value in scores.items())
        self.screen.say(f"step {state.clock.step}  epoch {state.clock.epoch:.2f}  {named}")
        state.log_history.append(
            {"step": state.clock.step, "epoch": round(state.clock.epoch, 4), **self.evaluation.metrics}
        )
        self._track(self.evaluation.metrics)
        if options.metric_for_best_model is not None:
            self._remember_best(self.evaluation.metrics)
        return self.evaluation

    def _remember_best(self, metrics: dict[str, float]) -> None:
        options, state = self.options, self.state
        if options.best_model_after_epoch is not None and state.clock.epoch <= options.best_model_after_epoch:
            return
        name = "eval_" + str(options.metric_for_best_model).removeprefix("eval_")
        if name not in metrics:
            known = ", ".join(key.removeprefix("eval_") for key in finishing.scores(metrics))
            raise OptionError(
                f"--metric_for_best_model {options.metric_for_best_model}: the evaluation reports {known}"
            )
        value = metrics[name]
        sign = 1 if options.greater_is_better else -1
        if state.best_metric is None or sign * value > sign * state.best_metric:
            state.best_metric, state.best_checkpoint = value, f"checkpoint-{state.clock.step}"

    def save_now(self) -> None:
        """Write a checkpoint. A disk that is full costs this checkpoint, not the run."""
        require_zeros(self.session)
        state = self.state
        state.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        try:
            checkpoint.save(self.session, state, self.output_dir, extra=self._write_extra)
        except OutputError as error:
            self.screen.warn(f"{error}; training goes on, earlier checkpoints are untouched")
            return
        if self.session.accelerator.is_main_process:
            keep = {state.best_checkpoint} if state.best_checkpoint else set()
            checkpoint.prune_checkpoints(self.output_dir, self.options.save_total_limit, keep)

    def _write_extra(self, folder: Path) -> None:
        finishing.write_companions(self, folder)

    def close(self) -> None:
        """Take the bar away and close the logs, however the run ended."""
        self.screen.stop_training()
        for tracker in self.session.trackers:
            tracker.close()

    # ---- after the loop

    def finish_training(self) -> None:
        """Leave the loop: last log line, invariants, the best checkpoint where it was asked for."""
        self.log_window()
        self.screen.stop_training()
        self.state.seconds += time.perf_counter() - self.started
        require_zeros(self.session)
        best = self.state.best_checkpoint
        if self.options.load_best_model_at_end and best is not None:
            checkpoint.load_model(self.session, self.output_dir / best)
            self.screen.say(
                f"best checkpoint: {best} ({self.options.metric_for_best_model} {self.state.best_metric:.4f})"
            )
            if best != f"checkpoint-{self.state.clock.step}":
                self.evaluated_step = -1


PHASE_NAMES = {Phase.OFF: "dense", Phase.OBSERVE: "observing", Phase.FROZEN: "frozen"}


def current_phase(model: torch.nn.Module) -> Phase:
    """What the quantizers do now; OFF for a model without any."""
    return next((quantizer.phase for quantizer in quantizers(model).values()), Phase.OFF)


def prepare(options: TrainOptions, accelerator: Accelerator, screen: tracking.Screen) -> Run:
    """Everything before the first step. Nothing is written before all that can be wrong has been looked at."""
    torch.manual_seed(options.seed)
    task = resolve_task(options.task)
    recipe = setup.load_recipe(options)
    epochs = setup.num_epochs(options, recipe)
    recipe.check(epochs)
    refuse_hopeless_quantization(options, recipe)
    output_dir = Path(options.output_dir)
    recipe_text = recipe.to_yaml() if recipe.modifiers else ""
    command = outputs.fingerprint(options.identity(), recipe_text, options.train_file if options.do_train else None)
    start = outputs.decide_start(
        output_dir, command, overwrite=options.overwrite_output_dir, resume=options.resume_from_checkpoint
    )

    tokenizer = setup.load_student_tokenizer(options)
    model, notes = setup.load_student(options, task)
    with accelerator.local_main_process_first():  # the others find the features in the cache
        data = task.load(options, tokenizer, max_positions=setup.max_positions(model))
    teacher, teacher_note = setup.load_teacher(options, recipe, task, model, tokenizer, accelerator)
    census_at_start = Census.of(model)
    plan = setup.plan_compression(recipe, model)
    trained_plan = None if options.do_train else finishing.trained_plan(options.model_name_or_path)
    setup.use_quantized_attention(trained_plan or plan, model)
    install(model, trained_plan or plan, observe_padding=options.observe_padding)
    if trained_plan is not None:
        finishing.load_ranges(options.model_name_or_path, model)
    bytes_of_checkpoint = checkpoint.checkpoint_bytes(model, 0.0 if options.optim == "sgd" else 2.0)

    accepts = setup.accepted_inputs(model)

    optimizer = setup.build_optimizer(options, model)
    base_weight_decay = [group["weight_decay"] for group in optimizer.param_groups]
    loader = None
    total_steps = 0
    if options.do_train:
        loader = setup.build_loader(options, data.train, data.collate, task, accelerator)
        total_steps = Clock(0, loader.steps_per_epoch).step_of(epochs)
    last_step = min(total_steps, options.max_steps) if options.max_steps > 0 else total_steps
    disk_warning = outputs.check_disk(
        output_dir,
        checkpoint_bytes=bytes_of_checkpoint,
        final_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        num_checkpoints=num_checkpoints(options, last_step, total_steps, loader),
    )

    if accelerator.is_main_process:
        outputs.open_folder(output_dir, command, sys.argv, clears=start.clears)
    accelerator.wait_for_everyone()

    prepared = setup.shard(accelerator, model, optimizer, trains=options.do_train)
    reduce_max, reduce_sum = setup.reductions(accelerator)
    session = Session(
        accelerator=accelerator,
        model=prepared[0],
        module=accelerator.unwrap_model(prepared[0], keep_fp32_wrapper=True),
        optimizer=prepared[1],
        recipe=recipe,
        plan=plan,
        task=task,
        options=options,
        loader=loader,
        teacher=teacher,
        reduce_max=reduce_max,
        reduce_sum=reduce_sum,
        accepts=accepts,
        base_lr=setup.flag_learning_rate(options, recipe, total_steps),
        base_weight_decay=base_weight_decay,
    )
    torch.manual_seed(options.seed + accelerator.process_index)
    state = TrainState(clock=Clock(0, loader.steps_per_epoch if loader else 1), last_step=last_step)
    if start.checkpoint is not None:
        state = checkpoint.load(session, start.checkpoint, last_step)
    if accelerator.is_main_process and options.do_train:
        session.trackers.append(tracking.JsonLines(output_dir, state.clock.step))
        if accelerator.log_with:
            name = options.run_name or output_dir.name
            session.trackers.append(tracking.AccelerateTrackers(accelerator, name, options.to_json()))

    for note in [start.message, *notes, *data.notes, teacher_note]:
        if note:
            screen.say(note)
    for warning in [*recipe.warnings, *setup.overruled_flags(options, recipe), disk_warning]:
        if warning:
            screen.warn(warning)
    if options.do_train and not options.one_shot:
        screen.say(
            f"{len(data.train) if data.train is not None else 0} features, {state.clock.steps_per_epoch} steps an epoch, "
            f"{epochs:g} epochs, {last_step} steps, {accelerator.num_processes} process(es) on {accelerator.device.type}, "
            f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}"
        )
        screen.start_training(last_step, state.clock.step)
    return Run(
        options=options,
        session=session,
        state=state,
        data=data,
        recipe_text=recipe_text,
        tokenizer=tokenizer,
        screen=screen,
        output_dir=output_dir,
        census_at_start=census_at_start,
        started=time.perf_counter(),
    )


def num_checkpoints(options: TrainOptions, last_step: int, total_steps: int, loader: Any) -> int:
    """How many checkpoints will lie in the folder at the end."""
    if not options.do_train or options.one_shot or options.save_strategy == "no" or not last_step:
        return 0
    every = options.save_steps if options.save_strategy == "steps" else loader.steps_per_epoch
    count = -(-last_step // every)
    return min(count, options.save_total_limit) if options.save_total_limit else count


def refuse_hopeless_quantization(options: TrainOptions, recipe: Recipe) -> None:
    """Quantization needs ranges: from training, or in one shot from calibration batches. Raises OptionError."""
    quantization = recipe.of(QuantizationModifier)
    if not quantization:
        return
    where = recipe.where(quantization[0])
    if options.one_shot and not calibration_steps(options, recipe):
        raise OptionError(
            f"{where}: --one_shot with quantization needs batches to take the ranges from: give --num_calibration_steps"
        )
    if not options.do_train:
        raise OptionError(
            f"{where}: without --do_train a QuantizationModifier has no ranges; a trained folder brings its own, so leave "
            "--recipe out to evaluate one"
        )


def calibration_steps(options: TrainOptions, recipe: Recipe) -> int | None:
    """Batches that one-shot quantization takes its ranges from: the flag's, else the recipe's number."""
    in_recipe = [modifier.num_calibration_steps for modifier in recipe.of(QuantizationModifier)]
    return options.num_calibration_steps or next((number for number in in_recipe if number), None)


def require_zeros(session: Session) -> None:
    """Raise InvariantError when a pruned weight is no longer zero."""
    revived = {name: count for name, count in check_masks(session.module).items() if count}
    if revived:
        name, count = next(iter(revived.items()))
        raise InvariantError(
            f"{count} pruned weights of {name} are no longer zero ({len(revived)} layers in all, rank "
            f"{session.accelerator.process_index}); this must not happen: please report it"
        )


@torch.no_grad()
def apply_once(run: Run) -> None:
    """`--one_shot`: let the recipe's end state hold at once, with ranges from calibration batches instead of training."""
    session, options = run.session, run.options
    session.module.eval()
    end = Clock(max(1, round((session.recipe.num_epochs or 0) + 1)), 1)
    session.recipe.on_step_start(session, end)
    batches = _calibration_batches(run, calibration_steps(options, session.recipe) or 1)
    with calibrating(session.module):
        for done, micro_batch in enumerate(batches, start=1):
            session.module(**session.student_inputs(micro_batch.inputs))
            end_step(session.module, session.reduce_max)
            run.screen.step(done, "calibrating")
    require_zeros(session)


def _calibration_batches(run: Run, count: int) -> Any:
    loader = run.session.loader
    micro_batches = (
        batch for step in loader.steps(run.state.clock, loader.steps_per_epoch) for batch in step if batch.num_units
    )
    return [batch for _, batch in zip(range(count), micro_batches, strict=False)]
