"""What the G-LoRA paper says: where its adapters start, how the local one shrinks, what ranks that gives."""
import copy
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import trainable
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import glora
import train
from data import arithmetic, text


def injected(o=20, i=24, rank=4, seed=0, dtype=torch.float64, **own):
    """-> a model of one adapted layer, its optimizer, its pretrained weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(i, o).to(dtype))
    W = model[0].weight.detach().clone()
    glora.inject(model, ("0",), rank, **own)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2), W


def stage(model, optimizer, x=None, noise=0.1, steps=2):
    """Optimizer steps with their observe(), then noise in every factor, as if more of them had come."""
    layer = model[0]
    for t in range(steps):
        inputs = torch.randn(6, layer.base.in_features).to(layer.base.weight) if x is None else x
        model(inputs).float().square().sum().backward()
        glora.observe(model, t + 1, steps)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn_like(p))


def product(layer):
    A, B = layer.local()
    return (B @ A).detach()


def rank_of(M):
    return torch.linalg.matrix_rank(M).item()


def rounded_once(got, W, A, B):
    """Whether got is W + B A, rounded to its own dtype, in whatever order the products were summed in A's."""
    eps, W, A, B = torch.finfo(A.dtype).eps, W.double(), A.detach().double(), B.detach().double()
    exact, slack = W + B @ A, (len(A) + 2) * eps * (W.abs() + B.abs() @ A.abs()).max()
    return bool((((exact - slack).to(got.dtype) <= got) & (got <= (exact + slack).to(got.dtype))).all())


# ---------------------------------------------------------------------- decompositions

def spectrum(n, m, sigma, seed=0):
    """(n, m) with these singular values."""
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, len(sigma)).double())[0] for size in (n, m))
    return U * sigma @ V.T


def sine(X, Y):
    """Sine of the largest principal angle between the spans of orthonormal X and Y: |Y - X Xᵀ Y|."""
    X, Y = X.double(), Y.double()
    return torch.linalg.matrix_norm(Y - X @ (X.T @ Y), 2).item()


@pytest.mark.parametrize("n, m", [(40, 40), (60, 30), (30, 60)])
@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_the_exact_route_spans_what_torch_linalg_svd_spans_at_both_ends(n, m, condition):
    k = min(n, m)
    M = spectrum(n, m, torch.logspace(0, -np.log10(condition), k).double()).float()
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    for take in (torch.arange(5), torch.arange(k - 5, k), torch.tensor([k - 2, k - 1, 0, 1])):
        u, s, v = glora.exact_svd(M, take)
        assert u.dtype == torch.float32 and u.shape == (n, len(take)) and v.shape == (m, len(take))
        torch.testing.assert_close(s.double(), S[take], rtol=1e-5, atol=0)
        assert sine(U[:, take], u) < 1e-5 and sine(Vh[take].T, v) < 1e-5
        torch.testing.assert_close(u.double() * s @ v.double().T, U[:, take] * S[take] @ Vh[take],
                                   rtol=0, atol=1e-6)


@pytest.mark.parametrize("n, m", [(40, 40), (60, 30), (30, 60)])
@pytest.mark.parametrize("condition", [1e5, 1e6, 1e7])
def test_the_last_triplets_of_a_float32_weight_are_off_by_the_condition_squared_in_float64(n, m, condition):
    """By 2e-16 (σ₁ / σ)² at most, as neighbours here are 1.3 times apart or more; and fp32's rounding."""
    k = min(n, m)
    M = spectrum(n, m, torch.logspace(0, -np.log10(condition), k).double()).float()
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    bound = torch.finfo(torch.float64).eps * (S[0] / S[-1]) ** 2 + torch.finfo(torch.float32).eps
    u, s, v = glora.exact_svd(M, torch.tensor([k - 1]))
    assert sine(U[:, -1:], u) < bound and sine(Vh[-1:].T, v) < bound
    assert abs(s.item() - S[-1]) < bound * S[-1]


def test_a_weight_of_lower_rank_gives_finite_factors():
    A, B = glora.balanced(*glora.exact_svd(torch.zeros(6, 5), torch.tensor([0, 4])))
    assert A.isfinite().all() and B.isfinite().all() and not (B @ A).any()


def test_the_randomized_route_finds_nearly_the_leading_span():
    """Halko et al., two power iterations: with a flat tail (ratio 0.9) a degree, with a gap rounding."""
    torch.manual_seed(0)
    flat, gap = 0.9 ** torch.arange(80).double(), torch.cat((torch.ones(8), torch.full((72,), 1e-3))).double()
    for sigma, limit in ((flat, 0.02), (gap, 1e-6)):
        M = spectrum(100, 80, sigma)
        U, S, V = glora.region_svd(M, 8, "randomized", 4, "top")
        exact = glora.region_svd(M, 8, "exact", 4, "top")
        assert U.shape == (100, 8) and V.shape == (80, 8)
        assert 1e-16 < sine(exact[0], U) < limit and sine(exact[2], V) < limit
        torch.testing.assert_close(S, exact[1], rtol=limit, atol=0)


@pytest.mark.parametrize("oversample, k, width",
                         [(4, 8, 32), (8, 4, 32), (1, 3, 3), (4, 20, None), (100, 1, None)])
def test_the_sketch_is_oversample_times_the_stages_rank_and_exact_where_that_reaches_the_region(
        oversample, k, width, monkeypatch):
    seen, real = [], torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank",
                        lambda M, q, niter: seen.append((q, niter)) or real(M, q=q, niter=niter))
    M = spectrum(90, 80, torch.linspace(2, 1, 80).double())
    U, S, V = glora.region_svd(M, k, "randomized", oversample, "top")
    assert S.shape == (k,) and seen == ([(width, 2)] if width else [])


