"""The README's code runs as it stands, on a tiny model."""

import re
from pathlib import Path

import pytest
import tiny

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
