"""One optimizer step of QLoRA on random weights: time, tokens/s, memory; Unsloth's beside it.

    python -m workflows.bench.train_step --policies full --shapes 2x2048 --packed 4x2048 \\
      --unsloth unsloth.jsonl --figures docs/performance/train_step.json

Measurements are appended to --output and not taken again. A process' peak shows only where it
rises above what ran before: --alone gives each case a process of its own. With --run-unsloth,
tests/gpu/unsloth_baseline.py runs first, with its packages from that folder.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unsloth_jax import data, lora, optim, plan, quant, remat, train, tree
from unsloth_jax.data import Row
from unsloth_jax.dims import Batch, Params
from unsloth_jax.leaves import Hosted
from unsloth_jax.plan import UNBOUNDED, Budget
from unsloth_jax.remat import Memory
from workflows import machine, objective
from workflows.bench import lengths, rows, sides, weights
from workflows.plan import budget

GIB = 2**30
RATE, DECAY = 2e-4, 0.01  # bitsandbytes' AdamW8bit decays by 0.01 where it isn't told otherwise
RUN = 256  # steps of a long run
SIZES = ("argument", "output", "alias", "temp", "host_temp")
BASELINE = Path(__file__).parents[2] / "tests" / "gpu" / "unsloth_baseline.py"


class Case(NamedTuple):
    """What is measured: a shape, its rows packed with documents or not, under a policy."""

    batch: int
    length: int
    packed: bool
    policy: str


class Setting(NamedTuple):
    """What all cases share; `shapes` are the parameters without their values."""

    family: ModuleType
    config: Any
    shapes: Params
    rule: optax.GradientTransformation
    rank: int

    def state(self, key: jax.Array) -> train.State:
        """Fresh adapters on all projections, and their optimizer state."""
        return train.start(lora.init(key, self.shapes, self.rank), self.rule)


def setting(a: argparse.Namespace) -> Setting:
    rate = optim.schedule("constant", RATE, 0, 1)
    rule = optim.make(a.optimizer, rate, weight_decay=DECAY)
    return Setting(*weights.model(a.shape), rule, a.rank)


def documents(case: Case) -> int:
    """The most documents that share a row in a long run, as the trainer counts them."""
    if not case.packed:
        return 1
    bins = itertools.islice(lengths.packed(case.batch, case.length), RUN)
    return max(len(row) for batch in bins for row in batch)


def batches(case: Case, vocabulary: int) -> Iterator[tuple[Batch, int]]:
    """(batch with its micro-batch axis, how many of its tokens are no padding) for each step."""
    bins, step = lengths.packed(case.batch, case.length), 0
    while True:
        ids = lengths.tokens(case.batch, case.length, vocabulary, step).reshape(-1)
        sizes = next(bins) if case.packed else [[case.length]] * case.batch
        micro = data.collate(_documents(ids, sizes), case.batch, case.length)
        yield data.stacked([micro]), sum(map(sum, sizes))
        step += 1


def _documents(ids: np.ndarray, sizes: list[list[int]]) -> list[list[Row]]:
    """The ids cut into documents, in order: what a row without padding holds."""
    pieces = iter(np.split(ids, np.cumsum([size for row in sizes for size in row])))
    return [[Row(next(pieces).tolist(), [1] * size) for size in row] for row in sizes]


def compiled(s: Setting, params: Params, case: Case) -> tuple[Any, dict[str, Any]]:
    """(the compiled step, what compiling took and the memory that XLA plans, in GiB)."""
    state = jax.eval_shape(s.state, jax.random.key(0))
    batch, _ = next(batches(case, s.config.vocab))
    loss = objective.loss(s.family, s.config, 1.0, plan.named(case.policy), documents(case))
    step = train.make_step(loss, s.rule)
    start = time.perf_counter()
    batch = objective.embedded(params, batch)
    lowered = step.lower(state, params, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch)))
    traced = time.perf_counter()
    program = lowered.compile()
    took = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    sizes = program.memory_analysis()
    gib = {name: getattr(sizes, f"{name}_size_in_bytes") / GIB for name in SIZES}
    whole = gib["argument"] + gib["output"] - gib["alias"] + gib["temp"]
    table = sum(w.table.nbytes for w in tree.flatten(params).values() if isinstance(w, Hosted))
    host = gib["host_temp"] + table / GIB
    return program, took | {"gib": gib, "compiled_gib": whole, "pinned_gib": host}


def ready(s: Setting, params: Params, case: Case) -> tuple[Params, Any, dict[str, Any]]:
    """(the parameters where the policy wants them, the compiled step, facts of compiling it).

    "auto" is the policy that a trainer would choose on this device.
    """
    if case.policy != "auto":
        params = placed(params, case)
        return params, *compiled(s, params, case)
    state = jax.eval_shape(s.state, jax.random.key(0))
    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    sizes = s.rank, case.batch, case.length, 1, platform
    job = plan.Job(s.family, s.config, s.shapes, lambda rank: state, *sizes)
    room = budget(None, held=plan.size(params)) or Budget(UNBOUNDED, UNBOUNDED)
    found: dict[Memory, tuple] = {}

    def confirm(memory: Memory) -> plan.Plan:
        found[memory] = ready(s, params, case._replace(policy=plan.title(memory)))
        return plan.laid_out(found[memory][1], job, memory)

    memory, _ = plan.choose(job, room, confirm=confirm)
    params, program, facts = found[memory]
    return params, program, facts | {"chosen": plan.title(memory)}


def measured(program: Any, s: Setting, params: Params, case: Case, a: argparse.Namespace) -> dict:
    """Median step time, tokens/s and the process' peak, or that it did not fit."""
    seconds, speeds, losses = [], [], []
    before, stream = machine.device_peak(), batches(case, s.config.vocab)
    sent = lambda batch, useful: (jax.device_put(objective.embedded(params, batch)), useful)
    try:
        state = s.state(jax.random.key(0))
        batch, useful = jax.block_until_ready(sent(*next(stream)))
        for _ in range(a.warmup + a.steps):
            start = time.perf_counter()
            state, report = program(state, params, batch)
            # As in `Run`: the next batch is made while the device works.
            done, (batch, useful) = useful, sent(*next(stream))
            jax.block_until_ready((state, report))
            seconds.append(time.perf_counter() - start)
            speeds.append(done / seconds[-1])
            losses.append(float(report.loss))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False}
    after = machine.device_peak()
    return {
        "fits": True,
        "ms": statistics.median(seconds[a.warmup :]) * 1e3,
        "tokens_per_s": statistics.median(speeds[a.warmup :]),
        "all_ms": [round(t * 1e3, 1) for t in seconds],
        "peak_gib": after / GIB if after > before else None,
        "losses": losses,
    }


