"""int8 weights: bytes, values, products and gradients; files of bitsandbytes and transformers."""

import inspect
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_chat
import torch
import transformers
from bitsandbytes import functional as bnb
from safetensors.numpy import load_file, save_file

from bridge import bnb_int8, hf
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, decoder, leaves, lora, quant, tree
from unsloth_jax.leaves import Lora, Quantized, Stacks, View
from unsloth_jax.quant import int8
from unsloth_jax.quant.int8 import Int8
from unsloth_jax.remat import KEPT, Memory
from workflows import plan, saving

DTYPES = ("float32", "bfloat16", "float16")
compiled = quant.FORMATS["int8"]


def halves(rows: int, width: int) -> np.ndarray:
    """Rows whose scaled values lie halfway between two codes, times powers of two."""
    rng = np.random.default_rng(1)
    codes = np.concatenate(
        [np.full((rows, 1), 127.0), rng.integers(-126, 126, (rows, width)) + 0.5], 1
    )
    return codes * 2.0 ** rng.integers(-18, 5, (rows, 1))


DRAWN = {
    "normal": lambda rng: rng.normal(size=(512, 1024)) * 0.02,
    "uniform": lambda rng: rng.uniform(-1, 1, size=(512, 1024)),
    "halfway": lambda rng: halves(64, 63),
    "subnormal in float16": lambda rng: rng.normal(size=(64, 256)) * 1e-7,
    "narrow": lambda rng: rng.normal(size=(3, 7)),
    "rows of zeros": lambda rng: rng.normal(size=(8, 64)) * (np.arange(8) % 2)[:, None],
}


def draw(kind: str, dtype: str):
    """(ours, bitsandbytes' input) of the same numbers."""
    theirs = torch.tensor(DRAWN[kind](np.random.default_rng(0))).to(getattr(torch, dtype))
    return jnp.asarray(theirs.float().numpy()).astype(dtype), theirs


def packed(seed: int = 0, *shape: int, dtype: str = "float32") -> Int8:
    w = np.random.default_rng(seed).normal(size=shape or (48, 96))
    return compiled(jnp.asarray(w, jnp.float32), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DRAWN)
def test_bytes_and_values_are_bitsandbytes_own(kind, dtype):
    ours, theirs = draw(kind, dtype)
    codes, scales, _ = bnb.int8_vectorwise_quant(theirs.to(torch.float16))
    values = bnb.int8_vectorwise_dequant(codes, scales)
    for leaf in (compiled(ours), int8.quantize(ours)):
        np.testing.assert_array_equal(leaf.codes, codes.numpy())
        np.testing.assert_array_equal(leaf.absmax, scales.numpy())
        assert leaf.dtype == dtype and leaf.dequantize().dtype == dtype
        for read in (Int8.dequantize, jax.jit(Int8.dequantize)):
            np.testing.assert_array_equal(read(leaf.replace(dtype="float32")), values.numpy())
        want = values.to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(leaf.dequantize().astype(jnp.float32), want)


def test_an_error_is_at_most_half_a_step_of_its_row():
    w = np.random.default_rng(3).normal(size=(64, 128)).astype(np.float16)
    leaf = compiled(jnp.asarray(w), dtype="float32")
    step = np.abs(w.astype(np.float64)).max(1, keepdims=True) / 127
    assert (np.abs(leaf.dequantize() - w) <= 0.5001 * step).all()
    assert {type(leaf), isinstance(leaf, Quantized)} == {Int8, True}


def test_a_stack_is_its_matrices_and_keeps_their_axes():
    stack = packed(1, 3, 2, 16, 32)
    assert stack.shape == (3, 2, 16, 32) and stack.absmax.shape == (3, 2, 16)
    one = leaves.layer(leaves.layer(stack, 2), jnp.int32(1))
    np.testing.assert_array_equal(one.dequantize(), stack.dequantize()[2, 1])
    with pytest.raises(ValueError, match=r"one matrix, got the stack \(3, 2, 16, 32\)"):
        stack.matmul(jnp.ones((1, 32)))


