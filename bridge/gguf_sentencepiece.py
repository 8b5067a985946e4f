"""A SentencePiece vocabulary -> texts, scores and types as GGUF has them.

From tokenizer.model the values are those of llama.cpp's converter, without the sentencepiece
package; from tokenizer.json, which transformers 5 saves alone, scores are the merges' order.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gguf import TokenType

MODEL = "tokenizer.model"
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of sentencepiece_model.proto's ModelProto
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0
BPE = 2  # of TrainerSpec.model_type
# SentencePiece's types are GGUF's, but for symbols given by hand, which the converter calls normal.
TYPES = {4: TokenType.NORMAL}


BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "\u2581"  # SentencePiece's sign for one
NORMALIZERS = {"Prepend", "Replace"}  # which put that sign
# Pre-tokenizers that never cut where pieces could join.
WHOLE = (
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
    {"type": "Metaspace", "replacement": SPACE, "split": False},
)


class Pieces(NamedTuple):
    """The vocabulary by id, and what is done to a text before it is cut."""

    texts: list[str]
    scores: list[float]
    types: list[TokenType]
    adds_space: bool  # before the first word
    normalizes: bool  # rewrites characters


def read(folder: Path) -> Pieces:
    """The pieces of tokenizer.model; raises ValueError for a file that is not one, or not BPE."""
    file = folder / MODEL
    try:
        fields = list(_fields(file.read_bytes()))
        pieces = [dict(_fields(value)) for number, value in fields if number == PIECES]
        texts = [piece[1].decode("utf-8") for piece in pieces]
        trainer, normalizer = (
            dict(_fields(b"".join(value for number, value in fields if number == part)))
            for part in (TRAINER, NORMALIZER)
        )
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{file} is no SentencePiece model: {error!r}") from error
    if not texts:
        raise ValueError(f"{file} is no SentencePiece model: it has no pieces")
    if trainer.get(3, 1) != BPE:
        raise ValueError(f"{file} has SentencePiece's model type {trainer.get(3, 1)}, expected BPE")
    kinds = [piece.get(3, TokenType.NORMAL) for piece in pieces]
    return Pieces(
        texts,
        [piece.get(2, 0.0) for piece in pieces],
        [TYPES.get(kind, TokenType(kind)) for kind in kinds],
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(2)),
    )


def from_json(spec: Mapping[str, Any]) -> Pieces:
    """The pieces of tokenizer.json's BPE; raises ValueError for one that cuts texts into words."""
    model, pre = spec["model"], spec.get("pre_tokenizer") or {}
    if pre and not any(known.items() <= pre.items() for known in WHOLE):
        raise ValueError(f"llama.cpp has no pre-tokenizer beside SentencePiece, got {pre}")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    texts = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][text] for text in texts] != list(range(len(texts))):
        raise ValueError(f"tokenizer.json's {len(texts)} tokens have ids that leave some out")
    kinds = {model.get("unk_token"): TokenType.UNKNOWN}
    kind = lambda text: TokenType.BYTE if BYTE.fullmatch(text) else TokenType.NORMAL
    types = [kinds.get(text, kind(text)) for text in texts]
    return Pieces(texts, [-float(ranks.get(t, 0)) for t in texts], types, adds_space(spec), False)


def adds_space(spec: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json puts a space before a text's first word."""
    return "Prepend" in normalizers(spec) or prepends(spec)


def prepends(spec: Mapping[str, Any]) -> bool:
    """Whether its pre-tokenizer does so, which leaves a text alone that begins with a space."""
    return (spec.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never"


def normalizers(spec: Mapping[str, Any]) -> list[str]:
    """What tokenizer.json does to a text first, by type."""
    parts = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
    return [p["type"] for p in parts.get("normalizers", [parts])]


def vocabulary(
    pieces: Pieces,
    added: Mapping[int, Mapping[str, Any]],
    rows: int,
    control: Any,
) -> tuple[list[str], list[float], list[TokenType]]:
    """Text, score and type of every id below `rows`; `control(token)` tells control tokens.

    Raises ValueError for ids that don't fit.
    """
    largest = max([len(pieces.texts) - 1, *added])
    if largest >= rows:
        raise ValueError(f"the tokenizer has ids up to {largest}, the embedding has {rows} rows")
    padding, missing = [f"[PAD{i}]" for i in range(rows)], rows - len(pieces.texts)
    texts = pieces.texts + padding[len(pieces.texts) :]
    scores = pieces.scores + [PADDING_SCORE] * missing
    types = pieces.types + [TokenType.UNUSED] * missing
    for i, token in added.items():
        text = token["content"]
        types[i] = TokenType.CONTROL if control(token) else TokenType.USER_DEFINED
        texts[i] = text if control(token) else text.replace(SPACE, " ")
        scores[i] = ADDED_SCORE
    return texts, scores, types


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: int, float or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 5:
            (value,), at = struct.unpack_from("<f", data, at), at + 4
        elif wire == 1:
            (value,), at = struct.unpack_from("<d", data, at), at + 8
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
            if len(value) != size:
                raise IndexError(f"field {number} ends beyond the file")
        else:
            raise KeyError(f"wire type {wire}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
