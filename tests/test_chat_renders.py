"""The named chat templates: the recorded renders, what must hold of any conversation, llama.cpp."""

import datetime
import json
from functools import cache
from pathlib import Path

import jinja2
import marking
import pytest
from small_tokenizers import SYSTEM, TALK, byte_level
from tokenizers import AddedToken

from bridge import templates
from bridge import tokenizer as bt
from bridge.chat_templates import get_chat_template
from tests import llama_server
from tests.gguf_writing import serving, small, tokenizer_folder, written

RECORDED = json.loads((Path(__file__).parent / "data" / "chat_renders.json").read_text())
# The four conversations of the record: messages, and whether an answer is asked for.
ASKED = {
    "U": (TALK, False),
    "Ug": (TALK[:3], True),
    "S": ([SYSTEM, *TALK], False),
    "Sg": ([SYSTEM, *TALK[:3]], True),
}
DATE = {"current_date": "2026-01-01"}
FIRST = [names[0] for names in templates.FORMATS]
MARKS = ["<|turn>", "<turn|>", "<|end_of_turn|>", "<|im_sep|>"]
MARKS += ["<|start|>", "<|message|>", "<|channel|>", "<|return|>"]


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


TALKS = {
    "one turn": [user("a"), said("b")],
    "three turns": [user("a"), said("b"), user("c"), said("d"), user("e"), said("f")],
    "system": [system("s"), user("a"), said("b"), user("c"), said("d")],
    "empty texts": [system(""), user(""), said("b"), user(""), said("d")],
    "space": [system(" s\n"), user("  a\n\n b\n"), said("c\n\n  d"), user("\te "), said("f")],
    "Jinja": [user("{{ x }} {% if y %} {# z #} }}"), said("{{ bos_token }} %} {{ messages }}")],
    "quotes": [system("\"s\" '\\n' \\"), user("\"a\" 'b' \\"), said('it\'s \\n "c"')],
    "other formats": [user("[INST] <|im_start|>system ### Human:"), said("<|eot_id|> USER: b")],
    "scripts": [user("日本 🙂 é"), said("Größe\u00a0ß")],
}
# Roles out of the usual order: what each of these makes is a text or a refusal, never less.
UNUSUAL = {
    "assistant first": [said("hello"), user("a"), said("b")],
    "system, then assistant": [system("s"), said("hello"), user("a"), said("b")],
    "two users": [user("a"), user("b"), said("c")],
    "two assistants": [user("a"), said("b"), said("c")],
    "system inside": [user("a"), said("b"), system("s"), user("c"), said("d")],
    "system alone": [system("s")],
}
# Gemma 4 asks with an empty thought, which no answer begins with.
UNPROMPTED = {"gemma-4-thinking", "gemma4-thinking"}
THINKING = {"qwen-3", "qwen3-thinking", "gemma-4", "gemma-4-thinking", "gpt-oss"}
# Llama 2 begins each exchange with BOS.
BOS_EACH_EXCHANGE = {"llama"}


@cache
def spoken(name):
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return get_chat_template(tokenizer, name, map_eos_token=False)


def render(name, messages, asked=False, **more):
    return bt.render(spoken(name), messages, add_generation_prompt=asked, **(DATE | more))


def ending(name):
    """What the recorded render writes after an answer."""
    return RECORDED[name]["U"].rsplit("It's 4.", 1)[1]


def opening(name):
    """What the recorded render writes between the generation prompt and the last answer."""
    asked, answered = RECORDED[name]["Ug"], RECORDED[name]["U"]
    return "" if name in UNPROMPTED else answered.removeprefix(asked).split("It's 4.")[0]


def trims(name):
    return render(name, [user("a"), said(" b ")]) == render(name, [user("a"), said("b")])


def shown(name, answer):
    return answer.strip() if trims(name) else answer


def test_the_names_are_the_recorded_ones():
    assert set(templates.NAMED) == set(RECORDED) and len(RECORDED) == 47


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_conversations_render_to_the_recorded_texts(name):
    got = {key: render(name, messages, asked) for key, (messages, asked) in ASKED.items()}
    assert got == RECORDED[name]


def test_gpt_oss_writes_the_day_of_rendering_unless_told_one():
    days = [datetime.date.today().isoformat()]
    text = bt.render(spoken("gpt-oss"), TALK)
    days.append(datetime.date.today().isoformat())
    assert any(text == render("gpt-oss", TALK, current_date=day) for day in days)


@pytest.mark.parametrize("name", FIRST)
def test_a_template_renders_alike_whatever_the_engine_does_with_newlines(name):
    plain = jinja2.Environment()
    plain.globals["raise_exception"] = plain.globals["strftime_now"] = str
    text = plain.from_string(templates.text(name))
    for messages in TALKS.values():
        got = text.render(
            messages=messages,
            bos_token="<BOS>",
            eos_token="<EOS>",
            add_generation_prompt=True,
            **DATE,
        )
        assert got == render(name, messages, True)


@pytest.mark.parametrize("name", RECORDED)
def test_every_message_stands_in_the_text_and_every_answer_with_its_end(name):
    for messages in TALKS.values():
        text, at = render(name, messages), 0
        for message in messages:
            content = shown(name, message["content"])
            if message["role"] == "assistant":
                content += ending(name)
            at = text.index(content, at) + len(content)
        assert at == len(text)


