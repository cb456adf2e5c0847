"""
Diagnostics of updates: pure functions of matrices M (out, in), or of their singular values s, descending;
and the two nulls that each number needs beside it, since sorting noise yields blocks, too.
"""
import math

import torch
import torch.nn as nn

from cps_lora import balanced_cut, cluster
from gfa import fold


def shuffled(M):
    return M.flatten()[torch.randperm(M.numel())].view(M.shape)


def same_spectrum(M):
    """U diag(s) Vᵀ with Haar-distributed U, V."""
    s = torch.linalg.svdvals(M)
    (U, R), (V, _) = (torch.linalg.qr(torch.randn(n, len(s), dtype=M.dtype)) for n in M.shape)
    return U * R.diagonal().sign() * s @ V.T        # QR favours signs: one factor without them is enough


NULLS = dict(update=lambda M: M, shuffled=shuffled, random=same_spectrum)


def entropy_rank(p):
    p = p[p > 0] / p.sum()
    return math.exp(-(p * p.log()).sum())


def eber_glora(s):
    """exp of the entropy of p_i = s_i² / Σ s² (G-LoRA App. F), of the update accumulated over all stages."""
    return entropy_rank(s ** 2)


def eber_cps(s):
    """exp of the entropy of p_i = s_i / Σ s (CPS-LoRA App. I), of one stage."""
    return entropy_rank(s)


def algebraic_rank(s, shape):
    """Above numpy's bound for float32, in which factors train (a difference of bf16 weights is all rank)."""
    return int((s > s[0] * max(shape) * torch.finfo(torch.float32).eps).sum())


def spectrum(values):
    """s / Σ s, mean and standard deviation over modules; a shorter one ends in zeros."""
    p = nn.utils.rnn.pad_sequence([s / s.sum() for s in values], batch_first=True)
    return dict(mean=p.mean(0).tolist(), deviation=p.std(0, correction=0).tolist())


def principal_angles(P, Q):
    """Degrees, descending, between the spans of orthonormal P (n, a) and Q (n, b): min(a, b) of them."""
    return torch.linalg.svdvals(P.T @ Q).clamp(max=1).acos().rad2deg().flip(0)


def block_angle(M, rows, columns, dimension):
    """
    Degrees, over all pairs of blocks the mean of: the mean principal angle of their `dimension` top left, or
    top right, singular vectors, whichever is larger (App. L). rows (out), columns (in) are clusters; blocks
    of different features are compared by the features' order. A side of unequal sizes is left out, a block of
    lower rank has fewer vectors. NaN where nothing can be compared.
    """
    bases, angles = [], []
    for block in (M[rows == i][:, columns == j] for i in rows.unique() for j in columns.unique()):
        U, s, Vh = torch.linalg.svd(block, full_matrices=False)
        top = min(dimension, algebraic_rank(s, block.shape))
        sides = (U[:, :top], Vh[:top].T)
        for other in bases if top else ():
            both = [principal_angles(x, y).mean() for x, y in zip(sides, other) if len(x) == len(y)]
            angles += [max(both)] if both else []
        bases += [sides] if top else []
    return (sum(angles) / len(angles)).item() if angles else math.nan


def bicluster(M, k, strategy="cosine"):
    """Clusters 0 .. k - 1 of M's rows (out) and columns (in), by one of CPS-LoRA's strategies."""
    return cluster(M, torch.eye(M.shape[1], dtype=M.dtype), k, strategy)


def contrast(M, rows, columns):
    """Share, 0 to 1, of the variance of |M| that lies between the means of its blocks: what an eye sees."""
    rows, columns = (nn.functional.one_hot(c).to(M.dtype) for c in (rows, columns))
    size = (rows.sum(0)[:, None] * columns.sum(0)).clamp(min=1)
    between = size * (rows.T @ M.abs() @ columns / size - M.abs().mean()) ** 2
    return (between.sum() / M.numel() / M.abs().var(correction=0)).item()


