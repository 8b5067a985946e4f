"""Reward functions: what they are called with, what they may return, how their errors are told."""

import asyncio
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd

from workflows import keywords, rewards
from workflows.rewards import RewardError, Rewards

ROWS = [{"prompt": f"p{i}", "answer": i, "entry": {"of": i}} for i in range(3)]
TEXTS = [f"text {i}" for i in range(6)]
IDS = [[7] * (i + 1) for i in range(6)]


def scored(*functions, **settings):
    with_close = Rewards(list(functions), **settings)
    try:
        return with_close.score(ROWS, TEXTS, IDS, SimpleNamespace(global_step=5))
    finally:
        with_close.close()


def gives(values, name="given"):
    def function(completions, **kwargs):
        return values if len(completions) == len(TEXTS) else values[: len(completions)]

    function.__name__ = name
    return function


def everything(seen):
    def function(**kwargs):
        seen.update(kwargs)
        return [len(kwargs["completions"][i]) / (1 + i) for i in range(len(kwargs["prompts"]))]

    return function


def some(prompts, completions, completion_ids, answer, log_extra, log_metric, **kwargs):
    log_metric("longest", max(len(ids) for ids in completion_ids))
    for ids in completion_ids:
        log_extra("length", [len(ids)])
    return [None if a == 1 else float(a) for a in answer]


async def waits(completions, trainer_state, **kwargs):
    await asyncio.sleep(0.01)
    return [None if "3" in text else trainer_state.global_step for text in completions]


