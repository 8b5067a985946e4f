"""GGUF files of Qwen3-Next, gpt-oss and DeepSeek-V3: what llama.cpp would compute otherwise."""

import pytest

from tests.oracles import gguf_families as made
from tests.test_gguf_families import written

OTHERWISE = {
    "weights of another sum": (
        "qwen3_next",
        dict(norm_topk_prob=False),
        "norm_topk_prob False where .* True",
    ),
    "a layer without experts": (
        "qwen3_next",
        dict(mlp_only_layers=[1]),
        r"mixtures of experts \(True, False, True, True, True\) where",
    ),
    "delta nets elsewhere": (
        "qwen3_next",
        dict(layer_types=[*made.ALTERNATING[:4], "full_attention"]),
        r"delta nets in layers \(True, False, True, False, False\)",
    ),
    "delta nets' other values": (
        "qwen3_next",
        dict(linear_value_head_dim=16),
        "linear_value_head_dim 16 where .* 32",
    ),
    "biases beside delta nets": (
        "qwen3_next",
        dict(attention_bias=True),
        "no place for 8 biases: blk.1.attn_k.bias",
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(case, tmp_path):
    name, changes, message = OTHERWISE[case]
    with pytest.raises(ValueError, match=message):
        written(tmp_path, made.CONFIGS[name] | changes)
    assert not (tmp_path / "model.gguf").exists()
