"""The parts of a GRPO run's page: rewards first, what they come with, completions to read."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from workflows import charts
from workflows import report_parts as parts
from workflows.charts import Band, Curve, Point, Rule, Scale, number
from workflows.grpo_report import TABLE
from workflows.report_parts import COLORS, MORE, Record, Row, points_of, raw_and_smooth

NEWEST, BEST, WORST = 6, 3, 3  # generations, and completions of each, in the table
LETTERS = 900  # of a text there
REWARDS = "rewards/"
GAP, RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
OWN = ("prompt", "completion", "rewards", "reward", "advantage", "finish_reason")
# Charts of several numbers: title, unit, {name in the log: what it is}.
GROUPED: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("groups without a signal", "share", {"frac_reward_zero_std": "rewards are equal"}),
    ("KL from the reference", "nats a token", {"kl": "each step"}),
    ("entropy", "nats a token", {"entropy": "each step"}),
    ("clipped", "share of tokens", {
        "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above",
        "clip_ratio/region_mean": "either", "cispo_clip_ratio": "above",
    }),
    ("clipped, by completion", "share of its tokens", {
        "clip_ratio/low_min": "below, the least", "clip_ratio/high_max": "above, the most",
    }),
    ("policy over the one that sampled", "ratio", {"ratio": "each step"}),
    ("completions that are cut off or repeat", "share", {
        "completions/clipped_ratio": "cut off by the length",
        "completions/repetition": "repetition",
    }),
    ("speed", "tokens/s", {
        "rollout_tokens_per_s": "sampler", "learner_tokens_per_s": "learner",
    }),
    ("time of a step", "s", {
        "rollout_seconds": "rollout", "reward_seconds": "rewards", "learner_seconds": "learner",
    }),
    ("between sampler and learner", "nats a token", {f"{GAP}/mean": "mean", f"{GAP}/max": "most"}),
    ("importance weights", "ratio", {
        f"{RATIO}/mean": "mean", f"{RATIO}/min": "least", f"{RATIO}/max": "most",
    }),
)  # fmt: skip
ANY = ("entropy", "policy over the one that sampled", "importance weights")  # 0 is nothing there
WARM = ("speed", "time of a step")  # without the first step, which compiles
OF_LOSS = ("learning_rate", "grad_norm", "memory_gib")
ASIDE = (
    "reward", "reward_std", "tokens_per_s", "step_time", "num_tokens", "unscored", "completions",
)  # fmt: skip
HELD_OUT = {
    "completions/mean_length": "completions' length",
    "completions/clipped_ratio": "completions that are cut off",
}


def there(record: Record, rows: Sequence[Row]) -> bool:
    """Whether record or rows are those of a run with rewards."""
    return record.get("prompts") is not None or any("reward" in row for row in rows)


def curves(record: Record, rows: Sequence[Row]) -> str:
    """Rewards over the whole width, then everything else that the log counts."""
    if not rows:
        return parts.curves(record, rows)
    trained, steps = [row for row in rows if "loss" in row], parts.across(rows)
    held_out = parts.evaluations(record, rows)
    settings = record.get("settings") or {}
    judged = held_out.pop("reward", {})
    spread = [(r["step"], r["reward"] - r["reward_std"], r["reward"] + r["reward_std"])
              for r in trained if r.get("reward") is not None]  # fmt: skip
    wide = charts.chart(
        "reward",
        [*raw_and_smooth("mean of a step", trained, "reward"),
         *parts.held_out_curves(judged, "reward", settings)],
        marks=parts.best_marks(judged, "reward", settings), steps=steps,
        bands=[Band("a deviation to both sides", spread)],
    )  # fmt: skip
    small = [*_functions(trained, steps), _lengths(trained, steps, settings)]
    for title, unit, names in GROUPED:
        of = trained[1:] if title in WARM and len(trained) > 2 else trained
        floor = None if title in ANY else 0.0
        small.append(charts.chart(title, _lines(of, names), unit=unit, steps=steps, floor=floor))
    small += _held_out(held_out, steps)
    small.append(charts.chart("loss", raw_and_smooth("each step", trained, "loss"), steps=steps))
    small += [parts.counted(name, trained, steps, record) for name in (*OF_LOSS, *_others(trained))]
    return (
        f'<h2>Curves</h2><div class="wide">{wide}</div><div class="charts">{"".join(small)}</div>'
    )


def _held_out(found: Mapping[str, Mapping[str, Sequence[Point]]], steps: Scale) -> list[str]:
    """Charts of evaluations: each function's rewards where there are several, and lengths."""
    means = [name for name in found if name.startswith(REWARDS) and name.endswith("/mean")]
    title = lambda name: f"reward {name.removeprefix(REWARDS).removesuffix('/mean')}"
    named = {name: title(name) for name in means if len(means) > 1} | HELD_OUT
    dots = lambda sets: [
        Curve(name, points, n % COLORS, "dots")
        for n, (name, points) in enumerate(sets.items(), start=1)
    ]
    return [
        charts.chart(f"evaluation: {title}", dots(found[name]), steps=steps, floor=0.0)
        for name, title in named.items()
        if name in found
    ]


def _others(rows: Sequence[Row]) -> list[str]:
    """Numbers that no chart above shows: those that reward functions logged."""
    known = {*OF_LOSS, *ASIDE, *parts.ASIDE, *(name for *_, names in GROUPED for name in names)}
    left = {name for row in rows for name in row} - known
    return sorted(n for n in left if not n.startswith((REWARDS, "completions/")))[:MORE]


def _lines(rows: Sequence[Row], names: Mapping[str, str]) -> list[Curve]:
    """A line a name; with a smoothed one where it stands alone."""
    present = [name for name in names if points_of(rows, name)]
    if len(present) == 1:
        return raw_and_smooth(names[present[0]], rows, present[0])
    return [Curve(names[name], points_of(rows, name), n % COLORS) for n, name in enumerate(present)]