# ---------------------------------------------------------------------- Eqs. 4, 5, 14: the start

@pytest.mark.parametrize("o, i", [(20, 24), (24, 20)])
@pytest.mark.parametrize("global_init, local_init, G, L", [     # of 20 triplets, 6 and 2: Table 6
    ("bottom", "top", range(14, 20), range(0, 2)), ("top", "top", range(0, 6), range(6, 8)),
    ("bottom", "bottom", range(14, 20), range(12, 14)), ("top", "bottom", range(0, 6), range(18, 20))])
def test_the_adapters_start_on_different_triplets_of_w_and_these_leave_the_residual(
        o, i, global_init, local_init, G, L):
    model, _, W = injected(o, i, 8, global_init=global_init, local_init=local_init)
    layer, (U, S, Vh) = model[0], torch.linalg.svd(W, full_matrices=False)
    part = lambda take: sum(S[k] * torch.outer(U[:, k], Vh[k]) for k in take)
    torch.testing.assert_close(layer.lora_global_B @ layer.lora_global_A, part(G))
    torch.testing.assert_close(product(layer), part(L))
    torch.testing.assert_close(layer.base.weight, W - part(G) - part(L))                # Eqs. 5 and 14
    for A, B, take in ((layer.lora_global_A, layer.lora_global_B, G),
                       (layer.lora_local_A, layer.lora_local_B, L)):
        torch.testing.assert_close(A.norm(dim=1), S[list(take)].sqrt())                 # Σ^½ on either side
        torch.testing.assert_close(B.norm(dim=0), S[list(take)].sqrt())


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_function_is_exact_whatever_the_route_as_the_residual_is_formed_from_the_factors(
        svd, monkeypatch):
    calls, real = [], torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank", lambda *a, **k: calls.append(1) or real(*a, **k))
    model, optimizer, W = injected(120, 128, 4, svd=svd, oversample=1)

    def same(W):        # to rounding: the adapters are parts of W, of at most its norm
        torch.testing.assert_close(model[0].base.weight + model[0].delta(), W, rtol=0,
                                   atol=64 * torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W, 2).item())

    same(W)
    assert not calls                                                        # stage 0 is exact (Table 16)
    for s in range(2):
        stage(model, optimizer)
        W = (model[0].base.weight + model[0].delta()).detach()
        glora.reinit(model, optimizer)
        same(W)
        assert product(model[0]).any() and len(calls) == (s + 1) * (svd == "randomized")


@pytest.mark.parametrize("rank, ratio, ranks",
                         [(8, "3:1", (6, 2)), (8, "1:3", (2, 6)), (6, "1:1", (3, 3)), (10, "2:3", (4, 6))])
def test_the_ratio_splits_the_rank(rank, ratio, ranks):
    layer = injected(40, 41, rank, ratio=ratio)[0][0]
    assert (len(layer.lora_global_A), len(layer.lora_local_A)) == glora.split_rank(rank, ratio) == ranks


@pytest.mark.parametrize("rank, own, message", [
    (6, {}, "ratio 3:1: rank 6 is not a multiple of 3 [+] 1"),
    (4, dict(ratio="1:2"), "ratio 1:2: rank 4 is not"), (4, dict(ratio="4:0"), "ratio '4:0'"),
    (4, dict(ratio="3"), "ratio '3', expected two whole numbers above 0, such as 3:1"),
    (4, dict(ratio="-3:1"), "ratio '-3:1'"), (4, dict(ratio="3:1:1"), "ratio '3:1:1'"),
    (4, dict(oversample=0), "oversample 0"), (4, dict(svd="x"), "svd 'x', expected one of exact, randomized"),
    (4, dict(importance="x"), "importance 'x', expected one of taylor"),
    (4, dict(importance_window="x"), "importance_window 'x'"), (4, dict(global_init="x"), "global_init 'x'"),
    (4, dict(local_init="x"), "local_init 'x'"), (4, dict(alpha=8), "no alpha")])
def test_bad_settings_leave_the_model_as_it_was(rank, own, message):
    model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 20))
    with pytest.raises(ValueError, match=message):
        glora.inject(model, ("0", "1"), rank, **own)
    assert [type(m) for m in model] == [nn.Linear] * 2


def test_table_1_the_parameter_count_is_loras():
    for model, printed in (("LLaMA2-7B", 8.39), ("LLaMA2-13B", 13.11), ("LLaMA3-8B", 6.82)):
        assert round(trainable("glora", model, "attention", 8) / 1e6, 2) == printed
    lora = trainable("lora", "LLaMA3-8B", "attention", 8)
    assert trainable("glora", "LLaMA3-8B", "attention", 8, ratio="1:3") == lora


def test_dropout_draws_one_mask_for_both_adapters_and_spares_the_residual():
    torch.manual_seed(0)
    own = dict(global_init="bottom", local_init="top")
    layer = glora.GLoRALinear(nn.Linear(24, 20).double(), 3, 1, 0.5, own)
    x = torch.randn(40, 24).double()
    for _ in range(2):                                                      # a pair, then a dense block
        torch.manual_seed(1)
        y = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(y, layer.base(x) + layer.dropout(x) @ layer.delta().T)
        layer.start(torch.arange(5), torch.arange(6), None, torch.randn(6, 5).double())


# ---------------------------------------------------------------------- Alg. 1 with Eqs. 2, 9 - 15 as printed

