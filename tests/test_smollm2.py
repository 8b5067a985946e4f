"""The real SmolLM2-135M-Instruct, against transformers and llama.cpp on the same weights."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import xllamacpp

from bridge import hub
from bridge import tokenizer as text
from tests import llama_server
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth_jax.data import Row, collate
from unsloth_jax.sample import Sampling
from workflows import demo_data, objective

pytestmark = pytest.mark.slow

STORY = (
    "The lighthouse keeper counted 27 ships before noon, wrote each name in her book, and went "
    "down to the harbour to ask why the twenty-eighth had not come.\n\n"
    "def late(ships, now):\n    return [s for s in ships if s.due < now]  # nobody answered"
)
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in simple words why the sky is blue.",
)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n <",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4,",
    "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
)
CONVERSATIONS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "2+2?\n"}],
    [
        {"role": "user", "content": "東京 <|im_end|>?"},
        {"role": "assistant", "content": "  Tokyo\n\n"},
        {"role": "user", "content": "{{ thanks }} 🙂"},
    ],
)
PIECES = json.loads((Path(__file__).parent / "data" / "gguf_source_pieces.json").read_text())
VOCABULARY = 49152
LIKELY = -25.0  # natural log; below it float32 scores carry no digits worth comparing


def loaded(four: bool):
    return FastLanguageModel.from_pretrained(
        str(hub.embedded_smollm2()), max_seq_length=256, dtype="float32", load_in_4bit=four
    )[0]


@pytest.fixture(scope="module")
def ours():
    return loaded(four=False)


@pytest.fixture(scope="module")
def theirs(ours):
    """transformers' model with the weights that our source reads; its head is tied."""
    config = transformers.LlamaConfig(**ours.source.config, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).float().eval()
    state = {n: torch.from_numpy(np.array(ours.source.read(n))) for n in ours.source.headers()}
    lost = model.load_state_dict(state, strict=False)
    assert lost.missing_keys == ["lm_head.weight"] and not lost.unexpected_keys
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def files(ours, tmp_path_factory):
    """A folder with our model.F32.gguf and model.Q8_0.gguf."""
    folder = tmp_path_factory.mktemp("smollm2") / "gguf"
    ours.save_pretrained_gguf(folder, quantization_method=["f32", "q8_0"])
    return folder


