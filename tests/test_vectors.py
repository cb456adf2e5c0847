"""The method files against tests/vectors, which experiments/vectors.py works out from the papers."""
import json
import math

import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

import checkpoint
from experiments import vectors

METHODS = {name: checkpoint.load_method(name) for name in vectors.CASES}
ALL = [(name, case) for name, cases in vectors.CASES.items() for case in cases]
STAGED = [(name, case) for name, case in ALL if hasattr(METHODS[name], "reinit")]
FACTORED = [(name, case) for name, case in ALL if name != "gfa"]        # a GFA update has no factors (§2)


def close(got, want):
    """Equal but for the order of float64 sums."""
    torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-11 * want.abs().max().item())


def file(method):
    return ROOT / "tests" / "vectors" / f"{method}.safetensors"


class Case:
    """One case of a file: its tensors, its settings, and the method run along them."""

    def __init__(self, name, case):
        self.method, prefix = METHODS[name], f"{case}."
        with safe_open(file(name), "pt") as f:
            self.own = json.loads(f.metadata()["cases"])[case]
        self.tensors = load_file(file(name))
        self.tensors = self.below(prefix)

    def __getitem__(self, key):
        return self.tensors[key]

    def below(self, prefix):
        """{rest of the key: tensor} of the keys that begin so."""
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def inject(self):
        """-> the adapted model, an optimizer with the groups of the case, or with a single one."""
        model = nn.ModuleDict()
        for name in self.own["modules"]:
            (o, i), bias = self[f"{name}.weight"].shape, f"{name}.bias" in self.tensors
            model[name] = nn.Linear(i, o, bias=bias).double()
            stored = self.below(f"{name}.").items()
            model[name].load_state_dict({key: t for key, t in stored if key in ("weight", "bias")})
        self.method.inject(model, tuple(self.own["modules"]), **self.own["inject"])
        names = self.own.get("groups", [[list(trainable(model))]])[0]
        groups = [[trainable(model)[name] for name in group] for group in names]
        return model, torch.optim.AdamW([{"params": group} for group in groups], 1e-2)

    def load(self, model, key):
        """The trainable tensors of a step, or of a stage's end, into the model, which has no others."""
        params = trainable(model)
        stored = {p: t for p, t in self.below(f"{key}.").items() if "lora_" in p and "grad." not in p}
        assert params.keys() == stored.keys()
        with torch.no_grad():
            for p, value in stored.items():
                params[p].copy_(value)

    def load_partition(self, model, stage):
        """The clusters that a stage of CPS-LoRA has: those of the first are drawn at random."""
        for name, t in self.below(f"stage{stage}.").items():
            if name.endswith(("lora_rows", "lora_columns")):
                model.get_buffer(name).copy_(t)

    def backward(self, model, key):
        """-> {module: y}, {name: gradient} of Σ y ⊙ G at a step, those of the inputs named module.x."""
        x = {name: self[f"{key}.{name}.x"].clone().requires_grad_() for name in self.own["modules"]}
        y = {name: model[name](x[name]) for name in x}
        sum((y[name] * self[f"{key}.{name}.G"]).sum() for name in x).backward()
        grads = {name: p.grad.clone() for name, p in trainable(model).items()}
        return y, grads | {f"{name}.x": x[name].grad for name in x}

    def run(self, stages=None):
        """
        Along the stages (or so many): yields (stage, model, optimizer) as inject or reinit left it; then,
        with the stored factors of each step, takes the gradients, has them observed, lets the optimizer step;
        and leaves the factors that the stage ends with.
        """
        model, optimizer = self.inject()
        for stage in range(self.own["stages"] if stages is None else stages):
            if stage:
                self.method.reinit(model, optimizer)
            yield stage, model, optimizer
            self.load_partition(model, stage)
            for t in range(vectors.STEPS):
                self.load(model, f"stage{stage}.step{t}")
                self.backward(model, f"stage{stage}.step{t}")
                if hasattr(self.method, "observe"):
                    self.method.observe(model, t + 1, vectors.STEPS)
                optimizer.step()
                optimizer.zero_grad()
            self.load(model, f"stage{stage}.end")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained(case, stages=None):
    """-> the model and its optimizer after these stages."""
    return list(case.run(stages))[-1][1:]


def groups(model, optimizer):
    """Names of the parameters in the optimizer's groups, and of those that it has a state for."""
    names = {p: name for name, p in trainable(model).items()}
    grouped = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    return grouped, {names[p] for p in optimizer.state}


@pytest.mark.parametrize("name, case", ALL)
def test_outputs_and_gradients_are_those_of_the_dense_update(name, case):
    """LoRA, GraLoRA: Eqs. 1, 3, 5. CPS-LoRA: Eqs. 8 - 11. G-LoRA: Eq. 2. GFA: Steps 1 - 4, Alg. 1."""
    case = Case(name, case)
    for stage, model, _ in case.run():
        case.load_partition(model, stage)
        for t in range(vectors.STEPS):
            key = f"stage{stage}.step{t}"
            case.load(model, key)
            model.zero_grad()
            y, grads = case.backward(model, key)
            model.zero_grad()
            for module, value in y.items():
                close(value, case[f"{key}.{module}.y"])
            assert grads.keys() == case.below(f"{key}.grad.").keys()
            for p, grad in grads.items():
                close(grad, case[f"{key}.grad.{p}"])


