"""Reading GGUF: bytes, names and row order against libgguf, transformers and the formulas."""

import json
import struct
import tracemalloc

import gguf
import libgguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bridge import gguf_config, gguf_header, hub
from bridge.gguf_source import BLOCKS, GGUFSource, halves_from_pairs
from tests import tiny_gguf

BAD = "truncated|cut short|corrupt"
NEARLY_LLAMA3 = gguf_config.llama3_factors(1e4, 16, 8.0, 8192).astype(np.float32)
NEARLY_LLAMA3[1] *= 1.001


def tiny(path, arch="llama", tensors=None, metadata=None, **changes):
    given = tiny_gguf.hyperparameters(arch, **changes) | (metadata or {})
    return tiny_gguf.write(path / "m.gguf", tensors or tiny_gguf.weights(arch), given, arch)


@pytest.fixture(scope="module")
def smollm2():
    return GGUFSource(hub.embedded_smollm2())


def test_header_equals_ggufs_reader(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for bits in (8, 16, 32, 64):
        getattr(writer, f"add_uint{bits}")(f"u{bits}", 2**bits - 1)
        getattr(writer, f"add_int{bits}")(f"i{bits}", -(2 ** (bits - 1)))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    for values in ([1, -2, 3], [0.5, 1e-9], ["", "naïve 🙂"], [True, False]):
        writer.add_array(f"array of {values}", values)
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.ones((3, 5), np.float16))
    writer.add_tensor("b", np.ones((2, 3, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    mine, theirs = gguf_header.read(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert mine.metadata == fields and len(fields) == 17
    assert {name: tuple(t) for name, t in mine.tensors.items()} == {
        t.name: (t.tensor_type, tuple(t.shape[::-1]), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    }


def test_every_tensor_of_the_real_file_equals_ggmls_values(smollm2):
    headers, found = smollm2.headers(), gguf_header.read(smollm2.path)
    raw = np.memmap(smollm2.path, np.uint8, "r")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    for name, header in headers.items():
        t = found.tensors[names.get_name(name, (".weight",))]
        blocks = raw[t.start : t.start + t.size]
        if t.kind == Kind.F32:
            w = np.frombuffer(blocks, np.float32)
        else:
            w = libgguf.dequantize_rows(blocks.reshape(t.shape[0], -1), t.kind, t.shape[-1])
        if "q_proj" in name or "k_proj" in name:
            heads = 9 if "q_proj" in name else 3
            w = np.stack([w[h * 64 + side :: 2][:32] for h in range(heads) for side in (0, 1)])
        read = smollm2.read(name)
        assert read.dtype == header.dtype == "float32" and read.shape == header.shape
        np.testing.assert_array_equal(read, w.reshape(t.shape), err_msg=name)
    assert len(headers) == len(found.tensors) == 272


def test_config_of_the_real_file_is_smollm2s(smollm2):
    config = transformers.LlamaConfig(**smollm2.config)
    assert json.loads(json.dumps(smollm2.config)) == smollm2.config
    wanted = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, head_dim=64)
    wanted |= dict(num_key_value_heads=3, intermediate_size=1536, rms_norm_eps=1e-5)
    wanted |= dict(vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True)
    wanted |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=2, attention_bias=False)
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}


@pytest.mark.parametrize("arch, bias", [("llama", False), ("qwen2", True), ("qwen3", False)])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config_equal_transformers_own_gguf_loading(tmp_path, arch, bias, tied):
    tensors = tiny_gguf.weights(arch, tied=tied, bias=bias)
    path = tiny(tmp_path, arch, tensors, vocab_size=40, attention__key_length=16)
    source = GGUFSource(path)
    # transformers drops qwen3's head_dim, so it is told.
    told = {"head_dim": 16} if arch == "qwen3" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, **told)
    theirs = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    assert set(source.headers()) == set(theirs)
    for name, w in theirs.items():
        np.testing.assert_array_equal(source.read(name), w, err_msg=name)
    mine = model.config.__class__(**source.config).to_dict()
    skipped = {"quantization_config", "_name_or_path", "transformers_version", "rms_norm_eps"}
    skipped |= {"head_dim", "dtype", "architectures"} | {"bos_token_id", "eos_token_id"}
    assert {k: v for k, v in mine.items() if k not in skipped} == {
        k: v for k, v in model.config.to_dict().items() if k not in skipped
    }
    assert mine["rms_norm_eps"] == 1e-5 and mine["head_dim"] == 16


def test_llama_biases_are_permuted_like_their_rows(tmp_path):
    tensors = tiny_gguf.weights(bias=True)
    source = GGUFSource(tiny(tmp_path, tensors=tensors))
    assert source.config["attention_bias"] is True
    name = "model.layers.1.self_attn.q_proj"
    for part in ("weight", "bias"):
        w = tensors[f"blk.1.attn_q.{part}"]
        there = w.reshape(4, 8, 2, -1).swapaxes(1, 2).reshape(w.shape)
        np.testing.assert_array_equal(source.read(f"{name}.{part}"), there)


def test_rows_return_from_the_converters_order():
    w = np.arange(4 * 16 * 3).reshape(64, 3)
    stored = w.reshape(4, 2, 8, 3).swapaxes(1, 2).reshape(64, 3)
    assert not np.array_equal(stored, w)
    np.testing.assert_array_equal(halves_from_pairs(stored, 4), w)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_each_block_type_dequantises_as_ggml_does(tmp_path, kind):
    w = np.random.default_rng(0).normal(size=(40, 512)).astype(np.float32)
    blocks = libgguf.quantize_rows(w, kind)
    tensors = tiny_gguf.weights() | {"token_embd.weight": (blocks, kind)}
    source = GGUFSource(tiny(tmp_path, tensors=tensors))
    read = source.read("model.embed_tokens.weight")
    header = source.headers()["model.embed_tokens.weight"]
    assert header == ((40, 512), "float32", None, kind.name)
    np.testing.assert_array_equal(read, libgguf.dequantize_rows(blocks, kind, 512))
    assert 0 < np.abs(read - w).max() < 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float_types_keep_their_bits(tmp_path, dtype):
    w = np.random.default_rng(0).normal(size=(40, 64)).astype(dtype)
    given = (w.view(np.uint8), Kind.BF16) if dtype == ml_dtypes.bfloat16 else w
    tensors = tiny_gguf.weights() | {"token_embd.weight": given}
    source = GGUFSource(tiny(tmp_path, tensors=tensors))
    read = source.read("model.embed_tokens.weight")
    assert read.dtype == dtype and read.tobytes() == w.tobytes()
    assert source.config["dtype"] == source.headers()["model.embed_tokens.weight"].dtype
    assert source.config["dtype"] == np.dtype(dtype).name


def test_a_file_cut_anywhere_says_so(tmp_path):
    data = tiny(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 3000, 7), *range(3000, len(data), 9001), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=BAD) as raised:
            GGUFSource(cut)
        assert str(cut) in str(raised.value)


