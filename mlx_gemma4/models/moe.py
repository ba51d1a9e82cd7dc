"""Mixture of experts of 26B-A4B: the router and the experts that run beside the dense MLP.

Shapes: N tokens (batch and length flattened), E experts, K chosen per token, H hidden, F expert width.
Source: transformers `modeling_gemma4.py: Gemma4TextRouter, Gemma4TextExperts`.
"""

import mlx.core as mx
import mlx.nn as nn

from ..config import TextConfig
from .fused import geglu

# From this many (token, expert) pairs on, sorting them by expert pays: each expert's rows become one matmul.
SORT_FROM = 64


class Router(nn.Module):
    """Chooses K experts per token and their weights."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps
        self.root = config.hidden_size**-0.5
        self.scale = mx.ones((config.hidden_size,))
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.per_expert_scale = mx.ones((config.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [B, L, H], not normalised -> expert indices and weights, [B, L, K] each."""
        scores = self.proj(mx.fast.rms_norm(x, self.scale * self.root, self.eps)).astype(mx.float32)
        chosen = mx.stop_gradient(mx.argpartition(scores, kth=-self.top_k, axis=-1)[..., -self.top_k :])
        # Softmax over all experts, then renormalised over the chosen: the same as a softmax over the chosen.
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return chosen, (weights * self.per_expert_scale[chosen]).astype(x.dtype)


class ExpertLinear(nn.Module):
    """E linear maps without bias, weight [E, out, in]; each row of the input names its expert."""

    def __init__(self, experts: int, input_dims: int, output_dims: int):
        super().__init__()
        self.weight = mx.random.uniform(-(input_dims**-0.5), input_dims**-0.5, (experts, output_dims, input_dims))

    def __call__(self, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        """x [..., 1, in], experts int [...] -> [..., 1, out]; `ordered` says that experts are ascending."""
        dtype, weight = x.dtype, self.weight
        if mx.default_device() == mx.cpu:  # where MLX's gather_mm knows float32 only
            x, weight = x.astype(mx.float32), weight.astype(mx.float32)
        y = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=ordered)
        return y.astype(dtype)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_: object
    ) -> "QuantizedExpertLinear":
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """`ExpertLinear` on quantized weights: weight, scales and, in affine mode, biases, as `mx.quantize` makes them."""

    def __init__(self, weight: mx.array, group_size: int | None, bits: int | None, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
        self.biases = biases[0] if biases else None
        self.freeze()

    def __call__(self, x: mx.array, experts: mx.array, ordered: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=ordered,
        )


class SwitchGLU(nn.Module):
    """GeGLU with the three matrices of the chosen experts."""

    def __init__(self, config: TextConfig):
        super().__init__()
        E, H, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = ExpertLinear(E, H, F)
        self.up_proj = ExpertLinear(E, H, F)
        self.down_proj = ExpertLinear(E, F, H)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """x [B, L, H], chosen [B, L, K] -> [B, L, K, H]."""
        K = chosen.shape[-1]
        if chosen.size < SORT_FROM:
            rows, experts, ordered = x[..., None, None, :], chosen, False
        else:
            # One row per (token, expert) pair, by expert: [N*K, 1, H].
            order = mx.argsort(chosen.flatten())
            rows, experts, ordered = x.flatten(0, -2)[order // K][:, None], chosen.flatten()[order], True
        y = geglu(self.gate_proj(rows, experts, ordered), self.up_proj(rows, experts, ordered))
        y = self.down_proj(y, experts, ordered).squeeze(-2)
        return y[mx.argsort(order)].reshape(*chosen.shape, -1) if ordered else y


class Experts(nn.Module):
    """The weighted sum of the chosen experts."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.switch_glu = SwitchGLU(config)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x [B, L, H], chosen and weights [B, L, K] -> [B, L, H]."""
        return (self.switch_glu(x, chosen) * weights[..., None]).sum(axis=-2)