@pytest.mark.parametrize(
    "w, dtype",
    [(jnp.ones(4), None), (jnp.ones((2, 4), jnp.int8), None), (jnp.ones((2, 4)), "int8")],
)
def test_what_is_no_float_matrix_is_refused(w, dtype):
    quantize = inspect.unwrap(int8.quantize)  # without the tests' own checks of annotations
    with pytest.raises(ValueError, match=r"int8 takes matrices in .*, got \w+ of shape"):
        quantize(w, dtype)


def exact(leaf: Int8) -> np.ndarray:
    """The weight in float64 by its definition."""
    return np.asarray(leaf.codes, np.float64) * np.asarray(leaf.absmax, np.float64)[:, None] / 127


# Of the largest value: float32 sums, and one rounding of the result in 16 bits.
BOUND = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)])
def test_a_product_and_its_gradient_are_those_of_the_exact_weight(shape, dtype):
    leaf, rng = packed(2, 48, 96, dtype=dtype), np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    y, back = jax.vjp(leaf.matmul, x)
    want = np.asarray(x, np.float64) @ exact(leaf).T
    assert y.dtype == dtype and np.abs(y - want).max() <= BOUND[dtype] * np.abs(want).max()
    dy = jnp.asarray(rng.normal(size=y.shape), dtype)
    (dx,) = back(dy)
    want = np.asarray(dy, np.float64) @ exact(leaf)
    # The weight is rounded too, so that cotangents stay in float16's range.
    assert dx.dtype == dtype and np.abs(dx - want).max() <= 2 * BOUND[dtype] * np.abs(want).max()


def test_small_cotangents_survive_float16():
    leaf = packed(5, 48, 96, dtype="float16")
    leaf = leaf.replace(absmax=leaf.absmax * 1e-3)
    dy = jnp.full((1, 48), 2e-5, jnp.float16)
    (dx,) = jax.vjp(leaf.matmul, jnp.ones((1, 96), jnp.float16))[1](dy)
    want = np.asarray(dy, np.float64) @ exact(leaf)
    assert np.abs(want).max() > 1e-7 and np.abs(dx - want).max() < 6e-8


def test_codes_and_scales_get_no_gradient_and_adapters_get_theirs():
    base, rng = packed(6), np.random.default_rng(7)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 96), (48, 4)))
    x = jnp.asarray(rng.normal(size=(5, 96)), jnp.float32)

    def through(base):
        def loss(a, b):
            leaf = Lora(base, a, b, jnp.float32(0.7))
            return (leaves.linear({"weight": leaf}, x) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1))(a, b)

    got, want = through(base), through(jnp.asarray(exact(base), jnp.float32))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-3), got, want)
    scales = jax.grad(lambda s: base.replace(absmax=s).matmul(x).sum())(base.absmax)
    assert not scales.any()


# One model: its layers in int8, in one stack or mixed with 16 bits.

ROWS = [tiny.draw(1, 9), tiny.draw(2, 6)]


def in_int8(name="llama"):
    p = tiny.pair(name)
    return p, quant.quantize(p.params, "int8", hf.is_linear)


def plain(params):
    """Every leaf dequantized."""
    dense = lambda _, leaf: leaves.map_stacks(leaves.dense, leaf)
    return tree.map_paths(dense, params)


def scores(p, params, tokens, positions, segments):
    return np.asarray(tiny.logits(p.family, p.config, params, tokens, positions, segments))


def packed_row():
    """Two documents in one row, and each in a row of its own."""
    length = sum(map(len, ROWS))
    tokens = jnp.asarray([ROWS[0] + ROWS[1]], jnp.int32)
    positions = jnp.asarray([[*range(len(ROWS[0])), *range(len(ROWS[1]))]], jnp.int32)
    segments = jnp.asarray([[1] * len(ROWS[0]) + [2] * len(ROWS[1])], jnp.int32)
    assert tokens.shape == (1, length)
    return (tokens, positions, segments), tiny.padded(ROWS, length)


