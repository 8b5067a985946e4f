"""Loading adapters and GGUF files: base revisions, templates that differ, files left behind."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import tiny_chat

import unsloth_jax
from bridge import export
from bridge import tokenizer as text
from unsloth_jax import FastLanguageModel
from workflows import face

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
COMMIT = "5" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture
def cache(folder, tmp_path):
    """A hub cache that holds the model as org/base, under a commit that is not its main one."""
    repo = tmp_path / "hub" / "models--org--base"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("6" * 40)
    return tmp_path / "hub"


def test_an_adapter_keeps_the_revision_of_its_base_and_is_loaded_on_it(cache, folder, tmp_path):
    options = dict(max_seq_length=32, load_in_4bit=False, cache_dir=str(cache))
    load = FastLanguageModel.from_pretrained
    trained, _ = load("org/base", revision=COMMIT, **options)
    FastLanguageModel.get_peft_model(trained, r=2).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("org/base", COMMIT)
    again, _ = load(str(tmp_path / "adapter"), **options)
    assert again.source.folder.name == COMMIT == again.peft.revision
    config.write_text(json.dumps(fields | {"revision": None}))
    with pytest.raises(OSError, match="'org/base' is neither here nor on the hub"):
        load(str(tmp_path / "adapter"), **options)
    local = FastLanguageModel.get_peft_model(tiny_chat.load(folder)[0], r=2)
    assert local.peft.revision is None


@pytest.mark.parametrize("own", ["another", "none", "same"])
def test_an_adapter_of_another_template_says_so_once_at_load(own, folder, tmp_path, capsys):
    model = FastLanguageModel.get_peft_model(tiny_chat.load(folder)[0], r=2)
    base = model.tokenizer.chat_template
    if own != "same":
        model.tokenizer = unsloth_jax.get_chat_template(model.tokenizer, (CHATML, "eos_token"))
    place = tmp_path / own
    model.save_pretrained(place)
    if own == "none":
        for name in (*text.FILES, "tokenizer_config.json", "chat_template.jinja"):
            (place / name).unlink(missing_ok=True)
    capsys.readouterr()
    loaded, tokenizer = tiny_chat.load(place)
    said = capsys.readouterr().out
    assert tokenizer is loaded.tokenizer
    assert tokenizer.chat_template == (CHATML if own == "another" else base)
    assert said.count("another chat template") == (own != "same")
    if own == "another":
        assert "\n--- base\n+++ adapter\n@@ " in said and "\n+{% for m in messages %}" in said
        assert len(said.splitlines()) <= face.DIFF_LINES + 2
    if own == "none":
        hashes = [export.text_hash(t) for t in (CHATML, base)]
        assert all(value in said for value in hashes)


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The model as a GGUF file."""
    place = tmp_path_factory.mktemp("packed") / "g"
    tiny_chat.load(folder)[0].save_pretrained_gguf(place, quantization_method="f32")
    return place / "model.F32.gguf"


def test_the_tokenizer_files_of_a_gguf_go_with_its_model(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokenizer = FastLanguageModel.from_pretrained(str(packed), 32, load_in_4bit=False)
    (held,) = tmp_path.glob("unsloth_jax-tokenizer-*")
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "tokenizer.json").exists() and held == model.tokenizer_folder
    del model
    gc.collect()
    assert not held.exists()
    tokenizer.save_pretrained(tmp_path / "later")
    assert text.ids(text.load(tmp_path / "later"), "one") == text.ids(tokenizer, "one")


def test_a_process_that_loaded_a_gguf_leaves_no_folder(packed, tmp_path):
    code = (
        "from unsloth_jax import FastLanguageModel as F\n"
        f"kept = F.from_pretrained({str(packed)!r}, 32, load_in_4bit=False, device_map='cpu')\n"
        "assert kept[0].tokenizer_folder.is_dir()"
    )
    settings = os.environ | {"TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=settings)
    assert not list(tmp_path.glob("unsloth_jax-tokenizer-*"))


def test_a_model_with_a_broken_template_is_refused_at_load(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{{ bos_token }}\n{% for m in messages %}")
    with pytest.raises(ValueError, match="chat_template of .*broken is not valid Jinja: line 2: "):
        tiny_chat.load(broken)
