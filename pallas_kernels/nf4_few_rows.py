"""NF4 products with few rows of x: decoding reads a weight's packed bytes once and no others.

    y[m, o] = sum_b scale[o, b] * sum_k CODES[code[o, 64 b + k]] * x[m, 64 b + k]

Sums are float32, and so are scales, behind each block's product: no weight is rounded on its own.
Widths that 512 divides take up to 16 rows to tensor cores with a table of byte pairs
(`_nf4_few_rows_warp`); other widths take up to 4 rows to CUDA cores, and what is left goes to
tensor cores by tiles (`_nf4_few_rows_triton`). On tensor cores the codebook is bfloat16 (relative
2^-9), else float32. There is no gradient (`nf4_matmul.products` has one).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from operator import index
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import _choice, nf4
from pallas_kernels.nf4_dequantize import one_layer

Layer = int | Int[Array, ""] | Int[Array, "1"] | None
Implementation = Literal["triton", "xla"]
MOST_ROWS = 64
MOST_IN_WARPS = 16  # rows of x that `warp_kernel` takes
MOST_VECTORS = 4  # rows of x that CUDA cores take
WIDEST_VECTOR = 16384  # columns that 512 threads keep in registers
MOST_MATRICES = 3
PROCESSORS = 132  # of an H100; others run the same grids, less evenly


class Plan(NamedTuple):
    """How a product is cut: weight rows of a program, and what else its kernel asks for."""

    rows: int
    warps: int
    columns: int = 0  # of the tile, at least 8 and x's rows; 0 runs on CUDA cores
    splits: int = 1  # equal parts of a row's blocks, added afterwards
    stages: int = 1
    step: int = 0  # blocks that a warp asks for at once; not 0 is `warp_kernel`, of 16 rows
    tiles: int = 1  # groups of 16 rows that a program of `warp_kernel` takes
    registers: int = 0  # of a thread of `warp_kernel` at most; 0 leaves it to the compiler


def reference(
    layout: nf4.Layout,
    x: Float[Array, "M I"],
    packed: UInt8[Array, "*L O half"],
    statistics: nf4.Statistics,
    layer: Layer = None,
) -> Float[Array, "M O"]:
    """The same product by way of a whole dequantized weight, which is cast to `layout.dtype`."""
    number = None if layer is None else jnp.asarray(layer, jnp.int32).reshape(())
    return nf4.matmul(layout, x, *one_layer(packed, statistics, number))


def few_rows(
    layout: nf4.Layout,
    x: Float[Array, "M I"],
    packed: UInt8[Array, "*L O half"],
    statistics: nf4.Statistics,
    layer: Layer = None,
    implementation: Implementation | None = None,
    plan: Plan | None = None,
) -> Float[Array, "M O"]:
    """x @ w.T in x's dtype, summed in float32, of one matrix or of one layer of a stack.

    A stack is read in place. None takes triton where `supports` is silent, else xla; naming
    triton where it can't run raises ValueError with the reason, a layer outside the stack too.
    """
    return few_rows_together((layout,), x, (packed,), (statistics,), layer, implementation, plan)[0]


def few_rows_together(
    layouts: Sequence[nf4.Layout],
    x: Float[Array, "M I"],
    packed: Sequence[UInt8[Array, "*L _ half"]],
    statistics: Sequence[nf4.Statistics],
    layer: Layer = None,
    implementation: Implementation | None = None,
    plan: Plan | None = None,
) -> tuple[Float[Array, "M O"], ...]:
    """Products of one x with up to three matrices (q, k, v; gate, up) in one launch."""
    _check_layer(packed, layer)
    reason = supports(layouts, x, packed, statistics)
    reasons = {"triton": reason, "xla": None}
    if _choice.pick("NF4 products with few rows", implementation, reasons) == "xla":
        each = zip(layouts, packed, statistics, strict=True)
        return tuple(reference(lay, x, p, s, layer) for lay, p, s in each)
    return _launch(layouts, x, packed, statistics, layer, plan)


def _check_layer(packed, layer):
    for one in packed:
        if (one.ndim == 3) != (layer is not None):
            raise ValueError(
                "a stack [L, O, I/2] is read with a layer, a matrix [O, I/2] without: "
                f"got packed bytes {one.shape} and layer {layer}"
            )
        if layer is not None and not isinstance(layer, jax.Array):
            if not 0 <= index(layer) < one.shape[0]:
                raise ValueError(f"got layer {layer}, the stack has 0 to {one.shape[0] - 1}")


def supports(
    layouts: Sequence[nf4.Layout],
    x: Float[Array, "M I"],
    packed: Sequence[UInt8[Array, "*L _ half"]],
    statistics: Sequence[nf4.Statistics],
) -> str | None:
    """Why the Triton kernels can't take these, or None if they can."""
    if _choice.platform() != "gpu" or jax.default_backend() != "gpu":
        return f"it needs a GPU, got platform {jax.default_backend()}"
    if old := _choice.older(8.0):
        return old
    missing = [name for name in ("triton", "jax_triton") if find_spec(name) is None]
    return f"it needs {missing}, not installed" if missing else fits(layouts, x, packed, statistics)


