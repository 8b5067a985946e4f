"""A SentencePiece vocabulary (tokenizer.model) -> texts, scores and types as GGUF has them.

Values are those of llama.cpp's converter, without the sentencepiece package.
"""

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


class Pieces(NamedTuple):
    """The vocabulary by id, and what is done to a text before it is cut."""

    texts: list[str]
    scores: list[float]
    types: list[TokenType]
    adds_space: bool  # before the first word


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
    )


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
        texts[i] = text if control(token) else text.replace("\u2581", " ")
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
