"""The runner finds what it promises to find, at the line where it is, and nothing in the same kernel done right.

Owns one planted fault per entry of FAULTS. Leaves what kernels compute to `test_metal_cpu_language.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import metal_cpu
import mlx.core as mx
import pytest

pytestmark = pytest.mark.skipif(metal_cpu.unsupported() is not None, reason=str(metal_cpu.unsupported()))

INDICES = "uint i = thread_position_in_grid.x, l = thread_index_in_simdgroup, t = thread_index_in_threadgroup;\n"
FENCE = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LOADED = INDICES + "threadgroup float a[64]; a[t] = 0; " + FENCE + " a[t] = float(t);\n"  # line 2


@dataclass
class Case:
    """`source` with FAULT in the place of the @: the fault is at `line`; with CLEAN there is none."""

    name: str
    kind: str
    line: int | None
    source: str
    fault: str
    clean: str
    x: mx.array | None = None
    run: dict[str, Any] = field(default_factory=dict)


def run(
    source: str,
    x: mx.array | None = None,
    threads: int = 32,
    threadgroup: int | None = None,
    out: int | None = None,
    **options: Any,
) -> tuple[mx.array, metal_cpu.Report]:
    """Launches `source` over `threads` threads with one input `x` and one output of `out` floats (one per thread)."""
    with metal_cpu.session(**{k: options.pop(k) for k in ("order", "seed", "time_limit") if k in options}) as session:
        inputs = mx.zeros((32,)) if x is None else x
        kernel = metal_cpu.metal_kernel("planted", ["x"], ["out"], source)
        (values,) = kernel(
            inputs=[inputs],
            grid=(threads, 1, 1),
            threadgroup=(threadgroup or threads, 1, 1),
            output_shapes=[(threads if out is None else out,)],
            output_dtypes=[mx.float32],
            **options,
        )
    return values, session.last


WIDE = {"threads": 64}
FAULTS = [
    # Memory that is not there.
    Case("device_read_past_the_end", "out-of-bounds", 2, INDICES + "out[i] = x[@];", "i + 1", "i"),
    Case("device_read_before_the_start", "out-of-bounds", 2, INDICES + "out[i] = x[@];", "int(i) - 1", "int(i)"),
    Case("device_read_far_away", "out-of-bounds", 2, INDICES + "out[i] = x[@];", "i + 100000000", "i"),
    Case("device_write_past_the_end", "out-of-bounds", 3, INDICES + "\nout[@] = 1;", "i + 1", "i"),
    Case(
        "vector_read_over_the_tail",
        "out-of-bounds",
        2,
        INDICES + "out[i] = (*(const device float4*)(x + 4 * @)).w;",
        "l",
        "(l % 31)",
        mx.zeros((126,)),
    ),
    Case(
        "matrix_load_over_the_tail",
        "out-of-bounds",
        3,
        INDICES + "simdgroup_float8x8 m;\nsimdgroup_load(m, x, @);\nsimdgroup_store(m, out, 8);",
        "9",
        "8",
        mx.zeros((64,)),
        {"out": 64},
    ),
    Case(
        "threadgroup_through_a_pointer",
        "out-of-bounds",
        3,
        INDICES + "threadgroup float a[32], b[32]; b[l] = 0; threadgroup float* p = a;\np[@] = 1;\nout[i] = b[l];",
        "l + 1",
        "l",
    ),
    Case(
        "threadgroup_by_index",
        "out-of-bounds",
        3,
        INDICES + "threadgroup float a[32];\na[@] = 1;\nout[i] = 1;",
        "l + 1",
        "l",
    ),
    Case("private_by_index", "out-of-bounds", 3, INDICES + "float a[4] = {};\na[l % @] = 1;\nout[i] = a[0];", "5", "4"),
    Case(
        "private_through_a_pointer",
        "out-of-bounds",
        3,
        INDICES + "float a[4] = {}; thread float* p = a;\np[l % @] = 1;\nout[i] = a[l % 4];",
        "5",
        "4",
    ),
    Case(
        "endless_run_over_the_output",
        "out-of-bounds",
        2,
        INDICES + "for (uint j = 0; @; j++) out[j] = 1;",
        "true",
        "j < 1",
        run={"threads": 1},
    ),
    Case("write_to_an_input", "read-only", 2, INDICES + "@ = 1; out[i] = 1;", "((device float*)x)[l]", "out[l]"),
    # Memory that holds nothing.
    Case(
        "uninitialised_threadgroup",
        "uninitialised",
        3,
        INDICES + "threadgroup float a[32]; if (l < @) a[l] = 1; " + FENCE + "\nout[i] = a[31 - l];",
        "31",
        "32",
    ),
    Case(
        "threadgroup_memory_of_the_previous_threadgroup",
        "uninitialised",
        3,
        INDICES + "threadgroup float a[32]; if (@) a[l] = 1; " + FENCE + "\nout[i] = a[31 - l];",
        "i < 32",
        "i < 64",
        run={"threads": 64, "threadgroup": 32},
    ),
    Case("output_read_before_written", "uninitialised", 2, INDICES + "out[i] = @ + 1;", "out[i]", "x[i]"),
    # Races.
    Case("no_barrier", "race", 4, LOADED + "@\nout[i] = a[63 - t];", "", FENCE, run=WIDE),
    Case(
        "barrier_of_the_other_memory",
        "race",
        4,
        LOADED + "threadgroup_barrier(mem_flags::@);\nout[i] = a[63 - t];",
        "mem_device",
        "mem_threadgroup",
        run=WIDE,
    ),
    Case(
        "barrier_of_no_memory",
        "race",
        4,
        LOADED + "threadgroup_barrier(mem_flags::@);\nout[i] = a[63 - t];",
        "mem_none",
        "mem_threadgroup",
        run=WIDE,
    ),
    Case(
        "simdgroup_barrier_between_simdgroups",
        "race",
        4,
        LOADED + "@(mem_flags::mem_threadgroup);\nout[i] = a[63 - t];",
        "simdgroup_barrier",
        "threadgroup_barrier",
        run=WIDE,
    ),
    Case("lanes_of_one_simdgroup", "race", 4, LOADED + "@\nout[i] = a[t ^ 1];", "", FENCE.replace("thread", "simd", 1)),
    Case(
        "write_after_read",
        "race",
        4,
        LOADED + FENCE + " float v = a[63 - t]; @\na[t] = v; " + FENCE + " out[i] = a[t];",
        "",
        FENCE,
        run=WIDE,
    ),
    Case(
        "write_after_read_by_several_groups",
        "race",
        4,
        LOADED + FENCE + " float v = a[0]; @\nif (t == 63) a[0] = 1; " + FENCE + " out[i] = v;",
        "",
        FENCE,
        run=WIDE,
    ),
    Case(
        "matrix_store_read_without_barrier",
        "race",
        3,
        INDICES
        + "threadgroup float a[64]; a[l] = a[l + 32] = 0; "
        + "simdgroup_barrier(mem_flags::mem_threadgroup); simdgroup_float8x8 m(1.0f); simdgroup_store(m, a, 8); @\n"
        + "out[i] = a[63 - l];",
        "",
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    Case(
        "device_between_threads",
        "race",
        3,
        INDICES + "out[t] = x[i]; @\nout[t + 64] = out[63 - t];",
        FENCE,
        "threadgroup_barrier(mem_flags::mem_device);",
        mx.arange(64.0),
        {"threads": 64, "out": 128},
    ),
    Case(
        "between_threadgroups",
        "race",
        2,
        INDICES + "out[i % @] = float(i);",
        "8",
        "64",
        run={"threads": 64, "threadgroup": 32},
    ),
    Case(
        "reader_in_another_threadgroup",
        "race",
        2,
        INDICES + "if (i < 32) out[i] = 1; else out[i] = @ + 1;",
        "out[i - 32]",
        "x[i - 32]",
        run={"threads": 64, "threadgroup": 32, "init_value": 0},
    ),
    Case(
        "increment_without_atomic",
        "race",
        2,
        INDICES + "@",
        "out[0] += 1;",
        "atomic_fetch_add_explicit((device atomic<float>*)out, 1.0f, memory_order_relaxed);",
        run={"out": 1, "init_value": 0},
    ),
    Case(
        "bytes_of_one_word",
        "race",
        2,
        INDICES + "((device uchar*)out)[@] = uchar(l);",
        "4 * i / 8",
        "i",
        run={"out": 32},
    ),
    # Barriers that not all reach.
    Case(
        "barrier_in_a_branch",
        "divergence",
        2,
        INDICES + "if (l < @) { " + FENCE + " } out[i] = 1;",
        "16",
        "32",
    ),
    Case(
        "two_barriers_in_two_branches",
        "divergence",
        2,
        INDICES + "if (l < @) { " + FENCE + " out[i] = 1; }\nelse { " + FENCE + " out[i] = 2; }",
        "16",
        "32",
    ),
    Case(
        "return_before_a_barrier",
        "divergence",
        3,
        INDICES + "if (i >= @) return;\n" + FENCE + " out[i] = 1;",
        "20",
        "32",
    ),
    Case(
        "simdgroup_barrier_in_a_branch",
        "divergence",
        2,
        INDICES + "if (l < @) { simdgroup_barrier(mem_flags::mem_threadgroup); } out[i] = 1;",
        "16",
        "32",
    ),
    # SIMD-group functions.
    Case(
        "shuffle_from_an_inactive_lane",
        "simd",
        2,
        INDICES + "if (i < @) out[i] = simd_shuffle_xor(x[i], 1); else out[i] = 1;",
        "19",
        "20",
    ),
    Case("shuffle_from_lane_32", "simd", 2, INDICES + "out[i] = simd_shuffle(x[i], l + @);", "1", "0"),
    Case("broadcast_of_many_lanes", "simd", 2, INDICES + "out[i] = simd_broadcast(x[i], @);", "l", "3"),
    Case(
        "matrix_product_with_lanes_missing",
        "simd",
        4,
        INDICES + "if (l >= @) return;\nsimdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);\n"
        "simdgroup_multiply(m, m, m); out[i] = m.thread_elements()[0];",
        "31",
        "32",
    ),
    # Alignment, arithmetic, limits.
    Case(
        "misaligned_vector",
        "misaligned",
        2,
        INDICES + "out[i] = (*(const device float4*)(x + @ * l)).w;",
        "1",
        "4",
        mx.zeros((128,)),
    ),
    Case("integer_division_by_zero", "undefined", 2, INDICES + "out[i] = float(int(i) / int(x[i] + @));", "0", "1"),
    Case(
        "signed_overflow",
        "undefined",
        2,
        INDICES + "out[i] = float((INT_MAX - 40 + int(x[i])) @ int(i));",
        "+ 20 +",
        "+ 0 +",
    ),
    Case("float_beyond_its_integer", "undefined", 2, INDICES + "out[i] = float(int(x[i] + @));", "1e10f", "1e9f"),
    Case(
        "threadgroup_memory_over_32_KB",
        "limit",
        2,
        INDICES + "threadgroup float a[@];\na[l] = 1; out[i] = a[l];",
        "8193",
        "8192",
    ),
    Case(
        "hang",
        "hang",
        None,
        INDICES + "volatile int go = @; while (go) {}\nout[i] = 1;",
        "1",
        "0",
        run={"time_limit": 1},
    ),
]


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_planted_fault_is_found_where_it_is(case):
    with pytest.raises(metal_cpu.KernelFault) as raised:
        run(case.source.replace("@", case.fault), case.x, **case.run)
    errors = raised.value.report.errors
    assert {error.kind for error in errors} == {case.kind}
    if case.line:
        assert f"planted.metal:{case.line}" in {error.where for error in errors}
    assert case.kind in metal_cpu.KINDS and f"[{case.kind}]" in str(raised.value)


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_the_same_kernel_done_right_reports_nothing(case):
    _, report = run(case.source.replace("@", case.clean), case.x, **case.run)
    assert report.errors == [] and report.notes == []


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize(
    "name", ["no_barrier", "write_after_read", "between_threadgroups", "shuffle_from_an_inactive_lane"]
)
def test_faults_do_not_depend_on_the_order(name, order):
    (case,) = [case for case in FAULTS if case.name == name]
    with pytest.raises(metal_cpu.KernelFault) as raised:
        run(case.source.replace("@", case.fault), case.x, order=order, seed=5, **case.run)
    assert {error.kind for error in raised.value.report.errors} == {case.kind}


def test_every_kind_of_fault_has_a_planted_one():
    # A crash is what the checks did not foresee, so there is none to plant.
    assert {case.kind for case in FAULTS} == set(metal_cpu.KINDS) - {"crash"}


def test_a_race_names_both_lines():
    with pytest.raises(metal_cpu.KernelFault, match=r"planted.metal:4.*after a write by thread.*at planted.metal:2"):
        run(LOADED + "\nout[i] = a[63 - t];", threads=64)


def test_unwritten_output_is_counted():
    _, report = run(INDICES + "if (l < 30) out[i] = 1;")
    assert report.unwritten == 8 and report.buffers["out"].unwritten == 8


def test_one_value_stored_by_many_is_a_note():
    _, report = run(INDICES + "out[0] = 5;", out=1)
    assert report.errors == [] and [note.kind for note in report.notes] == ["same-value"]


def test_fault_in_a_helper_names_the_header():
    kernel = metal_cpu.metal_kernel(
        "helped",
        ["x"],
        ["out"],
        "out[0] = second(x);",
        header="\ninline float second(const constant float* p) {\n  return p[1];\n}",
    )
    with pytest.raises(metal_cpu.KernelFault) as raised:
        kernel(
            inputs=[mx.zeros((1, 1)).reshape(1)],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
        )
    assert [error.where for error in raised.value.report.errors] == ["header:3"]


def test_too_many_threads_and_empty_grids_are_refused():
    with pytest.raises(ValueError, match="2048 threads"):
        run(INDICES + "out[i] = 1;", threads=2048)
    with pytest.raises(ValueError, match="grid"):
        run(INDICES + "out[i] = 1;", threads=0, threadgroup=32)


def test_a_faulty_launch_leaves_the_next_one_unharmed():
    for _ in range(2):
        with pytest.raises(metal_cpu.KernelFault):
            run(INDICES + "out[i] = x[i + 1];")
        values, report = run(INDICES + "out[i] = x[i] + 1;")
        assert report.errors == [] and values.tolist() == [1.0] * 32
