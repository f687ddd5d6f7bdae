"""Flags of SparseML's and the Hugging Face Trainer's commands that are not offered here: why, and what to use
instead."""

from __future__ import annotations

from typing import Final, NamedTuple


class Refusal(NamedTuple):
    """`reason` completes "--name: ..."; `harmless` are the values (in lower case) that ask for what happens anyway."""

    reason: str
    harmless: tuple[str, ...] = ()


_OFF: Final = ("false", "no", "f", "n", "0", "none", "")
_ON: Final = ("true", "yes", "t", "y", "1")

_HUB: Final = Refusal(
    "nothing is pushed to the hub; OUTPUT_DIR is a plain model folder, upload it with `hf upload NAME OUTPUT_DIR`",
    _OFF,
)
_LAUNCH: Final = Refusal(
    "how a run is spread over devices is the launcher's business: `accelerate launch --config_file FILE"
    " sparse_accel train"
    " ...` with a config that `accelerate config` writes",
    _OFF,
)
_DDP: Final = Refusal(
    "DistributedDataParallel is set up by the program to suit masks and quantizers; leave it out", _OFF
)
_TPU: Final = Refusal("TPUs are not supported", (*_OFF, "-1"))
_GENERATION: Final = Refusal("it belongs to SparseML's text_generation command, which is not offered", _OFF)
_LOADER: Final = Refusal("the loader's other settings are fixed; --dataloader_num_workers is the one to turn", _OFF)
_COMPILE: Final = Refusal("--compile compiles in the one way that is offered; leave this out", _OFF)
_CONSOLE: Final = Refusal(
    "there is one level of log lines, always from the main process; --logging_strategy and --logging_steps say how"
    " many",
    ("passive", "info", *_OFF),
)


def _renamed(name: str) -> Refusal:
    return Refusal(f"it has long been called --{name}; use that")


