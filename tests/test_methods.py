"""
The contract that every method file meets, whatever it computes. A new file with inject() is picked up by
itself; one that lies elsewhere is named: METHOD=path/to/mine.py pytest tests/test_methods.py -k mine

Everything in float64, and with B refilled with noise first: while B = 0, most bugs are invisible.
"""
import copy
import functools
import inspect
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import presets

load = functools.cache(checkpoint.load_method)
METHODS = [*sorted(checkpoint.method_files()), *filter(None, [os.environ.get("METHOD")])]
ADAPTERS = [name for name in METHODS if not hasattr(load(name), "TRAINS_BASE_WEIGHTS")]
MERGEABLE = [name for name in METHODS if not hasattr(load(name), "NOT_MERGEABLE")]
REINITS = [name for name in METHODS if hasattr(load(name), "reinit")]
COUNTS = [name for name in METHODS if hasattr(load(name), "count")]
FLAGS = [(name, flag) for name in METHODS for flag in getattr(load(name), "DEFAULTS", {})]
TARGETS = ("q_proj", "up_proj")

# What the contract is told of single methods; a file that stands in none of these is checked in full.
OTHER = {"glora": {"ratio": "1:3"}}     # another value of a flag that is free text
INVISIBLE = {}                          # {method: {flag: the test that sees it}}, where a toy cannot show it
ROUNDED = {"pissa": True, "milora": True}       # factors start in the model's dtype, as forward rounds them
# Part of the loss counts as a constant, so that its gradient is not the whole one: the test that shows that.
DETACHED = {"dora": "test_dora_is_pefts_in_outputs_and_gradients_and_in_where_its_one_mask_acts"}


class Toy(nn.Module):
    def __init__(self, scale=1):
        super().__init__()
        self.q_proj = nn.Linear(12 * scale, 16 * scale)
        self.up_proj = nn.Linear(16 * scale, 24 * scale, bias=False)
        self.head = nn.Linear(24 * scale, 3)

    def forward(self, x):
        return self.head(self.up_proj(self.q_proj(x).tanh()).tanh())


def same(actual, expected, rule, **tolerance):
    """assert_close, whose message starts with the rule."""
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{rule}\n{text}", **tolerance)


def roundings(dtype):
    """
    How far a float32 or bf16 toy may be from the exact one: 16 roundings or so of values around 1 lie between
    x and y, each of half an eps, and where sums are no wider than that, in float32, two of 24 products.
    """
    return dict(rtol=0, atol=(16 + 2 * 24 * (dtype == torch.float32)) * torch.finfo(dtype).eps / 2)


def inject(name, model, **kw):
    method = load(name)
    method.inject(model, TARGETS, 4, **kw)
    return method


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def perturb(model):
    """Noise in every trainable tensor, of a size that moves the function but keeps it tame."""
    with torch.no_grad():
        for p in trainable(model):
            p.add_(0.1 * torch.randn_like(p))


def stages(method, model, x, count=2, output=None):
    """What training does to a model: noise in its tensors, `count` times where the method re-initialises."""
    output = output or (lambda: model(x))
    perturb(model)
    if not hasattr(method, "reinit"):
        return
    optimizer = torch.optim.AdamW(trainable(model), 1e-2)
    for t in range(count):
        output().square().sum().backward()
        if hasattr(method, "observe"):
            method.observe(model, t + 1, count + 1)
        optimizer.step()
        optimizer.zero_grad()
        y = output()
        method.reinit(model, optimizer)
        same(output(), y, "a re-initialisation leaves the function unchanged")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trainable(model)}, "after reinit the groups hold what trains"
        assert {id(p) for p in optimizer.state} <= held, "reinit drops the state of what is gone"
        perturb(model)


def layers(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "delta")}


def trains_base(method):
    return getattr(method, "TRAINS_BASE_WEIGHTS", False)


def name_of(method):
    """The name, or else the path, by which load_method finds the file again."""
    file = Path(method.__file__)
    return file.stem if checkpoint.method_files().get(file.stem) == file else str(file)


