"""What kernels compute under the runner is what Metal's specification says, and what Metal refuses is refused.

Owns SIMD-group functions, types, orders, positions and bytes. Leaves faults to `test_metal_cpu_faults.py`.
"""

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(metal_cpu.unsupported() is not None, reason=str(metal_cpu.unsupported()))

INDICES = "uint i = thread_position_in_grid.x, l = thread_index_in_simdgroup, t = thread_index_in_threadgroup;\n"
FENCE = "threadgroup_barrier(mem_flags::mem_threadgroup);"
LANES = np.arange(32)
X = np.random.default_rng(0).normal(size=32).astype(np.float32)


def run(source, inputs=(), out=(32,), dtype=mx.float32, grid=(32, 1, 1), threadgroup=None, header="", **options):
    """The output of a kernel with inputs named a, b, c as a numpy array."""
    names = list("abc"[: len(inputs)])
    made = {key: options.pop(key) for key in ("atomic_outputs", "ensure_row_contiguous") if key in options}
    kernel = metal_cpu.metal_kernel("language", names, ["out"], source, header, **made)
    (values,) = kernel(
        inputs=[value if isinstance(value, mx.array) else mx.array(value) for value in inputs],
        grid=grid,
        threadgroup=threadgroup or grid,
        output_shapes=[out],
        output_dtypes=[dtype],
        **options,
    )
    return np.array(values.astype(mx.float32) if dtype == mx.bfloat16 else values)


SIMD = {
    "simd_sum(v)": lambda v: v.sum(),
    "simd_product(v)": lambda v: v.prod(),
    "simd_max(v)": lambda v: v.max(),
    "simd_min(v)": lambda v: v.min(),
    "simd_prefix_inclusive_sum(v)": lambda v: v.cumsum(),
    "simd_prefix_exclusive_sum(v)": lambda v: v.cumsum() - v,
    "simd_shuffle(v, (l * 7) % 32)": lambda v: v[LANES * 7 % 32],
    "simd_shuffle_xor(v, 5)": lambda v: v[LANES ^ 5],
    "simd_shuffle_up(v, 3)": lambda v: v[np.where(LANES < 3, LANES, LANES - 3)],
    "simd_shuffle_down(v, 3)": lambda v: v[np.where(LANES > 28, LANES, LANES + 3)],
    "simd_shuffle_rotate_up(v, 4)": lambda v: np.roll(v, 4),
    "simd_shuffle_rotate_down(v, 4)": lambda v: np.roll(v, -4),
    "simd_broadcast(v, 9)": lambda v: v[9],
    "simd_broadcast_first(v)": lambda v: v[0],
    "quad_sum(v)": lambda v: v.reshape(8, 4).sum(1).repeat(4),
    "quad_shuffle_xor(v, 2)": lambda v: v[LANES ^ 2],
    "float(simd_or(1u << l) == ~0u)": lambda v: 1.0,
    "float(popcount(uint(ulong(simd_ballot(v > 0)))))": lambda v: (v > 0).sum(),
    "float(simd_all(v > -100)) + 2 * float(simd_any(v > 100))": lambda v: 1.0,
    "simd_sum(float4(v, 1, 2, v)).w": lambda v: v.sum(),
    "float(simd_sum(half(l)))": lambda v: 496.0,
    "float(simd_shuffle(ulong(l) << 40, 5) >> 40)": lambda v: 5.0,
    "float(simd_shuffle_down(l == 7, 1))": lambda v: LANES == 6,
}


@pytest.mark.parametrize("expression", SIMD)
def test_simdgroup_function(expression):
    out = run(INDICES + f"float v = a[i]; out[i] = {expression};", [X])
    np.testing.assert_allclose(out, np.broadcast_to(SIMD[expression](X), 32), rtol=2e-5, atol=1e-5)


def test_simd_sum_of_a_diverged_branch_covers_its_lanes():
    out = run(INDICES + "float v = 0; if (l < 8) v = simd_sum(1.0f); out[i] = v;")
    assert out.tolist() == [8.0] * 8 + [0.0] * 24


