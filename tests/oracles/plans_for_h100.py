"""XLA's plans of steps for an H100, made on a machine without one: tests/data/plans_for_h100.json.

    export JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu PYTHONPATH=.
    export XLA_FLAGS=--xla_gpu_autotune_level=0
    python tests/oracles/plans_for_h100.py h100_sxm.txtpb 'mixtral-8x7b 2x2048 full 16' ...

The first argument is the GPU's description in openxla/xla, xla/backends/gpu/target_config/specs/
(rates of its units aside). Needs jax[cuda12] 0.11.2, triton 3.6.0 and jax-triton 0.3.1. What JAX
asks a GPU about itself is answered here, and nothing is tuned: for 2 x 2048 tokens of
Qwen3-30B-A3B the plan is the one that the GPU's own compiler made, 25.60 GiB.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from jax._src import xla_bridge
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax._src.pallas.triton import gpu_info
from jax.experimental import topologies

from pallas_kernels import _choice, attention
from unsloth_jax import plan
from workflows import plan as planning
from workflows.bench import plan_accuracy

DATA = Path(__file__).parents[1] / "data" / "plans_for_h100.json"


def pretend() -> None:
    """Whatever asks for a GPU's properties is told an H100's."""
    found = gpu_info.get_gpu_info_from_version(gpu_info.GpuVersion.H100)
    gpu_info.get_gpu_info = lambda: found
    cudnn.check_cudnn_version = lambda: 91002
    cudnn.check_compute_capability = lambda capability: True
    cudnn.is_cuda_compute_capability_equal = lambda capability: capability == "9.0"
    _choice.capability = lambda: 9.0
    attention._disagreement = lambda *_: None
    attention.jax = SimpleNamespace(**vars(jax) | {"default_backend": lambda: "gpu"})


def device(target: str) -> jax.sharding.SingleDeviceSharding:
    """Where nothing runs: the device that a target's description stands for."""
    if "cuda" not in xla_bridge._topology_factories:
        xla_bridge.discover_pjrt_plugins()
    found = topologies.get_topology_desc("1x1x1", "cuda", target_config=target, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(found.devices[0])


def job(fields: dict[str, Any], batch: int, length: int, rank: int) -> plan.Job:
    family, c, params = planning.shapes(fields, "bfloat16", "nf4")
    states = planning.states(params, plan_accuracy.RULE)
    return plan.Job(family, c, params, states, rank, batch, length)


def compiled(j: plan.Job, memory: plan.Memory, place: Any) -> plan.Plan:
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    j = plan._table_apart(j) if memory.host_embedding else j
    given = jax.tree.map(placed, (j.states(j.rank), j.params, plan.batches(j, memory)))
    with _choice.target("gpu"):
        traced = plan_accuracy.step(j, memory).trace(*given)
        program = traced.lower(lowering_platforms=("cuda",)).compile()
    return plan.laid_out(program, j, memory)


def main(target: str, *names: str) -> None:
    """Replaces or adds the rows of these names; shapes are those of the file."""
    pretend()
    place, data = device(Path(target).read_text()), json.loads(DATA.read_text())
    for name in names:
        shape, size, policy, rank = name.split()
        batch, length = map(int, size.split("x"))
        j, memory = job(data["shapes"][shape], batch, length, int(rank)), plan.named(policy)
        found, guess = compiled(j, memory, place), plan.estimate(j, memory)
        data["rows"][name] = {"gib": found.total / plan.GIB, "host_gib": found.host / plan.GIB}
        print(f"{name}: {plan.gib(found.total)}, estimated {plan.gib(guess.total)}", flush=True)
        DATA.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
