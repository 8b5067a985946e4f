"""How far plans are off: compiled steps that nothing runs, and peaks of steps that run.

    python -m workflows.bench.plan_accuracy --compile --output docs/performance/plan_compiled.json
    python -m workflows.bench.plan_accuracy --measure 5 --figures docs/performance/plan.json

--compile takes no memory for weights and needs 10 to 30 seconds a case; cases that are in --output
are not compiled again. --measure runs each case in a process of its own, where the peak is its own;
what it saw is kept in --measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax

from unsloth_jax import lora, optim, plan, train
from unsloth_jax.data import Row
from unsloth_jax.plan import GIB, Job, Plan
from unsloth_jax.remat import Memory
from workflows import machine, objective
from workflows import plan as planning
from workflows.batching import Batches
from workflows.bench import configs, lengths, rows, weights
from workflows.run import Run

MUST, AIM = 0.10, 0.03
RULE = optim.make("adamw_8bit", optim.schedule("constant", 2e-4, 0, 1), weight_decay=0.01)
SHAPES: dict[str, dict[str, Any]] = configs.CONFIGS | {
    "qwen3-0.6b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu", tie_word_embeddings=True,
        max_position_embeddings=40960, bos_token_id=151643, eos_token_id=151645,
    ),
}  # fmt: skip


class Case(NamedTuple):
    """A shape under a way to spend memory, with adapters of a rank."""

    batch: int
    length: int
    memory: Memory
    rank: int = 16
    shape: str = "llama-8b"

    @property
    def name(self) -> str:
        what = f"{self.batch}x{self.length}, {plan.title(self.memory)}, r={self.rank}"
        return f"plan of {self.shape}, {what}"


CASES = (
    Case(2, 2048, Memory("none")),
    Case(2, 2048, Memory("full")),
    Case(4, 2048, Memory("mlp", host_embedding=True)),
    Case(8, 2048, Memory("offload", tiles=2, host_embedding=True)),
    Case(1, 16384, Memory("full", tiles=2, host_embedding=True)),
    Case(2, 2048, Memory("offload", host_embedding=True)),
    Case(4, 2048, Memory("none", host_embedding=True)),
    Case(4, 2048, Memory("attention", host_embedding=True), rank=8),
    Case(8, 2048, Memory("full"), rank=64),
    Case(1, 8192, Memory("mlp", host_embedding=True), rank=64),
    Case(4, 2048, Memory("none"), shape="qwen3-0.6b"),
    Case(8, 2048, Memory("full"), rank=8, shape="qwen3-0.6b"),
)
TINY = tuple(Case(2, 128, Memory(keep), 4, "tiny") for keep in ("none", "full"))


def job(case: Case) -> Job:
    """The case as shapes, planned for a GPU wherever this runs."""
    family, c, params = planning.shapes(SHAPES[case.shape], "bfloat16", "nf4")
    states = planning.states(params, RULE)
    return Job(family, c, params, states, case.rank, case.batch, case.length)


def step(j: Job, memory: Memory) -> Any:
    """The optimizer step of a job."""
    return train.make_step(objective.loss(j.family, j.config, 1.0, memory, documents=1), RULE)


def in_gib(p: Plan) -> dict[str, float]:
    """The parts of a plan, its total and its host memory."""
    parts = {name: getattr(p, name) / GIB for name in (*plan.PARTS, "host")}
    return parts | {"total": p.total / GIB}


def compiled(case: Case) -> rows.Row:
    """What XLA plans for a case beside what `estimate` says: a row of --output."""
    j, start = job(case), time.perf_counter()
    found = plan.compiled(step(j, case.memory), j, case.memory)
    took, guess = time.perf_counter() - start, plan.estimate(j, case.memory)
    facts = case._asdict() | {"memory": case.memory._asdict()}
    return rows.figure(
        case.name, found.total / GIB, "GiB", better="lower", absolute=True, case=facts,
        compiled=in_gib(found), estimated=in_gib(guess), off=guess.total / found.total - 1,
        compile_s=took, peak_gib=found.total / GIB, pinned_gib=found.host / GIB,
    )  # fmt: skip


def compile_all(cases: tuple[Case, ...], output: Path, budget_s: float | int) -> list[rows.Row]:
    """Rows of all cases; those that `output` lacks are compiled while there is time."""
    end, found = time.monotonic() + budget_s, []
    for case in cases:
        old = json.loads(output.read_text()) if output.exists() else []
        row = next((row for row in old if row["name"] == case.name), None)
        if row is None:
            if time.monotonic() > end:
                print("no time left for", case.name, flush=True)
                continue
            row = compiled(case)
            rows.write(output, [row])
        found.append(row | row["compiled"] | {"estimated": row["estimated"]["total"]})
        print(rows.table(found[-1:], COMPILED), flush=True)
    return found


def measured(case: Case) -> rows.Row:
    """Three steps of a case: the device's peak beside both plans, in GiB."""
    j = job(case)
    program = step(j, case.memory)
    both = plan.compiled(program, j, case.memory), plan.estimate(j, case.memory)
    params = weights.random(j.params)
    params = objective.hosted(params) if case.memory.host_embedding else params
    state = train.start(lora.init(jax.random.key(0), j.params, case.rank), RULE)
    ids = lengths.tokens(case.batch, case.length, j.config.vocab, 0).tolist()
    data = Batches([Row(row, [1] * len(row)) for row in ids], case.batch, 1, case.length, False, 0)
    Run(program, state, params, data, lambda step: 0.0, 3)()
    peak = machine.device_peak() / GIB or None
    plans = {p.source: p.total / GIB for p in both}
    off = {f"{k}_off": abs(v / peak - 1) if peak else None for k, v in plans.items()}
    return {"name": case.name, "peak_gib": peak, "pinned_gib": both[0].host / GIB} | plans | off


