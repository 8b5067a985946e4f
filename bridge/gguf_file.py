"""Weights and a tokenizer -> a GGUF file that llama.cpp loads.

Metadata and tensors are those of llama.cpp's convert_hf_to_gguf.py, quantized files those that
its llama-quantize makes of them.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from bridge import (
    gguf_blocks,
    gguf_experts,
    gguf_header,
    gguf_layouts,
    gguf_metadata,
    gguf_tokens,
    hf,
    verify_gguf,
)
from bridge.gguf_architectures import ARCHITECTURES
from bridge.gguf_blocks import Choice, Format
from bridge.places import places
from bridge.safetensors_file import Weight, check_space
from bridge.source import Header
from unsloth_jax.models import FAMILIES, family

MANY_SUBSTITUTED = 0.05


class Report(NamedTuple):
    """What was written. `tensors` has name, source, type, wanted, shape, bytes, error of each."""

    tensors: list[dict[str, Any]]
    rounding: dict[str, dict[str, Any]]  # by type, as `verify_gguf.worst`
    bits_per_weight: float
    substituted: float  # share of all weights whose type is not the one the format wants
    notes: list[str]


class Entry(NamedTuple):
    """One tensor on its way to the file."""

    name: str
    weight: Weight
    choice: Choice


class Plan(NamedTuple):
    """Everything that is known before the first weight is read."""

    model: ModuleType
    config: Any  # the family's
    fmt: Format
    entries: list[Entry]
    tokens: gguf_tokens.Tokens
    notes: list[str]


def save(
    path: str | Path,
    config: Mapping[str, Any],
    weights: Iterable[Weight],
    tokenizer_folder: str | Path,
    fmt: str,
    *,
    name: str | None = None,
) -> Report:
    """Writes the GGUF file `path`; `config` is config.json's content, weights have its names.

    One weight is in memory at a time. Each is read twice: before the file gets its name it is
    re-opened and compared (see `verify_gguf.verify`, which raises ValueError).
    Raises ValueError before writing for what GGUF or llama.cpp can't hold, OSError for a full disk.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another name")
    plan = _plan(config, list(weights), tokenizer_folder, gguf_blocks.format_named(fmt))
    check_space(path.parent, _needed(plan))
    name, told = gguf_metadata.loadable_name(name or path.stem, plan.tokens.texts)
    plan = plan._replace(notes=plan.notes + told)
    keys = lambda out: _metadata(out, plan, config, tokenizer_folder, name)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        wide = _write(unfinished, plan, keys)
        if wide:
            plan = _without_overflow(plan, wide)
            _write(unfinished, plan, keys)
        report = _checked(unfinished, plan)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return report


def room(
    config: Mapping[str, Any], weights: Iterable[Weight], tokenizer_folder: str | Path, fmt: str
) -> int:
    """Bytes that `save` takes at most; raises ValueError as it does before writing."""
    return _needed(_plan(config, list(weights), tokenizer_folder, gguf_blocks.format_named(fmt)))


