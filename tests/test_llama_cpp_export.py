"""Each GGUF export runs in llama.cpp: sound files pass, wrong ones are found by this alone."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_chat

from bridge import gguf_file
from bridge import tokenizer as text
from bridge.gguf_source import halves_from_pairs
from bridge.safetensors_file import Weight
from unsloth_jax.sample import Sampling
from workflows import agreement, divergence, keywords, llama_cpp
from workflows.model import Model

ROOT = Path(__file__).parents[1]
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
FORMATS = ("f32", "f16", "bf16", "q8_0")
HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture(scope="module")
def model(folder):
    return tiny_chat.adapted(folder)


@pytest.fixture(scope="module")
def plain(folder):
    return tiny_chat.load(folder)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_files_of_every_family_say_what_the_merged_model_says(tmp_path, family):
    model = tiny_chat.adapted(tiny_chat.save(tmp_path / "base", family), load_in_4bit=True)
    manifest = model.save_pretrained_gguf(tmp_path / "g", quantization_method=[*FORMATS, "q4_k_m"])
    for fmt in FORMATS:
        facts = manifest["quantization"][f"model.{fmt.upper()}.gguf"]["llama_cpp"]
        assert (facts["prompts"], facts["new_tokens"]) == (8, 256)
        assert facts["bound"] >= max(agreement.BOUNDS[fmt.upper()], 1.5 * facts["largest_gap"])
        assert facts["equal"] >= 220
    assert manifest["quantization"]["model.F32.gguf"]["llama_cpp"]["equal"] == 256
    coarse = manifest["quantization"]["model.Q4_K_M.gguf"]["llama_cpp"]
    assert coarse["bound"] is None and coarse["largest_gap"] > 0
    assert json.loads((tmp_path / "g" / "manifest.json").read_text()) == manifest


def wrong(source, change, path, fmt="q8_0", **fields):
    """A GGUF file of weights that went through `change(name, read)`, sound as a file."""
    read = lambda name: lambda: change(name, source.read).astype(np.float32)
    headers = source.headers().items()
    weights = [Weight(n, h.shape, np.dtype(np.float32), read(n)) for n, h in headers]
    gguf_file.save(path, source.config | fields, weights, source.folder, fmt)
    return path


def same(name, read):
    return read(name)


def rows_in_their_own_order(name, read):
    """What a converter writes that forgets to reorder the rows of queries and keys."""
    heads = [n for part, n in HEADS.items() if part in name]
    return halves_from_pairs(read(name), heads[0]) if heads else read(name)


def layers_exchanged(name, read):
    swapped = {"0": "1", "1": "0"}
    return read(".".join(swapped.get(part, part) for part in name.split(".")))


def norm_left_out(name, read):
    return np.ones_like(read(name)) if name == "model.norm.weight" else read(name)


WRONG = {
    "rows": (rows_in_their_own_order, {}),
    "layers": (layers_exchanged, {}),
    "norm": (norm_left_out, {}),
    "epsilon": (same, {"rms_norm_eps": 0.5}),
}


@pytest.mark.parametrize("fmt", ["bf16", "q8_0"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_sound_but_of_another_model_is_found(plain, folder, tmp_path, kind, fmt):
    change, fields = WRONG[kind]
    path = wrong(plain.source, change, tmp_path / "wrong.gguf", fmt, **fields)
    prompts, types = divergence.prompts(plain), ["F32", fmt.upper()]
    told = (
        r"wrong.gguf: llama.cpp says token \d+ where the merged model says \d+: prompt [1-8], "
        r"new token \d+, \d\.\d+ standard deviations of the scores below it, rounding explains 0\."
    )
    with pytest.raises(ValueError, match=told):
        agreement.checked(plain.source, prompts, {path: types})


def test_the_same_file_of_the_right_weights_passes_and_a_coarse_type_has_no_bound(plain, tmp_path):
    prompts = divergence.prompts(plain)
    good = wrong(plain.source, same, tmp_path / "good.gguf")
    bad = wrong(plain.source, layers_exchanged, tmp_path / "bad.gguf")
    found = agreement.checked(plain.source, prompts, {good: ["Q8_0"], bad: ["Q8_0", "Q4_K"]})
    assert found["good.gguf"].equal > 220 and found["good.gguf"].largest_gap < 0.25
    assert found["bad.gguf"].equal < 200 and found["bad.gguf"].largest_gap > 1
    assert found["bad.gguf"].bound is None


def test_gaps_are_those_of_the_whole_models_scores(plain, monkeypatch):
    tokens, barred = np.random.default_rng(0).integers(3, 400, (2, 12)).astype(np.int32), [7, 300]
    logits = plain(tokens)[:, 3:-1].astype(np.float64)
    allowed = np.delete(np.arange(logits.shape[-1]), barred)
    best, deviation = logits[..., allowed].max(-1), logits[..., allowed].std(-1)
    mine = np.take_along_axis(logits, tokens[:, 4:, None], -1)[..., 0]
    monkeypatch.setattr(divergence, "ROWS", 100)
    found = agreement.scored(plain.source, tokens, 4, barred)
    np.testing.assert_array_equal(found.likeliest, allowed[logits[..., allowed].argmax(-1)])
    np.testing.assert_allclose(found.gap, (best - mine) / deviation, atol=1e-4)
    assert 0.001 < found.rounding < 0.2


def test_a_token_that_the_vocabulary_lacks_is_not_taken_for_agreement(plain):
    tokens = np.full((1, 8), tiny_chat.VOCAB, np.int32)
    tokens[:, :4] = 5
    with pytest.raises((ValueError, IndexError)):
        agreement.scored(plain.source, tokens, 4, [])


def test_every_prompt_is_continued_to_its_last_token_and_no_end_is_said(plain, tmp_path):
    path = wrong(plain.source, same, tmp_path / "good.gguf", "f32")
    prompts = divergence.prompts(plain)
    assert prompts.shape == (8, divergence.PROMPT) and len({tuple(p) for p in prompts}) == 8
    found = llama_cpp.greedy(path, prompts.tolist(), 32)
    assert tiny_chat.EOS in found.barred and not np.isin(found.tokens, found.barred).any()
    assert np.shape(found.tokens) == (8, 32) and len(np.unique(found.tokens)) > 30


def test_an_answer_cut_short_is_refused(plain, tmp_path):
    path = wrong(plain.source, same, tmp_path / "good.gguf", "f32", max_position_embeddings=32)
    with pytest.raises(ValueError, match=r"good.gguf: llama.cpp answered 8 prompts with \[16, 16"):
        llama_cpp.greedy(path, divergence.prompts(plain).tolist(), 32)


SHORT = [("Llama", {"max_position_embeddings": 40}), ("Mistral", {"sliding_window": 40})]


@pytest.mark.parametrize(("family", "fields"), SHORT)
def test_a_model_of_a_short_context_is_told_and_not_run(
    tmp_path, capsys, monkeypatch, family, fields
):
    monkeypatch.setattr(keywords, "_said", set())
    model, _ = tiny_chat.load(tiny_chat.save(tmp_path / "m", family, **fields))
    facts = model.save_pretrained_gguf(tmp_path / "g")["quantization"]["model.Q8_0.gguf"]
    why = "the model's context or window has 40 tokens, the check takes 48"
    assert facts["llama_cpp_not_run"] == why
    assert f"model.Q8_0.gguf: not run in llama.cpp: {why}" in capsys.readouterr().out


def test_a_file_that_llama_cpp_does_not_load_is_refused_with_its_last_lines(plain, tmp_path):
    path = wrong(plain.source, same, tmp_path / "bad.gguf", "f32")
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_c0unt"))
    with pytest.raises(ValueError, match=r"bad.gguf: (.|\n)*status 1 (.|\n)*llama.block_count"):
        llama_cpp.greedy(path, divergence.prompts(plain).tolist(), 32)
    with pytest.raises(ValueError, match=r"bad.gguf: (.|\n)*status 1 (.|\n)*llama.block_count"):
        llama_cpp.chat(path, [tiny_chat.TALK[:1]], 4)


DIES = "import os, sys\nprint('GGML_ASSERT(x) failed', file=sys.stderr, flush=True)\nos.abort()\n"
# The process is ended after a second: it never sleeps to its end.
HANGS = "import time\ntime.sleep(60)\n"


def with_package(monkeypatch, tmp_path, source):
    """A package found before the real xllamacpp, here and in the process that runs it."""
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "xllamacpp.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "first"))


def test_a_process_that_dies_ends_the_export_and_nothing_is_left(model, tmp_path, monkeypatch):
    with_package(monkeypatch, tmp_path, DIES)
    out = tmp_path / "out"
    told = r"model.Q8_0.gguf: llama.cpp ended with exit status -6 (.|\n)*GGML_ASSERT\(x\) failed"
    with pytest.raises(ValueError, match=told):
        model.save_pretrained_gguf(out / "g")
    assert list(out.iterdir()) == []
    model.save_pretrained_gguf(out / "g", run_in_llama_cpp=False)
    assert (out / "g" / "model.Q8_0.gguf").exists()


def test_a_process_that_hangs_is_ended(plain, tmp_path, monkeypatch):
    path = wrong(plain.source, same, tmp_path / "good.gguf", "f32")
    with_package(monkeypatch, tmp_path, HANGS)
    monkeypatch.setattr(llama_cpp, "SECONDS", 1)
    with pytest.raises(llama_cpp.NotRun, match=r"good.gguf: it did not finish within 1 s"):
        llama_cpp.greedy(path, divergence.prompts(plain).tolist(), 32)


BROKEN = "raise ImportError('libfoo.so: cannot open shared object file')"


def test_a_package_that_does_not_import_is_told_and_the_files_stay(model, tmp_path, monkeypatch):
    with_package(monkeypatch, tmp_path, BROKEN)
    facts = model.save_pretrained_gguf(tmp_path / "g")["quantization"]["model.Q8_0.gguf"]
    assert "xllamacpp can't be imported: libfoo.so" in facts["llama_cpp_not_run"]
    assert (tmp_path / "g" / "model.Q8_0.gguf").exists()


@pytest.mark.parametrize(
    "given, threads",
    [("3", 3), ("2,4", 2), ("0", None), ("-1", None), ("²", None), ("", None), ("1000", 16)],
)
def test_the_number_of_threads_is_one_that_llama_cpp_takes(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert llama_cpp._threads() == (threads or min(16, len(os.sched_getaffinity(0))))


@pytest.mark.parametrize(
    "types, rounding, bound",
    [
        (["F32"], 0.05, 0.005), (["F32", "BF16"], 0.01, 0.1), (["BF16"], 0.05, 0.4),
        (["F32", "Q8_0"], 0.02, 0.9), (["Q8_0"], 0.06, None), (["Q8_0", "Q4_K"], 0.0, None),
    ],
)  # fmt: skip
def test_the_bound_grows_with_what_rounding_does_to_the_model(types, rounding, bound):
    assert agreement.bound_of(types, rounding) == (bound and pytest.approx(bound))


def test_an_export_with_a_wrong_file_in_it_keeps_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(agreement.BOUNDS, "Q8_0", 0.0)
    monkeypatch.setitem(agreement.TIMES, "Q8_0", 0.0)
    with pytest.raises(ValueError, match=r"model.Q8_0.gguf: .* rounding explains 0.0"):
        model.save_pretrained_gguf(tmp_path / "g", quantization_method=["f32", "q8_0"])
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_not_to_run_says_so(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keywords, "_said", set())
    facts = model.save_pretrained_gguf(tmp_path / "g", run_in_llama_cpp=False)
    one = facts["quantization"]["model.Q8_0.gguf"]
    assert one["llama_cpp_not_run"] == "run_in_llama_cpp=False" and "llama_cpp" not in one
    assert "not run in llama.cpp: run_in_llama_cpp=False" in capsys.readouterr().out


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_another_kind_than_true_and_false_is_refused(model, tmp_path, value):
    # The signature's own check, which only tests have, would come first.
    unchecked = inspect.unwrap(Model.save_pretrained_gguf)
    with pytest.raises(TypeError, match="run_in_llama_cpp must be bool, got"):
        unchecked(model, tmp_path / "g", run_in_llama_cpp=value)


WITHOUT = """
import sys

