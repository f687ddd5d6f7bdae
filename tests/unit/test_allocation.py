"""Freed memory is kept: a large block that is taken again and again costs its pages once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
from sparse_accel.runtime.allocation import keep_freed_memory
assert sys.argv[1] == "plain" or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytes(bytearray(48 << 20))  # two blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_large_blocks_are_not_given_back() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", PROBE, word], capture_output=True, text=True, check=True).stdout)
        for word in ("plain", "kept")
    )
    assert kept < plain / 10
