"""experiments/gradients.py: its measure against autograd and hand-written loops; answers that are known."""
import gzip
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import checkpoint
from gralora import GraLoRALinear

sys.path.insert(0, str(ROOT / "experiments"))
import gradients as E


def layer_of(G, r, k, noise=0.0):
    layer = GraLoRALinear(SimpleNamespace(weight=G), r, 2 * r, 0.0, k, 0)
    with torch.no_grad():
        layer.lora_B.normal_(0, noise)
    return layer


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_U_is_what_a_step_of_the_adapter_does_to_W_to_first_order(k, noise):
    """Eq. 4 by autograd of a loss: G on W itself, and how delta() moves along the factors' own gradients."""
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 8, bias=False, dtype=torch.float64)
    x, target = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    layer = GraLoRALinear(base, 4, 8, 0.0, k, 0)
    torch.nn.init.normal_(layer.lora_B, 0, noise)
    W = (base.weight + layer.delta()).detach().requires_grad_()
    (G,) = torch.autograd.grad((x @ W.T - target).pow(3).sum(), W)
    (layer(x) - target).pow(3).sum().backward()
    steps, ends = {p: p.grad.clone() for p in (layer.lora_A, layer.lora_B)}, []
    with torch.no_grad():
        for move in (1, -2):                        # delta is bilinear: the central difference is exact
            for p, g in steps.items():
                p += move * g
            ends.append(layer.delta())
        for p, g in steps.items():
            p += g
        torch.testing.assert_close(E.fused(G, layer), (ends[0] - ends[1]) / 2)


