"""
Test vectors for whoever ports a method to another framework: tests/vectors/*.safetensors, in the format of
tests/vectors/README.md. Nothing is shared with the method files: each method is written down once more, dense
and slow, from its paper's printed algorithm and our decisions where the paper is open. The loss is Σ y ⊙ G
with a stored G, so its gradient for a weight is D = Gᵀ x, whatever y is.

    python experiments/vectors.py [DIR]
"""
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS = {"k_proj": (16, 44, False), "query": (26, 22, True), "o_proj": (3, 7, False)}       # out, in, bias
CASES = {   # of each method: the arguments of inject
    "lora": {"default": dict(rank=4), "alpha": dict(rank=4, alpha=6)},
    "gralora": {"blocks": dict(rank=6, alpha=9, k=2), "hybrid": dict(rank=8, k=2, hybrid=2)},
    "cps_lora": {"cosine": dict(rank=6, k=2)}, "glora": {"exact": dict(rank=8, ratio="3:1")},
    "gfa": {"two": dict(rank=3), "three": dict(rank=2)}}
SEED, TOKENS, STEPS, STAGES = 1201, 4, 2, 3
part = lambda c, n, k: np.split(np.arange(n), k)[c]         # the c-th of k equal parts of 0 .. n - 1


def apart(values):
    """values, where neighbours differ by 1e-3 of the larger at least: whoever sorts them finds one order."""
    v = np.sort(values)
    gap = (np.diff(v) / np.maximum(np.abs(v[1:]), np.abs(v[:-1]))).min()
    assert gap >= 1e-3, f"two values are {gap:.1e} apart: take another seed"
    return values


def draw_layers(rng, out, case, names=("k_proj", "query")):
    """{module: (W (out, in), bias (out) or 0)}, pretrained."""
    layers = {}
    for name in names:
        o, i, bias = LAYERS[name]
        layers[name] = 0.3 * rng.randn(o, i), rng.randn(o) if bias else 0
        out |= dict(zip((f"{case}.{name}.weight", f"{case}.{name}.bias"), layers[name][:1 + bias]))
    return layers


def run_stage(rng, out, key, layers, params, update):
    """
    Two steps, on features of unlike size, noise for an optimizer; -> the last params, their ΔW and factors.
    layers {module: (frozen W, bias)}; params {name: array}; update(params, D), with D {module: ∂L/∂ΔW},
    -> {module: ΔW (out, in)}, {name: gradient}, {module: factors}.
    """
    size = {name: [rng.uniform(0.3, 3, n) for n in W.T.shape] for name, (W, _) in layers.items()}
    for t in range(STEPS):
        at = f"{key}.step{t}"
        x = {name: rng.randn(TOKENS, len(a)) * a for name, (a, _) in size.items()}
        G = {name: rng.randn(TOKENS, len(b)) * b for name, (_, b) in size.items()}
        D = {name: G[name].T @ x[name] for name in layers}
        delta, grads, _ = update(params, D)
        for name, (W, bias) in layers.items():
            out[f"{at}.{name}.x"], out[f"{at}.{name}.G"] = x[name], G[name]
            out[f"{at}.{name}.y"] = x[name] @ (W + delta[name]).T + bias
            out[f"{at}.grad.{name}.x"] = G[name] @ (W + delta[name])
        out |= {f"{at}.{p}": params[p] for p in params} | {f"{at}.grad.{p}": grads[p] for p in params}
        params = {p: value + 0.1 * rng.randn(*value.shape) for p, value in params.items()}
    out |= {f"{key}.end.{p}": value for p, value in params.items()}
    return params, *update(params, D)[::2]


