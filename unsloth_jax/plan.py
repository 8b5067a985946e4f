"""The memory of a training step, known before it runs.

`estimate` is a closed form of shapes and policy, for any machine. `compiled` asks XLA, which lays
every buffer out when it compiles, and needs shapes only. `choose` takes the fastest of a ladder of
`Memory` values that fits. All sizes are bytes.
"""

import bisect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unsloth_jax import remat, tree
from unsloth_jax.dims import Batch, Params
from unsloth_jax.layer_memory import (
    Job,
    copies,
    embedding,
    feed,
    gaps,
    item,
    live,
    residuals,
    size,
    table,
)
from unsloth_jax.leaves import Hosted, Quantized, Vacant
from unsloth_jax.remat import Memory

GIB = 2**30
UNBOUNDED = 2**62
ERROR = 1.15  # an estimate is at most this factor off
TILE = 8192  # tokens that pass through the MLP at once where there are more
BUCKET = 64  # rows are padded to a multiple of this
RANKS = (64, 32, 16, 8, 4, 2, 1)


class Budget(NamedTuple):
    """Bytes that a plan may take."""

    device: int
    host: int


class Plan(NamedTuple):
    """Where a step's memory goes; "compiled" by XLA or "estimated".

    A compiled plan's temporaries are what its total leaves beside the exact other parts.
    """

    parameters: int
    adapters: int
    optimizer: int
    gradients: int
    residuals: int  # what layers keep on the device for the backward pass
    temporaries: int
    batch: int
    host: int  # pinned layer inputs, and the embedding table where it stays behind
    source: Literal["compiled", "estimated"]

    @property
    def total(self) -> int:
        """On the device, at the peak."""
        return sum(self[: len(PARTS)])

    def fits(self, budget: Budget) -> bool:
        return self.total <= budget.device and self.host <= budget.host

    def __str__(self) -> str:
        parts = zip(PARTS, self, strict=False)
        said = ", ".join(f"{name} {gib(x)}" for name, x in parts)
        return f"{gib(self.total)} ({self.source}: {said}), host {gib(self.host)}"


PARTS = Plan._fields[: Plan._fields.index("host")]


def gib(size: int) -> str:
    """ "1.50 GiB"."""
    return f"{size / GIB:.2f} GiB" if size < UNBOUNDED else "any amount"


def title(memory: Memory) -> str:
    """A rung's name: "full+host+tiles2+chunk256+unroll"."""
    parts = {
        "host": memory.host_embedding,
        f"tiles{memory.tiles}": memory.tiles > 1,
        f"chunk{memory.chunk}": memory.chunk != remat.PLAIN.chunk,
        "unroll": memory.unroll,
    }
    return "+".join([memory.keep, *(part for part, on in parts.items() if on)])


def named(title: str) -> Memory:
    """The `Memory` of a title, such as a script is given; the parts may stand in any order.

    Raises ValueError for a part that means nothing.
    """
    keep, *parts = title.split("+")
    found = {"keep": keep}
    for part in parts:
        number = re.fullmatch(r"(tiles|chunk)(\d+)", part)
        if number:
            found[number[1]] = int(number[2])
        elif part in ("host", "unroll"):
            found["host_embedding" if part == "host" else part] = True
        else:
            raise ValueError(f"{part!r} in {title!r} is none of host, tilesN, chunkN, unroll")
    remat.policy(keep)
    return Memory(**found)


def hostable(params: Params) -> bool:
    """Whether the embedding table may stay in host memory: frozen and plain, the head its own."""
    needed = isinstance(table(params)[1], Quantized | Vacant)
    return "lm_head.weight" in tree.flatten(params) and not needed


def _table_apart(job: Job) -> Job:
    """The job with a table in host memory; where it has only a shape, with zeros of no size."""
    path, leaf = table(job.params)
    if isinstance(leaf, Hosted):
        return job
    zeros = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    flat = tree.flatten(job.params) | {path: Hosted(zeros)}
    return job._replace(params=tree.unflatten(flat))