def gguf_names(arch: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """llama.cpp's names of Hugging Face's; raises ValueError for those it has none for."""
    known = next(a for a, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    table = gguf.get_tensor_name_map(known, layers)
    # The converter takes this name for one of its own before it looks it up.
    spelled = lambda name: re.sub(
        r"\.dt_bias$", ".dt_proj.bias", name.replace(*gguf_experts.CORRECTION)
    )
    found = {name: table.get_name(spelled(name), (".weight", ".bias")) for name in names}
    unknown = [name for name, theirs in found.items() if theirs is None]
    if unknown:
        raise ValueError(f"no name in llama.cpp's architecture {arch!r} for {unknown}")
    return found


def _plan(
    config: Mapping[str, Any], weights: list[Weight], folder: str | Path, fmt: Format
) -> Plan:
    model = family(config["model_type"])
    if not hasattr(model, "GGUF_ARCH"):
        able = sorted(name for name, one in FAMILIES.items() if hasattr(one, "GGUF_ARCH"))
        raise ValueError(
            f"a {config['model_type']!r} model can't be exported as GGUF yet; these can: {able}"
        )
    c = model.config(config)
    headers = {w.name: Header(tuple(w.shape), str(w.dtype)) for w in weights}
    hf.check(model, c, headers, "what is to be exported")
    notes = gguf_metadata.refuse_unspeakable(model, c, config)
    tokens = gguf_tokens.read(folder, config, model.GGUF_ARCH)
    named = _named(model, c, weights)
    if gguf_blocks.is_quantized(fmt):
        named = {n: _without_ones(w) for n, w in named.items()}
    experts = getattr(c, "experts", 1)
    sizes = gguf_blocks.Sizes(model.GGUF_ARCH, c.layers, c.heads, c.kv_heads, experts)
    choices = gguf_blocks.choose(fmt, {n: w.shape for n, w in named.items()}, sizes)
    order = sorted(named, key=_quantized_order) if gguf_blocks.is_quantized(fmt) else list(named)
    entries = [Entry(n, named[n], choices[n]) for n in order]
    return Plan(model, c, fmt, entries, tokens, notes + tokens.notes)


def _named(model: ModuleType, c: Any, weights: list[Weight]) -> dict[str, Weight]:
    """Weights by GGUF name in the converter's order: rope factors, then as safetensors sorts.

    Raises ValueError for a bias that llama.cpp has no place for.
    """
    known, out = places(model, c), {}
    for name, w in gguf_metadata.rope_factors(c.rope).items():
        out[name] = Weight(name, w.shape, w.dtype, lambda w=w: w)
    own = getattr(model, "gguf_parts", lambda c, name, shape: {})
    parts_of = lambda w: own(c, w.name, tuple(w.shape))
    ordered = gguf_experts.merged([w for w in weights if w.name in known], known, parts_of)
    named = gguf_names(model.GGUF_ARCH, c.layers, [w.name for w in ordered])
    out |= {named[w.name]: _reshaped(model, c, w) for w in ordered}
    biases, reads = [n for n in out if n.endswith(".bias")], ARCHITECTURES[model.GGUF_ARCH].biases
    lost = [n for n in biases if n.split(".")[-2] not in reads]
    if lost:
        raise ValueError(
            f"llama.cpp's {model.GGUF_ARCH!r} has no place for {len(lost)} biases: {lost[0]}"
        )
    return out


def _reshaped(model: ModuleType, c: Any, w: Weight) -> Weight:
    """The tensor in the file, where the family has them in other shapes: as it is checked."""
    if not hasattr(model, "gguf_shape"):
        return w
    wide = lambda: np.asarray(w.read()).astype(np.float32, copy=False)
    shape = model.gguf_shape(c, w.name, tuple(w.shape))
    return Weight(w.name, shape, w.dtype, lambda: model.to_gguf(c, w.name, wide()))


def _without_ones(w: Weight) -> Weight:
    """As llama-quantize has a tensor."""
    shape = gguf_layouts.without_ones(tuple(w.shape))
    read = lambda: np.asarray(w.read()).reshape(shape)
    return w if shape == tuple(w.shape) else Weight(w.name, shape, w.dtype, read)


def _quantized_order(name: str) -> tuple[int, str]:
    """llama-quantize's order: what belongs to no layer, then layer by layer, by name."""
    return (int(name.split(".")[1]) if name.startswith("blk.") else -1), name


def _needed(plan: Plan) -> int:
    return sum(map(_room, plan.entries)) + _header_room(plan.tokens)


def _room(entry: Entry) -> int:
    return gguf_blocks.size(entry.weight.shape, entry.choice.kind) + gguf.GGUF_DEFAULT_ALIGNMENT


def _header_room(tokens: gguf_tokens.Tokens) -> int:
    """Bytes that the metadata takes at most."""
    texts = sum(len(t.encode()) + 12 for t in tokens.texts)
    return texts + sum(len(m.encode()) + 8 for m in tokens.special.merges) + 2**20


def _metadata(
    out: gguf.GGUFWriter, plan: Plan, config: Mapping[str, Any], folder: str | Path, name: str
) -> None:
    """All keys, in the converter's order; llama-quantize moves two of them to the end."""
    quantized = gguf_blocks.is_quantized(plan.fmt)
    gguf_metadata.rope_attention(out, plan.config)
    label = gguf_experts.size_label({e.name: tuple(e.weight.shape) for e in plan.entries})
    gguf_metadata.general(out, folder, name, label)
    gguf_metadata.architecture(out, plan.config, config)
    if not quantized:
        out.add_file_type(plan.fmt.file_type)
    gguf_metadata.family_keys(out, plan.model, plan.config)
    if not quantized:
        out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    gguf_tokens.write(out, plan.tokens)
    if quantized:
        out.add_quantization_version(gguf.GGML_QUANT_VERSION)
        out.add_file_type(plan.fmt.file_type)


def _write(path: Path, plan: Plan, keys: Any) -> list[str]:
    """Writes the whole file; returns the tensors that float16 can't hold."""
    out = gguf.GGUFWriter(path, plan.model.GGUF_ARCH)
    keys(out)
    for e in plan.entries:
        nbytes = gguf_blocks.size(e.weight.shape, e.choice.kind)
        float32 = np.dtype(np.float32)
        out.add_tensor_info(e.name, e.weight.shape, float32, nbytes, raw_dtype=e.choice.kind)
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
        return [e.name for e in plan.entries if _put(out, plan, e)]
    finally:
        out.close()


def _put(out: gguf.GGUFWriter, plan: Plan, e: Entry) -> bool:
    """Reads, encodes and writes one tensor; True says that float16 can't hold it."""
    w = _value(plan, e)
    out.write_tensor_data(gguf_blocks.encode(w, e.choice.kind))
    return e.choice.kind == Kind.F16 and gguf_blocks.overflows(w)


def _value(plan: Plan, e: Entry) -> np.ndarray:
    """A tensor as float32, its rows in llama.cpp's order; raises ValueError for NaN or infinity."""
    w = np.asarray(e.weight.read()).astype(np.float32, copy=False)
    if w.shape != tuple(e.weight.shape):
        raise ValueError(f"{e.weight.name} was announced as {e.weight.shape}, it is {w.shape}")
    bad = w.size - int(np.count_nonzero(np.isfinite(w)))
    if bad:
        raise ValueError(f"{e.weight.name} has {bad} values that are not finite")
    done = e.weight.name == e.name or hasattr(plan.model, "gguf_shape")
    if done or not hasattr(plan.model, "to_gguf"):
        return w
    return plan.model.to_gguf(plan.config, e.weight.name, w)


def _without_overflow(plan: Plan, wide: list[str]) -> Plan:
    """The plan with those tensors in bfloat16, which has float32's range."""
    choice = lambda e: e.choice._replace(kind=Kind.BF16) if e.name in wide else e.choice
    note = f"kept in bfloat16, values above {gguf_blocks.LARGEST_F16:.0f} don't fit float16: {wide}"
    entries = [e._replace(choice=choice(e)) for e in plan.entries]
    return plan._replace(entries=entries, notes=[*plan.notes, note])


def _checked(path: Path, plan: Plan) -> Report:
    """Compares the finished file with what it should hold; raises ValueError where it doesn't."""
    file = gguf_header.read(path)
    shapes = {name: (t.shape, t.kind) for name, t in file.tensors.items()}
    wanted = {e.name: (tuple(e.weight.shape), e.choice.kind) for e in plan.entries}
    if list(shapes.items()) != list(wanted.items()):
        differ = sorted(set(shapes.items()) ^ set(wanted.items()))
        raise ValueError(f"{path}: tensors came back otherwise than written: {differ[:4]}")
    found = verify_gguf.verify(path, [e.weight for e in plan.entries])
    sizes = {name: t.size for name, t in file.tensors.items()}
    rows = [_row(e, sizes[e.name], found[e.weight.name].error) for e in plan.entries]
    return _report(rows, verify_gguf.worst(found.values()), plan.notes)


def _row(e: Entry, nbytes: int, error: float) -> dict[str, Any]:
    return {
        "name": e.name,
        "source": e.weight.name,
        "type": e.choice.kind.name,
        "wanted": e.choice.wanted.name,
        "shape": list(e.weight.shape),
        "bytes": nbytes,
        "error": error,
    }


def _report(rows: list[dict[str, Any]], rounding: dict[str, Any], notes: list[str]) -> Report:
    count = lambda some: sum(math.prod(r["shape"]) for r in some)
    replaced = [r for r in rows if r["type"] != r["wanted"]]
    share = count(replaced) / count(rows)
    if share > MANY_SUBSTITUTED:
        types = sorted({f"{r['wanted']} became {r['type']}" for r in replaced})
        notes = [*notes, f"{share:.0%} of the weights have another type by their width: {types}"]
    coarse = [r for r in rows if r["error"] > gguf_blocks.ERROR[Kind[r["type"]]]]
    if coarse:
        worst = max(coarse, key=lambda r: r["error"])
        figure = f"{worst['error']:.1%} in {worst['type']}"
        notes = [*notes, f"{len(coarse)} tensors round worse than usual, {worst['name']} {figure}"]
    bits = 8 * sum(r["bytes"] for r in rows) / count(rows)
    return Report(rows, rounding, bits, share, notes)