REFUSED_FLAGS: Final[dict[str, Refusal]] = {
    # old names of Hugging Face's
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size"),
    "evaluate_during_training": _renamed("eval_strategy steps"),
    "save_checkpoints_steps": _renamed("save_steps"),
    "output_path": _renamed("output_dir"),
    "model": _renamed("model_name_or_path"),
    "tokenizer": _renamed("tokenizer_name"),
    "dataset": _renamed("dataset_name"),
    "stop_epoch": _renamed("num_train_epochs"),
    # the model
    "trust_remote_code": Refusal(
        "no code from a model folder or the hub is run; use a model that transformers has itself", _OFF
    ),
    "use_fast_tokenizer": Refusal(
        "words and answers are found by character offsets, which only fast tokenizers give", _ON
    ),
    "token": Refusal(
        "a token on a command line ends up in logs; log in with `hf auth login` or set HF_TOKEN, then pass"
        " --use_auth_token"
    ),
    "use_teacher_tokenizer": Refusal("the teacher's tokenizer is used unless --tokenizer_name names another"),
    "low_cpu_mem_usage": Refusal("transformers loads models that way already; leave it out", _ON),
    "torch_dtype": Refusal("weights are kept in float32; use --bf16 for mixed precision", ("float32", "auto", *_OFF)),
    "precision": Refusal("weights are kept in float32; use --bf16 for mixed precision", ("full", "float32", "auto")),
    # the recipe
    "num_export_samples": Refusal(
        "sample inputs and outputs are written by the export of a model, not by training; leave it out here", _OFF
    ),
    "save_compressed": _GENERATION,
    "oneshot_device": _GENERATION,
    "do_oneshot": Refusal("it belongs to SparseML's text_generation command; here: --one_shot --do_train", _OFF),
    "run_stages": _GENERATION,
    "clear_sparse_session": _GENERATION,
    "num_calibration_samples": Refusal("use --num_calibration_steps, the number of batches"),
    "teacher_model": Refusal("use --distill_teacher"),
    "distill_hardness": Refusal(
        "it is the recipe's: --recipe_args '{\"distill_hardness\": ...}' where it is a variable"
    ),
    "distill_temperature": Refusal(
        "it is the recipe's: --recipe_args '{\"distill_temperature\": ...}' where it is a variable"
    ),
    "task": Refusal("the task is a word of the command, such as sparse_accel train question_answering"),
    # optimizer and schedule
    "optim_args": Refusal("optimizers run with --learning_rate, --weight_decay and the --adam_* flags only", _OFF),
    "optim_target_modules": Refusal("it belongs to optimizers that are not offered (GaLore and the like)", _OFF),
    "adafactor": Refusal("Adafactor is not offered; leave it out for AdamW", _OFF),
    "lr_scheduler_kwargs": Refusal(
        "write the course of the learning rate into a recipe (LearningRateFunctionModifier)", (*_OFF, "{}")
    ),
    "label_smoothing_factor": Refusal("losses are the plain ones of SparseML; leave it out", ("0", "0.0")),
    "neftune_noise_alpha": Refusal("noise on embeddings is not offered; leave it out", (*_OFF,)),
    "auto_find_batch_size": Refusal(
        "results may not depend on free memory; lower --per_device_train_batch_size and raise"
        " --gradient_accumulation_steps",
        _OFF,
    ),
    "average_tokens_across_devices": Refusal("the loss is normalised over all devices already; leave it out", _ON),
    "gradient_checkpointing_kwargs": Refusal(
        "--gradient_checkpointing alone is offered; it uses the non-reentrant kind", (*_OFF, "{}")
    ),
    "activation_checkpointing": Refusal("use --gradient_checkpointing", _OFF),
    "activation_checkpointing_kwargs": Refusal("use --gradient_checkpointing", (*_OFF, "{}")),
    "use_cache": Refusal("encoders have no key-value cache; leave it out", _OFF),
    "past_index": Refusal("it belongs to models with a memory of the past, which are not offered", ("-1",)),
    # evaluation and checkpoints
    "eval_accumulation_steps": Refusal("predictions leave the device after every batch already; leave it out", ("1",)),
    "prediction_loss_only": Refusal("scores need the predictions; leave it out", _OFF),
    "eval_on_start": Refusal("score the model before training in a run of its own, with --do_eval alone", _OFF),
    "eval_do_concat_batches": Refusal("predictions of all batches are put together; leave it out", _ON),
    "eval_use_gather_object": Refusal("predictions are tensors and gathered as such; leave it out", _OFF),
    "batch_eval_metrics": Refusal("scores need all predictions at once; leave it out", _OFF),
    "include_inputs_for_metrics": Refusal("metrics see the examples already; leave it out", _OFF),
    "include_for_metrics": Refusal("metrics see the examples already; leave it out", _OFF),
    "save_safetensors": Refusal("weights are always saved as safetensors", _ON),
    "save_only_model": Refusal(
        "checkpoints always hold what continuing takes; bound them with --save_total_limit", _OFF
    ),
    "save_on_each_node": Refusal("the output folder is shared between nodes", _OFF),
    "enable_jit_checkpoint": Refusal("use --save_steps", _OFF),
    "ignore_data_skip": Refusal("a continued run sees exactly the data that it would have seen; leave it out", _OFF),
    "restore_callback_states_from_checkpoint": Refusal("there are no callbacks", _OFF),
    "full_determinism": Refusal("runs on CPU repeat to the bit already; leave it out", _OFF),
    # logging
    "log_level": _CONSOLE,
    "log_level_replica": Refusal("only the main process prints", ("passive", "warning", *_OFF)),
    "log_on_each_node": Refusal("only the main process of the whole run prints", _OFF),
    "logging_nan_inf_filter": Refusal("a loss that is not finite ends the run; it is never filtered", _OFF),
    "include_num_input_tokens_seen": Refusal("tokens are not counted; leave it out", _OFF),
    "include_tokens_per_second": Refusal("throughput is given in samples and steps; leave it out", _OFF),
    "skip_memory_metrics": Refusal("memory is not traced", _ON),
    "project": Refusal("set the tracker's own variable (WANDB_PROJECT ...)", _OFF),
    "trackio_space_id": Refusal("set the tracker's own variable", _OFF),
    "trackio_bucket_id": Refusal("set the tracker's own variable", _OFF),
    "trackio_static_space_id": Refusal("set the tracker's own variable", _OFF),
    # the loader
    "remove_unused_columns": Refusal("only what the model reads is ever put into a batch; leave it out", _ON),
    "label_names": Refusal("the task knows its labels; leave it out", _OFF),
    "length_column_name": Refusal("--group_by_length measures the windows itself; leave it out", ("length",)),
    "train_sampling_strategy": Refusal("use --group_by_length; order is random otherwise", ("random",)),
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": Refusal("batches always come in order", _ON),
    # precision and machine
    "tf32": Refusal("set NVIDIA_TF32_OVERRIDE in the environment (0 turns it off)", ("none",)),
    "fp16_opt_level": Refusal("it belongs to NVIDIA's Apex, which is not used; --fp16 or --bf16 is enough"),
    "fp16_backend": Refusal(
        "torch's autocast is the only backend; leave it out", ("auto", "amp", "cpu_amp", "cuda_amp")
    ),
    "half_precision_backend": Refusal(
        "torch's autocast is the only backend; leave it out", ("auto", "amp", "cpu_amp", "cuda_amp")
    ),
    "use_ipex": Refusal("Intel's extension is not used; leave it out", _OFF),
    "use_mps_device": Refusal("a device is chosen by accelerate; leave it out", _OFF),
    "xpu_backend": _LAUNCH,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "torchdynamo": _COMPILE,
    "jit_mode_eval": _COMPILE,
    "use_liger_kernel": Refusal("its kernels would bypass masks and quantizers", _OFF),
    "liger_kernel_config": Refusal("its kernels would bypass masks and quantizers", _OFF),
    "torch_empty_cache_steps": Refusal("leave it out; PYTORCH_CUDA_ALLOC_CONF tunes the allocator", _OFF),
    "debug": Refusal("leave it out; `accelerate launch --debug` checks collectives", _OFF),
    "mp_parameters": _LAUNCH,
    "sharded_ddp": _LAUNCH,
    "fsdp": _LAUNCH,
    "fsdp_config": _LAUNCH,
    "fsdp_min_num_params": _LAUNCH,
    "fsdp_transformer_layer_cls_to_wrap": _LAUNCH,
    "deepspeed": _LAUNCH,
    "accelerator_config": _LAUNCH,
    "parallelism_config": _LAUNCH,
    "split_batches": _LAUNCH,
    "num_processes": Refusal(
        "it is the launcher's: put it before the program, `accelerate launch --num_processes N ...`"
    ),
    "mixed_precision": Refusal("use --bf16 or --fp16, or the launcher's own --mixed_precision before the program"),
    "multi_gpu": Refusal("it is the launcher's: put it before the program, `accelerate launch --multi_gpu ...`"),
    "cpu": Refusal("use --use_cpu"),
    "ddp_backend": Refusal("the backend follows the device: NCCL for GPUs, gloo for CPUs"),
    "ddp_bucket_cap_mb": _DDP,
    "ddp_find_unused_parameters": _DDP,
    "ddp_broadcast_buffers": _DDP,
    "ddp_static_graph": _DDP,
    "tpu_num_cores": _TPU,
    "tpu_metrics_debug": _TPU,
    # the hub
    "push_to_hub": _HUB,
    "push_to_hub_model_id": _HUB,
    "push_to_hub_organization": _HUB,
    "push_to_hub_token": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
    "hub_strategy": _HUB,
    "hub_private_repo": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
}

# What old launchers append to every process's command; accepted when it says the same as the environment.
LOCAL_RANK_FLAG: Final = "local_rank"


def refusal_message(flag: str, value: str, environ_local_rank: str | None) -> str | None:
    """Why `--flag value` is refused, or None when the value asks for what happens anyway. KeyError for a flag that is
    not in the table."""
    if flag == LOCAL_RANK_FLAG:
        if value in {"-1", environ_local_rank}:
            return None
        return (
            "--local_rank: the rank comes from the environment variable LOCAL_RANK, as torchrun and `accelerate"
            " launch` set"
            f" it (now: {environ_local_rank or 'not set'}); start with one of them"
        )
    refusal = REFUSED_FLAGS[flag]
    if value.strip().lower() in refusal.harmless:
        return None
    return f"--{flag}: not offered: {refusal.reason}"
