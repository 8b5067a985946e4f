"""What llama.cpp does in each of its architectures, and what the keys of its files don't change.

After llama.cpp's src/models (what is computed) and conversion (what its converter writes).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

QKV = ("attn_q", "attn_k", "attn_v")
ATTENTION = (*QKV, "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")
NORMS = ("attn_norm", "ffn_norm", "output_norm")

SIZES = ("embedding_length", "feed_forward_length")
HEADS = ("head_count", "head_count_kv")
# The order of a file's keys, as most of the converter's classes have it.
USUAL = (
    "block_count", "context_length", *SIZES, *HEADS, "rope_scaling", "rope_freq_base", "eps",
    "experts", "head_lengths",
)  # fmt: skip
GEMMA = ("context_length", "embedding_length", "block_count", "feed_forward_length", *HEADS,
         "eps", "head_lengths")  # fmt: skip
PHI3 = ("context_length", "rope_context", *SIZES, "block_count", *HEADS, "eps", "rope_dimensions",
        "rope_freq_base")  # fmt: skip
FALCON_H1 = ("context_length", *SIZES, "head_count", "block_count", "ssm", "eps")
QWEN35 = (*USUAL[:7], "rope_sections", *USUAL[7:])
DEEPSEEK = (*USUAL[:-1], "sigmoid", USUAL[-1])
SCALINGS = ("default", "linear", "dynamic", "yarn")
YARN = (32.0, 1.0, True)  # beta_fast, beta_slow, truncate


class Architecture(NamedTuple):
    """One of llama.cpp's; what has a default is as in most of them."""

    biases: tuple[str, ...] = QKV  # those it reads; any other stops it from loading the file
    activation: str = "silu"
    ropes: tuple[str, ...] = SCALINGS  # kinds that it computes as transformers does
    theta: float | None = None  # rope's base, where no key says it
    tunes_yarn: bool = False  # whether it reads yarn's beta_fast and beta_slow
    scales_yarn: bool = False  # whether it reads mscale_all_dim, which the family's keys are about
    tells_truncate: bool = False  # whether yarn's ramp between broken dimensions is told
    period: int = 0  # each so many-th layer is full, the others have a window; 0: none has
    square: bool = False  # whether the heads together are as wide as the model
    tied: bool | None = None  # the only kind of head that it has
    head_lengths: bool | None = True  # None: if the config states head_dim
    layer_norm: bool = False  # mean and variance, not the root of the mean square alone
    keys: tuple[str, ...] = USUAL
    converter_llama: bool = False  # the converter's class is derived from llama's


LLAMA = Architecture(converter_llama=True, biases=(*ATTENTION, *FFN))
ARCHITECTURES = {
    "llama": LLAMA._replace(ropes=(*SCALINGS, "llama3")),
    "llama4": LLAMA._replace(biases=QKV, ropes=(*SCALINGS, "llama3")),
    "qwen2": Architecture(head_lengths=None),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(biases=()),
    "gemma": Architecture(
        activation="gelu_pytorch_tanh", ropes=("default",), theta=1e4, tied=True, keys=GEMMA
    ),
    "gemma2": Architecture(
        activation="gelu_pytorch_tanh", ropes=("default",), theta=1e4, period=2, tied=True,
        keys=GEMMA,
    ),
    "gemma3": Architecture(
        activation="gelu_pytorch_tanh", ropes=("default", "linear"), period=6
    ),
    "phi3": Architecture(
        biases=(), ropes=("default", "longrope"), square=True, head_lengths=False, keys=PHI3
    ),
    "granite": LLAMA._replace(square=True, head_lengths=False),
    "olmo2": Architecture(square=True, tied=False, head_lengths=None),
    "smollm3": LLAMA._replace(biases=QKV, head_lengths=None),
    "command-r": Architecture(
        ropes=("default", "dynamic"), square=True, tied=True, head_lengths=None, layer_norm=True
    ),
    "cohere2": Architecture(
        biases=(), ropes=("default", "dynamic"), period=4, square=True, tied=True, layer_norm=True
    ),
    "starcoder2": Architecture(
        biases=(*ATTENTION, "ffn_up", "ffn_down", *NORMS), activation="gelu_pytorch_tanh",
        square=True, head_lengths=None, layer_norm=True,
    ),
    "glm4": Architecture(),
    "glm4moe": Architecture(biases=(*QKV, "exp_probs_b"), head_lengths=None),
    "exaone4": Architecture(
        ropes=(*SCALINGS, "llama3"), square=True, head_lengths=None
    ),
    "falcon-h1": Architecture(
        biases=(*FFN, "ssm_conv1d", "ssm_dt"), ropes=("default", "dynamic"), keys=FALCON_H1
    ),
    "qwen35": Architecture(biases=("ssm_dt",), ropes=("default", "dynamic"), keys=QWEN35),
    "qwen3next": Architecture(biases=("ssm_dt",)),
    "deepseek2": Architecture(biases=("exp_probs_b",), scales_yarn=True, keys=DEEPSEEK),
    "gpt-oss": Architecture(
        biases=(*ATTENTION, "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        period=2, tied=False, tells_truncate=True,
    ),
    "mistral3": LLAMA._replace(ropes=("yarn",), tunes_yarn=True, scales_yarn=True),
}  # fmt: skip


def differences(arch: str, c: Any, own: dict[str, tuple[Any, Any]]) -> Iterator[str]:
    """What of the model `c` llama.cpp would compute otherwise, in words.

    `own` is the family's: what it is called -> (this model's, the only one of llama.cpp).
    """
    a, r = ARCHITECTURES[arch], c.rope
    if r.kind not in a.ropes:
        yield f"has rope type {r.kind!r}, which llama.cpp has for none but {_with_rope(r.kind)}"
    betas = YARN[:2] if a.tunes_yarn else (r.beta_fast, r.beta_slow)
    if r.kind == "yarn" and (*betas, r.truncate or a.tells_truncate) != YARN:
        yield f"has yarn with other beta_fast, beta_slow, truncate than {YARN}"
    fixed = {"activation": (c.activation, a.activation)}
    if a.theta is not None:
        fixed["rope_theta"] = r.theta, a.theta
    if a.period:
        fixed["sliding windows"] = c.windows, alternating(c.windows, a.period)
    if a.square:
        fixed["heads of width"] = c.head_width * c.heads, c.width
    if a.tied is not None:
        fixed["tie_word_embeddings"] = c.tied, a.tied
    for name, (ours, theirs) in (fixed | own).items():
        if ours != theirs:
            yield f"has {name} {ours!r} where llama.cpp has {theirs!r}"


def alternating(windows: tuple[int | None, ...], period: int) -> tuple[int | None, ...]:
    """A window on every layer but each `period`-th."""
    window = next(filter(None, windows), 1)
    return tuple(window if (i + 1) % period else None for i in range(len(windows)))


def _with_rope(kind: str) -> list[str]:
    return [name for name, a in ARCHITECTURES.items() if kind in a.ropes]
