"""The inside of `workflows.sandbox`: limits, a seccomp filter, then the program. Linux only.

Run as a script by a fresh Python with two file descriptors and the limits in `argv`; the standard
library alone. The filter lists what is allowed: whatever it does not name fails with EPERM.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import types

LOCKED = b"locked"  # what the status pipe gets once nothing can be undone
OPEN_FILES = 32
DENIED_OPEN = 0o20003103  # write only, read and write, create, truncate, append, tmpfile
THREAD = 0x10000  # CLONE_THREAD
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # a terminal's state, sizes, flags
FCNTLS = (0, 1, 2, 3, 4, 1030)  # duplicates, close-on-exec, status flags; no owner, no lease

# (x86-64, aarch64); None where that processor has no such call.
PLAIN = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57),
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "pipe": (22, None), "pipe2": (293, 59),
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214), "futex": (202, 98), "set_robust_list": (273, 99),
    "rseq": (334, 293), "set_tid_address": (218, 96), "membarrier": (324, 283),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getgroups": (115, 158), "getpgid": (121, 155),
    "getpgrp": (111, None), "getsid": (124, 156), "getrandom": (318, 278), "uname": (63, 160),
    "sysinfo": (99, 179), "getrlimit": (97, 163), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None), "pause": (34, None),
    "restart_syscall": (219, 128), "arch_prctl": (158, None), "exit": (60, 93),
    "exit_group": (231, 94),
}  # fmt: skip
# Calls that one argument decides on.
OPEN, OPENAT, CLONE, CLONE3 = (2, None), (257, 56), (56, 220), (435, 435)
IOCTL, FCNTL, PRLIMIT64 = (16, 29), (72, 25), (302, 261)
PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH

# Of <linux/bpf_common.h> and <linux/seccomp.h>.
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def refused(system: str, processor: str) -> str | None:
    """Why there is no sandbox on such a machine; None where there is one."""
    if system != "Linux" or processor not in PROCESSORS:
        known = " and ".join(PROCESSORS)
        return f"running code needs Linux's seccomp on {known}, this is {system} on {processor}"
    return None


def instruction(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    """A struct sock_filter; `true` and `false` say how many instructions are jumped over."""
    return struct.pack("=HBBI", code, true, false, value)


def rules(processor: str) -> bytes:
    """The filter's program, in the kernel's BPF."""
    column, arch = PROCESSORS[processor]
    denied, unknown = FAIL | errno.EPERM, FAIL | errno.ENOSYS
    program = [
        instruction(LOAD, ARCH),
        instruction(EQUAL, arch, true=1),
        instruction(RETURN, KILL),
        instruction(LOAD, NUMBER),
    ]
    for numbers in PLAIN.values():
        program += _where(numbers[column], [instruction(RETURN, ALLOW)])
    for numbers, argument in ((OPEN, 1), (OPENAT, 2)):
        program += _where(numbers[column], _bits(argument, DENIED_OPEN, denied, ALLOW))
    program += _where(CLONE[column], _bits(0, THREAD, ALLOW, denied))
    # The C library then falls back to clone, whose flags a filter can see.
    program += _where(CLONE3[column], [instruction(RETURN, unknown)])
    program += _where(IOCTL[column], _one_of(1, IOCTLS, denied))
    program += _where(FCNTL[column], _one_of(1, FCNTLS, denied))
    # Limits may be read, not set: a null pointer in both halves of the third argument.
    high = [instruction(LOAD, ARGUMENTS + 20), instruction(EQUAL, 0, true=1)]
    high += [instruction(RETURN, denied)]
    program += _where(PRLIMIT64[column], [*high, *_one_of(2, (0,), denied)])
    return b"".join([*program, instruction(RETURN, denied)])


def _where(number: int | None, body: list[bytes]) -> list[bytes]:
    """`body`, which returns, for one call."""
    return [] if number is None else [instruction(EQUAL, number, false=len(body)), *body]


def _bits(argument: int, mask: int, then: int, otherwise: int) -> list[bytes]:
    return [
        instruction(LOAD, ARGUMENTS + 8 * argument),
        instruction(ANY_BIT, mask, false=1),
        instruction(RETURN, then),
        instruction(RETURN, otherwise),
    ]


def _one_of(argument: int, values: tuple[int, ...], otherwise: int) -> list[bytes]:
    body = [instruction(LOAD, ARGUMENTS + 8 * argument)]
    for value in values:
        body += [instruction(EQUAL, value, false=1), instruction(RETURN, ALLOW)]
    return [*body, instruction(RETURN, otherwise)]


def limit(seconds: int, memory: int, output: int) -> None:
    """Limits of this process, soft and hard; memory and output in bytes."""
    import resource  # which Windows has not

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def lock(processor: str) -> None:
    """No new rights, death with the parent, the filter. Raises OSError where the kernel refuses."""
    code = rules(processor)
    kept = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a 16-bit length, padding, a pointer.
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(kept))
    control = ctypes.CDLL(None, use_errno=True).prctl
    control.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    pointer = ctypes.create_string_buffer(program, len(program))
    for what in (
        (1, signal.SIGKILL, 0, 0, 0),  # PR_SET_PDEATHSIG
        (38, 1, 0, 0, 0),  # PR_SET_NO_NEW_PRIVS
        (22, 2, ctypes.addressof(pointer), 0, 0),  # PR_SET_SECCOMP, a filter
    ):
        if control(*what):
            raise OSError(ctypes.get_errno(), f"prctl({what[0]}) failed")


def main() -> None:
    code, status, seconds, memory, output = (int(x) for x in sys.argv[1:])
    with open(code, "rb") as file:
        program = file.read()
    module = types.ModuleType("__main__")
    sys.argv = ["program.py"]
    limit(seconds, memory, output)
    lock(platform.machine())
    os.write(status, LOCKED)
    os.close(status)
    sys.modules["__main__"] = module
    exec(compile(program, "program.py", "exec"), module.__dict__)


if __name__ == "__main__":
    ITSELF = sys.modules["__main__"]  # kept: its functions' names would go with it
    main()
