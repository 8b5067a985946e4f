"""GGUF files of the further families: llama.cpp's converter (recorded) and llama.cpp itself."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge import gguf_file, gguf_metadata, gguf_tokens
from bridge.safetensors_file import Weight
from tests import llama_server
from tests.gguf_writing import serving, tokenizer_folder
from tests.oracles import gguf_answers as base
from tests.oracles import gguf_families as made
from tests.test_gguf_file import next_logprobs, speaking
from tests.test_gguf_tokens import CONVERSATIONS, PIECES, respell, texts
from unsloth_jax.models import gemma2

ANSWERS = json.loads(made.ANSWERS.read_text())
# Windows that llama.cpp lacks hold 32 tokens.
WITHIN_WINDOW = (1, 5, 17, 31)
LENGTHS = {"phi3": WITHIN_WINDOW, "phi3_long": (5, 120), "starcoder2": WITHIN_WINDOW}
TOLERANCE = 1e-2  # nats
DEEP = ("cohere_plus", "exaone4_windows")
SLOW = pytest.mark.slow
LATER = tuple(n for n in made.CONFIGS if n.startswith(("qwen3_next", "gpt_oss", "deepseek")))
AFTER = (*DEEP, *LATER, *made.QUANTIZED)
NAMES = [pytest.param(n, marks=[SLOW] * (n in AFTER)) for n in made.CONFIGS]
SPOKEN = [one for one in NAMES if one.values[0] not in made.QUANTIZED]


def weights_of(config):
    return [Weight(n, w.shape, w.dtype, lambda w=w: w) for n, w in made.weights(config).items()]


def written(path, config, fmt="f32"):
    """The GGUF file of a config, with its family's tokenizer, in the folder `path`."""
    folder = made.tokenizer(config, path / "tokenizer")
    file = path / "model.gguf"
    return gguf_file.save(file, config, weights_of(config), folder, fmt, name=base.NAME)


@pytest.mark.parametrize("name", NAMES)
def test_file_equals_llama_cpps_to_the_byte(name, tmp_path):
    for fmt, answer in ANSWERS[name].items():
        (tmp_path / fmt).mkdir()
        written(tmp_path / fmt, made.CONFIGS[name], fmt)
        path = tmp_path / fmt / "model.gguf"
        if base.digest(path.read_bytes()) != answer["file"]:
            ours = json.loads(json.dumps(base.described(path)))
            assert ours["keys"] == answer["keys"]
            assert ours["tensors"] == answer["tensors"]
            raise AssertionError("keys and tensors are the same, the bytes are not")


def model_of(path, config):
    """transformers' model of a config."""
    (path / "config.json").write_text(json.dumps(config))
    base.save_file(made.weights(config), path / "model.safetensors", {"format": "pt"})
    options = dict(dtype=torch.float32, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def differences(model, server, lengths):
    """Largest difference in nats of the next token's log-probabilities, by length of the text."""
    draw, found = np.random.default_rng(0), {}
    for length in lengths:
        ids = draw.integers(3, 480, length).tolist()
        with torch.no_grad():
            reference = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).numpy()
        off = np.abs(next_logprobs(server, ids, 512) - reference)
        assert reference.std() > 0.5
        found[length] = off[reference > -25].max()
    return found


@pytest.mark.parametrize("name", SPOKEN)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    config = made.CONFIGS[name]
    written(tmp_path, config)
    server = speaking(tmp_path / "model.gguf")
    lengths = LENGTHS.get(name, (1, 5, 17, 40, 120))
    found = differences(model_of(tmp_path, config), server, lengths)
    assert max(found.values()) < TOLERANCE, found


def test_longrope_is_long_in_a_long_context_of_llama_cpp(tmp_path):
    config = made.CONFIGS["phi3_long"]
    report = written(tmp_path, config)
    server = speaking(tmp_path / "model.gguf", 512)
    found = differences(model_of(tmp_path, config), server, (5, 270, 300))
    assert max(found.pop(270), found.pop(300)) < TOLERANCE
    assert found[5] > 10 * TOLERANCE  # as the report tells
    assert any("up to 256 tokens" in note for note in report.notes)


