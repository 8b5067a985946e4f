"""Times operations of `pallas_kernels` inside a jit loop, beside what XLA makes of the same.

    python -m workflows.bench.kernels --only nf4 --output docs/performance/kernels.json

An operation is one entry of OPS. Each runs over several sets of inputs in turn, larger together
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

from pallas_kernels import nf4_dequantize
from pallas_kernels.nf4 import BLOCK, NESTED_BLOCK
from pallas_kernels.nf4_few_rows import few_rows
from unsloth_jax.quant import nf4
from workflows.bench import rows

CACHE_MIB = 100  # twice an H100's second-level cache
BANDWIDTH, FLOPS = 2.91e12, 794e12  # of one H100 80GB: device copy, bf16 matmul 8192^3
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


def ops(O: int, I: int) -> list[Op]:
    """Every operation on a weight of these sides."""
    return [
        dequantize(O, I, 2.5, 2.8),
        row_product(1, O, I, 2.0, 3.5),
        row_product(16, O, I, 1.5, 2.2),
        row_product(64, O, I, 1.1, 1.5),
    ]


def seconds(fn: Callable[..., Any], sets: list[Arrays], repeats: int, runs: int = 5) -> float:
    """Median device seconds of one `fn(*inputs)`, each waiting for the last."""

    def once(sets, outs, link):
        new = []
        for inputs, _ in zip(sets, outs, strict=True):
            inputs, link = jax.lax.optimization_barrier((inputs, link))
            out = fn(*inputs)
            link = jax.tree.leaves(out)[0].reshape(-1)[0].astype(jnp.float32)
            new.append(out)
        return tuple(new), link

    @jax.jit
    def loop(sets, link):
        # Results are carried, else all of them but a first element would be left out.
        outs = tuple(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out) for out in shapes)
        return jax.lax.fori_loop(0, repeats, lambda i, c: once(sets, *c), (outs, link))[1]

    shapes = [jax.eval_shape(fn, *inputs) for inputs in sets]
    link, took = jax.block_until_ready(loop(sets, jnp.zeros(()))), []
    for _ in range(runs):
        start = time.perf_counter()
        link = jax.block_until_ready(loop(sets, link))
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
    floor = max(op.bytes / BANDWIDTH, op.flops / FLOPS)
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
