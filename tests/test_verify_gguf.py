"""What is found wrong with a finished GGUF file, and what is not though it is hard to round."""

import numpy as np
import pytest

from bridge import gguf_blocks, gguf_header, verify_gguf
from tests.gguf_writing import small, weights_of, written
from unsloth_jax.models import llama

FORMATS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_k_m")
GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
WIDE = small(hidden_size=256, intermediate_size=256, num_attention_heads=4, head_dim=64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{format: path} of one model with rows of 256."""
    folder = tmp_path_factory.mktemp("gguf")
    for fmt in FORMATS:
        written(folder / f"{fmt}.gguf", WIDE, fmt)
    return {fmt: folder / f"{fmt}.gguf" for fmt in FORMATS}


def changed(name, value):
    """The weights of the model, one of them another array."""
    return [w._replace(read=lambda: value) if w.name == name else w for w in weights_of(WIDE)]


def read(name):
    return next(w for w in weights_of(WIDE) if w.name == name).read()


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_sound_file_stays_within_the_bounds_of_its_types(files, fmt):
    found = verify_gguf.verify(files[fmt], weights_of(WIDE))
    assert found.keys() == {w.name for w in weights_of(WIDE)}
    for row in found.values():
        assert row.error <= row.bound == gguf_blocks.ERROR[row.kind]
    largest = verify_gguf.worst(found.values())
    for kind, row in largest.items():
        assert row["error"] == max(r.error for r in found.values() if r.kind.name == kind)
    assert set(largest) > {"F32"} or fmt == "f32"


@pytest.mark.parametrize("fmt", FORMATS)
def test_two_tensors_that_changed_places_are_found(files, fmt):
    weights = changed(UP, read(GATE))
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight came back .*1\d\d.\d\d% off"):
        verify_gguf.verify(files[fmt], weights)


@pytest.mark.parametrize("part", ["q", "k"])
def test_rows_of_queries_and_keys_in_another_order_are_found(tmp_path, monkeypatch, part):
    sound = llama.to_gguf
    skipped = f"self_attn.{part}_proj"
    wrong = lambda c, path, w: w if skipped in path else sound(c, path, w)
    monkeypatch.setattr(llama, "to_gguf", wrong)
    with pytest.raises(ValueError, match=rf"blk.\d.attn_{part}.weight came back .*% off in Q8_0"):
        written(tmp_path / "model.gguf", WIDE, "q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fmt", "byte", "bit"), [("q8_0", 2, 0x40), ("q6_k", 192, 0x20)])
def test_one_corrupted_block_is_found_where_the_whole_tensor_hides_it(
    files, fmt, byte, bit, tmp_path
):
    stored, raw = "token_embd.weight", bytearray(files[fmt].read_bytes())
    t = gguf_header.read(files[fmt]).tensors[stored]
    raw[t.start + t.size // 2 + byte] ^= bit  # of the first block of the middle row
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=f"{stored} came back with a block in .* row 256 "):
        verify_gguf.verify(tmp_path / "bad.gguf", weights_of(WIDE))


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16"])
def test_one_changed_bit_of_a_plain_type_is_found(files, fmt, tmp_path):
    raw = bytearray(files[fmt].read_bytes())
    t = gguf_header.read(files[fmt]).tensors["blk.1.ffn_down.weight"]
    raw[t.start] ^= 1
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match="blk.1.ffn_down.weight came back with 1 values that are"):
        verify_gguf.verify(tmp_path / "bad.gguf", weights_of(WIDE))


def test_a_scale_that_is_no_number_is_found(files, tmp_path):
    raw = bytearray(files["q8_0"].read_bytes())
    t = gguf_header.read(files["q8_0"]).tensors["blk.0.attn_v.weight"]
    raw[t.start : t.start + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match="blk.0.attn_v.weight came back nan% off in Q8_0"):
        verify_gguf.verify(tmp_path / "bad.gguf", weights_of(WIDE))


def test_missing_and_surplus_tensors_are_named(files):
    with pytest.raises(ValueError, match=r"1 tensors missing or surplus: \['model.norm.weight'\]"):
        verify_gguf.verify(
            files["f32"], [w for w in weights_of(WIDE) if "model.norm" not in w.name]
        )


def test_a_vocabulary_of_another_length_is_found(files, tmp_path):
    raw, key = files["f32"].read_bytes(), b"tokenizer.ggml.tokens"
    other = raw.replace(key, b"tokenizer.ggml.t0kens")
    assert other != raw
    (tmp_path / "bad.gguf").write_bytes(other)
    with pytest.raises(ValueError, match="0 tokens, token_embd.weight has 512 rows"):
        verify_gguf.verify(tmp_path / "bad.gguf", weights_of(WIDE))


def normal(scale=0.02):
    return np.random.default_rng(0).normal(0, scale, (256, 256)).astype(np.float32)


def outlier_row():
    w = normal()
    w[3] *= 1000
    return w


def outlier_column():
    w = normal()
    w[:, 5] *= 300
    return w


def nearly_zero_rows():
    w = normal()
    w[:128] *= 1e-4
    return w


def half_steps():
    """One large value in each block of 32, the others midway between two of Q5_0's."""
    w = np.sign(normal()) / 32
    w[:, ::32] = 1
    return w


HARD = {
    "all zero": lambda: np.zeros((256, 256), np.float32),
    "outlier row": outlier_row,
    "outlier column": outlier_column,
    "nearly zero rows": nearly_zero_rows,
    "half steps": half_steps,
    "heavy tails": lambda: np.random.default_rng(1).standard_t(2, (256, 256)).astype(np.float32),
    "one sign": lambda: np.full((256, 256), 0.37, np.float32),
    "sparse": lambda: normal() * (normal(1.0) > 2.5),
}


@pytest.mark.parametrize("kind", verify_gguf.BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("source", HARD)
def test_weights_that_are_hard_to_round_pass(kind, source):
    error, block, bound = rounded(HARD[source](), kind)
    assert error <= bound and block.excess <= 0


@pytest.mark.parametrize("kind", verify_gguf.BLOCKS, ids=lambda kind: kind.name)
def test_normal_weights_stay_below_the_usual_error_and_half_as_much_is_usual(kind):
    error, block, bound = rounded(normal(), kind)
    assert bound == gguf_blocks.ERROR[kind] and 0.5 * bound < error < bound
    assert -0.9 * block.bound < block.excess < 0


def rounded(w, kind):
    """(error, worst block, bound) of a matrix rounded to a type and back."""
    back = gguf_blocks.decode(gguf_blocks.encode(w, kind), kind).reshape(w.shape)
    pieces = [(np.arange(len(w)), back)]
    error, block, _ = verify_gguf._compared(pieces, w, kind)
    return error, block, verify_gguf.bound_of(error, w, kind)


def test_a_file_of_a_hard_tensor_is_written_and_said_to_round_worse(tmp_path):
    weights = changed(UP, outlier_column())
    report = written(tmp_path / "model.gguf", WIDE, "q8_0", weights=weights)
    row = report.rounding["Q8_0"]
    assert row["tensor"] == "blk.0.ffn_up.weight" and 0.008 < row["error"] < row["bound"] < 0.032
    assert any("blk.0.ffn_up.weight 1." in note for note in report.notes)
