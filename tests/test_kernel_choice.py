"""Which implementation an operation takes, and what is said of it."""

import pytest

from pallas_kernels import _choice


@pytest.fixture
def turing(monkeypatch):
    monkeypatch.setattr(_choice, "capability", lambda: 7.5)
    _choice._say.cache_clear()


def test_a_kernel_that_the_gpu_is_too_old_for_is_said_once(turing, capsys):
    for _ in range(3):
        reasons = {"pallas": _choice.older(8.0), "xla": None}
        assert _choice.pick("NF4 dequantize", None, reasons) == "xla"
    assert capsys.readouterr().err == (
        "unsloth_jax: NF4 dequantize: 'xla' runs instead of 'pallas': "
        "it needs compute capability 8.0, this GPU has 7.5\n"
    )


def test_a_kernel_that_only_the_shapes_rule_out_is_not_spoken_of(turing, capsys):
    assert _choice.pick("x", None, {"pallas": "it takes widths of 16 n", "xla": None}) == "xla"
    assert capsys.readouterr().err == ""


def test_a_kernel_asked_for_by_name_raises_with_the_reason(turing):
    with pytest.raises(ValueError, match="x: 'pallas' can't run: it needs compute capability 9.0"):
        _choice.pick("x", "pallas", {"pallas": _choice.older(9.0), "xla": None})