def told(table, name):
    """What the contract is told of a method, by its file's name or, for a copy of it, by its PRESET."""
    names = Path(name).stem, getattr(load(name), "PRESET", None)
    return next((table[key] for key in names if key in table), {})


def accepts(name, own):
    try:
        inject(name, Toy(), **own)
    except ValueError:
        return False
    return True


def other_values(name):
    """[(flag, value)]: for each entry of DEFAULTS all other choices, the other boolean, or another number."""
    found = []
    for flag, (default, _, *choices) in getattr(load(name), "DEFAULTS", {}).items():
        if choices:
            values = [value for value in choices[0] if value != default]
        elif isinstance(default, bool):
            values = [not default]
        elif isinstance(default, str):
            values = [told(OTHER, name).get(flag)]
        else:                                               # doubled, where that is another one and allowed
            tried = [type(default)(value) for value in (2 * default, 1, 2, default / 2)]
            values = [next((v for v in tried if v != default and accepts(name, {flag: v})), None)]
        assert values != [None], f"--{flag}: no other value is known; name one in this file's OTHER"
        found += [(flag, value) for value in values]
    return found


def make_case(name):
    torch.manual_seed(0)
    base, x = Toy().double(), torch.randn(2, 5, 12, dtype=torch.float64)
    model = copy.deepcopy(base)
    return inject(name, model), base, model, x


@pytest.fixture(params=METHODS)
def case(request):
    return make_case(request.param)


def test_there_are_methods():
    assert {"lora", "full", "gfa"} <= set(METHODS)


# ------------------------------------------------------------------------------------ start, gradients

def test_the_function_is_unchanged_at_init(case):
    method, base, model, x = case
    same(model(x), base(x), "at init the model computes what the pretrained one does")


def test_every_lora_tensor_trains_and_nothing_else(case):
    method, base, model, x = case
    perturb(model)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if trains_base(method) or name.rpartition(".")[2].startswith("lora_"):
            assert p.requires_grad, f"every parameter named lora_… trains, else it is a buffer: {name}"
            assert p.grad is not None and p.grad.any(), f"every trainable tensor has a gradient: not {name}"
        else:
            assert not p.requires_grad, f"every trainable tensor is named lora_…: {name} is not"
            assert p.grad is None, f"nothing but lora_ tensors gets a gradient: {name} does"


def check_fall(model, loss, whole, h=1e-4, rtol=1e-6):
    """
    Whatever learning rate a method wants, a step against the gradient that is small enough lowers the loss by
    what the gradient predicts: at the rate |g| along -g. Central differences are off by h² / 6 times the
    third derivative, and by the loss's roundings over h: some 1e-8 and 1e-12 on the toy. rtol leaves room.
    """
    params, losses = trainable(model), []
    grads = torch.autograd.grad(loss(), params)
    norm, start = sum(g.square().sum() for g in grads).sqrt(), [p.detach().clone() for p in params]
    assert norm > 0, "some gradient is not zero at init: else nothing would ever train"
    for length in (-h, h, 0):
        with torch.no_grad():
            for p, p0, g in zip(params, start, grads):
                p.copy_(p0 - length * g / norm)
            losses.append(loss())
    assert losses[1] < losses[0], "a small step against the gradient lowers the loss"
    if whole:
        fall = (losses[0] - losses[1]) / (2 * h)
        same(fall, norm, "the loss falls by what the gradient predicts (or DETACHED)", rtol=rtol, atol=0)


def test_the_loss_falls_by_what_the_gradient_predicts(case):
    """At init, where most of the gradient may be zero; and after noise, where no wrong part can hide."""
    method, base, model, x = case
    whole = not told(DETACHED, name_of(method))
    check_fall(model, lambda: model(x).square().mean(), whole)
    perturb(model)
    check_fall(model, lambda: model(x).square().mean(), whole)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_repeats_an_injection(name):
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Toy().double()
        inject(name, model)
        found.append(dict(model.state_dict()))
    same(*found, "what inject draws depends on torch's seed alone")


