"""The code of the README and of docs/sft.md runs as it stands, on a tiny model."""

import re
from pathlib import Path

import pytest
import tiny
import tiny_chat

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tiny.reference("llama"), tmp_path_factory.mktemp("llama"))


def test_the_functional_road_is_short_and_learns(folder):
    code = next(block for block in BLOCKS if "value_and_grad" in block)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 30
    code = code.replace('"path/to/model"', repr(str(folder)))
    first = {}
    exec(compile(code.replace("range(10)", "range(1)"), "README.md", "exec"), first)
    last = {}
    exec(compile(code, "README.md", "exec"), last)
    assert float(last["value"]) < 0.9 * float(first["value"])


@pytest.mark.slow
def test_the_road_of_fine_tuning_runs_as_it_stands(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "sft.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.S)[0]
    folder = tiny_chat.save(tmp_path / "model")
    for old, new in {
        '"unsloth/Llama-3.2-1B-Instruct"': repr(str(folder)),
        '"out': f'"{tmp_path}/out',
        "max_steps=60": "max_steps=2",
    }.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, "sft.md", "exec"), {})
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter", "merged", "gguf", "metrics.jsonl"} <= written
