"""What the GraLoRA paper says, and peft's layer as the oracle."""
import copy
import json
import math

import pytest
import torch
import torch.nn as nn
from conftest import trainable
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import gralora

KINDS = [(1, 0), (2, 0), (4, 0), (2, 2), (4, 3), (1, 2)]       # k, hybrid of rank 4 + hybrid


def layer(k, hybrid=0, rank=None, alpha=9, dropout=0.0, o=36, i=24, seed=0):
    torch.manual_seed(seed)
    rank = rank or 4 + hybrid
    ours = gralora.GraLoRALinear(nn.Linear(i, o), rank, alpha, dropout, k, hybrid).double()
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return ours


@pytest.mark.parametrize("k, hybrid", KINDS)
def test_eq_5_block_by_block(k, hybrid):
    ours = layer(k, hybrid)
    A, B, p, o, i = ours.lora_A, ours.lora_B, 4 // k, 36 // k, 24 // k
    want = torch.zeros(36, 24).double()
    for j in range(k):                          # output block
        for n in range(k):                      # input block
            A_jn = A[j * p:(j + 1) * p, n * i:(n + 1) * i]          # the paper's A_jnᵀ (r/k, N/k)
            B_jn = B[j * o:(j + 1) * o, n * p:(n + 1) * p]          # (M/k, r/k)
            want[j * o:(j + 1) * o, n * i:(n + 1) * i] = B_jn @ A_jn
    if hybrid:
        want += ours.lora_B_general @ ours.lora_A_general           # §3.5
    want *= 9 / (4 + hybrid)                                        # α / r, r the total
    torch.testing.assert_close(ours.delta(), want)
    x = torch.randn(2, 5, 24).double()
    torch.testing.assert_close(ours(x), ours.base(x) + x @ want.T)


def peft_layer(ours, k, hybrid, alpha=9):
    peft = pytest.importorskip("peft")
    config = peft.GraloraConfig(target_modules=["0"], r=4, alpha=alpha, gralora_k=k, hybrid_r=hybrid)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(24, 36)).double(), config).double()
    q = theirs.base_model.model[0]
    with torch.no_grad():                       # the header's mapping of tensors
        q.base_layer.load_state_dict(ours.base.state_dict())
        q.gralora_A["default"].copy_(ours.lora_A.unflatten(1, (k, -1)).permute(1, 2, 0))
        q.gralora_B["default"].copy_(ours.lora_B.unflatten(0, (k, -1)).mT)
        if hybrid:
            q.gralora_A_general["default"].weight.copy_(ours.lora_A_general)
            q.gralora_B_general["default"].weight.copy_(ours.lora_B_general)
    return theirs, q


@pytest.mark.parametrize("k, hybrid", KINDS)
def test_it_is_pefts_gralora(k, hybrid):
    ours = layer(k, hybrid)
    theirs, q = peft_layer(ours, k, hybrid)
    x = torch.randn(2, 5, 24).double()
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.delta(), q.get_delta_weight("default"), rtol=0, atol=1e-6)
    y.square().sum().backward()
    z.square().sum().backward()
    A, B = q.gralora_A["default"], q.gralora_B["default"]
    grad = A.grad.permute(2, 0, 1).flatten(1), B.grad.mT.flatten(0, 1)
    torch.testing.assert_close((ours.lora_A.grad, ours.lora_B.grad), grad, rtol=1e-9, atol=1e-6)
    if hybrid:
        torch.testing.assert_close(ours.lora_A_general.grad, q.gralora_A_general["default"].weight.grad)
        torch.testing.assert_close(ours.lora_B_general.grad, q.gralora_B_general["default"].weight.grad)
    model = nn.Sequential(ours)
    gralora.merge(model)
    torch.testing.assert_close(model[0].weight, theirs.merge_and_unload()[0].weight, rtol=0, atol=1e-6)


def test_k_1_is_lora():
    lora = checkpoint.load_method("lora")
    ours, x = layer(1), torch.randn(4, 24).double()
    theirs = lora.LoRALinear(ours.base, 4, 9, 0.0).double()
    with torch.no_grad():
        theirs.lora_A.copy_(ours.lora_A)
        theirs.lora_B.copy_(ours.lora_B)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.delta(), theirs.delta())