OTHERWISE = {
    "another activation": ("gemma2", dict(hidden_activation="silu", hidden_act="silu"), "'silu'"),
    "another theta": ("gemma", dict(rope_theta=2e4), r"rope_theta 20000.0 where .* 10000.0"),
    "a scale": ("gemma2", dict(query_pre_attn_scalar=64), r"scale 0.125 where .* 0.1767"),
    "no cap": ("gemma2", dict(final_logit_softcapping=None), "both soft-caps False"),
    "a pattern": (
        "gemma3",
        dict(layer_types=["full_attention"] * 6 + ["sliding_attention"]),
        r"windows \(None, .* where llama.cpp has \(32, 32, 32, 32, 32, None, 32\)",
    ),
    "a rope of windows": (
        "gemma3_linear",
        dict(rope_parameters=dict(full_attention=made.LINEAR, sliding_attention=made.LINEAR)),
        "rope of layers with a window 'linear'",
    ),
    "an untied head": ("gemma2", dict(tie_word_embeddings=False), "tie_word_embeddings False"),
    "a tied head": ("olmo2", dict(tie_word_embeddings=True), "tie_word_embeddings True"),
    "wide heads": ("phi3", dict(head_dim=32), "heads of width 128 where .* 64"),
    "no biases": ("starcoder2", dict(use_bias=False), "use_bias False"),
    "linear": (
        "gemma",
        dict(rope_parameters=made.LINEAR, rope_theta=None),
        "'linear', which llama.cpp has for none but",
    ),
    "llama3": ("granite", dict(rope_parameters=base.LLAMA3, rope_theta=None), "rope type 'llama3'"),
    "no rope": ("smollm3", dict(no_rope_layers=[1, 0, 1, 0]), r"layers with rope \(True, False"),
    "short chunks": (
        "llama4",
        dict(attention_chunk_size=64),
        "attention_chunk_size 64 where .* 8192",
    ),
    "other chunks": (
        "llama4",
        dict(layer_types=["full_attention"] * 5),
        r"layers with chunks \(False",
    ),
    # llama.cpp ends where no layer uses what it scales queries of such layers by.
    "few layers": (
        "llama4",
        dict(num_hidden_layers=2, no_rope_layers=[1, 1], layer_types=["chunked_attention"] * 2),
        "a layer without rope False where .* True",
    ),
    "other steps": ("llama4", dict(moe_layers=[1, 2]), r"mixtures of experts \(False, True, True"),
    "no growth": ("llama4", dict(attn_temperature_tuning=False), r"floor_scale \(None, None\)"),
    "plain queries": ("llama4", dict(use_qk_norm=False), "use_qk_norm False where .* True"),
    "an output's bias": (
        "llama4",
        dict(attention_bias=True),
        "no place for 5 biases: blk.0.attn_output",
    ),
    "normed heads": ("cohere", dict(use_qk_norm=True), "use_qk_norm of 2 layers True"),
    "cohere's biases": ("cohere", dict(attention_bias=True), "no place for 2 biases: blk.0.attn_o"),
    "gemma's biases": ("gemma", dict(attention_bias=True), "no place for 2 biases"),
    "all groups": ("glm4_moe", dict(topk_group=3), "groups left out False"),
    "no mixture": ("glm4_moe", dict(first_k_dense_replace=3), "mixtures of experts False"),
    "few windows": (
        "exaone4_windows",
        dict(num_hidden_layers=4, layer_types=made.SLIDING),
        r"sliding windows \(True, True, True, False\) where .* \(False,",
    ),
    "a norm before the gate": (
        "falcon_h1",
        dict(mamba_norm_before_gate=True),
        "mamba_norm_before_gate True where .* False",
    ),
    "no bias of taps": ("falcon_h1", dict(mamba_conv_bias=False), "mamba_conv_bias False"),
    "another factor of a tied head": (
        "falcon_h1_tied",
        dict(lm_head_multiplier=0.5),
        "lm_head_multiplier 0.5 where .* 0.6",
    ),
    "biases of queries": ("falcon_h1", dict(attention_bias=True), "no place for 8 biases"),
    "a bias of Mamba": ("falcon_h1", dict(projectors_bias=True), "2 biases: blk.0.ssm_out.bias"),
    "other values": ("qwen3_5", dict(linear_value_head_dim=16), "linear_value_head_dim 16"),
    "other delta nets": (
        "qwen3_5",
        dict(layer_types=[*made.ALTERNATING[:4], "full_attention"]),
        r"delta nets in layers \(True, False, True, False, False\) where .* False, True\)",
    ),
    "few sections": (
        "qwen3_5",
        dict(rope_parameters=made.rope(1e7, mrope_section=[1, 1, 1], partial_rotary_factor=0.25)),
        "frequencies beyond mrope_section 1 where",
    ),
    "many sections": (
        "qwen3_5",
        dict(rope_parameters=made.rope(1e7, mrope_section=[100] * 3, partial_rotary_factor=0.25)),
        r"frequencies in mrope_section beyond head_dim \d+ where llama.cpp has 0",
    ),
    "truncate": (
        "ministral3",
        dict(rope_parameters=made.CONFIGS["ministral3"]["rope_parameters"] | dict(truncate=False)),
        "yarn with other.*truncate",
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(case, tmp_path):
    name, changes, message = OTHERWISE[case]
    with pytest.raises(ValueError, match=message):
        written(tmp_path, made.CONFIGS[name] | changes)
    assert not (tmp_path / "model.gguf").exists()


def test_a_name_that_makes_llama_cpp_look_for_phi3s_tokens_is_written_otherwise(tmp_path):
    config, file = made.CONFIGS["olmo2"], tmp_path / "model.gguf"
    folder = made.tokenizer(config, tmp_path / "tokenizer")
    how = (file, config, weights_of(config), folder, "f32")
    (note,) = gguf_file.save(*how, name="tuned/Our-Phi-3-mini").notes
    assert "'tuned/Our-phi_3-mini', not 'tuned/Our-Phi-3-mini'" in note and "'</s>'" in note
    speaking(file)  # it ends where tokens are missing
    known = gguf_metadata.PHI3_TOKENS
    assert gguf_metadata.loadable_name("phi3", known) == ("phi3", [])
    assert gguf_metadata.loadable_name("phi-4", []) == ("phi-4", [])


@pytest.mark.parametrize("name", ["phi3", "starcoder2", "qwen3_moe"])
def test_windows_that_llama_cpp_lacks_are_told(name, tmp_path):
    own = dict(use_sliding_window=True, sliding_window=32) if name == "qwen3_moe" else {}
    (note,) = written(tmp_path, made.CONFIGS[name] | own).notes
    assert "no sliding window" in note and "beyond 32" in note


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "cohere2"])
def test_windows_that_llama_cpp_has_are_not_told(name, tmp_path):
    assert not written(tmp_path, made.CONFIGS[name]).notes


