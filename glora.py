"""
G-LoRA: Global-Local Decoupled Low-Rank Adaptation (Xiong et al., Findings of ACL 2026). Official
code: none. Not Generalized LoRA (arXiv 2306.07967), which other libraries call `glora`.

Two adapters share LoRA's parameter budget. The global one, G, always covers the whole weight. The
local one, L, does at first, too; each re-initialisation merges it into the frozen weight, keeps the
half of its input and the half of its output features that mattered most, and starts a new L on that
quarter of its region, at twice the rank: sides halved, rank doubled, so the count stays.

    y = x W_res + x G_A G_B + (x[:, R] L_A L_B, placed at the columns C)                   (Eq. 2)

Both start on singular triplets of the weight, which then leave W_res, so no start changes the
function (but for rounding). G starts on the last, of least energy: it moves everything and shall
not disturb what W mostly does. L starts on the first: its features move along what W does most.

    loss.backward()                                     # of every micro-batch of step t of T
    observe(model, t, T)                                # adds to L's scores; clip only after it
    optimizer.step(), optimizer.zero_grad()
    if a stage ends here and t < T: reinit(model, optimizer)        # and merge(model) at the end

reinit_every counts epochs ("60s": steps). The paper's 10 epochs, re-initialised every 2nd, are five
stages, s = 0 .. 4, with four re-inits between them: none at the end, where its L would not train.

Notation (paper, y = x W  ->  here, y = x Wᵀ: the paper's rows are input features):
    m, n           i, o       input, output features of the weight W (o, i)
    m/2^i, n/2^i   m, n       those of L's region: ⌊i / 2^s⌋, ⌊o / 2^s⌋; at first the whole weight
    i              s          stage: how many re-initialisations came before
    r              rank       LoRA's at this budget; shared out as r_g + r_l
    (1-α)r, αr     r_g, r_l   rank · g / (g + l), rank · l / (g + l), for --ratio g:l
    2^i αr         r          rank of the live L: 2^s r_l
    G_A, G_B       lora_global_A (r_g, i), lora_global_B (o, r_g), transposed
    L_A, L_B       lora_local_A (r, m), lora_local_B (n, r), transposed
    R, C           lora_rows (m), lora_columns (n): the region's input, output features, ascending:
                   those that the paper's orders π_r, π_c put first; no weight is permuted
    W_res          base.weight = pretrained + lora_fixed_B lora_fixed_A, rounded once. The fixed
                   factors, A (F, i) and B (o, F), list what left and entered W so far: the starts
                   of G and of every L (B negated), and what every merged L had become
Sizes of a module s re-initialisations later, in our letters:
    trains   r_g (i + o) + r (m + n) <= rank (i + o), LoRA's; equal where 2^s divides i and o (no
             count(): it is not told s). Once L's pair would cost as much as its region, L is dense,
             r_g (i + o) + m n; re-inits leave it, so s, m, n, r and F stay as they then are
    rank     G + L: at most r_g + r (L dense: r_g + min(m, n)); at full ranks at least |r - r_g|, as
             they may cancel (Prop. 1).
             The update since the pretrained weight (what factors() returns; a dense L is m wide in
             it): at most 2 r_g + 2 r_l (2^(s+1) - 1); at rank 8, s = 4: 136 for 3:1, 376 for 1:3
    saved    every lora_ tensor: what trains, the indices, and the fixed factors, F (i + o) numbers,
             F = r_g + r_l (3 · 2^s - 2), less r if L is dense, in fp32: for LLaMA2-7B's q, k, v, o
             at rank 8, s = 4, 0.41 GB at 3:1 (F = 98), 1.17 GB at 1:3 (F = 278); on the device, too
    host     a copy of the pretrained weights, in their dtype (bf16: 4.3 GB), to make W_res from

Differs from the paper: Eq. 2 sums every stage's L, Eq. 11 merges each into W_res: counted twice.
        Here one L is live, the rest in W_res. (The sum, unused, needs pretrained minus all starts.)
    Eq. 5 subtracts G alone: at stage 0 L's start leaves W, too (§3.2).
    App. J.2 decomposes L alone: of rank r, but the new L needs 2r triplets: we take W_res + L.
Left open by the paper (gap: our choice, because):
    direction of Eq. 10: descending, as the first half is what Eq. 13 cuts out.
    gradient of Eq. 9: of whole steps, or the region would depend on the micro-batch's size.
    Eq. 9 over a stage: the mean over its steps, as one batch is noise; or the last step's.
    Table 4's `grad`, `fisher`: |g|, g² in Eq. 9's place, as these names mean elsewhere.
    no gradient in a stage: the factors' magnitudes, and a warning, as some order is needed.
    Table 6 (G, L on the first or last triplets): at stage 0, L has its end of those that G left. W
        minus G ends in r_g triplets of σ = 0: factors of 0, whose gradients are 0, never train.
    "full fine-tuning" of a region: one block (n, m), 0 at first; later re-inits leave it.
    randomized SVD: a sketch of oversample · r columns (its 4x, 8x), two power iterations; exact at
        stage 0 (Table 16: 6 min with either SVD) and for last triplets, which no sketch finds.
    optimizer state: L's is dropped, as its shapes change; G's and a dense L's go on.
    scale: none, as none is printed.
    place of dropout: on x, one mask for both; 0 unless set, as is weight decay: the adapters hold a
        part of W, so with dropout the start is another function, and decay would shrink W itself.
Slips in Alg. 1 (Eqs. 11 - 15 hold): L stays in W_res, r_l undoubled; lines 2, 15 cut Vᵀ by columns.
"""
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# Score of each entry θ of a factor of L (named L here) from θ and its gradient g. |θ g| is to first
# order what the loss would change by if θ were 0 (Eqs. 6 - 8). The factors are scored, not W, as a
# gradient of W's size would take full fine-tuning's memory.
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
COMMON = {"reinit_every": "2"}           # epochs
TINY = {"lr": 5e-3, "reinit_every": "60s"}   # on the bundled model; 60 steps
PRESET = "glora"                        # whose rows of presets.py apply


