"""What is written: manifests, merged weights, tokenizers; and what is left when writing fails."""

import collections
import hashlib
import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_chat
import torch
import transformers
from safetensors import safe_open

from bridge import export, gguf_header, merge
from bridge import tokenizer as text
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, get_chat_template, tree
from unsloth_jax.leaves import dense, layer
from workflows import keywords

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CUSTOM = ("{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}",
          "<|im_end|>")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture(scope="module")
def model(folder):
    return tiny_chat.adapted(folder)


@pytest.fixture(scope="module")
def in_4bit(folder):
    return tiny_chat.adapted(folder, load_in_4bit=True)


def tensors(folder) -> dict[str, np.ndarray]:
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}
    return out


def sums(model, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 of base + scale * b @ a for every weight, by the definition."""
    flat = tree.flatten(model.adapters)
    out = {name: w.astype(np.float32) for name, w in base.items()}
    for path in (p.removesuffix(".a") for p in flat if p.endswith(".a")):
        for i in range(tiny_chat.LAYERS):
            a, b = (np.asarray(flat[f"{path}.{side}"][i]) for side in "ab")
            out[f"{path.replace('*', str(i))}.weight"] += np.float32(model.scale) * (b @ a)
    return out


SAVED = {
    "adapter": lambda model, out, **o: model.save_pretrained(out, **o),
    "lora": lambda model, out, **o: model.save_pretrained_merged(out, None, "lora", **o),
    "merged": lambda model, out, **o: model.save_pretrained_merged(
        out, max_shard_size="100KB", **o
    ),
    "gguf": lambda model, out, **o: model.save_pretrained_gguf(
        out, quantization_method=["q8_0", "quantized"], **o
    ),
}


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """{kind: (folder, manifest)} of everything a model can be saved as."""
    out = tmp_path_factory.mktemp("saved")
    return {kind: (out / kind, save(model, out / kind)) for kind, save in SAVED.items()}


def counted(path) -> dict[str, int]:
    if path.suffix == ".gguf":
        return collections.Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors)
    with safe_open(path, framework="numpy") as file:
        return collections.Counter(file.get_slice(name).get_dtype() for name in file.keys())


@pytest.mark.parametrize("kind", SAVED)
def test_a_manifest_says_what_the_files_are(saved, model, kind):
    folder, manifest = saved[kind]
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    there = sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
    assert [row["path"] for row in manifest["files"]] == there
    for row in manifest["files"]:
        path = folder / row["path"]
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert row["bytes"] == path.stat().st_size
        if path.suffix in (".safetensors", ".gguf"):
            assert row["dtypes"] == counted(path) and row["tensors"] == sum(counted(path).values())
    template = (tiny_chat.TOKENIZER / "chat_template.jinja").read_bytes()
    assert manifest["chat_template_sha256"] == hashlib.sha256(template).hexdigest()
    assert manifest["base_model"] == model.name and manifest["versions"]["jax"] == jax.__version__


def test_the_kinds_of_files_are_those_asked_for(saved):
    names = {kind: {row["path"] for row in m["files"]} for kind, (_, m) in saved.items()}
    tokenizer = set(tiny_chat.TOKENIZER_FILES)
    assert names["adapter"] == tokenizer | {"adapter_config.json", "adapter_model.safetensors"}
    assert names["lora"] == names["adapter"]
    assert names["gguf"] == {"model.Q8_0.gguf", "model.Q4_K_M.gguf"}
    shards = {name for name in names["merged"] if name.endswith(".safetensors")}
    assert len(shards) > 2 and names["merged"] - shards - tokenizer == {
        "config.json", "generation_config.json", "model.safetensors.index.json",
    }  # fmt: skip
    facts = saved["gguf"][1]["quantization"]
    assert (
        facts["model.Q8_0.gguf"]["bits_per_weight"] > facts["model.Q4_K_M.gguf"]["bits_per_weight"]
    )


def test_merged_weights_are_base_plus_adapters_cast_once(saved, model, folder):
    base, got = tensors(folder), tensors(saved["merged"][0])
    expected = sums(model, base)
    assert got.keys() == base.keys()
    for name, value in expected.items():
        assert got[name].dtype == BFLOAT16
        assert got[name].tobytes() == value.astype(BFLOAT16).tobytes(), name
    changed = [name for name in base if got[name].tobytes() != base[name].tobytes()]
    assert len(changed) == 7 * tiny_chat.LAYERS == saved["merged"][1]["adapted"]


def test_adapters_at_zero_leave_the_base_byte_for_byte(folder, tmp_path):
    model, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(model, r=4)
    model.save_pretrained_merged(tmp_path / "m")
    base, got = tensors(folder), tensors(tmp_path / "m")
    assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in base.items()}
    plain, _ = tiny_chat.load(folder)
    plain.save_pretrained_merged(tmp_path / "p")
    assert (tmp_path / "p" / "model.safetensors").read_bytes() == (
        tmp_path / "m" / "model.safetensors"
    ).read_bytes()


def test_a_4bit_model_merges_into_the_original_or_the_dequantized_weights(
    in_4bit, folder, tmp_path
):
    original = in_4bit.save_pretrained_merged(tmp_path / "o")
    rounded = in_4bit.save_pretrained_merged(tmp_path / "d", base="dequant4")
    assert (original["base"], rounded["base"]) == ("original16", "dequant4")
    assert original["base_error_over_delta"]["median"] > 0
    base = tensors(folder)
    for name, value in sums(in_4bit, base).items():
        assert tensors(tmp_path / "o")[name].tobytes() == value.astype(BFLOAT16).tobytes(), name
    held = {name: dequantized(in_4bit, name, base[name]) for name in base}
    for name, value in sums(in_4bit, held).items():
        assert tensors(tmp_path / "d")[name].tobytes() == value.astype(BFLOAT16).tobytes(), name
    with pytest.raises(ValueError, match="base must be one of .*dequant4.*got 'nf4'"):
        in_4bit.save_pretrained_merged(tmp_path / "x", base="nf4")


@pytest.mark.parametrize("adapted", [True, False])
def test_a_base_that_was_trained_on_has_its_other_matrices_dequantized_too(
    in_4bit, folder, adapted
):
    m, base = in_4bit, tensors(folder)
    queries = {p: x for p, x in tree.flatten(m.adapters).items() if "q_proj" in p and adapted}
    some = (m.family, m.config, m.params, tree.unflatten(queries), m.scale, m.source, None)
    found = merge.merged(*some, "dequant4")
    assert found.facts["dequantized"] == 7 * tiny_chat.LAYERS
    for w in found.weights:
        if "q_proj" not in w.name or not adapted:
            held = dequantized(m, w.name, base[w.name]).astype(BFLOAT16)
            assert w.read().tobytes() == held.tobytes(), w.name
    assert "dequantized" not in merge.merged(*some, "original16").facts


def dequantized(model, name: str, base: np.ndarray) -> np.ndarray:
    parts = name.split(".")
    if "layers" not in parts:
        return base
    i = int(parts[2])
    leaf = tree.flatten(model.params)[".".join([*parts[:2], "*", *parts[3:]])]
    return base if base.ndim == 1 else np.asarray(dense(layer(leaf, i)))


def test_transformers_runs_the_merged_folder_as_we_run_base_and_adapters(saved, model, folder):
    ids = np.asarray([np.random.default_rng(0).integers(3, tiny_chat.VOCAB, 24)])
    summed = tiny_chat.reference(folder)
    exact = sums(model, tensors(folder))
    summed.load_state_dict({k: torch.tensor(v) for k, v in exact.items()})
    with torch.no_grad():
        theirs = summed(torch.tensor(ids)).logits.numpy()
        merged = tiny_chat.reference(saved["merged"][0])(torch.tensor(ids)).logits.numpy()
        cast = {k: torch.tensor(v).bfloat16().float() for k, v in exact.items()}
        summed.load_state_dict(cast)
        rounded = summed(torch.tensor(ids)).logits.numpy()
    assert np.abs(model(ids) - theirs).max() < 1e-4 * theirs.std()
    assert np.abs(merged - rounded).max() < 1e-6 * theirs.std()
    again, _ = tiny_chat.load(saved["merged"][0])
    assert np.abs(again(ids) - merged).max() < 1e-4 * theirs.std()


def test_an_adapter_folder_loads_with_its_base(saved, model):
    again, tokenizer = tiny_chat.load(saved["adapter"][0])
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), model.adapters, again.adapters)
    assert jax.tree.all(equal) and again.scale == model.scale == 2.0
    assert text.state(tokenizer) == text.state(model.tokenizer)
    assert FastLanguageModel.get_peft_model(again, r=4, lora_alpha=8) is again
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), model.adapters, again.adapters)
    )
    with pytest.raises(TypeError, match="already has adapters"):
        FastLanguageModel.get_peft_model(again, r=8)


@pytest.mark.parametrize("kind", SAVED)
def test_a_folder_that_holds_something_is_left_alone(model, tmp_path, kind):
    target = tmp_path / "out"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"not empty \(\['notes.txt'\]\)"):
            SAVED[kind](model, target, overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]


@pytest.mark.parametrize("kind", SAVED)
def test_a_target_that_is_a_file_is_refused_before_a_weight_is_read(poisoned, tmp_path, kind):
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="out is a file; an export is a folder"):
            SAVED[kind](poisoned, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_link_to_an_empty_folder_is_written_through(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / export.MANIFEST).exists()


def test_an_export_is_replaced_only_when_asked(model, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    model.save_pretrained(target)
    (target / "old").write_text("")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        model.save_pretrained(target)
    assert (target / "old").exists()
    model.save_pretrained_merged(target, overwrite=True)
    assert not (target / "old").exists() and (target / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def poisoned(model):
    """The last adapter's values are not finite, so that writing stops midway."""
    sound = model.adapters
    flat = tree.flatten(sound)
    name = sorted(flat)[-1]
    model.adapters = tree.unflatten(flat | {name: flat[name].at[-1].set(jnp.nan)})
    yield model
    model.adapters = sound


@pytest.mark.parametrize("kind", SAVED)
def test_a_failure_midway_leaves_nothing(poisoned, tmp_path, kind):
    with pytest.raises(ValueError, match="finite"):
        SAVED[kind](poisoned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_the_earlier_export(model, poisoned, tmp_path):
    plain = poisoned.adapters
    poisoned.adapters = None
    poisoned.save_pretrained_merged(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    poisoned.adapters = plain
    with pytest.raises(ValueError, match="not finite"):
        poisoned.save_pretrained_merged(tmp_path / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", SAVED)
def test_a_disk_too_small_is_said_before_writing(model, tmp_path, monkeypatch, kind):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, 5,000 are free"):
        SAVED[kind](model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_room_for_all_formats_is_asked_before_the_first_is_written(model, tmp_path, monkeypatch):
    one = model.save_pretrained_gguf(tmp_path / "one", quantization_method="f32")
    free = one["files"][0]["bytes"] + 3 * 2**19  # with the slack of one header, not of two
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    with pytest.raises(OSError, match=rf"needs [\d,]+ bytes, {free:,} are free"):
        model.save_pretrained_gguf(tmp_path / "both", quantization_method=["q8_0", "f32"])
    assert not (tmp_path / "both").exists()


def test_what_a_gguf_file_cannot_hold_is_printed_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keywords, "_said", set())
    fields = dict(hidden_size=96, num_attention_heads=4, head_dim=24, sliding_window=16)
    model, _ = tiny_chat.load(tiny_chat.save(tmp_path / "base", "Mistral", **fields))
    capsys.readouterr()
    manifest = model.save_pretrained_gguf(tmp_path / "g", quantization_method=["q8_0", "q4_k_m"])
    told = capsys.readouterr().out
    notes = [n for facts in manifest["quantization"].values() for n in facts["notes"]]
    assert {told.count(note) for note in notes} == {1}
    both = "model.Q8_0.gguf, model.Q4_K_M.gguf: llama.cpp has no sliding window"
    assert both in told and "model.Q4_K_M.gguf: 100% of the weights have another type" in told


def test_a_gguf_file_becomes_a_folder_without_a_configuration_to_compare(saved, tmp_path):
    model, _ = tiny_chat.load(saved["gguf"][0] / "model.Q8_0.gguf")
    manifest = model.save_pretrained_merged(tmp_path / "m")
    assert "config_changes" not in manifest
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert fields["hidden_size"] == 64 and "bfloat16" in fields.values()


def test_configurations_are_copied_byte_for_byte_but_for_the_fields_that_change(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((base / name).read_text()) | {"_note": "\u00e9"}
        (base / name).write_text(json.dumps(fields, indent=5))
    same = tiny_chat.load(base)[0].save_pretrained_merged(tmp_path / "same")
    assert same["config_changes"] == {}
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (base / name).read_bytes()
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"dtype": "float32"}))
    other = tiny_chat.load(base)[0].save_pretrained_merged(tmp_path / "other")
    assert other["config_changes"] == {"dtype": ["float32", "bfloat16"]}
    got = json.loads((tmp_path / "other" / "config.json").read_text())
    assert list(got.items()) == list((fields | {"dtype": "bfloat16"}).items())


def test_the_share_of_the_delta_lost_to_rounding_is_in_the_manifest(saved, model, folder):
    base = {k: v.astype(np.float32) for k, v in tensors(folder).items()}
    exact = sums(model, base)
    norm = lambda some: np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in some))
    lost = norm(x - x.astype(BFLOAT16).astype(np.float32) for x in exact.values())
    share = lost / norm(exact[k] - base[k] for k in base)
    assert saved["merged"][1]["rounding_over_delta"] == pytest.approx(share, rel=1e-4)
    assert 0.001 < share < 0.5


