"""
CPS-LoRA: Localized Low-Rank Adaptation within Clustered Parameter Subspaces (Xiong et al., ACL
2026). Official code: none.

Like GraLoRA a k x k grid of local low-rank pairs with LoRA's parameter count, but the blocks are
clusters of rows and of columns, and they move. Training runs in stages: after each, the update is
kept, its rows and its columns are clustered by likeness, and new pairs start on the new blocks.
Rows that are alike are well fitted at low rank. And the ranks p of blocks add up to k r if they are
orthogonal, A_lᵀ A_m = B_l B_mᵀ = 0 for l ≠ m (Prop. 2): sufficient, and not enforced. The first
blocks are random: ΔW is 0 then, there is nothing to sort. A stage needs time: its
B starts at 0, its Adam moments empty, and the learning rate, as scheduled, is not warmed up again.

    W_t = W_{t-1} + ΔW_{t-1},  ΔW[I_n, J_j] = A_l B_l,  n, j = 1..k,  l = n + k (j - 1)   (Eq. 10)

Notation (paper, y = x W  ->  here, y = x Wᵀ: the paper's rows are input features):
    m, n      i, o          input and output features
    r         rank (r)      LoRA's at this parameter count
    r'        p             rank of one block, r / k
    I_n, J_j  cluster n - 1 in lora_rows (i), j - 1 in lora_columns (o): one entry for each feature
    A_l       lora_A[rows (j - 1) p .. j p - 1, I_n]ᵀ, a part of lora_A (r, i)
    B_l       lora_B[J_j, columns (n - 1) p .. n p - 1]ᵀ, a part of lora_B (o, r)
    π_r, π_c  orders of the features that put cluster after cluster; only the clusters matter here

For k = 2, with the features in clustered order, so that I_1, I_2 and J_1, J_2 can be drawn:
    lora_A (r, i)   I_1   I_2     lora_B (o, r)    p     p      ΔW (o, i)     I_1       I_2
               p  | A_1ᵀ  A_2ᵀ             J_1  | B_1ᵀ  B_2ᵀ         J_1  | B_1ᵀ A_1ᵀ  B_2ᵀ A_2ᵀ
               p  | A_3ᵀ  A_4ᵀ             J_2  | B_3ᵀ  B_4ᵀ         J_2  | B_3ᵀ A_3ᵀ  B_4ᵀ A_4ᵀ

So A's rank axis is (output cluster j, p), B's is (input cluster n, p): LoRA's shapes, however large
each cluster is (App. D). lora_B @ lora_A would pair row group j of A with column group j of B, but
that group is an input cluster. expand() therefore gives each pair (n, j) its own p of the inner
axis, k² p = k r in all, zeros elsewhere. The paper permutes x and the update's output (App. K.2):
y = x W + (x[:, π_r] A B)[:, π_c⁻¹], A B block by block: the same function. In stage t ours takes
2 t k r (i + o) FLOPs a token, t k times LoRA's: t times 1.6 % of W's 2 i o (2048², r = 8, k = 2).

    trains   r (i + o), LoRA's, whatever k: the paper states no other, so there is no count() here
    rank     at most k r of a stage's ΔW, t k r of the sum of t stages; LoRA's is r
    saved    every lora_ tensor: A, B, the clusters (int64), and k r (i + o) fp32 numbers for each
             stage that ended: 67 MB for LLaMA2-7B's q, k, v, o at r = 8, k = 2

    loss.backward()                                     # of every micro-batch of a step
    optimizer.step(), optimizer.zero_grad()             # clip before
    if a stage ends here, and not the run: reinit(model, optimizer)     # merge(model) at the end

train.py's --reinit_every counts epochs ("150s": steps), its --reinit_at N is one re-init after N
steps. The paper's 2 epochs are two stages, one re-init; Table 6 is `--epochs 1 --reinit_at 100`.

Differs from the paper: Alg. 1's line 6, W_t ← (W_{t-1} + ΔW_{t-1})[π_r, :][:, π_c], writes no
        weight, as bf16 would round a small ΔW away. W stands until merge(), and the ended stages'
        factors run beside the live ones: the same function in every dtype. Time relative to a LoRA
        layer's, forward and backward: 1.03 in the 2nd stage, 1.15 in the 10th (2048²; at 4096² 1.01
        and 1.07, by 7 % more FLOPs; r = 8, k = 2, 512 tokens, one core).
    delta() and factors() are of all stages, where Alg. 1 returns the last one's update.
    App. E, corrected (its A, B are App. A's expanded factors, ΔW = A B; r_ref: the reference row of
        ΔW): Eq. 2's scaling by D, left out there, is in; the rows' products with r_ref are
        A (B r_refᵀ), not (r_ref A) B; diag(A (B Bᵀ) Aᵀ) holds squared norms.
    u, v of Eq. 4 are the second singular pair (§3.3; §4.2's "dominant" is a slip).
Left open by the paper (gap: our choice, because):
    A's fan-in (Kaiming-uniform): the size of its input cluster, which is all that A_l reads.
    values at a re-init: those of the start, A random and B 0, so that the function stays.
    the cosine's reference: the longest row or column, as it weighs most; or the mean, or the first.
    d, the embedding's width: max(1, ⌈log2 k⌉), as that many signs tell k clusters apart.
    k-means: of each side apart, the best of ten runs from k-means++ seeds, as one may get stuck.
    "imbalanced": some cluster has under half of the equal share, as some bound is needed.
    dropout: 0; if set, on the live stage alone: the ended ones are a part of W_t.
    scale: none, as none is printed.
"""
import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# How the ended stage's ΔW gives the next clusters, of its rows and, likewise, of its columns:
#   cosine              sort by cosine with one of them, cut into k equal parts; the paper's choice
#   spectral            k-means of their spectral embedding (Eqs. 2, 3), of whatever sizes it gives
#   spectral-balance1   the same; if imbalanced: sort by the embedding's first column (Eq. 4), cut
#   spectral-balance2   the same; if imbalanced: as cosine
#   random              k equal parts of a new random order, drawn as the first (in CPSLinear)
#   none                the same clusters again, though the stage is merged and new factors start
#   abs-cosine          ours: as cosine, by its magnitude
# Not to re-initialise at all (--reinit_every none) is another thing: one stage on random blocks, so
# GraLoRA up to the order of features and its default α / r = 2. (Table 5's row 1; row 2: `none`.)
# The printed strategies separate blocks whose means differ. Orthogonal blocks (Prop. 2) of mean
# zero look alike to them, as rows of a block are opposite as often as alike: hence abs-cosine.
STRATEGIES = ("cosine", "spectral", "spectral-balance1", "spectral-balance2", "random", "none",
              "abs-cosine")
