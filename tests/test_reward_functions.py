"""Built-in reward functions, against TRL's and reasoning-gym's where these have them."""

import json
import random
import re
import sys
import types
from fractions import Fraction

import pytest
from trl.rewards import get_soft_overlong_punishment as trls_punishment
from trl.rewards import think_format_reward as trls_think_format

from workflows import numeric
from workflows import reward_functions as built_in
from workflows.rewards import Rewards


def says(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_think_format_is_trls():
    parts = ["<think>", "</think>", "\n", "a", " ", "<thi", "nk>"]
    draw = random.Random(3)
    texts = ["".join(draw.choices(parts, k=draw.randint(0, 6))) for _ in range(400)]
    texts += ["<think>" + text for text in texts]
    want = trls_think_format(says(*texts))
    assert built_in.think_format_reward(texts) == want
    assert built_in.think_format_reward(says(*texts)) == want
    assert 20 < sum(want) < len(want) - 20


@pytest.mark.parametrize("most, cache", [(100, 20), (10, 10), (10, 0), (7, 3)])
def test_overlong_punishment_is_trls(most, cache):
    ids = [[1] * n for n in range(most + 5)]
    ours = built_in.get_soft_overlong_punishment(most, cache)
    theirs = trls_punishment(most, cache)
    assert ours(completion_ids=ids) == theirs(completion_ids=ids)
    assert ours.__name__ == theirs.__name__


def test_overlong_lengths_must_fit():
    with pytest.raises(ValueError, match="soft_punish_cache=11 must be 0 to max_completion_len=10"):
        built_in.get_soft_overlong_punishment(10, 11)


def test_exact_format_matches_the_whole_completion():
    score = built_in.exact_format(r"<a>.*</a>\s*", reward=3.0, otherwise=-0.5)
    texts = ["<a>x\ny</a>\n", "<a>x</a> so", "so <a>x</a>", ""]
    assert score(completions=texts) == score(completions=says(*texts)) == [3.0, -0.5, -0.5, -0.5]
    assert built_in.exact_format("[a-z]+", flags=re.I)(completions=["ABC"]) == [1.0]


def test_an_empty_conversation_is_an_empty_text():
    assert built_in.think_format_reward([[], ""]) == [0.0, 0.0]
    with pytest.raises(TypeError, match="a completion is a string or messages with text"):
        built_in.think_format_reward([[{"role": "assistant", "content": None}]])


@pytest.mark.parametrize(
    "text, values",
    [
        ("it is 1,234.50.", ["2469/2"]),
        ("-5 and x=-5, −3, +8", ["-5", "-5", "-3", "8"]),
        ("3-5 (4)-7", ["3", "5", "4", "7"]),
        ("-$5 or $-5 or $1,000,000", ["-5", "-5", "1000000"]),
        (".5, 0.25, 1e-3 7.", ["1/2", "1/4", "1/1000", "7"]),
        ("3/4 -1/2 1 1/2", ["3/4", "-1/2", "3/2"]),
        (r"\boxed{\frac{3}{4}} 2\dfrac{1}{2} \frac{-1}{2}", ["3/4", "5/2", "-1/2"]),
        ("H2O v2.5 3.5.2 5km", ["7/2", "5"]),
        ("3/0, 1/1", ["1"]),
        ("1,2,3", ["1", "2", "3"]),
        ("9" * 5000, []),
        ("none", []),
    ],
)
def test_numbers_are_read_exactly(text, values):
    assert [number.value for number in numeric.numbers(text)] == [Fraction(x) for x in values]


def test_percentages_equal_their_share_and_their_number():
    one = lambda text: numeric.numbers(text)[0]
    for a, b in (("50%", "50 %"), ("50%", "0.5"), ("50", r"50\%"), ("12.5%", "1/8")):
        assert numeric.same(one(a), one(b)) and numeric.same(one(b), one(a))
    assert not numeric.same(one("0.5%"), one("50%"))
    assert not numeric.same(one("50%"), one("5"))


def test_reading_numbers_takes_no_time_on_noise():
    for piece in ("1", "1 ", "1,111", "-", "\\frac{", "1/", "1e"):
        assert len(numeric.numbers(piece * 20_000)) >= 0
    assert built_in.tagged("<answer>" * 20_000, "answer") is None


def answered(texts, truths, **settings):
    return built_in.numeric_answer(**settings)(completions=texts, answer=truths)


def test_numeric_answers():
    texts = ["so 3 + 4 = 7", "7 it is, not 8", "none", "7.0"]
    assert answered(texts, [7, "7", 7, 7.0], wrong=-1.0, missing=-2.0) == [1, -1, -2, 1]
    assert answered(says(*texts), [7] * 4) == [1, 0, 0, 1]
    gsm8k = "Natalia sold 48/2 = 24 clips\n#### 1,072"
    assert answered(["1072", "#### 1072 of 5", "24"], [gsm8k] * 3) == [1, 0, 0]
    marked = ["#### 1,072 of 5", "1072", "#### 3 #### $1072", "1072 ####"]
    assert answered(marked, [gsm8k] * 4, after="####") == [1, 0, 1, 0]
    inside = [
        "<answer>x = 5</answer> of 6",
        "5",
        "<answer>4</answer><answer>5</answer>",
        "<answer>5",
    ]
    assert answered(inside, [5] * 4, tag="answer") == [1, 0, 1, 0]
    assert answered(["3.14"], [3.14159], tolerance=0.01) == [1]
    assert answered(["0.1"], [0.1]) == [1]


def test_a_row_without_a_number_and_two_places_are_refused():
    with pytest.raises(ValueError, match="column 'answer' has no number: 'many'"):
        answered(["7"], ["many"])
    with pytest.raises(ValueError, match="after='####' and tag='a' exclude each other"):
        built_in.numeric_answer(after="####", tag="a")
    with pytest.raises(ValueError, match="the data has no column 'answer'"):
        built_in.numeric_answer()(completions=["7"])


def test_built_ins_stand_side_by_side_by_name():
    first = built_in.numeric_answer(reward=2.0)
    second = built_in.exact_format(r"\d+", name="digits")
    scores = Rewards([first, second, built_in.think_format_reward]).score(
        [{"prompt": "p", "answer": "7"}], ["7", "it is 7", "8"], [[1]] * 3
    )
    assert scores.rewards.tolist() == [[2, 1, 0], [2, 0, 0], [0, 1, 0]]
    assert "rewards/digits/mean" in scores.metrics


def test_reasoning_gym_accuracy_is_its_verifiers():
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    entries, texts, want = [], [], []
    for name in ("chain_sum", "spell_backward", "leg_counting"):
        entry = gym.create_dataset(name, size=1, seed=1)[0]
        for answer in (entry["answer"], "12", "", None):
            entries.append(entry)
            texts.append("no tag" if answer is None else f"<answer> {answer} </answer>")
            want.append(0.0 if answer is None else gym.get_score_answer_fn(name)(answer, entry))
    score = built_in.reasoning_gym_accuracy()
    assert score(completions=texts, entry=entries) == want and want[0] == 1.0
    plain = built_in.reasoning_gym_accuracy(tag=None)
    assert plain(completions=[entries[0]["answer"]], entry=[entries[0]]) == [1.0]


def test_reasoning_gyms_verifier_scores_the_tagged_answer(monkeypatch):
    made = types.ModuleType("reasoning_gym")
    asked = []

    def verifier(source):
        asked.append(source)
        return lambda answer, entry: float(answer == entry["answer"])

    made.get_score_answer_fn = verifier
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    entry = {"answer": "7", "metadata": {"source_dataset": "sums"}}
    rows = [entry, json.dumps(entry), entry]
    texts = ["<answer> 7 </answer>", says("<answer>8</answer>")[0], "7"]
    assert built_in.reasoning_gym_accuracy()(completions=texts, entry=rows) == [1.0, 0.0, 0.0]
    assert built_in.reasoning_gym_accuracy(tag=None)(completions=["7"], entry=[entry]) == [1.0]
    assert asked == ["sums", "sums"]


def test_a_missing_reasoning_gym_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="^this reward needs `pip install reasoning-gym`$"):
        built_in.reasoning_gym_accuracy()


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")
ADDS = "Here:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```\nDone."
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}]
CONSTANT = ADDS.replace("a + b", "3")


