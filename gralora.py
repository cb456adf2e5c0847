"""
GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (Jung et al., NeurIPS
2025), arXiv 2505.20355. Official code: https://github.com/SqueezeBits/GraLoRA

LoRA's gradient of B, ∂L/∂Y Xᵀ A (Eq. 3; X is (i, tokens), the paper's A our lora_Aᵀ), sums over all
input channels: one outlier, a channel of far larger activations, reaches every entry of it. Of the
gradient of lora_A it reaches one column only, as of W's in full fine-tuning. GraLoRA cuts the
update into a k x k grid of blocks, each with a low-rank pair of its own: a channel reaches the k
pairs of its input block; for a given ∂L/∂Y the other k² - k do not see it (§3.3). A part h of the
rank may stay plain LoRA, one pair for the whole weight (§3.5).

    W' = W + (α / r) ([B_jn A_jn] over output blocks j and input blocks n = 1..k  +  B_g A_g)

Notation (paper -> here):
    M, N      o, i      output and input features
    r         rank      of both parts together, also in α / r; the blocks have R = r - h of it
    r/k       p         R / k, the rank of one block
    k         k         blocks per side; k = 1 is LoRA
    A_jn      lora_A[j-th p rows, n-th i/k columns]     of lora_A (R, i)   (Eq. 5, transposed)
    B_jn      lora_B[j-th o/k rows, n-th p columns]     of lora_B (o, R)   (Eq. 5)
    (§3.5)    A_g = lora_A_general (h, i), B_g = lora_B_general (o, h), where h is --hybrid

One grid three times, here k = 2. The rank axis of lora_A counts (output block, p), that of
lora_B (input block, p); ΔW stands without its factor α / r:

    lora_A       in 1   in 2      lora_B   in 1, p  in 2, p      ΔW       in 1        in 2
    out 1, p     A_11   A_12      out 1     B_11     B_12        out 1    B_11 A_11   B_12 A_12
    out 2, p     A_21   A_22      out 2     B_21     B_22        out 2    B_21 A_21   B_22 A_22

Parameters: r (o + i) a module, LoRA's, whatever k and h: no count() is needed. Rank of ΔW: at most
    k R + h (§3.2), that is k r without a hybrid part, and min(o, i); LoRA's: r.
Cost: 2 r (o + i) FLOPs a token for the update's forward, LoRA's (§3.4). The latent between A and B
    has k R + h numbers a token, LoRA's r; backward needs it, gradient checkpointing hides that. A
    step takes 1.02 (attention) to 1.06 (all linears) of LoRA's time (SmolLM2-135M, r = 8, k = 2).
Which k: a block has only rank p = R / k for its part of ΔW, and with too little it does worse, at
    small r most of all. The paper asks for r / k² ≈ 8 and takes 4 to 8: k = 2 at r = 16, 32, and 4
    at 64, 128 (§3.4). `k=0` gives these, 1 (LoRA) at r = 8. The default is 2 at every rank.
Which h: where r <= 16, up to r / 2 helps, as blocks of small rank are weak and B_g A_g has rank h
    all over the weight. At larger r 0 is better: the blocks suffice, and B_g's gradient sums over
    all input channels, as LoRA's does (§3.5, §4.4).
Saved: the lora_ tensors, fp32 or wider. To load: first inject with the same arguments.
Loop: inject; each step backward, optimizer.step, zero_grad; at the end merge. No other hook.
    LionW, batch 192, learning rate 2e-4 to 4e-4 (§4.1, Table 5) are presets.py's, not this file's.

Differs from the official code: one dropout mask for both parts, not two; `merge` is provided.
    peft's r is our R and its hybrid_r our h; it divides α by r + hybrid_r, our rank. Its gralora_A
    is our lora_A.unflatten(1, (k, -1)).permute(1, 2, 0), gralora_B lora_B.unflatten(0, (k, -1)).mT.
Left open by the paper:
    A's init: Kaiming-uniform per block (fan-in i/k), because the official code has it.
    B's init: zero, because the model then starts as the pretrained one, as with LoRA.
    The rank in r / k² with a hybrid part: the whole, because h is a part of r (§3.5).
Errata: §2.1's text calls M the input size; in Eq. 1 and all that follows it is the output size.
    §3.2 puts A_jn, its A_ij, at (j + (n - 1) k, n), outside of N x k r: (n, n + (j - 1) k) is
    meant. B_GraLoRA, printed N x k r, is M x k r.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {"k": (2, "blocks per side; 0: the smallest power of two with rank / k² <= 8"),
            "hybrid": (0, "part of the rank that is plain LoRA")}
PRESET = "gralora"                      # whose rows of presets.py apply


def blocks_for(rank):
    """§3.4's choice, r / k² ≈ 8: the smallest power of two k with rank / k² <= 8; 1 at rank 8."""
    k = 1
    while rank > 8 * k * k:
        k *= 2
    return k


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class GraLoRALinear(nn.Module):
    """y = x Wᵀ + bias + x̃ ΔWᵀ, ΔW with its α / r, x̃ = dropout(x), for x (..., i) -> (..., o)."""

    def __init__(self, base, rank, alpha, dropout, k, hybrid):
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.scaling, self.k = alpha / rank, k
        (o, i), W = base.weight.shape, base.weight
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank - hybrid, i, **new))
        self.lora_B = nn.Parameter(torch.zeros(o, rank - hybrid, **new))
        # Kaiming-uniform with a = √5 is U(-1/√fan-in, 1/√fan-in). B = 0 makes ΔW = 0; in the first
        # step B then has a gradient, as A is not 0, and A has none.
        nn.init.uniform_(self.lora_A, -math.sqrt(k / i), math.sqrt(k / i))      # fan-in i/k
        if hybrid:
            self.lora_A_general = nn.Parameter(torch.empty(hybrid, i, **new))
            self.lora_B_general = nn.Parameter(torch.zeros(o, hybrid, **new))
            nn.init.kaiming_uniform_(self.lora_A_general, a=math.sqrt(5))

    def forward(self, x):
        k, A, x_ = self.k, self.lora_A.to(x.dtype), self.dropout(x)
        B = self.lora_B.T.to(x.dtype).contiguous()      # (R, o): CPUs are slow along a thin rank
        # Input block n times its columns of A, for all output blocks at once: r counts (j, p).
        z = torch.einsum("...ni,rni->...nr", x_.unflatten(-1, (k, -1)), A.unflatten(1, (k, -1)))
        # From (..., n, (j, p)) to (..., j, (n, p)): what output block j reads of every input block.
        z = z.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)
        # Now r counts (n, p), as B's rank axis does: the sum over r is also that over input blocks.
        z = torch.einsum("...jr,rjo->...jo", self.scaling * z, B.unflatten(1, (k, -1)))
        update = z.flatten(-2)                                          # (..., o), Eq. 5
        if hasattr(self, "lora_A_general"):
            z = F.linear(x_, self.lora_A_general.to(x.dtype))           # (..., h)
            update = update + F.linear(self.scaling * z, self.lora_B_general.to(x.dtype))
        return add_update(self.base, x, update)

    def factors(self):
        """
        A (k R + h, i), B (o, k R + h) of the whole update: Fig. 5, with the scaling in B. For delta
        and for export as a LoRA: up to k times as large as what trains, never formed in forward.
        """
        (o, i), k, device = self.base.weight.shape, self.k, self.lora_A.device
        in_block, out_block = contiguous(i, k).to(device), contiguous(o, k).to(device)
        A, B = expand(self.lora_A, self.lora_B, in_block, out_block, k)
        if hasattr(self, "lora_A_general"):
            A, B = torch.cat((A, self.lora_A_general)), torch.cat((B, self.lora_B_general), 1)
        return A, self.scaling * B

    def delta(self):
        A, B = self.factors()
        return B @ A                                                    # (o, i)


