"""experiments/diagnostics.py against numpy, scipy and plain loops; experiments/analyze.py on tiny runs."""
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import checkpoint
import train

sys.path.insert(0, str(ROOT / "experiments"))
import analyze
import diagnostics as d


def matrix(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64)


def values(M):
    return torch.linalg.svdvals(M)


def low_rank(out, into, r, seed=0):
    return matrix(out, r, seed=seed) @ matrix(r, into, seed=seed + 1)


# ---- nulls

def test_a_shuffled_matrix_has_the_same_entries_elsewhere():
    M = matrix(7, 5)
    N = d.shuffled(M)
    assert N.shape == M.shape and not torch.equal(N, M)
    assert torch.equal(N.flatten().sort()[0], M.flatten().sort()[0])


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_random_matrix_of_the_same_spectrum_has_other_vectors(shape):
    M = low_rank(*shape, 3)
    N = d.same_spectrum(M)
    np.testing.assert_allclose(np.linalg.svd(N.numpy())[1], np.linalg.svd(M.numpy())[1], atol=1e-12)
    assert (N - M).norm() > 0.1 * M.norm()


def test_its_vectors_favour_no_sign():
    """LAPACK's Q of two Gaussian columns is always a reflection: U Vᵀ would always be a rotation."""
    torch.manual_seed(0)
    found = [d.same_spectrum(torch.eye(2, dtype=torch.float64)) for _ in range(400)]
    assert 120 < sum(torch.linalg.det(N) > 0 for N in found) < 280
    assert abs(sum(N[0, 0].sign() for N in found)) < 80


# ---- spectra and ranks

def test_effective_ranks_are_exp_of_the_entropies_of_either_paper():
    scipy = pytest.importorskip("scipy.stats")
    s = values(matrix(9, 6))
    assert d.eber_glora(s) == pytest.approx(math.exp(scipy.entropy(s.numpy() ** 2)))     # App. F: p ∝ σ²
    assert d.eber_cps(s) == pytest.approx(math.exp(scipy.entropy(s.numpy())))            # App. I: p ∝ σ
    assert d.eber_glora(s) < d.eber_cps(s)


def test_an_effective_rank_is_that_of_equal_values_and_zeros_count_for_nothing():
    s = torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    assert d.eber_glora(s) == pytest.approx(3) and d.eber_cps(s) == pytest.approx(3)


@pytest.mark.parametrize("r", [1, 3, 8])
def test_algebraic_rank_is_numpys_of_the_float32_matrix(r):
    M = low_rank(12, 9, r).float()
    assert d.algebraic_rank(values(M.double()), M.shape) == np.linalg.matrix_rank(M.numpy()) == r
    wide = torch.zeros(12, 100)
    wide[0, 0], wide[1, 1] = 1, 5e-6
    assert d.algebraic_rank(values(wide.double()), wide.shape) == np.linalg.matrix_rank(wide.numpy()) == 1


def test_gralora_has_k_times_loras_rank():
    """GraLoRA Table 4: r, 2 r, 4 r; the null of the entries is of full rank."""
    import gralora
    for k, expected in ((1, 4), (2, 8), (4, 16)):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(32, 24).double())
        gralora.inject(layer, ["0"], 4, k=k)
        torch.nn.init.normal_(layer[0].lora_B)
        M = layer[0].delta().detach()
        assert d.algebraic_rank(values(M), M.shape) == expected
        N = d.shuffled(M)
        assert d.algebraic_rank(values(N), N.shape) == 24


def test_a_spectrum_is_the_mean_of_shares_and_short_ones_end_in_zeros():
    a, b = torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    found = d.spectrum([a, b])
    p = np.array([[0.75, 0.25, 0], [0.5, 0.25, 0.25]])
    np.testing.assert_allclose(found["mean"], p.mean(0))
    np.testing.assert_allclose(found["deviation"], p.std(0))


# ---- angles and blocks

def test_principal_angles_are_scipys():
    scipy = pytest.importorskip("scipy.linalg")
    P, Q = torch.linalg.qr(matrix(10, 3))[0], torch.linalg.qr(matrix(10, 4, seed=1))[0]
    expected = np.rad2deg(scipy.subspace_angles(P.numpy(), Q.numpy()))
    np.testing.assert_allclose(d.principal_angles(P, Q).numpy(), expected, atol=1e-6)


