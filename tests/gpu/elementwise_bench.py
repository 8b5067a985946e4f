"""Kernels for what lies between a layer's products, beside what XLA makes of the same, on one GPU.

    python tests/gpu/elementwise_bench.py --output docs/performance/elementwise.json

Candidates, not part of the library: one enters `pallas_kernels` where it beats XLA here. Each is
first compared with its reference, made of `unsloth_jax.layers` and `unsloth_jax.rope`, then timed
in a jit loop (`workflows.bench.kernels`) at Llama-3.1-8B's sizes, with each of its tiles.
Operands and results are bfloat16, sums float32. The floor is every operand read and every result
written once.
"""

import argparse
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import _choice, adam8_update
from unsloth_jax import layers, rope
from workflows.bench import kernels, rows
from workflows.bench.kernels import Op

EPS = 1e-5
TOLERANCE = 1e-2  # of the largest value: roundings to bfloat16 that one side leaves out
COLUMNS = "name tile ours_us other_us floor_us ratio".split()


class Sizes(NamedTuple):
    """Widths of model, mlp and a head, and numbers of heads; all but F are powers of two."""

    D: int = 4096
    F: int = 14336
    h: int = 128
    H: int = 32
    K: int = 8


class Tile(NamedTuple):
    """Rows of one program, and its warps."""

    rows: int
    warps: int


# Rows of the model's width; tokens' heads; pieces of a row of the mlp's width.
ROW_TILES = [Tile(1, 4), Tile(1, 8), Tile(2, 8)]
TOKEN_TILES = [Tile(1, 4), Tile(1, 2), Tile(2, 8)]
PIECE_TILES = [Tile(1, 4), Tile(1, 8), Tile(2, 4)]


class Candidate(NamedTuple):
    """An operation to time; `op.ours` takes one of the tiles first."""

    op: Op
    tiles: list[Tile]


def launch(body: Callable[..., None], tile: Tile, outs: list[Any], *operands: jax.Array) -> list:
    """Runs `body` on refs of operands and results, `tile.rows` of their first axis at a time.

    An operand of one dimension goes to every program as a whole.
    """

    def spec(x):
        if x.ndim == 1:
            return pl.BlockSpec(x.shape, lambda i: (0,))
        return pl.BlockSpec((tile.rows, *x.shape[1:]), lambda i: (i,) + (0,) * (x.ndim - 1))

    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs],
        grid=(outs[0].shape[0] // tile.rows,),
        in_specs=list(map(spec, operands)),
        out_specs=list(map(spec, outs)),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=_choice.interpreting(),
        name="candidate",
    )(*operands)


def wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def inverse_norm(x: jax.Array) -> jax.Array:
    """1 / sqrt(mean(x^2) + eps) of each row [M, D] as [M, 1]."""
    return jax.lax.rsqrt(jnp.sum(x * x, axis=1) / x.shape[1] + EPS)[:, None]


def draws(key: jax.Array, *shapes: tuple[int, ...]) -> kernels.Arrays:
    keys = jax.random.split(key, len(shapes))
    draw = lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16)
    return tuple(draw(*pair) for pair in zip(keys, shapes, strict=True))


def norm(M: int, s: Sizes, joined: bool) -> Candidate:
    """A norm; or (x + d, the norm of that), where a product's result joins the residual."""

    def body(w_ref, x_ref, *refs):
        x = x_ref[...]
        if joined:
            d_ref, sum_ref, out_ref = refs
            x = (wide(x) + wide(d_ref[...])).astype(x.dtype)
            sum_ref[...] = x
        unit = wide(x) * inverse_norm(wide(x))
        refs[-1][...] = unit.astype(x.dtype) * w_ref[...][None]

    def reference(w, x, *d):
        x = x + d[0] if joined else x
        y = layers.rms_norm(w, x, EPS)
        return [x, y] if joined else [y]

    count = 2 if joined else 1
    ours = lambda tile, w, x, *d: launch(body, tile, [x] * count, w, x, *d)
    inputs = lambda key: draws(key, (s.D,), *[(M, s.D)] * count)
    name = f"{'residual and ' * joined}RMSNorm, {M}x{s.D}"
    return Candidate(Op(name, inputs, ours, reference, 4 * count * M * s.D, 0), ROW_TILES)


