"""bridge.tokenizer and bridge.chat_templates against transformers' own templates and ids."""

import copy
import hashlib
import json
from functools import cache

import marking
import pytest
from small_tokenizers import RENDERED, SYSTEM, TALK, TEMPLATES, TOKENIZERS, USER, byte_level

from bridge import tokenizer as bt
from bridge.chat_templates import get_chat_template

TALKS = {
    "one turn": TALK[:2],
    "two turns": TALK,
    "system": [SYSTEM, *TALK],
    "spaces": [USER, {"role": "assistant", "content": "a  b\n\nc 日本 🙂\n\nd"}],
    "digits": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
}
KINDS = [(t, k) for t in TEMPLATES for k in TOKENIZERS]
# GPT-2's pattern cuts a blank line in two where text follows: there the prompt is no prefix of ids.
PREFIXED = [kind for kind in KINDS if kind[0] != "llama-3" or kind[1] == "metaspace"]


@pytest.fixture(scope="module")
def spoken():
    built = {name: build() for name, build in TOKENIZERS.items()}
    plain = lambda template: (TEMPLATES[template].jinja, "eos_token")
    return {(t, k): get_chat_template(built[k], plain(t)) for t, k in KINDS}


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def supervised(tokenizer, messages, **options) -> str:
    ids, mask = bt.conversation_row(tokenizer, messages, **options)
    return tokenizer.decode([t for t, on in zip(ids, mask, strict=True) if on])


@pytest.mark.parametrize("name", TEMPLATES)
def test_test_templates_render_as_the_published_ones(name, spoken):
    tokenizer = spoken[name, "byte_level"]
    got = [short(bt.render(tokenizer, m, add_generation_prompt=g)) for m, g in RENDERED]
    assert tuple(got) == TEMPLATES[name].hashes


def test_chatml_renders_as_the_published_one():
    tokenizer = get_chat_template(byte_level(), "chatml")
    got = [short(bt.render(tokenizer, m, add_generation_prompt=g)) for m, g in RENDERED]
    assert got == ["021f72c726", "bc15ad30e9", "6afa8af5b0", "ef9bd3efd8"]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_ids_equal_transformers_and_rows_carry_the_same_ids(kind, talk, spoken):
    tokenizer, messages = spoken[kind], TALKS[talk]
    for prompt in (False, True):
        want = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False
        )
        assert bt.ids(tokenizer, messages, add_generation_prompt=prompt) == want
        text = bt.render(tokenizer, messages, add_generation_prompt=prompt)
        if text.startswith(tokenizer.bos_token) or kind[1] != "metaspace":
            assert bt.ids(tokenizer, text) == want
        assert want[:2] != [tokenizer.bos_token_id] * 2
    assert bt.conversation_row(tokenizer, messages)[0] == bt.ids(tokenizer, messages)


def test_plain_text_gets_the_bos_of_its_tokenizer_once():
    tokenizer = TOKENIZERS["metaspace"]()
    bos = tokenizer.bos_token_id
    assert bt.ids(tokenizer, "Hello.") == tokenizer("Hello.")["input_ids"]
    assert bt.ids(tokenizer, "Hello.").count(bos) == 1
    assert bt.ids(tokenizer, "<BOS>Hello.").count(bos) == 1


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_mask_covers_each_answer_and_its_end_and_nothing_else(kind, talk, spoken):
    tokenizer, messages = spoken[kind], TALKS[talk]
    template = TEMPLATES[kind[0]]
    ids, mask = bt.conversation_row(tokenizer, messages)
    shown = marking.marked(tokenizer, ids, mask)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    parts = [part.split("]]")[0] for part in shown.split("[[")[1:]]
    assert len(parts) == len(answers)
    for n, (part, answer) in enumerate(zip(parts, answers, strict=True)):
        thought = "<think>\n\n</think>\n\n" * (kind[0] == "qwen-3" and n == len(answers) - 1)
        assert part.lstrip(" ") == thought + answer + template.ends


