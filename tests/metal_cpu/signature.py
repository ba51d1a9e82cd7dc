"""The text that MLX writes around a kernel's body, character by character.

Follows write_signature and metal_kernel of mlx/backend/common/metal_kernel.cpp; tests compare it with what the
installed MLX prints. Leaves what that text means on a CPU to `compile.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .arrays import metal_type

CONSTANT_BELOW = 8  # inputs of fewer elements come in the constant address space

# In the order of MLX, with the expression that yields each from the entry point's `const metal_cpu_thread* t`.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", "t->dispatched_simdgroups * 8"),
    "dispatch_simdgroups_per_threadgroup": ("uint", "t->dispatched_simdgroups"),
    "dispatch_threads_per_threadgroup": ("uint3", "t->dispatched"),
    "grid_origin": ("uint3", None),
    "grid_size": ("uint3", "t->grid"),
    "quadgroup_index_in_threadgroup": ("uint", "t->index / 4"),
    "quadgroups_per_threadgroup": ("uint", "t->simdgroups * 8"),
    "simdgroup_index_in_threadgroup": ("uint", "t->simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "t->simdgroups"),
    "thread_execution_width": ("uint", "32u"),
    "thread_index_in_quadgroup": ("uint", "t->lane % 4"),
    "thread_index_in_simdgroup": ("uint", "t->lane"),
    "thread_index_in_threadgroup": ("uint", "t->index"),
    "thread_position_in_grid": ("uint3", "t->position_in_grid"),
    "thread_position_in_threadgroup": ("uint3", "t->position_in_threadgroup"),
    "threadgroup_position_in_grid": ("uint3", "t->threadgroup_in_grid"),
    "threadgroups_per_grid": ("uint3", "t->threadgroups"),
    "threads_per_grid": ("uint3", "t->grid"),
    "threads_per_simdgroup": ("uint", "32u"),
    "threads_per_threadgroup": ("uint3", "t->threads"),
}
EXTRAS = ("shape", "strides", "ndim")  # of an input, passed where the body names them

Template = Sequence[tuple[str, "mx.Dtype | int | bool"]]


@dataclass(frozen=True)
class Parameter:
    """One buffer. type: of an element, with its address space; reference: passed as one element, not as a pointer."""

    name: str
    type: str
    reference: bool = False

    @property
    def declaration(self) -> str:
        return f"  {self.type}{'&' if self.reference else '*'} {self.name}"


@dataclass(frozen=True)
class Signature:
    """header + template + declaration + body + "}": in parts, because a compiler wants line numbers between them."""

    function: str
    arguments: str  # of the template, "<float, 3>", or empty
    header: str
    template: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]
    body: str

    @property
    def declaration(self) -> str:
        lines = [f"{parameter.declaration} [[buffer({i})]]" for i, parameter in enumerate(self.parameters)]
        lines += [f"  {ATTRIBUTES[name][0]} {name} [[{name}]]" for name in self.attributes]
        return f"{self.template}[[kernel]] void {self.function}(\n" + ",\n".join(lines) + ") {\n"

    @property
    def text(self) -> str:
        """What mx.fast.metal_kernel compiles and, with verbose=True, prints."""
        text = f"{self.header}{self.declaration}{self.body}\n}}\n"
        if self.arguments:
            instance = f"{self.function}{self.arguments}"
            text += f'\ntemplate [[host_name("{self.function}")]] [[kernel]] decltype({instance}) {instance};\n'
        return text


def extras_named(name: str, body: str) -> tuple[str, ...]:
    """Which of an input's shape, strides and ndim the body mentions."""
    return tuple(extra for extra in EXTRAS if f"{name}_{extra}" in body)


def signature(
    name: str,
    inputs: Sequence[tuple[str, str, tuple[int, ...], int]],
    outputs: Sequence[tuple[str, str]],
    body: str,
    header: str,
    template: Template,
    atomic_outputs: bool,
) -> Signature:
    """inputs: (name, Metal type, shape, elements); outputs: (name, Metal type); template: as given to the kernel."""
    values = [metal_type(value) if isinstance(value, mx.Dtype) else str(int(value)) for _, value in template]
    function = "_".join([f"custom_kernel_{name}", *(["_" + "_".join(values)] if values else [])])
    parameters = []
    for label, kind, shape, size in inputs:
        space = "constant" if size < CONSTANT_BELOW else "device"
        parameters.append(Parameter(label, f"const {space} {kind}", reference=not shape))
        types = {"shape": "const constant int", "strides": "const constant int64_t", "ndim": "const constant int"}
        for extra in extras_named(label, body) if shape else ():
            parameters.append(Parameter(f"{label}_{extra}", types[extra], reference=extra == "ndim"))
        function += f"_{kind}" + ("s" if not shape else "c" if size < CONSTANT_BELOW else "")
    for label, kind in outputs:
        parameters.append(Parameter(label, f"device atomic<{kind}>" if atomic_outputs else f"device {kind}"))
        function += f"_{kind}"
    kinds = [
        f"{'bool' if isinstance(value, bool) else 'int' if isinstance(value, int) else 'typename'} {label}"
        for label, value in template
    ]
    return Signature(
        function,
        f"<{', '.join(values)}>" if values else "",
        header,
        f"template <{', '.join(kinds)}>\n" if kinds else "",
        tuple(parameters),
        tuple(attribute for attribute in ATTRIBUTES if attribute in body),
        body,
    )
