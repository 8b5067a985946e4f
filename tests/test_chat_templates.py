"""bridge.chat_templates: names, system texts, tokens that take others' places, ShareGPT."""

import json
from pathlib import Path

import datasets
import jinja2
import pytest
from small_tokenizers import SYSTEM, TALK, USER, byte_level
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bridge import templates
from bridge import tokenizer as bt
from bridge.chat_templates import get_chat_template, is_gemma, standardize_sharegpt

DOCS = Path(__file__).parents[1] / "docs" / "chat_templates.md"
FIRST = [names[0] for names in templates.FORMATS]
MAPS = {"chatml", "gemma", "gemma2", "gemma_chatml", "gemma2_chatml"}
DEFAULTS = {name for name in templates.NAMED if templates.default_system(name) is not None}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALLED = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
        ],
    },
    {"role": "tool", "content": "no <rain>"},
    {"role": "assistant", "content": "No."},
]
SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def gemma(**names):
    """A tokenizer with Gemma's tokens and without ChatML's."""
    spec = byte_level(missing=("<|im_start|>", "<|im_end|>")).backend_tokenizer.to_str()
    spec = spec.replace("<BOS>", "<bos>").replace("<EOS>", "<eos>")
    extra = {"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"} | extra | names
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec), **names)


def files(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "chat_template.jinja"}


def test_the_table_of_the_docs_is_the_programs():
    assert templates.table() in DOCS.read_text()


@pytest.mark.parametrize(
    ("name", "near"), [("lama-3", "llama-3"), ("qwen3.5", "qwen3"), ("ChatML", "chatml")]
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_names(name, near):
    with pytest.raises(ValueError, match=f"did you mean .*'{near}'") as error:
        get_chat_template(byte_level(), name)
    assert all(repr(known) in str(error.value) for known in templates.NAMED)


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_system_message_stands_where_the_default_one_does(name):
    message = 'Say "it\'s" {{ x }} {% y %} \\n\nö <|im_end|>'
    tokenizer = byte_level()
    default, changed = (
        get_chat_template(tokenizer, name, system_message=m) for m in (None, message)
    )
    told = lambda text: [{"role": "system", "content": text}, *TALK]
    for spoken, text in ((default, templates.default_system(name)), (changed, message)):
        assert bt.render(spoken, TALK) == bt.render(spoken, told(text))
    assert bt.render(changed, [SYSTEM, *TALK]) == bt.render(default, [SYSTEM, *TALK])
    assert message in bt.render(changed, TALK) and message not in bt.render(default, TALK)


@pytest.mark.parametrize("name", sorted(set(FIRST) - DEFAULTS))
def test_a_system_message_is_refused_where_the_template_has_no_text_for_it(name):
    with pytest.raises(ValueError, match="no system text of its own; put a .*'alpaca'"):
        get_chat_template(byte_level(), name, system_message="Be brief.")


@pytest.mark.parametrize("name", templates.NAMED)
def test_only_templates_that_map_a_token_change_the_tokenizer(name, tmp_path):
    given = byte_level()
    before, saved = bt.state(given), files(given, tmp_path / "given")
    new = get_chat_template(given, name)
    assert bt.state(given) == before and given.chat_template is None
    assert len(new) == len(given)
    assert (files(new, tmp_path / "new") == saved) == (name not in MAPS)
    kept = get_chat_template(given, name, map_eos_token=False)
    assert files(kept, tmp_path / "kept") == saved and kept.chat_template == new.chat_template
    if name in MAPS:
        assert new.eos_token == new.pad_token == templates.NAMED[name].stop_word
        assert new.get_vocab() == given.get_vocab()


@pytest.mark.parametrize("name", FIRST)
def test_a_saved_template_is_read_back_to_the_byte(name, tmp_path):
    new = get_chat_template(byte_level(), name)
    new.save_pretrained(tmp_path)
    assert bt.load(tmp_path).chat_template == new.chat_template
    assert bt.ids(bt.load(tmp_path), TALK) == bt.ids(new, TALK)


@pytest.mark.parametrize("name", ["chatml", "gemma_chatml", "gemma2_chatml"])
def test_chatml_takes_the_places_of_gemmas_tokens(name, tmp_path):
    given = gemma()
    before, id_of = bt.state(given), given.convert_tokens_to_ids
    new = get_chat_template(given, name)
    assert bt.state(given) == before and len(new) == len(given)
    assert new.convert_tokens_to_ids("<|im_start|>") == id_of("<start_of_turn>")
    assert new.convert_tokens_to_ids("<|im_end|>") == id_of("<eos>") == new.pad_token_id
    assert new.eos_token == "<|im_end|>" and "<start_of_turn>" not in new.get_vocab()
    new.save_pretrained(tmp_path)
    loaded = bt.load(tmp_path)
    assert loaded.get_vocab() == new.get_vocab()
    assert bt.ids(loaded, TALK) == bt.ids(new, TALK)
    assert bt.ids(new, TALK).count(id_of("<start_of_turn>")) == len(TALK)
    kept = get_chat_template(given, name, map_eos_token=False)
    assert kept.get_vocab() == given.get_vocab() and kept.chat_template == new.chat_template


@pytest.mark.parametrize("name", [*FIRST, "custom"])
def test_every_template_begins_with_bos_on_gemmas_tokenizers(name):
    custom = ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "eos_token")
    tokenizer = get_chat_template(gemma(), custom if name == "custom" else name)
    text = bt.render(tokenizer, TALK)
    bos = sum(m["role"] == "user" for m in TALK) if name == "llama" else 1
    assert text.count("<bos>") == bos and text.lstrip("\n").startswith("<bos>")


