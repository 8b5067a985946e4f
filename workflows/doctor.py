"""What this machine offers training, and what stands in its way.

    python -m workflows.doctor

Versions, devices, how much of the GPU JAX may take and by which settings, who else holds it, the
compile cache, and which kernels run here.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import adam8_update, attention, nf4_dequantize, nf4_few_rows
from unsloth_jax.plan import gib
from unsloth_jax.quant import nf4
from workflows import machine
from workflows.plan import FRACTION, FRACTIONS

PACKAGES = "jax jaxlib jax-triton flax optax orbax-checkpoint transformers datasets torch".split()
PREALLOCATE, ALLOCATOR = "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"
Line = tuple[str, str]


def versions() -> Iterator[Line]:
    """Python's and each package's version, or that it is not installed."""
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def devices() -> Iterator[Line]:
    """What JAX sees, and of the first device what it may take and holds."""
    for device in jax.local_devices():
        capability = getattr(device, "compute_capability", None)
        yield (
            f"device {device.id}",
            " ".join(
                [device.device_kind, *([f"(compute capability {capability})"] * bool(capability))]
            ),
        )
    if (limit := machine.device_limit()) is not None:
        yield "JAX may take", gib(limit)
        yield "JAX holds", gib(machine.device_in_use())
        yield "free for JAX", gib(machine.device_free())
    yield "host memory free", gib(machine.host_free())


def allocator() -> Iterator[Line]:
    """The settings of JAX's GPU allocator as they take effect."""
    share = next((os.environ[name] for name in FRACTIONS if name in os.environ), None)
    yield "share of the GPU", share or f"{FRACTION} (default; set {FRACTIONS[0]})"
    ahead = os.environ.get(PREALLOCATE, "true").lower() not in ("false", "0")
    yield "taken at the start", "yes" if ahead else f"no ({PREALLOCATE})"
    yield "allocator", os.environ.get(ALLOCATOR, "default")
    yield "compile cache", jax.config.jax_compilation_cache_dir or "none (see compile_cache)"
    yield "XLA_FLAGS", os.environ.get("XLA_FLAGS") or "none"


def tenants() -> Iterator[Line]:
    """The processes that hold memory of a GPU, as nvidia-smi tells."""
    if shutil.which("nvidia-smi") is None:
        yield "on the GPU", "nvidia-smi is not installed"
        return
    fields = "pid,process_name,used_memory"
    for query in (f"--query-compute-apps={fields}", "--query-gpu=memory.used,memory.total"):
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        said = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()
        label = "process on a GPU" if "apps" in query else "GPU memory used, total"
        for line in said.splitlines() or ["none that it may see"]:
            yield label, line


def kernels() -> Iterator[Line]:
    """For each kernel, whether it runs here on shapes of a usual model, or why not."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    q, k = shape(2, 2048, 32, 128), shape(2, 2048, 8, 128)
    w = jax.eval_shape(nf4.quantize, shape(4096, 4096))
    of = lambda documents: attention.supports(attention.Rule(0.1, documents=documents), q, k)
    reasons = {
        "attention": of(1),
        "attention, packed rows": of(8),
        "NF4 dequantisation": nf4_dequantize.supports(w.layout, w.packed, w.statistics),
        "NF4 matmul, few rows": _few_rows(shape(4096, 4096), shape(1, 4096)),
        "8-bit Adam": adam8_update.supports(jax.ShapeDtypeStruct((4096, 16), jnp.float32)),
    }
    for name, reason in reasons.items():
        yield name, "its kernel" if reason is None else f"XLA: {reason}"


def _few_rows(weight: jax.ShapeDtypeStruct, x: jax.ShapeDtypeStruct) -> str | None:
    """Why few rows don't run through their kernel, or None; asked of shapes alone."""
    reasons = []

    def ask(weight, x):
        w = nf4.quantize(weight)
        reasons.append(nf4_few_rows.supports([w.layout], x, [w.packed], [w.statistics]))
        return x

    jax.eval_shape(ask, weight, x)
    return reasons[0]


PARTS = {
    "versions": versions,
    "devices": devices,
    "memory and compiler": allocator,
    "GPU": tenants,
    "kernels": kernels,
}


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(line)
    for title, part in PARTS.items():
        print(title)
        for name, value in part():
            print(f"  {name:<24}{value}")


if __name__ == "__main__":
    main()
