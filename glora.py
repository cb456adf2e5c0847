"""
G-LoRA: Global-Local Decoupled Low-Rank Adaptation (Xiong et al., Findings of ACL 2026). Official
code: none. Not Generalized LoRA (arXiv 2306.07967), which other libraries call `glora`.

Two adapters split LoRA's parameter budget. The global one covers the whole weight; the local one
does at first, too, and at each re-initialisation keeps the half of its input and the half of its
output features that mattered most, at twice the rank. Both start on singular triplets, of W and
later of W_res on the region, which leave the frozen weight: but for rounding, no start changes the
function.

    y = x W_res + x G_A G_B + (x[:, R] L_A L_B, placed at the columns C)                   (Eq. 2)

Notation (paper, y = x W  ->  here, y = x Wᵀ: the paper's rows are input features):
    m, n         i, o and m, n    input and output features: of the weight, and of the region
    i            s                stage: how many re-initialisations came before
    (1-α)r, αr   r_g, r_l         rank · g / (g + l) and rank · l / (g + l), for --ratio g:l
    G_A, G_B     lora_global_A (r_g, i), lora_global_B (o, r_g), transposed
    L_A, L_B     lora_local_A (r, m), lora_local_B (n, r), transposed; r = 2^s r_l
    π_r, π_c     lora_rows (m), lora_columns (n): R, C, the features they put first, in any order
    W_res        base.weight = pretrained + lora_fixed_B lora_fixed_A, rounded once. These hold, at
                 full width, what G and every L took at their start (minus, in B) and what every
                 merged L became: up to r_g + r_l (3 · 2^s - 2) rows of A; 98 at rank 8, 3:1, after
                 4 re-initialisations; 278 at 1:3, 1.17 GB in fp32 for LLaMA2-7B's q, k, v, o.

Differs from the paper: Eq. 2 sums the local adapters of all stages and Eq. 11 merges each of them
    into W_res, which counts them twice: here one is live, and the earlier ones are in W_res.
    Alg. 1 neither subtracts L nor doubles r_l nor puts W_res back in order; lines 2 and 15 slip in
    their indices: Eqs. 11 - 15 hold. Eq. 5 subtracts G alone: at stage 0 L leaves W, too (§3.2).
    App. J.2 decomposes L alone, whose rank is half of what Eq. 14 takes: not followed.
Left open by the paper: the direction of Eq. 10, descending; the gradient of Eq. 9, of whole
    optimizer steps, scores averaged over the stage, magnitudes where there was none; Table 4's
    `grad` and `fisher`, mean |g| and g²; Table 6 at stage 0, L's choice among the triplets that G
    left; "full fine-tuning" of a region, one block that starts at 0 and is kept; randomized SVD, a
    sketch of oversample · r columns, two power iterations, exact at stage 0 and for trailing
    triplets, which no sketch finds; optimizer state, L's dropped, G's and a dense L's kept; scale,
    none; dropout's place, on x, one mask for both. With dropout the start is not
    the pretrained function, as the adapters hold weight; weight decay, for the same reason, shrinks
    W itself: the default of both is 0. A triplet of σ = 0 has no gradient: a weight of lower rank
    wastes those of a `bottom` start.
"""
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

IMPORTANCE = {"taylor": lambda L, g: (L * g).abs(),                     # Eq. 9
              "grad": lambda L, g: g.abs(),                             # Table 4
              "fisher": lambda L, g: g * g}                             # Table 4
DEFAULTS = {"ratio": ("3:1", "rank of the global to rank of the local adapter"),
            "svd": ("exact", "of a new region, at a re-initialisation", ("exact", "randomized")),
            "oversample": (4, "width of the randomized SVD's sketch, in ranks of the stage"),
            "importance": ("taylor", "score of an entry of the local factors", tuple(IMPORTANCE)),
            "importance_window": ("stage", "its mean score, or its last step's", ("stage", "last")),
            "global_init": ("bottom", "triplets that G starts on", ("bottom", "top")),
            "local_init": ("top", "triplets that L starts on", ("top", "bottom"))}
COMMON = {"reinit_every": "2"}
TINY = {"lr": 5e-3, "reinit_every": "60s"}   # on the bundled model; "2": epochs, "60s": steps
PRESET = "glora"                        # whose rows of presets.py apply