@pytest.mark.parametrize("kind", PREFIXED, ids="-".join)
def test_supervised_tokens_are_what_follows_the_generation_prompt(kind, spoken):
    tokenizer = spoken[kind]
    ids, mask = bt.conversation_row(tokenizer, TALK[:2])
    prompt = bt.ids(tokenizer, TALK[:1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    answer = mask[len(prompt) :]
    assert sum(mask[: len(prompt)]) == 0
    assert answer == sorted(answer, reverse=True) and len(answer) - sum(answer) <= 1


def test_first_supervises_only_later_answers(spoken):
    tokenizer = spoken["llama-3", "byte_level"]
    assert supervised(tokenizer, TALK, first=2) == "It's 4.<|eot_id|>"
    assert supervised(tokenizer, TALK, first=4) == ""


def test_history_without_its_thoughts_is_supervised_as_it_stands(spoken):
    tokenizer = spoken["qwen-3", "byte_level"]
    thinking = [dict(m) for m in TALK]
    thinking[1]["content"] = "<think>\nA greeting.\n</think>\n\nHello."
    last = "<think>\n\n</think>\n\nIt's 4.<|im_end|>"
    assert supervised(tokenizer, thinking) == "Hello.<|im_end|>" + last
    assert supervised(tokenizer, TALK, enable_thinking=False) == (
        "Hello.<|im_end|>It's 4.<|im_end|>"
    )


def test_a_rewritten_answer_that_cannot_be_found_is_refused():
    jinja = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ (m.content if loop.last else '...') + '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer = get_chat_template(byte_level(), (jinja, "eos_token"))
    with pytest.raises(ValueError, match="message 1: the chat template renders this answer"):
        bt.conversation_row(tokenizer, TALK)


@pytest.mark.parametrize(
    ("kind", "answer", "want"),
    [
        ("byte_level", "Hello.", " Hello.<EOS>"),
        ("digits", "Hello.", " Hello.<EOS>"),
        ("digits", "4", "4<EOS>"),
        ("metaspace", "Hello.", " Hello.<EOS>"),
    ],
)
def test_a_word_with_the_headers_space_is_learnt_and_a_lone_space_is_not(kind, answer, want):
    jinja = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = get_chat_template(TOKENIZERS[kind](), (jinja, "eos_token"))
    assert supervised(tokenizer, [USER, {"role": "assistant", "content": answer}]) == want


def test_the_end_token_is_supervised_although_it_is_the_pad_token(spoken):
    tokenizer = spoken["zephyr", "byte_level"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids, mask = bt.conversation_row(tokenizer, TALK)
    ends = [i for i, t in enumerate(ids) if t == tokenizer.eos_token_id]
    assert [mask[i] for i in ends] == [0, 1, 0, 1]


def test_stop_ids_hold_all_that_ends_an_answer(spoken):
    tokenizer = spoken["llama-3", "byte_level"]
    id_of = tokenizer.convert_tokens_to_ids
    assert bt.stop_ids(tokenizer) == sorted([id_of("<EOS>"), id_of("<|eot_id|>")])
    assert bt.stop_ids(tokenizer, {"eos_token_id": [7, 9]}) == sorted(
        [7, 9, id_of("<EOS>"), id_of("<|eot_id|>")]
    )
    assert bt.stop_ids(byte_level(), {"eos_token_id": 7}) == sorted([id_of("<EOS>"), 7])
    assert bt.stop_ids(spoken["zephyr", "metaspace"]) == [2]


def test_reading_leaves_the_tokenizer_as_it_was(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(pad_id=1, pad_token="<EOS>", length=16)
    tokenizer.chat_template = TEMPLATES["llama-3"].jinja
    before = bt.state(tokenizer)
    ids, _ = bt.conversation_row(tokenizer, TALK)
    assert len(ids) > 16
    bt.stop_ids(tokenizer)
    get_chat_template(tokenizer, ("{{ messages[0].content }}<stop>", "<stop>"))
    assert bt.state(tokenizer) == before
    tokenizer(["a", "b"], padding=True)
    assert bt.state(tokenizer) != before


@pytest.mark.parametrize("change", ["template", "token", "pad", "side"])
def test_state_changes_with_the_tokenizer(change):
    tokenizer = byte_level()
    before = bt.state(tokenizer)
    match change:
        case "template":
            tokenizer.chat_template = "x"
        case "token":
            tokenizer.add_tokens(["<new>"])
        case "pad":
            tokenizer.pad_token = "<BOS>"
        case "side":
            tokenizer.padding_side = "left"
    assert bt.state(tokenizer) != before


@pytest.mark.parametrize("place", ["side file", "tokenizer_config", "processor", "chat_template"])
def test_templates_are_read_from_each_place(place, tmp_path):
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    if place == "side file":
        (tmp_path / "chat_template.jinja").write_text("{{ 'x' }}")
    else:
        names = {"tokenizer_config": "tokenizer_config", "processor": "processor_config"}
        path = tmp_path / f"{names.get(place, 'chat_template')}.json"
        held = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(held | {"chat_template": "{{ 'x' }}"}))
    assert bt.render(bt.load(tmp_path), TALK) == "x"


def test_a_loaded_tokenizer_equals_the_saved_one(tmp_path):
    tokenizer = get_chat_template(TOKENIZERS["metaspace"](), "chatml")
    tokenizer.save_pretrained(tmp_path)
    loaded = bt.load(tmp_path)
    assert bt.ids(loaded, TALK) == bt.ids(tokenizer, TALK)
    assert bt.stop_ids(loaded) == bt.stop_ids(tokenizer)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        bt.load(tmp_path / "nowhere")


def test_no_template_is_an_error_that_says_how_to_get_one():
    with pytest.raises(ValueError, match="get_chat_template"):
        bt.ids(byte_level(), TALK)


def test_an_existing_stop_word_becomes_eos_and_keeps_its_id():
    given = byte_level()
    before = bt.state(given)
    new = get_chat_template(given, "chatml")
    assert new.eos_token == "<|im_end|>"
    assert new.eos_token_id == given.convert_tokens_to_ids("<|im_end|>")
    assert new.get_vocab() == given.get_vocab() and bt.state(given) == before
    kept = get_chat_template(given, "chatml", map_eos_token=False)
    assert kept.eos_token == "<EOS>" and kept.chat_template == new.chat_template


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_new_stop_word_takes_the_place_of_eos(kind, tmp_path):
    given = TOKENIZERS[kind]()
    before = bt.state(given)
    new = get_chat_template(given, ("{{ messages[0].content }}<stop>", "<stop>"))
    assert bt.state(given) == before
    assert len(new) == len(given) and new.eos_token_id == given.eos_token_id
    assert new.convert_ids_to_tokens(given.eos_token_id) == new.eos_token == new.pad_token
    assert "<EOS>" not in new.get_vocab()
    new.save_pretrained(tmp_path)
    for tokenizer in (new, bt.load(tmp_path)):
        ids = bt.ids(tokenizer, [USER])
        assert ids[-1] == given.eos_token_id and "<stop>" not in tokenizer.decode(ids[:-1])
        assert ids[:-1] == given("Hi there!", add_special_tokens=False)["input_ids"]


def test_none_keeps_the_models_own_template(spoken):
    given = spoken["gemma", "byte_level"]
    new = get_chat_template(given, None)
    assert new is not given and bt.state(new) == bt.state(given)
    with pytest.raises(ValueError, match="has none"):
        get_chat_template(byte_level(), None)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_mapping_reads_both_kinds_of_messages(template, spoken):
    given = spoken["mistral", "byte_level"]
    words = {"role": "from", "content": "va'l\"ue", "user": "human", "assistant": "b\\ot"}
    names = {"user": "human", "assistant": "b\\ot"}
    other = [{"from": names[m["role"]], "va'l\"ue": m["content"]} for m in TALK]
    plain, new = (get_chat_template(given, template, mapping=m) for m in ({}, words))
    assert bt.render(new, other) == bt.render(new, TALK) == bt.render(plain, TALK)


def test_system_message_fills_a_custom_template():
    custom = ("{system_message} {{ messages[0].content }}", "eos_token")
    new = get_chat_template(byte_level(), custom, system_message="Be brief.")
    assert bt.render(new, TALK) == "Be brief. Hi there!"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(chat_template="alpacca"), ValueError, "did you mean"),
        (dict(chat_template="{{ x }}"), ValueError, "jinja_text, stop_word"),
        (dict(chat_template=("{{ x }}",)), TypeError, "chat_template"),
        (dict(chat_template=("{system_message}", "<EOS>")), ValueError, "give system_message"),
        (dict(system_message="Be brief."), ValueError, "no system text"),
        (dict(mapping={"speaker": "from"}), ValueError, "speaker"),
    ],
)
def test_bad_templates_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        get_chat_template(byte_level(), **options)


