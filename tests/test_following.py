"""A learning rate that follows the evaluations: which rates a run takes, and goes on with."""

import jax
import optax
import pytest
import tiny_chat
import torch
from transformers import get_scheduler

from unsloth_jax import SFTConfig, SFTTrainer
from workflows.run import short_hash

SETTINGS = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=0.2, max_length=64,
    lr_scheduler_type="reduce_lr_on_plateau", optim="adamw_torch", eval_strategy="steps",
    eval_steps=1, max_steps=6, lr_scheduler_kwargs=dict(patience=0, factor=0.5, cooldown=1),
)  # fmt: skip


def trainer(
    model, held_out=tiny_chat.MESSAGES[:3], optimizers=(None, None), **changes
) -> SFTTrainer:
    return SFTTrainer(
        model=model, train_dataset=tiny_chat.MESSAGES, eval_dataset=held_out,
        args=SFTConfig(**(SETTINGS | changes)), optimizers=optimizers,
    )  # fmt: skip


def taken(run, name="learning_rate") -> list[float]:
    return [row[name] for row in run.log_history if name in row]


def expected(run, metric="eval_loss", start=0, **more) -> list[float]:
    """torch's rate of each step, from the run's own metrics but the `start` first ones."""
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=SETTINGS["learning_rate"])
    kwargs = SETTINGS["lr_scheduler_kwargs"] | more
    scheduler, rates = get_scheduler(run.args.lr_scheduler_type, theirs, 0, 6, kwargs), []
    for value in taken(run, metric)[start:]:
        rates.append(theirs.param_groups[0]["lr"])
        scheduler.step(value)
    return rates


def test_a_run_takes_torchs_rates_goes_on_with_them_and_compiles_nothing_for_them(fresh, tmp_path):
    start, compiled = fresh.adapters, []

    class Steps:
        def on_step_end(self, args, state, control, **more):
            compiled.append(state.global_step)

    listen = lambda name, seconds, **more: (
        name.endswith("backend_compile_duration") and (compiled.append("compiled"))
    )
    run = trainer(fresh, output_dir=str(tmp_path), save_strategy="steps", save_steps=3)
    run.add_callback(Steps)
    jax.monitoring.register_event_duration_secs_listener(listen)
    run.train()
    jax.monitoring.unregister_event_duration_listener(listen)
    rates = taken(run)
    assert rates == pytest.approx(expected(run)) and len(set(rates)) > 2
    assert compiled[compiled.index(2) :] == [2, 3, 4, 5, 6]
    whole = short_hash(fresh.adapters)
    fresh.adapters = start
    again = trainer(fresh, output_dir=str(tmp_path), save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint_3"))
    assert taken(again) == rates and short_hash(fresh.adapters) == whole
    assert rates[5] < rates[3] < rates[0]  # changed before and after the checkpoint


def test_the_steps_take_the_rate_that_is_logged(fresh):
    kwargs = dict(patience=0, factor=1e-9, mode="max")  # a falling loss is a bad one
    run = trainer(fresh, lr_scheduler_kwargs=kwargs, eval_on_start=True)
    run.train()
    assert taken(run) == pytest.approx(expected(run, start=1, cooldown=0, **kwargs))
    still = taken(run).index(min(taken(run)))
    losses = taken(run, "eval_loss")[1:]
    assert 0 < still < 5 and losses[still - 1 :] == pytest.approx(
        [losses[still - 1]] * (6 - still + 1)
    )
    assert losses[still - 2] != pytest.approx(losses[still - 1], rel=1e-3)


def test_a_metric_that_should_grow_is_taken_as_such(fresh):
    run = trainer(fresh, metric_for_best_model="perplexity", greater_is_better=True)
    run.train()
    assert taken(run) == pytest.approx(expected(run, "eval_perplexity", mode="max"))
    other = dict(lr_scheduler_type="greedy", metric_for_best_model="perplexity")
    assert (
        trainer(fresh, lr_scheduler_kwargs={"min_lr": 0}, **other).args.schedule(0, 6).mode == "max"
    )


REFUSED = {
    "no evaluation": (
        dict(held_out=None, eval_strategy="no"),
        "'reduce_lr_on_plateau' need an eva",
    ),
    "an optimizer": (
        dict(optimizers=(optax.sgd(0.1), None)),
        "one that is handed over holds its own",
    ),
    "another metric": (dict(metric_for_best_model="accuracy"), "accuracy"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_rate_that_nothing_can_move_is_refused(fresh, how):
    changes, message = REFUSED[how]
    with pytest.raises(ValueError, match=message):
        trainer(fresh, **changes).train()


def test_another_metric_refuses_to_go_on(fresh, tmp_path):
    saved = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=2)
    trainer(fresh, max_steps=2, **saved).train()
    for other in (dict(eval_steps=2), dict(held_out=tiny_chat.MESSAGES[1:3])):
        with pytest.raises(ValueError, match="belongs to another run.*'rate follows'"):
            trainer(fresh, max_steps=2, **saved, **other).train(resume_from_checkpoint=True)
