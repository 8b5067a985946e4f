"""Checkpoints: a killed run continues bitwise, foreign and half-written ones are not taken."""

import json
import shutil
import signal
from pathlib import Path

import child_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat

from bridge.checkpoint import Checkpoints
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth_jax.optim import make
from unsloth_jax.train import State, start
from workflows.run import resumed

ROOT = Path(__file__).parents[1]
SETTINGS = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2,
    lr_scheduler_type="linear", warmup_steps=2, optim="adamw_torch", max_length=64,
    save_strategy="steps", save_steps=10, max_steps=20,
)  # fmt: skip


def trainer(folder: Path, output: Path, rows=tiny_chat.MESSAGES, r: int = 4, **changes):
    model, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(model, r=r)
    args = SFTConfig(**(SETTINGS | {"output_dir": str(output)} | changes))
    return SFTTrainer(model=model, train_dataset=rows, args=args)


PRELUDE = (
    child_process.PRELUDE
    + """
import test_checkpoint

folder, output, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
"""
)
# What is trained, killed and resumed: a kind's trainer, with the settings beside SETTINGS.
KINDS = {"sft": {}, "packed": dict(packing=True, save_steps=5, optim="adamw_8bit")}
KILLED = """
make = lambda name: test_checkpoint.kind(kind, folder, output / name)
make("whole").train()
run = make("broken")
run.state.log_history = child_process.Deadly(13)
run.train()
"""
RESUMED = """
run = test_checkpoint.kind(kind, folder, output / "broken")
assert run.train(resume_from_checkpoint=True).global_step == 20
run.model.save_pretrained(output / "adapter")
"""


