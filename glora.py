"""
G-LoRA: Global-Local Decoupled Low-Rank Adaptation (Xiong et al., Findings of ACL 2026). Official
code: none. Not Generalized LoRA (arXiv 2306.07967), which other libraries call `glora`.

Two adapters share LoRA's parameters. The global one covers the whole weight; the local one does at
first, too, and at each re-initialisation keeps the half of its input and the half of its output
features that mattered most, at twice the rank. Both start on singular triplets of the weight, and
what they take leaves the frozen part: neither an init nor a re-init changes the function.

    y = x W_res + x G_A G_B + (x[:, R] L_A L_B, placed at the columns C)                   (Eq. 2)

Notation (paper, y = x W  ->  here, y = x Wᵀ: its rows are input features, its columns output ones):
    m, n         i, o and m, n    input and output features: of the weight, and of the region
    (1-α)r, αr   r_g, r_l         rank · g / (g + l) and rank · l / (g + l), for --ratio g:l
    G_A, G_B     lora_global_A (r_g, i), lora_global_B (o, r_g), transposed
    L_A, L_B     lora_local_A (r, m), lora_local_B (n, r), transposed; r = 2^s r_l in stage s
    π_r, π_c     lora_rows (m), lora_columns (n)   R, C: what the cut keeps of the permutations
    W_res        base.weight = pretrained + lora_fixed_B lora_fixed_A, rounded once

Differs from the paper: Eq. 2 sums the local adapters of all stages and Eq. 11 merges each of them
    into W_res, which counts them twice: here one is live, and the earlier ones are in W_res.
    Alg. 1 never subtracts L, doubles r_l or restores the order: Eqs. 11 - 15 do, and hold.
    App. J.2 decomposes L alone, whose rank is half of what Eq. 14 takes: not followed.
Left open by the paper: the direction of Eq. 10, descending; the gradient of Eq. 9, of whole
    optimizer steps, scores averaged over the stage; Table 4's `grad` and `fisher`, mean |g| and g²;
    Table 6's `bottom` at stage 0, among the triplets that G left (the last of W - G are its null
    space); Halko's power iterations, 2; dropout's place, on x, one mask for both adapters. With
    dropout the start is not the pretrained function, as the adapters hold weight: the default is 0.
"""
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

IMPORTANCE = {"taylor": lambda L, g: (L * g).abs(),                     # Eq. 9
              "grad": lambda L, g: g.abs(),                             # these two: Table 4
              "fisher": lambda L, g: g * g}
DEFAULTS = {"ratio": ("3:1", "rank of the global to rank of the local adapter"),
            "svd": ("exact", "of the regions, at a re-initialisation", ("exact", "randomized")),
            "oversample": (4, "width of the randomized SVD's sketch, in ranks of the stage"),
            "importance": ("taylor", "of an entry of the local factors", tuple(IMPORTANCE)),
            "importance_window": ("stage", "mean over it, or its last step", ("stage", "last")),
            "global_init": ("bottom", "triplets that G starts on", ("bottom", "top")),
            "local_init": ("top", "triplets that L starts on", ("top", "bottom"))}
COMMON = {"reinit_every": "2"}


def exact_svd(M, take):
    """
    U (n, k), Σ (k), V (m, k) of M (n, m): the triplets at the k positions `take`, largest first.
    From the eigenvectors of the smaller Gram matrix, in float64, as its condition is M's squared:
    the vectors of the other side are formed only where they are taken.
    """
    if len(M) < M.shape[1]:
        return exact_svd(M.T, take)[::-1]
    M64 = M.double()
    V = torch.linalg.eigh(M64.T @ M64).eigenvectors.flip(1)[:, take]
    U = M64 @ V
    S = U.norm(dim=0)
    return (U / S.clamp(min=torch.finfo(S.dtype).tiny)).to(M), S.to(M), V.to(M)


def ends(order, k, where):
    """The k first ("top") or last ("bottom") of `order`, and the others."""
    first, last = order.split((k, len(order) - k) if where == "top" else (len(order) - k, k))
    return (first, last) if where == "top" else (last, first)


def region_svd(M, k, own):
    """k triplets of a region M (n, m), for its local adapter (Eq. 13)."""
    width = own["oversample"] * k
    if own["svd"] == "exact" or width >= min(M.shape):
        return exact_svd(M, ends(torch.arange(min(M.shape)), k, own["local_init"])[0])
    U, S, V = torch.svd_lowrank(M, q=width, niter=2)        # Halko et al. 2011
    return U[:, :k], S[:k], V[:, :k]


def balanced(U, S, V):
    """A = Σ^½ Vᵀ (k, m) and B = U Σ^½ (n, k), so B A = U Σ Vᵀ (Eqs. 5, 14)."""
    return (V * S.sqrt()).T.contiguous(), U * S.sqrt()


