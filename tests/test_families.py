"""Every family with adapters and in 4 bits: against PEFT and torch, and bitsandbytes' own files."""

import warnings
from pathlib import Path

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import tiny_chat
import torch
import transformers
from adapted import LORA, in_peft, scale

from bridge import hf, peft_adapter
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, lora, quant, tree
from unsloth_jax.leaves import Stacks
from workflows import family_table

ROW = tiny.draw(21, 48)
TOLERANCE = 1e-3  # of a gradient's norm
# All of them in `make test-full`, the oddest in `make test` too.
FAST = ("gemma2", "phi3")
FAMILIES = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny.EACH.values()
]


def their_gradients(model: torch.nn.Module) -> tuple[float, dict[str, np.ndarray]]:
    """(mean cross entropy of ROW, its gradient by each of PEFT's parameters)."""
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for p in trained.values():
        p.requires_grad_(True)
    loss = model(torch.tensor([ROW]), labels=torch.tensor([ROW])).loss
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in trained.items()}


def our_gradients(pair: tiny.Pair, adapters, factor: float) -> tuple[float, dict]:
    tokens, positions, segments = tiny.padded([ROW], len(ROW))

    def loss(adapters):
        params = lora.attach(pair.params, adapters, factor)
        scores = tiny.logits.__wrapped__(*pair[1:3], params, tokens, positions, segments)
        chances = jax.nn.log_softmax(scores[:, :-1])
        return -jnp.take_along_axis(chances, tokens[:, 1:, None], -1).mean()

    value, found = jax.jit(jax.value_and_grad(loss))(adapters)
    return float(value), tree.flatten(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_of_every_pair_is_pefts(name, tmp_path, figure):
    pair, settings = tiny.pair(name), LORA[name]
    model = in_peft(name, settings)
    model.save_pretrained(tmp_path)
    adapters, read = peft_adapter.load(tmp_path, pair.params)
    wanted_loss, wanted = their_gradients(model)
    loss, found = our_gradients(pair, adapters, scale(read))
    assert abs(loss - wanted_loss) <= 1e-4 * wanted_loss
    apart = []
    for name, mine in peft_adapter.tensors(tree.unflatten(found)).items():
        theirs = wanted[name.replace(".weight", ".default.weight")]
        apart.append(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    assert len(apart) == len(wanted)
    said = f"gradient of every LoRA pair against PEFT, {pair.model.config.model_type}"
    figure(f"{said}, share of its norm", max(apart), TOLERANCE)


def opened(folder, **options) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", attn_implementation="eager", **options
        )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # Else CPUs that multiply in bfloat16 do so, whatever the compute dtype.
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_bitsandbytes_gives_its_own_logits(name, tmp_path, figure):
    plain = tiny.save(tiny.reference(name), tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=["lm_head", "router"],
    )  # fmt: skip
    written = opened(plain, quantization_config=how)
    written.save_pretrained(tmp_path / "four")
    source = SafetensorsSource(tmp_path / "four")
    family, c, params = hf.load(source, quantize="nf4")
    flat = tree.flatten(params)
    parts = {p: leaf.parts if isinstance(leaf, Stacks) else (leaf,) for p, leaf in flat.items()}
    packed = {p for p, here in parts.items() if isinstance(here[0], quant.nf4.NF4)}
    # transformers 5 leaves experts as they are.
    assert packed == {p for p in flat if hf.is_linear(p) and ".experts." not in p}
    found = np.asarray(tiny.logits(family, c, params, *tiny.padded([ROW], len(ROW))))
    with torch.no_grad():
        # Of the model that wrote the file: transformers finds no experts in its own of Llama 4.
        again = written if "llama4" in name else opened(tmp_path / "four")
        expected = again(torch.tensor([ROW])).logits.numpy()
    said = f"logits of bitsandbytes' 4-bit file, {source.config['model_type']}, share of std"
    figure(said, np.abs(found - expected).max() / expected.std(), 1e-4)
    exact = np.asarray(tiny.logits(*tiny.pair(name)[1:], *tiny.padded([ROW], len(ROW))))
    assert np.abs(found - exact).max() > 0.01 * expected.std()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_model_is_merged_into_what_transformers_computes(name, tmp_path, figure):
    kind, fields = tiny.TINY[name]
    own = fields | dict(vocab_size=tiny_chat.VOCAB)
    folder = tiny_chat.save(tmp_path / "base", kind, **own)
    model, tokenizer = tiny_chat.load(folder, max_seq_length=60)
    FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear")
    args = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
        lr_scheduler_type="constant", max_length=60, max_steps=3, packing=True,
        output_dir=str(tmp_path / "run"), save_strategy="no",
    )  # fmt: skip
    ids = np.asarray([ROW[:24]])
    before = model(ids)
    losses = SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=tiny_chat.MESSAGES, args=args
    ).train()
    trained = model(ids)
    assert np.isfinite(losses.training_loss)
    assert np.abs(trained - before).max() > 0.01 * before.std()
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    with torch.no_grad():
        theirs = tiny_chat.reference(tmp_path / "merged")(torch.tensor(ids)).logits.numpy()
    again, _ = tiny_chat.load(tmp_path / "merged", max_seq_length=60)
    said = f"logits of merged weights, {tiny.pair(name).model.config.model_type}, share of std"
    figure(said, np.abs(again(ids) - theirs).max() / theirs.std(), 2e-4)
    # Sums of base and adapters are rounded to 16 bits in the file, here they are not.
    assert np.abs(trained - theirs).mean() <= 0.1 * theirs.std()


