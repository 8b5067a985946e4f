"""Checkpoints into parameter trees: every file layout, exact round trips, bounded memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file

from bridge import bnb_nf4, hf, merge, safetensors_file
from bridge.safetensors_file import SafetensorsSource
from unsloth_jax import tree
from unsloth_jax.leaves import Stacks
from unsloth_jax.quant import nf4

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.reference("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the tensors of a folder's only safetensors file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", tiny.EACH.values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hf_to_ours_to_hf_has_equal_bytes(name, dtype, tmp_path):
    model = tiny.reference(name).to(dtype)
    tiny.save(model, tmp_path / "theirs", max_shard_size="100KB")
    source = SafetensorsSource(tmp_path / "theirs")
    family, c, params = hf.load(source)
    kept = merge.merged(family, c, params, None, 1.0, None, str(dtype).removeprefix("torch."))
    (tmp_path / "ours").mkdir()
    safetensors_file.save(tmp_path / "ours", kept.weights, "150KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = source
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    ours = {}
    for file in set(index["weight_map"].values()):
        ours |= load_file(tmp_path / "ours" / file)
    assert set(ours) == set(again.headers()) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in ours.values())
    for key, value in ours.items():
        assert value.tobytes() == again.read(key).tobytes(), key


def test_transformers_reads_what_we_write(folder, tmp_path):
    source = SafetensorsSource(folder)
    family, c, params = hf.load(source)
    kept = merge.merged(family, c, params, None, 1.0, source, "float32")
    safetensors_file.save(tmp_path, kept.weights, "100KB")
    (tmp_path / "config.json").write_text(json.dumps(source.config))
    theirs = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), source.read(key), err_msg=key)


def test_wrong_weights_come_in_one_error(copy):
    def change(t):
        del t["model.norm.weight"]
        t["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
        t["model.layers.1.self_attn.q_proj.weight"] = np.zeros((128, 64), np.int32)
        t["model.extra.weight"] = np.zeros(3, np.float32)

    rewrite(copy, change)
    with pytest.raises(ValueError) as error:
        hf.load(SafetensorsSource(copy))
    for part in (
        "missing model.norm.weight (64,)",
        "model.layers.0.mlp.up_proj.weight has shape (3, 4), the config says (128, 64)",
        "model.layers.1.self_attn.q_proj.weight has dtype int32",
        "unexpected model.extra.weight",
    ):
        assert part in str(error.value)


def test_values_that_are_not_finite_are_refused_by_name(copy):
    def change(t):
        t["model.layers.2.mlp.down_proj.weight"][0, 0] = np.nan

    rewrite(copy, change)
    with pytest.raises(ValueError, match="model.layers.2.mlp.down_proj.weight holds values"):
        hf.load(SafetensorsSource(copy), quantize="nf4")


@pytest.mark.parametrize("keep", [4, 1000, 100_000])
def test_a_truncated_file_is_named(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is truncated or not a safetensors"):
        SafetensorsSource(copy)


def test_files_that_are_missing_or_foreign_are_named(copy, tmp_path):
    (copy / "config.json").write_text("{nonsense")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        SafetensorsSource(copy)
    with pytest.raises(ValueError, match="config.json is missing"):
        SafetensorsSource(tmp_path / "nothing")
    shutil.rmtree(tmp_path / "empty", ignore_errors=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    (tmp_path / "empty/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no .safetensors.*there is .*pytorch_model.bin"):
        SafetensorsSource(tmp_path / "empty")


def test_a_shard_named_in_the_index_but_missing_is_named(tmp_path):
    folder = tiny.save(tiny.reference("llama"), tmp_path / "m", max_shard_size="100KB")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="named in the index but missing"):
        SafetensorsSource(folder)


def test_a_tied_checkpoint_may_carry_its_head_twice(tmp_path):
    folder = tiny.save(tiny.reference("qwen2"), tmp_path / "m")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    _, c, params = hf.load(SafetensorsSource(folder))
    assert c.tied and "lm_head" not in params


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path):
    folder = tiny.save(tiny.reference("qwen2"), tmp_path / "m")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf.load(SafetensorsSource(folder))


def test_a_config_without_model_type_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["model_type"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names no model_type"):
        hf.load(SafetensorsSource(copy))


def as_4bit(folder: Path, chosen) -> dict[str, nf4.NF4]:
    """Stores the layers' matrices that `chosen` names as bitsandbytes blocks, in place."""
    made = {}

    def change(t):
        for name in [n for n in t if n.endswith("_proj.weight") and chosen(n)]:
            plain = "up_proj" in name or "layers.0.mlp.down" in name
            leaf = nf4.quantize(jnp.asarray(t.pop(name), jnp.bfloat16), double=not plain)
            made[name] = leaf
            t.update(bnb_nf4.tensors(name, jax.tree.map(np.asarray, leaf)))

    rewrite(folder, change)
    return made


