"""What only a GPU can show: the same numbers as the CPU, and peak memory while loading."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bridge import hf
from bridge.safetensors_file import SafetensorsSource
from pallas_kernels import adam8_update, attention, nf4_dequantize
from pallas_kernels.nf4_dequantize import LowRank
from unsloth_jax import data, decoder, lora, optim, train, tree
from unsloth_jax.quant import FORMATS
from unsloth_jax.quant.nf4 import NF4
from unsloth_jax.remat import KEPT, Memory
from workflows import objective

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
    # This process holds a share of the device's memory already.
    alone = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alone)
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
    step = train.make_step(objective.loss(family, c, 1.0), optimizer)
    state, seen = train.start(adapters, optimizer), []
    for _ in range(20):
        state, report = step(state, params, batch)
        seen.append(float(report.loss))
    assert seen[-1] < 0.7 * seen[0], seen
    assert all(leaf.dtype == jnp.float32 for leaf in tree.flatten(state.trainable).values())


# The float32 reference, then every policy in bfloat16 with the kernels.
WAYS = [Memory(), *map(Memory, KEPT), Memory("none", unroll=True), Memory("full", tiles=4)]
STEPS = 20


def losses_of(family, c, params, adapters, batch, memory, documents):
    optimizer = optim.make("adamw_8bit", optim.schedule("constant", 5e-3, 0, STEPS))
    step = train.make_step(objective.loss(family, c, 1.0, memory, documents), optimizer)
    state, seen = train.start(adapters, optimizer), []
    for _ in range(STEPS):
        state, report = step(state, params, objective.embedded(params, batch))
        seen.append(float(report.loss))
    return np.array(seen)


def in_float32(leaf):
    """The same values, computed with in float32."""
    return replace(leaf, dtype="float32") if isinstance(leaf, NF4) else leaf.astype(jnp.float32)


@pytest.mark.parametrize("packed", [False, True])
def test_every_plan_follows_the_float32_reference(folder, packed):
    family, c, params = hf.load(SafetensorsSource(folder), jnp.bfloat16, "nf4")
    exact = tree.map_paths(lambda _, leaf: in_float32(leaf), params)
    rng = np.random.default_rng(3)
    sizes = [[40, 70, 18], [128], [64, 30], [5, 100, 23]] if packed else [[128]] * 4
    rows = [[data.Row(rng.integers(3, 256, n).tolist(), [1] * n) for n in row] for row in sizes]
    batch = data.stacked([data.collate(rows, 4, 128)])
    documents = max(map(len, sizes))
    adapters = lora.init(jax.random.key(0), params, 16)
    with jax.default_matmul_precision("highest"):
        wanted = losses_of(family, c, exact, adapters, batch, Memory(), documents)
    assert wanted[-1] < 0.7 * wanted[0]
    for memory in WAYS:
        got = losses_of(family, c, params, adapters, batch, memory, documents)
        # bfloat16 keeps 8 bits; the losses differ by less, and start within two thousandths.
        assert abs(got[0] - wanted[0]) <= 2e-3 * wanted[0], memory
        assert np.abs(got - wanted).max() <= 1e-2 * wanted[0], (memory, got, wanted)
    if "lm_head" in params:
        lean = losses_of(
            family, c, objective.hosted(params), adapters, batch, Memory("offload"), documents
        )
        np.testing.assert_allclose(lean, got, atol=1e-2 * wanted[0])


def test_the_dequantizing_kernel_is_exact_here():
    w = jax.random.normal(jax.random.key(0), (2, 1024, 4096), jnp.bfloat16) * 0.02
    leaf = FORMATS["nf4"](w)
    pair = LowRank(jnp.full((16, 4096), 1e-2), jnp.full((1024, 16), 1e-2), jnp.float32(2))
    for i in range(2):
        args = leaf.layout, leaf.packed, leaf.statistics, i
        read = lambda how, args=args: nf4_dequantize.dequantize(*args, implementation=how)
        np.testing.assert_array_equal(read("pallas"), jax.jit(read, static_argnums=0)("xla"))
        ours = nf4_dequantize.dequantize(*args, pair, implementation="pallas").astype(jnp.float32)
        exact = nf4_dequantize.reference(*args, pair, jnp.float32)
        # One rounding of the sum, one of the term and of each factor, in bfloat16.
        assert jnp.all(jnp.abs(ours - exact) <= 2.0**-7.9 * jnp.abs(exact) + 2.0**-6 * 3.2e-3)


def test_the_kernel_of_8_bit_adam_makes_the_references_codes_here():
    shape = (3, 512, 1024)
    draw = lambda n: jax.random.normal(jax.random.key(n), shape) * 10.0 ** -(n + 2)
    mu = adam8_update.quantize(draw(1), adam8_update.SIGNED)
    nu = adam8_update.quantize(draw(2) ** 2, adam8_update.UNSIGNED)
    args = adam8_update.Rates(), draw(0), mu, nu, jnp.asarray([1.5, 2.5])
    got, wanted = (
        jax.jit(partial(adam8_update.update, args[0], implementation=how))(*args[1:])
        for how in ("pallas", "xla")
    )
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(ours.absmax, theirs.absmax, rtol=1e-6)
        apart = np.abs(np.asarray(ours.codes, int) - np.asarray(theirs.codes, int))
        # Where a code is a near tie either may come out.
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-4


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("length", [320, 512])  # a multiple of 64 only, and of 128
def test_cudnn_agrees_with_the_reference(documents, window, length):
    n = length
    sizes = [[n - 212, 7, 150], [n], [200, 100]] if documents > 1 else [[n], [n - 112], [n]]
    rows = [[data.Row([1] * n, [1] * n) for n in row] for row in sizes]
    b = jax.tree.map(jnp.asarray, data.collate(rows, 3, length))
    keys = jax.random.split(jax.random.key(1), 4)
    draw = lambda key, n: jax.random.normal(key, (3, length, n, 128), jnp.bfloat16)
    q, k, v, g = (draw(key, n) for key, n in zip(keys, (8, 2, 2, 8), strict=True))
    rule = attention.Rule(128**-0.5, window, documents=documents)
    real = (b.segments > 0)[..., None, None]

    def values(how, dtype):
        def out(*qkv):
            y = attention.attention(rule, *qkv, b.segments, b.positions, how)
            return jnp.where(real, y, 0)

        y, back = jax.vjp(out, *(x.astype(dtype) for x in (q, k, v)))
        return y, *back(jnp.where(real, g, 0).astype(dtype))

    got, wanted = values("cudnn", jnp.bfloat16), values("xla", jnp.float32)
    for ours, exact in zip(got, wanted, strict=True):
        error = jnp.linalg.norm(ours.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
        assert error <= 8e-3, error


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_takes_sinks_and_finds_their_gradient(packed, window):
    assert attention._disagreement("bfloat16", 8, 64, packed, window, True) is None
