"""The methods that the papers compare with: what each paper or code says, against peft where it has them."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import trainable

import checkpoint

TARGETS = ("q_proj", "v_proj", "down_proj")
MODELS = ("LLaMA2-7B", "LLaMA2-13B", "LLaMA3-8B", "Qwen2.5-1.5B")
dora, pissa, milora, rosa, rasa, mora, denselora, spiel = map(checkpoint.load_method, (
    "dora", "pissa", "milora", "rosa", "rasa", "mora", "denselora", "spiel"))


def llama():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2)).double().eval()


def in_peft(model, **config):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(TARGETS), **config)).double()


def linear(method, o=20, i=24, rank=4, **own):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(i, o).double())
    W = model[0].weight.detach().clone()
    method.inject(model, ("0",), rank, **own)
    return model, model[0], W


def noise(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def dense(layer, x, W_eff):
    return x @ W_eff.T + layer.base.bias


# ------------------------------------------------------------------------------------ DoRA

@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_is_pefts_in_outputs_and_gradients_and_in_where_its_one_mask_acts(dropout):
    ours, theirs = llama(), in_peft(llama(), r=4, lora_alpha=8, use_dora=True, lora_dropout=dropout)
    dora.inject(ours, TARGETS, 4, 8, dropout)
    noise(ours)
    names = dict(lora_A="lora_A.default.weight", lora_B="lora_B.default.weight",
                 lora_m="lora_magnitude_vector.default.weight")
    other = dict(theirs.named_parameters())

    def twin(name):
        module, _, leaf = name.rpartition(".")
        return other[f"base_model.model.{module}.{names[leaf]}"]

    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.requires_grad:
                twin(name).copy_(p)
    ids, results = torch.randint(61, (2, 9)), []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(1)
        logits = model(ids).logits
        logits.square().sum().backward()
        results.append(logits)
    torch.testing.assert_close(*results)
    assert (results[0] - llama()(ids).logits).abs().max() > 0.1
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, twin(name).grad)


def test_dora_starts_with_the_row_norms_in_fp32_and_its_count_is_loras_and_out():
    layer = linear(dora)[1]
    torch.testing.assert_close(layer.lora_m, layer.base.weight.norm(dim=1))
    half = nn.Sequential(nn.Linear(24, 20).to(torch.bfloat16))
    dora.inject(half, ("0",), 4)
    assert half[0].lora_m.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps                                            # a sum of 24 squares
    torch.testing.assert_close(half[0].lora_m, half[0].base.weight.float().norm(dim=1), rtol=24 * eps, atol=0)
    counts = [trainable("dora", m, "attention", 8) for m in MODELS]
    assert counts == [8_912_896, 13_926_400, 7_143_424, 2_279_424]


# ------------------------------------------------------------------------------------ PiSSA, MiLoRA

@pytest.mark.parametrize("alpha", [4, 8])
def test_pissa_has_pefts_factors_and_residual(alpha):
    """
    peft decomposes in fp32: the exact triplets of W + E with |E| of some eps σ₁, and E turns the leading
    subspace, and with it the product, by up to |E| σ₁ / (σ₄ - σ₅).
    """
    ours, theirs = llama(), in_peft(llama().float(), r=4, lora_alpha=alpha, init_lora_weights="pissa")
    pissa.inject(ours, TARGETS, 4, alpha)
    ids = torch.randint(61, (2, 9))
    first = llama()
    torch.testing.assert_close(ours(ids).logits, first(ids).logits)
    for name, layer in pissa.layers(ours).items():
        other = theirs.get_submodule("base_model.model." + name)
        S = torch.linalg.svdvals(first.get_submodule(name).weight)
        near = dict(rtol=0, atol=(8 * torch.finfo(torch.float32).eps * S[0] ** 2 / (S[3] - S[4])).item())
        torch.testing.assert_close(layer.base.weight, other.base_layer.weight, **near)
        torch.testing.assert_close(layer.delta(), other.get_delta_weight("default"), **near)
        torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0))  # √(Σ/s) on each side


@pytest.mark.parametrize("method, take", [(pissa, slice(0, 4)), (milora, slice(16, 20))])
def test_the_triplets_that_train(method, take):
    model, layer, W = linear(method)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    part = U[:, take] * S[take] @ Vh[take]
    torch.testing.assert_close(layer.delta(), part)
    torch.testing.assert_close(layer.base.weight, W - part)
    assert layer.scaling == 1                                                       # alpha = r
    noise(model)
    A, B = method.factors(model)["0"]
    assert len(A) == 8
    x = torch.randn(5, 24).double()
    torch.testing.assert_close(dense(layer, x, W + B @ A), model(x))                # a LoRA of the first W
    method.merge(model)
    torch.testing.assert_close(model[0].weight, W + B @ A)


def test_pissas_fast_start_is_nearly_the_exact_one(monkeypatch):
    """On a weight whose singular values halve: 16 iterations multiply a random start's error by 2⁻³³."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 20).double())[0] for n in (20, 24))

    def start(**own):
        model = nn.Sequential(nn.Linear(24, 20).double())
        with torch.no_grad():
            model[0].weight.copy_(U * 0.5 ** torch.arange(20) @ V.T)
        pissa.inject(model, ("0",), 4, **own)
        return model[0].delta()

    seen, real = [], torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank",
                        lambda W, rank, niter: seen.append((rank, niter)) or real(W, rank, niter))
    exact, fast = start(), start(niter=16)
    assert seen == [(4, 16)] and (exact - fast).norm() < 1e-4 * exact.norm()
    with pytest.raises(ValueError, match="niter -1"):
        linear(pissa, niter=-1)


