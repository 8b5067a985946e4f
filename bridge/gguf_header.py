"""The header of a GGUF file: metadata and where each tensor lies (layout: ggml's docs/gguf.md).

gguf.GGUFReader takes seconds for a vocabulary and compares no length with the file's.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
SMALLEST_FILE = 24  # magic, version, two counts
LENGTH = struct.Struct("<Q")  # what stands before a string


class Tensor(NamedTuple):
    """One tensor's place: `shape` is [out, in] as NumPy has it, `start` counts from the file's."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


class GGUF(NamedTuple):
    """An opened file's header; `metadata` holds Python values, arrays as lists."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | Path) -> GGUF:
    """Metadata and tensor table of the file at `path`, every length checked against the file.

    Raises ValueError saying what is wrong: not GGUF, version, byte order, truncated, corrupt.
    """
    path = Path(path)
    size = path.stat().st_size
    if size < SMALLEST_FILE:
        raise ValueError(f"{path}: not a GGUF file, or cut short: it has {size} bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = Cursor(data, path)
        tensor_count, key_count = _opening(at)
        metadata = _unique(at, "metadata key", key_count, lambda: (at.string(), _value(at)))
        table = _unique(at, "tensor", tensor_count, lambda: (at.string(), _place(at)))
        tensors = _placed(path, table, at.offset, _alignment(path, metadata), size)
    return GGUF(path, metadata, tensors)


class Cursor:
    """A position in the file's bytes that refuses to pass their end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.offset = data, path, 0

    def need(self, size: int) -> None:
        if size > len(self.data) - self.offset:
            raise ValueError(
                f"{self.path}: truncated or corrupt: {size} bytes are expected at byte "
                f"{self.offset} of the header, the file has {len(self.data)} in all"
            )

    def take(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        self.need(struct.calcsize(layout))
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return values

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings; a vocabulary has some hundred thousand, so that each is a short loop."""
        data, end, at, out = self.data, len(self.data), self.offset, []
        for _ in range(count):
            start = at + LENGTH.size
            at = start + LENGTH.unpack_from(data, at)[0] if start <= end else start
            if at > end:
                self.offset = min(start, end)
                self.need(at - self.offset)
            try:
                out.append(data[start:at].decode())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path}: corrupt: no UTF-8 at byte {start}: {error}"
                ) from error
        self.offset = at
        return out


def _opening(at: Cursor) -> tuple[int, int]:
    magic, version, tensors, keys = at.take("4sIQQ")
    if magic != MAGIC:
        raise ValueError(f"{at.path}: not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    if version & 0xFFFF == 0:
        raise ValueError(f"{at.path}: a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise ValueError(f"{at.path}: GGUF version {version}; known: {VERSIONS}")
    return tensors, keys


def _unique(at: Cursor, what: str, count: int, entry) -> dict[str, Any]:
    """`count` entries by name. Raises ValueError where a name comes twice."""
    found = {}
    for _ in range(count):
        name, value = entry()
        if name in found:
            raise ValueError(f"{at.path}: corrupt: {what} {name!r} stands there twice")
        found[name] = value
    return found


def _value(at: Cursor) -> Any:
    (kind,) = at.take("I")
    if kind == STRING:
        return at.string()
    if kind == ARRAY:
        return _array(at)
    return at.take(_scalar(at, kind))[0]


def _array(at: Cursor) -> list[Any]:
    kind, count = at.take("IQ")
    if kind == STRING:
        at.need(8 * count)
        return at.strings(count)
    letter = _scalar(at, kind)
    at.need(struct.calcsize(letter) * count)
    return list(at.take(f"{count}{letter}"))


def _scalar(at: Cursor, kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"{at.path}: corrupt: value type {kind} at byte {at.offset - 4}")
    return SCALARS[kind]


def _place(at: Cursor) -> tuple[int, tuple[int, ...], int]:
    """(type number, shape with the contiguous axis last, offset in the data) of one tensor."""
    (axes,) = at.take("I")
    if axes > 4:
        raise ValueError(f"{at.path}: corrupt: a tensor of {axes} axes at byte {at.offset - 4}")
    shape = at.take(f"{axes}Q")[::-1]
    kind, offset = at.take("IQ")
    return kind, shape, offset


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"{path}: corrupt: general.alignment is {alignment!r}, no power of two")
    return alignment


def _placed(
    path: Path, table: dict[str, Any], header_end: int, alignment: int, file_size: int
) -> dict[str, Tensor]:
    """The table with absolute places. Raises ValueError where a tensor passes the file's end."""
    data_start = -(-header_end // alignment) * alignment
    tensors = {
        name: _tensor(path, name, kind, shape, data_start + offset)
        for name, (kind, shape, offset) in table.items()
    }
    beyond = [name for name, t in tensors.items() if t.start + t.size > file_size]
    if beyond:
        needed = max(t.start + t.size for t in tensors.values())
        raise ValueError(
            f"{path}: truncated: it has {file_size} bytes and its tensors need {needed}; "
            f"{len(beyond)} of {len(tensors)} tensors lie beyond the end, first {beyond[0]!r}"
        )
    return tensors


def _tensor(path: Path, name: str, number: int, shape: tuple[int, ...], start: int) -> Tensor:
    known = {kind.value: kind for kind in GGMLQuantizationType}
    if number not in known:
        raise ValueError(f"{path}: tensor {name!r} has type {number}; known: {sorted(known)}")
    block, block_bytes = GGML_QUANT_SIZES[known[number]]
    count = int(np.prod(shape, dtype=object))
    if not shape or shape[-1] % block:
        raise ValueError(
            f"{path}: corrupt: tensor {name!r} of type {known[number].name} has shape {shape}; "
            f"the last axis must be a multiple of {block}"
        )
    return Tensor(known[number], shape, start, count // block * block_bytes)