@pytest.mark.parametrize("change", ["tokenizer.model", "tokenizer.json", "as transformers saves"])
@pytest.mark.parametrize("name", ["gemma2", "phi3", "llama_pieces", "mistral_pieces"])
def test_llama_cpps_token_ids_equal_the_sentencepiece_tokenizers(name, change, tmp_path):
    config = made.CONFIGS[name]
    folder = made.tokenizer(config, tmp_path / "tokenizer")
    if change != "tokenizer.model":
        without_model(folder)
    if change == "as transformers saves" and name == "gemma2":
        folder = tmp_path / "saved"
        AutoTokenizer.from_pretrained(made.SENTENCEPIECE).save_pretrained(folder)
    path = tmp_path / "model.gguf"
    report = gguf_file.save(path, config, weights_of(config), folder, "f32", name=base.NAME)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    server, wrong = serving(tmp_path / "model.gguf"), []
    told = any("behind special tokens" in note for note in report.notes)
    assert told == (name == "mistral_pieces")
    added = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    for text in texts():
        if told and (text.startswith(" ") or any(token in text for token in added)):
            continue
        ids = llama_server.token_ids(server, text, add_special=True)
        if ids != tokenizer.encode(text).ids:
            wrong.append(text)
    assert not wrong


def test_a_space_that_settings_and_tokenizer_do_not_agree_on_is_refused(tmp_path):
    config = made.CONFIGS["llama_pieces"]
    folder = made.tokenizer(config, tmp_path / "tokenizer")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_prefix_space": False}))
    with pytest.raises(ValueError, match="add_prefix_space=False, the tokenizer does as with True"):
        gguf_tokens.read(folder, config)


def test_a_tokenizer_without_a_first_space_is_told_to_llama_cpp(tmp_path):
    path = tmp_path / "model.gguf"
    config = made.CONFIGS["llama_pieces"]
    gguf_file.save(path, config, weights_of(config), made.SENTENCEPIECE, "f32", name=base.NAME)
    tokenizer = Tokenizer.from_file(str(made.SENTENCEPIECE / "tokenizer.json"))
    server = serving(path)
    for text in PIECES:
        ids = llama_server.token_ids(server, text, add_special=True)
        assert ids == tokenizer.encode(text).ids, text


