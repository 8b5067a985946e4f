"""Batches of optimizer steps: which rows share one, in what order, how wide."""

import itertools

import jax
import numpy as np
import pytest
from small_tokenizers import TALK, byte_level
from test_data import LENGTHS, rows_of

from bridge.chat_templates import get_chat_template
from unsloth_jax import SFTConfig
from workflows import batching
from workflows.batching import Batches
from workflows.rows import rows
from workflows.streams import Streamed

WAYS = {
    "random": {},
    "sequential": dict(train_sampling_strategy="sequential"),
    "grouped": dict(train_sampling_strategy="group_by_length"),
    "packed": dict(packing=True),
    "packed in order": dict(packing=True, train_sampling_strategy="sequential"),
}


def batches(**settings) -> Batches:
    config = SFTConfig(**settings)
    return Batches(rows_of(LENGTHS), 2, 2, 64, config.packing, **batching.order(config))


def seen(found, steps: int, skip: int = 0) -> list:
    return list(itertools.islice(found.forever(skip), steps))


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_holds_every_row_once_and_batches_go_on_after_any_step(way):
    found = batches(**WAYS[way])
    per_epoch = found.steps(0)
    assert found.steps(1) == per_epoch
    steps = seen(found, 2 * per_epoch)
    for epoch in range(2):
        part = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        tokens = np.concatenate([b.tokens[b.segments > 0] for _, b in part])
        assert sorted(tokens) == [t for row in found.rows for t in row.tokens]
        assert part[-1][0] == epoch + 1
    for skip in (1, per_epoch - 1, per_epoch, per_epoch + 3):
        for (epoch, one), (again, other) in zip(steps[skip:], seen(found, 4, skip), strict=False):
            assert epoch == again
            jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("way", ["random", "grouped", "packed"])
def test_the_order_is_the_seeds_and_the_epochs(way):
    first = lambda **more: batches(**WAYS[way] | more).bins(0)
    assert first() == first() != first(seed=1)
    assert batches(**WAYS[way]).bins(0) != batches(**WAYS[way]).bins(1)


def test_sequential_rows_keep_their_order():
    found = batches(train_sampling_strategy="sequential")
    assert [row for (row,) in found.bins(3)] == found.rows


def test_rows_of_like_length_need_little_padding():
    def used(way):
        parts = [b for _, b in seen(batches(**WAYS[way], pad_to_multiple_of=8), 50)]
        return sum((b.segments > 0).sum() for b in parts) / sum(b.segments.size for b in parts)

    assert used("grouped") > 0.85 > used("random") and used("packed") > 0.9


def test_group_by_length_is_the_older_name():
    assert batching.order(SFTConfig(group_by_length=True)) == batching.order(
        SFTConfig(train_sampling_strategy="group_by_length")
    )


def test_packed_rows_hold_no_more_documents_than_is_said():
    found = batches(packing=True)
    most = max(int(b.segments.max()) for _, b in seen(found, 3 * found.steps(0)))
    assert most == found.documents(3 * found.steps(0)) > 1


@pytest.mark.parametrize(("given", "packing", "width", "unit"), [
    (None, False, 64, 64), ("auto", False, 64, 64), (24, False, 72, 24), (24, True, 72, 72),
    (None, True, 64, 64),
])  # fmt: skip
def test_the_width_is_a_multiple_of_what_was_asked_for(given, packing, width, unit):
    found = batches(pad_to_multiple_of=given, packing=packing)
    multiple = batching.width_multiple(SFTConfig(pad_to_multiple_of=given))
    stream = Streamed(lambda n: iter(found.rows), 2, 2, 64, packing, 3, multiple)
    for source in (found, stream):
        assert source.widest == width
        widths = {b.tokens.shape[-1] for _, b in seen(source, 3)}
        assert max(widths) <= width and not any(w % unit for w in widths)


@pytest.mark.parametrize(("settings", "error", "text"), [
    (dict(packing_strategy="wrapped"), ValueError, r"'wrapped' is not supported; \['bfd', 'bfd_s"),
    (dict(train_sampling_strategy="batch_rebalance"), ValueError, "'batch_rebalance' is not supp"),
    (dict(pad_to_multiple_of=0), ValueError, "whole number from 1, 'auto' or None, got 0"),
    (dict(pad_to_multiple_of="8"), ValueError, "whole number from 1, 'auto' or None, got '8'"),
    (dict(group_by_length="yes"), TypeError, "group_by_length must be bool"),
    (dict(group_by_length=True, train_sampling_strategy="sequential"), ValueError, "two orders"),
])  # fmt: skip
def test_an_order_that_cannot_be_is_refused(settings, error, text):
    with pytest.raises(error, match=text):
        SFTConfig(**settings)


def test_a_row_that_is_too_long_is_cut_into_several_when_asked():
    chatml = get_chat_template(byte_level(), "chatml")
    (whole,) = rows([{"messages": TALK}], chatml, max_length=None)
    pieces = rows([{"messages": TALK}], chatml, max_length=10, split=True)
    assert [t for row in pieces for t in row.tokens] == whole.tokens
    assert all(row.mask == [0] + [1] * (len(row.tokens) - 1) for row in pieces)
    answers = rows(
        [{"messages": TALK}], chatml, max_length=10, split=True, assistant_only_loss=True
    )
    assert 0 < len(answers) < len(pieces) and all(any(row.mask) for row in answers)
    silent = {"input_ids": [5] * 30, "labels": [-100] * 30}
    with pytest.raises(ValueError, match="row 0: no supervised token among 30"):
        rows([silent], chatml, max_length=10, split=True)
