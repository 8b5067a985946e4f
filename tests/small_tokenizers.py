"""Tokenizers of a few hundred tokens, built in the test, and templates that real models speak."""

import json
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "Hi there! Hello. What is 2+2? It's 4. Be brief.",
    "system user assistant model think prompt answer",
    "Book a table for four at Luigi's on Friday at 7 pm. Luigi's | 4 | Fri | 19:00",
    "a  b   c\n\nd\n\n\ne \n f",
) * 4
OTHERS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "[INST]", "[/INST]",
]  # fmt: skip


def _wrap(backend: Tokenizer, **names) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<EOS>"} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )


def _train(backend: Tokenizer, specials: list[str], **options) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=[AddedToken(s, special=True) for s in specials],
        **options,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(*, digits: bool = False, missing: tuple[str, ...] = (), **names):
    """GPT-2's kind, spans without their leading space; `digits` are split off one by one."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Digits(individual_digits=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if digits else level
    backend.decoder = decoders.ByteLevel()
    specials = [s for s in ["<BOS>", "<EOS>", *OTHERS] if s not in missing]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, specials, initial_alphabet=alphabet)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return _wrap(backend, **names)


def metaspace(**names):
    """Llama 2's kind: a word begins with its space, and <BOS> is put before plain text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("\u2581", " ")]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    _train(backend, ["<unk>", "<BOS>", "<EOS>", *OTHERS, *bytes_])
    # Byte tokens stand in the vocabulary, but text that spells one is not that byte.
    tree = json.loads(backend.to_str())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in bytes_]
    backend = Tokenizer.from_str(json.dumps(tree))
    bos = backend.token_to_id("<BOS>")
    backend.post_processor = processors.TemplateProcessing(
        single="<BOS> $A", special_tokens=[("<BOS>", bos)]
    )
    return _wrap(backend, unk_token="<unk>", **names)


TOKENIZERS = {
    "byte_level": byte_level,
    "digits": lambda: byte_level(digits=True),
    "metaspace": metaspace,
}


class Spoken(NamedTuple):
    """A template, what ends its answers, and the hashes of conversations U, Ug, S and Sg."""

    jinja: str
    ends: str
    hashes: tuple[str, str, str, str]


USER = {"role": "user", "content": "Hi there!"}
TALK = [
    USER,
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It's 4."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
# (messages, add_generation_prompt) behind the four hashes of each template.
RENDERED = [(TALK, False), (TALK[:3], True), ([SYSTEM, *TALK], False), ([SYSTEM, *TALK[:3]], True)]

_LOOP = "{% for m in messages %}"
_PROMPT = "{% endfor %}{% if add_generation_prompt %}"
_FOLDED = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + JOIN %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
)
_ASK = "{{ (first if loop.first else '') + m.content }}"

TEMPLATES = {
    "zephyr": Spoken(
        _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        + _PROMPT + "{{ '<|assistant|>\n' }}{% endif %}",
        "<EOS>",
        ("ab7bff7b63", "e7a3504b3e", "303d36c4b1", "91934f97e8"),
    ),
    "llama-3": Spoken(
        "{{ bos_token }}" + _LOOP
        + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        + "{{ m.content|trim + '<|eot_id|>' }}"
        + _PROMPT + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        ("09e78c838a", "d906ab5aa9", "2004c725d4", "cf01a61537"),
    ),
    "gemma": Spoken(
        "{{ bos_token }}" + _FOLDED.replace("JOIN", "' '") + _LOOP
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}" + _ASK
        + "{{ '<end_of_turn>\n' }}" + _PROMPT + "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
        ("dca1e8f720", "f42b656b3d", "30471db08a", "98f1f8bee2"),
    ),
    "mistral": Spoken(
        "{{ bos_token }}" + _FOLDED.replace("JOIN", "' '") + _LOOP
        + "{% if m.role == 'user' %}{{ '[INST] ' }}" + _ASK + "{{ ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "<EOS>",
        ("48df83d31f", "334a641a1d", "b614775e1d", "e0b4c77708"),
    ),
    "llama-2": Spoken(
        _FOLDED.replace("+ JOIN", "").replace(
            "messages[0].content ", "'<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' "
        ) + _LOOP
        + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}" + _ASK + "{{ ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        " <EOS>",
        ("202047f494", "442543fab0", "c53a47f062", "640520d352"),
    ),
    "phi-3": Spoken(
        _LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        + _PROMPT + "{{ '<|assistant|>\n' }}{% endif %}",
        "<|end|>",
        ("93f0accd61", "2586ace03d", "dd6b8edebc", "08b8b0cfe5"),
    ),
    # Writes an empty thought before the last answer only, and drops thoughts of earlier ones.
    "qwen-3": Spoken(
        _LOOP + "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ said + '<|im_end|>\n' }}" + _PROMPT + "{{ '<|im_start|>assistant\n' }}"
        "{% if not enable_thinking|default(true) %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        "<|im_end|>",
        ("9d50a34698", "bc15ad30e9", "514277d998", "ef9bd3efd8"),
    ),
}  # fmt: skip
