"""What the loader asks of a checkpoint, whatever file format it has."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np


class Header(NamedTuple):
    """A weight as it lies in a file, known without reading its values."""

    shape: tuple[int, ...]  # as Hugging Face has it, [out, in]
    dtype: str  # "float32", "float16", "bfloat16": what reading (or dequantising) gives
    format: str | None = None  # the layout of quantized values in words, None for plain numbers
    blocks: str | None = None  # the type that reading dequantises, such as GGUF's Q4_1


@runtime_checkable
class Source(Protocol):
    """An opened checkpoint; `config` is the content of config.json in Hugging Face's words."""

    config: dict[str, Any]

    def headers(self) -> dict[str, Header]:
        """Every weight by its full Hugging Face name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One weight as a dense host array in its header's dtype."""
        ...