def test_a_mixed_checkpoint_loads_each_layer_in_its_own_kind(copy):
    mixed = lambda n: ".1." not in n and not (".0." in n and "q_proj" in n)
    made = as_4bit(copy, mixed)
    source = SafetensorsSource(copy)
    _, c, params = hf.load(source, quantize="nf4")
    flat = tree.flatten(params)
    q = flat["model.layers.*.self_attn.q_proj.weight"]
    down = flat["model.layers.*.mlp.down_proj.weight"]
    assert isinstance(q, Stacks) and q.layers == ((0, 1), (2,))
    assert isinstance(down, Stacks) and down.layers == ((0,), (1,), (2,))
    for name, leaf in made.items():
        path = next(p for p in flat if p.split("*")[-1] == name.split(".", 3)[-1].join([".", ""]))
        here = int(name.split(".")[2])
        part = next(n for n, ids in enumerate(flat[path].layers) if here in ids)
        at = flat[path].layers[part].index(here)
        ours = jax.tree.map(lambda x, at=at: x[at], flat[path].parts[part])
        jax.tree.map(np.testing.assert_array_equal, ours, leaf)
    dense = hf.load(source, jnp.float32)[2]
    up = dense["model"]["layers"]["*"]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(up[2], made["model.layers.2.mlp.up_proj.weight"].dequantize())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_quant_map", "nested_offset"])
@pytest.mark.parametrize("keep", ["nf4", None])
def test_4bit_statistics_that_are_not_finite_are_refused_by_name(copy, part, value, keep):
    layer = "up_proj" if part == "absmax" else "q_proj"  # `as_4bit` nests none of the first
    as_4bit(copy, lambda n: layer in n)
    name = f"model.layers.1.mlp.{layer}.weight" if layer == "up_proj" else ""
    name = name or f"model.layers.1.self_attn.{layer}.weight"

    def change(t):
        if part != "nested_offset":
            t[f"{name}.{part}"][-1] = value
            return
        said = json.loads(t[f"{name}.{bnb_nf4.STATE}"].tobytes()) | {part: float(value)}
        t[f"{name}.{bnb_nf4.STATE}"] = np.frombuffer(json.dumps(said).encode(), np.uint8)

    rewrite(copy, change)
    said = f"{name}.{part}" if keep else name
    with pytest.raises(ValueError, match=f"{said} holds values that are not finite"):
        hf.load(SafetensorsSource(copy), quantize=keep)


BROKEN = {
    "a list as config": ("config.json", b"[1]", "config.json holds a list, expected a JSON object"),
    "a binary config": ("config.json", b"\xff\xfe\x00", "config.json is not JSON"),
    "half a generation config": ("generation_config.json", b"{", "generation_config.json is not"),
    "a list as generation config": ("generation_config.json", b"[]", "holds a list"),
    "an index without a map": (
        "model.safetensors.index.json", b"{}", "None as weight_map, expected weights' names"),
    "an index of numbers": (
        "model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "expected weights' names"),
}  # fmt: skip


@pytest.mark.parametrize("file, content, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_json_file_is_named_with_what_was_expected(copy, file, content, message):
    (copy / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SafetensorsSource(copy)


@pytest.mark.parametrize(
    "size", [0, -3, True, 1.5, None, "abcGB", "GB", "5XB", "-1GB", "0MB", "nanGB", "1e400GB"]
)
def test_a_size_that_means_nothing_is_refused_with_the_known_units(size):
    with pytest.raises(ValueError, match=f"size {size!r} is not understood.*'GIB'"):
        safetensors_file.size_in_bytes(size)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), (" 1.5 kib", 1536), (7, 7)])
def test_sizes_are_read_with_their_units(text, size):
    assert safetensors_file.size_in_bytes(text) == size


MEMORY = """
import ctypes, gc, sys, threading, time
import jax, numpy as np, jax.numpy as jnp
sys.path.insert(0, {root!r})
from bridge import hf
from bridge.safetensors_file import SafetensorsSource
def anonymous():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()
def resident():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
def load():
    return jax.block_until_ready(hf.load(SafetensorsSource({folder!r}), {dtype}, {quantize!r})[2])
load()  # compiles
peak, done = [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
params = load()
done.append(1)
kept = anonymous() - start
headers = SafetensorsSource({folder!r}).headers().values()
largest = max(int(np.prod(h.shape)) * np.dtype(h.dtype).itemsize for h in headers)
print(peak[0] - start, kept, sum(x.nbytes for x in jax.tree.leaves(params)), largest)
"""


@pytest.mark.parametrize("quantize, dtype", [("nf4", "jnp.bfloat16"), (None, "None")])
def test_loading_peaks_at_the_model_and_three_of_its_largest_tensors(tmp_path, quantize, dtype):
    sizes = dict(hidden_size=512, intermediate_size=8192, num_hidden_layers=8, vocab_size=512)
    model = tiny.reference("llama", **sizes).to(torch.bfloat16)
    folder = tiny.save(model, tmp_path / "big", max_shard_size="40MB")
    code = MEMORY.format(root=str(ROOT), folder=str(folder), quantize=quantize, dtype=dtype)
    env = {"JAX_PLATFORMS": "cpu", "PATH": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr[-2000:]
    grown, kept, size, largest = map(int, ran.stdout.split())
    assert kept >= 0.9 * size, "the first load left memory behind, so this one shows nothing"
    assert grown <= size + 3 * largest, (grown, size, largest)
