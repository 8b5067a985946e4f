"""A run's page: whole HTML without a network, kept whatever ends the run, made again from files."""

import json
import math
import re
from html.parser import HTMLParser
from time import monotonic

import pytest
import tiny_chat

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth_jax.data import Row
from workflows import report, run_page
from workflows.batching import Batches
from workflows.row_lengths import drawn, lengths

VOID = {"meta", "rect", "path", "polyline", "link", "img", "br", "wbr"}
NASTY = '</script><script>alert(1)</script> & "quoted" <img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Tags in their order; fails where one closes what is not open."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.said = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)


def of(folder) -> Page:
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("report") / "tiny")


@pytest.fixture
def trainer(folder, tmp_path):
    """trainer(callbacks, **settings) writes into tmp_path / "out"."""
    model, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(model, r=4)

    def made(*callbacks, **settings):
        same = dict(output_dir=str(tmp_path / "out"), max_steps=4, learning_rate=1e-2)
        args = SFTConfig(**same | settings)
        held_out = {"short": tiny_chat.MESSAGES[:2], "a_b": tiny_chat.MESSAGES[2:4]}
        return SFTTrainer(
            model, train_dataset=tiny_chat.MESSAGES, eval_dataset=held_out, args=args,
            callbacks=list(callbacks),
        )  # fmt: skip

    return made


def test_a_run_leaves_a_whole_page_that_needs_no_network(trainer, tmp_path):
    trainer(eval_steps=2, metric_for_best_model="a_b_loss").train()
    page, raw = of(tmp_path / "out"), (tmp_path / "out" / "report.html").read_text()
    assert "http:" not in raw and "https:" not in raw and "url(" not in raw
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert dict(page.attributes)["lang"] == "en" and page.tags.count("h1") == 1
    for said in ("done", "4 of 4", "short, best", "a_b, best", "best a_b loss", "learning rate",
                 "gradient norm", "tokens/s", "memory", "rows by length", "max length 128",
                 "learning_rate", "0.01", "5e-05", "jaxlib", "transformers"):  # fmt: skip
        assert said in page.text, said
    changed = page.text[page.text.index("Configuration") : page.text.index("at their defaults")]
    assert "max_steps" in changed and "weight_decay" not in changed


def test_the_evaluations_of_the_page_are_the_logs(trainer, tmp_path):
    run = trainer(eval_steps=2)
    run.train()
    names = {value for name, value in of(tmp_path / "out").attributes if name == "data-name"}
    best = min(
        (row["eval_short_loss"], row["step"]) for row in run.log_history if "loss" not in row
    )
    assert f"short, best {best[0]:.4g} at step {best[1]}" in names


def test_samples_stand_under_their_prompt_by_step_and_as_text(trainer, tmp_path):
    trainer().train()
    file = tmp_path / "out" / "metrics.jsonl"
    with open(file, "a") as out:
        for step, answer in ((2, NASTY), (4, "four")):
            row = {"step": step, "samples": [{"prompt": f"{NASTY}?", "completion": answer}]}
            out.write(json.dumps(row) + "\n")
    report.main([str(tmp_path / "out")])
    page = of(tmp_path / "out")
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert page.text.count(f"{NASTY}?") == 1 and page.text.count(NASTY) == 2
    assert re.search(r"step 2 .*</script>.* step 4 .*four", page.text, re.S)


@pytest.mark.parametrize(
    "error, state, why",
    [
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ZeroDivisionError("<i>of mine</i>"), "error", "ZeroDivisionError: <i>of mine</i>"),
    ],
)
def test_whatever_ends_a_run_its_page_says_so(trainer, tmp_path, error, state, why):
    class Ends:
        def on_step_end(self, args, run, control, **other):
            if run.global_step == 2:
                raise error

    with pytest.raises(type(error)):
        trainer(Ends()).train()
    page = of(tmp_path / "out")
    assert f"{state} at step 2 of 4" in page.text and why in page.text
    assert "i" not in page.tags


def test_a_run_that_a_callback_ends_is_stopped_and_not_done(trainer, tmp_path):
    class Ends:
        def on_step_end(self, args, run, control, **other):
            control.should_training_stop = run.global_step == 3
            return control

    trainer(Ends()).train()
    assert "stopped at step 3 of 4" in of(tmp_path / "out").text