def test_packed_rows_equal_separate_rows_and_the_dequantized_model():
    p, params = in_int8()
    row, alone = packed_row()
    got, rows = scores(p, params, *row)[0], scores(p, params, *alone)
    parts = np.concatenate([rows[0, : len(ROWS[0])], rows[1, : len(ROWS[1])]])
    np.testing.assert_allclose(got, parts, atol=2e-5 * parts.std())
    want = scores(p, plain(params), *row)[0]
    assert np.abs(got - want).max() <= 1e-4 * want.std()
    assert np.abs(scores(p, p.params, *row)[0] - want).max() > 1e-3 * want.std()
    assert quant.stored(params) == "int8" and quant.stored(plain(params)) is None


def test_layers_of_two_kinds_and_views_of_a_stack_are_read_by_number():
    p, params = in_int8()
    path = "model.layers.*.mlp.up_proj.weight"
    flat = tree.flatten(params)
    whole = flat[path]
    kinds = Stacks((View(whole, (0, 2)), whole.dequantize()[1:2]), ((0, 2), (1,)))
    mixed = tree.unflatten(flat | {path: kinds})
    row, _ = packed_row()
    want = scores(p, params, *row)
    np.testing.assert_allclose(scores(p, mixed, *row), want, atol=1e-4 * want.std())


@pytest.mark.parametrize("keep", [k for k in KEPT if k != "offload"])
def test_no_plan_of_training_keeps_codes_layer_by_layer(keep):
    p, params = in_int8()
    row, _ = packed_row()
    adapters = lora.init(jax.random.key(0), params, 4)
    stacks = {leaf.codes.shape for leaf in tree.flatten(params).values() if type(leaf) is Int8}

    def loss(adapters):
        hidden = decoder.forward(p.family, p.config, lora.attach(params, adapters, 1.0), *row,
                                 memory=Memory(keep))  # fmt: skip
        return (hidden**2).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters)
    found = set()
    for eqn in every(jaxpr.jaxpr):
        made = [v.aval for v in eqn.outvars if getattr(v.aval, "dtype", None) == jnp.int8]
        found |= {aval.shape for aval in made}
        wide = [v.aval.shape for v in eqn.outvars if eqn.primitive.name == "convert_element_type"]
        assert not stacks & set(wide), "a stack was widened"
    assert found and not stacks & found, "a stack of codes was made again"


