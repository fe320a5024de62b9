"""Peak memory in a process of its own: the heap of this one has seen too much."""

import subprocess
import sys

import pytest

from bolaco.work.memory import PeakMemory

SCRIPT = """
from bolaco.work.memory import PeakMemory, largest_resident
MIB = 2**20
block = bytearray(16 * MIB)
del block  # from now on glibc serves blocks of this size from the heap
blocks = [bytearray(MIB) for _ in range(200)]
last = blocks[-1]
del blocks
memory = PeakMemory()
before = memory.bytes()
more = b"x" * (50 * MIB)
print(before // MIB, memory.bytes() // MIB, largest_resident() // MIB)
"""


@pytest.mark.skipif(not PeakMemory().reset, reason="the mark of the largest memory cannot be reset here")
def test_what_was_freed_before_does_not_count() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, after, ever = map(int, done.stdout.split())
    assert before < ever - 100
    assert before + 45 <= after <= before + 60
