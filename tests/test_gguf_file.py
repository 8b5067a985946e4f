"""GGUF files against llama.cpp: its converter, its quantizer (recorded) and itself (xllamacpp)."""

import json
import re
import shutil
import weakref

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge import gguf_blocks, gguf_file, gguf_tokenizer, gguf_tokens
from bridge.safetensors_file import Weight
from tests import llama_server
from tests.oracles import gguf_answers as made

ANSWERS = json.loads(made.ANSWERS.read_text())
WHOLE = [(n, f) for n, files in ANSWERS.items() if n not in made.TYPES_ONLY for f in files]
ROWS = {"vocab_size": 512}
SPOKEN = {
    **{n: made.CONFIGS[n] for n in ("llama", "llama_tied_biases", "llama_llama3", "llama_linear")},
    **{n: made.CONFIGS[n] for n in ("mistral", "qwen2", "qwen2_tied_yarn", "qwen3")},
    "qwen3_tied_yarn": made.CONFIGS["qwen3_tied_yarn"],
    "yarn_own_attention": made.CONFIGS["qwen2_tied_yarn"]
    | {"rope_scaling": made.YARN | {"attention_factor": 1.5}},
    "yarn_mscale": made.CONFIGS["qwen2_tied_yarn"]
    | {"rope_scaling": made.YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
}
LENGTHS = (1, 5, 17, 30, 31)  # mistral's window is 32
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Größe\n  {{ no }} <tool>"},
        {"role": "user", "content": "one  two"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "東京?"},
    ],
]


def weights_of(config):
    made_now = {n: made.values(n, s).astype(np.float32) for n, s in made.shapes(config).items()}
    return [Weight(n, w.shape, w.dtype, lambda w=w: w) for n, w in made_now.items()]


def written(path, config, fmt="f32", folder=made.TOKENIZER, weights=None):
    weights = weights_of(config) if weights is None else weights
    return gguf_file.save(path, config, weights, folder, fmt, name=made.NAME)


def exported(path, name, fmt="f32"):
    """A recorded case's file, from its own folder."""
    folder = made.folder(name, path / name)
    return written(path / "model.gguf", made.CONFIGS[name], fmt, folder)


def small(**changes):
    return made.CONFIGS["llama"] | changes


def tokenizer_folder(path, change=lambda spec: None, **settings):
    """A copy of the tiny tokenizer whose tokenizer.json went through `change`."""
    shutil.copytree(made.TOKENIZER, path)
    spec = json.loads((path / "tokenizer.json").read_text())
    change(spec)
    (path / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((path / "tokenizer_config.json").read_text()) | settings
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("name", "fmt"), WHOLE)
def test_file_equals_llama_cpps_to_the_byte(name, fmt, tmp_path):
    report = exported(tmp_path, name, fmt)
    for row in report.tensors:
        usual = gguf_blocks.ERROR[gguf.GGMLQuantizationType[row["type"]]]
        assert row["error"] <= usual and (row["error"] > 0) == (row["type"] != "F32")
    ours = json.loads(json.dumps(made.described(tmp_path / "model.gguf")))
    for part in ("keys", "tensors", "file"):
        assert ours[part] == ANSWERS[name][fmt][part], part


@pytest.mark.parametrize("fmt", ["q4_k_m"])
def test_types_of_eighty_layers_equal_llama_quantizes(fmt):
    config, arch = made.CONFIGS["eighty_layers"], "llama"
    names = gguf_file.gguf_names(arch, 80, made.shapes(config))
    shapes = {names[n]: s for n, s in made.shapes(config).items()}
    sizes = gguf_blocks.Sizes(arch, 80, config["num_attention_heads"], 1)
    chosen = gguf_blocks.choose(gguf_blocks.FORMATS[fmt], shapes, sizes)
    wanted = {t[0]: t[1] for t in ANSWERS["eighty_layers"][fmt]["tensors"]}
    assert {n: c.kind.name for n, c in chosen.items()} == wanted
    assert wanted["blk.12.attn_v.weight"] == "Q6_K" and wanted["blk.13.attn_v.weight"] == "Q5_K"


def speaking(path):
    """A server of llama.cpp as exact as it gets: float32 cache, no flash attention."""
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup = str(path), 256, 1, False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(p)


