"""Ctrl-C, SIGTERM and a full disk during a run: what is on the disk, what ends and how."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import child_process
import jax
import numpy as np
import pytest
import tiny_chat

from unsloth_jax import SFTConfig, SFTTrainer
from workflows.interrupts import Interrupts
from workflows.run import short_hash

ROOT = Path(__file__).parents[1]
SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip
SAVED = dict(save_strategy="steps", save_steps=100)
ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@pytest.fixture(autouse=True)
def answers():
    """Python's own answers, which a shell's background jobs start without."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, answer) for number, answer in own.items()}
    yield lambda: {number: signal.getsignal(number) for number in own} == own
    for number, answer in before.items():
        signal.signal(number, answer)


class At:
    """A callback that does something at an event of a step."""

    def __init__(self, step, act, event="on_step_end"):
        self.step, self.act = step, act
        setattr(self, event, self.do)

    def on_train_end(self, args, state, control, **more): ...

    def do(self, args, state, control, **more):
        if state.global_step == self.step:
            self.act()


def trainer(model, *callbacks, held_out=None, **changes) -> SFTTrainer:
    return SFTTrainer(
        model=model, train_dataset=tiny_chat.MESSAGES, eval_dataset=held_out,
        callbacks=list(callbacks), args=SFTConfig(**(SAME | changes)),
    )  # fmt: skip


def sends(number: int, times: int = 1):
    return lambda: [os.kill(os.getpid(), number) for _ in range(times)]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint_*"))


@pytest.mark.parametrize(
    "event, number",
    [
        ("on_step_end", signal.SIGINT), ("on_log", signal.SIGTERM), ("on_step_begin", signal.SIGINT)
    ],
)  # fmt: skip
def test_a_signal_ends_a_run_with_a_checkpoint_from_which_it_goes_on(
    fresh, tmp_path, answers, number, event, capfd
):
    whole = trainer(fresh, max_steps=6, output_dir=str(tmp_path / "whole"))
    start = fresh.adapters
    whole.train()
    last, fresh.adapters = short_hash(fresh.adapters), start
    kept = SAVED | dict(max_steps=6, output_dir=str(tmp_path / "run"))
    with pytest.raises(ENDS[number]) as error:
        trainer(fresh, At(3, sends(number), event), **kept).train()
    assert getattr(error.value, "code", None) == (143 if number == signal.SIGTERM else None)
    assert checkpoints(tmp_path / "run") == ["checkpoint_3"] and answers()
    said = capfd.readouterr()
    assert f"{signal.Signals(number).name}: ends after this step" in said.err
    assert "stopped after step 3: the model has its adapters, its newest checkpoint" in said.out
    fresh.adapters = start
    again = trainer(fresh, **kept)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert short_hash(fresh.adapters) == last
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5, 6] and lines == again.log_history


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(fresh, tmp_path):
    often = SAVED | dict(max_steps=4, eval_strategy="steps", eval_steps=2)
    run = trainer(fresh, held_out=tiny_chat.MESSAGES[:3], output_dir=str(tmp_path), **often)
    first = run._evaluator

    def signalled(*given):
        measure = first(*given)
        return lambda adapters: (sends(signal.SIGINT)(), measure(adapters))

    run._evaluator = signalled
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert checkpoints(tmp_path) == ["checkpoint_2"] and len(run.log_history) == 2
    again = trainer(fresh, held_out=tiny_chat.MESSAGES[:3], output_dir=str(tmp_path), **often)
    again.train(resume_from_checkpoint=True)
    evaluated = [row["step"] for row in again.log_history if "eval_loss" in row]
    assert evaluated == [2, 4]


def test_without_checkpoints_a_signal_leaves_the_adapters(fresh, capfd, answers):
    start = short_hash(fresh.adapters)
    with pytest.raises(KeyboardInterrupt):
        trainer(fresh, At(2, sends(signal.SIGINT)), max_steps=4).train()
    assert short_hash(fresh.adapters) != start and answers()
    said = "stopped after step 2: the model has its adapters, no checkpoint was written"
    assert said in capfd.readouterr().out


