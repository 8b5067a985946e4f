"""The sandbox, attacked: what a program may not do, and what it may."""

import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from workflows import lockdown, sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


def run(code, **settings):
    return sandbox.run(code, **({"seconds": 10.0} | settings))


def test_a_program_reads_its_input_and_prints():
    result = run(
        "import math, json\nprint(input(), math.sqrt(4))\nprint(json.dumps([1]))", stdin="ä"
    )
    assert result == sandbox.Result("ä 2.0\n[1]\n", "", "ok")


def test_a_program_is_alone():
    code = """
import os, sys
assert __name__ == "__main__" and sys.argv == ["program.py"]
assert os.listdir(".") == [] and set(os.environ) <= {"LC_CTYPE"}, os.environ
assert set(os.listdir("/proc/self/fd")) <= {"0", "1", "2", "3"}
assert os.getsid(0) == os.getpid()
from dataclasses import dataclass
@dataclass
class Point:
    x: int
print(Point(1))
"""
    assert run(code) == sandbox.Result("Point(x=1)\n", "", "ok")


def test_nothing_of_this_process_is_handed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "word")
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        code = f"import os; print(dict(os.environ)); os.fstat({file.fileno()})"
        result = run(code)
    assert "word" not in result.out and "Bad file descriptor" in result.error


def test_programs_run_side_by_side():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, [f"print({n})" for n in range(8)]))
    assert found == [(f"{n}\n", "", "ok") for n in range(8)]


@pytest.mark.parametrize(
    "code, status, error",
    [
        ("1/0", "exit 1", "ZeroDivisionError"),
        ("if", "exit 1", "SyntaxError"),
        ("import sys; sys.exit('bad')", "exit 1", "bad"),
        ("import os; os._exit(3)", "exit 3", ""),
        ("import os; os._exit(0)", "ok", ""),
        ("import ctypes; ctypes.string_at(0)", "signal SIGSEGV", ""),
        ("import os; os.abort()", "signal ", ""),
        ("raise SystemExit", "ok", ""),
        ("print('\\0')\n\0", "exit 1", "Error"),
        ("x = '\udc80'", "exit 1", "SyntaxError"),
    ],
)
def test_how_a_program_ended_is_told(code, status, error):
    result = run(code)
    assert result.status.startswith(status) and error in result.error