def running(path: Path) -> xllamacpp.Server:
    """llama.cpp as exact as it gets: float32 cache, no flash attention, its loop begun."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": [3], "max_tokens": 1})
    return server


@pytest.fixture(scope="module")
def server(files):
    return running(files / "model.F32.gguf")


def next_logprobs(server: xllamacpp.Server, ids: list[int]) -> np.ndarray:
    """llama.cpp's float64 [V] for the token after `ids`.

    The bias acts on the sample alone: an end token sampled would leave no log-probabilities.
    """
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": VOCABULARY,
             "logit_bias": [[VOCABULARY - 1, 1e6]], "post_sampling_probs": False}  # fmt: skip
    answer = server.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    out = np.full(VOCABULARY, np.nan)
    for found in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        out[found["id"]] = found["logprob"]
    return out


@pytest.fixture(scope="module")
def wanted(ours) -> list[tuple[list[int], np.ndarray]]:
    """(ids, our next-token log-probabilities) of each prompt."""
    rows = [text.ids(ours.tokenizer, prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    logits = ours([row + [0] * (width - len(row)) for row in rows], mask)
    last = logits[np.arange(len(rows)), [len(row) - 1 for row in rows]]
    return list(zip(rows, np.asarray(jax.nn.log_softmax(last, axis=-1)), strict=True))


def strings() -> list[str]:
    """200 strings: Unicode, code, spaces, digits, special tokens, and joins of them."""
    rng = random.Random(2)
    joined = ["".join(rng.choices(PIECES, k=rng.randint(2, 7))) for _ in range(200)]
    return [*PIECES, *joined][:200]


def test_loss_on_a_text_equals_transformers(ours, theirs, figure):
    ids = text.ids(ours.tokenizer, STORY)
    batch = jax.tree.map(jnp.asarray, collate([[Row(ids, [1] * len(ids))]], 1, 96))
    total = jax.jit(objective.loss(ours.family, ours.config, 1.0))({}, ours.params, batch)
    row = torch.tensor([ids])
    with torch.no_grad():
        want = theirs(input_ids=row, labels=row).loss.item()
    assert 2 < want < 5
    figure("SmolLM2's loss on a text against transformers, nats", abs(total.mean() - want), 1e-3)


def test_greedy_answers_equal_transformers(ours, theirs):
    ask = lambda q: [{"role": "user", "content": q}]
    rows = [text.ids(ours.tokenizer, ask(q), add_generation_prompt=True) for q in QUESTIONS]
    got = ours.answers(rows, stop_ids=[], max_new_tokens=32, sampling=Sampling(temperature=0.0))
    for ids, answer in zip(rows, got, strict=True):
        # Each token is the likeliest after those before it: then `generate` would give the same.
        with torch.no_grad():
            logits = theirs(torch.tensor([ids + answer.tokens])).logits[0, len(ids) - 1 : -1]
        assert answer.tokens == logits.argmax(-1).tolist()
        assert len(answer.tokens) == 32
    assert "Paris" in ours.tokenizer.decode(got[0].tokens)


def test_llama_cpps_log_probabilities_of_our_float32_file_equal_ours(server, wanted, figure):
    for n, (ids, want) in enumerate(wanted, start=1):
        got = next_logprobs(server, ids)
        assert not np.isnan(got).any()
        likely = want > LIKELY
        assert likely.sum() > 1000
        off = np.abs(got[likely] - want[likely]).max()
        figure(f"log-probabilities of SmolLM2's F32 GGUF in llama.cpp, prompt {n}, nats", off, 2e-3)


def test_llama_cpps_likeliest_token_of_our_q8_0_file_equals_ours(files, wanted):
    quantized = running(files / "model.Q8_0.gguf")
    for ids, want in wanted:
        assert next_logprobs(quantized, ids).argmax() == want.argmax()


def test_token_ids_of_our_file_in_llama_cpp_equal_our_tokenizers(ours, server):
    assert len(set(strings())) == 200
    for string in strings():
        want = text.ids(ours.tokenizer, string)
        assert llama_server.token_ids(server, string, add_special=True) == want, repr(string)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one", "system", "turns"])
def test_llama_cpp_renders_conversations_from_our_file_as_we_do(ours, server, conversation):
    want = text.render(ours.tokenizer, conversation, add_generation_prompt=True)
    assert llama_server.rendered(server, conversation) == want
    assert all(m["content"] in want for m in conversation)


def test_qlora_lowers_the_loss_and_its_exported_adapter_loads_equal(tmp_path):
    model = FastLanguageModel.get_peft_model(loaded(four=True), r=8, random_state=0)
    settings = SFTConfig(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=8,
        learning_rate=2e-3, warmup_steps=1, max_seq_length=64, assistant_only_loss=True, seed=0,
    )  # fmt: skip
    examples = demo_data.conversations(demo_data.split().train[:64])
    trainer = SFTTrainer(model=model, train_dataset=examples, args=settings)
    assert trainer.train().global_step == 8
    losses = [row["loss"] for row in trainer.log_history]
    assert np.mean(losses[-2:]) < 0.7 * np.mean(losses[:2])

    model.save_pretrained(tmp_path / "adapter")
    again, tokenizer = FastLanguageModel.from_pretrained(
        str(tmp_path / "adapter"), max_seq_length=256, dtype="float32"
    )
    assert jax.tree.structure(model.adapters) == jax.tree.structure(again.adapters)
    jax.tree.map(np.testing.assert_array_equal, model.adapters, again.adapters)
    assert text.state(tokenizer) == text.state(model.tokenizer)
    row = [text.ids(tokenizer, examples[0]["messages"])]
    np.testing.assert_array_equal(model(row), again(row))
    bare = dataclasses.replace(model, adapters=None, peft=None)
    assert np.abs(model(row) - bare(row)).max() > 1