class Printed:
    """
    The paper's own layout: y = x W, W (m, n), explicit permutations of all rows and columns; factors
    from torch.linalg.svd.
    """

    def __init__(self, W, r_g, r_l):
        self.m, self.n = W.shape
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)                             # Eq. 4
        k = len(S)
        root = S[k - r_g:].sqrt()
        self.G_A, self.G_B = U[:, k - r_g:] * root, root[:, None] * Vh[k - r_g:]        # Eq. 5
        self.W_res = W - self.G_A @ self.G_B
        self.pi_r, self.pi_c, self.rank = torch.arange(self.m), torch.arange(self.n), r_l
        self.localise()

    def localise(self):
        W_init = self.W_res[self.pi_r][:, self.pi_c].clone()                            # Eq. 12
        U, S, Vh = torch.linalg.svd(W_init[:self.m, :self.n], full_matrices=False)      # Eq. 13
        root = S[:self.rank].sqrt()
        self.L_A, self.L_B = U[:, :self.rank] * root, root[:, None] * Vh[:self.rank]    # Eq. 14
        W_init[:self.m, :self.n] -= self.L_A @ self.L_B
        self.W_res = W_init[self.pi_r.argsort()][:, self.pi_c.argsort()]                # Eq. 15

    def padded(self):
        """ΔW_L: L_A L_B in the upper left corner, in the restored order (Eq. 11)."""
        full = torch.zeros_like(self.W_res)
        full[:self.m, :self.n] = self.L_A @ self.L_B
        return full[self.pi_r.argsort()][:, self.pi_c.argsort()]

    def forward(self, x):                                                       # Eq. 2, the live stage
        local = torch.zeros(len(x), self.W_res.shape[1]).double()
        local[:, :self.n] = x[:, self.pi_r][:, :self.m] @ self.L_A @ self.L_B
        return x @ self.W_res + x @ self.G_A @ self.G_B + local[:, self.pi_c.argsort()]

    def next(self, I_A, I_B):
        """I_A (m, r), I_B (r, n) of Eq. 9."""
        self.W_res = self.W_res + self.padded()                                         # Eq. 11
        norm = lambda vector: sum(v * v for v in vector.tolist()) ** 0.5
        by_row = sorted(range(self.m), key=lambda j: -norm(I_A[j]))                     # Eq. 10
        by_column = sorted(range(self.n), key=lambda j: -norm(I_B[:, j]))
        self.pi_r = torch.cat((self.pi_r[:self.m][by_row], self.pi_r[self.m:]))
        self.pi_c = torch.cat((self.pi_c[:self.n][by_column], self.pi_c[self.n:]))
        self.m, self.n = self.m // 2, self.n // 2                                       # Alg. 1, line 12
        self.rank = 2 * self.rank                                                       # r_l^{i+1}
        self.localise()


def test_equations_2_to_15_as_printed_over_three_stages():
    """Ours against explicit permutations; what training moved is handed over in the printed order."""
    model, optimizer, W = injected(131, 167, 4)
    layer, bias = model[0], model[0].base.bias
    paper = Printed(W.T, 3, 1)
    for s in range(4):
        rows, columns = paper.pi_r[:paper.m], paper.pi_c[:paper.n]
        assert sorted(rows.tolist()) == layer.lora_rows.tolist()
        assert sorted(columns.tolist()) == layer.lora_columns.tolist()
        torch.testing.assert_close(layer.base.weight, paper.W_res.T)
        torch.testing.assert_close(product(layer), paper.padded().T)
        x = torch.randn(7, 167).double()
        torch.testing.assert_close(model(x), paper.forward(x) + bias)
        if s == 3:
            break
        I_A, I_B = (torch.zeros_like(p) for p in (layer.lora_local_A, layer.lora_local_B))
        for t in range(3):
            model(torch.randn(6, 167).double()).square().sum().backward()
            I_A += (layer.lora_local_A * layer.lora_local_A.grad).detach().abs()        # Eq. 9
            I_B += (layer.lora_local_B * layer.lora_local_B.grad).detach().abs()
            glora.observe(model, t + 1, 3)
            optimizer.step()
            optimizer.zero_grad()
        at_row = (layer.lora_rows == rows[:, None]).int().argmax(1)         # places of the printed order
        at_column = (layer.lora_columns == columns[:, None]).int().argmax(1)
        paper.G_A, paper.G_B = layer.lora_global_A.detach().T, layer.lora_global_B.detach().T
        paper.L_A = layer.lora_local_A.detach()[:, at_row].T
        paper.L_B = layer.lora_local_B.detach()[at_column].T
        paper.next(I_A[:, at_row].T, I_B[at_column].T)
        glora.reinit(model, optimizer)


def test_eq_2_summed_over_the_stages_is_the_merged_form_with_another_base_and_not_with_eq_15s():
    """
    x (W₀ - G_init - Σ L_init) + x G + Σ x L^i is what we compute; with the W_res of Eq. 15, merged stages
    count twice.
    """
    model, optimizer, W = injected(40, 48, 4)
    layer = model[0]
    G_init, inits, finals = (layer.lora_global_B @ layer.lora_global_A).detach(), [], []
    for s in range(3):
        inits.append(product(layer))
        stage(model, optimizer)
        finals.append(product(layer))
        if s < 2:
            glora.reinit(model, optimizer)
    G, x = (layer.lora_global_B @ layer.lora_global_A).detach(), torch.randn(5, 48).double()
    total = lambda base: x @ (base + G + sum(finals)).T + layer.base.bias
    torch.testing.assert_close(model(x), total(W - G_init - sum(inits)))
    assert (model(x) - total(layer.base.weight.detach())).abs().max() > 0.1


# ---------------------------------------------------------------------- regions, ranks, the dense switch

