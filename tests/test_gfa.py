"""What the GFA paper says, a sentence, an equation or an algorithm line at a time."""
import copy
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import trainable
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
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
    product = lambda x, B, A: gfa.Product.apply(x, W, None, B, A, offset)
    assert torch.autograd.gradcheck(product, (x, B, A), nondet_tol=1e-12)


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
    torch.testing.assert_close(model(x), y)


def test_init_b_is_zero_and_a_has_standard_deviation_sigma():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    for sigma in (0.02, 0.5):
        gfa.inject(model, ("0",), 64, sigma=sigma)
        assert not model.adapter.lora_B.any()
        A, n = model.adapter.lora_A / sigma, model.adapter.lora_A.numel()       # bounds of six sigma
        assert abs(A.pow(4).mean().item() - 3) < 6 * (96 / n) ** 0.5            # normal; uniform has 1.8
        assert abs(A.std().item() - 1) < 6 / (2 * n) ** 0.5 and abs(A.mean()) < 6 / n ** 0.5
        gfa.merge(model)


def test_sigma_is_0_02_where_none_is_given():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    gfa.inject(model, ("0",), 64)
    assert gfa.DEFAULTS["sigma"][0] == 0.02 and abs(model.adapter.lora_A.std().item() - 0.02) < 0.02 * 0.02


@pytest.mark.parametrize("rank", [13, 14])
def test_a_rank_is_at_most_k_and_a_refusal_changes_nothing(rank):
    model = Net()                                   # M is 14 x 12
    with pytest.raises(ValueError, match=f"rank {rank} for a global matrix of 14 x 12, expected 1 to 12"):
        gfa.inject(model, NAMES, rank)
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model.layers)
    assert not hasattr(model, "adapter")
    gfa.inject(model, NAMES, 12)


def test_factors_lie_on_the_device_of_the_weights():
    model = Net().to("meta")
    gfa.inject(model, NAMES, 2)
    assert model.adapter.lora_A.is_meta and model.adapter.lora_B.is_meta


@pytest.mark.parametrize("alpha", [16, 1, 0])
def test_the_scale_is_one_and_there_is_no_dropout(alpha):
    with pytest.raises(ValueError, match="no alpha"):
        gfa.inject(Net(), NAMES, 2, alpha=alpha)
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


@pytest.mark.parametrize("budget", [float("inf"), float("nan"), float("-inf"), -1.0])
def test_a_budget_that_is_no_finite_positive_number_is_one_line_of_error_and_changes_nothing(budget):
    model = Net()
    with pytest.raises(ValueError, match=f"^match_lora {budget:g} allows .* parameters, rank 1 has 26$"):
        gfa.inject(model, NAMES, 2, match_lora=budget)
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model.layers)


@pytest.mark.parametrize("budget, rank", [(0.0, 7), (1.0, 1), (2.0, 3)])
def test_the_rank_that_match_lora_chose_is_read_off_the_adapter(budget, rank):
    model = Net()                                   # Σ (p + q) = 50, m + k = 14 + 12
    gfa.inject(model, NAMES, 7, match_lora=budget)
    assert len(model.adapter.lora_A) == rank


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
    gfa.Product.apply(z, torch.zeros_like(W), None, *model[0].rows()).backward(dy)
    assert error(z.grad, (dy.double() @ gfa.cut(B @ A, 0, W.shape)).detach()) < 0.02


# ---------------------------------------------------------------------- one buffer, bf16, autocast

