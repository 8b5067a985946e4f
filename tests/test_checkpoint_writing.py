"""Checkpoints written beside the steps: of their own step, whole after any end, a full disk."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.args import StandardSave

from bridge import checkpoint
from bridge.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
LIKE = {
    "w": jnp.arange(1 << 14, dtype=jnp.float32),
    "half": jnp.ones((64, 64), jnp.bfloat16),
    "codes": jnp.arange(256, dtype=jnp.uint8).repeat(64),
    "step": jnp.zeros((), jnp.int32),
}
STEP = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)


def fresh():
    return jax.tree.map(lambda x: jnp.array(x, copy=True), LIKE)


def after(steps: int) -> dict[str, np.ndarray]:
    state = fresh()
    for _ in range(steps):
        state = STEP(state)
    return jax.device_get(state)


def alike(one, other) -> bool:
    equal = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return jax.tree.all(jax.tree.map(equal, one, other))


def test_a_save_returns_before_the_disk_is_done(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.ones((1 << 24,))}, {})
    assert checkpoints.latest() is None
    checkpoints.wait()
    assert checkpoints.latest() == 1 and [p.name for p in tmp_path.iterdir()] == ["checkpoint_1"]


def test_each_checkpoint_is_of_its_own_step_though_later_steps_take_its_buffers(tmp_path):
    checkpoints, state, taken = Checkpoints(tmp_path), fresh(), []
    for step in range(1, 13):
        before, state = state, STEP(state)
        taken.append(all(x.is_deleted() for x in jax.tree.leaves(before)))
        if step % 3 == 0:
            checkpoints.save(step, state, {"step": step})
    checkpoints.close()
    assert all(taken), "a save kept the step after it from donating its state"
    for step in (3, 6, 9, 12):
        found = checkpoints.restore(LIKE, step)
        assert found.facts == {"step": step} and alike(found.state, after(step))


def test_a_restored_state_can_be_donated(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, LIKE, {})
    checkpoints.wait()
    state = checkpoints.restore(LIKE).state
    STEP(state)
    assert all(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state))


def test_the_next_save_waits_for_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    big = {"w": jnp.ones((1 << 22,))}
    for step in (1, 2, 3):
        checkpoints.save(step, big, {})
        assert checkpoints.steps() == [*range(1, step)]
    checkpoints.close()
    assert checkpoints.steps() == [1, 2, 3]


def test_what_a_save_failed_with_is_raised_by_the_next_and_names_the_path(tmp_path):
    empty = {"w": jnp.zeros((0, 4))}  # Orbax writes no array without elements
    for then in (lambda c: c.save(2, LIKE, {}), Checkpoints.wait, Checkpoints.close):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, empty, {})
        with pytest.raises(RuntimeError, match="checkpoint_1 was not written: .*zero size"):
            then(checkpoints)
        assert list(tmp_path.iterdir()) == []
        checkpoints.wait()


def test_a_save_that_failed_is_noticed_without_waiting(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.zeros((0, 4))}, {})
    with pytest.raises(RuntimeError, match="checkpoint_1 was not written"):
        while True:
            checkpoints.poll()


def test_a_step_is_not_written_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, LIKE, {})
    with pytest.raises(ValueError, match="checkpoint_1 exists already"):
        checkpoints.save(1, LIKE, {})


def test_best_arrays_and_notes_come_back_beside_the_state(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    best = {"w": LIKE["w"] + 7}
    checkpoints.save(1, LIKE, {}, notes={"metric": 0.5}, best=best)
    checkpoints.save(2, LIKE, {})
    checkpoints.close()
    found = checkpoints.restore(LIKE, 1, best)
    assert found.notes == {"metric": 0.5} and alike(found.best, best)
    assert checkpoints.restore(LIKE, 2, best)[2:] == ({}, None)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    for name in ("checkpoint_3.partial", "checkpoint_4.partial.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(1, LIKE, {})
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_1", "mine"]


PRELUDE = f"""
import os, random, signal, sys, time
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
folder = Path(sys.argv[1])
"""


def python(script: str, *given, timeout: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, given)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment
    )


# A limit on the size of a file is a full disk that needs no root.
FULL_DISK = """
import resource, test_checkpoint_writing as t
from bridge.checkpoint import Checkpoints
checkpoints = Checkpoints(folder)
checkpoints.save(1, t.LIKE, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
checkpoints.save(2, t.LIKE, {})
try:
    checkpoints.wait()
except OSError as error:
    print(error.errno, error)
print(sorted(path.name for path in folder.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(2, t.LIKE, {})
checkpoints.close()
"""


def test_a_full_disk_leaves_the_checkpoint_before_and_no_half_written_one(tmp_path):
    done = python(FULL_DISK, tmp_path)
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()
    assert error.startswith(f"{errno.EFBIG} ") and f"{tmp_path}/checkpoint_2 was not" in error
    assert left == "['checkpoint_1']"
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1, 2] and alike(checkpoints.restore(LIKE, 1).state, LIKE)


# Children are forked, not started: the parent has no thread yet and importing takes seconds.
KILLS = """
import numpy as np
from bridge.checkpoint import Checkpoints
tree = lambda step: {f"w{i}": np.full((1 << 12,), step + i, np.float32) for i in range(8)}

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def saver(out):
    checkpoints = Checkpoints(folder, keep=2)
    step = checkpoints.latest() or 0
    while True:
        step += 1
        checkpoints.save(step, tree(step), {"step": step})
        checkpoints.wait()
        os.write(out, b"%d\\n" % step)

def checker(least):
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore(tree(0))
    step = found.facts["step"]
    assert step == checkpoints.latest() >= least, (step, least)
    for name, x in tree(step).items():
        assert np.array_equal(found.state[name], x), name
    os._exit(7)

random.seed(int(sys.argv[2]))
halves = 0
for _ in range(int(sys.argv[3])):
    read, write = os.pipe()
    pid = child(lambda: saver(write))
    os.close(write)
    said = os.read(read, 100)  # the first save of this child is whole
    time.sleep(random.uniform(0, 0.12))  # at any moment of one of its saves
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(read, 1 << 16):
        said += more
    halves += any("partial" in path.name for path in folder.iterdir())
    least = int(said.split()[-1])
    assert os.waitstatus_to_exitcode(os.waitpid(child(lambda: checker(least)), 0)[1]) == 7
print(halves)
"""


@pytest.mark.slow
def test_fifty_kills_while_saving_never_lose_the_newest_whole_checkpoint(tmp_path):
    done = python(KILLS, tmp_path, random.randrange(10**6), 50)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10, "few of the kills came while a checkpoint was being written"


def test_a_kill_while_saving_leaves_the_newest_whole_checkpoint(tmp_path):
    done = python(KILLS, tmp_path, 1, 3)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_is_larger_than_the_disk_is_not_begun(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), (free * 2,), (0,))
    with pytest.raises(OSError, match=f"{free * 2} bytes are needed") as error:
        checkpoint._room(tmp_path / "checkpoint_1", {"state": StandardSave({"w": huge})})
    assert error.value.errno == errno.ENOSPC
