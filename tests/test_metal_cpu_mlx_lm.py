"""mlx-lm's kernels in the runner, against mlx-lm's own operations: kernels that nobody here wrote, judged by others.

Owns which kernels and shapes. Where the runner finds a fault, the test states it and shows that repairing it is enough.
"""

import metal_cpu
import mlx.core as mx
import pytest
from metal_cpu.peers import fresh, in_place_of_mlx
from mlx import nn

pytestmark = pytest.mark.skipif(metal_cpu.unsupported() is not None, reason=str(metal_cpu.unsupported()))

normal = mx.random.normal
BY_TYPE = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 2e-2}
TYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float", "bfloat"])


@pytest.fixture(autouse=True)
def session():
    mx.random.seed(0)
    with in_place_of_mlx(), metal_cpu.session() as opened:
        yield opened


def assert_close(got: mx.array, wanted: mx.array, tolerance: float) -> None:
    """The largest difference is below `tolerance` times the largest value."""
    got, wanted = got.astype(mx.float32), wanted.astype(mx.float32)
    assert got.shape == wanted.shape
    assert mx.abs(got - wanted).max().item() <= tolerance * mx.abs(wanted).max().item()


@pytest.mark.parametrize("dtype", BY_TYPE, ids=["float", "half", "bfloat"])
@pytest.mark.parametrize("variant", ["plain", "mask", "vector_gate", "vector_gate_mask", "packed", "explicit_tree"])
def test_gated_delta(variant, dtype):
    module = fresh("mlx_lm.models.gated_delta")
    batch, steps, key_heads, heads, key_width, width = 2, 3, 2, 4, 64, 16
    if variant in ("packed", "explicit_tree"):
        key_width = 128
    q, k = ((normal((batch, steps, key_heads, key_width)) * 0.1).astype(dtype) for _ in range(2))
    v = normal((batch, steps, heads, width)).astype(dtype)
    gate = (batch, steps, heads, key_width) if "vector_gate" in variant else (batch, steps, heads)
    g, beta = mx.sigmoid(normal(gate)), mx.sigmoid(normal((batch, steps, heads))).astype(dtype)
    state = normal((batch, heads, width, key_width))
    mask = mx.array([[True, False, True], [True, True, False]]) if "mask" in variant else None
    if variant == "explicit_tree":
        y, after = module.gated_delta_kernel_xtree(q, k, v, g, beta, state)
    elif variant == "packed":
        y, after = module.gated_delta_kernel(q, k, v, g, beta, state)
    else:
        y, after = module.gated_delta_kernel_unpacked(q, k, v, g, beta, state, mask)
    expected, expected_after = module.gated_delta_ops(q, k, v, g, beta, state, mask)
    if mask is not None:
        y, expected = (mx.where(mask[..., None, None], out, 0) for out in (y, expected))
    assert_close(y, expected, BY_TYPE[dtype])
    assert_close(after, expected_after, BY_TYPE[dtype])


