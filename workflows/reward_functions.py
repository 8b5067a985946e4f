"""Reward functions to start from. Completions are strings or conversations (the first message).

Each is a factory, but for `think_format_reward`; `name=` sets the function's `__name__`, which its
metrics carry, so that two of a kind can stand side by side.
"""

import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from workflows import numeric, sandbox
from workflows.reward_calls import text

Reward = Callable[..., list[float | None]]
FENCE = re.compile(r"```([^\n`]*)\n(.*?)```", re.DOTALL)
PYTHON = ("", "python", "python3", "py")  # what may stand behind a fence's opening


def _named(function: Callable, name: str) -> Reward:
    function.__name__ = function.__qualname__ = name
    return function


def exact_format(
    pattern: str,
    *,
    reward: float | int = 1.0,
    otherwise: float | int = 0.0,
    flags: int = re.DOTALL,
    name: str = "exact_format_reward",
) -> Reward:
    """`reward` where the whole completion matches a regular expression.

    A pattern that backtracks without end blocks Python itself: no timeout helps.
    """
    whole = re.compile(pattern, flags)

    def score(completions: Sequence, **kwargs: Any) -> list[float | int]:
        return [reward if whole.fullmatch(text(c)) else otherwise for c in completions]

    return _named(score, name)


def think_format_reward(completions: Sequence, **kwargs: Any) -> list[float | int]:
    """1 where a completion starts with `<think>`, once, and closes it; TRL's function."""
    starts = [text(completion).partition("<think>") for completion in completions]
    return [
        1.0 if tag and not before and tag not in rest and "</think>" in rest else 0.0
        for before, tag, rest in starts
    ]


def tagged(completion: str, tag: str) -> str | None:
    """What stands in the last `<tag>...</tag>`, stripped; None where there is none."""
    head, closing, _ = completion.rpartition(f"</{tag}>")
    _, opening, inside = head.rpartition(f"<{tag}>")
    return inside.partition(closing)[0].strip() if opening else None


def numeric_answer(
    column: str = "answer",
    *,
    after: str | None = None,
    tag: str | None = None,
    reward: float | int = 1.0,
    wrong: float | int = 0.0,
    missing: float | int = 0.0,
    tolerance: float | int = 0.0,
    name: str = "numeric_answer_reward",
) -> Reward:
    """`reward` where a completion's number is that of the data's `column`, exactly.

    The number is a completion's last; with `after="####"` the first behind the last marker; with
    `tag="answer"` the last inside the last `<answer>...</answer>`. `missing` where there is none.
    `numeric.numbers` says what is read; 50% equals 0.5 and 50. Raises ValueError for a row of
    `column` without a number, and for both `after` and `tag`.
    """
    if after is not None and tag is not None:
        raise ValueError(f"numeric_answer: after={after!r} and tag={tag!r} exclude each other")

    def one(completion: str, truth: Any) -> float | int:
        wanted = numeric.number(truth)
        if wanted is None:
            raise ValueError(f"column {column!r} has no number: {truth!r:.200}")
        found = _found(completion, after, tag)
        if found is None:
            return missing
        return reward if numeric.same(found, wanted, tolerance) else wrong

    def score(completions: Sequence, **kwargs: Any) -> list[float | int]:
        pairs = zip(completions, _column(kwargs, column), strict=True)
        return [one(text(completion), truth) for completion, truth in pairs]

    return _named(score, name)


def _found(completion: str, after: str | None, tag: str | None) -> numeric.Number | None:
    if after is not None:
        _, marker, rest = completion.rpartition(after)
        return (numeric.numbers(rest) or [None])[0] if marker else None
    inside = completion if tag is None else tagged(completion, tag)
    return (numeric.numbers(inside or "") or [None])[-1]


def _column(kwargs: Mapping[str, Any], column: str) -> Any:
    if column not in kwargs:
        raise ValueError(f"the data has no column {column!r}")
    return kwargs[column]


