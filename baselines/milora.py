"""
MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning (Wang et al.,
NAACL 2025). Official code: https://github.com/sufenlp/MiLoRA

PiSSA's mirror image: the factors start as the r last singular triplets of W, so that training moves
W's minor directions and the principal ones stay frozen.

    W' = W_res + s B A,  W_res = W - s B₀ A₀,  s B₀ A₀ = U Σ Vᵀ [last r],  s = alpha / r

Notation (paper -> here):  A -> lora_A (r, in);  B -> lora_B (out, r);  W_p -> base.weight, W_res;
    A₀, B₀ -> lora_A0, lora_B0, kept for reload and export

Left open by the paper: alpha, r as in the authors' scripts, so that s = 1. They train with dropout
    0.05; as the adapter holds weight, the start is then not the pretrained function: 0 here. For
    the same reason weight decay shrinks W.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {}
TINY = {"lr": 5e-3}                     # on the bundled model
PRESET = "milora"                       # whose rows of presets.py apply


def triplets(W, rank):
    """U (out, r), Σ (r), V (in, r): the r last singular triplets of W (out, in)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, -rank:], S[-rank:], Vh[-rank:].T


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class MiLoRALinear(nn.Module):
    """y = x W_resᵀ + bias + s dropout(x) Aᵀ Bᵀ, for x (..., in) -> (..., out)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.pretrained = None              # a copy of the first W, on the CPU
        (o, i), W = base.weight.shape, base.weight.detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        A, B = W.new_empty(rank, i), W.new_empty(o, rank)
        if not W.is_meta:                   # there only shapes are wanted
            U, S, V = triplets(W, rank)
            root = (S / self.scaling).sqrt()
            A, B = (V * root).T, U * root
            A, B = (f.to(base.weight.dtype).to(W.dtype) for f in (A, B))    # as forward rounds them
        self.lora_A, self.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.lora_A0, self.lora_B0 = nn.Buffer(A.clone()), nn.Buffer(B.clone())
        if not W.is_meta:
            self.write(-self.scaling * self.lora_B0 @ self.lora_A0)

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        h = self.scaling * F.linear(self.dropout(x), A)         # (..., r), scaled where narrow
        # Bᵀ is copied row by row: a CPU is slow where a thin factor lies along its rank.
        return add_update(self.base, x, h @ B.T.contiguous())

    def delta(self):
        return self.scaling * self.lora_B @ self.lora_A         # (out, in)

    @torch.no_grad()
    def write(self, change):
        """W = pretrained + change, rounded once."""
        W = self.base.weight
        if self.pretrained is None:
            self.pretrained = W.detach().to("cpu", copy=True)
        W.copy_(self.pretrained.to(W.device, change.dtype) + change)


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
    Freeze the model, wrap its targets in place; base.weight becomes W_res. ValueError for a
    bad target or dropout, or unless 1 <= rank <= min(in, out).
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    alpha = rank if alpha is None else alpha
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, MiLoRALinear(base, rank, alpha, dropout))


def layers(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "delta")}


@torch.no_grad()
def merge(model):
    """Write what the factors have become for what they were, rounded once; plain nn.Linears."""
    for name, layer in layers(model).items():
        layer.write(layer.delta() - layer.scaling * layer.lora_B0 @ layer.lora_A0)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


def factors(model):
    """{name: (A (2r, in), B (out, 2r))}: the factors, and minus what they started with."""
    return {name: (torch.cat((layer.lora_A.detach(), layer.lora_A0)),
                   layer.scaling * torch.cat((layer.lora_B.detach(), -layer.lora_B0), 1))
            for name, layer in layers(model).items()}


@torch.no_grad()
def restore(model, tensors):
    """W_res of a freshly injected model, from the saved start; ValueError names what misfits."""
    for name, layer in layers(model).items():
        A, B = (tensors.get(f"{name}.lora_{x}0") for x in "AB")
        if A is None or B is None or A.shape != layer.lora_A.shape or B.shape != layer.lora_B.shape:
            raise ValueError(f"tensors {name}.lora_A0 and _B0 are missing or of another shape")
        W, wide = layer.base.weight, layer.lora_A.dtype
        layer.write(-layer.scaling * B.to(W.device, wide) @ A.to(W.device, wide))
