"""Every kind of adapter and whole weights: trained here, saved, read by PEFT, transformers, us."""

import jax
import numpy as np
import peft
import pytest
import tiny_chat
import torch
import transformers

import unsloth_jax
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, lora, tree
from unsloth_jax.leaves import Vacant

SAME = dict(
    per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64, max_steps=2,
)  # fmt: skip
ROWS = tiny_chat.MESSAGES
IDS = np.asarray([[5, 9, 30, 7, 41, 12, 60, 33]])
TABLES = ["embed_tokens", "lm_head"]
KINDS = {
    "dora": dict(use_dora=True),
    "pissa": dict(init_lora_weights="pissa", lora_alpha=8),
    "loftq": dict(init_lora_weights="loftq", lora_alpha=4),
    "tables": dict(target_modules=["q_proj", *TABLES]),
    "norms": dict(modules_to_save=["norm", "input_layernorm"], target_modules=["q_proj"]),
}


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    how = dict(num_hidden_layers=1, tie_word_embeddings=True)
    return tiny_chat.save(tmp_path_factory.mktemp("tied"), **how)


def trainer(model, **changes) -> SFTTrainer:
    return SFTTrainer(model=model, train_dataset=ROWS, args=SFTConfig(**(SAME | changes)))


def logits(model) -> np.ndarray:
    return model(IDS)


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.mark.parametrize("name", [slow(n) if n not in ("dora", "pissa") else n for n in KINDS])
def test_what_is_trained_is_what_peft_and_we_read_back(folder, tmp_path, name, figure, capsys):
    model, _ = tiny_chat.load(folder)
    base = logits(model)
    FastLanguageModel.get_peft_model(model, **{"r": 4} | KINDS[name])
    if name != "loftq":
        assert off(logits(model), base) < 1e-4
    trainer(model).train()
    trained = logits(model)
    assert off(trained, base) > 0.1
    model.save_pretrained(tmp_path / "a")
    there = peft.PeftModel.from_pretrained(tiny_chat.reference(folder), tmp_path / "a")
    again, _ = tiny_chat.load(tmp_path / "a", load_in_4bit=name == "loftq")
    assert ("belongs to the base in NF4" in capsys.readouterr().out) == (name == "loftq")
    if name == "loftq":  # Its pair is for 4 bits, whose statistics the loader nests.
        assert off(logits(again), trained) < 0.1 < off(theirs(there), trained)
        assert model.params["model"]["layers"]["*"]["mlp"]["up_proj"]["weight"].shape[0] == 1
        return
    figure(
        f"{name}: trained logits in PEFT, over their deviation", off(theirs(there), trained), 1e-4
    )
    assert off(logits(again), trained) < 1e-4
    facts = model.save_pretrained_gguf(tmp_path / "g", None, "f32", run_in_llama_cpp=False)
    assert facts["quantization"]["model.F32.gguf"]["kl_trained_to_written"] < 1e-4
    facts = model.save_pretrained_merged(tmp_path / "m")
    assert facts["kl_trained_to_written"] < 0.02
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert off(theirs(merged), trained) < 0.2 * off(trained, base)


@pytest.mark.parametrize("name", ["pissa", slow("tables")])
def test_runs_that_change_the_base_or_train_tables_go_on_bitwise(folder, tmp_path, name):
    results = []
    for resumed in (False, True):
        model, _ = tiny_chat.load(folder)
        FastLanguageModel.get_peft_model(model, **{"r": 4} | KINDS[name])
        saved = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=2)
        run = trainer(model, max_steps=3, **({} if resumed else saved))
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint_2") if resumed else None)
        results.append(model.adapters)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *results))
    if name == "pissa":
        other, _ = tiny_chat.load(folder)
        FastLanguageModel.get_peft_model(other, r=4, lora_alpha=8)
        with pytest.raises(ValueError, match="belongs to another run.*initial pairs"):
            trainer(other, max_steps=3).train(str(tmp_path / "checkpoint_2"))


