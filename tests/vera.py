"""
VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., ICLR 2024), arXiv 2310.11454
Where the paper is silent this follows peft's tuners/vera.

One random pair A, B serves all layers and never trains. What a layer learns is two vectors, one
entry for each rank and one for each output: r + out parameters, where LoRA has r (in + out).

    y = W x + Λ_b B Λ_d A x

Notation (paper -> here):  A -> model.adapter.lora_A (r, largest in);  B -> model.adapter.lora_B
    (largest out, r);  d, b, the diagonals of Λ_d, Λ_b -> lora_d (r), lora_b (out). A layer takes
    the first columns of A and the first rows of B, as many as it has features.

Left open by the paper: dropout, on x, as in peft. No alpha: Λ_d is the scale. The rank may exceed
    in and out; above in · out the entries of d could not be told apart.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {"d_init": (0.1, "first value of every entry of d"),
            "projection_seed": (0, "of A and B, which no other draw depends on")}


class Projections(nn.Module):
    """A and B, Kaiming-uniform, the same for every dtype and device. model.adapter owns them."""

    def __init__(self, rank, i, o, seed, **new):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.empty(rank, i, device="cpu"), torch.empty(o, rank, device="cpu")
        for projection in (A, B):
            nn.init.kaiming_uniform_(projection, generator=generator)
        self.lora_A, self.lora_B = nn.Buffer(A.to(**new)), nn.Buffer(B.to(**new))

    def forward(self, x):
        return x        # an nn.Sequential that was injected calls all of its children


class VeRALinear(nn.Module):
    """y = x Wᵀ + bias + x̃ (Λ_b B Λ_d A)ᵀ, x̃ = dropout(x), for x (..., in) -> (..., out)."""

    def __init__(self, base, shared, dropout, d_init):
        super().__init__()
        object.__setattr__(self, "shared", shared)      # unregistered: the model owns it
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.lora_d = nn.Parameter(shared.lora_A.new_full((len(shared.lora_A),), d_init))
        self.lora_b = nn.Parameter(shared.lora_B.new_zeros(len(base.weight)))

    def pair(self):
        """A (r, in) and B (out, r): the first columns of the one, the first rows of the other."""
        o, i = self.base.weight.shape
        return self.shared.lora_A[:, :i], self.shared.lora_B[:o]

    def forward(self, x):
        A, B, d, b = (t.to(x.dtype) for t in (*self.pair(), self.lora_d, self.lora_b))
        h = d * F.linear(self.dropout(x), A)                    # (..., r)
        return self.base(x) + b * F.linear(h, B)

    def factors(self):
        """Λ_d A (r, in) and Λ_b B (out, r)."""
        A, B = self.pair()
        return self.lora_d[:, None] * A, self.lora_b[:, None] * B

    def delta(self):
        A, B = self.factors()
        return B @ A                                            # (out, in)


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


def inject(model, targets, rank, alpha=None, dropout=0.0, *, d_init=0.1, projection_seed=0):
    """
    Freeze the model, wrap its targets in place, register A and B as model.adapter. ValueError for
    an alpha (Λ_d is the scale), a bad target or dropout, or unless 1 <= rank <= in · out.
    """
    if alpha is not None:
        raise ValueError("VeRA has no alpha: Λ_d is its scale")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= base.weight.numel():
            raise ValueError(f"rank {rank} for {name}, expected 1 to {base.weight.numel()}")
    o, i = (max(sizes) for sizes in zip(*(base.weight.shape for base in found.values())))
    W = next(iter(found.values())).weight
    new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
    shared = Projections(rank, i, o, projection_seed, **new)
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, VeRALinear(base, shared, dropout, d_init))
    model.adapter = shared


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
    """{name: (A (r, in), B (out, r))} with ΔW = B A, Λ_d inside A and Λ_b inside B."""
    return {name: tuple(f.detach() for f in layer.factors())
            for name, layer in model.named_modules() if hasattr(layer, "delta")}


def count(shapes, rank, **own):
    """Trainable parameters: r + out a layer."""
    return sum(rank + o for o, i in shapes)
