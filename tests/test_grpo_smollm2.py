"""10 steps of SmolLM2 against TRL's GRPOTrainer, recorded by tests/oracles/grpo_smollm2.py."""

import json
from pathlib import Path

import grpo_runs as shared
import numpy as np
import pytest
import recorded_sft as start
from test_trl_sft import trainer as adapted

from bridge import hub
from unsloth_jax import FastLanguageModel, GRPOConfig, GRPOTrainer
from workflows import rollout
from workflows.rollout import Completion, Counts, Rollout

pytestmark = pytest.mark.slow
TRL = json.loads((Path(__file__).parent / "data" / "grpo_smollm2.json").read_text())


def test_losses_and_gradient_norms_are_trls(figure, monkeypatch):
    base, _ = FastLanguageModel.from_pretrained(
        str(hub.embedded_smollm2()), max_seq_length=256, dtype="float32", load_in_4bit=False
    )
    model = adapted(base, False, False).model
    assert model.peft.rank == start.RANK
    groups = iter(TRL["completions"])

    def recorded(family, c, params, ids, settings, **_):
        zeros = lambda one: [0.0] * len(one)
        stops = {one for one in model.stop_ids()}
        how = lambda one: "stop" if one[-1] in stops else "length"
        found = [
            [Completion(one, zeros(one), zeros(one), how(one)) for one in next(groups)] for _ in ids
        ]
        return Rollout(found, Counts(0, sum(len(one.tokens) for g in found for one in g), 1))

    monkeypatch.setattr(rollout, "run", recorded)
    run = GRPOTrainer(
        model=model, reward_funcs=shared.reward, args=GRPOConfig(**shared.RUN, alarms=False),
        train_dataset=[{"prompt": prompt} for prompt in TRL["prompts"]],
    )  # fmt: skip
    run.train()
    assert len(run.log_history) == len(TRL["steps"]) == 10
    for name in ("loss", "grad_norm"):
        ours = np.array([row[name] for row in run.log_history])
        theirs = np.array([step[name] for step in TRL["steps"]])
        figure(f"SmolLM2's GRPO, {name}", np.abs(ours - theirs).max() / np.abs(theirs).max(), 1e-3)
        assert np.ptp(theirs) > 0.05 * np.abs(theirs).max()
