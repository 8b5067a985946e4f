"""The decoding benchmark on a tiny shape, and its limits at the real one."""

import json

import pytest

from workflows.bench import decode, rows, weights


def test_it_measures_both_ways_to_hold_the_weights(tmp_path, capsys):
    path = tmp_path / "decode.json"
    line = ["--shape", "tiny", "--batches", "1", "--cache", "64", "--tokens", "4", "--rank", "4"]
    line += ["--weights", "materialized,nf4", "--attention", "--output", str(path)]
    decode.main(line)
    found = json.loads(path.read_text())
    assert [row["name"] for row in found] == [
        "decode, bf16, batch 1, cache 64, tiny",
        "decode, bf16, batch 1, cache 64, tiny, share of the read limit",
        "decode, NF4-resident, batch 1, cache 64, tiny",
        "decode attention over XLA's, batch 1, cache 64, tiny",
    ]
    for row in found:
        rows.check(row)
    assert found[3]["ratio"] > 0
    for row in found[:3]:
        assert row["must"] is row["aim"] is row["ratio"] is None
        assert row["ours"] > 0 and row["bytes"] > 0 and row["bandwidth_tbs"] > 0
    assert found[2]["bytes"] < 0.6 * found[0]["bytes"]
    assert found[1]["ours"] == pytest.approx(found[0]["ours"] / found[0]["limit"])
    assert "share of the read limit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "mode, batch, limit",
    [("materialized", 1, 193), ("materialized", 32, 5430), ("materialized", 128, 15780)],
)
def test_the_limits_at_an_8b_model_are_those_of_its_bytes(mode, batch, limit):
    m = decode.Model(*weights.model("llama-8b"))
    read = decode.bytes_read(m, mode, batch, 512)
    assert batch * 2.91e12 / read == pytest.approx(limit, rel=0.005)


@pytest.mark.parametrize("line", [["--weights", "fp8"], ["--tokens", "512"]])
def test_a_line_that_means_nothing_is_refused(line, capsys):
    with pytest.raises(SystemExit):
        decode.main(line)
    assert "--weights takes" in capsys.readouterr().err
