"""
SpIEL-AG: Scaling Sparse Fine-Tuning to Large Language Models (Ansell et al., 2024)
arXiv 2401.16405. Official code: https://github.com/AlanAnsell/peft (Apache-2.0)

k entries of each weight train, as values beside their places. Every S steps some places change: the
smallest values are dropped (their entries return to the pretrained ones), and entries with the
largest accumulated gradient grow instead.

    W' = W + Δ,  Δ[places] = values

Schedule, step t of T: gradients are gathered over steps 1 .. A, and from each multiple of S to A
    steps after it; then a share p of the places changes: all of them (p = 1) the first time, later
    p = rate (1 - t / T). Candidates: the k largest gradients of the first step gathered.
Notation: η -> lora_values (k);  φ -> lora_places (k), flat row-major;  a new value's moments: the
    means of its g and g², as Adam would have them at its age, the number of steps gathered.

Differs from the code: gradients of whole optimizer steps are gathered, unclipped, not of
    micro-batches, so the choice does not depend on their size; the price: in the first step of a
    window every layer holds a dense gradient until observe. On a bf16 base Δ is a product of its
    own: in W it would be rounded away. Left open: what --density is a share of, in the code all
    weights of the model, in the papers' tables undecidable; here the targets' weights. 0: LoRA's
    count at --rank, module by module; the code spreads the sum by size. Its weight decay, 1 to 30,
    pulls on the values alone; here it is --weight_decay.
"""
import torch
import torch.nn as nn

DEFAULTS = {"density": (0.0, "share of the target weights that train; 0: as many as LoRA's"),
            "reselection_steps": (20, "S, optimizer steps from one change of places to the next"),
            "accumulation_steps": (5, "A, steps over which gradients are gathered before it"),
            "reselection_rate": (0.2, "share of the places that change, before its linear decay")}
PRESET, COMMON = "spiel", {"lr": 1e-4}  # whose rows of presets.py apply; the authors' rate


class SparseProduct(torch.autograd.Function):
    """x (W + Δ)ᵀ; nothing weight-sized is kept, Δ is formed again in backward."""

    @staticmethod
    def forward(ctx, x, W, values, layer):
        ctx.layer = layer
        ctx.save_for_backward(x, W, values)
        if W.dtype == values.dtype:
            return x @ (W + layer.spread(values)).T
        return x @ W.T + x @ layer.spread(values).to(x.dtype).T

    @staticmethod
    def backward(ctx, dy):
        x, W, values = ctx.saved_tensors
        layer = ctx.layer
        delta = layer.spread(values)
        exact = W.dtype == values.dtype
        dx = dy @ (W + delta) if exact else dy @ W + dy @ delta.to(dy.dtype)
        dW = (dy.reshape(-1, len(W)).T @ x.reshape(-1, W.shape[1])).to(values.dtype).flatten()
        layer.gather(dW)
        return dx, None, dW[layer.lora_places], None