@pytest.mark.parametrize("k, hybrid", KINDS)
def test_the_rank_is_k_times_the_blocks_rank_plus_the_general_part(k, hybrid):
    ours = layer(k, hybrid)
    A, B = ours.factors()
    assert len(A) == B.shape[1] == 4 * k + hybrid == torch.linalg.matrix_rank(ours.delta())


@pytest.mark.parametrize("k, rank", [(1, 128), (2, 256), (4, 512), (8, 1024)])
def test_table_4_rank_128_on_random_factors(k, rank):
    torch.manual_seed(0)
    A, B = torch.randn(128, 1088), torch.randn(1088, 128)
    A, B = gralora.expand(A, B, gralora.contiguous(1088, k), gralora.contiguous(1088, k), k)
    assert torch.linalg.matrix_rank(B.double() @ A.double()) == rank


def test_fig_5_the_sparse_factors_hold_every_block_once():
    """
    A_ij at block (j, j + (i - 1) k) of A_GraLoRA (N x kr), B_ij at (i, j + (i - 1) k) of B_GraLoRA, blocks
    of r/k wide.
    """
    k, p, o, i = 3, 2, 12, 8
    ours = layer(k, rank=6)
    A, B = gralora.expand(ours.lora_A, ours.lora_B, gralora.contiguous(24, k), gralora.contiguous(36, k), k)
    assert (A != 0).sum() == 6 * 24 and (B != 0).sum() == 6 * 36           # r N and r M entries
    sparse_A, sparse_B = torch.zeros(24, 18).double(), torch.zeros(36, 18).double()
    for a in range(k):                                                     # the paper's i, from 0
        for b in range(k):                                                 # the paper's j
            at = (b + a * k) * p
            sparse_A[b * i:(b + 1) * i, at:at + p] = ours.lora_A[a * p:(a + 1) * p, b * i:(b + 1) * i].T
            sparse_B[a * o:(a + 1) * o, at:at + p] = ours.lora_B[a * o:(a + 1) * o, b * p:(b + 1) * p]
    torch.testing.assert_close(sparse_B @ sparse_A.T, B @ A)


def test_init_is_kaiming_uniform_per_block_and_b_is_zero():
    for k, hybrid in ((1, 0), (2, 0), (4, 16)):
        model = nn.Sequential(nn.Linear(4096, 64))
        gralora.inject(model, ("0",), 48, k=k, hybrid=hybrid)
        A, bound = model[0].lora_A, math.sqrt(k / 4096)
        assert 0.99 * bound < A.abs().max() <= bound and abs(A.std() * math.sqrt(3) / bound - 1) < 0.02
        assert not model[0].lora_B.any()
        if hybrid:
            assert 0.99 / 64 < model[0].lora_A_general.abs().max() <= 1 / 64
            assert not model[0].lora_B_general.any()


def test_alpha_is_2r_of_the_total_rank():
    model = nn.Sequential(nn.Linear(32, 32))
    gralora.inject(model, ("0",), 8, hybrid=4)
    assert model[0].scaling == 2.0
    gralora.merge(model)
    gralora.inject(model, ("0",), 8, alpha=4, hybrid=4)
    assert model[0].scaling == 0.5


@pytest.mark.parametrize("rank, k", [(1, 1), (8, 1), (16, 2), (32, 2), (36, 4), (64, 4), (128, 4),
                                     (512, 8)])
def test_section_3_4_the_choice_of_k(rank, k):
    assert gralora.blocks_for(rank) == k
    model = nn.Sequential(nn.Linear(512, 512))
    gralora.inject(model, ("0",), rank, k=0)
    assert model[0].k == k


@pytest.mark.parametrize("own, message", [
    (dict(k=4), r"k 4 does not divide rank - hybrid = 6 of 0"),
    (dict(k=2, hybrid=1), r"k 2 does not divide rank - hybrid = 5"),
    (dict(k=-1), r"k -1 does not divide"), (dict(k=2, hybrid=6), r"hybrid 6 of rank 6, expected 0 to 5"),
    (dict(k=6), r"k 6 does not divide in = 20 of 0"), (dict(k=3), r"k 3 does not divide in = 20 of 0")])