def most_important(score, dim):
    """Positions, ascending, of the half of the features with the largest ℓ2 norms (Eq. 10)."""
    order = score.norm(dim=dim).argsort(descending=True, stable=True)
    return order[:len(order) // 2].sort().values


def is_dense(r, n, m):
    """Whether a pair of rank r costs as much as the whole (n, m) region: then L is one block."""
    return r * (n + m) >= n * m


class GLoRALinear(nn.Module):
    """y = x W_resᵀ + bias + x̃ (G + L)ᵀ, x̃ = dropout(x), for x (..., i) -> (..., o)."""

    def __init__(self, base, r_g, r_l, dropout, own):
        super().__init__()
        self.base, self.dropout, self.own = base, nn.Dropout(dropout), own
        self.pretrained = None                          # a copy of the first W, on the CPU
        (o, i), W = base.weight.shape, base.weight.detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        A, B = W.new_empty(r_g + r_l, i), W.new_empty(o, r_g + r_l)
        if not W.is_meta:                               # there only shapes are wanted
            G, others = ends(torch.arange(min(o, i)), r_g, own["global_init"])
            L, _ = ends(others, r_l, own["local_init"])
            A, B = balanced(*exact_svd(W, torch.cat((G, L))))                   # Eqs. 4, 5, 14
        (G_A, L_A), (G_B, L_B) = A.split((r_g, r_l)), B.split((r_g, r_l), 1)
        self.lora_global_A = nn.Parameter(G_A.clone())
        self.lora_global_B = nn.Parameter(G_B.clone())
        self.lora_fixed_A, self.lora_fixed_B = nn.Buffer(G_A.clone()), nn.Buffer(-G_B)      # Eq. 5
        pair = (None, torch.zeros_like(W)) if is_dense(r_l, o, i) else (L_A, L_B)
        self.begin(*(torch.arange(size, device=W.device) for size in (i, o)), *pair)
        if not W.is_meta:
            self.take_out()

    def begin(self, rows, columns, A, B):
        """A local adapter on this region: A (r, m), B (n, r), or no A and B (n, m), dense."""
        self.lora_rows, self.lora_columns = nn.Buffer(rows), nn.Buffer(columns)
        self.lora_local_A = None if A is None else nn.Parameter(A.clone())
        self.lora_local_B = nn.Parameter(B.clone())
        self.scores = None                              # of A, B: summed over the stage by observe

    def local(self):
        """A (r, i), B (o, r) of the local update: zero outside of its region."""
        A, B, (o, i) = self.lora_local_A, self.lora_local_B, self.base.weight.shape
        A = torch.eye(B.shape[1]).to(B) if A is None else A
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
        # Zeros outside of the region, in one pair of plain products with G: 1.00 to 1.03 of LoRA in
        # stages 0 - 3 (2048², r = 8, 2 cores), where gather and index_add take 1.06 to 1.38.
        x_ = self.dropout(x)
        y = self.base(x) + F.linear(F.linear(x_, A.to(x.dtype)), B.to(x.dtype))
        if dense:                                       # as a pair it would be m wide
            block = F.linear(x_[..., self.lora_rows], self.lora_local_B.to(x.dtype))
            y = y.index_add(-1, self.lora_columns, block)
        return y

    def delta(self):
        A, B = self.live()
        return B @ A                                                            # (o, i)

    def region(self, rows, columns):
        """W_res on these features, (n, m), before it is rounded (Eq. 12)."""
        W = self.pretrained[columns.cpu()][:, rows.cpu()].to(self.lora_fixed_A)
        return W + self.lora_fixed_B[columns] @ self.lora_fixed_A[:, rows]

    @torch.no_grad()
    def fix(self, sign):
        """Put the local factors into W_res, with this sign."""
        A, B = self.local()
        self.lora_fixed_A = torch.cat((self.lora_fixed_A, A))
        self.lora_fixed_B = torch.cat((self.lora_fixed_B, sign * B), 1)

    def take_out(self):
        """What the local adapter starts with leaves the frozen weight (Eqs. 14, 15)."""
        if self.lora_local_A is not None:               # a dense one starts at 0
            self.fix(-1)
        self.write(self.lora_fixed_A, self.lora_fixed_B)

    @torch.no_grad()
    def write(self, A, B):
        """W = pretrained + B A, rounded once whatever the number of stages."""
        W = self.base.weight
        if self.pretrained is None:
            self.pretrained = W.detach().to("cpu", copy=True)
        W.copy_(self.pretrained.to(W.device, A.dtype) + B @ A)


def find(model, targets):
    """{name: nn.Linear} whose leaf name or dotted suffix is in targets; none may hit nothing."""
    if not targets:
        raise ValueError("no targets")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hits = {t: [name for name in linears if f".{name}".endswith(f".{t}")] for t in targets}
    for target, names in hits.items():
        if not names:
            raise ValueError(f"target {target!r} matches no nn.Linear of the model")
    hit = set().union(*hits.values())
    return {name: m for name, m in linears.items() if name in hit}


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
    Freeze the model, wrap its targets in place, each after one SVD of its weight. ValueError for an
    alpha (no scale is printed), a bad target or choice, a rank outside 1..min(in, out), a ratio
    that does not divide it, or the trailing triplets of a randomized SVD.
    """
    own = dict(svd=svd, oversample=oversample, importance=importance, global_init=global_init,
               importance_window=importance_window, local_init=local_init)
    if alpha is not None:
        raise ValueError("G-LoRA has no alpha: its adapters are not scaled (Eq. 2)")
    for flag, value in own.items():
        if len(DEFAULTS[flag]) > 2 and value not in DEFAULTS[flag][2]:
            raise ValueError(f"{flag} {value!r}, expected one of {', '.join(DEFAULTS[flag][2])}")
    if oversample < 1:
        raise ValueError(f"oversample {oversample}, expected at least 1")
    if svd == "randomized" and local_init == "bottom":
        raise ValueError("local_init bottom needs svd exact: randomized finds leading triplets")
    model.requires_grad_(False)
    found = find(model, targets)
    for name, base in found.items():
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} for {name}, expected 1 to {min(base.weight.shape)}")
    r_g, r_l = split_rank(rank, ratio)
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
        pair = layer.lora_local_A, layer.lora_local_B
        if pair[0] is None or pair[0].grad is None or pair[1].grad is None:
            continue
        new = [IMPORTANCE[layer.own["importance"]](L, L.grad) for L in pair]
        earlier = layer.scores if layer.own["importance_window"] == "stage" else None
        layer.scores = [a + b for a, b in zip(earlier, new)] if earlier else new


@torch.no_grad()
def reinit(model, optimizer):
    """The next stage of every local adapter (Eqs. 10 - 15); a dense one stays as it is (§3.2.2)."""
    for name, layer in layers(model).items():
        A, B, scores = layer.lora_local_A, layer.lora_local_B, layer.scores
        if A is None:
            continue
        if scores is None or not all(score.any() for score in scores):
            warnings.warn(f"{name}: a stage without gradients, its region is cut by magnitude")
            scores = A.abs(), B.abs()
        rows = layer.lora_rows[most_important(scores[0], 0)]                    # Eq. 10
        columns = layer.lora_columns[most_important(scores[1], 1)]
        layer.fix(+1)                                                           # Eq. 11
        M, r = layer.region(rows, columns), 2 * len(A)                          # Eq. 12
        dense = is_dense(r, *M.shape)
        pair = (None, torch.zeros_like(M)) if dense else balanced(*region_svd(M, r, layer.own))
        layer.begin(rows, columns, *pair)                                       # Eqs. 13, 14
        layer.take_out()
        replace(optimizer, A, layer.lora_local_A)
        replace(optimizer, B, layer.lora_local_B)


def replace(optimizer, old, new):
    """Parameter `new`, or none, takes the place of `old` in its group; the state of `old` goes."""
    optimizer.state.pop(old, None)
    for group in optimizer.param_groups:
        places = [(new,) if p is old else (p,) for p in group["params"]]
        group["params"] = [p for place in places for p in place if p is not None]


@torch.no_grad()
def merge(model):
    """Write every whole update into its weight, rounded once, and put the plain nn.Linear back."""
    for name, layer in layers(model).items():
        layer.write(*layer.total())
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
        if A is None or B is None or A.shape != (B.shape[-1], i) or B.shape != (o, len(A)):
            raise ValueError(f"tensors {name}.lora_fixed_A and _B are missing or not for {o} x {i}")
        places = []
        for key, size in (("rows", i), ("columns", o)):
            index = tensors.get(f"{name}.lora_{key}", torch.empty(0)).flatten()
            if not 0 < len(index) == len(index.unique()) or index.min() < 0 or index.max() >= size:
                raise ValueError(f"tensor {name}.lora_{key}, expected distinct, below {size}")
            places.append(index.to(W.device, torch.long))
        m, n = map(len, places)
        r = m if L is None else len(L)
        A_new = None if L is None else torch.empty(r, m, **new)     # load_state_dict fills them
        layer.begin(*places, A_new, torch.empty(n, r, **new))
        layer.lora_fixed_A, layer.lora_fixed_B = A.to(**new), B.to(**new)
        layer.write(layer.lora_fixed_A, layer.lora_fixed_B)
