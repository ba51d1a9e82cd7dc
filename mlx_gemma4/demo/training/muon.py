"""The optimiser: Muon for the matrices inside the layers, Adam for embeddings and norms.

Owns: one `step` over all parameters. Convolutions, tables of positions and heads count as embeddings. Muon (K. Jordan,
2024) replaces a matrix's momentum by its nearest orthogonal matrix; the update is scaled to the size an Adam step
would have (Liu et al., 2025, "Muon is scalable for LLM training").
"""

import torch


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration on a stack of matrices [n, rows, columns], in bfloat16."""
    x = g.bfloat16()
    flip = x.shape[1] > x.shape[2]
    if flip:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if flip else x).float()


class Optimiser:
    """Muon + Adam. `step(lr)` takes the share of the peak learning rates to use, 0 to 1."""

    def __init__(self, model: torch.nn.Module, matrix_lr: float, vector_lr: float, embed_lr: float):
        self.rates = {"matrix": matrix_lr, "vector": vector_lr, "embed": embed_lr}
        self.matrices: dict[tuple[int, int], list[torch.nn.Parameter]] = {}
        self.others: list[tuple[str, torch.nn.Parameter]] = []
        for name, p in model.named_parameters():
            if "embed_tokens" in name or "heads." in name or p.dim() != 2:
                self.others.append(("vector" if p.dim() == 1 else "embed", p))
            else:
                self.matrices.setdefault((p.shape[0], p.shape[1]), []).append(p)
        self.momentum = {k: torch.zeros(len(v), *k) for k, v in self.matrices.items()}
        self.adam = [(torch.zeros_like(p), torch.zeros_like(p)) for _, p in self.others]
        self.count = 0

    def state_dict(self) -> dict:
        """Everything `step` remembers."""
        return {"momentum": self.momentum, "adam": self.adam, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved `state_dict`."""
        self.momentum, self.adam, self.count = state["momentum"], state["adam"], state["count"]

    @torch.no_grad()
    def step(self, share: float, decay: float = 0.1) -> None:
        """One update from the gradients in `.grad`."""
        self.count += 1
        for shape, params in self.matrices.items():
            g, m = torch.stack([p.grad for p in params]), self.momentum[shape]
            m.lerp_(g, 0.05)
            update = orthogonalise(g.lerp(m, 0.95))
            lr = self.rates["matrix"] * share
            for p, u in zip(params, update, strict=True):
                p.mul_(1 - lr * decay).add_(u, alpha=-lr * 0.2 * max(shape) ** 0.5)
        for (kind, p), (m, v) in zip(self.others, self.adam, strict=True):
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.02)
            m_hat, v_hat = m / (1 - 0.9**self.count), v / (1 - 0.98**self.count)
            p.addcdiv_(m_hat, v_hat.sqrt() + 1e-9, value=-self.rates[kind] * share)