def every(jaxpr):
    """All equations, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from every(inner)


# Files.


def tensors_of(theirs: torch.Tensor) -> dict[str, np.ndarray]:
    codes, scales, _ = bnb.int8_vectorwise_quant(theirs.to(torch.float16))
    found = {"m.weight": codes.numpy(), "m.SCB": scales.numpy()}
    return found | {"m.weight_format": np.array(0, np.uint8)}


def read(stored, dtype="float32"):
    return bnb_int8.parts(stored.__getitem__, "m.weight", stored, dtype)


def test_tensors_are_read_and_written_unchanged():
    stored = tensors_of(draw("normal", "bfloat16")[1])
    assert bnb_int8.is_int8(stored, "m.weight") and not bnb_int8.is_int8(stored, "m.SCB")
    written = bnb_int8.tensors("m.weight", jax.tree.map(jnp.asarray, read(stored)))
    assert written.keys() == stored.keys()
    for name, value in stored.items():
        assert (written[name].dtype, written[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(written[name], value)
    with pytest.raises(ValueError, match="one by one"):
        bnb_int8.tensors("m.weight", packed(0, 2, 4, 8))


BROKEN = {
    "no scales": (lambda t: {k: v for k, v in t.items() if k != "m.SCB"}, "m.SCB is missing"),
    "scales of another shape": (
        lambda t: t | {"m.SCB": t["m.SCB"][:-1]}, r"SCB is float32 \(511,\), expected .*\(512,\)",
    ),
    "scales in 16 bits": (
        lambda t: t | {"m.SCB": t["m.SCB"].astype(np.float16)}, "SCB is float16 .*expected float32",
    ),
    "negative scales": (lambda t: t | {"m.SCB": -t["m.SCB"]}, "SCB holds negative numbers"),
    "float codes": (
        lambda t: t | {"m.weight": t["m.weight"].astype(np.float32)},
        r"it is float32 \(512, 1024\), expected int8",
    ),
    "another layout": (
        lambda t: t | {"m.weight_format": np.array(2, np.uint8)},
        "weight_format is 2, expected 0, rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_tensors_are_refused_by_what_is_wrong(kind):
    change, message = BROKEN[kind]
    stored = change(tensors_of(draw("normal", "float32")[1]))
    with pytest.raises(ValueError, match=f"(?s)m.weight is no readable int8 weight.*{message}"):
        read(stored)


def opened(folder, dtype="float32", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(
            folder, dtype=getattr(torch, dtype), device_map="cpu", attn_implementation="eager",
            **options,
        )  # fmt: skip


def eight_bits():
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("plain") / "tiny")


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' own 8-bit save of the same model."""
    place = folder.parent / "eight"
    opened(folder, "bfloat16", quantization_config=eight_bits()).save_pretrained(place)
    for name in tiny_chat.TOKENIZER_FILES:
        shutil.copyfile(folder / name, place / name)
    return place


@pytest.fixture
def copy(theirs, tmp_path):
    return shutil.copytree(theirs, tmp_path / "copy")


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def the_leaves(params):
    return {p: leaf for p, leaf in tree.flatten(params).items() if type(leaf) is Int8}


def test_loading_in_8_bits_packs_what_transformers_packs_to_the_same_bytes(folder, theirs):
    ours = the_leaves(hf.load(SafetensorsSource(folder), quantize="int8")[2])
    files = load_file(theirs / "model.safetensors")
    assert len(ours) == 7 and sum(n.endswith("SCB") for n in files) == 7 * tiny_chat.LAYERS
    for path, leaf in ours.items():
        for i in range(tiny_chat.LAYERS):
            name = path.replace("*", str(i))
            np.testing.assert_array_equal(leaf.codes[i], files[name])
            np.testing.assert_array_equal(leaf.absmax[i], files[bnb_int8.scale_of(name)])


def test_transformers_8_bit_folder_is_taken_as_it_is(folder, theirs):
    family, c, params = hf.load(SafetensorsSource(theirs), jnp.float32, "int8")
    packed_here = hf.load(SafetensorsSource(folder), jnp.float32, "int8")[2]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params, packed_here)
    assert jax.tree.all(same) and len(the_leaves(params)) == 7
    assert {leaf.dtype for leaf in the_leaves(params).values()} == {"float32"}
    # Activations in 8 bits are transformers' way: its own dequantized weights are the oracle.
    model = opened(theirs).dequantize(torch.float32).float()
    rows = [tiny.draw(1, 12, tiny_chat.VOCAB)]
    want = their_logits(model, rows)
    got = tiny.logits(family, c, params, *tiny.padded(rows, 12))
    assert np.abs(got - want).max() <= 1e-4 * want.std()
    for keep, dtype in ((None, None), ("nf4", None), (None, jnp.float32)):
        found = hf.load(SafetensorsSource(theirs), dtype, keep)[2]
        assert quant.stored(found) == ("int8" if keep else None)
    read16 = tree.flatten(hf.load(SafetensorsSource(theirs))[2])
    assert read16["model.layers.*.mlp.up_proj.weight"].dtype == jnp.bfloat16