class Allocations(TorchDispatchMode):
    """The distinct storages of at least `size` entries that operations return, those in `known` left out."""

    def __init__(self, size, known):
        super().__init__()
        self.size, self.known, self.held = size, {t.untyped_storage().data_ptr() for t in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.size:
            self.held.append(out)               # held, so that no address is used twice
        return out

    def count(self):
        return len({t.untyped_storage().data_ptr() for t in self.held} - self.known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_direction_allocates_one_buffer_as_large_as_a_weight(dtype):
    model = nn.Sequential(nn.Linear(48, 40)).to(dtype)
    gfa.inject(model, ("0",), 2)
    x = torch.randn(5, 48, dtype=dtype, requires_grad=True)
    with Allocations(48 * 40, model.state_dict().values()) as forward:
        y = model(x)
    with Allocations(48 * 40, model.state_dict().values()) as backward:
        y.backward(torch.randn(5, 40, dtype=dtype))
    assert (forward.count(), backward.count()) == (1, 1)


def test_the_buffer_is_0_outside_a_module_that_needs_no_input_gradient():
    """Its entries are never computed there; deterministic torch fills what is not written with NaN."""
    base, model = injected()
    B, A = (model.adapter.get_parameter(n).detach().clone().requires_grad_() for n in ("lora_B", "lora_A"))
    assert model.layers[0].last * A.shape[1] > base.layers[0].weight.numel()        # a tail
    assert model.layers[-1].offset > 0                                              # a head
    x, dy = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    z, dz = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        model.layers[0](z).backward(dz)
        model.layers[-1](x).backward(dy)
    finally:
        torch.use_deterministic_algorithms(False)
    vec = (B @ A).flatten()
    ((z @ vec[:70].view(10, 7).T * dz).sum() + (x @ vec[145:160].view(3, 5).T * dy).sum()).backward()
    torch.testing.assert_close(model.adapter.lora_B.grad, B.grad)
    torch.testing.assert_close(model.adapter.lora_A.grad, A.grad)


def test_at_init_a_bf16_layer_with_bias_is_its_linear_to_the_last_bit():
    """In whole numbers every order of a sum gives the same; a second rounding, before the bias, shows."""
    torch.manual_seed(0)
    base = nn.Linear(64, 48).to(torch.bfloat16)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randint(-9, 10, p.shape))
        base.bias *= 5
    model = nn.Sequential(copy.deepcopy(base))
    gfa.inject(model, ("0",), 2)
    x = torch.randint(-9, 10, (100, 64)).to(torch.bfloat16)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, ""), (torch.bfloat16, "forward"),
                                             (torch.float32, "forward"), (torch.float32, "both")])
def test_bf16_and_autocast_keep_a_small_update_in_each_direction(dtype, autocast):
    """
    An update of 1e-3 of W's scale. W = [[V, V], [V, V]] in whole numbers: of [z, -z] and of [d, -d] its own
    part is 0, exactly, and Δ's is all that is left. Of another dy, W's is nearly all.
    """
    torch.manual_seed(0)
    whole = lambda *shape: torch.randint(-4, 5, shape).to(dtype)
    V, z, d = whole(32, 64), whole(24, 64), whole(24, 32)
    model = nn.Sequential(nn.Linear(128, 64, bias=False)).to(dtype)
    model[0].weight.data = W = V.repeat(2, 2)
    gfa.inject(model, ("0",), 4)
    with torch.no_grad():
        model.adapter.lora_B.normal_()
        model.adapter.lora_B *= 3e-3 / model[0].delta().std()
    x = torch.cat([z, -z], 1).requires_grad_()
    for dy in (torch.cat([d, -d], 1), whole(24, 64)):
        B, A, t = (v.detach().double().requires_grad_()
                   for v in (model.adapter.lora_B, model.adapter.lora_A, x))
        want = t @ (W.double() + gfa.cut(B @ A, 0, W.shape)).T
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
            y = model(x)
        assert y.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "both"):
            got = torch.autograd.grad(y, (x, model.adapter.lora_B, model.adapter.lora_A), dy.to(y.dtype))
        exact = torch.autograd.grad(want, (t, B, A), dy.double())
        assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32]
        for one, other in zip((y, *got), (want, *exact)):       # 2^-9 a rounding; W + Δ in bf16 has > 0.5
            assert (one.double() - other).norm() < 0.03 * other.norm()


# ---------------------------------------------------------------------- evaluation

def flops(layer, x, times=1):
    with FlopCounterMode(display=False) as counter:
        for _ in range(times):
            layer(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype, products", [(torch.float32, 1), (torch.float64, 1), (torch.bfloat16, 2)])
def test_evaluation_without_gradient_forms_each_slice_once_and_writes_no_weight(dtype, products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 40)).to(dtype)
    gfa.inject(model, ("0", "1"), 2)
    nn.init.normal_(model.adapter.lora_B)
    layer, x, tensors = model.eval()[1], torch.randn(5, 24, dtype=dtype), copy.deepcopy(model.state_dict())
    formed, read = 2 * (layer.last - layer.first) * 2 * gfa.fold(1920)[1], products * 2 * 5 * 24 * 40
    want = layer(x)
    with torch.no_grad():
        assert flops(layer, x) == formed + read         # after a forward with gradient: eval() comes first
        assert flops(layer.eval(), x) == formed + read
        assert flops(layer, x, 3) == 3 * read
    with torch.inference_mode():
        assert flops(layer, x, 2) == 2 * read
        assert torch.equal(layer(x), want)
    assert list(model.state_dict()) == list(tensors)
    assert all(map(torch.equal, model.state_dict().values(), tensors.values()))