@pytest.mark.parametrize("number", ENDS)
def test_a_second_signal_writes_no_checkpoint(fresh, tmp_path, answers, number):
    run = trainer(
        fresh, At(2, sends(number, 2), "on_log"), max_steps=4, output_dir=str(tmp_path), **SAVED
    )
    with pytest.raises(ENDS[number]):
        run.train()
    assert checkpoints(tmp_path) == [] and answers()
    assert np.isfinite(jax.tree.leaves(fresh.adapters)[0]).all()


def test_an_answer_of_the_users_own_stays(fresh, answers):
    seen = []
    signal.signal(signal.SIGTERM, lambda *given: seen.append(given))
    trainer(fresh, At(1, sends(signal.SIGTERM)), max_steps=2).train()
    assert len(seen) == 1 and not answers()


def test_a_thread_that_is_not_the_main_one_trains_without_them(fresh):
    done = []
    run = trainer(fresh, max_steps=2)
    thread = threading.Thread(target=lambda: done.append(run.train().global_step))
    thread.start()
    thread.join()
    assert done == [2]


def test_a_signal_between_blocks_is_raised_where_it_is_looked_for(answers):
    with pytest.raises(SystemExit), Interrupts() as interrupts:
        interrupts.check()
        sends(signal.SIGTERM)()
        assert interrupts.asked == signal.SIGTERM
        interrupts.check()
    assert answers()


PRELUDE = (
    child_process.PRELUDE
    + """
import test_interrupts as t
import tiny_chat
from unsloth_jax import FastLanguageModel

folder, output = map(Path, sys.argv[1:])
model = FastLanguageModel.get_peft_model(tiny_chat.load(folder)[0], r=4)
"""
)
ENDLESS = """
ready = t.At(5, lambda: print("ready", flush=True))
t.trainer(model, ready, max_steps=10**6, output_dir=str(output), **t.SAVED).train()
"""


def begun(script: str, *given: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, given)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, -signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_from_another_process_saves_and_exits(folder, tmp_path, number, code):
    with begun(ENDLESS, folder, tmp_path) as process:
        while "ready" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    (saved,) = checkpoints(tmp_path)
    step = int(saved.removeprefix("checkpoint_"))
    assert step >= 5 and f"stopped after step {step}" in out
    assert f"{signal.Signals(number).name}: ends after this step" in error


# A limit on the size of a file is a full disk that needs no root; step 4 finds it so.
FILLED = """
def limit(soft):
    def act():
        [one.join() for one in threading.enumerate() if one.name.startswith("write checkpoint")]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, -1))
    return act
full = [t.At(3, limit(4096)), t.At(5, limit(-1))][:int(os.environ["EVENTS"])]
kept = dict(max_steps=6, save_strategy="steps", save_steps=2, output_dir=str(output))
try:
    t.trainer(model, *full, **kept).train()
finally:
    print("adapters", t.short_hash(model.adapters))
"""


@pytest.mark.parametrize("lifted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_ends_no_run_but_a_last_checkpoint_that_is_lacking_is_an_error(
    folder, tmp_path, lifted, monkeypatch
):
    monkeypatch.setenv("EVENTS", "2" if lifted else "1")
    with begun(FILLED, folder, tmp_path) as process:
        out, error = process.communicate(timeout=100)
    line = f"the checkpoint {tmp_path}/checkpoint_4 was not written: File too large. Training goes"
    assert sum(line in said for said in out.splitlines()) == 1, out + error
    assert "goes on; the last whole checkpoint is 2" in out
    assert (process.returncode == 0) == lifted, error
    assert checkpoints(tmp_path) == ["checkpoint_2"] + ["checkpoint_6"] * lifted
    steps = [json.loads(row)["step"] for row in open(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    if not lifted:
        # Orbax's own threads may write what they saw behind it.
        (raised,) = [said for said in error.splitlines() if said.startswith("OSError")]
        assert f"{tmp_path}/checkpoint_6 was not" in raised
        assert "adapters" in out
