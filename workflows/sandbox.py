"""Python programs that a model wrote, run where they can do little harm. Linux only.

A program runs in a fresh `python -I` in an empty folder with an empty environment and a session of
its own. The kernel's seccomp filter (`lockdown.py`) lets it compute, start threads, import what is
installed, read files and write to its standard output and error; sockets, new processes and
programs, signals, tracing, changed limits and every change of the file system fail with
PermissionError. Time, memory, open files and output are limited.

What it does not protect from: what you may read can be read, files and your other processes'
memory in /proc alike (and printed, which only the reward sees), so keep secrets from the user who
trains; a bug of the kernel; what the processor leaks. It is no container: run it as a user with few
rights, not as root. `asyncio`, which needs sockets, does not run. Programs may use all cores for as
long as their time lasts.
"""

import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

from workflows import lockdown

MiB = 2**20
TIME = "time"  # the status of a program that ran out of it


class Result(NamedTuple):
    """What a program left."""

    out: str  # cut at `output_bytes`, like `error`; bytes that are no UTF-8 are replaced
    error: str
    status: str  # "ok", "exit 1", "signal SIGSEGV" or "time"


def run(
    code: str,
    stdin: str = "",
    *,
    seconds: float | int = 5,
    memory_bytes: int = 512 * MiB,
    output_bytes: int = MiB,
) -> Result:
    """Runs a Python program to its end, or kills it after `seconds` of wall-clock or CPU time.

    `memory_bytes` bounds its address space: what it asks for beyond raises MemoryError there; what
    it writes beyond `output_bytes` raises OSError there. Its own errors are in the result.
    Raises RuntimeError where the machine has no seccomp (macOS, other processors, old kernels) and
    ValueError for limits that are not positive: nothing runs unprotected.
    """
    reason = lockdown.refused(platform.system(), platform.machine())
    if reason is not None:
        raise RuntimeError(reason)
    for name, given in (
        ("seconds", seconds), ("memory_bytes", memory_bytes), ("output_bytes", output_bytes)
    ):  # fmt: skip
        if not (given > 0 and math.isfinite(given)):
            raise ValueError(f"{name}={given!r} must be positive")
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as program,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as error,
    ):
        for file, text in ((program, code), (given, stdin)):
            file.write(text.encode("utf-8", "surrogatepass"))
            file.seek(0)
        limits = math.ceil(seconds), int(memory_bytes), int(output_bytes)
        status = _run(folder, program, (given, out, error), seconds, limits)
        return Result(_text(out, output_bytes), _text(error, output_bytes), status)


def _run(
    folder: str,
    program: IO,
    streams: tuple[IO, IO, IO],
    seconds: float | int,
    limits: tuple[int, ...],
) -> str:
    reading, writing = os.pipe()
    numbers = program.fileno(), writing
    command = [sys.executable, "-I", "-B", "-X", "utf8", str(Path(lockdown.__file__).resolve())]
    command += [str(x) for x in (*numbers, *limits)]
    # Output files bounded by RLIMIT_FSIZE need no reader and can't block.
    given, out, error = streams
    with open(reading, "rb") as locked:
        try:
            process = subprocess.Popen(
                command, stdin=given, stdout=out, stderr=error, cwd=folder, env={},
                pass_fds=numbers, start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writing)
        in_time = _ended(process, seconds)
        began = locked.read() == lockdown.LOCKED
    if not in_time:
        return TIME
    if not began:
        raise RuntimeError(f"the sandbox did not close, so no code was run: {_text(error, 2000)}")
    return _status(process.returncode)


def _ended(process: subprocess.Popen, seconds: float | int) -> bool:
    """Whether it ended by itself; it has ended after this, whatever came."""
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _status(code: int) -> str:
    if code == -signal.SIGXCPU:
        return TIME
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit {code}" if code else "ok"


def _text(file: IO, most: int) -> str:
    file.seek(0)
    return file.read(int(most)).decode("utf-8", "replace")
