"""Settings of every test: strict shapes, a CPU unless -m gpu, one compile cache, no network."""

import datetime
import gc
import json
import os
import socket
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

FIGURES: list[tuple[str, float, float]] = []
MOST_MAPS = 25_000
COUNTED = {"next": 0.0}
CACHE = Path(__file__).parents[1] / ".cache" / "jax"


def pytest_configure(config):
    asked = config.option.markexpr or ""
    if "gpu" not in asked or "not gpu" in asked:
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Half the time to compile; slow tests run for longer than they compile.
    jax.config.update("jax_disable_most_optimizations", "not slow" in asked)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_addoption(parser):
    parser.addoption("--figures", help="JSON file that takes what the parity tests measured")


def pytest_sessionfinish(session):
    path = session.config.getoption("--figures")
    if path:
        day = datetime.date.today().isoformat()
        rows = [dict(zip(("what", "measured", "limit"), row, strict=True)) for row in FIGURES]
        text = json.dumps({"date": day, "figures": rows}, indent=2)
        Path(path).write_text(text + "\n")


@pytest.fixture(autouse=True)
def room_for_programs():
    """Frees compiled programs before a process has as many pieces of memory as Linux allows.

    Each program takes some; beyond 65,530 of them a compiler aborts. Counting them takes
    milliseconds, so that it is done every few seconds.
    """
    yield
    maps = Path("/proc/self/maps")
    if time.monotonic() < COUNTED["next"] or not maps.exists():
        return
    COUNTED["next"] = time.monotonic() + 5
    if maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Any connection but to this machine raises: nothing here may need a network."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"a test connects to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny chat model's folder."""
    import tiny_chat  # it loads torch, which most tests' own processes do without

    return tiny_chat.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(folder):
    """That model, loaded once a file; `fresh` gives it new adapters."""
    import tiny_chat

    return tiny_chat.load(folder)[0]


@pytest.fixture
def fresh(base):
    from unsloth_jax import FastLanguageModel

    base.adapters = None
    return FastLanguageModel.get_peft_model(base, r=4)


@pytest.fixture
def figure():
    """figure(what, measured, limit) fails over the limit and is reported with --figures."""

    def take(what: str, measured: float, limit: float) -> None:
        FIGURES.append((what, float(measured), float(limit)))
        assert measured <= limit, f"{what}: {measured} is over {limit}"

    return take


@pytest.fixture
def key():
    return jax.random.key(0)
