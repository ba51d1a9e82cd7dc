"""The runner against MLX itself: the source text that MLX generates, and the kernels of its documentation.

The kernels are those of https://ml-explore.github.io/mlx/build/html/dev/custom_metal_kernels.html.
"""

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from metal_cpu.signature import ATTRIBUTES

pytestmark = pytest.mark.skipif(metal_cpu.unsupported() is not None, reason=str(metal_cpu.unsupported()))

TEXTS = {
    "plain": {"source": "uint i = thread_position_in_grid.x; out[i] = x[i] + y[i % 3] + z;"},
    "shapes_and_strides": {
        "source": "out[thread_position_in_grid.x] = x_shape[0] + y_strides[0] + x_ndim; // z_ndim: a scalar has none"
    },
    "every_attribute": {"source": "; ".join(ATTRIBUTES) + "; out[0] = 1;"},
    "header": {
        "source": "out[thread_position_in_grid.x] = one(x[0]);",
        "header": "inline float one(float v) { return 1; }\n",
    },
    "atomic_outputs": {
        "source": "atomic_fetch_add_explicit(&out[thread_position_in_grid.x], 1.0f, memory_order_relaxed);",
        "atomic_outputs": True,
    },
    "template": {
        "source": "uint i = thread_position_in_grid.x; out[i] = float(T(x[i])) + N + (B ? 1 : 0);",
        "template": [("T", mx.bfloat16), ("N", 3), ("B", True)],
    },
}


