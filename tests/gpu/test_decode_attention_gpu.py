"""The compiled attention kernel of decoding against its reference, on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention as op

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "batch, heads, group, slots, width",
    [(1, 8, 4, 512, 128), (3, 3, 3, 256, 64), (40, 8, 4, 128, 128), (2, 2, 7, 2048, 256)],
)
def test_the_compiled_kernel_equals_the_reference(batch, heads, group, slots, width, dtype, window):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), dtype)
    args = (draw(batch, heads * group, width), draw(batch, heads, width), draw(batch, heads, width))
    args += (draw(batch, heads, slots, width), draw(batch, heads, slots, width))
    used = jnp.asarray(np.resize([slots - 1, 0, 63, 64, 17], batch), jnp.int32)
    assert op.supports(args[0], *args[3:5]) is None
    both = [
        jax.jit(partial(op.attend, scale=width**-0.5, window=window, implementation=name))
        for name in ("pallas", "xla")
    ]
    got, want = (fn(*args, used) for fn in both)
    error = np.abs(np.asarray(got[0], np.float32) - np.asarray(want[0], np.float32)).max()
    assert error <= 2e-2 * np.abs(np.asarray(want[0], np.float32)).max()
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