def exact_svd(M, take):
    """
    U (n, k), S (k), V (m, k) of M (n, m): its singular triplets at the k positions `take`, where 0
    is the largest. V are eigenvectors of Mᵀ M (a wide M is transposed first), U = M V / S, formed
    for these k alone. In float64, as Mᵀ M has M's condition squared: the vectors at a σ are off by
    about 2e-16 σ₁² over the gap of the σ², σ₁ the largest. It takes 0.6 of the time of torch's SVD
    in float64, and as long as torch's SVD in float32 (4096², one core).
    """
    if len(M) < M.shape[1]:
        return exact_svd(M.T, take)[::-1]
    M64 = M.to("cpu" if M.device.type == "mps" else M.device, torch.float64)    # MPS has no float64
    V = torch.linalg.eigh(M64.T @ M64).eigenvectors.flip(1)[:, take]
    U = M64 @ V
    S = U.norm(dim=0)
    return (U / S.clamp(min=torch.finfo(S.dtype).tiny)).to(M), S.to(M), V.to(M)


def take_end(order, k, where):
    """The k first ("top") or last ("bottom") of `order`, largest σ first, and the others."""
    first, last = order.split((k, len(order) - k) if where == "top" else (len(order) - k, k))
    return (first, last) if where == "top" else (last, first)


def region_svd(M, k, svd, oversample, local_init, **_):
    """
    U, S, V as exact_svd's: the k triplets of a region M (n, m) that L starts on (Eq. 13). Exact
    also where a sketch would be as wide as the region.
    """
    if svd == "exact" or local_init == "bottom" or oversample * k >= min(M.shape):
        return exact_svd(M, take_end(torch.arange(min(M.shape)), k, local_init)[0])
    U, S, V = torch.svd_lowrank(M, q=oversample * k, niter=2)        # Halko et al. 2011
    return U[:, :k], S[:k], V[:, :k]


def balanced(U, S, V):
    """
    A = Σ^½ Vᵀ (k, m) and B = U Σ^½ (n, k), so B A = U Σ Vᵀ (Eqs. 5, 14). A triplet of σ = 0 never
    trains (both gradients are 0): a weight of lower rank wastes those of a `bottom` start.
    """
    return (V * S.sqrt()).T.contiguous(), U * S.sqrt()