# ------------------------------------------------------------------------------------ merge, factors, disk

def unmergeable(method, model):
    """True where the file says that its update is no matrix: merge, delta and factors then raise that."""
    if not hasattr(method, "NOT_MERGEABLE"):
        return False
    for what in (lambda: method.merge(model), lambda: next(iter(layers(model).values())).delta(),
                 lambda: method.factors(model)):
        with pytest.raises(NotImplementedError, match=method.NOT_MERGEABLE[:40]):
            what()
    return True


def test_merge_gives_the_same_function_in_plain_linears_under_the_old_names(case):
    method, base, model, x = case
    if unmergeable(method, model):
        return
    stages(method, model, x)
    y = model(x)
    assert (y - base(x)).abs().max() > 1e-3, "noise in what trains changes the function"
    method.merge(model)
    same(model(x), y, "merge leaves the function as it was trained")
    modules, old = ([(n, type(m)) for n, m in each.named_modules()] for each in (model, base))
    assert modules == old, "merge puts the plain modules back under their names and leaves nothing of ours"
    assert list(model.state_dict()) == list(base.state_dict()), "a merged model has the tensors it once had"
    assert not trainable(model), "nothing trains in a merged model"


def test_delta_is_the_layer_applied_to_the_identity(case):
    method, base, model, x = case
    perturb(model)
    assert len(layers(model)) == (0 if trains_base(method) else 2), "every target is a layer with delta()"
    if unmergeable(method, model):
        return
    for name, layer in layers(model).items():
        eye = torch.eye(base.get_submodule(name).in_features, dtype=torch.float64)
        same((layer(eye) - layer.base(eye)).T, layer.delta(), f"delta() is what forward adds: {name}")


def test_factors_are_the_whole_change_of_the_weights_or_say_why_not(case):
    method, base, model, x = case
    stages(method, model, x)
    if not hasattr(method, "factors"):
        assert trains_base(method), "a method file has factors(model), if only to raise NotImplementedError"
        return
    try:
        found = method.factors(model)
    except NotImplementedError as reason:
        assert len(str(reason)) > 20, "where there are no factors, the error says why"
        return
    method.merge(model)
    assert sorted(found) == sorted(TARGETS), "factors has an entry for every target"
    for name, (A, B) in found.items():
        change = model.get_submodule(name).weight - base.get_submodule(name).weight
        same(B @ A, change, f"factors are the whole change against the pretrained weight: {name}")


def save(method, model, directory, own):
    record = dict(method=name_of(method), targets=TARGETS, rank=4, own=own)
    checkpoint.save_adapter(directory, model, record)


def test_an_adapter_on_disk_reloads_on_the_pretrained_model(case, tmp_path):
    method, base, model, x = case
    stages(method, model, x)
    save(method, model, tmp_path / "a", {})
    other = copy.deepcopy(base)
    torch.manual_seed(12345)
    checkpoint.load_adapter(other, tmp_path / "a", method.__file__)
    same(other(x), model(x), "the lora_ tensors on disk are all that a reload needs, whatever torch's seed")
    saved, loaded = (checkpoint.adapter_tensors(m) for m in (model, other))
    assert list(saved) == list(loaded), "a reload has the tensors that were saved"
    assert all(map(torch.equal, saved.values(), loaded.values())), "a reload is the adapter saved, to the bit"
    if unmergeable(method, model):
        return
    method.merge(model)                                     # and can be merged where it was reloaded
    method.merge(other)
    same(other(x), model(x), "a reloaded adapter merges to the same weights")


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_reloads_under_every_flag(name, tmp_path):
    for number, (flag, value) in enumerate(other_values(name)):
        torch.manual_seed(0)
        base, x = Toy().double(), torch.randn(2, 5, 12, dtype=torch.float64)
        model = copy.deepcopy(base)
        method = inject(name, model, **{flag: value})
        stages(method, model, x)
        save(method, model, tmp_path / f"{number}", {flag: value})
        torch.manual_seed(12345)
        checkpoint.load_adapter(base, tmp_path / f"{number}", method.__file__)
        same(base(x), model(x), f"a run with --{flag} {value} reloads from its flags and its lora_ tensors")


