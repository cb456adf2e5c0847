"""
The contract that every method file meets, whatever it computes. A new file with inject() is picked up by itself.

Everything in float64, and with B refilled with noise first: while B = 0, most bugs are invisible.
"""
import copy
import inspect
import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import checkpoint

METHODS = sorted(checkpoint.method_files())
ADAPTERS = [name for name in METHODS if not hasattr(checkpoint.load_method(name), "TRAINS_BASE_WEIGHTS")]
MERGEABLE = [name for name in METHODS if not hasattr(checkpoint.load_method(name), "NOT_MERGEABLE")]
TARGETS = ("q_proj", "up_proj")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.up_proj, self.head = nn.Linear(12, 16), nn.Linear(16, 24, bias=False), nn.Linear(24, 3)

    def forward(self, x):
        return self.head(self.up_proj(self.q_proj(x).tanh()).tanh())


def inject(name, model, **kw):
    method = checkpoint.load_method(name)
    method.inject(model, TARGETS, 4, **kw)
    return method


def perturb(model):
    """Noise in every trainable tensor, of a size that moves the function but keeps it tame."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def stages(method, model, x, count=2, output=None):
    """What training does to a model: noise in its tensors, and where the method re-initialises, `count` times that."""
    output = output or (lambda: model(x))
    perturb(model)
    if not hasattr(method, "reinit"):
        return
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for t in range(count):
        output().square().sum().backward()
        if hasattr(method, "observe"):
            method.observe(model, t + 1, count + 1)
        optimizer.step()
        optimizer.zero_grad()
        y = output()
        method.reinit(model, optimizer)
        torch.testing.assert_close(output(), y)             # the function is unchanged
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad} and {id(p) for p in optimizer.state} <= held
        perturb(model)


def layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "delta")}


def trains_base(method):
    return getattr(method, "TRAINS_BASE_WEIGHTS", False)


def test_there_are_methods():
    assert {"lora", "full", "gfa"} <= set(METHODS)


@pytest.fixture(params=METHODS)
def case(request):
    torch.manual_seed(0)
    base, x = Toy().double(), torch.randn(2, 5, 12, dtype=torch.float64)
    model = copy.deepcopy(base)
    return inject(request.param, model), base, model, x


def test_the_function_is_unchanged_at_init(case):
    method, base, model, x = case
    torch.testing.assert_close(model(x), base(x))


def test_every_lora_tensor_trains_and_nothing_else(case):
    method, base, model, x = case
    perturb(model)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        ours = trains_base(method) or name.rpartition(".")[2].startswith("lora_")
        assert p.requires_grad == ours and (p.grad is not None and p.grad.abs().sum() > 0) == ours, name


def unmergeable(method, model):
    """True where the file says that its update is no matrix: then merge, delta and factors raise with that reason."""
    if not hasattr(method, "NOT_MERGEABLE"):
        return False
    for what in (lambda: method.merge(model), lambda: next(iter(layers(model).values())).delta(), lambda: method.factors(model)):
        with pytest.raises(NotImplementedError, match=method.NOT_MERGEABLE[:40]):
            what()
    return True


def test_merge_gives_the_same_function_in_plain_linears_under_the_old_names(case):
    method, base, model, x = case
    if unmergeable(method, model):
        return
    stages(method, model, x)
    y = model(x)
    assert (y - base(x)).abs().max() > 1e-3
    method.merge(model)
    torch.testing.assert_close(model(x), y)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in base.named_modules()]
    assert list(model.state_dict()) == list(base.state_dict()) and not any(p.requires_grad for p in model.parameters())


def test_delta_is_the_layer_applied_to_the_identity(case):
    method, base, model, x = case
    perturb(model)
    assert len(layers(model)) == (0 if trains_base(method) else 2)
    if unmergeable(method, model):
        return
    for name, layer in layers(model).items():
        eye = torch.eye(base.get_submodule(name).in_features, dtype=torch.float64)
        torch.testing.assert_close((layer(eye) - layer.base(eye)).T, layer.delta())


def test_factors_are_the_whole_change_of_the_weights_or_say_why_not(case):
    method, base, model, x = case
    stages(method, model, x)
    if not hasattr(method, "factors"):
        assert trains_base(method)
        return
    try:
        found = method.factors(model)
    except NotImplementedError as reason:
        assert len(str(reason)) > 20
        return
    method.merge(model)
    assert sorted(found) == sorted(TARGETS)
    for name, (A, B) in found.items():
        torch.testing.assert_close(B @ A, model.get_submodule(name).weight - base.get_submodule(name).weight)


def test_an_adapter_on_disk_reloads_on_the_pretrained_model(case, tmp_path):
    method, base, model, x = case
    stages(method, model, x)
    checkpoint.save_adapter(tmp_path / "a", model, dict(method=method.__name__.removeprefix("method_"), targets=TARGETS, rank=4))
    other = copy.deepcopy(base)
    checkpoint.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(*(checkpoint.adapter_tensors(m).values() for m in (model, other)), strict=True))
    if unmergeable(method, model):
        return
    method.merge(model)                                     # and can be merged where it was reloaded
    method.merge(other)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(checkpoint.load_method(name), "reinit")])
def test_five_reinits_of_a_bf16_base_round_it_once(name):
    """The weights after five re-initialisations are those of the exact run, rounded: within half a unit, not five."""
    torch.manual_seed(0)
    model, x = Toy().to(torch.bfloat16), torch.randn(6, 12).to(torch.bfloat16)
    base, method = copy.deepcopy(model), inject(name, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for t in range(5):
        perturb(model)
        model(x).float().square().sum().backward()
        if hasattr(method, "observe"):
            method.observe(model, t + 1, 6)
        optimizer.zero_grad()
        method.reinit(model, optimizer)
    perturb(model)
    found = method.factors(model)
    method.merge(model)
    for target, (A, B) in found.items():
        exact = base.get_submodule(target).weight.double() + B.double() @ A.double()
        got = model.get_submodule(target).weight
        assert (got == exact.to(torch.bfloat16)).double().mean() > 0.99
        torch.testing.assert_close(got, exact.to(torch.bfloat16), rtol=2**-8, atol=0)


def test_leading_dimensions_are_free(case):
    method, base, model, x = case
    perturb(model)
    torch.testing.assert_close(model(x).flatten(0, 1), model(x.flatten(0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_fp32_and_activations_keep_the_models_dtype(name, dtype):
    torch.manual_seed(0)
    base, x = Toy().to(dtype), torch.randn(5, 12, dtype=dtype)
    model = copy.deepcopy(base)
    method = inject(name, model)
    x = x.float() if trains_base(method) else x
    perturb(model)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    y = model(x)
    assert y.dtype == x.dtype
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    double = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(y.double(), double, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name in MERGEABLE])
def test_merge_into_bf16_rounds_once(name):
    """The merged bf16 weight is the exact one, rounded: within half a unit in the last place."""
    torch.manual_seed(0)
    model = Toy().to(torch.bfloat16)
    base, method = copy.deepcopy(model), inject(name, model)
    perturb(model)
    try:        # of the pretrained weight, where a method takes its start out of it
        changes = {name: B.double() @ A.double() for name, (A, B) in method.factors(model).items()}
    except NotImplementedError:
        changes = {name: layer.delta().double() for name, layer in layers(model).items()}
    want = {name: base.get_submodule(name).weight.double() + change for name, change in changes.items()}
    method.merge(model)
    for name, W in want.items():
        got = model.get_submodule(name).weight
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, W.to(torch.bfloat16), rtol=2**-8, atol=0)
        assert (got == W.to(torch.bfloat16)).double().mean() > 0.99


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_target_that_matches_nothing_is_an_error(name):
    method = checkpoint.load_method(name)
    with pytest.raises(ValueError, match="'k_proj' matches no"):
        method.inject(Toy(), ("q_proj", "k_proj"), 4)


@pytest.mark.parametrize("rank", [0, -1, 10**6])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_rank_out_of_bounds_is_an_error(name, rank):
    method = checkpoint.load_method(name)
    with pytest.raises(ValueError, match=f"rank {rank}"):
        method.inject(Toy(), TARGETS, rank)


@pytest.mark.parametrize("name", METHODS)
def test_dropout_acts_in_training_only_or_is_refused(name):
    torch.manual_seed(0)
    model, x = Toy().double(), torch.randn(5, 12, dtype=torch.float64)
    try:
        inject(name, model, dropout=0.5)
    except ValueError as reason:
        assert "dropout" in str(reason)
        return
    perturb(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_targeted_name_is_a_leaf_or_a_dotted_suffix(name):
    method = checkpoint.load_method(name)
    model = nn.ModuleDict(dict(a=nn.ModuleDict(dict(dense=nn.Linear(8, 8))), b=nn.ModuleDict(dict(dense=nn.Linear(8, 8))),
                               xdense=nn.Linear(8, 8)))
    fresh = copy.deepcopy(model)
    method.inject(model, ("a.dense",), 4)
    assert list(layers(model)) == ["a.dense"]
    model = fresh
    method.inject(model, ("dense",), 4)
    assert list(layers(model)) == ["a.dense", "b.dense"]


@pytest.mark.parametrize("name", METHODS)
def test_a_transformers_model_is_injected_trained_and_merged_by_the_same_file(name):
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                               num_attention_heads=4, num_key_value_heads=2)).double().eval()
    base, ids, method = copy.deepcopy(model), torch.randint(61, (2, 9)), checkpoint.load_method(name)
    method.inject(model, ("q_proj", "v_proj", "down_proj"), 4)
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    y = model(ids).logits
    if unmergeable(method, model):
        return
    method.merge(model)
    torch.testing.assert_close(model(ids).logits, y)
    assert list(model.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("name", ADAPTERS)
def test_factors_written_as_a_peft_lora_over_the_original_model_give_the_same_logits(name, tmp_path):
    """Stages and re-initialisations included: whatever the method, where its update is low-rank it is a plain LoRA."""
    peft, tf = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                               num_attention_heads=4, num_key_value_heads=2)).double().eval()
    base, ids, method = copy.deepcopy(model), torch.randint(61, (2, 9)), checkpoint.load_method(name)
    method.inject(model, ("q_proj", "v_proj", "down_proj"), 4)
    stages(method, model, ids, output=lambda: model(ids).logits)
    try:
        found = method.factors(model)
    except NotImplementedError:
        return
    rank = {module: len(A) for module, (A, B) in found.items()}
    tensors = {f"base_model.model.{module}.lora_{x}.weight": t.contiguous()
               for module, pair in found.items() for x, t in zip("AB", pair)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(      # one r and alpha a module: the scale is 1
        peft_type="LORA", task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=list(rank), rank_pattern=rank, alpha_pattern=rank)))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).double().eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)


def source(name, function):
    method = checkpoint.load_method(name)
    return inspect.getsource(getattr(method, function)) if hasattr(method, function) else None


def test_functions_that_files_share_are_equal_to_the_letter():
    """So that `diff baselines/lora.py gralora.py` is the paper."""
    assert len({source(name, "find") for name in METHODS} - {None}) == 1
    assert {source(name, "merge") for name in ("gralora", "dora", "mora", "spiel")} == {source("lora", "merge")}
    assert {source(name, "merge").replace("    del model.adapter\n", "") for name in ("gfa", "rasa")} == {source("lora", "merge")}
    assert source("rasa", "kind") == source("denselora", "kind")
    assert all(source("pissa", f) == source("milora", f) for f in ("layers", "merge", "factors", "restore"))
    assert source("gralora", "expand") == source("cps_lora", "expand")
    assert len({source(name, "layers") for name in ("glora", "cps_lora", "rosa")}) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_stands_alone_and_keeps_to_its_form(name):
    text = checkpoint.method_files()[name].read_text(encoding="utf-8")
    imported = {line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"math", "warnings", "torch"}
    assert max(map(len, text.splitlines())) <= 100
    method = checkpoint.load_method(name)
    parameters = inspect.signature(method.inject).parameters
    assert list(parameters)[:5] == ["model", "targets", "rank", "alpha", "dropout"]
    assert {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        n: entry[0] for n, entry in method.DEFAULTS.items()}
