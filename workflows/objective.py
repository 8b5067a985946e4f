"""What a run lowers: a loss of adapters and a batch, and what a batch needs before it."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from unsloth_jax import decoder, leaves, lora, losses, plan, remat, train, tree
from unsloth_jax.dims import Batch, Measured, Params, Shared, Total
from unsloth_jax.experts import Spread
from unsloth_jax.leaves import Hosted

LOSSES = {"nll": losses.sft, "dft": losses.dft}
ADAPTERS, EMBEDDINGS = 0, 1  # what draws from a batch's key, each from a key of its own


class Objective(NamedTuple):
    """How a run's loss is built, and the batches of its steps made ready.

    `name` stands in checkpoints. `loss` takes what `objective.loss` takes. `ready(step, batch)`
    fills in what the loss reads beside the rows, on the host, a step ahead of the device;
    `compared(batch)` does so for an evaluation. `statistics` makes, of the arguments of `loss`,
    what a whole step tells each micro-batch (see `train.make_step`). `beside(accumulation, rows)`
    are the shapes of what `ready` fills in, `shared` those of `Batch.shared`. `counts` names what
    the loss is divided by. `rests` says that a step may have no gradient at all, as where rewards
    are equal.
    """

    name: str
    loss: Callable[..., train.LossFn]
    ready: Callable[[int, Batch], Batch] = lambda step, batch: batch
    dropout: float = 0.0  # of the adapters' inputs, drawn from the batch's key
    draws: bool = False  # whether batches get a key
    perplexity: bool = True  # whether the loss is a plain cross entropy, in evaluation too

    compared: Callable[[Batch], Batch] = lambda batch: batch
    statistics: Callable[..., train.StatisticsFn] | None = None
    beside: Callable[[int, int], dict[str, Any] | None] = lambda accumulation, rows: None
    counts: str = "supervised_tokens"
    rests: bool = False
    shared: Callable[[int, int], Shared | None] = lambda accumulation, rows: None

    def step(self, optimizer: optax.GradientTransformation, *how: Any) -> Callable:
        """A run's step; `how` are the arguments of `loss`."""
        found = None if self.statistics is None else self.statistics(*how)
        return train.make_step(self.loss(*how), optimizer, found)

    def alone(self, *how: Any, **more: Any) -> train.LossFn:
        """The loss of one micro-batch by itself; the arguments are those of `loss`."""
        found = None if self.statistics is None else self.statistics(*how, **more)
        return train.whole(self.loss(*how, **more), found)


class Options(NamedTuple):
    """What may differ in the loss of supervised fine-tuning."""

    kind: str = "nll"
    smoothing: float = 0.0  # share of the mean over the vocabulary
    neftune: float = 0.0  # alpha of the noise on embeddings, 0 for none
    dropout: float = 0.0  # of adapters' inputs
    balance: float = 0.0  # weight of the loss of uneven experts

    @property
    def draws(self) -> bool:
        return bool(self.neftune or self.dropout)


NONE = Options()


def loss(
    model: ModuleType,
    c: Any,
    scale: float,
    memory: remat.Memory = remat.PLAIN,
    documents: int | None = None,
    options: Options = NONE,
) -> train.LossFn:
    """The loss of the supervised tokens under base plus adapters.

    `memory` and `documents` are those of `decoder.forward`. A batch without a key draws nothing.
    """
    total = LOSSES[options.kind]

    def fn(adapters: Params, frozen: Params, b: Batch) -> Total | Measured:
        params = attached(frozen, adapters, scale, b, options.dropout)
        rows = b.tokens, b.positions, b.segments, memory, documents
        embedded = _noised(params, b, options.neftune)
        if options.balance:
            hidden, found = decoder.spread(model, c, params, *rows, embedded)
        else:
            hidden = decoder.forward(model, c, params, *rows, embedded)
        head = model.head(c, params)
        chunked = (memory.chunk, b.weights, options.smoothing, model.scores(c))
        nll = total(losses.token_logprobs(hidden, head, b.targets, *chunked), b.weights)
        return _balanced(nll, found, b, options.balance) if options.balance else nll

    return fn


