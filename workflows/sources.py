"""Data sets by name: a file of rows, a folder that `datasets` wrote, a name on the hub."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import datasets

Row = Mapping[str, Any]


def opened(dataset: Any, split: str = "train") -> Iterable[Row]:
    """The rows of a data set given by path or hub name; anything else as it is.

    JSON Lines, JSON (a list), CSV and Parquet files are read without a cache. Raises ValueError
    naming the file and what it can't be read as, FileNotFoundError for a path that is not there.
    """
    if not isinstance(dataset, str | os.PathLike):
        return dataset
    path = Path(dataset)
    if path.is_dir():
        return _folder(path, split)
    if path.is_file() or path.suffix in READERS:
        return _file(path)
    if _hub_name(str(dataset)):
        return datasets.load_dataset(str(dataset), split=split)
    raise FileNotFoundError(
        f"data set {str(dataset)!r} is no file or folder here, and no hub name (owner/name); "
        f"files may end in {sorted(READERS)}"
    )


def _hub_name(text: str) -> bool:
    parts = text.split("/")
    return len(parts) == 2 and all(parts) and not text.startswith((".", "~"))


def _folder(path: Path, split: str) -> Iterable[Row]:
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"the folder {path} was not written by datasets' save_to_disk: {error}; give a file "
            f"ending in {sorted(READERS)}"
        ) from error
    return found[split] if isinstance(found, datasets.DatasetDict) else found


def _file(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"no data file {path}")
    if path.suffix not in READERS:
        raise ValueError(f"data file {path.name}: known endings are {sorted(READERS)}")
    return READERS[path.suffix](path)


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """The file as text, a byte order mark left out. Raises ValueError where it is no UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is no UTF-8 text: {error}; expected UTF-8, save the file in it"
        ) from error


def _json_lines(path: Path) -> Iterator[Row]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number} is no JSON: {error}") from error


def _json(path: Path) -> Iterator[Row]:
    with _text(path) as file:
        text = file.read()
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path.name} is no JSON: {error}; a file of one object a line ends in .jsonl"
        ) from error
    if not isinstance(found, list):
        raise ValueError(f"{path.name} holds {type(found).__name__}, expected a list of rows")
    yield from found


def _csv(path: Path) -> Iterator[Row]:
    with _text(path) as file:
        for row in csv.DictReader(file):
            if None in row or None in row.values():
                raise ValueError(f"{path.name}: the row {row} has not the header's cells")
            yield row


def _parquet(path: Path) -> Iterator[Row]:
    try:
        # Streaming leaves no copy in a cache.
        yield from datasets.load_dataset(
            "parquet", data_files=str(path), split="train", streaming=True
        )
    except ValueError as error:
        raise ValueError(f"{path.name} is no Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip
