"""Small checkpoints and tokenizers for the tests that write GGUF files."""

import json
import shutil

import numpy as np
import xllamacpp

from bridge import gguf_file
from bridge.safetensors_file import Weight
from tests import llama_server
from tests.oracles import gguf_answers as made


def weights_of(config):
    made_now = {n: made.values(n, s).astype(np.float32) for n, s in made.shapes(config).items()}
    return [Weight(n, w.shape, w.dtype, lambda w=w: w) for n, w in made_now.items()]


def written(path, config, fmt="f32", folder=made.TOKENIZER, weights=None):
    weights = weights_of(config) if weights is None else weights
    return gguf_file.save(path, config, weights, folder, fmt, name=made.NAME)


def exported(path, name, fmt="f32"):
    """A recorded case's file, from its own folder."""
    folder = made.folder(name, path / name)
    return written(path / "model.gguf", made.CONFIGS[name], fmt, folder)


def small(**changes):
    return made.CONFIGS["llama"] | changes


def tokenizer_folder(path, change=lambda spec: None, **settings):
    """A copy of the tiny tokenizer whose tokenizer.json went through `change`."""
    shutil.copytree(made.TOKENIZER, path)
    spec = json.loads((path / "tokenizer.json").read_text())
    change(spec)
    (path / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((path / "tokenizer_config.json").read_text()) | settings
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def serving(path) -> xllamacpp.Server:
    """A llama.cpp server whose loop is known to run."""
    server = llama_server.serve(path)
    # A server that goes before its loop has begun waits for it for ever.
    server.handle_completions({"prompt": [3], "max_tokens": 1})
    return server
