"""What this machine's memory holds, in bytes."""

import jax


def device_limit() -> int | None:
    """What JAX may take of the first device; None where the backend doesn't say (a CPU's)."""
    return _statistics().get("bytes_limit")


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


def _statistics() -> dict[str, int]:
    return jax.local_devices()[0].memory_stats() or {}


def _line(path: str, name: str) -> int:
    with open(path) as lines:
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
