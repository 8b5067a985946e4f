"""Training with products in fp8: asked for by name, refused where it can't run, close to bf16's."""

import json
import runpy
from pathlib import Path

import jax
import pytest
import tiny_chat

from pallas_kernels import _choice
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, tree
from unsloth_jax.quant.nf4 import NF4
from workflows.bench import rows, train_step
from workflows.sft_config import MATMULS

SCRIPT = Path(__file__).parent / "gpu" / "fp8_loss.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(folder, 256)[0], r=4)


def trainer(model, **changes):
    args = SFTConfig(max_steps=1, max_length=64, **changes)
    return SFTTrainer(model=model, train_dataset=tiny_chat.MESSAGES, args=args)


def dtypes(model):
    leaves = tree.flatten(model.params).values()
    return {leaf.matmul_dtype for leaf in leaves if isinstance(leaf, NF4)}


def test_without_a_fitting_gpu_a_run_is_refused_and_the_model_stays_as_it_was(model):
    run, before = trainer(model, matmul_dtype="fp8_backward"), jax.tree.structure(model.params)
    with pytest.raises(ValueError, match="can't be multiplied in fp8: it needs a GPU"):
        run.train()
    assert run.log_history == [] and jax.tree.structure(model.params) == before


@pytest.mark.parametrize("other", ["int8", "fp8"])
def test_another_dtype_is_refused_with_the_known_ones(other):
    with pytest.raises(ValueError, match=rf"matmul_dtype '{other}' .*\[None, 'bf16', 'fp8_back"):
        SFTConfig(matmul_dtype=other)
    assert SFTConfig().matmul_dtype is None


def test_only_inside_a_run_are_weights_multiplied_in_fp8(model):
    with _choice.target("gpu"), pytest.raises(KeyError), model.multiplied_in("fp8"):
        assert dtypes(model) == {"fp8"}
        raise KeyError
    assert dtypes(model) == {"bf16"}
    with model.multiplied_in(None):
        assert dtypes(model) == {"bf16"}


def test_a_checkpoint_of_fp8_is_another_runs_and_one_of_bf16_is_as_ever(model):
    facts = {kind: trainer(model, matmul_dtype=kind)._facts({}) for kind in MATMULS}
    assert facts[None] == facts["bf16"]
    assert len({facts[kind]["fp8"] for kind in MATMULS}) == 2
    assert facts[None]["fp8"] is None


@pytest.mark.parametrize("policy", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_all_dtypes_learn_alike(folder, tmp_path, policy, capsys):
    main, output = runpy.run_path(str(SCRIPT))["main"], tmp_path / "loss.json"
    line = [str(folder), "--steps", "12", "--batch", "2", "--length", "160", "--policy", policy]
    main([*line, "--learning-rate", "2e-2", "--optimizer", "adamw_torch", "--output", str(output)])
    found = json.loads(output.read_text())
    first, *others = found["losses"].values()
    for seen in others:
        assert seen != first and seen[-1] < 0.8 * seen[0]
        assert max(abs(x / y - 1) for x, y in zip(seen, first, strict=True)) <= 0.05
    # The first loss is found before anything is rounded.
    assert found["losses"]["fp8_backward"][0] == pytest.approx(first[0], rel=1e-5)
    assert all(abs(ratio - 1) <= 0.02 for ratio in found["ratio"].values())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == found["ratio"]


def test_the_bench_keeps_both_dtypes_apart(tmp_path, capsys):
    line = ["--shape", "tiny", "--steps", "1", "--warmup", "1", "--shapes", "1x64", "--packed", ""]
    line += ["--policies", "full", "--optimizer", "adamw_torch", "--rank", "4"]
    line += ["--output", str(tmp_path / "train.jsonl")]
    for dtype in ("bf16", "fp8"):
        train_step.main([*line, "--matmul-dtype", dtype])
    first, second = rows.read(tmp_path / "train.jsonl")
    assert (first["matmul_dtype"], second["matmul_dtype"]) == ("bf16", "fp8")
    assert first["losses"] != second["losses"] and second["fits"]
    assert capsys.readouterr().out.splitlines()[-1].count("full") == 1
