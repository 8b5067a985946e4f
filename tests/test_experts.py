"""Mixtures of experts: products by group, what files hold of them, and their balance."""

import json

import bitsandbytes
import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import safetensors.torch
import tiny
import tiny_chat
import torch
import transformers
from adapted import LORA, in_peft, scale

from bridge import bnb_nf4, hf, merge, peft_adapter
from bridge.safetensors_file import SafetensorsSource
from pallas_kernels import _choice
from pallas_kernels import grouped_matmul as kernel
from unsloth_jax import SFTConfig, SFTTrainer, experts, leaves, quant, train
from unsloth_jax.dims import Batch
from unsloth_jax.leaves import Groups, Lora
from workflows import objective

SLOW = pytest.mark.slow
SIZES = {
    "uneven": (3, 0, 70, 1, 26),
    "one holds all": (0, 0, 100, 0, 0),
    "few rows": (1, 0, 0, 2, 0),
    "none at the ends": (0, 17, 64, 16, 0),
}


def drawn(sizes, height=48, width=64, seed=0):
    """(rows, matrices, the group of each row)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(sizes), width)).astype(np.float32)
    w = rng.normal(size=(len(sizes), height, width)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_are_multiplied_with_their_groups_matrix(sizes):
    x, w, ids = drawn(sizes)
    got = kernel.grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(got, np.einsum("ni,noi->no", x, np.asarray(w)[ids]), atol=2e-5)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_of_a_grouped_product(sizes):
    x, w, ids = drawn(sizes)
    dy = np.random.default_rng(1).normal(size=(len(x), w.shape[1])).astype(np.float32)
    counts = jnp.asarray(sizes, jnp.int32)
    _, pull = jax.vjp(lambda x, w: kernel.grouped_matmul(x, w, counts), x, w)
    dx, dw = pull(jnp.asarray(dy))
    np.testing.assert_allclose(dx, np.einsum("no,noi->ni", dy, np.asarray(w)[ids]), atol=2e-5)
    for group in range(len(sizes)):
        want = dy[ids == group].T @ np.asarray(x)[ids == group]
        np.testing.assert_allclose(dw[group], want, atol=2e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_kernel_equals_its_reference(sizes, turned):
    x, w, _ = drawn(sizes, 64, 64)
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    counts = jnp.asarray(sizes, jnp.int32)
    with _choice.target("gpu", interpret=True):
        got = kernel._pallas(x, w, counts, turned)
    want = kernel.reference(x, w, counts, turned)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7, atol=1e-3
    )


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_kernel_of_a_weights_gradient_equals_its_reference(sizes):
    x, w, _ = drawn(sizes, 48, 64)
    x = jnp.asarray(x, jnp.bfloat16)
    dy = jnp.asarray(np.random.default_rng(4).normal(size=(len(x), 48)), jnp.bfloat16)
    counts = jnp.asarray(sizes, jnp.int32)
    with _choice.target("gpu", interpret=True):
        got = kernel._pallas_over(dy, x, counts)
    np.testing.assert_allclose(got, kernel.reference_over(dy, x, counts), rtol=1e-5, atol=1e-4)


def test_tiles_cover_each_row_once_and_no_two_groups():
    sizes = np.array([5, 0, 130, 1, 64])
    group, first, end = map(np.asarray, kernel.tiles(jnp.asarray(sizes), int(sizes.sum()), 64))
    seen = np.full(sizes.sum(), -1)
    for g, start, stop in zip(group, first, end, strict=True):
        rows = np.arange(start, min(start + 64, stop))
        assert (seen[rows] == -1).all()
        seen[rows] = g
    np.testing.assert_array_equal(seen, np.repeat(np.arange(5), sizes))


def test_the_kernel_lowers_for_a_gpu_with_its_gradient():
    x, w, _ = drawn((40, 24), 64, 64)
    x, w, sizes = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), jnp.array([40, 24])
    total = lambda x, w: kernel.grouped_matmul(x, w, sizes).astype(jnp.float32).var()
    with _choice.target("gpu"):
        both = jax.jit(jax.grad(total, (0, 1)))
        text = both.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w: (x.astype(jnp.float32), w), "16 or float16, got float32"),
        (lambda x, w: (x, w[:, :40]), r"sides of 16 n, got \(40, 64\)"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, words):
    x, w, _ = drawn((8, 8), 64, 64)
    x, w = change(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16))
    with _choice.target("gpu"), pytest.raises(ValueError, match=words):
        kernel.grouped_matmul(x, w, jnp.array([8, 8]), "pallas")


def test_adapters_and_quantized_matrices_of_experts_are_what_their_dense_ones_are():
    x, w, ids = drawn((9, 4, 0, 7), 64, 64)
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(4, 3, 64)), rng.normal(size=(4, 64, 3))
    a, b = (jnp.asarray(side, jnp.float32) for side in (a, b))
    packed = quant.FORMATS["nf4"](jnp.asarray(w))
    for base in (jnp.asarray(w), packed):
        leaf = Lora(base, a, b, jnp.arange(1.0, 5.0))
        dense = np.asarray(leaves.dense(leaf))
        for rows in (slice(None), slice(8, 11)):
            sizes = np.bincount(ids[rows], minlength=4)
            groups = Groups(jnp.asarray(ids[rows]), jnp.asarray(sizes, jnp.int32))
            got = leaves.grouped({"weight": leaf}, jnp.asarray(x[rows]), groups)
            want = np.einsum("ni,noi->no", x[rows], dense[ids[rows]])
            np.testing.assert_allclose(got, want, atol=2e-4)


def test_routing_is_in_float32_whatever_the_model_computes_in():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.bfloat16)
    node = {"weight": jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)}
    got = experts.router_scores(node, x)
    want = np.asarray(x, np.float64) @ np.asarray(node["weight"], np.float64).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_chosen_experts_scores_alone_decide_their_weights():
    scores = np.random.default_rng(4).normal(0, 3, (7, 6)).astype(np.float32)
    route = experts.chosen_route(jnp.asarray(scores), 3)
    highest, chosen = torch.topk(torch.tensor(scores), 3, dim=-1)
    np.testing.assert_array_equal(route.experts, chosen.numpy())
    np.testing.assert_allclose(route.weights, highest.softmax(-1).numpy(), atol=1e-7)


def test_routers_stay_in_float32_when_a_checkpoint_is_read_in_16_bits(tmp_path):
    tiny.save(tiny.reference("qwen3_moe"), tmp_path)
    _, _, params = hf.load(SafetensorsSource(tmp_path), dtype=jnp.bfloat16, quantize="nf4")
    mlp = params["model"]["layers"]["*"]["mlp"]
    assert mlp["gate"]["weight"].parts[0].dtype == jnp.float32
    experts_ = mlp["experts"]["*"]["up_proj"]["weight"].parts[0]
    assert isinstance(experts_, quant.nf4.NF4) and experts_.shape == (2, 6, 32, 64)


def test_routers_that_a_file_holds_in_4_bits_are_dequantized(tmp_path):
    """bitsandbytes packs them with everything, being linear modules in transformers."""
    source = SafetensorsSource(tiny.save(tiny.reference("llama4_text"), tmp_path))
    values, wanted = {}, []
    for key in source.headers():
        value = source.read(key)
        if ".router." not in key:
            values[key] = value
            continue
        leaf = quant.nf4.quantize(jnp.asarray(value, jnp.bfloat16))
        wanted.append(np.asarray(leaf.dequantize()))
        values |= bnb_nf4.tensors(key, jax.tree.map(np.asarray, leaf))
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    _, _, params = hf.load(SafetensorsSource(tmp_path), dtype=jnp.bfloat16, quantize="nf4")
    (found,) = params["model"]["layers"]["*"]["feed_forward"]["router"]["weight"].parts
    assert found.dtype == jnp.float32 and len(wanted) == 2
    np.testing.assert_array_equal(np.asarray(found), np.stack(wanted).astype(np.float32))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_bitsandbytes_packed_one_by_one_are_taken_as_they_are(name, tmp_path):
    """As transformers 4 stored them, whose experts were linear modules."""
    # bitsandbytes' own dequantizing on a CPU errs where a row is no whole block.
    own = dict(intermediate_size=128) if name == "mixtral" else dict(moe_intermediate_size=64)
    model = tiny.reference(name, **own)
    source = SafetensorsSource(tiny.save(model, tmp_path))
    values, rounded = {}, {}
    for key in source.headers():
        value = torch.tensor(source.read(key))
        if ".experts." not in key:
            values[key] = value
            continue
        packed, state = bitsandbytes.functional.quantize_4bit(
            value, quant_type="nf4", compress_statistics=True
        )
        values |= {key: packed} | {
            f"{key}.{part}": x for part, x in state.as_dict(packed=True).items()
        }
        rounded[key] = bitsandbytes.functional.dequantize_4bit(packed, state)
    safetensors.torch.save_file(values, tmp_path / "model.safetensors")
    stored = SafetensorsSource(tmp_path)
    family, c, params = hf.load(stored, quantize="nf4")
    for key, want in rounded.items():
        place = hf.places(family, c)[key]
        node = params
        for part in place.path.split("."):
            node = node[part]
        np.testing.assert_array_equal(np.asarray(leaves.dense(place.pick(node))), want.numpy())
        leaf = place.pick(node)
        bytes_ = np.asarray(leaf.packed)[int(leaf.number)]
        np.testing.assert_array_equal(bytes_.ravel(), values[key].numpy().ravel())


def four_bits(weight: torch.Tensor, key: str) -> dict[str, torch.Tensor]:
    """bitsandbytes' tensors of one linear module's weight, statistics nested."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=True
    )
    parts = state.as_dict(packed=True).items()
    return {key: packed} | {f"{key}.{part}": x for part, x in parts}


