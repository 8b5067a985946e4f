"""Memory of a fine-tuning run before it starts: a command for any machine, and what trainers ask.

    python -m workflows.plan unsloth/Llama-3.1-8B --max-seq-length 2048 --batch 2 --gpu 80GB

Of the model only config.json is read: a folder's, a file's or the hub's. `--compile` adds what XLA
plans on this machine's GPU; no weights are made for it either.
"""

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from transformers.utils import cached_file

from bridge import hf, safetensors_file
from bridge.gguf_source import GGUFSource
from pallas_kernels import attention
from unsloth_jax import layer_memory, lora, optim, plan, quant, tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Hosted
from unsloth_jax.models import family_of, tree_of
from unsloth_jax.plan import UNBOUNDED, Budget, Job, Plan
from unsloth_jax.remat import Memory
from unsloth_jax.train import State, make_step, start
from workflows import adapting, machine, objective
from workflows.batching import Steps
from workflows.interrupts import uninterrupted
from workflows.keywords import say
from workflows.objective import SFT, Objective
from workflows.widths import packed

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# What XLA takes of a GPU where nothing else is said, and where it is said.
FRACTION, FRACTIONS = 0.75, ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
# use_gradient_checkpointing -> how memory is spent; names are settled when the batch is known.
CHECKPOINTING = {"auto": "auto", "unsloth": "unsloth", True: Memory("full"), False: Memory("none")}


def size(asked: int | float | str, whole: int | None = None) -> int:
    """Bytes of an int, of a share (a float up to 1) of `whole`, or of a text like "24GB".

    Raises ValueError for anything else, and for a share where `whole` is not known.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?I?B)\s*", str(asked).upper())
    if isinstance(asked, str) and found and found[1].count(".") < 2:
        return int(float(found[1]) * UNITS[found[2]])
    if isinstance(asked, float) and 0 < asked <= 1:
        if whole is None:
            raise ValueError(
                f"memory_budget={asked} is a share of a device that does not report its memory: "
                'give bytes, or a text such as "24GB"'
            )
        return int(asked * whole)
    if isinstance(asked, int) and not isinstance(asked, bool) and asked > 1:
        return asked
    raise ValueError(
        f"memory_budget must be bytes, a share of the device up to 1.0 or a text such as "
        f'"24GB", got {asked!r}'
    )


def check_budget(asked: Any) -> None:
    """Raises ValueError where `asked` is no memory_budget."""
    if asked is not None:
        size(asked, UNBOUNDED)


def budget(asked: int | float | str | None, held: int = 0) -> Budget | None:
    """What a plan may take on this machine's first device and its host.

    By default what the device reports free, and `held`: bytes there that the plan counts too. None
    where it reports nothing and nothing was asked for.
    """
    whole, left = machine.device_limit(), machine.device_free()
    free = UNBOUNDED if left is None else left + held
    if asked is not None:
        return Budget(min(size(asked, whole), free), machine.host_pinnable())
    return None if whole is None else Budget(free, machine.host_pinnable())


LESS = {None: "quarter", "int8": "half"}  # what 4 bits take of a format


def shapes(
    fields: dict[str, Any], dtype: Any, stored: str | None
) -> tuple[ModuleType, Any, Params]:
    """(family, config, parameters as shapes) of config.json's fields.

    `stored` is the layers' format, of quant.FORMATS. Raises ValueError for an unknown model.
    """
    family = family_of(fields)
    c = family.config(fields)

    def made() -> Params:
        params = tree_of(family, c, lambda _, shape: jnp.zeros(shape, dtype))
        return quant.quantize(params, stored, hf.is_linear) if stored else params

    return family, c, jax.eval_shape(made)


def check_room(name: str, fields: dict[str, Any], dtype: Any, stored: str | None) -> None:
    """Raises MemoryError where a model's weights alone are more than the device has left."""
    free = machine.device_free()
    if free is None:
        return
    need = plan.size(shapes(fields, dtype, stored)[2])
    if need > free:
        raise MemoryError(
            f"the weights of {name} take {plan.gib(need)}, JAX can take {plan.gib(free)} of this "
            "device: `python -m workflows.doctor` says who holds the rest and which settings "
            "limit it"
            + ("" if stored == "nf4" else f"; load_in_4bit=True takes about a {LESS[stored]}")
        )


