"""Our own GGUF files of yarn models, read back: the same logits as by the config they came from."""

import dataclasses

import numpy as np
import pytest
import tiny

from bridge import hf
from bridge.gguf_source import GGUFSource
from tests import gguf_writing
from tests.oracles import gguf_answers


@pytest.mark.parametrize("own", [{"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}])
def test_a_yarn_files_attention_factor_survives_writing_and_reading(tmp_path, own):
    hf_config = gguf_answers.CONFIGS["qwen2_tied_yarn"]
    hf_config = hf_config | {"rope_scaling": gguf_answers.YARN | own}
    gguf_writing.written(tmp_path / "m.gguf", hf_config)
    source = GGUFSource(tmp_path / "m.gguf")
    module, found, params = hf.load(source)
    vocabulary = source.config["vocab_size"]
    batch = tiny.padded([tiny.draw(0, 40, vocabulary)], 40)
    ours, wanted = (
        tiny.logits(module, c, params, *batch) for c in (found, module.config(hf_config))
    )
    np.testing.assert_allclose(ours, wanted, atol=1e-4 * np.std(wanted))
    other = dataclasses.replace(found, rope=dataclasses.replace(found.rope, attention_factor=1.0))
    far = tiny.logits(module, other, params, *batch)
    assert np.abs(far - wanted).max() > 1e-2 * np.std(wanted)