def trls(functions):
    """TRL's rewards, keywords, metrics and columns for the same batch."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    extra, metrics = {}, {}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=5),
        environments=None,
        async_loop=loop,
        reward_funcs=functions,
        reward_processing_classes=[None] * len(functions),
        reward_func_names=[f.__name__ for f in functions],
        _log_completion_extra=lambda name, values: extra.setdefault(name, []).extend(values),
        _log_metric=lambda name, value: metrics.setdefault(name, []).append(value),
    )
    inputs = [row for row in ROWS for _ in range(2)]
    prompts = [row["prompt"] for row in inputs]
    out = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, TEXTS, IDS)
    loop.call_soon_threadsafe(loop.stop)
    return out, extra, metrics


def test_rewards_keywords_metrics_and_columns_are_trls():
    ours, theirs = {}, {}
    got = scored(everything(ours), some, waits)
    want, extra, metrics = trls([everything(theirs), some, waits])
    np.testing.assert_allclose(got.rewards, want.numpy(), rtol=1e-6)
    assert np.isnan(got.rewards).sum() == 3
    assert got.extra == extra == {"length": [1, 2, 3, 4, 5, 6]}
    assert got.logged == metrics == {"longest": [6]}
    for seen in (ours, theirs):
        for name in ("log_extra", "log_metric", "trainer_state"):
            assert seen.pop(name)
    assert ours == theirs
    for i, name in enumerate(("function", "some", "waits")):
        mean, std = torch.nanmean(want[:, i]), nanstd(want[:, i])
        assert got.metrics[f"rewards/{name}/mean"] == pytest.approx(mean.item(), rel=1e-6)
        assert got.metrics[f"rewards/{name}/std"] == pytest.approx(std.item(), rel=1e-6)


def test_a_function_without_kwargs_gets_what_it_names():
    def few(answer, completion_ids, weight=2.0):
        return [weight * a + len(ids) for a, ids in zip(answer, completion_ids, strict=True)]

    assert scored(few).rewards[:, 0].tolist() == [1, 2, 5, 6, 9, 10]


def test_a_missing_column_is_named_before_any_call():
    def asks(answer, solution):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=r"'asks' needs \['solution'\].*\['answer', 'entry'\]"):
        scored(asks)
    with pytest.raises(ValueError, match=r"\['prompts'\] have names of reward keywords"):
        Rewards(some).check(["prompts", "answer"])


def test_numbers_of_every_kind_are_taken():
    kinds = [True, 2, 0.5, np.float32(1.5), torch.tensor(2.5, dtype=torch.bfloat16), None]
    got = scored(gives(kinds), gives(np.arange(6), "array"), gives(torch.ones(6), "tensor"))
    np.testing.assert_array_equal(got.rewards[:, 0], [1, 2, 0.5, 1.5, 2.5, np.nan])
    assert got.rewards[:, 1].tolist() == list(range(6)) and got.rewards[:, 2].sum() == 6
    assert got.rewards.dtype == np.float64
    assert scored(lambda completions: (float(c[-1]) for c in completions)).rewards.sum() == 15


@pytest.mark.parametrize(
    "values, error, told",
    [
        ([1.0] * 5, ValueError, "'given' returned 5 rewards for 6 completions"),
        ([0, float("nan"), 0, 0, 0, 0], ValueError, "'given' gave nan for row 1, 'text 1': None"),
        ([0, 0, 0, -np.inf, 0, 0], ValueError, "gave -inf for row 3, 'text 3'"),
        ([0, 0, 10**400, 0, 0, 0], ValueError, "for row 2, 'text 2'"),
        ([0, 0, 0, 0, 0, "1"], TypeError, "gave '1' for row 5, 'text 5': expected a number"),
        ([0, 0, 0, 0, 0, np.ones(2)], TypeError, "row 5, 'text 5': expected a number"),
        ("123456", TypeError, "'given' must return a list, got '123456'"),
        (dict.fromkeys(range(6)), TypeError, "'given' must return a list"),
    ],
)
def test_what_is_no_reward_is_told_by_function_row_and_completion(values, error, told):
    with pytest.raises(error) as caught:
        scored(some, gives(values))
    assert told in str(caught.value)


def test_returning_nothing_and_forgetting_async_are_told():
    async def coroutine(completions):
        return [0.0] * len(completions)

    def forgot(**kwargs):
        return coroutine(kwargs["completions"])

    def nothing(completions):
        pass

    with pytest.raises(TypeError, match="'nothing' must return a list, got None"):
        scored(nothing)
    with pytest.raises(TypeError, match="'forgot' gave a coroutine: define it with `async def`"):
        scored(forgot)


def test_an_exception_names_function_row_and_completion():
    def fails(completions, answer, log_metric):
        log_metric("calls", 1)
        return [1 / (a - 1) for a in answer]

    async def fails_later(completions):
        await asyncio.sleep(0)
        return [{}[text] for text in completions if text == "text 4"] + [0.0] * 6

    with pytest.raises(RewardError) as caught:
        scored(some, fails)
    told = "'fails' raised ZeroDivisionError: division by zero; at row 2 of 6, completion 'text 2'"
    assert told in str(caught.value) and isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(RewardError, match="'fails_later' raised KeyError.*row 4 of 6.*'text 4'"):
        scored(fails_later)


def test_an_error_of_the_whole_batch_alone_is_told_as_such():
    def all_or_nothing(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [completions[1]]  # another error is not the one looked for

    with pytest.raises(RewardError, match="too many; none of the 6 rows raises it alone"):
        scored(all_or_nothing)


def test_exit_in_a_function_is_an_error_too():
    def leaves(completions):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="'leaves' raised SystemExit: 3; at row 0"):
        scored(leaves)


def test_long_completions_are_cut_in_messages():
    def fails(completions):
        raise ValueError("no")

    with pytest.raises(RewardError, match=r"'a{299}\.\.\. \(5002 characters\)"):
        Rewards(fails).score(ROWS[:1], ["a" * 5000], [[1]])


def test_functions_run_side_by_side():
    gate = threading.Barrier(3)

    def first(completions):
        gate.wait(10)
        return [threading.get_ident()] * len(completions)

    def second(completions):
        gate.wait(10)
        return [threading.get_ident()] * len(completions)

    async def third(completions):
        await asyncio.to_thread(gate.wait, 10)
        return [0] * len(completions)

    got = scored(first, second, third)
    assert len({*got.rewards[0], threading.get_ident()}) == 4


def test_async_functions_meet_in_one_loop_that_stays():
    loops = []

    def make(name, met, meets):
        async def function(completions):
            loops.append(asyncio.get_running_loop())
            met.append(1)
            while len(met) < meets:
                await asyncio.sleep(0.001)
            return [0.0] * len(completions)

        function.__name__ = name
        return function

    met = []
    both = Rewards([make("a", met, 2), make("b", met, 2)], timeout=20)
    both.score(ROWS, TEXTS, IDS)
    both.score(ROWS, TEXTS, IDS)
    assert len(loops) == 4 and len(set(loops)) == 1
    both.close()
    both.score(ROWS, TEXTS, IDS)
    assert len(set(loops)) == 2
    both.close()


def test_closing_ends_the_loop_and_its_thread(monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    before = set(threading.enumerate())
    run = Rewards([waits])
    run.score(ROWS, TEXTS, IDS, SimpleNamespace(global_step=1))
    (thread,) = set(threading.enumerate()) - before
    loop = run._loop
    run.close()
    thread.join(10)
    assert loop.is_closed() and not thread.is_alive() and not failed


def test_the_timeout_names_those_who_are_late():
    free = threading.Event()
    cancelled = threading.Event()

    def slow(completions):
        free.wait(20)
        return [0.0] * len(completions)

    async def slow_too(completions):
        try:
            await asyncio.sleep(20)
        finally:
            cancelled.set()

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"\['slow', 'slow_too'\] took more than 1.0 s for 6"):
        scored(some, slow, slow_too, timeout=1.0)
    assert time.monotonic() - began < 10
    assert cancelled.wait(5)
    free.set()


def test_looking_for_the_row_ends_with_the_timeout():
    free = threading.Event()

    def hangs_alone(completions):
        if len(completions) > 1:
            raise ValueError("many")
        free.wait(20)

    with pytest.raises(RewardError, match="many; tried one by one, 0 of 6 rows ended in time"):
        scored(hangs_alone, timeout=0.2)
    free.set()


def test_functions_do_not_see_each_others_changes():
    def spoils(completions, answer, completion_ids):
        for values in (completions, answer, completion_ids):
            values.clear()
        return [0.0] * 6

    def reads(completions, answer, completion_ids):
        time.sleep(0.05)
        return [len(completions) + len(answer) + len(completion_ids)] * 6

    assert scored(spoils, reads).rewards[:, 1].tolist() == [18] * 6


def test_completions_without_any_reward_are_counted_and_told_once(capsys):
    keywords._said.clear()
    run = Rewards([gives([None, None, 1, 0, 0, 0]), gives([None, 1, None, 0, 0, 0], "other")])
    assert run.score(ROWS, TEXTS, IDS).unscored == 1
    assert run.score(ROWS, TEXTS[::-1], IDS).unscored == 1
    told = capsys.readouterr().out
    assert told.count("no reward function gave row 0 a reward") == 1 and "'text 0'" in told


def test_a_function_that_gives_nothing_has_no_metrics():
    got = scored(gives([None] * 6), gives([None] * 5 + [2.0], "other"))
    assert got.metrics == {"rewards/other/mean": 2.0, "rewards/other/std": 0.0}
    assert got.unscored == 5


@pytest.mark.parametrize(
    "functions, settings, error, told",
    [
        ([], {}, ValueError, "no reward function was given"),
        (None, {}, ValueError, "no reward function was given"),
        (5, {}, TypeError, "reward function 0 is 5; functions are taken"),
        ([some, some], {}, ValueError, r"share the names \['some'\]"),
        ([some, "a/model"], {}, TypeError, "reward function 1 is 'a/model'; functions are taken"),
        ("a/model", {}, TypeError, "reward function 0 is 'a/model'"),
        ([torch.nn.Linear(1, 1)], {}, TypeError, "0, a Linear, needs a __name__"),
        ([some, waits], {"reward_weights": [1.0]}, ValueError, "1 reward_weights for 2 functions"),
        (some, {"reward_weights": [np.nan]}, ValueError, "must be finite"),
        (some, {"timeout": 0}, ValueError, "timeout=0 of rewards must be positive"),
    ],
)
def test_what_can_be_known_before_a_run_raises_at_once(functions, settings, error, told):
    with pytest.raises(error, match=told):
        Rewards(functions, **settings)


def test_names_and_weights():
    class Judge:
        __name__ = "judge"

        async def __call__(self, completions, scale=1):
            return [scale] * len(completions)

    run = Rewards([some, partial(waits, x=1), Judge()], [1, 0.5, 0])
    assert run.names == ["some", "waits", "judge"] and run.weights.tolist() == [1, 0.5, 0]
    assert Rewards(some).weights.tolist() == [1]
    assert scored(Judge()).rewards.sum() == 6


@pytest.mark.parametrize(
    "rows, texts, ids, told",
    [
        (ROWS, TEXTS[:5], IDS[:5], "5 completions are no whole groups of 3 rows"),
        (ROWS, TEXTS, IDS[:5], "5 completion_ids for 6 completions"),
        ([*ROWS[:2], {"prompt": "p"}], TEXTS, IDS, r"row 2 has columns \['prompt'\]"),
        ([{"text": "p"}], TEXTS, IDS, "expected 'prompt'"),
    ],
)
def test_rows_and_completions_must_fit(rows, texts, ids, told):
    with pytest.raises(ValueError, match=told):
        Rewards(some).score(rows, texts, ids)


def test_logged_columns_are_whole_and_of_one_function():
    def short(completions, log_extra):
        log_extra("x", [1, 2])
        return [0.0] * 6

    def full(completions, log_extra):
        log_extra("length", list(range(6)))
        return [0.0] * 6

    with pytest.raises(ValueError, match="'short' logged 2 values of column 'x', expected 6"):
        scored(short)
    with pytest.raises(ValueError, match="'full' logged 6 values of column 'length'"):
        scored(some, full)


def test_scores_go_into_advantages():
    from unsloth_jax.advantages import advantages

    got = scored(some, waits)
    out = advantages(got.rewards, np.array([1.0, 0.5]), 2)
    assert np.isfinite(out.values).all() and isinstance(got, rewards.Scores)
