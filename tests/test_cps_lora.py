"""What the CPS-LoRA paper says: its clustering in factored form, its stages, its examples."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import trainable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cps_lora as cps
import gralora


def agreement(found, truth):
    """Share of features whose cluster is the true one, under the best naming of the clusters (k = 2)."""
    same = (found == truth).double().mean().item()
    return max(same, 1 - same)


def low_rank(m, n, R, seed=0):
    torch.manual_seed(seed)
    return torch.randn(m, R).double(), torch.randn(n, R).double()


# ---------------------------------------------------------------------- App. E: cosine

@pytest.mark.parametrize("reference", ["longest", "mean", "first"])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_cosine_order_is_that_of_the_dense_rows(reference, absolute):
    P, Q = low_rank(40, 30, 5)
    rows = (P @ Q.T).numpy()
    norms = np.linalg.norm(rows, axis=1)
    ref = dict(longest=rows[norms.argmax()], mean=rows.mean(0), first=rows[0])[reference]
    cosine = rows @ ref / (norms * np.linalg.norm(ref))
    want = np.argsort(np.abs(cosine) if absolute else cosine)
    assert cps.cosine_order(P, Q, reference, absolute).tolist() == want.tolist()


def test_a_row_of_zeros_is_like_none():
    P, Q = low_rank(9, 5, 2)
    P[3] = 0
    P[1] = -P[0] / 2                                                        # one of the two is below
    rows = (P @ Q.T)[[0, 1, 2, 4, 5, 6, 7, 8]]
    below = (rows @ rows[rows.norm(dim=1).argmax()] < 0).sum().item()       # its cosine is 0: after these
    assert cps.cosine_order(P, Q).tolist().index(3) == below > 0


# ---------------------------------------------------------------------- Eqs. 2, 3: spectral

@pytest.mark.parametrize("m, n, R, d", [(40, 30, 5, 1), (30, 50, 4, 3), (9, 8, 8, 2)])
def test_the_spectral_embedding_is_that_of_the_dense_matrix(m, n, R, d):
    P, Q = low_rank(m, n, R)
    dense = (P @ Q.T).numpy()
    shifted = dense - dense.min()                                   # P of §3.3, the offset included
    S = shifted / np.sqrt(shifted.sum(1))[:, None] / np.sqrt(shifted.sum(0))[None]      # Eq. 2
    U, sigma, Vt = np.linalg.svd(S)                                 # Eq. 3
    assert sigma[0] == pytest.approx(1)
    assert abs(abs(U[:, 0] @ np.sqrt(shifted.sum(1) / shifted.sum())) - 1) < 1e-9
    u, v = (x.numpy() for x in cps.spectral_embedding(P, Q, d))
    assert u.shape == (m, d) and v.shape == (n, d)
    for c in range(d):
        sign = np.sign(u[:, c] @ U[:, c + 1])
        gap = min(sigma[c] - sigma[c + 1], sigma[c + 1] - sigma[c + 2])      # rounding turns by eps / gap
        np.testing.assert_allclose(sign * u[:, c], U[:, c + 1], rtol=0, atol=1e-12 / gap)
        np.testing.assert_allclose(sign * v[:, c], Vt[c + 1], rtol=0, atol=1e-12 / gap)


@pytest.mark.parametrize("place", [3, 1090])
def test_the_minimum_of_the_update_is_found_wherever_its_row_is(place):
    """Beyond the first 1024 rows, which are multiplied out at once, and among them."""
    P, Q = (factor.abs() for factor in low_rank(1100, 8, 3))
    P[place] *= -1
    dense = P @ Q.T
    assert dense.argmin() // 8 == place
    shifted = dense - dense.min()
    U, _, Vh = torch.linalg.svd(shifted / shifted.sum(1).sqrt()[:, None] / shifted.sum(0).sqrt(),
                                full_matrices=False)
    u, v = cps.spectral_embedding(P, Q, 1)
    torch.testing.assert_close(u @ v.T, U[:, 1:2] @ Vh[1:2])


@pytest.mark.parametrize("seed", range(8))
def test_a_row_or_column_that_is_the_minimum_throughout_moves_no_other(seed):
    """In fp32 its sum is 0 but for rounding, and its part of S is that, not what divides it by so little."""
    torch.manual_seed(seed)
    P, Q = torch.rand(12, 3) + 1, torch.rand(9, 3)
    P[4], P[:, 2] = torch.tensor([0.3, 0.7, 1.0]), 1
    Q[:, 2] = 1 - Q[:, :2] @ P[4, :2]                               # row 4 of P Qᵀ is 1, the others above it
    dense = P.double() @ Q.double().T
    shifted = dense - dense.min()
    S = shifted / shifted.sum(1).sqrt()[:, None] / shifted.sum(0).sqrt()
    S[4] = 0
    U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
    bound = 10 * torch.finfo(torch.float32).eps ** 0.5 / sigma[1]   # a row of 1/√eps enters the QR
    for u, v in (cps.spectral_embedding(P, Q, 1), cps.spectral_embedding(Q, P, 1)[::-1]):
        assert ((u @ v.T).double() - U[:, 1:2] @ Vh[1:2]).norm() < bound


# ---------------------------------------------------------------------- cutting, k-means

@pytest.mark.parametrize("m, k, sizes", [(8, 2, [4, 4]), (10, 3, [4, 3, 3]), (5, 5, [1] * 5), (7, 1, [7]),
                                         (11, 4, [3, 3, 3, 2])])
def test_a_balanced_cut_follows_the_order_in_equal_parts(m, k, sizes):
    torch.manual_seed(0)
    order = torch.randperm(m)
    clusters = cps.balanced_cut(order, k)
    assert clusters.bincount(minlength=k).tolist() == sizes
    assert clusters[order].tolist() == sorted(clusters.tolist())


def test_kmeans_finds_separate_groups_and_a_lloyd_fixed_point():
    torch.manual_seed(0)
    truth = torch.arange(60) % 3
    X = torch.randn(60, 2).double() * 0.01 + torch.tensor([[0.0, 0], [5, 0], [0, 5]]).double()[truth]
    found = cps.kmeans(X, 3)
    assert all(len(found[truth == c].unique()) == 1 for c in range(3)) and len(found.unique()) == 3
    for seed in range(3):           # also where the groups are not separate, and seeds are not enough
        torch.manual_seed(seed)
        X = torch.randn(60, 2).double()
        found = cps.kmeans(X, 3)
        centers = torch.stack([X[found == j].mean(0) for j in range(3)])
        assert torch.equal(torch.cdist(X, centers).argmin(1), found)


def inertia(X, clusters):
    return sum((X[clusters == j] - X[clusters == j].mean(0)).square().sum() for j in clusters.unique())


def test_kmeans_is_the_best_of_ten_runs():
    for seed in range(4):
        torch.manual_seed(seed)
        X = torch.rand(40, 2).double()
        drawn = torch.get_rng_state()
        runs = [cps.lloyd(X, 8) for _ in range(10)]
        for value, clusters in runs:
            torch.testing.assert_close(value, inertia(X, clusters))
        values = [value.item() for value, _ in runs]
        assert max(values) > 1.01 * min(values)
        torch.set_rng_state(drawn)
        assert inertia(X, cps.kmeans(X, 8)).item() == pytest.approx(min(values))


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_leaves_no_cluster_empty(seed):
    torch.manual_seed(seed)
    X = torch.zeros(12, 1).double()
    X[0] = 1                                    # two distinct points, four clusters
    assert cps.kmeans(X, 4).bincount(minlength=4).min() >= 1
    assert cps.kmeans(torch.randn(4, 2).double(), 4).unique().numel() == 4      # one-row clusters


# ---------------------------------------------------------------------- what the strategies find

def checkerboard(n=64, seed=0):
    """Blocks of different mean plus noise, rank 4 in all, rows and columns shuffled; and the truth."""
    torch.manual_seed(seed)
    rows, columns = (torch.arange(n) % 2)[torch.randperm(n)], (torch.arange(n) % 2)[torch.randperm(n)]
    means = torch.tensor([[2.0, 0.5], [0.3, 1.5]]).double()
    left, right = torch.eye(2).double()[rows] @ means, torch.eye(2).double()[columns]
    noise = 0.1 * torch.randn(n, 2).double(), torch.randn(n, 2).double()
    return torch.cat((left, noise[0]), 1), torch.cat((right, noise[1]), 1), rows, columns


@pytest.mark.parametrize("strategy", ["cosine", "spectral", "spectral-balance1", "spectral-balance2",
                                      "abs-cosine"])
def test_a_planted_checkerboard_of_block_means_is_recovered(strategy):
    for seed in range(3):
        P, Q, rows, columns = checkerboard(seed=seed)
        found = cps.cluster(P, Q, 2, strategy)
        assert agreement(found[0], rows) == agreement(found[1], columns) == 1.0


def test_random_does_not_recover_it():
    P, Q, rows, _ = checkerboard()
    torch.manual_seed(0)
    assert np.mean([agreement(cps.cluster(P, Q, 2, "random")[0], rows) for _ in range(20)]) < 0.65


def orthogonal_blocks(n=64, r=4, seed=0):
    """Proposition 2's update, four blocks of rank r in mutually orthogonal subspaces: dense, its A_i, B_i."""
    torch.manual_seed(seed)
    A = torch.linalg.qr(torch.randn(n // 2, 4 * r).double())[0].split(r, 1)
    B = torch.linalg.qr(torch.randn(n // 2, 4 * r).double())[0].split(r, 1)
    dense = torch.cat([torch.cat([A[0] @ B[0].T, A[2] @ B[2].T], 1),
                       torch.cat([A[1] @ B[1].T, A[3] @ B[3].T], 1)])
    return dense, A, B


def test_zero_mean_orthogonal_blocks_are_found_by_abs_cosine_alone():
    """
    Rank-1 blocks: two rows of one block row are parallel or opposite, of different ones orthogonal (Prop.
    2's form).
    """
    scores = {strategy: [] for strategy in cps.STRATEGIES if strategy != "none"}
    for seed in range(8):
        torch.manual_seed(seed)
        n = 64
        A = torch.linalg.qr(torch.randn(n // 2, 4).double())[0]
        B = torch.linalg.qr(torch.randn(n // 2, 4).double())[0]
        zero = torch.zeros(n // 2).double()
        P = torch.stack([torch.cat((A[:, 0], zero)), torch.cat((zero, A[:, 1]))] * 2, 1)
        Q = torch.stack([torch.cat((B[:, 0], zero)), torch.cat((B[:, 1], zero)),
                         torch.cat((zero, B[:, 2])), torch.cat((zero, B[:, 3]))], 1)
        shuffle = torch.randperm(n)
        truth = (torch.arange(n) >= n // 2).long()[shuffle]
        for strategy, found in scores.items():
            found.append(agreement(cps.cluster(P[shuffle], Q, 2, strategy)[0], truth))
    assert np.mean(scores["abs-cosine"]) == 1.0
    assert all(np.mean(found) < 0.85 for name, found in scores.items() if name != "abs-cosine"), scores


def test_skewed_clusters_fall_back_to_a_balanced_cut():
    P, Q, _, _ = checkerboard()
    few = (torch.arange(64) < 4).long()                         # 60 rows alike, 4 others
    P[:, :2] = torch.tensor([[2.0, 0.5], [0.3, 1.5]]).double()[few]
    skewed = cps.cluster(P, Q, 2, "spectral")[0].bincount(minlength=2)
    assert skewed.min() < 16
    by_vector, by_cosine = cps.spectral_embedding(P, Q, 1)[0][:, 0].argsort(), cps.cosine_order(P, Q)
    for strategy, order in (("spectral-balance1", by_vector), ("spectral-balance2", by_cosine)):       # Eq. 4
        assert agreement(cps.cluster(P, Q, 2, strategy)[0], cps.balanced_cut(order, 2)) == 1.0


def test_a_stage_without_an_update_falls_back_to_a_random_partition_and_says_so():
    for strategy in cps.STRATEGIES[:4]:
        with pytest.warns(UserWarning, match="left no update: the next clusters are random"):
            rows, columns = cps.cluster(torch.zeros(10, 4), torch.randn(12, 4), 2, strategy)
        assert rows.bincount().tolist() == [5, 5] and columns.bincount().tolist() == [6, 6]
    model = nn.Sequential(nn.Linear(12, 10))
    cps.inject(model, ("0",), 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.warns(UserWarning, match="left no update"):
        cps.reinit(model, optimizer)
    assert model(torch.randn(3, 12)).isfinite().all()


# ---------------------------------------------------------------------- the layer: Eqs. 5 - 11

def layer(k=2, rank=6, rows=None, columns=None, i=14, o=10):
    torch.manual_seed(0)
    ours = cps.CPSLinear(nn.Linear(i, o), rank, 0.0, k, "cosine", "longest").double()
    nn.init.normal_(ours.lora_B)
    if rows is not None:
        ours.lora_rows.copy_(torch.tensor(rows))
        ours.lora_columns.copy_(torch.tensor(columns))
    return ours


UNEQUAL = dict(rows=[0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1],         # 3 + 11
               columns=[1, 0, 0, 0, 0, 0, 0, 0, 0, 0])                  # 9 + 1


@pytest.mark.parametrize("sizes", [{}, UNEQUAL])
def test_eq_8_by_loops_with_the_permutations_as_printed(sizes):
    """x' = x[:, π_r], y'_j = Σ_i x'[I_i] (G_l + A_l B_l), y = y'[:, π_c⁻¹]; App. D: unequal clusters."""
    ours, x, k, p = layer(**sizes), torch.randn(5, 14).double(), 2, 3
    W = ours.base.weight.T                                                      # the paper's W (m in, n out)
    pi_r, pi_c = ours.lora_rows.argsort(stable=True), ours.lora_columns.argsort(stable=True)
    I = ours.lora_rows[pi_r]
    J = ours.lora_columns[pi_c]
    W_, x_ = W[pi_r][:, pi_c], x[:, pi_r]                                       # Eqs. 5, 7
    y_ = torch.zeros(5, 10).double()
    for j in range(k):
        for i in range(k):
            G = W_[I == i][:, J == j]                                           # Eq. 6
            A_l = ours.lora_A[j * p:(j + 1) * p][:, pi_r][:, I == i].T          # (|I_i|, r')
            B_l = ours.lora_B[pi_c][J == j][:, i * p:(i + 1) * p].T             # (r', |J_j|)
            y_[:, J == j] += x_[:, I == i] @ (G + A_l @ B_l)                    # Eq. 8
    y = y_[:, pi_c.argsort()] + ours.base.bias                                  # Eq. 9
    torch.testing.assert_close(ours(x), y)
    eye = torch.eye(14).double()
    torch.testing.assert_close(ours.delta().T, torch.linalg.lstsq(eye, ours(eye) - ours.base(eye)).solution)


def test_contiguous_clusters_are_gralora():
    """The two files differ in where the blocks are: with contiguous clusters and α = r they are one."""
    ours = layer(k=2, rank=6, i=16, o=12)
    ours.lora_rows.copy_(gralora.contiguous(16, 2))
    ours.lora_columns.copy_(gralora.contiguous(12, 2))
    theirs = gralora.GraLoRALinear(ours.base, 6, 6, 0.0, 2, 0).double()
    with torch.no_grad():
        theirs.lora_A.copy_(ours.lora_A)
        theirs.lora_B.copy_(ours.lora_B)
    x = torch.randn(4, 16).double()
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_first_partition_is_random_and_balanced():
    torch.manual_seed(0)
    a, b = (cps.CPSLinear(nn.Linear(40, 30), 4, 0.0, 2, "cosine", "longest") for _ in range(2))
    for one in (a, b):
        assert one.lora_rows.bincount().tolist() == [20, 20]
        assert one.lora_columns.bincount().tolist() == [15, 15]
    assert not torch.equal(a.lora_rows, b.lora_rows)


def test_a_is_kaiming_uniform_with_its_clusters_size_as_fan_in_and_b_zero():
    ours = cps.CPSLinear(nn.Linear(2000, 40), 20, 0.0, 2, "cosine", "longest")
    ours.start((torch.arange(2000) >= 400).long(), ours.lora_columns)
    for part, size in ((ours.lora_A[:, :400], 400), (ours.lora_A[:, 400:], 1600)):
        bound = 1 / math.sqrt(size)
        assert 0.99 * bound < part.abs().max() <= bound
        assert abs(part.std() * math.sqrt(3) / bound - 1) < 6 / math.sqrt(5 * part.numel())      # six sigma
    assert not ours.lora_B.any()


def test_the_parameter_count_is_loras_whatever_k():
    assert {trainable("cps_lora", "LLaMA3-8B", "attention", 8, k=k) for k in (1, 2, 4)} == {6_815_744}


@pytest.mark.parametrize("own, message", [
    (dict(k=4), "k 4 for 0, expected a divisor of rank 6"), (dict(k=0), "k 0 for 0"),
    (dict(k=21), "k 21 for 0, expected a divisor of rank 6"),       # above min(in, out), hence above the rank
    (dict(strategy="x"), "strategy 'x', expected one of cosine"),
    (dict(reference="x"), "reference 'x', expected one of longest")])
def test_bad_settings(own, message):
    with pytest.raises(ValueError, match=message):
        cps.inject(nn.Sequential(nn.Linear(20, 24)), ("0",), 6, **own)
    with pytest.raises(ValueError, match="no alpha"):
        cps.inject(nn.Sequential(nn.Linear(20, 24)), ("0",), 6, alpha=12)


# ---------------------------------------------------------------------- stages: Alg. 1

def trained(strategy="cosine", stages=1, reference="longest"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20).double())
    W = model[0].weight.detach().clone()
    cps.inject(model, ("0",), 4, strategy=strategy, reference=reference)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(stages):
        model(torch.randn(6, 24, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        nn.init.normal_(model[0].lora_B, 0, 0.1)
    return model, optimizer, W


def test_a_reinit_merges_clusters_and_starts_anew():
    model, optimizer, W = trained()
    layer = model[0]
    delta, A, rows = layer.delta().detach(), layer.lora_A.detach().clone(), layer.lora_rows.clone()
    group = [id(p) for p in optimizer.param_groups[0]["params"]]
    want = cps.cluster(*(f.detach() for f in (layer.expanded()[0].T, layer.expanded()[1])), 2, "cosine")
    cps.reinit(model, optimizer)
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, W + delta, layer.base.bias))      # lines 4, 6
    assert torch.equal(layer.base.weight, W)
    assert torch.equal(layer.lora_rows, want[0]) and torch.equal(layer.lora_columns, want[1])       # line 5
    assert not torch.equal(layer.lora_rows, rows)
    assert not torch.equal(layer.lora_A, A) and not layer.lora_B.any()          # line 8
    assert not optimizer.state and [id(p) for p in optimizer.param_groups[0]["params"]] == group


def test_the_reference_reaches_the_clustering():
    found = {}
    for reference in ("longest", "mean", "first"):
        model, optimizer, _ = trained(reference=reference)
        A, B = (f.detach() for f in model[0].expanded())
        want = torch.cat(cps.cluster(A.T, B, 2, "cosine", reference))
        cps.reinit(model, optimizer)
        found[reference] = torch.cat((model[0].lora_rows, model[0].lora_columns))
        assert torch.equal(found[reference], want)
    assert not torch.equal(found["mean"], found["longest"]) and not torch.equal(found["mean"], found["first"])


class Products(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_only_stages_that_have_ended_cost_products_of_their_own():
    """x Wᵀ, the live x Aᵀ and its B, however many stages there were; of those that ended two together."""
    model, optimizer, _ = trained()
    for want in (3, 5, 5):
        nn.init.normal_(model[0].lora_B)
        with Products() as products:
            products.count = 0
            model(torch.randn(3, 24).double())
        assert products.count == want
        cps.reinit(model, optimizer)


def test_the_expanded_b_is_laid_out_along_the_outputs():
    assert layer(**UNEQUAL).expanded()[1].T.is_contiguous()


def test_a_failed_clustering_leaves_the_stage_as_it_was(monkeypatch):
    model, optimizer, W = trained()
    monkeypatch.setattr(cps, "cluster", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cps.reinit(model, optimizer)
    assert torch.equal(model[0].base.weight, W) and not len(model[0].lora_merged_A)


def test_stages_of_another_model_are_refused():
    model, optimizer, _ = trained()
    cps.reinit(model, optimizer)
    tensors = dict(model.state_dict())
    for change in ({"0.lora_merged_A": tensors["0.lora_merged_A"][:, :5]}, {"0.lora_merged_B": None},
                   {"0.lora_merged_B": tensors["0.lora_merged_B"][:, :3]}):
        fresh, _, _ = trained()
        with pytest.raises(ValueError, match="tensors 0.lora_merged_A and _B are missing or not for 20 x 24"):
            cps.restore(fresh, tensors | change)


def test_only_the_stage_that_ended_is_clustered():
    model, optimizer, _ = trained()
    cps.reinit(model, optimizer)
    nn.init.normal_(model[0].lora_B, 0, 0.01)       # so little that the sum's clusters are the first stage's
    A, B = (f.detach() for f in model[0].expanded())
    want = cps.cluster(A.T, B, 2, "cosine")
    cps.reinit(model, optimizer)
    assert torch.equal(model[0].lora_rows, want[0]) and torch.equal(model[0].lora_columns, want[1])


def test_strategy_none_keeps_the_partition_and_still_merges():
    model, optimizer, W = trained("none")
    rows, delta = model[0].lora_rows.clone(), model[0].delta().detach()
    cps.reinit(model, optimizer)
    assert torch.equal(model[0].lora_rows, rows)
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, W + delta, model[0].base.bias))


@pytest.mark.parametrize("strategy", cps.STRATEGIES)
def test_every_strategy_leaves_the_function_and_partitions_everything(strategy):
    model, optimizer, _ = trained(strategy)
    x = torch.randn(3, 24, dtype=torch.float64)
    for _ in range(3):
        nn.init.normal_(model[0].lora_B)
        y = model(x)
        cps.reinit(model, optimizer)
        torch.testing.assert_close(model(x), y)
        assert model[0].lora_rows.unique().tolist() == model[0].lora_columns.unique().tolist() == [0, 1]


# ---------------------------------------------------------------------- §3.2, App. A - D

def rank(M):
    return torch.linalg.matrix_rank(M).item()


def test_propositions_1_and_2_the_same_parameters_reach_twice_the_rank():
    n, r = 64, 4
    dense, A, B = orthogonal_blocks(n, r)
    assert rank(dense) == 4 * r                                                 # Prop. 2
    local = sum(a.numel() + b.numel() for a, b in zip(A, B))
    torch.manual_seed(0)
    left, right = torch.randn(n, 2 * r).double(), torch.randn(2 * r, n).double()
    assert local == left.numel() + right.numel() == 4 * n * r
    assert rank(left @ right) == 2 * r                                          # Prop. 1, Comment 1


def test_our_layer_reaches_proposition_2s_rank():
    assert rank(layer(k=2, rank=4, i=40, o=48).delta()) == 8            # 2 r, where LoRA of equal size has r


@pytest.mark.parametrize("shared, lost",
                         [("A1 A3", True), ("B1 B2", True), ("A1 A2", False), ("B1 B3", False)])
def test_appendix_c_what_side_by_side_or_stacked_blocks_share_is_lost(shared, lost):
    """
    [[A1 B1, A3 B3], [A2 B2, A4 B4]]: A1, A3 lie side by side, B1, B2 stand on each other; A1, A2 share
    nothing there.
    """
    n, r, s = 64, 4, 2
    _, A, B = orthogonal_blocks(n, r)
    blocks = {f"{name}{j + 1}": list_[j].clone() for name, list_ in (("A", A), ("B", B)) for j in range(4)}
    one, other = shared.split()
    blocks[other][:, :s] = blocks[one][:, :s]
    product = lambda j: blocks[f"A{j}"] @ blocks[f"B{j}"].T
    dense = torch.cat([torch.cat([product(1), product(3)], 1), torch.cat([product(2), product(4)], 1)])
    assert rank(dense) == 4 * r - s * lost


def test_appendix_d_ranks_add_up_for_blocks_of_any_size():
    torch.manual_seed(0)
    sizes_m, sizes_n, ranks = (10, 22), (12, 16), ((1, 4), (2, 3))
    dense = torch.cat([torch.cat([torch.randn(m, ranks[a][b]).double() @ torch.randn(ranks[a][b], n).double()
                                  for b, n in enumerate(sizes_n)], 1) for a, m in enumerate(sizes_m)])
    assert rank(dense) == 1 + 4 + 2 + 3
    ours = layer(k=2, rank=4, **UNEQUAL).delta()        # ours: 3 + 11 rows, 9 + 1 columns, blocks of rank 2
    assert rank(ours) == 2 + 2 + 1          # the two blocks of the one-column cluster share its one dimension


def test_figure_6_half_the_parameters_for_the_same_error():
    """Four orthogonal blocks of rank r: locally 4 n r parameters, globally 8 n r, for error 0."""
    n, r = 256, 16
    dense, A, B = orthogonal_blocks(n, r)
    error = lambda X: (dense - X).norm().item() / dense.norm().item()
    half = n // 2
    local = torch.zeros(n, n).double()
    for a in (0, half):
        for b in (0, half):
            U, S, Vh = torch.linalg.svd(dense[a:a + half, b:b + half])
            local[a:a + half, b:b + half] = U[:, :r] * S[:r] @ Vh[:r]
    U, S, Vh = torch.linalg.svd(dense)
    globally = lambda R: U[:, :R] * S[:R] @ Vh[:R]
    budget = 4 * n * r
    assert error(local) < 1e-9 and 4 * r * (half + half) == budget
    assert error(globally(budget // (2 * n))) > 0.6 and error(globally(4 * r)) < 1e-9       # twice the budget


# ---------------------------------------------------------------------- stages beside W

def test_a_reinit_of_a_bf16_model_leaves_every_bit_of_w_and_rounds_the_activations_alone():
    """Every product and sum is rounded by u of its size at most: before and after, against float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20)).to(torch.bfloat16)
    W = model[0].weight.detach().clone()
    cps.inject(model, ("0",), 4)
    layer, x, u = model[0], torch.randn(7, 24, dtype=torch.bfloat16), 2**-8
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        nn.init.normal_(layer.lora_B, 0, 0.1)
        (A, B), bias = (f.detach().double() for f in layer.total()), layer.base.bias.double()
        exact = F.linear(x.double(), W.double() + B @ A, bias)
        size = F.linear(x.double().abs(), W.double().abs() + B.abs() @ A.abs(), bias.abs())
        before = model(x)
        cps.reinit(model, optimizer)
        assert torch.equal(layer.base.weight, W)
        for y in (before, model(x)):                    # A, B, x Aᵀ, h Bᵀ, the sum; and W x, its bias
            assert y.dtype == torch.bfloat16 and ((y.double() - exact).abs() < 6 * u * size).all()
        assert ((layer.delta().double() - B @ A).abs() <= 1e-5 * (B.abs() @ A.abs())).all()         # in fp32


def test_a_reinit_and_a_reload_need_no_weight():
    """It may be sharded or on the meta device; no copy of it is held either."""
    model, optimizer, W = trained()
    model[0].base.weight = nn.Parameter(W.to("meta"), requires_grad=False)
    delta = model[0].delta().detach()
    cps.reinit(model, optimizer)
    torch.testing.assert_close(model[0].delta(), delta)
    fresh, _, _ = trained()
    fresh[0].base.weight = model[0].base.weight
    tensors = dict(model.state_dict())
    cps.restore(fresh, tensors)
    del tensors["0.base.weight"]
    fresh.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(fresh[0].delta(), delta)
    assert not any(torch.is_tensor(t) for t in vars(fresh[0]).values())


def test_a_reinit_moves_every_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 24), nn.Linear(24, 20)).double()
    cps.inject(model, ("0", "1", "2"), 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for layer in model:
        nn.init.normal_(layer.lora_B, 0, 0.1)
    A, rows = [layer.lora_A.detach().clone() for layer in model], [layer.lora_rows.clone() for layer in model]
    model(torch.randn(6, 24).double()).square().sum().backward()
    optimizer.step()
    cps.reinit(model, optimizer)
    for layer, A_, rows_ in zip(model, A, rows, strict=True):
        assert len(layer.lora_merged_A) == 8 and not layer.lora_B.any() and layer.lora_merged_B.any()
        assert not torch.equal(layer.lora_A, A_) and not torch.equal(layer.lora_rows, rows_)
    assert not optimizer.state


def test_a_reinit_drops_the_gradients_of_the_factors_that_ended():
    model, optimizer, _ = trained()
    assert all(p.grad is not None for p in (model[0].lora_A, model[0].lora_B))
    cps.reinit(model, optimizer)
    assert all(p.grad is None for p in (model[0].lora_A, model[0].lora_B))


def test_dropout_spares_what_the_base_sees_and_the_stages_that_are_part_of_w_t():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(14, 10)).double()
    cps.inject(model, ("0",), 6, dropout=0.5)
    ours, optimizer = model[0], torch.optim.SGD(model.parameters(), 0)
    x, before = torch.randn(5, 14).double(), torch.zeros(10, 14).double()
    for _ in range(3):
        nn.init.normal_(ours.lora_B)
        torch.manual_seed(1)
        y = ours(x)
        torch.manual_seed(1)
        live = F.linear(F.dropout(x, 0.5), ours.delta() - before)
        torch.testing.assert_close(y, ours.base(x) + F.linear(x, before) + live)
        before = ours.delta().detach()
        cps.reinit(model, optimizer)


# ---------------------------------------------------------------------- the strategies' lines

@pytest.mark.parametrize("k, d", [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
def test_the_embedding_has_log2_k_dimensions_rounded_up(k, d, monkeypatch):
    asked, embedding = [], cps.spectral_embedding
    monkeypatch.setattr(cps, "spectral_embedding", lambda P, Q, d: asked.append(d) or embedding(P, Q, d))
    P, Q = low_rank(20, 18, 6)
    found = cps.cluster(P, Q, k, "spectral")
    assert asked == [d] and [len(c.unique()) for c in found] == [k, k]


@pytest.mark.parametrize("m, few, skewed", [(64, 15, True), (64, 16, False), (66, 16, True), (66, 17, False)])
def test_a_cluster_is_skewed_under_half_of_the_equal_share_and_not_at_it(m, few, skewed):
    torch.manual_seed(0)
    rows, columns = (torch.arange(m) < few).long(), torch.arange(64) % 2
    means, noise = torch.tensor([[2.0, 0.5], [0.3, 1.5]]).double(), 0.1 * torch.randn(m, 2).double()
    P = torch.cat((means[rows], noise), 1)
    Q = torch.cat((torch.eye(2).double()[columns], torch.randn(64, 2).double()), 1)
    assert sorted(cps.cluster(P, Q, 2, "spectral")[0].bincount().tolist()) == [few, m - few]
    for strategy in ("spectral-balance1", "spectral-balance2"):
        found = cps.cluster(P, Q, 2, strategy)[0].bincount().tolist()
        assert sorted(found) == ([m // 2] * 2 if skewed else [few, m - few])


@pytest.mark.parametrize("strategy", sorted(set(cps.STRATEGIES) - {"none"}))
@pytest.mark.parametrize("m, n", [(2100, 2300), (2300, 2100)])
def test_clustering_forms_nothing_of_half_the_weights_size(strategy, m, n):
    """The largest are the 1024 rows of ΔW in which the minimum is sought: of 4096, a quarter."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            out = call(*args, **kwargs or {})
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    torch.manual_seed(0)
    P, Q = torch.randn(m, 8), torch.randn(n, 8)
    with Sizes():
        cps.cluster(P, Q, 2, strategy)
    assert m <= max(sizes) < m * n / 2


def test_random_clusters_are_scattered_and_new_ones_every_time():
    """Neighbours share a cluster as often as chance has it: 0.5 ± 0.016, and so do two draws."""
    torch.manual_seed(0)
    P, Q = torch.ones(1000, 1), torch.ones(1200, 1)
    (rows, columns), (others, _) = (cps.cluster(P, Q, 2, "random") for _ in range(2))
    pairs = (rows[1:], rows[:-1]), (columns[1:], columns[:-1]), (rows, others), (rows, columns[:1000])
    for one, other in pairs:
        assert 0.4 < (one == other).double().mean() < 0.6


# ---------------------------------------------------------------------- devices, dtypes, what is refused

def test_all_that_is_made_lies_on_the_device_of_the_weights():
    model = nn.Sequential(nn.Linear(24, 20)).to("meta")
    cps.inject(model, ("0",), 4)
    assert all(t.is_meta for t in (*model.state_dict().values(), *model[0].total(), model[0].delta()))
