"""What every file of launch_configs/ promises: accelerate reads it as it is meant, and it says aloud what a run will do."""

from __future__ import annotations

import argparse
import logging
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from sparse_accel.runtime.deepspeed_launch import check_deepspeed, launch_environment
from sparse_accel.runtime.launch import check_accumulation, check_environment, gradient_clipping, mixed_precision

FOLDER = Path(__file__).resolve().parents[2] / "launch_configs"
JOBS = {"slurm.sbatch", "kubernetes.yaml"}
CONFIGS = sorted(path for path in FOLDER.iterdir() if path.name not in JOBS)
# What torchrun, which `accelerate launch` calls, adds for the first of the processes.
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
of_type = {
    kind: pytest.mark.parametrize(
        "path",
        [path for path in CONFIGS if f"distributed_type: {kind}" in path.read_text()],
        ids=lambda path: path.stem,
    )
    for kind in ("FSDP", "DEEPSPEED")
}


def launch_arguments(path: Path) -> argparse.Namespace:
    """What `accelerate launch --config_file path` works with."""
    words = ["--config_file", str(path), "--main_process_port", "0", "sparse_accel", "train"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    arguments.deepspeed_fields_from_accelerate_config = ""
    return arguments


def launched_environment(path: Path) -> dict[str, str]:
    """What `accelerate launch --config_file path` puts into the environment of its processes."""
    arguments = launch_arguments(path)
    with mock.patch.dict(os.environ, {"PATH": os.environ["PATH"]}, clear=True):
        if arguments.use_deepspeed:
            environ = prepare_deepspeed_cmd_env(arguments)[1]
        elif arguments.use_fsdp or arguments.multi_gpu:
            environ = prepare_multi_gpu_env(arguments)
        else:
            return prepare_simple_launcher_cmd_env(arguments)[1]
    return environ | TORCHRUN | {"WORLD_SIZE": str(arguments.num_processes)}


def test_the_cases_are_all_there() -> None:
    assert {path.name for path in FOLDER.iterdir()} >= JOBS
    assert [path.stem for path in CONFIGS] == sorted(
        "cpu single_gpu ddp fsdp2 zero1 zero2 zero3 zero3_offload multi_node_ddp multi_node_fsdp2 multi_node_zero3".split()
    )


@every_config
def test_accelerate_knows_every_key(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    known = {action.dest for action in launch_command_parser()._actions}
    nested = {**config.fsdp_config, **config.deepspeed_config}
    assert set(nested) <= known


@every_config
def test_the_header_names_command_precision_and_clipping(path: Path) -> None:
    text = path.read_text("utf-8")
    header = text[: text.index("\ncompute_environment:")]
    assert f"--config_file launch_configs/{path.name} " in header
    assert "\n# Precision: " in header and "--bf16" in header
    assert "\n# Gradient clipping: --max_grad_norm" in header
    assert header.startswith("# ") and header.splitlines()[0].endswith(".")
    assert max(map(len, text.splitlines())) <= 122


@every_config
def test_its_numbers_go_together(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert config.machine_rank == 0
    assert (config.num_machines > 1) == path.stem.startswith("multi_node_")
    assert (config.main_process_ip is not None) == (config.num_machines > 1)
    assert (config.num_processes > 1) == (path.stem not in ("cpu", "single_gpu"))
    assert config.use_cpu == (path.stem == "cpu")


@every_config
def test_what_is_launched_leaves_the_step_to_the_flags_and_passes_the_checks(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        environ = launched_environment(path)
    assert not [record for record in caplog.records if "num_cpu_threads" not in record.getMessage()]
    check_environment(environ, has_gpu=lambda: True)
    assert launch_environment(environ, {}) == environ
    device = "cpu" if path.stem == "cpu" else "cuda"
    for precision in ("no", "bf16", "fp16") if "--fp16" in path.read_text("utf-8") else ("no", "bf16"):
        if "zero" in path.stem:
            check_deepspeed(environ, {}, precision)
        flags = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
        assert mixed_precision(environ, **flags, device_type=device) == precision
    check_accumulation(environ, 3)
    assert gradient_clipping(environ, 0.3, is_explicit=True) == 0.3


@of_type["FSDP"]
def test_fsdp_is_the_second_version_as_its_plugin_reads_it(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.dict(os.environ, launched_environment(path), clear=True), caplog.at_level(logging.WARNING):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.activation_checkpointing is False
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not [record for record in caplog.records if "deprecation" in record.getMessage()]


@of_type["DEEPSPEED"]
def test_deepspeed_takes_clipping_and_accumulation_from_the_flags(path: Path) -> None:
    with mock.patch.dict(os.environ, launched_environment(path), clear=True):
        plugin = DeepSpeedPlugin()
    settings = plugin.deepspeed_config
    stage = int(re.findall(r"zero(\d)", path.stem)[0])
    assert settings["gradient_clipping"] == "auto"
    assert settings["gradient_accumulation_steps"] == "auto"
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == ("cpu" if "offload" in path.stem else "none")
    assert settings["zero_optimization"]["offload_param"]["device"] == "none"
    assert plugin.zero3_init_flag is False
    # `auto` would reach Accelerator as well, which calls int() on it.
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in launched_environment(path)


@of_type["DEEPSPEED"]
def test_deepspeed_on_several_machines_starts_as_torchrun_does(path: Path) -> None:
    arguments = launch_arguments(path)
    if arguments.num_machines > 1:
        assert arguments.deepspeed_multinode_launcher == "standard"
        assert prepare_deepspeed_cmd_env(arguments)[0] is None  # no command of DeepSpeed's own launcher
        assert arguments.nproc_per_node == "8"


def test_a_key_that_accelerate_does_not_know_would_be_found() -> None:
    known = {action.dest for action in launch_command_parser()._actions}
    assert "fsdp_version" in known and "zero_stage" in known
    assert "fsdp_versions" not in known


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


def test_the_kubernetes_job_is_one_pod_per_machine() -> None:
    service, job = _documents("kubernetes.yaml")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environ["NUM_MACHINES"])
    assert int(environ["GPUS_PER_MACHINE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["terminationGracePeriodSeconds"] > int(environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 30
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--main_process_ip {first} " in container["command"][2]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_job_script_is_changed_in_two_places_and_starts_a_shipped_configuration(name: str) -> None:
    text = (FOLDER / name).read_text("utf-8")
    assert re.findall(r"---- CHANGE (\d) of 2: ", text) == ["1", "2"]
    (config,) = set(re.findall(r"launch_configs/(\w+)\.yaml", text)) - {"kubernetes"}
    assert (FOLDER / f"{config}.yaml").is_file()
    assert "Precision and gradient clipping" in text


def test_the_page_on_clusters_lists_every_configuration_and_names_no_other() -> None:
    page = (FOLDER.parent / "docs" / "distributed.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)\.yaml` \|", page, re.MULTILINE) == [
        *("cpu", "single_gpu", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"),
        *("multi_node_ddp", "multi_node_fsdp2", "multi_node_zero3"),
    ]
    named = set(re.findall(r"launch_configs/([\w.]+\w)", page))
    assert {name for name in named if not (FOLDER / name).is_file()} == set()


def test_the_page_on_clusters_says_what_needs_deepspeed() -> None:
    page = (FOLDER.parent / "docs" / "distributed.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)\.yaml` \|.*\| ([^|]*)\|$", page, re.MULTILINE))
    for path in CONFIGS:
        is_deepspeed = "distributed_type: DEEPSPEED" in path.read_text("utf-8")
        assert ("DeepSpeed" in rows[path.stem]) == is_deepspeed