def next_logprobs(server, ids, vocabulary):
    """llama.cpp's distribution after `ids`; the bias forces a harmless sample only."""
    asked = {"prompt": ids, "max_tokens": 1, "logprobs": vocabulary, "temperature": 0.0}
    asked |= {"logit_bias": [[vocabulary - 1, 1e6]], "post_sampling_probs": False}
    answer = server.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    out = np.full(vocabulary, -np.inf)
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        out[one["id"]] = one["logprob"]
    return out


@pytest.mark.parametrize("name", SPOKEN)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    config = SPOKEN[name]
    written(tmp_path / "model.gguf", config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    made.save_file({w.name: w.read() for w in weights_of(config)}, tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    server, draw = speaking(tmp_path / "model.gguf"), np.random.default_rng(0)
    lengths = LENGTHS if name == "mistral" else (*LENGTHS[:3], 40, 120)
    for length in lengths:
        ids = draw.integers(3, 480, length).tolist()
        with torch.no_grad():
            reference = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).numpy()
        found = next_logprobs(server, ids, 512)
        assert reference.std() > 0.5
        assert np.abs(found - reference)[reference > -25].max() < 2e-3, length


PIECES = """hello
 world
It's THEY'RE we'll I'm
for(i=0;i<10;++i){}
x = {"a": [1, 2.5]}
3 33 333 3333 33333
12,345.678
  two  spaces  x
Größe naïve café
Москва не верит
東京都
한국어
สวัสดี
مرحبا
🚀🎉
½ ² Ⅷ
٣٤ ३४
<|im_start|>user
<|im_end|>
<|endoftext|>
<|sep|>
<tool>
<|im_
<tool
a<tool>b
...!!!???
'''```
——
https://a.b/c?d=e#f
snake_case CamelCase
ÀÉÎ ǅ ß
a""".splitlines()
PIECES += [
    "\n",
    "\n\n\n",
    "\r\n",
    "\t\ttabs",
    "   ",
    "def f(a):\n    return a\n",
    "e\u0301",
    "\u00a0",
]
PIECES += ["\u200b", "\U0001f1eb\U0001f1f7", "\U0001f469\u200d\U0001f467", " \n  \n", "\x00\x1f"]


def texts():
    """200 strings: words, code, digits, spaces, Unicode, special tokens, and mixtures of them."""
    draw = np.random.default_rng(0)
    return PIECES + ["".join(draw.choice(PIECES, 4)) for _ in range(200 - len(PIECES))]


SPLITS = {
    "smollm": (
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ),
    "gpt-2": (
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ),
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def respell(pre):
    """tokenizer.json as models of that pre-tokenizer have it, on the tiny vocabulary."""
    known = gguf_tokens.PRE_TOKENIZERS[pre]
    split = {"type": "Split", "pattern": {"Regex": known.steps[0]}, "behavior": "Isolated"}
    steps = SPLITS.get(pre, (split | {"invert": False}, BYTES))

    def change(spec):
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(steps)}
        spec["model"]["ignore_merges"] = known.ignores_merges
        if known.adds_bos:
            spec["post_processor"] = made.adding("<|im_start|>", 1)

    return change


@pytest.mark.parametrize("pre", gguf_tokens.PRE_TOKENIZERS)
def test_llama_cpps_token_ids_equal_the_tokenizers(pre, tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", respell(pre))
    written(tmp_path / "model.gguf", small(), folder=folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    server, strings = llama_server.serve(tmp_path / "model.gguf"), texts()
    assert len(strings) == 200
    for text in strings:
        ids = llama_server.token_ids(server, text, add_special=True)
        assert ids == tokenizer.encode(text).ids, text


def test_no_bos_is_added_that_the_tokenizer_does_not_add(tmp_path):
    def change(spec):
        respell("llama-bpe")(spec)
        spec["post_processor"] = None

    folder = tokenizer_folder(tmp_path / "tokenizer", change)
    written(tmp_path / "model.gguf", small(), folder=folder)
    server = llama_server.serve(tmp_path / "model.gguf")
    assert llama_server.token_ids(server, "a", add_special=True) == [
        Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("a")
    ]


def test_llama_cpp_renders_the_chat_template_as_transformers_does(tmp_path):
    written(tmp_path / "model.gguf", small())
    server, tokenizer = (
        llama_server.serve(tmp_path / "model.gguf"),
        AutoTokenizer.from_pretrained(made.TOKENIZER),
    )
    for talk in CONVERSATIONS:
        wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert llama_server.rendered(server, talk) == wanted


def test_a_tokenizer_read_from_gguf_is_written_as_it_was(tmp_path):
    written(tmp_path / "first.gguf", small())
    folder = gguf_tokenizer.save_folder(tmp_path / "first.gguf", tmp_path / "tokenizer")
    written(tmp_path / "second.gguf", small(), folder=folder)
    first, second = (
        {k: v for k, _, v in made.described(tmp_path / f"{n}.gguf")["keys"] if "token" in k}
        for n in ("first", "second")
    )
    assert first.items() <= second.items()


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config", "chat_template.json"])
def test_the_chat_template_is_found_wherever_the_folder_keeps_it(place, tmp_path):
    template = (made.TOKENIZER / "chat_template.jinja").read_text()
    extra = {"chat_template": template} if place == "tokenizer_config" else {}
    folder = tokenizer_folder(tmp_path / "tokenizer", **extra)
    if place != "chat_template.jinja":
        (folder / "chat_template.jinja").unlink()
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": template}))
    assert gguf_tokens.read(folder, ROWS).special.chat_template == template


def test_the_template_file_wins_over_the_configs_as_in_transformers(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", chat_template="another")
    used = AutoTokenizer.from_pretrained(folder).chat_template
    assert gguf_tokens.read(folder, ROWS).special.chat_template == used != "another"


def test_tokens_are_typed_and_padded_to_the_embedding():
    tokens = gguf_tokens.read(made.TOKENIZER, ROWS)
    kinds = dict(zip(tokens.texts, tokens.types, strict=True))
    assert len(tokens.texts) == 512 and tokens.texts[482] == "[PAD482]"
    assert kinds["[PAD511]"] == gguf.TokenType.UNUSED
    assert kinds["<|im_end|>"] == kinds["<|sep|>"] == gguf.TokenType.CONTROL
    assert kinds["<tool>"] == gguf.TokenType.USER_DEFINED
    assert kinds["a"] == gguf.TokenType.NORMAL


def test_an_unmarked_special_id_comes_from_the_config(tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", eos_token=None)
    ids = gguf_tokens.read(folder, ROWS | {"eos_token_id": 2}).special.special_token_ids
    assert ids["eos"] == 2


def no_word_level(spec):
    spec["model"]["type"] = "WordLevel"


def byte_fallback(spec):
    spec["model"]["byte_fallback"] = True


def other_digits(spec):
    spec["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False


def whole_words(spec):
    spec["model"]["ignore_merges"] = True


def lowercase(spec):
    spec["normalizer"] = {"type": "Lowercase"}


def suffixes(spec):
    spec["model"]["end_of_word_suffix"] = "</w>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_word_level, "WordLevel.*known: BPE"),
        (byte_fallback, "SentencePiece.*saved as safetensors"),
        (other_digits, "no name for this pre-tokenizer.*smollm.*llama-bpe"),
        (whole_words, "ignore_merges=True; known"),
        (lowercase, "Lowercase.*known: NFC"),
        (suffixes, "</w>"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(change, message, tmp_path):
    folder = tokenizer_folder(tmp_path / "tokenizer", change)
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "model.gguf", small(), folder=folder)
    assert not list(tmp_path.glob("model*"))


def test_a_sentencepiece_model_file_alone_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ValueError, match="SentencePiece"):
        gguf_tokens.read(tmp_path, ROWS)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="ids up to 481, the embedding has 400 rows.*without a row"
    ):
        written(tmp_path / "model.gguf", small(vocab_size=400))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2.*supported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "qwen3", "attention_bias": True}, "no place for.*attn_output.bias"),
        ({"model_type": "qwen3", "rope_scaling": made.LLAMA3}, "llama3.*llama only"),
        ({"rope_scaling": made.YARN | {"truncate": False}}, "yarn with other.*truncate"),
        ({"rope_scaling": made.YARN | {"beta_slow": 2.0}}, "yarn with other.*beta_slow"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(changes, message, tmp_path):
    config = small(**changes)
    weights = weights_of(config)
    with pytest.raises(ValueError, match=message):
        written(tmp_path / "model.gguf", config, weights=weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "note"),
    [("mistral", "no sliding window.*beyond 32"), ("llama_dynamic", "dynamic rope.*beyond 256")],
)
def test_what_llama_cpp_leaves_out_is_told(name, note, tmp_path):
    (told,) = exported(tmp_path, name).notes
    assert re.search(note, told)


def test_weights_that_miss_or_misfit_are_listed_together(tmp_path):
    weights = weights_of(small())[1:]
    weights[0] = weights[0]._replace(shape=(63,))
    with pytest.raises(ValueError, match=r"(?s)missing model.embed_tokens.weight.*\(63,\)"):
        written(tmp_path / "model.gguf", small(), weights=weights)


def test_an_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'q3_k'; known: \['bf16', 'f16', 'f32', 'q4_k_m'"):
        written(tmp_path / "model.gguf", small(), "q3_k")


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="model.gguf"):
        written(tmp_path / "model.gguf", small())
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_full_disk_is_said_before_a_weight_is_read(tmp_path):
    config, reads = small(intermediate_size=10**12), []
    weights = [
        Weight(n, s, np.dtype(np.float32), lambda n=n: reads.append(n))
        for n, s in made.shapes(config).items()
    ]
    with pytest.raises(OSError, match="needs 1,536,000.*bytes.*are free on"):
        written(tmp_path / "model.gguf", config, weights=weights)
    assert not reads and not list(tmp_path.iterdir())


def replaced(config, name, value):
    """The weights of a config with one of them read as `value()`."""
    return [w._replace(read=value) if w.name == name else w for w in weights_of(config)]


def broken():
    raise KeyError("the source went away")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (broken, "the source went away"),
        (lambda: np.full((64,), np.nan, np.float32), "64 values that are not finite"),
        (lambda: np.ones(65, np.float32), r"announced as \(64,\), it is \(65,\)"),
    ],
)
def test_a_failure_midway_leaves_no_file(value, error, tmp_path):
    weights = replaced(small(), "model.norm.weight", value)
    with pytest.raises((KeyError, ValueError), match=error):
        written(tmp_path / "model.gguf", small(), weights=weights)
    assert not list(tmp_path.iterdir())


