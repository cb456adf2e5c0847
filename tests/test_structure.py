"""experiments/structure.py, blocks.py, regions.py, global_order.py: each measure; each name, in small."""
import itertools
import json
import math
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import train

sys.path.insert(0, str(ROOT / "experiments"))
import blocks
import gfa_permuted
import global_order
import regions
import structure
import sweep

import gfa

NAMES = {name: getattr(module, name) for module, names in (
    (structure, ("spectra",)), (blocks, ("rank", "angles", "partition", "blocks")),
    (regions, ("importance", "ends")), (global_order, ("outlook", "permute"))) for name in names}
ARGS = SimpleNamespace(seeds=2, steps=4, model=None, common="--train_rows 40 --val_rows 8 --batch_size 4 "
                       "--no-eval_before --log_every 4 --targets v_proj --eval_limit 1")


def matrix(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


# ---- measures

def tail(M, r):
    return (np.linalg.svd(M, compute_uv=False)[r:] ** 2).sum()


def test_what_pairs_of_a_rank_leave_of_blocks_is_the_sum_of_their_tails():
    M, rows, columns = matrix(6, 8), torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([1, 1, 0, 2, 0, 2, 0, 0])
    cut = (M.numpy()[rows.numpy() == i][:, columns.numpy() == j] for i in range(2) for j in range(3))
    left = sum(tail(block, 1) for block in cut) / (M.numpy() ** 2).sum()
    assert blocks.block_error(M, rows, columns, 1) == pytest.approx(left)


def test_each_grid_has_loras_parameters_and_one_block_is_lora():
    M = matrix(8, 12)
    found = blocks.errors(M, 4, [torch.arange(n) % 2 for n in M.shape])
    assert list(found) == ["LoRA", "blocks as they are", "cosine", "abs-cosine", "true blocks"]
    norm = (M.numpy() ** 2).sum()
    assert found["LoRA"] == pytest.approx(tail(M.numpy(), 4) / norm)
    halves = [M.numpy()[i:i + 4, j:j + 6] for i in (0, 4) for j in (0, 6)]
    assert found["blocks as they are"] == pytest.approx(sum(tail(half, 2) for half in halves) / norm)


def test_planted_blocks_are_those_of_proposition_2_and_only_the_absolute_cosine_finds_them():
    """Rank 4r; half of it is all that LoRA has with the true blocks' parameters."""
    torch.manual_seed(0)
    M, (rows, columns) = blocks.orthogonal_blocks(64, 4)
    assert np.linalg.matrix_rank(M.numpy()) == 16
    cut = [M.numpy()[rows.numpy() == i][:, columns.numpy() == j] for i in (0, 1) for j in (0, 1)]
    for one, other in itertools.combinations(cut, 2):
        np.testing.assert_allclose(one.T @ other, 0, atol=1e-12)
        np.testing.assert_allclose(one @ other.T, 0, atol=1e-12)
    found = blocks.errors(M, 8, (rows, columns))
    assert found["true blocks"] < 1e-12 and found["abs-cosine"] < 1e-12
    assert found["LoRA"] == pytest.approx(0.5) and found["cosine"] > 0.3


def test_overlap_and_density_of_regions_by_hand():
    pair = lambda rows, columns: (torch.tensor(rows), torch.tensor(columns))
    one = {"q": pair([0, 1], [2, 3]), "v": pair([4, 5], [0, 1])}
    other = {"q": pair([1, 0], [3, 7]), "v": pair([5, 6], [2, 3])}
    assert regions.overlap(one, other) == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert regions.overlap(one, one) == 1
    deltas = {name: matrix(8, 10, seed=n) for n, name in enumerate(one)}
    by_hand = []
    for name, (rows, columns) in one.items():
        M = deltas[name].numpy() ** 2       # rows are input features
        by_hand.append(M[np.ix_(columns.numpy(), rows.numpy())].mean() / M.mean())
    assert regions.density(one, deltas) == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize("values, verdict", [
    ([1.0, 1.2, 0.9], "held"), ([-1.0, -1.2, -0.9], "not held"), ([1.0, -1.0, 0.5], "cannot be told"),
    ([5.0], "cannot be told"), ([0.0, 0.0], "cannot be told"), ([1.0, 0.1, 0.2], "cannot be told")])
def test_a_verdict_is_by_the_interval_of_the_differences(values, verdict):
    """Student's, by scipy; one seed tells nothing."""
    scipy = pytest.importorskip("scipy.stats")
    found = structure.told("a above b", values)
    assert found["verdict"] == verdict and found["difference"] == pytest.approx(np.mean(values))
    if len(values) > 1:
        half = scipy.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
        assert found["half"] == pytest.approx(half, rel=2e-3)


def test_a_rate_is_what_main_chose_for_the_method_and_else_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(structure, "MAIN", tmp_path / "main.json")
    permuted = f"--method {ROOT / 'experiments' / 'gfa_permuted.py'} --order modules"
    assert structure.rate("--method lora --rank 64") == ("0.01", "its file")
    assert structure.rate("--method cps_lora --k 4") == ("0.005", "its file")
    assert structure.rate(permuted) == ("0.03", "its file")
    rows = {"lora": {"lr": "3e-2"}, "gfa": {"lr": "1e-1"}}
    structure.MAIN.write_text(json.dumps({"rows": rows}))
    assert structure.rate("--method lora --rank 64") == ("0.03", "main")
    assert structure.rate("--method cps_lora --k 4") == ("0.005", "its file")
    assert structure.rate(permuted) == ("0.1", "main")


# ---- GFA in another order

@pytest.mark.parametrize("order", gfa_permuted.ORDERS)
def test_an_order_deals_every_coordinate_of_m_out_once(order):
    sizes = {"q": 12, "k": 8, "v": 8, "o": 12, "up": 40}
    found = gfa_permuted.places(sizes, order, 1)
    assert {name: len(where) for name, where in found.items()} == sizes
    assert sorted(torch.cat([*found.values()]).tolist()) == list(range(80))
    runs = [bool((where.diff() == 1).all()) for where in found.values()]
    assert all(runs) == (order != "entries")
    assert (list(found) == list(sizes)) == (order != "modules")
    again = gfa_permuted.places(sizes, order, 1)
    assert all(torch.equal(again[name], found[name]) for name in sizes)


@pytest.mark.parametrize("order", gfa_permuted.ORDERS)
@torch.no_grad()
def test_a_layer_takes_its_entries_of_m_from_its_places(order):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 3), "b": torch.nn.Linear(4, 6, bias=False)}).double()
    before = {name: layer.weight.clone() for name, layer in model.items()}
    gfa_permuted.inject(model, ("a", "b"), 2, order=order, order_seed=3)
    x = {name: matrix(2, W.shape[1]) for name, W in before.items()}
    start = {name: model[name](x[name]) for name in before}
    torch.nn.init.normal_(model.adapter.lora_B)
    M = (model.adapter.lora_B @ model.adapter.lora_A).flatten()
    found = gfa_permuted.places({name: W.numel() for name, W in before.items()}, order, 3)
    after = {name: model[name](x[name]) for name in before}
    gfa_permuted.merge(model)
    for name, W in before.items():
        bias = model[name].bias if name == "a" else 0
        torch.testing.assert_close(start[name], x[name] @ W.T + bias)
        torch.testing.assert_close(model[name].weight, W + M[found[name]].view(W.shape))
        torch.testing.assert_close(after[name], model[name](x[name]))


