"""What a recorded training of SmolLM2 began with, and what is kept of its end; numpy only."""

from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "trl_sft.json"
STEPS, BATCH, RATE, CLIP = 30, 2, 5e-4, 1.0
RANK, ALPHA = 4, 8
WIDTH, PACKED, ROWS = 64, 128, 12
PRODUCTS = 3
# Name -> whether rows are packed, whether answers alone are learnt.
WAYS = {
    "all tokens": (False, False),
    "answers": (False, True),
    "all tokens, packed": (True, False),
    "answers, packed": (True, True),
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def start(layer: int, module: str, shape: tuple[int, ...]) -> np.ndarray:
    """`a` of one adapter, [rank, in], as PEFT's start is distributed; `b` is zero."""
    rng = np.random.default_rng((7, layer, MODULES.index(module)))
    return rng.uniform(-1, 1, shape).astype(np.float32) / np.sqrt(shape[1])


def vectors(layer: int, module: str, side: str, size: int) -> np.ndarray:
    """[PRODUCTS, size] normal numbers, by which a tensor's values are multiplied and summed up."""
    rng = np.random.default_rng((8, layer, MODULES.index(module), "ab".index(side)))
    return rng.standard_normal((PRODUCTS, size))


def kept(layer: int, module: str, side: str, tensor: np.ndarray) -> list[float]:
    """The norm of a tensor and its products, in float64."""
    flat = tensor.astype(np.float64).ravel()
    return [np.linalg.norm(flat), *(vectors(layer, module, side, flat.size) @ flat)]