@pytest.mark.parametrize("kind", ["adapter", "lora", "merged"])
def test_the_files_of_the_tokenizer_are_copied_byte_for_byte(saved, kind):
    for name in tiny_chat.TOKENIZER_FILES:
        source = tiny_chat.TOKENIZER / name
        assert (saved[kind][0] / name).read_bytes() == source.read_bytes(), name


def test_nothing_we_do_changes_the_tokenizer(folder, tmp_path):
    model, tokenizer = tiny_chat.load(folder)
    state = text.state(tokenizer)
    assert state == text.state(text.load(tiny_chat.TOKENIZER))
    FastLanguageModel.get_peft_model(model, r=4)
    SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=tiny_chat.MESSAGES, args=SFTConfig())
    get_chat_template(tokenizer, "chatml")
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained_merged(tmp_path / "m", tokenizer)
    model.save_pretrained_gguf(tmp_path / "g", tokenizer)
    assert text.state(tokenizer) == state


def test_padding_of_an_earlier_call_does_not_reach_the_export(folder, tmp_path):
    model, tokenizer = tiny_chat.load(folder)
    tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.padding is not None
    model.save_pretrained_merged(tmp_path / "m", tokenizer)
    assert tokenizer.backend_tokenizer.padding is not None
    for name in tiny_chat.TOKENIZER_FILES:
        assert (tmp_path / "m" / name).read_bytes() == (tiny_chat.TOKENIZER / name).read_bytes()