# ------------------------------------------------------------------------------------ dtypes, devices

def rounded_once(got, W, A, B):
    """
    Where got (bf16) is W + B A, rounded once: as near to it as the nearest bf16 number, but for what float32
    loses on the way, the roundings of R products, R sums and a few more, each of |W| + |B| |A| at most. What
    was rounded to bf16 before that, too, is off by up to half a unit more.
    """
    W, A, B = W.double(), A.double(), B.double()
    exact, lost = W + B @ A, (len(A) + 4) * 2**-24 * (W.abs() + B.abs() @ A.abs())
    return (got.double() - exact).abs() <= (exact.to(torch.bfloat16).double() - exact).abs() + 2 * lost


@pytest.mark.parametrize("name", REINITS)
def test_five_reinits_of_a_bf16_base_round_it_once(name):
    """The weights after five re-initialisations are the exact ones, rounded: within half a unit, not five."""
    torch.manual_seed(0)
    model, x = Toy().to(torch.bfloat16), torch.randn(6, 12).to(torch.bfloat16)
    base, method = copy.deepcopy(model), inject(name, model)
    optimizer = torch.optim.AdamW(trainable(model), 1e-2)
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
        got, W = (m.get_submodule(target).weight for m in (model, base))
        assert rounded_once(got, W, A, B).all(), f"five re-initialisations round a bf16 weight once: {target}"


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name in MERGEABLE])
def test_merge_into_bf16_rounds_once(name):
    """The merged bf16 weight is the exact one, rounded: within half a unit in the last place."""
    torch.manual_seed(0)
    model = Toy().to(torch.bfloat16)
    base, method = copy.deepcopy(model), inject(name, model)
    perturb(model)
    try:        # of the pretrained weight, where a method takes its start out of it
        changes = method.factors(model)
    except NotImplementedError:
        changes = {target: (torch.eye(layer.base.in_features), layer.delta().detach())
                   for target, layer in layers(model).items()}
    method.merge(model)
    for target, (A, B) in changes.items():
        got, W = (m.get_submodule(target).weight for m in (model, base))
        assert got.dtype == torch.bfloat16, "merge keeps the weight's dtype"
        assert rounded_once(got, W, A, B).all(), f"merge adds in float32 and rounds once: {target}"


def test_leading_dimensions_are_free(case):
    method, base, model, x = case
    perturb(model)
    same(model(x).flatten(0, 1), model(x.flatten(0, 1)), "a layer takes (..., in) to (..., out)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_fp32_and_activations_keep_the_models_dtype(name, dtype):
    torch.manual_seed(0)
    base, x = Toy().to(dtype), torch.randn(5, 12, dtype=dtype)
    model = copy.deepcopy(base)
    method = inject(name, model)
    x = x.float() if trains_base(method) else x
    perturb(model)
    assert all(p.dtype == torch.float32 for p in trainable(model)), "what trains is float32, whatever W is"
    for key, t in checkpoint.adapter_tensors(model).items():
        assert t.dtype == torch.float32 or not t.is_floating_point(), f"lora_ buffers are float32: not {key}"
    y = model(x)
    assert y.dtype == x.dtype, "activations stay in the model's dtype"
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in trainable(model)), "gradients are finite"
    double = copy.deepcopy(model).double()(x.double())
    same(y.double(), double, f"{dtype} is what a layer computes in float64, rounded", **roundings(dtype))


