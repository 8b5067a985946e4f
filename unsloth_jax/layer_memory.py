"""What a layer keeps for its backward pass, and what is alive in it: bytes from shapes.

Widths are those of the weights themselves, so that mixtures and layers of several kinds need no
fields of their own. The factors are those of programs that XLA compiled for an H100.
"""

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import attention, recurrence
from unsloth_jax import tree
from unsloth_jax.dims import Params, Shared
from unsloth_jax.leaves import Hosted, stacks
from unsloth_jax.remat import KEPT, Memory
from unsloth_jax.train import State

# Modules of an MLP that isn't one of experts, and an expert's own last one.
GATES, UPS, BOTH = ("gate_proj",), ("up_proj", "c_fc"), ("gate_up_proj",)
LAST = "down_proj", "w2"
INDEXED = 2**31  # numbers in one operand of `pallas_kernels.grouped_matmul`


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
    shared: Shared | None = None  # shapes of a batch's

    @property
    def tokens(self) -> int:
        """Of one micro-batch."""
        return self.batch * self.length

    @property
    def mixed(self) -> tuple[int, int]:
        """(rows, tokens of each) that attention sees of a micro-batch."""
        if self.shared is None:
            return self.batch, self.length
        *_, count, width = self.shared.places.shape
        return self.batch * count, min(width, self.length)


def size(node: Any) -> int:
    """Bytes of all arrays of a tree, or of the shapes in their place."""
    leaves = jax.tree.leaves(node)
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)


def table(params: Params) -> tuple[str, Any]:
    """(path, the embedding table [V, D]: an array, a shape, a quantized or a `Hosted` one)."""
    flat = tree.flatten(params)
    return next((p, leaf) for p, leaf in flat.items() if p.endswith("embed_tokens.weight"))


def embedding(job: Job) -> Any:
    """The embedding table, wherever it is: its rows are the first activations."""
    leaf = table(job.params)[1]
    return leaf.table if isinstance(leaf, Hosted) else leaf


def activations(job: Job) -> jnp.dtype:
    """The dtype of what passes through the layers: the embedding table's."""
    return jnp.dtype(embedding(job).dtype)


def item(job: Job) -> int:
    return activations(job).itemsize


def _kept(memory: Memory) -> tuple[str, ...]:
    """Names that layers keep; tiles compute their own again, whatever the policy says."""
    names = KEPT[memory.keep]
    return names if memory.tiles == 1 else tuple(n for n in names if n not in ("gate", "up"))


def _flash(job: Job) -> bool:
    """Whether attention runs without its scores in memory."""
    width = max(job.config.head_width, job.config.v_width)
    fits = width % 8 == 0 and width <= 128 and job.config.attention_cap is None
    return job.platform == "gpu" and item(job) == 2 and fits


class Feed(NamedTuple):
    """Sizes of what stands in the MLPs' place."""

    gates: int  # outputs of gates that a policy may keep, of all layers
    ups: int
    widest: int  # the most outputs that one up projection has, experts aside
    experts: int  # numbers in the matrices of one layer's experts
    largest: int  # those in the largest of these
    inner: int  # outputs of an expert's first products


def feed(job: Job) -> Feed:
    """The sizes, from the weights: experts keep nothing, whatever the policy says."""
    gates = ups = widest = 0
    first, last = {}, {}
    for path, leaf in tree.flatten(job.params).items():
        module = path.removesuffix(".weight").rpartition(".")[2]
        if not path.startswith(f"{job.family.LAYERS}.*.") or path.endswith(".bias"):
            continue
        for layers, shape in _parts(leaf, job.config.layers):
            if ".experts." in path:
                if len(shape) == 3:
                    (last if module in LAST else first)[path] = shape
            elif module in (*GATES, *UPS, *BOTH):
                width = shape[-2] // (1 + (module in BOTH))
                gates += layers * width * (module not in UPS)
                ups += layers * width * (module not in GATES)
                widest = max(widest, width)
    every = [math.prod(shape) for shape in (first | last).values()]
    inner = sum(shape[-2] for shape in first.values())
    return Feed(gates, ups, widest, sum(every), max(every, default=0), inner)