@pytest.mark.parametrize("o, i", [(97, 131), (64, 48), (33, 96)])
def test_regions_are_nested_and_half_as_wide_and_high_each_time_rounded_down(o, i):
    model, optimizer, _ = injected(o, i, 4)
    layer, budget = model[0], 4 * (o + i)
    for s in range(8):
        m, n, r = i >> s, o >> s, 2 ** s
        assert len(layer.lora_rows) == m and len(layer.lora_columns) == n
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        dense, divides = r * (m + n) >= m * n, o % 2 ** s == 0 and i % 2 ** s == 0
        assert trains <= budget and (trains == budget) == (divides and not dense)
        if dense:                                                   # §3.2.2: the first such stage is dense
            assert layer.lora_local_A is None and layer.lora_local_B.shape == (n, m)
            return
        assert layer.lora_local_A.shape == (r, m) and layer.lora_local_B.shape == (n, r)
        before = set(layer.lora_rows.tolist()), set(layer.lora_columns.tolist())
        stage(model, optimizer, steps=1)
        glora.reinit(model, optimizer)
        assert set(layer.lora_rows.tolist()) < before[0]                                # App. J.3
        assert set(layer.lora_columns.tolist()) < before[1]
    pytest.fail("never dense")


@pytest.mark.parametrize("o, i, r_l, first",
                         [(4096, 4096, 2, 5), (4096, 4096, 6, 5), (1024, 4096, 2, 5), (1024, 4096, 6, 4),
                          (192, 576, 2, 4), (128, 128, 2, 3)])
def test_the_stage_from_which_a_pair_would_cost_as_much_as_the_region(o, i, r_l, first):
    dense = [glora.is_dense(r_l * 2 ** s, o >> s, i >> s) for s in range(first + 1)]
    assert dense == [False] * first + [True]


def test_a_dense_region_starts_at_zero_and_later_reinits_leave_it_and_its_moments_alone():
    model, optimizer, _ = injected(16, 16, 4)
    layer, x = model[0], torch.randn(5, 16).double()
    while layer.lora_local_A is not None:
        stage(model, optimizer)
        y = model(x)
        glora.reinit(model, optimizer)
        torch.testing.assert_close(model(x), y)
    assert not layer.lora_local_B.any()
    stage(model, optimizer)
    block, state, rows, y = layer.lora_local_B, optimizer.state[layer.lora_local_B], layer.lora_rows, model(x)
    assert block.any() and state["exp_avg"].any()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    glora.reinit(model, optimizer)
    assert layer.lora_local_B is block and optimizer.state[block] is state and layer.lora_rows is rows
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    torch.testing.assert_close(model(x), y)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in (layer.lora_global_A, layer.lora_global_B, layer.lora_local_B)]


