"""What the training step holds in memory, read from the program that XLA compiled."""

import math
import re
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from unsloth_jax import decoder, lora, losses, optim, quant, train, tree
from unsloth_jax.dims import Batch, Total
from unsloth_jax.models import family as family_of
from unsloth_jax.remat import KEPT, Memory
from workflows import objective

SCALE = 2.0
RATE = optim.schedule("cosine", 1e-3, 2, 10)
OPTIMIZER = optim.make("adamw_torch", RATE, weight_decay=0.01, max_grad_norm=1.0)
# Shapes for what is only compiled: no number of rows, widths or layers equals another product.
BIG = dict(vocab_size=5000, hidden_size=320, intermediate_size=1216, num_attention_heads=8)
MICRO, LINES, LENGTH = 2, 3, 448
FLOATS = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8}
SIZES = FLOATS | {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8}


@cache
def big():
    """(family, config, 4-bit parameters as shapes, adapters as shapes) of a wider llama."""
    hf = tiny.reference("llama").config.to_dict() | BIG | dict(head_dim=64)
    family = family_of(hf["model_type"])
    c = family.config(hf)
    shapes = tree.unflatten({
        path: jax.ShapeDtypeStruct((c.layers, *shape) if "*" in path else shape, jnp.bfloat16)
        for path, (shape, _) in family.weights(c).items()
    })  # fmt: skip
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, 8, lora.TARGETS))
    zeros = lambda p: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), p)
    four_bit = lambda: quant.quantize(zeros(shapes), "nf4", lambda p: p.endswith("_proj.weight"))
    return family, c, jax.eval_shape(four_bit), adapters


# Two of the policies in the shorter run.
EVERY = [k if k in ("full", "none") else pytest.param(k, marks=pytest.mark.slow) for k in KEPT]


def compiled(loss) -> str:
    """HLO of a step over `big`, as XLA will run it; any warning is an error."""
    _, _, params, adapters = big()
    state = jax.eval_shape(lambda: train.start(zeros_like(adapters), OPTIMIZER))
    whole = lambda dtype: jax.ShapeDtypeStruct((MICRO, LINES, LENGTH), dtype)
    batches = Batch(*(whole(d) for d in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered = train.make_step(loss, OPTIMIZER).lower(state, params, batches)
        # The program is read and never run, so its machine code need not be good.
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()


def zeros_like(tree_of_shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree_of_shapes)


def arrays(hlo: str) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in the text of a compiled program."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", hlo)
    return {(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in found if dtype in SIZES}


def large_constants(hlo: str) -> set[str]:
    lines = [line.split(" constant(")[0] for line in hlo.splitlines() if " constant(" in line]
    size = lambda dtype, shape: SIZES[dtype] * math.prod(shape)
    return {line for line in lines if any(size(*a) > 2**20 for a in arrays(line))}


def full_scores(hlo: str) -> set:
    """Arrays with a score of every word for each token of a micro-batch, or of more."""
    whole = LINES * LENGTH * BIG["vocab_size"]
    return {
        (dtype, shape)
        for dtype, shape in arrays(hlo)
        if dtype in FLOATS and math.prod(shape) >= whole and BIG["vocab_size"] in shape
    }


def whole_stacks(hlo: str) -> set:
    """Arrays of 16 bits or more with as many numbers as a quantized stack of weights."""
    flat = tree.flatten(big()[2])
    sizes = {math.prod(w.shape) for path, w in flat.items() if path.endswith("_proj.weight")}
    return {(d, s) for d, s in arrays(hlo) if SIZES[d] > 1 and math.prod(s) in sizes}


@pytest.mark.parametrize("keep", EVERY)
def test_the_compiled_step_holds_no_large_constant_no_full_scores_and_no_copy_of_the_base(keep):
    family, c, _, adapters = big()
    hlo = compiled(objective.loss(family, c, SCALE, Memory(keep)))
    assert large_constants(hlo) == full_scores(hlo) == whole_stacks(hlo) == set()
    donated = re.search(r"input_output_alias=\{(.*)\}, ", hlo.splitlines()[0]).group(1)
    assert donated.count("-alias") >= 3 * len(jax.tree.leaves(adapters))


def test_the_compiled_evaluation_holds_no_full_scores_and_no_copy_of_the_base():
    family, c, params, adapters = big()
    whole = lambda dtype: jax.ShapeDtypeStruct((LINES, LENGTH), dtype)
    batch = Batch(*(whole(d) for d in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
    loss = jax.jit(objective.SFT.alone(family, c, SCALE, documents=1))
    program = loss.lower(adapters, params, batch)
    hlo = program.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    assert large_constants(hlo) == full_scores(hlo) == whole_stacks(hlo) == set()


def test_a_step_that_breaks_these_rules_is_noticed():
    family, c, _, _ = big()
    mask = np.random.default_rng(0).random((LINES, LENGTH, 320), np.float32)

    def wasteful(adapters, frozen, b) -> Total:
        dense = tree.map_paths(
            lambda path, w: w.dequantize() if path.endswith("_proj.weight") else w, frozen
        )
        params = lora.attach(dense, adapters, SCALE)
        hidden = decoder.forward(family, c, params, b.tokens, b.positions, b.segments) * mask
        every = jax.nn.log_softmax(decoder.logits(family, c, params, hidden))
        logps = jnp.take_along_axis(every, b.targets[..., None], axis=-1)[..., 0]
        return losses.sft(logps, b.weights)

    hlo = compiled(wasteful)
    assert large_constants(hlo) and full_scores(hlo) and whole_stacks(hlo)
