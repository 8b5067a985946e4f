"""Which tokens are learnt, for every way to say so: recorded texts with the learnt parts in [[ ]].

The texts were written by hand from the models' published chat formats.
"""

import random
import re

import marking
import pytest
from small_tokenizers import SYSTEM, TALK, byte_level, metaspace
from tokenizers import AddedToken, Regex, pre_tokenizers

from bridge import templates
from bridge import tokenizer as bt
from bridge.chat_templates import get_chat_template
from unsloth_jax.data import Row, collate
from workflows.responses import Detected, responses_only
from workflows.rows import rows

MARKS = ["<|turn>", "<turn|>", "<|end_of_turn|>", "<|im_sep|>", "<|user|>", "<|assistant|>"]
MARKS += ["<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|system|>", "<|endoftext|>"]
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
ASKED, SAID = LLAMA.format("user"), LLAMA.format("assistant")
GOLDEN = {
    "llama-3": (
        f"<BOS>{LLAMA.format('system')}Be brief.<|eot_id|>{ASKED}Hi there!<|eot_id|>"
        f"{SAID}[[Hello.<|eot_id|>]]{ASKED}What is 2+2?<|eot_id|>{SAID}[[It's 4.<|eot_id|>]]",
        ASKED, SAID, "",
    ),
    "llama-3.1": (
        f"<BOS>{LLAMA.format('system')}Cutting Knowledge Date: December 2023\n"
        f"Today Date: 26 July 2024\n\nBe brief.<|eot_id|>{ASKED}Hi there!<|eot_id|>"
        f"{SAID}[[Hello.<|eot_id|>]]{ASKED}What is 2+2?<|eot_id|>{SAID}[[It's 4.<|eot_id|>]]",
        ASKED, SAID, "",
    ),
    "qwen-2.5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there!<|im_end|>\n"
        "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[It's 4.<|im_end|>]]\n",
        "<|im_start|>user\n", "<|im_start|>assistant\n", "\n",
    ),
    "qwen-3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there!<|im_end|>\n"
        "<|im_start|>assistant\n[[Hello.<|im_end|>]]\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nIt's 4.<|im_end|>]]\n",
        "<|im_start|>user\n", "<|im_start|>assistant\n", "\n",
    ),
    "gemma-3": (
        "<BOS><start_of_turn>user\nBe brief.\n\nHi there!<end_of_turn>\n"
        "<start_of_turn>model\n[[Hello.<end_of_turn>]]\n"
        "<start_of_turn>user\nWhat is 2+2?<end_of_turn>\n"
        "<start_of_turn>model\n[[It's 4.<end_of_turn>]]\n",
        "<start_of_turn>user\n", "<start_of_turn>model\n", "\n",
    ),
    "mistral": (
        "<BOS>[INST] Be brief. Hi there! [/INST][[Hello.<EOS>]]"
        "[INST] What is 2+2? [/INST][[It's 4.<EOS>]]",
        "[INST]", "[/INST]", "",
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there!<|end|>\n<|assistant|>\n"
        "[[Hello.<|end|>]]\n<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\n[[It's 4.<|end|>]]\n",
        "<|user|>\n", "<|assistant|>\n", "\n",
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi there!"
        "<|im_end|><|im_start|>assistant<|im_sep|>[[Hello.<|im_end|>]]<|im_start|>user<|im_sep|>"
        "What is 2+2?<|im_end|><|im_start|>assistant<|im_sep|>[[It's 4.<|im_end|>]]",
        "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>", "",
    ),
}  # fmt: skip
# How Llama 3 splits text: line ends stay together whatever follows them.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPLIT = WORDS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def line_ends_together():
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return tokenizer


KINDS = {"byte_level": byte_level, "llama-3": line_ends_together, "metaspace": metaspace}
WHOLE = {"messages": [SYSTEM, *TALK]}
PAIR = {"prompt": [SYSTEM, *TALK[:3]], "completion": TALK[3:]}


def spoken(name: str, kind: str):
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return get_chat_template(tokenizer, name)


def one(tokenizer, example, **how) -> Row:
    return rows([example], tokenizer, max_length=None, **how)[0]


def golden(tokenizer, marked: str) -> Row:
    """The row of a text: a token is learnt if it ends within [[ ]]; the first one never is."""
    parts = re.split(r"\[\[|\]\]", marked)
    text = "".join(parts)
    tokens, ends = bt.encode(tokenizer, text, special=False)
    borders = [sum(map(len, parts[:n])) for n in range(len(parts) + 1)]
    learnt = [(borders[n], borders[n + 1]) for n in range(1, len(parts), 2)]
    return Row(tokens, [int(any(a < end <= z for a, z in learnt)) for end in ends])


