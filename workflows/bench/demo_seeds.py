"""The demo's exact match on several seeds, before and after training.

python -m workflows.bench.demo_seeds --output docs/results/demo_seeds.json
"""

import argparse
import datetime
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

from bridge import export
from workflows import demo, demo_data, machine


def measured(seed: int) -> dict:
    """One training; the data split, the adapters' start and the order of rows follow the seed."""
    start = time.perf_counter()
    _, trainer, before, after = demo.trained(seed)
    held_out = demo_data.split(seed).held_out
    return {
        "seed": seed,
        "before": before.share,
        "after": after.share,
        "best_constant": demo_data.best_constant([e.record for e in held_out]),
        "held_out": len(held_out),
        "steps": len(trainer.log_history),
        "first_loss": trainer.log_history[0]["loss"],
        "last_loss": trainer.log_history[-1]["loss"],
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(machine.peak() / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="3407,1,2")
    parser.add_argument("--output", type=Path, required=True)
    a = parser.parse_args()
    rows = []
    for seed in map(int, a.seeds.split(",")):
        rows.append(measured(seed))
        print(json.dumps(rows[-1]), flush=True)
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": export.versions(),
        "command": f"python -m workflows.bench.demo_seeds --seeds {a.seeds}",
    }
    a.output.parent.mkdir(parents=True, exist_ok=True)
    a.output.write_text(json.dumps(facts | {"runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
