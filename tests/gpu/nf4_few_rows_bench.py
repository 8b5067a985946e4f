"""NF4 products with few rows against XLA's bfloat16 matmul, on one GPU: errors, times, ratios.

    python tests/gpu/nf4_few_rows_bench.py [--rows 1 16 64] [--shapes 4096x4096] [--default-plans]

Each time is a call's share of a loop in one jit: 16 calls on 16 different layers (so that the
second-level cache holds none of them), the loop's next x made from its last y. The other side's
weights are 16 separate arrays, so that nothing is sliced. Errors are |y - r| / |r| against float32.

"net" is the ratio without both sides' empty iterations (products of 32 rows of weight).

Predicted for an H100 (2.91 TB/s; 128 lanes issue a clock and SM, 23.7 weights arrive; 2.8 us to
start, fill and add), instructions counted in SASS, launches in a command buffer:

    rows  shape         bytes    floor    instructions a weight   predicted   bf16 seen   ratio
    1     4096 x 4096    8.7 MB   3.0 us   3.0                     6   us      15.2 us     2.5
    1     1024 x 4096    2.2 MB   0.7 us   3.0                     3.4 us       5.0 us     1.5
    1     14336 x 4096  30.3 MB  10.4 us   2.7                    16   us      42.8 us     2.7
    1     4096 x 14336  30.3 MB  10.4 us   2.5                    15   us      43.7 us     2.9
    16    4096 x 4096    8.7 MB   3.0 us   3.8, x 16 times over    9   us      16.6 us     1.8
    16    14336 x 4096  30.3 MB  10.4 us   3.4                    26   us      46.3 us     1.8
"""

import argparse
import importlib.util
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _nf4_few_rows_warp, _triton_launch, nf4, nf4_few_rows
from pallas_kernels.nf4_few_rows import Plan

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
TOGETHER = {"q,k,v": [(4096, 4096), (1024, 4096), (1024, 4096)], "gate,up": [(14336, 4096)] * 2}
ROWS = [1, 16, 64, 8, 2, 4, 32]
CALLS, FIRST = 16, 2  # the layers read; a scalar argument of 1 would be compiled on its own
LOOPS, REPEATS = 40, 5
BANDWIDTH = 2.91e12
CACHE = 100e6  # bytes that the layers must exceed twice over