def _balanced(nll: Total, found: Spread, b: Batch, weight: float) -> Measured:
    """The loss with that of uneven experts, which a step divides by other counts than tokens."""
    uneven = losses.balance(found.chances, b.beside["sent"], found.rows)
    value = nll.value + weight * uneven.value * b.beside["counted"]
    return Measured(nll._replace(value=value), {"aux_loss": uneven})


def spread_of_step(
    model: ModuleType,
    c: Any,
    scale: float,
    memory: remat.Memory = remat.PLAIN,
    documents: int | None = None,
) -> train.StatisticsFn:
    """What `_balanced` must know of a whole step: choices a row by expert, tokens that count.

    Its arguments are those of `loss`. It costs a forward pass.
    """

    def fn(adapters: Params, frozen: Params, b: Batch) -> dict[str, Total]:
        params = lora.attach(frozen, adapters, scale)
        rows = b.tokens, b.positions, b.segments, memory, documents, b.embedded
        found = decoder.spread(model, c, params, *rows)[1]
        return {
            "sent": Total(found.sent, found.rows),
            "counted": Total(b.weights.sum(), found.rows),
        }

    return fn


def attached(
    frozen: Params, adapters: Params, scale: float, b: Batch, dropout: float = 0.0
) -> Params:
    """Base plus adapters, whose inputs are dropped by draws of the batch's key, if it has one."""
    if b.key is None or not dropout:
        return lora.attach(frozen, adapters, scale)
    return lora.attach(frozen, adapters, scale, dropout, _key(b, ADAPTERS))


def _key(b: Batch, use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.wrap_key_data(b.key, impl="threefry2x32"), use)


def _noised(params: Params, b: Batch, alpha: float) -> Any:
    """Embeddings with NEFTune's noise; as the batch has them where nothing is drawn."""
    if b.key is None or not alpha:
        return b.embedded
    rows = b.embedded
    if rows is None:
        rows = leaves.embed({"weight": plan.table(params)[1]}, b.tokens)
    lengths = decoder.document_lengths(b.segments)
    return losses.neftune(_key(b, EMBEDDINGS), rows, alpha, lengths)


SFT = Objective("sft/1", loss)


def sft(options: Options, seed: int) -> Objective:
    """Supervised fine-tuning with these options; the steps' draws follow from `seed`.

    Raises ValueError for an unknown kind of loss, and for dft with smoothing.
    """
    if options.kind not in LOSSES:
        raise ValueError(f"loss_type={options.kind!r} is not supported; supported: {[*LOSSES]}")
    if options.kind == "dft" and options.smoothing:
        raise ValueError(
            f"loss_type='dft' weighs tokens by their own probability, which label_smoothing_factor"
            f"={options.smoothing} has not: choose one"
        )
    named = {k: v for k, v in options._asdict().items() if v and v != "nll"}
    name = ", ".join([SFT.name, *(f"{k} {v}" for k, v in named.items())])

    def built(*args: Any, **more: Any) -> train.LossFn:
        return loss(*args, **more, options=options)

    plain = options.kind == "nll" and not options.smoothing and not options.balance
    statistics = spread_of_step if options.balance else None
    if not options.draws:
        return Objective(name, built, perplexity=plain, statistics=statistics)
    ready = lambda step, batch: batch._replace(key=keys(seed, step, len(batch.tokens)))
    return Objective(name, built, ready, options.dropout, True, plain, statistics=statistics)


def keys(seed: int, step: int, count: int) -> np.ndarray:
    """Key data uint32 [count, 2] of a step's micro-batches; the same in a run that goes on."""
    return np.random.SeedSequence((seed, step)).generate_state(2 * count).reshape(count, 2)


def hosted(params: Params) -> Params:
    """The tree with its embedding table in host memory, where a head of its own stays behind.

    A tied, quantized or trained table is needed on the device: then the tree as it is.
    """
    path, leaf = plan.table(params)
    if isinstance(leaf, Hosted) or not plan.hostable(params):
        return params
    return tree.unflatten(tree.flatten(params) | {path: Hosted(np.asarray(leaf))})


def embedded(params: Params, batch: Batch) -> Batch:
    """The batch with its tokens' embeddings, where their table is in host memory."""
    if batch.embedded is not None:
        return batch
    _, leaf = plan.table(params)
    return batch._replace(embedded=leaf.rows(batch.tokens)) if isinstance(leaf, Hosted) else batch
