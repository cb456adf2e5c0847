"""
CPS-LoRA: Localized Low-Rank Adaptation within Clustered Parameter Subspaces (Xiong et al., ACL
2026). Official code: none.

Like GraLoRA a k x k grid of local low-rank pairs with LoRA's parameter count, but the blocks are
clusters of rows and of columns, and they move. Training runs in stages: after each, the update is
merged, its rows and columns are clustered by likeness, and new pairs start on new blocks.
A stage needs time: its B starts at 0 and its Adam moments empty, at whatever rate the schedule has.

    W_t = W_{t-1} + ΔW_{t-1},  ΔW[I_n, J_j] = A_l B_l,  n, j = 1..k,  l = n + k (j - 1)   (Eq. 10)

Notation (paper, y = x W  ->  here, y = x Wᵀ: the paper's rows are input features):
    m, n      i, o          input and output features
    r, r'     rank, p       LoRA's r, and a block's: p = r / k; a stage's ΔW has rank <= k r
    I_n, J_j  lora_rows (i), lora_columns (o)      the cluster, 0 .. k - 1, of each feature
    A_l       lora_A[j-th p rows, I_n]ᵀ            of lora_A (r, i): LoRA's shapes, whatever the
    B_l       lora_B[J_j, n-th p columns]ᵀ         of lora_B (o, r)  sizes of the clusters (App. D)
    π_r, π_c  orders of the features, here only cut into clusters: no weight is permuted (App. K.2)

Differs from the paper: Alg. 1's line 6, W_t ← (W_{t-1} + ΔW_{t-1})[π_r, :][:, π_c], writes no
    weight: in bf16 a small ΔW would be rounded away. W stands until merge(), and the ended stages'
    factors run beside the live ones: the same function in every dtype. Each stage adds k r (i + o)
    saved numbers a module and some time: the 2nd takes 1.03 of LoRA's step, the 10th 1.15 (2048²;
    at 4096² 1.01 and 1.07, by 7 % more FLOPs; r = 8, k = 2, 512 tokens, one core). delta() and
    factors() are of all stages, where Alg. 1 returns the last one's update.
    App. E, corrected: A, B are App. A's expanded factors; Eq. 2's scaling by D, left out there, is
    in; the products of rows are A (B r_refᵀ), and diag(A (B Bᵀ) Aᵀ) holds squared norms.
    u, v of Eq. 4 are the second singular pair (§3.3; §4.2's "dominant" is a slip).
Left open by the paper: the fan-in of A's Kaiming init, its row cluster; the values at a re-init,
    the same again; the cosine's reference, the longest vector; d = max(1, ⌈log2 k⌉), k-means for
    each side apart, the best of ten; "imbalanced", a cluster under half of the equal share;
    dropout, 0; where it is set it reaches the live stage alone, as in the paper's form.
    The printed strategies find blocks of different mean. Blocks of mean zero in orthogonal
    subspaces (Prop. 2) look alike to them; `abs-cosine`, ours, tells those apart.
"""
import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# balance1, 2: k-means, and if it is imbalanced a cut by Eq. 4 or by cosine; none: blocks stay.
STRATEGIES = ("cosine", "spectral", "spectral-balance1", "spectral-balance2", "random", "none",
              "abs-cosine")
DEFAULTS = {"k": (2, "clusters per side"),
            "strategy": ("cosine", "how the next stage's clusters are found", STRATEGIES),
            "reference": ("longest", "what the cosine is taken with", ("longest", "mean", "first"))}
COMMON = {"reinit_every": "1"}
# On the bundled model: two stages, as in the paper.
TINY = {"lr": 5e-3, "max_steps": 300, "reinit_every": "150s"}
PRESET = "cps_lora"                     # whose rows of presets.py apply


# ---- clustering: the rows of P Qᵀ (m, n), with P (m, R) and Q (n, R), never formed as a whole

def cosine_order(P, Q, reference="longest", absolute=False):
    """Rows of P Qᵀ by their cosine with one of them (or their mean), ascending: (m,) (App. E)."""
    inner = P @ (Q.T @ Q)                                               # rows' products: inner @ Pᵀ
    norms = (inner * P).sum(1).clamp(min=0).sqrt()
    ref = dict(longest=P[norms.argmax()], mean=P.mean(0), first=P[0])[reference]
    similarity = inner @ ref / norms.clamp(min=torch.finfo(P.dtype).tiny)
    return (similarity.abs() if absolute else similarity).argsort()


def spectral_embedding(P, Q, d):
    """Singular vectors 2 .. d + 1 of S (Eqs. 2, 3) for rows and columns of P Qᵀ: (m, d), (n, d)."""
    (m, _), (n, _) = P.shape, Q.shape
    lowest = min((part @ Q.T).min() for part in P.split(1024))          # in chunks: never m x n
    P = torch.cat((P, -lowest.expand(m, 1)), 1)                         # ΔW - min ΔW = P Qᵀ, now
    Q = torch.cat((Q, Q.new_ones(n, 1)), 1)
    D_r, D_c = P @ Q.sum(0), Q @ P.sum(0)                               # row and column sums
    eps = torch.finfo(P.dtype).eps      # a row of minima sums to rounding: no division by that
    Q_P, R_P = torch.linalg.qr(P / D_r.clamp(min=eps * D_r.max()).sqrt()[:, None])
    Q_Q, R_Q = torch.linalg.qr(Q / D_c.clamp(min=eps * D_c.max()).sqrt()[:, None])
    U, _, Vh = torch.linalg.svd(R_P @ R_Q.T)                            # App. E: a small SVD
    return Q_P @ U[:, 1:d + 1], Q_Q @ Vh[1:d + 1].T                     # the first pair is trivial