def norm_backward(M: int, s: Sizes, parts: int) -> Candidate:
    """The cotangent of a norm's input, the residual's added; the result's comes in parts.

    Where several products shared the result, it is wanted again for their adapters.
    """
    again = parts > 1

    def body(w_ref, x_ref, dx_ref, *refs):
        dy_refs, (out_ref, *y_refs) = refs[:parts], refs[parts:]
        x, w = wide(x_ref[...]), wide(w_ref[...])[None]
        du = sum(wide(ref[...]) for ref in dy_refs) * w
        inverse = inverse_norm(x)
        unit = x * inverse
        along = (jnp.sum(du * unit, axis=1) / x.shape[1])[:, None]
        out_ref[...] = (inverse * (du - unit * along) + wide(dx_ref[...])).astype(out_ref.dtype)
        for ref in y_refs:
            ref[...] = (unit * w).astype(ref.dtype)

    def reference(w, x, dx, *dys):
        y, back = jax.vjp(lambda x: layers.rms_norm(w, x, EPS), x)
        return [back(sum(dys))[0] + dx, *[y] * again]

    ours = lambda tile, w, x, *rest: launch(body, tile, [x] * (1 + again), w, x, *rest)
    inputs = lambda key: draws(key, (s.D,), *[(M, s.D)] * (2 + parts))
    name = f"RMSNorm backward, {parts} part{'s, norm again' * again}, {M}x{s.D}"
    op = Op(name, inputs, ours, reference, 2 * (3 + parts + again) * M * s.D, 0)
    return Candidate(op, ROW_TILES)


def angles(M: int, s: Sizes) -> rope.Angles:
    place = jnp.arange(M, dtype=jnp.int32)[None]
    return rope.angles(rope.Rope("default", 5e5, s.h), place, place)


def turn(cos_ref, sin_ref, x_ref, out_ref, heads: slice, sign: int) -> None:
    """Rotates `heads` of x [M, n, 2, h / 2], backwards where `sign` is -1."""
    cos, sin = cos_ref[...][:, None], sin_ref[...][:, None] * sign
    left, right = (wide(x_ref[:, heads, i, :]) for i in (0, 1))
    out_ref[:, :, 0, :] = (left * cos - right * sin).astype(out_ref.dtype)
    out_ref[:, :, 1, :] = (right * cos + left * sin).astype(out_ref.dtype)