def states(
    params: Params,
    optimizer: optax.GradientTransformation,
    targets: Sequence[str] | str = lora.TARGETS,
    layers: Sequence[int] | None = None,
) -> Callable[[int], State]:
    """Shapes of fresh adapters with their optimizer state, by rank."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    @functools.cache
    def of(rank: int) -> State:
        return jax.eval_shape(
            lambda key: start(lora.init(key, params, rank, targets, layers), optimizer), key
        )

    return of


def rungs(asked: Memory | str, job: Job) -> tuple[Memory, ...]:
    """What may be chosen from: a `Memory` alone, "unsloth" the leanest, "auto" the whole ladder."""
    if isinstance(asked, Memory):
        return (asked,)
    every = plan.ladder(job)
    return every if asked == "auto" else every[-1:]


def job_of(
    model: Any,
    optimizer: optax.GradientTransformation,
    batches: Steps,
    keyed: bool = False,
) -> Job:
    """A trainer's run as shapes; where rows are not packed, its longest."""
    bare = lambda node: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), node)
    own, rank = bare(model.adapters), model.peft.rank if model.peft else 0

    @functools.cache
    def of(asked: int) -> State:
        shaped = own if asked == rank else adapting.of_rank(own, asked)
        return jax.eval_shape(lambda adapters: start(adapters, optimizer), shaped)

    return Job(
        model.family, model.config, bare(model.params), of, rank,
        batches.batch, batches.widest, batches.accumulation,
        "gpu" if jax.default_backend() == "gpu" else "cpu", keyed,
    )  # fmt: skip


@contextmanager
def prepared(
    model: Any,
    optimizer: optax.GradientTransformation,
    batches: Steps,
    total: int,
    asked: int | float | str | None = None,
    lowered: Objective = SFT,
    noted: Callable[[Plan], None] = lambda plan: None,
) -> Iterator[Callable]:
    """The step of a run of `total` steps that fits; inside, the model's table lies where it wants.

    On a GPU the plan is confirmed by compiling. On a CPU there is one only where a budget is asked
    for; `noted` gets it. Raises ValueError before the run allocates anything where no plan fits.
    """
    documents = batches.documents(total)
    say(f"packing: on, up to {documents} share a row" if documents > 1 else "packing: off")
    hosted = functools.cache(lambda: objective.hosted(model.params))
    frozen = lambda memory: hosted() if memory.host_embedding else model.params
    sizes = batches.accumulation, batches.batch
    job = job_of(model, optimizer, batches, lowered.draws)
    job = job._replace(beside=lowered.beside(*sizes), shared=lowered.shared(*sizes))

    @functools.cache
    def step(memory: Memory) -> Callable:
        return lowered.step(optimizer, model.family, model.config, model.scale, memory, documents)

    def confirm(memory: Memory) -> Plan:
        try:
            return plan.compiled(step(memory), job._replace(params=frozen(memory)), memory)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return plan.estimate(job, memory)._replace(temporaries=UNBOUNDED, source="compiled")

    _say_attention(job, documents)
    memory = _chosen(model, job, asked, confirm, noted)
    with _table_in_place(model, frozen(memory)):
        yield step(memory)


@contextmanager
def _table_in_place(model: Any, frozen: Params) -> Iterator[None]:
    """Inside, the model has `frozen` alone; after it, a table in host memory is back."""
    if frozen is model.params:
        yield
        return
    model.params = frozen  # the last reference to the table on the device goes
    try:
        yield
    finally:
        back = lambda path, leaf: jax.device_put(leaf.table) if isinstance(leaf, Hosted) else leaf
        with uninterrupted():
            model.params = tree.map_paths(back, frozen)


def _say_attention(job: Job, documents: int) -> None:
    """One line where a GPU's attention holds every score, since no kernel takes these shapes."""
    c, dtype = job.config, layer_memory.activations(job)
    widest = max(c.head_width, c.v_width)
    shape = lambda heads: jax.ShapeDtypeStruct((*job.mixed, heads, widest), dtype)
    rules = {attention.Rule(1.0, w, c.attention_cap, documents, c.chunk) for w in c.windows}
    sinks = any(path.endswith(".sinks") for path in tree.flatten(job.params))
    reasons = {attention.supports(rule, shape(c.heads), shape(c.kv_heads), sinks) for rule in rules}
    if job.platform == "gpu" and reasons != {None}:
        say(f"attention runs through XLA, with all scores in memory: {max(filter(None, reasons))}")


def _chosen(model: Any, job: Job, asked: Any, confirm: Callable, noted: Callable) -> Memory:
    asked = model.memory_budget if asked is None else asked
    wanted = rungs(model.memory, job)
    if job.platform == "cpu" and asked is None:
        return wanted[-1]
    room = budget(asked, held=plan.size(model.params))
    if room is None:
        if model.memory != "auto":
            return wanted[-1]
        raise ValueError(
            'use_gradient_checkpointing="auto": the device does not report its memory; give '
            'memory_budget, such as "24GB"'
        )
    memory, found = plan.choose(job, room, wanted, confirm if job.platform == "gpu" else None)
    say(
        f"memory plan ({found.source}): {plan.title(memory)}, {plan.gib(found.total)} of "
        f"{plan.gib(room.device)} on the device, {plan.gib(found.host)} on the host"
    )
    noted(found)
    return memory


