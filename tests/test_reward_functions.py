"""Built-in reward functions, against TRL's where it has them."""

import json
import sys
import types

import pytest
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from workflows import numeric
from workflows import reward_functions as ours

said = lambda text: [{"role": "assistant", "content": text}]
THOUGHTS = [
    "<think>a</think>b", "<think>a", "b<think>a</think>", "<think>a<think>b</think>", "", "x",
    "<think></think>", "<think>a\nb</think>\nc",
]  # fmt: skip


def test_think_format_is_trls():
    talks = [said(text) for text in THOUGHTS]
    want = think_format_reward(talks)
    assert ours.think_format_reward(talks) == ours.think_format_reward(THOUGHTS) == want
    assert set(want) == {0.0, 1.0}


@pytest.mark.parametrize("longest, cache", [(100, 20), (100, 0), (50, 50)])
def test_soft_overlong_punishment_is_trls(longest, cache):
    ids = [[1] * n for n in (0, 1, longest - cache, longest - cache // 2, longest, longest + 1)]
    want = get_soft_overlong_punishment(longest, cache)(ids) if cache else [0, 0, 0, 0, 0, -1]
    found = ours.get_soft_overlong_punishment(longest, cache)(completion_ids=ids)
    assert found == pytest.approx(want)
    with pytest.raises(ValueError, match="soft_punish_cache"):
        ours.get_soft_overlong_punishment(longest, longest + 1)


def test_exact_format_wants_the_whole_completion():
    reward = ours.exact_format(r"<a>\d+</a>", reward=3.0, otherwise=-1.0, name="shape")
    texts = ["<a>12</a>", "x <a>12</a>", "<a>12</a>\n"]
    assert reward(completions=texts) == [3.0, -1.0, -1.0] and reward.__name__ == "shape"


@pytest.mark.parametrize(
    "text, value",
    [
        ("so 1,234.50 it is", 1234.5), ("-3", -3), ("5 - 3", 3), ("$-2.5", -2.5), ("1/4", 0.25),
        ("1 1/2", 1.5), (r"\frac{3}{4}", 0.75), ("6.02e23", 6.02e23), ("50%", 50), (".5", 0.5),
        ("H2O", None), ("", None), ("1/0", None), ("3 apples and 7", 7), ("−8", -8),
    ],
)  # fmt: skip
def test_numbers_are_read_from_text(text, value):
    found = numeric.number(text)
    assert (None if found is None else float(found.value)) == value


def test_a_numeric_answer_is_the_columns_number():
    rows = ["#### 42", 42, "1,000", "0.5", "7"]
    texts = ["it is 42.", "#### 41", "1000", "50%", "none"]
    reward = ours.numeric_answer("answer", wrong=-1.0, missing=-2.0)
    assert reward(completions=texts, answer=rows) == [1.0, -1.0, 1.0, 1.0, -2.0]
    tagged = ours.numeric_answer(tag="answer")
    assert tagged(completions=["<answer>3</answer> 4", "3"], answer=[3, 3]) == [1.0, 0.0]
    after = ours.numeric_answer(after="####")
    assert after(completions=["1 #### 3 4", "3"], answer=[3, 3]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="exclude each other"):
        ours.numeric_answer(after="x", tag="y")
    with pytest.raises(ValueError, match="no column 'answer'"):
        reward(completions=["1"])
    with pytest.raises(ValueError, match="has no number"):
        reward(completions=["1"], answer=["one"])


def test_reasoning_gyms_verifier_scores_the_tagged_answer(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "reasoning_gym", None)
        with pytest.raises(ImportError, match="pip install reasoning-gym"):
            ours.reasoning_gym_accuracy()
    made = types.ModuleType("reasoning_gym")
    asked = []

    def verifier(source):
        asked.append(source)
        return lambda answer, entry: float(answer == entry["answer"])

    made.get_score_answer_fn = verifier
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    entry = {"answer": "7", "metadata": {"source_dataset": "sums"}}
    rows = [entry, json.dumps(entry), entry]
    texts = ["<answer> 7 </answer>", said("<answer>8</answer>"), "7"]
    assert ours.reasoning_gym_accuracy()(completions=texts, entry=rows) == [1.0, 0.0, 0.0]
    assert ours.reasoning_gym_accuracy(tag=None)(completions=["7"], entry=[entry]) == [1.0]
    assert asked == ["sums", "sums"]


def test_a_program_passes_by_its_cases_or_asserts():
    cases = [{"input": "2", "output": "4\n"}, {"input": "3", "output": "9"}]
    right = "Here:\n```python\nprint(int(input()) ** 2)\n```"
    texts = [right, said("```\nprint(4)\n```"), "print(4)", "```python\nexit(0)\n```"]
    reward = ours.code_reward(missing=-1.0, seconds=10)
    tests = [cases, cases, cases, "assert square(2) == 4"]
    assert reward(completions=texts, tests=tests) == [1.0, 0.0, -1.0, 0.0]
    partly = ours.code_reward(partial=True, seconds=10)
    assert partly(completions=texts[1:2], tests=[cases]) == [0.5]
    square = "```python\ndef square(x):\n    return x * x\n```"
    assert reward(completions=[square], tests=["assert square(2) == 4"]) == [1.0]