def test_a_rank_larger_than_the_next_region_allows_is_dense_not_a_crash():
    model, optimizer, _ = injected(24, 40, 16, ratio="1:3")                 # 24 of a 12 x 20 region
    stage(model, optimizer)
    glora.reinit(model, optimizer)
    assert model[0].lora_local_A is None and model[0].lora_local_B.shape == (12, 20)
    model, _, W = injected(8, 8, 8, ratio="1:3")                            # and already at stage 0
    assert model[0].lora_local_B.shape == (8, 8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= 8 * 16
    torch.testing.assert_close(model[0].base.weight + model[0].delta(), W)


def test_proposition_1_both_extremes_of_the_rank():
    """
    r_g = r_l = r, two re-inits later: a region of m/4 x n/4 with rank 4r. 3r <= rank(G + L) <= 5r, both
    are reached.
    """
    r, m, n = 2, 128, 96
    model, optimizer, _ = injected(n, m, 2 * r, ratio="1:1")
    for _ in range(2):
        stage(model, optimizer)
        glora.reinit(model, optimizer)
    layer = model[0]
    assert layer.lora_local_A.shape == (4 * r, m // 4) and layer.lora_local_B.shape == (n // 4, 4 * r)
    with torch.no_grad():
        nn.init.normal_(layer.lora_local_A), nn.init.normal_(layer.lora_local_B)
        L = product(layer)
        nn.init.normal_(layer.lora_global_A), nn.init.normal_(layer.lora_global_B)
        assert rank_of(L) == 4 * r and rank_of(layer.delta()) == 5 * r      # independent spaces
        A, B = layer.local()
        layer.lora_global_A.copy_(A[:r])
        layer.lora_global_B.copy_(-B[:, :r])                                # cancels r of L's directions
        assert rank_of(layer.delta()) == 3 * r


def test_factors_grow_to_the_accumulated_bound():
    """2 r_g + 2 Σ r_l 2^s: 136 at 3:1 and 376 at 1:3 after the paper's four re-inits, at rank 8."""
    bound = lambda r_g, r_l, stages: 2 * r_g + 2 * sum(r_l * 2 ** s for s in range(stages))
    assert bound(6, 2, 5) == 136 and bound(2, 6, 5) == 376
    model, optimizer, W = injected(128, 160, 4)
    for s in range(3):
        A, B = glora.factors(model)["0"]
        assert len(A) == B.shape[1] == bound(3, 1, s + 1)
        stage(model, optimizer)
        glora.reinit(model, optimizer)
    stage(model, optimizer)
    A, B = glora.factors(model)["0"]
    assert rank_of(B @ A) == bound(3, 1, 4)


def eber(M):
    """App. F: exp of the entropy of p_i = σ_i² / Σ σ²."""
    p = torch.linalg.svdvals(M) ** 2
    p = p[p > 1e-30] / p.sum()
    return torch.exp(-(p * p.log()).sum()).item()


def test_the_effective_rank_of_the_update_grows_stage_by_stage():
    """Every stage moves as far as the one before, in each of twice as many directions: App. F, all stages."""
    model, optimizer, W = injected(128, 128, 8)
    found = []
    for _ in range(4):
        before = product(model[0])
        with torch.no_grad():                                   # L moves by 0.01 U Vᵀ, both orthonormal
            V, R = torch.linalg.qr(model[0].local()[0].T)       # A = Rᵀ Vᵀ
            U = torch.linalg.qr(torch.randn_like(model[0].lora_local_B))[0]
            model[0].lora_local_B.add_(0.01 * U @ torch.linalg.inv(R.T))
        model(torch.randn(6, 128).double()).square().sum().backward()
        glora.observe(model, 1, 1)
        optimizer.zero_grad()
        assert (product(model[0]) - before).any()
        A, B = glora.factors(model)["0"]
        found.append(eber(B @ A))
        glora.reinit(model, optimizer)
    assert all(later > 1.5 * earlier for earlier, later in zip(found, found[1:])), found


# ---------------------------------------------------------------------- importance: Eqs. 9, 10, Table 4

@pytest.mark.parametrize("strategy, formula",
                         [("taylor", lambda L, g: abs(L * g)), ("grad", lambda L, g: abs(g)),
                          ("fisher", lambda L, g: g ** 2)])
@pytest.mark.parametrize("window", ["stage", "last"])
def test_the_score_is_the_mean_over_the_stage_or_its_last_step_and_starts_anew(strategy, formula, window):
    model, optimizer, _ = injected(32, 48, 4, importance=strategy, importance_window=window)
    layer = model[0]
    for _ in range(2):
        seen = []
        for t in range(3):
            model(torch.randn(6, 48).double()).square().sum().backward()
            seen.append([formula(L.detach().numpy(), L.grad.numpy())
                         for L in (layer.lora_local_A, layer.lora_local_B)])
            glora.observe(model, t + 1, 3)
            optimizer.step()
            optimizer.zero_grad()
        want = [np.mean(score, 0) for score in zip(*seen)] if window == "stage" else seen[-1]
        norms = [np.linalg.norm(want[0], axis=0), np.linalg.norm(want[1], axis=1)]     # over the rank axis
        best = [sorted(np.argsort(-norm)[:len(norm) // 2]) for norm in norms]
        rows, columns = layer.lora_rows[best[0]], layer.lora_columns[best[1]]
        glora.reinit(model, optimizer)
        assert torch.equal(layer.lora_rows, rows) and torch.equal(layer.lora_columns, columns)


@pytest.mark.parametrize("strategy", ["taylor", "grad", "fisher"])
def test_a_planted_critical_block_is_found(strategy):
    """
    The loss weighs few outputs, and few inputs vary: after two re-inits the region holds them all, a
    quarter each way.
    """
    model, optimizer, _ = injected(64, 80, 4, importance=strategy)
    rows, columns = torch.randperm(80)[:12], torch.randperm(64)[:10]
    scale_in, scale_out = torch.full((80,), 0.01).double(), torch.full((64,), 0.01).double()
    scale_in[rows], scale_out[columns] = 1, 1
    for _ in range(2):
        for t in range(4):
            x = torch.randn(30, 80).double() * scale_in
            (model(x) * scale_out).square().sum().backward()
            glora.observe(model, t + 1, 4)
            optimizer.step()
            optimizer.zero_grad()
        glora.reinit(model, optimizer)
    assert set(rows.tolist()) <= set(model[0].lora_rows.tolist()) and len(model[0].lora_rows) == 20
    assert set(columns.tolist()) <= set(model[0].lora_columns.tolist()) and len(model[0].lora_columns) == 16


@pytest.mark.parametrize("silent", ["no gradient", "a gradient of zeros", "one of A alone"])
def test_a_stage_in_which_no_gradient_arrived_is_cut_by_magnitude_with_a_warning(silent):
    model, optimizer, _ = injected(32, 48, 8)
    layer = model[0]
    with torch.no_grad():
        nn.init.normal_(layer.lora_local_A), nn.init.normal_(layer.lora_local_B)
    A, B = layer.lora_local_A.detach().clone(), layer.lora_local_B.detach().clone()
    if silent == "a gradient of zeros":
        (0 * model(torch.randn(2, 48).double())).sum().backward()
    if silent == "one of A alone":
        model(torch.randn(2, 48).double()).sum().backward()
        layer.lora_local_B.grad.zero_()
    glora.observe(model, 1, 1)
    layer.lora_local_B.grad = None
    glora.observe(model, 2, 2)                                              # nothing to add, no crash
    with pytest.warns(UserWarning, match="^no gradient at 0 in this stage; regions cut by magnitude: 1"):
        glora.reinit(model, optimizer)
    assert layer.lora_rows.tolist() == A.norm(dim=0).argsort(descending=True)[:24].sort().values.tolist()
    assert layer.lora_columns.tolist() == B.norm(dim=1).argsort(descending=True)[:16].sort().values.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stage(model, optimizer)
        glora.reinit(model, optimizer)


def test_ties_go_to_the_first_feature():
    assert glora.most_important(torch.ones(4, 200), 0).tolist() == list(range(100))     # norms of exactly 2


def test_the_region_does_not_depend_on_the_micro_batch_size(tiny):
    """observe() sees the whole accumulated batch, once per step."""
    regions = []
    for micro in (8, 2):
        torch.manual_seed(0)
        model = checkpoint.load(tiny).double()
        rows = arithmetic.rows(".", "arithmetic", "train")[:8]
        examples, _ = text.encode(text.Tokenizer(tiny, model.cfg), rows, 512, False)
        glora.inject(model, ("q_proj", "up_proj"), 8)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        for t in range(2):
            train.backward(model, examples, micro)
            glora.observe(model, t + 1, 2)
            optimizer.step()
            optimizer.zero_grad()
        glora.reinit(model, optimizer)
        regions.append([t.tolist() for name, t in model.named_buffers()
                        if name.endswith(("lora_rows", "lora_columns"))])
    assert regions[0] == regions[1] and len(regions[0]) == 16


# ---------------------------------------------------------------------- what a re-init does to the rest

def test_a_reinit_drops_the_local_state_keeps_the_global_and_the_groups():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32).double())
    glora.inject(model, ("0",), 4)
    layer = model[0]
    optimizer = torch.optim.AdamW([dict(params=[layer.lora_local_B, layer.lora_global_A], lr=1e-2),
                                   dict(params=[layer.lora_global_B, layer.lora_local_A], lr=5e-3)])
    for _ in range(2):
        stage(model, optimizer)
        old = layer.lora_local_A, layer.lora_local_B
        kept = {p: optimizer.state[p]["exp_avg"].clone() for p in (layer.lora_global_A, layer.lora_global_B)}
        glora.reinit(model, optimizer)
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
            [id(layer.lora_local_B), id(layer.lora_global_A)],
            [id(layer.lora_global_B), id(layer.lora_local_A)]]
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
        assert set(optimizer.state) == set(kept) and not any(p in optimizer.state for p in old)
        assert all(torch.equal(optimizer.state[p]["exp_avg"], value) for p, value in kept.items())


def test_a_reinit_decomposes_the_region_of_the_merged_residual_without_the_live_global_adapter():
    """Eqs. 11 - 13, not App. J.2: the top of (W_res + ΔW_L) on the region, twice L's rank."""
    model, optimizer, _ = injected(40, 48, 4)
    stage(model, optimizer)
    layer = model[0]
    merged = layer.base.weight.detach() + product(layer)
    glora.reinit(model, optimizer)
    M = merged[layer.lora_columns][:, layer.lora_rows]
    U, S, Vh = torch.linalg.svd(M)
    torch.testing.assert_close(layer.lora_local_B @ layer.lora_local_A, U[:, :2] * S[:2] @ Vh[:2])
    assert len(layer.lora_local_A) == 2


def test_local_init_bottom_holds_at_every_stage():
    model, optimizer, _ = injected(96, 128, 4, local_init="bottom")
    for s in range(1, 3):
        stage(model, optimizer)
        merged = model[0].base.weight.detach() + product(model[0])
        glora.reinit(model, optimizer)
        rows, columns = model[0].lora_rows, model[0].lora_columns
        U, S, Vh = torch.linalg.svd(merged[columns][:, rows], full_matrices=False)
        r = 2 ** s
        torch.testing.assert_close(product(model[0])[columns][:, rows], U[:, -r:] * S[-r:] @ Vh[-r:])


def test_a_bf16_base_is_rounded_once_after_four_reinits():
    model, optimizer, W = injected(96, 128, 4, dtype=torch.bfloat16)
    layer = model[0]
    for s in range(4):
        stage(model, optimizer)
        glora.reinit(model, optimizer)
        exact = W.float() + layer.lora_fixed_B @ layer.lora_fixed_A
        # What is decomposed is not rounded: L's triplets are those of the exact region, and are out of it.
        if s < 2:
            region = lambda M: torch.linalg.svdvals(M[layer.lora_columns][:, layer.lora_rows].double())
            left, before = region(exact), region(exact + product(layer))
            rounding = 2 * torch.finfo(torch.float32).eps * before[0].item()
            torch.testing.assert_close(left[:4], before[2 ** (s + 1):][:4], rtol=0, atol=rounding)
        assert rounded_once(layer.base.weight, W, layer.lora_fixed_A, layer.lora_fixed_B)
        assert layer.lora_fixed_A.dtype == torch.float32
    total = glora.factors(model)["0"]
    glora.merge(model)
    assert model[0].weight.dtype == torch.bfloat16 and rounded_once(model[0].weight, W, *total)


def test_nothing_weight_sized_is_kept_for_autograd():
    def keep(t):
        kept.append(t)
        return t

    for stages in (0, 2, 6):
        model, optimizer, _ = injected(96, 128, 4)
        for _ in range(stages):
            stage(model, optimizer)
            glora.reinit(model, optimizer)
        kept, x = [], torch.randn(3, 128).double()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x.requires_grad_())
        weights = {p.data_ptr() for p in model.parameters()}
        large = [t for t in kept if t.numel() >= 96 * 128 / 2]
        assert kept and not [t.shape for t in large if t.data_ptr() not in weights]
        y.sum().backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_forward_costs_the_adapters_alone():
    """Per token 2 (r_g + r) (i + o) for a pair, zeros included, 2 r_g (i + o) + 2 m n for a dense block."""
    o, i, tokens = 96, 128, 7
    model, optimizer, _ = injected(o, i, 4)
    seen = set()
    for s in range(4):
        layer = model[0]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(tokens, i).double())
        dense = layer.lora_local_A is None
        local = layer.lora_local_B.numel() if dense else 2 ** s * (i + o)
        assert counter.get_total_flops() == 2 * tokens * (i * o + 3 * (i + o) + local)
        seen.add(dense)
        stage(model, optimizer)
        glora.reinit(model, optimizer)
    assert seen == {True, False}