def fits(
    layouts: Sequence[nf4.Layout],
    x: Float[Array, "M I"],
    packed: Sequence[UInt8[Array, "*L _ half"]],
    statistics: Sequence[nf4.Statistics],
) -> str | None:
    """Why shapes or dtypes are beyond the kernels on any machine, or None."""
    kinds = {s.nested_absmax is not None for s in statistics}
    stacks = {p.shape[:-2] for p in packed}
    rules = {
        f"1 to {MOST_MATRICES} matrices, got {len(layouts)}": 1 <= len(layouts) <= MOST_MATRICES,
        f"x in bfloat16, got {x.dtype}": x.dtype == jnp.bfloat16,
        f"1 to {MOST_ROWS} rows of x, got {x.shape[0]}": 1 <= x.shape[0] <= MOST_ROWS,
        f"matrices of one depth, got {stacks}": len(stacks) == 1,
        "statistics all nested or all plain, got both": len(kinds) == 1,
    }
    for layout, one in zip(layouts, packed, strict=True):
        height, width = layout.matrix
        rules |= {
            f"blocks of 64, got {layout.block}": layout.block == 64,
            f"nested blocks of 256, got {layout.nested_block}": layout.nested_block == 256,
            f"a width that 64 divides, got {width}": width % 64 == 0,
            f"x of width {width}, got {x.shape[1]}": width == x.shape[1],
            f"packed bytes [..., {height}, {width // 2}], got {one.shape}": one.shape[-2:]
            == (height, width // 2),
        }
    broken = [rule for rule, holds in rules.items() if not holds]
    return f"it takes {broken[0]}" if broken else None


def best_plan(rows: int, width: int, heights: Sequence[int]) -> Plan:
    """The cut for x [rows, width] and matrices of these heights, from H100 budgets."""
    groups = sum(-(-height // 16) for height in heights)
    if rows <= MOST_IN_WARPS and width // 64 % 8 == 0:
        return _warp_plan(rows, width // 64, groups)
    blocks = _power_of_two(width // 64)
    if rows <= MOST_VECTORS and width <= WIDEST_VECTOR:
        warps = max(1, min(16, blocks // 16))
        return Plan(rows=8 if rows <= 2 and warps < 16 else 4, warps=warps)
    tile = 64
    tiles = sum(-(-height // tile) for height in heights)
    splits = 1
    while tiles * splits < 3 * PROCESSORS and width // 64 % (2 * splits) == 0:
        splits *= 2
    return Plan(tile, 4, columns=_power_of_two(max(8, rows)), splits=splits, stages=4)


def _warp_plan(rows, blocks, groups):
    """Eight warps, twice on a processor; for one row smaller programs were measured faster."""
    step = next(step for step in (4, 2, 1) if blocks % (8 * step) == 0)
    tiles = -(-groups // (2 * PROCESSORS)) if blocks <= 16 * step else 1
    return Plan(16, 8, step=step, tiles=min(tiles, 2) if rows == 1 else tiles, registers=128)


def _power_of_two(least):
    return 1 << (least - 1).bit_length()


def constants(
    layouts: Sequence[nf4.Layout], rows: int, nested: bool, traced: bool, plan: Plan
) -> tuple[dict, tuple[int, ...]]:
    """The compile-time arguments of a plan's kernel, and its grid.

    Raises ValueError where the parts of a row's blocks would not be equal, and for warps that
    leave `warp_kernel`'s table of 256 pairs unfilled or have no room for their sums.
    """
    if layouts[0].matrix[1] // 64 % plan.splits:
        raise ValueError(f"{plan.splits} parts don't divide {layouts[0].matrix[1] // 64} blocks")
    heights = [layout.matrix[0] for layout in layouts] + [0] * (MOST_MATRICES - len(layouts))
    width = layouts[0].matrix[1]
    tiles = sum(-(-height // plan.rows) for height in heights)
    sides = dict(zip(("O0", "O1", "O2"), heights, strict=True))
    if plan.step:
        parts, blocks = plan.warps * plan.step, layouts[0].matrix[1] // 64
        if plan.rows != 16 or blocks % parts:
            raise ValueError(f"{plan} takes 16 rows, and {parts} has to divide {blocks} blocks")
        most = 16 if plan.step == 4 and rows <= 2 else 8
        if plan.warps not in (8, most):
            raise ValueError(
                f"{plan.warps} warps with {rows} rows of x: 8 fill the table of 256 pairs, "
                f"and sums have room for {most}"
            )
    both = {"M": rows, "I": width, **sides, "NESTED": nested, "TRACED": traced, "ROWS": plan.rows}
    if plan.step:
        both |= {"WARPS": plan.warps, "STEP": plan.step, "TILES": plan.tiles}
        both |= {"REGISTERS": plan.registers}
        return both, (-(-tiles // plan.tiles),)
    if plan.columns:
        both |= {"COLUMNS": plan.columns, "SPLITS": plan.splits, "STAGES": plan.stages}
        return both, (tiles, plan.splits)
    return both | {"BLOCKS": _power_of_two(width // 64)}, (tiles,)


def _launch(layouts, x, packed, statistics, layer, plan):
    from pallas_kernels import _nf4_few_rows_triton, _nf4_few_rows_warp, _triton_launch

    heights = [layout.matrix[0] for layout in layouts]
    plan = plan or best_plan(x.shape[0], x.shape[1], heights)
    traced = isinstance(layer, jax.Array)
    nested = statistics[0].nested_absmax is not None
    constexprs, grid = constants(layouts, x.shape[0], nested, traced, plan)
    matrices = [_pointers(p, s) for p, s in zip(packed, statistics, strict=True)]
    matrices += [matrices[0]] * (MOST_MATRICES - len(matrices))
    number = layer.astype(jnp.int32).reshape(1) if traced else x
    parts = (plan.splits,) if plan.splits > 1 else ()
    kernel = _nf4_few_rows_triton.vector_kernel
    if plan.step or plan.columns:
        kernel = (
            _nf4_few_rows_triton.tile_kernel if plan.columns else _nf4_few_rows_warp.warp_kernel
        )
    args = x, number, 0 if traced or layer is None else index(layer), *sum(matrices, ())
    shape = (*parts, x.shape[0], sum(heights))
    out = jax.ShapeDtypeStruct(shape, jnp.float32 if parts else x.dtype)
    constexprs |= {"SHUFFLED": True}
    y = _triton_launch.call(
        args, kernel, out, grid, plan.warps, plan.stages, constexprs, plan.registers
    )
    y = y.sum(0).astype(x.dtype) if parts else y
    starts = [sum(heights[:i]) for i in range(len(heights))]
    return tuple(y[:, at : at + height] for at, height in zip(starts, heights, strict=True))


def _pointers(packed, statistics):
    absmax, *nested = statistics
    return packed, absmax, *(absmax if array is None else array for array in nested)
