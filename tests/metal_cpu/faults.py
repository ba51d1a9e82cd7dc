"""What a launch reports: faults with the kernel's line, bytes per buffer, counts.

Owns the records and the two exceptions. Leaves how faults are found to `runtime/`, and their lines to `lines.py`.
"""

from dataclasses import dataclass, field

KINDS = {
    "out-of-bounds": "device, threadgroup or private memory beyond its end or before its start",
    "uninitialised": "a read of threadgroup memory or of an output that nobody has written",
    "race": "two accesses by different threads, one of them a write, without a barrier or fence between",
    "divergence": "a barrier that not all threads reach",
    "simd": "a SIMD-group function that reads an inactive lane, a lane that does not exist, or needs all lanes",
    "misaligned": "an access at an address that is no multiple of what its type promises",
    "read-only": "a write to an input",
    "undefined": "signed overflow, integer division by zero, a float that its integer type cannot hold",
    "limit": "more threadgroup memory than Metal has, or more private memory than this runner gives",
    "hang": "the launch took longer than its time limit",
    "crash": "a signal that none of the checks foresaw",
}


@dataclass(frozen=True)
class Fault:
    """One finding. kind: a key of KINDS, or "same-value". where: "name.metal:12", "header:3", or "?"."""

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.where}: {self.message}"


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer. `read` counts every thread's loads; `read_unique` each byte once, however often read."""

    size: int
    read: int
    read_unique: int
    written: int
    written_unique: int
    unwritten: int


@dataclass(frozen=True)
class Report:
    """What one launch did.

    errors: findings that raise `KernelFault`. notes: stores of one value by several unordered threads, which is
    harmless. buffers: by the kernel's own names, inputs and outputs. seconds: of the run, without compiling.
    """

    name: str
    errors: list[Fault]
    notes: list[Fault]
    counts: dict[str, int]
    buffers: dict[str, Traffic]
    seconds: float = field(compare=False)

    @property
    def unwritten(self) -> int:
        """Bytes of outputs that nobody wrote."""
        return sum(traffic.unwritten for traffic in self.buffers.values())


class CompileError(RuntimeError):
    """The source does not compile, here or, as far as the rules are known, with Metal."""


class KernelFault(RuntimeError):
    """A launch broke a rule; `report` has all of it."""

    def __init__(self, report: Report) -> None:
        self.report = report
        shown = [str(fault) for fault in report.errors[:4]]
        if len(report.errors) > len(shown):
            shown.append(f"and {len(report.errors) - len(shown)} more")
        super().__init__(f"{report.name}: " + "; ".join(shown))