def reasoning_gym_accuracy(
    column: str = "entry", *, tag: str | None = "answer", name: str = "reasoning_gym_reward"
) -> Reward:
    """The score, 0 to 1, that reasoning-gym's verifier gives to a completion's answer.

    `column` holds the task's entries (question, answer, metadata) as dictionaries or as JSON; the
    metadata's `source_dataset` names the verifier. The answer is what stands in the last tag,
    0 where there is none; `tag=None` takes the whole completion. Some verifiers hand the answer to
    SymPy, which evaluates it as Python in this process.
    Raises ImportError where the package is missing.
    """
    try:
        from reasoning_gym import get_score_answer_fn
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ImportError("this reward needs `pip install reasoning-gym`") from error
    verifiers: dict[str, Callable] = {}

    def one(completion: str, given: Any) -> float:
        entry = json.loads(given) if isinstance(given, str) else given
        source = entry["metadata"]["source_dataset"]
        if source not in verifiers:
            verifiers[source] = get_score_answer_fn(source)
        answer = completion.strip() if tag is None else tagged(completion, tag)
        return 0.0 if answer is None else float(verifiers[source](answer=answer, entry=entry))

    def score(completions: Sequence, **kwargs: Any) -> list[float | int]:
        pairs = zip(completions, _column(kwargs, column), strict=True)
        return [one(text(completion), entry) for completion, entry in pairs]

    return _named(score, name)


def get_soft_overlong_punishment(
    max_completion_len: int,
    soft_punish_cache: int,
    *,
    name: str = "soft_overlong_punishment_reward",
) -> Reward:
    """0 up to `max_completion_len - soft_punish_cache` tokens, then down to -1 in a line.

    Of DAPO (arXiv:2503.14476, equation 13), by TRL's name. Raises ValueError for lengths of which
    the second is not within the first.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache={soft_punish_cache} must be 0 to {max_completion_len=}"
        )
    free = max_completion_len - soft_punish_cache

    def one(length: int) -> float:
        if length <= free:
            return 0.0
        return -1.0 if length > max_completion_len else (free - length) / soft_punish_cache

    def score(completion_ids: Sequence, **kwargs: Any) -> list[float | int]:
        return [one(len(ids)) for ids in completion_ids]

    return _named(score, name)


def code_reward(
    column: str = "tests",
    *,
    partial: bool = False,
    missing: float | int = 0.0,
    seconds: float | int = 5,
    memory_bytes: int = 512 * sandbox.MiB,
    workers: int | None = None,
    name: str = "code_reward",
) -> Reward:
    """1 where the completion's last fenced Python block passes its row's tests, in the sandbox.

    A row of `column` is a list of cases {"input", "output"} (standard input, and what must be
    printed, but for white space at lines' ends), or Python text with asserts that runs behind the
    program. With `partial` the share of cases that pass. Asserts share a process with the program:
    one that looks for a way to pass without an answer finds it. Cases don't.
    `missing` where there is no block; `seconds` and `memory_bytes` are a program's.
    Raises RuntimeError where there is no sandbox.
    """
    limits = {"seconds": seconds, "memory_bytes": memory_bytes}

    def one(completion: str, tests: Any) -> float | int:
        fenced = FENCE.findall(completion)
        blocks = [block for kind, block in fenced if kind.strip().lower() in PYTHON]
        if not blocks:
            return missing
        if isinstance(tests, str):
            return float(_asserts(blocks[-1], tests, limits))
        if not tests:
            raise ValueError(f"column {column!r} has no tests: {tests!r}")
        passed = 0
        for case in tests:
            right = _prints(blocks[-1], case, limits)
            if not (right or partial):
                return 0.0
            passed += right
        return passed / len(tests)

    def score(completions: Sequence, **kwargs: Any) -> list[float | int]:
        tests = _column(kwargs, column)
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            return list(pool.map(one, [text(c) for c in completions], tests))

    return _named(score, name)


def _prints(program: str, case: Mapping[str, str], limits: Mapping[str, Any]) -> bool:
    result = sandbox.run(program, case["input"], **limits)
    return result.status == "ok" and _lines(result.out) == _lines(case["output"])


def _lines(printed: str) -> list[str]:
    return [line.rstrip() for line in printed.rstrip().splitlines()]


def _asserts(program: str, tests: str, limits: Mapping[str, Any]) -> bool:
    # A word nobody can guess says that the tests' end was reached: exit(0) does not pass.
    word = secrets.token_hex(16)
    result = sandbox.run(f"{program}\n\n{tests}\n\nprint({word!r})\n", **limits)
    return result.status == "ok" and result.out.rstrip().endswith(word)
