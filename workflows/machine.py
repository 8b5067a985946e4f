"""What this machine's memory holds, in bytes."""

import os
import shutil
import subprocess

import jax

# The GiB of host memory that XLA pins at most, read when it starts, and its own default.
PINNED, PINNED_DEFAULT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", 64


def device_limit() -> int | None:
    """What JAX may take of the first device; None where the backend doesn't say (a CPU's)."""
    return _statistics().get("bytes_limit")


def device_free() -> int | None:
    """What JAX can still take of the first device; None where the backend doesn't say.

    It is the rest of JAX's own share, or less where other processes hold part of that.
    """
    if (limit := device_limit()) is None:
        return None
    return left(limit, device_in_use(), _statistics().get("pool_bytes"), _gpu_free())


def left(limit: int, held: int, claimed: int | None, unclaimed: int | None) -> int:
    """Bytes for JAX, which may take `limit`, has `claimed` from the driver and holds `held` of it.

    `unclaimed` is what no process has; where either isn't known nobody else is taken to be there.
    """
    if claimed is None or unclaimed is None:
        return limit - held
    return min(limit, claimed + unclaimed) - held


def device_in_use() -> int:
    """Held on the first device now; 0 where the backend doesn't count."""
    return _statistics().get("bytes_in_use", 0)


def device_peak() -> int:
    """Held on the first device at this process' peak; 0 where the backend doesn't count."""
    return _statistics().get("peak_bytes_in_use", 0)


def peak() -> int:
    """The first device's peak so far; on a CPU that of this process (/proc/self/status)."""
    return device_peak() or _line("/proc/self/status", "VmHWM")


def host_free() -> int:
    """Host memory that is available (/proc/meminfo)."""
    return _line("/proc/meminfo", "MemAvailable")


def host_pinnable() -> int:
    """Host memory that a program on a GPU may take: available, and within what XLA pins at most."""
    return min(host_free(), int(os.environ.get(PINNED, PINNED_DEFAULT)) * 2**30)


def _gpu_free() -> int | None:
    """Bytes of the first visible GPU that no process holds, None where nvidia-smi doesn't say."""
    if shutil.which("nvidia-smi") is None:
        return None
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={which}", "--query-gpu=memory.free"]
    done = subprocess.run(
        [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True
    )
    told = done.stdout.strip()
    return int(told) * 2**20 if done.returncode == 0 and told.isdecimal() else None


def _statistics() -> dict[str, int]:
    return jax.local_devices()[0].memory_stats() or {}


def _line(path: str, name: str) -> int:
    with open(path) as lines:
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