def fields(model: str) -> dict[str, Any]:
    """config.json's fields of a folder, a config.json, a GGUF file or a name on the hub.

    No weight is read. Raises OSError where there is no config.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return GGUFSource(path).config
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return safetensors_file.read_json(path)
    if path.is_absolute() or path.parent.is_dir() and path.name == "config.json":
        raise FileNotFoundError(f"no config.json at {str(path)!r}")
    return safetensors_file.read_json(Path(cached_file(model, "config.json")))


COLUMNS = ("parameters", "adapters", "optimizer", "gradients", "residuals", "temporaries")


def table(lines: Sequence[tuple[str, Plan, bool]], chosen: str | None) -> str:
    """(name, plan, whether it fits) a line, in GiB; the chosen one is marked."""
    head = ["", "plan", "source", *COLUMNS, "total", "host", "fits"]
    cells = [head]
    for name, p, fits in lines:
        sizes = [getattr(p, part) / plan.GIB for part in COLUMNS]
        sizes = [f"{x:.2f}" for x in (*sizes, p.total / plan.GIB, p.host / plan.GIB)]
        mark = "*" if name == chosen else ""
        cells.append([mark, name, p.source, *sizes, "yes" if fits else "no"])
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    pad = lambda i, cell: cell.ljust(widths[i]) if i < 3 else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, x) for i, x in enumerate(row)).rstrip() for row in cells)


def fraction() -> float:
    """The share of a GPU's memory that XLA takes."""
    return next((float(os.environ[name]) for name in FRACTIONS if name in os.environ), FRACTION)


def asked_job(a: argparse.Namespace) -> tuple[Job, optax.GradientTransformation]:
    optimizer = optim.make(a.optimizer, optim.schedule("constant", 1e-4, 0, 1), max_grad_norm=1.0)
    config = fields(a.model)
    stored = hf.kept(config, packed(True, a.load_in_8bit, a.load_in_16bit))
    family, c, params = shapes(config, a.dtype, stored)
    names = a.target_modules
    targets = names if names == lora.ALL_LINEAR else tuple(names.split(","))
    of = states(params, optimizer, targets)
    sizes = a.batch, a.max_seq_length, a.accumulation
    return Job(family, c, params, of, a.rank, *sizes), optimizer


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", help="a folder, a config.json, a .gguf file or a name on the hub")
    p.add_argument("--max-seq-length", type=int, default=2048, help="tokens a row")
    p.add_argument("--batch", type=int, default=2, help="rows a micro-batch")
    p.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--target-modules", default=",".join(lora.TARGETS))
    p.add_argument("--optimizer", default="adamw_8bit", choices=list(optim.OPTIMIZERS))
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    width = p.add_mutually_exclusive_group()
    width.add_argument("--load-in-8bit", action="store_true", help="int8 instead of NF4")
    width.add_argument("--load-in-16bit", action="store_true", help="no NF4")
    p.add_argument("--gpu", default="80GB", help="its memory, of which XLA takes a share")
    p.add_argument("--memory-budget", help="what a run may take of it, instead of that share")
    p.add_argument("--host", help="host memory that may be pinned, such as 64GB; else unbounded")
    p.add_argument("--compile", action="store_true", help="ask XLA too, on this machine's GPU")
    a = p.parse_args(line)
    if min(a.max_seq_length, a.batch, a.accumulation, a.rank) < 1:
        p.error("--max-seq-length, --batch, --accumulation and --rank start at 1")
    for name in ("gpu", "memory_budget", "host"):
        try:
            fine = size(getattr(a, name) or "1GB") > 0
        except ValueError:
            fine = False
        if not fine:
            option = name.replace("_", "-")
            p.error(f'--{option} takes a size such as "80GB", got {getattr(a, name)!r}')
    if a.compile and jax.default_backend() != "gpu":
        p.error(f"--compile needs a GPU, JAX sees {jax.devices()}")
    return a


def main(line: Sequence[str] | None = None) -> None:
    a = arguments(line)
    job, optimizer = asked_job(a)
    device = size(a.memory_budget) if a.memory_budget else int(size(a.gpu) * fraction())
    room = Budget(device, size(a.host) if a.host else UNBOUNDED)
    said = "memory budget" if a.memory_budget else f"{fraction():.0%} of {a.gpu} ({FRACTIONS[0]})"
    print(f"{a.model}: {a.batch} x {a.max_seq_length} tokens, rank {a.rank}, {a.optimizer}")
    print(f"budget: {plan.gib(room.device)}, {said}; figures in GiB")
    lines, chosen = [], None
    for memory in plan.ladder(job):
        found = [plan.estimate(job, memory)]
        if a.compile:
            loss = objective.loss(job.family, job.config, 1.0, memory, documents=1)
            found.append(plan.compiled(make_step(loss, optimizer), job, memory))
        if chosen is None and found[-1].fits(room):
            chosen = plan.title(memory)
        lines += [(plan.title(memory), p, p.fits(room)) for p in found]
    print(table(lines, chosen))
    if chosen is None:
        sys.exit(plan.refusal(job, room))


if __name__ == "__main__":
    main()