# k = 2 does best in the paper (Fig. 5): finer blocks differ less. k = 1: LoRA, scale 1, a stage.
DEFAULTS = {"k": (2, "clusters per side"),
            "strategy": ("cosine", "how the next stage's clusters are found", STRATEGIES),
            "reference": ("longest", "what the cosine is taken with", ("longest", "mean", "first"))}
COMMON = {"reinit_every": "1"}          # epochs
# On the bundled model: two stages of 150 steps; the paper's are two of an epoch.
TINY = {"lr": 5e-3, "max_steps": 300, "reinit_every": "150s"}
PRESET = "cps_lora"                     # whose rows of presets.py apply


# ---- clustering: ΔW = P Qᵀ (a, b), from P (a, w) and Q (b, w) alone: it is never formed as a whole
# (App. E). The paper's ΔW has a = i rows, b = o columns; for the columns P and Q trade places.

def cosine_order(P, Q, reference="longest", absolute=False):
    """Rows of P Qᵀ by their cosine with one of them (or their mean), ascending: (a,) (App. E)."""
    inner = P @ (Q.T @ Q)                               # (a, w); inner @ Pᵀ: rows' inner products
    norms = (inner * P).sum(1).clamp(min=0).sqrt()
    ref = dict(longest=P[norms.argmax()], mean=P.mean(0), first=P[0])[reference]
    # The reference's length is left out: it does not change the order. A row of zeros has cosine 0.
    similarity = inner @ ref / norms.clamp(min=torch.finfo(P.dtype).tiny)
    return (similarity.abs() if absolute else similarity).argsort()


