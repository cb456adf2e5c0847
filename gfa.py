"""
GFA: Global Factorized Adaptation: Parameter-Efficient Fine-Tuning via Cross-Module Low-Rank
Sharing (anonymous authors, ICML submission). Official code: none.

LoRA gives each of N modules a pair of factors of its own. GFA strings the updates Δ of all modules
into one long vector, folds that into the rows of one matrix M (m, k), and factorizes M. M is
near-square, as m + k, the size of its factors at rank 1, is then smallest.

    W_i' = W_i + s · reshape(vec(B A)[c_{i-1} : c_i], p_i, q_i),    s = 1

Notation (paper -> here):
    p_i, q_i   p, q     output and input features of module i
    c_{i-1}    start    where module i begins in the vector of length d = Σ p_i q_i
    B          lora_B   (m, r), zero at first           m = ⌈d / k⌉
    A          lora_A   (r, k), N(0, σ²) at first       k = ⌊√d⌋
    M          B A      (m, k), never formed as a whole (Alg. 1)

A module of 3 x 4, Δ = [a a a a; b b b b; c c c c], that starts at entry 7 of M with k = 5:

    row 0 of M   . . . . .      dots: other modules' entries; at M's very end, padding
    row 1        . . a a a      start = 7 = 1 k + 2: first = 1, offset = 2 (row, column)
    row 2        a b b b b
    row 3        c c c c .      last = 4, the row after: Δ needs rows 1, 2, 3 of B, shares 1 and 3

The idea: the rows of Δ are windows of M that begin at up to k / g columns (2, 1, 0 above), where
g = gcd(k, q). In an M of rank 1 all rows are multiples of A, yet windows from different columns
differ. The ends of M's rows cut the windows into (k + q) / g - 1 pieces, or one more if g does not
divide start; the rows of Δ that have a piece have rank <= r there. Hence

    rank(Δ) <= r ((k + q) / g - 1), or r more; and min(p, q)

Each of 48 modules of 64 x 64 has rank 64 at r = 1, as k = 443, g = 1 (§2); but if k = u q, it is
u r or (u + 1) r at most: 8 r for q,v of LLaMA2-7B. Neither method's updates contain the other's: a
LoRA's rank is r at most, and modules of rank 1 can make up an M of high rank (§3).

Parameters: r (m + k), about 2 r √d, for the whole model: for N equal square modules √N times fewer
    than LoRA's r Σ (p + q) (Eq. 1). q,v of Qwen2.5-3B: 26,067 r, LoRA 230,400 r.
Cost, T tokens: LoRA adds 6 T r (p + q) FLOPs to a module's step, GFA 2 T p q for the gradient of Δ,
    as full fine-tuning has it, and 2 r p q each for Δ forward, Δ backward, dB, dA; on a bf16 base
    4 T p q more, for a second product. Time: 1.5 times LoRA's step (one 2048² layer, 512 tokens,
    fp32; bf16: 2.9), 1.37 in SmolLM2-135M (fp32, r = 8), all on a CPU. Memory: while a layer
    computes, its rows of M in fp32, about a weight; on a bf16 base a narrow copy, too.
Evaluation: merge(model) before you generate. Unmerged, in eval mode without gradient, a layer keeps
    W + Δ (bf16: Δ) until train(), eval() or a change of A, B, W: the targets twice in memory. A
    token then costs as if merged (bf16: one product more), and 12 times that where Δ is formed anew
    for it (2048², one core). Merging rounds W + Δ to W's dtype: in bf16 a small Δ is lost.
Saved: lora_A and lora_B of model.adapter, r (m + k) numbers, fp32 or wider. Positions are not:
    targets, shapes and order must be the same, for another order loads, and updates other weights.
Loop: inject; each step backward, optimizer.step, zero_grad; at the end merge. No other hook.

Differs from the paper: a bf16 base gets two products, x Wᵀ + x Δᵀ, since W + Δ would round Δ away.
Left open by the paper:
    vec: row-major over (out, in), because torch stores a weight so, and a slice is then a view.
    Order of modules: named_modules', because it is a model's own; that of `targets` has no part.
    σ: 0.02, because the first Adam step, of B alone, then changes W as LoRA's does at equal r and
        rate: LoRA's A has σ = 1/√(3 in), times its scale 2; equals 0.02 at in = 3,333.
    Learning rate, optimizer, batch, epochs: none is printed; 3e-3 is ours, the rest train.py's.
    A budget: match_lora, ours, takes the largest r with r (m + k) <= match_lora · Σ (p + q), that
        is LoRA's count at r = match_lora. For q,v of Qwen2.5-3B 8 gives r = 70. The paper's
        "r = 1/2" anchor is no rank, but "roughly 0.3x" of LoRA r = 1: 0.3 gives r = 2, 0.23x.
Errata: d is 169.9M (Qwen2.5-3B) and 352.3M (LLaMA-3.2-3B), printed 226M and 201M. Table 1's adapter
    FLOPs, 1.00 times LoRA's, cannot hold where Δ is formed.
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
    """Of whole rows of M, the entries from `offset` on, as a matrix of `shape`: a view (Step 4)."""
    return rows.flatten()[offset:offset + math.prod(shape)].view(shape)


def summed(W, B, A, offset, dtype):
    """(W + Δ,); or (W, Δ in dtype) if W, or B A by autocast, is narrower than A: a sum loses Δ."""
    delta = cut(B @ A, offset, W.shape)                                 # Alg. 1, line 3
    return (delta.add_(W),) if W.dtype == A.dtype == delta.dtype else (W, delta.to(dtype))


def product(x, bias, W, delta=None):
    y = F.linear(x, W, bias)                                            # Alg. 1, line 4
    return y if delta is None else y + F.linear(x, delta)


class Product(torch.autograd.Function):
    """
    x (..., q) -> x (W + Δ)ᵀ + bias (..., p), Δ cut from B A; B (rows, r): the rows of lora_B that
    the module meets. Autograd keeps x, W, B, A, never Δ: backward forms it anew. W, bias: frozen.
    """

    @staticmethod
    def forward(ctx, x, W, bias, B, A, offset):
        ctx.save_for_backward(x, W, B, A)
        ctx.offset = offset
        return product(x, bias, *summed(W, B, A, offset, x.dtype))

    @staticmethod
    @once_differentiable        # a second derivative is refused: it would need backward's own graph
    def backward(ctx, dy):
        x, W, B, A = ctx.saved_tensors
        # One buffer as large as the rows of M: for B A, then for its gradient. `window` is the view
        # of it where Δ lies. dy has y's dtype: A's if `summed` gave W + Δ, else bf16 or autocast's.
        dx, dM = None, A.new_empty(len(B), A.shape[1])
        window, fused = cut(dM, ctx.offset, W.shape), dy.dtype == A.dtype
        if ctx.needs_input_grad[0]:
            torch.mm(B, A, out=dM)                          # Δ in its window
            dx = dy @ window.add_(W) if fused else dy @ W.to(dy.dtype) + dy @ window.to(dy.dtype)
        flat = dM.flatten()     # a view; 0 beside Δ, else B A of neighbours would enter dB and dA
        flat[:ctx.offset] = flat[ctx.offset + W.numel():] = 0
        dy, x = dy.reshape(-1, len(W)), x.reshape(-1, W.shape[1]).to(dy.dtype)
        # Δ's gradient dyᵀ x (p, q), into dM through the view; that of A and B follows from M = B A.
        torch.mm(dy.T, x, out=window) if fused else window.copy_(dy.T @ x)
        return dx, None, None, dM @ A.T, B.T @ dM, None     # of x, W, bias, B (rows, r), A, offset


class GlobalFactors(nn.Identity):
    """
    The one pair that all modules share; M's last entries, up to k - 1, are in no module. An
    Identity, as model.adapter is a child, and a model that is an nn.Sequential calls its children.
    """

    def __init__(self, d, rank, sigma, **new):
        super().__init__()
        m, k = fold(d)
        if not 1 <= rank <= k:
            raise ValueError(f"rank {rank} for a global matrix of {m} x {k}, expected 1 to {k}")
        # B = 0: every Δ starts at 0. A then has no gradient in the first step, but B has.
        self.lora_B = nn.Parameter(torch.zeros(m, rank, **new))         # Step 3
        self.lora_A = nn.Parameter(torch.empty(rank, k, **new).normal_(0, sigma))


class GFALinear(nn.Module):
    """y = x (W + Δ)ᵀ + bias, where Δ (p, q) are the p q entries of M from `start` on."""

    def __init__(self, base, shared, start):
        super().__init__()
        # kept: None, nothing yet; False, nothing until eval(); or (now, aliases, summed) of forward
        self.base, self.kept = base, None
        object.__setattr__(self, "shared", shared)          # unregistered: model.adapter owns it
        k = shared.lora_A.shape[1]
        self.first, self.offset = divmod(start, k)          # row and column of M where Δ begins
        self.last = -(-(start + base.weight.numel()) // k)  # the row after Δ's last row, exclusive
        # torch.compile takes a module's integers as constants, and would compile each layer anew;
        # sizes of a tensor it does not. So rows() reads the three as sizes of a view of one number.
        self.place = torch.empty(()).expand(self.first, self.last, self.offset)

    def rows(self):
        """B of M's rows first .. last - 1, A, and the column in row first where Δ begins."""
        first, last, offset = self.place.shape
        return self.shared.lora_B[first:last], self.shared.lora_A, offset

    def train(self, mode=True):
        """eval() calls this, too: what is kept goes, and in eval mode a layer may keep again."""
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        """
        In training Product alone. In eval mode under no_grad W + Δ is kept, until train(), eval(),
        or a write to W, B or A that torch counts. It counts none of a fused optimizer's: after a
        forward with gradient, which a step may follow, nothing is kept until eval(). Nor is it with
        inference tensors, which count no writes, under autocast, or in a compiled graph.
        """
        W, bias = self.base.weight, self.base.bias
        sources = W, *self.shared.parameters()
        if (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
                or torch.compiler.is_compiling() or any(t.is_inference() for t in sources)
                or self.kept is False):
            self.kept = False
            return Product.apply(x, W, bias, *self.rows())
        now = [(t.data_ptr(), t._version) for t in sources]
        # Kept with aliases of its sources: no other tensor can come to lie at their addresses.
        if self.kept is None or self.kept[0] != now:
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
    Freeze the model, wrap its targets in place (all on one device: not checked). Their factors are
    model.adapter; len(lora_A) there is the rank that match_lora chose. ValueError, before anything
    is changed: an alpha, a dropout, a rank outside 1..k, a bad target, sigma or budget.
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
