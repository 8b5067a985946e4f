"""gpt-oss' own files, whose experts are in MXFP4: against transformers' dequantizing."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_chat
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bridge import hf, merge, mxfp4
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import FastLanguageModel, quant, tree

SIZES = dict(intermediate_size=64)
DEQUANTIZE = transformers.Mxfp4Config(dequantize=True)


def theirs(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """transformers' bfloat16 as float32."""
    return convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()


def packed(folder: Path, seed: int = 0) -> Path:
    """A folder's experts as random blocks, as openai/gpt-oss-20b has them."""
    rng = np.random.default_rng(seed)
    values = load_file(folder / "model.safetensors")
    for name in [n for n in values if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, height = values.pop(name).shape
        shape = experts, height, width // 32
        values[f"{name}_blocks"] = rng.integers(0, 256, (*shape, 16), np.uint8)
        values[f"{name}_scales"] = rng.integers(122, 126, shape, np.uint8)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny.reference("gpt_oss", **SIZES).to(torch.bfloat16)
    return packed(tiny.save(model, tmp_path_factory.mktemp("mxfp4")))


def test_every_byte_under_every_scale_is_what_transformers_makes_of_it():
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, 16))
    found = mxfp4.dequantized(blocks, scales)
    assert found.dtype == mxfp4.DTYPE and found.shape == (1, 512, 256)
    np.testing.assert_array_equal(found.astype(np.float32), theirs(blocks.copy(), scales.copy()))


def test_experts_have_axes_of_their_own_and_lie_turned():
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 6, 2, 16), np.uint8)
    scales = rng.integers(120, 130, (3, 6, 2), np.uint8)
    found = mxfp4.dequantized(blocks, scales)
    assert found.shape == (3, 64, 6)
    np.testing.assert_array_equal(found.astype(np.float32), theirs(blocks, scales))


def test_a_checkpoint_in_mxfp4_gives_transformers_logits(folder):
    source = SafetensorsSource(folder)
    header = source.headers()["model.layers.1.mlp.experts.down_proj"]
    assert header == ((4, 64, 64), "bfloat16", None, "MXFP4")
    family, c, params = hf.load(source, jnp.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=DEQUANTIZE
    )
    state = model.state_dict()
    for path in family.TRANSPOSED:
        for i, ours in enumerate(tree.flatten(params)[path]):
            want = state[path.replace("*", str(i))].numpy().swapaxes(1, 2)
            np.testing.assert_array_equal(ours, want)
    row = tiny.draw(3, 40)
    found = np.asarray(tiny.logits(family, c, params, *tiny.padded([row], 40)))[0]
    with torch.no_grad():
        expected = model(torch.tensor([row])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()


def test_loading_in_4_bits_packs_the_dequantized_experts_as_nf4(folder):
    source = SafetensorsSource(folder)
    _, _, params = hf.load(source, jnp.bfloat16, quantize="nf4")
    flat = tree.flatten(params)
    leaf = flat["model.layers.*.mlp.experts.gate_up_proj"]
    assert isinstance(leaf, quant.nf4.NF4) and leaf.shape == (3, 4, 128, 64)
    exact = source.read("model.layers.2.mlp.experts.gate_up_proj").swapaxes(1, 2)
    want = quant.FORMATS["nf4"](jnp.asarray(exact))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[2], y), leaf, want)
    for name in ("router.weight", "router.bias"):
        assert flat[f"model.layers.*.mlp.{name}"].dtype == jnp.float32
    assert flat["model.layers.*.mlp.experts.down_proj_bias"].dtype == jnp.bfloat16


def test_adapters_are_merged_into_the_dequantized_experts(tmp_path):
    folder = tiny_chat.save(tmp_path / "base", "GptOss", **tiny.TINY["gpt_oss"][1] | SIZES | dict(
        vocab_size=tiny_chat.VOCAB))  # fmt: skip
    packed(folder)
    model, tokenizer = tiny_chat.load(folder, load_in_4bit=True, max_seq_length=32)
    FastLanguageModel.get_peft_model(
        model, r=2, target_modules=["q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    fill = lambda x: jax.random.normal(jax.random.key(1), x.shape) / 10
    model.adapters = jax.tree.map(fill, model.adapters)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    config, manifest = (
        json.loads((tmp_path / "merged" / name).read_text())
        for name in ("config.json", "manifest.json")
    )
    assert "quantization_config" not in config
    assert (manifest["base"], manifest["base_blocks"]) == ("checkpoint", ["MXFP4"])
    merged, base = SafetensorsSource(tmp_path / "merged"), SafetensorsSource(folder)
    deltas = merge.pairs(model.adapters, 16 / 2, model.params)
    name = "model.layers.1.mlp.experts.down_proj"
    exact = base.read(name).astype(np.float32).swapaxes(1, 2)
    want = exact + deltas[name].delta(exact)
    found = merged.read(name).astype(np.float32).swapaxes(1, 2)
    np.testing.assert_allclose(found, want, rtol=2**-8, atol=1e-6)


def test_experts_that_unsloth_keeps_as_linear_modules_are_refused_by_name(folder, tmp_path):
    values = load_file(folder / "model.safetensors")
    values["model.layers.0.mlp.experts.gate_up_projs.0.weight"] = np.zeros((128, 64), np.float32)
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="experts.gate_up_projs.0.weight.*load_in_4bit=True"):
        hf.load(SafetensorsSource(tmp_path))


NAME = "model.layers.1.mlp.experts.down_proj"
BROKEN = {
    "no scales": (lambda t: t.pop(f"{NAME}_scales"), f"{NAME}_scales is missing"),
    "no blocks": (lambda t: t.pop(f"{NAME}_blocks"), f"{NAME}_blocks is missing"),
    "fewer scales": (
        lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"][..., :1]}),
        rf"{NAME}_scales has shape \(4, 64, 1\), the blocks' first axes are \(4, 64, 2\)"),
    "wider blocks": (
        lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"].reshape(4, 64, 1, 32)}),
        rf"{NAME}_blocks has shape \(4, 64, 1, 32\), expected \[E, O, I/32, 16\]"),
    "flat blocks": (
        lambda t: t.update({f"{NAME}_blocks": t[f"{NAME}_blocks"].reshape(4, -1)}),
        rf"{NAME}_blocks has shape \(4, 2048\)"),
    "signed scales": (
        lambda t: t.update({f"{NAME}_scales": t[f"{NAME}_scales"].astype(np.int8)}),
        f"{NAME}_scales has dtype int8, expected uint8"),
    "fewer experts": (
        lambda t: t.update({n: t[n][:3] for n in (f"{NAME}_blocks", f"{NAME}_scales")}),
        rf"{NAME} has shape \(3, 64, 64\), the config says \(4, 64, 64\)"),
    "both kinds": (
        lambda t: t.update({NAME: np.zeros((4, 64, 64), np.float32)}), f"{NAME} is there twice"),
    "infinite scales": (
        lambda t: t[f"{NAME}_scales"].fill(255), f"{NAME} holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_blocks_that_are_no_weight_are_refused_by_name(folder, tmp_path, change, message):
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        hf.load(SafetensorsSource(tmp_path))