@pytest.mark.parametrize("name", METHODS)
def test_a_bf16_model_starts_where_the_same_weights_in_fp32_do(name):
    torch.manual_seed(0)
    narrow = Toy().to(torch.bfloat16)
    wide, tensors = copy.deepcopy(narrow).float(), []
    for model in (narrow, wide):
        torch.manual_seed(1)
        inject(name, model)
        tensors.append({key: t.detach() for key, t in checkpoint.adapter_tensors(model).items()})
    rounded = told(ROUNDED, name)
    for key, t in tensors[0].items() if rounded else ():
        assert torch.equal(t, t.to(torch.bfloat16).float()), f"this start is rounded to bf16: {key} is not"
    rule = "the start is made in float32, not in the model's dtype"
    same(*tensors, rule, rtol=2**-8 if rounded else 1e-5, atol=1e-6)


class Watch(TorchDispatchMode):
    """Fails at the first operation on a tensor that is not on the meta device; numbers may be anywhere."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for t in tree_leaves((args, kwargs)):
            assert not isinstance(t, torch.Tensor) or t.is_meta or not t.dim(), \
                "every tensor that forward uses is a parameter, a buffer, or made on x's device: " \
                f".to(device) left one of shape {tuple(t.shape)} behind"
        return op(*args, **(kwargs or {}))


def test_a_moved_model_takes_along_all_that_forward_uses(case):
    method, base, model, x = case
    stages(method, model, x)
    y, x = model(x), x.float()
    model.float()
    same(model(x), y.float(), "moved to float32, a float64 model computes the same", **roundings(x.dtype))
    model, x = model.to("meta"), x.to("meta")
    with Watch():
        model(x)


# ------------------------------------------------------------------------------------ what inject refuses

@pytest.mark.parametrize("name", METHODS)
def test_a_target_that_matches_nothing_is_an_error(name):
    method = load(name)
    with pytest.raises(ValueError, match="'k_proj' matches no"):
        method.inject(Toy(), ("q_proj", "k_proj"), 4)


@pytest.mark.parametrize("rank", [0, -1, 10**6])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_rank_out_of_bounds_is_an_error(name, rank):
    """Above in * out at the latest: so many outer products are dependent, whatever the method."""
    try:
        load(name).inject(Toy(), TARGETS, rank)
    except ValueError as error:
        assert f"rank {rank}" in str(error), f"the error says 'rank {rank}', and what was expected: {error}"
    else:
        pytest.fail(f"inject refuses rank {rank}, with a ValueError that says 'rank {rank}'")


def tied():
    """up_proj's weight is an embedding's, too."""
    model = Toy()
    model.embed = nn.Embedding(24, 16)
    model.embed.weight = model.up_proj.weight
    return model


def twice():
    """up_proj has a second name, under which it would stay unwrapped."""
    model = Toy()
    model.again = model.up_proj
    return model


@pytest.mark.parametrize("make, other", [(tied, "embed"), (twice, "again")])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_target_whose_weight_another_module_shares_is_an_error(name, make, other):
    method, model = load(name), make()
    message = f"up_proj: its weight is also {other}.weight, an update would change both"
    with pytest.raises(ValueError, match=message):
        method.inject(model, TARGETS, 4)
    method.inject(model, ("q_proj",), 4)                    # what is no target may be shared
    assert list(layers(model)) == ["q_proj"], "targets are wrapped, and nothing else"


def state(model):
    """What a refused injection must not touch, and the tensors."""
    modules = [(name, type(m), m.training) for name, m in model.named_modules()]
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return (modules, trains), copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_a_refused_inject_leaves_the_model_as_it_was(name):
    method, refused, perhaps = load(name), [dict(dropout=1.5)], [dict(alpha=4)]
    if name in ADAPTERS:
        refused += [dict(rank=0), dict(rank=10**6), dict(targets=("q_proj", "k_proj")), dict(targets=())]
        refused += [dict(model=tied)]
    for flag, (default, _, *choices) in getattr(method, "DEFAULTS", {}).items():
        bad = {flag: "no such" if isinstance(default, str) else -1}
        (refused if choices else perhaps).append(bad)       # a number below 0 may mean something
    for change in refused + perhaps:
        how = dict(model=Toy, targets=TARGETS, rank=4) | change
        model = how.pop("model")()
        model.q_proj.requires_grad_(False).eval()
        before, tensors = state(model)
        try:
            method.inject(model, **how)
        except ValueError:
            after, now = state(model)
            assert after == before, f"a refused inject leaves modules and requires_grad alone: {change}"
            assert all(map(torch.equal, now.values(), tensors.values())), f"and the weights: {change}"
        else:
            assert change in perhaps, f"inject refuses, with a ValueError: {change}"


@pytest.mark.parametrize("name", METHODS)
def test_dropout_acts_in_training_only_or_is_refused(name):
    torch.manual_seed(0)
    model, x = Toy().double(), torch.randn(5, 12, dtype=torch.float64)
    try:
        inject(name, model, dropout=0.5)
    except ValueError as reason:
        assert "dropout" in str(reason), "a method that has no place for dropout says so"
        return
    perturb(model)
    assert not torch.equal(model(x), model(x)), "dropout acts in training"
    model.eval()
    same(model(x), model(x), "dropout does not act in evaluation")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_targeted_name_is_a_leaf_or_a_dotted_suffix(name):
    method = load(name)
    a, b = (nn.ModuleDict(dict(dense=nn.Linear(8, 8))) for _ in range(2))
    model = nn.ModuleDict(dict(a=a, b=b, xdense=nn.Linear(8, 8)))
    fresh = copy.deepcopy(model)
    method.inject(model, ("a.dense",), 4)
    assert list(layers(model)) == ["a.dense"], "a target names modules by a dotted suffix"
    model = fresh
    method.inject(model, ("dense",), 4)
    assert list(layers(model)) == ["a.dense", "b.dense"], "a target names modules by their leaf"


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_target_is_a_linear_and_no_other_module_of_that_name(name):
    method, a = load(name), nn.ModuleDict(dict(proj=nn.Embedding(20, 24)))
    model = nn.ModuleDict(dict(a=a, proj=nn.Linear(20, 24)))
    method.inject(model, ("proj",), 4)
    assert list(layers(model)) == ["proj"] and type(model["a"]["proj"]) is nn.Embedding
    with pytest.raises(ValueError, match="target 'a.proj' matches no nn.Linear"):
        method.inject(nn.ModuleDict(dict(a=a)), ("a.proj",), 4)


@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.1])
@pytest.mark.parametrize("name", METHODS)
def test_a_dropout_below_0_or_of_1_is_refused(name, dropout):
    bounds = f"dropout {dropout}, expected 0 <= dropout < 1"
    with pytest.raises(ValueError, match=bounds if presets.takes(load(name), dropout=0.5) else "dropout"):
        inject(name, Toy(), dropout=dropout)


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(load(name), "add_update")])
def test_under_autocast_the_output_has_its_dtype_bias_and_all(name):
    model = nn.Sequential(nn.Linear(20, 24))
    load(name).inject(model, ("0",), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(5, 20)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ADAPTERS)
def test_factors_are_no_part_of_a_graph(name):
    model = Toy()
    method = inject(name, model)
    try:
        factors = method.factors(model)
    except NotImplementedError:
        return
    assert factors and not any(f.requires_grad for pair in factors.values() for f in pair)


# ------------------------------------------------------------------------------------ flags, counts

def trace(name, own, seed=0):
    """What can be seen of a method under these flags: its start, outputs, gradients, and where it ends up."""
    torch.manual_seed(seed)
    model, x = Toy(4).double(), torch.randn(16, 48, dtype=torch.float64)
    method = inject(name, model, **own)
    seen, steps = [*model.state_dict().values(), model(x)], 1
    torch.manual_seed(1)
    perturb(model)
    make = getattr(method, "make_optimizer", lambda params, lr, decay: torch.optim.AdamW(params, lr))
    optimizer = make(trainable(model), 1e-2, 0.0)
    if hasattr(method, "reinit") or hasattr(method, "observe"):
        steps = 30                                          # of 50: three re-inits, or SpIEL's first schedule
    for t in range(1, steps + 1):
        y = model(x)
        y.square().sum().backward()
        seen += [y, *(p.grad for p in trainable(model))] if t == 1 else []
        seen = [s.detach().clone() for s in seen]
        if hasattr(method, "observe"):
            method.observe(model, t, 50)
        optimizer.step()
        optimizer.zero_grad()
        if t % 10 == 0 and hasattr(method, "reinit"):
            method.reinit(model, optimizer)
    return [*seen, *model.state_dict().values(), model(x)]


def differ(some, others):
    """Other shapes, or other values than roundings make."""
    if [t.shape for t in some] != [t.shape for t in others]:
        return True
    return not all(torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-9) for a, b in zip(some, others))


def alike(name, flag):
    """Pairs of a flag's values that nothing tells apart, alone or beside another choice of another flag."""
    method, others = load(name), other_values(name)
    values = [method.DEFAULTS[flag][0], *(value for f, value in others if f == flag)]
    beside = [{}] + [{f: value} for f, value in others if f != flag and len(method.DEFAULTS[f]) == 3]
    pairs = list(itertools.combinations(range(len(values)), 2))
    for seed, also in itertools.product(range(3), beside):
        if not pairs:
            break
        traces = [trace(name, also | {flag: value}, seed) for value in values]
        pairs = [(i, j) for i, j in pairs if not differ(traces[i], traces[j])]
    return [(values[i], values[j]) for i, j in pairs]