def kind(name: str, folder: Path, output: Path):
    """The trainer of one of KINDS."""
    return trainer(folder, output, **KINDS[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


def killed_and_resumed(name: str, folder: Path, output: Path) -> Path:
    """`output` with a whole run of 20 steps and one that was killed and resumed."""
    killed = child_process.run(PRELUDE + KILLED, folder, output, name)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (output / "broken" / "checkpoint_10").is_dir()
    assert not (output / "broken" / "checkpoint_20").exists()
    again = child_process.run(PRELUDE + RESUMED, folder, output, name)
    assert again.returncode == 0, again.stderr
    return output


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    return killed_and_resumed("sft", folder, tmp_path_factory.mktemp("runs"))


def state_of(run: SFTTrainer):
    args = run.args
    return start(run.model.adapters, make(args.optim, lambda n: n, max_grad_norm=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_killed_and_resumed_equals_a_whole_one_bitwise(name, folder, tmp_path):
    output = killed_and_resumed(name, folder, tmp_path)
    like = state_of(kind(name, folder, tmp_path / "unused"))
    states = [Checkpoints(output / one).restore(like, 20).state for one in ("whole", "broken")]
    named = zip(*map(jax.tree.leaves_with_path, states), strict=True)
    for (path, one), (_, other) in named:
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path
    assert int(states[0].step) == 20 and len(jax.tree.leaves(states[0].opt)) > 28


@pytest.mark.slow
def test_the_metrics_of_a_resumed_run_hold_every_step_once(runs):
    read = lambda name: map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch", "supervised_tokens")
    whole, broken = ([{k: row[k] for k in kept} for row in read(n)] for n in ("whole", "broken"))
    assert [row["step"] for row in whole] == [*range(1, 21)] and whole == broken


SAVING = """
import random
attempt = int(sys.argv[4])
random.seed(attempt)
class Deadly:
    def on_save(self, args, state, control, **more):
        # Each attempt comes further than the one before, however slow the disk.
        if state.global_step == 3 + 4 * attempt and attempt < 4:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(random.uniform(0, 0.06), kill).start()
run = test_checkpoint.trainer(folder, output, save_steps=1, save_total_limit=2)
run.add_callback(Deadly())
there = any(output.glob("checkpoint_*")) if output.is_dir() else False
run.train(resume_from_checkpoint=there)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_while_saving_equals_a_whole_one(folder, tmp_path):
    train = "test_checkpoint.kind(kind, folder, output).train()"
    whole = child_process.run(PRELUDE + train, folder, tmp_path / "whole", "sft")
    assert whole.returncode == 0, whole.stderr
    like, codes = state_of(trainer(folder, tmp_path / "unused")), []
    while not codes or codes[-1] != 0:
        done = child_process.run(PRELUDE + SAVING, folder, tmp_path / "run", "sft", len(codes))
        codes.append(done.returncode)
        assert done.returncode in (0, -signal.SIGKILL) and len(codes) < 16, done.stderr
    assert len(codes) > 3
    whole = Checkpoints(tmp_path / "whole").restore(like, 20).state
    again = Checkpoints(tmp_path / "run").restore(like, 20).state
    for a, b in zip(*map(jax.tree.leaves, (whole, again)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


FOREIGN = {
    "data": dict(rows=tiny_chat.MESSAGES[::-1]),
    "learning_rate": dict(learning_rate=2e-2),
    "steps in all": dict(max_steps=30),
    "warm-up steps": dict(warmup_steps=3),
    "adam_beta2": dict(adam_beta2=0.98),
    "seed": dict(seed=1),
    "length": dict(max_length=128),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FOREIGN)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(runs, folder, what):
    run = trainer(folder, runs / "whole", **FOREIGN[what])
    with pytest.raises(ValueError, match=f"belongs to another run.*'{what}'") as error:
        run.train(resume_from_checkpoint=True)
    others = set(FOREIGN) - {what}
    assert not any(f"'{name}'" in str(error.value) for name in others)


@pytest.mark.slow
def test_a_checkpoint_of_other_adapters_is_refused_by_their_shapes(runs, folder):
    with pytest.raises(ValueError, match=r"does not fit this run(.|\n)*expected"):
        trainer(folder, runs / "whole", r=8).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(runs, folder):
    with pytest.raises(FileExistsError, match="checkpoint 20 of an earlier run"):
        trainer(folder, runs / "whole").train()


class Stopping(list):
    def append(self, row):
        super().append(row)
        if row["step"] == 3:
            raise KeyboardInterrupt


def test_a_refused_run_leaves_the_metrics_and_a_resumed_one_adds_to_them(folder, tmp_path):
    short = dict(max_steps=4, save_steps=2)
    run = trainer(folder, tmp_path, **short)
    run.state.log_history = Stopping()
    with pytest.raises(KeyboardInterrupt):
        run.train()
    file = tmp_path / "metrics.jsonl"
    steps = lambda: [json.loads(line)["step"] for line in file.read_text().splitlines()]
    before = file.read_bytes()
    again = trainer(folder, tmp_path, **short)
    with pytest.raises(FileExistsError, match="checkpoint 2 of an earlier run"):
        again.train()
    assert file.read_bytes() == before and steps()[:2] == [1, 2]
    again.train(resume_from_checkpoint=True)
    assert steps() == [1, 2, 3, 4]


def test_resuming_from_nothing_raises_and_makes_no_folder(folder, tmp_path):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        trainer(folder, tmp_path / "nowhere").train(resume_from_checkpoint=True)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer(folder, tmp_path).train(resume_from_checkpoint=True)


SMALL = {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.asarray(3, jnp.int32)}


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, SMALL), {"step": step})
    checkpoints.close()
    return tmp_path / "c"


def test_a_checkpoint_comes_back_as_it_was(saved):
    found = Checkpoints(saved).restore(SMALL)
    assert found.facts == {"step": 2} and int(found.state["n"]) == 5
    assert np.array_equal(found.state["w"], np.asarray(SMALL["w"]) + 2)
    assert Checkpoints(saved).restore(SMALL, 1).facts == {"step": 1}


def test_a_temporary_folder_of_a_killed_writer_is_not_taken(saved):
    shutil.copytree(saved / "checkpoint_2", saved / "checkpoint_3.orbax-checkpoint-tmp-7")
    assert Checkpoints(saved).latest() == 2


@pytest.mark.parametrize(
    "lost", ["facts/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d/*"]
)
def test_a_checkpoint_that_lacks_a_file_is_refused(saved, lost):
    (found,) = (saved / "checkpoint_2").glob(lost)
    found.unlink()
    with pytest.raises(ValueError, match=r"checkpoint_2 .*incomplete"):
        Checkpoints(saved).restore(SMALL)


def test_only_as_many_checkpoints_are_kept_as_asked(tmp_path):
    checkpoints = Checkpoints(tmp_path / "k", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, SMALL, {})
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "k").glob("checkpoint_*")) == [
        "checkpoint_2", "checkpoint_3",
    ]  # fmt: skip


def test_a_name_without_a_step_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="'checkpoint_abc' names no checkpoint; expected"):
        resumed(tmp_path / "checkpoint_abc", State({}, None, 0), {})
