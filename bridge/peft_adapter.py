"""LoRA adapters in PEFT's folders, both ways: adapter_config.json and adapter_model.safetensors.

Names and meaning of the fields: peft 0.21 `LoraConfig`, `check_target_module_exists`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from bridge import modules_to_save, peft_experts, peft_fields
from bridge.export import complete
from bridge.peft_fields import STARTS, Own, check
from bridge.safetensors_file import check_space, listing, opened, read_json, settle_metadata
from unsloth_jax import lora, tree
from unsloth_jax.dims import Params
from unsloth_jax.leaves import Stacks, dense, layer
from unsloth_jax.lora import starts
from unsloth_jax.lora.targets import layer_count, sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SIDES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
ALL_LINEAR = "all-linear"
EMBEDDING = "embed_tokens"
NOTES = {  # on a saved adapter, by its start
    starts.LOFTQ: "after LoftQ the adapter belongs to the base in NF4 (load_in_4bit=True; exactly "
    "for loftq_iter=1 without double quantization): on 16-bit weights it answers otherwise, "
    "save_pretrained_merged(..., base='dequant4') holds all that was trained",
}


class Settings(NamedTuple):
    """What an adapter means beside its matrices; `metadata` is free text (hashes of its base)."""

    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] | str = ALL_LINEAR
    layers: tuple[int, ...] | None = None
    start: bool | str = True
    base: str | None = None
    revision: str | None = None
    dropout: float = 0.0
    metadata: Mapping[str, str] = MappingProxyType({})
    dora: bool = False
    saved: tuple[str, ...] = ()  # modules_to_save: trained as they are
    rank_pattern: Mapping[str, int] = MappingProxyType({})  # modules of other ranks, same scale

    def rank_of(self, module: str) -> int:
        """The rank of one module's pair, by its full name."""
        hits = (r for key, r in self.rank_pattern.items() if peft_fields.names(key, module))
        return next(hits, self.rank)

    def alpha_of(self, rank: int) -> float | int:
        """lora_alpha of a pair of this rank, so that its scale is that of all."""
        more = rank / self.rank
        alpha = self.alpha * (math.sqrt(more) if self.rslora else more)
        return int(alpha) if alpha == int(alpha) else alpha


class Module(NamedTuple):
    """A matrix of the base, in one layer of its stack (None outside the stacks).

    With `experts` it is as many of them, which PEFT's `target_parameters` name.
    """

    path: str
    layer: int | None
    shape: tuple[int, int]
    experts: int | None = None