@pytest.mark.parametrize("name, case", ALL)
def test_the_merged_weight_is_the_frozen_one_and_the_update(name, case):
    """LoRA, GraLoRA: Eq. 1. CPS-LoRA: Alg. 1, lines 17 - 19. G-LoRA: W_res + G + L (Eq. 2). GFA: Step 4."""
    case = Case(name, case)
    model, _ = trained(case)
    case.method.merge(model)
    assert list(model) == case.own["modules"]
    for module in model:
        assert type(model[module]) is nn.Linear
        close(model[module].weight, case[f"merged.{module}.weight"])


@pytest.mark.parametrize("name, case", FACTORED)
def test_the_factors_are_the_whole_update_of_the_pretrained_weight(name, case):
    """LoRA, GraLoRA: Eq. 1, Fig. 5. CPS-LoRA: Eqs. 10, 11 of every stage. G-LoRA: Eqs. 2, 5, 11, 14."""
    case = Case(name, case)
    model, _ = trained(case)
    found = case.method.factors(model)
    assert list(found) == case.own["modules"]
    for module, (A, B) in found.items():
        want = case[f"factors.{module}.B"] @ case[f"factors.{module}.A"]
        close(B @ A, want)
        close(case[f"{module}.weight"] + want, case[f"merged.{module}.weight"])


@pytest.mark.parametrize("name, case", [(name, case) for name, case in ALL if name != "glora"])
def test_a_stage_starts_at_the_frozen_function_with_a_drawn_within_its_bound(name, case):
    """
    B = 0, and A ~ U(±1/√fan_in), Kaiming's for a = √5, or N(0, σ²). CPS-LoRA: Alg. 1, line 8. GFA: Step 3.
    Its own draw, which no file can tell, fills the bound; so does the stored one.
    """
    case = Case(name, case)
    for stage, model, _ in case.run():
        key, params = f"stage{stage}.step0", trainable(model)
        for module in case.own["modules"]:
            close(model[module](case[f"{key}.{module}.x"]), case[f"{key}.{module}.y"])
        for p, value in params.items():
            if "lora_B" in p:
                assert not value.any() and not case[f"{key}.{p}"].any()
        for p, bound in case.own.get("uniform", {}).items():
            assert all(0.9 * bound < A.abs().max() <= bound for A in (params[p], case[f"{key}.{p}"]))
        for p, sigma in case.own.get("normal", {}).items():
            assert all(0.5 * sigma < A.std() < 1.5 * sigma for A in (params[p], case[f"{key}.{p}"]))


@pytest.mark.parametrize("name, case", STAGED)
def test_a_reinit_keeps_the_groups_and_drops_the_state_of_what_is_new(name, case):
    case = Case(name, case)
    for stage, model, optimizer in case.run():
        state = set(case.own["keep_state"] if stage else ())
        assert groups(model, optimizer) == (case.own["groups"][stage], state)


@pytest.mark.parametrize("name, case", STAGED)
def test_a_reinit_leaves_the_function_as_it_was(name, case):
    """CPS-LoRA: Alg. 1, lines 4 - 8. G-LoRA: Eqs. 11 - 15."""
    case = Case(name, case)
    for stages in range(1, case.own["stages"]):
        model, optimizer = trained(case, stages)
        x = {module: case[f"stage{stages}.step0.{module}.x"] for module in case.own["modules"]}
        before = {module: model[module](x[module]) for module in x}
        case.method.reinit(model, optimizer)
        for module in x:
            want = case[f"stage{stages}.step0.{module}.y"]
            close(before[module], want)
            close(model[module](x[module]), want)


# ------------------------------------------------------------------------------------ CPS-LoRA