def test_what_we_write_is_read_by_transformers_with_its_own_logits(folder, theirs, tmp_path):
    files = load_file(theirs / "model.safetensors")
    stacks = the_leaves(hf.load(SafetensorsSource(folder), quantize="int8")[2])
    ours = load_file(folder / "model.safetensors")
    for path, leaf in stacks.items():
        for i in range(tiny_chat.LAYERS):
            name = path.replace("*", str(i))
            ours |= bnb_int8.tensors(name, leaves.layer(leaf, i))
    assert ours.keys() == files.keys()
    save_file(ours, tmp_path / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = eight_bits().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rows = [tiny.draw(1, 12, tiny_chat.VOCAB)]
    got, want = (their_logits(opened(place), rows) for place in (tmp_path, theirs))
    np.testing.assert_array_equal(got, want)


FAMILIES = [
    name if name == "llama" else pytest.param(name, marks=pytest.mark.slow)
    for name in tiny.EACH.values()
]


def dequantized(folder, name):
    """The torch model of an 8-bit folder, its layers as transformers dequantizes them."""
    if name != "llama4_text":
        return opened(folder).dequantize(torch.float32).float()
    # transformers opens none of Llama 4: it looks for a module for each expert, which it
    # does not write. Its formula for one layer is applied to the file instead.
    stored = load_file(folder / "model.safetensors")
    scales = {key: stored.pop(key) for key in [k for k in stored if k.endswith(".SCB")]}
    weights = {k: torch.tensor(w) for k, w in stored.items() if not k.endswith("weight_format")}
    for key, scale in scales.items():
        path = key.removesuffix("SCB") + "weight"
        weights[path] = bnb.int8_vectorwise_dequant(weights[path], torch.tensor(scale))
    model = tiny.reference(name)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys and scales
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_8_bit_folder_of_each_family_gives_its_dequantized_logits(name, tmp_path):
    tiny.reference(name).save_pretrained(tmp_path / "plain")
    how = dict(quantization_config=eight_bits())
    opened(tmp_path / "plain", **how).save_pretrained(tmp_path / "eight")
    source = SafetensorsSource(tmp_path / "eight")
    family, c, params = hf.load(source, jnp.float32, "int8")
    # Experts are no modules of transformers' and stay as they are in its files.
    linear = {p for p in family.weights(c) if hf.is_linear(p) and ".experts." not in p}
    parts = {p: leaf.parts if isinstance(leaf, Stacks) else (leaf,)
             for p, leaf in tree.flatten(params).items()}  # fmt: skip
    assert {p for p, of in parts.items() if type(of[0]) is Int8} == linear and len(linear) >= 4
    rows = [tiny.draw(1, 20)]
    want = their_logits(dequantized(tmp_path / "eight", name), rows)
    got = tiny.logits(family, c, params, *tiny.padded(rows, 20))
    assert np.abs(got - want).max() <= 1e-4 * want.std()
    plainly = their_logits(opened(tmp_path / "plain"), rows)
    assert np.abs(plainly - want).max() > 1e-3 * want.std()


def changed(folder, change):
    """The folder with its tensors changed in place."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return SafetensorsSource(folder)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("keep", ["int8", None])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v for k, v in t.items() if UP not in k or k.endswith("weight")},
         f"{UP}.weight has dtype int8, expected a float, .* or int8 rows with their SCB"),
        (lambda t: {k: v for k, v in t.items() if k != f"{UP}.weight"}, f"missing {UP}.weight"),
        (lambda t: t | {f"{UP}.SCB": t[f"{UP}.SCB"] * np.float32(np.nan)}, f"{UP}.* not finite"),
        (lambda t: t | {f"{UP}.weight_format": np.array(1, np.uint8)}, f"{UP}.weight_format is 1"),
        (lambda t: t | {f"{UP}.weight": t[f"{UP}.weight"][:, :-1]}, f"{UP}.weight has shape"),
    ],
    ids=["no SCB", "no weight", "NaN", "layout", "shape"],
)  # fmt: skip
def test_a_malformed_checkpoint_is_refused_by_name(copy, change, message, keep):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        hf.load(changed(copy, change), quantize=keep)


def test_values_that_float16_does_not_hold_are_refused_by_name(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")

    def grown(t):
        t[f"{UP}.weight"][3, 5] = 7e4
        return t

    source = changed(copy, grown)
    with pytest.raises(ValueError, match=f"{UP}.weight holds values over 65504.*load_in_16bit"):
        hf.load(source, quantize="int8")
    assert quant.stored(hf.load(source, quantize="nf4")[2]) == "nf4"


# The face.


def load8(folder, **options):
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype="float32", load_in_8bit=True, **options
    )


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A model in 8 bits, trained for three steps."""
    model, tokenizer = load8(folder)
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    out = str(tmp_path_factory.mktemp("out"))
    args = SFTConfig(output_dir=out, max_steps=3, learning_rate=1e-2, packing=True, logging_steps=1,
                     per_device_train_batch_size=2)  # fmt: skip
    trainer = SFTTrainer(
        model, processing_class=tokenizer, train_dataset=tiny_chat.TEXTS, args=args
    )
    trainer.train()
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_load_in_8bit_alone_trains_and_answers(folder, trained):
    model, losses = trained
    assert model.stored == "int8" and model.quantized and losses[-1] < losses[0]
    dense = FastLanguageModel.from_pretrained(str(folder), 128, "float32", load_in_16bit=True)[0]
    assert dense.stored is None
    prompt = [tiny.draw(5, 7, tiny_chat.VOCAB)]
    answers = [
        model.generate(prompt, max_new_tokens=8, weights=w) for w in ("stored", "materialized")
    ]
    np.testing.assert_array_equal(*answers)
    np.testing.assert_array_equal(
        model.generate(prompt, max_new_tokens=8)[0, 7:8], model(answers[0][:, :7])[:, -1].argmax(-1)
    )


@pytest.mark.parametrize(
    "given, stored",
    [
        (dict(load_in_8bit=True), "int8"),
        (dict(load_in_8bit=True, load_in_4bit=False), "int8"),
        (dict(load_in_8bit=False), "nf4"),
        (dict(load_in_16bit=True), None),
        (dict(load_in_16bit=True, load_in_8bit=False, load_in_4bit=False), None),
        (dict(load_in_4bit=False), None),
        (dict(load_in_8bit=True, full_finetuning=True), None),
    ],
    ids=str,
)
def test_each_width_gives_its_format(folder, given, stored):
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, **given)
    # Weights that are all trained are not in `params`.
    assert model.stored == stored == quant.stored(model.params)