def test_experts_of_llama_4_that_bitsandbytes_packed_one_by_one_give_transformers_logits(tmp_path):
    """As transformers reads them, and wrote them before version 5."""
    model = tiny.reference("llama4_text")
    source = SafetensorsSource(tiny.save(model, tmp_path))
    values = {}
    for key in source.headers():
        value = torch.tensor(source.read(key))
        owner, _, last = key.rpartition(".")
        if not key.endswith(("gate_up_proj", "down_proj")):
            values |= {key: value} if "proj" not in key else four_bits(value, key)
            continue
        for e, one in enumerate(value.transpose(1, 2)):
            names = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            for name, part in zip(names, one.chunk(len(names)), strict=True):
                values |= four_bits(part, f"{owner}.{e}.{name}.weight")
    safetensors.torch.save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32",
        bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head", "router"],
    )  # fmt: skip
    text = json.loads((tmp_path / "config.json").read_text())
    text |= {"quantization_config": how.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(text))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", device_map="cpu"
    )
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    row = tiny.draw(7, 24)
    with torch.no_grad():
        want = theirs(torch.tensor([row])).logits.numpy()
    for kept in ("nf4", None):
        family, c, params = hf.load(SafetensorsSource(tmp_path), quantize=kept)
        for name in ("gate_up_proj", "down_proj"):
            (leaf,) = params["model"]["layers"]["*"]["feed_forward"]["experts"][name].parts
            assert isinstance(leaf, quant.nf4.NF4) == (kept is not None) and len(leaf.shape) == 4
        got = np.asarray(tiny.logits(family, c, params, *tiny.padded([row], len(row))))
        assert np.abs(got - want).max() <= 1e-4 * want.std()
    merged = merge.merged(family, c, params, None, 1.0, SafetensorsSource(tmp_path)).weights
    shapes = {key: header.shape for key, header in source.headers().items()}
    assert {w.name: w.shape for w in merged} == shapes
    assert all(w.read().shape == w.shape for w in merged if ".experts." in w.name)