def test_a_copy_of_the_tokenizer_has_the_same_state():
    tokenizer = byte_level()
    assert bt.state(copy.deepcopy(tokenizer)) == bt.state(tokenizer)


HEADED = "<|im_start|>{{ m.role }}\n"
HEADS = {
    "trimmed": HEADED + "{{ m.content|trim }}<|im_end|>\n",
    "plain": HEADED + "{{ m.content }}<|im_end|>\n",
    "history without thoughts": HEADED
    + "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n",
    "calls": HEADED
    + "{% if m.tool_calls %}{{ m.tool_calls }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
}


@pytest.mark.parametrize("loop", HEADS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_header_is_not_learnt_where_the_template_ignores_the_generation_prompt(kind, loop):
    jinja = "{% for m in messages %}" + HEADS[loop] + "{% endfor %}"
    tokenizer = get_chat_template(TOKENIZERS[kind](), (jinja, "<|im_end|>"))
    messages = [dict(m) for m in TALK]
    messages[1]["content"] = "<think>a</think> two "
    if loop == "calls":
        messages[1] |= {"content": None, "tool_calls": ["book"]}
    shown = marking.marked(tokenizer, *bt.conversation_row(tokenizer, messages))
    parts = [part.split("]]")[0] for part in shown.split("[[")[1:]]
    first = {"history without thoughts": "two <|im_end|>", "calls": "['book']<|im_end|>"}
    wanted = [first.get(loop, "<think>a</think> two"), "It's 4.<|im_end|>"]
    assert len(parts) == 2 and parts[1] == wanted[1]
    assert parts[0].strip().startswith(wanted[0]) and parts[0].endswith("<|im_end|>")
    assert bt.end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_a_template_that_hides_where_answers_begin_is_refused():
    jinja = "{% for m in messages %}{{ m.role + ': ' + (m.content|length|string) }}{% endfor %}"
    tokenizer = get_chat_template(byte_level(), (jinja, "eos_token"))
    with pytest.raises(ValueError, match="message 1: the chat template ignores add_generation"):
        bt.conversation_row(tokenizer, TALK)


def test_an_answer_without_any_token_is_refused():
    jinja = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = get_chat_template(byte_level(), (jinja, "eos_token"))
    with pytest.raises(ValueError, match="message 1: no token to learn"):
        bt.conversation_row(tokenizer, [USER, {"role": "assistant", "content": ""}])


BROKEN = "{{ bos_token }}\n{% for m in messages %}\n{{ m.content }"


@cache
def sound() -> str:
    return byte_level().backend_tokenizer.to_str()


# A file's name, what stands in it (a dict: fields of a sound tokenizer.json that are replaced).
BROKEN_FILES = [
    ("tokenizer.json", 900, "tokenizer.json is not JSON: .*line"),
    ("tokenizer.json", "", "tokenizer.json is not JSON"),
    ("tokenizer.json", b"\xff\xfe", "tokenizer.json is not JSON: .*utf-8"),
    ("tokenizer.json", "[]", "tokenizer.json holds a list, expected a JSON object"),
    ("tokenizer.json", "{}", "tokenizer.json can't be read: .*Model missing.*expected what"),
    ("tokenizer.json", {"model": {"type": "BPE"}}, "tokenizer.json can't be read: .*vocab"),
    ("tokenizer.json", {"added_tokens": [{"id": 1}]}, "tokenizer.json .*missing field"),
    ("tokenizer.json", {"added_tokens": None}, "tokenizer.json can't be read: .*null"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "No"}}, "tokenizer.json .*PreTokenizer"),
    ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
    ("tokenizer_config.json", '{"eos_token": 5}', "the tokenizer in .* can't be read: .*eos_token"),
    ("tokenizer_config.json", '{"chat_template": 5}', "chat_template of .* is 5, expected Jinja"),
    ("special_tokens_map.json", "{", "special_tokens_map.json is not JSON"),
    ("processor_config.json", "[]", "processor_config.json holds a list"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja can't be read: .*utf-8"),
]


