"""Times operations of `pallas_kernels` inside a jit loop, beside what XLA makes of the same.

    python -m workflows.bench.kernels --only nf4 --output docs/performance/kernels.json

An operation is one entry of `ops`. Each runs over several sets of inputs in turn, larger together
than the cache, and every run waits for the one before; so what is measured is the device's time.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp

from pallas_kernels import (
    adam8_update,
    attention,
    cross_entropy,
    grouped_matmul,
    nf4_dequantize,
    nf4_fp8,
    nf4_matmul,
)
from pallas_kernels.nf4 import BLOCK, NESTED_BLOCK
from pallas_kernels.nf4_dequantize import LowRank
from pallas_kernels.nf4_few_rows import few_rows
from unsloth_jax.quant import nf4
from workflows.bench import rows

CACHE_MIB = 100  # twice an H100's second-level cache
# Of one H100 80GB: device copy, matmul 8192^3 in bf16 and in e4m3.
BANDWIDTH, FLOPS, FLOPS_E4M3 = 2.91e12, 794e12, 1297e12
Arrays = tuple[Any, ...]


class Op(NamedTuple):
    """An operation to time; bytes and operations are the least that it must move and do."""

    name: str
    inputs: Callable[[jax.Array], Arrays]  # from a key
    ours: Callable[..., Any]
    other: Callable[..., Any] | None  # of the same inputs, or None
    bytes: int
    flops: int
    in_bytes: bool = False  # compared in TB/s, not in time over the other's
    peak: float = FLOPS
    must: float | None = None
    aim: float | None = None


def weight(O: int, I: int, key: jax.Array) -> nf4.NF4:
    """A random 4-bit weight with nested statistics."""
    return jax.jit(nf4.quantize)(jax.random.normal(key, (O, I), jnp.bfloat16) * I**-0.5)


def packed_bytes(O: int, I: int) -> int:
    """Codes, 8-bit scales and the scales' scales."""
    return O * I // 2 + O * I // BLOCK + 4 * (O * I // BLOCK // NESTED_BLOCK)


def dequantize(O: int, I: int, must=None, aim=None) -> Op:
    return Op(
        f"NF4 dequantisation {O}x{I}",
        lambda key: (weight(O, I, key),),
        lambda w: nf4_dequantize.dequantize(w.layout, w.packed, w.statistics),
        lambda w: nf4_dequantize.reference(w.layout, w.packed, w.statistics),
        packed_bytes(O, I) + 2 * O * I,
        O * I,
        in_bytes=True,
        must=must,
        aim=aim,
    )


def decode_e4m3(O: int, I: int, transposed: bool) -> Op:
    """NF4 to e4m3 with a scale a row, as forward takes it or, transposed, as backward does."""
    read = lambda how: lambda w: how(w.layout, w.packed, w.statistics, transposed=transposed)
    return Op(
        f"NF4 to e4m3{', transposed' * transposed} {O}x{I}",
        lambda key: (weight(O, I, key),),
        read(nf4_fp8.decode),
        read(nf4_fp8.reference),
        packed_bytes(O, I) + O * I + 4 * O,
        O * I,
        in_bytes=True,
    )


def row_product(M: int, O: int, I: int, must=None, aim=None) -> Op:
    """x @ w.T for M rows; the other side is cuBLAS on the bfloat16 weight."""

    def inputs(key: jax.Array) -> Arrays:
        w = weight(O, I, key)
        return jax.random.normal(key, (M, I), jnp.bfloat16), w, jax.jit(lambda w: w.dequantize())(w)

    return Op(
        f"NF4 matmul over cuBLAS bf16, M={M}, {O}x{I}",
        inputs,
        lambda x, w, dense: few_rows(w.layout, x, w.packed, w.statistics),
        lambda x, w, dense: jnp.einsum("mi,oi->mo", x, dense),
        packed_bytes(O, I) + 2 * M * (O + I),
        2 * M * O * I,
        must=must,
        aim=aim,
    )


def adapted_product(M: int, O: int, I: int, rank: int = 16, e4m3: bool = False) -> Op:
    """Forward and backward of a 4-bit weight with an adapter; the other side keeps them apart.

    In `e4m3`, beside the same in 16 bits.
    """

    def inputs(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 4)
        draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
        w, x, g = weight(O, I, keys[0]), draw(keys[1], M, I), draw(keys[2], M, O)
        a, b = jnp.full((rank, I), I**-0.5), jnp.full((O, rank), 1e-3)
        return w, x, g, LowRank(a, b, jnp.float32(1))

    def both(how: Callable[..., list[jax.Array]]) -> Callable[..., Any]:
        def run(w, x, g, pair):
            packed = nf4_matmul.Packed(w.packed, w.statistics)
            y, back = jax.vjp(lambda x, pair: how([w.layout], x, [packed], [pair])[0], x, pair)
            return y, back(g)

        return run

    moved = 2 * (packed_bytes(O, I) + 2 * M * (O + I))
    name = f"NF4 matmul with adapter, both directions, M={M}, {O}x{I}"
    ours, other = both(nf4_matmul.products), both(nf4_matmul.reference)
    if e4m3:
        name, ours, other = f"{name}, e4m3 over bf16", both(nf4_fp8.products), ours
    flops = 4 * M * O * I + 12 * M * rank * (O + I)
    return Op(name, inputs, ours, other, moved, flops, peak=FLOPS_E4M3 if e4m3 else FLOPS)