def test_gemmas_tokenizers_are_known_by_their_tokens():
    assert is_gemma(gemma()) and not is_gemma(byte_level())
    assert not is_gemma(gemma(bos_token="<eos>"))


def test_the_pad_token_follows_eos_only_where_it_was_eos():
    follows = get_chat_template(byte_level(), "chatml")
    stays = get_chat_template(byte_level(pad_token="<|eot_id|>"), "chatml")
    none = get_chat_template(byte_level(pad_token=None), "chatml")
    assert [t.pad_token for t in (follows, stays, none)] == ["<|im_end|>", "<|eot_id|>", None]


@pytest.mark.parametrize("name", FIRST)
def test_sharegpt_keys_are_read_by_every_template(name):
    mapped = get_chat_template(byte_level(), name, mapping=SHAREGPT)
    want = bt.render(get_chat_template(byte_level(), name), [SYSTEM, *TALK])
    assert (
        bt.render(mapped, sharegpt([SYSTEM, *TALK])) == bt.render(mapped, [SYSTEM, *TALK]) == want
    )


THOUGHT = [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]
EMPTY = "<think>\n\n</think>\n\n"
# Name, switches, what the prompt ends with, how the answer of THOUGHT is written.
THINKING = [
    ("qwen3", {}, "assistant\n", "<think>\nHm.\n</think>\n\nYes.<|im_end|>\n"),
    ("qwen3", {"enable_thinking": True}, "assistant\n", "</think>\n\nYes.<|im_end|>\n"),
    ("qwen3", {"enable_thinking": False}, "assistant\n" + EMPTY, "</think>\n\nYes.<|im_end|>\n"),
    ("qwen3-thinking", {}, "assistant\n<think>\n", "<think>\nHm.\n</think>\n\nYes.<|im_end|>\n"),
    ("qwen3-instruct", {"enable_thinking": False}, "assistant\n", None),
    ("gemma-4", {}, "model\n", "model\n<|channel>thought\nHm.\n<channel|>Yes.<turn|>\n"),
    ("gemma-4", {"enable_thinking": True}, "model\n", "Hm.\n<channel|>Yes.<turn|>\n"),
    ("gemma-4-thinking", {}, "<|channel>thought\n<channel|>", "Hm.\n<channel|>Yes.<turn|>\n"),
    ("gemma-4-thinking", {"enable_thinking": True}, "model\n", "<channel|>Yes.<turn|>\n"),
    (
        "gpt-oss",
        {"reasoning_effort": "high"},
        "<|start|>assistant",
        "analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|end|>",
    ),
]