@pytest.mark.parametrize("name, held, message", BROKEN_FILES)
def test_a_broken_file_is_refused_by_its_name(tmp_path, name, held, message):
    byte_level().save_pretrained(tmp_path)
    if isinstance(held, int):
        held = sound()[:held]
    if isinstance(held, dict):
        held = json.dumps(json.loads(sound()) | held)
    (tmp_path / name).write_bytes(held if isinstance(held, bytes) else held.encode())
    with pytest.raises(ValueError, match=message) as error:
        bt.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_is_neither_broken_nor_ours_keeps_its_own_error(tmp_path):
    with pytest.raises(ZeroDivisionError), bt._naming("a file", ValueError):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        bt.load(tmp_path)


@pytest.mark.parametrize("eos", ["2", [2, None, "3"], 2.0, True, [-1], 2**40, {"a": 1}])
def test_an_end_that_is_no_token_id_is_refused(eos):
    with pytest.raises(ValueError, match="eos_token_id of generation_config.json or config.json"):
        bt.stop_ids(byte_level(), {"eos_token_id": eos})


def test_broken_jinja_is_refused_at_once_with_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"chat_template is not valid Jinja: line 3: unexpected"):
        get_chat_template(byte_level(), (BROKEN, "eos_token"))
    tagged = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert get_chat_template(byte_level(), (tagged, "eos_token")).chat_template == tagged


@pytest.mark.parametrize("names", [("default",), ("default", "tool_use")])
def test_a_broken_template_of_a_folder_is_refused_at_load(tmp_path, names):
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ 'x' }}" if len(names) == 1 else dict.fromkeys(names, "{{ 'x' }}")
    tokenizer.save_pretrained(tmp_path)
    held = sorted(tmp_path.rglob("*.jinja"))
    assert len(held) == len(names) and bt.load(tmp_path).chat_template
    held[-1].write_text("{% if x %}")
    with pytest.raises(ValueError, match=r"is not valid Jinja: line 1: .*endif"):
        bt.load(tmp_path)