@pytest.mark.parametrize("name", RECORDED)
def test_a_conversation_has_at_most_one_bos_and_it_comes_first(name):
    for messages in (talk for key, talk in TALKS.items() if key != "Jinja"):
        text = render(name, messages)
        if name in BOS_EACH_EXCHANGE:
            assert text.count("<BOS>") == sum(m["role"] == "user" for m in messages)
        else:
            assert text.count("<BOS>") == RECORDED[name]["U"].count("<BOS>") <= 1
            assert "<BOS>" not in text.lstrip()[1:]


@pytest.mark.parametrize("name", RECORDED)
def test_an_answer_begins_with_the_generation_prompt_it_was_asked_with(name):
    for messages in TALKS.values():
        for turn in (n for n, m in enumerate(messages) if m["role"] == "assistant"):
            asked = render(name, messages[:turn], True)
            answered = render(name, messages[: turn + 1])
            assert answered.startswith(asked) == (name not in UNPROMPTED)
            assert asked.startswith(render(name, messages[:turn]).rstrip("\n"))


@pytest.mark.parametrize("name", RECORDED)
def test_every_answer_is_supervised_with_its_end_and_nothing_else_is(name):
    tokenizer = spoken(name)
    # The text of another format's end is that format's own end token here.
    for messages in (talk for key, talk in TALKS.items() if key != "other formats"):
        ids, mask = bt.conversation_row(tokenizer, messages, **DATE)
        marked = marking.marked(tokenizer, ids, mask).split("[[")[1:]
        answers = [shown(name, m["content"]) for m in messages if m["role"] == "assistant"]
        for part, answer in zip(marked, answers, strict=True):
            wanted = [opened + answer + ending(name) for opened in ("", opening(name))]
            assert part.split("]]")[0].strip() in [text.strip() for text in wanted]


def test_formats_of_models_that_trim_texts_do_so():
    # As the models' own templates: Llama 2 and later, Gemma.
    trimmed = {"llama", "llama-3", "llama-3.1", "gemma", "gemma-3", "gemma-4", "gemma-4-thinking"}
    assert {name for name in FIRST if trims(name)} == trimmed


INSIDE = ["unsloth", "mistral", "llama", "vicuna", "vicuna_old", "alpaca", "gemma", "gpt-oss"]
REFUSED = {name: ("system inside",) for name in INSIDE}
REFUSED["gemma-3"] = ("assistant first", "two users", "two assistants", "system inside")


@pytest.mark.parametrize("name", FIRST)
def test_roles_in_another_order_are_written_whole_or_refused(name):
    for talk, messages in UNUSUAL.items():
        if talk in REFUSED.get(name, ()):
            with pytest.raises(jinja2.TemplateError, match="first"):
                render(name, messages)
            continue
        text, at = render(name, messages), 0
        for message in messages:
            end = ending(name) if message["role"] == "assistant" else ""
            at = text.index(message["content"] + end, at) + 1


@pytest.mark.parametrize("name", FIRST)
def test_text_in_parts_is_their_text_and_anything_else_is_refused(name):
    parts = lambda *texts: [{"type": "text", "text": text} for text in texts]
    joined = "ab" if trims(name) else " a b"
    assert render(name, [user(parts(" a ", "b")), said(parts("c"))]) == (
        render(name, [user(joined), said("c")])
    )
    image = [{"type": "image", "image": "x.png"}, *parts("a")]
    for content in (image, None, 5, {"text": "a"}, ["a"]):
        with pytest.raises(jinja2.TemplateError):
            render(name, [user(content), said("b")])


@pytest.mark.parametrize("name", FIRST)
def test_what_a_format_has_no_place_for_is_refused(name):
    refused = [[user("a"), {"role": "critic", "content": "b"}, said("c")]]
    if name not in THINKING:
        refused.append([user("a"), said("b", reasoning_content="c")])
    for messages in refused:
        with pytest.raises(jinja2.TemplateError, match="this chat format has no"):
            render(name, messages)


SERVED = {
    "asked": ASKED["Ug"][0],
    "system": ASKED["Sg"][0],
    "one": [user("a")],
    "empty": [system(""), user("")],
    "space": [*TALKS["space"], user(" g\n")],
    "Jinja": [system("{{ no }}"), *TALKS["Jinja"], user("{% x %}")],
    "quotes": [*TALKS["quotes"], user("日本")],
    "thoughts": [user("a"), said("<think>\nb\n</think>\n\nc"), user("d")],
}


@pytest.mark.parametrize("name", FIRST)
def test_llama_cpp_renders_each_template_as_transformers_does(name, tmp_path):
    ends = dict(bos_token="<|sep|>", eos_token="<|endoftext|>")
    folder = tokenizer_folder(tmp_path / "tokenizer", **ends)
    (folder / "chat_template.jinja").write_text(templates.text(name))
    written(tmp_path / "model.gguf", small(), folder=folder)
    server, tokenizer = serving(tmp_path / "model.gguf"), bt.load(folder)
    for messages in SERVED.values():
        # llama.cpp asks models that can think to do so unless it is told otherwise.
        want = bt.render(tokenizer, messages, add_generation_prompt=True, enable_thinking=True)
        assert llama_server.rendered(server, messages) == want