# ------------------------------------------------------------------------------------ RoSA

def test_rosa_trains_a_random_window_of_neighbouring_triplets_and_draws_another_of_the_merged_weight():
    """By products: the sign of a pair of vectors is each decomposition's own."""
    places = set()
    for seed in range(40):
        torch.manual_seed(seed)
        W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()
        A, B = rosa.window(W, 4)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        place = next(p for p in range(3) if torch.allclose(B @ A, U[:, p:p + 4] * S[p:p + 4] @ Vh[p:p + 4]))
        torch.testing.assert_close(B.T @ B, torch.eye(4).double())
        torch.testing.assert_close(A @ A.T, S[place:place + 4].square().diag())         # all of Σ is in A
        places.add(place)
    assert places == {0, 1, 2}                                                          # the last one, too


def test_rosa_reinit_merges_and_drops_the_moments():
    model, layer, W = linear(rosa)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        model(torch.randn(5, 24).double()).square().sum().backward()
        optimizer.step()
        noise(model)
        merged, old = (layer.base.weight + layer.delta()).detach(), layer.delta().detach()
        rosa.reinit(model, optimizer)
        torch.testing.assert_close(layer.base.weight + layer.delta(), merged)
        S, found = torch.linalg.svdvals(merged), layer.lora_A.norm(dim=1)
        assert any(torch.allclose(found, S[p:p + 4]) for p in range(17))
        assert not torch.allclose(layer.delta(), old)
        torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(4).double())
        assert not optimizer.state
    with pytest.raises(ValueError, match="no alpha"):
        linear(rosa, alpha=8)


# ------------------------------------------------------------------------------------ RaSA

def test_rasa_is_its_formula_and_shares_one_pool_a_kind():
    model = llama()
    rasa.inject(model, TARGETS, 4, 6, k=1)
    noise(model)
    assert sorted(model.adapter) == [f"kind-model-layers-{leaf}" for leaf in (
        "mlp-down_proj", "self_attn-q_proj", "self_attn-v_proj")]
    for block in model.model.layers:
        layer, pool = block.self_attn.q_proj, model.adapter["kind-model-layers-self_attn-q_proj"]
        assert layer.pool is pool and pool.lora_A.shape == (2, 32) and layer.lora_A.shape == (3, 32)
        B, A = torch.cat((layer.lora_B, pool.lora_B), 1), torch.cat((layer.lora_A, pool.lora_A))
        torch.testing.assert_close(layer.delta(), B @ torch.diag(layer.lora_d) @ A)
    names = [name for name in [*dict(model.named_parameters()), *model.state_dict()] if "lora_" in name]
    assert len(names) == 2 * (3 * 2 + 2 * 3 * 3) and not any("pool" in name for name in names)
    fresh = llama()
    rasa.inject(fresh, TARGETS, 4, 6)
    d = fresh.model.layers[0].self_attn.q_proj.lora_d
    torch.testing.assert_close(d, torch.tensor([1, 1, 1, 1.5, 1.5]).double())
    counts = [trainable("rasa", m, "attention", 8) for m in MODELS]
    assert counts == [8_393_600, 13_114_720, 6_820_736, 2_182_992]


