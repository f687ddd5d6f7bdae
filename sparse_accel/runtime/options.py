"""The options of a training run: each one has its type, default, help and group here and nowhere else."""

from __future__ import annotations

import shlex
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Final

from sparse_accel.zoo.resolving import Resolution

# The groups in the order in which `--help` shows them.
GROUP_RUN: Final = "What to run"
GROUP_DATA: Final = "Data"
GROUP_ANSWERS: Final = "Questions and answers"
GROUP_LABELS: Final = "Columns and labels"
GROUP_MASKING: Final = "Text and masks"
GROUP_RECIPE: Final = "Recipe and teacher"
GROUP_MODEL: Final = "Model and tokenizer"
GROUP_OPTIMIZER: Final = "Batches, optimizer and schedule (a recipe wins where it speaks)"
GROUP_SAVING: Final = "Evaluation and checkpoints"
GROUP_LOGGING: Final = "Logging"
GROUP_MACHINE: Final = "Precision and machine"

STRATEGIES: Final = ("no", "steps", "epoch")

# `auto` and the ways of spreading a teacher that runtime/teachers has; repeated here because that needs torch.
TEACHER_PLACEMENTS: Final = ("auto", "replicated", "device_map", "fsdp2", "zero3")

# What --teacher_cache may be besides a folder.
TEACHER_CACHES: Final = ("auto", "off")

# Experiment trackers that accelerate knows -> the module whose presence shows that one is installed.
TRACKERS: Final = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}

QA: Final = "question_answering"
TEXT: Final = "text_classification"
TOKEN: Final = "token_classification"
MLM: Final = "masked_language_modeling"

# What an evaluation of each task reports, without the prefix `eval_`; the first is the default of
# `--metric_for_best_model`. Which of them a data set has depends on its labels.
METRICS: Final = {
    QA: ("f1", "exact_match"),
    TEXT: (
        "accuracy",
        "f1",
        "f1_macro",
        "f1_micro",
        "matthews_correlation",
        "pearson",
        "spearmanr",
        "mse",
        "combined_score",
        "loss",
    ),
    TOKEN: ("f1", "precision", "recall", "accuracy", "loss"),
    MLM: ("loss", "perplexity", "accuracy"),
}
LOWER_IS_BETTER: Final = frozenset({"loss", "perplexity", "mse"})
METRICS_WITH_NEGATIVES: Final = (
    "f1",
    "exact",
    "HasAns_f1",
    "HasAns_exact",
    "NoAns_f1",
    "NoAns_exact",
    "best_f1",
    "best_exact",
)

TRUE_WORDS: Final = frozenset({"true", "yes", "on", "t", "y", "1"})
FALSE_WORDS: Final = frozenset({"false", "no", "off", "f", "n", "0"})
BOOLEAN_WORDS: Final = TRUE_WORDS | FALSE_WORDS