def test_a_damaged_header_raises_a_value_error_or_reads(tmp_path):
    data, rng = tiny(tmp_path).read_bytes(), np.random.default_rng(0)
    damaged, refused = tmp_path / "damaged.gguf", 0
    for _ in range(400):
        place = rng.integers(0, 2500)
        damaged.write_bytes(data[:place] + rng.bytes(1) + data[place + 1 :])
        try:
            GGUFSource(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "opening, message",
    [
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(40), "version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "big-endian"),
        (b"", "not a GGUF file, or cut short"),
    ],
)
def test_what_is_not_gguf_is_named(tmp_path, opening, message):
    (tmp_path / "x.gguf").write_bytes(opening)
    with pytest.raises(ValueError, match=message):
        GGUFSource(tmp_path / "x.gguf")


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'mamba'; known: \['command-r', .*'starcoder2'\]"):
        GGUFSource(tiny(tmp_path, "mamba", tiny_gguf.weights()))


def test_a_key_that_only_its_family_needs_is_named_where_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"missing: \['gemma3.attention.sliding_window'\]"):
        GGUFSource(tiny(tmp_path, "gemma3", tiny_gguf.weights()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8, the model has 16"),
        ({"attention__value_length": 8}, "attention.value_length is 8"),
        ({"vocab_size": 41}, "vocab_size is 41"),
        ({"attention__head_count_kv": [2, 1]}, "differs by layer"),
        ({"attention__causal": False}, "only True is supported"),
        ({"expert_count": 8}, r"expert_count is 8, tensors of experts have \[\]"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers is 1; only 0 is supported"),
        ({"logit_scale": 2.0}, r"not understood: \['logit_scale'\]"),
        ({"block_count": None}, "missing: .*llama.block_count"),
        ({"block_count": 1}, r"without a place in 'llama': \['blk.1"),
        ({"block_count": 99}, "99 layers"),
        ({"embedding_length": "wide"}, "'wide', not a positive number"),
        ({"rope__scaling__type": "longrope"}, "'longrope'; known: none, linear, yarn"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "original_context_length"),
        ({"rope__scaling__attn_factor": 0.8}, "attn_factor is 0.8.* with rope scaling 'default'"),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 32,
                "rope__scaling__yarn_attn_factor": 1.1,
                "rope__scaling__attn_factor": 1.5,
            },
            "yarn_attn_factor is 1.1, but rope.scaling.attn_factor=1.5 with factor 4.0 makes 1.70",
        ),
    ],
)
def test_metadata_that_is_not_honoured_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        GGUFSource(tiny(tmp_path, **changes))


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"blk.0.attn_sinks.weight": np.ones(4, np.float32)}, r"\['blk.0.attn_sinks.weight'\]"),
        ({"output.weight": (np.zeros((40, 64), np.uint8), Kind.I8)}, r"\['I8'\].*known: \['F32'"),
        ({"rope_freqs.weight": np.full(5, 2, np.float32)}, r"shape \(5,\), head_dim is 16"),
        ({"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}, "not Llama 3's scaling"),
        ({"rope_freqs.weight": NEARLY_LLAMA3}, "not Llama 3's scaling by 8.0"),
    ],
)
def test_tensors_that_are_not_understood_are_refused(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        GGUFSource(tiny(tmp_path, tensors=tiny_gguf.weights() | extra))


def test_one_part_of_several_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of 3 parts"):
        GGUFSource(tiny(tmp_path, metadata={"split.count": 3}))


def test_an_unknown_weight_is_named(tmp_path):
    with pytest.raises(ValueError, match="no weight 'lm_head.bias'; known: "):
        GGUFSource(tiny(tmp_path)).read("lm_head.bias")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {"rope_type": "default"}),
        ({"rope__scaling__type": "none"}, {"rope_type": "default"}),
        ({"rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 2.5},
            {"rope_type": "linear", "factor": 2.5},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 32,
                "rope__scaling__yarn_attn_factor": 1.1,
                "rope__scaling__yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.1,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_rope_scaling_is_read_from_metadata(tmp_path, changes, expected):
    found = GGUFSource(tiny(tmp_path, **changes)).config["rope_parameters"]
    assert found == {"rope_theta": 10000.0} | expected


@pytest.mark.parametrize("head_dim, theta", [(64, 5e5), (128, 5e5), (16, 1e4)])
@pytest.mark.parametrize("factor, original", [(8.0, 8192), (32.0, 8192), (4.0, 128)])
def test_llama3_scaling_is_recovered_from_its_tensor(head_dim, theta, factor, original):
    given = dict(rope_type="llama3", rope_theta=theta, factor=factor, low_freq_factor=1.0)
    given |= dict(high_freq_factor=4.0, original_max_position_embeddings=original)
    frequencies = lambda rope: ROPE_INIT_FUNCTIONS["llama3"](
        transformers.LlamaConfig(head_dim=head_dim, rope_parameters=rope), torch.device("cpu")
    )[0].numpy()
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    factors = (plain / frequencies(given)).astype(np.float32)
    file = gguf_header.GGUF("x", {}, {})
    found = gguf_config._rope(
        file, {"rope.freq_base": theta}, head_dim, {gguf_config.FACTORS: factors}
    )
    np.testing.assert_allclose(frequencies(found), frequencies(given), 1e-5)
    assert found["factor"] == factor
    if head_dim > 16:
        assert found == given


def test_rope_factors_are_no_weight_and_reach_the_config(tmp_path):
    factors = gguf_config.llama3_factors(5e5, 16, 8.0, 8192).astype(np.float32)
    tensors = tiny_gguf.weights() | {"rope_freqs.weight": factors}
    source = GGUFSource(tiny(tmp_path, tensors=tensors, rope__freq_base=5e5))
    assert source.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert not [name for name in source.headers() if "rope" in name]


def test_windows_and_end_tokens_reach_the_config(tmp_path):
    ids = {"bos": 1, "eos": 2, "eot": 3, "padding": 0}
    metadata = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    mistral = GGUFSource(tiny(tmp_path, metadata=metadata, attention__sliding_window=32)).config
    assert (mistral["model_type"], mistral["sliding_window"]) == ("mistral", 32)
    assert (mistral["bos_token_id"], mistral["eos_token_id"]) == (1, [2, 3])
    assert mistral["pad_token_id"] == 0
    qwen3 = GGUFSource(tiny(tmp_path, "qwen3", attention__sliding_window=32)).config
    assert (qwen3["use_sliding_window"], qwen3["max_window_layers"]) == (True, 0)
    assert GGUFSource(tiny(tmp_path, "qwen2")).config["use_sliding_window"] is False


def test_float_weights_are_mapped_and_blocks_never_held_twice(smollm2):
    held = smollm2.read("model.norm.weight")
    assert not held.flags.owndata and not held.flags.writeable
    tracemalloc.start()
    w = smollm2.read("model.embed_tokens.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * w.nbytes


def test_a_string_that_passes_the_files_end_says_where_it_stands(tmp_path):
    opening = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    path = tmp_path / "cut.gguf"
    path.write_bytes(opening + struct.pack("<Q", 1000) + b"general")
    with pytest.raises(ValueError, match="corrupt: 1000 bytes are expected at byte 32"):
        gguf_header.read(path)