def _parts(leaf: Any, layers: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(how many layers, the shape of one) of each part of a stack."""
    whole = stacks(leaf, layers)
    for part, ids in zip(whole.parts, whole.layers, strict=True):
        yield len(ids), part.shape[1:]


def residuals(job: Job, memory: Memory) -> int:
    """What layers keep on the device for the backward pass."""
    c, names, f = job.config, _kept(memory), feed(job)
    q, k = c.heads * c.head_width, c.kv_heads * c.head_width
    widths = {"q": q, "k": k, "v": c.kv_heads * c.v_width}
    row = c.layers * c.width * (("mid" in names) + (memory.keep != "offload"))
    row = item(job) * (row + f.gates * ("gate" in names) + f.ups * ("up" in names))
    mixed = job.tokens * item(job) * sum(widths[n] for n in names if n in widths)
    if attention.KEPT in names:
        # With the softmax' float32 statistics.
        each = item(job) * c.heads * c.v_width + 4 * c.heads * _flash(job)
        mixed += math.prod(job.mixed) * each
    return job.tokens * row + mixed * sum(not x or x.attends for x in _held(job))


def _held(job: Job) -> list[Any]:
    """What a cache holds of each layer, None where that is keys and values alone."""
    own = getattr(job.family, "holds", None)
    return [own and own(job.config, kind) for kind in job.family.kinds(job.config)]


def _mlp(job: Job, memory: Memory) -> int:
    """Live in the backward pass of a layer's MLP, beside residuals and gradients."""
    c, b, part, f = job.config, item(job), job.tokens // memory.tiles, feed(job)
    kept = "gate" in _kept(memory)
    # Their product, three cotangents and, computed again, gate and up less what they replace.
    wide = part * f.widest * b * (4 if kept else 5)
    rows = job.tokens * c.width * b * ((2 if kept else 3) + (2 if memory.tiles > 1 else 0))
    return wide + rows + 2 * f.widest * c.width * b + _mixture(job, memory)


def _mixture(job: Job, memory: Memory) -> int:
    """Live in the backward pass of a layer's experts, beside what else the layer holds."""
    c, b, f = job.config, item(job), feed(job)
    if not f.experts:
        return 0
    count = job.tokens // memory.tiles * c.chosen
    # Inputs, results and their cotangents; first products, what the last takes and theirs.
    rows = count * b * (4 * c.width + 3 * f.inner)
    # All matrices in 16 bits, and the bytes of one of them cut out of their stack.
    needed = rows + f.experts * b + f.largest // 2
    if job.platform == "gpu" and f.largest >= INDEXED:
        # XLA's own products: matrices twice and turned, each row once an expert.
        needed += (f.experts + 2 * f.largest + count * c.experts * c.width) * b
    return needed


def copies(job: Job, memory: Memory) -> int:
    """Adapters that the program holds twice from its beginning to its end.

    A pair for gate and up together is cut in two, and both find a gradient of `a`; of layers of
    several kinds each kind's are cut out of their stack. Layers written out need neither.
    """
    if memory.unroll:
        return 0
    own, held = tree.flatten(job.states(job.rank).trainable), tree.flatten(job.params)
    joined = lambda path: ".experts.gate_up_proj." in path and path.rpartition(".")[0] not in held
    cut = sum(size(leaf) for path, leaf in own.items() if joined(path))
    return cut + size(own) * _several(job)


def gaps(job: Job, memory: Memory) -> int:
    """What stays empty between stacks where scans lie within scans: about all layers' inputs."""
    inputs = job.config.layers * job.tokens * job.config.width * item(job)
    return inputs * (_several(job) and memory.keep != "offload" and not memory.unroll)


def _several(job: Job) -> bool:
    """Whether layers are of more than one kind."""
    return len(set(job.family.kinds(job.config))) > 1


def _attention(job: Job) -> int:
    """Live in the backward pass of a layer's attention, beside residuals and gradients."""
    c, b = job.config, item(job)
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    count, length = job.mixed
    # Inputs, result and their cotangents; cuDNN adds dq's parts in float32.
    rows = count * length * (b * (4 * q + 4 * kv) + 4 * q) + job.tokens * b * 3 * c.width
    if job.shared is not None:
        rows += job.tokens * b * 2 * (q + kv)  # before they are apart, and cotangents joined again
    if any(path.endswith("q_norm.weight") for path in tree.flatten(job.params)):
        rows += job.tokens * 14 * (q + kv)  # float32 inputs, results and cotangents of the norms
    scores = 0 if _flash(job) else 3 * 4 * count * c.heads * length**2
    return rows + scores + c.width * (q + 2 * kv) * b


def _recurrence(job: Job) -> int:
    """Live in a recurrence's backward pass: its rows and each chunk's state, with cotangents."""
    (count, length), b = job.mixed, item(job)
    chunks = count * -(-length // recurrence.CHUNK)
    row = lambda C, H, V: (16 + 8 * b) * C + 16 * H * V
    held = ((one.tail[1], *one.state) for one in _held(job) if one and one.state)
    every = (count * length * row(C, H, V) + 8 * chunks * H * K * V for C, H, K, V in held)
    return max(every, default=0)


def live(job: Job, memory: Memory) -> int:
    """Live in the backward pass of a layer, beside residuals and gradients."""
    # Inputs on their way, both directions; none are when attention's rows come to life.
    in_flight = 4 if memory.keep == "offload" else 0
    moving = in_flight * job.tokens * job.config.width * item(job)
    return max(_mlp(job, memory) + moving, _attention(job), _recurrence(job))
