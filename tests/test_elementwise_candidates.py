"""The candidates of tests/gpu/elementwise_bench.py in interpret mode, and their lowering."""

import json
from functools import partial

import jax
import pytest
from gpu import elementwise_bench as bench

from pallas_kernels import _choice
from workflows.bench import rows

SIZES = bench.Sizes(D=64, F=96, h=16, H=4, K=2)
ALL = {c.op.name: c for c in bench.candidates(16, SIZES)}


@pytest.mark.parametrize("name", ALL)
def test_a_candidate_equals_its_reference(name):
    c = ALL[name]
    with _choice.target("gpu", interpret=True):
        for tile in c.tiles:
            assert bench.error(c, tile) <= bench.TOLERANCE, tile


@pytest.mark.parametrize("name", ALL)
def test_a_candidate_lowers_for_a_gpu_as_one_launch(name):
    c = ALL[name]
    inputs = jax.eval_shape(c.op.inputs, jax.random.key(0))
    with _choice.target("gpu"):
        traced = jax.jit(partial(c.op.ours, c.tiles[0])).trace(*inputs)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 1 and "stablehlo.transpose" not in text


def test_a_floor_counts_every_operand_and_result_once():
    for c in (c for name, c in ALL.items() if "Adam" not in name):
        inputs = jax.eval_shape(c.op.inputs, jax.random.key(0))
        arrays = [*inputs, *jax.eval_shape(c.op.other, *inputs)]
        assert c.op.bytes == sum(x.size * x.dtype.itemsize for x in arrays if x.ndim > 1)


def test_the_script_times_a_candidate_and_writes_its_row(tmp_path, capsys):
    output = tmp_path / "x.json"
    line = "--tokens 16 --sizes 64 96 16 4 2 --only SwiGLU, --seconds 0.001 --cache-mib 0"
    bench.main([*line.split(), "--interpret", "--output", str(output)])
    (row,) = json.loads(output.read_text())
    rows.check(row)
    assert row["name"] == "SwiGLU, 16x96" and row["other_us"] > 0 and len(row["tiles_us"]) == 3
    assert "SwiGLU, 16x96" in capsys.readouterr().out


def test_a_candidate_that_is_wrong_is_not_timed():
    c = ALL["SwiGLU, 16x96"]
    wrong = lambda tile, *xs: [y * 1.1 for y in c.op.ours(tile, *xs)]
    with _choice.target("gpu", interpret=True), pytest.raises(ValueError, match="SwiGLU.*off"):
        bench.measured(c._replace(op=c.op._replace(ours=wrong)), 0.001, 0)