@pytest.mark.parametrize("name, flag", FLAGS)
def test_every_flag_changes_something(name, flag):
    if flag not in told(INVISIBLE, name):
        for one, other in alike(name, flag):
            pytest.fail(f"every entry of DEFAULTS changes something: --{flag} {other} does what {one} does")


def test_what_the_contract_cannot_see_has_a_test_of_its_own():
    files = Path(__file__).parent.glob("test_*.py")
    tests = "".join(file.read_text(encoding="utf-8") for file in files)
    for test in [*DETACHED.values(), *(test for flags in INVISIBLE.values() for test in flags.values())]:
        assert f"\ndef {test}(" in tests, f"an exception names the test that sees it: there is no {test}"
    for name, flags in INVISIBLE.items():
        assert all(alike(name, flag) for flag in flags), f"a flag that is seen is no exception: {name}"


@pytest.mark.parametrize("sizes", [(12, 16, 24), (64, 48, 8)])
@pytest.mark.parametrize("name", COUNTS)
def test_the_count_that_a_file_states_is_what_trains(name, sizes):
    i, mid, o = sizes
    for own in [{}, *({flag: value} for flag, value in other_values(name))]:
        model = nn.ModuleDict(dict(q_proj=nn.Linear(i, mid), up_proj=nn.Linear(mid, o)))
        stated = inject(name, model, **own).count([(mid, i), (o, mid)], 4, **own)
        assert stated == sum(p.numel() for p in trainable(model)), f"count(shapes, rank) is what trains {own}"


