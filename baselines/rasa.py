"""
RaSA: Rank-Sharing Low-Rank Adaptation (He et al., ICLR 2025)
Official code: https://github.com/zwhe99/RaSA (MIT)

Of each layer's r ranks k go into a pool that all layers of a kind (all q_proj, all v_proj, ..)
share. An update has the layer's own r - k ranks and the pool's k L, each with a trained weight.

    W_i' = W_i + [B_i | B_S] diag(d_i) [A_i ; A_S]

Notation (paper -> here):  A_i, B_i -> lora_A (r - k, in), lora_B (out, r - k);  d_i -> lora_d
    (r - k + k L);  A_S, B_S -> model.adapter[kind].lora_A (k L, in), .lora_B (out, k L);  L layers

alpha lives in the start of d alone: alpha / 2(r - k) for the layer's own ranks, alpha / 2 k L for
    the pool's. Left open: its default, 2r; k is r / 8 in the paper's runs, 1 here. Of a name all
    numbers are left out: the experts of a mixture are one kind.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {"k": (1, "ranks of each layer that go into the shared pool")}


class Pool(nn.Module):
    """The ranks that all layers of a kind share. model.adapter owns it, so it is saved once."""

    def __init__(self, ranks, base):
        super().__init__()
        (o, i), W = base.weight.shape, base.weight
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(ranks, i, **new))
        self.lora_B = nn.Parameter(torch.zeros(o, ranks, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class RaSALinear(Pool):
    """y = x Wᵀ + bias + dropout(x) ΔWᵀ, for x (..., in) -> (..., out)."""

    def __init__(self, base, pool, rank, k, alpha, dropout):
        super().__init__(rank - k, base)
        object.__setattr__(self, "pool", pool)      # unregistered: the model owns it
        self.base, self.dropout, shared = base, nn.Dropout(dropout), len(pool.lora_A)
        d = [alpha / (2 * (rank - k))] * (rank - k) + [alpha / (2 * shared)] * shared
        self.lora_d = nn.Parameter(torch.tensor(d).to(self.lora_A))

    def pair(self):
        """A (r - k + k L, in), B (out, r - k + k L): the layer's own ranks first."""
        return (torch.cat((self.lora_A, self.pool.lora_A)),
                torch.cat((self.lora_B, self.pool.lora_B), 1))

    def forward(self, x):
        A, B = self.pair()
        h = self.lora_d.to(x.dtype) * F.linear(self.dropout(x), A.to(x.dtype))
        # Bᵀ is copied row by row: a CPU is slow where a thin factor lies along its rank.
        return add_update(self.base, x, h @ B.T.to(x.dtype).contiguous())

    def delta(self):
        A, B = self.pair()
        return self.lora_d * B @ A                              # (out, in)


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


def inject(model, targets, rank, alpha=None, dropout=0.0, *, k=1):
    """
    Freeze the model, wrap its targets in place, put the pools into model.adapter. ValueError for
    a bad target or dropout, unless 1 <= k < rank <= min(in, out), or where modules of a kind differ
    in shape.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    alpha = 2 * rank if alpha is None else alpha
    found, groups = find(model, targets), {}
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
        if not 1 <= k < rank:
            raise ValueError(f"k {k}, expected 1 to rank - 1 = {rank - 1}")
        first, _ = groups.setdefault(kind(name), (base, []))
        if base.weight.shape != first.weight.shape:
            raise ValueError(f"{name} is {tuple(base.weight.shape)}, others of its kind "
                             f"{tuple(first.weight.shape)}: they cannot share a pool")
        groups[kind(name)][1].append(name)
    model.requires_grad_(False)
    model.adapter = Owner({key: Pool(k * len(names), base)
                           for key, (base, names) in groups.items()})
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        layer = RaSALinear(base, model.adapter[kind(name)], rank, k, alpha, dropout)
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
    del model.adapter


def factors(model):
    """{name: (A (r - k + k L, in), B (out, r - k + k L))} with ΔW = B A, d inside B."""
    return {name: (layer.pair()[0].detach(), (layer.lora_d * layer.pair()[1]).detach())
            for name, layer in model.named_modules() if hasattr(layer, "delta")}