@pytest.mark.parametrize("name", TEXTS)
def test_generated_source_is_what_mlx_generates(name, capfd, tmp_path):
    options = dict(TEXTS[name])
    template = options.pop("template", None)
    inputs = [mx.zeros((32,)), mx.zeros((3,), mx.float16), mx.array(2, mx.int32)]
    call = {
        "template": template,
        "grid": (32, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(32,)],
        "output_dtypes": [mx.float32],
        "verbose": True,
    }
    theirs = mx.fast.metal_kernel(name=name, input_names=["x", "y", "z"], output_names=["out"], **options)
    # Without a GPU MLX can trace a kernel for export, and prints it then.
    mx.export_function(str(tmp_path / "f"), lambda *a: theirs(inputs=list(a), stream=mx.gpu, **call)[0], *inputs)
    expected = capfd.readouterr().out
    ours = metal_cpu.metal_kernel(name, ["x", "y", "z"], ["out"], **options)
    ours(inputs=inputs, init_value=0, **call)
    assert "[[kernel]] void custom_kernel_" in expected and capfd.readouterr().out == expected


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float", "half", "bfloat"])
def test_exp(dtype):
    source = "uint elem = thread_position_in_grid.x; T tmp = inp[elem]; out[elem] = metal::exp(tmp);"
    a = mx.random.normal(shape=(4, 16)).astype(dtype)
    (b,) = metal_cpu.metal_kernel("myexp", ["inp"], ["out"], source)(
        inputs=[a],
        template=[("T", dtype)],
        grid=(a.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[a.shape],
        output_dtypes=[a.dtype],
    )
    assert b.dtype == dtype and mx.allclose(b, mx.exp(a), rtol=1e-5 if dtype == mx.float32 else 1e-2)


def test_exp_of_a_slice_without_copying_it():
    source = """
        uint elem = thread_position_in_grid.x;
        uint loc = elem_to_loc(elem, inp_shape, inp_strides, inp_ndim);
        T tmp = inp[loc];
        out[elem] = metal::exp(tmp);"""
    a = mx.random.normal(shape=(4, 16)).astype(mx.float16)[::2]
    (b,) = metal_cpu.metal_kernel("myexp_strided", ["inp"], ["out"], source, ensure_row_contiguous=False)(
        inputs=[a],
        template=[("T", mx.float16)],
        grid=(a.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[a.shape],
        output_dtypes=[a.dtype],
    )
    assert mx.allclose(b, mx.exp(a), rtol=1e-2)


CORNERS = ("nw", "ne", "sw", "se")
PREAMBLE = """
    uint elem = thread_position_in_grid.x;
    int H = x_shape[1];
    int W = x_shape[2];
    int C = x_shape[3];
    int gH = grid_shape[1];
    int gW = grid_shape[2];

    int w_stride = C;
    int h_stride = W * w_stride;
    int b_stride = H * h_stride;

    uint grid_idx = elem / {channels} * 2;
    float ix = ((grid[grid_idx] + 1) * W - 1) / 2;
    float iy = ((grid[grid_idx + 1] + 1) * H - 1) / 2;

    int ix_nw = floor(ix);
    int iy_nw = floor(iy);
    int ix_ne = ix_nw + 1;
    int iy_ne = iy_nw;
    int ix_sw = ix_nw;
    int iy_sw = iy_nw + 1;
    int ix_se = ix_nw + 1;
    int iy_se = iy_nw + 1;

    T nw = (ix_se - ix)    * (iy_se - iy);
    T ne = (ix    - ix_sw) * (iy_sw - iy);
    T sw = (ix_ne - ix)    * (iy    - iy_ne);
    T se = (ix    - ix_nw) * (iy    - iy_nw);

    int batch_idx = elem / {channels} / gH / gW * b_stride;
    int channel_idx = elem % {channels};
    int base_idx = batch_idx + channel_idx;
"""
INSIDE = "iy_{0} >= 0 && iy_{0} <= H - 1 && ix_{0} >= 0 && ix_{0} <= W - 1"
FORWARD = (
    PREAMBLE.format(channels="C")
    + "".join(f"T I_{c} = x[base_idx + iy_{c} * h_stride + ix_{c} * w_stride];\n" for c in CORNERS)
    + "".join(f"I_{c} = {INSIDE.format(c)} ? I_{c} : 0;\n" for c in CORNERS)
    + "out[elem] = nw * I_nw + ne * I_ne + sw * I_sw + se * I_se;"
)
SLOPES = {
    "nw": ("- I_nw * (iy_se - iy)", "- I_nw * (ix_se - ix)"),
    "ne": ("+ I_ne * (iy_sw - iy)", "- I_ne * (ix - ix_sw)"),
    "sw": ("- I_sw * (iy - iy_ne)", "+ I_sw * (ix_ne - ix)"),
    "se": ("+ I_se * (iy - iy_nw)", "+ I_se * (ix - ix_nw)"),
}
BACKWARD = (
    "int C_padded = ceildiv(x_shape[3], threads_per_simdgroup) * threads_per_simdgroup;\n"
    + PREAMBLE.format(channels="C_padded")
    + "T gix = T(0); T giy = T(0);\nif (channel_idx < C) {\n"
    + "int cot_index = elem / C_padded * C + channel_idx;\nT cot = cotangent[cot_index];\n"
    + "".join(
        f"""if ({INSIDE.format(c)}) {{
            int offset = base_idx + iy_{c} * h_stride + ix_{c} * w_stride;
            atomic_fetch_add_explicit(&x_grad[offset], {c} * cot, memory_order_relaxed);
            T I_{c} = x[offset];
            gix = gix {SLOPES[c][0]} * cot;
            giy = giy {SLOPES[c][1]} * cot;
        }}\n"""
        for c in CORNERS
    )
    + """}
    T gix_mult = W / 2;
    T giy_mult = H / 2;
    gix = simd_sum(gix);
    giy = simd_sum(giy);
    if (thread_index_in_simdgroup == 0) {
        atomic_fetch_add_explicit(&grid_grad[grid_idx], gix * gix_mult, memory_order_relaxed);
        atomic_fetch_add_explicit(&grid_grad[grid_idx + 1], giy * giy_mult, memory_order_relaxed);
    }"""
)


def grid_sample_reference(x: mx.array, grid: mx.array) -> mx.array:
    """x [N, H, W, C], grid [N, h, w, 2] in -1..1 -> bilinear samples [N, h, w, C], zero outside."""
    count, height, width, _ = x.shape
    ix, iy = ((grid[..., 0] + 1) * width - 1) / 2, ((grid[..., 1] + 1) * height - 1) / 2
    left, top = mx.stop_gradient(mx.floor(ix)), mx.stop_gradient(mx.floor(iy))
    rows = mx.arange(count)[:, None, None]
    total = mx.zeros((*grid.shape[:3], x.shape[3]))
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        cx, cy = left + dx, top + dy
        inside = (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
        weight = (1 - mx.abs(ix - cx)) * (1 - mx.abs(iy - cy)) * inside
        at = [mx.clip(c, 0, limit - 1).astype(mx.int32) for c, limit in ((cy, height), (cx, width))]
        total = total + weight[..., None] * x[rows, at[0], at[1]]
    return total


def sample(x: mx.array, grid: mx.array) -> mx.array:
    shape = (*grid.shape[:3], x.shape[3])
    (out,) = metal_cpu.metal_kernel("grid_sample", ["x", "grid"], ["out"], FORWARD)(
        inputs=[x, grid],
        template=[("T", x.dtype)],
        output_shapes=[shape],
        output_dtypes=[x.dtype],
        grid=(int(np.prod(shape)), 1, 1),
        threadgroup=(256, 1, 1),
    )
    return out


def test_grid_sample():
    x, grid = mx.random.normal((2, 6, 8, 5)), mx.random.uniform(-0.7, 0.7, (2, 4, 3, 2))
    assert mx.allclose(sample(x, grid), grid_sample_reference(x, grid), atol=1e-5)


def test_grid_sample_reads_beyond_its_input_before_it_tests_the_bounds():
    # True of the documentation's kernel: it loads first and discards afterwards.
    x, grid = mx.random.normal((1, 6, 8, 5)), mx.full((1, 4, 3, 2), -1.5)
    with pytest.raises(metal_cpu.KernelFault) as raised:
        sample(x, grid)
    assert {error.kind for error in raised.value.report.errors} == {"out-of-bounds"}


@pytest.mark.parametrize("order", ["forward", "random"])
def test_grid_sample_gradient_with_atomics(order):
    x, grid = mx.random.normal((2, 6, 8, 5)), mx.random.uniform(-1.2, 1.2, (2, 4, 3, 2))
    cotangent = mx.random.normal((2, 4, 3, 5))
    kernel = metal_cpu.metal_kernel(
        "grid_sample_grad", ["x", "grid", "cotangent"], ["x_grad", "grid_grad"], BACKWARD, atomic_outputs=True
    )
    with metal_cpu.session(order=order) as session:
        gradients = kernel(
            inputs=[x, grid, cotangent],
            template=[("T", x.dtype)],
            output_shapes=[x.shape, grid.shape],
            output_dtypes=[x.dtype, x.dtype],
            grid=(2 * 4 * 3 * 32, 1, 1),
            threadgroup=(256, 1, 1),
            init_value=0,
        )
    _, expected = mx.vjp(grid_sample_reference, [x, grid], [cotangent])
    for got, wanted in zip(gradients, expected, strict=True):
        assert mx.allclose(got, wanted, atol=1e-4)
    assert session.last.counts["atomics"] > 0 and session.last.counts["races"] == 0