# ---------------------------------------------------------------------- saving

@pytest.mark.parametrize("stages, dtype", [(0, torch.float64), (1, torch.float64), (5, torch.float64),
                                           (2, torch.bfloat16)])
def test_an_adapter_reloads_without_an_svd(stages, dtype, tmp_path, monkeypatch):
    model, optimizer, W = injected(48, 40, 8, dtype=dtype)
    fresh = nn.Sequential(nn.Linear(40, 48).to(dtype))
    with torch.no_grad():
        fresh[0].weight.copy_(W), fresh[0].bias.copy_(model[0].base.bias)
    for _ in range(stages):
        stage(model, optimizer)
        glora.reinit(model, optimizer)
    stage(model, optimizer)
    checkpoint.save_adapter(tmp_path / "a", model, dict(method="glora", targets=["0"], rank=8))
    for name in ("eigh", "svd"):
        monkeypatch.setattr(torch.linalg, name, lambda *a, **k: pytest.fail("an SVD"))
    other = copy.deepcopy(fresh)
    method, _ = checkpoint.load_adapter(other, tmp_path / "a")
    saved, loaded = model.state_dict(), other.state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in saved.items() if "lora_" in name)
    x, fixed = torch.randn(5, 40).to(dtype), (model[0].lora_fixed_A, model[0].lora_fixed_B)
    y = model(x)
    torch.testing.assert_close(other(x), y, rtol=0, atol=16 * torch.finfo(dtype).eps * y.abs().max().item())
    assert all(rounded_once(net[0].base.weight, W, *fixed) for net in (model, other))
    dtypes = lambda model: {name: t.dtype for name, t in model.state_dict().items()}
    assert dtypes(other) == dtypes(model)
    assert (other[0].lora_local_A is None) == (stages >= 2)
    total = method.factors(model)["0"]
    method.merge(other), method.merge(model)
    assert all(rounded_once(net[0].weight, W, *total) for net in (model, other))