def _functions(rows: Sequence[Row], steps: Scale) -> list[str]:
    """A chart a reward function, where there are several."""
    every = {name for row in rows for name in row}
    names = sorted(n for n in every if n.startswith(REWARDS) and n.endswith("/mean"))
    out = []
    for color, name in enumerate(names if len(names) > 1 else []):
        function = name.removeprefix(REWARDS).removesuffix("/mean")
        std = f"{REWARDS}{function}/std"
        ends = lambda row, name=name, std=std: (
            row["step"], row[name] - row[std], row[name] + row[std]
        )  # fmt: skip
        both = [row for row in rows if None not in (row.get(name), row.get(std))]
        band = Band("a deviation to both sides", list(map(ends, both)), color % COLORS)
        drawn = [c._replace(color=color % COLORS) for c in raw_and_smooth("mean", rows, name)]
        out.append(charts.chart(f"reward {function}", drawn, steps=steps, bands=[band]))
    return out


def _lengths(rows: Sequence[Row], steps: Scale, settings: Record) -> str:
    names = [f"completions/{end}_length" for end in ("mean", "min", "max")]
    whole = [row for row in rows if all(row.get(name) is not None for name in names)]
    ends = [(row["step"], row[names[1]], row[names[2]]) for row in whole]
    most = settings.get("max_completion_length")
    return charts.chart(
        "completions' length", raw_and_smooth("mean", whole, names[0]), unit="tokens", steps=steps,
        bands=[Band("shortest to longest", ends)], floor=0.0,
        rules=[Rule(f"max_completion_length {most:,}", most)] if most else [],
    )  # fmt: skip


def completions(rows: Sequence[Row]) -> str:
    """The newest generations that the log keeps, each with its best and worst completions."""
    kept = [row for row in rows if row.get(TABLE)]
    shown = [_generation(row, n == 0) for n, row in enumerate(reversed(kept[-NEWEST:]))]
    if not shown:
        return ""
    left = len(kept) - len(shown)
    more = f'<p class="soft">{left} earlier ones stand in metrics.jsonl.</p>' if left else ""
    return f"<h2>Completions</h2>{''.join(shown)}{more}"


def _generation(row: Row, newest: bool) -> str:
    worth = lambda one: -float("inf") if one.get("reward") is None else one["reward"]
    ordered = sorted(row[TABLE], key=worth, reverse=True)
    best, worst = ordered[:BEST], ordered[BEST:][-WORST:]
    names = list(dict.fromkeys(name for one in ordered for name in one.get("rewards", {})))
    names = names if len(names) > 1 else []
    extra = list(dict.fromkeys(k for one in ordered for k in one if k not in OWN))
    heads = ("prompt", "completion", "reward", *names, "advantage", "ended by", *extra)
    kind = lambda head: ' class="n"' if head not in ("prompt", "completion", *extra) else ""
    head = "".join(f'<th scope="col"{kind(h)}>{_broken(str(h))}</th>' for h in heads)
    lines = [_line(one, names, extra) for one in best]
    if left := len(ordered) - len(best) - len(worst):
        wide = f'colspan="{len(heads)}"'
        lines.append(f'<tr class="gap"><td class="soft" {wide}>{left} more</td></tr>')
    lines += [_line(one, names, extra) for one in worst]
    mean = f", mean reward {number(row['reward'])}" if row.get("reward") is not None else ""
    return (
        f"<details{' open' if newest else ''}><summary>step {row['step']:,}{mean}</summary>"
        f'<div class="wider"><table class="kept"><tr>{head}</tr>{"".join(lines)}</table></div>'
        "</details>"
    )


def _line(one: Mapping[str, Any], names: Sequence[str], extra: Sequence[str]) -> str:
    numbers = [one.get("reward"), *(one["rewards"].get(n) for n in names), one.get("advantage")]
    say: Callable[[Any], str] = lambda x: "" if x is None else number(x)
    cells = "".join(f'<td class="n">{escape(say(x))}</td>' for x in numbers)
    ended = {"length": "length", "stop": "stop token"}.get(one.get("finish_reason", ""), "")
    more = "".join(f"<td>{parts.cut(str(one.get(k, '')), LETTERS)}</td>" for k in extra)
    return (
        f'<tr><td><div class="text prompt">{parts.cut(_said(one["prompt"]), LETTERS)}</div></td>'
        f'<td><div class="text">{parts.cut(str(one["completion"]), LETTERS)}</div></td>'
        f'{cells}<td class="n">{ended}</td>{more}</tr>'
    )


def _broken(name: str) -> str:
    """A name as HTML that may break after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def _said(prompt: Any) -> str:
    """A prompt as text, messages a paragraph each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)


def data(record: Record) -> str:
    """The prompts' lengths, and how many there are."""
    found, held_out = record.get("prompts"), record.get("evaluation") or {}
    table = [(f"evaluation prompts{n and f', {n}'}", f"{k:,}") for n, k in held_out.items()]
    if found is None:
        return f"<h2>Data</h2>{parts.two_columns(table)}" if table else ""
    limit = Rule(f"max_seq_length {found['limit']:,}", found["limit"])
    drawn = charts.bars(
        "prompts by length", found["edges"], found["counts"], unit="tokens", rule=limit
    )
    lengths = f"{found['shortest']:,} to {found['longest']:,}, median {number(found['median'])}"
    table = [("prompts", f"{found['rows']:,}"), ("tokens a prompt", lengths), *table]
    return f'<h2>Data</h2><div class="two">{drawn}<div>{parts.two_columns(table)}</div></div>'