def rotation(M: int, s: Sizes) -> Candidate:
    """q and k turned by their positions, and v, out of the one product that makes all three."""
    heads = [slice(0, s.H), slice(s.H, s.H + s.K), slice(s.H + s.K, s.H + 2 * s.K)]

    def body(cos_ref, sin_ref, x_ref, q_ref, k_ref, v_ref):
        turn(cos_ref, sin_ref, x_ref, q_ref, heads[0], 1)
        turn(cos_ref, sin_ref, x_ref, k_ref, heads[1], 1)
        v_ref[...] = x_ref[:, heads[2], :, :]

    def ours(tile, cos, sin, x):
        by = (y.reshape(M, s.h // 2) for y in (cos, sin))
        shapes = [(M, n, 2, s.h // 2) for n in (s.H, s.K, s.K)]
        outs = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes]
        ys = launch(body, tile, outs, *by, x.reshape(M, -1, 2, s.h // 2))
        return [y.reshape(1, M, y.shape[1], s.h) for y in ys]

    def reference(cos, sin, x):
        q, k, v = (x.reshape(1, M, -1, s.h)[:, :, part] for part in heads)
        return [rope.rotate(q, (cos, sin)), rope.rotate(k, (cos, sin)), v]

    width = s.h * (s.H + 2 * s.K)
    inputs = lambda key: (*angles(M, s), *draws(key, (1, M, width)))
    name = f"RoPE, {M} tokens, {s.H} and {s.K} heads"
    return Candidate(Op(name, inputs, ours, reference, 4 * M * (width + s.h), 0), TOKEN_TILES)


def rotation_backward(M: int, s: Sizes) -> Candidate:
    """Cotangents of q and k, which attention gives apart."""

    def body(cos_ref, sin_ref, q_ref, k_ref, dq_ref, dk_ref):
        turn(cos_ref, sin_ref, q_ref, dq_ref, slice(None), -1)
        turn(cos_ref, sin_ref, k_ref, dk_ref, slice(None), -1)

    def ours(tile, cos, sin, q, k):
        by = (x.reshape(M, s.h // 2) for x in (cos, sin))
        halves = [x.reshape(M, x.shape[2], 2, s.h // 2) for x in (q, k)]
        outs = launch(body, tile, halves, *by, *halves)
        return [y.reshape(x.shape) for x, y in zip((q, k), outs, strict=True)]

    def reference(cos, sin, q, k):
        turned = lambda *xs: [rope.rotate(x, (cos, sin)) for x in xs]
        return list(jax.vjp(turned, q, k)[1]([q, k]))

    inputs = lambda key: (*angles(M, s), *draws(key, (1, M, s.H, s.h), (1, M, s.K, s.h)))
    name = f"RoPE backward, {M} tokens, {s.H} and {s.K} heads"
    moved = 4 * M * s.h * (s.H + s.K + 1)
    return Candidate(Op(name, inputs, ours, reference, moved, 0), TOKEN_TILES)


def gated(M: int, s: Sizes, name: str, backward: bool) -> Candidate:
    """act(gate) * up, or both cotangents and, for the next product's adapter, that again."""
    width = s.F & -s.F  # a power of two; an elementwise operation may be cut anywhere
    f = lambda gate, up: layers.ACTIVATIONS[name](gate) * up

    def forward_body(gate_ref, up_ref, out_ref):
        out_ref[...] = f(wide(gate_ref[...]), wide(up_ref[...])).astype(out_ref.dtype)

    def backward_body(gate_ref, up_ref, dy_ref, *out_refs):
        y, back = jax.vjp(f, wide(gate_ref[...]), wide(up_ref[...]))
        for ref, value in zip(out_refs, (*back(wide(dy_ref[...])), y), strict=True):
            ref[...] = value.astype(ref.dtype)

    def ours(tile, *xs):
        cut = [x.reshape(-1, width) for x in xs]
        body, count = (backward_body, 3) if backward else (forward_body, 1)
        return [y.reshape(M, s.F) for y in launch(body, tile, cut[:count], *cut)]

    def reference(gate, up, *dy):
        y, back = jax.vjp(f, gate, up)
        return [*back(*dy), y] if backward else [y]

    inputs = lambda key: draws(key, *[(M, s.F)] * (3 if backward else 2))
    kind = {"silu": "SwiGLU", "gelu_pytorch_tanh": "GeGLU"}[name]
    full = f"{kind}{' backward' * backward}, {M}x{s.F}"
    op = Op(full, inputs, ours, reference, (12 if backward else 6) * M * s.F, 0)
    return Candidate(op, PIECE_TILES)


def adam(size: int) -> Candidate:
    """The library's 8-bit Adam with other tiles beside its own, the first; rows are its blocks."""
    op = kernels.adam_update(size)
    rates = adam8_update.Rates()
    ours = lambda tile, *xs: jax.tree.leaves(adam8_update._pallas(rates, *xs, *tile))
    op = op._replace(
        ours=ours, other=lambda *xs: jax.tree.leaves(adam8_update.reference(rates, *xs))
    )
    tiles = [Tile(adam8_update.ROWS, adam8_update.WARPS), Tile(4, 4), Tile(4, 2), Tile(16, 8)]
    return Candidate(op, tiles)


def candidates(M: int, s: Sizes) -> list[Candidate]:
    """Every candidate for M tokens."""
    return [
        norm(M, s, joined=False),
        norm(M, s, joined=True),
        norm_backward(M, s, 1),
        norm_backward(M, s, 2),
        rotation(M, s),
        rotation_backward(M, s),
        gated(M, s, "silu", False),
        gated(M, s, "silu", True),
        gated(M, s, "gelu_pytorch_tanh", False),
        gated(M, s, "gelu_pytorch_tanh", True),
        adam(M * s.D),
    ]


def error(c: Candidate, tile: Tile) -> float:
    """Largest difference from the reference, as a share of its result's largest value."""
    inputs = c.op.inputs(jax.random.key(0))
    found, expected = (jax.jit(fn)(*inputs) for fn in (partial(c.op.ours, tile), c.op.other))
    shares = []
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        ours, theirs = np.asarray(wide(ours)), np.asarray(wide(theirs))
        shares.append(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return float(max(shares))


def measured(c: Candidate, seconds: float, cache: int) -> rows.Row:
    """The figure of the fastest tile. Raises ValueError where one disagrees with the reference."""
    found = {}
    for tile in c.tiles:
        if not error(c, tile) <= TOLERANCE:
            raise ValueError(f"{c.op.name}, {tile}: {error(c, tile):.2g} off the reference")
        op = c.op._replace(ours=partial(c.op.ours, tile), other=None)
        found[tile] = kernels.measured(op, seconds, cache)["ours_us"]
    best = min(found, key=found.get)
    row = kernels.measured(c.op._replace(ours=partial(c.op.ours, best)), seconds, cache)
    name = lambda tile: f"{tile.rows} rows, {tile.warps} warps"
    return row | {"tile": name(best), "tiles_us": {name(t): us for t, us in found.items()}}


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    p.add_argument("--sizes", type=int, nargs=5, default=Sizes(), metavar=tuple("DFhHK"))
    p.add_argument("--only", default="", help="candidates whose name has this in it")
    p.add_argument("--seconds", type=float, default=0.05, help="of each timed loop")
    p.add_argument("--cache-mib", type=int, default=kernels.CACHE_MIB, help="inputs exceed it")
    p.add_argument("--interpret", action="store_true", help="run without a GPU")
    p.add_argument("--output", type=Path)
    a = p.parse_args(line)
    chosen = [c for M in a.tokens for c in candidates(M, Sizes(*a.sizes)) if a.only in c.op.name]
    found = []
    with _choice.target("gpu", interpret=True) if a.interpret else contextlib.nullcontext():
        for c in chosen:
            found.append(measured(c, a.seconds, a.cache_mib * 2**20))
            print(rows.table(found[-1:], COLUMNS).splitlines()[-1], flush=True)
            if a.output:
                rows.write(a.output, found[-1:])
    print(rows.table(found, COLUMNS))


if __name__ == "__main__":
    main()
