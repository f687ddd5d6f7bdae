"""Starting the program for real: four ways, one process and two, and launches that would silently do otherwise."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
LIMIT = 240.0  # seconds: a machine that is busy takes ten times as long as an idle one

SCRIPT = [str(SCRIPTS / "sparse_accel")]
MODULE = [sys.executable, "-m", "sparse_accel"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
TWO = ["--multi_gpu", "--num_processes", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

needs_script = pytest.mark.skipif(not Path(SCRIPT[0]).is_file(), reason="the package is not installed here")
needs_no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def run(command: list[str], **environ: str) -> Ended:
    """Run a command from the root of the checkout; it and all that it started are killed at the limit."""
    launchers = ("ACCELERATE_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_", "FSDP_", "TORCHELASTIC", "PYTHONWARNINGS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(command)} was still running after {LIMIT:.0f} s\n{out[-2000:]}\n{err[-4000:]}")
    return Ended(process.returncode, out, err)


def training_words(model: Path, train_file: Path, output: Path) -> list[str]:
    """The words of a training of one optimizer step."""
    return [
        *("train", "question_answering", "--do_train", "--model_name_or_path", str(model)),
        *("--train_file", str(train_file), "--output_dir", str(output)),
        *("--max_seq_length", "96", "--doc_stride", "16", "--max_steps", "1", "--save_strategy", "no"),
    ]


@pytest.fixture
def training(tiny_student: Path, tiny_train: Path, tmp_path: Path) -> list[str]:
    """Training words whose output folder is `tmp_path/out`."""
    return training_words(tiny_student, tiny_train, tmp_path / "out")


@pytest.fixture(scope="module")
def started_as_module(
    tiny_student: Path, tiny_train: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The weights that `python -m sparse_accel` trains."""
    output = tmp_path_factory.mktemp("module") / "out"
    words = training_words(tiny_student, tiny_train, output)
    ended = run([*MODULE, *words, "--per_device_train_batch_size", "16"], ACCELERATE_USE_CPU="1")
    assert ended.code == 0, ended.err
    return weights(output)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# The default run starts the README's commands, which are these ways and those of two processes: tests/test_readme.py.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(SCRIPT, id="script", marks=needs_script),
        pytest.param([*LAUNCH, "sparse_accel"], id="launch folder"),
        pytest.param([*LAUNCH, "-m", "sparse_accel"], id="launch module"),
    ],
)
def test_every_way_of_starting_trains_the_model_that_the_module_does(
    start: list[str], training: list[str], started_as_module: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ended = run([*start, *training, "--per_device_train_batch_size", "16"], ACCELERATE_USE_CPU="1")
    assert ended.code == 0, ended.err
    trained = weights(tmp_path / "out")
    assert trained.keys() == started_as_module.keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in started_as_module.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("start", "environ"),
    [
        pytest.param([*LAUNCH, *TWO, "sparse_accel"], {"ACCELERATE_USE_CPU": "1"}, id="launch folder"),
        pytest.param([*LAUNCH, *TWO, "-m", "sparse_accel"], {"ACCELERATE_USE_CPU": "1"}, id="launch module"),
        pytest.param([*TORCHRUN, "-m", "sparse_accel"], {}, id="torchrun", marks=needs_no_gpu),
    ],
)
def test_two_processes_train_together_and_only_the_first_prints(
    start: list[str], environ: dict[str, str], training: list[str], tmp_path: Path
) -> None:
    ended = run([*start, *training, "--per_device_train_batch_size", "8"], **environ)
    assert ended.code == 0, ended.err
    assert weights(tmp_path / "out")
    assert ended.out.count("2 processes") == 1
    assert ended.out.count("written to") == 1