def test_gated_delta_kernels_agree_bit_by_bit():
    # Their comments promise it; it holds only if simd_sum adds neighbours first, as Apple GPUs do.
    module = fresh("mlx_lm.models.gated_delta")
    heads = (1, 3, 4)
    inputs = [normal((1, 3, 2, 128)), normal((1, 3, 2, 128)), normal((*heads, 16)), mx.sigmoid(normal(heads))]
    inputs += [mx.sigmoid(normal(heads)), normal((1, 4, 16, 128))]
    kernels = module.gated_delta_kernel, module.gated_delta_kernel_xtree, module.gated_delta_kernel_unpacked
    (first, *others) = [kernel(*inputs) for kernel in kernels]
    for other in others:
        assert all(mx.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_state_space_update():
    module = fresh("mlx_lm.models.ssm")
    n, h, d, g, ds = 2, 4, 16, 2, 64
    inputs = [normal((n, 1, h, d)), normal((h,)), normal((n, 1, g, ds)), normal((n, 1, g, ds)), normal((h,))]
    inputs += [normal((n, 1, h)), normal((h,)), normal((n, h, d, ds)), (0.001, 100.0)]
    for got, wanted in zip(module.ssm_update_kernel(*inputs), module.ssm_attn(*inputs), strict=True):
        assert_close(got, wanted, 1e-5)


def test_rwkv7():
    module = fresh("mlx_lm.models.rwkv7")
    batch, steps, heads, width = 1, 3, 2, 64
    r, k, v, a, b = (normal((batch, steps, heads, width)) * 0.3 for _ in range(5))
    w, state = mx.sigmoid(normal((batch, steps, heads, width))), normal((batch, heads, width, width))
    y, after = module.wkv7_kernel(r, w, k, v, a, b, state)
    rows = []
    for t in range(steps):
        row, state = module._wkv7_step_ops(*(x[:, t] for x in (r, w, k, v, a, b)), state)
        rows.append(row)
    assert_close(y, mx.stack(rows, 1).reshape(y.shape), 1e-5)
    assert_close(after, state, 1e-5)


def test_bitlinear():
    layer = fresh("mlx_lm.models.bitlinear_layers").BitLinear(256, 64, bias=False)
    ternary = mx.random.randint(0, 3, (64, 256))
    quarters = mx.split(ternary, 4)
    layer.weight = sum(part << 2 * i for i, part in enumerate(quarters)).astype(mx.uint8)
    layer.weight_scale = mx.array([0.7])
    x = normal((3, 256))
    assert_close(layer(x), x @ (ternary.astype(mx.float32) - 1).T * 0.7, 1e-5)


def test_sinkhorn():
    scores, eps = mx.softmax(normal((3, 2, 4, 4)), -1), mx.array([1e-6])
    expected = scores / (scores.sum(-2, keepdims=True) + eps)
    for _ in range(4):
        expected = expected / (expected.sum(-1, keepdims=True) + eps)
        expected = expected / (expected.sum(-2, keepdims=True) + eps)
    assert_close(fresh("mlx_lm.models.deepseek_v41")._sinkhorn(scores, iters=5, eps=eps), expected, 1e-6)


@TYPES
def test_attention_residuals(dtype):
    module = fresh("mlx_lm.models.kimi_k3")
    raw, partial, weight = (normal(shape).astype(dtype) for shape in ((3, 2, 600), (2, 600), (600,)))
    inverse = mx.rsqrt(raw.astype(mx.float32).square().mean(-1) + 1e-6)
    blocks = module.ResidualBlocks.__new__(module.ResidualBlocks)
    blocks.raw, blocks.inv_rms = raw, inverse
    got, wanted = (module._attn_res_mix(blocks, partial, weight, 1e-6, use) for use in (True, False))
    assert_close(got, wanted, BY_TYPE[dtype])


@TYPES
@pytest.mark.parametrize("width", [64, 80])
def test_norms_of_queries_and_keys(width, dtype):
    heads, kv_heads = 4, 2
    x = normal((2, 3, 2 * (heads + kv_heads) * width)).astype(dtype)
    shape = {"n_heads": heads, "n_kv_heads": kv_heads, "head_dim": width, "eps": 1e-5, "query_scale": 0.5}
    each = x.reshape(2, 3, -1, width)
    norm = mx.fast.rms_norm(each, None, 1e-5)
    expected = norm[:, :, :heads] * 0.5, norm[:, :, heads : heads + kv_heads]
    for got, wanted in zip(fresh("mlx_lm.kernels.qk_norm").qk_norm(x, **shape), expected, strict=True):
        assert_close(got, wanted, BY_TYPE[dtype])

    def rotated(y):
        turned = mx.fast.rope(y.swapaxes(1, 2), width, traditional=True, base=1e4, scale=1.0, offset=7)
        return turned.swapaxes(1, 2)

    together = fresh("mlx_lm.kernels.qk_norm_rope").qk_norm_rope(x, **shape, rope_base=1e4, offset=7)
    for got, wanted in zip(together, expected, strict=True):
        assert_close(got, rotated(wanted), max(BY_TYPE[dtype], 1e-4))


def test_expert_routing():
    logits, bias = normal((2, 3, 40)), normal((40,)) * 0.1
    chosen, weights = fresh("mlx_lm.kernels.expert_routing").expert_routing(
        logits, bias, top_k=4, multiplier=1.5, score_eps=1e-20, route_scale=2.0
    )
    scores = mx.sigmoid(logits * 1.5)
    expected = mx.argsort(-(scores + bias), axis=-1)[..., :4]
    share = mx.take_along_axis(scores, expected, -1)
    assert mx.array_equal(chosen.astype(mx.int32), expected.astype(mx.int32))
    assert_close(weights, share / share.sum(-1, keepdims=True) * 2, 1e-5)


@pytest.mark.parametrize("width", [96, 512])
def test_experts_normed_and_combined(width):
    module = fresh("mlx_lm.kernels.post_expert_norm_combine")
    x, w, scale = normal((5, 3, width)), mx.softmax(normal((5, 3)), -1), normal((width,))
    expected = (mx.fast.rms_norm(x * scale, None, 1e-5) * w[..., None]).sum(1)
    assert_close(module.post_expert_norm_combine(x, w, norm_weight=scale, eps=1e-5), expected, 1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["heads_first", "positions_first"])
def test_gate_of_strided_inputs(transposed):
    batch, heads, length, width = 2, 3, 5, 64
    x = normal((batch, length, heads, width)).swapaxes(1, 2) if transposed else normal((batch, heads, length, width))
    gate = normal((batch, length, 2 * heads * width))[..., ::2]
    expected = mx.fast.rms_norm(x, None, 1e-5).swapaxes(1, 2).reshape(batch, length, -1) * mx.sigmoid(gate)
    got = fresh("mlx_lm.kernels.rms_norm_sigmoid_gate").rms_norm_sigmoid_gate(x, gate, eps=1e-5)
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("width", [64, 768])
def test_norm_add_norm(width):
    module = fresh("mlx_lm.kernels.norm_add_norm")
    branch, stream = normal((4, width)), normal((4, width))
    alpha, beta, post = (normal((width,)) for _ in range(3))
    following = nn.RMSNorm(width, eps=1e-5)
    following.weight = normal((width,))
    total, normed = module.norm_add_norm(
        branch, stream, alpha=alpha, beta=beta, post_weight=post, post_eps=1e-5, next_norm=following
    )
    expected = alpha * stream + beta * mx.fast.rms_norm(branch * post, None, 1e-5)
    assert_close(total, expected, 1e-5)
    assert_close(normed, following(expected), 1e-5)
    assert_close(module.pre_norm(total, following, dtype=mx.float32), following(expected), 1e-5)


def repaired(source: str) -> str:
    """The losses with a barrier between reading the shared maxima and overwriting them, and barriers that fence."""
    reads = ("max_p = shared[simd_lane_id * 2 + 1];\n", "sum_exp_p = shared[simd_lane_id * 2 + 1];\n")
    for read in reads:
        assert source.count(f" {read}") == 1
        source = source.replace(f" {read}", f" {read}threadgroup_barrier(mem_flags::mem_threadgroup);\n")
    assert "mem_none" in source
    return source.replace("mem_flags::mem_none", "mem_flags::mem_threadgroup")


def losses(module, name, q, p):
    """(the kernel's loss and gradient, the reference's)."""
    cotangent = mx.array([1.0, -2.0])
    ours = getattr(module, f"{name}_div_loss")

    def reference(q, p):
        log_q, log_p = (x - mx.logsumexp(x, -1, keepdims=True) for x in (q, p))
        if name == "kl":
            return nn.losses.kl_div_loss(log_q, log_p, axis=-1, reduction="none")
        middle = mx.log(0.5 * (mx.exp(log_q) + mx.exp(log_p)))
        return 0.5 * sum(nn.losses.kl_div_loss(middle, x, axis=-1, reduction="none") for x in (log_p, log_q))

    def with_gradient(loss):
        (values,), (gradient,) = mx.vjp(lambda q: loss(q, p), [q], [cotangent])
        return values, gradient

    return with_gradient(ours), with_gradient(reference)


@pytest.mark.parametrize("name", ["kl", "js"])
def test_losses_race_for_shared_memory(name, session):
    # mlx-lm issue 1700: `shared` is overwritten while other SIMD-groups still read the maxima from it.
    module = fresh("mlx_lm.tuner.losses")
    q, p = normal((2, 5000)), normal((2, 5000))
    with pytest.raises(metal_cpu.KernelFault) as raised:
        losses(module, name, q, p)
    assert {error.kind for error in raised.value.report.errors} == {"race"}
    with metal_cpu.session(checks=False):
        (wrong, _), (right, _) = losses(module, name, q, p)
    assert mx.abs(wrong - right).max().item() > 1e-3  # not a theoretical one


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", ["kl", "js"])
def test_losses_repaired(name, order, monkeypatch):
    def repairing(name, input_names, output_names, source, **options):
        return metal_cpu.metal_kernel(name, input_names, output_names, repaired(source), **options)

    monkeypatch.setattr(mx.fast, "metal_kernel", repairing)
    module = fresh("mlx_lm.tuner.losses")
    with metal_cpu.session(order=order, seed=2):
        ours, expected = losses(module, name, normal((2, 5000)), normal((2, 5000)))
    for got, wanted in zip(ours, expected, strict=True):
        assert_close(got, wanted, 1e-4)
