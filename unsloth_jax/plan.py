"""The memory of a training step, known before it runs.

`estimate` is a closed form of shapes and policy, for any machine. `compiled` asks XLA, which lays
every buffer out when it compiles, and needs shapes only. `choose` takes the fastest of a ladder of
`Memory` values that fits. All sizes are bytes.
"""

import bisect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention, recurrence
from unsloth_jax import remat, tree
from unsloth_jax.dims import Batch, Params
from unsloth_jax.leaves import Hosted, Quantized, Vacant
from unsloth_jax.remat import KEPT, Memory
from unsloth_jax.train import State

GIB = 2**30
UNBOUNDED = 2**62
ERROR = 1.15  # an estimate is at most this factor off
TILE = 8192  # tokens that pass through the MLP at once where there are more
BUCKET = 64  # rows are padded to a multiple of this
RANKS = (64, 32, 16, 8, 4, 2, 1)


class Job(NamedTuple):
    """What is trained. Nothing here needs values: shapes do."""

    family: ModuleType
    config: Any
    params: Params
    states: Callable[[int], State]  # shapes of adapters and optimizer by rank
    rank: int
    batch: int
    length: int
    accumulation: int = 1
    platform: str = "gpu"
    keyed: bool = False  # whether batches bring a random key
    beside: dict[str, Any] | None = None  # shapes of a batch's `beside`

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.batch * self.length


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


def size(node: Any) -> int:
    """Bytes of all arrays of a tree, or of the shapes in their place."""
    leaves = jax.tree.leaves(node)
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)


def table(params: Params) -> tuple[str, Any]:
    """(path, the embedding table [V, D]: an array, a shape, a quantized or a `Hosted` one)."""
    flat = tree.flatten(params)
    return next((p, leaf) for p, leaf in flat.items() if p.endswith("embed_tokens.weight"))


def _rows(job: Job) -> Any:
    """The embedding table, wherever it is: its rows are the first activations."""
    leaf = table(job.params)[1]
    return leaf.table if isinstance(leaf, Hosted) else leaf


def activations(job: Job) -> jnp.dtype:
    """The dtype of what passes through the layers: the embedding table's."""
    return jnp.dtype(_rows(job).dtype)


def _item(job: Job) -> int:
    return activations(job).itemsize


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
    first = _rows(job)
    rows = jax.ShapeDtypeStruct((*lead, first.shape[1]), first.dtype)
    embedded = rows if memory.host_embedding else None
    key = jax.ShapeDtypeStruct((job.accumulation, 2), jnp.uint32) if job.keyed else None
    return Batch(whole, whole, real, whole, whole, embedded, key, job.beside)


def _fixed(job: Job, memory: Memory) -> dict[str, int]:
    """The parts that are exact."""
    state = job.states(job.rank)
    if memory.host_embedding:
        job = _table_apart(job)
    grads = size(state.trainable)
    inputs = job.config.layers * job.tokens * job.config.width * _item(job)
    left_behind = size(_rows(job)) if memory.host_embedding else 0
    return dict(
        parameters=size(job.params),
        adapters=grads,
        optimizer=size(state.opt),
        gradients=grads * (1 if job.accumulation == 1 else 2),
        residuals=_residuals(job, memory),
        batch=size(batches(job, memory)),
        host=left_behind + (inputs if memory.keep == "offload" else 0),
    )


def _kept(memory: Memory) -> tuple[str, ...]:
    """Names that layers keep; tiles compute their own again, whatever the policy says."""
    names = KEPT[memory.keep]
    return names if memory.tiles == 1 else tuple(n for n in names if n not in ("gate", "up"))


def _flash(job: Job) -> bool:
    """Whether attention runs without its scores in memory."""
    width = max(job.config.head_width, job.config.v_width)
    fits = width % 8 == 0 and width <= 128 and job.config.attention_cap is None
    return job.platform == "gpu" and _item(job) == 2 and fits


