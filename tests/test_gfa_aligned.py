"""What baselines/gfa_aligned.py says, a sentence at a time, beside gfa.py and slow loops."""
import copy
import inspect
import math

import pytest
import torch
import torch.nn as nn
from conftest import PUBLISHED, trainable
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import gfa
import model as M

aligned = checkpoint.load_method("gfa_aligned")
SHAPES = ((6, 6), (4, 6), (6, 5), (9, 6), (6, 7))       # (out, in): w = 6, two of them transposed; d = 186


def injected(method=aligned, rank=2, shapes=SHAPES, **own):
    """Layers of these shapes, every second with a bias, and noise in both factors."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(q, p, bias=j % 2 == 0) for j, (p, q) in enumerate(shapes)).double()
    method.inject(model, tuple(map(str, range(len(shapes)))), rank, **own)
    torch.manual_seed(1)
    nn.init.normal_(model.adapter.lora_B)
    nn.init.normal_(model.adapter.lora_A)
    return model


def run(model, updates=None):
    """Every layer's output for an input of its own, by its forward or by `updates`, and all gradients."""
    torch.manual_seed(2)
    params, outputs = [model.adapter.lora_B, model.adapter.lora_A], []
    for j in range(len(model) - 1):
        base = model[j].base
        x = torch.randn(2, 3, base.in_features, dtype=torch.float64, requires_grad=True)
        params.append(x)
        outputs.append(model[j](x) if updates is None else base(x) + x @ updates[j].T)
    return outputs, torch.autograd.grad(sum(y.square().sum() for y in outputs), params)


def stacked(model, w):
    """The header, slowly: row i c + j is B_i A_j, modules take n rows each, transposed for w = out."""
    B, A = model.adapter.lora_B, model.adapter.lora_A
    chunks = [A[:, j:j + w] for j in range(0, A.shape[1], w)]
    rows = iter([B[i] @ chunk for i in range(len(B)) for chunk in chunks])
    found = []
    for layer in model[:len(model) - 1]:
        p, q = layer.base.weight.shape
        S = torch.stack([next(rows) for _ in range(p if q == w else q)])
        found.append(S if q == w else S.T)
    return found


def published(name, targets):
    """The (out, in) of the targets of a released model."""
    with torch.device("meta"):
        net = checkpoint.build(PUBLISHED[name])
    return [tuple(base.weight.shape) for base in gfa.find(net, M.targets_of(net, targets)).values()]


# ---------------------------------------------------------------------- the update

def test_forward_delta_and_gradients_are_those_of_the_stack_of_rows():
    model = injected()
    assert aligned.fold(SHAPES) == (16, 12, 6)
    assert [layer.transposed for layer in model[:5]] == [False, False, True, False, True]
    assert [layer.rows()[2] for layer in model[:5]] == [0, 0, 0, 1, 0]          # one begins inside a row of M
    updates = stacked(model, 6)
    for layer, update in zip(model[:5], updates):
        torch.testing.assert_close(layer.delta(), update)
    for got, want in zip(run(model), run(model, updates)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [8, 9, 10, 11])
def test_a_module_begins_and_ends_at_any_place_in_a_row_of_m(rows):
    """c = 4 rows of the stack a row of M, and a module of either kind after one of `rows` rows."""
    shapes = ((rows, 3), (9, 3), (3, 9), (19, 3), (3, 12))
    model = injected(shapes=shapes)
    assert aligned.fold(shapes)[1] == 4 * 3 and model[1].rows()[2] == rows % 4
    for got, want in zip(run(model), run(model, stacked(model, 3))):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shapes", [((64, 64),) * 4, ((5, 4), (7, 4), (7, 4))])
def test_where_near_square_is_aligned_already_it_is_gfas_model(shapes):
    """k a multiple of every q, in the second case with modules that begin inside a row of M."""
    ours, paper = injected(shapes=shapes), injected(gfa, shapes=shapes)
    (m, k, w), q = aligned.fold(shapes), shapes[0][1]
    assert (m, k) == gfa.fold(sum(p * q for p, q in shapes)) and w == q and k > q
    ours.adapter.load_state_dict(paper.adapter.state_dict())
    for layer, other in zip(ours[:len(shapes)], paper):
        torch.testing.assert_close(layer.delta(), other.delta())
    for got, want in zip(run(ours), run(paper)):
        torch.testing.assert_close(got, want)


def test_q_and_v_of_llama2_7b_are_aligned_already():
    shapes = published("LLaMA2-7B", "q_proj,v_proj")
    assert aligned.fold(shapes) == (*gfa.fold(64 * 4096**2), 4096) == (8 * 4096, 8 * 4096, 4096)


