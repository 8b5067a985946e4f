"""NF4 against bitsandbytes on a CPU: bytes, statistics and values; the gradient of matmul."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from pallas_kernels import nf4 as kernel
from unsloth_jax import leaves, quant
from unsloth_jax.quant import nf4

SHAPES = [(256, 512), (96, 200), (33, 65), (64, 64), (1, 1), (3, 7)]
DTYPES = ["float32", "bfloat16", "float16"]
compiled = jax.jit(nf4.quantize, static_argnames=("dtype", "double", "block"))


def draw(shape, dtype, seed=0):
    """The same weight for JAX and for torch, with one block of zeros where there is room."""
    w = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    if w.size > 256:
        w.reshape(-1)[64:192] = 0
    theirs = torch.tensor(w).to(getattr(torch, dtype))
    return jnp.asarray(theirs.float().numpy(), dtype), theirs


def their_values(packed, state):
    """bitsandbytes' float32 view of what it dequantizes, the weight taken as one row.

    Its AVX-512 routine mixes up scales of blocks that straddle rows; one row has none.
    """
    shape, state.shape = state.shape, torch.Size((1, 2 * packed.numel()))
    values = bnb.dequantize_4bit(packed, state).float().numpy()
    state.shape = shape
    return values.reshape(-1)[: shape.numel()].reshape(shape)


def with_statistics(leaf, state):
    """`leaf` with the statistics of a bitsandbytes state."""
    if not state.nested:
        return leaf.replace(absmax=jnp.asarray(state.absmax.numpy()))
    theirs = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
    fields = dict(zip(kernel.Statistics._fields, (t.numpy() for t in theirs), strict=True))
    return leaf.replace(**jax.tree.map(jnp.asarray, fields))


def wide(x):
    return np.asarray(x, np.float32)


CASES = [(shape, dtype, 64) for shape in SHAPES for dtype in DTYPES]
CASES += [(shape, "float32", 128) for shape in SHAPES[1:4]]


def check_against_bitsandbytes(shape, dtype, block, quantize, dequantize):
    ours, theirs = draw(shape, dtype)
    leaf = quantize(ours, double=False, block=block)
    assert (leaf.shape, leaf.dtype) == (shape, dtype)
    pairs = [bnb.quantize_4bit(theirs, None, None, block, double, "nf4") for double in (0, 1)]
    np.testing.assert_array_equal(leaf.absmax, pairs[0][1].absmax.numpy())
    values = dequantize([with_statistics(leaf, state) for _, state in pairs])
    for (packed, state), value in zip(pairs, values, strict=True):
        np.testing.assert_array_equal(leaf.packed.reshape(-1, 1), packed.numpy())
        np.testing.assert_array_equal(wide(value), their_values(packed, state))


def every(weights):
    return [leaf.dequantize() for leaf in weights]


@pytest.mark.parametrize(("shape", "dtype", "block"), CASES)
def test_packed_bytes_scales_and_values_equal_bitsandbytes(shape, dtype, block):
    check_against_bitsandbytes(shape, dtype, block, compiled, jax.jit(every))


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_equal_outside_of_jit_too(dtype):
    check_against_bitsandbytes((96, 200), dtype, 64, nf4.quantize, every)


@pytest.mark.parametrize("shape", [(512, 512), (96, 200)])
def test_nested_codes_are_the_nearest_and_the_librarys_on_its_own_grid(shape):
    _, w = draw(shape, "float32", seed=1)
    absmax = bnb.quantize_4bit(w, None, None, 64, False, "nf4")[1].absmax
    state = bnb.quantize_4bit(w, None, None, 64, True, "nf4")[1]
    nest = jax.jit(lambda a, offset: kernel.nest(a, offset=offset))
    ours = nest(absmax.numpy(), state.offset.numpy())
    np.testing.assert_array_equal(ours.nested_absmax, state.state2.absmax.numpy())
    np.testing.assert_array_equal(ours.nested_map, state.state2.code.numpy())

    table = state.state2.code.double().numpy()
    rest = (absmax - state.offset).numpy()
    unit = rest * np.repeat(np.float32(1) / np.asarray(ours.nested_absmax), 256)[: rest.size]
    distance = lambda points: np.abs(points.astype(np.float64)[:, None] - table)
    np.testing.assert_array_equal(ours.absmax, distance(unit).argmin(1))
    grid = np.floor((unit + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5))
    np.testing.assert_array_equal(distance(grid / 65535 * 2 - 1).argmin(1), state.absmax.numpy())


def test_unnesting_rounds_the_product_before_the_sum():
    rng = np.random.default_rng(7)
    codes, top = rng.integers(0, 256, 10000, np.uint8), rng.random(40, np.float32)
    table, offset = kernel.dynamic_map(), np.float32(0.37)
    expected = (table[codes] * np.repeat(top, 256)[:10000]).astype(np.float32) + offset
    statistics = jax.tree.map(jnp.asarray, kernel.Statistics(codes, top, table, offset))
    for unnest in (kernel.unnest, jax.jit(kernel.unnest)):
        np.testing.assert_array_equal(unnest(statistics), expected)


def test_offset_is_the_mean_and_own_values_stay_within_a_nested_step():
    ours, theirs = draw((512, 1024), "float32", seed=2)
    leaf = compiled(ours)
    packed, state = bnb.quantize_4bit(theirs, None, None, 64, True, "nf4")
    assert abs(float(leaf.offset) - state.offset.item()) <= 2 * np.spacing(state.offset.numpy())
    plain = compiled(ours, double=False)
    step = np.diff(leaf.nested_map).max() * float(leaf.nested_absmax.max())
    assert np.abs(wide(leaf.dequantize()) - wide(plain.dequantize())).max() <= step
    # Worst case of a code: half the widest gap of the code book, times the block's scale.
    bound = np.diff(kernel.CODES).max() / 2 * np.repeat(wide(plain.absmax), 64).reshape(512, 1024)
    assert (np.abs(wide(plain.dequantize()) - wide(ours)) <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 0.25), ("float32", 6), ("bfloat16", 1)])
def test_ties_at_thresholds_take_bitsandbytes_code(dtype, scale):
    edges = kernel.THRESHOLDS
    near = np.concatenate([edges, np.nextafter(edges, 2), np.nextafter(edges, -2), [1, -1, 0]])
    w = np.zeros(128, np.float32)
    w[:48] = w[64:112] = near.astype(np.float32) * np.float32(scale)
    theirs = torch.tensor(w[None]).to(getattr(torch, dtype))
    packed, state = bnb.quantize_4bit(theirs, None, None, 64, False, "nf4")
    leaf = compiled(jnp.asarray(theirs.float().numpy(), dtype), double=False)
    np.testing.assert_array_equal(leaf.packed.reshape(-1, 1), packed.numpy())
    np.testing.assert_array_equal(leaf.absmax, state.absmax.numpy())


def test_weights_are_multiplied_by_a_reciprocal_not_divided():
    rng = np.random.default_rng(0)
    w = (rng.choice(kernel.THRESHOLDS, (256, 64))).astype(np.float32)
    top = rng.uniform(0.01, 1, (256, 1)).astype(np.float32)
    w, w[:, :1] = w * top, top
    code = lambda unit: np.searchsorted(kernel.THRESHOLDS, unit)
    assert (code(w * (np.float32(1) / top)) != code(w / top)).sum() > 500
    packed = bnb.quantize_4bit(torch.tensor(w), None, None, 64, False, "nf4")[0]
    np.testing.assert_array_equal(compiled(w, double=False).packed.reshape(-1, 1), packed)


@pytest.mark.parametrize("size", [64, 133])
def test_blocks_of_zeros_have_code_seven_and_scale_zero(size):
    packed, state = bnb.quantize_4bit(torch.zeros(1, size), None, None, 64, False, "nf4")
    assert (packed.numpy() == 0x77).all()
    plain, nested = (compiled(jnp.zeros((1, size)), double=double) for double in (False, True))
    for leaf in (plain, nested):
        np.testing.assert_array_equal(leaf.packed.reshape(-1, 1), packed)
        assert not wide(jax.jit(nf4.NF4.dequantize)(leaf)).any()
    assert not wide(plain.absmax).any()
    assert (state.absmax.numpy() < 2e-38).all()


@pytest.mark.parametrize("shape", [(3, 64, 128), (2, 3, 5, 7)])
def test_a_stack_equals_its_matrices(shape):
    w = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
    stack = compiled(w)
    assert stack.shape == shape
    assert {leaf.shape[: len(shape) - 2] for leaf in jax.tree.leaves(stack)} == {shape[:-2]}
    dequantize = jax.jit(nf4.NF4.dequantize)
    values = dequantize(stack)
    for at in np.ndindex(shape[:-2]):
        one = jax.tree.map(lambda a, at=at: a[at], stack)
        assert one.shape == shape[-2:]
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(compiled(w[at])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        np.testing.assert_array_equal(dequantize(one), values[at])
    with pytest.raises(ValueError, match="index it first"):
        stack.matmul(jnp.ones(shape[-1]))


@pytest.mark.parametrize(
    ("shape", "dtype", "x_dtype"),
    [
        ((64, 128), "float32", "float32"),
        ((64, 128), "bfloat16", "float32"),
        ((64, 128), "bfloat16", "bfloat16"),
        ((64, 128), "float16", "float32"),
        ((33, 65), "bfloat16", "float32"),
    ],
)
def test_matmul_and_its_gradient_equal_the_dense_ones(shape, x_dtype, dtype):
    leaf = compiled(draw(shape, dtype)[0])
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 5, shape[1])), x_dtype)
    dy = jnp.asarray(rng.normal(size=(2, 5, shape[0])), x_dtype)

    def product(x, leaf):
        return leaf.matmul(x)

    def dense(x, leaf):
        w = leaf.dequantize().astype(x.dtype)
        return jnp.einsum("...i,oi->...o", x, w, preferred_element_type=jnp.float32).astype(x.dtype)

    def both(fn, x, leaf, dy):
        y, back = jax.vjp(lambda x: fn(x, leaf), x)
        return y, *back(dy)

    pairs = (jax.jit(partial(both, fn))(x, leaf, dy) for fn in (product, dense))
    for ours, theirs in zip(*pairs, strict=True):
        assert ours.dtype == x.dtype
        tolerance = 1e-6 if x_dtype == "float32" else 2**-8
        np.testing.assert_allclose(
            wide(ours), wide(theirs), rtol=tolerance, atol=tolerance * wide(theirs).std()
        )


def test_a_weight_gets_no_gradient_and_plain_statistics_get_zeros():
    leaf = compiled(draw((64, 128), "float32")[0])
    x = jnp.ones((2, 128))
    gradient = jax.grad(lambda x, w: w.matmul(x).sum(), argnums=(0, 1), allow_int=True)
    dx, dleaf = jax.jit(gradient)(x, leaf)
    assert np.asarray(dx).any()
    assert dleaf.packed.dtype == jax.dtypes.float0
    assert not any(np.asarray(a, np.float32).any() for a in jax.tree.leaves(dleaf.statistics[1:]))


def stacked_loss(x, stack):
    """Layers by a traced number, each under remat, as a decoder has them."""

    @partial(jax.checkpoint, prevent_cse=False)
    def body(x, i):
        return jnp.tanh(leaves.layer(stack, i).matmul(x)), None

    return jax.lax.scan(body, x, jnp.arange(stack.shape[0]))[0].sum()


def test_gradient_through_scan_and_remat_holds_one_dense_layer_at_a_time():
    stack = compiled(jnp.asarray(np.random.default_rng(5).normal(size=(8, 256, 256)), jnp.float32))
    x = jnp.ones((4, 256))
    dense = jax.grad(lambda x: stacked_loss(x, Dense(stack.dequantize())))(x)
    step = jax.jit(jax.grad(stacked_loss)).lower(x, stack).compile()
    np.testing.assert_allclose(step(x, stack), dense, rtol=1e-5, atol=1e-6)
    matrix = 256 * 256 * 4
    assert step.memory_analysis().temp_size_in_bytes < 4 * matrix


@jax.tree_util.register_pytree_node_class
class Dense:
    """A plain weight with the quantized ones' method."""

    def __init__(self, w):
        self.w, self.shape = w, w.shape

    def matmul(self, x):
        return jnp.einsum("...i,oi->...o", x, self.w)

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_backward_keeps_packed_bytes_and_statistics_only():
    leaf = compiled(draw((256, 512), "bfloat16")[0])
    _, back = jax.vjp(leaf.matmul, jnp.ones((2, 512)))
    kept = sum(a.nbytes for a in jax.tree.leaves(back))
    assert kept <= sum(a.nbytes for a in jax.tree.leaves(leaf)) < 0.55 * 256 * 512