def _option(
    help_text: str,
    group: str,
    default: Any = MISSING,
    *,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    shapes_weights: bool = True,
    tasks: tuple[str, ...] = (),
    task_defaults: Mapping[str, Any] | None = None,
) -> Any:
    """One field. `minimum` and `maximum` are allowed values, `above` and `below` are not; `shapes_weights` is False for
    an option that may change between a run and its continuation, because the trained weights do not depend on it.
    `tasks` are those that have the option, all of them where it is empty; `task_defaults` are what it is where a task
    differs from `default`."""
    metadata = {
        "help": help_text,
        "group": group,
        "aliases": aliases,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "shapes_weights": shapes_weights,
        "tasks": tasks,
        "task_defaults": task_defaults or {},
    }
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Everything that a training command says. Made by `load_options`, which also checks it."""

    task: str  # the command's own word (`train question_answering`)
    # The fields that the person set, so that a warning need not speak of a default. Every field below is a flag.
    explicit: frozenset[str] = field(default=frozenset(), compare=False)
    # The fields that were given as `zoo:` stubs: they hold what the stubs stand for, and what was typed is kept here.
    stubs: Mapping[str, Resolution] = field(default_factory=dict, compare=False)

    # ---- what to run
    output_dir: str = _option("Folder for the model, its checkpoints and results.", GROUP_RUN, shapes_weights=False)
    overwrite_output_dir: bool = _option(
        "Start anew in an output folder that holds an earlier run. Only files that such a run wrote are touched; without"
        " --do_train its model and checkpoints stay, and its scores are replaced by the new ones.",
        GROUP_RUN,
        False,
        shapes_weights=False,
    )
    do_train: bool = _option("Train.", GROUP_RUN, False, shapes_weights=False)
    do_eval: bool = _option(
        "Score the final model on the validation set. Any --eval_strategy but 'no' implies it.",
        GROUP_RUN,
        False,
        shapes_weights=False,
    )
    do_predict: bool = _option("Write predictions for the test set.", GROUP_RUN, False, shapes_weights=False)
    resume_from_checkpoint: str | bool | None = _option(
        "A checkpoint folder to continue from; True: the newest in --output_dir, which must hold one; False: never"
        " continue. Left out, an output folder with checkpoints of the same command is continued.",
        GROUP_RUN,
        None,
        shapes_weights=False,
    )
    reset_optimizer: bool = _option(
        "Continue from a checkpoint with a new optimizer: its weights, masks, ranges and place in time are kept.",
        GROUP_RUN,
        False,
        shapes_weights=False,
    )
    seed: int = _option("Seed of everything random.", GROUP_RUN, 42, minimum=0)
    data_seed: int | None = _option(
        "Seed of the order of the training data; --seed when left out.", GROUP_RUN, None, minimum=0
    )

    # ---- model and tokenizer
    model_name_or_path: str = _option(
        "Model folder, hub id or zoo: stub to start from, pruned already for sparse transfer.", GROUP_MODEL
    )
    config_name: str | None = _option("Another folder or hub id for the model's config.", GROUP_MODEL, None)
    tokenizer_name: str | None = _option(
        "Another folder or hub id for the tokenizer. Left out: the model's, else the teacher's.",
        GROUP_MODEL,
        None,
    )
    zoo: str | None = _option(
        "Your own catalogue of zoo: stubs, which may stand for models and recipes: a YAML file or a folder, several joined"
        " as in PATH. SPARSE_ACCEL_ZOO names one for all commands.",
        GROUP_MODEL,
        None,
        shapes_weights=False,
    )
    cache_dir: str | None = _option("Where downloads are kept.", GROUP_MODEL, None, shapes_weights=False)
    model_revision: str = _option("Revision of a model on the hub.", GROUP_MODEL, "main")
    use_auth_token: bool = _option(
        "Use the token of your hub login (`hf auth login` or HF_TOKEN).", GROUP_MODEL, False, shapes_weights=False
    )

    # ---- data
    dataset_name: str | None = _option("Data set on the hub, instead of files.", GROUP_DATA, None)
    dataset_config_name: str | None = _option("Configuration of --dataset_name.", GROUP_DATA, None)
    train_file: str | None = _option(
        "Training data: .json, .jsonl, .csv, .tsv or .parquet; also .conll to classify tokens, .txt for masked words.",
        GROUP_DATA,
        None,
    )
    validation_file: str | None = _option("Validation data.", GROUP_DATA, None, shapes_weights=False)
    test_file: str | None = _option("Test data for --do_predict.", GROUP_DATA, None, shapes_weights=False)
    max_train_samples: int | None = _option("Use only the first N training samples.", GROUP_DATA, None, minimum=1)
    max_eval_samples: int | None = _option(
        "Use only the first N validation samples.", GROUP_DATA, None, minimum=1, shapes_weights=False
    )
    max_predict_samples: int | None = _option(
        "Use only the first N test samples.", GROUP_DATA, None, minimum=1, shapes_weights=False
    )
    validation_split_percentage: int | None = _option(
        "Without validation data: hold this percentage of the training rows out for it, chosen by chance and the same each"
        " time.",
        GROUP_DATA,
        None,
        above=0,
        below=100,
        task_defaults={MLM: 5},
    )
    validation_ratio: float | None = _option(
        "The same as a share: 0.1 is 10 percent.", GROUP_DATA, None, above=0, below=1, tasks=(TEXT,)
    )
    streaming: bool = _option(
        "Read and tokenize while training, for data that does not fit in memory.", GROUP_DATA, False, tasks=(MLM,)
    )
    max_seq_length: int | None = _option(
        "Tokens of the longest feature; capped at what the model and its tokenizer can take.",
        GROUP_DATA,
        None,
        minimum=8,
        task_defaults={QA: 384, TEXT: 384},
    )
    pad_to_max_length: bool | None = _option(
        "True pads every window to --max_seq_length, as SparseML did: the same losses, since padding is masked out, only"
        " slower. Left out or False, nothing is padded beyond what --batching does (but as SparseML where"
        " --distill_include_padding or --observe_padding lets padding take part).",
        GROUP_DATA,
        None,
    )
    batching: str = _option(
        "How windows form batches. packed: end to end, without padding, batches of equally many windows and tokens; grouped:"
        " windows of similar length, padded to the longest; padded: at random, padded. A model that cannot be packed is"
        " grouped. Left out: packed, unless --pad_to_max_length, --group_by_length or padding that takes part say otherwise.",
        GROUP_DATA,
        "packed",
        choices=("packed", "grouped", "padded"),
    )
    group_by_length: bool = _option("The same as --batching grouped.", GROUP_DATA, False)
    on_bad_rows: str = _option(
        "A malformed row ends the run, or is skipped, counted and named.",
        GROUP_DATA,
        "error",
        choices=("error", "skip"),
    )
    overwrite_cache: bool = _option("Tokenize again, whatever is cached.", GROUP_DATA, False, shapes_weights=False)
    preprocessing_num_workers: int | None = _option(
        "Processes that tokenize.", GROUP_DATA, None, minimum=1, shapes_weights=False
    )
    dataloader_num_workers: int = _option(
        "Processes per rank that assemble batches; 0: none.", GROUP_DATA, 0, minimum=0, shapes_weights=False
    )
    dataloader_pin_memory: bool = _option(
        "Pin batches in host memory for faster copies to a GPU.", GROUP_DATA, True, shapes_weights=False
    )
    dataloader_drop_last: bool = _option("Leave out an epoch's last batch when it is not full.", GROUP_DATA, False)

    # ---- columns and labels
    task_name: str | None = _option(
        "text_classification: a task of GLUE, for its columns and metrics (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb,"
        " wnli). token_classification: the labels are in the column NAME_tags; ner when left out.",
        GROUP_LABELS,
        None,
        tasks=(TEXT, TOKEN),
        task_defaults={TOKEN: "ner"},
    )
    input_column_names: str | None = _option(
        "The column with the text, or two of them, separated by a comma. Left out: those of GLUE, else the first that are no"
        " label.",
        GROUP_LABELS,
        None,
        tasks=(TEXT,),
    )
    text_column_name: str | None = _option(
        "The column with the words (token_classification) or the text. Left out: tokens or text, else the first.",
        GROUP_LABELS,
        None,
        tasks=(TOKEN, MLM),
    )
    label_column_name: str | None = _option(
        "The column with the labels.", GROUP_LABELS, None, tasks=(TEXT, TOKEN), task_defaults={TEXT: "label"}
    )
    eval_on_test: bool = _option(
        "Score on the test data instead of the validation data.",
        GROUP_LABELS,
        False,
        tasks=(TEXT,),
        shapes_weights=False,
    )
    label_all_tokens: bool = _option(
        "Give every piece of a word its label, not the first piece alone.", GROUP_LABELS, False, tasks=(TOKEN,)
    )
    return_entity_level_metrics: bool = _option(
        "Precision, recall and F1 of each class of entities too.",
        GROUP_LABELS,
        False,
        tasks=(TOKEN,),
        shapes_weights=False,
    )

    # ---- text and masks
    dataset_name_2: str | None = _option("A second data set, put behind the first.", GROUP_MASKING, None, tasks=(MLM,))
    dataset_config_name_2: str | None = _option("Configuration of --dataset_name_2.", GROUP_MASKING, None, tasks=(MLM,))
    line_by_line: bool = _option(
        "Every line is a feature of its own; else all text is put together and cut into features of --max_seq_length.",
        GROUP_MASKING,
        False,
        tasks=(MLM,),
    )
    mlm_probability: float = _option(
        "Share of the tokens that the model must restore.", GROUP_MASKING, 0.15, above=0, below=1, tasks=(MLM,)
    )
    whole_word_mask: bool = _option(
        "Choose whole words, with all of their pieces, rather than single tokens.", GROUP_MASKING, False, tasks=(MLM,)
    )
    distill_top_k: int = _option(
        "Compare the student with the teacher's K likeliest tokens and all others together, to save memory; 0: with the whole"
        " vocabulary.",
        GROUP_MASKING,
        0,
        minimum=0,
        tasks=(MLM,),
    )
    model_type: str | None = _option(
        "Start from random weights of this architecture (bert, roberta, ...) instead of --model_name_or_path.",
        GROUP_MASKING,
        None,
        tasks=(MLM,),
    )
    config_overrides: str | None = _option(
        "With --model_type: values of its config, as hidden_size=128,num_hidden_layers=2.",
        GROUP_MASKING,
        None,
        tasks=(MLM,),
    )

    # ---- questions and answers
    question_column: str | None = _option(
        "The column with the questions. Left out: question, else the first.", GROUP_ANSWERS, None, tasks=(QA,)
    )
    context_column: str | None = _option(
        "The column with the passages. Left out: context, else the second.", GROUP_ANSWERS, None, tasks=(QA,)
    )
    answer_column: str | None = _option(
        "The column with the answers, each a text and its place. Left out: answers, else the third.",
        GROUP_ANSWERS,
        None,
        tasks=(QA,),
    )
    doc_stride: int = _option(
        "Tokens that neighbouring windows of a long passage share.", GROUP_ANSWERS, 128, minimum=0, tasks=(QA,)
    )
    version_2_with_negative: bool = _option(
        "Some questions have no answer (SQuAD v2).", GROUP_ANSWERS, False, tasks=(QA,)
    )
    null_score_diff_threshold: float = _option(
        "Answer with nothing when its score beats the best span's by more than this (SQuAD v2).",
        GROUP_ANSWERS,
        0.0,
        shapes_weights=False,
        tasks=(QA,),
    )
    n_best_size: int = _option(
        "Candidates kept per question in nbest_predictions.json.",
        GROUP_ANSWERS,
        20,
        minimum=1,
        shapes_weights=False,
        tasks=(QA,),
    )
    max_answer_length: int = _option(
        "Longest answer, in tokens.", GROUP_ANSWERS, 30, minimum=1, shapes_weights=False, tasks=(QA,)
    )

    # ---- recipe and teacher
    recipe: str | None = _option(
        "A SparseML recipe: .yaml, .yml or .md file, the name of a shipped one, a zoo: stub, or its text.",
        GROUP_RECIPE,
        None,
    )
    recipe_args: str | None = _option(
        "Values for the recipe's variables: a JSON object or k=v,k2=v2.", GROUP_RECIPE, None
    )
    distill_teacher: str | None = _option(
        "Teacher for the recipe's distillation: a model folder, hub id or zoo: stub, 'self' (a frozen copy of the model as"
        " loaded) or 'disable'.",
        GROUP_RECIPE,
        None,
    )
    teacher_placement: str = _option(
        "Where the teacher's weights are: whole on every process (replicated), in slices on all of them (fsdp2, or zero3 by"
        " DeepSpeed), or layer by layer on the devices of a single process (device_map). auto: the first that fits.",
        GROUP_RECIPE,
        "auto",
        choices=TEACHER_PLACEMENTS,
        shapes_weights=False,
    )
    teacher_cache: str = _option(
        "Ask the teacher once for every window and read its answers from a file in all epochs and later runs, without the"
        " teacher in memory. auto: below --cache_dir, where the recipe distils for more than an epoch or a file is there"
        " already; off: ask in every step; a folder: always, there.",
        GROUP_RECIPE,
        "auto",
        shapes_weights=False,
    )
    teacher_cache_dtype: str = _option(
        "How the teacher's answers are stored. auto: as they are computed, so that nothing is lost; float16 takes half the"
        " room of float32 and rounds.",
        GROUP_RECIPE,
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    distill_include_padding: bool = _option(
        "Let padding take part in the losses, the distillation's and the task's, as in SparseML's sums.",
        GROUP_RECIPE,
        False,
        tasks=(QA, TOKEN, MLM),
    )
    observe_padding: bool = _option(
        "Let padding take part in the activation ranges of quantization, as in SparseML.", GROUP_RECIPE, False
    )
    quantized_attention: str = _option(
        "How attention whose products the recipe quantizes is computed while training. products: scores and probabilities on"
        " their grids too, as SparseML places them; fused: only the products' operands and the context, so that fused"
        " attention can run; probabilities then have the fixed range 0 to 1, in evaluation and in what is exported.",
        GROUP_RECIPE,
        "products",
        choices=("products", "fused"),
    )
    one_shot: bool = _option(
        "Apply the recipe to the model as it is, without training. Needs --do_train.", GROUP_RECIPE, False
    )
    num_calibration_steps: int | None = _option(
        "With --one_shot: training batches from which quantization takes its ranges.", GROUP_RECIPE, None, minimum=1
    )
    check_sparsity_every: int = _option(
        "Optimizer steps between checks that pruned weights are still zero, that masks and ranges are the same on all"
        " processes and that the loss is finite; 0: only when saving and at the end.",
        GROUP_RECIPE,
        500,
        minimum=0,
        shapes_weights=False,
    )

    # ---- batches, optimizer, schedule
    per_device_train_batch_size: int = _option(
        "Windows per process in a training micro-batch.", GROUP_OPTIMIZER, 8, minimum=1
    )
    per_device_eval_batch_size: int = _option(
        "Windows per process in an evaluation batch.", GROUP_OPTIMIZER, 8, minimum=1, shapes_weights=False
    )
    gradient_accumulation_steps: int = _option("Micro-batches per optimizer step.", GROUP_OPTIMIZER, 1, minimum=1)
    num_train_epochs: float = _option("Epochs; may be fractional.", GROUP_OPTIMIZER, 3.0, above=0)
    max_steps: int = _option(
        "End the run early after this many optimizer steps; schedules keep their length. -1: never.",
        GROUP_OPTIMIZER,
        -1,
        minimum=-1,
        shapes_weights=False,
    )
    learning_rate: float = _option("Highest learning rate.", GROUP_OPTIMIZER, 5e-5, minimum=0)
    lr_scheduler_type: str = _option(
        "Course of the learning rate.",
        GROUP_OPTIMIZER,
        "linear",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup_ratio: float = _option(
        "Share of all steps in which the rate rises from 0.", GROUP_OPTIMIZER, 0.0, minimum=0, maximum=1
    )
    warmup_steps: int = _option("The same, in optimizer steps.", GROUP_OPTIMIZER, 0, minimum=0)
    optim: str = _option(
        "Optimizer; the fused AdamW is torch's quickest, on CPUs too.",
        GROUP_OPTIMIZER,
        "adamw_torch_fused",
        choices=("adamw_torch_fused", "adamw_torch", "sgd"),
    )
    weight_decay: float = _option(
        "Decoupled weight decay, of all but biases and norms.", GROUP_OPTIMIZER, 0.0, minimum=0
    )
    adam_beta1: float = _option("Decay of Adam's first moment.", GROUP_OPTIMIZER, 0.9, minimum=0, below=1)
    adam_beta2: float = _option("Decay of Adam's second moment.", GROUP_OPTIMIZER, 0.999, minimum=0, below=1)
    adam_epsilon: float = _option("Adam's epsilon.", GROUP_OPTIMIZER, 1e-8, minimum=0)
    max_grad_norm: float = _option("Clip the gradient to this norm; 0: never.", GROUP_OPTIMIZER, 1.0, minimum=0)
    gradient_checkpointing: bool = _option(
        "Recompute activations in backward: less memory, more time.", GROUP_OPTIMIZER, False, shapes_weights=False
    )

    # ---- evaluation and checkpoints
    eval_strategy: str = _option(
        "When to evaluate during training.",
        GROUP_SAVING,
        "no",
        aliases=("evaluation_strategy",),
        choices=STRATEGIES,
        shapes_weights=False,
    )
    eval_steps: int | None = _option(
        "Optimizer steps between evaluations; --logging_steps when left out.",
        GROUP_SAVING,
        None,
        minimum=1,
        shapes_weights=False,
    )
    eval_delay: float = _option(
        "Epochs (or steps, with --eval_strategy steps) before the first evaluation.",
        GROUP_SAVING,
        0.0,
        minimum=0,
        shapes_weights=False,
    )
    save_strategy: str = _option(
        "When to save a checkpoint.", GROUP_SAVING, "steps", choices=STRATEGIES, shapes_weights=False
    )
    save_steps: int = _option(
        "Optimizer steps between checkpoints.", GROUP_SAVING, 500, minimum=1, shapes_weights=False
    )
    save_total_limit: int | None = _option(
        "Keep only the newest N checkpoints, and the best one.", GROUP_SAVING, None, minimum=1, shapes_weights=False
    )
    async_checkpoints: bool = _option(
        "Write a checkpoint while training goes on, from a copy in the main process's host memory that is as large as the"
        " checkpoint; where that is not free, and with False, training waits.",
        GROUP_SAVING,
        True,
        shapes_weights=False,
    )
    load_best_model_at_end: bool = _option(
        "End with the best checkpoint rather than the last.", GROUP_SAVING, False, shapes_weights=False
    )
    metric_for_best_model: str | None = _option(
        "Score by which the best checkpoint is chosen, with or without the prefix eval_; left out, the first that the data"
        " has.",
        GROUP_SAVING,
        None,
        shapes_weights=False,
    )
    greater_is_better: bool | None = _option(
        "Whether more of that score is better; left out: False of loss, perplexity and mse, else True.",
        GROUP_SAVING,
        None,
        shapes_weights=False,
    )
    best_model_after_epoch: float | None = _option(
        "Only checkpoints after this epoch can be the best: the first ones of a recipe are not compressed yet.",
        GROUP_SAVING,
        None,
        minimum=0,
        shapes_weights=False,
    )

    # ---- logging
    logging_strategy: str = _option(
        "When to write a line of the log.", GROUP_LOGGING, "steps", choices=STRATEGIES, shapes_weights=False
    )
    logging_steps: int = _option("Optimizer steps between lines.", GROUP_LOGGING, 500, minimum=1, shapes_weights=False)
    logging_first_step: bool = _option("Log the first step too.", GROUP_LOGGING, False, shapes_weights=False)
    report_to: tuple[str, ...] = _option(
        "Trackers to report to besides our own log: one or several, 'all' that are installed, or 'none'.",
        GROUP_LOGGING,
        ("none",),
        choices=("none", "all", *TRACKERS),
        shapes_weights=False,
    )
    logging_dir: str | None = _option(
        "Folder for the trackers' files; OUTPUT_DIR/runs when left out.", GROUP_LOGGING, None, shapes_weights=False
    )
    run_name: str | None = _option(
        "Name of the run in the trackers; the output folder's when left out.", GROUP_LOGGING, None, shapes_weights=False
    )
    disable_tqdm: bool = _option("Plain lines instead of a progress bar.", GROUP_LOGGING, False, shapes_weights=False)

    # ---- precision and machine
    sparse_storage: str = _option(
        "How masked weights are stored while training. compact: only those that are kept, so that gradients, optimizer and"
        " checkpoints shrink with them; masked: all, with a mask. auto: compact where the zeros hold from the first step to"
        " the last and are half of a layer or more. The trained weights are the same.",
        GROUP_MACHINE,
        "auto",
        choices=("auto", "masked", "compact"),
        shapes_weights=False,
    )
    fp16: bool = _option("Mixed precision in float16; needs a GPU.", GROUP_MACHINE, False)
    bf16: bool = _option("Mixed precision in bfloat16.", GROUP_MACHINE, False)
    fp16_full_eval: bool = _option(
        "Evaluate in float16 even when training is not.", GROUP_MACHINE, False, shapes_weights=False
    )
    bf16_full_eval: bool = _option(
        "Evaluate in bfloat16 even when training is not.", GROUP_MACHINE, False, shapes_weights=False
    )
    use_cpu: bool = _option("Run on the CPU though there is a GPU.", GROUP_MACHINE, False, aliases=("no_cuda",))
    compile: bool = _option(
        "Compile the layers of the encoder with torch.compile, up to where quantization starts. Takes a minute or more before"
        " the first steps; needs a C++ compiler on a CPU; not with DeepSpeed. Not measured on a GPU yet.",
        GROUP_MACHINE,
        False,
        aliases=("torch_compile",),
    )
    ddp_timeout: int = _option(
        "Seconds that a process waits for the others before it gives up.",
        GROUP_MACHINE,
        1800,
        minimum=1,
        shapes_weights=False,
    )

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values; `load_options` reads the same mapping back from a file."""
        values = {name: self.typed(name) for name in ("task", *(entry.name for entry in flag_fields(self.task)))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def origin(self) -> str:
        """What training starts from, for people."""
        return self.typed("model_name_or_path") or f"a new {self.model_type} model"

    def typed(self, name: str) -> Any:
        """The value of a field as it was given: the `zoo:` stub, not what it stands for."""
        return self.stubs[name].stub if name in self.stubs else getattr(self, name)

    def identity(self) -> dict[str, Any]:
        """The options on which the trained weights depend, as JSON values: two runs with equal identities are the same
        run, so that one may continue the other's checkpoints."""
        shaping = {entry.name for entry in flag_fields(self.task) if entry.metadata["shapes_weights"]}
        given = {name: value for name, value in self.to_json().items() if name == "task" or name in shaping}
        # A catalogue may change between two runs. What a recipe says is compared anyway.
        models = {name: resolution.value for name, resolution in self.stubs.items() if name != "recipe"}
        return given | ({"zoo stubs stand for": models} if models else {})


def flag_fields(task: str | None = None) -> list[Field[Any]]:
    """The fields that are flags, in the order of the class; those of one task, if it is named."""
    flags = [entry for entry in fields(TrainOptions) if "help" in entry.metadata]
    return [entry for entry in flags if task is None or has_task(entry, task)]


def has_task(entry: Field[Any], task: str) -> bool:
    """Whether a task has the flag."""
    return not entry.metadata["tasks"] or task in entry.metadata["tasks"]


def default_of(entry: Field[Any], task: str) -> Any:
    """What a flag is where nobody says otherwise."""
    return entry.metadata["task_defaults"].get(task, entry.default)


def flag_names() -> dict[str, str]:
    """Every spelling of every flag (with `_`, without `--`) -> the field that it sets."""
    return {spelling: entry.name for entry in flag_fields() for spelling in (entry.name, *entry.metadata["aliases"])}


_HINTS: Final = typing.get_type_hints(TrainOptions)


def is_switch(entry: Field[Any]) -> bool:
    """Whether a flag is true or false (and may stand alone on a command line)."""
    return bool in value_kinds(entry) and str not in value_kinds(entry)


def kind_name(entry: Field[Any]) -> str:
    """The type of a flag's value in words, for `--help` and for errors."""
    kinds = value_kinds(entry)
    if entry.metadata["choices"]:
        return "|".join(entry.metadata["choices"])
    if kinds == {str, bool}:
        return "text|True|False"
    return {bool: "True|False", int: "integer", float: "number", str: "text"}[next(iter(kinds))]


def value_kinds(entry: Field[Any]) -> set[type]:
    """The plain types that a field takes besides None; a tuple counts as its items."""
    hint = _HINTS[entry.name]
    if typing.get_origin(hint) is tuple:
        return {str}
    if isinstance(hint, types.UnionType):
        return set(typing.get_args(hint)) - {types.NoneType}
    return {hint}


def describe_command(options: TrainOptions, program: str = "sparse_accel") -> str:
    """The shell command that gives these options: what was set or differs from the defaults, in the order of the
    class."""
    words = [program, "train", options.task]
    for entry in flag_fields(options.task):
        value = options.typed(entry.name)
        if value in (default_of(entry, options.task), "") and entry.name not in options.explicit:
            continue
        words.append(f"--{entry.name}")
        if value is True and is_switch(entry):
            continue
        words.extend([",".join(value)] if isinstance(value, tuple) else [str(value)])
    return shlex.join(words)
