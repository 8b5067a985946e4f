"""Lists of targets on families that lack some of their names, and what files of PEFT scale."""

import numpy as np
import peft
import pytest
import tiny
import tiny_chat
import torch
from adapted import names_adapted, read_config

from bridge import peft_adapter
from unsloth_jax import lora
from unsloth_jax.models import family_of
from workflows import plan

FUSED = {
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "glm4": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
                    "gate_up_proj", "down_proj"},
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_unsloths_list_means_fused_projections_too(name, tmp_path, capsys):
    params = tiny.pair(name).params
    assert {p.rpartition(".")[2] for p in lora.modules(params, lora.TARGETS)} == FUSED[name]
    tiny.reference(name).config.save_pretrained(tmp_path)
    plan.main([str(tmp_path), "--max-seq-length", "32"])
    assert "adapters" in capsys.readouterr().out


def test_usual_names_that_a_model_lacks_are_left_out_as_in_peft():
    targets = ["q_proj", "o_proj", "w1"]
    model = peft.get_peft_model(
        tiny.reference("phi3"), peft.LoraConfig(r=2, target_modules=targets)
    )
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert names_adapted(tiny.pair("phi3").params, targets) == theirs


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_porj", "o_proj"], r"\['q_porj'\] match nothing; nearest known: .*'q_proj'"),
        (["q_proj", "v_proj"], r"match nothing; nearest known: \['qkv_proj'\]; there are"),
    ],
)
def test_a_typo_and_a_list_of_nothing_are_refused_with_the_nearest_names(targets, said):
    with pytest.raises(ValueError, match=said):
        lora.named(tiny.pair("phi3").params, targets)


@pytest.mark.slow
def test_default_adapters_of_a_fused_family_are_told_and_read_by_peft(tmp_path, capsys):
    folder = tiny_chat.save(tmp_path / "base", "Phi3")
    model = tiny_chat.adapted(folder)
    assert "phi3 has no q_proj, k_proj" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "adapter")
    assert set(read_config(tmp_path / "adapter")["target_modules"]) == FUSED["phi3"]
    theirs = peft.PeftModel.from_pretrained(tiny_chat.reference(folder), tmp_path / "adapter")
    ids = [tiny.draw(3, 20)]
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(model(np.asarray(ids)) - expected).max() < 1e-4 * expected.std()


PATTERNS = {
    "qwen3": dict(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"k_proj": 3}),
    "qwen3_moe": dict(
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"mlp.experts.down_proj": 2},
    ),
    "gpt_oss": dict(target_parameters=["1.mlp.experts.gate_up_proj"], use_rslora=True,
                    rank_pattern={"o_proj": 3, "q_proj": 2}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_of_ranks_and_alphas_and_single_layers_go_both_ways(name, tmp_path):
    pair = tiny.pair(name)
    fields = dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "o_proj"])
    model = peft.get_peft_model(
        tiny.reference(name), peft.LoraConfig(task_type="CAUSAL_LM", **fields, **PATTERNS[name])
    ).eval()
    draws = torch.Generator().manual_seed(4)
    for key, p in model.named_parameters():
        if "lora_" in key:
            p.data = 0.15 * torch.randn(p.shape, generator=draws)
    model.save_pretrained(tmp_path / "theirs")
    row = tiny.draw(3, 20)
    scored = lambda m: m(torch.tensor([row])).logits[0].detach().numpy()
    expected = scored(model)
    adapters, read = peft_adapter.load(tmp_path / "theirs", pair.params)
    scale = lora.scaling(read.alpha, read.rank, read.rslora)
    got = tiny.logits(
        pair.family, pair.config, lora.attach(pair.params, adapters, scale), *tiny.padded([row], 20)
    )
    assert np.abs(got[0] - expected).max() < 1e-4 * expected.std()
    peft_adapter.save(tmp_path / "ours", adapters, read)
    again = peft.PeftModel.from_pretrained(tiny.reference(name), tmp_path / "ours").eval()
    assert np.abs(scored(again) - expected).max() < 1e-4 * expected.std()
    listed = read_config(tmp_path / "ours")["target_parameters"] or []
    assert sorted(listed) == sorted(PATTERNS[name].get("target_parameters", []))


def test_models_around_a_text_model_and_unknown_ones_say_where_to_read_on():
    inside = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    with pytest.raises(ValueError, match="'gemma3'.*'gemma3_text'.*Text models inside others"):
        family_of(inside)
    with pytest.raises(ValueError, match="'mamba' is not supported.*\"A new family\""):
        family_of({"model_type": "mamba", "text_config": {"model_type": "mamba"}})


def test_an_export_of_a_second_model_is_told_as_the_first_was(tmp_path, capsys):
    told = []
    for name in ("one", "two"):
        model, _ = tiny_chat.load(tiny_chat.save(tmp_path / name, "Mistral", sliding_window=16))
        capsys.readouterr()
        model.save_pretrained_gguf(tmp_path / f"{name}_gguf", quantization_method="f16")
        told.append(capsys.readouterr().out)
    assert "llama.cpp has no sliding window" in told[0] and told[0] == told[1]