def exact_svd(M, take):
    """
    U (n, k), Σ (k), V (m, k) of M (n, m): the triplets at the k positions `take`, counted from the
    largest. From the eigenvectors of the smaller Gram matrix, in float64, as its condition is M's
    squared: a σ's are off by about 2e-16 (σ₁ / σ)². The other side's are formed only where taken.
    """
    if len(M) < M.shape[1]:
        return exact_svd(M.T, take)[::-1]
    M64 = M.to("cpu" if M.device.type == "mps" else M.device, torch.float64)    # MPS has no float64
    V = torch.linalg.eigh(M64.T @ M64).eigenvectors.flip(1)[:, take]
    U = M64 @ V         # In all 0.6 of an SVD's time in float64, 1.0 in float32 (4096², one core).
    S = U.norm(dim=0)
    return (U / S.clamp(min=torch.finfo(S.dtype).tiny)).to(M), S.to(M), V.to(M)


def take_end(order, k, where):
    """The k first ("top") or last ("bottom") of `order`, and the others."""
    first, last = order.split((k, len(order) - k) if where == "top" else (len(order) - k, k))
    return (first, last) if where == "top" else (last, first)


def region_svd(M, k, svd, oversample, local_init, **_):
    """The k triplets of a region M (n, m) that its local adapter starts on (Eq. 13)."""
    if svd == "exact" or local_init == "bottom" or oversample * k >= min(M.shape):
        return exact_svd(M, take_end(torch.arange(min(M.shape)), k, local_init)[0])
    U, S, V = torch.svd_lowrank(M, q=oversample * k, niter=2)        # Halko et al. 2011
    return U[:, :k], S[:k], V[:, :k]


def balanced(U, S, V):
    """A = Σ^½ Vᵀ (k, m) and B = U Σ^½ (n, k), so B A = U Σ Vᵀ (Eqs. 5, 14)."""
    return (V * S.sqrt()).T.contiguous(), U * S.sqrt()


