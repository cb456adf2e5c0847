"""
RoSA: Random Subspace Adaptation for Efficient Fine-Tuning (Hameed et al., 2024), arXiv 2407.07802
Official code: https://github.com/rosa-paper/rosa (method svd_equal). Not "Robust Adaptation".

The factors are r neighbouring singular triplets of W, at a random place; the frozen weight keeps
the others. Every period they are merged, and the triplets of another place of the new W train.

    W' = W_fixed + B A,  W_fixed = W - B₀ A₀,  B₀ A₀ = U Σ Vᵀ [place .. place + r]

Notation (paper -> here):  A -> lora_A (r, in) = Σ Vᵀ at first;  B -> lora_B (out, r) = U at first;
    W_fixed -> base.weight = pretrained + lora_fixed_B lora_fixed_A, rounded once

Differs from the paper: its 2023 text has √Σ in both factors; as in the code, A has all of Σ. The
    code never draws the place of the smallest triplet: here all places are equally likely.
Left open by the paper: optimizer state, dropped for A and B (in the code for all that trains), the
    learning-rate schedule goes on; dropout, 0: with it the start is not the pretrained function, as
    the factors hold weight, which weight decay shrinks, too. No scale. The period, an epoch, is the
    code's default; G-LoRA's authors took two.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {}
COMMON = {"reinit_every": "1", "lr": 5e-5}   # as the authors' runs on decoders
TINY = {"lr": 5e-3, "reinit_every": "60s"}   # on the bundled model
PRESET = "rosa"                         # whose rows of presets.py apply


def window(W, rank):
    """A (r, in) = Σ Vᵀ and B (out, r) = U: r neighbouring singular triplets of W (out, in)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    place = torch.randint(len(S) - rank + 1, ()).item()
    take = slice(place, place + rank)
    return S[take, None] * Vh[take], U[:, take]


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class RoSALinear(nn.Module):
    """y = x W_fixedᵀ + bias + dropout(x) Aᵀ Bᵀ, for x (..., in) -> (..., out)."""

    def __init__(self, base, rank, dropout):
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.pretrained = None              # a copy of the first W, on the CPU
        (o, i), W = base.weight.shape, base.weight
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, i, **new))
        self.lora_B = nn.Parameter(torch.empty(o, rank, **new))
        self.lora_fixed_A = nn.Buffer(torch.empty(0, i, **new))     # what every window took and
        self.lora_fixed_B = nn.Buffer(torch.empty(o, 0, **new))     # what the merged ones became
        if not W.is_meta:                   # there only shapes are wanted
            self.factorize(W.detach().to(**new))

    @torch.no_grad()
    def factorize(self, W):
        """Start on a random window of W, unrounded, which leaves the frozen weight."""
        A, B = window(W, len(self.lora_A))
        self.lora_A.copy_(A), self.lora_B.copy_(B)
        self.record(-1)
        self.write(self.lora_fixed_A, self.lora_fixed_B)

    @torch.no_grad()
    def record(self, sign):
        """The factors, with this sign, become part of W_fixed at the next write."""
        self.lora_fixed_A = torch.cat((self.lora_fixed_A, self.lora_A))
        self.lora_fixed_B = torch.cat((self.lora_fixed_B, sign * self.lora_B), 1)

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        # Bᵀ is copied row by row: a CPU is slow where a thin factor lies along its rank.
        return add_update(self.base, x, F.linear(self.dropout(x), A) @ B.T.contiguous())

    def delta(self):
        return self.lora_B @ self.lora_A                        # (out, in)

    def total(self):
        """A, B of the whole update against the pretrained weight."""
        return (torch.cat((self.lora_fixed_A, self.lora_A)),
                torch.cat((self.lora_fixed_B, self.lora_B), 1))

    def write(self, A, B):
        """W = pretrained + B A, rounded once whatever the number of stages."""
        W = self.base.weight
        if self.pretrained is None:
            self.pretrained = W.detach().to("cpu", copy=True)
        W.copy_(self.pretrained.to(W.device, A.dtype) + B @ A)


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
    """
    Freeze the model, wrap its targets in place; base.weight becomes W_fixed. ValueError for an
    alpha (RoSA has no scale), a bad target or dropout, or unless 1 <= rank <= min(in, out).
    """
    if alpha is not None:
        raise ValueError("RoSA has no alpha: its factors hold singular values, unscaled")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, RoSALinear(base, rank, dropout))


def layers(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "delta")}


@torch.no_grad()
def reinit(model, optimizer):
    """Merge, and start on another window of the merged weight; the factors' moments go."""
    for layer in layers(model).values():
        layer.record(+1)
        A, B, W = layer.lora_fixed_A, layer.lora_fixed_B, layer.base.weight
        layer.factorize(layer.pretrained.to(W.device, A.dtype) + B @ A)
        for p in (layer.lora_A, layer.lora_B):
            p.grad = None                                       # of the factors that were merged
            optimizer.state.pop(p, None)


@torch.no_grad()
def merge(model):
    """Write every whole update into its weight, rounded once, and put the plain nn.Linear back."""
    for name, layer in layers(model).items():
        layer.write(*layer.total())
        layer.pretrained = None                 # its memory, before the next weight is computed
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


def factors(model):
    """{name: (A (R, in), B (out, R))} of the update over all windows: what each took and left."""
    return {name: tuple(f.detach() for f in layer.total()) for name, layer in layers(model).items()}


@torch.no_grad()
def restore(model, tensors):
    """Give a freshly injected model the merged windows in `tensors`; ValueError if none fit."""
    for name, layer in layers(model).items():
        (o, i), W = layer.base.weight.shape, layer.base.weight
        A, B = (tensors.get(f"{name}.lora_fixed_{x}") for x in "AB")
        if A is None or B is None or A.shape[1:] != (i,) or B.shape != (o, len(A)):
            raise ValueError(f"tensors {name}.lora_fixed_A and _B are missing or not for {o} x {i}")
        new = dict(device=W.device, dtype=layer.lora_A.dtype)
        layer.lora_fixed_A, layer.lora_fixed_B = A.to(**new), B.to(**new)
        layer.write(layer.lora_fixed_A, layer.lora_fixed_B)
