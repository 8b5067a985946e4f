"""Each script of workflows/bench/ runs on a tiny shape; rows, lengths and the table are right."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gpu import bnb_checkpoint, unsloth_baseline
from transformers import AutoModelForCausalLM

from unsloth_jax import tree
from unsloth_jax.quant.nf4 import NF4
from workflows.bench import (
    compile_time,
    configs,
    kernels,
    lengths,
    performance,
    profile,
    rows,
    sides,
    train_step,
    weights,
)

SHAPES = ["2x2048", "4x2048", "8x2048", "1x8192", "1x16384"]
# Every figure that has a "must".
ASKED = {f"step {shape}: tokens/s over Unsloth's" for shape in SHAPES}
ASKED |= {f"step {s}: tokens/s over Unsloth's leanest, at its peak" for s in SHAPES[:3]}
LEANEST = "step {}: leanest peak over Unsloth's leanest, no slower"
ASKED |= {LEANEST.format(s) for s in ("2x2048", "8x2048", "1x16384")}
ASKED |= {f"decode, bf16, batch {n}, cache 512, llama-8b" for n in (32, 128)}
ASKED |= {
    "step packed 4x2048: useful tokens/s over Unsloth's",
    "longest row, r=32, batch 1",
    "plan's predicted peak against measured, 5 configurations",
    "first step of llama-8b, cold",
    "first step of llama-8b, second process with the compile cache",
    "NF4 dequantisation 14336x4096",
    "decode, bf16, batch 1, cache 512, llama-8b, share of the read limit",
    "decode, NF4-resident, batch 1, cache 512, llama-8b",
}
SIDES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336")
ASKED |= {f"NF4 matmul over cuBLAS bf16, M={M}, {side}" for M in (1, 16, 64) for side in SIDES}

TINY = ["--shape", "tiny", "--steps", "2", "--warmup", "1"]


def measurement(who, speed, peak, batch=2, length=2048, packed=False, **more):
    """What a script would append for one case."""
    shape = dict(batch=batch, length=length, packed=packed)
    size = dict(peak_gib=peak, compiled_gib=peak, pinned_gib=0.5, gib={"argument": 5.0})
    what = dict(who=who, shape="llama-8b", rank=16, policy="full", fits=True, tokens_per_s=speed)
    where = dict(command="python x", device="GPU", date="2026-01-01", versions={})
    return what | shape | size | where | dict(attention="sdpa", ms=1.0) | more


def test_a_step_is_measured_on_plain_and_packed_rows_and_not_taken_again(tmp_path, capsys):
    line = [*TINY, "--shapes", "2x64", "--packed", "2x96", "--policies", "auto", "--rank", "4"]
    line += ["--optimizer", "adamw_torch", "--output", str(tmp_path / "train.jsonl")]
    train_step.main(line)
    found = rows.read(tmp_path / "train.jsonl")
    assert [(m["batch"], m["length"], m["packed"]) for m in found] == [
        (2, 64, False),
        (2, 96, True),
    ]
    for m in found:
        assert m["fits"] and m["tokens_per_s"] > 0 and m["compile_s"] > 0
        assert (m["policy"], m["chosen"]) == ("auto", "none")
        assert m["gib"]["temp"] > 0 and m["compiled_gib"] > m["gib"]["alias"] > 0
        assert all(abs(x - math.log(512)) < 1 for x in m["losses"]) and len(m["losses"]) == 3
    train_step.main(line)
    assert rows.read(tmp_path / "train.jsonl") == found
    assert "tokens_per_s" in capsys.readouterr().out


def test_the_figures_are_written_where_both_sides_are_known(tmp_path):
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "unsloth.jsonl"
    rows.append(ours, measurement("ours", 15000.0, 7.0))
    rows.append(theirs, measurement("unsloth", 10000.0, 6.8))
    line = ["--shapes", "", "--packed", "", "--output", str(ours), "--unsloth", str(theirs)]
    train_step.main([*line, "--figures", str(tmp_path / "out.json")])
    found = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    assert found["step 2x2048: tokens/s over Unsloth's"]["ratio"] == 1.5
    assert rows.met(found["step 2x2048: tokens/s over Unsloth's"], "must") is True
    peak = found["step 2x2048: leanest peak over Unsloth's leanest, no slower"]
    assert math.isclose(peak["ratio"], 7.0 / 6.8) and rows.met(peak, "must") is False


def test_unsloth_gets_its_fastest_mode_and_we_the_plan_named_auto():
    ours = [measurement("ours", s, 9.0, policy=p) for p, s in (("none", 30.0), ("auto", 20.0))]
    theirs = [measurement("unsloth", s, p) for s, p in ((10.0, 6.8), (16.0, 9.9))]
    speed, same, peak = sides.figures(ours, theirs)
    assert (speed["ours"], speed["other"]) == (20.0, 16.0)
    assert (same["other"], peak["other"]) == (10.0, 6.8)
    assert "no plan" in same["missed"] and rows.met(same, "must") is False


def test_figures_of_another_matmul_dtype_have_names_of_their_own():
    theirs = [measurement("unsloth", 10.0, 6.8)]
    plain, other = (
        {row["name"] for row in sides.figures([measurement("ours", 15.0, 7.0, **more)], theirs)}
        for more in ({}, {"matmul_dtype": "fp8_backward"})
    )
    assert other == {f"{name}, fp8_backward" for name in plain}


def test_the_leanest_plan_must_not_be_slower_than_unsloths_leanest():
    ours = [measurement("ours", 9.0, 5.0), measurement("ours", 12.0, 6.0)]
    *_, peak = sides.figures(ours, [measurement("unsloth", 10.0, 6.8)])
    assert peak["ours"] == 6.0
    *_, peak = sides.figures(ours[:1], [measurement("unsloth", 10.0, 6.8)])
    assert rows.met(peak, "must") is False


def test_measurements_of_two_devices_are_not_compared():
    with pytest.raises(ValueError, match="'GPU', Unsloth on 'other'"):
        sides.figures(
            [measurement("ours", 9.0, 5.0)], [measurement("unsloth", 9.0, 5.0, device="other")]
        )


def test_the_arithmetic_limit_is_that_of_the_8b_model():
    fields = configs.config("llama-8b")
    short, long, packed = (
        sides.limit(shape, fields)
        for shape in ((2, 2048, False), (1, 16384, False), (4, 2048, True))
    )
    assert 24000 < short < 26500
    assert long < 0.8 * short < short < packed


@pytest.mark.slow
def test_a_process_of_its_own_measures_one_case(tmp_path):
    line = [*TINY, "--shapes", "1x64", "--packed", "", "--policies", "full", "--alone"]
    output = tmp_path / "train.jsonl"
    train_step.main([*line, "--optimizer", "adamw_torch", "--output", str(output)])
    (found,) = rows.read(output)
    assert found["fits"] and "--policies=full" in found["command"]


def test_both_sides_get_the_same_documents_in_the_same_order():
    case = train_step.Case(2, 128, True, "full")
    batch, useful = next(train_step.batches(case, 512))
    sizes = list(itertools.chain.from_iterable(next(lengths.packed(2, 128))))
    assert useful == sum(sizes) == int((batch.segments > 0).sum())
    there = lengths.tokens(2, 128, 512, 0).reshape(-1)[:useful]
    np.testing.assert_array_equal(batch.tokens[batch.segments > 0], there)
    assert int(batch.weights.sum()) == useful - len(sizes)


def test_unsloths_packed_row_holds_our_documents_and_counts_our_targets():
    case = unsloth_baseline.Case(2, 128, True)
    there = unsloth_baseline.batches(case, 512, 3, "cpu")
    here = train_step.batches(train_step.Case(2, 128, True, "full"), 512)
    for (theirs, their_useful), (ours, our_useful) in zip(there, here, strict=False):
        real = ours.segments > 0
        assert their_useful == our_useful
        np.testing.assert_array_equal(theirs["input_ids"][0], ours.tokens[real])
        np.testing.assert_array_equal(theirs["position_ids"][0], ours.positions[real])
        targets = (theirs["labels"][0, 1:] != -100).numpy()
        np.testing.assert_array_equal(targets, ours.weights[real][:-1])
        assert int(theirs["packed_seq_lengths"].sum()) == our_useful


def test_the_checkpoint_made_for_unsloth_loads_in_transformers(tmp_path):
    bnb_checkpoint.make(tmp_path, "tiny", bnb_checkpoint.TOKENIZER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    w = model.model.layers[1].mlp.down_proj.weight
    assert w.quant_state.nested and w.quant_state.shape == torch.Size([128, 256])
    ids = torch.tensor(lengths.tokens(1, 64, 512, 0)).long()
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert abs(loss - math.log(512)) < 1


def test_documents_have_the_mean_and_the_bounds_that_are_promised():
    drawn = np.array(list(itertools.islice(lengths.documents(), 20000)))
    assert abs(drawn.mean() - lengths.MEAN) < 5
    assert drawn.min() >= lengths.SHORTEST and drawn.max() == lengths.LONGEST


def test_packed_bins_are_full_and_never_too_long():
    for bins in itertools.islice(lengths.packed(4, 2048), 8):
        filled = [sum(row) for row in bins]
        assert len(bins) == 4 and max(filled) <= 2048 and min(filled) > 0.9 * 2048


def test_a_shape_that_cannot_be_read_raises():
    assert lengths.shapes("2x2048,1x8192") == [(2, 2048), (1, 8192)]
    with pytest.raises(ValueError, match="'2x'"):
        lengths.shapes("2x")


def test_random_weights_have_the_deviation_of_their_width():
    _, c, shapes = weights.model("tiny")
    params = tree.flatten(weights.random(shapes))
    same = lambda made, asked: (made.shape, made.dtype) == (asked.shape, asked.dtype)
    assert all(map(same, *map(jax.tree.leaves, (params, tree.flatten(shapes)))))
    projections = [w for w in params.values() if isinstance(w, NF4)]
    assert len(projections) == 7
    for w in projections:
        deviation = float(w.dequantize().astype(jnp.float32).std())
        assert 0.9 < deviation * math.sqrt(w.shape[-1]) < 1.1
    assert np.all(np.asarray(params["model.layers.*.input_layernorm.weight"]) == 1)
    head = float(params["lm_head.weight"].astype(jnp.float32).std())
    assert 0.9 < head * math.sqrt(c.width) < 1.1


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="'llama-9b'"):
        configs.config("llama-9b")


@pytest.mark.slow
def test_kernels_are_timed_and_written(tmp_path):
    output = tmp_path / "kernels.json"
    line = ["--sides", "128x256", "--seconds", "0.001", "--cache-mib", "0"]
    kernels.main([*line, "--output", str(output)])
    found = json.loads(output.read_text())
    assert len(found) == len(kernels.ops(128, 256))
    for row in found:
        rows.check(row)
        assert row["ours"] > 0 and row["floor_us"] > 0


def test_a_kernel_loop_runs_the_operation_every_time():
    runs = []

    def counted(x):
        jax.debug.callback(lambda: runs.append(1))
        return x + 1

    kernels.seconds(counted, [(jnp.zeros(4),), (jnp.ones(4),)], repeats=3, runs=2)
    jax.effects_barrier()
    assert len(runs) == 2 * 3 * (1 + 2)


@pytest.mark.slow
def test_the_first_step_is_timed_cold_and_with_a_cache(tmp_path, capsys):
    output = tmp_path / "compile_time.json"
    compile_time.main(["--shape", "tiny", "--length", "1x64", "--output", str(output)])
    cold, cached = json.loads(output.read_text())
    assert "cold" in cold["name"] and "cache" in cached["name"]
    assert 0 < cached["parts"]["compile"] < cold["parts"]["compile"]
    assert cold["ours"] == cold["parts"]["total"] > cold["parts"]["compile"]
    assert cold["parts"]["losses"] == cached["parts"]["losses"]


def test_the_table_replaces_what_stood_between_the_markers(tmp_path, capsys):
    page = f"before\n{performance.START}\nold\n{performance.END}\nafter\n"
    (tmp_path / "performance.md").write_text(page)
    figures = [
        rows.figure("a", 3.0, "s", other=2.0, must=1.4, aim=1.8, peak_gib=7.0, pinned_gib=1.0),
        rows.figure("b", 3.0, "s", must=4.0, better="lower"),
        rows.figure("c", 5.0, "1/s", ours_us=20.0, other_us=50.0, floor_us=10.0),
    ]
    rows.write(tmp_path / "performance" / "x.json", figures)
    performance.main(["--docs", str(tmp_path)])
    text = (tmp_path / "performance.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    (a,) = [line for line in text.splitlines() if line.startswith("| a ")]
    assert "1.5" in a and "yes" in a and "aim too" not in a and "7.00 + 1.00" in a
    (c,) = [line for line in text.splitlines() if line.startswith("| c ")]
    assert [float(cell) for cell in c.split("|")[2:-1]] == [20, 50, 10, 2.5]
    performance.main(["--docs", str(tmp_path)])
    assert (tmp_path / "performance.md").read_text() == text


def test_the_committed_figures_keep_to_the_schema_and_the_page_has_its_markers():
    found = performance.figures(performance.DOCS / "performance")
    page = (performance.DOCS / "performance.md").read_text()
    assert performance.put(page, performance.text(found)) == page
    asked = {row["name"] for row in found if row["must"] is not None}
    assert ASKED <= asked, ASKED - asked


def test_a_page_without_markers_is_not_written():
    with pytest.raises(ValueError, match="end of table"):
        performance.put("no table here", "table")


@pytest.mark.parametrize(
    "ours, other, better, must, expected",
    [
        (3.0, 2.0, "higher", 1.5, True),
        (3.0, 2.0, "lower", 1.4, False),
        (3.0, None, "lower", 3.0, True),
        (None, 2.0, "higher", 1.0, None),
        (3.0, 2.0, "higher", None, None),
    ],
)
def test_a_row_is_judged_by_its_ratio_or_by_its_own_value(ours, other, better, must, expected):
    row = rows.figure("x", ours, "s", other=other, better=better, must=must)
    assert rows.met(row, "must") is expected
    rows.check(row)


def test_a_row_that_breaks_the_schema_is_named(tmp_path):
    row = rows.figure("x", 1.0, "s")
    with pytest.raises(ValueError, match="'x' lacks.*unit"):
        rows.write(tmp_path / "a.json", [{k: v for k, v in row.items() if k != "unit"}])
    with pytest.raises(ValueError, match="not finite.*ours"):
        rows.check(row | {"ours": math.nan})
    with pytest.raises(ValueError, match="'more'"):
        rows.figure("x", 1.0, "s", better="more")


def test_a_figure_of_the_same_name_is_replaced_in_its_place(tmp_path):
    path = tmp_path / "a.json"
    rows.write(path, [rows.figure("x", 1.0, "s"), rows.figure("y", 2.0, "s")])
    rows.write(path, [rows.figure("x", 3.0, "s")])
    assert [(r["name"], r["ours"]) for r in json.loads(path.read_text())] == [
        ("x", 3.0),
        ("y", 2.0),
    ]


def test_a_table_has_a_column_for_each_name_and_blanks_for_what_is_missing():
    table = rows.table([{"a": 1234.5, "b": "x"}, {"a": 0.12344}], ["a", "b"]).splitlines()
    assert table[0] == "|      a | b   |" and table[1] == "| -----: | --- |"
    assert table[2] == "|  1,234 | x   |" and table[3] == "| 0.1234 |     |"


def kernel(name, start, length, tid=7, **args):
    return {"ph": "X", "pid": 1, "tid": tid, "ts": start, "dur": length, "name": name, "args": args}


def test_a_profile_counts_each_kernel_once_and_the_gaps_between_them():
    thread = lambda tid, name: dict(ph="M", pid=1, tid=tid, name="thread_name", args={"name": name})
    trace = [
        thread(7, "Stream #13(Compute)"),
        thread(8, "XLA Ops"),
        kernel("nvjet_hsh_128x256", 1000, 2000, hlo_op="custom-call.3"),
        kernel("nf4_dequantize", 500, 400),
        kernel("sm90_flash_fprop", 3500, 500),
        kernel("loop_multiply_fusion_2", 3800, 400),
        kernel("copy of the above", 500, 9000, tid=8, hlo_op="fusion.1"),
    ]
    found = profile.breakdown(profile.kernels({"traceEvents": trace}))
    parts = {"products": 2.0, "attention": 0.5, "NF4 decoding": 0.4, "fusions": 0.4}
    assert found["parts"] == pytest.approx(parts) and found["kernels"] == 4
    assert found["span_ms"] == pytest.approx(3.7) and found["gaps_ms"] == pytest.approx(0.6)
    with pytest.raises(ValueError, match="no kernels"):
        profile.kernels({"traceEvents": trace[:2]})


def test_a_step_is_profiled_here_too(tmp_path, capsys):
    line = ["--shape", "tiny", "--shapes", "2x64", "--output", str(tmp_path / "profile.jsonl")]
    profile.main(line)
    (found,) = rows.read(tmp_path / "profile.jsonl")
    assert found["parts"]["fusions"] > 0 and found["kernels"] > 10
    assert "2x64" in capsys.readouterr().out
