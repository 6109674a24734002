"""The C extension of `hpc_bnn.noise`; all else stands in setup.cfg. Without a C compiler the package goes without it."""

import sysconfig

from setuptools import Extension, setup

abi3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a Python without the lock has no stable ABI yet
native = Extension(
    "hpc_bnn.noise._native",
    ["hpc_bnn/noise/native.c"],
    # The numbers must have the same bits everywhere: whatever CFLAGS say, no product is rounded together with a sum
    extra_compile_args=["-O3", "-std=gnu11", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
    extra_link_args=["-pthread"],
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if abi3 else [],
    py_limited_api=abi3,
    optional=True,
)
setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp310"}} if abi3 else {})
