"""Adapter folders beside those that PEFT writes, and each way in which one can be wrong."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
from adapted import LORA, drawn, in_peft, names_adapted, read_config
from safetensors.numpy import load_file, save_file

from bridge import peft_adapter
from bridge.peft_adapter import Settings


@pytest.mark.parametrize("name", tiny.entries(LORA))
def test_saved_files_hold_the_names_and_fields_that_peft_writes(name, tmp_path):
    pair, s = tiny.pair(name), LORA[name]
    peft_adapter.save(tmp_path / "ours", drawn(pair.params, s), s)
    in_peft(name, s).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / peft_adapter.WEIGHTS) for who in ("ours", "theirs"))
    shapes = lambda x: {k: (v.shape, v.dtype) for k, v in x.items() if "base_layer" not in k}
    assert shapes(ours) == shapes(theirs)
    mine, other = (read_config(tmp_path / who) for who in ("ours", "theirs"))
    assert set(mine) <= set(other)
    assert {k for k in mine if mine[k] != other[k]} <= {
        "target_modules",
        "target_parameters",
        "base_model_name_or_path",
    }


def arrays_equal(x, y) -> bool:
    same = jax.tree.map(lambda a, b: bool((a == b).all()), x, y)
    return jax.tree.structure(x) == jax.tree.structure(y) and all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", tiny.entries(LORA))
def test_saved_adapters_load_bit_for_bit_with_their_settings(name, tmp_path):
    pair = tiny.pair(name)
    notes = {"chat_template_sha256": "12ab"}
    s = LORA[name]._replace(base="some/model", revision="main", metadata=notes)
    adapters = drawn(pair.params, s)
    peft_adapter.save(tmp_path / "a", adapters, s)
    again, read = peft_adapter.load(tmp_path / "a", pair.params)
    assert arrays_equal(adapters, again)
    kept = lambda s: s._replace(targets=None, metadata=None)
    assert kept(read) == kept(s) and read.metadata == notes
    assert names_adapted(pair.params, read.targets, read.layers) == names_adapted(
        pair.params, s.targets, s.layers
    )


def test_equal_adapters_give_files_of_equal_bytes(tmp_path):
    s = LORA["llama"]._replace(metadata={name: name.upper() for name in "zyxwvu"})
    for name in ("a", "b", "c"):
        peft_adapter.save(tmp_path / name, drawn(tiny.pair("llama").params, s), s)
    files = {(tmp_path / name / peft_adapter.WEIGHTS).read_bytes() for name in ("a", "b", "c")}
    assert len(files) == 1


@pytest.fixture
def folder(tmp_path):
    """A good adapter of llama on q_proj, to be spoilt."""
    s = Settings(2, 4.0, targets=("q_proj",))
    peft_adapter.save(tmp_path / "adapter", drawn(tiny.pair("llama").params, s), s)
    return tmp_path / "adapter"


def spoil_config(folder: Path, **fields):
    (folder / peft_adapter.CONFIG).write_text(json.dumps(read_config(folder) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_dora="yes"), dict(modules_to_save=["nothing"]),
        dict(alpha_pattern={"q_proj": "2"}),
        dict(rank_pattern={"q_proj": 0}), dict(bias="all"), dict(lora_bias=True), dict(r="four"),
        dict(fan_in_fan_out=True), dict(target_parameters=["experts.w"]),
        dict(corda_config={"x": 1}),
        dict(eva_config={"rho": 2.0}), dict(trainable_token_indices=[1]), dict(peft_type="IA3"),
        dict(task_type="SEQ_CLS"), dict(init_lora_weights="pissa"), dict(init_lora_weights="eva"),
        dict(layer_replication=[[0, 2]]), dict(megatron_config={"x": 1}), dict(use_qalora=True),
        dict(layers_pattern="blocks"), dict(alora_invocation_tokens=[3]), dict(lora_alpha=None),
        dict(a_field_of_tomorrow="on"),
    ],
    ids=str,
)  # fmt: skip
def test_config_fields_that_cannot_be_honoured_are_refused_by_name(folder, fields):
    spoil_config(folder, **fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        peft_adapter.load(folder, tiny.pair("llama").params)


def test_every_field_that_cannot_be_honoured_stands_in_one_error(folder):
    spoil_config(folder, fan_in_fan_out=True, bias="all")
    with pytest.raises(ValueError, match="bias='all'.*fan_in_fan_out=True"):
        peft_adapter.load(folder, tiny.pair("llama").params)


def test_config_fields_of_every_peft_default_are_understood(folder):
    spoil_config(folder, **json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
                 | read_config(folder))  # fmt: skip
    peft_adapter.load(folder, tiny.pair("llama").params)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(target_modules=r".*\.q_proj"), "all"),
        (dict(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]), "all"),
        (dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*k_proj"), "all"),
        (dict(layers_to_transform=[0, 1, 2], layers_pattern="layers"), "all"),
        (dict(layers_to_transform=1), "too many"),
        (dict(target_modules="all-linear"), "too few"),
        (dict(target_modules=["q_proj", "v_proj"]), "too few"),
        (dict(target_modules=["embed_tokens"]), "embedding"),
        (dict(target_modules=["W_pack"]), "no module"),
    ],
    ids=str,
)
def test_the_file_must_hold_what_its_config_names(folder, fields, expected):
    spoil_config(folder, **fields)
    load = lambda: peft_adapter.load(folder, tiny.pair("llama").params)
    if expected == "all":
        adapters, read = load()
        again = names_adapted(tiny.pair("llama").params, read.targets, read.layers)
        assert again == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    else:
        words = {"too many": "unexpected.*layers.0", "too few": "missing.*layers.0"}
        with pytest.raises(ValueError, match="(?s)" + words.get(expected, expected)):
            load()


def test_missing_unexpected_misshapen_and_broken_tensors_stand_in_one_error(folder):
    path, key = (
        folder / peft_adapter.WEIGHTS,
        "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight",
    )
    values = load_file(path)
    del values[key.format(0, "A")]
    values["base_model.model.vision.lora_A.weight"] = np.zeros((2, 2), np.float32)
    values[key.format(1, "A")] = np.zeros((2, 65), np.float32)
    values[key.format(1, "B")] = values[key.format(1, "B")] * np.float32(np.nan)
    values[key.format(2, "A")] = np.zeros((2, 64), np.int32)
    save_file(values, path)
    with pytest.raises(ValueError) as caught:
        peft_adapter.load(folder, tiny.pair("llama").params)
    for words in (
        r"missing .*layers.0.*lora_A.weight \(2, 64\)", r"unexpected .*vision.lora_A",
        r"layers.1.*lora_A.* has shape \(2, 65\), rank and base say \(2, 64\)",
        "layers.1.*lora_B.*not finite", "layers.2.*lora_A.*dtype int32",
    ):  # fmt: skip
        assert re.search(words, str(caught.value)), words


def test_an_adapter_of_a_router_is_refused_by_name(tmp_path):
    s = Settings(2, 4.0, targets=("q_proj", "router"))
    in_peft("llama4_text", s).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected .*feed_forward\.router\.lora_A"):
        peft_adapter.load(tmp_path, tiny.pair("llama4_text").params)


def test_a_head_that_was_changed_beside_its_adapter_is_refused(tmp_path):
    pair, s = tiny.pair("llama_gelu"), LORA["llama_gelu"]
    in_peft("llama_gelu", s).save_pretrained(tmp_path)
    path, key = tmp_path / peft_adapter.WEIGHTS, "base_model.model.lm_head.base_layer.weight"
    values = load_file(path)
    assert key in values
    save_file(values | {key: values[key] + 1}, path)
    with pytest.raises(ValueError, match=f"unexpected {key}"):
        peft_adapter.load(tmp_path, pair.params)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_16_bit_adapter_files_load_as_float32(folder, dtype):
    path = folder / peft_adapter.WEIGHTS
    values = {k: v.astype(dtype) for k, v in load_file(path).items()}
    save_file(values, path)
    adapters, _ = peft_adapter.load(folder, tiny.pair("llama").params)
    a = adapters["model"]["layers"]["*"]["self_attn"]["q_proj"]["a"]
    assert a.dtype == jnp.float32
    expected = values["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(a[1], expected.astype(np.float32))


@pytest.mark.parametrize("name", [peft_adapter.WEIGHTS, peft_adapter.CONFIG])
def test_a_missing_or_truncated_file_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name):
        peft_adapter.load(folder, tiny.pair("llama").params)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        peft_adapter.load(folder, tiny.pair("llama").params)


@pytest.mark.parametrize(
    ("said", "spoil", "message"),
    [
        (Settings(3, 4.0, targets=("q_proj",)), lambda x: x, r"rank \[2\].*rank 3"),
        (Settings(2, 4.0, targets=("k_proj",)), lambda x: x, "q_proj.*targets .'k_proj'"),
        (Settings(2, 4.0, targets=("q_proj",), layers=(1,)), lambda x: x, "layers.0"),
        (Settings(2, 4.0, targets=("q_proj",)), lambda x: x * np.inf, "not finite"),
    ],
    ids=["rank", "targets", "layers", "values"],
)
def test_nothing_is_written_of_adapters_that_are_not_what_is_said(tmp_path, said, spoil, message):
    adapters = drawn(tiny.pair("llama").params, Settings(2, 4.0, targets=("q_proj",)))
    with pytest.raises(ValueError, match=message):
        peft_adapter.save(tmp_path / "a", jax.tree.map(spoil, adapters), said)
    assert not list(tmp_path.iterdir())


def test_adapters_on_the_embedding_are_not_written(tmp_path):
    s = Settings(2, 4.0, targets=("embed_tokens",))
    with pytest.raises(ValueError, match="model.embed_tokens can't be written"):
        peft_adapter.save(tmp_path / "a", drawn(tiny.pair("llama").params, s), s)


def test_a_folder_that_holds_files_is_left_as_it_is(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    s = Settings(2, 4.0, targets=("q_proj",))
    with pytest.raises(FileExistsError, match="not empty"):
        peft_adapter.save(folder, drawn(tiny.pair("llama").params, s, seed=6), s)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(before) == [peft_adapter.CONFIG, peft_adapter.WEIGHTS]