def test_what_does_not_divide_is_an_error_with_both_numbers(own, message):
    with pytest.raises(ValueError, match=message):
        gralora.inject(nn.Sequential(nn.Linear(20, 24)), ("0",), 6, **own)
    with pytest.raises(ValueError, match="k 3 does not divide out = 20 of 0"):
        gralora.inject(nn.Sequential(nn.Linear(24, 20)), ("0",), 6, k=3)


def test_the_parameter_count_is_loras():
    counts = {trainable("gralora", "LLaMA3-8B", "all", 64, k=k, hybrid=h)
              for k, h in ((1, 0), (2, 0), (4, 0), (4, 32))}
    assert counts == {trainable("lora", "LLaMA3-8B", "all", 64)}


# ---------------------------------------------------------------------- §3.3, §3.4, App. C

@pytest.mark.parametrize("k", [1, 2, 4])
def test_section_3_4_flops_are_2_n_r_t_plus_2_r_m_t(k):
    M, N, r, T = 96, 64, 8, 20
    ours = gralora.GraLoRALinear(nn.Linear(N, M), r, 16, 0.0, k, 0)
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(T, N))
    assert counter.get_total_flops() - 2 * M * N * T == 2 * N * r * T + 2 * r * M * T


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_appendix_c_counts_adds_as_2n_minus_1(k):
    M, N, r, T = 96, 64, 16, 20
    product = lambda a, b, c: (2 * b - 1) * a * c                  # (a, b) times (b, c)
    lora = product(r, N, T) + product(M, r, T)
    ours = k * k * (product(r // k, N // k, T) + product(M // k, r // k, T)) + k * (k - 1) * (M // k) * T
    assert lora == 2 * r * (M + N) * T - (r + M) * T
    assert ours == 2 * r * (M + N) * T - k * r * T - M * T == lora - (k - 1) * r * T


def test_section_3_3_an_outlier_channel_reaches_only_the_k_blocks_that_see_it():
    k, ours = 4, layer(4, rank=8, o=32, i=32)
    torch.manual_seed(1)
    x, dy = torch.randn(50, 32).double(), torch.randn(50, 32).double()
    calm, loud = [], []
    for outlier, norms in ((1.0, calm), (1e4, loud)):       # so much that no small entry of A hides it
        ours.zero_grad()
        z = x.clone()
        z[:, 11] *= outlier                                         # input block 1
        ours(z).backward(dy)
        for j in range(k):
            for n in range(k):
                norms.append(ours.lora_B.grad[j * 8:(j + 1) * 8, n * 2:(n + 1) * 2].norm().item())
    for block, (before, after) in enumerate(zip(calm, loud)):
        assert after > 5 * before if block % k == 1 else after == pytest.approx(before)


def test_what_backward_keeps_of_b_is_laid_out_along_the_outputs():
    ours, kept = layer(2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(torch.randn(5, 24).double())
    B, = (t for t in kept if sorted(t.shape) == [2, 4, 18])             # j, R, o/k
    assert B.stride(B.shape.index(18)) == 1


def test_one_dropout_mask_for_both_parts():
    ours, x = layer(2, 2, dropout=0.5), torch.randn(40, 24).double()
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, ours.base(x) + ours.dropout(x) @ ours.delta().T)


# ---------------------------------------------------------------------- files for peft

def tiny_llama():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2)
    return tf.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("k, hybrid", [(2, 0), (4, 4)])
def test_a_saved_adapter_loads_into_peft(k, hybrid, tmp_path):
    """The tensors of adapter.safetensors, mapped as the header says, under peft's names and config."""
    peft = pytest.importorskip("peft")
    model, targets, ids = tiny_llama(), ("q_proj", "v_proj", "down_proj"), torch.randint(61, (2, 9))
    base = copy.deepcopy(model)
    gralora.inject(model, targets, 8, k=k, hybrid=hybrid)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.2)
    saved = dict(method="gralora", targets=targets, rank=8, own=dict(k=k, hybrid=hybrid))
    checkpoint.save_adapter(tmp_path / "ours", model, saved)
    names = {"lora_A": ("gralora_A", lambda t: t.unflatten(1, (k, -1)).permute(1, 2, 0)),
             "lora_B": ("gralora_B", lambda t: t.unflatten(0, (k, -1)).mT),
             "lora_A_general": ("gralora_A_general.weight", lambda t: t),
             "lora_B_general": ("gralora_B_general.weight", lambda t: t)}
    tensors = {}
    for name, t in load_file(tmp_path / "ours" / "adapter.safetensors").items():
        module, leaf = name.rsplit(".", 1)
        new, convert = names[leaf]
        tensors[f"base_model.model.{module}.{new}"] = convert(t).contiguous()
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(dict(
        peft_type="GRALORA", task_type="CAUSAL_LM", r=8 - hybrid, hybrid_r=hybrid, gralora_k=k, alpha=16,
        target_modules=list(targets))))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).double().eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)
    assert (theirs(ids).logits - tiny_llama()(ids).logits).abs().max() > 0.1


