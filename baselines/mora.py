"""
MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning (Jiang et al., 2024), arXiv 2405.12130
Official code: https://github.com/kongds/MoRA (Apache-2.0)

LoRA's parameters as one square matrix between a fixed compression of x and a fixed decompression:
an update of higher rank for the same count.

    y = x Wᵀ + decompress(M compress(x))

Notation (paper -> here):  M -> lora_M (r̂, r̂), 0 at first;  r̂ = √((in + out) r), rounded
Types (--type), x filled up with its own beginning to n blocks of r̂:
    1  sharing (Eq. 6): the blocks are summed, M once, the result is repeated over the outputs
    6  rotation (Eq. 9): block j is rotated by position j as RoPE rotates, M each, laid side by side

Differs from the paper: r̂ is rounded as in the code, to an even number for type 6; text: floor.
Left open: which type is when meant; 6 is the authors' for small ranks. It has no scale. The merging
    with a change of type (ReMoRA) is not here.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

DEFAULTS = {"type": (6, "of compression: 6 rotation, 1 sharing", (1, 6))}


def square(rank, i, o, type):
    """r̂, the side of M."""
    side = int(((i + o) * rank) ** 0.5 + 0.5)
    return side // 2 * 2 if type == 6 else side


def rotate(x):
    """Block j of x (..., n, r̂) by RoPE's angles for position j: base 10000, half-split layout."""
    n, side = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = 1e4 ** -(torch.arange(0, side, 2, device=x.device, dtype=wide) / side)
    angle = (torch.arange(n, device=x.device)[:, None] * frequency).repeat(1, 2)        # (n, r̂)
    left, right = x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat((-right, left), -1) * angle.sin().to(x.dtype)


def cycle(x, size):
    """x (..., k) repeated from its beginning, and cut, to (..., size)."""
    return x.repeat(*[1] * (x.dim() - 1), -(-size // x.shape[-1]))[..., :size]


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class MoRALinear(nn.Module):
    """y = x Wᵀ + bias + f(dropout(x)), for x (..., in) -> (..., out); f is linear."""

    def __init__(self, base, rank, dropout, type):
        super().__init__()
        self.base, self.dropout, self.type = base, nn.Dropout(dropout), type
        (o, i), W = base.weight.shape, base.weight
        side = square(rank, i, o, type)
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_M = nn.Parameter(torch.zeros(side, side, **new))

    def update(self, x):
        (o, i), side = self.base.weight.shape, len(self.lora_M)
        x = cycle(x, -(-i // side) * side).unflatten(-1, (-1, side))        # (..., n, r̂)
        x = rotate(x) if self.type == 6 else x.sum(-2, keepdim=True)
        return cycle(F.linear(x, self.lora_M.to(x.dtype)).flatten(-2), o)

    def forward(self, x):
        return add_update(self.base, x, self.update(self.dropout(x)))

    def delta(self):
        eye = torch.eye(self.base.in_features, device=self.lora_M.device, dtype=self.lora_M.dtype)
        return self.update(eye).T                                           # (out, in)


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


def inject(model, targets, rank, alpha=None, dropout=0.0, *, type=6):
    """
    Freeze the model, wrap its targets in place, at LoRA's budget for `rank`. ValueError for an
    alpha (MoRA has no scale), a bad target or dropout, a type but 1 and 6, or a rank outside
    1..min(in, out).
    """
    if alpha is not None:
        raise ValueError("MoRA has no alpha: its update is not scaled")
    if type not in DEFAULTS["type"][2]:
        raise ValueError(f"type {type}, expected one of 1, 6")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, MoRALinear(base, rank, dropout, type))


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
    """NotImplementedError: the update's rank goes up to min(in, out)."""
    raise NotImplementedError("MoRA's update is of high rank: it has no small factors")