def balanced_cut(order, k):
    """Cluster of each of m features when their order is cut into k parts, equal to within one."""
    clusters = torch.empty_like(order)
    clusters[order] = torch.arange(len(order), device=order.device) * k // len(order)
    return clusters


def lloyd(X, k, steps=50):
    """A run of Lloyd's k-means, seeded as k-means++: its inertia (squared distances), clusters."""
    centers = X[torch.randint(len(X), (1,))]
    for _ in range(k - 1):
        far = torch.cdist(X, centers).amin(1) ** 2
        seed = torch.multinomial(far if far.sum() > 0 else torch.ones_like(far), 1)
        centers = torch.cat((centers, X[seed]))
    for _ in range(steps):
        distance, clusters = torch.cdist(X, centers).min(1)
        for j in range(k):
            if not (clusters == j).any():       # empty: takes the point that is worst off elsewhere
                alone = clusters.bincount(minlength=k)[clusters] == 1
                clusters[distance.masked_fill(alone, -1).argmax()] = j
        moved = torch.stack([X[clusters == j].mean(0) for j in range(k)])
        if torch.equal(moved, centers):
            break
        centers = moved
    return distance.square().sum(), clusters


def kmeans(X, k, starts=10):
    """X (m, d) -> (m,) clusters in 0 .. k - 1: of the best run, as a single one may get stuck."""
    return min((lloyd(X, k) for _ in range(starts)), key=lambda run: run[0])[1]


def cluster(P, Q, k, strategy, reference="longest"):
    """Clusters of the rows of P Qᵀ (m) and of its columns (n); both random where P Qᵀ is 0."""
    absolute = strategy == "abs-cosine"
    cosine = lambda P, Q: balanced_cut(cosine_order(P, Q, reference, absolute), k)
    if strategy != "random" and not ((P.T @ P) @ (Q.T @ Q)).diagonal().sum() > 0:   # |P Qᵀ|²
        warnings.warn("a stage left no update: the next clusters are random")
        strategy = "random"
    if strategy == "random":
        return tuple(balanced_cut(torch.randperm(len(X)).to(X.device), k) for X in (P, Q))
    if strategy in ("cosine", "abs-cosine"):
        return cosine(P, Q), cosine(Q, P)
    found = []
    embeddings = spectral_embedding(P, Q, max(1, math.ceil(math.log2(k))))
    for X, (L, R) in zip(embeddings, ((P, Q), (Q, P))):
        clusters = kmeans(X, k)
        if strategy != "spectral" and clusters.bincount(minlength=k).min() < len(X) / (2 * k):
            balance1 = strategy == "spectral-balance1"      # then by u or v: Eq. 4
            clusters = balanced_cut(X[:, 0].argsort(), k) if balance1 else cosine(L, R)
        found.append(clusters)
    return tuple(found)


def expand(A, B, rows, columns, k):
    """
    The block-sparse factors of the whole update: (k R, i) and (o, k R), ΔW = their product.
    rows (i) and columns (o) name the block of each input and each output feature. The inner axis
    counts (n, j, p): input block, output block, rank; a block pair meets in the one p it owns.
    """
    each = torch.arange(k, device=A.device)
    A = A * (rows == each[:, None])[:, None]                            # (n, R, i), R = (j, p)
    # (n, j, p, o): laid out along o, for a CPU's products are faster so, the backward's above all.
    B = B.T.contiguous().unflatten(0, (k, 1, -1)) * (columns == each[:, None])[:, None]
    return A.flatten(0, 1), B.flatten(0, 2).T