# ------------------------------------------------------------------------------------ transformers and peft

def llama():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2)
    return tf.LlamaForCausalLM(config).double().eval(), torch.randint(61, (2, 9))


def nll(model, ids):
    """In float64, which transformers' own loss is not."""
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", METHODS)
def test_a_transformers_model_is_injected_trained_and_merged_by_the_same_file(name):
    model, ids = llama()
    base, method = copy.deepcopy(model), load(name)
    method.inject(model, ("q_proj", "v_proj", "down_proj"), 4)
    same(model(ids).logits, base(ids).logits, "at init a transformers model computes what it did")
    fall = dict(whole=not told(DETACHED, name), h=1e-3, rtol=1e-2)      # its norms, in float32, are noise
    check_fall(model, lambda: nll(model, ids), **fall)
    optimizer = torch.optim.AdamW(trainable(model), 1e-2)
    for _ in range(8):
        nll(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    check_fall(model, lambda: nll(model, ids), **fall)
    y = model(ids).logits
    if unmergeable(method, model):
        return
    method.merge(model)
    same(model(ids).logits, y, "merge leaves a transformers model's function as it was trained")
    assert list(model.state_dict()) == list(base.state_dict()), "a merged model has the tensors it once had"


@pytest.mark.parametrize("name", ADAPTERS)
def test_factors_written_as_a_peft_lora_over_the_original_model_give_the_same_logits(name, tmp_path):
    """Stages and re-initialisations included: whatever the method, a low-rank update is a plain LoRA."""
    peft = pytest.importorskip("peft")
    model, ids = llama()
    base, method = copy.deepcopy(model), load(name)
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
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(  # one r and alpha a module: the scale is 1
        peft_type="LORA", task_type="CAUSAL_LM", r=1, lora_alpha=1, target_modules=list(rank),
        rank_pattern=rank, alpha_pattern=rank)))
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path)).double().eval()
    same(theirs(ids).logits, model(ids).logits, "factors, loaded as a LoRA by peft, give the same function")


