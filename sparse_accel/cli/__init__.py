"""The program `sparse_accel`: runs a command and turns what goes wrong into one message and an exit code.

Exit codes: 0 done, 1 a fault of the program (with a traceback), 2 bad input or usage, 3 a broken promise of training,
130 interrupted. Imports nothing heavy, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from sparse_accel.errors import SparseAccelError
from sparse_accel.runtime.launch import process_rank, requested_world_size

# How long another rank than the first holds back its message: the first rank most often meets the same error, prints
# it, and its end makes the launcher end the others.
_SECONDS_FOR_THE_FIRST_RANK = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` when left out) and return the exit code. Several processes: a failing one does
    not return but leaves at once, since waiting for others in exit handlers could keep the whole run alive."""
    rank = process_rank(os.environ)
    several = (requested_world_size(os.environ) or 1) > 1
    if several and rank != 0:
        _silence()
    code = _run(list(sys.argv[1:] if argv is None else argv), rank)
    if code != 0 and several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _silence() -> None:
    """Only the main process prints: on the others nothing reaches standard output and no library warns. What goes wrong
    is still said, on standard error."""
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    warnings.simplefilter("ignore")


def _run(argv: list[str], rank: int) -> int:
    from sparse_accel.cli.program import UsageError, run_command

    try:
        return run_command(argv, speaks=rank == 0)
    except SparseAccelError as error:
        return _fail(str(error), error.exit_code, rank)
    except UsageError as error:
        return _fail(error.format_message(), 2, rank)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, rank)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`); keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        return _fail(traceback.format_exc().rstrip(), 1, rank)


def _fail(message: str, code: int, rank: int) -> int:
    prefix = "" if code in (1, 130) else "error: "
    if rank != 0:
        time.sleep(_SECONDS_FOR_THE_FIRST_RANK)
        prefix = f"[rank {rank}] {prefix}"
    print(f"{prefix}{message}", file=sys.stderr, flush=True)
    return code