def test_the_numbers_are_those_of_a_loop_over_the_entries():
    torch.manual_seed(0)
    (o, i), channel, grid = (4, 6), 3, 2
    U, G = torch.randn(2, o, i, dtype=torch.float64)
    u, g = U.tolist(), G.tolist()
    cells = [(a, b) for a in range(o) for b in range(i)]
    off = lambda c: (sum((c * u[a][b] - g[a][b]) ** 2 for a, b in cells)
                     / sum(g[a][b] ** 2 for a, b in cells)) ** 0.5
    c = torch.linalg.lstsq(U.reshape(-1, 1), G.reshape(-1, 1)).solution.item()
    assert off(c) < min(off(c - 1e-3), off(c + 1e-3))
    size = lambda where: (sum((c * u[a][b]) ** 2 for a, b in where)
                          / sum(g[a][b] ** 2 for a, b in where)) ** 0.5
    found = E.measure(U, G, channel, grid)
    known = {"as is": off(1), "scaled": off(c), "inside": size([(a, b) for a, b in cells if b >= 3]),
             "outside": size([(a, b) for a, b in cells if b < 3]),
             "share": sum(u[a][3] ** 2 for a in range(o)) / sum(u[a][b] ** 2 for a, b in cells)}
    assert {name: found[name] for name in known} == pytest.approx(known)
    for j in range(grid):
        for n in range(grid):
            where = [(a, b) for a, b in cells if a // 2 == j and b // 3 == n]
            assert found["map"][j][n] == pytest.approx(abs(size(where)))


def planted_pair(o=32, i=48, channel=20):
    """G without an outlier, and the same with channel times 1024: in this column alone they differ."""
    pair = []
    for gain in (1, 1024):
        torch.manual_seed(0)
        pair.append(E.planted(o, i, channel, gain).double())
    plain, outlier = pair
    others = torch.arange(i) != channel
    torch.testing.assert_close(outlier[:, others], plain[:, others])
    torch.testing.assert_close(outlier[:, channel], 1024 * plain[:, channel])
    return plain, outlier


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_planted_outlier_reaches_the_k_blocks_that_see_it_and_all_of_LoRA(noise):
    """§3.3: the other k² - k adapters' gradients are to the bit what they are without it."""
    plain, outlier = planted_pair()
    for k in (1, 2, 4, 8):
        layer = layer_of(plain, 8, k, noise)
        mine = [E.blocks(E.fused(G, layer), k).detach() for G in (plain, outlier)]
        changed = (mine[0] != mine[1]).any(3).any(1)                            # (j, n)
        assert changed.tolist() == [[n == 20 * k // 48 for n in range(k)]] * k
    rows = {row["k"]: row for row in E.sweep([outlier], 20, (8,)) if row["B"] == "zero"}
    assert rows[1]["outside"] > 5 * max(rows[k]["outside"] for k in (2, 4, 8))


def test_of_one_column_alone_the_deviations_are_known():
    """G = g e_cᵀ and B = 0: U = s² g (AᵀA e_c)ᵀ, so both numbers are lengths of vectors of AᵀA's column c."""
    torch.manual_seed(0)
    G = torch.zeros(16, 24, dtype=torch.float64)
    G[:, 5] = torch.randn(16, dtype=torch.float64)
    layer = layer_of(G, 4, 1)
    column = 4 * (layer.lora_A.T @ layer.lora_A)[:, 5].detach()
    off = column - torch.eye(24, dtype=torch.float64)[5]
    found = E.measure(E.fused(G, layer).detach(), G, 5, 4)
    assert found["as is"] == pytest.approx(off.norm().item())
    assert found["scaled"] == pytest.approx((1 - (column[5] / column.norm()) ** 2).sqrt().item())
    assert found["share"] == pytest.approx((column[5] / column.norm()).square().item())


def test_the_deviations_are_the_same_for_every_k_with_an_outlier_or_none():
    """
    In the mean, with x = i / r, o = i: each half of U is c G, c = s² r σ² = 4 / (3x), and c² x ‖G‖² of noise.
    One half for B = 0, two for B noise.
    """
    torch.manual_seed(0)
    gradients = [E.planted(128, 128, 7) for _ in range(8)]
    for one in (gradients, [G.flatten()[torch.randperm(G.numel())].view_as(G) for G in gradients]):
        for row in E.sweep(one, 7, (16, 64)):
            x, halves = 128 / row["r"], 1 if row["B"] == "zero" else 2
            c = 4 / (3 * x)
            assert row["as is"] == pytest.approx(((1 - halves * c) ** 2 + halves * c * c * x) ** 0.5, abs=0.1)
            assert row["scaled"] == pytest.approx((x / (x + halves)) ** 0.5, abs=0.03)


def test_outliers_are_named_from_the_threshold_on_and_the_largest_always():
    mean = torch.ones(9)
    mean[4] = 3
    assert E.outliers(mean) == [(4, 3.0)]
    mean[7], mean[2] = E.OUTLIER, 50
    assert E.outliers(mean) == [(2, 50.0), (7, 20.0)]


def test_the_gradients_of_a_model_are_those_of_its_training_loss(tmp_path, tiny):
    """By autograd on the weight of one layer; its planted channel is found."""
    rows = [dict(instruction=f"{n} + 1?", input="", output=str(n + 1)) for n in range(E.ROWS)]
    with gzip.open(tmp_path / "commonsense_15k.json.gz", "wt") as file:
        json.dump(rows, file)
    found = E.activations(tiny, tmp_path)
    model = checkpoint.load(tiny)
    tokenizer = E.text.Tokenizer(tiny, model.cfg)
    inputs, layer = [], model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda layer, x: inputs.append(x[0]))
    loss = model.losses([E.text.example(tokenizer, row) for row in rows]).mean()
    (G,) = torch.autograd.grad(loss, layer.weight)
    assert len(found) == len(model.model.layers)
    torch.testing.assert_close(found[1][0], G, atol=1e-5, rtol=1e-3)
    assert found[1][1][0][0] == inputs[0].abs().mean(0).argmax()


def test_a_run_leaves_json_a_table_and_a_picture(tmp_path, tiny, monkeypatch):
    rows = [dict(instruction=f"{n} + 1?", input="", output=str(n + 1)) for n in range(20)]
    (tmp_path / "commonsense_15k.json").write_text(json.dumps(rows))
    monkeypatch.setattr(E, "DRAWS", 1)
    monkeypatch.setattr(E, "OUTLIER", 2)
    E.main(["--model", str(tiny), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "gradients.json").read_text())
    planted, real = result["subjects"]
    assert len(result["layers"]) == checkpoint.load(tiny).cfg.num_hidden_layers
    assert planted["share of G"] > 0.8 and real["name"].startswith("tiny: down_proj of layer ")
    for s in (planted, real):
        cells = [(row["B"], row["r"], row["k"]) for row in s["rows"]]
        assert cells == [(B, r, k) for B in ("zero", "noise") for r in E.RANKS for k in E.KS]
        assert [(row["B"], row["r"], row["k"]) for row in s["null"]] == cells
        assert [len(row["map"]) for row in s["rows"]] == [8, 2, 4, 8] * 8
    # the null is the same entries in another order: no column has a share of its own
    assert all(row["share"] < 0.05 < 0.5 * planted["share of G"] for row in planted["null"])
    lines = (tmp_path / "out" / "gradients.md").read_text().splitlines()
    assert sum(line.startswith("| noise | 128 | ") for line in lines) == 8
    assert lines[0].startswith("`python experiments/gradients.py --model ")
    if sys.modules.get("matplotlib"):
        assert (tmp_path / "out" / "gradients.png").stat().st_size > 10_000