def spectral_embedding(P, Q, d):
    """
    Singular vectors 2 .. d + 1 of S (Eqs. 2, 3) for rows and columns of P Qᵀ: (a, d), (b, d). S is
    ΔW - min ΔW, divided by the roots of its row sums D_r and column sums D_c.
    """
    a, b = len(P), len(Q)
    lowest = min((part @ Q.T).min() for part in P.split(1024))          # in chunks: never a x b
    P = torch.cat((P, -lowest.expand(a, 1)), 1)                         # ΔW - min ΔW = P Qᵀ, now
    Q = torch.cat((Q, Q.new_ones(b, 1)), 1)
    D_r, D_c = P @ Q.sum(0), Q @ P.sum(0)                               # (a,), (b,)
    eps = torch.finfo(P.dtype).eps      # a row whose entries are all the minimum sums to about 0
    # Q_P and Q_Q have orthonormal columns: the singular vectors of S = Q_P (T_P T_Qᵀ) Q_Qᵀ are
    # those of the middle, at most (w + 1, w + 1), multiplied by Q_P and by Q_Q.
    Q_P, T_P = torch.linalg.qr(P / D_r.clamp(min=eps * D_r.max()).sqrt()[:, None])
    Q_Q, T_Q = torch.linalg.qr(Q / D_c.clamp(min=eps * D_c.max()).sqrt()[:, None])
    U, _, Vh = torch.linalg.svd(T_P @ T_Q.T)                            # App. E: a small SVD
    return Q_P @ U[:, 1:d + 1], Q_Q @ Vh[1:d + 1].T     # the first pair is √D_r, √D_c, whatever ΔW


def balanced_cut(order, k):
    """Cluster, 0 .. k - 1, of each feature: their order cut into k parts, equal to within one."""
    clusters = torch.empty_like(order)
    clusters[order] = torch.arange(len(order), device=order.device) * k // len(order)
    return clusters


def lloyd(X, k, steps=50):
    """A run of Lloyd's k-means, seeded as k-means++: its sum of squared distances, its clusters."""
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
    """X (a, d) -> (a,) clusters in 0 .. k - 1: of the best run, as a single one may get stuck."""
    return min((lloyd(X, k) for _ in range(starts)), key=lambda run: run[0])[1]


def cluster(P, Q, k, strategy, reference="longest"):
    """Clusters (a,) of the rows of P Qᵀ and (b,) of its columns; both random where P Qᵀ is 0."""
    absolute = strategy == "abs-cosine"
    cosine = lambda L, R: balanced_cut(cosine_order(L, R, reference, absolute), k)  # rows of L Rᵀ
    # The trace is the sum of the squares of P Qᵀ's entries, |P Qᵀ|².
    if strategy != "random" and not ((P.T @ P) @ (Q.T @ Q)).diagonal().sum() > 0:
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
            # balance1: by u or v, the first column (Eq. 4); balance2: by cosine.
            balance1 = strategy == "spectral-balance1"
            clusters = balanced_cut(X[:, 0].argsort(), k) if balance1 else cosine(L, R)
        found.append(clusters)
    return tuple(found)