@pytest.mark.parametrize(("name", "switches", "prompt", "answer"), THINKING)
def test_thinking_switches_and_thoughts_are_written_as_the_model_knows_them(
    name, switches, prompt, answer
):
    tokenizer = get_chat_template(byte_level(), name)
    asked = bt.render(tokenizer, [USER], add_generation_prompt=True, **switches)
    assert asked.endswith(prompt)
    assert ("<|think|>" in asked) == (name.startswith("gemma") and bool(switches))
    assert ("Reasoning: high" in asked) == (name == "gpt-oss")
    if answer is not None:
        assert bt.render(tokenizer, THOUGHT, **switches).endswith(answer)
        later = bt.render(tokenizer, [*THOUGHT, USER], **switches)
        assert "Hm." not in later and "Yes." in later


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking"])
def test_thoughts_in_the_text_are_those_given_beside_it(name):
    tokenizer = get_chat_template(byte_level(), name)
    inside = [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}]
    assert bt.render(tokenizer, inside) == bt.render(tokenizer, THOUGHT)


LISTED = json.dumps(TOOL)
QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + LISTED
    + "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_TALK = (
    "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\nno <rain>\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\nNo.<|im_end|>\n"
)
LLAMA_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
WITH_TOOLS = {
    "qwen-2.5": "<|im_start|>system\n" + templates.QWEN + "\n\n" + QWEN_TOOLS + QWEN_TALK,
    "qwen3-instruct": "<|im_start|>system\n" + QWEN_TOOLS + QWEN_TALK,
    "qwen-3": "<|im_start|>system\n" + QWEN_TOOLS + QWEN_TALK.replace("No.", EMPTY + "No."),
    "llama-3.1": "<BOS>" + LLAMA_HEAD.format("system") + "Environment: ipython\nCutting Knowledge "
    "Date: December 2023\nToday Date: 26 July 2024\n\n<|eot_id|>" + LLAMA_HEAD.format("user")
    + "Given the following functions, please respond with a JSON for a function call with its "
    "proper arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n" + json.dumps(TOOL, indent=4) + "\n\nRain?<|eot_id|>"
    + LLAMA_HEAD.format("assistant") + '{"name": "weather", "parameters": {"city": "Köln"}}'
    "<|eot_id|>" + LLAMA_HEAD.format("ipython") + '"no <rain>"<|eot_id|>'
    + LLAMA_HEAD.format("assistant") + "No.<|eot_id|>",
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_calls_and_results_are_written_as_the_model_knows_them(name):
    tokenizer = get_chat_template(byte_level(), name)
    assert bt.render(tokenizer, CALLED, tools=[TOOL]) == WITH_TOOLS[name]
    ids, mask = bt.conversation_row(tokenizer, CALLED, tools=[TOOL])
    learnt = tokenizer.decode([t for t, on in zip(ids, mask, strict=True) if on])
    assert '"weather"' in learnt and "No." in learnt and "rain" not in learnt


def test_llama_needs_a_question_to_list_tools_in():
    tokenizer = get_chat_template(byte_level(), "llama-3.1")
    with pytest.raises(jinja2.TemplateError, match="lists tools in the question"):
        bt.render(tokenizer, [SYSTEM, TALK[1], *TALK], tools=[TOOL])


def test_lfm_lists_tools_in_the_system_message():
    tokenizer = get_chat_template(byte_level(), "lfm-2")
    listed = f"List of tools: <|tool_list_start|>[{LISTED}]<|tool_list_end|><|im_end|>\n"
    alone = bt.render(tokenizer, [USER], tools=[TOOL])
    assert alone.startswith("\n<BOS><|im_start|>system\n" + listed)
    assert "system\nBe brief.\n" + listed in bt.render(tokenizer, [SYSTEM, USER], tools=[TOOL])
    answered = bt.render(tokenizer, [USER, {"role": "tool", "content": "12"}])
    assert "tool\n<|tool_response_start|>12<|tool_response_end|><|im_end|>" in answered


@pytest.mark.parametrize("name", sorted({*FIRST} - {*WITH_TOOLS, "qwen3-thinking"}))
def test_formats_without_tools_refuse_them(name):
    tokenizer = get_chat_template(byte_level(), name)
    with pytest.raises(jinja2.TemplateError, match="this chat format has no tool_calls"):
        bt.render(tokenizer, CALLED[:2])
    if name != "lfm-2":
        with pytest.raises(jinja2.TemplateError, match="this chat format has no tools"):
            bt.render(tokenizer, TALK, tools=[TOOL])


def test_a_models_own_template_is_given_tools_and_switches():
    given = byte_level()
    given.chat_template = "{{ tools | tojson }} {{ enable_thinking }} {{ messages[0].content }}"
    new = get_chat_template(given, None)
    text = bt.render(new, TALK, tools=[TOOL], enable_thinking=False)
    assert text == f"[{LISTED}] False Hi there!" and new.chat_template == given.chat_template


ROWS = [{"conversations": sharegpt([SYSTEM, *TALK]), "id": n} for n in range(5)]
KINDS = {
    "list": lambda rows: rows,
    "generator": iter,
    "Dataset": datasets.Dataset.from_list,
    "streaming": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sharegpt_rows_become_messages_and_messages_stay(kind):
    got = standardize_sharegpt(KINDS[kind](ROWS), batch_size=2)
    want = [{"conversations": [SYSTEM, *TALK], "id": n} for n in range(5)]
    assert list(got) == want == list(standardize_sharegpt(KINDS[kind](want), batch_size=2))


def test_standardize_reads_messages_and_other_role_names():
    bots = [{"messages": [{"from": "me", "value": "a"}, {"from": "bot", "value": "b"}]}]
    got = standardize_sharegpt(bots, aliases_for_user=["me"], aliases_for_assistant=["bot"])
    assert got == [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ]
    both = datasets.Dataset.from_list([bots[0] | {"conversations": None}, ROWS[0]])
    got = standardize_sharegpt(
        both, aliases_for_user=["me", "human"], aliases_for_assistant=["bot", "gpt"]
    )
    assert got[1]["conversations"] == [SYSTEM, *TALK] and got[0]["messages"][1]["content"] == "b"


BAD_ROWS = [
    ([{"from": "bot", "value": "x"}], TypeError, "role 'bot': known are .*'gpt'"),
    ([{"from": "human", "text": "x"}], ValueError, "expected role and content, or from and value"),
    ([{"role": "user", "content": 5}], ValueError, "content 5: expected text or a list"),
    (["Hi"], ValueError, "message 0 is 'Hi'"),
]


@pytest.mark.parametrize(("messages", "error", "text"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_index(messages, error, text):
    bad = {"conversations": messages, "id": 9}
    with pytest.raises(error, match=f"row 5: .*{text}"):
        standardize_sharegpt([*ROWS, bad])
    for kind in ("Dataset", "streaming"):
        rows = KINDS[kind]([bad] * 2)
        with pytest.raises(error, match=f"row 0: .*{text}"):
            list(standardize_sharegpt(rows))


def test_a_row_without_messages_is_refused_with_its_columns():
    with pytest.raises(ValueError, match=r"row 1 has \['text'\]: expected messages in 'conv"):
        standardize_sharegpt([ROWS[0], {"text": "x"}])
