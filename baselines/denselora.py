"""
DenseLoRA: Dense Low-Rank Adaptation of Large Language Models (Mu et al., ACL 2025)
Official code: https://github.com/mulin-ahu/DenseLoRA (as published it adds nothing: a misspelt type
name skips every branch). G-LoRA's counts, 4.16M to 5.21M, are r = 64 on q,k,v,up,down.

All layers of a kind (all q_proj, all v_proj, ..) share an encoder and a decoder; a layer's own is
a dense r x r matrix between them. GELUs on both sides make the update a function of x.

    y = x Wᵀ + (alpha / r) GELU(Dec M GELU(Enc x))

Notation (paper -> here):  Enc -> model.adapter[kind].lora_A (r, in);  Dec -> .lora_B (out, r);
    M -> lora_M (r, r): r (in + out) + L r² parameters for a kind with L layers

Left open by the paper: alpha, 2r as in its example; dropout, as in the code: on x, after each GELU.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {}
PRESET = "denselora"                    # whose rows of presets.py apply
NOT_MERGEABLE = "DenseLoRA's GELUs make its update a function of the input: no weight holds it"


class Shared(nn.Module):
    """Encoder and decoder of all layers of a kind. model.adapter owns it, so it is saved once."""

    def __init__(self, rank, base):
        super().__init__()
        (o, i), W = base.weight.shape, base.weight
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, i, **new))
        self.lora_B = nn.Parameter(torch.zeros(o, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class DenseLoRALinear(nn.Module):
    """y = x Wᵀ + bias + (alpha / rank) f(x), for x (..., in) -> (..., out)."""

    def __init__(self, base, shared, rank, alpha, dropout):
        super().__init__()
        object.__setattr__(self, "shared", shared)      # unregistered: the model owns it
        self.base, self.scaling, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        self.lora_M = nn.Parameter(torch.empty(rank, rank).to(shared.lora_A))
        nn.init.kaiming_uniform_(self.lora_M, a=math.sqrt(5))

    def forward(self, x):
        A, M, B = (p.to(x.dtype) for p in (self.shared.lora_A, self.lora_M, self.shared.lora_B))
        h = self.dropout(F.gelu(F.linear(self.dropout(x), A)))              # (..., r)
        y = self.dropout(F.gelu(F.linear(F.linear(h, M), B)))               # (..., out)
        return add_update(self.base, x, self.scaling * y)

    def delta(self):
        raise NotImplementedError(NOT_MERGEABLE)


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


def kind(name):
    """A module's name without numbers: model.layers.3.mlp.up_proj -> kind-model-..-up_proj."""
    return "kind-" + "-".join(part for part in name.split(".") if not part.isdigit())


class Owner(nn.ModuleDict):
    """model.adapter; passes x on, as an nn.Sequential would call it."""

    def forward(self, x):
        return x


def inject(model, targets, rank, alpha=None, dropout=0.0):
    """
    Freeze the model, wrap its targets in place, put what they share into model.adapter. ValueError
    for a bad target or dropout, unless 1 <= rank <= min(in, out), or where modules of a kind differ
    in shape.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    alpha = 2 * rank if alpha is None else alpha
    found, firsts = find(model, targets), {}
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
        first = firsts.setdefault(kind(name), base)
        if base.weight.shape != first.weight.shape:
            raise ValueError(f"{name} is {tuple(base.weight.shape)}, others of its kind "
                             f"{tuple(first.weight.shape)}: they cannot share an encoder")
    model.requires_grad_(False)
    model.adapter = Owner({key: Shared(rank, base) for key, base in firsts.items()})
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        layer = DenseLoRALinear(base, model.adapter[kind(name)], rank, alpha, dropout)
        setattr(model.get_submodule(parent), leaf, layer)


def merge(model):
    raise NotImplementedError(NOT_MERGEABLE)


def factors(model):
    raise NotImplementedError(NOT_MERGEABLE)
