"""The beginning of Python code that a test runs in a process of its own, to kill it there."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELUDE = f"""
import os, resource, signal, sys, threading
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import conftest, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(conftest.CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
"""
