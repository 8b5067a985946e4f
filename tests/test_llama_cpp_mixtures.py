"""llama.cpp's answers for mixtures, whose routers may choose other experts by rounding alone."""

import numpy as np
import pytest
import tiny_chat
import torch
from safetensors.torch import load_file, save_file

from tests.test_llama_cpp_export import rows_in_their_own_order, wrong
from workflows import agreement, divergence

MOE = dict(head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)


def narrow(folder, seed=0):
    """A mixture whose routers' scores lie close together, unlike those of tests/tiny.py."""
    tiny_chat.save(folder, "Qwen3Moe", **MOE, norm_topk_prob=True)
    draw, weights = torch.Generator().manual_seed(seed), load_file(folder / "model.safetensors")
    for name, w in weights.items():
        if w.ndim > 1:
            drawn = torch.randn(w.shape, generator=draw) / w.shape[-1] ** 0.5
            weights[name] = drawn.to(w.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def experts_in_another_order(name, read):
    e = [part for part in name.split(".") if part.isdigit()]
    if "down_proj" not in name or len(e) < 2:
        return read(name)
    return read(name.replace(f"experts.{e[1]}.", f"experts.{(int(e[1]) + 1) % 4}."))


def one_expert_turned(name, read):
    return -read(name) if "experts.1.gate_proj" in name else read(name)


def keys_of_the_other_layer(name, read):
    swapped = {"0": "1", "1": "0"}
    parts = name.split(".")
    if "k_proj" in parts:
        parts[2] = swapped[parts[2]]
    return read(".".join(parts))


WRONG = {
    "rows": rows_in_their_own_order,
    "experts": experts_in_another_order,
    "one expert": one_expert_turned,
    "keys": keys_of_the_other_layer,
}


@pytest.fixture(scope="module", params=range(3))
def plain(request, tmp_path_factory):
    folder = narrow(tmp_path_factory.mktemp("narrow") / "model", request.param)
    return tiny_chat.load(folder)[0]


@pytest.mark.slow
def test_other_experts_by_rounding_are_no_wrong_file(plain, tmp_path):
    facts = plain.save_pretrained_gguf(tmp_path / "g", quantization_method=["f32", "q8_0"])
    found = {name: file["llama_cpp"] for name, file in facts["quantization"].items()}
    assert found["model.F32.gguf"]["equal"] == 256 and not found["model.F32.gguf"]["rerouted"]
    q8 = found["model.Q8_0.gguf"]
    # Each of these models has some, which were refused as a wrong file's.
    assert q8["equal"] > 215 and 0 < q8["rerouted"] < 13 and q8["largest_gap"] <= q8["bound"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_mixture_is_still_found(plain, tmp_path, kind):
    path = wrong(plain.source, WRONG[kind], tmp_path / "wrong.gguf", "q8_0")
    with pytest.raises(ValueError, match=r"wrong.gguf: llama.cpp says token .* rounding explains"):
        agreement.checked(plain.source, divergence.prompts(plain), {path: ["Q8_0", "F32"]})


def test_a_model_without_experts_is_never_excused(tmp_path):
    model, _ = tiny_chat.load(tiny_chat.save(tmp_path / "dense"))
    texts, gap = np.full((8, 48), 5), np.zeros((8, 32))
    gap[0, 3] = 1
    assert not agreement.rerouted(model.source, texts, gap, 0.5, [], ["Q8_0"]).any()