# What each must fail with: PermissionError, and no mark on the disk.
ATTACKS = {
    "socket": "import socket; socket.socket()",
    "a local socket": "import socket; socket.socketpair()",
    "fork": "os.fork()",
    "vfork": "import subprocess; subprocess.run(['true'])",
    "a shell": "assert os.system('true') == 0 or fail()",
    "another program": "os.execv('/bin/true', ['true'])",
    "a spawned program": "os.posix_spawn('/bin/true', ['true'], {})",
    "killing the parent": "os.kill(os.getppid(), 9)",
    "killing all": "os.kill(-1, 9)",
    "a group's signal": "os.killpg(0, 9)",
    "a new file": "open('new', 'w')",
    "writing": "open({kept!r}, 'r+')",
    "appending": "open({kept!r}, 'a')",
    "truncating": "os.truncate({kept!r}, 0)",
    "truncating by opening": "os.open({kept!r}, os.O_RDONLY | os.O_TRUNC)",
    "a file without a name": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "deleting": "os.remove({kept!r})",
    "renaming": "os.rename({kept!r}, {kept!r} + '2')",
    "a folder": "os.mkdir('folder')",
    "removing a folder": "os.rmdir({folder!r})",
    "a link": "os.link({kept!r}, 'link')",
    "a symbolic link": "os.symlink({kept!r}, 'link')",
    "a pipe with a name": "os.mkfifo('fifo')",
    "modes": "os.chmod({kept!r}, 0o777)",
    "modes by number": "os.fchmod(os.open({kept!r}, os.O_RDONLY), 0o777)",
    "owners": "os.chown({kept!r}, 1, 1)",
    "times": "os.utime({kept!r})",
    "attributes": "os.setxattr({kept!r}, 'user.a', b'1')",
    "another root": "os.chroot('/')",
    "another folder's": "os.chdir('/')",
    "priorities": "os.nice(-5)",
    "users": "os.setuid(0)",
    "a session": "os.setsid()",
    "memory with a name": "os.memfd_create('m')",
    "a handle of the parent": "os.pidfd_open(os.getppid())",
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """What each attack met, one line each, all tried by one program; and its file."""
    folder = tmp_path_factory.mktemp("attacked")
    kept = folder / "kept"
    kept.write_text("kept")
    before = kept.stat()
    code = ["import os, signal", "def fail(): raise PermissionError('as a shell tells it')"]
    for name, attack in ATTACKS.items():
        attack = attack.replace("{kept!r}", repr(str(kept))).replace(
            "{folder!r}", repr(str(folder))
        )
        code += ["try:", f"    {attack}", f"    print({name!r}, 'done', sep=': ')"]
        code += ["except BaseException as e:", f"    print({name!r}, type(e).__name__, sep=': ')"]
    result = run("\n".join(code))
    assert result.status == "ok", result
    after = kept.stat()
    assert kept.read_text() == "kept" and os.listdir(folder) == ["kept"]
    for field in ("st_mode", "st_uid", "st_mtime_ns", "st_nlink"):
        assert getattr(before, field) == getattr(after, field)
    return dict(line.split(": ") for line in result.out.splitlines())


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_denied(name, attacked):
    assert attacked[name] == "PermissionError"


# Calls that Python has no function for, by number on x86-64 and aarch64.
CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "io_uring_setup": (425, 425),
    "openat2": (437, 437),
    "mount": (165, 40),
    "unshare": (272, 97),
    "bpf": (321, 280),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "seccomp": (317, 277),
    "prctl": (157, 167),
    "execveat": (322, 281),
    "setrlimit": (160, 164),
    "clone without a thread": (56, 220),
    "keyctl": (250, 219),
    "one of a later kernel": (4000, 4000),
}


def test_calls_past_python_are_denied():
    column = lockdown.PROCESSORS[os.uname().machine][0]
    code = """
import ctypes
call = ctypes.CDLL(None, use_errno=True).syscall
for number in {numbers}:
    print(call(number, 17, 0, 0, 0, 0, 0), ctypes.get_errno())
limit = (ctypes.c_ulong * 2)(2**40, 2**40)
print(call({prlimit}, 0, 9, limit, 0), ctypes.get_errno())
print(call({fcntl}, 0, 8, 1), ctypes.get_errno())
print(call({ioctl}, 0, 0x5412, b"x"), ctypes.get_errno())
print(call({clone3}, 0, 0), ctypes.get_errno())
"""
    numbers = [pair[column] for pair in CALLS.values()]
    kinds = {name: getattr(lockdown, name.upper())[column] for name in ("fcntl", "ioctl", "clone3")}
    result = run(code.format(numbers=numbers, prlimit=lockdown.PRLIMIT64[column], **kinds))
    assert result.out.split("\n")[:-1] == ["-1 1"] * (len(numbers) + 3) + ["-1 38"], result


def test_another_processors_calls_end_the_program():
    if os.uname().machine != "x86_64":
        pytest.skip("32-bit calls are x86's")
    # mov eax, 20 (getpid of 32 bits); int 0x80; ret
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print("reached")
"""
    assert run(code) == sandbox.Result("", "", "signal SIGSYS")


def test_threads_and_reading_work(tmp_path):
    (tmp_path / "file").write_text("readable")
    code = f"""