def test_lanes_meet_again_after_a_helper_that_some_call():
    header = "inline float helped(float v) {\n\n\n  return simd_sum(v);\n}"
    out = run(INDICES + "float v = 1; if (l < 8) v = helped(v);\nout[i] = simd_sum(v);", header=header)
    assert out.tolist() == [8.0 * 8 + 24] * 32


def test_vectors():
    source = """
        float4 v = float4(1, 2, 3, 4); half4 h = half4(v); float4 w = float4(h) * v.wzyx; v.xz = float2(7, 8);
        uint2 u = as_type<uint2>(ulong(0x100000002ul)); vec<float, 2> p = vec<float, 2>(3, 4);
        out[0] = w.x; out[1] = v.x + v.z; out[2] = dot(v, w); out[3] = max(v, 5.0f).y; out[4] = u.x + 10 * u.y;
        out[5] = select(v, w, v < w).w; out[6] = all(v > 0.0f); out[7] = clamp(v, 2.0f, 3.0f).x;
        out[8] = static_cast<float4>(h).z; out[9] = length(p); out[10] = float(max(int4(1, 9, 2, 3), 4).x);
        out[11] = float(abs(int2(-3, 2)).x);"""
    expected = [4, 15, 7 * 4 + 2 * 6 + 8 * 6 + 4 * 4, 5, 12, 4, 1, 3, 3, 5, 4, 3]
    assert run(source, out=(12,), grid=(1, 1, 1)).tolist() == expected


def test_half_rounds_after_every_operation():
    a, b, c = np.float16(1.001), np.float16(3.14159), np.float16(-3.1438)
    out = run("half p = a[0] * a[1] + a[2]; out[0] = p;", [np.array([a, b, c] * 3)], (1,), mx.float16, (1, 1, 1))
    assert out[0] == np.float16(a * b) + c


@pytest.mark.parametrize("value", [1.00390625, 1.01171875, -3.3e38, 1e-40, 65504.0])
def test_float_becomes_the_nearest_bfloat(value):
    out = run("out[0] = bfloat(a[0]);", [np.full(9, value, np.float32)], (1,), mx.bfloat16, (1, 1, 1))
    assert out[0] == np.array(mx.array(value, mx.float32).astype(mx.bfloat16).astype(mx.float32))


def test_literals_are_floats():
    assert run("out[0] = a[0] * 0.1 == a[0] * 0.1f;", [np.full(9, 3.3, np.float32)], (1,), grid=(1, 1, 1))[0] == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float", "half", "bfloat"])
def test_matrix_product(dtype):
    a, b = mx.random.normal((8, 8)).astype(dtype), mx.random.normal((8, 16)).astype(dtype)
    source = """simdgroup_matrix<T, 8, 8> x, y; simdgroup_float8x8 z = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
        simdgroup_load(x, a, 8, ulong2(0, 0), true); simdgroup_load(y, b, 16, ulong2(8, 0));
        simdgroup_multiply_accumulate(z, x, y, z); simdgroup_store(z, out, 8);"""
    out = run(source, [a, b], (8, 8), template=[("T", dtype)])
    expected = a.astype(mx.float32).T @ b.astype(mx.float32)[:, 8:] + 1
    np.testing.assert_allclose(out, np.array(expected), rtol=1e-5, atol=1e-5)


