"""Unsloth's names over the pure core; signatures and defaults are theirs."""

import difflib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from bridge import export, gguf_tokenizer, hf, hub, peft_adapter, safetensors_file
from bridge import tokenizer as text
from bridge.gguf_source import GGUFSource
from bridge.peft_adapter import Settings
from unsloth_jax import lora, quant
from workflows import adapting, vocabulary, widths
from workflows.face_keywords import (
    LOAD_IGNORED,
    LOAD_KINDS,
    LOAD_LATER,
    LOAD_NAMES,
    LOAD_USED,
    PEFT_IGNORED,
    PEFT_KINDS,
    PEFT_LATER,
    PEFT_RANGES,
    PEFT_USED,
)
from workflows.keywords import ranged, say, settle, shown, typed, written
from workflows.model import Model
from workflows.plan import CHECKPOINTING, check_budget, check_room

DTYPES = ("float32", "bfloat16", "float16")
DIFF_LINES = 12
DEVICES = re.compile(r"auto|sequential|balanced|balanced_low_0|cpu|\d+|(cuda|gpu)(:\d+)?")
DEFAULT = "unsloth/Llama-3.2-1B-Instruct"


def is_bfloat16_supported() -> bool:
    """Whether the device computes in bfloat16: GPUs from compute capability 8.0 on, and CPUs."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return capability is None or float(capability) >= 8.0


def compute_dtype(dtype: Any) -> jnp.dtype:
    """The dtype weights are computed in: None is float32 on a CPU, else bfloat16 where there is it.

    Raises ValueError for another dtype or name than float32, bfloat16 and float16.
    """
    if dtype is None:
        if jax.default_backend() == "cpu":
            return jnp.dtype("float32")
        return jnp.dtype("bfloat16" if is_bfloat16_supported() else "float16")
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; supported: None and {list(DTYPES)}")
    return jnp.dtype(name)


def require_device(device_map: Any) -> None:
    """Raises RuntimeError where a GPU is asked for, or stands unused, and JAX sees only CPUs.

    Raises ValueError for what names no place.
    """
    wanted = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    wrong = [d for d in wanted if d is not None and not _is_device(d)]
    if wrong:
        raise ValueError(
            f"device_map names {shown(wrong[0])}; expected None, 'auto', 'sequential', 'balanced', "
            "'cpu', 'cuda', 'cuda:0', a GPU's number, or modules with one of these"
        )
    if jax.default_backend() != "cpu" or str(device_map) == "cpu":
        return
    asked = any(isinstance(d, int) or str(d).startswith(("cuda", "gpu")) for d in wanted)
    unused = Path("/proc/driver/nvidia/version").exists() and "cpu" not in os.environ.get(
        "JAX_PLATFORMS", ""
    )
    if asked or unused:
        why = (
            f"device_map={device_map!r} asks for a GPU"
            if asked
            else "this machine has an NVIDIA GPU"
        )
        raise RuntimeError(
            f"{why}, but JAX sees only {jax.devices()}: install unsloth-jax[cuda], "
            "or pass device_map='cpu' to use the CPU"
        )


def _is_device(value: Any) -> bool:
    return not isinstance(value, bool) and bool(DEVICES.fullmatch(str(value)))


class FastLanguageModel:
    """Loading and adapting, by the names of Unsloth's notebooks."""

    @staticmethod
    @widths.one_width
    def from_pretrained(
        model_name: str | Path = DEFAULT,
        max_seq_length: int = 2048,
        dtype: Any = None,
        load_in_4bit: bool = True,
        *,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        resize_model_vocab: int | None = None,
        token: str | None = None,
        device_map: Any = "sequential",
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        use_exact_model_name: bool = False,
        **other: Any,
    ) -> tuple[Model, Any]:
        """(model, tokenizer) of a local folder, a GGUF file, an adapter folder or a hub name.

        Args:
            max_seq_length: longest prompt plus answer, and longest training row, in tokens.
            dtype: None (float32 on a CPU, bfloat16 on a GPU), a name, or a NumPy or JAX dtype.
            load_in_4bit: packs the layers' matrices as NF4; False (or load_in_16bit) keeps `dtype`.
            load_in_8bit: packs them as int8 rows, bitsandbytes' LLM.int8 of the weights alone.
            full_finetuning: all weights are trained, in float32 beside those computed with; the
                model needs no get_peft_model, and is loaded as with load_in_4bit=False.
            resize_model_vocab: rows that embedding and head get, before anything is trained.
            use_exact_model_name: a name of a 4-bit repo is never taken for its 16-bit parent.
            device_map: "cpu", or "cuda" to insist on a GPU; the others take what JAX finds.

        Raises ValueError for what the checkpoint or a keyword asks that is not supported, with
        what is; RuntimeError where no GPU is there and one was asked for.
        """
        find = dict(revision=revision, token=token, cache_dir=cache_dir)
        find["local_files_only"] = local_files_only
        bits = dict(load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
        bits |= dict(load_in_16bit=load_in_16bit, full_finetuning=full_finetuning)
        name = dict(model_name=model_name, use_exact_model_name=use_exact_model_name)
        sizes = dict(max_seq_length=max_seq_length, resize_model_vocab=resize_model_vocab)
        _check_load(find | bits | name | sizes, other)
        require_device(device_map)
        how = dict(fmt=widths.packed(**bits), exact=use_exact_model_name, find=find)
        name, path = widths.located(model_name, **how)
        load = dict(max_seq_length=max_seq_length, dtype=compute_dtype(dtype), fmt=how["fmt"])
        if hub.kind(path) == "adapter":
            if full_finetuning or resize_model_vocab is not None:
                raise ValueError(
                    f"full_finetuning and resize_model_vocab need a whole model, but {path} holds "
                    "adapters: load their base, or merge them into it first"
                )
            model = _load_adapter(path, how | {"find": find | {"revision": None}}, load)
            return model, model.tokenizer
        model = _load(name, path, **load)
        if resize_model_vocab is not None:
            vocabulary.resize(model, resize_model_vocab)
        if full_finetuning:
            adapting.begin_whole(model)
            model.memory = CHECKPOINTING["unsloth"]
        return model, model.tokenizer

    @staticmethod
    def get_peft_model(
        model: Model,
        r: int = 16,
        target_modules: Sequence[str] | str = lora.TARGETS,
        lora_alpha: float | int = 16,
        lora_dropout: float | int = 0.0,
        *,
        layers_to_transform: Sequence[int] | int | None = None,
        finetune_last_n_layers: int | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = MappingProxyType({}),
        use_dora: bool = False,
        target_parameters: Sequence[str] | None = None,
        memory_budget: int | float | str | None = None,
        **other: Any,
    ) -> Model:
        """The same model with fresh adapters; one that has the same settings is returned as it is.

        Args:
            target_modules: last names of modules, a regular expression over whole paths, or
                "all-linear"; embed_tokens and lm_head in a list are trained whole.
            target_parameters: experts' matrices, such as "mlp.experts.gate_up_proj".
            lora_dropout: share of an adapter's input that each training step drops.
            modules_to_save: modules that are trained whole, in float32.
            init_lora_weights: True, "gaussian", or "pissa", "pissa_niter_4", "loftq", which change
                the base and need load_in_4bit=False.
            layers_to_transform: layer numbers that get adapters; the others get none.
            use_gradient_checkpointing: True computes layers again in the backward pass, "unsloth"
                is the leanest plan, "auto" the fastest that fits; on a CPU both mean True.
            memory_budget: what training may take: bytes, a share or "24GB"; else what is free.

        Raises TypeError where the model has adapters of other settings, ValueError for values
        that mean nothing or are not supported.
        """
        settle("get_peft_model", other, PEFT_USED, PEFT_IGNORED, PEFT_LATER)
        _checkpointing("get_peft_model", model, use_gradient_checkpointing)
        check_budget(memory_budget)
        given = dict(
            lora_alpha=lora_alpha, use_rslora=use_rslora, random_state=random_state,
            init_lora_weights=init_lora_weights, use_dora=use_dora, lora_dropout=lora_dropout,
        )  # fmt: skip
        typed("get_peft_model", given, PEFT_KINDS)
        ranged("get_peft_model", given, PEFT_RANGES)
        iterations = adapting.loftq(loftq_config)
        if model.adapters is not None and model.peft is None:
            say("all weights of the model are trained: get_peft_model changes nothing")
            return model
        peft = adapting.settings(
            model, r, adapting.with_experts(model, target_modules, target_parameters), lora_alpha,
            layers_to_transform, finetune_last_n_layers, modules_to_save, rslora=use_rslora,
            start=init_lora_weights, dropout=lora_dropout, dora=use_dora,
        )  # fmt: skip
        _adapt(model, peft, random_state, iterations)
        model.memory = CHECKPOINTING[use_gradient_checkpointing]
        model.memory_budget = memory_budget
        return model

    @staticmethod
    def for_inference(model: Model) -> Model:
        """The model as it is: there is no mode to switch."""
        typed("for_inference", {"model": model}, {"model": Model})
        return model

    @staticmethod
    def for_training(model: Model, use_gradient_checkpointing: bool | str = True) -> Model:
        """The same model, its next training with this gradient checkpointing.

        True leaves a plan that has any as it is.
        """
        _checkpointing("for_training", model, use_gradient_checkpointing)
        if use_gradient_checkpointing is not True or model.memory == CHECKPOINTING[False]:
            model.memory = CHECKPOINTING[use_gradient_checkpointing]
        return model


def _check_load(given: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    settle("from_pretrained", other, LOAD_USED, LOAD_IGNORED, LOAD_LATER)
    typed("from_pretrained", given, LOAD_KINDS)
    written("from_pretrained", given, LOAD_NAMES)
    ranged("from_pretrained", given, {"max_seq_length": (1, None)})


def _adapt(model: Model, peft: Settings, seed: int, iterations: int) -> None:
    """Adapters, unless there are some; raises TypeError where these have other settings."""
    if model.adapters is None:
        adapting.begin(model, peft, seed, iterations)
        return
    if not adapting.same(model.peft, peft):
        raise TypeError(f"the model already has adapters with {model.peft}, asked for {peft}")
    say("the model already has adapters with these settings; they are kept")


def _checkpointing(where: str, model: Any, asked: Any) -> None:
    """Raises TypeError where `model` is none, ValueError for what is no gradient checkpointing."""
    typed(where, {"model": model}, {"model": Model})
    if not isinstance(asked, bool | str) or asked not in CHECKPOINTING:
        raise ValueError(
            f"{where}: use_gradient_checkpointing must be one of {list(CHECKPOINTING)}, got "
            f"{shown(asked)}"
        )


def _compare_templates(model: Model, own: Any) -> None:
    """Says where an adapter was trained with another chat template than its base's.

    `own` is the tokenizer in the adapter's folder, None where it has none.
    """
    base = model.tokenizer.chat_template
    mine = None if own is None else own.chat_template
    hashed = lambda template: export.text_hash(template if isinstance(template, str) else None)
    trained = model.peft.metadata.get("chat_template_sha256") or hashed(mine)
    if trained is None or trained == hashed(base):
        return
    said = f"the adapter was trained with another chat template than that of {model.name}"
    if not isinstance(mine, str):
        say(f"{said}, which is used: sha256 {trained}, the base's is {hashed(base)}")
        return
    lines = [(base if isinstance(base, str) else "").splitlines(), mine.splitlines()]
    changes = list(difflib.unified_diff(*lines, "base", "adapter", lineterm="", n=0))
    shown = [line[:200] for line in changes[:DIFF_LINES]]
    left = [f"({len(changes) - len(shown)} more lines)"] * (len(changes) > len(shown))
    say("\n".join([f"{said}; the adapter's is used:", *shown, *left]))


def _load_adapter(path: Path, how: dict[str, Any], load: dict[str, Any]) -> Model:
    """An adapter folder with the base that it names; `how` is what `widths.located` takes."""
    config = path / peft_adapter.CONFIG
    fields = safetensors_file.read_json(config)
    base = fields.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{config} names no base_model_name_or_path to load")
    model = _load(*widths.located(base, recorded=fields.get("revision"), **how), **load)
    adapting.load(model, path)
    own = text.load(path) if any((path / name).exists() for name in text.FILES) else None
    _compare_templates(model, own)
    if own is not None:
        model.tokenizer, model.tokenizer_folder = own, path
    return model


def _load(name: str, path: Path, *, max_seq_length: int, dtype: Any, fmt: str | None) -> Model:
    """A model folder or a GGUF file as a Model without adapters."""
    if hub.kind(path) == "gguf":
        source = GGUFSource(path)
        folder = Path(tempfile.mkdtemp(prefix="unsloth_jax-tokenizer-"))
        # Exports copy its files, so they stay as long as the model that they are of.
        weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
        gguf_tokenizer.save_folder(path, folder)
    else:
        source, folder = safetensors_file.SafetensorsSource(path), path
    hf.described(source)  # its complaints before the tokenizer's
    tokenizer = text.load(folder)
    check_room(name, source.config, dtype, hf.kept(source.config, fmt))
    widths.tell(name, source.config, fmt)
    family, c, params = hf.load(source, dtype, fmt)
    longest = source.config.get("max_position_embeddings", max_seq_length)
    if max_seq_length > longest:
        say(
            f"max_seq_length={max_seq_length} passes the {longest} positions the model was trained "
            "on; rope is not rescaled"
        )
    stored = quant.stored(params)
    return Model(name, source, family, c, params, folder, tokenizer, max_seq_length, dtype, stored)