def test_kinds_are_told_apart_and_any_module_can_own_the_pools():
    assert rasa.kind("model.layers.3.mlp.up_proj") == "kind-model-layers-mlp-up_proj"
    assert rasa.kind("model.layers.3.mlp_up.proj") != "kind-model-layers-mlp-up_proj"
    for method in (rasa, denselora):
        inner = nn.Sequential()
        inner.add_module("values", nn.Linear(8, 8))             # a name that nn.ModuleDict has itself
        model, x = nn.Sequential(nn.Linear(8, 8), inner).double(), torch.randn(3, 8).double()
        y = model(x)
        method.inject(model, ("0", "values"), 4)
        torch.testing.assert_close(model(x), y)
        noise(model)
        assert not torch.allclose(model(x), y)


def test_rasa_refuses_what_cannot_be_shared():
    model = nn.ModuleDict({"0": nn.ModuleDict(dict(q=nn.Linear(8, 8))),
                           "1": nn.ModuleDict(dict(q=nn.Linear(8, 12)))})
    for method in (rasa, denselora):
        with pytest.raises(ValueError, match=r"1.q is \(12, 8\), others of its kind \(8, 8\)"):
            method.inject(copy.deepcopy(model), ("q",), 4)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k {k}, expected 1 to rank - 1 = 3"):
            linear(rasa, k=k)


# ------------------------------------------------------------------------------------ MoRA

