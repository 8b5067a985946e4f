"""The beginning of Python code that a test runs in a process of its own, to kill it there."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELUDE = f"""
import os, resource, signal, sys, threading
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import child_process, conftest, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(conftest.CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
"""


class Deadly(list):
    """A log whose process is killed at a step, once the checkpoints before it are on the disk."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def append(self, row):
        if row["step"] == self.step:
            # Tiny steps are over before the disk is.
            [one.join() for one in threading.enumerate() if one.name.startswith("write checkpoint")]
            os.kill(os.getpid(), signal.SIGKILL)
        super().append(row)


def run(script: str, *given) -> subprocess.CompletedProcess:
    """Python code in a process of its own, to its end."""
    command = [sys.executable, "-c", script, *map(str, given)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