def gfa_errors(deltas, budgets):
    """E_GFA(P) for budgets P of parameters: Σ_{j > r} s_j(M)², r = ⌊P / (m + k)⌋ (Prop. 3.2)."""
    vec = torch.cat([M.flatten() for M in deltas])
    m, k = fold(len(vec))
    energy = torch.linalg.svdvals(nn.functional.pad(vec, (0, m * k - len(vec))).view(m, k)) ** 2
    return [energy[int(P // (m + k)):].sum().item() for P in budgets]


def lora_errors(deltas, budgets):
    """
    E_LoRA(P): Σ_i Σ_{j > r_i} s_ij² at the best integer ranks with Σ r_i (p_i + q_i) <= P (Prop. 3.2), exact.
    Among modules of equal p + q the largest s² go first; the split between such pools is enumerated, by
    dynamic programming in steps of the greatest common divisor of all p + q.
    """
    pools = {}
    for M in deltas:
        pools.setdefault(sum(M.shape), []).append(torch.linalg.svdvals(M) ** 2)
    step, total = math.gcd(*pools), sum(s.sum() for energies in pools.values() for s in energies)
    best = torch.zeros(int(max(budgets) // step) + 1, dtype=total.dtype)    # what b steps can take
    for price, energies in pools.items():
        wide, before, best = price // step, best, best.clone()
        taken = torch.cat(energies).sort(descending=True)[0].cumsum(0)
        for n in range(1, min(len(taken), (len(best) - 1) // wide) + 1):
            best[n * wide:] = best[n * wide:].maximum(before[:-n * wide] + taken[n - 1])
    return [(total - best[int(P // step)]).clamp(min=0).item() for P in budgets]


# ---- all of them, of one update


def measures(whole, stage, trained, ks, strategy, dimension):
    """{measure: number} of one module, whose angles and contrasts are the stage's where there is one."""
    s, M = torch.linalg.svdvals(whole), whole if stage is None else stage
    found = dict(rank=algebraic_rank(s, whole.shape), eber_glora=eber_glora(s))
    if stage is not None:
        found["eber_cps"] = eber_cps(torch.linalg.svdvals(stage))
    orders = {"trained": trained} if trained else {}
    for k in ks:
        orders[f"before_{k}"] = [balanced_cut(torch.arange(n), k) for n in M.shape]
        orders[f"after_{k}"] = bicluster(M, k, strategy)
    for name, (rows, columns) in orders.items():
        found[f"angle_{name}"] = block_angle(M, rows, columns, max(1, dimension // len(rows.unique())))
        found[f"contrast_{name}"] = contrast(M, rows, columns)
    return {key: value for key, value in found.items() if not math.isnan(value)}


def average(dicts, reduce=torch.mean):
    """{key: mean of its values} over the dicts that have it."""
    keys = dict.fromkeys(key for found in dicts for key in found)
    return {key: reduce(torch.tensor([found[key] for found in dicts if key in found],
                                     dtype=torch.float64)).item() for key in keys}


def analyze(whole, stage, trained, ks=(2, 4, 8), budgets=(0.3, 1, 2, 4, 8, 16), strategy="cosine",
            dimension=8):
    """
    What analysis.json holds of one update, each part by NULLS' kinds. budgets: multiples of LoRA's parameters
    at rank 1 on these modules; errors: shares of the squared norm of all updates.
    """
    prices = [x * sum(sum(M.shape) for M in whole.values()) for x in budgets]
    modules, spectra, errors = {name: {} for name in whole}, {}, {}
    for kind, null in NULLS.items():
        wholes = {name: null(M) for name, M in whole.items()}
        stages = {name: wholes[name] if M is whole.get(name) else null(M) for name, M in stage.items()}
        for name, M in wholes.items():
            modules[name][kind] = measures(M, stages.get(name), trained.get(name), ks, strategy, dimension)
        spectra[kind] = {what: spectrum([torch.linalg.svdvals(M) for M in found.values()])
                         for what, found in (("accumulated", wholes), ("stage", stages)) if found}
        norm, deltas = sum(M.square().sum().item() for M in wholes.values()), list(wholes.values())
        errors[kind] = {what: [error / norm for error in least(deltas, prices)]
                        for what, least in (("gfa", gfa_errors), ("lora", lora_errors))}
    over = lambda names, reduce=torch.mean: {
        kind: average([modules[name][kind] for name in names], reduce) for kind in NULLS}
    leaves = {name: name.rpartition(".")[2] for name in modules}
    return dict(mean=over(modules), deviation=over(modules, lambda t: t.std(correction=0)),
                leaves={leaf: over([n for n in modules if leaves[n] == leaf]) for leaf in leaves.values()},
                modules=modules, spectra=spectra, budgets=list(budgets), errors=errors)