def mora_by_loops(x, M, o, type):
    """One x (in): blocks filled up with x's beginning; type 1 sums and repeats, type 6 rotates each block."""
    side = len(M)
    n = -(-len(x) // side)
    blocks = [[x[(j * side + c) % len(x)] for c in range(side)] for j in range(n)]
    if type == 1:
        h = M @ torch.tensor([sum(block[c] for block in blocks) for c in range(side)]).double()
        return torch.stack([h[c % side] for c in range(o)])
    out = []
    for j, block in enumerate(blocks):
        turned = list(block)
        for c in range(side // 2):
            angle = torch.tensor(j * 10000 ** (-2 * c / side)).double()
            a, b = block[c], block[c + side // 2]
            turned[c] = a * angle.cos() - b * angle.sin()
            turned[c + side // 2] = b * angle.cos() + a * angle.sin()
        out += (M @ torch.tensor(turned).double()).tolist()
    return torch.tensor([out[c % len(out)] for c in range(o)]).double()


@pytest.mark.parametrize("type", [1, 6])
@pytest.mark.parametrize("o, i", [(20, 24), (24, 20), (30, 13), (16, 64), (64, 16)])
def test_mora_is_its_loops_for_square_tall_and_wide_weights(type, o, i):
    model, layer, W = linear(mora, o, i, rank=3, type=type)
    noise(model)
    x = torch.randn(i).double()
    torch.testing.assert_close(model(x) - layer.base(x), mora_by_loops(x, layer.lora_M.detach(), o, type))


def test_moras_matrix_has_loras_budget_and_starts_at_zero():
    assert mora.square(8, 4096, 4096, 6) == 256 == mora.square(8, 4096, 4096, 1)    # 65,536 = 8 (4096 + 4096)
    assert mora.square(4, 60, 60, 1) == 22
    assert mora.square(3, 160, 160, 1) == 31 and mora.square(3, 160, 160, 6) == 30
    assert not linear(mora)[1].lora_M.any()
    model, layer, _ = linear(mora, 64, 64, 4)
    noise(model)
    assert torch.linalg.matrix_rank(layer.delta()) == 64                            # LoRA's would be 4
    for own, message in ((dict(alpha=4), "no alpha"), (dict(type=2), "type 2, expected one of 1, 6")):
        with pytest.raises(ValueError, match=message):
            linear(mora, **own)


# ------------------------------------------------------------------------------------ DenseLoRA

def test_denselora_is_its_formula_and_only_the_decoder_has_a_gradient_at_first():
    model = llama()
    denselora.inject(model, TARGETS, 4)
    layers = [block.self_attn.q_proj for block in model.model.layers]
    shared = model.adapter["kind-model-layers-self_attn-q_proj"]
    assert all(layer.shared is shared for layer in layers) and layers[0].scaling == 2
    model(torch.randint(61, (2, 9))).logits.square().sum().backward()
    assert shared.lora_B.grad.any() and not shared.lora_A.grad.any() and not layers[0].lora_M.grad.any()
    noise(model)
    x = torch.randn(7, 32).double()
    for layer in layers:
        want = torch.stack([layer.base.weight @ v + 2 * F.gelu(
            shared.lora_B @ layer.lora_M @ F.gelu(shared.lora_A @ v)) for v in x])
        torch.testing.assert_close(layer(x), want)
    counts = [trainable("denselora", m, "q_proj,k_proj,v_proj,up_proj,down_proj", 64) for m in MODELS[:3]]
    assert counts == [4_161_536, 5_210_112, 4_194_304]


def test_denselora_drops_in_three_places():
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(a=nn.Linear(6, 5).double()))
    denselora.inject(model, ("a",), 3, dropout=0.5)
    noise(model)
    calls = []
    model["a"].dropout.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[-1]))
    model["a"](torch.randn(4, 6).double())
    assert calls == [6, 3, 5]


# ------------------------------------------------------------------------------------ SpIEL

def spiel_layer(o=12, i=10, rank=2, **own):
    model, layer, W = linear(spiel, o, i, rank, **own)
    params = [p for p in model.parameters() if p.requires_grad]
    return model, layer, W, spiel.make_optimizer(params, 1e-2, 0.0)


def test_spiel_is_pefts_shira_and_its_gradients_those_of_the_dense_weight():
    peft = pytest.importorskip("peft")
    model, layer, W, _ = spiel_layer()
    noise(model)
    assert len(layer.lora_values) == 2 * (12 + 10) == len(set(layer.lora_places.tolist()))
    x = torch.randn(7, 10).double().requires_grad_()
    full = (W + layer.delta().detach()).requires_grad_()
    want = dense(layer, x, full)
    torch.testing.assert_close(model(x), want)
    dy = torch.randn_like(want)
    dx, dW = torch.autograd.grad(want, (x, full), dy)
    got = torch.autograd.grad(model(x), (x, layer.lora_values), dy)
    torch.testing.assert_close(got[0], dx)
    torch.testing.assert_close(got[1], dW.flatten()[layer.lora_places])
    mask = torch.zeros(120)
    mask[layer.lora_places] = 1
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.base)), peft.ShiraConfig(
        r=2, target_modules=["0"], mask_type="random", init_weights=True))
    other = theirs.base_model.model[0]
    other.shira_indices["default"] = torch.stack((layer.lora_places // 10, layer.lora_places % 10)).int()
    other.shira_weight["default"].data = layer.lora_values.detach().clone()
    torch.testing.assert_close(theirs.double()(x), model(x))


@pytest.mark.parametrize("T", [4, 5, 6, 25, 26])
def test_no_change_of_places_comes_after_the_last_step(T):
    model, layer, _, optimizer = spiel_layer()
    for t in range(1, T + 1):
        model(torch.randn(10).double()).square().sum().backward()           # one vector will do
        spiel.observe(model, t, T)
        optimizer.step()
        optimizer.zero_grad()
    assert (layer.lora_values != 0).all() or T == 6 and (layer.lora_values != 0).double().mean() > 0.9


def test_sparse_adamw_is_adam_at_equal_ages_and_counts_from_each_elements_own_start():
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(6).double()) for _ in range(2))
    ours, theirs = spiel.SparseAdamW([p], 1e-2), torch.optim.Adam([q], 1e-2)
    for _ in range(5):
        p.grad = q.grad = torch.randn(6).double()
        ours.step(), theirs.step()
    torch.testing.assert_close(p, q)
    with torch.no_grad():
        for key in ("exp_avg", "exp_avg_sq", "age"):
            ours.state[p][key][2] = 0                           # element 2 is new
        before = p.clone()
        p.grad = torch.full((6,), 0.3).double()
        ours.step()
    assert (before - p)[2].item() == pytest.approx(1e-2)        # a first step is lr · sign(g)
    decayed = nn.Parameter(torch.ones(1).double())
    decayed.grad = torch.zeros(1).double()
    spiel.SparseAdamW([decayed], 0.1, weight_decay=0.5).step()
    assert decayed.item() == pytest.approx(1 - 0.1 * 0.5)