def test_nothing_is_kept_in_training_with_gradient_or_after_train():
    _, model = injected()
    layer, x = model.layers[0], torch.randn(5, 7, dtype=torch.float64)
    for mode in (False, True):                              # what was kept goes at eval(), too
        with torch.no_grad():
            layer.eval()(x)
            kept = weakref.ref(layer.kept[2][0])
        layer.train(mode)
        assert kept() is None
    with torch.no_grad():
        assert flops(layer, x, 3) == 3 * flops(layer, x)    # train mode
    layer.eval()
    assert flops(layer, x, 3) == 3 * flops(layer, x)
    with torch.no_grad():
        layer.eval()(x)
        kept = weakref.ref(layer.kept[2][0])
    layer(x)
    assert kept() is None                                   # a forward with gradient


def step(make, **own):
    """Training in eval mode, with no train() or eval() between; torch does not count a fused step."""
    def change(model, x):
        optimizer = make(model.adapter.parameters(), 0.1, **own)
        loss = model(x).square().sum()
        with torch.no_grad():
            model(x)
        loss.backward()
        optimizer.step()
    return change


@torch.no_grad()
def fill(tensor):
    tensor.normal_()


def load(model, x, **how):
    model.load_state_dict({key: t + 1 for key, t in model.state_dict().items()}, **how)


def replace(model, x):
    model.adapter.lora_A = nn.Parameter(model.adapter.lora_A.detach() + 1)


def swap(model, x):
    """As averages of weights are swapped in: not counted, but an evaluation begins with eval()."""
    model.adapter.lora_B.data.add_(1)
    model.eval()


@torch.inference_mode()
def infer(model, x):
    model.adapter.lora_B.add_(1)


CHANGES = {
    "B in place": lambda model, x: fill(model.adapter.lora_B),
    "A in place": lambda model, x: fill(model.adapter.lora_A),
    "W in place": lambda model, x: fill(model.layers[1].base.weight),
    "in inference mode": infer,
    "load_state_dict": load, "load_state_dict, assign": lambda model, x: load(model, x, assign=True),
    "load_state_dict of the adapter": lambda model, x: load(model.adapter, x),
    "another parameter": replace,
    "another W": lambda model, x: setattr(model.layers[1].base.weight, "data", torch.randn(5, 10).double()),
    "another A": lambda model, x: setattr(model.adapter.lora_A, "data", 2 * model.adapter.lora_A.data),
    "data, then eval()": swap,
    "SGD": step(torch.optim.SGD), "AdamW": step(torch.optim.AdamW, foreach=False),
    "foreach": step(torch.optim.AdamW, foreach=True), "fused": step(torch.optim.AdamW, fused=True),
    ".to() there and back": lambda model, x: model.to(torch.bfloat16).to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_never_stale(change):
    base, model = injected()
    x = torch.randn(6, 7, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before) and all(layer.kept for layer in model.layers)
    CHANGES[change](model, x)
    with torch.no_grad():
        after = [model(x) for _ in range(2)]
        for layer, plain in zip(model.layers, base.layers):
            plain.load_state_dict(layer.base.state_dict())
        want = naive(base, model.adapter.lora_B, model.adapter.lora_A, x)
    assert (want - before).abs().max() > 1e-6
    for y in after:
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-12)