def sum_of_pairs(pairs, params, D, s=1.0):
    """
    ΔW as a sum of low-rank pairs, each on some output features O and some input features I of its module.
    pairs {module: [(O, I, name of B, place in B, name of A or None for an identity, place in A)]}
    -> ΔW, gradients, {module: [(A (p, in), B (out, p)) of each pair, zero outside of I and O]}.
    """
    delta, wide = {name: np.zeros(d.shape) for name, d in D.items()}, {name: [] for name in D}
    grads = {p: np.zeros_like(value) for p, value in params.items()}
    for name, (o, i) in {name: d.shape for name, d in D.items()}.items():
        for O, I, b, at_b, a, at_a in pairs[name]:
            B, A, here = params[b][at_b], params[a][at_a] if a else np.eye(len(I)), np.ix_(O, I)
            delta[name][here] += s * B @ A                              # GraLoRA's Eq. 1
            grads[b][at_b] += s * D[name][here] @ A.T                   # GraLoRA's Eq. 3, for s = 1
            if a:
                grads[a][at_a] += s * B.T @ D[name][here]
            wide[name].append((A @ np.eye(i)[I], s * np.eye(o)[:, O] @ B))
    return delta, grads, wide


def finish(out, case, layers, frozen, delta, wide=None):
    """The merged weights, and factors A (R, in), B (out, R) of the whole update of the pretrained ones."""
    for name, (W, _) in layers.items():
        out[f"{case}.merged.{name}.weight"] = merged = frozen[name][0] + delta[name]
        if wide:
            A, B = np.vstack([A for A, _ in wide[name]]), np.hstack([B for _, B in wide[name]])
            assert np.allclose(W + B @ A, merged)
            out[f"{case}.factors.{name}.A"], out[f"{case}.factors.{name}.B"] = A, B


def start_lora(rng, layers, params, bounds, rank, k, suffix=""):
    """A uniform within Kaiming's bound (a = √5) for a fan-in of in/k, B zero."""
    for name, (W, _) in layers.items():
        bounds[f"{name}.lora_A{suffix}"] = bound = np.sqrt(k / W.shape[1])
        params[f"{name}.lora_A{suffix}"] = rng.uniform(-bound, bound, (rank, W.shape[1]))
        params[f"{name}.lora_B{suffix}"] = np.zeros((len(W), rank))


def lora(rng, out, case, rank, alpha=None):
    return gralora(rng, out, case, rank, 1, alpha)          # its Eq. 1: a grid of one block is LoRA (§3.1)


def gralora(rng, out, case, rank, k, alpha=None, hybrid=0):
    """A k x k grid of pairs; a part h of the rank may be plain LoRA (§3.5). s = α / r, α = 2r by default."""
    layers, params, bounds, s = draw_layers(rng, out, case), {}, {}, (alpha or 2 * rank) / rank
    pairs, key = {name: [] for name in layers}, f"{case}.stage0"
    for end, R, n in (("", rank - hybrid, k), ("_general", hybrid, 1))[:2 if hybrid else 1]:
        start_lora(rng, layers, params, bounds, R, n, end)
        for name, (W, _) in layers.items():
            A, B = f"{name}.lora_A{end}", f"{name}.lora_B{end}"
            for i, j in np.ndindex(n, n):                               # Eq. 5: block row i, block column j
                O, I = part(i, len(W), n), part(j, W.shape[1], n)
                pairs[name].append((O, I, B, np.ix_(O, part(j, R, n)), A, np.ix_(part(i, R, n), I)))
    params, delta, wide = run_stage(rng, out, key, layers, params, partial(sum_of_pairs, pairs, s=s))
    finish(out, case, layers, layers, delta, wide)
    return dict(modules=list(layers), stages=1, uniform=bounds)


def cosine_order(vectors):
    """Ascending by the cosine with the longest one (§3.3, App. E; the direction is Eq. 4's)."""
    norms = np.sqrt((vectors ** 2).sum(1))
    apart(np.sort(norms)[-2:])
    return np.argsort(apart(vectors @ vectors[norms.argmax()] / (norms * norms.max())))


