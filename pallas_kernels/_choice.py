"""Which implementation of an operation runs: decided from shapes, dtypes and platform alone."""

import contextlib
import contextvars
import functools
import math
import sys
from collections.abc import Iterator, Mapping

import jax

HERE = "this GPU"  # in every reason that lies in the device, not in what an operation is given

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_interpret: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)


def platform() -> str:
    """The platform that traced code is for: "gpu" or "cpu" (any other is taken for "cpu")."""
    if _platform.get() is not None:
        return _platform.get()
    # Set by `jax.default_device`, to a device or a platform's name.
    device = jax.config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "gpu" if name in ("gpu", "cuda") else "cpu"


def capability() -> float:
    """Compute capability of the first GPU; infinite where there is none to ask."""
    found = getattr(jax.devices()[0], "compute_capability", None)
    return math.inf if found is None else float(found)


def older(oldest: float) -> str | None:
    """That the GPU's compute capability is below `oldest`, or None."""
    found = capability()
    return f"it needs compute capability {oldest}, {HERE} has {found}" if found < oldest else None


def interpreting() -> bool:
    """Whether Pallas kernels run in interpret mode."""
    return _interpret.get()


@contextlib.contextmanager
def target(name: str, interpret: bool = False) -> Iterator[None]:
    """Code traced inside is for platform `name`, e.g. to lower for a GPU on a machine without.

    `interpret` lets its Pallas kernels run anywhere. jit's cache doesn't see either: trace
    functions of your own inside.
    """
    tokens = _platform.set(name), _interpret.set(interpret)
    try:
        yield
    finally:
        _platform.reset(tokens[0])
        _interpret.reset(tokens[1])


def pick(operation: str, implementation: str | None, reasons: Mapping[str, str | None]) -> str:
    """The implementation asked for, or the first whose reason against it is None.

    `reasons` lists implementations best first; one that this GPU rules out is said once. Raises
    ValueError with the reason where the one asked for can't run, and for an unknown name.
    """
    if implementation is None:
        chosen = next(name for name, reason in reasons.items() if reason is None)
        for name, reason in reasons.items():
            if reason is not None and HERE in reason:
                _say(f"{operation}: {chosen!r} runs instead of {name!r}: {reason}")
        return chosen
    if implementation not in reasons:
        raise ValueError(f"{operation} has no {implementation!r}; known: {list(reasons)}")
    if reasons[implementation] is not None:
        raise ValueError(f"{operation}: {implementation!r} can't run: {reasons[implementation]}")
    return implementation


@functools.cache
def _say(line: str) -> None:
    print(f"unsloth_jax: {line}", file=sys.stderr, flush=True)
