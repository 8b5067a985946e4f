"""GGUF files against llama.cpp: its converter, its quantizer (recorded) and itself (xllamacpp)."""

import json
import re
import weakref

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from transformers import AutoModelForCausalLM

from bridge import gguf_blocks, gguf_file
from bridge.safetensors_file import Weight
from tests.gguf_writing import exported, small, weights_of, written
from tests.oracles import gguf_answers as made

ANSWERS = json.loads(made.ANSWERS.read_text())
WHOLE = [(n, f) for n, files in ANSWERS.items() if n not in made.TYPES_ONLY for f in files]
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


@pytest.mark.parametrize(("name", "fmt"), WHOLE)
def test_file_equals_llama_cpps_to_the_byte(name, fmt, tmp_path):
    report = exported(tmp_path, name, fmt)
    for row in report.tensors:
        usual = gguf_blocks.ERROR[gguf.GGMLQuantizationType[row["type"]]]
        assert row["error"] <= usual and (row["error"] > 0) == (row["type"] != "F32")
    answer, path = ANSWERS[name][fmt], tmp_path / "model.gguf"
    if made.digest(path.read_bytes()) != answer["file"]:
        ours = json.loads(json.dumps(made.described(path)))
        assert ours["keys"] == answer["keys"]
        assert ours["tensors"] == answer["tensors"]
        raise AssertionError("keys and tensors are the same, the bytes are not")


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


def speaking(path, context=256):
    """A server of llama.cpp as exact as it gets: float32 cache, no flash attention."""
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup = str(path), context, 1, False
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2.*supported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "qwen3", "attention_bias": True}, "no place for.*attn_output.bias"),
        (
            {"model_type": "qwen3", "rope_scaling": made.LLAMA3},
            r"llama3.*none but \['llama', 'llama4', 'exaone4'\]",
        ),
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
