"""Looking into traced and compiled programs."""

import re
from collections.abc import Iterator

from jax.extend.core import jaxprs_in_params


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def made(closed) -> list[tuple[str, tuple[int, ...], str]]:
    """(primitive, shape, dtype) of every array that a traced program makes."""
    return [
        (eqn.primitive.name, var.aval.shape, var.aval.dtype.name)
        for eqn in equations(closed.jaxpr)
        for var in eqn.outvars
        if hasattr(var.aval, "shape")
    ]


RESULT = re.compile(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")


def compiled(text: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(operation, shape, dtype as HLO spells it) of every array in a compiled program's text."""
    return [
        (op, tuple(int(n) for n in dims.split(",") if n), dtype)
        for dtype, dims, op in RESULT.findall(text)
    ]
