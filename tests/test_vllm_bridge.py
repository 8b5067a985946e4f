"""vLLM's bridge against a stand-in for it: versions, the probe, what is asked and refused."""

import sys

import grpo_runs
import jax
import pytest
import vllm_stand_in
from grpo_runs import TEXTS
from vllm_stand_in import Base

from bridge import vllm
from unsloth_jax import FastLanguageModel, GRPOConfig, GRPOTrainer

SETTINGS = grpo_runs.LOOP | dict(
    alarms=False, max_steps=2, prompts_per_step=2, use_vllm=True, learning_rate=2e-2,
    warmup_steps=0, temperature=0.8,
)  # fmt: skip


@pytest.fixture
def model(folder):
    return grpo_runs.model(folder)


def trainer(model, **settings) -> GRPOTrainer:
    args = GRPOConfig(**(SETTINGS | settings))
    return GRPOTrainer(model=model, reward_funcs=grpo_runs.reward, args=args, train_dataset=TEXTS)


def told(run, model, figure) -> None:
    """A run of two steps moved two versions of the adapters, and nothing else."""
    size = sum(x.size * 4 for x in jax.tree.leaves(model.adapters))
    assert [row["vllm/adapter_version"] for row in run.log_history] == [1, 2]
    for row in run.log_history:
        assert row["vllm/sync_bytes"] == size and row["vllm/sync_seconds"] > 0
        figure("probe by the stand-in for vLLM", row["vllm/probe_difference"], 1e-4)
        figure("its log-probabilities", row["sampling/sampling_logp_difference/mean"], 1e-5)
        assert row["rollout_tokens_per_s"] > 0
        assert 0 <= row["completions/clipped_ratio"] <= 1
    assert run.engine.sampler.home is None and not run.engine.sampler.version.folder.exists()


def versions(base: Base) -> list[tuple[str, str]]:
    return [(what, name.rpartition("-")[2]) for what, name in base.log]


MOVED = [("load", "1"), ("load", "2"), ("unload", "1")]


def test_a_run_draws_with_vllm_in_the_process(model, folder, monkeypatch, figure):
    base = Base(grpo_runs.model(folder))
    made = vllm_stand_in.installed(monkeypatch, base).made
    run = trainer(model, vllm_options={"enforce_eager": True})
    run.train()
    told(run, model, figure)
    assert versions(base) == MOVED
    [options] = made
    assert options["model"] == str(folder) and options["dtype"] == "float32"
    assert options["max_lora_rank"] == 8 and options["enable_lora"] and options["enforce_eager"]
    assert options["logprobs_mode"] == "processed_logprobs" and options["max_model_len"] == 128
    # Another run gives its adapters names and numbers of their own, to the same base.
    model.adapters = jax.tree.map(lambda x: x * 2, model.adapters)
    names = {name for _, name in base.log}
    run.engine.sync(model.adapters)
    assert len(made) == 1 and base.log[-2][1] not in names
    assert run.engine.told["vllm/adapter_version"] == 3
    run.engine.sync(model.adapters)
    assert run.engine.told["vllm/sync_bytes"] == 0 and len(base.log) == 5


def test_a_run_draws_with_a_server(model, folder, figure):
    base = Base(grpo_runs.model(folder))
    with vllm_stand_in.serving(base) as url:
        run = trainer(model, vllm_mode="server", vllm_server_base_url=url)
        run.train()
    told(run, model, figure)
    assert versions(base) == MOVED


def test_adapters_that_did_not_arrive_are_caught_by_the_probe(model, folder):
    with vllm_stand_in.serving(Base(grpo_runs.model(folder), stale=True)) as url:
        run = trainer(model, vllm_mode="server", vllm_server_base_url=url)
        with pytest.raises(RuntimeError, match="version 2 of the adapters and the learner differ"):
            run.train()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "other"}, "answered with the adapters 'other', asked for 'unsloth-jax-"),
        ({"choices": []}, "gave 0 completions for 1.*return_token_ids"),
        ({"refuses": "/v1/load_lora_adapter"}, "404.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python"),
        ({"refuses": "/v1/completions"}, "refuses /v1/completions: 404"),
        ({"choices": [{"index": 0, "token_ids": [5], "prompt_token_ids": [1]}]}, "read the tokens"),
        (
            {
                "choices": [
                    {
                        "index": 0, "token_ids": [5, 6], "finish_reason": "length",
                        "logprobs": {"token_logprobs": [-1.0]},
                    }
                ]
            },
            "2 tokens with log-probabilities",
        ),
    ],
)  # fmt: skip
def test_a_servers_answer_that_is_none_of_this_version_is_refused(changes, message, model, folder):
    with vllm_stand_in.serving(Base(model), **changes) as url:
        run = trainer(model, vllm_mode="server", vllm_server_base_url=url)
        with pytest.raises(RuntimeError, match=message):
            run.engine.sync(model.adapters)
        run.engine.close()


def test_what_is_not_there_is_told_before_the_first_step(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'unsloth-jax\[vllm\]'.*vllm_mode='server'"):
        trainer(model)
    with pytest.raises(ConnectionError, match="no vLLM server answers at http://127.0.0.1:9 "):
        trainer(model, vllm_mode="server", vllm_server_base_url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="no http or https address"):
        trainer(model, vllm_mode="server", vllm_server_base_url="ftp://somewhere")
    with vllm_stand_in.serving(Base(model)) as url, pytest.raises(ValueError, match="128 tokens"):
        vllm.Server(url + "/v1").check(256)


def test_what_vllm_can_not_take_is_refused(model, base):
    with pytest.raises(ValueError, match="top_p=0.9, min_p=0.1 with use_vllm=True"):
        GRPOConfig(use_vllm=True, top_p=0.9, min_p=0.1)
    with pytest.raises(ValueError, match="rollout_fn draws the completions itself"):
        args = GRPOConfig(**SETTINGS)
        how = dict(rollout_fn=lambda params, prompts, key: (), train_dataset=TEXTS, args=args)
        GRPOTrainer(model=model, **how)
    base.adapters = None
    dora = FastLanguageModel.get_peft_model(base, r=4, use_dora=True)
    with pytest.raises(ValueError, match="plain adapters of linear layers.*DoRA True"):
        trainer(dora)
    with pytest.raises(ValueError, match="rank 512 at most, got 600"):
        vllm.room(600)
    assert [vllm.room(r) for r in (1, 4, 16, 17)] == [1, 8, 16, 32]


def test_vllms_settings_without_vllm_are_said_to_have_no_effect(capsys):
    GRPOConfig(vllm_gpu_memory_utilization=0.7, vllm_mode="server")
    assert "vllm_mode, vllm_gpu_memory_utilization have no effect" in capsys.readouterr().out