@pytest.mark.parametrize("four", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_experts_are_trained_merged_and_exported(four, tmp_path):
    kind, fields = tiny.TINY["qwen3_moe"]
    own = fields | dict(vocab_size=tiny_chat.VOCAB, moe_intermediate_size=64)
    folder = tiny_chat.save(tmp_path / "base", kind, **own)
    model, tokenizer = tiny_chat.load(folder, max_seq_length=60, load_in_4bit=four)
    FastLanguageModel.get_peft_model(model, r=4)
    named = "model.layers.*.mlp.experts."
    before = {p: x for p, x in tree.flatten(model.adapters).items() if p.startswith(named)}
    assert before.keys() == {
        f"{named}{m}.{side}" for m in ("gate_up_proj", "down_proj") for side in "ab"
    }
    args = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
        lr_scheduler_type="constant", max_length=60, max_steps=3, packing=True,
        output_dir=str(tmp_path / "run"), save_strategy="no",
    )  # fmt: skip
    SFTTrainer(
        model=model, tokenizer=tokenizer, train_dataset=tiny_chat.MESSAGES, args=args
    ).train()
    after = tree.flatten(model.adapters)
    for path, x in before.items():
        moved = jax.tree.map(lambda new, old: bool((new != old).any()), after[path], x)
        assert all(jax.tree.leaves(moved)), path
    ids = np.asarray([ROW[:24]])
    trained = model(ids)
    model.save_pretrained(str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(
        tiny_chat.reference(folder), str(tmp_path / "adapter")
    ).eval()
    if not four:
        with torch.no_grad():
            expected = theirs(torch.tensor(ids)).logits.numpy()
        assert np.abs(trained - expected).max() <= 2e-4 * expected.std()
    base = "dequant4" if four else "original16"
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer, base=base)
    with torch.no_grad():
        merged = tiny_chat.reference(tmp_path / "merged")(torch.tensor(ids)).logits.numpy()
    assert np.abs(trained - merged).mean() <= 0.1 * merged.std()
    again, _ = tiny_chat.load(str(tmp_path / "adapter"), max_seq_length=60, load_in_4bit=four)
    np.testing.assert_allclose(again(ids), trained, atol=1e-5 * trained.std())


def test_the_page_of_families_shows_what_was_measured():
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    assert family_table.filled(page) == page


def test_a_family_without_figures_is_named(tmp_path):
    (tmp_path / "parity.json").write_text('{"figures": []}')
    with pytest.raises(ValueError, match="no figures of cohere for .*run `make figures`"):
        family_table.table(tmp_path / "parity.json")