def measure_all(cases: tuple[Case, ...], figures: Path | None, output: Path) -> None:
    """Each case in a process of its own; the worst of them is the figure.

    Cases that `output` has are not measured again.
    """
    found = []
    for case in cases:
        row = rows.find(rows.read(output), {"name": case.name})
        if row is None:
            line = [sys.executable, "-m", "workflows.bench.plan_accuracy", "--alone", case.name]
            done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(output, row)
        found.append(row)
        print(rows.table(found[-1:], MEASURED), flush=True)
    print(rows.table(found, MEASURED))
    off = [row["compiled_off"] for row in found]
    worst = None if None in off else max(off)
    if figures:
        name = f"plan's predicted peak against measured, {len(found)} configurations"
        more = dict(better="lower", absolute=True, cases=found)
        rows.write(figures, [rows.figure(name, worst, "of 1", must=MUST, aim=AIM, **more)])


COMPILED = (
    "name total estimated off parameters residuals gradients temporaries host compile_s".split()
)
MEASURED = "name peak_gib compiled compiled_off estimated estimated_off pinned_gib".split()


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--compile", action="store_true", help="compile every case, run none")
    p.add_argument("--measure", type=int, default=0, metavar="N", help="run the first N cases")
    p.add_argument("--tiny", action="store_true", help="small cases, for any machine")
    p.add_argument("--output", type=Path, default=Path("docs/performance/plan_compiled.json"))
    p.add_argument("--figures", type=Path, help="a JSON list of docs/performance/")
    p.add_argument("--measured", type=Path, default=Path("plan_accuracy.jsonl"), metavar="FILE")
    p.add_argument("--budget-s", type=float, default=540)
    p.add_argument("--alone", help=argparse.SUPPRESS)
    a = p.parse_args(line)
    cases = TINY if a.tiny else CASES
    if a.alone:
        case = next(case for case in (*CASES, *TINY) if case.name == a.alone)
        print(json.dumps(measured(case)))
    if a.compile:
        print(rows.table(compile_all(cases, a.output, a.budget_s), COMPILED))
    if a.measure:
        measure_all(cases[: a.measure], a.figures, a.measured)


if __name__ == "__main__":
    main()