def test_a_stage_of_another_model_is_refused():
    model, optimizer, _ = injected(48, 40, 8)
    stage(model, optimizer)
    glora.reinit(model, optimizer)
    tensors = dict(model.state_dict())
    A, B, rows = (tensors[f"0.lora_{key}"] for key in ("fixed_A", "fixed_B", "rows"))
    for key, value, message in (
            ("fixed_A", A[:, :5], "tensors 0.lora_fixed_A and _B are missing or not for 48 x 40"),
            ("fixed_B", None, "tensors 0.lora_fixed_A and _B are missing"), ("fixed_B", B[1:], "tensors 0"),
            ("fixed_A", None, "tensors 0.lora_fixed_A and _B are missing"),
            ("fixed_A", torch.tensor(1.0), "tensors 0.lora_fixed_A"),
            ("fixed_B", torch.tensor(1.0), "tensors 0.lora_fixed_A"), ("fixed_B", B[:, 1:], "tensors 0"),
            ("rows", rows + 40 - rows.max(), "tensor 0.lora_rows, expected distinct, below 40"),
            ("rows", rows - 40, "tensor 0.lora_rows"), ("rows", rows * 0, "tensor 0.lora_rows"),
            ("rows", torch.cat((rows[1:], rows[:1] - 40)), "tensor 0.lora_rows"),
            ("rows", torch.tensor(40), "tensor 0.lora_rows, expected distinct, below 40"),
            ("columns", tensors["0.lora_columns"][:0], "tensor 0.lora_columns")):
        with pytest.raises(ValueError, match=message):
            glora.restore(injected(48, 40, 8)[0], tensors | {f"0.lora_{key}": value})


# ---------------------------------------------------------------------- what is said, freed and kept

def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 16)).double()
    glora.inject(model, ("0", "1"), 4)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize("observed, message", [
    (False, "observe was not called in this stage; regions cut by magnitude: 2"),
    (True, "no gradient at 0 in this stage; regions cut by magnitude: 2")])
def test_a_stage_without_scores_is_told_once_and_with_its_cause(observed, message):
    model, optimizer = two_layers()
    for _ in range(2):                                                      # anew in every stage
        if observed:
            glora.observe(model, 1, 1)
        else:
            model(torch.randn(3, 24).double()).sum().backward()
        with pytest.warns(UserWarning) as told:
            glora.reinit(model, optimizer)
        assert [str(warning.message) for warning in told] == [message]


def test_a_module_that_no_gradient_reaches_is_named_and_the_others_keep_their_scores():
    model, optimizer = two_layers()
    model[1](torch.randn(3, 20).double()).square().sum().backward()
    glora.observe(model, 1, 1)
    best = [glora.most_important(score, dim).tolist() for dim, score in enumerate(model[1].scores)]
    with pytest.warns(UserWarning, match="^no gradient at 0 in this stage; regions cut by magnitude: 1"):
        glora.reinit(model, optimizer)
    assert [model[1].lora_rows.tolist(), model[1].lora_columns.tolist()] == best