def most_important(score, dim):
    """
    Positions, ascending, of the half of the features with the largest ℓ2 norms (Eq. 10) of their
    scores over dim, the rank axis. Rounded down; of equal ones the first.
    """
    order = score.norm(dim=dim).argsort(descending=True, stable=True)
    return order[:len(order) // 2].sort().values                        # Alg. 1, line 12


def is_dense(r, n, m):
    """Whether a pair of rank r has as many numbers as its whole (n, m) region (§3.2.2)."""
    return r * (n + m) >= n * m


def add_update(base, x, update):
    """
    base(x) + update (..., o): a product that starts from the update, then the bias. A bf16 base(x),
    rounded alone, would swallow what is under half a unit of its last place. [None]: x may be (i,).
    """
    y = torch.addmm(update[None].flatten(0, -2), x[None].flatten(0, -2), base.weight.T)
    return (y if base.bias is None else y + base.bias.to(y.dtype)).view_as(update)


class GLoRALinear(nn.Module):
    """
    y = x W_resᵀ + bias + x̃ (G + L)ᵀ, x̃ = dropout(x), for x (..., i) -> (..., o). G and L, (o, i),
    are the products B A of their factors, L with zeros outside of its region.
    """
    STATE = ("scores",)     # what a resumed run needs beside the saved tensors

    def __init__(self, base, r_g, r_l, dropout, own):
        super().__init__()
        self.base, self.dropout, self.own = base, nn.Dropout(dropout), own
        self.pretrained = None                          # write() copies W here, on the CPU
        (o, i), W = base.weight.shape, base.weight.detach()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        A, B = W.new_empty(r_g + r_l, i), W.new_empty(o, r_g + r_l)
        if not W.is_meta:                               # there only shapes are wanted
            for_G, others = take_end(torch.arange(min(o, i)), r_g, own["global_init"])
            for_L, _ = take_end(others, r_l, own["local_init"])     # Alg. 1 line 15, as Vᵀ[:r_l]
            A, B = balanced(*exact_svd(W, torch.cat((for_G, for_L))))                   # Eqs. 4, 5
        (G_A, L_A), (G_B, L_B) = A.split((r_g, r_l)), B.split((r_g, r_l), 1)
        # Clones: parameters share no storage. If L is dense from the start, L_A and L_B stay in W.
        self.lora_global_A, self.lora_global_B = (nn.Parameter(f.clone()) for f in (G_A, G_B))
        self.lora_fixed_A, self.lora_fixed_B = nn.Buffer(G_A.clone()), nn.Buffer(-G_B)      # Eq. 5
        pair = (None, torch.zeros_like(W)) if is_dense(r_l, o, i) else (L_A.clone(), L_B.clone())
        self.start(torch.arange(i, device=W.device), torch.arange(o, device=W.device), *pair)
        if not W.is_meta:
            self.move(-1)                               # L leaves, as G did in lora_fixed above

    def start(self, rows, columns, A, B):
        """L on rows (m) and columns (n) is now A (r, m), B (n, r); or, dense, no A and B (n, m)."""
        self.lora_rows, self.lora_columns = nn.Buffer(rows), nn.Buffer(columns)
        self.lora_local_A = None if A is None else nn.Parameter(A)
        # scores, of A and B: None before observe(), [] while that has met no gradient.
        self.lora_local_B, self.scores = nn.Parameter(B), None

    def local(self):
        """A (r, i), B (o, r) of L, zero outside of its region; of a dense L, A is the identity."""
        A, B, (o, i) = self.lora_local_A, self.lora_local_B, self.base.weight.shape
        A = torch.eye(B.shape[1], dtype=B.dtype, device=B.device) if A is None else A
        return (A.new_zeros(len(A), i).index_copy(1, self.lora_rows, A),
                B.new_zeros(o, len(A)).index_copy(0, self.lora_columns, B))

    def live(self):
        """A (r_g + r, i), B (o, r_g + r) of both adapters: G + L = B A (G alone is Eq. 3)."""
        A, B = self.local()
        return torch.cat((self.lora_global_A, A)), torch.cat((self.lora_global_B, B), 1)

    def total(self):
        """A, B of the update of all stages: pretrained + B A = W_res + G + L."""
        A, B = self.live()
        return torch.cat((self.lora_fixed_A, A)), torch.cat((self.lora_fixed_B, B), 1)

    def forward(self, x):
        dense = self.lora_local_A is None
        # Eq. 2, zeros: live() pads L to the whole weight, for one pair of products with G. Forward
        # and backward take 1.01 (stage 0) to 1.04 (4) of a LoRA layer's time (2048², rank 8, 512
        # tokens, 2 cores). To gather x[:, R] and add at C costs more in early stages, most in 0.
        A, B = (self.lora_global_A, self.lora_global_B) if dense else self.live()
        x_ = self.dropout(x)
        # Bᵀ is copied row by row: a CPU is slow where a thin factor lies along its rank.
        update = F.linear(x_, A.to(x.dtype)) @ B.T.to(x.dtype).contiguous()
        if dense:                                       # as a pair with zeros it would be m wide
            block = F.linear(x_.index_select(-1, self.lora_rows), self.lora_local_B.to(x.dtype))
            update = update.index_add(-1, self.lora_columns, block)
        return add_update(self.base, x, update)

    def delta(self):
        A, B = self.live()
        return B @ A                    # (o, i), on top of W_res; total() has all since pretrained

    @torch.no_grad()
    def move(self, sign):
        """
        L, as it now is, enters W_res (+1, Eq. 11) or leaves it (-1, Eqs. 14, 15): its factors join
        the fixed ones. W_res, written rounded, is returned unrounded.
        """
        if self.lora_local_A is not None:               # a dense L starts at 0: nothing leaves
            A, B = self.local()
            self.lora_fixed_A = torch.cat((self.lora_fixed_A, A))
            self.lora_fixed_B = torch.cat((self.lora_fixed_B, sign * B), 1)
        return self.write(self.lora_fixed_A, self.lora_fixed_B)

    @torch.no_grad()
    def write(self, A, B):
        """
        base.weight = pretrained + B A, rounded once whatever the number of stages: to add each
        stage to a bf16 weight would round every time. Returned unrounded.
        """
        if self.pretrained is None:
            self.pretrained = self.base.weight.detach().to("cpu", copy=True)
        W = self.pretrained.to(A) + B @ A
        # Rounding to nearest is enough: held-out loss with a bf16 base, against an fp32 one's,
        # after four re-inits: +0.3 % (3:1), +0.5 % (1:3) at learning rate 1e-4, -0.1 % (3:1) at
        # 3e-4 (SmolLM2-135M, all seven linears, rank 8, 60 steps of 4 GSM8K examples, one seed).
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
    outside 1..min(in, out), a ratio g:l of which g + l does not divide it.
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
    Score L's factors by the gradients that stand (Eq. 9): once an optimizer step t of T (unused
    here), with those of the whole accumulated batch, as its |θ g| is no sum of the micro-batches';
    before clipping, which would weigh the steps. A sum over the stage orders features as its mean.
    """
    for layer in layers(model).values():
        A, B = layer.lora_local_A, layer.lora_local_B
        if A is None or A.grad is None or B.grad is None:
            layer.scores = layer.scores or []           # [], not None: observed, but no gradient
            continue
        scores = [IMPORTANCE[layer.own["importance"]](p, p.grad) for p in (A, B)]
        if layer.scores and layer.own["importance_window"] == "stage":
            scores = [earlier + now for earlier, now in zip(layer.scores, scores)]
        layer.scores = scores


@torch.no_grad()
def reinit(model, optimizer):
    """
    The next stage of every L (Eqs. 10 - 15); a dense one stays as it is (§3.2.2). What is
    decomposed is W_res + L on the new region, without G. After zero_grad, never after the last
    step. L's new factors replace the old in the optimizer's groups: whoever keeps a list of
    parameters takes it anew.
    """
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
        W = layer.move(+1)      # (o, i); it now holds L, still live till start()       # Eq. 11
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
    """
    Parameter `new` takes the place of `old` in its group, or none does where `new` is None, as for
    the A of an L that turned dense; the state (Adam's moments) of `old` goes.
    """
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
    """{name: (A (R, in), B (out, R))} of the update of all stages to the pretrained weight."""
    return {name: tuple(f.detach() for f in layer.total()) for name, layer in layers(model).items()}


@torch.no_grad()
def restore(model, tensors):
    """Give a freshly injected model the stage in `tensors`; ValueError names one that misfits."""
    for name, layer in layers(model).items():
        (o, i), W = layer.base.weight.shape, layer.base.weight
        new = dict(device=W.device, dtype=layer.lora_global_A.dtype)
        A, B, local = (tensors.get(f"{name}.lora_{x}") for x in ("fixed_A", "fixed_B", "local_A"))
        if A is None or B is None or A.shape[1:] != (i,) or B.shape != (o, len(A)):
            raise ValueError(f"tensors {name}.lora_fixed_A and _B are missing or not for {o} x {i}")
        places = []
        for key, size in (("rows", i), ("columns", o)):
            index = tensors.get(f"{name}.lora_{key}", torch.empty(0)).flatten()
            if not 0 < len(index) == len(index.unique()) or index.min() < 0 or index.max() >= size:
                raise ValueError(f"tensor {name}.lora_{key}, expected distinct, below {size}")
            places.append(index.to(W.device, torch.long))
        m, n = map(len, places)
        r = m if local is None else local.numel() // m              # none saved: L was dense
        pair = torch.empty(r, m, **new), torch.empty(n, r, **new)   # load_state_dict fills them
        layer.start(*places, None if local is None else pair[0], pair[1])
        layer.lora_fixed_A, layer.lora_fixed_B = A.to(**new), B.to(**new)
        layer.write(layer.lora_fixed_A, layer.lora_fixed_B)
