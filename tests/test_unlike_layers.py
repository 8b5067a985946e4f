"""What the face makes of models whose layers differ: mixtures, chunks, rows of several lengths."""

import numpy as np
import peft
import pytest
import tiny
import tiny_chat
import torch

from unsloth_jax import FastLanguageModel, lora

LENGTHS = (23, 9, 41)
CHUNKED = dict(
    head_dim=16, intermediate_size_mlp=96, num_local_experts=3, num_experts_per_tok=1,
    attention_chunk_size=7, no_rope_layers=[1, 0], floor_scale=8,
)  # fmt: skip
COUNTED = {
    "Ministral3": dict(
        head_dim=16, rope_parameters=tiny.YARN | dict(rope_theta=1e4, llama_4_scaling_beta=0.5)
    ),
    "Llama4Text": CHUNKED,
    "Qwen3_5Text": tiny.DELTA | dict(layer_types=["linear_attention", "full_attention"]),
}
MIXTURE = dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTED)
def test_rows_padded_on_the_left_have_the_logits_of_their_own(kind, tmp_path):
    folder = tiny_chat.save(tmp_path, kind, **COUNTED[kind])
    model, theirs = tiny_chat.load(folder)[0], tiny_chat.reference(folder)
    longest = max(LENGTHS)
    rows = [tiny.draw(n, n, tiny_chat.VOCAB) for n in LENGTHS]
    ids = np.asarray([[0] * (longest - len(row)) + row for row in rows])
    mask = np.asarray([[0] * (longest - n) + [1] * n for n in LENGTHS])
    found = model(ids, mask)
    with torch.no_grad():
        alone = [theirs(torch.tensor([row])).logits[0].numpy() for row in rows]
    for got, want in zip(found, alone, strict=True):
        assert np.abs(got[-len(want) :] - want).max() <= 1e-4 * want.std()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return tiny_chat.load(tiny_chat.save(tmp_path_factory.mktemp("moe"), "Qwen3Moe", **MIXTURE))[0]


REFUSED = {
    "use_dora=True": dict(use_dora=True),
    "lora_dropout=0.1": dict(lora_dropout=0.1),
    "use_dora=True and lora_dropout=0.1": dict(use_dora=True, lora_dropout=0.1),
}


@pytest.mark.parametrize("named", REFUSED)
def test_dropout_and_dora_of_experts_are_refused_by_name(named, mixture):
    parameters = ["mlp.experts.down_proj"]
    for other in ({}, dict(target_modules=["q_proj"], target_parameters=parameters)):
        with pytest.raises(ValueError, match=f"{named} is not supported for experts.*down_proj"):
            FastLanguageModel.get_peft_model(mixture, **REFUSED[named], **other)
        assert mixture.adapters is None
    with pytest.raises(ValueError, match="does not work with"):
        config = peft.LoraConfig(target_parameters=parameters, **REFUSED[named])
        peft.get_peft_model(tiny.reference("qwen3_moe"), config)


@pytest.mark.slow
def test_dropout_and_dora_of_a_mixtures_attention_are_taken(tmp_path):
    model, _ = tiny_chat.load(tiny_chat.save(tmp_path, "Qwen3Moe", **MIXTURE))
    FastLanguageModel.get_peft_model(
        model, target_modules="all-linear", use_dora=True, lora_dropout=0.1
    )
    own = lora.parts(model.adapters)[0]
    assert own and not any("experts" in path for path in own)
    assert any(path.endswith(".magnitude") for path in own)