def test_padding_reaches_no_weight_and_gets_no_gradient():
    model = injected()
    (m, k, w), rows = aligned.fold(SHAPES), 6 + 4 + 5 + 9 + 7
    spare = m * k // w - rows                               # rows of the stack that no module has
    assert spare == 1
    B, A = model.adapter.lora_B, model.adapter.lora_A
    with torch.no_grad():
        B[:-1] = 0                                          # only M's last row is left
    (outputs, (_, dA, *_)) = run(model)
    assert (dA[:, k - spare * w:] == 0).all() and (dA[:, :k - spare * w] != 0).all()
    with torch.no_grad():
        A[:, k - spare * w:] += 1
    torch.testing.assert_close(run(model)[0], outputs)


# ---------------------------------------------------------------------- the fold

def test_w_is_the_size_that_all_targets_share_and_the_fewest_are_transposed():
    for shapes, w in [(((4, 6), (6, 9)), 6), (((9, 4), (9, 4)), 4), (((4, 9),), 9),
                      (((4, 9), (9, 4), (9, 4)), 4), (((4, 9), (4, 9), (9, 4)), 9)]:
        assert aligned.fold(shapes)[2] == w


def test_targets_that_share_no_size_are_refused_and_nothing_is_changed():
    model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 9), nn.Linear(9, 5)])
    with pytest.raises(ValueError, match=r"no size that all targets share, in or out: \[\(5, 9\), \(6, "):
        aligned.inject(model, ("0", "1", "2"), 1)
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)
    aligned.inject(model, ("0", "1"), 1)


def test_k_is_the_multiple_of_w_closest_to_the_root_of_d():
    for w, rows in [(1, 1), (5, 1), (5, 2), (7, 9), (6, 31), (16, 35), (16, 37), (3, 1000), (4096, 524288)]:
        d, (m, k, _) = rows * w, aligned.fold([(rows, w)])
        distances = [abs(multiple - math.sqrt(d)) for multiple in range(w, math.isqrt(d) + 2 * w, w)]
        assert k % w == 0 and abs(k - math.sqrt(d)) == min(distances) and m == math.ceil(d / k)


@pytest.mark.parametrize("name, targets, c", [
    ("RoBERTa-large", "query,value", 7), ("Qwen2.5-3B", "q_proj,v_proj", 6),
    ("LLaMA-3.2-3B", "q_proj,v_proj", 6), ("LLaMA2-7B", "attention", 11), ("LLaMA2-7B", "all", 20)])
def test_published_models_have_few_rows_of_the_stack_in_a_row_of_m_and_about_gfas_count(name, targets, c):
    shapes = published(name, targets)
    _, k, w = aligned.fold(shapes)
    assert k == c * w
    assert aligned.count(shapes, 8) == trainable("gfa_aligned", name, targets, 8)
    assert 1 <= aligned.count(shapes, 8) / gfa.count(shapes, 8) < 1.02


# ---------------------------------------------------------------------- local rank, factors

def rank(W):
    return torch.linalg.matrix_rank(W.detach()).item()


def test_an_update_has_rank_c_r_where_gfas_has_full_rank():
    shapes = ((64, 64),) * 48
    ours, paper = injected(rank=1, shapes=shapes), injected(gfa, rank=1, shapes=shapes)
    assert [layer.c for layer in ours[:48]] == [7] * 48
    assert [rank(layer.delta()) for layer in ours[:48]] == [7] * 48
    assert [rank(layer.delta()) for layer in paper[:48]] == [64] * 48


@pytest.mark.parametrize("r", [1, 2, 3])
def test_factors_have_rank_c_r_or_the_smaller_size_of_the_module_and_share_no_memory(r):
    model = injected(rank=r)
    found, c = aligned.factors(model), 2
    for j, (p, q) in enumerate(SHAPES):
        A, B = found[str(j)]
        R = min(c * r, p, q)
        assert (A.shape, B.shape) == ((R, q), (p, R)) and rank(model[j].delta()) == R
        torch.testing.assert_close(B @ A, model[j].delta())
    tensors = [t for pair in found.values() for t in pair]
    assert not any(t.requires_grad for t in tensors)
    places = {t.untyped_storage().data_ptr() for t in [*tensors, *model.adapter.parameters()]}
    assert len(places) == len(tensors) + 2                  # a file of factors holds each of them


# ---------------------------------------------------------------------- cost

@pytest.mark.parametrize("p, q", [(192, 96), (96, 192)])
def test_an_update_costs_a_lora_of_rank_c_r_on_side_w_and_of_rank_r_on_side_n(p, q):
    """Three modules of 192 rows of 96: c = 2. Forward; backward: the same for x, and for the factors."""
    model, t, c, r = injected(rank=3, shapes=((p, q), (p, q), (96, 96))), 10, 2, 3
    assert aligned.fold(((p, q), (p, q), (96, 96))) == (240, 192, 96) and model[1].rows()[2] == 0
    x = torch.randn(t, q, dtype=torch.float64, requires_grad=True)
    update = 2 * t * (c * r * 96 + r * 192)
    with FlopCounterMode(display=False) as counter:
        y = model[1](x)
    assert counter.get_total_flops() == 2 * t * p * q + update
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * t * p * q + 2 * update