def in_torch(folder, batches, rate: float, decay: float):
    """(losses, state) of transformers' model after AdamW steps on these batches."""
    model = tiny_chat.reference(folder)
    # Its pad is its eos here, a token like others: torch would leave that row as it is.
    model.model.embed_tokens.padding_idx = None
    named = [*model.named_parameters()]
    plain = [p for name, p in named if "norm" in name]
    groups = [{"params": [p for name, p in named if "norm" not in name], "weight_decay": decay},
              {"params": plain, "weight_decay": 0.0}]  # fmt: skip
    optimizer, losses = torch.optim.AdamW(groups, lr=rate), []
    for batch in batches:
        tokens, mask = (torch.tensor(np.asarray(x[0])) for x in (batch.tokens, batch.segments > 0))
        scores = model(tokens, attention_mask=mask.long()).logits.log_softmax(-1)
        on = torch.tensor(batch.weights[0])
        found = scores.gather(-1, torch.tensor(batch.targets[0]).long()[..., None])[..., 0]
        loss = -(found * on).sum() / on.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_full_fine_tuning_is_torchs_adamw(folder, tmp_path, figure):
    model, _ = tiny_chat.load(folder, full_finetuning=True)
    assert all(isinstance(x, Vacant) for x in tree.flatten(model.params).values())
    assert FastLanguageModel.get_peft_model(model) is model and model.peft is None
    rate, decay = 1e-3, 0.05
    run = trainer(model, learning_rate=rate, weight_decay=decay, max_steps=10)
    forever = run._batches().forever()
    losses, state = in_torch(folder, [next(forever)[1] for _ in range(10)], rate, decay)
    before = tiny_chat.reference(folder).state_dict()
    run.train()
    ours = [row["loss"] for row in run.log_history]
    assert losses[-1] < 0.7 * losses[0]
    worst = max(abs(a / b - 1) for a, b in zip(ours, losses, strict=True))
    figure("full fine-tuning: 10 losses beside torch's AdamW, relative", worst, 1e-3)
    for path, leaf in tree.flatten(lora.attach(model.params, model.adapters, 1.0)).items():
        wanted = state[path.replace("*", "0")].numpy()
        found = np.asarray(leaf[0] if "*" in path else leaf)
        # Where a gradient is mere rounding, Adam goes a whole step its way: so norms are compared.
        way = np.linalg.norm(wanted - before[path.replace("*", "0")].numpy())
        assert np.linalg.norm(found - wanted) < 0.02 * way, path
    trained = logits(model)
    model.save_pretrained(tmp_path / "whole")
    again, _ = tiny_chat.load(tmp_path / "whole")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", dtype=torch.float32
    )
    assert off(logits(again), theirs(merged)) < 1e-4 and off(logits(again), trained) < 0.1
    with pytest.raises(ValueError, match="all weights of the model are trained"):
        model.save_pretrained_merged(tmp_path / "l", None, "lora")


@pytest.mark.parametrize("which", [slow("folder"), "tied"])
def test_added_tokens_are_trained_saved_and_read_back(request, tmp_path, which):
    model, tokenizer = tiny_chat.load(request.getfixturevalue(which))
    before = len(tokenizer)
    unsloth_jax.add_new_tokens(model, tokenizer, ["<red>", "<blue>", "the"])
    new = [t for t in ("<red>", "<blue>", "the") if tokenizer.convert_tokens_to_ids(t) >= before]
    assert model.config.vocab == len(tokenizer) == before + len(new) and len(new) >= 2
    table = tree.flatten(model.params)["model.embed_tokens.weight"]
    near = np.asarray(table[:before]).mean(0)
    np.testing.assert_allclose(table[before], near, atol=1e-2 * np.abs(table).max())
    FastLanguageModel.get_peft_model(model, r=4)
    assert set(model.peft.saved) == set(TABLES)
    with pytest.raises(ValueError, match="before get_peft_model"):
        model.resize_token_embeddings(before)
    rows = [{"text": "<red> one two <blue>"}] * 4
    SFTTrainer(model=model, train_dataset=rows, args=SFTConfig(**SAME)).train()
    IDS[0, 3] = before
    trained = logits(model)
    model.save_pretrained(tmp_path / "a")
    again, read = tiny_chat.load(tmp_path / "a")
    assert again.config.vocab == len(read) == len(tokenizer)
    assert off(logits(again), trained) < 1e-4
    facts = model.save_pretrained_gguf(tmp_path / "g", None, "f32", run_in_llama_cpp=False)
    assert facts["quantization"]["model.F32.gguf"]["kl_trained_to_written"] < 1e-4
    model.save_pretrained_merged(tmp_path / "m")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert merged.config.vocab_size == len(tokenizer)
    assert off(theirs(merged), trained) < 0.3


def test_a_tied_head_is_trained_with_its_embedding_or_not_at_all(tied):
    model, _ = tiny_chat.load(tied)
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "embed_tokens"])
    assert model.peft.saved == ("embed_tokens", "lm_head")
    assert [*lora.parts(model.adapters)[1]] == ["model.embed_tokens.weight"]
    model.adapters = None
    with pytest.raises(ValueError, match="the base lacks or holds changes of adapters.*again"):
        FastLanguageModel.get_peft_model(model, r=4)
    with pytest.raises(ValueError, match="trains one of embedding and head, which are one matrix"):
        FastLanguageModel.get_peft_model(tiny_chat.load(tied)[0], modules_to_save=["lm_head"])


def test_what_cannot_be_adapted_or_resized_is_refused(folder, tmp_path):
    model, tokenizer = tiny_chat.load(folder, load_in_4bit=True)
    with pytest.raises(ValueError, match="is NF4: load with load_in_16bit=True"):
        FastLanguageModel.get_peft_model(model, init_lora_weights="loftq")
    for given, error, message in (
        (dict(new_tokens="<red>"), TypeError, "new_tokens must be a list of texts"),
        (dict(new_tokens=["<red>"], method="interpolation"), ValueError, "method='interpolation'"),
    ):
        with pytest.raises((error, TypeError), match=message):
            unsloth_jax.add_new_tokens(model, tokenizer, **given)
    with pytest.raises(ValueError, match="new_num_tokens must be at least 1, got 0"):
        model.resize_token_embeddings(0)
    model.resize_token_embeddings(500, pad_to_multiple_of=64)
    assert model.config.vocab == 512
    assert tiny_chat.load(folder, resize_model_vocab=490)[0].config.vocab == 490
    plain, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(plain, r=4).save_pretrained(tmp_path / "a")
    for given in (dict(full_finetuning=True), dict(resize_model_vocab=490)):
        with pytest.raises(ValueError, match="need a whole model, but .* holds adapters"):
            tiny_chat.load(tmp_path / "a", **given)