import threading, time, statistics, tempfile
from concurrent.futures import ThreadPoolExecutor
print(open({str(tmp_path / "file")!r}).read())
with ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(len, ["ab", "c"])))
time.sleep(0.01)
"""
    assert run(code) == sandbox.Result("readable\n3\n", "", "ok")


def test_memory_is_limited():
    result = run("x = bytearray(10**9)", memory_bytes=256 * sandbox.MiB)
    assert result.status == "exit 1" and "MemoryError" in result.error
    result = run("x = []\nwhile True: x.append(bytearray(10**6))", memory_bytes=256 * sandbox.MiB)
    assert result.status == "exit 1" and "MemoryError" in result.error


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "for s in (15, 2, 14, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    ],
)
def test_time_is_limited(code):
    began = time.monotonic()
    assert run(f"print(1, flush=True)\n{code}", seconds=1.0) == ("1\n", "", "time")
    assert time.monotonic() - began < 10


def test_output_is_limited():
    flood = "import sys\nwhile True: sys.{}.write('x' * 1000)"
    for stream in ("stdout", "stderr"):
        result = run(flood.format(stream), output_bytes=5000)
        assert result.status.startswith("exit") and len(result.out) + len(result.error) <= 10_000
        assert len(result.out if stream == "stdout" else result.error) == 5000
    stubborn = """
import os
while True:
    try:
        os.write(1, b"\\xff" * 999)
    except OSError:
        pass
"""
    result = run(stubborn, output_bytes=5000, seconds=1.0)
    assert result.status == "time" and result.out == "\ufffd" * 5000


def test_limits_must_be_positive():
    for name in ("seconds", "memory_bytes", "output_bytes"):
        with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
            sandbox.run("", **{name: 0})


@pytest.mark.parametrize(
    "machine", [("Darwin", "arm64"), ("Linux", "riscv64"), ("Windows", "AMD64")]
)
def test_other_machines_are_refused(machine, monkeypatch):
    monkeypatch.setattr(sandbox.platform, "system", lambda: machine[0])
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine[1])
    with pytest.raises(RuntimeError, match=f"this is {machine[0]} on {machine[1]}"):
        sandbox.run("print(1)")


def test_a_sandbox_that_does_not_close_is_an_error(tmp_path, monkeypatch):
    script = tmp_path / "broken.py"
    script.write_text("raise OSError(38, 'prctl(22) failed')")
    monkeypatch.setattr(lockdown, "__file__", str(script))
    with pytest.raises(RuntimeError, match=r"no code was run(.|\n)*prctl\(22\) failed"):
        sandbox.run("print(1)")


def test_without_a_filter_no_program_runs(tmp_path, monkeypatch):
    """A kernel that has none: the script itself, with a call that it refuses."""
    script = tmp_path / "old_kernel.py"
    script.write_text(Path(lockdown.__file__).read_text().replace("(22, 2,", "(22, 77,"))
    monkeypatch.setattr(lockdown, "__file__", str(script))
    marked = tmp_path / "ran"
    with pytest.raises(RuntimeError, match=r"prctl\(22\) failed"):
        sandbox.run(f"open({str(marked)!r}, 'w')")
    assert not marked.exists()


def headers():
    """The kernel's numbers of calls, by processor's column."""
    x86 = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    generic = Path("/usr/include/asm-generic/unistd.h")
    if not (x86.exists() and generic.exists()):
        pytest.skip("the kernel's headers (linux-libc-dev) are not installed")
    named = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
    tables = [dict(re.findall(named, path.read_text())) for path in (x86, generic)]
    tables[1]["newfstatat"] = tables[1]["fstatat"]
    return tables


def test_numbers_of_calls_are_the_kernels():
    tables = headers()
    single = {"open", "openat", "clone", "clone3", "ioctl", "fcntl", "prlimit64"}
    known = lockdown.PLAIN | {name: getattr(lockdown, name.upper()) for name in single}
    for name, numbers in known.items():
        assert numbers == tuple(int(t[name]) if name in t else None for t in tables), name