@torch.no_grad()
def test_gfas_own_order_is_gfa():
    models = [torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 4)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for method, model in zip((gfa, gfa_permuted), models):
        torch.manual_seed(0)
        method.inject(model, ("0", "1"), 3)
        torch.nn.init.normal_(model.adapter.lora_B)
    torch.testing.assert_close(*(model(matrix(3, 7)) for model in models))
    with pytest.raises(ValueError, match="order 'rows', expected one of own, modules, entries"):
        gfa_permuted.inject(torch.nn.Sequential(torch.nn.Linear(7, 5)), ("0",), 3, order="rows")


def test_the_vector_of_an_order_is_what_the_layers_would_take_back():
    deltas = {"a": matrix(3, 4), "b": matrix(5, 2, seed=1), "c": matrix(2, 6, seed=2)}
    own = torch.cat([M.flatten() for M in deltas.values()])
    assert torch.equal(global_order.strung(deltas, "own", 0)[0], own)
    for order in gfa_permuted.ORDERS[1:]:
        vec = global_order.strung(deltas, order, 0)[0]
        assert not torch.equal(vec, own) and torch.equal(vec.sort()[0], own.sort()[0])
        where = gfa_permuted.places({name: M.numel() for name, M in deltas.items()}, order, 0)
        assert all(torch.equal(vec[where[name]], M.flatten()) for name, M in deltas.items())


# ---- each name

class InProcess(sweep.Sweep):
    """Without a new process and a picture of the loss for each run, which are most of a small one."""
    def run(self, flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "matplotlib.figure", None)
            train.main([*shlex.split(flags), "--out_dir", str(self.directory(flags)), "--overwrite"])
        return flags


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return InProcess(jobs=1, cache=tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_words_numbers_and_a_picture(name, jobs, tmp_path, monkeypatch):
    """Each row with its re-inits and rate; a verdict on each claim, in the words, too."""
    monkeypatch.setattr(structure, "MAIN", tmp_path / "main.json")
    found = NAMES[name](jobs, ARGS)
    data = json.loads(json.dumps(found["data"]))
    words = "\n".join(found["words"])
    assert str(ROOT) not in words + json.dumps(data)
    for row in data["rows"].values():
        assert len(row["loss"]) == 2 and row["lr"].endswith(" (its file)") and row["reinits"] >= 0
    assert data["verdict"]
    for verdict in data["verdict"]:
        assert verdict["verdict"] in ("held", "not held", "cannot be told")
        assert f"- {verdict['claim']}: " in words
    pytest.importorskip("matplotlib")
    found["draw"](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_gradients_are_the_planted_ones_of_gradients_py(tmp_path):
    """No run of train.py; the outlier reaches all of LoRA, and of a grid the blocks that see it."""
    found = blocks.gradients(None, None)
    assert len(found["data"]["subjects"]) == 1 and len(found["data"]["subjects"][0]["rows"]) == 32
    verdict = {one["claim"].partition(":")[0]: one["verdict"] for one in found["data"]["verdict"]}
    assert verdict["r = 128, outside"] == "held" and len(verdict) == 3
    assert json.dumps(found["data"]) and "planted: 256 x 256" in "\n".join(found["words"])
    pytest.importorskip("matplotlib")
    found["draw"](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").is_file()
