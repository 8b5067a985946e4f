"""Mixtures of experts and 8-bit weights on a GPU: the CPU's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge import hf
from bridge.safetensors_file import SafetensorsSource
from pallas_kernels import grouped_matmul
from unsloth_jax import decoder
from unsloth_jax.quant import FORMATS

pytestmark = pytest.mark.gpu
SIZES = {"uneven": (300, 0, 2, 777, 1), "few": (1, 0, 2, 0, 1), "one": (0, 4096, 0, 0, 0)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("height", "width"), [(768, 2048), (48, 80)])
def test_rows_are_multiplied_with_their_groups_matrix(sizes, height, width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(sum(sizes), width)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(len(sizes), height, width)) * width**-0.5, jnp.bfloat16)
    ids, counts = np.repeat(np.arange(len(sizes)), sizes), jnp.asarray(sizes, jnp.int32)
    assert grouped_matmul.supports(x, w) is None

    def total(x, w):
        y = grouped_matmul.grouped_matmul(x, w, counts, "pallas")
        return (y.astype(jnp.float32) ** 2).sum() / 2, y

    (_, y), (dx, dw) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)
    wide = lambda a: np.asarray(a, np.float32)
    for g in range(len(sizes)):
        here = ids == g
        want = wide(x)[here] @ wide(w)[g].T
        np.testing.assert_allclose(wide(y)[here], want, rtol=2**-7, atol=2e-2)
        back = wide(y)[here] @ wide(w)[g]
        np.testing.assert_allclose(wide(dx)[here], back, rtol=2**-6, atol=5e-2)
        over = wide(y)[here].T @ wide(x)[here]
        np.testing.assert_allclose(wide(dw)[g], over, rtol=2**-6, atol=0.02 * np.abs(over).max())


def test_a_layers_experts_have_the_cpus_values_in_nf4():
    w = np.random.default_rng(1).normal(0, 0.02, (6, 256, 512)).astype(jnp.bfloat16)
    leaf = jax.jit(FORMATS["nf4"])(jnp.asarray(w))
    here = np.asarray(jax.jit(lambda x: x.dequantize())(leaf), np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        there = jax.device_put(leaf, jax.devices("cpu")[0])
        there = np.asarray(jax.jit(lambda x: x.dequantize())(there), np.float32)
    np.testing.assert_array_equal(here, there)


def test_int8_codes_are_the_cpus_but_for_ties():
    """A GPU's reciprocal is rounded otherwise, which moves a code that lies between two."""
    w = np.random.default_rng(2).normal(0, 0.02, (512, 768)).astype(np.float32)
    codes, scales = [], []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            made = jax.jit(FORMATS["int8"])(jax.device_put(w, device))
            codes.append(np.asarray(made.codes, np.int32))
            scales.append(np.asarray(made.absmax))
    np.testing.assert_array_equal(*scales)
    apart = np.abs(codes[0] - codes[1])
    assert apart.max() <= 1 and apart.mean() < 1e-3


OTHERS = ("gpt_oss", "llama4_text", "deepseek_v3", "glm4_moe", "qwen3_5_text", "falcon_h1")
CASES = [(name, q) for name in ("mixtral", "qwen3_moe") for q in (None, "nf4", "int8")]


@pytest.mark.parametrize(("name", "quantize"), [*CASES, *((name, "nf4") for name in OTHERS)])
def test_logits_of_mixtures_and_hybrids_are_those_of_a_cpu(name, quantize, tmp_path):
    tiny = pytest.importorskip("tiny", reason="needs torch to make a checkpoint")
    folder = tiny.save(tiny.reference(name), tmp_path)
    ids = np.random.default_rng(3).integers(3, 256, (2, 48)).astype(np.int32)
    with jax.default_device(jax.devices("cpu")[0]):
        family, c, params = hf.load(SafetensorsSource(folder), quantize=quantize)

    def run(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        hidden = decoder.forward(family, c, params, ids, positions, jnp.ones_like(ids))
        return decoder.logits(family, c, params, hidden)

    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            found.append(np.asarray(jax.jit(run)(*jax.device_put((params, ids), device))))
    assert np.abs(found[0] - found[1]).max() <= 1e-4 * found[1].std()