def test_the_first_clusters_of_cps_lora_are_equal_and_the_next_ones_the_halves_of_a_cosine_order():
    """Alg. 1, lines 1, 5, 7: parts of the rows, columns in ascending order of the cosine with the longest."""
    case = Case("cps_lora", "cosine")
    for stage, model, _ in case.run():
        for module in case.own["modules"]:
            for side in ("rows", "columns"):
                found = getattr(model[module], f"lora_{side}")
                stored = case[f"stage{stage}.{module}.lora_{side}"]
                assert found.bincount().tolist() == stored.bincount().tolist() == [len(stored) // 2] * 2
                assert not stage or torch.equal(found, stored)


# ------------------------------------------------------------------------------------ G-LoRA

def product(layer, which):
    """B A of an adapter of a layer, on its own region: (n, m)."""
    A, B = (getattr(layer, f"lora_{which}_{side}") for side in "AB")
    return B if A is None else B @ A


def test_glora_starts_on_the_triplets_of_the_weight_and_of_its_next_regions():
    """Eqs. 4, 5, 12 - 14. Signs of singular vectors are free: products are compared, and norms (Σ^½ each)."""
    case = Case("glora", "exact")
    for stage, model, _ in case.run():
        for module in case.own["modules"]:
            stored = case.below(f"stage{stage}.step0.{module}.")
            assert ("lora_local_A" in stored) == (stage < 2)                            # §3.2.2: then dense
            for which in ("local", "global")[:1 if stage else 2]:
                A, B = (stored.get(f"lora_{which}_{side}") for side in "AB")
                close(product(model[module], which), B if A is None else B @ A)
                if A is not None:
                    found = getattr(model[module], f"lora_{which}_A")
                    close(found.norm(dim=1).sort().values, A.norm(dim=1).sort().values)


def test_gloras_frozen_weight_is_what_its_adapters_leave():
    """W_res of Eqs. 5, 11, 14, 15, to some thousand roundings of its largest entry."""
    case = Case("glora", "exact")
    for stage, model, _ in case.run():
        for module in case.own["modules"]:
            want = case[f"stage{stage}.{module}.weight"]
            few = 1e4 * torch.finfo(torch.float64).eps * want.abs().max().item()
            torch.testing.assert_close(model[module].base.weight, want, rtol=0, atol=few)


def test_glora_scores_entries_by_the_mean_of_the_factor_times_its_gradient():
    """Eq. 9: I = |L ⊙ g|, over the steps of a stage; observe keeps their sum, which orders features alike."""
    case = Case("glora", "exact")
    for stages in (1, 2):
        model, _ = trained(case, stages)
        for module in case.own["modules"]:
            for side, score in zip("AB", model[module].scores):
                close(score / vectors.STEPS, case[f"stage{stages - 1}.score.{module}.lora_local_{side}"])


def test_glora_keeps_the_halves_of_rows_and_columns_that_scored_most():
    """Eq. 10, Alg. 1, line 12: by ℓ2 norms over the rank, descending, within the region before."""
    case = Case("glora", "exact")
    for stage, model, _ in case.run():
        for module in case.own["modules"]:
            o, i = case[f"{module}.weight"].shape
            for side, size in (("rows", i), ("columns", o)):
                found = getattr(model[module], f"lora_{side}")
                assert found.tolist() == case[f"stage{stage}.{module}.lora_{side}"].tolist()
                assert len(found) == math.floor(size / 2 ** stage)


def test_gloras_dense_region_stays_as_it_is():
    """§3.2.2: "switches to full fine-tuning and stops shrinking the region any further"."""
    case = Case("glora", "exact")
    model, optimizer = trained(case)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    case.method.reinit(model, optimizer)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert groups(model, optimizer) == (case.own["groups"][-1], trainable(model).keys())


# ------------------------------------------------------------------------------------ the files

def test_the_files_are_what_experiments_vectors_writes():
    """Singular vectors too: their signs are fixed, and neighbours among what is sorted are apart."""
    for method, (tensors, metadata) in vectors.make().items():
        stored = load_file(file(method))
        assert stored.keys() == tensors.keys()
        for key, t in tensors.items():
            torch.testing.assert_close(torch.from_numpy(t), stored[key], rtol=1e-9, atol=1e-11 * abs(t).max())
        with safe_open(file(method), "pt") as f:
            assert f.metadata() == metadata


def test_two_values_that_are_hardly_apart_are_refused_by_the_writer():
    assert vectors.apart(torch.tensor([-1.0, 2.0, 1.0]).numpy()).tolist() == [-1, 2, 1]
    for values in ([1.0, 2.0, 1.0005], [-1.0, -1.0005, 3.0]):
        with pytest.raises(AssertionError, match="apart"):
            vectors.apart(torch.tensor(values).numpy())


def test_gfas_modules_begin_inside_a_row_of_m_and_leave_padding():
    """Step 2: k = ⌊√d⌋, m = ⌈d / k⌉, at most k - 1 entries of padding; one case has none to spare."""
    for name, padding in (("two", 19), ("three", 35)):
        case = Case("gfa", name)
        (m, _), (_, k) = (case[f"stage0.step0.adapter.lora_{side}"].shape for side in "BA")
        sizes = [case[f"{module}.weight"].numel() for module in case.own["modules"]]
        d = sum(sizes)
        assert k == math.isqrt(d) and m == math.ceil(d / k) and m * k - d == padding <= k - 1
        assert all(sum(sizes[:n]) % k for n in range(1, len(sizes)))


def test_the_files_are_small_and_in_float64():
    assert sorted(METHODS) == sorted(path.stem for path in file("x").parent.glob("*.safetensors"))
    assert sum(file(method).stat().st_size for method in METHODS) < 1_000_000
    for method in METHODS:
        assert all(t.dtype in (torch.float64, torch.int64) for t in load_file(file(method)).values())
