"""What each layer keeps for the backward pass, and what else training trades for memory.

Policies from the least memory to the fastest. A layer's input is kept by the scan itself;
"offload" moves it to pinned host memory (Unsloth's offloaded checkpoints). "none" computes no
matrix product and no attention again, only norms and what lies between products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pallas_kernels import attention, cross_entropy

KEPT: dict[str, tuple[str, ...]] = {
    "offload": (),
    "full": (),
    "attention": ("q", "k", "v", attention.KEPT),
    "mlp": ("gate", "up"),
    "none": ("q", "k", "v", attention.KEPT, "mid", "gate", "up"),
}
INPUT = "block_in"


class Memory(NamedTuple):
    """How a training step spends memory; nothing here changes its result."""

    keep: str = "full"  # of KEPT
    tiles: int = 1  # parts of a row that pass through the MLP one after the other
    chunk: int = cross_entropy.CHUNK  # rows of scores that exist at a time
    unroll: bool = False  # no loop over layers: what they keep is never copied into stacks
    host_embedding: bool = False  # the table stays in host memory, which looks its rows up


PLAIN = Memory()


def policy(keep: str) -> Callable[..., Any]:
    """A `jax.checkpoint` policy by name. Raises ValueError for an unknown one."""
    if keep not in KEPT:
        raise ValueError(f"unknown remat policy {keep!r}; known: {list(KEPT)}")
    if keep == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    named = jax.checkpoint_policies.save_only_these_names(*KEPT[keep])
    if attention.KEPT not in KEPT[keep]:
        return named

    def with_statistics(primitive: Any, *args: Any, **kwargs: Any) -> Any:
        return primitive.name == attention.KEPT_BY_CUDNN or named(primitive, *args, **kwargs)

    return with_statistics
