"""Folders that are complete or absent, and the manifest that says what is in them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bridge import gguf_header

MANIFEST = "manifest.json"
PACKAGES = ("unsloth-jax", "jax", "transformers", "safetensors", "gguf", "libgguf")


@contextmanager
def complete(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well.

    Raises FileExistsError, before anything is written, where `folder` is a file or holds files;
    `overwrite` replaces it, and only where its manifest shows that an export made it.
    """
    # The last step renames, which would replace a link and not what it leads to.
    folder = Path(folder).resolve() if Path(folder).is_symlink() else Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an export is a folder: choose another name")
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if there and not (overwrite and MANIFEST in there):
        why = (
            "has no manifest of an export"
            if overwrite
            else "pass overwrite=True to replace an export"
        )
        raise FileExistsError(f"{folder} is not empty ({there[:5]}): {why}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if there:
            shutil.rmtree(folder)
        elif folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def text_hash(text: str | None) -> str | None:
    """sha256 of a text, None for none."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def contents(path: Path) -> dict[str, Any]:
    """What a re-opened file holds: bytes, hash and, for weights, tensors counted by dtype."""
    row: dict[str, Any] = {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            kinds = Counter(file.get_slice(name).get_dtype() for name in file.keys())
    elif path.suffix == ".gguf":
        kinds = Counter(t.kind.name for t in gguf_header.read(path).tensors.values())
    else:
        return row
    return row | {"tensors": sum(kinds.values()), "dtypes": dict(kinds)}


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Version of each package, or "not installed"."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Describes every file of `folder` by re-opening it, writes manifest.json, returns it."""
    files = [contents(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST]
    manifest = {**facts, "files": files, "versions": versions()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest
