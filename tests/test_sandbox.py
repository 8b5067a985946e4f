"""The sandbox against programs that try to leave it."""

import os
import platform
import signal
import threading
import time

import pytest

from workflows import lockdown, sandbox
from workflows.sandbox import MiB, run

pytestmark = pytest.mark.skipif(
    lockdown.refused(platform.system(), platform.machine()) is not None, reason="needs seccomp"
)


def test_a_program_computes_reads_its_input_and_prints():
    found = run("import sys, math\nprint(math.isqrt(int(sys.stdin.read())) + 1)", "1764")
    assert found == sandbox.Result("43\n", "", "ok")


def test_installed_modules_and_threads_work():
    code = """
import threading, json, collections
done = []
several = [threading.Thread(target=done.append, args=(n,)) for n in range(4)]
[one.start() for one in several]
[one.join() for one in several]
print(json.dumps(sorted(done)))
"""
    assert run(code).out == "[0, 1, 2, 3]\n"


FORBIDDEN = {
    "a socket": "import socket; socket.socket()",
    "a pair of sockets": "import socket; socket.socketpair()",
    "a program": "import subprocess; subprocess.run(['/bin/true'])",
    "a shell": "import os; assert os.system('true') == 0",
    "a copy of itself": "import os; os.fork()",
    "another program in its place": "import os; os.execv('/bin/true', ['true'])",
    "a file": "open('new', 'w')",
    "a file in the system": "import os; os.open('/tmp/new', os.O_CREAT | os.O_RDWR)",
    "to delete": "import os; os.unlink('/etc/hostname')",
    "to rename": "import os; os.rename('/etc/hostname', '/etc/h')",
    "a folder": "import os; os.mkdir('new')",
    "other rights": "import os; os.chmod('.', 0)",
    "a link": "import os; os.symlink('/etc', 'here')",
    "to kill its parent": "import os; os.kill(os.getppid(), 9)",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}  # fmt: skip


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_reaches_outside_fails_in_the_program(what, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    found = run(f"{FORBIDDEN[what]}\nprint('done')")
    assert "done" not in found.out and found.status in ("exit 1", "signal SIGSYS")
    expected = ("PermissionError", "OSError", "AssertionError", "ValueError", "not allowed")
    assert any(name in found.error for name in expected), found.error
    assert kept.read_text() == "as it was"


def test_system_calls_by_number_are_filtered_too():
    number = 41 if platform.machine() == "x86_64" else 198  # socket
    code = f"""
import ctypes
c = ctypes.CDLL(None, use_errno=True)
print(c.syscall({number}, 2, 1, 0), ctypes.get_errno())
"""
    assert run(code).out.split() == ["-1", "1"]


def test_time_memory_and_output_end():
    began = time.monotonic()
    assert run("while True: pass", seconds=1).status == "time"
    assert run("import time; time.sleep(60)", seconds=1).status == "time"
    assert time.monotonic() - began < 20
    found = run("x = 'x' * (1 << 30)", memory_bytes=256 * MiB)
    assert found.status == "exit 1" and "MemoryError" in found.error
    found = run("while True: print('x' * 1000)", output_bytes=10_000)
    assert found.status != "ok" and len(found.out) <= 10_000


def test_how_a_program_ended_is_told():
    assert run("raise SystemExit(3)").status == "exit 3"
    assert run("import os; os._exit(4)").status == "exit 4"
    assert run("import ctypes; ctypes.string_at(0)").status == "signal SIGSEGV"
    found = run("1 / 0")
    assert found.status == "exit 1" and "ZeroDivisionError" in found.error
    assert "SyntaxError" in run("def").error


def test_nothing_of_this_process_is_handed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "word")
    secret = (tmp_path / "secret").open("w+")
    code = (
        "import os; print(dict(os.environ), os.listdir('.'), sorted(os.listdir('/proc/self/fd')))"
    )
    out = run(code).out
    assert "word" not in out and "[]" in out
    assert str(secret.fileno()) not in out.split("] [")[-1] or secret.fileno() < 4
    secret.close()


def test_programs_run_side_by_side():
    found = [None] * 4

    def one(n):
        found[n] = run(f"print({n})").out

    several = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    [x.start() for x in several]
    [x.join() for x in several]
    assert found == [f"{n}\n" for n in range(4)]
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL and os.getpid()


@pytest.mark.parametrize("limits", [dict(seconds=0), dict(memory_bytes=-1), dict(output_bytes=0)])
def test_limits_that_are_none_are_refused(limits):
    (name,) = limits
    with pytest.raises(ValueError, match=f"{name}=.* must be positive"):
        run("pass", **limits)


def test_a_machine_without_the_filter_runs_nothing(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(RuntimeError, match="needs Linux's seccomp.*this is Darwin"):
        run("print(1)")
