"""NF4 weights in bitsandbytes' safetensors layout, both ways.

A weight P lies as `P` (packed bytes, uint8 or viewed as another dtype), `P.absmax`, `P.quant_map`,
`P.quant_state.bitsandbytes__nf4` (JSON as bytes) and, where the statistics are nested,
`P.nested_absmax` and `P.nested_quant_map`. Source: bitsandbytes 0.50 `QuantState.as_dict`.
"""

import json
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.nf4 import CODES
from unsloth_jax.quant.nf4 import BLOCKS, DTYPES, NF4, in_rows

Read = Callable[[str], np.ndarray]  # a tensor by its full name; KeyError where there is none

STATE = "quant_state.bitsandbytes__nf4"
FP4 = "quant_state.bitsandbytes__fp4"
PLAIN = ("absmax", "quant_map", STATE)
NESTED = ("nested_absmax", "nested_quant_map")


class State(NamedTuple):
    """The JSON beside a weight, checked; `nested_block` is None where statistics are plain."""

    matrix: tuple[int, int]
    dtype: str
    block: int
    nested_block: int | None = None
    offset: float | None = None


def is_nf4(names: Container[str], name: str) -> bool:
    """Whether any of NF4's members stands beside `name`. Raises on FP4, another code book."""
    if f"{name}.{FP4}" in names:
        raise ValueError(
            f"{name} is quantized as fp4, the only bitsandbytes 4-bit type read is nf4"
        )
    return any(f"{name}.{member}" in names for member in PLAIN + NESTED)


def members(names: Container[str], name: str) -> list[str]:
    """Names of the tensors that belong to the weight `name`, itself excluded."""
    every = (f"{name}.{member}" for member in PLAIN + NESTED)
    return [member for member in every if member in names]


def state(read: Read, name: str) -> State:
    """Shape, dtype and block lengths of a weight, from its JSON alone. Raises on other kinds."""
    key = f"{name}.{STATE}"
    try:
        raw = json.loads(read(key).tobytes())
    except KeyError as error:
        raise ValueError(f"{name} is no readable NF4 weight: {key} is missing") from error
    except ValueError as error:
        raise ValueError(f"{key} holds no JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{key} holds {raw!r}, expected a JSON object")
    nested = "nested_offset" in raw
    known = {
        "quant_type": ("nf4",),
        "dtype": DTYPES,
        "blocksize": BLOCKS,
        **({"nested_blocksize": BLOCKS, "nested_dtype": ("float32",)} if nested else {}),
    }
    wrong = [
        f"{field} is {raw.get(field)!r}, known are {values}"
        for field, values in known.items()
        if raw.get(field) not in values
    ]
    shape = raw.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(_is_length(n) for n in shape)):
        wrong.append(f"shape is {shape!r}, expected two lengths")
    if nested and not isinstance(raw["nested_offset"], float | int):
        wrong.append(f"nested_offset is {raw['nested_offset']!r}, expected a number")
    _refuse(key, wrong)
    extra = (raw["nested_blocksize"], raw["nested_offset"]) if nested else ()
    return State(tuple(shape), raw["dtype"], raw["blocksize"], *extra)


def parts(read: Read, name: str, names: Container[str]) -> NF4:
    """The weight `name` with host arrays in its fields; `names` are those in the checkpoint.

    Raises one error with every missing member, or one with every member of another shape or dtype.
    """
    is_nf4(names, name)
    nested = any(f"{name}.{member}" in names for member in NESTED)
    needed = [name, *(f"{name}.{member}" for member in PLAIN + (NESTED if nested else ()))]
    _refuse(name, [f"{key} is missing" for key in needed if key not in names])
    it = state(read, name)
    if nested != (it.nested_block is not None):
        _refuse(name, [f"{STATE} says nested={not nested}, the tensors beside it say {nested}"])
    found = {key: read(f"{name}.{key}") for key in PLAIN[:2] + (NESTED if nested else ())}
    packed = np.ascontiguousarray(read(name)).reshape(-1).view(np.uint8)
    _refuse(name, _misfits(it, packed, found))
    rows, width = it.matrix
    return NF4(
        packed.reshape(rows, width // 2) if in_rows(it.matrix) else packed,
        found["absmax"],
        found.get("nested_absmax"),
        found.get("nested_quant_map"),
        np.float32(it.offset) if nested else None,
        matrix=it.matrix,
        block=it.block,
        dtype=it.dtype,
        **({"nested_block": it.nested_block} if nested else {}),
    )


def _misfits(it: State, packed: np.ndarray, found: dict[str, np.ndarray]) -> Iterable[str]:
    size = it.matrix[0] * it.matrix[1]
    blocks = -(-size // it.block)
    expected = {"absmax": ("float32", blocks), "quant_map": ("float32", 16)}
    if it.nested_block:
        nested = -(-blocks // it.nested_block)
        expected |= {"absmax": ("uint8", blocks), "nested_absmax": ("float32", nested)}
        expected |= {"nested_quant_map": ("float32", 256)}
    if packed.size != -(-size // 2):
        yield f"{packed.size} packed bytes, shape {it.matrix} has {-(-size // 2)}"
    for key, (dtype, length) in expected.items():
        if (found[key].dtype.name, found[key].shape) != (dtype, (length,)):
            yield f"{key} is {found[key].dtype} {found[key].shape}, expected {dtype} ({length},)"
    if not np.array_equal(found["quant_map"], CODES):
        yield f"quant_map is {found['quant_map'].tolist()}, expected NF4's {CODES.tolist()}"


def tensors(name: str, leaf: NF4) -> dict[str, np.ndarray]:
    """The tensors of one weight as bitsandbytes saves them, by full name. Raises on a stack."""
    if tuple(leaf.shape) != tuple(leaf.matrix):
        raise ValueError(f"{name} is a stack of shape {leaf.shape}: save its matrices one by one")
    nested = leaf.nested_absmax is not None
    said = {
        "quant_type": "nf4",
        "blocksize": leaf.block,
        "dtype": leaf.dtype,
        "shape": list(leaf.matrix),
    }
    arrays = {"absmax": leaf.absmax, "quant_map": CODES.copy()}
    if nested:
        said["nested_blocksize"] = leaf.nested_block
        said["nested_dtype"] = "float32"
        said["nested_offset"] = float(leaf.offset)
        arrays |= {"nested_absmax": leaf.nested_absmax, "nested_quant_map": leaf.nested_map}
    arrays[STATE] = np.frombuffer(json.dumps(said).encode(), np.uint8)
    packed = np.asarray(leaf.packed).reshape(-1, 1)
    return {name: packed, **{f"{name}.{key}": np.asarray(a) for key, a in arrays.items()}}


def quantization_config(
    skip: Sequence[str], compute_dtype: str = "bfloat16", double: bool = True
) -> dict[str, Any]:
    """`quantization_config` of a config.json whose linear weights but the modules `skip` are NF4.

    Keys and values are transformers' `BitsAndBytesConfig.to_dict()`; name the head in `skip`.
    """
    if compute_dtype not in DTYPES:
        raise ValueError(f"unknown compute dtype {compute_dtype!r}, known are {DTYPES}")
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _is_length(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0


def _refuse(name: str, wrong: Iterable[str]) -> None:
    lines = list(wrong)
    if lines:
        raise ValueError(f"{name} is no readable NF4 weight:\n  " + "\n  ".join(lines))
