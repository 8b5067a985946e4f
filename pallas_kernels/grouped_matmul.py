"""Products of rows with matrices of their own: row n with that of its group, rows sorted by group.

    y[n] = x[n] @ w[g(n)].T        dx[n] = dy[n] @ w[g(n)]        dw[g] = sum_n dy[n].T x[n]

What a mixture of experts needs (arXiv:2211.15841). The kernels (Pallas, Triton) give each tile of
rows one group, so that no row is padded and no product is with a matrix of another group; where a
group ends inside a tile the rest of it is masked. dw takes a group's rows some at a time. Sums are
in float32. XLA's own products go over all groups for each row.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import _choice

Implementation = Literal["pallas", "xla"]
ROWS, COLS, DEPTH = 128, 256, 64  # of a program's tile, and of one step of its sum
WARPS, STAGES = 8, 3
OVER, OVER_ROWS = (64, 128), 64  # of a program's tile of dw, and the rows that it adds at a time


def _sums(of_rows: int, of_other: int, groups: list[int]) -> jax.lax.RaggedDotDimensionNumbers:
    """A sum over these axes; the rows' first axis is in groups."""
    return jax.lax.RaggedDotDimensionNumbers((((of_rows,), (of_other,)), ((), ())), [0], groups)


def reference(
    x: Float[Array, "N I"], w: Float[Array, "E ..."], sizes: Int[Array, " E"], turned: bool = False
) -> Float[Array, "N O"]:
    """The first sizes[0] rows with w[0], and so on, in x's dtype.

    Matrices are [O, I], or [I, O] if `turned`.
    """
    sums = _sums(1, 1 if turned else 2, [0])
    y = jax.lax.ragged_dot_general(
        x, w.astype(x.dtype), sizes, sums, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


def reference_over(
    dy: Float[Array, "N O"], x: Float[Array, "N I"], sizes: Int[Array, " E"]
) -> Float[Array, "E O I"]:
    """dy.T @ x over the rows of each group, float32."""
    return jax.lax.ragged_dot_general(
        dy, x, sizes, _sums(0, 0, []), preferred_element_type=jnp.float32
    )


def supports(x: Array, w: Array) -> str | None:
    """Why the kernel can't run on rows [N, I] and matrices [E, O, I], or None."""
    if _choice.platform() != "gpu":
        return "it needs a GPU"
    if old := _choice.older(8.0):
        return old
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes rows in bfloat16 or float16, got {x.dtype}"
    if w.shape[1] % 16 or w.shape[2] % 16:
        return f"it takes sides of 16 n, got {w.shape[1:]}"
    if max(w.size, x.size, x.shape[0] * w.shape[1]) >= 2**31:
        return f"rows {x.shape} with {w.shape} pass 2^31 elements and are indexed in 32 bits"
    return None


def grouped_matmul(
    x: Float[Array, "N I"],
    w: Float[Array, "E O I"],
    sizes: Int[Array, " E"],
    implementation: Implementation | None = None,
) -> Float[Array, "N O"]:
    """x @ w.T of each row with its group's matrix; `sizes` must add up to N.

    Raises ValueError with the reason where the implementation asked for can't run.
    """
    reasons = {"pallas": supports(x, w), "xla": None}
    return _product(x, w, sizes, _choice.pick("grouped matmul", implementation, reasons))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, w, sizes, chosen):
    return _either(x, w, sizes, chosen, False)


def _either(x, w, sizes, chosen, turned):
    return (_pallas if chosen == "pallas" else reference)(x, w, sizes, turned)


def _forward(x, w, sizes, chosen):
    return _product(x, w, sizes, chosen), (x, w, sizes)


def _backward(chosen, saved, dy):
    x, w, sizes = saved
    dx = _either(dy, w, sizes, chosen, True)
    dw = (_pallas_over if chosen == "pallas" else reference_over)(dy, x, sizes)
    return dx, dw.astype(w.dtype), None


_product.defvjp(_forward, _backward)


