"""
DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024)
Official code: https://github.com/NVlabs/DoRA

LoRA moves the direction of each output feature's weights, a trained magnitude sets their length:
r (in + out) + out parameters.

    W' = m ⊙ V / |V|,  V = W + (alpha / r) B A,  |V| the norm of each row of V (out, in)

Notation (paper -> here):  A -> lora_A (r, in);  B -> lora_B (out, r);  m -> lora_m (out), first |W|

Differs from the paper: its norm is "column-wise" for y = W x with W (d, k); as in the official code
    it is one per output feature. |V| is a constant for the gradient, as in that code's default.
Left open by the paper: dropout, as in the official code: x goes to W undropped, to the rest through
    one mask, y = W x + (m/|V| - 1) W x̃ + m/|V| ΔV x̃. α, 2r.
Costs: each forward forms V in fp32 for its norms, for a moment. A row of zeros in W has no norm.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS, COMMON = {}, {"lr": 2e-4}     # the authors' rate
PRESET = "dora"                         # whose rows of presets.py apply


class DoRALinear(nn.Module):
    """y = x Wᵀ + bias + x̃ (W' - W)ᵀ, x̃ = dropout(x), for x (..., in) -> (..., out)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        (o, i), W = base.weight.shape, base.weight
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, i, **new))
        self.lora_B = nn.Parameter(torch.zeros(o, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_m = nn.Parameter(W.detach().to(**new).norm(dim=1))

    def directions(self):
        """V (out, in)."""
        return self.base.weight.to(self.lora_B.dtype) + self.scaling * self.lora_B @ self.lora_A

    def forward(self, x):
        W, A, B = self.base.weight, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        with torch.no_grad():               # in fp32: rounded, m / |V| would not be 1 at the start
            norm = self.directions().norm(dim=1)
        gain = self.lora_m / norm                                               # (out)
        x_, y = self.dropout(x), F.linear(x, W)
        y_ = F.linear(x_, W) if self.training and self.dropout.p else y         # x̃ is x else
        update = F.linear(self.scaling * F.linear(x_, A), B)
        y = y + (gain - 1).to(x.dtype) * y_ + gain.to(x.dtype) * update
        return y if self.base.bias is None else y + self.base.bias

    def delta(self):
        V = self.directions()
        return (self.lora_m / V.norm(dim=1))[:, None] * V - self.base.weight    # (out, in)


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
        setattr(model.get_submodule(parent), leaf, DoRALinear(base, rank, alpha, dropout))


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
    """NotImplementedError: the magnitudes scale whole rows of W, so ΔW has full rank."""
    raise NotImplementedError("DoRA scales the rows of W: its update is not low-rank")
