"""Makes tests/data/tiny_sentencepiece: BPE of SentencePiece with byte tokens, 480 pieces.

    python tests/oracles/tiny_sentencepiece.py

Needs sentencepiece. Special tokens stand where Gemma has them; "<|endoftext|>" is there because
llama.cpp does not load Phi-3's architecture without it.
"""

import io
import json
from pathlib import Path

import sentencepiece
from tiny_tokenizer import TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

FOLDER = Path(__file__).parents[1] / "data" / "tiny_sentencepiece"
CONTROL, PLAIN = ["<start_of_turn>", "<end_of_turn>", "<|endoftext|>"], ["<tool>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' "
    "+ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
NAMES = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


def trained() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=out,
        vocab_size=480,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[*CONTROL, *PLAIN],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def fast(pieces: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The same vocabulary as tokenizer.json has it, its merges by score."""
    texts = [pieces.id_to_piece(i) for i in range(len(pieces))]
    vocabulary = {text: i for i, text in enumerate(texts)}
    scores = {text: pieces.get_score(i) for i, text in enumerate(texts)}
    merges = [
        (text[:at], text[at:])
        for text in texts
        if not text.startswith("<")
        for at in range(1, len(text))
        if text[:at] in vocabulary and text[at:] in vocabulary
    ]
    merges.sort(key=lambda pair: -scores["".join(pair)])
    bpe = models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.post_processor = processors.TemplateProcessing(
        single=["<bos>", "$A"],
        pair=["<bos>", "$A", "<bos>:1", "$B:1"],
        special_tokens=[("<bos>", 2)],
    )
    token = lambda text, special: AddedToken(text, normalized=False, special=special)
    made.add_special_tokens([token(t, True) for t in (*NAMES.values(), *CONTROL)])
    made.add_tokens([token(t, False) for t in PLAIN])
    return made


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "tokenizer.model").write_bytes(trained())
    made = fast(sentencepiece.SentencePieceProcessor(str(FOLDER / "tokenizer.model")))
    made.save(str(FOLDER / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "model_max_length": 256}
    config |= NAMES | {"clean_up_tokenization_spaces": False}
    config["added_tokens_decoder"] = {
        str(made.token_to_id(text)): {"content": text, "normalized": False, "special": special}
        for texts, special in (([*NAMES.values(), *CONTROL], True), (PLAIN, False))
        for text in texts
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (FOLDER / "chat_template.jinja").write_text(TEMPLATE)
    print(f"{FOLDER}: {made.get_vocab_size()} tokens")
