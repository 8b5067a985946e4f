"""NF4 files: those of bitsandbytes and transformers read and written; ours loaded there."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_nf4 import DTYPES, compiled, draw, their_values, wide

from bridge import bnb_nf4


def file_of(theirs, double, storage=torch.uint8):
    """The tensors that bitsandbytes would save for a weight named P."""
    packed, state = bnb.quantize_4bit(theirs, None, None, 64, double, "nf4", storage)
    as_numpy = lambda t: t.view(torch.uint8).numpy() if t.dtype == storage else t.numpy()
    tensors = {"P": packed, **{f"P.{k}": v for k, v in state.as_dict(packed=True).items()}}
    return {name: as_numpy(t) for name, t in tensors.items()}, packed, state


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 200), (64, 64), (3, 7)])
def test_a_file_of_bitsandbytes_is_read_and_written_unchanged(shape, dtype, double):
    stored, packed, state = file_of(draw(shape, dtype)[1], double)
    assert bnb_nf4.is_nf4(stored, "P") and not bnb_nf4.is_nf4(stored, "Q")
    assert {"P", *bnb_nf4.members(stored, "P")} == stored.keys()
    leaf = bnb_nf4.parts(stored.__getitem__, "P", stored)
    assert bnb_nf4.state(stored.__getitem__, "P").matrix == leaf.shape == shape
    np.testing.assert_array_equal(wide(leaf.dequantize()), their_values(packed, state))
    same_tensors(bnb_nf4.tensors("P", leaf), stored)
    on_device = jax.tree.map(jnp.asarray, leaf)
    same_tensors(bnb_nf4.tensors("P", on_device), stored)


@pytest.mark.parametrize("storage", ["bfloat16", "float32", "int8"])
def test_bytes_stored_as_another_dtype_are_the_same_bytes(storage):
    theirs = draw((64, 64), "bfloat16")[1]
    stored, _, _ = file_of(theirs, True)
    packed = bnb.quantize_4bit(theirs, None, None, 64, True, "nf4", getattr(torch, storage))[0]
    assert packed.dtype != torch.uint8
    viewed = stored | {"P": packed.view(torch.uint8).numpy().view(jnp.dtype(storage))}
    leaf = bnb_nf4.parts(viewed.__getitem__, "P", viewed)
    same_tensors(bnb_nf4.tensors("P", leaf), stored)


def with_state(stored, **changed):
    key = f"P.{bnb_nf4.STATE}"
    raw = json.loads(stored[key].tobytes()) | changed
    return stored | {key: np.frombuffer(json.dumps(raw).encode(), np.uint8)}


BROKEN = {
    "fp4": (
        lambda s: s | {"P.quant_state.bitsandbytes__fp4": s[f"P.{bnb_nf4.STATE}"]},
        ["fp4"],
    ),
    "missing": (
        lambda s: {"P": s["P"], "P.nested_absmax": s["P.nested_absmax"]},
        ["P.absmax is missing", "P.quant_map is missing", "nested_quant_map is missing", "quant_s"],
    ),
    "no json": (lambda s: s | {f"P.{bnb_nf4.STATE}": np.zeros(3, np.uint8)}, ["holds no JSON"]),
    "other numbers": (
        lambda s: with_state(s, blocksize=48, quant_type="nf5", dtype="int8", shape=[64]),
        ["blocksize is 48", "quant_type is 'nf5'", "dtype is 'int8'", r"shape is \[64\]"],
    ),
    "nested numbers": (
        lambda s: with_state(s, nested_blocksize=7, nested_dtype="float16", nested_offset="x"),
        ["nested_blocksize is 7", "nested_dtype is 'float16'", "nested_offset is 'x'"],
    ),
    "misshapen": (
        lambda s: s | {k: s[k][:-1] for k in ("P", "P.absmax", "P.nested_absmax", "P.quant_map")},
        ["2047 packed bytes", r"absmax is uint8 \(63,\)", r"quant_map is float32 \(15,\)"],
    ),
    "plain among nested": (
        lambda s: s | {"P.absmax": s["P.absmax"].astype(np.float32)},
        [r"absmax is float32 \(64,\), expected uint8"],
    ),
    "half nested": (
        lambda s: {k: v for k, v in s.items() if "nested" not in k},
        ["the tensors beside it say False"],
    ),
    "another code book": (
        lambda s: s | {"P.quant_map": s["P.quant_map"] * np.float32(1.01)},
        ["quant_map is .*expected NF4's"],
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_with_everything_wrong_in_one_error(kind):
    change, messages = BROKEN[kind]
    stored = change(file_of(draw((64, 64), "float32")[1], True)[0])
    with pytest.raises(ValueError) as error:
        bnb_nf4.parts(stored.__getitem__, "P", stored)
    for message in messages:
        assert error.match(message)


def test_a_state_that_is_not_there_and_a_stack_are_refused():
    with pytest.raises(ValueError, match="quant_state.bitsandbytes__nf4 is missing"):
        bnb_nf4.state({}.__getitem__, "P")
    with pytest.raises(ValueError, match="one by one"):
        bnb_nf4.tensors("P", compiled(jnp.ones((2, 3, 64))))


# One process of transformers: a checkpoint in 16 or 32 bits, its 4-bit save, and ours.


def config(double, skip=("lm_head",)):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=list(skip),
    )


@pytest.fixture(scope="module", params=[("float32", False), ("bfloat16", True), ("float16", True)])
def saved(request, tmp_path_factory):
    """(float folder, transformers' 4-bit folder, dtype, double) of a tiny Llama."""
    dtype, double = request.param
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))
    plain, four = (tmp_path_factory.mktemp(f"{name}-{dtype}") for name in ("plain", "four"))
    model.to(getattr(torch, dtype)).save_pretrained(plain)
    opened(plain, dtype, quantization_config=config(double)).save_pretrained(four)
    return plain, four, dtype, double


