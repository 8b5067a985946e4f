"""How long the first training step takes: without a compilation cache, then in a second process.

    python -m workflows.bench.compile_time --output docs/performance/compile_time.json

Counted from the process' start to the first loss on the host: imports, tracing, compiling and the
step. Making random weights stands for loading a checkpoint and is given beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workflows.bench import rows

ASKED = {"cold": (60, 30), "cached": (25, 10)}  # seconds: must, aim
NAMES = {
    "cold": "first step of {}, cold",
    "cached": "first step of {}, second process with the compile cache",
}


def child(a: argparse.Namespace) -> None:
    """One process' first step; prints what each part took, in seconds, as JSON."""
    import jax

    from workflows.bench import train_step, weights

    jax.config.update("jax_compilation_cache_dir", str(a.cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    batch, length = map(int, a.length.split("x"))
    case = train_step.Case(batch, length, False, a.policy)
    line = ["--shape", a.shape, "--warmup", "0", "--steps", "1"]
    step_arguments = train_step.arguments(line)
    jax.devices()
    parts = {"start": time.time() - a.started}
    s = train_step.setting(step_arguments)
    at = time.time()
    params = jax.block_until_ready(weights.random(s.shapes))
    parts["weights"] = time.time() - at
    params, program, found = train_step.ready(s, params, case)
    parts |= {"trace": found["trace_s"], "compile": found["compile_s"]}
    at = time.time()
    first = train_step.measured(program, s, params, case, step_arguments)
    parts["step"] = time.time() - at
    parts["total"] = time.time() - a.started - parts["weights"]
    print(json.dumps(parts | {"device": rows.device(), "losses": first.get("losses")}))


def measured(a: argparse.Namespace, cache: Path, kind: str) -> rows.Row:
    """The figure of one fresh process that uses the cache folder."""
    options = ["--shape", a.shape, "--length", a.length, "--policy", a.policy]
    options += ["--cache", str(cache), "--started", str(time.time())]
    command = [sys.executable, "-m", "workflows.bench.compile_time", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    parts = json.loads(done.stdout.splitlines()[-1])
    must, aim = ASKED[kind]
    return rows.figure(
        NAMES[kind].format(a.shape), parts["total"], "s", must=must, aim=aim, better="lower",
        absolute=True, parts=parts, policy=a.policy, device=parts["device"],
    )  # fmt: skip


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", default="llama-8b")
    p.add_argument("--length", default="2x2048", help="batch x length")
    p.add_argument("--policy", default="none+unroll")
    p.add_argument("--output", type=Path)
    p.add_argument("--cache", type=Path, help="only one process' step, with this cache")
    p.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    a = p.parse_args(line)
    if a.cache:
        child(a)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(a, Path(folder), kind) for kind in ASKED]
    for row in found:
        print(row["name"], {k: v for k, v in row["parts"].items() if isinstance(v, float)})
    print(rows.table(found, "name ours must aim unit".split()))
    if a.output:
        rows.write(a.output, found)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    main()