def last_only(marked: str) -> str:
    before, part = marked.rsplit("[[", 1)
    return before.replace("[[", "").replace("]]", "") + "[[" + part


for_every_template = pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in GOLDEN for kind in KINDS]
)


@for_every_template
def test_answers_are_learnt_with_their_end_and_nothing_else(name, kind):
    tokenizer, (marked, *_) = spoken(name, kind), GOLDEN[name]
    assert one(tokenizer, WHOLE, assistant_only_loss=True) == golden(tokenizer, marked)


@for_every_template
def test_the_last_answer_alone_is_learnt_when_asked_and_as_a_completion(name, kind):
    tokenizer, want = spoken(name, kind), last_only(GOLDEN[name][0])
    want = golden(tokenizer, want)
    assert one(tokenizer, WHOLE, last_response_only=True) == want
    assert one(tokenizer, PAIR) == want == one(tokenizer, PAIR, completion_only_loss=True)


@for_every_template
def test_markers_learn_what_stands_between_them(name, kind):
    tokenizer, (marked, ask, say, after) = spoken(name, kind), GOLDEN[name]
    made = [one(tokenizer, WHOLE)]
    assert made[0].mask == [0] + [1] * (len(made[0].tokens) - 1)
    # Up to the next question, so with what follows an answer's end.
    between = golden(tokenizer, marked.replace(f"]]{after}", f"{after}]]"))
    # GPT-2 splits the header's line ends otherwise where a text follows them.
    exact = not (name.startswith("llama") and kind == "byte_level")
    assert responses_only(made, tokenizer, ask, say, force_match=exact) == [between]
    found = lambda **how: Row(made[0].tokens, Detected(tokenizer, **how)(*made[0]))
    assert found() == golden(tokenizer, marked)
    assert found(last_response_only=True) == golden(tokenizer, last_only(marked))


def test_an_end_of_turn_that_is_also_the_padding_is_learnt_and_padding_is_not():
    tokenizer = spoken("mistral", "byte_level")
    assert tokenizer.pad_token == tokenizer.eos_token == "<EOS>"
    row = one(tokenizer, WHOLE, assistant_only_loss=True)
    batch = collate([[row]], 1, len(row.tokens) + 9)
    learnt = batch.targets[0][batch.weights[0] > 0].tolist()
    assert learnt.count(tokenizer.eos_token_id) == 2 == row.tokens.count(tokenizer.eos_token_id)
    assert not batch.weights[0][len(row.tokens) - 1 :].any()
    padded = row.tokens + [tokenizer.pad_token_id] * 9
    labels = [t if on else -100 for t, on in zip(*row, strict=True)]
    given = {"input_ids": padded, "labels": labels + [-100] * 9}
    again = one(tokenizer, given | {"attention_mask": [1] * len(row.tokens) + [0] * 9})
    assert again == row


def drawn(seed: int) -> list[dict[str, str]]:
    """A conversation of words that no other message has."""
    rng = random.Random(seed)
    text = lambda role, n: " ".join(
        f"{role}{n}{rng.choice('abc')}" for _ in range(rng.randint(1, 3))
    )
    talk = [{"role": "system", "content": text("rule", 0)}] if rng.random() < 0.5 else []
    for n in range(rng.randint(1, 3)):
        talk.append({"role": "user", "content": text("ask", n)})
        talk.append({"role": "assistant", "content": text("say", n)})
    return talk


@pytest.mark.parametrize("name", templates.NAMED)
def test_any_conversation_has_one_bos_at_most_and_its_answers_learnt_to_their_ends(name):
    tokenizer = spoken(name, random.Random(name).choice([*KINDS]))
    end, bos = bt.end_of_turn(tokenizer), tokenizer.bos_token_id
    assert end is not None
    for talk in map(drawn, range(3)):
        row = one(tokenizer, {"messages": talk}, assistant_only_loss=True)
        asked = [m["content"] for m in talk if m["role"] == "user"]
        said = [m["content"] for m in talk if m["role"] == "assistant"]
        # Llama 2's own format begins each exchange with BOS.
        assert row.tokens.count(bos) <= (len(asked) if name == "llama" else 1)
        marked = marking.marked(tokenizer, *row)
        learnt = re.findall(r"\[\[(.*?)\]\]", marked, re.DOTALL)
        rest = re.sub(r"\[\[.*?\]\]", "", marked, flags=re.DOTALL)
        assert len(learnt) == len(said)
        assert all(a in part and "ask" not in part for a, part in zip(said, learnt, strict=True))
        assert all(text in rest for text in asked) and "say" not in rest
        stops = [i for i, t in enumerate(row.tokens) if t == end and row.mask[i]]
        assert len(stops) == len(said)
        ended = [i for i in stops if i + 1 == len(row.mask) or not row.mask[i + 1]]
        assert ended == stops
