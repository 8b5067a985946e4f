"""Tokens/s of decoding on random weights, greedy, the cache full at the last token.

    python -m workflows.bench.decode --batches 1,32,128 --cache 512 --tokens 64 \\
      --weights materialized,nf4 --output docs/performance/decode.json

A token's limit is what it must read: the weights it multiplies with and the whole cache, at the
speed of a copy on this device. No prompt is read: prefill is not in these figures.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp

from pallas_kernels import decode_attention
from unsloth_jax import decoding, lora, sample, tree, unstack
from unsloth_jax.dims import Params
from unsloth_jax.sample import Sampling
from workflows import generate, machine
from workflows.bench import rows
from workflows.bench import weights as made

RUNS = 3
MODES = {"materialized": "bf16", "nf4": "NF4-resident"}
# Of Llama-3.1-8B's shape and a cache of 512 on an H100: (must, aim, vLLM 0.23.0's tokens/s).
SHARE = (0.85, 0.93)
ASKED: dict[tuple[str, int], tuple[float | None, float | None, float | None]] = {
    ("materialized", 8): (None, None, 1164.0),
    ("materialized", 32): (4300.0, 5000.0, 4190.0),
    ("materialized", 64): (None, None, 7505.0),
    ("materialized", 128): (12000.0, 14500.0, 11949.0),
    ("nf4", 1): (300.0, 450.0, None),
}


class Model(NamedTuple):
    """A model to decode with; `params` are its weights as they are stored."""

    family: ModuleType
    config: Any
    params: Params


def model(shape: str, rank: int) -> Model:
    """Random NF4 weights of a shape, with adapters of a rank unless it is 0."""
    family, c, shapes = made.model(shape)
    params = made.random(shapes)
    if rank:
        params = lora.attach(params, lora.init(jax.random.key(0), params, rank), 1.0)
    return Model(family, c, params)


def draft(m: Model, batch: int, slots: int, used: int) -> sample.Draft:
    """A generation under way whose rows have `used` tokens."""
    row = lambda value, dtype: jnp.full((batch,), value, dtype)
    cache = decoding.empty(m.family, m.config, batch, slots, jnp.bfloat16)
    cache = cache.replace(used=row(used, jnp.int32), context=row(used, jnp.int32))
    seen = jnp.zeros((batch, m.config.vocab), bool)
    rest = (row(0, jnp.int32), row(0.0, jnp.float32), seen, row(False, bool), jax.random.key(0))
    return sample.Draft(cache, *rest)


def seconds(m: Model, layers: Any, batch: int, slots: int, tokens: int) -> tuple[float, float]:
    """(median seconds of a token, seconds of the first call beyond that)."""
    run, start = generate.programs(m.family, m.config), slots - tokens
    knobs = generate.on_device(Sampling(temperature=0.0))
    stop, limit = jnp.asarray([-2], jnp.int32), jnp.asarray(tokens, jnp.int32)
    state, took = draft(m, batch, slots, start), []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        state, new, _ = run.decode(layers, state, stop, knobs, limit, steps=tokens)
        assert (jax.device_get(new) >= 0).all(), "the loop ended early"
        took.append(time.perf_counter() - began)
        used = jnp.full_like(state.cache.used, start)
        state = state.replace(cache=state.cache.replace(used=used))
    once = statistics.median(took[1:])
    return once / tokens, took[0] - once


def bytes_read(m: Model, mode: str, batch: int, slots: int) -> int:
    """What a token cannot do without: matrices of the layers, the head, keys and values."""
    size = lambda node: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(node))
    stored = size([leaf for path, leaf in tree.flatten(m.params).items() if ".*." in path])
    layers = unstack.plain_bytes(m.family, m.params) if mode == "materialized" else stored
    c, head = m.config, size(m.family.head(m.config, m.params))
    return layers + head + 2 * 2 * c.layers * batch * c.kv_heads * slots * c.head_width


def bandwidth(size: int, repeats: int = 20) -> float:
    """Bytes a second, read plus written, of copies of an array of `size` bytes."""
    copy = lambda _, x: jax.lax.optimization_barrier(x + 1)
    run: Callable[[jax.Array], jax.Array] = jax.jit(
        lambda x: jax.lax.fori_loop(0, repeats, copy, x), donate_argnums=0
    )
    x = jax.block_until_ready(run(jnp.zeros(size // 4, jnp.float32)))
    took = []
    for _ in range(RUNS):
        began = time.perf_counter()
        x = jax.block_until_ready(run(x))
        took.append(time.perf_counter() - began)
    return 2 * size * repeats / statistics.median(took)


def measured(
    m: Model, shape: str, mode: str, batch: int, slots: int, tokens: int, speed: float
) -> list[rows.Row]:
    """The figures of one mode and batch: tokens/s, and for one row the share of the limit."""
    layers = generate.readable(
        m.family, m.config, m.params, "materialized" if mode == "materialized" else "stored", 0
    )
    before = machine.device_peak()
    token_s, compile_s = seconds(m, layers, batch, slots, tokens)
    read = bytes_read(m, mode, batch, slots)
    rate, limit = batch / token_s, batch * speed / read
    reference = shape == "llama-8b" and slots == 512
    must, aim, other = ASKED.get((mode, batch), (None,) * 3) if reference else (None,) * 3
    more = dict(ms=token_s * 1e3, compile_s=compile_s, bytes=read, bandwidth_tbs=speed / 1e12)
    # A process' peak shows only where it rises above what ran before.
    more["peak_gib"] = machine.device_peak() / 2**30 if machine.device_peak() > before else None
    name = f"decode, {MODES[mode]}, batch {batch}, cache {slots}, {shape}"
    found = [
        rows.figure(
            name, rate, "tokens/s", other=other, limit=limit, must=must, aim=aim, absolute=True,
            **more,
        )
    ]  # fmt: skip
    if mode == "materialized" and batch == 1:
        must, aim = SHARE if reference else (None, None)
        share = dict(limit=1.0, must=must, aim=aim, absolute=True)
        found.append(
            rows.figure(f"{name}, share of the read limit", rate / limit, "of 1", **share, **more)
        )
    return found


def attention_seconds(m: Model, batch: int, slots: int, implementation: str | None) -> float:
    """Median seconds of a layer's attention and cache update; the layers' caches pass the cache."""
    c = m.config
    rows_of = lambda heads: jnp.ones((batch, heads, c.head_width), jnp.bfloat16)
    empty, count = decoding.empty(m.family, c, batch, slots, jnp.bfloat16), c.layers
    used = jnp.full((batch,), slots - 1, jnp.int32)
    new = rows_of(c.kv_heads)

    def token(_, carry):
        q, keys, values = carry
        keys, values = list(keys), list(values)
        for i in range(count):
            q, keys[i], values[i] = decode_attention.attend(
                q, new, new, keys[i], values[i], used, scale=0.1, implementation=implementation
            )
        return q, tuple(keys), tuple(values)

    run = jax.jit(lambda carry: jax.lax.fori_loop(0, 16, token, carry), donate_argnums=0)
    carry, took = (rows_of(c.heads), empty.keys, empty.values), []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        carry = jax.block_until_ready(run(carry))
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:]) / (16 * count)


def attention(m: Model, shape: str, batch: int, slots: int, speed: float) -> rows.Row:
    """How often a second a layer's attention runs, and how often as XLA has it."""
    c = m.config
    ours, other = (attention_seconds(m, batch, slots, name) for name in (None, "xla"))
    limit = speed / (2 * 2 * batch * c.kv_heads * slots * c.head_width)
    name = f"decode attention over XLA's, batch {batch}, cache {slots}, {shape}"
    more = dict(other=1 / other, limit=limit, ms=ours * 1e3)
    return rows.figure(name, 1 / ours, "1/s", **more)