def test_llama_cpp_renders_the_chat_template_as_transformers_does(tmp_path):
    written(tmp_path, made.CONFIGS["gemma2"])
    server = serving(tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(made.SENTENCEPIECE)
    for talk in CONVERSATIONS:
        wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        # llama.cpp's tokenizer adds the first token itself.
        assert "<bos>" + llama_server.rendered(server, talk) == wanted


def sentencepiece(path, change=lambda folder: None):
    """Gemma's tokens of a folder that went through `change`."""
    folder = made.tokenizer(made.CONFIGS["gemma2"], path / "tokenizer")
    change(folder)
    return gguf_tokens.read(folder, made.CONFIGS["gemma2"], "gemma2")


def test_pieces_have_the_types_and_scores_of_their_kinds(tmp_path):
    tokens = sentencepiece(tmp_path)
    rows = zip(tokens.texts, tokens.types, tokens.scores, strict=True)
    kinds = {text: (kind, score) for text, kind, score in rows}
    assert len(tokens.texts) == 512 and tokens.pre == "default"
    assert kinds["<0x41>"] == (TokenType.BYTE, 0.0)
    assert kinds["<bos>"] == kinds["<end_of_turn>"] == (TokenType.CONTROL, -1000.0)
    assert kinds["<tool>"] == (TokenType.USER_DEFINED, -1000.0)
    assert kinds["[PAD511]"] == (TokenType.UNUSED, -10000.0)
    assert kinds["\u2581a"][0] == TokenType.NORMAL and -500 < kinds["\u2581a"][1] < 0


def test_added_tokens_are_read_from_tokenizer_json_where_the_settings_name_none(tmp_path):
    def change(folder):
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["added_tokens_decoder"]
        file.write_text(json.dumps(settings))

    found = sentencepiece(tmp_path / "changed", change)
    assert found.types == sentencepiece(tmp_path).types


def without_model(folder):
    (folder / "tokenizer.model").unlink()


def words(folder):
    without_model(folder)
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text()) | {"pre_tokenizer": {"type": "Whitespace"}}
    file.write_text(json.dumps(spec))


def with_a_gap(folder):
    without_model(folder)
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["model"]["vocab"]["<bos>"] = 500
    file.write_text(json.dumps(spec))


def cut_short(folder):
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:1000])


def unigram(folder):
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes() + b"\x12\x02\x18\x01")


def lowercase(folder):
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}
    file.write_text(json.dumps(spec))


def charsmap(folder):
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes() + b"\x1a\x03\x12\x01x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (words, "no pre-tokenizer beside SentencePiece.*Whitespace"),
        (with_a_gap, "leave some out"),
        (cut_short, "is no SentencePiece model.*beyond the file"),
        (unigram, "model type 1, expected BPE"),
        (lowercase, "changes them first.*Lowercase"),
        (charsmap, "changes them first: by rules in tokenizer.model"),
    ],
)
def test_sentencepiece_that_gguf_cannot_hold_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sentencepiece(tmp_path, change)


def test_more_pieces_than_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ids up to 479, the embedding has 400 rows"):
        written(tmp_path, made.CONFIGS["gemma2"] | dict(vocab_size=400))


def test_a_norm_without_its_offset_is_found_when_the_file_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gemma2, "to_gguf", lambda c, path, w: w)
    with pytest.raises(ValueError, match="norm.weight came back"):
        written(tmp_path, made.CONFIGS["gemma2"])
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(("name", "pre"), [("olmo2", "dbrx"), ("glm4", "glm4"), ("phi3", "dbrx")])
def test_llama_cpps_token_ids_equal_the_tokenizers_under_the_familys_name(name, pre, tmp_path):
    config = made.CONFIGS[name]
    folder = tokenizer_folder(tmp_path / "tokenizer", respell("dbrx"))
    path = tmp_path / "model.gguf"
    gguf_file.save(path, config, weights_of(config), folder, "f32", name=base.NAME)
    assert GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == pre
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    server = serving(path)
    for text in texts():
        ids = llama_server.token_ids(server, text, add_special=True)
        assert ids == tokenizer.encode(text).ids, text


def test_a_family_that_llama_cpp_lacks_is_refused_with_those_it_has(monkeypatch, tmp_path):
    monkeypatch.delattr(gemma2, "GGUF_ARCH")
    with pytest.raises(ValueError, match="'gemma2' model can't be .*'cohere', .*'qwen3'"):
        written(tmp_path, made.CONFIGS["gemma2"])