def _residuals(job: Job, memory: Memory) -> int:
    c, names = job.config, _kept(memory)
    q, k = c.heads * c.head_width, c.kv_heads * c.head_width
    v = c.kv_heads * c.v_width
    widths = dict(q=q, k=k, v=v, mid=c.width, gate=c.mlp_width, up=c.mlp_width)
    widths[attention.KEPT] = c.heads * c.v_width
    row = sum(widths.pop(n) for n in ("mid", "gate", "up") if n in names)
    row = _item(job) * (row + c.width * (memory.keep != "offload"))
    mixed = _item(job) * sum(widths[n] for n in names if n in widths)
    # The softmax' float32 statistics.
    mixed += 4 * c.heads * (attention.KEPT in names and _flash(job))
    return job.tokens * (c.layers * row + mixed * sum(not x or x.attends for x in _held(job)))


def _held(job: Job) -> list[Any]:
    """What a cache holds of each layer, None where that is keys and values alone."""
    own = getattr(job.family, "holds", None)
    return [own and own(job.config, kind) for kind in job.family.kinds(job.config)]


def _mlp(job: Job, memory: Memory) -> int:
    """Live in the backward pass of a layer's MLP, beside residuals and gradients."""
    c, b, part = job.config, _item(job), job.tokens // memory.tiles
    kept = "gate" in _kept(memory)
    # Their product, three cotangents and, computed again, gate and up less what they replace.
    wide = part * c.mlp_width * b * (4 if kept else 5)
    rows = job.tokens * c.width * b * ((2 if kept else 3) + (2 if memory.tiles > 1 else 0))
    return wide + rows + 2 * c.mlp_width * c.width * b


def _attention(job: Job) -> int:
    """Live in the backward pass of a layer's attention, beside residuals and gradients."""
    c, b = job.config, _item(job)
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    # Inputs, result and their cotangents; cuDNN adds dq's parts in float32.
    rows = job.tokens * (b * (4 * q + 4 * kv + 3 * c.width) + 4 * q)
    if any(path.endswith("q_norm.weight") for path in tree.flatten(job.params)):
        rows += job.tokens * 14 * (q + kv)  # float32 inputs, results and cotangents of the norms
    scores = 0 if _flash(job) else 3 * 4 * job.batch * c.heads * job.length**2
    return rows + scores + c.width * (q + 2 * kv) * b


def _recurrence(job: Job) -> int:
    """Live in a recurrence's backward pass: its rows and each chunk's state, with cotangents."""
    chunks, b = job.batch * -(-job.length // recurrence.CHUNK), _item(job)
    row = lambda C, H, V: (16 + 8 * b) * C + 16 * H * V
    held = ((one.tail[1], *one.state) for one in _held(job) if one and one.state)
    every = (job.tokens * row(C, H, V) + 8 * chunks * H * K * V for C, H, K, V in held)
    return max(every, default=0)


def _layer(job: Job, memory: Memory) -> int:
    # Inputs on their way, both directions; none are when attention's rows come to life.
    in_flight = 4 if memory.keep == "offload" else 0
    moving = in_flight * job.tokens * job.config.width * _item(job)
    return max(_mlp(job, memory) + moving, _attention(job), _recurrence(job))


def _loss(job: Job, memory: Memory) -> int:
    """Live while the loss finds its scores and the hidden states' cotangents."""
    c, b = job.config, _item(job)
    chunk = min(memory.chunk, max(64, job.tokens // 4), job.tokens)
    return chunk * c.vocab * (4 + b) + 3 * job.tokens * c.width * b


def estimate(job: Job, memory: Memory) -> Plan:
    """The plan by a closed form, from compiled GPU steps: the loss or a layer has the peak."""
    fixed = _fixed(job, memory)
    live = max(fixed["gradients"] + _layer(job, memory), _loss(job, memory))
    return Plan(**fixed, temporaries=max(live - fixed["gradients"], 0), source="estimated")


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
        fixed["host"] += size(_rows(job))
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
    rungs += [Memory(keep, host_embedding=host) for keep in ("mlp", "attention", "full")]
    rungs.append(Memory("full", tiles, host_embedding=host))
    lean = Memory("offload", tiles, host_embedding=host)
    while _loss(job, lean) > _layer(job, lean) and lean.chunk > remat.PLAIN.chunk // 4:
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