def batches(job: Job, memory: Memory) -> Batch:
    """Shapes of what a step is given."""
    lead = (job.accumulation, job.batch, job.length)
    whole, real = (jax.ShapeDtypeStruct(lead, d) for d in (jnp.int32, jnp.float32))
    first = embedding(job)
    rows = jax.ShapeDtypeStruct((*lead, first.shape[1]), first.dtype)
    embedded = rows if memory.host_embedding else None
    key = jax.ShapeDtypeStruct((job.accumulation, 2), jnp.uint32) if job.keyed else None
    return Batch(whole, whole, real, whole, whole, embedded, key, job.beside, job.shared)


def _fixed(job: Job, memory: Memory) -> dict[str, int]:
    """The parts that are exact."""
    state = job.states(job.rank)
    if memory.host_embedding:
        job = _table_apart(job)
    grads = size(state.trainable)
    inputs = job.config.layers * job.tokens * job.config.width * item(job)
    left_behind = size(embedding(job)) if memory.host_embedding else 0
    return dict(
        parameters=size(job.params),
        adapters=grads,
        optimizer=size(state.opt),
        gradients=grads * (1 if job.accumulation == 1 else 2),
        residuals=residuals(job, memory),
        batch=size(batches(job, memory)),
        host=left_behind + (inputs if memory.keep == "offload" else 0),
    )


def _loss(job: Job, memory: Memory) -> int:
    """Live while the loss finds its scores and the hidden states' cotangents."""
    c, b = job.config, item(job)
    chunk = min(memory.chunk, max(64, job.tokens // 4), job.tokens)
    return chunk * c.vocab * (4 + b) + 3 * job.tokens * c.width * b


def estimate(job: Job, memory: Memory) -> Plan:
    """The plan by a closed form, from compiled GPU steps: the loss or a layer has the peak."""
    fixed = _fixed(job, memory)
    most = max(fixed["gradients"] + live(job, memory), _loss(job, memory))
    extra = max(most - fixed["gradients"], 0) + copies(job, memory) + gaps(job, memory)
    return Plan(**fixed, temporaries=extra, source="estimated")


def compiled(step: Any, job: Job, memory: Memory) -> Plan:
    """The plan of a `make_step` of this job as XLA compiles it for this machine's device."""
    if memory.host_embedding:
        job = _table_apart(job)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), job.params)
    program = step.lower(job.states(job.rank), params, batches(job, memory)).compile()
    return laid_out(program, job, memory)


def laid_out(program: Any, job: Job, memory: Memory) -> Plan:
    """The plan of this job's step as XLA has compiled it."""
    sizes, fixed = program.memory_analysis(), _fixed(job, memory)
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total += sizes.temp_size_in_bytes
    fixed["host"] = sizes.host_temp_size_in_bytes
    if memory.host_embedding:
        fixed["host"] += size(embedding(job))
    known = sum(x for name, x in fixed.items() if name != "host")
    return Plan(**fixed, temporaries=total - known, source="compiled")


