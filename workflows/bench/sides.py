"""Both sides' measurements of training steps, put beside each other."""

from collections.abc import Sequence
from typing import Any

from workflows.bench import configs, lengths, rows

FLOPS = 794e12  # a bf16 matmul 8192^3 on one H100 80GB
LONG, LONGEST_RANK = 16384, 32
SPEED = {  # (batch, length, packed) -> (must, aim) of tokens/s over Unsloth's fastest
    (2, 2048, False): (1.5, 1.8),
    (4, 2048, False): (1.5, 1.8),
    (8, 2048, False): (1.4, 1.65),
    (1, 8192, False): (1.3, 1.55),
    (1, 16384, False): (1.3, 1.55),
    (4, 2048, True): (1.4, 1.8),
}
SAME_PEAK = {(2, 2048, False), (4, 2048, False), (8, 2048, False)}
SAME_PEAK_ASKED = (1.1, 1.35)
PEAK = {  # (must, aim) of our leanest peak over Unsloth's leanest
    (2, 2048, False): (1.0, 0.95),
    (8, 2048, False): (1.0, 0.85),
    (1, 16384, False): (1.0, 0.85),
}
LONGEST = (200_000, 350_000)

Row = rows.Row
Shape = tuple[int, int, bool]


def limit(shape: Shape, fields: dict[str, Any], flops: float = FLOPS) -> float:
    """Tokens/s where only the products that can't be left out take time, at `flops` FLOP/s.

    4 FLOP a frozen weight and token (forward, gradient of the input) and 7 T x width a layer for
    causal attention (2 forward, 5 backward), T being the mean length that a token looks back on.
    """
    _, length, packed = shape
    D, F, V = (fields[f"{name}_size"] for name in ("hidden", "intermediate", "vocab"))
    H, K = (fields[f"num_{name}_heads"] * fields["head_dim"] for name in ("attention", "key_value"))
    matrices = fields["num_hidden_layers"] * (2 * D * (H + K) + 3 * D * F) + V * D
    back = _mean_back(length) if packed else length
    return flops / (4 * matrices + 7 * back * H * fields["num_hidden_layers"])


def _mean_back(length: int) -> float:
    """Mean over tokens of their document's length."""
    bins = next(lengths.packed(64, length))
    sizes = [size for row in bins for size in row]
    return sum(size**2 for size in sizes) / sum(sizes)


def shape_of(m: Row) -> Shape:
    return m["batch"], m["length"], m["packed"]


def gib(m: Row) -> float:
    """The measured peak; the compiled one where another case of that process hid it."""
    return m["compiled_gib"] if m["peak_gib"] is None else m["peak_gib"]


def fitting(measurements: Sequence[Row], shape: Shape, rank: int = 16) -> list[Row]:
    return [m for m in measurements if shape_of(m) == shape and m["fits"] and m["rank"] == rank]


def fastest(measurements: Sequence[Row]) -> Row:
    return max(measurements, key=lambda m: m["tokens_per_s"])


def leanest(measurements: Sequence[Row]) -> Row:
    return min(measurements, key=gib)


def chosen(measurements: Sequence[Row]) -> Row:
    """What plan "auto" took, or the fastest where it wasn't measured."""
    return fastest([m for m in measurements if m["policy"] == "auto"] or measurements)