def test_spiels_schedule_of_s_20_a_5_t_100():
    """Gathered in steps 1 - 5, 20 - 25, 40 - 45, ..; changed after 5 (all), 25, 45, .. by 0.2 (1 - t / T)."""
    model, layer, _, optimizer = spiel_layer()
    gathered, changes, real = [], {}, layer.reselect
    layer.reselect = lambda share, *a: changes.setdefault(t, share) and real(share, *a)
    for t in range(1, 101):
        if layer.gathering:
            gathered.append(t)
        model(torch.randn(4, 10).double()).square().sum().backward()
        spiel.observe(model, t, 100)
        optimizer.step()
        optimizer.zero_grad()
    assert gathered == [*range(1, 6), *range(20, 26), *range(40, 46), *range(60, 66), *range(80, 86)]
    assert changes == pytest.approx({5: 1, 25: 0.15, 45: 0.11, 65: 0.07, 85: 0.03})


@pytest.mark.parametrize("share, micro", [(1.0, 1), (0.5, 3)])
def test_the_smallest_values_make_room_for_the_largest_summed_gradients(share, micro):
    """By loops over dense gradients; the choice is that of whole steps, whatever their micro-batches."""
    model, layer, W, optimizer = spiel_layer()
    noise(model)
    k, sums, squares, candidates = len(layer.lora_places), 0, 0, None
    for t in range(1, 4):
        x = torch.randn(6, 10).double()
        full = (W + layer.delta().detach()).requires_grad_()
        g, = torch.autograd.grad(dense(layer, x, full).square().sum(), full)
        g = g.flatten()
        candidates = g.abs().topk(k).indices.tolist() if candidates is None else candidates
        sums, squares = sums + g, squares + g * g
        for part in x.chunk(micro):
            model(part).square().sum().backward()
        spiel.observe(model, t, 10**9)
        optimizer.step()
        optimizer.zero_grad()
    layer.end_step()
    values, places = layer.lora_values.detach().clone(), layer.lora_places.tolist()
    state = optimizer.state[layer.lora_values]
    before = {key: value.clone() for key, value in state.items()}
    order = sorted(range(k), key=lambda s: abs(values[s].item()))
    dropped, kept = order[:int(k * share)], {places[s] for s in order[int(k * share):]}
    grown = sorted((c for c in candidates if c not in kept), key=lambda c: -abs(sums[c].item()))
    grown = grown[:len(dropped)]
    again = {places[s] for s in dropped} & set(grown)
    with torch.no_grad():
        layer.reselect(share, state, (0.9, 0.999))
    free, new = [s for s in dropped if places[s] not in again], [c for c in grown if c not in again]
    want = dict(zip(free, new))
    assert new and again if share == 1 else new
    now = layer.lora_places.tolist()
    for s in range(k):
        if s in want:
            c = want[s]
            assert now[s] == c and layer.lora_values[s] == 0 and state["age"][s] == 3
            assert state["exp_avg"][s].item() == pytest.approx(sums[c].item() / 3 * (1 - 0.9 ** 3))
            assert state["exp_avg_sq"][s].item() == pytest.approx(squares[c].item() / 3 * (1 - 0.999 ** 3))
        else:
            assert now[s] == places[s] and layer.lora_values[s] == values[s]
            assert all(state[key][s] == before[key][s] for key in before)
    assert len(set(now)) == k


def test_spiel_keeps_small_values_on_a_bf16_base_and_nothing_weight_sized_for_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48).to(torch.bfloat16))
    spiel.inject(model, ("0",), 2)
    layer, x = model[0], torch.randn(5, 64).to(torch.bfloat16)
    with torch.no_grad():
        layer.lora_values.fill_(1e-4)                           # W + 1e-4 is W in bf16, mostly
    change = (model(x) - layer.base(x)).float()
    assert change.abs().max() > 0
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x.requires_grad_())
    own = {p.data_ptr() for p in model.parameters()}
    assert kept and not [t.shape for t in kept if t.numel() >= 48 * 64 and t.data_ptr() not in own]
    y.float().sum().backward()
    assert layer.lora_values.grad.dtype == torch.float32


def test_spiels_budget_and_bad_settings():
    assert trainable("spiel", "LLaMA3-8B", "attention", 8) == trainable("lora", "LLaMA3-8B", "attention", 8)
    assert len(linear(spiel, density=0.1)[1].lora_values) == 48
    for own, message in (
            (dict(alpha=4), "no alpha and no dropout"), (dict(dropout=0.1), "no alpha and no dropout"),
            (dict(density=1.5), "density 1.5"), (dict(reselection_rate=-1.0), "reselection_rate -1.0"),
            (dict(accumulation_steps=20), "accumulation_steps 20, expected 1 to reselection_steps - 1 = 19")):
        with pytest.raises(ValueError, match=message):
            linear(spiel, **own)
