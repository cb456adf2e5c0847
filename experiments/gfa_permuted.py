"""
GFA with its coordinates in another order (`permute` of reproduce.py): vec(B A) is dealt out to the modules in
their own order, in a shuffled order of modules, or entry by entry in a shuffled order of all d entries.

    ΔW_i = reshape(vec(B A)[π(c_{i-1} : c_i)], p_i, q_i)

    python train.py --method experiments/gfa_permuted.py --order entries

Differs from gfa.py: every module forms all of B A, which suits small models alone. The coordinates are not
saved, as the order's seed gives them again.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import gfa
from gfa import merge  # noqa: F401

ORDERS = ("own", "modules", "entries")
DEFAULTS = gfa.DEFAULTS | {"order": ("own", "of the coordinates", ORDERS),
                           "order_seed": (0, "of the shuffled orders")}
COMMON, TINY, PRESET = gfa.COMMON, gfa.TINY, "gfa"


def places(sizes, order, seed):
    """{module: the positions (p q) in vec(B A) of its entries, row-major}, for sizes {module: p q}."""
    draw, names = torch.Generator().manual_seed(seed), list(sizes)
    if order == "modules":
        names = [names[n] for n in torch.randperm(len(names), generator=draw)]
    total = sum(sizes.values())
    every = torch.randperm(total, generator=draw) if order == "entries" else torch.arange(total)
    return dict(zip(names, every.split([sizes[name] for name in names])))


class Scattered(nn.Module):
    """y = x (W + Δ)ᵀ + bias, where Δ's entries are those of M at `places` (p q)."""

    def __init__(self, base, shared, places):
        super().__init__()
        self.base, self.places = base, places
        object.__setattr__(self, "shared", shared)          # unregistered: model.adapter owns it

    def delta(self):
        M = self.shared.lora_B @ self.shared.lora_A
        return M.flatten().index_select(0, self.places).view(self.base.weight.shape)

    def forward(self, x):
        return F.linear(x, self.base.weight + self.delta(), self.base.bias)


def inject(model, targets, rank, alpha=None, dropout=0.0, *, sigma=0.02, match_lora=0.0, order="own",
           order_seed=0):
    """gfa.inject, then each layer takes its entries from where `order` puts them. ValueError as there."""
    if order not in ORDERS:
        raise ValueError(f"order {order!r}, expected one of {', '.join(ORDERS)}")
    gfa.inject(model, targets, rank, alpha, dropout, sigma=sigma, match_lora=match_lora)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, gfa.GFALinear)}
    found = places({name: layer.base.weight.numel() for name, layer in layers.items()}, order, order_seed)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        mine = found[name].to(layer.base.weight.device)
        setattr(model.get_submodule(parent), leaf, Scattered(layer.base, model.adapter, mine))
