"""Completions behind one prompt in a row, against each behind a prompt of its own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import tiny
import transformers
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels import _choice, attention
from unsloth_jax import decoder, lora, losses, shared_prompts
from unsloth_jax.models import family_of
from workflows import grpo_objective
from workflows.grpo_rows import Layout

# Prompts by their tokens; four completions of each, one without a token.
PROMPTS = (5, 19, 12)
COMPLETIONS = ((7, 20, 1, 13), (9, 0, 30, 4), (2, 11, 8, 8))
GROUP, SCALE = 4, 0.7
NAMES = (
    "qwen2_yarn_window", "gemma2", "qwen3_5_text", "falcon_h1", "qwen3_moe", "gpt_oss",
    "llama4_text", "phi3",
)  # fmt: skip


def drawn():
    """(prompts, completions) as token ids."""
    prompts = [tiny.draw(n, size) for n, size in enumerate(PROMPTS)]
    sizes = [size for group in COMPLETIONS for size in group]
    return prompts, [tiny.draw(100 + n, size) if size else [] for n, size in enumerate(sizes)]


def layout(batch: int, **how) -> Layout:
    return Layout(len(PROMPTS), GROUP, batch, (max(PROMPTS), 30), limit=64, **how)


def laid(how: Layout):
    prompts, completions = drawn()
    learnt = [[n % 5 != 3 for n in range(len(one))] for one in completions]
    worth = [[np.sin(n + 3 * m) for n in range(len(one))] for m, one in enumerate(completions)]
    return how.laid(prompts, completions, learnt, {"drawn": worth}, {"real": np.ones(12)})


def adapted(name: str):
    pair = tiny.pair(name)
    targets = lora.TARGETS if "experts" not in str(jax.tree.structure(pair.params)) else ATTENTION
    adapters = lora.init(jax.random.key(1), pair.params, 4, targets)
    leaves, kind = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return pair, kind.unflatten(drawn)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@partial(jax.jit, static_argnums=(0, 1))
def together(family, c, params, adapters, batch):
    """(sum, log p) and gradients of rows with shared prompts, over micro-batches."""
    told = grpo_objective.scored(family, c, SCALE, 1.0)

    def one(adapters, b):
        logps = told(adapters, params, b)[0]
        weights = grpo_objective.behind(b.weights, b)
        return (logps * b.beside["drawn"] * weights).sum(), logps * weights

    grads, logps = jax.lax.map(
        lambda b: jax.grad(one, has_aux=True)(adapters, b), batch._replace(key=None)
    )
    return jax.tree.map(lambda g: g.sum(0), grads), logps


@partial(jax.jit, static_argnums=(0, 1))
def alone(family, c, params, adapters, rows, weights, worth):
    """The same of rows of their own."""
    tokens, positions, segments = rows

    def one(adapters):
        hidden = decoder.forward(
            family, c, lora.attach(params, adapters, SCALE), tokens, positions, segments
        )
        head = family.head(c, lora.attach(params, adapters, SCALE))
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        logps = losses.token_logprobs(hidden, head, targets, scores=family.scores(c)) * weights
        return (logps * worth).sum(), logps

    return jax.grad(one, has_aux=True)(adapters)


def of_its_own(pair, adapters):
    prompts, completions = drawn()
    whole = [prompts[n // GROUP] + one for n, one in enumerate(completions)]
    rows = tiny.padded(whole, 64)
    weights, worth = np.zeros((2, *rows[0].shape), np.float32)
    for n, one in enumerate(completions):
        start = len(prompts[n // GROUP]) - 1
        for i in range(len(one)):
            weights[n, start + i], worth[n, start + i] = i % 5 != 3, np.sin(i + 3 * n)
    grads, logps = alone(pair.family, pair.config, pair.params, adapters, rows, weights, worth)
    return grads, np.asarray(logps)[weights > 0]


# One of them in the shorter run: windows, an odd number of key heads, yarn.
CHOSEN = [n if n == "qwen2_yarn_window" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


@pytest.mark.parametrize("name", CHOSEN)
def test_completions_behind_one_prompt_are_as_behind_their_own(name, figure):
    pair, adapters = adapted(name)
    want, each = of_its_own(pair, adapters)
    apart = not shared_prompts.alike(pair.family, pair.config, 64)
    assert apart == (name == "phi3")
    batch = laid(layout(8, apart=apart))
    sizes = (2, 8, 1) if apart else (2, 2, GROUP)
    assert batch.shared.places.shape[:3] == sizes
    grads, logps = together(pair.family, pair.config, pair.params, adapters, batch)
    got = np.asarray(logps)[grpo_objective.behind(batch.weights, batch) > 0]
    gap = np.abs(got - each).max() / np.abs(each).max()
    figure(f"{name}'s shared prompts, log-probabilities", gap, 1e-5)
    for one, other in zip(*map(jax.tree.leaves, (grads, want)), strict=True):
        gap, size = np.abs(one - other).max(), np.abs(other).max()
        figure(f"{name}'s shared prompts, gradients", gap / size, 1e-5)


@pytest.mark.parametrize(
    "name, longest",
    [("llama", None), ("llama3_rope", None), ("gemma3_text", None), ("llama4_text", None),
     ("qwen2_yarn_window", None), ("llama_dynamic", 64), ("phi3", 48)],
)  # fmt: skip
def test_prompts_are_shared_where_no_length_of_a_row_turns_them(name, longest):
    kind, fields = tiny.TINY[name]
    fields = getattr(transformers, f"{kind}Config")(**fields).to_dict()
    family = family_of(fields)
    c = family.config(fields)
    if longest is None:
        assert shared_prompts.alike(family, c, 1000)
    else:
        assert shared_prompts.alike(family, c, longest)
        assert not shared_prompts.alike(family, c, longest + 1)


@pytest.mark.parametrize(
    "batch, sizes",
    [(1, (12, 1, 1)), (2, (6, 1, 2)), (3, (6, 1, 2)), (4, (3, 1, 4)), (7, (3, 1, 4)),
     (8, (2, 2, 4)), (100, (1, 3, 4))],
)  # fmt: skip
def test_every_completion_lies_behind_its_prompt_once(batch, sizes):
    how = layout(batch)
    step, (prompts, completions) = laid(how), drawn()
    assert step.shared.places.shape[:3] == sizes
    assert (how.accumulation, how.rows, how.together) == sizes
    flat = lambda x, n: x.reshape(-1, *x.shape[n:])
    found = []
    for tokens, places, real, positions in zip(
        flat(step.tokens, 2), flat(step.shared.places, 2), flat(step.beside["real"], 2),
        flat(step.positions, 2), strict=True,
    ):  # fmt: skip
        for own, there in zip(places, real, strict=True):
            if there:
                at = own[own >= 0]
                found.append(tokens[at].tolist())
                assert positions[at].tolist() == list(range(len(at)))
    assert found == [prompts[n // GROUP] + one for n, one in enumerate(completions)]
    behind = grpo_objective.behind(step.weights, step)
    assert (
        behind.sum()
        == step.weights.sum()
        == sum(n % 5 != 3 for c in completions for n in range(len(c)))
    )
    real = sum(map(len, prompts)) * how.parts + sum(map(len, completions))
    assert (step.segments > 0).sum() == real
    owners = np.asarray(grpo_objective.owned(step))
    assert owners.max() < how.rows * how.together
    worth = step.beside["drawn"][owners >= 0]
    np.testing.assert_allclose(
        worth,
        [np.sin(n + 3 * m) for m, c in enumerate(completions) for n in range(len(c))],
        rtol=1e-6,
    )


def test_few_widths_are_made_and_none_beyond_what_there_can_be():
    how = Layout(8, 8, 8, (256, 1024), limit=2048)
    assert how.most == (256, 8192, 1280) and how.widest == 8448
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        prompts = [[0] * n for n in rng.integers(1, 257, 8)]
        completions = [[0] * n for n in np.minimum(rng.geometric(1 / 500, 64), 1024)]
        widths = how._widths(prompts, completions)
        seen.add(widths)
        assert all(a <= b for a, b in zip(widths, how.most, strict=True))
        assert all(n % 64 == 0 for n in widths)
    assert len(seen) < 30
    with pytest.raises(ValueError, match="a row has 2049 tokens, the limit is 2048"):
        how._widths([[0] * 1025] * 8, [[0] * 1024] * 64)
    # A custom rollout's may be longer than max_completion_length.
    assert how._widths([[0] * 300] * 8, [[0] * 1300] * 64) == (320, 10432, 1600)


def test_a_step_for_a_gpu_has_no_mask_of_rows_and_scatters_nothing(monkeypatch):
    """Lowered for one without one: cuDNN gets the completions' own rows."""
    monkeypatch.setattr(attention, "supports", lambda *_: None)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda c: c == "9.0")
    pair, adapters = adapted("llama")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), pair.params)
    completions = [tiny.draw(n, size) for n, size in enumerate((80, 60, 10, 70))]
    how = Layout(1, GROUP, 8, (100, 80), limit=256)
    b = how.laid([tiny.draw(9, 100)], completions, [[1] * len(one) for one in completions], {}, {})
    b = jax.tree.map(lambda x: jnp.asarray(x[0]), b)

    def loss(adapters, params):
        params = lora.attach(params, adapters, SCALE)
        rows = b.tokens, b.positions, b.segments
        hidden = decoder.forward(pair.family, pair.config, params, *rows, shared=b.shared)
        return shared_prompts.predicting(hidden, b.shared).astype(jnp.float32).sum()

    with _choice.target("gpu"):
        traced = jax.jit(jax.grad(loss)).trace(adapters, params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    row, own = b.tokens.shape[1], b.shared.places.shape[2]
    assert (row, own) == (384, 192)
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1 and "tensor<4x192x4x32xbf16>" in text
    assert f"{own}x{own}" not in text and f"{row}x{row}" not in text
    assert "stablehlo.scatter" not in text and f"{row}x" in text
    # All that layers keep, and what is kept of none: their inputs, one token a row's token.
    stacks = {shape for _, shape, _ in programs.made(traced.jaxpr) if {row, own} & {*shape[1:]}}
    kept = {shape for shape in stacks if shape[0] == pair.config.layers}
    assert kept == {(pair.config.layers, 1, row, pair.config.width)}
