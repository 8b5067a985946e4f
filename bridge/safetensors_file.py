"""Safetensors folders: opened for reading tensor by tensor, written in shards as a stream."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bridge import bnb_int8, bnb_nf4, mxfp4
from bridge.source import Header

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(rf"(\d+\.?\d*|\.\d+) *({'|'.join(UNITS)})")


class Weight(NamedTuple):
    """One tensor to be written, computed when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class SafetensorsSource:
    """A Hugging Face folder with config.json and one or many safetensors files."""

    def __init__(self, folder: str | Path):
        """Raises ValueError for a missing, truncated or foreign file, naming it."""
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        if (self.folder / "generation_config.json").exists():
            read_json(self.folder / "generation_config.json")  # else the first answer would fail
        files = sorted(self.folder.glob("*.safetensors"))
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            files = [self.folder / f for f in _indexed(index)]
        files = [f for f in files if not f.name.startswith("adapter_")]
        if not files:
            raise ValueError(
                f"{self.folder} holds no .safetensors file; there is {listing(self.folder)}"
            )
        self._where = {name: f for file in files for f in [opened(file)] for name in f.keys()}

    def headers(self) -> dict[str, Header]:
        """Every weight by name; what bitsandbytes and MXFP4 store in parts is one weight."""
        out, companions = {}, set()
        for name in self._where:
            if bnb_nf4.is_nf4(self._where, name):
                state = bnb_nf4.state(self.tensor, name)
                companions.update(bnb_nf4.members(self._where, name))
                # Stacks hold leaves of one layout, so the layout is part of the format's name.
                layout = f"nf4 in blocks of {state.block}, nested {state.nested_block}"
                out[name] = Header(state.matrix, state.dtype, layout)
            elif (whole := mxfp4.weight(name)) is not None:
                shape = mxfp4.shape(self._where, self._described, whole)
                out[whole] = Header(shape, mxfp4.DTYPE.name, blocks=mxfp4.NAME)
            elif bnb_int8.is_int8(self._where, name):
                companions.update(bnb_int8.members(self._where, name))
                out[name] = Header(self._described(name)[0], self._dtype, bnb_int8.FORMAT)
            else:
                out[name] = Header(*self._described(name))
        return {name: header for name, header in out.items() if name not in companions}

    def _described(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, dtype) of one tensor as it lies in the file."""
        piece = self._where[name].get_slice(name)
        return tuple(piece.get_shape()), _dtype(name, piece.get_dtype()).name

    def tensor(self, name: str) -> np.ndarray:
        """One tensor exactly as it lies in the file."""
        return self._where[name].get_tensor(name)

    def read_quantized(self, name: str) -> Any:
        """The quantized leaf of a weight, its bytes and statistics untouched, on the host."""
        if bnb_int8.is_int8(self._where, name):
            return bnb_int8.parts(self.tensor, name, self._where, self._dtype)
        return bnb_nf4.parts(self.tensor, name, self._where)

    @property
    def _dtype(self) -> str:
        """What int8 weights stand for: the config's dtype, else the one that they were made of."""
        named = self.config.get("dtype", self.config.get("torch_dtype"))
        return named if named in ("float32", "bfloat16", "float16") else "float16"

    def read(self, name: str) -> np.ndarray:
        """One weight as a dense array in its header's dtype."""
        if bnb_nf4.is_nf4(self._where, name) or bnb_int8.is_int8(self._where, name):
            return np.asarray(_dequantized(self.read_quantized(name)))
        if mxfp4.is_mxfp4(self._where, name):
            parts = (self.tensor(f"{name}{end}") for end in (mxfp4.BLOCKS, mxfp4.SCALES))
            return mxfp4.dequantized(*parts)
        return self.tensor(name)


_dequantized = jax.jit(lambda leaf: leaf.dequantize())


def _dtype(name: str, stored: str) -> np.dtype:
    if stored not in DTYPES:
        raise ValueError(
            f"{name} is stored as {stored}, which is not read; known: {sorted(DTYPES)}"
        )
    return DTYPES[stored]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError naming the file where it is missing or something else."""
    if not path.exists():
        raise ValueError(f"{path} is missing; there is {listing(path.parent)}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected a JSON object")
    return found


def _indexed(index: Path) -> list[str]:
    """The files that an index names. Raises ValueError where it maps no weight to a file."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
        raise ValueError(
            f"{index} has {str(named)[:80]} as weight_map, expected weights' names and their files"
        )
    return sorted(set(named.values()))


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else []


def opened(path: Path):
    """safetensors' reader; raises ValueError with the file's name for a broken or missing file."""
    if not path.exists():
        raise ValueError(f"{path} is named in the index but missing")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def size_in_bytes(text: Any) -> int:
    """ "5GB" -> 5000000000; raises ValueError for a size that can't be read or is not over 0."""
    size = 0
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif isinstance(text, str) and (parts := SIZE.fullmatch(text.strip().upper())):
        size = int(float(parts[1]) * UNITS[parts[2]])
    if size < 1:
        raise ValueError(
            f"size {text!r} is not understood; expected bytes over 0, or a number and one of "
            f"{sorted(UNITS)}"
        )
    return size


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError before anything is written where the disk can't hold `needed` bytes."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(f"writing {folder} needs {needed:,} bytes, {free:,} are free on {there}")


def shards(weights: Sequence[Weight], limit: int) -> list[list[Weight]]:
    """Weights in order, cut where a file would pass `limit` bytes."""
    out: list[list[Weight]] = [[]]
    for w in weights:
        if out[-1] and sum(x.nbytes for x in out[-1]) + w.nbytes > limit:
            out.append([])
        out[-1].append(w)
    return out


def save(folder: Path, weights: Sequence[Weight], max_shard_size: str | int = "5GB") -> None:
    """Writes model*.safetensors (and an index where there are several), one tensor at a time."""
    parts = shards(weights, size_in_bytes(max_shard_size))
    if len(parts) == 1:
        write(folder / "model.safetensors", parts[0])
        return
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write(folder / file, part)
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights)},
        "weight_map": {w.name: file for file, part in zip(files, parts, strict=True) for w in part},
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n"
    )


def write(path: Path, weights: Sequence[Weight]) -> None:
    """One safetensors file (format: huggingface/safetensors README), values computed in turn."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for w in weights:
        header[w.name] = {
            "dtype": NAMES[w.dtype],
            "shape": list(w.shape),
            "data_offsets": [at, at + w.nbytes],
        }
        at += w.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for w in weights:
            value = np.ascontiguousarray(w.read())
            if value.shape != tuple(w.shape) or value.dtype != w.dtype:
                raise ValueError(
                    f"{w.name} is {value.dtype}{value.shape}, announced as {w.dtype}{w.shape}"
                )
            file.write(value.tobytes())


def settle_metadata(path: Path) -> None:
    """Puts a file's metadata in alphabetical order, in place: equal contents get equal bytes.

    The writer of `safetensors` leaves it in another order each time.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same header took more room"
        file.seek(8)
        file.write(text.ljust(size))