def test_a_checkpoints_own_format_goes_before_the_one_asked_for_and_is_told(theirs, capsys):
    four, _ = FastLanguageModel.from_pretrained(str(theirs), 64)
    assert four.stored == "int8"
    assert f"{theirs} is stored as int8: its weights are taken as they are, not as nf4" in (
        capsys.readouterr().out
    )
    dense, _ = FastLanguageModel.from_pretrained(str(theirs), 64, load_in_16bit=True)
    assert dense.stored is None
    assert f"{theirs} is stored as int8: its weights are dequantized" in capsys.readouterr().out


def merged_tensors(place):
    return load_file(place / "model.safetensors")


def test_a_merge_names_its_base_and_adds_to_it(folder, trained, tmp_path, capsys):
    model = trained[0]
    facts = model.save_pretrained_merged(tmp_path / "a")
    assert facts["base"] == "original16" and "base_error_over_delta" in facts
    assert "8-bit error over delta" in capsys.readouterr().out
    own = model.save_pretrained_merged(tmp_path / "b", base="dequant8")
    assert own["base"] == "dequant8" and "base_error_over_delta" not in own
    with pytest.raises(ValueError, match="base must be one of .*dequant8.*got 'dequant4'"):
        model.save_pretrained_merged(tmp_path / "c", base="dequant4")
    adapted, name = tree.flatten(model.adapted()), f"{UP}.weight"
    want = leaves.dense(leaves.layer(adapted["model.layers.*.mlp.up_proj.weight"], 1))
    np.testing.assert_array_equal(
        merged_tensors(tmp_path / "b")[name], np.asarray(want.astype(jnp.bfloat16))
    )
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "quantization_config" not in config
    assert load8(tmp_path / "b")[0].stored == "int8"