def beside(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """Our measurements, each with Unsloth's fastest there, the ratio and the arithmetic limit."""
    out = []
    for m in ours:
        more: Row = {"limit": limit(shape_of(m), configs.config(m["shape"]))}
        others = fitting(theirs, shape_of(m), m["rank"])
        if others and m["fits"]:
            best = fastest(others)
            more["unsloth"] = f"{best['tokens_per_s']:,.0f} {best['attention']} {best['policy']}"
            more["ratio"] = m["tokens_per_s"] / best["tokens_per_s"]
            lean = leanest(others)
            more["unsloth_gib"], more["unsloth_pinned"] = gib(lean), lean["pinned_gib"]
        out.append(m | more)
    return out


def figures(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """The rows of the performance table that these measurements can fill."""
    out = []
    for shape in sorted(SPEED):
        mine, others = fitting(ours, shape), fitting(theirs, shape)
        if not mine or not others:
            continue
        out.append(_speed(shape, chosen(mine), fastest(others)))
        if shape in SAME_PEAK:
            out.append(_at_their_peak(shape, mine, leanest(others)))
        if shape in PEAK:
            out.append(_peak(shape, mine, leanest(others)))
    return [row | {"name": row["name"] + _dtype(ours)} for row in out + _longest(ours)]


def _dtype(ours: Sequence[Row]) -> str:
    """What sets these measurements' names apart: frozen weights multiplied in another dtype."""
    found = {m.get("matmul_dtype", "bf16") for m in ours} - {"bf16"}
    return "".join(f", {dtype}" for dtype in sorted(found))


def title(shape: Shape) -> str:
    batch, length, packed = shape
    return f"{'packed ' * packed}{batch}x{length}"


def _speed(shape: Shape, mine: Row, other: Row, name: str = "", asked=None, **more: Any) -> Row:
    must, aim = asked or SPEED[shape]
    what = "useful tokens/s" if shape[2] else "tokens/s"
    bound = limit(shape, configs.config(mine["shape"]))
    return rows.figure(
        name or f"step {title(shape)}: {what} over Unsloth's",
        mine["tokens_per_s"], "tokens/s", other=other["tokens_per_s"], limit=bound,
        must=must, aim=aim, **_facts(mine, other), **more,
    )  # fmt: skip


def _facts(mine: Row, other: Row) -> Row:
    """Where and how both were measured; raises ValueError where the devices differ."""
    if mine["device"] != other["device"]:
        raise ValueError(f"ours ran on {mine['device']!r}, Unsloth on {other['device']!r}")
    keep = "command device date versions policy pinned_gib batch length".split()
    theirs = {f"other_{k}": other[k] for k in "policy attention pinned_gib command date".split()}
    peaks = {"peak_gib": gib(mine), "other_peak_gib": gib(other)}
    peaks |= {"peak_compiled": True} if mine["peak_gib"] is None else {}
    return {k: mine[k] for k in keep} | {"chosen": mine.get("chosen")} | peaks | theirs


def _at_their_peak(shape: Shape, mine: Sequence[Row], lean: Row) -> Row:
    small = [m for m in mine if gib(m) <= gib(lean)]
    name = f"step {title(shape)}: tokens/s over Unsloth's leanest, at its peak"
    if small:
        return _speed(shape, fastest(small), lean, name, SAME_PEAK_ASKED)
    why = f"no plan's peak is below Unsloth's leanest, {gib(lean):.2f} GiB"
    return _speed(shape, leanest(mine), lean, name, SAME_PEAK_ASKED, missed=why)


def _peak(shape: Shape, mine: Sequence[Row], lean: Row) -> Row:
    quick = [m for m in mine if m["tokens_per_s"] >= lean["tokens_per_s"]]
    best = leanest(quick or mine)
    more = {} if quick else {"missed": "no plan is as fast as Unsloth's leanest"}
    must, aim = PEAK[shape]
    return rows.figure(
        f"step {title(shape)}: leanest peak over Unsloth's leanest, no slower",
        gib(best), "GiB", other=gib(lean), limit=best["gib"]["argument"], must=must, aim=aim,
        better="lower", **_facts(best, lean), **more,
    )  # fmt: skip


def _longest(ours: Sequence[Row]) -> list[Row]:
    """The longest single row with rank 32 that ran."""
    alone = [m for m in ours if m["batch"] == 1 and m["rank"] == LONGEST_RANK and m["fits"]]
    if not alone:
        return []
    m = max(alone, key=lambda m: m["length"])
    keep = "command device date versions policy pinned_gib batch length".split()
    return [
        rows.figure(
            f"longest row, r={LONGEST_RANK}, batch 1", m["length"], "tokens", must=LONGEST[0],
            aim=LONGEST[1], absolute=True, **{k: m[k] for k in keep}, peak_gib=gib(m),
        )
    ]  # fmt: skip