def test_during_a_run_its_page_says_running_and_is_read_again(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(run_page, "EVERY", 0.0)
    monkeypatch.setattr(run_page, "SHARE", 0)
    seen = []

    class Looks:
        def on_step_end(self, args, run, control, **other):
            seen.append((tmp_path / "out" / "report.html").read_text())

    trainer(Looks()).train()
    assert "running at step 3 of 4" in Page(seen[2]).text
    assert 'http-equiv="refresh"' in seen[2]
    assert 'http-equiv="refresh"' not in (tmp_path / "out" / "report.html").read_text()


def test_a_page_is_not_written_at_every_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with run_page.Page(tmp_path, {}, 100, 0, lambda: 1) as page:
        before = (tmp_path / "report.html").stat().st_mtime_ns
        for step in range(100):
            page({"step": step})
        assert (tmp_path / "report.html").stat().st_mtime_ns == before
        # A page that took a second is due a hundred seconds later, not after the usual time.
        page.cost, page.written = 1.0, monotonic() - 2 * run_page.EVERY
        page({"step": 100})
        assert (tmp_path / "report.html").stat().st_mtime_ns == before
        page.cost = 0.0
        page({"step": 101})
        assert (tmp_path / "report.html").stat().st_mtime_ns > before


def test_a_page_that_cannot_be_written_stops_nothing(trainer, tmp_path, capsys):
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    assert trainer().train().global_step == 4
    assert "report.html can't be written" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "metrics.jsonl", "report.html", "run.json"
    ]  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_keeps_the_rows_and_starts_before_it(trainer, tmp_path):
    class Ends:
        def on_step_end(self, args, run, control, **other):
            if run.global_step == 2:
                raise KeyboardInterrupt

    saved = dict(save_strategy="steps", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer(Ends(), **saved).train()
    trainer(**saved).train(resume_from_checkpoint=True)
    starts = report.record(tmp_path / "out")["starts"]
    assert [(s["from"], s["step"], s["state"]) for s in starts] == [
        (0, 2, "stopped"), (starts[1]["from"], 4, "done")
    ]  # fmt: skip
    trained = [row["step"] for row in report.rows(tmp_path / "out") if "loss" in row]
    assert trained == [1, 2, 3, 4] or trained == [1, 2][: starts[1]["from"]] + [2, 3, 4]
    assert "Starts" in of(tmp_path / "out").text


def test_a_start_that_ended_without_a_word_is_told_when_the_run_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    lost = {"at": "2026-01-01T00:00:00", "from": 0, "step": 1, "state": "running", "why": ""}
    (tmp_path / "run.json").write_text(json.dumps({"total": 2, "starts": [lost]}))
    with run_page.Page(tmp_path, {}, 2, 1, lambda: 2):
        pass
    states = [start["state"] for start in report.record(tmp_path)["starts"]]
    assert states == ["stopped", "done"]
    assert "it ended without a word" in of(tmp_path).text


@pytest.mark.slow
def test_a_new_run_links_the_page_that_it_moves_aside(trainer, tmp_path):
    trainer().train()
    before = (tmp_path / "out" / "report.html").read_bytes()
    trainer(max_steps=2).train()
    assert (tmp_path / "out" / "report.1.html").read_bytes() == before
    links = [value for name, value in of(tmp_path / "out").attributes if name == "href"]
    assert links == ["report.1.html"]


def test_the_command_makes_the_same_page_again(trainer, tmp_path, capsys):
    trainer(eval_steps=2).train()
    page = tmp_path / "out" / "report.html"
    before = page.read_bytes()
    page.unlink()
    report.main([str(tmp_path / "out")])
    assert page.read_bytes() == before
    (tmp_path / "out" / "run.json").unlink()
    report.main([str(tmp_path / "out")])
    assert "unknown at step 4" in of(tmp_path / "out").text
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "no metrics.jsonl in" in capsys.readouterr().err
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(SystemExit, match="line 2 is no row of a log"):
        report.main([str(tmp_path / "out")])


def test_a_page_of_many_steps_and_samples_stays_small():
    rows = [
        {"step": n, "loss": 3 + math.sin(n), "learning_rate": 1e-4, "grad_norm": math.nan,
         "tokens_per_s": 1e4, "memory_gib": 2.0, "seconds": 0.1, "rewards/margins": n / 7}
        for n in range(1, 4001)
    ]  # fmt: skip
    rows += [
        {"step": n, "samples": [{"prompt": f"{k} &" * 900, "completion": "<" * 9000}] * 3}
        for n in range(0, 4000, 100) for k in range(20)
    ]  # fmt: skip
    rows += [{"step": n, "eval_loss": 2.0, "eval_perplexity": math.inf} for n in range(0, 4000)]
    began = monotonic()
    text = report.page({}, rows)
    assert monotonic() - began < 20
    assert len(text.encode()) < 1_000_000
    assert "nan" not in text.split("<script>")[0].lower().replace("data-name", "")
    assert "rewards/margins" in Page(text).text and "8 more prompts" in Page(text).text


def test_a_page_of_nothing_is_whole():
    assert "No step has been logged yet" in Page(report.page({}, [])).text
    assert "streamed" in Page(report.page({"data": None}, [])).text


def test_lengths_count_what_an_epoch_holds():
    rows = [Row([7] * n, [0] + [1] * (n - 1)) for n in (10, 20, 30, 50)]
    packed = lengths(Batches(rows, 1, 1, 60, True, 0))
    assert packed[:7] == (4, 110, 106, 10, 25, 50, 60)
    assert packed.density == pytest.approx(110 / 120)
    padded = lengths(Batches(rows, 2, 1, 60, False, None))
    assert padded.density == pytest.approx(110 / (4 * 60))
    assert drawn(packed).count("\n") < 24 and drawn(packed).endswith("# 1")