def test_the_angle_of_blocks_is_the_larger_of_left_and_right_and_the_mean_over_pairs():
    """CPS-LoRA App. L, pair by pair with scipy."""
    scipy = pytest.importorskip("scipy.linalg")
    M = matrix(8, 12)
    rows, columns = torch.tensor([0, 1] * 4), torch.tensor([1, 0, 0, 1, 1, 0] * 2)
    blocks = [M.numpy()[rows.numpy() == i][:, columns.numpy() == j] for i in (0, 1) for j in (0, 1)]
    tops = [(U[:, :2], Vh[:2].T) for U, _, Vh in map(np.linalg.svd, blocks)]
    pairs = [max(scipy.subspace_angles(x, y).mean() for x, y in zip(a, b))
             for a, b in itertools.combinations(tops, 2)]
    assert d.block_angle(M, rows, columns, 2) == pytest.approx(np.rad2deg(np.mean(pairs)))


def test_blocks_of_orthogonal_subspaces_are_at_ninety_degrees_and_alike_ones_at_none():
    half = torch.tensor([0] * 8 + [1] * 8)
    left, right = (torch.linalg.qr(matrix(8, 8, seed=s))[0] for s in (0, 1))
    block = lambda n: left[:, 2 * n:2 * n + 2] @ right[:, 2 * n:2 * n + 2].T     # four, of rank 2 (Prop. 2)
    apart = torch.cat([torch.cat([block(0), block(1)], 1), torch.cat([block(2), block(3)], 1)])
    assert d.block_angle(apart, half, half, 2) == pytest.approx(90)
    assert d.block_angle(apart, half, half, 8) == pytest.approx(90)      # no more vectors than the rank has
    assert d.block_angle(block(0).repeat(2, 2), half, half, 2) == pytest.approx(0, abs=1e-5)
    # Its nulls are at the angle of random subspaces, which is not small: what 80 degrees are worth.
    assert 40 < d.block_angle(d.same_spectrum(apart), half, half, 2) < 85


def test_blocks_that_share_only_the_row_space_are_as_far_apart_as_their_columns_are():
    """As LoRA's stacked blocks: one right space, two left ones."""
    rows, columns = torch.tensor([0] * 6 + [1] * 6), torch.zeros(5, dtype=torch.long)
    Q, V = torch.linalg.qr(matrix(6, 4))[0], torch.linalg.qr(matrix(5, 2))[0]
    M = torch.cat([Q[:, :2] @ V.T, Q[:, 2:] @ V.T])
    assert d.block_angle(M, rows, columns, 2) == pytest.approx(90)


def test_a_side_of_unequal_sizes_is_left_out_and_a_block_of_zeros():
    rows, columns = torch.tensor([0, 0, 0, 1, 1]), torch.zeros(6, dtype=torch.long)
    M = matrix(5, 6)
    V = [torch.linalg.svd(part)[2][:2].T for part in (M[:3], M[3:])]
    expected = d.principal_angles(*V).mean().item()
    assert d.block_angle(M, rows, columns, 2) == pytest.approx(expected)
    assert d.block_angle(torch.cat([M, torch.zeros(2, 6)]), torch.cat([rows, torch.tensor([2, 2])]),
                         columns, 2) == pytest.approx(expected)
    assert math.isnan(d.block_angle(M, torch.zeros(5, dtype=torch.long), columns, 2))     # one block


def test_contrast_is_the_share_of_variance_between_blocks():
    M, rows, columns = matrix(6, 9), torch.tensor([0, 1, 0, 1, 1, 1]), torch.tensor([0, 1, 2] * 3)
    size = np.abs(M.numpy())
    means = np.empty_like(size)
    for i, j in itertools.product(range(2), range(3)):
        block = np.ix_(rows.numpy() == i, columns.numpy() == j)
        means[block] = size[block].mean()
    assert d.contrast(M, rows, columns) == pytest.approx(means.var() / size.var())
    assert d.contrast(torch.from_numpy(means), rows, columns) == pytest.approx(1)