# The default run has each message once; test_launch_checks.py has it of every environment.
@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        pytest.param(["--cpu", "--num_processes", "2"], {}, "MASTER_ADDR is set but WORLD_SIZE is not", id="cpu"),
        pytest.param(
            [],
            {"MASTER_ADDR": "127.0.0.1"},
            "MASTER_ADDR is set but WORLD_SIZE is not",
            id="master_addr",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(TWO, {}, "but no GPU was found", id="multi_gpu", marks=needs_no_gpu),
        pytest.param(["--use_fsdp", "--num_processes", "2"], {}, "asks for FSDP", id="fsdp", marks=needs_no_gpu),
        pytest.param(
            ["--use_fsdp", "--num_processes", "2"],
            {"ACCELERATE_USE_CPU": "1"},
            "asks for FSDP",
            id="fsdp on cpu",
            marks=[needs_no_gpu, pytest.mark.exhaustive],
        ),
        pytest.param(
            ["--use_deepspeed", "--num_processes", "2"],
            {},
            "asks for DeepSpeed",
            id="deepspeed",
            marks=[needs_no_gpu, pytest.mark.deepspeed, pytest.mark.exhaustive],
        ),
        pytest.param(
            ["--use_deepspeed", "--num_processes", "2"],
            {"ACCELERATE_USE_CPU": "1"},
            "asks for DeepSpeed",
            id="deepspeed on cpu",
            marks=[needs_no_gpu, pytest.mark.deepspeed],
        ),
    ],
)
def test_a_launch_that_would_do_something_else_stops_and_writes_nothing(
    options: list[str], environ: dict[str, str], message: str, training: list[str], tmp_path: Path
) -> None:
    if "--use_deepspeed" in options:
        pytest.importorskip("deepspeed")
    ended = run([*LAUNCH, *options, "sparse_accel", *training], **environ)
    assert ended.code != 0
    assert ended.err.count(message) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "start", [pytest.param(SCRIPT, marks=needs_script, id="script"), pytest.param(MODULE, id="module")]
)
def test_bad_input_is_one_message_and_exit_code_2(start: list[str], training: list[str], tmp_path: Path) -> None:
    ended = run([*start, *training, "--learning_rate", "fast"])
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: --learning_rate: expected a finite number, got 'fast'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "start", [["sparse_accel"], pytest.param(["-m", "sparse_accel"], marks=pytest.mark.exhaustive)]
)
def test_two_processes_report_bad_input_once(start: list[str], training: list[str]) -> None:
    ended = run([*LAUNCH, *TWO, *start, *training, "--learning_rate", "fast"], ACCELERATE_USE_CPU="1")
    assert ended.code != 0
    assert ended.err.count("error: --learning_rate: expected a finite number, got 'fast'") == 1


def test_two_processes_print_help_once() -> None:
    ended = run([*LAUNCH, *TWO, "sparse_accel", "train", "qa", "--help"], ACCELERATE_USE_CPU="1")
    assert ended.code == 0
    assert ended.out.count("Usage: sparse_accel") == 1


def test_a_rank_that_fails_alone_ends_the_run_for_all_with_its_message(training: list[str], tmp_path: Path) -> None:
    """The second rank does not see the training file, as on a node without the disk; the first waits for it."""
    first = shlex.join([*MODULE, *training])
    second = shlex.join([*MODULE, *(word.replace("train.json", "absent.json") for word in training)])
    script = f'if [ "$RANK" = 1 ]; then exec {second}; fi; exec {first}'
    ended = run([*TORCHRUN, "--no-python", "bash", "-c", script], ACCELERATE_USE_CPU="1")
    assert ended.code != 0
    assert "[rank 1] error: --train_file: no such file" in ended.err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_interrupted_training_says_so_and_exits_with_130(training: list[str], tmp_path: Path) -> None:
    endless = [*training, "--max_steps", "-1", "--num_train_epochs", "100000"]
    process = subprocess.Popen(
        [*MODULE, *endless],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A test session in the background of a shell ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "out" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"


def test_the_folder_form_leaves_one_identity_to_every_module() -> None:
    """`python sparse_accel` puts the package's folder first on the path, where `cli` would be a module of its own."""
    script = (
        "import runpy, sys\n"
        "sys.argv = ['sparse_accel', '--version']\n"
        "try:\n    runpy.run_path('sparse_accel', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('sparse_accel.cli') is not None\n"
        "assert importlib.util.find_spec('cli') is None\n"
    )
    ended = run([sys.executable, "-c", script])
    assert ended.code == 0, ended.err
    assert ended.out.startswith("sparse_accel ")