class SpIELLinear(nn.Module):
    """y = x (W + Δ)ᵀ + bias, for x (..., in) -> (..., out)."""
    STATE = ("candidates", "seen", "gathering", "age")  # what a resumed run needs beside tensors

    def __init__(self, base, count, schedule):
        super().__init__()
        self.base, self.schedule, W = base, schedule, base.weight
        wide = torch.promote_types(W.dtype, torch.float32)
        self.lora_values = nn.Parameter(torch.zeros(count, device=W.device, dtype=wide))
        places = torch.randperm(W.numel(), device=W.device)[:count].sort().values
        self.lora_places = nn.Buffer(places)
        self.candidates = self.seen = None      # places (k); sums of g and of g² there (2, k)
        self.gathering, self.step_gradient, self.age = True, None, 0

    def spread(self, values):
        W = self.base.weight
        return values.new_zeros(W.numel()).index_add(0, self.lora_places, values).view_as(W)

    def forward(self, x):
        y = SparseProduct.apply(x, self.base.weight, self.lora_values, self)
        return y if self.base.bias is None else y + self.base.bias

    def delta(self):
        return self.spread(self.lora_values)                                # (out, in)

    def gather(self, dW):
        """Called by backward, once a micro-batch: dense until there are candidates."""
        if self.gathering:
            part = dW if self.candidates is None else dW[self.candidates]
            self.step_gradient = part if self.step_gradient is None else self.step_gradient + part

    def end_step(self):
        """A step's whole gradient joins the sums; the first one of a window names candidates."""
        g, self.step_gradient = self.step_gradient, None
        if g is None:
            return
        if self.candidates is None:
            self.candidates = g.abs().topk(len(self.lora_places)).indices
            g, self.seen = g[self.candidates], g.new_zeros(2, len(self.lora_places))
            self.age = 0
        self.seen += torch.stack((g, g * g))
        self.age += 1

    def reselect(self, share, state, betas):
        """Drop the smallest values for the candidates of the largest gradients, in place."""
        if self.candidates is None:
            return
        values, places = self.lora_values, self.lora_places
        order = values.abs().argsort()
        dropped = order[:int(len(places) * share)]
        kept = places[order[len(dropped):]]
        fresh = ~torch.isin(self.candidates, kept)
        fresh, sums = self.candidates[fresh], self.seen[:, fresh]
        top = sums[0].abs().argsort(descending=True)[:len(dropped)]
        grown, sums = fresh[top], sums[:, top]
        stays = torch.isin(grown, places[dropped])              # dropped and grown again: untouched
        dropped = dropped[~torch.isin(places[dropped], grown[stays])]
        grown, (g, g2) = grown[~stays], sums[:, ~stays] / self.age
        slots = dropped[:len(grown)]
        places[slots], values[slots] = grown, 0
        state["exp_avg"][slots] = g * (1 - betas[0] ** self.age)
        state["exp_avg_sq"][slots] = g2 * (1 - betas[1] ** self.age)
        state["age"][slots] = float(self.age)
        self.candidates = self.seen = None


class SparseAdamW(torch.optim.Optimizer):
    """AdamW whose bias correction knows the age of every element; ends a step with due changes."""

    def __init__(self, params, lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, (b1, b2), g = self.state[p], group["betas"], p.grad
                for key in ("exp_avg", "exp_avg_sq", "age"):
                    state.setdefault(key, torch.zeros_like(p))
                state["age"] += 1
                state["exp_avg"].lerp_(g, 1 - b1)
                state["exp_avg_sq"].lerp_(g * g, 1 - b2)
                m = state["exp_avg"] / (1 - b1 ** state["age"])
                v = state["exp_avg_sq"] / (1 - b2 ** state["age"])
                p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))
                p.sub_(group["lr"] * group["weight_decay"] * p)         # of Δ, after the step
                if due := vars(p).pop("due", None):
                    layer, share = due
                    layer.reselect(share, state, group["betas"])


def make_optimizer(params, lr, weight_decay):
    return SparseAdamW(params, lr, weight_decay)


@torch.no_grad()
def observe(model, t, T):
    """Gather step t's gradients where the schedule says so; a due change comes after its step."""
    for layer in (m for m in model.modules() if hasattr(m, "gather")):
        S, A, rate = layer.schedule
        layer.end_step()
        if t % S == A and t < T:
            layer.lora_values.due = layer, 1.0 if t == A else rate * (1 - t / T)
        start = (t + 1) // S * S                    # of the next step's window, if it can end
        layer.gathering = t + 1 - start <= A and start + A < T


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


def inject(model, targets, rank, alpha=None, dropout=0.0, *, density=0.0, reselection_steps=20,
           accumulation_steps=5, reselection_rate=0.2):
    """
    Freeze the model, wrap its targets in place. ValueError for an alpha or dropout (SpIEL has
    neither), a rank outside 1..min(in, out), a density or rate outside 0..1, or unless
    0 < accumulation_steps < reselection_steps.
    """
    if alpha is not None or dropout:
        raise ValueError("SpIEL has no alpha and no dropout: its values are added to the weight")
    if not 0 <= density <= 1 or not 0 <= reselection_rate <= 1:
        raise ValueError(f"density {density}, reselection_rate {reselection_rate}, expected 0 to 1")
    if not 0 < accumulation_steps < reselection_steps:
        raise ValueError(f"accumulation_steps {accumulation_steps}, expected 1 to "
                         f"reselection_steps - 1 = {reselection_steps - 1}")
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
    schedule = reselection_steps, accumulation_steps, reselection_rate
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        size = base.weight.numel()
        count = int(density * size) if density else min(size, rank * sum(base.weight.shape))
        layer = SpIELLinear(base, max(1, count), schedule)
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
    """NotImplementedError: scattered entries have no low rank."""
    raise NotImplementedError("SpIEL's update is sparse, not low-rank: it has no factors")
