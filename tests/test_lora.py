"""LoRA: scale, init, dropout, parameter counts, and peft's layer as the oracle."""
import math

import pytest
import torch
import torch.nn as nn
from conftest import trainable

import checkpoint

lora = checkpoint.load_method("lora")


def layer(rank=4, alpha=6, dropout=0.0, o=16, i=24):
    torch.manual_seed(0)
    ours = lora.LoRALinear(nn.Linear(i, o), rank, alpha, dropout).double()
    nn.init.normal_(ours.lora_B)
    return ours


def test_the_update_by_loops():
    ours, x = layer(), torch.randn(3, 24).double()
    y = ours.base(x)
    for t in range(3):
        h = [sum(ours.lora_A[r, i] * x[t, i] for i in range(24)) for r in range(4)]
        for o in range(16):
            y[t, o] += (6 / 4) * sum(ours.lora_B[o, r] * h[r] for r in range(4))
    torch.testing.assert_close(ours(x), y)


def test_alpha_is_2r_unless_given():
    for alpha, scaling in ((None, 2.0), (16, 4.0), (1, 0.25)):
        model = nn.Sequential(nn.Linear(8, 8))
        lora.inject(model, ("0",), 4, alpha)
        assert model[0].scaling == scaling


def test_init_is_kaiming_uniform_for_a_and_zero_for_b():
    ours = lora.LoRALinear(nn.Linear(1024, 64), 64, 64, 0.0)
    assert not ours.lora_B.any() and ours.lora_A.abs().max() <= 1 / 32
    assert abs(ours.lora_A.std().item() * math.sqrt(3 * 1024) - 1) < 0.02


def test_dropout_is_on_the_adapters_input_alone():
    ours, x = layer(dropout=0.5), torch.randn(200, 24).double()
    ours.scaling = 0.0
    assert torch.equal(ours(x), ours.base(x))           # the base path sees x undropped
    ours.scaling = 1.0
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, ours.base(x) + ours.dropout(x) @ ours.lora_A.T @ ours.lora_B.T)


@pytest.mark.parametrize("model, count", [("LLaMA2-7B", 8_388_608), ("LLaMA2-13B", 13_107_200),
                                          ("LLaMA3-8B", 6_815_744), ("Qwen2.5-1.5B", 2_179_072)])
def test_parameter_counts_of_the_papers_tables(model, count):
    assert trainable("lora", model, "attention", 8) == count


@pytest.mark.parametrize("model, targets, count", [("RoBERTa-large", "query,value", 98_304),
                                                   ("Qwen2.5-3B", "q_proj,v_proj", 230_400),
                                                   ("LLaMA-3.2-3B", "q_proj,v_proj", 286_720)])
def test_parameter_counts_at_rank_1_on_q_and_v(model, targets, count):
    assert trainable("lora", model, targets, 1) == count


def test_it_is_pefts_lora():
    peft = pytest.importorskip("peft")
    ours, x = layer(), torch.randn(2, 5, 24).double()
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(24, 16)).double(),
                                 peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6)).double()
    q = theirs.base_model.model[0]
    with torch.no_grad():
        q.base_layer.load_state_dict(ours.base.state_dict())
        q.lora_A["default"].weight.copy_(ours.lora_A)
        q.lora_B["default"].weight.copy_(ours.lora_B)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, q.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, q.lora_B["default"].weight.grad)
    torch.testing.assert_close(ours.delta(), q.get_delta_weight("default"))


def test_nothing_as_large_as_a_weight_is_kept_for_backward():
    ours = lora.LoRALinear(nn.Linear(256, 256).requires_grad_(False), 4, 8, 0.0)
    x, kept = torch.randn(7, 256, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x)
    assert kept and all(t.numel() < 256 * 256 or t.data_ptr() == ours.base.weight.data_ptr() for t in kept)
