"""Every field of each family's config.json matters, is refused, or is named here."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from hub_families import DENSE, FURTHER

from unsloth_jax.models import family, fields

# What a field may be where doubling or negating its value makes no sense.
OTHER = {
    "sliding_window": 4, "final_logit_softcapping": 7.0, "attn_logit_softcapping": 7.0,
    "use_bidirectional_attention": True, "sliding_window_pattern": 2, "mlp_only_layers": [2],
    "moe_layers": [1], "head_dim": 8, "time_step_limit": [0.1, 0.5],
    "q_lora_rank": 16,
}  # fmt: skip
# What each layer becomes where all are alike.
UNLIKE = {
    "full_attention": "sliding_attention", "sliding_attention": "full_attention",
    "hybrid": "attention",
}  # fmt: skip


@cache
def stated(name: str) -> dict[str, Any]:
    """An entry's config.json as transformers writes it."""
    kind, own = tiny.TINY[name]
    return getattr(transformers, f"{kind}Config")(**own).to_dict()


ENTRIES = [name for name in tiny.TINY if stated(name)["model_type"] in (*DENSE, *FURTHER)]


def other(field: str, value: Any) -> Any:
    """A value of the same kind that says something else."""
    if field == "hidden_act" or field == "hidden_activation":
        return "gelu" if value == "silu" else "silu"
    if field == "rope_type":
        return "linear" if value == "default" else "default"
    if field == "type":
        return "linear"
    if field in OTHER and value != OTHER[field]:
        return OTHER[field]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value or 0.5
    if isinstance(value, list) and isinstance(value[0], str):
        return [next((two for two in value if two != one), UNLIKE.get(one)) for one in value]
    if isinstance(value, list):
        return [
            1 - one if one in (0, 1) and field == "no_rope_layers" else 2 * one for one in value
        ]
    raise AssertionError(f"no other value for {field}={value!r}")