@pytest.mark.parametrize("p, q", [(192, 96), (96, 192)])
def test_no_slice_is_formed_and_nothing_as_large_as_a_weight_is_kept(p, q):
    model = injected(rank=3, shapes=((p, q), (p, q), (96, 96)))
    weight, sizes = model[1].base.weight, []
    note = lambda t: sizes.append(t.numel()) if t.data_ptr() != weight.data_ptr() else None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: note(t) or t, lambda t: t):
        y = model[1](torch.randn(5, q, dtype=torch.float64))
    assert sizes and max(sizes) < p * q / 10
    y.sum().backward()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="dynamo of torch 2.6 mixes up sizes in backward")
def test_layers_compile_to_two_graphs_wherever_they_begin():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)))
    aligned.inject(model, tuple(map(str, range(30))), 2)
    nn.init.normal_(model.adapter.lora_B)
    layers, counter = model[:30], CompileCounter()
    assert {layer.rows()[2] for layer in layers} == {0, 1, 2, 3, 4}
    x = torch.randn(5, 8, requires_grad=True)
    want = layers(x)
    wanted = torch.autograd.grad(want.sum(), (x, *model.adapter.parameters()))
    for layer in layers:
        layer.compile(backend=counter, dynamic=True)
    got = layers(x)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), (x, *model.adapter.parameters())), wanted):
        torch.testing.assert_close(g, w)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_autocast_computes_in_bf16_and_trains_in_float32():
    model = injected().float()
    for layer in model[:5]:
        x = torch.randn(4, layer.base.in_features, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert model.adapter.lora_A.grad.dtype == model.adapter.lora_B.grad.dtype == torch.float32


# ---------------------------------------------------------------------- as in gfa.py

def test_what_is_as_in_gfa_is_equal_to_the_letter():
    for function in ("find", "merge"):
        assert inspect.getsource(getattr(aligned, function)) == inspect.getsource(getattr(gfa, function))
    assert aligned.DEFAULTS == gfa.DEFAULTS


def test_b_starts_at_zero_and_a_has_standard_deviation_sigma():
    torch.manual_seed(0)
    for own, sigma in (({}, 0.02), (dict(sigma=0.5), 0.5)):
        model = nn.Sequential(nn.Linear(512, 512))
        aligned.inject(model, ("0",), 64, **own)
        A = model.adapter.lora_A / sigma
        assert not model.adapter.lora_B.any()
        assert abs(A.std().item() - 1) < 6 / (2 * A.numel()) ** 0.5 and abs(A.mean()) < 6 / A.numel() ** 0.5
        assert abs(A.pow(4).mean().item() - 3) < 6 * (96 / A.numel()) ** 0.5            # normal
    with pytest.raises(ValueError, match="sigma 0, expected above 0"):
        aligned.inject(nn.Sequential(nn.Linear(8, 8)), ("0",), 2, sigma=0)


@pytest.mark.parametrize("own, why", [(dict(alpha=0), "no alpha"), (dict(alpha=8), "no alpha"),
                                      (dict(dropout=0.1), "no dropout")])
def test_there_is_no_alpha_and_no_dropout(own, why):
    with pytest.raises(ValueError, match=why):
        injected(**own)


def test_a_rank_is_at_most_the_smaller_side_of_m():
    """Of 16 x 12 it is k; of 9 x 16, where √d lies between two multiples of w, it is m."""
    for shapes, sides, least in ((SHAPES, "16 x 12", 12), (((18, 8),), "9 x 16", 9)):
        injected(rank=least, shapes=shapes)
        message = f"rank {least + 1} for a global matrix of {sides}, expected 1 to {least}"
        with pytest.raises(ValueError, match=message):
            injected(rank=least + 1, shapes=shapes)


def test_match_lora_is_the_largest_rank_in_the_budget():
    lora_1 = sum(p + q for p, q in SHAPES)                  # 60, of which rank 1 takes 16 + 12
    for budget, r in [(0.5, 1), (0.94, 2), (28 * 3 / lora_1, 3), (2.0, 4)]:
        model = injected(rank=9, match_lora=budget)
        assert len(model.adapter.lora_A) == r and 28 * r <= budget * lora_1 < 28 * (r + 1)
    with pytest.raises(ValueError, match="match_lora 0.25 allows 15 parameters, rank 1 has 28"):
        injected(match_lora=0.25)


@pytest.mark.parametrize("budget", [float("inf"), float("nan"), float("-inf"), -1.0])
def test_a_budget_that_is_no_finite_positive_number_is_an_error(budget):
    with pytest.raises(ValueError, match=f"^match_lora {budget:g} allows .* parameters, rank 1 has 28$"):
        injected(match_lora=budget)


def test_the_factors_have_one_registered_owner_on_the_device_of_the_weights():
    model = injected()
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert names == ["adapter.lora_B", "adapter.lora_A"] == [n for n in model.state_dict() if "lora_" in n]
    for one in (model, copy.deepcopy(model)):
        assert all(layer.shared is one.adapter for layer in one[:5])
    with torch.device("meta"):
        assert injected().adapter.lora_A.is_meta
