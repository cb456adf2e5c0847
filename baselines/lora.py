"""
LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., ICLR 2022), arXiv 2106.09685
Official code: https://github.com/microsoft/LoRA

Each target weight stays frozen and gets a trainable update of rank r: r (in + out) parameters
instead of in * out.

    W' = W + (alpha / r) B A

Notation (paper -> here):  A -> lora_A (r, in);  B -> lora_B (out, r);  α -> alpha, 2r by default

Differs from the paper: A is U(-1/√in, 1/√in) at first, as in the official code; not Gaussian.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {}


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class LoRALinear(nn.Module):
    """y = x Wᵀ + bias + (alpha / rank) dropout(x) Aᵀ Bᵀ, for x (..., in) -> (..., out)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        (o, i), W = base.weight.shape, base.weight
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, i, **new))
        self.lora_B = nn.Parameter(torch.zeros(o, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        h = self.scaling * F.linear(self.dropout(x), A)         # (..., r), scaled where narrow
        # Bᵀ is copied row by row: a CPU is slow where a thin factor lies along its rank.
        return add_update(self.base, x, h @ B.T.contiguous())

    def delta(self):
        return self.scaling * self.lora_B @ self.lora_A         # (out, in)


def find(model, targets):
    """
    {name: nn.Linear} whose leaf name or dotted suffix is in targets. ValueError for a target that
    hits nothing, or whose weight another module shares, as a tied head's does.
    """
    if not targets:
        raise ValueError("no targets")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hits = {t: [name for name in linears if f".{name}".endswith(f".{t}")] for t in targets}
    for target, names in hits.items():
        if not names:
            raise ValueError(f"target {target!r} matches no nn.Linear of the model")
    hit = set().union(*hits.values())
    found = {name: m for name, m in linears.items() if name in hit}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, m in found.items():
        others = [n for n, p in parameters if p is m.weight and n != f"{name}.weight"]
        if others:
            raise ValueError(f"{name}: its weight is also {others[0]}, an update would change both")
    return found


def inject(model, targets, rank, alpha=None, dropout=0.0):
    """Freeze the model, wrap its targets in place. ValueError unless 1 <= rank <= min(in, out)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    alpha = 2 * rank if alpha is None else alpha
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(base, rank, alpha, dropout))


def count(shapes, rank):
    """Trainable parameters, r (in + out) for each target of these (out, in)."""
    return rank * sum(o + i for o, i in shapes)


@torch.no_grad()
def merge(model):
    """Add every update to its weight, rounded once, and put the plain nn.Linear back."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "delta"):
            W, delta = layer.base.weight, layer.delta()         # delta is fp32 or wider
            W.copy_(W.to(delta.dtype) + delta)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)


def factors(model):
    """{name: (A (r, in), B (out, r))} with ΔW = B A, the scaling inside B."""
    return {name: (layer.lora_A.detach(), layer.scaling * layer.lora_B.detach())
            for name, layer in model.named_modules() if hasattr(layer, "delta")}
