"""Freed memory is kept, where the C library can do that."""

import ctypes
import platform
import subprocess
import sys
from typing import Any

import pytest

from sparseinst.engine.memory import keep_freed_memory

PROGRAM = """
import resource
from sparseinst.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(100 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(int, ended.stdout.split())
    assert before > 200, "a large block is mapped, and cleared, each time (in pages that may be huge)"
    assert after < 50


def test_other_c_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: Any) -> object:
        return object()

    monkeypatch.setattr(ctypes, "CDLL", without)
    assert not keep_freed_memory()