def plans(rows: int, shape: tuple[int, int]) -> list[Plan]:
    """The default and a few others worth a try."""
    height, width = shape
    first = nf4_few_rows.best_plan(rows, width, [height])
    groups, long = height // 16, width > 4096
    if rows == 1:
        old = Plan(8, 16 if long else 4)
        others = [Plan(16, 8, step=4), old]
        if long:
            others += [Plan(16, 8, step=2, registers=128)]
        elif groups >= 256:
            each, few = -(-groups // 264), -(-groups // 132)
            others += [Plan(16, 16, step=4, tiles=few, registers=128)]
            others += [Plan(16, 8, step=4, tiles=n, registers=128) for n in (each, 1, 2)]
    elif rows <= 16:
        others = [Plan(16, 8, step=4), Plan(16, 8, step=2, tiles=first.tiles, registers=128)]
        others += [first._replace(registers=0), first._replace(registers=160)]
        others += [Plan(64, 4, 16, 4, 4)]
    else:
        others = [Plan(128, 8, 64, 4, 3)]
    return [first, *(plan for plan in dict.fromkeys(others) if plan != first)]


def draw(shape: tuple[int, int], layers: int, seed: int):
    """Random bytes with nested statistics; codes are equally likely, as in a quantized weight."""
    height, width = shape
    blocks = height * width // 64
    keys = jax.random.split(jax.random.key(seed), 4)
    packed = jax.random.bits(keys[0], (layers, height, width // 2), jnp.uint8)
    nested = 0.01 * (1 + jax.random.uniform(keys[1], (layers, -(-blocks // 256))))
    table = jnp.broadcast_to(nf4.dynamic_map(), (layers, 256))
    offset = 0.02 * (1 + jax.random.uniform(keys[2], (layers,)))
    codes = jax.random.bits(keys[3], (layers, blocks), jnp.uint8)
    return packed, nf4.Statistics(codes, nested, table, offset)


def loop(calls):
    """A jitted function of x and operands: LOOPS rounds of `calls`, each after the one before."""

    @jax.jit
    def run(x, operands):
        def body(_, carry):
            x, _ = carry
            found = []
            for call in calls:
                y = call(x, operands)
                x, y = jax.lax.optimization_barrier((x, y))
                found.append(y)
            return x + 1e-30 * found[-1][:, :1], found

        shapes = jax.eval_shape(lambda x: [call(x, operands) for call in calls], x)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.fori_loop(0, LOOPS, body, (x, start))

    return run


def microseconds(run, x, operands, calls: int) -> float:
    jax.block_until_ready(run(x, operands))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(x, operands))
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times)) / (LOOPS * calls)


def dense_time(rows: int, shape: tuple[int, int]) -> float:
    """Microseconds of x @ w.T in bfloat16, with the weights in separate arrays."""
    height, width = shape
    count = max(CALLS, int(2 * CACHE // (2 * height * width)))
    keys = jax.random.split(jax.random.key(1), count)
    weights = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    x = jax.random.normal(jax.random.key(2), (rows, width), jnp.bfloat16)
    calls = [lambda x, w, i=i: x @ w[i].T for i in range(count)]
    return microseconds(loop(calls), x, weights, count)


def our_call(layout, plan, layer, x, operands):
    packed, statistics = operands
    return nf4_few_rows.few_rows(layout, x, packed, statistics, layer, "triton", plan)


def layers_of(size: int) -> int:
    return max(CALLS, int(2 * CACHE // size))


def our_time(layout, x, operands, plan: Plan):
    """Microseconds of a call, and what the last one gave for the last layer and this x."""
    count = operands[0].shape[0] - FIRST
    calls = [partial(our_call, layout, plan, FIRST + i) for i in range(count)]
    run = loop(calls)
    return microseconds(run, x, operands, count), run(x, operands)[1][-1]


@partial(jax.jit, static_argnums=(0, 3))
def expected(layout, x, operands, layer: int):
    one = jax.tree.map(lambda a: a[layer], operands)
    w = nf4.dequantize(layout._replace(dtype="float32"), *one)
    return jnp.einsum("mi,oi->mo", x.astype(jnp.float32), w, precision="highest")


def error(y, r) -> float:
    y, r = np.asarray(y, np.float64), np.asarray(r, np.float64)
    return float(np.linalg.norm(y - r) / np.linalg.norm(r))


def size_of(shape: tuple[int, int]) -> int:
    """Bytes that a call reads of a weight: packed codes, 8-bit scales and their scales."""
    weights = shape[0] * shape[1]
    return weights // 2 + weights // 64 + weights // 64 // 256 * 4


def errors_of_ours():
    """What a plan that can't be compiled or launched raises: it is printed, the others go on."""
    from triton.errors import TritonError

    return jax.errors.JaxRuntimeError, TritonError, ValueError


def report(row: dict) -> None:
    print(json.dumps(row), flush=True)  # NaN only where there is no other side


def overhead(rows: int, width: int) -> tuple[float, float]:
    """Microseconds of an iteration that reads next to nothing: ours and bfloat16's."""
    shape = (32, width)
    operands = draw(shape, FIRST + CALLS, 9)
    x = jax.random.normal(jax.random.key(rows), (rows, width), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1), CALLS)
    weights = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    dense = [lambda x, w, i=i: x @ w[i].T for i in range(CALLS)]
    plan = nf4_few_rows.best_plan(rows, width, [32])
    call = partial(our_call, nf4.Layout(shape), plan)
    ours = [partial(call, FIRST + i) for i in range(CALLS)]
    found = (
        microseconds(loop(ours), x, operands, CALLS),
        microseconds(loop(dense), x, weights, CALLS),
    )
    report({"name": f"overhead 32x{width}", "rows": rows, "ours_us": found[0], "bf16_us": found[1]})
    return found


def measure(name, rows, shape, operands, dense, plan, idle) -> dict | None:
    """One line of the table, or None where the plan does not compile or run."""
    layout = nf4.Layout(shape)
    x = jax.random.normal(jax.random.key(rows), (rows, shape[1]), jnp.bfloat16)
    layer = operands[0].shape[0] - 1
    try:
        ours, y = our_time(layout, x, operands, plan)
        wrong = error(y, expected(layout, x, operands, layer))
    except errors_of_ours() as problem:
        print(
            f"{name} M={rows} {plan}: FAILED {type(problem).__name__}: {problem}"[:600], flush=True
        )
        return None
    size = size_of(shape)
    row = {
        "name": name, "rows": rows, "plan": plan._asdict(), "error": wrong, "ours_us": ours,
        "bf16_us": dense, "ratio": dense / ours, "net_us": ours - idle[0],
        "net_ratio": (dense - idle[1]) / max(ours - idle[0], 0.1), "gb_s": size / ours / 1e3,
        "limit_us": 1e6 * size / BANDWIDTH,
    }  # fmt: skip
    report(row)
    return row


def together(name: str, shapes, rows: int) -> None:
    """Several matrices in one launch: error of each, time of all."""
    layouts = [nf4.Layout(shape) for shape in shapes]
    size = sum(map(size_of, shapes))
    count = layers_of(size)
    drawn = [draw(shape, count + FIRST, seed) for seed, shape in enumerate(shapes)]
    packed, statistics = zip(*drawn, strict=True)
    x = jax.random.normal(jax.random.key(rows), (rows, shapes[0][1]), jnp.bfloat16)

    def call(layer, x, operands):
        return nf4_few_rows.few_rows_together(layouts, x, *operands, layer, "triton")

    joined = lambda layer, x, operands: jnp.concatenate(call(layer, x, operands), 1)
    try:
        layer = jnp.int32(count) if len(shapes) > 2 else count  # traced for one of them
        found = jax.jit(partial(call, layer))(x, (packed, statistics))
        pairs = zip(found, layouts, drawn, strict=True)
        wrong = [error(y, expected(lay, x, one, count)) for y, lay, one in pairs]
        calls = [partial(joined, FIRST + i) for i in range(count)]
        ours = microseconds(loop(calls), x, (packed, statistics), count)
    except errors_of_ours() as problem:
        print(f"{name} M={rows}: FAILED {type(problem).__name__}: {problem}"[:600], flush=True)
        return
    report(
        {"name": name, "rows": rows, "errors": wrong, "ours_us": ours, "gb_s": size / ours / 1e3,
         "limit_us": 1e6 * size / BANDWIDTH}
    )  # fmt: skip


def table(found: list[dict]) -> None:
    print(f"{'shape':>14} {'M':>3} {'ours us':>8} {'bf16 us':>8} {'ratio':>6} {'net':>6} "
          f"{'GB/s':>6} {'limit us':>8} {'error':>8}  plan (best of those tried)")  # fmt: skip
    best = {}
    for row in found:
        key = row["name"], row["rows"]
        if key not in best or row["ours_us"] < best[key]["ours_us"]:
            best[key] = row
    for (name, rows), row in best.items():
        print(f"{name:>14} {rows:>3} {row['ours_us']:8.2f} {row['bf16_us']:8.2f} "
              f"{row['ratio']:6.2f} {row['net_ratio']:6.2f} "
              f"{row['gb_s']:6.0f} {row['limit_us']:8.2f} {row['error']:8.1e}  "
              f"{tuple(row['plan'].values())}")  # fmt: skip


def by_triton_call(args, kernel, out, grid, warps, stages, constants, registers=0):
    """The other road to a launch, which XLA keeps out of command buffers; registers uncapped."""
    import jax_triton

    return jax_triton.triton_call(
        *args, kernel=kernel, out_shape=out, grid=grid, num_warps=warps, num_stages=stages,
        **constants,
    )  # fmt: skip


def recorded_launch_works() -> bool:
    """Whether the default launch runs, said aloud; and what an empty one costs on either road."""
    shape, width = (32, 4096), 4096
    x, operands = jnp.ones((1, width), jnp.bfloat16), draw(shape, FIRST + CALLS, 9)
    plan, default = nf4_few_rows.best_plan(1, width, [32]), _triton_launch.call
    worked = []
    for name, road in (("triton_call", by_triton_call), ("recorded", default)):
        _triton_launch.call = road
        try:
            found, _ = our_time(nf4.Layout(shape), x, operands, plan)
            report({"name": f"32x4096 launched by {name}", "rows": 1, "ours_us": found})
            worked.append(name)
        except errors_of_ours() as problem:
            print(f"{name}: FAILED {type(problem).__name__}: {problem}"[:600], flush=True)
    _triton_launch.call = default
    return "recorded" in worked


def kernel_of(path: str):
    """`warp_kernel` of another version of its file, with the same parameters."""
    spec = importlib.util.spec_from_file_location("another_warp_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.warp_kernel


def measure_all(options) -> list[dict]:
    """Rows of the table, in the order of shapes where only default plans are timed."""
    end = time.perf_counter() + options.seconds
    late = lambda: time.perf_counter() > end
    shapes = [tuple(map(int, name.split("x"))) for name in options.shapes]
    cases = [(rows, shape) for rows in options.rows for shape in shapes]
    if options.default_plans:
        cases.sort(key=lambda case: shapes.index(case[1]))
    operands, idle, found = {}, {}, []
    for rows, shape in cases:
        if late():
            print(f"left out, time is up: M={rows} {shape}", flush=True)
            continue
        if shape not in operands:
            operands[shape] = draw(shape, FIRST + layers_of(size_of(shape)), shapes.index(shape))
        if (rows, shape[1]) not in idle:
            timed = rows == 1 or not options.default_plans
            idle[rows, shape[1]] = overhead(rows, shape[1]) if timed else (np.nan,) * 2
        found += measure_plans(options, rows, shape, operands[shape], idle[rows, shape[1]], late)
    for rows in sorted({1, 16} & set(options.rows)):
        for name, several in TOGETHER.items():
            if not late():
                together(name, several, rows)
    return found


def measure_plans(options, rows, shape, operands, idle, late) -> list[dict]:
    """Rows of the table for one shape; with another version of the kernel, one more."""
    dense, name = dense_time(rows, shape), "x".join(map(str, shape))
    tried = plans(rows, shape)[: 1 if options.default_plans else None]
    found = [measure(name, rows, shape, operands, dense, p, idle) for p in tried if not late()]
    if options.also and rows <= nf4_few_rows.MOST_IN_WARPS:
        ours, module = _nf4_few_rows_warp.warp_kernel, _nf4_few_rows_warp
        module.warp_kernel = kernel_of(options.also)
        measure(name + " also", rows, shape, operands, dense, tried[0], idle)
        module.warp_kernel = ours
    return [row for row in found if row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES])
    parser.add_argument("--seconds", type=float, help="100, or 50 with --default-plans")
    parser.add_argument("--default-plans", action="store_true", help="time no others")
    parser.add_argument("--also", help="another version of _nf4_few_rows_warp.py to time beside")
    parser.add_argument("--triton-call", action="store_true", help="launch by jax_triton itself")
    options = parser.parse_args()
    options.seconds = options.seconds or (50 if options.default_plans else 100)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    if options.triton_call or not (options.default_plans or recorded_launch_works()):
        _triton_launch.call = by_triton_call
    table(measure_all(options))


if __name__ == "__main__":
    main()
