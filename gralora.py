"""
GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (Jung et al., NeurIPS
2025), arXiv 2505.20355. Official code: https://github.com/SqueezeBits/GraLoRA

The update is cut into a k x k grid of blocks, and every block gets a low-rank pair of its own. That
is LoRA's parameters and FLOPs (§3.4), but its rank is up to k (r - h) + h (§3.2), and an outlier
among the input channels reaches only the gradients of the k blocks that see it (§3.3). A part h of
the rank may stay plain LoRA (§3.5).

    W' = W + (α / r) ([B_jn A_jn] over output blocks j and input blocks n = 1..k  +  B_g A_g)

Notation (paper -> here):
    M, N      o, i      output and input features
    r         rank      of both parts together; the blocks have R = r - h, one has p = R / k
    k         k         blocks per side; k = 1 is LoRA
    A_jn      lora_A[j-th p rows, n-th i/k columns]     of lora_A (R, i)   (Eq. 5, transposed)
    B_jn      lora_B[j-th o/k rows, n-th p columns]     of lora_B (o, R)   (Eq. 5)
    (§3.5)    lora_A_general (h, i), lora_B_general (o, h), where h is --hybrid

Differs from the paper: §2.1's text calls M the input size; in Eq. 1 and all that follows it is the
    output size. §3.2 puts A_ij at (i + (j - 1) k, j), which is outside; it belongs at block
    (j, j + (i - 1) k). B_GraLoRA, printed N x kr, is M x kr.
Differs from the official code: one dropout mask for both parts, not two; `merge` is provided.
    peft's r is our rank - hybrid, its gralora_A our lora_A.unflatten(1, (k, -1)).permute(1, 2, 0),
    its gralora_B our lora_B.unflatten(0, (k, -1)).mT.
Left open by the paper: A's init; Kaiming-uniform per block (fan-in i/k), as in the official code.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {"k": (2, "blocks per side; 0: the smallest power of two with rank / k² <= 8"),
            "hybrid": (0, "part of the rank that is plain LoRA")}
PRESET = "gralora"                      # whose rows of presets.py apply


def blocks_for(rank):
    """§3.4's choice, r / k² ≈ 8: the smallest power of two k with rank / k² <= 8."""
    k = 1
    while rank > 8 * k * k:
        k *= 2
    return k


def contiguous(size, k):
    """Block of each feature: 0 .. 0, 1 .. 1, up to k - 1, in equal parts."""
    return torch.arange(k).repeat_interleave(size // k)


def expand(A, B, rows, columns, k):
    """
    The block-sparse factors of the whole update: (k R, i) and (o, k R), ΔW = their product.
    rows (i) and columns (o) name the block of each input and each output feature. The inner axis
    counts (n, j, p): input block, output block, rank; a block pair meets in the one p it owns.
    """
    each = torch.arange(k, device=A.device)
    A = A * (rows == each[:, None])[:, None]                            # (n, R, i), R = (j, p)
    # (n, j, p, o): laid out along o, for a CPU's products are faster so, the backward's above all.
    B = B.T.contiguous().unflatten(0, (k, 1, -1)) * (columns == each[:, None])[:, None]
    return A.flatten(0, 1), B.flatten(0, 2).T


def add_update(base, x, update):
    """
    base(x) + update (..., o), rounded once: a product that starts from the update. In bf16 base(x)
    is rounded at first, and would swallow what is less than half a unit of its last place.
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class GraLoRALinear(nn.Module):
    """y = x Wᵀ + bias + (α / r) x̃ ΔWᵀ, x̃ = dropout(x), for x (..., i) -> (..., o)."""

    def __init__(self, base, rank, alpha, dropout, k, hybrid):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        (o, i), W, self.k = base.weight.shape, base.weight, k
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank - hybrid, i, **new))
        self.lora_B = nn.Parameter(torch.zeros(o, rank - hybrid, **new))
        nn.init.uniform_(self.lora_A, -math.sqrt(k / i), math.sqrt(k / i))      # fan-in i/k
        if hybrid:
            self.lora_A_general = nn.Parameter(torch.empty(hybrid, i, **new))
            self.lora_B_general = nn.Parameter(torch.zeros(o, hybrid, **new))
            nn.init.kaiming_uniform_(self.lora_A_general, a=math.sqrt(5))

    def forward(self, x):
        k, A, x_ = self.k, self.lora_A.to(x.dtype), self.dropout(x)
        B = self.lora_B.T.to(x.dtype).contiguous()      # (R, o): as in expand, for speed
        z = torch.einsum("...ni,rni->...nr", x_.unflatten(-1, (k, -1)), A.unflatten(1, (k, -1)))
        z = z.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)      # (..., n, R) -> (..., j, R)
        z = torch.einsum("...jr,rjo->...jo", self.scaling * z, B.unflatten(1, (k, -1)))
        update = z.flatten(-2)                                          # (..., o), Eq. 5
        if hasattr(self, "lora_A_general"):
            z = F.linear(x_, self.lora_A_general.to(x.dtype))           # (..., h)
            update = update + F.linear(self.scaling * z, self.lora_B_general.to(x.dtype))
        return add_update(self.base, x, update)

    def factors(self):
        """A (k R + h, i), B (o, k R + h) of the whole update: Fig. 5, with the scaling in B."""
        (o, i), k, device = self.base.weight.shape, self.k, self.lora_A.device
        rows, columns = contiguous(i, k).to(device), contiguous(o, k).to(device)
        A, B = expand(self.lora_A, self.lora_B, rows, columns, k)
        if hasattr(self, "lora_A_general"):
            A, B = torch.cat((A, self.lora_A_general)), torch.cat((B, self.lora_B_general), 1)
        return A, self.scaling * B

    def delta(self):
        A, B = self.factors()
        return B @ A                                                    # (o, i)


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


def inject(model, targets, rank, alpha=None, dropout=0.0, *, k=2, hybrid=0):
    """
    Freeze the model, wrap its targets in place. ValueError for a bad target or dropout, a rank
    outside 1..min(in, out), a hybrid part that is all of it, or a k that does not divide R, in and
    out.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    alpha = 2 * rank if alpha is None else alpha                        # §4.1: α = 2r
    k = k or blocks_for(rank)
    if not 0 <= hybrid < max(rank, 1):                                  # rank < 1 is reported below
        raise ValueError(f"hybrid {hybrid} of rank {rank}, expected 0 to {rank - 1}")
    found = find(model, targets)
    for name, base in found.items():
        o, i = base.weight.shape
        if not 1 <= rank <= min(o, i):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(o, i)}")
        for what, size in (("rank - hybrid", rank - hybrid), ("in", i), ("out", o)):
            if k < 1 or size % k:
                raise ValueError(f"k {k} does not divide {what} = {size} of {name}")
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        layer = GraLoRALinear(base, rank, alpha, dropout, k, hybrid)
        setattr(model.get_submodule(parent), leaf, layer)


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
    """{name: (A (k R + h, in), B (out, k R + h))} with ΔW = B A: the exact LoRA (§3.2)."""
    return {name: tuple(f.detach() for f in layer.factors())
            for name, layer in model.named_modules() if hasattr(layer, "delta")}
