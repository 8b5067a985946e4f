"""Where a training step's time goes on the device: kernels by kind, and the gaps between them.

    python -m workflows.bench.profile --shapes 2x2048 --packed 4x2048 --output profile.jsonl

Each case is compiled and warmed up as `train_step` does it, then one step is traced by JAX's
profiler. What belongs to which kind is told from the kernels' names (`KINDS`).
"""

import argparse
import gzip
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax

from unsloth_jax import quant
from workflows import objective
from workflows.bench import rows, train_step, weights

# The first whose pattern is in a kernel's name or in the name of its operation.
KINDS = {
    "NF4 decoding": r"nf4",
    "optimizer": r"adam8",
    "attention": r"fmha|flash|sdpa|cudnn",
    "head and loss": r"logprob|cross_entropy",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|\bdot\b|^dot",
    "copies": r"memcpy|memset|copy|dynamic.update.slice|dynamic.slice",
    "fusions": r"fusion|loop_|input_|wrapped_|reduce|transpose|convert|broadcast",
}
REST, LARGEST = "others", 12
Event = Mapping[str, Any]


def kind(event: Event) -> str:
    """The kind of one kernel."""
    args = event.get("args", {})
    names = " ".join(str(args.get(k, "")) for k in ("hlo_op", "tf_op", "name", "long_name"))
    text = f"{event['name']} {names}".lower()
    return next((k for k, pattern in KINDS.items() if re.search(pattern, text)), REST)


def kernels(trace: Mapping[str, Any]) -> list[Event]:
    """The kernels of a trace in order: of a GPU's streams, else operations on a CPU's threads.

    Raises ValueError where there are none.
    """
    events = trace["traceEvents"]
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and "stream" in e["args"]["name"].lower()
    }
    timed = (e for e in events if e.get("ph") == "X")
    found = [
        e
        for e in timed
        if ((e["pid"], e["tid"]) in streams if streams else "hlo_op" in e.get("args", {}))
    ]
    if not found:
        raise ValueError("the trace holds no kernels: was anything run while it was taken?")
    return sorted(found, key=lambda e: e["ts"])


def busy(events: Iterable[Event]) -> float:
    """Milliseconds in which at least one of the events, in order, was running."""
    total, end = 0.0, float("-inf")
    for e in events:
        start, stop = e["ts"], e["ts"] + e["dur"]
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e3


def breakdown(found: list[Event]) -> dict[str, Any]:
    """Milliseconds by kind, of gaps, and of the kernels that take longest."""
    parts: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for e in found:
        parts[kind(e)] += e["dur"] / 1e3
        names[e["name"]].append(e["dur"] / 1e3)
    span = (max(e["ts"] + e["dur"] for e in found) - found[0]["ts"]) / 1e3
    largest = sorted(names.items(), key=lambda item: -sum(item[1]))[:LARGEST]
    return {
        "span_ms": span,
        "gaps_ms": span - busy(found),
        "kernels": len(found),
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "largest": [[name[:90], len(ms), round(sum(ms), 3)] for name, ms in largest],
    }


def traced(s: train_step.Setting, params: Any, case: train_step.Case) -> dict[str, Any]:
    """The breakdown of one step of a case."""
    params, program, facts = train_step.ready(s, params, case)
    state, stream = s.state(jax.random.key(0)), train_step.batches(case, s.config.vocab)
    for step in range(4):
        batch, _ = next(stream)
        batch = jax.block_until_ready(jax.device_put(objective.embedded(params, batch)))
        if step < 3:
            state, _ = jax.block_until_ready(program(state, params, batch))
    with tempfile.TemporaryDirectory(prefix="unsloth_jax-trace-") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(state, params, batch))
        (file,) = Path(folder).rglob("*.trace.json.gz")
        found = breakdown(kernels(json.loads(gzip.decompress(file.read_bytes()))))
    return {"chosen": facts.get("chosen", case.policy), **found}


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", default="llama-8b")
    p.add_argument("--shapes", default="2x2048", help="batch x length, several by comma")
    p.add_argument("--packed", default="", help="the same, of packed rows")
    p.add_argument("--policy", default="auto")
    p.add_argument("--output", type=Path)
    a = p.parse_args(line)
    options = ["--shape", a.shape, f"--shapes={a.shapes}", f"--packed={a.packed}"]
    own = train_step.arguments([*options, "--policies", a.policy])
    s = train_step.setting(own)
    params = quant.matmul_in(weights.random(s.shapes), "bf16", jax.default_backend() == "cpu")
    for case in train_step.cases(own):
        found = case._asdict() | traced(s, params, case) | rows.facts()
        title = f"{'packed ' * case.packed}{case.batch}x{case.length}, {found['chosen']}"
        print(f"{title}: {found['span_ms']:.1f} ms, gaps {found['gaps_ms']:.1f}")
        lines = [{"kind": k, "ms": ms} for k, ms in found["parts"].items()]
        print(rows.table(lines, ["kind", "ms"]), flush=True)
        if a.output:
            rows.append(a.output, found)


if __name__ == "__main__":
    main()