def test_a_weight_at_the_address_of_a_former_one_is_told_from_it():
    """What is kept holds the memory of what it was formed from, so no other tensor can come to lie there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    gfa.inject(model, ("0",), 2)
    layer, W, x = model.eval()[0], model[0].base.weight, torch.randn(3, 512)
    with torch.no_grad():
        for _ in range(20):
            layer(x)
            address, W.data = W.data_ptr(), torch.empty(0)
            others = [torch.randn(512, 512) for _ in range(8)]
            W.data = next((t for t in others if t.data_ptr() == address), others[0])
            del others
            assert torch.equal(layer(x), F.linear(x, W))


def test_a_dtype_changed_and_a_copy_changed_are_not_stale_either():
    _, model = injected()
    x = torch.randn(6, 7, dtype=torch.float64)
    with torch.no_grad():
        y = model.eval()(x)
        other = copy.deepcopy(model)
        other.adapter.lora_B.zero_()
        assert (other(x) - y).abs().max() > 1e-3 and torch.equal(model(x), y)
        torch.testing.assert_close(model.float()(x.float()), y.float())


def test_autocast_and_tensors_that_count_no_writes_are_computed_anew():
    torch.manual_seed(0)
    x = torch.randn(6, 24)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(24, 24)).eval()
        gfa.inject(model, ("0",), 2)
        layer = model.eval()[0]
        before = layer(x)
        model.adapter.lora_B.normal_()
        torch.testing.assert_close(layer(x), F.linear(x, layer.base.weight + layer.delta(), layer.base.bias))
        assert not torch.equal(layer(x), before)
    model = nn.Sequential(nn.Linear(24, 24))
    gfa.inject(model, ("0",), 2)
    nn.init.normal_(model.adapter.lora_B)
    layer = model.eval()[0]
    with torch.no_grad():
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x)
            assert torch.equal(got, gfa.Product.apply(x, layer.base.weight, layer.base.bias, *layer.rows()))


def test_compiled_layers_are_evaluated_without_a_graph_for_each():
    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(12)))
    gfa.inject(model, tuple(map(str, range(12))), 2)
    nn.init.normal_(model.adapter.lora_B)
    layers, x, counter = model.eval()[:12], torch.randn(5, 24), CompileCounter()
    with torch.no_grad():
        want = layers(x)
        for layer in layers:
            layer.compile(backend=counter, dynamic=True)
        torch.testing.assert_close(layers(x), want)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="dynamo of torch 2.6 mixes up sizes in backward")
def test_twelve_layers_of_one_shape_compile_to_two_graphs():
    """One for the first, which begins at 0, and one for all others: dynamo takes only sizes 0 and 1 apart."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(12)))
    gfa.inject(model, tuple(map(str, range(12))), 2)
    nn.init.normal_(model.adapter.lora_B)
    layers, counter = model[:12], CompileCounter()
    assert all(layer.offset > 1 and layer.first > 1 for layer in layers[1:])
    x = torch.randn(5, 24, requires_grad=True)
    want = layers(x)
    wanted = torch.autograd.grad(want.sum(), (x, *model.adapter.parameters()))
    for layer in layers:
        layer.compile(backend=counter, dynamic=True)
    got = layers(x)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), (x, *model.adapter.parameters())), wanted):
        torch.testing.assert_close(g, w)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_second_derivative_is_refused_not_wrong():
    """Autograd does not see into backward."""
    _, model = injected()
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    dx, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ---------------------------------------------------------------------- devices, dtypes, what is refused

@pytest.mark.parametrize("sigma", [0.0, -0.02, float("nan")])
def test_a_sigma_that_is_not_above_0_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma {sigma}, expected above 0"):
        gfa.inject(Net(), NAMES, 2, sigma=sigma)


def test_train_without_an_argument_is_training():
    _, model = injected()
    assert model.layers[0].eval().train().training and not model.layers[0].train(False).training


def test_one_tensor_that_counts_no_writes_is_enough_to_keep_nothing():
    model, x = nn.Sequential(nn.Linear(24, 24)), torch.randn(6, 24)
    gfa.inject(model, ("0",), 2)
    layer = model.eval()[0]
    with torch.inference_mode():
        model.adapter.lora_B = nn.Parameter(torch.randn_like(model.adapter.lora_B), requires_grad=False)
        assert [t.is_inference() for t in (layer.base.weight, model.adapter.lora_B)] == [False, True]
        want = F.linear(x, layer.base.weight + layer.delta(), layer.base.bias)
        torch.testing.assert_close(layer(x), want)
    assert layer.kept is False


def test_what_is_kept_holds_the_memory_that_it_was_formed_from():
    _, model = injected()
    layer = model.eval().layers[0]
    with torch.no_grad():
        layer(torch.randn(5, 7).double())
    sources = layer.base.weight, *model.adapter.parameters()
    before = [t.data_ptr() for t in sources]
    for t in sources:
        t.data = t.data.clone()
    assert [t.data_ptr() for t in layer.kept[1]] == before != [t.data_ptr() for t in sources]