def save(
    folder: str | Path, adapters: Params, settings: Settings, initial: Params | None = None
) -> None:
    """Writes the adapter as PEFT reads it, float32; the folder appears when it is complete.

    After a start that changed the base (`lora.starts`), `initial` is what it gave. After PiSSA the
    file holds the difference, an adapter of twice the rank for the base as it was; after LoftQ the
    pair itself, for the base in NF4.
    Raises FileExistsError for a folder that holds something, ValueError for adapters that
    `settings` don't describe or PEFT can't express.
    """
    if initial is not None and settings.start == starts.LOFTQ:
        settings = settings._replace(start=True)
    elif initial is not None:
        adapters, settings = lora.difference(adapters, initial), doubled(settings)
    pairs, whole = lora.parts(adapters)
    values = tensors(tree.unflatten(pairs))
    fields = config(values, settings, peft_experts.modules(pairs))
    values |= modules_to_save.tensors(whole, settings.saved)
    check_space(Path(folder), sum(v.nbytes for v in values.values()) + 2**16)
    with complete(Path(folder)) as unfinished:
        save_file(values, unfinished / WEIGHTS, {"format": "pt"} | dict(settings.metadata))
        settle_metadata(unfinished / WEIGHTS)
        (unfinished / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        _check_written(unfinished / WEIGHTS, values)


def doubled(s: Settings) -> Settings:
    """Settings of the same scale and twice the rank, for a base that is as it was."""
    return s._replace(rank=2 * s.rank, alpha=s.alpha_of(2 * s.rank), start=True)


def _check_written(path: Path, values: Mapping[str, np.ndarray]) -> None:
    with opened(path) as file:
        wrong = [k for k, v in values.items() if not np.array_equal(file.get_tensor(k), v)]
    if wrong:
        raise OSError(f"{path} reads back otherwise than written: {wrong[:10]}")


def tensors(adapters: Params) -> dict[str, np.ndarray]:
    """Every matrix of the pairs by PEFT's name, float32, one a layer.

    Raises ValueError for values that are not finite, and for an adapter on the embedding: PEFT
    keeps these transposed, and where the head is tied it would not reach the head.
    """
    flat, out = tree.flatten(adapters), {}
    found = peft_experts.modules(flat)
    for path, leaf in flat.items():
        module, side = path.rsplit(".", 1)
        if module.endswith(EMBEDDING):
            raise ValueError(
                f"an adapter on {module} can't be written for PEFT; adapt linear layers"
            )
        both = peft_experts.both(found, module)
        for i in _layers(leaf) if ".*." in path else (None,):
            name = module if i is None else module.replace("*", str(i), 1)
            value = np.array(leaf if i is None else layer(leaf, i), np.float32, order="C")
            end = SIDES[side]
            if module in found:
                value, of = peft_experts.laid(module, side, value)
                name, end = peft_experts.key(name, both), SIDES[of]
            out[f"{PREFIX}{name}.{end}"] = value
    wrong = [name for name, value in out.items() if not np.isfinite(value).all()]
    if wrong:
        raise ValueError(f"adapter values are not finite in {wrong[:10]}")
    return out


def _layers(leaf: Any) -> Sequence[int]:
    if isinstance(leaf, Stacks):
        return sorted(i for ids in leaf.layers for i in ids)
    return range(leaf.shape[0])


def config(
    values: Mapping[str, np.ndarray], settings: Settings, experts: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of adapter_config.json for these tensors; `experts` are experts' modules.

    Raises ValueError where they are not what `settings` say.
    """
    if settings.start not in STARTS:
        raise ValueError(
            f"init_lora_weights={settings.start!r} changed the base: without the initial pairs "
            f"the adapter belongs to no checkpoint; others are {STARTS}"
        )
    s, names = settings, {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in values}
    names = {name for name in names if not name.endswith(peft_experts.ENDS)}
    targets = s.targets
    if targets == ALL_LINEAR:
        targets = tuple({name.rsplit(".", 1)[1] for name in names})
    if experts and not isinstance(targets, str):
        # The names of experts' matrices are no modules' for PEFT.
        ends = {name.rsplit(".", 1)[1] for name in names}
        targets = tuple(t for t in targets if t.rpartition(".")[2] in ends)
    strays = sorted(name for name in names if not _chosen(name, targets, s.layers))
    ranks = {n: values[f"{PREFIX}{n}.{SIDES['a']}"].shape[0] for n in sorted(names)}
    other = sorted({rank for name, rank in ranks.items() if rank != s.rank_of(name)})
    dora = sum(key.endswith(SIDES["magnitude"]) for key in values)
    if strays or other or dora != s.dora * len(names):
        raise ValueError(
            f"the adapters have rank {other or s.rank}, {dora} magnitudes and "
            f"{strays[:10] or f'{len(names)} modules'}; the settings say rank {s.rank}, targets "
            f"{s.targets!r}, layers {s.layers}, DoRA {s.dora}"
        )
    parameters = peft_experts.parameters(experts, s.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": s.base,
        "revision": s.revision,
        "inference_mode": True,
        "r": s.rank,
        "lora_alpha": s.alpha_of(s.rank),
        "lora_dropout": s.dropout,
        "use_rslora": s.rslora,
        "use_dora": s.dora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets) or None,
        "target_parameters": parameters or None,
        "exclude_modules": None,
        "layers_to_transform": None if s.layers is None else sorted(s.layers),
        "layers_pattern": None,
        "rank_pattern": dict(s.rank_pattern),
        "alpha_pattern": {k: s.alpha_of(rank) for k, rank in s.rank_pattern.items()},
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "modules_to_save": list(s.saved) or None,
        "ensure_weight_tying": False,
        "init_lora_weights": s.start,
        "loftq_config": {},
    }


def _chosen(name: str, targets: Sequence[str] | str, layers: Sequence[int] | None) -> bool:
    """PEFT's rule: a full name in the list is taken whatever `layers` says."""
    if isinstance(targets, str):
        return tree.matcher(targets)(name)
    if name in targets:
        return True
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return tree.matcher(tuple(targets))(name) and (layers is None or number in layers)


def load(folder: str | Path, params: Params) -> tuple[Params, Settings]:
    """(adapters for the base `params`, float32, as `lora.init` shapes them; their settings).

    Raises one ValueError with every field that can't be honoured, and one with every missing,
    unexpected, misshapen or broken tensor.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG)
    check(fields, str(folder / CONFIG))
    targets, layers = fields.get("target_modules") or (), fields.get("layers_to_transform")
    targets = targets if isinstance(targets, str) else tuple(targets)
    named = tuple(fields.get("target_parameters") or ())
    layers = (layers,) if isinstance(layers, int) else tuple(layers or ()) or None
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder / WEIGHTS} is missing; there is {listing(folder)}")
    chosen = _of_config(modules(params), targets, layers, fields.get("exclude_modules"), named)
    adapters, metadata = _read(folder, fields, chosen, params)
    if fields.get("exclude_modules") or named and isinstance(targets, str):
        targets, layers = tuple(chosen), None
    elif named:
        targets = (*targets, *named)
    return adapters, Settings(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rslora=fields.get("use_rslora", False),
        targets=targets,
        layers=layers,
        start=fields.get("init_lora_weights", True),
        base=fields.get("base_model_name_or_path"),
        revision=fields.get("revision"),
        dropout=fields.get("lora_dropout", 0.0),
        metadata=metadata,
        dora=fields.get("use_dora", False),
        saved=modules_to_save.listed(fields, params),
        rank_pattern=fields.get("rank_pattern") or {},
    )


def vocabulary(folder: str | Path) -> int | None:
    """Rows of the embedding that a PEFT folder holds; None where it was not trained."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        return None
    with opened(path) as file:
        held = f"{PREFIX}{modules_to_save.EMBEDDING}"
        return file.get_slice(held).get_shape()[0] if held in file.keys() else None


def _read(folder: Path, fields, chosen: Mapping[str, Module], params: Params):
    """(the tree of pairs and trained weights, the file's metadata)."""
    where, dora = str(folder / WEIGHTS), fields.get("use_dora", False)
    with opened(folder / WEIGHTS) as file:
        values = {key: file.get_tensor(key) for key in file.keys()}
        metadata = {k: v for k, v in (file.metadata() or {}).items() if k != "format"}
    named = modules_to_save.named(params, modules_to_save.listed(fields, params), where)
    twice = sorted(named.keys() & {f"{name}.weight" for name in chosen})
    if twice:
        raise ValueError(f"{folder / CONFIG}: {twice} are in modules_to_save and target_modules")
    own = {name: peft_fields.own(fields, name, str(folder / CONFIG)) for name in chosen}
    expected = _expected(chosen, {name: x.rank for name, x in own.items()}, dora)
    expected |= {f"{PREFIX}{name}": place.shape for name, place in named.items()}
    values = _without_base(values, modules(params), params)
    _check_tensors(values, expected, where)
    pairs = tree.flatten(_tree(values, chosen, params, own, dora))
    return tree.unflatten(pairs | modules_to_save.arrays(values, named, where)), metadata


def modules(params: Params) -> dict[str, Module]:
    """Every matrix of the base by its module's full name, `model.layers.0.mlp.up_proj`."""
    out = {}
    for path, site in sites(params).items():
        for i in site.layers or (None,):
            name = path if i is None else path.replace("*", str(i), 1)
            out[name] = Module(path, i, (sum(site.heights), site.width), site.experts)
    return out


def _of_config(base, targets, layers, exclude, parameters=()) -> dict[str, Module]:
    """The modules that a config names. Raises ValueError where there is none, or an embedding."""
    excluded = lambda name: bool(exclude) and _chosen(name, exclude, None)
    if targets == ALL_LINEAR:
        targets = tuple(n for n, m in base.items() if m.layer is not None and not m.experts)
    wanted = lambda n, m: (
        _chosen(n, parameters, layers) if m.experts else _chosen(n, targets, layers)
    )
    out = {n: m for n, m in base.items() if wanted(n, m) and not excluded(n)}
    embeddings = [name for name in out if name.endswith(EMBEDDING)]
    found = [n for n, m in out.items() if m.experts]
    absent = [p for p in parameters if not any(map(tree.matcher((p,)), found))]
    if embeddings or absent or not out:
        what = f"the embedding {embeddings}" if embeddings else "no module of this model"
        known = sorted({m.path for m in base.values() if not m.path.endswith(EMBEDDING)})
        also = f" and target_parameters {absent}" if absent else ""
        raise ValueError(f"target_modules {targets!r}{also} name {what}; supported: {known}")
    return out


def _without_base(values: dict[str, np.ndarray], base: dict[str, Module], params: Params):
    """Leaves out the copies of adapted heads that PEFT adds; a changed one stays, unexpected."""
    flat, ending = tree.flatten(params), ".base_layer.weight"

    def same(key: str, value: np.ndarray) -> bool:
        module = base.get(key.removeprefix(PREFIX).removesuffix(ending))
        if not key.endswith(ending) or module is None or module.layer is not None:
            return False
        ours = np.asarray(dense(flat[f"{module.path}.weight"]))
        return ours.shape == value.shape and np.array_equal(ours, value.astype(ours.dtype))

    return {key: value for key, value in values.items() if not same(key, value)}


def _keys(chosen: Mapping[str, Module]) -> dict[str, str]:
    """Where PEFT's file has each module's pair."""
    found = [n for n, m in chosen.items() if m.experts]
    key = lambda n: peft_experts.key(n, peft_experts.both(found, n))
    return {n: PREFIX + (key(n) if m.experts else n) for n, m in chosen.items()}


def _expected(
    chosen: Mapping[str, Module], ranks: Mapping[str, int], dora: bool
) -> dict[str, tuple[int, ...]]:
    out, keys = {}, _keys(chosen)
    for name, (path, _, (height, width), experts) in chosen.items():
        if experts and peft_experts.mirrored(path):
            height, width = width, height
        r = ranks[name] * (experts or 1)
        shapes = {"a": (r, width), "b": (height, r)} | ({"magnitude": (height,)} if dora else {})
        out |= {f"{keys[name]}.{SIDES[side]}": shape for side, shape in shapes.items()}
    return out


def _check_tensors(values, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    wrong = [f"missing {key} {shape}" for key, shape in expected.items() if key not in values]
    wrong += [f"unexpected {key} {values[key].shape}" for key in values if key not in expected]
    for key in sorted(expected.keys() & values.keys()):
        value, shape = values[key], expected[key]
        if value.shape != shape:
            wrong.append(f"{key} has shape {value.shape}, rank and base say {shape}")
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            wrong.append(f"{key} has dtype {value.dtype}, expected a float")
        elif not np.isfinite(value.astype(np.float32)).all():
            wrong.append(f"{key} holds values that are not finite")
    if wrong:
        more = f"\n  and {len(wrong) - 30} more" if len(wrong) > 30 else ""
        raise ValueError(f"{where} does not fit:\n  " + "\n  ".join(wrong[:30]) + more)


def _tree(
    values, chosen: Mapping[str, Module], params: Params, own: Mapping[str, Own], dora: bool
) -> Params:
    """Pairs by path, layers of one rank in a stack. B takes what a module's scale is of all's."""
    out, every, keys = {}, tuple(range(layer_count(params))), _keys(chosen)
    by_path: dict[str, dict[int | None, str]] = {}
    for name, module in chosen.items():
        by_path.setdefault(module.path, {})[module.layer] = name
    for path, names in by_path.items():
        groups: dict[int, list[int]] = {}
        for i in sorted(i for i in names if i is not None):
            groups.setdefault(own[names[i]].rank, []).append(i)
        ids = tuple(map(tuple, groups.values()))
        count = chosen[next(iter(names.values()))].experts
        for side in (*"ab", "magnitude") if dora else "ab":

            def read(i, path=path, names=names, side=side, count=count):
                take = lambda side: values[f"{keys[names[i]]}.{SIDES[side]}"].astype(np.float32)
                x = peft_experts.read(path, side, take, count) if count else take(side)
                return x * np.float32(own[names[i]].factor) if side == "b" else x

            stacks = tuple(jnp.asarray(np.stack([read(i) for i in part])) for part in ids)
            if ids in ((), (every,)):
                out[f"{path}.{side}"] = stacks[0] if ids else jnp.asarray(read(None))
            else:
                out[f"{path}.{side}"] = Stacks(stacks, ids)
    return tree.unflatten(out)
