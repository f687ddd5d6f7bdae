"""The job scripts, run for real with stand-ins for the cluster: what `accelerate` is given on each machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "launch_configs" / "slurm.sbatch"
KUBERNETES = ROOT / "launch_configs" / "kubernetes.yaml"

# srun starts its words once per machine, each with its own SLURM_NODEID, and forwards signals to them.
SRUN = r"""#!/bin/bash
printf '%s\n' "$@" > "$DESK/srun.argv"
while [[ $1 == --* ]]; do shift; done
pids=()
trap 'echo TERM >> "$DESK/srun.signals"; kill -TERM "${pids[@]}"' TERM
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do
  while true; do wait "$pid" && code=0 || code=$?; kill -0 "$pid" 2>/dev/null || break; done
  ((code == 0)) || status=$code
done
exit $status
"""
SCONTROL = r"""#!/bin/bash
printf '%s\n' "$*" >> "$DESK/scontrol.calls"
[[ $1 != show ]] || printf 'node-a\nnode-b\n'
"""
ACCELERATE = r"""#!/bin/bash
rank=${SLURM_NODEID:-$JOB_COMPLETION_INDEX}
printf '%s\n' "$@" > "$DESK/accelerate.$rank.argv"
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$DESK/shutdown_timeout"
[[ -z ${RUNS_UNTIL_TOLD:-} ]] || {
  trap 'mkdir -p out; echo "{}" > out/preempted.json; exit 1' TERM
  touch "$DESK/started.$rank"
  while true; do sleep 0.05; done
}
exit "${EXIT_CODE:-0}"
"""


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the stand-ins on a path of their own and the virtual environment that the script enters."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    return tmp_path


def job(desk: Path, **environ: str) -> subprocess.Popen[str]:
    """The batch script, as SLURM starts it on the first of two machines with four GPUs each."""
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
    }
    return subprocess.Popen(
        ["bash", str(SLURM)],
        cwd=desk,
        env={"PATH": f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}", "DESK": str(desk), **slurm, **environ},
        stderr=subprocess.PIPE,
        text=True,
    )


def argv(desk: Path, node: int) -> list[str]:
    return (desk / f"accelerate.{node}.argv").read_text().splitlines()


def calls(desk: Path) -> list[str]:
    return (desk / "scontrol.calls").read_text().splitlines()


def test_the_batch_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


@pytest.mark.parametrize("node", [0, 1])
def test_each_machine_gets_one_launcher_with_its_own_number(desk: Path, node: int) -> None:
    process = job(desk)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    words = argv(desk, node)
    assert words[: words.index("train") + 2] == [
        *("launch", "--machine_rank", str(node)),
        *("--config_file", "launch_configs/multi_node_fsdp2.yaml"),
        *("--num_machines", "2", "--num_processes", "8"),
        *("--main_process_ip", "node-a", "--main_process_port", "23456"),
        *("-m", "sparse_accel", "train", "question_answering"),
    ]
    assert words[-2:] == ["--output_dir", "out"]
    assert (desk / "srun.argv").read_text().splitlines()[:2] == ["--cpus-per-task=32", "--kill-on-bad-exit=1"]
    assert int((desk / "shutdown_timeout").read_text()) > 30


def test_a_job_that_ends_is_not_queued_again_though_an_old_marker_lay_there(desk: Path) -> None:
    (desk / "out").mkdir()
    (desk / "out" / "preempted.json").write_text("{}")
    process = job(desk)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert calls(desk) == ["show hostnames node-[a-b]"]


def test_a_job_that_fails_is_not_queued_again_and_keeps_its_exit_code(desk: Path) -> None:
    process = job(desk, EXIT_CODE="3")
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert calls(desk) == ["show hostnames node-[a-b]"]


def test_a_job_that_is_told_to_stop_lets_the_training_save_and_is_queued_again(desk: Path) -> None:
    process = job(desk, RUNS_UNTIL_TOLD="1")
    deadline = time.monotonic() + 60
    while len(list(desk.glob("started.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (desk / "srun.signals").read_text() == "TERM\n"
    assert calls(desk) == ["show hostnames node-[a-b]", "requeue 123456"]
    assert process.returncode == 1
    assert "queued again" in err


def test_the_batch_script_asks_for_the_signal_in_time_to_save(desk: Path) -> None:
    text = SLURM.read_text("utf-8")
    (told,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE)
    (allowed,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.MULTILINE)
    assert int(told) > int(allowed)
    assert "\n#SBATCH --requeue\n" in text
    assert "\n#SBATCH --ntasks-per-node=1\n" in text
    # sbatch reads no more options below the first command.
    assert text.rindex("\n#SBATCH") < text.index("\nset -euo pipefail")


@pytest.mark.parametrize("node", [0, 1])
def test_a_pod_starts_the_same_launcher(desk: Path, node: int) -> None:
    _, spec = yaml.safe_load_all(KUBERNETES.read_text("utf-8"))
    (container,) = spec["spec"]["template"]["spec"]["containers"]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    subprocess.run(
        [*container["command"], *container["args"]],
        cwd=desk,
        env={
            "PATH": f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "DESK": str(desk),
            "JOB_COMPLETION_INDEX": str(node),
            **environ,
        },
        check=True,
    )
    words = argv(desk, node)
    assert words[: words.index("train") + 2] == [
        *("launch", "--machine_rank", str(node), "--num_machines", "2", "--num_processes", "16"),
        *("--main_process_ip", "sparse-accel-0.sparse-accel", "--main_process_port", "29500"),
        *("--config_file=launch_configs/multi_node_fsdp2.yaml", "-m", "sparse_accel", "train", "question_answering"),
    ]


@pytest.mark.parametrize("path", [SLURM, KUBERNETES], ids=lambda path: path.stem)
def test_accelerate_parses_what_it_is_given(desk: Path, path: Path) -> None:
    """Its own parser, on the words of the first machine."""
    if path == SLURM:
        job(desk).communicate(timeout=60)
    else:
        test_a_pod_starts_the_same_launcher(desk, 0)
    program = (
        "import json, sys\n"
        "from accelerate.commands.launch import launch_command_parser\n"
        "args = launch_command_parser().parse_args(sys.argv[1:])\n"
        "print(json.dumps([args.machine_rank, args.module, args.training_script, args.training_script_args[:2]]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, *argv(desk, 0)[1:]], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout) == [0, True, "sparse_accel", ["train", "question_answering"]]


def test_the_page_on_clusters_explains_every_variable_that_the_scripts_read() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text("utf-8")
    read = set(
        re.findall(
            r"\b(?:SLURM_\w+|JOB_COMPLETION_INDEX|TORCH_ELASTIC_\w+)", SLURM.read_text() + KUBERNETES.read_text()
        )
    )
    assert len(read) >= 6
    assert {name for name in read if f"`{name}`" not in page} == set()
