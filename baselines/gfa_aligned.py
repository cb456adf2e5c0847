"""
GFA, aligned: another model than the paper's (gfa.py), and ours. Official code: none.

The paper folds all updates into M without regard to their rows, so an update can have full rank,
but its slice of M must be formed. Here M is folded along the rows: an update has rank c r at most,
and is applied as products of thin matrices, as LoRA's is. The targets share a size w (in a
transformer the hidden one) and are laid out with rows of length w: as they are where w is their in,
transposed where it is their out. The rows of all modules are one stack, c of them one row of M:

    W' = W + S  or  W + Sᵀ,    S = n rows of the stack (B ⊗ I_c) A',    row i c + j being B_i A_j

Notation:
    w, n       w, n      the shared size; the other size of a module, its rows in the stack
    d, c       d, c      Σ n w; the rows of the stack in a row of M
    B          lora_B    (m, r), zero at first             m = ⌈d / k⌉
    A          lora_A    (r, k), N(0, σ²) at first         k = c w, the multiple of w closest to √d
    A', A_j              A as (r c, w); its columns from j w to (j + 1) w, (r, w)
    M          B A       (m, k), no part of which is formed

Where gfa.py's k is a multiple of every q already, both are one model: q,v of LLaMA2-7B, k = 8 q.
Cost: that of a LoRA with rank c r on side w, rank r on side n. c r is small beside a w of 4,096
    (LLaMA2-7B, all linears: c = 20), not beside 576 (SmolLM2-135M: c = 18); from c r = n / 2 on
    gfa.py's slices cost no more.
σ, match_lora, the order of modules, scale 1 and no dropout: as in gfa.py.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {"sigma": (0.02, "standard deviation σ of A's initial entries"),
            "match_lora": (0.0, "if > 0, replaces --rank by a budget: this multiple of LoRA r = 1")}
COMMON, TINY = {"lr": 3e-3}, {"lr": 3e-2}   # on real models, on the bundled one


def fold(shapes):
    """(m, k) of M and w, for targets of these (out, in). ValueError where they share no size."""
    ins, shared = [q for _, q in shapes], set.intersection(*map(set, shapes))
    if not shared:
        raise ValueError(f"no size that all targets share, in or out: {sorted(set(shapes))}")
    w, d = max(sorted(shared), key=ins.count), sum(p * q for p, q in shapes)    # fewest transposed
    k = max(1, round(math.sqrt(d) / w)) * w
    return -(-d // k), k, w


def rank_within(budget, shapes):
    """The largest r with r (m + k) <= budget * Σ (p + q), which is LoRA's count at rank 1."""
    (m, k, _), lora_1 = fold(shapes), sum(p + q for p, q in shapes)
    if not m + k <= budget * lora_1 < math.inf:
        raise ValueError(f"match_lora {budget:g} allows {budget * lora_1:.0f} parameters, "
                         f"rank 1 has {m + k}")
    return math.floor(budget * lora_1 / (m + k))


class GlobalFactors(nn.Identity):
    """
    The one pair that all modules share. The padding at M's end is in no module's rows. An
    Identity: an nn.Sequential that was injected calls all of its children.
    """

    def __init__(self, m, k, rank, sigma, **new):
        super().__init__()
        if not 1 <= rank <= min(m, k):
            raise ValueError(f"rank {rank} for a global matrix of {m} x {k}, "
                             f"expected 1 to {min(m, k)}")
        self.lora_B = nn.Parameter(torch.zeros(m, rank, **new))
        self.lora_A = nn.Parameter(torch.empty(rank, k, **new).normal_(0, sigma))


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class AlignedLinear(nn.Module):
    """y = x (W + Δ)ᵀ + bias, where Δ or Δᵀ is S (n, w), the stack's n rows from `start` on."""

    def __init__(self, base, shared, start, w):
        super().__init__()
        object.__setattr__(self, "shared", shared)          # unregistered: model.adapter owns it
        self.base, self.w, self.n = base, w, base.weight.numel() // w
        self.c, self.transposed = shared.lora_A.shape[1] // w, base.in_features != w
        first, offset = divmod(start, self.c)               # row of M, row of the stack in it
        last = -(-(start + self.n) // self.c)               # the row after S's last
        # As sizes, which from 2 on are symbols to torch.compile: a module's integers are constants
        # to it, and every layer would be compiled anew.
        self.place = torch.empty(()).expand(first + 2, last + 2, offset + 2)

    def rows(self):
        """B's (R, r) that meet S, A' (r c, w), the row of B ⊗ I_c where S begins."""
        first, last, offset = (size - 2 for size in self.place.shape)
        return self.shared.lora_B[first:last], self.shared.lora_A.view(-1, self.w), offset

    def forward(self, x):
        B, A, offset = self.rows()
        B, A, (R, r) = B.to(x.dtype), A.to(x.dtype), B.shape
        if self.transposed:
            z = F.pad(x, (offset, R * self.c - offset - self.n)).unflatten(-1, (R, -1))
            h = torch.einsum("ir,...ij->...rj", B, z)                   # (..., r, c)
            return add_update(self.base, x, h.flatten(-2) @ A)          # Σ_j (x_j B) A_j
        h = F.linear(x, A).unflatten(-1, (r, -1))                       # (..., r, c)
        y = torch.einsum("ir,...rj->...ij", B, h).flatten(-2)           # (x A_jᵀ) B_iᵀ: (..., R c)
        return add_update(self.base, x, y[..., offset:offset + self.n])

    def factors(self):
        """(A (R, q), B (p, R)) with Δ = B A and R = min(c r, p, q)."""
        B, A, offset = self.rows()
        if len(A) >= min(self.base.weight.shape):       # then Δ itself is the smaller
            delta = self.delta()
            eye = torch.eye(min(delta.shape)).to(delta)
            return (delta, eye) if len(eye) == len(delta) else (eye, delta)
        E = torch.kron(B, torch.eye(self.c).to(B))[offset:offset + self.n]      # (n, r c)
        return (E.T, A.T.clone()) if self.transposed else (A.clone(), E)    # A is every module's

    def delta(self):
        B, _, offset = self.rows()
        S = (B @ self.shared.lora_A).view(-1, self.w)[offset:offset + self.n]   # (n, w)
        return S.T if self.transposed else S                            # (p, q)


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
    outside 1..min(m, k), a budget below rank 1 or not finite, a bad target or sigma, or targets
    that share no size.
    """
    if alpha is not None or dropout:
        raise ValueError("aligned GFA has no alpha and no dropout, as GFA has none")
    if not sigma > 0:
        raise ValueError(f"sigma {sigma}, expected above 0: B starts at zero, so A must not")
    found = find(model, targets)
    W = next(iter(found.values())).weight
    shapes = [tuple(base.weight.shape) for base in found.values()]
    m, k, w = fold(shapes)
    if match_lora:
        rank = rank_within(match_lora, shapes)
    new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
    shared, start = GlobalFactors(m, k, rank, sigma, **new), 0
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        layer = AlignedLinear(base, shared, start, w)
        setattr(model.get_submodule(parent), leaf, layer)
        start += layer.n
    model.adapter = shared


def count(shapes, rank, sigma=0.02, match_lora=0.0):
    """Trainable parameters for targets of these (out, in): r (m + k), about 2 r √d."""
    return (rank_within(match_lora, shapes) if match_lora else rank) * sum(fold(shapes)[:2])


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


@torch.no_grad()
def factors(model):
    """{name: (A (R, in), B (out, R))} with ΔW = B A and R = min(c r, in, out)."""
    return {name: m.factors() for name, m in model.named_modules() if hasattr(m, "delta")}