def test_bi_clustering_finds_planted_blocks_and_some_in_noise():
    """Shuffled entries have no blocks, and still more contrast after sorting than before."""
    torch.manual_seed(0)
    rows, columns = torch.randperm(32) % 2, torch.randperm(40) % 2
    planted = (rows[:, None] == columns).double() * 2 + 0.1 * matrix(32, 40)
    plain = [torch.arange(n) * 2 // n for n in planted.shape]
    found = d.bicluster(planted, 2)
    assert all((c == t).all() or (c != t).all() for c, t in zip(found, (rows, columns)))
    assert d.contrast(planted, *plain) < 0.2 and d.contrast(planted, *found) > 0.9
    noise = [d.shuffled(planted) for _ in range(20)]
    before = sum(d.contrast(N, *plain) for N in noise) / 20
    after = sum(d.contrast(N, *d.bicluster(N, 2)) for N in noise) / 20
    assert 3 * before < after < 0.2


# ---- budgeted errors (GFA Def. 3.1, Prop. 3.2)

SHAPES = [(6, 4), (6, 4), (4, 3), (8, 5)]       # p + q: 10 twice, 7, 13
BUDGETS = [0, 6, 7, 10, 17, 20, 27, 30, 44, 60, 1000]


def tail(M, r):
    return (np.linalg.svd(M, compute_uv=False)[r:] ** 2).sum()


def test_gfas_error_is_the_tail_of_the_folded_vector():
    deltas = [matrix(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    vec = np.concatenate([M.numpy().ravel() for M in deltas])       # 100 entries: 10 x 10
    budgets = [0, 19, 20, 45, 200, 1000]
    expected = [tail(vec.reshape(10, 10), r) for r in (0, 0, 1, 2, 10, 10)]
    np.testing.assert_allclose(d.gfa_errors(deltas, budgets), expected, atol=1e-12)
    padded = np.append(vec[:52], [0] * 4).reshape(8, 7)             # 24 + 24 + 4: k = 7, m = 8
    np.testing.assert_allclose(d.gfa_errors([*deltas[:2], deltas[3][:1, :4]], [15]), [
        tail(np.append(np.append(vec[:48], deltas[3][0, :4].numpy()), [0] * 4).reshape(padded.shape), 1)])


def test_loras_error_is_the_best_of_all_allocations_of_ranks():
    scales = (1, 0.2, 3, 0.7)
    deltas = [c * matrix(*shape, seed=i) for i, (c, shape) in enumerate(zip(scales, SHAPES))]
    tails = [[tail(M.numpy(), r) for r in range(min(M.shape) + 1)] for M in deltas]
    best = dict.fromkeys(BUDGETS, math.inf)
    for ranks in itertools.product(*(range(len(t)) for t in tails)):
        cost = sum(r * sum(shape) for r, shape in zip(ranks, SHAPES))
        error = sum(t[r] for t, r in zip(tails, ranks))
        best = {P: min(least, error) if cost <= P else least for P, least in best.items()}
    np.testing.assert_allclose(d.lora_errors(deltas, BUDGETS), list(best.values()), atol=1e-10)


def test_each_method_wins_on_its_own_target_and_not_on_the_nulls():
    """A rank-1 M is GFA's at rank 1, rank-1 modules are LoRA's; shuffled, both lose it."""
    fold = low_rank(16, 16, 1)
    deltas = [part.reshape(8, 8) for part in fold.flatten().split(64)]
    assert d.gfa_errors(deltas, [32])[0] < 1e-20 * fold.norm() ** 2
    own = [low_rank(8, 8, 1, seed=i) for i in range(0, 8, 2)]
    norm = sum(M.norm() ** 2 for M in own)
    assert d.lora_errors(own, [64])[0] < 1e-12 * norm < 0.1 * norm < d.gfa_errors(own, [64])[0]
    null = [d.shuffled(M) for M in own]
    assert d.lora_errors(null, [64])[0] > 0.1 * norm
    null = [d.same_spectrum(M) for M in own]
    assert d.lora_errors(null, [64])[0] < 1e-12 * norm


# ---- all of them

def test_a_stage_has_the_angles_and_the_effective_rank_of_cps_lora_and_the_whole_update_the_others():
    whole, stage = matrix(16, 12), low_rank(16, 12, 5)
    found = d.measures(whole, stage, None, (2, 4), "cosine", 4)
    assert (found["rank"], found["eber_glora"]) == (12, d.eber_glora(values(whole)))
    assert found["eber_cps"] == d.eber_cps(values(stage))
    for k in (2, 4):                                    # of 4 / k vectors each
        blocks = d.bicluster(stage, k)
        assert found[f"angle_after_{k}"] == d.block_angle(stage, *blocks, 4 // k)
        assert found[f"contrast_after_{k}"] == d.contrast(stage, *blocks)
        plain = [torch.arange(n) * k // n for n in stage.shape]
        assert found[f"angle_before_{k}"] == d.block_angle(stage, *plain, 4 // k)
    none = d.measures(whole, None, None, (2,), "cosine", 4)
    assert "eber_cps" not in none and none["contrast_after_2"] == d.contrast(whole, *d.bicluster(whole, 2))


def test_an_update_of_one_stage_has_one_draw_of_each_null_and_errors_are_shares_of_it():
    whole = {f"{i}.q": matrix(8, 6, seed=i) for i in range(3)}
    result = d.analyze(whole, whole, {}, ks=(2,), budgets=(0, 1, 2))
    for kind, spectra in result["spectra"].items():
        assert spectra["accumulated"] == spectra["stage"], kind
        assert result["errors"][kind]["gfa"][0] == pytest.approx(1) == result["errors"][kind]["lora"][0]
    norm = sum(M.norm().item() ** 2 for M in whole.values())
    one, two = d.lora_errors(list(whole.values()), [42, 84])     # three modules of 8 + 6
    assert result["errors"]["update"]["lora"][1:] == pytest.approx([one / norm, two / norm])
    assert result["errors"]["shuffled"]["lora"][1] != result["errors"]["update"]["lora"][1]


# ---- the command

@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    own = dict(cps_lora=["--reinit_every", "2s"], gfa=[], dora=[], glora=["--reinit_every", "2s"])
    for method, flags in own.items():
        train.main(["--method", method, *flags, "--max_steps", "4", "--batch_size", "4", "--train_rows", "40",
                    "--eval_limit", "2", "--no-eval_before", "--targets", "v_proj",
                    "--out_dir", str(out / method)])
    return out


@torch.no_grad()
@pytest.mark.parametrize("method", ["cps_lora", "gfa", "dora", "glora"])
def test_an_update_is_what_merging_changes_with_factors_or_without(method, tiny_runs, tiny):
    whole, stage, trained = analyze.updates(tiny_runs / method)
    base, model = (checkpoint.load(tiny, torch.float64) for _ in range(2))
    module, _ = checkpoint.load_adapter(model, tiny_runs / method / "adapter")
    merged = method in ("gfa", "dora")
    module.merge(model)
    names = [name for name, _ in base.named_modules() if name.endswith("v_proj")]
    assert list(whole) == names
    for name in names:
        change = model.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(whole[name], change, rtol=0, atol=1e-12)
    assert (stage is whole) == merged and bool(trained) == (method == "cps_lora")
    if method == "cps_lora":
        for name in names:      # rank 8 in blocks of rank 4: a stage has 16, both have 32
            assert d.algebraic_rank(values(stage[name]), stage[name].shape) == 16
            assert d.algebraic_rank(values(whole[name]), whole[name].shape) == 32
            rows, columns = trained[name]
            assert (len(rows), len(columns)) == stage[name].shape
            block = stage[name][rows == 0][:, columns == 1]
            assert d.algebraic_rank(values(block), block.shape) == 4


def test_a_run_is_analyzed_beside_its_nulls(tiny_runs, tmp_path, capsys):
    runs = [str(tiny_runs / name) for name in ("cps_lora", "glora")]
    analyze.main([*runs, "--k", "2", "4", "--budgets", "1", "8", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(found) == ["cps_lora", "glora"]
    for name, result in found.items():
        means = result["mean"]
        assert list(means) == ["update", "shuffled", "random"]
        assert len(result["modules"]) == 4 and list(result["leaves"]) == ["v_proj"]
        assert means["random"]["eber_glora"] == pytest.approx(means["update"]["eber_glora"])
        assert means["shuffled"]["rank"] > means["update"]["rank"] == means["random"]["rank"]
        errors = result["errors"]
        assert errors["random"]["lora"] == pytest.approx(errors["update"]["lora"])
        assert all(1 > e[0] > e[1] >= 0 for kind in errors.values() for e in kind.values())
        for kind in means:
            module = [each[kind]["angle_after_2"] for each in result["modules"].values()]
            assert means[kind]["angle_after_2"] == pytest.approx(np.mean(module))
            assert result["deviation"][kind]["angle_after_2"] == pytest.approx(np.std(module))
            assert ("eber_cps" in means[kind]) == (name == "cps_lora")       # a stage of CPS-LoRA's alone
            assert ("angle_trained" in means[kind]) == (name == "cps_lora")
    assert capsys.readouterr().out.count("| shuffled |") == 2
    pytest.importorskip("matplotlib")
    pictures = {file.name for file in (tmp_path / "out").glob("*.png")}
    assert pictures == {"spectra.png", "angles.png", "errors.png", "map-cps_lora.png", "map-glora.png"}


def test_two_checkpoints_give_their_difference(tiny, tmp_path):
    model = checkpoint.load(tiny)
    changed = model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        changed.weight += low_rank(*changed.weight.shape, 2).float()
        model.model.embed_tokens.weight += 1            # the tied head, too, which is no target
    checkpoint.save_merged(tmp_path / "m", model, tiny)
    whole, stage, trained = analyze.updates(tmp_path / "m", base=tiny)
    assert list(whole) == ["model.layers.1.self_attn.q_proj"] and stage is whole and trained == {}
    added = low_rank(*changed.weight.shape, 2)
    torch.testing.assert_close(next(iter(whole.values())), added, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no module has an update"):
        analyze.updates(tiny, base=tiny)


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.main([str(tmp_path), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("analyze.py: error: ") and err.count("\n") == 1
    assert str(tmp_path) in err and not (tmp_path / "out").exists()


def test_without_matplotlib_there_is_the_json_and_a_line(tiny_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    analyze.main([str(tiny_runs / "dora"), "--k", "2", "--budgets", "1", "--out", str(tmp_path)])
    assert "no pictures: pip install -r requirements-plots.txt" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["analysis.json"]