def changes(hf: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path of a field, the config with another value there)."""
    for field, value in hf.items():
        if isinstance(value, dict) and field not in fields.HARMLESS:
            for path, changed in changes(value):
                yield f"{field}.{path}", hf | {field: changed}
        elif field not in fields.HARMLESS and not field.endswith("_token_id"):
            yield field, hf | {field: other(field, value)}


# Family or entry -> fields that transformers reads as little as we do where entries say what they
# say.
WINDOWS_OFF = "no layer has a window"
OF_LOSS = {
    "output_router_logits": "beside the scores",
    "router_aux_loss_coef": "a loss's, not the scores'",
}
UNREAD = {
    "any": {"max_position_embeddings": "dynamic and longrope alone rescale by it"},
    "qwen2": {
        "use_sliding_window": WINDOWS_OFF, "sliding_window": WINDOWS_OFF,
        "max_window_layers": "layer_types says it",
    },
    "qwen3": {
        "use_sliding_window": WINDOWS_OFF, "sliding_window": WINDOWS_OFF,
        "max_window_layers": "layer_types says it",
    },
    "gemma3_text": {"_sliding_window_pattern": "layer_types says it"},
    "phi3": {
        "original_max_position_embeddings": "longrope alone reads it",
        "rope_parameters.original_max_position_embeddings": "the one beside rope_parameters wins",
    },
    "smollm3": {"no_rope_layer_interval": "no_rope_layers says it"},
    "starcoder2": {
        "attention_dropout": "training of the base", "residual_dropout": "training of the base",
        "embedding_dropout": "training of the base",
    },
    "exaone4": {"sliding_window_pattern": "layer_types says it"},
    "mixtral": OF_LOSS,
    "qwen3_moe": OF_LOSS | {"use_sliding_window": WINDOWS_OFF, "sliding_window": WINDOWS_OFF},
    "gpt_oss": OF_LOSS,
    "qwen3_next": OF_LOSS,
    "glm4_moe": {"output_router_logits": "beside the scores"},
    "deepseek_v3": {"output_router_logits": "beside the scores"},
    "llama4_text": OF_LOSS | {
        "router_jitter_noise": "drawn nowhere", "interleave_moe_layer_step": "moe_layers says it",
        "no_rope_layer_interval": "no_rope_layers says it",
    },
    "llama4_text_unnormed": {
        "floor_scale": "no attn_temperature_tuning", "attn_scale": "no attn_temperature_tuning",
    },
    "falcon_h1": {
        "mamba_chunk_size": "how a row is cut, not what comes out",
        "mamba_expand": "mamba_d_ssm says it", "num_logits_to_keep": "which scores are made",
    },
    "falcon_h1_plain": {"mamba_norm_before_gate": "no mamba_rms_norm"},
}  # fmt: skip


def unread(name: str) -> set[str]:
    kinds = "any", stated(name)["model_type"], name
    return {path for kind in kinds for path in UNREAD.get(kind, {})}


def read(hf: dict[str, Any]) -> Any:
    """Our Config, or None where the config is refused."""
    try:
        return family(hf["model_type"]).config(hf)
    except ValueError:
        return None


def idle(name: str) -> set[str]:
    """Fields of an entry whose other values are taken and give the same Config."""
    base = read(stated(name))
    return {path for path, hf in changes(stated(name)) if read(hf) == base}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_config_field_matters_is_refused_or_is_named_unread(name):
    """Another Config gives other weights or logits: test_models.py and test_config.py."""
    assert read(stated(name)) is not None
    assert idle(name) <= unread(name)


def test_no_field_is_named_unread_that_is_read():
    kinds = lambda name: {"any", stated(name)["model_type"], name}
    found = {(k, path) for name in ENTRIES for path in idle(name) for k in kinds(name)}
    assert {(kind, path) for kind, paths in UNREAD.items() for path in paths} <= found


# Sizes whose defaults are too large here, and what a family is unknown without.
NO_DEFAULT = (*fields.REQUIRED, "model_type", "num_key_value_heads")
WINDOW = ("use_sliding_window", "sliding_window")  # which layer_types with windows ask for
NEEDED = {
    "qwen2_yarn_window": WINDOW[:1], "qwen3_biased": WINDOW[:1], "smollm3": WINDOW,
    "ministral3": ("rope_parameters",),
    # Transformers' defaults beside the other sizes are no model there either.
    "falcon_h1": ("mamba_d_ssm", "mamba_n_heads"),
    "falcon_h1_plain": ("mamba_d_ssm", "mamba_n_heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_a_field_left_out_is_read_as_transformers_reads_it(name):
    hf, kind = stated(name), getattr(transformers, f"{tiny.TINY[name][0]}Config")
    for field in hf:
        less = {key: value for key, value in hf.items() if key != field}
        if field in (*NO_DEFAULT, *NEEDED.get(name, ())):
            continue
        assert read(less) == read(kind(**less).to_dict()), field


REORDERS = {"mamba_chunk_size"}  # transformers' sums, which are rounded otherwise then
SIZES = {*fields.REQUIRED, "num_key_value_heads", "head_dim"}  # seen in the weights' shapes
ROW = tiny.draw(11, 40)  # beyond windows and, for most ropes, the original context


def both_logits(name: str, hf: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """transformers' logits of an entry under another config, and ours."""
    kind = tiny.TINY[name][0]
    config = getattr(transformers, f"{kind}Config")(**hf)
    config._attn_implementation = "eager"
    maker = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")
    model = tiny.redraw(maker(config).float().eval())
    with torch.no_grad():
        want = model(torch.tensor([ROW])).logits[0].numpy()
    module, saved, params = tiny.ours(model)
    c = read(hf)
    assert (module.weights(c), c.layers) == (module.weights(saved), saved.layers)
    return want, np.asarray(tiny.logits(module, c, params, *tiny.padded([ROW], len(ROW))))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_logits_follow_transformers_wherever_a_changed_field_is_taken(name):
    """Whether we read a field or leave it unread; what we refuse may do anything there."""
    base = read(stated(name))
    want_base, _ = both_logits(name, stated(name))
    for path, hf in changes(stated(name)):
        if read(hf) is None or path in SIZES:
            continue
        want, found = both_logits(name, hf)
        assert np.abs(found - want).max() <= 1e-4 * want.std(), path
        if read(hf) == base:
            limit = 1e-5 * want.std() if path in REORDERS else 0
            assert np.abs(want - want_base).max() <= limit, path