def test_a_prequantized_base_is_merged_from_its_own_rows(theirs, tmp_path):
    model, _ = load8(theirs)
    FastLanguageModel.get_peft_model(model, r=4)
    facts = model.save_pretrained_merged(tmp_path / "m")
    assert facts["base"] == "dequant8"
    assert facts["config_changes"].keys() == {"quantization_config"}
    files, scales = merged_tensors(theirs), f"{UP}.SCB"
    values = bnb.int8_vectorwise_dequant(
        torch.tensor(files[f"{UP}.weight"]), torch.tensor(files[scales])
    )
    np.testing.assert_array_equal(
        merged_tensors(tmp_path / "m")[f"{UP}.weight"].astype(np.float32),
        values.to(torch.bfloat16).float().numpy(),
    )


def test_adapters_and_gguf_files_are_written_from_8_bits(trained, tmp_path):
    model = trained[0]
    model.save_pretrained(tmp_path / "lora")
    again, _ = load8(tmp_path / "lora")
    prompt = [tiny.draw(6, 9, tiny_chat.VOCAB)]
    assert again.stored == "int8"
    np.testing.assert_array_equal(again(prompt), model(prompt))
    facts = saving.gguf(model, tmp_path / "gguf", None, ["q8_0"], "dequant8", False, False)
    assert facts["base"] == "dequant8" and (tmp_path / "gguf" / "model.Q8_0.gguf").exists()
    read8, _ = load8(tmp_path / "gguf" / "model.Q8_0.gguf")
    assert read8.stored == "int8"


def test_starts_and_whole_modules_that_need_16_bits_say_so(folder):
    model, _ = load8(folder)
    with pytest.raises(ValueError, match="is Int8: load with load_in_16bit=True"):
        FastLanguageModel.get_peft_model(model, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="load with load_in_16bit=True"):
        FastLanguageModel.get_peft_model(model, modules_to_save=["up_proj"])


def test_the_memory_plan_counts_a_byte_a_weight(folder, monkeypatch):
    fields = json.loads((folder / "config.json").read_text())
    made = hf.load(SafetensorsSource(folder), jnp.bfloat16, "int8")[2]
    sizes = {fmt: plan.plan.size(plan.shapes(fields, jnp.bfloat16, fmt)[2])
             for fmt in (None, "int8", "nf4")}  # fmt: skip
    assert sizes["int8"] == sum(x.nbytes for x in jax.tree.leaves(made))
    packed_numbers = sum(leaf.codes.size for leaf in the_leaves(made).values())
    rows = sum(leaf.absmax.size for leaf in the_leaves(made).values())
    assert sizes[None] - sizes["int8"] == packed_numbers - 4 * rows
    assert sizes["nf4"] < sizes["int8"] < sizes[None]
    monkeypatch.setattr(plan.machine, "device_free", lambda: sizes["int8"] - 1)
    with pytest.raises(MemoryError, match="load_in_4bit=True takes about a half"):
        load8(folder, device_map="cpu")
    a = plan.arguments([str(folder), "--load-in-8bit"])
    job, _ = plan.asked_job(a)
    assert quant.stored(job.params) == "int8"
    with pytest.raises(SystemExit):
        plan.arguments([str(folder), "--load-in-8bit", "--load-in-16bit"])


def test_fp8_products_are_refused_for_int8(folder):
    with pytest.raises(ValueError, match="no stacks of NF4 weights"):
        quant.matmul_in(load8(folder)[0].params, "fp8_backward", emulate=True)
