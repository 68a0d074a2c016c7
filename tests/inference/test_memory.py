"""Check that a process keeps freed memory if its C library supports this."""

import ctypes
import platform
import subprocess
import sys
from typing import Any

import pytest

from sparseinst.inference.memory import keep_freed_memory

PROGRAM = """
import resource
from sparseinst.inference.memory import keep_freed_memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options of mallopt")
def test_freed_memory_is_kept() -> None:
    completed = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, after = map(int, completed.stdout.split())
    assert before > 200, "the system maps and clears a large block each time (a few huge pages may hold it)"
    assert after < 50, "the process reuses the block"


def test_other_c_libraries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: Any) -> object:
        return object()

    monkeypatch.setattr(ctypes, "CDLL", without)
    assert not keep_freed_memory()
