"""A model written to disk: adapters, a merged Hugging Face folder, GGUF files."""

import copy
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bridge import export, gguf_file, merge, peft_adapter, safetensors_file
from bridge import tokenizer as text
from bridge.gguf_blocks import FORMATS
from bridge.gguf_source import GGUFSource
from bridge.source import Source
from workflows import agreement, divergence, vocabulary
from workflows.divergence import Trained
from workflows.keywords import shown, tell, typed, written

if TYPE_CHECKING:
    from workflows.model import Model

SAVE_LATER = {
    "push_to_hub": (False, None),
    "token": (None, False),
    "private": (None, False),
    "tags": (None,),
    "state_dict": (None,),
    "variant": (None,),
    "calibration_dataset": (None,),
    "datasets": (None,),
    "selected_adapters": (None,),
    "save_embedding_layers": ("auto", False, None),
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
}
GGUF_ONLY = {"first_conversion": (None,), "imatrix_file": (None, False), "save_method": (None,)}
GGUF_LATER = SAVE_LATER | GGUF_ONLY
GGUF_IGNORED = SAVE_IGNORED | {
    "max_shard_size": "each format is one file",
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


def check(where: str, target: Any, tokenizer: Any, overwrite: Any) -> None:
    """Raises TypeError or ValueError for a target, tokenizer or `overwrite` that is none."""
    kinds = {"save_directory": str, "tokenizer": PreTrainedTokenizerBase | None, "overwrite": bool}
    given = {"save_directory": target, "tokenizer": tokenizer, "overwrite": overwrite}
    typed(where, given, kinds)
    written(where, given, ["save_directory"])


def adapter(model: "Model", target: str | Path, tokenizer: Any, overwrite: bool) -> dict[str, Any]:
    """The adapters as a PEFT folder; returns its manifest. Raises ValueError without adapters."""
    if not model.adapters:
        raise ValueError("the model has no adapters: call FastLanguageModel.get_peft_model first")
    if model.peft is None:
        raise ValueError("all weights of the model are trained: there are no adapters to write")
    template = export.text_hash(_given(model, tokenizer).chat_template)
    config = export.text_hash(json.dumps(model.source.config, sort_keys=True))
    metadata = {"config_sha256": config} | ({"chat_template_sha256": template} if template else {})
    settings = model.peft._replace(base=model.name, metadata=metadata)
    if note := peft_adapter.NOTES.get(model.peft.start):
        tell(note)
    with export.complete(Path(target), overwrite) as folder:
        peft_adapter.save(folder, model.adapters, settings, model.initial)
        copy_tokenizer(model, folder, tokenizer)
        return export.write_manifest(folder, {"kind": "adapter", **_facts(model, tokenizer)})


def merged(
    model: "Model",
    target: str | Path,
    tokenizer: Any,
    max_shard_size: str | int,
    base: str,
    overwrite: bool,
) -> dict[str, Any]:
    """The merged model as a Hugging Face folder; returns its manifest.

    Raises ValueError where KL(trained || merged), measured on the finished files, is not finite.
    """
    found = _merged(model, None, base)
    with export.complete(Path(target), overwrite) as folder:
        safetensors_file.check_space(folder, sum(w.nbytes for w in found.weights))
        reference = _trained(model)
        safetensors_file.save(folder, found.weights, max_shard_size)
        changes = _write_config(model, folder, found)
        copy_tokenizer(model, folder, tokenizer)
        facts = {
            "kind": "merged_16bit",
            **found.facts,
            **changes,
            **_rounding(found),
            **_distances(model, found),
            **_divergence("the merged weights", model, reference, folder, found.base),
            **_facts(model, tokenizer),
        }
        return export.write_manifest(folder, facts)


def gguf(
    model: "Model",
    target: str | Path,
    tokenizer: Any,
    formats: Sequence[str],
    base: str,
    overwrite: bool,
    run_in_llama_cpp: bool = True,
) -> dict[str, Any]:
    """The merged model as one GGUF file a format, each verified; returns the manifest.

    Raises ValueError as `gguf_file.save` and `agreement.run`, and where a file's KL to the trained
    model isn't finite.
    """
    found = _merged(model, "float32", base)
    config, reports = hf_config(model, "float32"), {}
    with export.complete(Path(target), overwrite) as folder:
        tokens = folder / "tokenizer"
        copy_tokenizer(model, tokens, tokenizer)
        needed = [gguf_file.room(config, found.weights, tokens, fmt) for fmt in formats]
        safetensors_file.check_space(folder, sum(needed))
        reference = _trained(model)
        for fmt in formats:
            path = folder / f"model.{fmt.upper()}.gguf"
            report = gguf_file.save(path, config, found.weights, tokens, fmt, name=model.name)
            kl = _divergence(path.name, model, reference, path, found.base)
            reports[path.name] = _gguf_facts(report) | kl
        shutil.rmtree(tokens)
        kinds = {folder / name: set(facts["types"].values()) for name, facts in reports.items()}
        ran = agreement.run(model, found.weights, config, kinds, run_in_llama_cpp)
        reports = {name: facts | ran[name] for name, facts in reports.items()}
        _tell_notes(reports)
        facts = {
            "kind": "gguf",
            **found.facts,
            "quantization": reports,
            **_facts(model, tokenizer),
        }
        return export.write_manifest(folder, facts)


def formats(methods: Any) -> list[str]:
    """Names of GGUF formats of a name or several, each once, in Unsloth's words or our own.

    Raises TypeError for something else, ValueError for none.
    """
    several = [methods] if isinstance(methods, str) else methods
    if not isinstance(several, Iterable) or not all(isinstance(m, str) for m in several):
        raise TypeError(
            f"quantization_method must be a name or several, got {shown(methods)}; known: "
            f"{[*FORMATS, *GGUF_ALIASES]}"
        )
    found = dict.fromkeys(GGUF_ALIASES.get(m.lower(), m.lower()) for m in several)
    if not found:
        raise ValueError("quantization_method names no format")
    return list(found)


def hf_config(model: "Model", dtype: str) -> dict[str, Any]:
    """config.json of the merged model: the checkpoint's, unquantized, in another dtype."""
    config = {k: v for k, v in model.source.config.items() if k != "quantization_config"}
    config = vocabulary.config_of(config, model.config.vocab)
    return config | {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}


def copy_tokenizer(model: "Model", folder: Path, tokenizer: Any) -> None:
    """The checkpoint's own files, byte for byte, unless the tokenizer was replaced or changed."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = text.load(model.tokenizer_folder)
    given = _at_rest(_given(model, tokenizer), loaded)
    if text.state(given) != text.state(loaded):
        given.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (model.tokenizer_folder / name).exists():
            shutil.copyfile(model.tokenizer_folder / name, folder / name)


def _at_rest(given: Any, loaded: Any) -> Any:
    """A copy without the padding and truncation that the last call of a tokenizer left in it."""
    given = copy.deepcopy(given)
    backend, settings = given.backend_tokenizer, loaded.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    if settings.padding:
        backend.enable_padding(**settings.padding)
    if settings.truncation:
        backend.enable_truncation(**settings.truncation)
    return given


def _given(model: "Model", tokenizer: Any) -> Any:
    return model.tokenizer if tokenizer is None else tokenizer


def _facts(model: "Model", tokenizer: Any) -> dict[str, Any]:
    template = _given(model, tokenizer).chat_template
    return {"base_model": model.name, "chat_template_sha256": export.text_hash(template)}


def _merged(model: "Model", dtype: str | None, base: str) -> merge.Merged:
    m = model
    return merge.merged(
        m.family, m.config, m.params, m.adapters, m.scale, m.source, dtype, base, m.initial
    )  # fmt: skip


def _distances(m: "Model", found: merge.Merged) -> dict[str, Any]:
    """How far the quantized weights of training lie from those the delta was added to."""
    trained_on, packed = merge.dequantized(m.params), m.quantized or m.initial is not None
    if not (packed and m.adapters and found.base != trained_on):
        return {}
    ratios = merge.distances(m.family, m.config, m.params, m.adapters, m.scale, m.source, m.initial)
    if not ratios:
        return {}
    values = np.asarray(list(ratios.values()))
    median, largest = float(np.median(values)), float(values.max())
    tell(
        f"the delta is added to {_named(found)}; {trained_on[-1]}-bit error over delta: median "
        f"{median:.1f}, largest {largest:.1f} (base={trained_on!r} merges into the weights that "
        "were trained on)"
    )
    return {"base_error_over_delta": {"median": median, "largest": largest}}


def _named(found: merge.Merged) -> str:
    if found.base == merge.ORIGINAL:
        return "the original weights"
    return f"the checkpoint's own weights, dequantized from {', '.join(found.facts['base_blocks'])}"


def _rounding(found: merge.Merged) -> dict[str, Any]:
    """The share of the delta that the output's dtype does not hold."""
    share = found.rounding()
    if share is None:
        return {}
    tell(f"rounding the merged weights loses {share:.2%} of the delta (norm over norm)")
    return {"rounding_over_delta": share}


def _trained(model: "Model") -> Trained | None:
    """The model's scores as it was trained; None without adapters, where nothing was."""
    return divergence.trained(model) if model.adapters else None


def _divergence(
    what: str, model: "Model", reference: Trained | None, written: Path, base: str
) -> dict[str, Any]:
    """KL(trained || written) of a finished folder or GGUF file, told and as the manifest has it."""
    if reference is None:
        return {}
    source = _readable(written)
    if isinstance(source, str):
        tell(f"{what}: KL to the trained model is not measured: {source}")
        return {"kl_not_measured": source}
    found = divergence.measured(reference, source, model.dtype)
    tell(
        f"{what}: KL to the model as it was trained {found.kl:.4f} nats a token of general text, "
        f"likeliest token equal at {found.same_token:.0%} of {reference.tokens.size}"
    )
    if found.kl > divergence.FAR:
        other = merge.dequantized(model.params)
        advice = f"; base={other!r} merges into the weights that were trained on"
        advice = advice if model.quantized and base != other else ""
        tell(f"WARNING: {what}: that is far, {divergence.FAR} is the most of sound exports{advice}")
    return found.facts()


def _readable(written: Path) -> Source | str:
    """The export opened again, or why our reader can't: ropes that only llama.cpp undoes."""
    if written.is_dir():
        return safetensors_file.SafetensorsSource(written)
    try:
        return GGUFSource(written)
    except ValueError as error:
        return str(error)


def _write_config(model: "Model", folder: Path, found: merge.Merged) -> dict[str, Any]:
    """config.json and generation_config.json, byte for byte where nothing has to change.

    Returns the fields that differ from the checkpoint's config.json, where it has one: a GGUF file
    has none.
    """
    adapted = {w.dtype.name for w in found.weights if w.name in found.adapted}
    dtypes = adapted or {w.dtype.name for w in found.weights}
    config = hf_config(model, sorted(dtypes)[0])
    was = model.source.config
    changed = {k: [was.get(k), config.get(k)] for k in was | config if was.get(k) != config.get(k)}
    from_file = _copied(model, folder, "config.json")
    if changed or not from_file:
        fields = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(fields + "\n", encoding="utf-8")
    if not _copied(model, folder, "generation_config.json"):
        settings = json.dumps(model.generation_config(), indent=2)
        (folder / "generation_config.json").write_text(settings + "\n")
    if not from_file:
        return {}
    if changed:
        tell(f"fields of config.json that change, [before, after]: {changed}")
    return {"config_changes": changed}


def _copied(model: "Model", folder: Path, name: str) -> bool:
    """Copies a file of the checkpoint's folder; False where it has none, as a GGUF file."""
    source = getattr(model.source, "folder", None)
    if source is None or not (source / name).exists():
        return False
    shutil.copyfile(source / name, folder / name)
    return True


def _tell_notes(reports: dict[str, dict[str, Any]]) -> None:
    """Says each note once, with the files it is about."""
    for note in dict.fromkeys(note for facts in reports.values() for note in facts["notes"]):
        files = [name for name, facts in reports.items() if note in facts["notes"]]
        tell(f"{', '.join(files)}: {note}")


def _gguf_facts(report: gguf_file.Report) -> dict[str, Any]:
    return {
        "bits_per_weight": round(report.bits_per_weight, 3),
        "substituted": round(report.substituted, 4),
        "types": {row["name"]: row["type"] for row in report.tensors},
        "rounding": report.rounding,
        "notes": report.notes,
    }