def test_a_tensor_lost_in_rounding_is_found_when_the_file_is_read_again(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tiny = 1e-7 * made.values(name, (96, 64))
    weights = replaced(small(), name, lambda: tiny)
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight came back .* off in F16"):
        written(tmp_path / "model.gguf", small(), "f16", weights=weights)
    assert not list(tmp_path.iterdir())


def test_a_tensor_too_large_for_float16_is_kept_in_bfloat16(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    large = made.values(name, (96, 64)).astype(np.float32)
    large[0, 0] = 70000.0
    weights = replaced(small(), name, lambda: large)
    report = written(tmp_path / "model.gguf", small(), "f16", weights=weights)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types.pop("blk.0.ffn_up.weight") == "BF16"
    assert "BF16" not in types.values()
    assert any("bfloat16" in n and "blk.0.ffn_up.weight" in n for n in report.notes)
    again = written(tmp_path / "plain.gguf", small(), "f16")
    assert not again.notes


def test_weights_are_read_one_at_a_time(tmp_path):
    alive = weakref.WeakValueDictionary()

    def read(name, shape):
        assert not alive, f"{list(alive)} still held when {name} is read"
        value = made.values(name, shape).astype(np.float32)
        alive[name] = value
        return value

    weights = [
        Weight(n, s, np.dtype(np.float32), lambda n=n, s=s: read(n, s))
        for n, s in made.shapes(small()).items()
    ]
    written(tmp_path / "model.gguf", small(), "q8_0", weights=weights)


def test_the_report_counts_bits_and_substitutes(tmp_path):
    report = exported(tmp_path, "narrow", "q4_k_m")
    rows = {r["name"]: r for r in report.tensors}
    assert rows["blk.0.attn_q.weight"]["wanted"] == "Q4_K"
    assert rows["blk.0.attn_q.weight"]["type"] == "Q5_0"
    assert rows["blk.0.ffn_down.weight"]["type"] == "Q4_K"
    weights = sum(np.prod(r["shape"]) for r in report.tensors)
    other = sum(np.prod(r["shape"]) for r in report.tensors if r["type"] != r["wanted"])
    assert report.substituted == pytest.approx(other / weights) and 0.8 < report.substituted < 0.85
    tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert report.bits_per_weight == pytest.approx(8 * sum(t.n_bytes for t in tensors) / weights)
    assert len(report.notes) == 1 and "Q4_K became Q5_0" in report.notes[0]


def test_rows_of_an_odd_width_become_float16():
    shapes = {"blk.0.attn_q.weight": (80, 80), "token_embd.weight": (512, 80)}
    chosen = gguf_blocks.choose(
        gguf_blocks.FORMATS["q4_k_m"], shapes, gguf_blocks.Sizes("llama", 2, 4, 2)
    )
    assert {c.kind for c in chosen.values()} == {gguf.GGMLQuantizationType.F16}
