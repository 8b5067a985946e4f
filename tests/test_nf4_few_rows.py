"""NF4 products with few rows: kernels in Triton's interpreter, their SASS, the choice of road."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import nf4, nf4_few_rows
from pallas_kernels.nf4_few_rows import Plan

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "tests" / "few_rows_in_triton.py"


def draw(shape, rows, layers=(), nested=True, seed=0):
    """x in bfloat16 and a stack of quantized weights whose scales differ by a factor of ten."""
    rng = np.random.default_rng(seed)
    height, width = shape
    size = height * width
    w = rng.normal(0, 0.02, (*layers, size)) * np.exp(rng.normal(0, 0.5, (*layers, size)))
    one = lambda w: nf4.quantize(w.reshape(shape))
    packed, absmax = (jax.vmap(one) if layers else one)(jnp.asarray(w, jnp.float32))
    nest = jax.vmap(nf4.nest) if layers else nf4.nest
    statistics = nest(absmax) if nested else nf4.Statistics(absmax)
    x = jnp.asarray(rng.normal(0, 1, (rows, width)), jnp.bfloat16)
    return x, packed.reshape(*layers, height, width // 2), statistics


def exact(shape, x, packed, statistics):
    """float64 products with the weight in float32."""
    w = nf4.dequantize(nf4.Layout(shape, dtype="float32"), packed, statistics)
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


def test_on_a_cpu_the_product_is_that_of_the_dequantized_weight():
    x, packed, statistics = draw((96, 256), 3, (2,))
    layout = nf4.Layout((96, 256))
    one = jax.tree.map(lambda a: a[1], (packed, statistics))
    expected = nf4.matmul(layout, x, *one)
    for layer in (1, jnp.int32(1), jnp.array([1])):
        y = nf4_few_rows.few_rows(layout, x, packed, statistics, layer)
        np.testing.assert_array_equal(y, expected)
    alone = nf4_few_rows.few_rows(layout, x, *one)
    np.testing.assert_array_equal(alone, expected)
    assert alone.dtype == x.dtype


def test_products_together_equal_separate_ones():
    x, *first = draw((64, 128), 2, seed=1)
    _, *second = draw((96, 128), 2, seed=2)
    layouts = [nf4.Layout((64, 128)), nf4.Layout((96, 128))]
    both = nf4_few_rows.few_rows_together(layouts, x, *zip(first, second, strict=True))
    for y, layout, one in zip(both, layouts, (first, second), strict=True):
        np.testing.assert_array_equal(y, nf4_few_rows.few_rows(layout, x, *one))


REFUSED = {
    "blocks of 64, got 128": dict(layout=nf4.Layout((64, 128), block=128)),
    "nested blocks of 256, got 64": dict(layout=nf4.Layout((64, 128), nested_block=64)),
    "x in bfloat16, got float32": dict(x=jnp.zeros((1, 128))),
    "1 to 64 rows of x, got 65": dict(x=jnp.zeros((65, 128), jnp.bfloat16)),
    "x of width 128, got 64": dict(x=jnp.zeros((1, 64), jnp.bfloat16)),
    "a width that 64 divides, got 96": dict(layout=nf4.Layout((64, 96))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernels_cannot_take_is_said(reason):
    x, packed, statistics = draw((64, 128), 1)
    given = dict(layout=nf4.Layout((64, 128)), x=x) | REFUSED[reason]
    said = nf4_few_rows.fits([given["layout"]], given["x"], [packed], [statistics])
    assert said == f"it takes {reason}"
    assert nf4_few_rows.fits([nf4.Layout((64, 128))], x, [packed], [statistics]) is None


def test_triton_asked_for_on_a_cpu_raises_with_the_reason():
    x, packed, statistics = draw((64, 128), 1)
    with pytest.raises(ValueError, match="needs a GPU, got platform cpu"):
        layout = nf4.Layout((64, 128))
        nf4_few_rows.few_rows(layout, x, packed, statistics, implementation="triton")


@pytest.mark.parametrize("layer", [None, 2, -1])
def test_a_layer_outside_the_stack_raises(layer):
    x, packed, statistics = draw((64, 128), 1, (2,))
    with pytest.raises(ValueError, match="layer"):
        nf4_few_rows.few_rows(nf4.Layout((64, 128)), x, packed, statistics, layer)


# Heights that no tile divides, widths of which a power of two is not, plain and nested statistics.
INTERPRETED = {
    "vector": ([(20, 192)], 1, Plan(8, 2), True),
    "vector of two rows": ([(24, 128)], 2, Plan(4, 2), False),
    "vectors together": ([(40, 128), (8, 128), (20, 128)], 4, Plan(8, 2), True),
    "warps": ([(40, 1024)], 1, Plan(16, 8, step=1, tiles=2), True),
    "one row": ([(40, 2048)], 1, Plan(16, 8, step=4, tiles=2), True),
    "two rows, 16 warps": ([(24, 4096)], 2, Plan(16, 16, step=4, tiles=2), False),
    "one row together": ([(40, 2048), (16, 2048)], 1, Plan(16, 8, step=4, tiles=3), True),
    "two rows together": ([(24, 2048), (8, 2048), (20, 2048)], 2, Plan(16, 8, step=4), True),
    "warps, steps": ([(32, 4096)], 3, Plan(16, 8, step=4), True),
    "warps, plain": ([(24, 2048)], 11, Plan(16, 8, step=2, tiles=2), False),
    "warps together": (
        [(40, 1024), (16, 1024), (24, 1024)],
        16,
        Plan(16, 8, step=2, tiles=4),
        True,
    ),
    "tile": ([(40, 192)], 5, Plan(32, 4, 8), True),
    "tile in parts": ([(32, 384)], 16, Plan(32, 4, 16, 2), True),
    "tiles together": ([(40, 128), (8, 128), (20, 128)], 3, Plan(16, 4, 8), False),
}


CASES = [(name, i % 2 == 1) for i, name in enumerate(INTERPRETED)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Folder of each case's result, all computed in one process, since triton is told at import."""
    pytest.importorskip("triton", reason="the interpreter comes with triton")
    folder = tmp_path_factory.mktemp("interpreted")
    calls = []
    for i, (name, traced) in enumerate(CASES):
        shapes, rows, plan, nested = INTERPRETED[name]
        drawn = drawn_for(name)
        arrays = {"x": np.asarray(drawn[0][0], np.float32)}
        for j, (_, packed, statistics) in enumerate(drawn):
            given = [packed, *(a for a in statistics if a is not None)]
            arrays |= {f"{j}_{k}": np.asarray(a) for k, a in enumerate(given)}
        np.savez(folder / f"{i}.npz", **arrays)
        layouts = [nf4.Layout(shape) for shape in shapes]
        calls.append(nf4_few_rows.constants(layouts, rows, nested, traced, plan))
    done = subprocess.run(
        [sys.executable, RUNNER, folder, repr(calls)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def drawn_for(name):
    shapes, rows, _, nested = INTERPRETED[name]
    return [draw(shape, rows, (3,), nested, seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("name", "traced"), CASES)
def test_kernels_interpreted_on_a_cpu_give_the_float64_product(name, traced, interpreted):
    shapes, rows, plan, _ = INTERPRETED[name]
    y = np.load(interpreted / f"{CASES.index((name, traced))}.npy").astype(np.float64)
    drawn = drawn_for(name)
    one = [jax.tree.map(lambda a: a[2], (p, s)) for _, p, s in drawn]
    each = [exact(shape, drawn[0][0], *o) for shape, o in zip(shapes, one, strict=True)]
    expected = np.concatenate(each, axis=1)
    wrong = np.linalg.norm(y.sum(0) - expected) / np.linalg.norm(expected)
    assert wrong < (4e-3 if plan.columns or plan.step else 1e-6), wrong


@pytest.mark.parametrize(("rows", "plan", "most"), [
    (1, Plan(16, 4, step=4), 16), (2, Plan(16, 32, step=4), 16), (3, Plan(16, 16, step=4), 8),
    (1, Plan(16, 16, step=2), 8),
])  # fmt: skip
def test_warps_that_leave_the_table_unfilled_or_have_no_room_are_refused(rows, plan, most):
    with pytest.raises(ValueError, match=f"{plan.warps} warps .* sums have room for {most}"):
        nf4_few_rows.constants([nf4.Layout((64, 8192))], rows, True, False, plan)


@pytest.mark.parametrize("heights", [[1024], [4096], [14336], [14336, 14336]])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("width", [1024, 3072, 4096, 14336])
def test_the_default_plan_is_one_that_its_kernel_takes(heights, rows, width):
    plan = nf4_few_rows.best_plan(rows, width, heights)
    layouts = [nf4.Layout((height, width)) for height in heights]
    constants, grid = nf4_few_rows.constants(layouts, rows, True, False, plan)
    assert constants["WARPS"] == 8 and constants["REGISTERS"] == 128
    assert grid[0] * constants["TILES"] * 16 >= sum(heights)


def steps(program):
    """Instructions of PTX between braces: name and operands each."""
    body = program.strip("{} ").split(";")
    pairs = [line.split(None, 1) for line in body if line.strip() and ".reg" not in line]
    return [(name.split(".")[0], [a.strip() for a in rest.split(",")]) for name, rest in pairs]


def run_in_warp(program, inputs, outputs):
    """Values [lane] of each output; shfl as the PTX manual has it, on 32 lanes."""
    values = {name: np.asarray(v, np.uint32) for name, v in inputs.items()}
    lane = np.arange(32)
    for name, (to, *given) in steps(program):
        if name == "shr":
            values[to] = values[given[0]] >> np.uint32(int(given[1]))
        elif name == "shfl":
            segment, clamp = int(given[2], 0) >> 8 & 31, int(given[2], 0) & 31
            source = (lane & segment) | (values[given[1]] & np.uint32(31 & ~segment))
            assert (source <= ((lane & segment) | (clamp & ~segment))).all()
            values[to] = values[given[0]][source]
        else:
            assert (name, given[2]) == ("prmt", "0x7632"), name
            high = values[given[1]] & np.uint32(0xFFFF0000)
            values[to] = high | values[given[0]] >> np.uint32(16)
    return [values[out] for out in outputs]


def test_the_look_up_by_shuffle_gives_each_codes_value():
    kernels = pytest.importorskip("pallas_kernels._nf4_few_rows_triton", reason="needs triton")
    words = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
    octets = words.view(np.uint8).reshape(32, 4)
    codes = np.stack([octets >> 4, octets & 15], axis=-1)
    table = np.tile(nf4.CODES, 2)
    found = run_in_warp(
        kernels.EIGHT.value, {"$8": words, "$9": table.view(np.uint32)}, [f"${k}" for k in range(8)]
    )
    np.testing.assert_array_equal(
        np.stack(found, 1).view(np.float32), nf4.CODES[codes.reshape(32, 8)]
    )
    rounded = np.asarray(jnp.asarray(table, jnp.bfloat16).astype(jnp.float32))
    given = {"$4": words, "$5": rounded.view(np.uint32)}
    found = run_in_warp(kernels.FOUR.value, given, [f"${k}" for k in range(4)])
    pairs = np.stack(found, 1).view(jnp.bfloat16).reshape(32, 2, 4).astype(np.float32)
    np.testing.assert_array_equal(pairs, np.moveaxis(rounded[codes], 2, 1))


# Shape, rows, plan, most instructions in all for each of a thread's weights.
COMPILED = {
    "vector": ((4096, 4096), 1, Plan(8, 4), 4.6),
    "long vector": ((4096, 14336), 1, Plan(4, 16), 6.0),
    "warps of 1": ((4096, 4096), 1, Plan(16, 8, step=4, registers=128), 3.3),
    "warps of 1, 16": ((4096, 4096), 1, Plan(16, 16, step=4, tiles=2), 3.5),
    "long warps of 1": ((4096, 14336), 1, Plan(16, 8, step=4, registers=128), 2.7),
    "warps of 16": ((4096, 4096), 16, Plan(16, 8, step=4, registers=128), 4.0),
    "tile of 16": ((4096, 4096), 16, Plan(64, 4, 16, 4, 4), None),
    "tile of 64": ((4096, 4096), 64, Plan(128, 8, 64, 4, 3), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_hopper_code_spills_nothing_and_stays_short(name, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="its compiler makes the code")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels import _nf4_few_rows_triton, _nf4_few_rows_warp

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape, rows, plan, most = COMPILED[name]
    constants, _ = nf4_few_rows.constants([nf4.Layout(shape)], rows, True, False, plan)
    kernel = _nf4_few_rows_triton.vector_kernel
    if plan.step:
        kernel = _nf4_few_rows_warp.warp_kernel
    elif plan.columns:
        kernel = _nf4_few_rows_triton.tile_kernel
    kinds = {"x": "*bf16", "layers": "*bf16", "layer": "i32"}
    kinds |= {f"{kind}{i}": "*u8" for kind in ("packed", "absmax") for i in range(3)}
    kinds |= {"y": "*fp32" if plan.splits > 1 else "*bf16", **dict.fromkeys(constants, "constexpr")}
    kinds |= {"SHUFFLED": "constexpr"}
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        {**constants, "SHUFFLED": True},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    options |= {"maxnreg": plan.registers} if plan.registers else {}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", tmp_path / "kernel.cubin"], capture_output=True, text=True)
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text.stdout)
    assert len(names) > 100, text.stderr
    assert not [n for n in names if n.startswith(("LDL", "STL"))]
    if plan.columns:
        assert sum(n.startswith("HGMMA") for n in names) >= 4
    else:
        width = shape[1] if plan.step else 64 * constants["BLOCKS"]
        weights = plan.rows * plan.tiles * width / (32 * plan.warps)
        assert len(names) / weights < most, len(names) / weights