def ladder(job: Job) -> tuple[Memory, ...]:
    """Ways to spend memory, from the fastest to the leanest, each leaner than the one before."""
    if job.platform != "gpu":
        return tuple(Memory(keep) for keep in ("none", "mlp", "attention", "full"))
    # Looked up on the host, rows of all micro-batches wait on the device: more than a table?
    host = hostable(job.params) and job.accumulation * job.tokens < job.config.vocab
    tiles = _tiles(job)
    # Only a layer that keeps most of what it makes gains enough by being written out.
    rungs = [Memory("none", unroll=True), Memory("none", unroll=True, host_embedding=host)]
    # Experts keep nothing: a mixture's "mlp" is leaner than its "attention", or no rung at all.
    names = ("mlp",) * bool(feed(job).ups) + ("attention", "full")
    keeps = [Memory(keep, host_embedding=host) for keep in names]
    rungs += sorted(keeps, key=lambda memory: -estimate(job, memory).total)
    rungs.append(Memory("full", tiles, host_embedding=host))
    lean = Memory("offload", tiles, host_embedding=host)
    while _loss(job, lean) > live(job, lean) and lean.chunk > remat.PLAIN.chunk // 4:
        lean = lean._replace(chunk=lean.chunk // 2)
    kept = rungs[:1]
    for memory in [*rungs[1:], lean]:
        if estimate(job, memory).total < estimate(job, kept[-1]).total:
            kept.append(memory)
    return tuple(kept)


def _tiles(job: Job) -> int:
    """Parts of about TILE tokens that divide rows of every bucket; 1 where there are none."""
    every = job.batch * math.gcd(BUCKET, job.length)
    wanted = -(-job.tokens // TILE)
    most = min(every, job.tokens // (TILE // 4))
    return next((n for n in range(wanted, most + 1) if every % n == 0), 1)


def choose(
    job: Job,
    budget: Budget,
    rungs: Sequence[Memory] | None = None,
    confirm: Callable[[Memory], Plan] | None = None,
) -> tuple[Memory, Plan]:
    """The first rung (of `ladder(job)` by default) that fits, with its plan.

    A rung is judged by its estimate, then by `confirm`, such as `compiled`. Raises ValueError
    where none fits, with what would.
    """
    rungs, tried = ladder(job) if rungs is None else rungs, []
    for memory in rungs:
        plan = estimate(job, memory)
        # The last rung is refused on XLA's word only, unless it is far off.
        doubted = memory == rungs[-1] and plan.total <= ERROR * budget.device
        if confirm is not None and (plan.fits(budget) or doubted):
            plan = confirm(memory)
        if plan.fits(budget):
            return memory, plan
        tried.append((memory, plan))
    raise ValueError(refusal(job, budget, tried))


def refusal(job: Job, budget: Budget, tried: Sequence[tuple[Memory, Plan]] = ()) -> str:
    """That a job fits under none of the plans tried (those of its ladder), and what would."""
    tried = tried or [(memory, estimate(job, memory)) for memory in ladder(job)]
    memory, plan = min(tried, key=lambda one: one[1].total)
    would = [
        f"{what} ({gib(p.total)} on the device, {gib(p.host)} on the host)"
        for what, p in _fitting(job, budget, [memory for memory, _ in tried])
    ]
    trained = f"rank {job.rank}" if job.rank else "all weights trained"
    return (
        f"{job.batch} x {job.length} tokens with {trained} don't fit into "
        f"{gib(budget.device)} on the device and {gib(budget.host)} on the host; the leanest plan "
        f"tried, {title(memory)}, takes {plan}. What would fit: {'; '.join(would) or 'nothing'}"
    )


def _fitting(job: Job, budget: Budget, tried: Sequence[Memory]) -> Iterator[tuple[str, Plan]]:
    """(what to change, its plan): leaner memory, the longest rows, largest batch and rank."""
    leanest = lambda job: estimate(job, ladder(job)[-1])
    fits = lambda job: leanest(job).fits(budget)
    if ladder(job)[-1] not in tried and fits(job):
        yield 'use_gradient_checkpointing="unsloth"', leanest(job)
    shorter = range((job.length - 1) // BUCKET * BUCKET, 0, -BUCKET)
    changes = {
        "length": ("rows of {:,} tokens", shorter),
        "batch": ("a batch of {}", range(job.batch - 1, 0, -1)),
        "rank": ("rank {}", [r for r in RANKS if r < job.rank]),
    }
    for field, (what, values) in changes.items():
        changed = lambda value, field=field: job._replace(**{field: value})
        found = _first(values, lambda value, changed=changed: fits(changed(value)))
        if found is not None:
            yield what.format(found), leanest(changed(found))


def _first(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The first value that fits, where all that follow one that fits do too."""
    at = bisect.bisect_left(values, True, key=fits)
    return values[at] if at < len(values) else None