# ---------------------------------------------------------------------- the choice of k, and its bounds

@pytest.mark.parametrize("rank, hybrid, k", [(16, 8, 2), (64, 32, 4), (32, 28, 2)])
def test_k_is_chosen_from_the_whole_rank_whatever_part_of_it_is_hybrid(rank, hybrid, k):
    """§3.4 names the rank, of which §3.5 gives a part to LoRA: Table 2's hybrid row keeps rank 16's k."""
    model = nn.Sequential(nn.Linear(64, 64))
    gralora.inject(model, ("0",), rank, k=0, hybrid=hybrid)
    assert model[0].k == gralora.blocks_for(rank) == k != gralora.blocks_for(rank - hybrid)
    assert model[0].lora_A.shape == (rank - hybrid, 64) and model[0].lora_A_general.shape == (hybrid, 64)


@pytest.mark.parametrize("k", [21, 24, 40, 48, 10**6])
def test_more_blocks_than_features_are_refused(k):
    """k divides rank - hybrid, which is at most min(in, out)."""
    model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 20))
    for rank in (6, 20):
        with pytest.raises(ValueError, match=f"k {k} does not divide rank - hybrid = {rank} of 0"):
            gralora.inject(model, ("0", "1"), rank, k=k)
    assert [type(m) for m in model] == [nn.Linear] * 2 and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- devices, dtypes, what is refused

@pytest.mark.parametrize("o, i", [(20, 24), (24, 20)])
def test_a_rank_is_at_most_the_smaller_side(o, i):
    model = nn.Sequential(nn.Linear(i, o))
    with pytest.raises(ValueError, match="rank 22 for 0, expected 1 to 20"):
        gralora.inject(model, ("0",), 22)
    gralora.inject(model, ("0",), 20)


@pytest.mark.parametrize("rank, hybrid, message", [
    (1, 1, "hybrid 1 of rank 1, expected 0 to 0"), (4, -1, "hybrid -1 of rank 4, expected 0 to 3"),
    (0, 0, "rank 0 for 0, expected 1 to 20")])
def test_the_hybrid_part_leaves_one_rank_to_the_blocks_and_a_rank_of_0_is_told_as_such(rank, hybrid, message):
    with pytest.raises(ValueError, match=message):
        gralora.inject(nn.Sequential(nn.Linear(20, 24)), ("0",), rank, k=1, hybrid=hybrid)


def test_all_that_is_made_lies_on_the_device_of_the_weights():
    model = nn.Sequential(nn.Linear(24, 36)).to("meta")
    gralora.inject(model, ("0",), 6, hybrid=2)
    A, B = model[0].factors()
    assert all(t.is_meta for t in (*model.state_dict().values(), A, B, model[0].delta()))


@pytest.mark.parametrize("hybrid", [0, 2])
def test_in_bf16_the_output_is_the_exact_one_but_for_the_roundings_on_the_way(hybrid):
    """Factors, x Aᵀ, s z, their product and both sums: each is off by u of its size at most; 8 of them."""
    torch.manual_seed(0)
    model, u = nn.Sequential(nn.Linear(24, 36)).to(torch.bfloat16), 2**-8
    gralora.inject(model, ("0",), 4 + hybrid, hybrid=hybrid)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    x, (A, B), base = torch.randn(7, 24).to(torch.bfloat16), gralora.factors(model)["0"], model[0].base
    x_, A, B, W, b = (t.detach().double() for t in (x, A, B, base.weight, base.bias))
    y, exact = model(x), x_ @ (W + B @ A).T + b
    size = x_.abs() @ (W.abs() + B.abs() @ A.abs()).T + b.abs()
    assert y.dtype == torch.bfloat16 and ((y.double() - exact).abs() <= 8 * u * size).all()