def opened(folder, dtype, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map="cpu", **options
        )


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits.float().numpy()


def test_transformers_four_bit_folder_is_read_and_written_unchanged(saved):
    _, four, dtype, double = saved
    stored = load_file(four / "model.safetensors")
    modules = dict(opened(four, dtype).named_modules())
    names = [n for n in stored if bnb_nf4.is_nf4(stored, n)]
    assert len(names) == 14
    written = {n: t for n, t in stored.items() if not n.startswith(tuple(names))}
    for name in names:
        leaf = bnb_nf4.parts(stored.__getitem__, name, stored)
        assert leaf.dtype == dtype and (leaf.offset is not None) == double
        weight = modules[name.removesuffix(".weight")].weight
        theirs = bnb.dequantize_4bit(weight.data, weight.quant_state).float().numpy()
        np.testing.assert_array_equal(wide(leaf.dequantize()), theirs)
        written |= bnb_nf4.tensors(name, leaf)
    same_tensors(written, stored)


def test_our_four_bit_folder_loads_in_transformers_with_the_logits_of_its_own(saved, tmp_path):
    plain, four, dtype, double = saved
    theirs = load_file(four / "model.safetensors")
    ours = {}
    with safe_open(plain / "model.safetensors", "numpy") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            packed = bnb_nf4.is_nf4(theirs, name)
            leaf = compiled(jnp.asarray(tensor), double=double) if packed else None
            ours |= bnb_nf4.tensors(name, leaf) if packed else {name: tensor}
    assert ours.keys() == theirs.keys()
    save_file(ours, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((plain / "config.json").read_text())
    raw["quantization_config"] = bnb_nf4.quantization_config(["lm_head"], "float32", double)
    assert raw["quantization_config"] == config(double).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    got, want = logits(opened(tmp_path, dtype)), logits(opened(four, dtype))
    if not double:
        same_tensors(ours, theirs)
        np.testing.assert_array_equal(got, want)
    # Nested codes may differ by one, where the library rounds to its grid.
    assert np.abs(got - want).max() <= 2e-3 * want.std()
    assert np.abs(want - logits(opened(plain, dtype))).max() > 0.05 * want.std()


def test_quantization_config_knows_its_dtypes():
    with pytest.raises(ValueError, match="unknown compute dtype 'int8'"):
        bnb_nf4.quantization_config([], "int8")
