"""Scripts in a process of their own, and memory: how much is free, and how much a process took."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

#: A Python expression for the peak memory of its process in KiB. Not ru_maxrss, which starts at the parent's.
PEAK_KIB = r"int(__import__('re').search(r'VmHWM:\s+(\d+) kB', open('/proc/self/status').read())[1])"
needs_peak_memory = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="no /proc/self/status to read the memory from"
)


def run_script(
    script: str, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process, in a folder where the source tree does not shadow the installed package."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def free_memory() -> int:
    """Bytes that are available; half of all memory where the system does not tell."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