def attention_of(B: int, T: int, documents: int, H: int = 32, K: int = 8, h: int = 128) -> Op:
    """Forward and backward of causal attention; rows hold `documents` of equal length."""
    rule = attention.Rule(h**-0.5, documents=documents)
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    length = T // documents

    def inputs(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 4)
        draw = lambda key, n: jax.random.normal(key, (B, T, n, h), jnp.bfloat16)
        return tuple(draw(k, n) for k, n in zip(keys, (H, K, K, H), strict=True))

    def both(how: Callable[..., jax.Array]) -> Callable[..., Any]:
        def run(q, k, v, g):
            rows = place // length + 1, place % length
            y, back = jax.vjp(lambda *qkv: how(rule, *qkv, *rows), q, k, v)
            return y, back(g)

        return run

    ours, other = both(attention.attention), both(attention.reference)
    moved = 2 * B * T * h * (4 * H + 4 * K)
    name = f"attention, both directions, {B}x{T}, {documents} a row"
    return Op(name, inputs, ours, other, moved, 7 * B * H * documents * length**2 * h)


def log_probabilities(N: int, V: int, D: int) -> Op:
    """The head's log-probabilities with the derivative by x; the other side holds all scores."""

    def inputs(key: jax.Array) -> Arrays:
        first, second, third = jax.random.split(key, 3)
        draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
        return draw(first, N, D), draw(second, V, D) * D**-0.5, jax.random.randint(third, N, 0, V)

    ours = lambda x, w, y: cross_entropy.token_logprobs(x, w, y).logps.sum()
    other = lambda x, w, y: cross_entropy.reference(x, w, y, jnp.ones(N, bool)).logps.sum()
    moved = 2 * (V * D + 2 * N * D)
    name = f"log-probabilities with derivative, {N} rows, {V}x{D}"
    return Op(
        name, inputs, jax.value_and_grad(ours), jax.value_and_grad(other), moved, 4 * N * V * D
    )


def grouped_product(rows_: int, experts: int, O: int, I: int) -> Op:
    """A mixture's product and its gradient by the rows, tokens spread evenly but for chance."""

    def inputs(key: jax.Array) -> Arrays:
        kx, kw, kg, ks = jax.random.split(key, 4)
        x = jax.random.normal(kx, (rows_, I), jnp.bfloat16)
        w = jax.random.normal(kw, (experts, O, I), jnp.bfloat16)
        g = jax.random.normal(kg, (rows_, O), jnp.bfloat16)
        ids = jax.random.randint(ks, (rows_,), 0, experts)
        return x, w, g, jnp.bincount(ids, length=experts).astype(jnp.int32)

    def both(implementation: str | None) -> Callable[..., Any]:
        def run(x, w, g, sizes):
            of = lambda x: grouped_matmul.grouped_matmul(x, w, sizes, implementation)
            y, pull = jax.vjp(of, x)
            return y, pull(g)[0]

        return run

    moved = 2 * (2 * experts * O * I + 2 * rows_ * (O + I))
    name = f"grouped product and dx, {rows_} rows, {experts} x {O}x{I}"
    return Op(name, inputs, both(None), both("xla"), moved, 4 * rows_ * O * I)


def expert_weights(experts: int, O: int, I: int) -> Op:
    """A layer's experts from NF4 to bfloat16."""

    def inputs(key: jax.Array) -> Arrays:
        dense = jax.random.normal(key, (experts, O, I), jnp.bfloat16) * I**-0.5
        return (jax.jit(nf4.quantize)(dense),)

    ours = lambda w: w.dequantize()
    other = lambda w: jax.vmap(partial(nf4_dequantize.reference_one, w.layout))(
        w.packed, w.statistics
    )
    moved = experts * (packed_bytes(O, I) + 2 * O * I)
    return Op(f"NF4 dequantize, {experts} x {O}x{I}", inputs, ours, other, moved, 0, True)