from importlib import machinery
hidden = [f for f in sys.meta_path if f is machinery.PathFinder][0]

class Without(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "xllamacpp" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(hidden)] = Without
sys.path[:0] = [ROOT, ROOT + "/tests"]
from pathlib import Path
from workflows import agreement
found = agreement.run(None, [], CONFIG, {Path("model.Q8_0.gguf"): []})
assert found == {"model.Q8_0.gguf": {"llama_cpp_not_run": WHY}}, found
"""


def test_where_the_package_is_missing_the_export_says_so(plain):
    config = json.dumps(plain.source.config)
    why = "the package xllamacpp is not installed"
    script = f"ROOT, WHY = {str(ROOT)!r}, {why!r}\nCONFIG = json.loads({config!r})\n"
    script = "import json\n" + script + WITHOUT
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"model.Q8_0.gguf: not run in llama.cpp: {why}" in done.stdout
    assert llama_cpp.absent() is None


def test_chat_goes_through_the_files_own_template(plain, tmp_path):
    path = wrong(plain.source, same, tmp_path / "good.gguf", "f32")
    ask = [[{"role": "user", "content": words}] for words in ("one two three", "isn't it?")]
    ours = lambda messages: text.ids(plain.tokenizer, messages, add_generation_prompt=True)
    greedy = Sampling(temperature=0.0)
    found = plain.answers([ours(m) for m in ask], max_new_tokens=6, sampling=greedy)
    # Half a character at the end is shown by one of the two.
    whole = lambda words: words.strip(" \n\ufffd")
    decode = lambda answer: plain.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    said = [whole(words) for words in llama_cpp.chat(path, ask, 6)]
    assert [whole(decode(answer)) for answer in found] == said and all(said)