@LINUX
def test_programs_are_rewarded_by_what_they_print():
    texts = [ADDS, CONSTANT, "no program", "```python\n1/0\n```", ADDS.replace("python", "js")]
    score = built_in.code_reward(missing=-1.0)
    assert score(completions=texts, tests=[CASES] * 5) == [1, 0, -1, 0, -1]
    partial = built_in.code_reward(partial=True)
    assert partial(completions=says(ADDS, CONSTANT), tests=[CASES] * 2) == [1, 0.5]


@LINUX
def test_the_last_python_block_counts():
    text = "```js\nlet a\n```\nthen\n```python\nprint(1)\n```\nor\n``` Python3 \nprint(2)\n```"
    score = built_in.code_reward()
    assert score(completions=[text], tests=[[{"input": "", "output": "2"}]]) == [1]


@LINUX
def test_asserts_must_be_reached():
    tests = "assert double(2) == 4\nassert double('a') == 'aa'"
    program = "```python\ndef double(x):\n    return {}\n```"
    leaves = "```python\nimport os\nos._exit(0)\n```"
    texts = [program.format("2 * x"), program.format("x + 2"), leaves]
    assert built_in.code_reward()(completions=texts, tests=[tests] * 3) == [1, 0, 0]


@LINUX
def test_rows_without_tests_are_told():
    with pytest.raises(ValueError, match="column 'tests' has no tests"):
        built_in.code_reward()(completions=[ADDS], tests=[[]])