def expand(A, B, rows, columns, k):
    """
    The block-sparse factors of the whole update: (k R, i) and (o, k R), ΔW = their product.
    rows (i) and columns (o) name the block of each input and each output feature. The inner axis
    counts (n, j, p): input block, output block, rank; block (j, n) owns p of the k R places.
    """
    each = torch.arange(k, device=A.device)
    A = A * (rows == each[:, None])[:, None]                            # (n, R, i), R = (j, p)
    # (n, 1, p, o) * (j, 1, o), laid out along o: a CPU's products, backward's most, are faster so.
    B = B.T.contiguous().unflatten(0, (k, 1, -1)) * (columns == each[:, None])[:, None]
    return A.flatten(0, 1), B.flatten(0, 2).T


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class CPSLinear(nn.Module):
    """x (W + ΔW_1 + .. + ΔW_{t-1})ᵀ + bias + dropout(x) ΔW_tᵀ (..., o), in stage t; ΔW (o, i)."""

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
        self.register_buffer("lora_merged_A", torch.empty(0, i, **new))     # of the ended stages,
        self.register_buffer("lora_merged_B", torch.empty(o, 0, **new))     # expanded
        # Alg. 1, line 1: k equal parts of a random order, of the inputs, then of the outputs. It is
        # drawn on the CPU, whose generator gives the same clusters beside any accelerator.
        self.start(*(balanced_cut(torch.randperm(n).to(W.device), k) for n in (i, o)))

    @torch.no_grad()
    def start(self, rows, columns):
        """
        A stage on these clusters, with new factors (Alg. 1, lines 1 and 8), written into the same
        parameters: A is U(-1/√c, 1/√c) where its input's cluster has c features, B is 0.
        """
        self.lora_rows.copy_(rows)
        self.lora_columns.copy_(columns)
        each = torch.arange(self.k, device=rows.device)
        fan_in = (rows == each[:, None]).sum(1)[rows]       # (i), the size of each one's cluster
        self.lora_A.uniform_(-1, 1).div_(fan_in.sqrt())
        self.lora_B.zero_()

    def expanded(self):
        """
        A (k r, i), B (o, k r) of the live stage: ΔW_t = B A. Row (n, j, p) of A is row (j, p) of
        lora_A, with zeros but in I_n; that column of B is lora_B's (n, p), with zeros but in J_j.
        """
        return expand(self.lora_A, self.lora_B, self.lora_rows, self.lora_columns, self.k)

    def total(self):
        """A (t k r, i), B (o, t k r) of the t stages so far: the ended ones, then the live one."""
        A, B = self.expanded()
        return torch.cat((self.lora_merged_A, A)), torch.cat((self.lora_merged_B, B), 1)

    def forward(self, x):
        # Two products, (..., k r) inside, are faster than Eq. 8's block by block with x and y
        # permuted: up to k r = 256 they take 1.0 to 1.3 times a LoRA layer's time, those 1.4 to 1.5
        # (1st stage, 2048², 512 tokens, 2 cores; the header's times are at k r = 16).
        A, B = (f.to(x.dtype) for f in self.expanded())
        update = F.linear(F.linear(self.dropout(x), A), B)
        if len(self.lora_merged_A):     # ended stages, a part of W_t (Alg. 1, line 6): no dropout
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
    bad target, dropout or strategy, a rank outside 1..min(in, out), or a k that does not divide it,
    as a block has rank / k.
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
    """
    The next stage (Alg. 1, lines 4 - 8): cluster the ended stage's update, that one alone, keep its
    factors, start anew. The parameters are the same objects; their Adam moments are dropped, the
    schedule goes on.
    """
    for layer in layers(model).values():
        A, B = layer.expanded()                                         # line 4: ΔW_{t-1} = B A
        rows, columns = layer.lora_rows, layer.lora_columns
        if layer.strategy != "none":
            # Line 5, on the paper's ΔW (i, o) = Aᵀ Bᵀ: its rows are inputs, its columns outputs.
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
    """{name: (A (R, in), B (out, R))} of the update of all stages, R = stages · k r."""
    return {name: tuple(f.detach() for f in layer.total()) for name, layer in layers(model).items()}


@torch.no_grad()
def restore(model, tensors):
    """Give a fresh model the saved ended stages, of which it has none; ValueError at a misfit."""
    for name, layer in layers(model).items():
        A, B = (tensors.get(f"{name}.lora_merged_{x}") for x in "AB")
        o, i = layer.base.weight.shape
        if A is None or B is None or A.shape[1:] != (i,) or B.shape != (o, len(A)):
            raise ValueError(f"tensors {name}.lora_merged_A and _B are missing "
                             f"or not for {o} x {i}")
        layer.lora_merged_A, layer.lora_merged_B = A.to(layer.lora_A), B.to(layer.lora_A)
