"""The one mutable object: a model that a trainer changes, a sampler reads and exports write."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge import merge, safetensors_file
from bridge import tokenizer as text
from bridge.peft_adapter import Settings
from bridge.source import Source
from unsloth_jax import decoder, lora, quant, tree
from unsloth_jax.dims import Params
from unsloth_jax.remat import PLAIN, Memory
from workflows import fast_generate as fast
from workflows import generate, saving, vocabulary
from workflows.fast_generate import LoRARequest, RequestOutput
from workflows.generate import Answer
from workflows.inputs import (
    GENERATE_IGNORED,
    GENERATE_LATER,
    GENERATE_USED,
    check_objects,
    check_settings,
    masked,
    padded_last,
    room,
    sampling,
    stop_texts,
    stops,
)
from workflows.keywords import settle, typed

SHARDS = {"max_shard_size": "adapters are one file"}


@dataclass
class Model:
    """A loaded checkpoint, its frozen parameters and, once it has them, its adapters."""

    name: str
    source: Source
    family: ModuleType
    config: Any
    params: Params
    tokenizer_folder: Path
    tokenizer: Any
    max_seq_length: int
    dtype: Any
    stored: str | None  # the format of quantized layers, of quant.FORMATS
    adapters: Params | None = None
    peft: Settings | None = None
    initial: Params | None = None  # the pairs that a start took out of `params`
    memory: Memory | str = PLAIN  # or "auto", "unsloth": settled when the batch is known
    memory_budget: int | float | str | None = None  # what training may take of the device

    @property
    def quantized(self) -> bool:
        return self.stored is not None

    @property
    def scale(self) -> float:
        p = self.peft
        return lora.scaling(p.alpha, p.rank, p.rslora) if p else 1.0

    def adapted(self) -> Params:
        """The parameters with their adapters attached, nothing summed."""
        return lora.attach(self.params, self.adapters, self.scale) if self.adapters else self.params

    @contextmanager
    def multiplied_in(self, matmul_dtype: str | None) -> Iterator[None]:
        """Inside, `params` multiply in that dtype (see `quant.matmul_in`); None changes nothing."""
        if matmul_dtype is None:
            yield
            return
        self.params = quant.matmul_in(self.params, matmul_dtype)
        try:
            yield
        finally:
            self.params = quant.matmul_in(self.params, "bf16")

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
        """float32 logits [B, T, V]; where the mask is 0 they mean nothing."""
        tokens, mask = masked(input_ids, attention_mask)
        if tokens.min() < 0 or tokens.max() >= self.config.vocab:
            raise ValueError(
                f"input_ids lie in {tokens.min()} to {tokens.max()}, outside the vocabulary of "
                f"{self.config.vocab}"
            )
        # Positions, windows and chunks count from a row's first token, as `generate` does.
        tokens, mask, at = padded_last(tokens, mask)
        run = logits_program(self.family, self.config, self.scale)
        found = np.asarray(run(self.params, self.adapters, tokens, mask))
        return found if at is None else np.take_along_axis(found, at[..., None], axis=1)

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        inputs: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | int | None = None,
        top_k: int | None = None,
        top_p: float | int | None = None,
        min_p: float | int | None = None,
        repetition_penalty: float | int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        seed: int = 3407,
        weights: str = "auto",
        **other: Any,
    ) -> np.ndarray:
        """Prompt and completion, int32 [B, T + new], rows padded on the right after their end.

        Args:
            input_ids: [B, T] or [T], lists, NumPy or torch; padding on either side where
                `attention_mask` is 0.
            max_new_tokens, max_length: tokens to add, or in all; without them those of
                generation_config.json, and else what the model's max_seq_length leaves.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in transformers,
                which takes generation_config.json's values for those not given.
            stop_strings: texts that end an answer.
            streamer: an object with `put` and `end`, such as transformers' TextStreamer.
            seed: of the draws; the same seed gives the same answer.
            weights: "materialized" (plain arrays for this call), "stored", or the first if it fits.
        """
        settle("generate", other, GENERATE_USED, GENERATE_IGNORED, GENERATE_LATER)
        ids = _one_of(input_ids, inputs)
        lengths = {"max_new_tokens": max_new_tokens, "max_length": max_length}
        check_settings("generate", lengths | {"seed": seed})
        check_objects(streamer, tokenizer)
        config = self.generation_config() | other
        tokens, mask = masked(ids, attention_mask)
        prompts = [row[on != 0].tolist() for row, on in zip(tokens, mask, strict=True)]
        longest, draws = max(map(len, prompts)), (temperature, top_k, top_p, min_p)
        most = room(config, longest, self.max_seq_length, max_new_tokens, max_length)
        found = self.answers(
            prompts,
            max_new_tokens=most,
            sampling=sampling(config, do_sample, *draws, repetition_penalty),
            stop_ids=self.stop_ids() if eos_token_id is None else stops(eos_token_id),
            stop_strings=stop_texts(stop_strings),
            tokenizer=tokenizer,
            streamer=_started(streamer, tokens),
            seed=seed,
            weights=weights,
        )
        if streamer is not None:
            streamer.end()
        return np.concatenate([tokens, _in_rows(found, self.pad_id())], axis=1)

    def answers(
        self, prompts, *, stop_ids=None, tokenizer=None, streamer=None, **settings
    ) -> list[Answer]:
        """Completions of lists of token ids, with log-probabilities; see workflows.generate."""
        decode = (tokenizer or self.tokenizer).decode
        put = lambda piece: [
            streamer.put(piece[:, i]) for i in range(piece.shape[1]) if (piece[:, i] >= 0).all()
        ]
        return generate.answers(
            self.family,
            self.config,
            self.adapted(),
            prompts,
            stop_ids=self.stop_ids() if stop_ids is None else stop_ids,
            decode=decode,
            watch=put if streamer is not None else lambda piece: None,
            watched=streamer is not None,
            **settings,
        )

    def fast_generate(
        self, prompts: Any, sampling_params: Any = None, lora_request: Any = fast.LIVE, **other: Any
    ) -> list[RequestOutput]:
        """Completions in slots that are refilled, with vLLM's names: `.outputs[0].text`.

        Args:
            prompts: texts, lists of token ids or {"prompt_token_ids": ids}, or one of them.
            sampling_params: SamplingParams, one for all or one a prompt.
            lora_request: what `load_lora` gave; None for the base alone. By default the model's
                adapters as they are.
            slots: completions that are sampled at once.
            seed: of the draws of prompts whose SamplingParams have none.
            weights: as in `generate`.
        """
        return fast.fast_generate(self, prompts, sampling_params, lora_request, **other)

    def load_lora(self, folder: str | Path) -> LoRARequest:
        """A PEFT folder's adapters for one call of `fast_generate`; the model stays as it is."""
        return fast.load_lora(self, folder)

    def stop_ids(self) -> list[int]:
        """Every token id that ends an answer."""
        return text.stop_ids(self.tokenizer, self.generation_config())

    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.stop_ids()[0] if self.stop_ids() else 0

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json of the checkpoint, or the ids that config.json names."""
        folder = getattr(self.source, "folder", None)
        if folder is not None and (folder / "generation_config.json").exists():
            return safetensors_file.read_json(folder / "generation_config.json")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {k: self.source.config[k] for k in ids if self.source.config.get(k) is not None}

    def save_pretrained(
        self, save_directory: str | Path, *, overwrite: bool = False, **other: Any
    ) -> dict[str, Any]:
        """Writes the adapters as a PEFT folder and returns its manifest.

        A model whose weights are all trained is written as `save_pretrained_merged` writes it.
        Raises ValueError without adapters, FileExistsError for a folder that holds something.
        """
        used = ("save_directory", "overwrite")
        ignored = saving.SAVE_IGNORED | SHARDS
        settle("save_pretrained", other, used, ignored, saving.SAVE_LATER)
        saving.check("save_pretrained", save_directory, None, overwrite)
        if self.adapters and self.peft is None:
            return saving.merged(self, save_directory, None, "5GB", merge.ORIGINAL, overwrite)
        return saving.adapter(self, save_directory, None, overwrite)

    save_lora = save_pretrained

    def resize_token_embeddings(
        self,
        new_num_tokens: int,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> None:
        """Gives embedding and head this many rows; new ones lie at the mean of the others.

        Without `mean_resizing` they are drawn from N(0, 0.02^2). Raises ValueError with adapters.
        """
        count = -(-new_num_tokens // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        vocabulary.resize(self, count, "mean" if mean_resizing else "normal")

    @property
    def device(self) -> str:
        """Where the weights are, as torch names it: "cuda" or "cpu"."""
        return "cuda" if jax.default_backend() == "gpu" else "cpu"

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters train, in PEFT's words; packed ones count in full."""
        own = lora.parts(self.adapters or {})[1]
        trained = sum(x.size for x in jax.tree.leaves(self.adapters or {}))
        frozen = (x for path, x in tree.flatten(self.params).items() if path not in own)
        whole = trained + sum(math.prod(x.shape) for x in frozen)
        share = 100 * trained / whole
        print(f"trainable params: {trained:,} || all params: {whole:,} || trainable%: {share:.4f}")

    def save_pretrained_merged(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        *,
        max_shard_size: str | int = "5GB",
        base: str = merge.ORIGINAL,
        overwrite: bool = False,
        **other: Any,
    ) -> dict[str, Any]:
        """Writes the merged model as a Hugging Face folder and returns its manifest.

        Args:
            save_method: "merged_16bit", or "lora" for the adapters alone.
            base: what the delta is added to: "original16", the checkpoint's own weights where they
                are at hand, unlike those that a model in 4 or 8 bits was trained on, or "dequant4"
                ("dequant8"), the weights that were trained on, in 4 (8) bits. All other weights
                are written from there too.
        """
        used = ("save_directory", "tokenizer", "save_method", "max_shard_size", "base")
        settle("save_pretrained_merged", other, used, saving.SAVE_IGNORED, saving.SAVE_LATER)
        saving.check("save_pretrained_merged", save_directory, tokenizer, overwrite)
        if save_method not in saving.MERGE_METHODS:
            known = list(saving.MERGE_METHODS)
            raise ValueError(f"save_method={save_method!r} is not supported; supported: {known}")
        if save_method == "lora":
            return saving.adapter(self, save_directory, tokenizer, overwrite)
        return saving.merged(self, save_directory, tokenizer, max_shard_size, base, overwrite)

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        *,
        base: str = merge.ORIGINAL,
        overwrite: bool = False,
        run_in_llama_cpp: bool = True,
        **other: Any,
    ) -> dict[str, Any]:
        """Writes the merged model as one GGUF file a method and returns the manifest.

        Args:
            quantization_method: names such as "f16", "bf16", "q8_0", "q4_k_m", or several.
            base: see save_pretrained_merged.
            run_in_llama_cpp: whether llama.cpp, where the package xllamacpp is installed, runs the
                files on the CPU and its greedy tokens are compared with the merged model's.
        """
        used = ("save_directory", "tokenizer", "quantization_method", "base", "run_in_llama_cpp")
        settle("save_pretrained_gguf", other, used, saving.GGUF_IGNORED, saving.GGUF_LATER)
        saving.check("save_pretrained_gguf", save_directory, tokenizer, overwrite)
        run = {"run_in_llama_cpp": run_in_llama_cpp}
        typed("save_pretrained_gguf", run, {"run_in_llama_cpp": bool})
        how = (saving.formats(quantization_method), base, overwrite, run_in_llama_cpp)
        return saving.gguf(self, save_directory, tokenizer, *how)

    def push_to_hub(self, *given: Any, **other: Any) -> None:
        """Raises ValueError: nothing is uploaded yet."""
        raise ValueError(
            "uploads to the hub are not supported yet: save with save_pretrained, "
            "save_pretrained_merged or save_pretrained_gguf and upload the folder"
        )

    push_to_hub_merged = push_to_hub
    push_to_hub_gguf = push_to_hub


@cache
def logits_program(family: ModuleType, c: Any, scale: float):
    """Jitted: (params, adapters, tokens, mask) -> float32 logits."""

    def run(params, adapters, tokens, mask):
        if adapters is not None:
            params = lora.attach(params, adapters, scale)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden = decoder.forward(family, c, params, tokens, positions, mask)
        return decoder.logits(family, c, params, hidden)

    return jax.jit(run)


def _one_of(input_ids: Any, inputs: Any) -> Any:
    if (inputs is None) == (input_ids is None):
        raise ValueError("give input_ids, or inputs in their place")
    return inputs if input_ids is None else input_ids


def _in_rows(answers: Sequence[Answer], pad: int) -> np.ndarray:
    """Answers' tokens [B, longest], the rest of each row `pad`."""
    out = np.full((len(answers), max(len(a.tokens) for a in answers)), pad, np.int32)
    for row, answer in zip(out, answers, strict=True):
        row[: len(answer.tokens)] = answer.tokens
    return out


def _started(streamer: Any, tokens: np.ndarray) -> Any:
    if streamer is not None:
        streamer.put(tokens)
    return streamer
