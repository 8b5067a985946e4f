"""What only a GPU can show: the same numbers as the CPU, and peak memory while loading."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bridge import hf
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import data, decoder, lora, train, tree
from unsloth_jax.quant import FORMATS
from workflows import sft

pytestmark = pytest.mark.gpu

tiny = pytest.importorskip("tiny", reason="needs torch to make a checkpoint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 8 layers and 20 MB, large enough for its peak memory to be seen."""
    model = tiny.reference("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    return tiny.save(model, tmp_path_factory.mktemp("llama"))


def on(device, fn, *args):
    with jax.default_device(device):
        return jax.tree.map(np.asarray, jax.jit(fn)(*jax.device_put(args, device)))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nf4_has_the_same_bytes_and_values_as_on_a_cpu(dtype, double):
    w = np.random.default_rng(0).normal(0, 0.02, (512, 768)).astype(dtype)
    quantize = partial(FORMATS["nf4"], double=double)
    both = [on(d, quantize, w) for d in (jax.devices()[0], jax.devices("cpu")[0])]
    for ours, theirs in zip(*map(jax.tree.leaves, both), strict=True):
        if ours.dtype == np.uint8:
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    values = [
        on(d, lambda leaf: leaf.dequantize(), both[1])
        for d in (jax.devices()[0], jax.devices("cpu")[0])
    ]
    np.testing.assert_array_equal(*values)


def test_logits_are_those_of_a_cpu(folder):
    family, c, params = hf.load(SafetensorsSource(folder))
    ids = np.random.default_rng(1).integers(3, 256, (2, 48)).astype(np.int32)

    def run(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        hidden = decoder.forward(family, c, params, ids, positions, jnp.ones_like(ids))
        return decoder.logits(family, c, params, hidden)

    with jax.default_matmul_precision("highest"):
        ours = on(jax.devices()[0], run, params, ids)
        theirs = on(jax.devices("cpu")[0], run, params, ids)
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std()


PEAK = """
import sys, jax, numpy as np, jax.numpy as jnp
sys.path.insert(0, {root!r})
from bridge import hf
from bridge.safetensors_file import SafetensorsSource
source = SafetensorsSource({folder!r})
params = jax.block_until_ready(hf.load(source, jnp.bfloat16, "nf4")[2])
model = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
largest = max(int(np.prod(h.shape)) * np.dtype(h.dtype).itemsize for h in source.headers().values())
print(jax.devices()[0].memory_stats()["peak_bytes_in_use"], model, largest)
"""


def test_loading_peaks_at_the_model_and_three_of_its_largest_tensors(tmp_path):
    # Large tensors, beside which the runtime's own workspaces don't count.
    sizes = dict(hidden_size=2048, intermediate_size=16384, num_hidden_layers=3)
    folder = tiny.save(tiny.reference("llama", **sizes).bfloat16(), tmp_path)
    code = PEAK.format(root=str(Path(__file__).parents[1]), folder=str(folder))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    peak, model, largest = map(int, ran.stdout.split())
    assert peak <= model + 3 * largest, (peak, model, largest)


def test_qlora_learns_in_bfloat16(folder):
    family, c, params = hf.load(SafetensorsSource(folder), jnp.bfloat16, "nf4")
    rng = np.random.default_rng(2)
    rows = [data.Row(ids, [1] * 24) for ids in rng.integers(3, 256, (4, 24)).tolist()]
    batch = jax.device_put(data.stacked([data.collate([[r] for r in rows], 4, 32)]))
    optimizer = optax.adamw(1e-2)
    adapters = lora.init(jax.random.key(0), params, 16)
    step = train.make_step(sft.loss(family, c, 1.0), optimizer)
    state, seen = train.start(adapters, optimizer), []
    for _ in range(20):
        state, report = step(state, params, batch)
        seen.append(float(report.loss))
    assert seen[-1] < 0.7 * seen[0], seen
    assert all(leaf.dtype == jnp.float32 for leaf in tree.flatten(state.trainable).values())
