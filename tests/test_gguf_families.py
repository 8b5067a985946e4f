"""GGUF files of the further families: llama.cpp's converter (recorded) and llama.cpp itself."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bridge import gguf_file
from bridge.safetensors_file import Weight
from tests.oracles import gguf_answers as base
from tests.oracles import gguf_families as made
from tests.test_gguf_file import next_logprobs, speaking

ANSWERS = json.loads(made.ANSWERS.read_text())
# Windows that llama.cpp lacks hold 32 tokens.
WITHIN_WINDOW = (1, 5, 17, 31)
LENGTHS = {"phi3": WITHIN_WINDOW, "phi3_long": (5, 120), "starcoder2": WITHIN_WINDOW}
TOLERANCE = 1e-2  # nats
DEEP = ("cohere_plus", "exaone4_windows")
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n in DEEP)) for n in made.CONFIGS]


def weights_of(config):
    return [Weight(n, w.shape, w.dtype, lambda w=w: w) for n, w in made.weights(config).items()]


def written(path, config, fmt="f32"):
    """The GGUF file of a config, with its family's tokenizer, in the folder `path`."""
    folder = made.tokenizer(config, path / "tokenizer")
    file = path / "model.gguf"
    return gguf_file.save(file, config, weights_of(config), folder, fmt, name=base.NAME)


@pytest.mark.parametrize("name", NAMES)
def test_file_equals_llama_cpps_to_the_byte(name, tmp_path):
    for fmt, answer in ANSWERS[name].items():
        (tmp_path / fmt).mkdir()
        written(tmp_path / fmt, made.CONFIGS[name], fmt)
        path = tmp_path / fmt / "model.gguf"
        if base.digest(path.read_bytes()) != answer["file"]:
            ours = json.loads(json.dumps(base.described(path)))
            assert ours["keys"] == answer["keys"]
            assert ours["tensors"] == answer["tensors"]
            raise AssertionError("keys and tensors are the same, the bytes are not")


def model_of(path, config):
    """transformers' model of a config."""
    (path / "config.json").write_text(json.dumps(config))
    base.save_file(made.weights(config), path / "model.safetensors", {"format": "pt"})
    options = dict(dtype=torch.float32, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def differences(model, server, lengths):
    """Largest difference in nats of the next token's log-probabilities, by length of the text."""
    draw, found = np.random.default_rng(0), {}
    for length in lengths:
        ids = draw.integers(3, 480, length).tolist()
        with torch.no_grad():
            reference = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).numpy()
        off = np.abs(next_logprobs(server, ids, 512) - reference)
        assert reference.std() > 0.5
        found[length] = off[reference > -25].max()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    config = made.CONFIGS[name]
    written(tmp_path, config)
    server = speaking(tmp_path / "model.gguf")
    lengths = LENGTHS.get(name, (1, 5, 17, 40, 120))
    found = differences(model_of(tmp_path, config), server, lengths)
    assert max(found.values()) < TOLERANCE, found


def test_longrope_is_long_in_a_long_context_of_llama_cpp(tmp_path):
    config = made.CONFIGS["phi3_long"]
    report = written(tmp_path, config)
    server = speaking(tmp_path / "model.gguf", 512)
    found = differences(model_of(tmp_path, config), server, (5, 270, 300))
    assert max(found.pop(270), found.pop(300)) < TOLERANCE
    assert found[5] > 10 * TOLERANCE  # as the report tells
    assert any("up to 256 tokens" in note for note in report.notes)
