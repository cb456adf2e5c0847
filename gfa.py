"""
GFA: Global Factorized Adaptation: Parameter-Efficient Fine-Tuning via Cross-Module Low-Rank
Sharing (anonymous authors, ICML submission). Official code: none.

LoRA gives each of N modules a pair of factors of its own. GFA strings the updates of all modules
into one long vector, folds it into one near-square matrix M and factorizes that: about 2 r √d
parameters; for equal square modules √N times fewer than LoRA's r Σ (p + q) (Eq. 1). The price, one
module at a time: a slice of M is as large as its weight, and its gradient costs what full
fine-tuning's would (1.5 of LoRA's step at 2048², 512 tokens, fp32; bf16: 2.9).

    W_i' = W_i + s · reshape(vec(B A)[c_{i-1} : c_i], p_i, q_i),    s = 1

Notation (paper -> here):
    p_i, q_i   p, q     output and input features of module i
    c_{i-1}    start    where module i begins in the vector of length d = Σ p_i q_i
    B          lora_B   (m, r), zero at first           m = ⌈d / k⌉
    A          lora_A   (r, k), N(0, σ²) at first       k = ⌊√d⌋
    M          B A      (m, k), never formed as a whole (Alg. 1)

Evaluation of an unmerged model keeps W + Δ of each layer (bf16: Δ) until train(): the targets twice
in memory, a token in a twelfth of the time (2048², one core).
Differs from the paper: a bf16 base gets two products, x Wᵀ + x Δᵀ, since W + Δ would round Δ away.
Left open by the paper: vec is row-major over (out, in), modules come in named_modules order.
    σ = 0.02: the first Adam step is then about LoRA's with α = 2r at widths of 2,000 to 3,300.
    match_lora (ours) states a budget: the largest r with r (m + k) <= match_lora · Σ (p + q), where
    Σ (p + q) is LoRA at rank 1. 8 is LoRA's budget at rank 8; 0.3 is the paper's "r = 1/2" anchor,
    "roughly 0.3x" in its words. Local rank is not always high: where k is a multiple c q of a row
    length (k = 8 q for q,v of LLaMA2-7B), a row of M is c rows of the module, and rank(Δ) <= c r.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

DEFAULTS = {"sigma": (0.02, "standard deviation σ of A's initial entries"),
            "match_lora": (0.0, "if > 0, replaces --rank by a budget: this multiple of LoRA r = 1")}
COMMON, TINY = {"lr": 3e-3}, {"lr": 3e-2}   # on real models, on the bundled one


def fold(d):
    """(m, k) of the near-square matrix of d entries and at most k - 1 of padding (Step 2)."""
    k = math.isqrt(d)
    return -(-d // k), k


def rank_within(budget, d, lora_1):
    """The largest r with r (m + k) <= budget * lora_1, where lora_1 = Σ (p + q)."""
    if not sum(fold(d)) <= budget * lora_1 < math.inf:
        raise ValueError(f"match_lora {budget:g} allows {budget * lora_1:.0f} parameters, "
                         f"rank 1 has {sum(fold(d))}")
    return math.floor(budget * lora_1 / sum(fold(d)))


def cut(rows, offset, shape):
    """The entries of row-major `rows` from `offset` on, as a matrix of `shape`: a view (Step 4)."""
    return rows.flatten()[offset:offset + math.prod(shape)].view(shape)


def summed(W, B, A, offset, dtype):
    """(W + Δ,), or (W, Δ in dtype) where a sum as narrow as bf16 would lose Δ."""
    delta = cut(B @ A, offset, W.shape)                                 # Alg. 1, line 3
    return (delta.add_(W),) if W.dtype == A.dtype == delta.dtype else (W, delta.to(dtype))


def product(x, bias, W, delta=None):
    y = F.linear(x, W, bias)                                            # Alg. 1, line 4
    return y if delta is None else y + F.linear(x, delta)


class Product(torch.autograd.Function):
    """
    x (..., q) -> x (W + Δ)ᵀ + bias (..., p). Δ is cut from B A, the rows of M that this module
    meets. Backward forms Δ anew: autograd keeps x, W, B (rows, r) and A (r, k), never Δ. W and bias
    are frozen. Autocast narrows what is computed, not A: then W + Δ would lose Δ, as in bf16.
    """

    @staticmethod
    def forward(ctx, x, W, bias, B, A, offset):
        ctx.save_for_backward(x, W, B, A)
        ctx.offset = offset
        return product(x, bias, *summed(W, B, A, offset, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, W, B, A = ctx.saved_tensors
        dx, dM = None, A.new_empty(len(B), A.shape[1])      # one buffer: Δ, then its gradient
        window, fused = cut(dM, ctx.offset, W.shape), dy.dtype == A.dtype
        if ctx.needs_input_grad[0]:
            torch.mm(B, A, out=dM)                          # Δ in its window
            dx = dy @ window.add_(W) if fused else dy @ W.to(dy.dtype) + dy @ window.to(dy.dtype)
        flat = dM.flatten()                                 # a view: 0 outside this module
        flat[:ctx.offset] = flat[ctx.offset + W.numel():] = 0
        dy, x = dy.reshape(-1, len(W)), x.reshape(-1, W.shape[1]).to(dy.dtype)
        torch.mm(dy.T, x, out=window) if fused else window.copy_(dy.T @ x)      # (p, q)
        return dx, None, None, dM @ A.T, B.T @ dM, None


class GlobalFactors(nn.Identity):
    """
    The one pair that all modules share. The padding at M's end is in no module's slice. An
    Identity: an nn.Sequential that was injected calls all of its children.
    """

    def __init__(self, d, rank, sigma, **new):
        super().__init__()
        m, k = fold(d)
        if not 1 <= rank <= k:
            raise ValueError(f"rank {rank} for a global matrix of {m} x {k}, expected 1 to {k}")
        self.lora_B = nn.Parameter(torch.zeros(m, rank, **new))         # Step 3
        self.lora_A = nn.Parameter(torch.empty(rank, k, **new).normal_(0, sigma))


class GFALinear(nn.Module):
    """y = x (W + Δ)ᵀ + bias, where Δ (p, q) are the p q entries of M from `start` on."""

    def __init__(self, base, shared, start):
        super().__init__()
        self.base, self.kept = base, None
        object.__setattr__(self, "shared", shared)          # unregistered: model.adapter owns it
        k = shared.lora_A.shape[1]
        self.first, self.offset = divmod(start, k)          # row and column of M where Δ begins
        self.last = -(-(start + base.weight.numel()) // k)  # after Δ's last: a module may share it
        # As sizes, which are symbols to torch.compile: a module's integers are constants to it, and
        # every layer would be compiled anew.
        self.place = torch.empty(()).expand(self.first, self.last, self.offset)

    def rows(self):
        first, last, offset = self.place.shape
        return self.shared.lora_B[first:last], self.shared.lora_A, offset

    def train(self, mode=True):
        """eval() calls this, too: what is kept goes, and in eval mode a layer may keep again."""
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        """
        In eval mode under no_grad W + Δ is kept, until train(), eval(), or a write to W, B or A
        that torch counts. It does not count a fused optimizer's: after a forward with gradient,
        which a step may follow, nothing is kept until eval() is called.
        """
        W, bias = self.base.weight, self.base.bias
        sources = W, *self.shared.parameters()
        if (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
                or torch.compiler.is_compiling() or any(t.is_inference() for t in sources)
                or self.kept is False):
            self.kept = False
            return Product.apply(x, W, bias, *self.rows())
        now = [(t.data_ptr(), t._version) for t in sources]
        if self.kept is None or self.kept[0] != now:        # aliases, so that no address is reused
            self.kept = now, [t.detach() for t in sources], summed(W, *self.rows(), x.dtype)
        return product(x, bias, *self.kept[2])

    def delta(self):
        B, A, offset = self.rows()
        return cut(B @ A, offset, self.base.weight.shape)               # (p, q)


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


def inject(model, targets, rank, alpha=None, dropout=0.0, *, sigma=0.02, match_lora=0.0):
    """
    Freeze the model, wrap its targets in place, register their factors as model.adapter: a rank
    that match_lora chose is len(model.adapter.lora_A). ValueError for an alpha or a dropout, a rank
    outside 1..k, a budget below rank 1 or not finite, a bad target or sigma.
    """
    if alpha is not None or dropout:
        raise ValueError("GFA has no alpha (s = 1, Step 4) and no dropout (x meets W + Δ at once)")
    if not sigma > 0:
        raise ValueError(f"sigma {sigma}, expected above 0: B starts at zero, so A must not")
    found = find(model, targets)
    W = next(iter(found.values())).weight
    d = sum(base.weight.numel() for base in found.values())
    if match_lora:
        rank = rank_within(match_lora, d, sum(sum(base.weight.shape) for base in found.values()))
    new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
    shared, start = GlobalFactors(d, rank, sigma, **new), 0
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, GFALinear(base, shared, start))
        start += base.weight.numel()                                    # c_i
    model.adapter = shared


def count(shapes, rank, sigma=0.02, match_lora=0.0):
    """Trainable parameters for targets of these (out, in): r (m + k), about 2 r √d (Step 4)."""
    d, lora_1 = sum(p * q for p, q in shapes), sum(p + q for p, q in shapes)
    return (rank_within(match_lora, d, lora_1) if match_lora else rank) * sum(fold(d))


@torch.no_grad()
def merge(model):
    """Add every update to its weight, rounded once, and put the plain nn.Linear back."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "delta"):
            W, delta = layer.base.weight, layer.delta()         # delta is fp32 or wider
            W.copy_(W.to(delta.dtype) + delta)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)
    del model.adapter


def factors(model):
    """Always raises: entries of a rank-r M, folded anew to (p, q), may have full rank (§2)."""
    raise NotImplementedError("a GFA update folds entries of M anew: its rank may exceed r")