def add_update(base, x, update):
    """
    base(x) + update (..., o), rounded once: a product that starts from the update. In bf16 base(x)
    is rounded at first, and would swallow what is less than half a unit of its last place.
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class CPSLinear(nn.Module):
    """
    y = x (W + ΔW_1 + .. + ΔW_{t-1})ᵀ + bias + x̃ ΔW_tᵀ, x̃ = dropout(x), x (..., i) -> (..., o).
    """

    def __init__(self, base, rank, dropout, k, strategy, reference):
        super().__init__()
        self.base, self.dropout, self.k = base, nn.Dropout(dropout), k
        self.strategy, self.reference = strategy, reference
        (o, i), W = base.weight.shape, base.weight
        new = dict(device=W.device, dtype=torch.promote_types(W.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, i, **new))
        self.lora_B = nn.Parameter(torch.empty(o, rank, **new))
        self.register_buffer("lora_rows", torch.empty(i, dtype=torch.long, device=W.device))
        self.register_buffer("lora_columns", torch.empty(o, dtype=torch.long, device=W.device))
        self.register_buffer("lora_merged_A", torch.empty(0, i, **new))     # of the stages so far,
        self.register_buffer("lora_merged_B", torch.empty(o, 0, **new))     # expanded
        self.start(*(balanced_cut(torch.randperm(n).to(W.device), k) for n in (i, o)))

    @torch.no_grad()
    def start(self, rows, columns):
        """A stage on these clusters, with new factors (Alg. 1, lines 1 and 8)."""
        self.lora_rows.copy_(rows)
        self.lora_columns.copy_(columns)
        each = torch.arange(self.k, device=rows.device)
        fan_in = (rows == each[:, None]).sum(1)[rows]                   # (i), its cluster's size
        self.lora_A.uniform_(-1, 1).div_(fan_in.sqrt())
        self.lora_B.zero_()

    def expanded(self):
        return expand(self.lora_A, self.lora_B, self.lora_rows, self.lora_columns, self.k)

    def total(self):
        """A (R, i), B (o, R) of the whole update: the merged stages' factors, then the live."""
        A, B = self.expanded()
        return torch.cat((self.lora_merged_A, A)), torch.cat((self.lora_merged_B, B), 1)

    def forward(self, x):
        # Plain products, (..., R) inside, beat permuting x and y around Eq. 8's product
        # up to R = 256 (2048², 512 tokens, 2 cores: 1.0 to 1.3 times LoRA, against 1.4 to 1.5).
        A, B = (f.to(x.dtype) for f in self.expanded())
        update = F.linear(F.linear(self.dropout(x), A), B)
        if len(self.lora_merged_A):                                     # of W_t (Alg. 1, line 6)
            A, B = self.lora_merged_A.to(x.dtype), self.lora_merged_B.to(x.dtype)
            update = update + F.linear(F.linear(x, A), B)
        return add_update(self.base, x, update)

    def delta(self):
        A, B = self.total()
        return B @ A                                        # (o, i), Eqs. 10, 11, of all stages


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


def inject(model, targets, rank, alpha=None, dropout=0.0, *, k=2, strategy="cosine",
           reference="longest"):
    """
    Freeze the model, wrap its targets in place. ValueError for an alpha (no scale is printed), a
    bad target, dropout or strategy, a rank outside 1..min(in, out), or a k that does not divide it.
    """
    if alpha is not None:
        raise ValueError("CPS-LoRA has no alpha: its update is not scaled (Eq. 8)")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}, expected 0 <= dropout < 1")
    for flag, value in (("strategy", strategy), ("reference", reference)):
        if value not in DEFAULTS[flag][2]:
            raise ValueError(f"{flag} {value!r}, expected one of {', '.join(DEFAULTS[flag][2])}")
    found = find(model, targets)
    for name, base in found.items():
        smaller = min(base.weight.shape)
        if not 1 <= rank <= smaller:
            raise ValueError(f"rank {rank} for {name}, expected 1 to {smaller}")
        if k < 1 or rank % k:                                           # so k <= rank <= smaller
            raise ValueError(f"k {k} for {name}, expected a divisor of rank {rank}")
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        layer = CPSLinear(base, rank, dropout, k, strategy, reference)
        setattr(model.get_submodule(parent), leaf, layer)


def layers(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "delta")}


@torch.no_grad()
def reinit(model, optimizer):
    """The next stage (Alg. 1, lines 4 - 8): cluster the ended update, keep it, start anew."""
    for layer in layers(model).values():
        A, B = layer.expanded()                                         # line 4: ΔW_{t-1} = B A
        rows, columns = layer.lora_rows, layer.lora_columns
        if layer.strategy != "none":
            # Line 5, on the paper's ΔW = Aᵀ Bᵀ.
            rows, columns = cluster(A.T, B, layer.k, layer.strategy, layer.reference)
        # Line 6, W_t ← (W_{t-1} + ΔW_{t-1})[π_r, :][:, π_c]: W_t is W and all factors so far.
        layer.lora_merged_A, layer.lora_merged_B = layer.total()
        layer.start(rows, columns)                                      # lines 7, 8
        for p in (layer.lora_A, layer.lora_B):
            p.grad = None                                               # of the factors that ended
            optimizer.state.pop(p, None)


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
    """{name: (A (R, in), B (out, R))} of the update over all stages, R = stages · k r."""
    return {name: tuple(f.detach() for f in layer.total()) for name, layer in layers(model).items()}


@torch.no_grad()
def restore(model, tensors):
    """Give a fresh model the saved merged stages; ValueError if one is missing or misfits."""
    for name, layer in layers(model).items():
        A, B = (tensors.get(f"{name}.lora_merged_{x}") for x in "AB")
        o, i = layer.base.weight.shape
        if A is None or B is None or A.shape[1:] != (i,) or B.shape != (o, len(A)):
            raise ValueError(f"tensors {name}.lora_merged_A and _B are missing "
                             f"or not for {o} x {i}")
        layer.lora_merged_A, layer.lora_merged_B = A.to(layer.lora_A), B.to(layer.lora_A)
