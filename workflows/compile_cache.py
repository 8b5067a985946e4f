"""Compiled programs kept on disk, so that a second process starts at once."""

import os
from pathlib import Path

import jax
from jax._src import xla_bridge

from workflows import plan
from workflows.keywords import say

FLAGS = "XLA_FLAGS"
# Excludes algorithms whose result depends on the order of additions, cuDNN's attention among them.
DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"


def compile_cache(
    folder: str | Path | None = None, max_size: int | str = "10GB", deterministic: bool = False
) -> Path:
    """Keeps every compiled program in `folder`, by default ~/.cache/unsloth_jax; returns it.

    Beyond `max_size` (bytes, or a text such as "10GB") the programs that were used longest ago go.
    XLA's choices of algorithms are kept beside them, so that later processes repeat them;
    `deterministic` also adds DETERMINISTIC to the environment's XLA_FLAGS: XLA then leaves out
    algorithms whose results vary from run to run, which may be slower.

    Raises RuntimeError once JAX has started its backend: the flags would have no effect, and
    programs compiled before would be missing.
    """
    bytes_ = plan.size(max_size)
    if xla_bridge.backends_are_initialized():
        raise RuntimeError(
            "compile_cache must be called before JAX is used: before the first array, "
            "jax.devices() and from_pretrained"
        )
    place = Path(folder).expanduser() if folder is not None else default()
    place.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", bytes_)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if deterministic and DETERMINISTIC not in os.environ.get(FLAGS, ""):
        os.environ[FLAGS] = f"{os.environ.get(FLAGS, '')} {DETERMINISTIC}".strip()
        say(f"{FLAGS} is now {os.environ[FLAGS]!r}")
    return place


def default() -> Path:
    """Where programs are kept where nothing else is said: below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unsloth_jax"