def test_programs_capture_no_large_constant():
    w = draw((256, 512), "bfloat16")[0]
    leaf, x = compiled(w), jnp.ones((2, 512))
    programs = (
        jax.make_jaxpr(nf4.quantize)(w),
        jax.make_jaxpr(nf4.NF4.dequantize)(leaf),
        jax.make_jaxpr(jax.grad(lambda x, leaf: leaf.matmul(x).sum()))(x, leaf),
    )
    for program in programs:
        assert sum(np.asarray(c).nbytes for c in program.consts) < 2**12


def test_storage_is_four_bits_and_an_eighth_a_weight():
    leaf = jax.eval_shape(nf4.quantize, jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16))
    stored = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaf))
    assert leaf.shape == (1024, 4096)
    assert stored == 1024 * 4096 * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 256 * 4 + 4


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (jnp.ones((2, 64), jnp.float8_e4m3fn), {}, "takes matrices"),
        (jnp.ones((2, 64)), {"block": 48}, "block 48"),
        (jnp.ones((2, 64)), {"dtype": "int8"}, "dtype int8"),
    ],
)
def test_what_nf4_cannot_hold_is_refused(w, options, message):
    with pytest.raises(ValueError, match=message):
        nf4.quantize(w, **options)


def test_a_tree_is_quantized_by_path_and_part_of_a_stack():
    w = jnp.asarray(np.random.default_rng(6).normal(size=(2, 8, 64)), jnp.float32)
    parts = leaves.Stacks((w, w.astype(jnp.bfloat16)), ((0, 3), (1, 2)))
    layers = {"*": {"q_proj": {"weight": w, "bias": w[:, :, 0]}, "k_proj": {"weight": parts}}}
    params = {"model": {"layers": layers, "norm": {"weight": w[0, 0]}}}
    out = quant.quantize(params, "nf4", lambda path: path.endswith("_proj.weight"))
    node = out["model"]["layers"]["*"]
    assert isinstance(node["q_proj"]["weight"], nf4.NF4)
    assert node["q_proj"]["bias"] is layers["*"]["q_proj"]["bias"]
    assert out["model"]["norm"]["weight"] is params["model"]["norm"]["weight"]
    assert [part.dtype for part in node["k_proj"]["weight"].parts] == ["float32", "bfloat16"]
    assert node["k_proj"]["weight"].layers == ((0, 3), (1, 2))
    with pytest.raises(ValueError, match=r"unknown format 'nf5', known are \['int8', 'nf4'"):
        quant.quantize(params, "nf5", lambda path: True)
    with pytest.raises(ValueError, match=r"norm.weight is float32 \(64,\)"):
        quant.quantize(params, "nf4", lambda path: "norm" in path)
    with pytest.raises(ValueError, match="q_proj.weight is no plain array but NF4"):
        quant.quantize(out, "nf4", lambda path: path.endswith("q_proj.weight"))
