"""What the GFA paper says, a sentence, an equation or an algorithm line at a time."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import trainable
from torch.utils.flop_counter import FlopCounterMode

import gfa


class Net(nn.Module):
    """Modules of several shapes, with and without bias, in an order of their own."""

    def __init__(self, shapes=((10, 7), (5, 10), (5, 5), (3, 5))):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(q, p, bias=j % 2 == 0) for j, (p, q) in enumerate(shapes))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


NAMES = tuple(f"layers.{j}" for j in range(4))


def injected(rank=3, shapes=((10, 7), (5, 10), (5, 5), (3, 5)), **own):
    torch.manual_seed(0)
    base = Net(shapes).double()
    model = copy.deepcopy(base)
    gfa.inject(model, tuple(f"layers.{j}" for j in range(len(shapes))), rank, **own)
    nn.init.normal_(model.adapter.lora_B)
    nn.init.normal_(model.adapter.lora_A)
    return base, model


def naive(base, B, A, x):
    """§2 as it is printed: form M, flatten, cut at c_i, reshape, add. Autograd keeps everything."""
    vec, start = (B @ A).flatten(), 0
    for layer in base.layers:
        p, q = layer.weight.shape
        delta = vec[start:start + p * q].reshape(p, q)
        start += p * q
        x = F.linear(x, layer.weight + delta, layer.bias).tanh()
    return x


@pytest.mark.parametrize("d, m, k", [(1, 1, 1), (16, 4, 4), (17, 5, 4), (20, 5, 4), (24, 6, 4), (25, 5, 5),
                                     (10**10 + 1, 10**5 + 1, 10**5)])
def test_step_2_k_is_the_root_of_d_and_m_what_it_takes(d, m, k):
    assert gfa.fold(d) == (m, k) and m * k - d <= k - 1


def test_steps_1_to_4_forward_and_gradients_are_the_printed_ones():
    base, model = injected()
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    B, A = (model.adapter.get_parameter(n).detach().clone().requires_grad_() for n in ("lora_B", "lora_A"))
    z = x.detach().clone().requires_grad_()
    y, want = model(x), naive(base, B, A, z)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    for got, expected in ((model.adapter.lora_B, B), (model.adapter.lora_A, A), (x, z)):
        torch.testing.assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("offset", [0, 3, 5])
def test_gradcheck(offset):
    """Windows that begin and end inside a row: 4 rows of 6 hold a 4 x 4 slice at offset 0, 3 or 5."""
    torch.manual_seed(0)
    new = dict(dtype=torch.float64, requires_grad=True)
    x, B, A = torch.randn(2, 3, 4, **new), torch.randn(4, 2, **new), torch.randn(2, 6, **new)
    W = torch.randn(4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, B, A: gfa.Product.apply(x, W, B, A, offset), (x, B, A))


def test_step_4_slices_are_disjoint_and_cover_the_vector_in_order():
    base, model = injected()
    d = sum(layer.weight.numel() for layer in base.layers)
    m, k = gfa.fold(d)
    M = torch.arange(m * k).view(m, k)
    cuts = [gfa.cut(M[layer.first:layer.last], layer.offset, layer.base.weight.shape)
            for layer in model.layers]
    assert torch.cat([c.flatten() for c in cuts]).tolist() == list(range(d))
    backwards = copy.deepcopy(base)                 # the order is the model's, not that of the targets
    gfa.inject(backwards, NAMES[::-1], 3)
    assert [(l.first, l.offset) for l in backwards.layers] == [(l.first, l.offset) for l in model.layers]
    assert all(layer.first * k + layer.offset == c[0, 0] for layer, c in zip(model.layers, cuts))


def test_algorithm_1_forms_only_the_rows_that_a_module_meets():
    _, model = injected(shapes=((64, 64),) * 9)
    assert gfa.fold(9 * 4096) == (192, 192)
    for layer in model.layers:
        assert layer.last - layer.first <= -(-4096 // 192) + 1
    layer, n = model.layers[4], 10
    slice_flops = 2 * (layer.last - layer.first) * 3 * 192          # O(r d) over all modules
    with FlopCounterMode(display=False) as counter:
        layer.delta()
    assert counter.get_total_flops() == slice_flops
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.randn(n, 64, dtype=torch.float64, requires_grad=True))
    assert counter.get_total_flops() == slice_flops + 2 * n * 4096
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * slice_flops + 2 * 2 * n * 4096      # Δ again, dB, dA; dx, dΔ


def test_padding_reaches_no_weight_and_gets_no_gradient():
    base, model = injected()
    B, A = model.adapter.lora_B, model.adapter.lora_A
    (m, k), d = gfa.fold(160), 160
    assert (len(B), A.shape[1]) == (m, k) and 0 < (spare := m * k - d) <= k - 1
    with torch.no_grad():
        B[:-1] = 0                                          # only M's last row is left: its tail is padding
    x = torch.randn(6, 7, dtype=torch.float64)
    model(x).square().sum().backward()
    assert (A.grad[:, k - spare:] == 0).all() and (A.grad[:, :k - spare] != 0).all()
    y = model(x)
    with torch.no_grad():
        A[:, k - spare:] += 1
    assert torch.equal(model(x), y)


def test_init_b_is_zero_and_a_has_standard_deviation_sigma():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    for sigma in (0.02, 0.5):
        gfa.inject(model, ("0",), 64, sigma=sigma)
        assert not model.adapter.lora_B.any()
        A = model.adapter.lora_A / sigma
        assert abs(A.pow(4).mean().item() - 3) < 0.2                # normal; uniform has 1.8
        assert abs(A.std().item() - 1) < 0.02 and abs(A.mean()) < 1 / 50
        gfa.merge(model)


def test_the_scale_is_one_and_there_is_no_dropout():
    with pytest.raises(ValueError, match="no alpha"):
        gfa.inject(Net(), NAMES, 2, alpha=16)
    with pytest.raises(ValueError, match="no dropout"):
        gfa.inject(Net(), NAMES, 2, dropout=0.1)


def test_one_registered_owner():
    _, model = injected()
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert names == ["adapter.lora_B", "adapter.lora_A"] == [n for n in model.state_dict() if "lora_" in n]
    assert all(layer.shared is model.adapter for layer in model.layers)
    assert all(layer.shared is other.adapter for other in [copy.deepcopy(model)] for layer in other.layers)


# ---------------------------------------------------------------------- parameter counts

COUNTS = [("RoBERTa-large", "query,value", 14_189, 98_304, 6.93),
          ("Qwen2.5-3B", "q_proj,v_proj", 26_067, 230_400, 8.84),
          ("LLaMA-3.2-3B", "q_proj,v_proj", 37_541, 286_720, 7.64)]


@pytest.mark.parametrize("model, targets, rank_1, lora_1, saving", COUNTS)
def test_parameter_counts_and_savings_of_the_published_models(model, targets, rank_1, lora_1, saving):
    assert trainable("gfa", model, targets, 1) == rank_1
    assert trainable("gfa", model, targets, 16) == 16 * rank_1
    assert trainable("lora", model, targets, 1) == lora_1 and round(lora_1 / rank_1, 2) == saving


@pytest.mark.parametrize("model, targets, rank_1, lora_1, saving", COUNTS)
def test_the_half_rank_anchor_is_rank_2_at_0_3_of_lora_1(model, targets, rank_1, lora_1, saving):
    assert trainable("gfa", model, targets, 8, match_lora=0.3) == 2 * rank_1 <= 0.3 * lora_1 < 3 * rank_1


def test_match_lora_is_the_largest_rank_in_the_budget():
    assert trainable("gfa", "RoBERTa-large", "query,value", 1, match_lora=8) == 8 * 98_304 // 14_189 * 14_189
    assert gfa.rank_within(2.0, 16, 4) == 1 and gfa.rank_within(4.0, 16, 4) == 2      # an exact fit counts
    with pytest.raises(ValueError, match="match_lora 0.1 allows 9830 parameters, rank 1 has 14189"):
        trainable("gfa", "RoBERTa-large", "query,value", 1, match_lora=0.1)


@pytest.mark.parametrize("n", [4, 9, 16])
def test_eq_1_the_saving_is_root_n_for_equal_square_modules(n):
    lora_1 = n * 2 * 60
    assert lora_1 / sum(gfa.fold(n * 60 * 60)) == pytest.approx(n ** 0.5)


# ---------------------------------------------------------------------- incomparability (§2, §3)

def rank(W):
    return torch.linalg.matrix_rank(W.detach()).item()


def refolded(model):
    """The whole rows of M, put together again from the modules' updates."""
    vec, k = torch.cat([layer.delta().flatten() for layer in model.layers]), model.adapter.lora_A.shape[1]
    return vec[:len(vec) // k * k].view(-1, k)


def test_a_single_row_can_hold_a_whole_full_rank_module():
    """Where p q <= k, as in this toy: the first row of a rank-1 M is an invertible 3 x 3 update."""
    _, model = injected(rank=1, shapes=((3, 3), (10, 9)))
    with torch.no_grad():
        model.adapter.lora_B.zero_()[0] = 1
    assert model.layers[0].last == 1 and rank(model.layers[0].delta()) == 3
    assert rank(refolded(model)) == 1


def test_at_realistic_sizes_shifted_windows_reach_full_local_rank():
    """No row holds a module (p q > k); its rows of M wrap at another width than its own: that is enough."""
    _, model = injected(rank=1, shapes=((64, 64),) * 48)
    assert gfa.fold(48 * 4096)[1] == 443 < 4096
    assert [rank(layer.delta()) for layer in model.layers] == [64] * 48
    assert rank(refolded(model)) == 1


def test_where_k_is_a_multiple_of_the_width_the_local_rank_stays_low():
    """Four square modules: k = 2 q, so a row of M is two rows of a module: rank 1 becomes rank 2 at most."""
    _, model = injected(rank=1, shapes=((64, 64),) * 4)
    assert gfa.fold(4 * 4096) == (128, 128)
    assert [rank(layer.delta()) for layer in model.layers] == [2] * 4


def test_rank_one_modules_can_be_high_rank_after_global_reshaping():
    torch.manual_seed(0)
    new = dict(dtype=torch.float64)
    deltas = [torch.outer(torch.randn(40, **new), torch.randn(40, **new)) for _ in range(6)]
    m, k = gfa.fold(6 * 1600)
    vec = torch.cat([d.flatten() for d in deltas])
    M = F.pad(vec, (0, m * k - len(vec))).view(m, k)
    assert all(rank(d) == 1 for d in deltas) and rank(M) > 40


# ---------------------------------------------------------------------- cost and precision

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_a_weight_is_kept_for_backward(dtype):
    torch.manual_seed(0)
    model = Net(((96, 96),) * 3).to(dtype)
    gfa.inject(model, ("0", "1", "2"), 2)
    nn.init.normal_(model.adapter.lora_B)
    weights, kept = {layer.base.weight.data_ptr() for layer in model.layers}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(torch.randn(5, 96, dtype=dtype))
    assert any(t.data_ptr() in weights for t in kept)
    assert all(t.numel() < 96 * 96 or t.data_ptr() in weights for t in kept)
    y.float().sum().backward()


def test_the_first_layer_pays_for_no_input_gradient():
    n, (p, q), r = 32, (48, 64), 2
    flops = {}
    for needs in (False, True):
        model = nn.Sequential(nn.Linear(q, p))
        gfa.inject(model, ("0",), r)
        m, k = gfa.fold(p * q)
        y = model(torch.randn(n, q, requires_grad=needs))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        flops[needs] = counter.get_total_flops()
    factors = 2 * 2 * m * r * k                             # dB and dA
    assert flops[False] == 2 * n * p * q + factors
    assert flops[True] == flops[False] + 2 * n * p * q + 2 * m * r * k


def test_a_bf16_base_does_not_round_the_update_away():
    """
    An update of 1e-3 of W's scale: in a bf16 W + Δ most of it is lost. W's own part cancels: x = [z, -z],
    W = [V, V].
    """
    torch.manual_seed(0)
    V, z = torch.randn(64, 128).to(torch.bfloat16), torch.randn(32, 128).to(torch.bfloat16)
    model = nn.Sequential(nn.Linear(256, 64, bias=False)).to(torch.bfloat16)
    model[0].weight.data = W = torch.cat([V, V], 1)
    x = torch.cat([z, -z], 1)
    gfa.inject(model, ("0",), 4)
    with torch.no_grad():
        model.adapter.lora_B.normal_()
        model.adapter.lora_B *= 1e-3 / model[0].delta().std()
    B, A = (p.detach().double().requires_grad_() for p in (model.adapter.lora_B, model.adapter.lora_A))
    exact = x.double() @ gfa.cut(B @ A, 0, W.shape).T
    error = lambda got, want: ((got.double() - want).norm() / want.norm()).item()
    rounded = (W + model[0].delta().to(torch.bfloat16)).detach()
    assert error(x @ rounded.T, exact) > 0.5 and error(model(x), exact) < 0.02
    dy = torch.randn(32, 64).to(torch.bfloat16)
    model(x).backward(dy)
    exact.backward(dy.double())
    assert error(model.adapter.lora_B.grad, B.grad) < 0.01 and error(model.adapter.lora_A.grad, A.grad) < 0.01
    z = x.clone().requires_grad_()                      # the update's own part of dx
    gfa.Product.apply(z, torch.zeros_like(W), *model[0].rows(), 0).backward(dy)
    assert error(z.grad, (dy.double() @ gfa.cut(B @ A, 0, W.shape)).detach()) < 0.02
