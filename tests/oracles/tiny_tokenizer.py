"""Makes tests/data/tiny_tokenizer: byte-level BPE, under 512 tokens, split as SmolLM's.

python tests/oracles/tiny_tokenizer.py
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FOLDER = Path(__file__).parents[1] / "data" / "tiny_tokenizer"
TEXT = """
The quick brown fox jumps over the lazy dog. What is the capital of France?
The capital of France is Paris.
def add(a, b):
    return a + b
for i in range(10):
    print(i, i * i)
You are a helpful assistant. Write a short answer, then stop.
It's what they're asking, isn't it?
Être ou ne pas être, telle est la question. Größe, Straße, naïve café.
Москва слезам не верит. 東京都
{"name": "value", "numbers": [1, 2, 3.5], "nested": {"true": false}}
one two three four five six seven eight nine ten hundred thousand million
""".strip().splitlines()
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 256,
}

if __name__ == "__main__":
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    # One that looks like a control token and one that doesn't, neither marked special.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<|sep|>", "<tool>")])
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"), pretty=False)
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (FOLDER / "chat_template.jinja").write_text(TEMPLATE)
    print(FOLDER, tokenizer.get_vocab_size(), "tokens")