# ------------------------------------------------------------------------------------ form

def source(name, function):
    method = load(name)
    return inspect.getsource(getattr(method, function)) if hasattr(method, function) else None


@pytest.mark.parametrize("name", METHODS)
def test_find_is_equal_to_the_letter_in_every_file(name):
    assert source(name, "find") in (source("lora", "find"), None), "find is that of baselines/lora.py"


@pytest.mark.parametrize("bias", [False, True])
def test_in_bf16_an_update_below_the_outputs_last_place_is_not_swallowed(bias):
    """Of an update of 2^-11 where outputs are about 1, base(x) + update keeps less than half."""
    torch.manual_seed(0)
    base = nn.Linear(64, 256, bias=bias).to(torch.bfloat16)
    nn.init.normal_(base.weight, 0, 1 / 8)
    x, update = torch.randn(2, 40, 64).bfloat16(), 2**-11 * torch.randn(2, 40, 256).bfloat16()
    exact = F.linear(*(t.double() for t in (x, base.weight, *([base.bias] if bias else []))))
    kept = lambda y: ((y.double() - exact) * update.double()).sum() / update.double().square().sum()
    add_update = load("lora").add_update
    # An output's rounding is 2^-7 / sqrt(12) at most about: over 20480 of them the share varies by 0.032.
    assert abs(kept(add_update(base, x, update)) - 1) < 6 * 0.032
    assert kept(base(x) + update) < 0.6
    same(add_update(base.double(), x.double(), update.double()), exact + update, "base(x) + update")


def test_functions_that_files_share_are_equal_to_the_letter():
    """So that `diff baselines/lora.py gralora.py` is the paper."""
    merge, delete = source("lora", "merge"), "    del model.adapter\n"
    assert len({source(name, "find") for name in METHODS} - {None}) == 1
    assert len({source(name, "add_update") for name in METHODS} - {None}) == 1
    assert {source(name, "merge") for name in ("gralora", "cps_lora", "dora", "mora", "spiel")} == {merge}
    assert {source(name, "merge").replace(delete, "") for name in ("gfa", "rasa")} == {merge}
    assert source("rasa", "kind") == source("denselora", "kind")
    assert all(source("pissa", f) == source("milora", f) for f in ("layers", "merge", "factors", "restore"))
    assert source("gralora", "expand") == source("cps_lora", "expand")
    assert len({source(name, "layers") for name in ("glora", "cps_lora", "rosa")}) == 1
    assert source("glora", "merge") == source("rosa", "merge")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_stands_alone_and_keeps_to_its_form(name):
    method = load(name)
    lines = Path(method.__file__).read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported <= {"math", "warnings", "torch"}, "a method file imports torch, math and warnings"
    assert max(map(len, lines)) <= 100, "a method file has lines of up to 100 columns"
    parameters = inspect.signature(method.inject).parameters
    assert list(parameters)[:5] == ["model", "targets", "rank", "alpha", "dropout"], \
        "inject starts with model, targets, rank, alpha, dropout"
    keywords = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {n: entry[0] for n, entry in getattr(method, "DEFAULTS", {}).items()}, \
        "the entries of DEFAULTS are inject's keywords, with the same defaults"
