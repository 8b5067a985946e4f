"""The one mutable object: a model that a trainer changes, a sampler reads and exports write."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge import export, gguf_file, merge, peft_adapter, safetensors_file
from bridge import tokenizer as text
from bridge.peft_adapter import Settings
from bridge.source import Source
from unsloth_jax import decoder, lora
from unsloth_jax.dims import Params
from workflows import generate
from workflows.generate import Answer
from workflows.inputs import GENERATE_IGNORED, GENERATE_LATER, masked, sampling
from workflows.keywords import say, settle

SAVE_LATER = {
    "push_to_hub": (False, None),
    "token": (None, False),
    "private": (None, False),
    "tags": (None,),
    "state_dict": (None,),
    "variant": (None,),
    "first_conversion": (None,),
    "imatrix_file": (None, False),
    "calibration_dataset": (None,),
    "datasets": (None,),
    "save_method": (None,),
}
SAVE_IGNORED = {
    "is_main_process": "one process writes",
    "save_function": "safetensors are always written",
    "safe_serialization": "safetensors are always written",
    "save_peft_format": "adapters are always in PEFT's format",
    "temporary_location": "the temporary folder lies beside the target",
    "maximum_memory_usage": "weights are written one at a time",
    "num_calibration_samples": "nothing is calibrated",
    "max_seq_length": "nothing is calibrated",
    "merge_is_disposable": "no merged folder is made on the way to GGUF",
}
MERGE_METHODS = ("merged_16bit", "lora")
GGUF_ALIASES = {
    "not_quantized": "bf16",
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


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
    quantized: bool
    adapters: Params | None = None
    peft: Settings | None = None
    remat: bool = True

    @property
    def scale(self) -> float:
        p = self.peft
        return lora.scaling(p.alpha, p.rank, p.rslora) if p else 1.0

    def adapted(self) -> Params:
        """The parameters with their adapters attached, nothing summed."""
        return lora.attach(self.params, self.adapters, self.scale) if self.adapters else self.params

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> np.ndarray:
        """float32 logits [B, T, V]; where the mask is 0 they mean nothing."""
        tokens, mask = masked(input_ids, attention_mask)
        if tokens.min() < 0 or tokens.max() >= self.config.vocab:
            raise ValueError(
                f"input_ids lie in {tokens.min()} to {tokens.max()}, outside the vocabulary of {self.config.vocab}"
            )
        run = logits_program(self.family, self.config)
        return np.asarray(run(self.params, self.adapters, self.scale, tokens, mask))

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *,
        inputs: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Any = None,
        seed: int = 3407,
        **other: Any,
    ) -> np.ndarray:
        """Prompt and completion, int32 [B, T + new], rows padded on the right after their end.

        Args:
            input_ids: [B, T] or [T], lists, NumPy or torch; padding on either side where
                `attention_mask` is 0.
            max_new_tokens: tokens to add; None goes on to the model's max_seq_length.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in transformers,
                which takes generation_config.json's values for those not given.
            stop_strings: texts that end an answer.
            streamer: an object with `put` and `end`, such as transformers' TextStreamer.
            seed: of the draws; the same seed gives the same answer.
        """
        settle("generate", other, used=("input_ids", "max_new_tokens", "temperature", "top_p"),
               ignored=GENERATE_IGNORED, later=GENERATE_LATER)  # fmt: skip
        tokens, mask = masked(inputs if input_ids is None else input_ids, attention_mask)
        prompts = [row[on != 0].tolist() for row, on in zip(tokens, mask, strict=True)]
        longest = max(map(len, prompts))
        if max_new_tokens is None:
            max_new_tokens = (max_length or self.max_seq_length) - longest
        if longest + max_new_tokens > self.max_seq_length:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones pass max_seq_length={self.max_seq_length}"
            )
        given = dict(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        found = self.answers(
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling(self.generation_config(), do_sample, given),
            stop_ids=self.stop_ids()
            if eos_token_id is None
            else np.atleast_1d(eos_token_id).tolist(),
            stop_strings=[stop_strings] if isinstance(stop_strings, str) else stop_strings or (),
            tokenizer=tokenizer,
            streamer=_started(streamer, tokens),
            seed=seed,
        )
        if streamer is not None:
            streamer.end()
        width = max(len(a.tokens) for a in found)
        out = np.full((len(found), width), self.pad_id(), np.int32)
        for row, answer in zip(out, found, strict=True):
            row[: len(answer.tokens)] = answer.tokens
        return np.concatenate([tokens, out], axis=1)

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
    ) -> dict:
        """The adapters as a PEFT folder; returns its manifest. Raises ValueError without adapters."""
        settle(
            "save_pretrained",
            other,
            used=("save_directory", "overwrite"),
            ignored=SAVE_IGNORED,
            later=SAVE_LATER,
        )
        if self.adapters is None:
            raise ValueError(
                "the model has no adapters yet; call FastLanguageModel.get_peft_model first"
            )
        with export.complete(Path(save_directory), overwrite) as folder:
            peft_adapter.save(folder, self.adapters, self._settings())
            self._copy_tokenizer(folder, None)
            return export.write_manifest(folder, {"kind": "adapter", **self._facts(None)})

    save_lora = save_pretrained

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
    ) -> dict:
        """The merged model as a Hugging Face folder, or the adapters ("lora"); returns the manifest.

        Args:
            save_method: "merged_16bit" or "lora".
            base: what the delta is added to: "original16", the checkpoint's own weights where they
                are at hand, or "dequant4", the 4-bit weights that were trained on.
        """
        settle("save_pretrained_merged", other, used=("save_directory", "tokenizer", "save_method", "max_shard_size"),
               ignored=SAVE_IGNORED, later=SAVE_LATER)  # fmt: skip
        if save_method not in MERGE_METHODS:
            raise ValueError(
                f"save_method={save_method!r} is not supported; supported: {list(MERGE_METHODS)}"
            )
        if save_method == "lora":
            return self.save_pretrained(save_directory, overwrite=overwrite)
        found = self._merged(None, base)
        with export.complete(Path(save_directory), overwrite) as folder:
            safetensors_file.check_space(folder, sum(w.nbytes for w in found.weights))
            safetensors_file.save(folder, found.weights, max_shard_size)
            self._write_config(folder, found)
            self._copy_tokenizer(folder, tokenizer)
            facts = {
                "kind": "merged_16bit",
                **found.facts,
                **self._distances(found),
                **self._facts(tokenizer),
            }
            return export.write_manifest(folder, facts)

    def save_pretrained_gguf(
        self,
        save_directory: str | Path,
        tokenizer: Any = None,
        quantization_method: str | Sequence[str] = "fast_quantized",
        *,
        base: str = merge.ORIGINAL,
        overwrite: bool = False,
        **other: Any,
    ) -> dict:
        """The merged model as one GGUF file a method; returns the manifest.

        Args:
            quantization_method: names such as "f16", "bf16", "q8_0", "q4_k_m", or several.
        """
        settle("save_pretrained_gguf", other, used=("save_directory", "tokenizer", "quantization_method"),
               ignored=SAVE_IGNORED, later=SAVE_LATER)  # fmt: skip
        methods = (
            [quantization_method]
            if isinstance(quantization_method, str)
            else list(quantization_method)
        )
        formats = [GGUF_ALIASES.get(m.lower(), m.lower()) for m in methods]
        found = self._merged("float32", base)
        reports = {}
        with export.complete(Path(save_directory), overwrite) as folder:
            self._copy_tokenizer(folder / "tokenizer", tokenizer)
            for fmt in formats:
                path = folder / f"model.{fmt.upper()}.gguf"
                report = gguf_file.save(
                    path,
                    self.hf_config("float32"),
                    found.weights,
                    folder / "tokenizer",
                    fmt,
                    name=self.name,
                )
                reports[path.name] = _gguf_facts(report)
            shutil.rmtree(folder / "tokenizer")
            facts = {
                "kind": "gguf",
                **found.facts,
                "quantization": reports,
                **self._facts(tokenizer),
            }
            return export.write_manifest(folder, facts)

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """config.json of the merged model: the checkpoint's, unquantized, in another dtype."""
        config = {k: v for k, v in self.source.config.items() if k != "quantization_config"}
        return config | {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}

    def _merged(self, dtype: str | None, base: str) -> merge.Merged:
        return merge.merged(
            self.family,
            self.config,
            self.params,
            self.adapters,
            self.scale,
            self.source,
            dtype,
            base,
        )

    def _distances(self, found: merge.Merged) -> dict[str, Any]:
        if not (self.quantized and self.adapters and found.base == merge.ORIGINAL):
            return {}
        ratios = merge.distances(
            self.family, self.config, self.params, self.adapters, self.scale, self.source
        )
        values = np.asarray(list(ratios.values()))
        say(
            f"the delta is added to the original weights; 4-bit error over delta: median {np.median(values):.1f}, "
            f"largest {values.max():.1f} (base='dequant4' merges into the weights that were trained on)"
        )
        return {
            "base_error_over_delta": {
                "median": float(np.median(values)),
                "largest": float(values.max()),
            }
        }

    def _write_config(self, folder: Path, found: merge.Merged) -> None:
        dtypes = {w.dtype.name for w in found.weights if w.name in found.adapted} or {
            w.dtype.name for w in found.weights
        }
        config = self.hf_config(sorted(dtypes)[0])
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        settings = self.generation_config()
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def _copy_tokenizer(self, folder: Path, tokenizer: Any) -> None:
        """The checkpoint's own files, byte for byte, unless another tokenizer is given."""
        folder.mkdir(parents=True, exist_ok=True)
        given = tokenizer if tokenizer is not None else self.tokenizer
        if text.state(given) != text.state(text.load(self.tokenizer_folder)):
            given.save_pretrained(folder)
            return
        for name in TOKENIZER_FILES:
            if (self.tokenizer_folder / name).exists():
                shutil.copyfile(self.tokenizer_folder / name, folder / name)

    def _settings(self) -> Settings:
        template = export.text_hash(self.tokenizer.chat_template)
        metadata = {"chat_template_sha256": template} if template else {}
        return self.peft._replace(base=self.name, metadata=metadata)

    def _facts(self, tokenizer: Any) -> dict[str, Any]:
        template = (tokenizer if tokenizer is not None else self.tokenizer).chat_template
        return {"base_model": self.name, "chat_template_sha256": export.text_hash(template)}


@cache
def logits_program(family: ModuleType, c: Any):
    """Jitted: (params, adapters, scale, tokens, mask) -> float32 logits."""

    def run(params, adapters, scale, tokens, mask):
        if adapters is not None:
            params = lora.attach(params, adapters, scale)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden = decoder.forward(family, c, params, tokens, positions, mask)
        return decoder.logits(family, c, params, hidden)

    return jax.jit(run)


def _started(streamer: Any, tokens: np.ndarray) -> Any:
    if streamer is not None:
        streamer.put(tokens)
    return streamer


def _gguf_facts(report: gguf_file.Report) -> dict[str, Any]:
    return {
        "bits_per_weight": round(report.bits_per_weight, 3),
        "substituted": round(report.substituted, 4),
        "notes": report.notes,
    }