def cps_lora(rng, out, case, rank, k):
    """Alg. 1 over three stages: merge, order by cosine, cut into k equal parts, start anew. No scale."""
    layers, bounds, pairs, wide = draw_layers(rng, out, case), {}, {}, {}
    merged, order = dict(layers), {}
    for stage in range(STAGES):
        params, key, frozen = {}, f"{case}.stage{stage}", dict(merged)
        start_lora(rng, layers, params, bounds, rank, k)                # lines 1, 8; fan-in: of a row cluster
        for name, (W, _) in layers.items():
            order.setdefault(name, [rng.permutation(n) for n in W.T.shape])                 # line 1
            A, B, (π_r, π_c), pairs[name] = f"{name}.lora_A", f"{name}.lora_B", order[name], []
            for i, j in np.ndindex(k, k):                               # Eqs. 6, 10, 11, l = i + k (j - 1)
                I, J = π_r[part(i, len(π_r), k)], π_c[part(j, len(π_c), k)]
                pairs[name].append((J, I, B, np.ix_(J, part(i, rank, k)), A, np.ix_(part(j, rank, k), I)))
            for side, π in (("rows", π_r), ("columns", π_c)):
                out[f"{key}.{name}.lora_{side}"] = np.argsort(π) * k // len(π)      # the part of each feature
        params, delta, now = run_stage(rng, out, key, frozen, params, partial(sum_of_pairs, pairs))
        for name, (W, bias) in frozen.items():
            wide[name] = wide.get(name, []) + now[name]
            merged[name] = W + delta[name], bias                        # lines 4, 6, in the order W has
            if stage + 1 < STAGES:
                order[name] = cosine_order(delta[name].T), cosine_order(delta[name])        # line 5
    finish(out, case, layers, frozen, delta, wide)
    groups = [[f"{name}.lora_{side}" for name in layers] for side in "AB"]
    return dict(modules=list(layers), stages=STAGES, uniform=bounds, groups=[groups] * STAGES, keep_state=[])


def triplets(M, take):
    """The triplets `take` of M = U Σ Vᵀ, as U Σ^½ and Σ^½ Vᵀ; the largest entry of each u is positive."""
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    apart(S[S > 1e-9])                                                  # W_res of stage 0 has r_g zeros
    for u, v in zip(U.T[take], Vt[take]):
        sign = np.sign(max(u, key=abs))
        u *= sign
        v *= sign
    return U[:, take] * S[take] ** 0.5, S[take, None] ** 0.5 * Vt[take]


def start_local(W, rows, columns, r):
    """L on a region of W_merge (out, in): -> W_res (out, in), {"B": (n, r), "A": (r, m)} or {"B": (n, m)}."""
    m, n, here, W = len(rows), len(columns), np.ix_(rows, columns), W.T.copy()      # the paper's layout
    if r * (m + n) >= m * n:                                            # §3.2.2: dense, from 0
        return W.T, {"B": np.zeros((n, m))}
    L_A, L_B = triplets(W[here], slice(0, r))                           # Eqs. 12 - 14
    W[here] -= L_A @ L_B                                                # Eqs. 14, 15
    return W.T, {"B": L_B.T, "A": L_A.T}


