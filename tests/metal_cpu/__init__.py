"""Runs Metal kernels on a CPU and reports what they do wrong. For tests; README.md describes it.

source = "uint i = thread_position_in_grid.x; out[i] = 2 * x[i];"
double = metal_cpu.metal_kernel("double", ["x"], ["out"], source)
with metal_cpu.session(order="reverse") as session:
    (y,) = double(
        inputs=[x], grid=(64, 1, 1), threadgroup=(32, 1, 1), output_shapes=[x.shape], output_dtypes=[x.dtype]
    )
session.last.buffers["x"].read_unique
"""

from .compile import unsupported
from .faults import KINDS, CompileError, Fault, KernelFault, Report, Traffic
from .kernel import Session, metal_kernel, session

__all__ = [
    "KINDS",
    "CompileError",
    "Fault",
    "KernelFault",
    "Report",
    "Session",
    "Traffic",
    "metal_kernel",
    "session",
    "unsupported",
]
