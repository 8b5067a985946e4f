"""A compiled Triton kernel as a call that XLA may record into a command buffer (CUDA graph).

`jax_triton.triton_call` (0.3) lowers to the older kind of custom call, which XLA launches from the
host each time; jaxlib takes the same description by `triton_kernel_call_ffi` as well.
"""

import zlib

import jax

TARGET = "triton_kernel_call_ffi"


def call(
    args,
    kernel,
    out: jax.ShapeDtypeStruct,
    grid,
    warps: int,
    stages: int,
    constants: dict,
    registers: int = 0,
):
    """The kernel's output; args are arrays and ints, in the order of its parameters, out last.

    `registers` is the most that a thread may have. It has to be one of `constants` too, since
    jax_triton keeps compiled kernels by those.
    """
    from jax._src.lib import gpu_triton
    from jax_triton import triton_lib

    def backend(device, capability):
        made = triton_lib.get_cuda_backend(device, capability)
        parse = made.parse_options
        if registers:
            made.parse_options = lambda options: parse({**options, "maxnreg": registers})
        return made

    arrays = [arg for arg in args if not isinstance(arg, int)]
    avals = [arg if isinstance(arg, int) else jax.core.ShapedArray(arg.shape, arg.dtype)
             for arg in (*args, out)]  # fmt: skip
    kinds = [triton_lib.get_triton_type(aval) for aval in avals]
    scalars = [(i, kinds[i], aval) for i, aval in enumerate(avals) if isinstance(aval, int)]
    made, attributes = triton_lib.get_or_create_triton_kernel(
        backend, "cuda", kernel, kinds, scalars,
        num_warps=warps, num_stages=stages, num_ctas=1, compute_capability=None,
        enable_fp_fusion=True, metaparams=constants, dump=False,
    )  # fmt: skip
    parameters = []
    for i, (aval, kind) in enumerate(zip(avals, kinds, strict=True)):
        if not isinstance(aval, int):
            aligned = ["tt.divisibility", 16] in attributes[(i,)]
            parameters.append(gpu_triton.create_array_parameter(0, 16 if aligned else 0))
        elif aval != 1:  # a 1 is compiled in
            parameters.append(gpu_triton.create_scalar_parameter(aval, kind))
    sizes = (*grid, 1, 1)[:3]
    described = gpu_triton.TritonKernelCall(made, *sizes, parameters)
    name = kernel.fn.__name__
    opaque = zlib.compress(described.to_proto(name, b""))
    return jax.ffi.ffi_call(TARGET, out)(*arrays, opaque=opaque)
