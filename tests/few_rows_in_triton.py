"""Runs the few-row kernels in Triton's interpreter: FOLDER, [(constants, grid), ...].

Call n reads n.npz (x, and `i_k` for array k of matrix i, stacks of layers), writes float32 n.npy.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from pallas_kernels import _nf4_few_rows_triton, _nf4_few_rows_warp
from tests import ptx_on_numpy

LAYER = 2


def run(given: dict, constants: dict, grid: tuple) -> torch.Tensor:
    x = given["x"].to(torch.bfloat16)
    arrays = []
    for i in range(3):
        one = [given.get(f"{i}_{k}") for k in range(5)]
        one = arrays[:5] if one[0] is None else one
        arrays += [one[1] if a is None else a for a in one]
    heights = sum(constants[side] for side in ("O0", "O1", "O2"))
    y = torch.full((constants.get("SPLITS", 1), constants["M"], heights), torch.nan)
    layers, layer = (torch.tensor([LAYER]).int(), 0) if constants["TRACED"] else (x, LAYER)
    kernel = _nf4_few_rows_triton.vector_kernel
    if "STEP" in constants:
        kernel = _nf4_few_rows_warp.warp_kernel
    elif "COLUMNS" in constants:
        kernel = _nf4_few_rows_triton.tile_kernel
    kernel[grid](x, layers, layer, *arrays, y, **constants, SHUFFLED=False)
    return y


def main(folder: str, calls: str) -> None:
    InterpreterBuilder.create_inline_asm = ptx_on_numpy.create_inline_asm
    for n, (constants, grid) in enumerate(ast.literal_eval(calls)):
        arrays = np.load(Path(folder) / f"{n}.npz")
        given = {name: torch.tensor(array) for name, array in arrays.items()}
        np.save(Path(folder) / f"{n}.npy", run(given, constants, grid).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