def test_a_tokenizer_with_another_template_is_exported_when_given(model, tmp_path):
    given = get_chat_template(model.tokenizer, CUSTOM)
    wanted = given.apply_chat_template(tiny_chat.TALK, tokenize=False)
    assert wanted != model.tokenizer.apply_chat_template(tiny_chat.TALK, tokenize=False)
    for method in ("merged_16bit", "lora"):
        manifest = model.save_pretrained_merged(tmp_path / method, given, save_method=method)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / method)
        assert again.apply_chat_template(tiny_chat.TALK, tokenize=False) == wanted
        assert manifest["chat_template_sha256"] == export.text_hash(CUSTOM[0])
    model.save_pretrained_gguf(tmp_path / "g", given, "q8_0")
    keys = gguf_header.read(tmp_path / "g" / "model.Q8_0.gguf").metadata
    assert keys["tokenizer.chat_template"] == CUSTOM[0]


def test_unknown_methods_are_refused_with_the_known_ones(model, tmp_path):
    for method in ("merged_4bit", "merged_4bit_forced", "fp8"):
        with pytest.raises(ValueError, match=r"not supported.*merged_16bit.*lora"):
            model.save_pretrained_merged(tmp_path / "x", save_method=method)
    with pytest.raises(ValueError, match=r"q9_0(.|\n)*q8_0"):
        model.save_pretrained_gguf(tmp_path / "x", quantization_method="q9_0")
    with pytest.raises(ValueError, match="names no format"):
        model.save_pretrained_gguf(tmp_path / "x", quantization_method=[])
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_no_weight_are_refused(model):
    shapes = {"a": (2, 4, 8), "b": (2, 8, 4)}
    pair = {f"model.layers.*.nothing.{k}": np.zeros(v, np.float32) for k, v in shapes.items()}
    adapters = tree.unflatten(pair)
    with pytest.raises(ValueError, match="nothing.* belong to no weight"):
        merge.merged(model.family, model.config, model.params, adapters, 1.0, model.source)


def test_a_quantized_gguf_is_named_as_the_base_of_a_merge(saved, tmp_path):
    model = tiny_chat.adapted(saved["gguf"][0] / "model.Q8_0.gguf", load_in_4bit=True)
    facts = model.save_pretrained_merged(tmp_path / "m")
    assert (facts["base"], facts["base_blocks"]) == ("checkpoint", ["Q8_0"])
    assert model.save_pretrained_merged(tmp_path / "d", base="dequant4")["base"] == "dequant4"


def test_the_manifest_of_untrained_adapters_is_plain_json(folder, tmp_path):
    model, _ = tiny_chat.load(folder, load_in_4bit=True)
    FastLanguageModel.get_peft_model(model, r=4)
    model.save_pretrained_merged(tmp_path / "m")
    refuse = lambda word: pytest.fail(f"{word} is no JSON")
    json.loads((tmp_path / "m" / "manifest.json").read_text(), parse_constant=refuse)