def placed(params: Params, case: Case) -> Params:
    """The parameters with their embedding table where the policy wants it."""
    if plan.named(case.policy).host_embedding:
        return objective.hosted(params)
    back = lambda _, leaf: jax.device_put(leaf.table) if isinstance(leaf, Hosted) else leaf
    return tree.map_paths(back, params)


def cases(a: argparse.Namespace) -> list[Case]:
    """Policies in the order given, each from the smallest shape to the largest."""
    shapes = [(*shape, False) for shape in (lengths.shapes(a.shapes) if a.shapes else [])]
    shapes += [(*shape, True) for shape in (lengths.shapes(a.packed) if a.packed else [])]
    shapes.sort(key=lambda shape: shape[0] * shape[1])
    return [Case(*shape, policy) for policy in a.policies.split(",") for shape in shapes]


def key(case: Case, a: argparse.Namespace) -> dict[str, Any]:
    what = {"who": "ours", "what": "train", "shape": a.shape, "rank": a.rank}
    return what | {"optimizer": a.optimizer, "matmul_dtype": a.matmul_dtype} | case._asdict()


def run(a: argparse.Namespace) -> None:
    """Takes the measurements that are missing, as long as there is time."""
    end, params, s = time.monotonic() + a.budget_s, None, None
    for case in cases(a):
        if rows.find(rows.read(a.output), key(case, a)):
            continue
        if time.monotonic() > end:
            print("no time left for", case, flush=True)
            continue
        if a.alone:
            # Before anything asks for the device, whose memory the child needs.
            _alone(case, a)
            continue
        if params is None:
            s = setting(a)
            emulate = jax.default_backend() == "cpu"
            params = quant.matmul_in(weights.random(s.shapes), a.matmul_dtype, emulate)
        params, program, found = ready(s, params, case)
        found |= measured(program, s, params, case, a)
        rows.append(a.output, key(case, a) | found | rows.facts())
        print(json.dumps(key(case, a) | found), flush=True)