def contiguous(size, k):
    """Block of each feature: 0 .. 0, 1 .. 1, up to k - 1, in equal parts."""
    return torch.arange(k).repeat_interleave(size // k)


# `rows` are input features, though W is (out, in): as in cps_lora.py, whose paper has W (in, out),
# and any clusters as blocks. In the p places of block (j, n) A is 0 outside of input block n, and B
# outside of output block j: B_jn A_jn in that block of ΔW. Fig. 5 counts (j, n, p): the same ΔW.
def expand(A, B, rows, columns, k):
    """
    The block-sparse factors of the whole update: (k R, i) and (o, k R), ΔW = their product.
    rows (i) and columns (o) name the block of each input and each output feature. The inner axis
    counts (n, j, p): input block, output block, rank; block (j, n) owns p of the k R places.
    """
    each = torch.arange(k, device=A.device)
    A = A * (rows == each[:, None])[:, None]                            # (n, R, i), R = (j, p)
    # (n, 1, p, o) * (j, 1, o), laid out along o: a CPU's products, backward's most, are faster so.
    B = B.T.contiguous().unflatten(0, (k, 1, -1)) * (columns == each[:, None])[:, None]
    return A.flatten(0, 1), B.flatten(0, 2).T


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
    Freeze the model, wrap its targets in place. alpha None: 2 rank; k 0: by the rank (§3.4).
    ValueError, before anything is changed, for a bad target or dropout, a rank outside 1..min(in,
    out), a hybrid outside 0..rank - 1 (plain LoRA: k = 1), a k that does not divide R, in and out.
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