def test_bottom_triplets_come_from_the_exact_route_whatever_the_svd_which_is_told_at_the_start(monkeypatch):
    """Table 6 with the randomized variant's figures: a sketch holds leading triplets only."""
    with pytest.warns(UserWarning, match="local_init bottom uses the exact one"):
        model, optimizer, _ = injected(96, 128, 4, svd="randomized", oversample=1, local_init="bottom")
    monkeypatch.setattr(torch, "svd_lowrank", lambda *a, **k: pytest.fail("a sketch"))
    stage(model, optimizer)
    merged = model[0].base.weight.detach() + product(model[0])
    glora.reinit(model, optimizer)
    rows, columns = model[0].lora_rows, model[0].lora_columns
    U, S, Vh = torch.linalg.svd(merged[columns][:, rows], full_matrices=False)
    torch.testing.assert_close(product(model[0])[columns][:, rows], U[:, -2:] * S[-2:] @ Vh[-2:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        injected(svd="randomized"), injected(local_init="bottom")


def test_a_reinit_leaves_the_new_factors_without_a_gradient_and_the_global_ones_with_theirs():
    model, optimizer = two_layers()
    model(torch.randn(3, 24).double()).square().sum().backward()
    glora.observe(model, 1, 1)
    kept = [(p, p.grad.clone()) for layer in model for p in (layer.lora_global_A, layer.lora_global_B)]
    glora.reinit(model, optimizer)
    assert all(torch.equal(p.grad, grad) for p, grad in kept)
    assert all(p.grad is None for layer in model for p in (layer.lora_local_A, layer.lora_local_B))


def test_merge_frees_each_copy_of_a_pretrained_weight_before_the_next_weight_is_computed(monkeypatch):
    model, _ = two_layers()
    copies, write = [weakref.ref(layer.pretrained) for layer in model], glora.GLoRALinear.write
    alive = []

    def spy(layer, A, B):
        alive.append([copy() is not None for copy in copies])
        return write(layer, A, B)

    monkeypatch.setattr(glora.GLoRALinear, "write", spy)
    glora.merge(model)
    assert alive == [[True, True], [False, True]]


@pytest.mark.parametrize("ratio, stages", [("3:1", 2), ("1:3", 1)])
def test_a_region_is_decomposed_before_it_is_rounded(ratio, stages):
    """
    Eqs. 12 - 14 on a bf16 base: L is made of the largest triplets of the unrounded region M, M Lᵀ = L Lᵀ and
    Mᵀ L = Lᵀ L with M's σ, to float32's rounding of sums of 128 terms, which is 2⁻¹⁶ of bfloat16's.
    """
    model, optimizer, W = injected(96, 128, 8, dtype=torch.bfloat16, ratio=ratio)
    layer = model[0]
    for _ in range(stages):
        stage(model, optimizer)
        A, B = (torch.cat(pair, dim).double() for dim, pair in enumerate(zip(
            (layer.lora_fixed_A, layer.lora_fixed_B), layer.local())))
        merged = W.double() + B @ A                                                     # Eq. 11
        glora.reinit(model, optimizer)
        L = (layer.lora_local_B.double() @ layer.lora_local_A.double()).detach()
        M = merged[layer.lora_columns][:, layer.lora_rows]
        k, sigma = len(layer.lora_local_A), torch.linalg.svdvals(M)
        bound = 128 * torch.finfo(torch.float32).eps * sigma[0].item()
        torch.testing.assert_close(torch.linalg.svdvals(L)[:k], sigma[:k], rtol=0, atol=bound)
        for X, Y in ((M, L), (M.T, L.T)):
            assert torch.linalg.matrix_norm((X - Y) @ Y.T, 2) < bound * sigma[0]


def test_dropout_never_reaches_the_frozen_weight_at_any_stage():
    model, optimizer, _ = injected(32, 24, 4, dropout=0.5)
    layer, kinds = model[0], set()
    for s in range(4):
        x = torch.randn(50, 24).double()
        torch.manual_seed(s)
        y = model(x)
        torch.manual_seed(s)
        torch.testing.assert_close(y, layer.base(x) + layer.dropout(x) @ layer.delta().T)
        assert not torch.equal(layer.dropout(x), x)
        kinds.add(layer.lora_local_A is None)
        stage(model, optimizer)
        glora.reinit(model, optimizer)
    assert kinds == {True, False}


# ---------------------------------------------------------------------- devices, dtypes, what is refused

def test_all_that_is_made_lies_on_the_device_of_the_weights():
    model = nn.Sequential(nn.Linear(40, 48).double()).to("meta")
    glora.inject(model, ("0",), 8)
    assert all(t.is_meta for t in (*model.state_dict().values(), *model[0].total(), model[0].delta()))


@pytest.mark.parametrize("side", "AB")
def test_a_step_in_which_one_side_alone_has_a_gradient_adds_nothing(side):
    model, optimizer, _ = injected(32, 48, 4)
    layer = model[0]
    model(torch.randn(6, 48).double()).square().sum().backward()
    glora.observe(model, 1, 2)
    before = [score.clone() for score in layer.scores]
    getattr(layer, f"lora_local_{side}").grad = None
    glora.observe(model, 2, 2)
    assert all(map(torch.equal, layer.scores, before))


def test_a_feature_without_a_gradient_scores_0_and_the_others_are_scored():
    """One input that is always 0 must not send the whole layer to the cut by magnitude, with its warning."""
    model, optimizer, _ = injected(32, 48, 4)
    layer, x = model[0], torch.randn(6, 48).double()
    x[:, 7] = 0
    model(x).square().sum().backward()
    glora.observe(model, 1, 1)
    best = [glora.most_important(score, dim).tolist() for dim, score in enumerate(layer.scores)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        glora.reinit(model, optimizer)
    assert [layer.lora_rows.tolist(), layer.lora_columns.tolist()] == best and 7 not in best[0]


def test_the_products_run_along_the_outputs_and_the_start_is_laid_out_by_rows():
    """As GraLoRA's: a CPU is slow where a thin factor lies along its rank."""
    model, kept = injected()[0], []
    A, B = glora.balanced(*glora.exact_svd(torch.randn(20, 24), torch.arange(3)))
    assert A.is_contiguous() and B.shape == (20, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(5, 24).double())
    B, = (t for t in kept if sorted(t.shape) == [4, 20])
    assert B.stride(B.shape.index(20)) == 1


def test_what_is_kept_of_the_pretrained_weight_is_a_copy_without_a_gradient():
    model, _, W = injected()
    kept = model[0].pretrained
    assert torch.equal(kept, W) and not kept.requires_grad and not kept.is_set_to(model[0].base.weight)