def test_experts_of_which_one_is_missing_are_named(tmp_path):
    source = SafetensorsSource(tiny.save(tiny.reference("llama4_text"), tmp_path))
    values = {key: source.read(key) for key in source.headers()}
    key = "model.layers.0.feed_forward.experts.down_proj"
    fused = values.pop(key)
    values |= {
        f"{key.removesuffix('.down_proj')}.{e}.down_proj.weight": fused[e].T.copy()
        for e in range(3)
    }
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing {key} (?s:.*)unexpected .*experts.2.down_proj"):
        hf.load(SafetensorsSource(tmp_path))
    values[f"{key.removesuffix('.down_proj')}.3.down_proj.weight"] = fused[3].T.copy()
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    _, _, params = hf.load(SafetensorsSource(tmp_path))
    (found,) = params["model"]["layers"]["*"]["feed_forward"]["experts"]["down_proj"].parts
    np.testing.assert_array_equal(found[0], fused.swapaxes(1, 2))


def their_loss(name: str, rows, weight: float):
    """(loss, aux loss, gradient by each of PEFT's parameters) of transformers."""
    model = in_peft(name, LORA[name])
    model.base_model.model.router_aux_loss_coef = weight
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for p in trained.values():
        p.requires_grad_(True)
    ids = torch.tensor(np.asarray(rows))
    out = model(ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    return out.loss.item(), out.aux_loss.item(), {n: p.grad.numpy() for n, p in trained.items()}


def batches(rows, micro: int) -> Batch:
    """The rows as micro-batches of a step; each token's target is the next one."""
    ids = np.asarray(rows, np.int32)
    targets = np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], axis=1)
    weights = np.ones(ids.shape, np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    arrays = ids, targets, weights, positions, np.ones_like(ids)
    return Batch(*(x.reshape(micro, -1, ids.shape[1]) for x in arrays))


@pytest.mark.parametrize(
    "name",
    ["mixtral", *(pytest.param(n, marks=SLOW) for n in ("qwen3_moe", "gpt_oss", "qwen3_next"))],
)
def test_the_loss_of_uneven_experts_and_its_gradient_are_those_of_transformers(name, tmp_path):
    pair, settings, weight = tiny.pair(name), LORA[name], 0.3
    in_peft(name, settings).save_pretrained(tmp_path)
    adapters, read = peft_adapter.load(tmp_path, pair.params)
    rows = [tiny.draw(i, 40) for i in range(4)]
    loss, aux, wanted = their_loss(name, rows, weight)
    found = objective.sft(objective.Options(balance=weight), 0)
    how = pair.family, pair.config, scale(read)
    step = found.step(optax.sgd(1.0), *how)
    steps = {}
    for micro in (1, 2, 4):
        state, report = step(
            train.start(adapters, optax.sgd(1.0)), pair.params, batches(rows, micro)
        )
        assert abs(float(report.loss) - loss) <= 1e-5 * loss
        total = report.metrics["aux_loss"]
        assert abs(float(total.value.sum() / total.count.sum()) - aux) <= 1e-5 * aux
        steps[micro] = jax.tree.map(lambda old, new: old - new, adapters, state.trainable)
    for key, mine in peft_adapter.tensors(steps[1]).items():
        theirs = wanted[key.replace(".weight", ".default.weight")]
        assert np.linalg.norm(mine - theirs) <= 1e-3 * np.linalg.norm(theirs), key
    for micro in (2, 4):
        same = jax.tree.map(lambda a, b: np.abs(a - b).max(), steps[1], steps[micro])
        assert max(jax.tree.leaves(same)) <= 1e-5
    plain = in_peft(name, settings)(torch.tensor(rows), labels=torch.tensor(rows)).loss.item()
    assert abs(plain - loss) > 0.01 * loss


def test_a_family_that_has_no_such_loss_refuses_it_by_name(tmp_path):
    model, tokenizer = tiny_chat.load(tiny_chat.save(tmp_path, "Llama"), max_seq_length=60)
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1 .*'llama' model has no such"):
        SFTTrainer(
            model=model, tokenizer=tokenizer, train_dataset=tiny_chat.MESSAGES,
            args=SFTConfig(router_aux_loss_coef=0.1, output_dir=str(tmp_path / "run")),
        )  # fmt: skip
