"""The machine as a user is told of it, and programs kept on disk from process to process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workflows import doctor, machine
from workflows.compile_cache import compile_cache

ROOT = Path(__file__).parents[1]
GIB = 2**30

FIRST = """
import json, sys
import unsloth_jax
folder = unsloth_jax.compile_cache(sys.argv[1], "1GB", deterministic=True)
import jax, jax.numpy as jnp
found = {"cache_hits": 0, "cache_misses": 0}
def count(name, **more):
    last = name.rpartition("/")[2]
    if last in found:
        found[last] += 1
jax.monitoring.register_event_listener(count)
x = jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((8, 8)))
print(json.dumps(found | {"folder": str(folder), "value": float(x)}))
"""


def in_a_process(code, *arguments, **env):
    """What a fresh process prints last, as JSON."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    plain |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=plain, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), json.loads(done.stdout.splitlines()[-1])


def test_a_second_process_compiles_nothing(tmp_path):
    said, first = in_a_process(FIRST, str(tmp_path / "programs"))
    assert first["cache_misses"] > 0 and first["cache_hits"] == 0
    assert first["folder"] == str(tmp_path / "programs")
    assert "xla_gpu_exclude_nondeterministic_ops" in said[0]
    _, second = in_a_process(FIRST, str(tmp_path / "programs"))
    assert second["cache_misses"] == 0 and second["cache_hits"] == first["cache_misses"]
    assert second["value"] == first["value"]


def test_the_cache_lies_below_the_users_cache_folder(tmp_path):
    code = FIRST.replace('sys.argv[1], "1GB", deterministic=True', "")
    _, told = in_a_process(code, XDG_CACHE_HOME=str(tmp_path))
    assert told["folder"] == str(tmp_path / "unsloth_jax")
    assert any((tmp_path / "unsloth_jax").iterdir())


def test_the_cache_is_refused_once_jax_has_started(tmp_path):
    doctor.jax.devices()
    with pytest.raises(RuntimeError, match="before JAX is used"):
        compile_cache(tmp_path)
    with pytest.raises(ValueError, match="bytes, a share"):
        compile_cache(tmp_path, max_size="much")


def test_importing_touches_no_environment_and_starts_no_backend():
    code = """
import json, os
before = dict(os.environ)
import unsloth_jax, workflows.face, workflows.trainer
from jax._src import xla_bridge
print(json.dumps([dict(os.environ) == before, xla_bridge.backends_are_initialized()]))
"""
    assert in_a_process(code)[1] == [True, False]


@pytest.mark.parametrize(
    "claimed, unclaimed, expected",
    [
        (60 * GIB, 20 * GIB, 50 * GIB),  # taken at the start: all of the share is JAX's
        (0, 15 * GIB, 5 * GIB),  # nothing is taken yet, others hold most
        (0, 75 * GIB, 50 * GIB),
        (None, 15 * GIB, 50 * GIB),
        (60 * GIB, None, 50 * GIB),
    ],
)
def test_what_is_free_is_the_share_that_others_leave(claimed, unclaimed, expected):
    assert machine.left(60 * GIB, 10 * GIB, claimed, unclaimed) == expected


def test_the_doctor_names_versions_settings_and_each_kernel(capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    doctor.main([])
    said = capsys.readouterr().out
    lines = {line[:26].strip(): line[26:] for line in said.splitlines()}
    assert lines["jax"] == doctor.jax.__version__
    assert lines["share of the GPU"] == "0.5"
    assert lines["taken at the start"] == "no (XLA_PYTHON_CLIENT_PREALLOCATE)"
    assert lines["attention"] == "XLA: it needs an NVIDIA GPU"
    assert "NF4 dequantisation" in lines and "8-bit Adam" in lines