def most_important(score, dim):
    """Positions, ascending, of the half of the features with the largest ℓ2 norms (Eq. 10)."""
    order = score.norm(dim=dim).argsort(descending=True, stable=True)
    return order[:len(order) // 2].sort().values                        # Alg. 1, line 12


def is_dense(r, n, m):
    """Whether a pair of rank r costs as much as its whole (n, m) region (§3.2.2)."""
    return r * (n + m) >= n * m


def add_update(base, x, update):
    """
    base(x) + update (..., o), rounded once: a product that starts from the update. In bf16 base(x)
    is rounded at first, and would swallow what is less than half a unit of its last place.
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class GLoRALinear(nn.Module):
    """y = x W_resᵀ + bias + x̃ (G + L)ᵀ, x̃ = dropout(x), for x (..., i) -> (..., o)."""
    STATE = ("scores",)     # what a resumed run needs beside the saved tensors

    def __init__(self, base, r_g, r_l, dropout, own):
        super().__init__()
        self.base, self.dropout, self.own = base, nn.Dropout(dropout), own
        self.pretrained = None                          # write copies W here, on the CPU
        (o, i), W = base.weight.shape, base.weight.detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        A, B = W.new_empty(r_g + r_l, i), W.new_empty(o, r_g + r_l)
        if not W.is_meta:                               # there only shapes are wanted
            G, others = take_end(torch.arange(min(o, i)), r_g, own["global_init"])
            L, _ = take_end(others, r_l, own["local_init"])
            A, B = balanced(*exact_svd(W, torch.cat((G, L))))       # Eqs. 4, 5, Alg. 1 line 15
        (G_A, L_A), (G_B, L_B) = A.split((r_g, r_l)), B.split((r_g, r_l), 1)
        # Clones: parameters share no storage.
        self.lora_global_A, self.lora_global_B = (nn.Parameter(G.clone()) for G in (G_A, G_B))
        self.lora_fixed_A, self.lora_fixed_B = nn.Buffer(G_A.clone()), nn.Buffer(-G_B)      # Eq. 5
        pair = (None, torch.zeros_like(W)) if is_dense(r_l, o, i) else (L_A.clone(), L_B.clone())
        self.start(torch.arange(i, device=W.device), torch.arange(o, device=W.device), *pair)
        if not W.is_meta:
            self.move(-1)

    def start(self, rows, columns, A, B):
        """A local adapter on this region: A (r, m), B (n, r); or, dense, A None and B (n, m)."""
        self.lora_rows, self.lora_columns = nn.Buffer(rows), nn.Buffer(columns)
        self.lora_local_A = None if A is None else nn.Parameter(A)
        self.lora_local_B, self.scores = nn.Parameter(B), None      # scores of A, B: see observe

    def local(self):
        """A (r, i), B (o, r) of the local update: zero outside of its region."""
        A, B, (o, i) = self.lora_local_A, self.lora_local_B, self.base.weight.shape
        A = B.new_ones(B.shape[1]).diag() if A is None else A
        return (A.new_zeros(len(A), i).index_copy(1, self.lora_rows, A),
                B.new_zeros(o, len(A)).index_copy(0, self.lora_columns, B))

    def live(self):
        """A (r_g + r, i), B (o, r_g + r) of both adapters: G + L = B A."""
        A, B = self.local()
        return torch.cat((self.lora_global_A, A)), torch.cat((self.lora_global_B, B), 1)

    def total(self):
        """A, B of the whole update against the pretrained weight: all stages, this one included."""
        A, B = self.live()
        return torch.cat((self.lora_fixed_A, A)), torch.cat((self.lora_fixed_B, B), 1)

    def forward(self, x):
        dense = self.lora_local_A is None
        A, B = (self.lora_global_A, self.lora_global_B) if dense else self.live()
        # Eq. 2, zeros outside of the region, in a pair of products with G: 1.01, 1.01, 1.02, 1.03,
        # 1.04 of LoRA's time in stages 0 - 4 (2048², r = 8, 512 tokens, 2 cores); gather and
        # index_add cost more in the early stages, most in stage 0: the whole weight.
        x_ = self.dropout(x)
        # Bᵀ is copied row by row: a CPU is slow where a thin factor lies along its rank.
        update = F.linear(x_, A.to(x.dtype)) @ B.T.to(x.dtype).contiguous()
        if dense:                                       # as a pair it would be m wide
            block = F.linear(x_.index_select(-1, self.lora_rows), self.lora_local_B.to(x.dtype))
            update = update.index_add(-1, self.lora_columns, block)
        return add_update(self.base, x, update)

    def delta(self):
        A, B = self.live()
        return B @ A                                                            # (o, i)

    @torch.no_grad()
    def move(self, sign):
        """L enters (+1, Eq. 11) or leaves (-1, Eqs. 14, 15) W_res, which is returned unrounded."""
        if self.lora_local_A is not None:               # a dense one starts at 0
            A, B = self.local()
            self.lora_fixed_A = torch.cat((self.lora_fixed_A, A))
            self.lora_fixed_B = torch.cat((self.lora_fixed_B, sign * B), 1)
        return self.write(self.lora_fixed_A, self.lora_fixed_B)

    @torch.no_grad()
    def write(self, A, B):
        """W = pretrained + B A, rounded once whatever the number of stages; returned unrounded."""
        if self.pretrained is None:
            self.pretrained = self.base.weight.detach().to("cpu", copy=True)
        W = self.pretrained.to(A) + B @ A
        # Plain rounding is enough: held-out loss with a bf16 base, against fp32's, after four
        # re-inits: +0.3 % (3:1), +0.5 % (1:3) at learning rate 1e-4, -0.1 % (3:1) at 3e-4
        # (SmolLM2-135M, all seven linears, rank 8, 60 steps of 4 GSM8K examples, one seed).
        self.base.weight.copy_(W)
        return W


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


def split_rank(rank, ratio):
    """r_g, r_l of rank = r_g + r_l; ValueError unless ratio "g:l" is of whole numbers that fit."""
    g, l = (int(part) if part.isdecimal() else 0 for part in ratio.partition(":")[::2])
    if not g or not l:
        raise ValueError(f"ratio {ratio!r}, expected two whole numbers above 0, such as 3:1")
    if rank % (g + l):
        raise ValueError(f"ratio {ratio}: rank {rank} is not a multiple of {g} + {l}")
    return rank * g // (g + l), rank * l // (g + l)


def inject(model, targets, rank, alpha=None, dropout=0.0, *, ratio="3:1", svd="exact",
           oversample=4, importance="taylor", importance_window="stage", global_init="bottom",
           local_init="top"):
    """
    Freeze the model, wrap its targets in place; base.weight becomes W_res, by one SVD each.
    ValueError for an alpha (no scale is printed), a bad target, dropout or choice, a rank
    outside 1..min(in, out), a ratio that does not divide it.
    """
    own = dict(ratio=ratio, svd=svd, oversample=oversample, importance=importance,
               importance_window=importance_window, global_init=global_init, local_init=local_init)
    if alpha is not None:
        raise ValueError("G-LoRA has no alpha: its adapters are not scaled (Eq. 2)")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    for flag, (_, _, *choices) in DEFAULTS.items():
        if choices and own[flag] not in choices[0]:
            raise ValueError(f"{flag} {own[flag]!r}, expected one of {', '.join(choices[0])}")
    if oversample < 1:
        raise ValueError(f"oversample {oversample}, expected at least 1")
    if svd == "randomized" and local_init == "bottom":
        warnings.warn("svd randomized finds leading triplets: local_init bottom uses the exact one")
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
    r_g, r_l = split_rank(rank, ratio)
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, GLoRALinear(base, r_g, r_l, dropout, own))


def layers(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "delta")}


@torch.no_grad()
def observe(model, t, T):
    """
    Score the local factors by the gradients that stand (Eq. 9): once an optimizer step, with those
    of the whole batch, before clipping. The sum over a stage orders the features as its mean does.
    """
    for layer in layers(model).values():
        A, B = layer.lora_local_A, layer.lora_local_B
        if A is None or A.grad is None or B.grad is None:
            layer.scores = layer.scores or []           # observed, without a gradient
            continue
        scores = [IMPORTANCE[layer.own["importance"]](L, L.grad) for L in (A, B)]
        if layer.scores and layer.own["importance_window"] == "stage":
            scores = [earlier + now for earlier, now in zip(layer.scores, scores)]
        layer.scores = scores


@torch.no_grad()
def reinit(model, optimizer):
    """The next stage of every local adapter (Eqs. 10 - 15); a dense one stays as it is (§3.2.2)."""
    silent = []
    for name, layer in layers(model).items():
        A, B, scores = layer.lora_local_A, layer.lora_local_B, layer.scores
        if A is None:
            continue
        if not scores or not all(score.any() for score in scores):
            silent.append("observe was not called" if scores is None else f"no gradient at {name}")
            scores = A.abs(), B.abs()
        rows = layer.lora_rows[most_important(scores[0], 0)]                    # Eq. 10
        columns = layer.lora_columns[most_important(scores[1], 1)]
        W = layer.move(+1)                                                      # Eq. 11
        M, r = W[columns][:, rows], 2 * len(A)                                  # Eq. 12, (n, m)
        pair = ((None, torch.zeros_like(M)) if is_dense(r, *M.shape) else
                balanced(*region_svd(M, r, **layer.own)))                       # Eqs. 13, 14
        layer.start(rows, columns, *pair)
        layer.move(-1)                                                          # Eqs. 14, 15
        replace(optimizer, A, layer.lora_local_A)
        replace(optimizer, B, layer.lora_local_B)
    if silent:
        warnings.warn(f"{silent[0]} in this stage; regions cut by magnitude: {len(silent)}")


def replace(optimizer, old, new):
    """Parameter `new`, or none, takes the place of `old` in its group; the state of `old` goes."""
    optimizer.state.pop(old, None)
    for group in optimizer.param_groups:
        swapped = [new if p is old else p for p in group["params"]]
        group["params"] = [p for p in swapped if p is not None]


@torch.no_grad()
def merge(model):
    """Write every whole update into its weight, rounded once, and put the plain nn.Linear back."""
    for name, layer in layers(model).items():
        layer.write(*layer.total())
        layer.pretrained = None                 # its memory, before the next weight is computed
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


def factors(model):
    """{name: (A (R, in), B (out, R))} of the update over all stages: what each took and left."""
    return {name: tuple(f.detach() for f in layer.total()) for name, layer in layers(model).items()}


@torch.no_grad()
def restore(model, tensors):
    """Give a freshly injected model the stage in `tensors`; ValueError names one that misfits."""
    for name, layer in layers(model).items():
        (o, i), W = layer.base.weight.shape, layer.base.weight
        new = dict(device=W.device, dtype=layer.lora_global_A.dtype)
        A, B, L = (tensors.get(f"{name}.lora_{key}") for key in ("fixed_A", "fixed_B", "local_A"))
        if A is None or B is None or A.shape[1:] != (i,) or B.shape != (o, len(A)):
            raise ValueError(f"tensors {name}.lora_fixed_A and _B are missing or not for {o} x {i}")
        places = []
        for key, size in (("rows", i), ("columns", o)):
            index = tensors.get(f"{name}.lora_{key}", torch.empty(0)).flatten()
            if not 0 < len(index) == len(index.unique()) or index.min() < 0 or index.max() >= size:
                raise ValueError(f"tensor {name}.lora_{key}, expected distinct, below {size}")
            places.append(index.to(W.device, torch.long))
        m, n = map(len, places)
        r = m if L is None else L.numel() // m
        pair = torch.empty(r, m, **new), torch.empty(n, r, **new)   # load_state_dict fills them
        layer.start(*places, None if L is None else pair[0], pair[1])
        layer.lora_fixed_A, layer.lora_fixed_B = A.to(**new), B.to(**new)
        layer.write(layer.lora_fixed_A, layer.lora_fixed_B)