COLUMNS = "name ours other ratio limit must aim unit ms compile_s peak_gib".split()


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", default="llama-8b", help="a name in configs or a config.json")
    p.add_argument("--batches", default="1,32,128")
    p.add_argument("--cache", type=int, default=512, help="slots a row, full at the last token")
    p.add_argument("--tokens", type=int, default=64, help="in one dispatch, fewer than --cache")
    p.add_argument("--weights", default="materialized,nf4", help=f"of {', '.join(MODES)}")
    p.add_argument("--rank", type=int, default=0, help="of adapters on every projection")
    p.add_argument("--attention", action="store_true", help="time the attention kernel alone too")
    p.add_argument("--bandwidth", type=float, help="TB/s; measured by a copy where not given")
    p.add_argument("--output", type=Path)
    a = p.parse_args(line)
    modes = a.weights.split(",")
    if not set(modes) <= set(MODES) or not 0 < a.tokens < a.cache:
        p.error(f"--weights takes {list(MODES)}, --tokens 1 to --cache - 1")
    size = 2**30 if jax.default_backend() == "gpu" else 2**22
    speed = a.bandwidth * 1e12 if a.bandwidth else bandwidth(size)
    m, found = model(a.shape, a.rank), []
    for mode in modes:
        for batch in map(int, a.batches.split(",")):
            new = measured(m, a.shape, mode, batch, a.cache, a.tokens, speed)
            found += new
            if a.output:
                rows.write(a.output, new)
            print(rows.table(new, COLUMNS), flush=True)
    if a.attention:
        batches = map(int, a.batches.split(","))
        new = [attention(m, a.shape, batch, a.cache, speed) for batch in batches]
        found += new
        if a.output:
            rows.write(a.output, new)
    print(rows.table(found, COLUMNS))


if __name__ == "__main__":
    main()