def adam_update(size: int) -> Op:
    """Adam's direction and its two 8-bit moments of one array."""

    def inputs(key: jax.Array) -> Arrays:
        keys = jax.random.split(key, 3)
        draw = lambda key: jax.random.normal(key, (size,)) * 1e-3
        mu = adam8_update.quantize(draw(keys[0]), adam8_update.SIGNED)
        nu = adam8_update.quantize(draw(keys[1]) ** 2, adam8_update.UNSIGNED)
        return draw(keys[2]), mu, nu, jnp.ones(2)

    ours, other = (
        partial(how, adam8_update.Rates()) for how in (adam8_update.update, adam8_update.reference)
    )
    moved = 12 * size + 16 * (size // adam8_update.BLOCK)
    return Op(f"8-bit Adam, {size} elements", inputs, ours, other, moved, 0)


def ops(O: int, I: int) -> list[Op]:
    """Every operation on a weight of these sides; with small ones everything is small."""
    large = O >= 4096
    M, T = (4096, 2048) if large else (64, 64)
    heads = {} if large else {"H": 2, "K": 1, "h": 16}
    return [
        dequantize(O, I, 2.5, 2.8),
        adapted_product(M, O, I),
        decode_e4m3(O, I, False),
        decode_e4m3(O, I, True),
        adapted_product(M, O, I, e4m3=True),
        attention_of(2, T, 1, **heads),
        attention_of(4, T, 8, **heads),
        log_probabilities(M, 128256 if large else 512, I),
        *mixtures(large),
        adam_update(41_943_040 if large else 8192),  # adapters of Llama-3.1-8B, rank 16
        row_product(1, O, I, 2.0, 3.5),
        row_product(16, O, I, 1.5, 2.2),
        row_product(64, O, I, 1.1, 1.5),
    ]


def mixtures(large: bool) -> list[Op]:
    """At the shapes of Qwen3-30B-A3B and Mixtral-8x7B, 4,096 tokens."""
    if not large:
        return [grouped_product(64, 4, 64, 64), expert_weights(4, 64, 128)]
    return [
        grouped_product(4096 * 8, 128, 768, 2048),
        grouped_product(4096 * 2, 8, 14336, 4096),
        expert_weights(128, 768, 2048),
    ]


def seconds(fn: Callable[..., Any], sets: list[Arrays], repeats: int, runs: int = 5) -> float:
    """Median device seconds of one `fn(*inputs)`, each waiting for the last."""

    def once(sets, outs):
        new, last = [], outs[-1]
        for inputs in sets:
            inputs, _ = jax.lax.optimization_barrier((inputs, last))
            last = fn(*inputs)
            new.append(last)
        return tuple(new)

    @partial(jax.jit, donate_argnums=1)
    def loop(sets, outs):
        # All results leave the program, else XLA would leave out what makes them.
        return jax.lax.fori_loop(0, repeats, lambda i, outs: once(sets, outs), outs)

    shapes = [jax.eval_shape(fn, *inputs) for inputs in sets]
    outs = tuple(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out) for out in shapes)
    outs, took = jax.block_until_ready(loop(sets, outs)), []
    for _ in range(runs):
        start = time.perf_counter()
        outs = jax.block_until_ready(loop(sets, outs))
        took.append(time.perf_counter() - start)
    return statistics.median(took) / (repeats * len(sets))


def measured(op: Op, total_s: float, cache: int = CACHE_MIB * 2**20) -> rows.Row:
    """One figure: how long each side takes, and the least that the device would need."""
    sets = [op.inputs(jax.random.key(i)) for i in range(min(32, 2 + cache // op.bytes))]
    time_of = partial(seconds, sets=sets)
    guess = time_of(op.ours, repeats=1, runs=1)
    repeats = max(1, int(total_s / (guess * len(sets))))
    ours = time_of(op.ours, repeats=repeats)
    other = time_of(op.other, repeats=repeats) if op.other else None
    floor = max(op.bytes / BANDWIDTH, op.flops / op.peak)
    more = dict(must=op.must, aim=op.aim, ours_us=ours * 1e6, floor_us=floor * 1e6)
    more |= dict(other_us=other and other * 1e6, bytes=op.bytes, flops=op.flops)
    if op.in_bytes:
        tbs = lambda t: t and op.bytes / t / 1e12
        more |= dict(other=tbs(other), limit=BANDWIDTH / 1e12, absolute=True)
        return rows.figure(op.name, tbs(ours), "TB/s", **more)
    rate = lambda t: t and 1 / t
    return rows.figure(op.name, rate(ours), "1/s", other=rate(other), limit=rate(floor), **more)


COLUMNS = "name ours_us other_us floor_us ours other ratio limit must aim unit".split()


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--sides", default="14336x4096", help="O x I of the weight")
    p.add_argument("--only", default="", help="operations whose name has this in it")
    p.add_argument("--seconds", type=float, default=0.2, help="of each timed loop")
    p.add_argument("--cache-mib", type=int, default=CACHE_MIB, help="what inputs must exceed")
    p.add_argument("--output", type=Path)
    a = p.parse_args(line)
    chosen = [op for op in ops(*map(int, a.sides.split("x"))) if a.only in op.name]
    if not chosen:
        raise SystemExit(f"no operation has {a.only!r} in its name")
    found = []
    for op in chosen:
        found.append(measured(op, a.seconds, a.cache_mib * 2**20))
        if a.output:
            rows.write(a.output, found[-1:])
    print(rows.table(found, COLUMNS))


if __name__ == "__main__":
    main()
