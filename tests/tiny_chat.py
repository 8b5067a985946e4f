"""A tiny chat model as a Hugging Face folder: bfloat16 weights, byte-level BPE, a chat template."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import torch
import transformers

from unsloth_jax import FastLanguageModel
from workflows.model import Model

TOKENIZER = Path(__file__).parent / "data" / "tiny_tokenizer"
VOCAB, LAYERS, EOS = 482, 2, 2
FIELDS = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
)  # fmt: skip
TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]
PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("for i in range(10):", "print(i, i * i)"),
    ("Write a short answer", "The quick brown fox"),
    ("one two three", "four five six seven"),
    ("What they're asking", "isn't it?"),
    ("def add(a, b):", "return a + b"),
    ("You are a helpful assistant.", "Straße"),
    ("eight nine ten", "hundred thousand million"),
]
MESSAGES = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in PAIRS
]
TEXTS = [{"text": f"{q} {a}"} for q, a in PAIRS]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def save(folder: Path, family: str = "Llama", **changes) -> Path:
    """The folder, written: a redrawn model of `family` with the tiny tokenizer beside it."""
    config = getattr(transformers, f"{family}Config")(**(FIELDS | changes))
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model = tiny.redraw(model(config).float())
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    return folder


def reference(folder: Path) -> torch.nn.Module:
    """transformers' model of a folder, computing in float32."""
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def load(folder: Path, **options) -> tuple[Model, transformers.PreTrainedTokenizerBase]:
    """(model, tokenizer) in float32 unless `options` say otherwise."""
    options = dict(max_seq_length=128, dtype="float32", load_in_4bit=False) | options
    return FastLanguageModel.from_pretrained(str(folder), **options)


def adapted(folder: Path, seed: int = 0, **options) -> Model:
    """A model whose adapters have left zero, as after training."""
    model, _ = load(folder, **options)
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, random_state=seed)
    rng = np.random.default_rng(seed)
    drawn = lambda x: jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.float32)
    model.adapters = jax.tree.map(drawn, model.adapters)
    return model
