"""The rules of the house: who imports whom, what importing does, sizes, no broad excepts."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder -> (our folders below it, packages of others that it may import).
ALLOWED = {
    "pallas_kernels": ((), "jax jaxtyping numpy triton jax_triton"),
    "unsloth_jax": (("pallas_kernels",), "jax jaxtyping numpy flax optax"),
    "bridge": (
        ("pallas_kernels", "unsloth_jax"),
        "jax numpy ml_dtypes orbax safetensors gguf libgguf "
        "huggingface_hub tokenizers transformers",
    ),
    "workflows": (
        ("pallas_kernels", "unsloth_jax", "bridge"),
        "jax jaxtyping numpy optax transformers jinja2 datasets rich matplotlib xllamacpp "
        "mlflow tensorboard trackio wandb tyro yaml reasoning_gym",
    ),
}
# The core from the bottom up: a module imports earlier ones only.
CORE = ["dims", "tree", "leaves", "rope", "layers", "experts", "quant", "lora", "models"]
CORE += ["remat", "shared_prompts", "decoder", "unstack", "decoding", "sample", "rollout"]
ASIDE = {
    "losses": {"dims", "leaves"},
    "train": {"dims"},
    "optim": {"adam8", "directions", "following"},
    "following": set(),
    "directions": {"adam8"},
    "preference": {"dims"},
    "policy": {"dims", "preference"},
    "advantages": set(),
    "adam8": set(),
    "data": {"dims"},
    "layer_memory": {"dims", "tree", "leaves", "remat", "train"},
    "plan": {"dims", "tree", "leaves", "remat", "train", "layer_memory"},
}
LAZY = {"unsloth_jax/__init__.py", "unsloth_jax/chat_templates.py"}
TORCH = "bridge/vllm.py"
FILES = {
    str(path.relative_to(ROOT)): path for top in ALLOWED for path in (ROOT / top).rglob("*.py")
}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_KERNEL = 400, 60, 80


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def imported(name: str) -> set[str]:
    """Full names of what a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_downwards(folder):
    ours, theirs = ALLOWED[folder]
    known = {folder, *ours, *theirs.split(), *sys.stdlib_module_names}
    for name in (name for name in FILES if name.startswith(f"{folder}/")):
        others = {"torch", "vllm"} if name == TORCH else set()
        wrong = {top(module) for module in imported(name)} - known - others
        assert not wrong, f"{name} imports {sorted(wrong)}"


def test_the_core_is_built_from_the_bottom_up():
    below = {part: set(CORE[:i]) for i, part in enumerate(CORE)} | ASIDE
    core = [n for n in FILES if n.startswith("unsloth_jax/") and n not in LAZY]
    for name in core:
        part = name.split("/")[1].removesuffix(".py")
        inside = {m.split(".")[1] for m in imported(name) if m.startswith("unsloth_jax.")}
        wrong = inside - below[part] - {part}
        assert not wrong, f"{name} imports {sorted(wrong)}"


def test_only_the_lazy_modules_import_by_name():
    """`from importlib import import_module` is the one spelling, so that it can be found."""
    assert {name for name in FILES if "importlib.import_module" in imported(name)} == LAZY
    plain = [name for name in FILES if "import importlib\n" in FILES[name].read_text()]
    assert plain == []


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short_and_catch_nothing_broadly(name):
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines"
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            longest = LONGEST_KERNEL if "kernel" in node.name else LONGEST_FUNCTION
            assert length <= longest, f"{node.name} has {length} lines"
        if isinstance(node, ast.ExceptHandler):
            caught = {n.id for n in ast.walk(node.type or node) if isinstance(n, ast.Name)}
            broad = node.type is None or caught & {"Exception", "BaseException"}
            assert not broad, f"line {node.lineno} catches everything"


def run(script: str) -> None:
    """A fresh Python of the same environment; what it prints on failure is shown."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


IMPORT_ALL = """
import importlib, os, pkgutil, sys
before = dict(os.environ)
import unsloth_jax
for module in pkgutil.walk_packages(unsloth_jax.__path__, "unsloth_jax."):
    importlib.import_module(module.name)
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
"""


def test_importing_the_core_changes_no_environment_and_allocates_nothing():
    run(IMPORT_ALL + "import jax\nassert jax.live_arrays() == [], jax.live_arrays()")


def test_importing_the_core_loads_nothing_above_it():
    heavy = {"transformers", "gguf", "datasets", "torch", "bridge", "workflows"}
    run(IMPORT_ALL + f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)")