def _alone(case: Case, a: argparse.Namespace) -> None:
    options = {"shapes": "", "packed": "", "policies": case.policy}
    options["packed" if case.packed else "shapes"] = f"{case.batch}x{case.length}"
    names = "output shape rank optimizer steps warmup matmul_dtype".split()
    options |= {name: getattr(a, name) for name in names}
    flat = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, "-m", "workflows.bench.train_step", *flat], check=True)


def unsloth(a: argparse.Namespace) -> None:
    """Runs Unsloth's side on the same shapes in a process of its own, before JAX takes memory."""
    command = [sys.executable, str(BASELINE)]
    start = ["--folder", str(a.checkpoint), "--shape", a.shape]
    paths = [str(a.run_unsloth), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if not (a.checkpoint / "config.json").exists():
        subprocess.run([*command, "make", *start], check=True, env=environment)
    options = [f"--{name}={getattr(a, name)}" for name in "shapes packed rank".split()]
    options += ["--output", str(a.unsloth), "--budget-s", str(a.budget_s)]
    done = subprocess.run([*command, "train", *start, *options], env=environment)
    if done.returncode:
        sys.exit("Unsloth's side is not complete (see above); give the command again to go on")


COLUMNS = (
    "batch length packed policy chosen ms tokens_per_s ratio limit peak_gib compiled_gib "
    "pinned_gib unsloth unsloth_gib unsloth_pinned compile_s".split()
)


def report(a: argparse.Namespace) -> None:
    """Prints both sides' measurements in one table; writes the figures where asked to."""
    same = lambda m: (m["shape"], m.get("matmul_dtype", "bf16")) == (a.shape, a.matmul_dtype)
    ours = list(filter(same, rows.read(a.output)))
    theirs = [m for m in rows.read(a.unsloth) if m["shape"] == a.shape] if a.unsloth else []
    print(rows.table(sides.beside(ours, theirs), COLUMNS))
    if a.figures:
        rows.write(a.figures, sides.figures(ours, theirs))


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", default="llama-8b", help="a name in configs.py or a config.json")
    p.add_argument("--shapes", default="2x2048,4x2048,8x2048,1x8192,1x16384")
    p.add_argument("--packed", default="4x2048", help="shapes filled with documents; may be ''")
    p.add_argument("--policies", default=",".join(remat.KEPT), help="plan's names, or auto")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--optimizer", default="adamw_8bit")
    p.add_argument("--matmul-dtype", default="bf16", help="bf16, fp8 or fp8_backward")
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--budget-s", type=float, default=540)
    p.add_argument("--output", type=Path, default=Path("train_step.jsonl"))
    p.add_argument("--figures", type=Path, help="a JSON list of docs/performance/")
    p.add_argument("--unsloth", type=Path, help="measurements of unsloth_baseline.py")
    p.add_argument("--run-unsloth", type=Path, metavar="SITE", help="folder with its packages")
    p.add_argument("--checkpoint", type=Path, default=Path("/dev/shm/unsloth_checkpoint"))
    p.add_argument("--cache", type=Path, help="JAX's compilation cache")
    p.add_argument("--alone", action="store_true", help="each case in a process of its own")
    return p.parse_args(line)


def main(line: list[str] | None = None) -> None:
    a = arguments(line)
    if a.cache:
        jax.config.update("jax_compilation_cache_dir", str(a.cache))
    if a.run_unsloth:
        a.unsloth = a.unsloth or a.output.with_name("unsloth.jsonl")
        unsloth(a)
    run(a)
    report(a)


if __name__ == "__main__":
    main()