def next_region(out, key, name, region):
    """Eqs. 9, 10, of the stage's mean scores: the half of the rows and of the columns that scored most."""
    halves = []
    for axis, (side, features) in enumerate(zip("AB", region)):         # A (r, m) and B (n, r), by feature
        L = f"{name}.lora_local_{side}"
        steps = [out[f"{key}.step{t}.{L}"] * out[f"{key}.step{t}.grad.{L}"] for t in range(STEPS)]
        out[f"{key}.score.{L}"] = score = np.mean(np.abs(steps), axis=0)
        norms = apart(np.sqrt((score ** 2).sum(axis=axis)))
        halves.append(np.sort(features[np.argsort(-norms)[:len(norms) // 2]]))              # Alg. 1, line 12
    return halves


def glora(rng, out, case, rank, ratio):
    """Alg. 1 over three stages, the last one dense, with Eqs. 11 - 15 where it slips; one L is live."""
    g, l = map(int, ratio.split(":"))
    layers, params, merged, region, pairs, wide = draw_layers(rng, out, case), {}, {}, {}, {}, {}
    for name, (W, bias) in layers.items():
        G_A, G_B = triplets(W.T, slice(-rank * g // (g + l), None))     # Eqs. 4, 5
        params |= {f"{name}.lora_global_A": G_A.T, f"{name}.lora_global_B": G_B.T}
        merged[name], region[name] = (W - (G_A @ G_B).T, bias), [*map(np.arange, W.T.shape)]    # Eq. 5
    shared, groups, frozen = list(params), [], {}
    for stage in range(STAGES):
        key, params = f"{case}.stage{stage}", {p: params[p] for p in shared}
        for name, (W, bias) in merged.items():
            G, L, (rows, columns) = f"{name}.lora_global_", f"{name}.lora_local_", region[name]
            W_res, local = start_local(W, rows, columns, rank * l // (g + l) * 2 ** stage)
            params |= {L + side: value for side, value in local.items()}
            frozen[name] = W_res, bias
            pairs[name] = [(*map(np.arange, W.shape), G + "B", ..., G + "A", ...),
                           (columns, rows, L + "B", ..., L + "A" if "A" in local else None, ...)]   # Eq. 2
            out |= {f"{key}.{name}.{what}": value for what, value in
                    (("weight", W_res), ("lora_rows", rows), ("lora_columns", columns))}
        groups.append([shared, [p for p in params if p not in shared]])
        start = sum_of_pairs(pairs, params, {name: W for name, (W, _) in layers.items()})[2]
        params, delta, now = run_stage(rng, out, key, frozen, params, partial(sum_of_pairs, pairs))
        for name, (_, (A, B)) in now.items():
            wide[name] = wide.get(name, []) + [(a, -b) for a, b in start[name][stage > 0:]] + [(A, B)]
            merged[name] = frozen[name][0] + B @ A, layers[name][1]     # Eq. 11
            region[name] = next_region(out, key, name, region[name]) if stage + 1 < STAGES else None
    finish(out, case, layers, frozen, delta, {name: wide[name] + now[name][:1] for name in layers})
    return dict(modules=list(layers), stages=STAGES, groups=groups, keep_state=shared)


def gfa(rng, out, case, rank):
    """Steps 1 - 4, entry by entry; vec is row-major over (out, in)."""
    layers = draw_layers(rng, out, case, *([] if case == "two" else [("query", "k_proj", "o_proj")]))
    *starts, d = np.cumsum([0, *(W.size for W, _ in layers.values())])                      # Step 1
    c, k = dict(zip(layers, starts)), int(np.sqrt(d))                                       # Step 2

    def update(params, D):
        A, B, delta = params["adapter.lora_A"], params["adapter.lora_B"], {}
        grads = {p: np.zeros_like(value) for p, value in params.items()}
        for name, (W, _) in layers.items():
            delta[name] = np.zeros(W.shape)
            for o, i in np.ndindex(*W.shape):
                row, column = divmod(c[name] + o * W.shape[1] + i, k)
                delta[name][o, i] = B[row] @ A[:, column]               # Steps 3, 4, s = 1
                grads["adapter.lora_B"][row] += D[name][o, i] * A[:, column]
                grads["adapter.lora_A"][:, column] += D[name][o, i] * B[row]
        return delta, grads, None

    params = {"adapter.lora_B": np.zeros((-(-d // k), rank)), "adapter.lora_A": 0.02 * rng.randn(rank, k)}
    _, delta, _ = run_stage(rng, out, f"{case}.stage0", layers, params, update)
    finish(out, case, layers, layers, delta)
    return dict(modules=list(layers), stages=1, normal={"adapter.lora_A": 0.02})


def make():
    """{method: (tensors, metadata)} of every file."""
    files = {}
    for method, cases in CASES.items():
        rng, out, settings = np.random.RandomState(SEED), {}, {}
        for case, own in cases.items():
            settings[case] = dict(inject=own, **globals()[method](rng, out, case, **own))
        files[method] = {k: np.ascontiguousarray(v) for k, v in out.items()}, {"cases": json.dumps(settings)}
    return files


if __name__ == "__main__":
    directory = Path(sys.argv[1] if sys.argv[1:] else Path(__file__).resolve().parents[1] / "tests/vectors")
    for method, (tensors, metadata) in make().items():
        save_file(tensors, directory / f"{method}.safetensors", metadata)
