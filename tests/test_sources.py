"""Data sets by file, folder and name, and rows that are streamed."""

import csv
import itertools
import json
import time

import datasets
import numpy as np
import pytest
import tiny_chat

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from unsloth_jax.data import Row
from workflows import machine, sources
from workflows.batching import Batches
from workflows.streams import Streamed

SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_chat.load(tiny_chat.save(tmp_path_factory.mktemp("model")))[0]


@pytest.fixture
def fresh(base):
    base.adapters = None
    return FastLanguageModel.get_peft_model(base, r=4)


def trainer(model, data, **changes) -> SFTTrainer:
    return SFTTrainer(model=model, train_dataset=data, args=SFTConfig(**(SAME | changes)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows in every format that is read, as `datasets` or the standard library write."""
    folder = tmp_path_factory.mktemp("data")
    table = datasets.Dataset.from_list(tiny_chat.TEXTS)
    table.to_json(folder / "a.jsonl")
    table.to_parquet(folder / "a.parquet")
    table.to_csv(folder / "a.csv", index=False)
    (folder / "a.json").write_text(json.dumps(tiny_chat.TEXTS))
    table.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(folder / "splits")
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "a.json", "saved", "splits"])
def test_every_format_gives_the_rows_that_were_written(files, name):
    assert [dict(row) for row in sources.opened(files / name)] == tiny_chat.TEXTS
    assert [dict(row) for row in sources.opened(str(files / name))] == tiny_chat.TEXTS


def test_messages_in_a_file_train_as_the_list_does(fresh, files):
    (files / "talk.jsonl").write_text("\n".join(map(json.dumps, tiny_chat.MESSAGES)) + "\n\n")
    run = trainer(fresh, files / "talk.jsonl", assistant_only_loss=True)
    assert run.rows == trainer(fresh, tiny_chat.MESSAGES, assistant_only_loss=True).rows
    assert run.evaluate(str(files / "talk.jsonl"))["eval_loss"] > 0


@pytest.mark.parametrize(
    "name, text, error, message",
    [
        ("b.jsonl", '{"text": "x"}\n{"text"', ValueError, r"b.jsonl, line 2 is no JSON"),
        ("b.json", '{"text": "x"}', ValueError, r"b.json holds dict, expected a list of rows"),
        ("c.json", '{"a": 1}\n{"a": 2}', ValueError, r"one object a line ends in .jsonl"),
        ("b.csv", "text,kind\na\n", ValueError, r"b.csv: the row .* has not the header.s cells"),
        ("b.parquet", "PAR1", ValueError, r"b.parquet is no Parquet file"),
        ("b.txt", "x", ValueError, r"b.txt: known endings are \['.csv'"),
        (None, "", FileNotFoundError, r"no file or folder here, and no hub name"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, error, message):
    path = tmp_path / (name or "absent")
    if name:
        path.write_text(text)
    with pytest.raises(error, match=message):
        list(sources.opened(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_rows(files, tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (files / name).read_bytes())
    assert [dict(row) for row in sources.opened(tmp_path / name)] == tiny_chat.TEXTS


@pytest.mark.parametrize("name", ["b.jsonl", "b.csv", "b.json"])
def test_a_file_in_another_encoding_is_named(tmp_path, name):
    (tmp_path / name).write_bytes("text\nStraße\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is no UTF-8 text: .* save the file in it"):
        list(sources.opened(tmp_path / name))


def test_a_missing_file_and_a_foreign_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file .*x.jsonl"):
        list(sources.opened(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="was not written by datasets' save_to_disk"):
        sources.opened(tmp_path)


def test_a_csv_of_prompts_and_completions_is_learnt_from(fresh, tmp_path):
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerows([("prompt", "completion"), ("one, two\n", 'say "three"')])
    (row,) = trainer(fresh, tmp_path / "pairs.csv").rows
    assert 0 < sum(row.mask) < len(row.tokens)


def counted(rows, passes=None):
    """Rows function of a stream; notes the number of each pass."""

    def one(number):
        if passes is not None:
            passes.append(number)
        return iter(rows)

    return one


ROWS = [Row([*range(3, 3 + n)], [0] + [1] * (n - 1)) for n in (5, 9, 4, 7, 12)]


@pytest.mark.parametrize("packing", [False, True])
def test_streamed_batches_hold_every_row_of_a_pass_in_order(packing):
    passes = []
    stream = Streamed(counted(ROWS, passes), 2, 2, 16, packing, total=6)
    seen = list(itertools.islice(stream.forever(), 6))
    assert [epoch for epoch, _ in seen] == [n / 6 for n in range(1, 7)]
    assert passes[:3] == [0, 1, 2]
    flat = [b.tokens[i, j][b.segments[i, j] > 0] for _, b in seen for i in (0, 1) for j in (0, 1)]
    tokens = np.concatenate(flat).tolist()
    whole = [t for row in ROWS * 9 for t in row.tokens]
    if not packing:
        assert tokens == whole[: len(tokens)]
    rest = itertools.islice(stream.forever(skip=4), 2)
    for (_, one), (_, other) in zip(seen[4:], rest, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_streamed_rows_in_order_are_the_batches_of_the_list():
    fixed = Batches(ROWS, 2, 1, 16, False, None)
    stream = Streamed(counted(ROWS), 2, 1, 16, False, total=2)
    for one, (_, other) in zip(itertools.islice(fixed.epoch(0), 2), stream.forever(), strict=False):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.weights, other.weights)


def test_a_packed_row_of_a_stream_holds_no_more_documents_than_it_says():
    stream = Streamed(counted([Row([3, 4], [0, 1])] * 40), 1, 1, 512, True, total=2)
    most = [int(batch.segments.max()) for _, batch in itertools.islice(stream.forever(), 2)]
    assert most == [stream.documents(2)] * 2 and most[0] < 256


def test_a_stream_that_ends_for_good_is_told():
    passes = iter([iter(ROWS)])
    stream = Streamed(lambda number: next(passes, iter([])), 2, 1, 16, False, total=9)
    with pytest.raises(ValueError, match="pass 2 over the streamed data set brought no row"):
        list(itertools.islice(stream.forever(), 9))


def test_a_streaming_data_set_trains_as_its_rows_in_that_order(fresh):
    start = fresh.adapters
    stream = datasets.Dataset.from_list(tiny_chat.MESSAGES).to_iterable_dataset()
    run = trainer(fresh, stream, max_steps=6)
    run.train()
    assert [row["epoch"] for row in run.log_history][-1] == 1.0
    streamed = [row["loss"] for row in run.log_history]
    fresh.adapters = start
    run = trainer(fresh, tiny_chat.MESSAGES, max_steps=6)
    run._batches = lambda: Batches(run.rows, 2, 1, run.length, False, None)
    run.train()
    assert [row["loss"] for row in run.log_history] == streamed


def test_each_pass_over_a_shuffled_stream_has_an_order_of_its_own(fresh):
    table = datasets.Dataset.from_list(tiny_chat.TEXTS)
    stream = table.to_iterable_dataset().shuffle(seed=0, buffer_size=8)
    run = trainer(fresh, stream, max_steps=6)
    first, second, again = (list(run.rows(number)) for number in (0, 1, 0))
    assert first == again != second and sorted(first) == sorted(second)


class Counting:
    """Rows of a class that is no data set; counts those that were asked for."""

    asked = 0

    def __iter__(self):
        for n in range(99):
            self.asked += 1
            yield tiny_chat.TEXTS[n % 8]


def test_rows_of_any_iterable_are_read_as_they_are_needed(fresh):
    counting = Counting()
    run = trainer(fresh, counting, max_steps=1)
    assert counting.asked == 0
    assert list(itertools.islice(run.rows(0), 8)) == trainer(fresh, tiny_chat.TEXTS).rows
    assert counting.asked == 8


@pytest.mark.parametrize("steps", [-1, 1])
def test_what_can_be_read_only_once_is_refused_with_what_to_give_instead(fresh, steps):
    rows = tiny_chat.TEXTS
    once = lambda: (row for row in rows)
    with pytest.raises(
        ValueError, match="a generator can be read only once: give a list .*from_generator"
    ):
        trainer(fresh, once(), max_steps=steps)
    run = trainer(fresh, datasets.IterableDataset.from_generator(once), max_steps=1)
    assert list(run.rows(0)) == list(run.rows(1))
    with pytest.raises(ValueError, match="^eval_dataset: a generator can be read only once"):
        run.evaluate(once())


def test_a_bad_row_of_a_stream_is_named_when_it_comes(fresh):
    rows = [*tiny_chat.TEXTS[:4], {"text": None}]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match="row 4: columns"):
        trainer(fresh, stream, max_steps=6).train()


def test_what_needs_all_rows_is_refused_for_a_stream(fresh):
    run = trainer(fresh, datasets.Dataset.from_list(tiny_chat.TEXTS).to_iterable_dataset(),
                  max_steps=2)  # fmt: skip
    with pytest.raises(ValueError, match="markers need rows that are there"):
        train_on_responses_only(run, "user", "assistant")
    with pytest.raises(ValueError, match="train_dataset is streamed"):
        _ = run.train_dataset


@pytest.mark.slow
def test_a_million_streamed_rows_start_at_once_and_keep_memory_flat(fresh):
    def endless():
        for n in range(1_000_000):
            yield {"text": f"{n} one two three"}

    stream = datasets.IterableDataset.from_generator(endless)
    began = time.monotonic()
    run = trainer(fresh, stream, max_steps=400)
    peaks = {}

    class Peaks:
        def on_log(self, args, state, control, **more):
            peaks[state.global_step] = machine.peak(), time.monotonic() - began

    run.add_callback(Peaks)
    run.train()
    assert peaks[1][1] < 10
    assert peaks[400][0] - peaks[100][0] < 32 * 2**20