def test_matrix_elements_lie_as_on_apple_gpus():
    # What MLX's steel kernels count on: lane l holds row ((l / 4) & 4) + (l / 2) % 4, columns 2 * that of l & 9.
    source = INDICES + "simdgroup_float8x8 m; simdgroup_load(m, a, 8); out[2 * l] = m.thread_elements()[0];\n"
    out = run(source + "out[2 * l + 1] = m.thread_elements()[1];", [np.arange(64, dtype=np.float32)], (32, 2))
    rows, columns = (LANES // 4 & 4) + LANES // 2 % 4, (LANES // 4 & 2) * 2 + LANES % 2 * 2
    assert out.tolist() == np.stack([8 * rows + columns, 8 * rows + columns + 1], 1).tolist()


def test_positions_at_the_edge_of_a_grid():
    source = """uint2 p = thread_position_in_grid.xy; out[p.y * 5 + p.x] = threads_per_threadgroup.x * 100
        + dispatch_threads_per_threadgroup.x * 10 + thread_position_in_threadgroup.x
        + threadgroup_position_in_grid.x * 1000 + threadgroups_per_grid.x * 10000 + threads_per_grid.x * 100000;"""
    out = run(source, out=(2, 5), grid=(5, 2, 1), threadgroup=(3, 2, 1))
    assert out.tolist() == [[520330, 520331, 520332, 521230, 521231]] * 2


def test_constant_tables_overloads_and_methods():
    header = """
        constant float table[4] = {1.5f, 2.5f, 3.5f, 4.5f};
        static constant constexpr int three = 3;
        struct Pair { int a; float b; float product() const thread { return a * b; } };
        inline float pick(const device float* p, uint i) { return p[i]; }
        inline float pick(threadgroup const float* p, uint i) { return 10 * p[i]; }
        inline float pick(constant float* p, uint i) { return 100 * p[i]; }
        template <typename T, int N> struct Sums { T v[N]; Sums() thread { for (int i = 0; i < N; i++) v[i] = T(0); } };
    """
    source = (
        INDICES
        + f"threadgroup float s[32]; s[l] = l; {FENCE}\n"
        + "Pair p{int(l), 2.0f}; Sums<float, 2> sums; sums.v[1] += 3.0f;\n"
        + "auto added = [&](float z) { return z + three; };\n#pragma unroll\nfor (int q = 0; q < 1; q++)\n"
        + "out[i] = pick(a, i) + pick(s, l) + pick(table, l % 4) + p.product() + sums.v[1] + added(0.0f);"
    )
    expected = X + 10 * LANES + 100 * (1.5 + LANES % 4) + 2 * LANES + 3 + 3
    np.testing.assert_allclose(run(source, [X], header=header), expected, rtol=1e-6)


def test_threadgroup_values_stay_in_memory_across_barriers():
    source = INDICES + f"threadgroup float s; for (uint j = 0; j < 5; j++) {{ if (l == j) s = j; {FENCE}\n"
    out = run(source + f"out[j * 32 + i] = s; {FENCE} }}", out=(5, 32))
    assert (out == np.arange(5)[:, None]).all()


def test_atomics():
    source = INDICES + "atomic_fetch_add_explicit(&out[i % 4], a[i], memory_order_relaxed);"
    options = {"atomic_outputs": True, "init_value": 0}
    out = run(source, [np.ones(1000, np.int32)], (4,), mx.int32, (1000, 1, 1), (64, 1, 1), **options)
    assert out.tolist() == [250] * 4
    source = (
        INDICES
        + """threadgroup atomic_uint most;
        if (t == 0) atomic_store_explicit(&most, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_max_explicit(&most, (i * 7) % 61, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = float(atomic_load_explicit(&most, memory_order_relaxed));"""
    )
    assert run(source, out=(64,), grid=(64, 1, 1)).tolist() == [60.0] * 64


def test_strided_input_keeps_its_strides():
    a = mx.arange(24.0).reshape(4, 6)[:, ::2].T
    source = "uint i = thread_position_in_grid.x; out[i] = a[elem_to_loc(i, a_shape, a_strides, a_ndim)];"
    with metal_cpu.session() as session:
        out = run(source, [a], (12,), grid=(12, 1, 1), ensure_row_contiguous=False)
    assert out.tolist() == np.array(a).reshape(-1).tolist()
    assert list(session.last.buffers) == ["a", "out"] and session.last.buffers["a"].size > 12 * 4


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_results_do_not_depend_on_the_order(order):
    v = np.random.default_rng(1).normal(size=256).astype(np.float32)
    source = INDICES + "threadgroup float s[4]; float sum = simd_sum(a[i]); if (l == 0) s[t / 32] = sum;\n"
    with metal_cpu.session(order=order, seed=7):
        out = run(
            source + FENCE + " out[i] = s[0] + s[1] + s[2] + s[3];",
            [v],
            (256,),
            grid=(256, 1, 1),
            threadgroup=(128, 1, 1),
        )
    np.testing.assert_allclose(out, v.reshape(2, 128).sum(1).repeat(128), rtol=1e-4)


def test_bytes_are_counted_in_all_and_once():
    source = INDICES + "float s = 0; for (int j = 0; j < 4; j++) s += a[(i % 8) * 4 + j]; out[i] = s + b[0];"
    with metal_cpu.session() as session:
        run(source, [np.zeros(64, np.float32), np.zeros(16, np.uint8)])
    a, b, out = (session.last.buffers[name] for name in ("a", "b", "out"))
    assert (a.size, a.read, a.read_unique, a.written) == (256, 32 * 4 * 4, 8 * 4 * 4, 0)
    assert (b.read, b.read_unique) == (32, 1)
    assert (out.written, out.written_unique, out.read, out.unwritten) == (128, 128, 0, 0)


def test_unchecked_runs_give_the_same_values():
    with metal_cpu.session(checks=False) as session:
        out = run(INDICES + f"threadgroup float s[32]; s[l] = a[i]; {FENCE} out[i] = s[31 - l];", [X])
    assert out.tolist() == X[::-1].tolist() and session.last.counts["accesses"] == 0


REFUSED = {
    "device_pointer_to_threadgroup": (
        "__local|__global",
        "threadgroup float s[32]; device float* p = s; out[i] = p[0];",
    ),
    "cast_across_spaces": (
        "address space",
        "threadgroup float s[32]; device float* p = (device float*)s; out[i] = p[0];",
    ),
    "argument_of_another_space": ("no matching function", "threadgroup float s[32]; s[l] = 0; out[i] = of_device(s);"),
    "write_to_constant": ("read-only|const", "b[0] = 1; out[i] = 1;"),
    "pointer_without_space": ("'p' of type 'float", "float s[2] = {1, 2}; float* p = s; out[i] = p[0];"),
    "reference_without_space": ("'v' of type 'const float &'", "out[i] = unqualified(a[i]);"),
    "float_becomes_bfloat": ("bfloat", "bfloat b = a[i]; out[i] = float(b);"),
    "double": ("double", "double d = 1; out[i] = d;"),
    "vectors_of_two_types": ("error", "float4 v = float4(1); half4 h = half4(1); out[i] = (v * h).x;"),
    "too_few_components": ("wrong number", "float4 v = float4(1, 2); out[i] = v.x;"),
    "float_atomic_max": (
        "float atomics",
        "atomic_fetch_max_explicit((device atomic<float>*)out, 1.0f, memory_order_relaxed);",
    ),
    "simd_sum_of_64_bits": ("8, 16 or 32 bits", "out[i] = simd_sum(long(1));"),
    "unknown_function": ("undeclared", "out[i] = erf(1.0f);"),
    "uninitialised_local": ("uninitialized", "float v; out[i] = v;"),
    "sometimes_uninitialised_local": (
        "uninitialized",
        "float v; if (l < 16) v = 1; else if (l < 31) v = 2; out[i] = v;",
    ),
    "new": ("has_no_new", "thread int* p = new int; out[i] = *p;"),
    "much_private_memory": (
        "stack frame size",
        "float v[9000]; for (int j = 0; j < 9000; j++) v[j] = a[j % 32]; out[i] = v[l];",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_metal_refuses_is_refused(name):
    message, source = REFUSED[name]
    header = "inline float of_device(const device float* p) { return p[0]; }\n"
    if name == "reference_without_space":
        header += "inline float unqualified(const float& v) { return v; }\n"
    with pytest.raises(metal_cpu.CompileError, match=message):
        run(INDICES + source, [X, np.zeros(3, np.float32)], header=header)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="takes 1"):
        metal_cpu.metal_kernel("one", [], ["out"], "out[0] = 1;")(
            inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,), (1,)], output_dtypes=[mx.float32]
        )
    with pytest.raises(ValueError, match="forward, reverse, random"), metal_cpu.session(order="sideways"):
        pass
