"""
A method added as one file: tests/vera.py meets the contract as it is, and eight bugs put into it are seen.

The contract sees what no method may do. A bug that makes another method of it, as sound as the first, only
facts of its own can show: what the paper states, or another implementation's numbers. A pattern for others.
"""
import importlib.util
import inspect
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import checkpoint

VERA = ROOT / "tests" / "vera.py"
TARGETS = ["a", "b"]


# ------------------------------------------------------------------------------------ facts: peft's VeRA

def pair(file, dropout=0.0, noise=True, **own):
    """Ours and peft's on one model of two layers, (12, 16) and (16, 24), with the same vectors."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential() for _ in range(2))
    for name, base in (("a", nn.Linear(12, 16)), ("b", nn.Linear(16, 24))):
        for model in (ours, theirs):
            model.add_module(name, nn.Linear(base.in_features, base.out_features))
            model.get_submodule(name).load_state_dict(base.state_dict())
    checkpoint.load_method(file).inject(ours, TARGETS, 4, dropout=dropout, **own)
    theirs = peft.get_peft_model(theirs, peft.VeraConfig(
        r=4, target_modules=TARGETS, vera_dropout=dropout, d_initial=own.get("d_init", 0.1),
        projection_prng_key=own.get("projection_seed", 0)))
    if noise:
        for layer, other in zip(layers(ours), layers(theirs), strict=True):
            for p, q in zip(vectors(layer), vectors(other)):
                p.data = q.data = torch.randn_like(p)
    return ours, theirs


def layers(model):
    return [m for m in model.modules() if hasattr(m, "delta") or hasattr(m, "vera_lambda_b")]


def vectors(layer):
    """d and b."""
    if hasattr(layer, "lora_d"):
        return layer.lora_d, layer.lora_b
    return layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]


def one_pair_serves_all_layers(file):
    ours, theirs = pair(file)
    assert [name for name, _ in ours.named_buffers()] == ["adapter.lora_A", "adapter.lora_B"]
    assert all(layer.shared is ours.adapter for layer in layers(ours))


def the_start_is_pefts(file):
    for own in ({}, dict(d_init=0.3, projection_seed=5)):
        ours, theirs = pair(file, noise=False, **own)
        assert torch.equal(ours.adapter.lora_A, theirs.base_model.vera_A["default"])
        assert torch.equal(ours.adapter.lora_B, theirs.base_model.vera_B["default"])
        for layer, other in zip(layers(ours), layers(theirs), strict=True):
            assert all(map(torch.equal, vectors(layer), vectors(other)))


def as_many_parameters_train_as_in_peft(file):
    ours, theirs = pair(file)
    count = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert count == [(4 + 16) + (4 + 24)] * 2


def outputs_and_gradients_are_pefts(file, dropout=0.0):
    ours, theirs = pair(file, dropout)
    with torch.no_grad():
        ours.adapter.lora_A.copy_(theirs.base_model.vera_A["default"])
        ours.adapter.lora_B.copy_(theirs.base_model.vera_B["default"])
    ours, theirs, x = ours.double(), theirs.double(), torch.randn(3, 5, 12, dtype=torch.float64)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)                                # one mask for both, if they drop the same
        y = model(x)
        y.square().sum().backward()
        found.append([y, *(v.grad for layer in layers(model) for v in vectors(layer))])
    torch.testing.assert_close(*found)


def dropout_is_on_x(file):
    outputs_and_gradients_are_pefts(file, dropout=0.5)


FACTS = [one_pair_serves_all_layers, the_start_is_pefts, as_many_parameters_train_as_in_peft,
         outputs_and_gradients_are_pefts, dropout_is_on_x]


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.__name__)
def test_vera_is_pefts(fact):
    fact(str(VERA))


# ------------------------------------------------------------------------------------ the contract

def contract(file, tmp_path, monkeypatch):
    """What tests/test_methods.py has against a method file, one by one: its tests are called as functions."""
    monkeypatch.setenv("METHOD", str(file))
    spec = importlib.util.spec_from_file_location("contract", Path(__file__).with_name("test_methods.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fresh = itertools.count()
    for name, test in vars(module).items():
        wants = inspect.signature(test).parameters if name.startswith("test_") else {}
        ours, cases = str(file), [{}]
        for mark in getattr(test, "pytestmark", []):
            keys = [key.strip() for key in mark.args[0].split(",")]
            values = [dict(zip(keys, v if len(keys) > 1 else [v], strict=True)) for v in mark.args[1]]
            cases = [one | more for one in cases for more in values if more.get("name", ours) == ours]
        for kw in cases if {"name", "case"} & set(wants) else []:
            if "case" in wants:
                kw["case"] = module.make_case(ours)
            if "tmp_path" in wants:
                kw["tmp_path"] = tmp_path / f"{next(fresh)}"
                kw["tmp_path"].mkdir()
            try:
                test(**kw)
            except (Exception, pytest.fail.Exception) as error:
                yield f"{name}: {error}"


def test_vera_meets_the_contract(tmp_path, monkeypatch):
    assert list(contract(VERA, tmp_path, monkeypatch)) == []


BUFFERS, SLICES = "nn.Buffer(A.to(**new)), nn.Buffer(B.to(**new))", "lora_A[:, :i], self.shared.lora_B[:o]"
FLAG = "every entry of DEFAULTS changes something: --"
BUGS = {    # name: (the rule of the contract that shows it, or else the fact; edits)
    "the shared matrices train": ("count(shapes, rank)", (BUFFERS, BUFFERS.replace("Buffer", "Parameter"))),
    "every layer has its own": (
        one_pair_serves_all_layers, ('object.__setattr__(self, "shared", shared)', "self.shared = shared"),
        ("VeRALinear(base, shared, d", "VeRALinear(base,\n Projections(rank, i, o, len(name), **new), d")),
    "d_init is ignored": (FLAG + "d_init", ("lora_A),), d_init)", "lora_A),), 0.1)")),
    "dropout is on h": (dropout_is_on_x, ("F.linear(self.dropout(x), A)", "self.dropout(F.linear(x, A))")),
    "plain attributes": ("every tensor that forward uses", (BUFFERS, "A.to(**new), B.to(**new)")),
    "drawn in the model's dtype": (
        "the start is made in float32", ("o, seed,", "o, seed, W,"), ("_seed, **new)", "_seed, W, **new)"),
        ('device="cpu")', 'device="cpu", dtype=W.dtype)')),
    "the seed is ignored": (FLAG + "projection_seed", ("manual_seed(seed)", "manual_seed(0)")),
    "sliced from the wrong end": (
        outputs_and_gradients_are_pefts, (SLICES, SLICES.replace(":i", "-i:").replace(":o", "-o:")))}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_vera_is_seen(bug, tmp_path, monkeypatch):
    seen_by, *edits = BUGS[bug]
    text = VERA.read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "vera.py"
    file.write_text(text, encoding="utf-8")
    broken = contract(file, tmp_path, monkeypatch)
    if isinstance(seen_by, str):
        assert any(seen_by in message for message in broken)
        return
    assert list(broken) == []                               # another method, and a sound one
    with pytest.raises(AssertionError):
        seen_by(str(file))