def tiles(sizes: Int[Array, " E"], rows: int, tile: int) -> tuple[Array, Array, Array]:
    """(group, first row, end of the group's rows) of each tile, [ceil(rows / tile) + E] each.

    Tiles that are not needed are empty.
    """
    count = -(-rows // tile) + sizes.shape[0]
    ends, needed = jnp.cumsum(sizes), -(-sizes // tile)
    last = jnp.cumsum(needed)
    number = jnp.arange(count, dtype=jnp.int32)
    group = jnp.searchsorted(last, number, side="right").astype(jnp.int32)
    here = jnp.minimum(group, sizes.shape[0] - 1)
    first = ends[here] - sizes[here] + (number - (last - needed)[here]) * tile
    empty = group == sizes.shape[0]
    whole = lambda x: jnp.where(empty, 0, x).astype(jnp.int32)
    return here, whole(first), whole(ends[here])


def _pallas(x, w, sizes, turned):
    rows, width = x.shape
    height = w.shape[2 if turned else 1]
    w = w.astype(x.dtype)
    tile = min(ROWS, max(16, 1 << (max(rows // w.shape[0], 1) - 1).bit_length()))
    cols, depth = _dividing(height, COLS), _dividing(width, DEPTH)
    group, first, end = tiles(sizes, rows, tile)

    def kernel(group_ref, first_ref, end_ref, x_ref, w_ref, y_ref):
        number, at = pl.program_id(0), pl.program_id(1) * cols
        start, stop = first_ref[number], end_ref[number]

        @pl.when(start < stop)
        def _():
            g = group_ref[number]
            here = start + jnp.arange(tile)
            there = here < stop
            across = at + jnp.arange(cols)

            def more(step, total):
                along = step * depth + jnp.arange(depth)
                part = plgpu.load(
                    x_ref.at[here[:, None], along[None]], mask=there[:, None], other=0
                )
                sides = across[None], along[:, None]
                matrix = plgpu.load(w_ref.at[(g, *(sides[::-1] if turned else sides))])
                return total + jnp.dot(part, matrix, preferred_element_type=jnp.float32)

            total = jnp.zeros((tile, cols), jnp.float32)
            total = jax.lax.fori_loop(0, width // depth, more, total)
            plgpu.store(
                y_ref.at[here[:, None], across[None]], total.astype(x.dtype), mask=there[:, None]
            )

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, height), x.dtype),
        grid=(group.shape[0], height // cols),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=_choice.interpreting(),
        name="grouped_matmul",
    )(group, first, end, x, w)


def _dividing(side: int, most: int) -> int:
    """The largest power of two from 16 to `most` that divides a side."""
    return max(n for n in (16, 32, 64, 128, 256) if side % n == 0 and n <= most)


def _pallas_over(dy, x, sizes):
    height, width = dy.shape[1], x.shape[1]
    down, across = _dividing(height, OVER[0]), _dividing(width, OVER[1])
    ends = jnp.cumsum(sizes).astype(jnp.int32)

    def kernel(start_ref, end_ref, dy_ref, x_ref, out_ref):
        group = pl.program_id(0)
        start, stop = start_ref[group], end_ref[group]
        here = pl.program_id(1) * down + jnp.arange(down)
        there = pl.program_id(2) * across + jnp.arange(across)

        def more(step, total):
            row = start + step * OVER_ROWS + jnp.arange(OVER_ROWS)
            inside = (row < stop)[:, None]
            left = plgpu.load(dy_ref.at[row[:, None], here[None]], mask=inside, other=0)
            right = plgpu.load(x_ref.at[row[:, None], there[None]], mask=inside, other=0)
            return total + jnp.dot(left.T, right, preferred_element_type=jnp.float32)

        total = jnp.zeros((down, across), jnp.float32)
        steps = (stop - start + OVER_ROWS - 1) // OVER_ROWS
        plgpu.store(
            out_ref.at[group, here[:, None], there[None]],
            jax.lax.fori_loop(0, steps, more, total),
        )

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((sizes.shape[0], height, width), jnp.float32),
        grid=(sizes.shape[0], height // down, width // across),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=STAGES),
        interpret=_choice.interpreting(),
        name="grouped_matmul_over",
    )((ends - sizes).astype(jnp.int32), ends, dy, x.astype(dy.dtype))
