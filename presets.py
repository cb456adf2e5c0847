"""
The papers' hyper-parameter tables, by name: python train.py --method glora --preset glora-math-llama2 ...

PRESETS[name]["all"] holds for every method, PRESETS[name][METHOD] overrides it. METHOD is a method file's
PRESET (which a copy of the file keeps), or else its name. What suits the bundled model, preset `tiny`, the
method file says itself, as TINY. SOURCES[name] is (paper, its table, its model).
"""
import textwrap
from pathlib import Path

import torch

PRESETS = {"tiny": {"all": dict(
    model=str(Path(__file__).resolve().parent / "data" / "tiny"), task="arithmetic", lr=1e-2, batch_size=32,
    max_steps=240, warmup_steps=20, log_every=20, dtype="float32")}}
SOURCES = {"tiny": ("none", "method files' TINY", "the bundled one")}


def rows(name, method):
    """
    What preset `name` says for every method, less what this one (a module) has no place for, and what it says
    for this one, {flag: value} each; whose rows the latter are. ValueError lists the names that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}, expected one of {', '.join(PRESETS)}")
    owner = getattr(method, "PRESET", Path(method.__file__).stem)
    tiny = getattr(method, "TINY", {}) if name == "tiny" else {}
    no_place = dropped(name, method)
    shared = {flag: value for flag, value in PRESETS[name]["all"].items() if flag not in no_place}
    return shared, PRESETS[name].get(owner, {}) | tiny, owner


def dropped(name, method):
    """The flags, alpha or dropout, that preset `name` sets for every method and this one's inject refuses."""
    given = {flag: PRESETS[name]["all"].get(flag) for flag in ("alpha", "dropout")}
    return [flag for flag, value in given.items()
            if value and takes(method) and not takes(method, **{flag: value})]


def describe(name, method, args):
    """Prints whose rows of preset `name` hold for this method, the values in `args`, what was left out."""
    _, own, owner = rows(name, method)
    print(f"preset {name}, for {owner}: "
          + (", ".join(f"{flag} {args[flag]}" for flag in own) or "no flags of its own"))
    if left := dropped(name, method):
        print(f"left out of it: {', '.join(left)}, for which {owner} has no place")


def listing():
    """What --list_presets shows: of each its name, paper, table and model, and what it sets for whom."""
    lines = ["NAME: paper, table, model; what it sets for every method, then for single ones"]
    for name, preset in PRESETS.items():
        lines += ["", f"{name}: {', '.join(SOURCES[name])}"]
        for whose, flags in preset.items():
            words = ", ".join(f"{flag} {value}" for flag, value in flags.items())
            lines += textwrap.wrap(f"{whose}: {words}", 80, initial_indent="  ", subsequent_indent="      ",
                                   break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def takes(method, **given):
    """Whether inject takes this alpha or dropout, tried on one small layer; draws no random numbers."""
    with torch.random.fork_rng(devices=[]):
        try:
            method.inject(torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)}), ("a",), 4, **given)
        except ValueError:
            return False
    return True


# CPS-LoRA, Tables 7 - 10: the learning rate of "Other", and of the methods that have a column of their own.
CPS = [("llama2-7b", "commonsense", 1e-4, dict(cps_lora=1e-4, pissa=2e-4)),
       ("llama2-7b", "math", 3e-4, dict(cps_lora=3e-4, pissa=4e-4)),
       ("llama3-8b", "commonsense", 1e-4, dict(cps_lora=4e-5, pissa=2e-4)),
       ("llama3-8b", "math", 1e-4, dict(cps_lora=4e-5, pissa=2e-4)),
       ("llama3-8b", "code", 5e-5, dict(cps_lora=4.5e-5)),
       ("qwen2.5-1.5b", "commonsense", 1e-4, dict(cps_lora=1e-4, pissa=2e-4)),
       ("qwen2.5-1.5b", "math", 3e-4, dict(cps_lora=5e-5)),
       ("qwen2.5-1.5b", "code", 4e-5, dict(cps_lora=6e-5, pissa=4.5e-5, gralora=5e-5)),
       ("llama2-13b", "commonsense", 1e-4, dict(cps_lora=1e-4, pissa=2e-4)),
       ("llama2-13b", "math", 3e-4, dict(cps_lora=1e-4))]
CPS_TABLES = {"llama2-7b": ("Table 7", "LLaMA2-7B"), "llama3-8b": ("Table 8", "LLaMA3-8B-Instruct"),
              "qwen2.5-1.5b": ("Table 9", "Qwen2.5-1.5B"), "llama2-13b": ("Table 10", "LLaMA2-13B")}
CPS_MIX = dict(commonsense="commonsense_170k", math="math_10k", code="codealpaca_20k")      # §4.1
for model, task, other, rates in CPS:
    SOURCES[f"cps-{task}-{model}"] = ("CPS-LoRA", *CPS_TABLES[model])
    PRESETS[f"cps-{task}-{model}"] = {
        "all": dict(task=task, rank=8, targets="attention", batch_size=4, epochs=2, warmup_steps=500,
                    lr=other, mix=CPS_MIX[task]),
        **{method: dict(lr=lr) for method, lr in rates.items()}}

# G-LoRA, Tables 9 - 12: r_g : r_l; learning rate with the exact SVD; oversampling and learning rate with the
# randomized one; the learning rate of "Other", and of the methods that have a column of their own.
COMMONSENSE, CODE = dict(pissa=2e-4, rosa=2e-4, gralora=2e-4), dict(milora=3e-5, denselora=1e-5)
GLORA = [("commonsense", "LLaMA2", "3:1", 1e-4, 4, 1e-4, 1e-4, COMMONSENSE),
         ("commonsense", "LLaMA3-8B", "3:1", 1e-4, 4, 1e-4, 1e-4, COMMONSENSE),
         ("math", "LLaMA2", "1:3", 3e-4, 4, 3e-4, 3e-4, {}),
         ("math", "LLaMA3-8B", "3:1", 3e-4, 4, 3e-4, 3e-4, {}),
         ("code", "LLaMA3-8B-Instruct", "1:3", 2e-5, 8, 1e-5, 5e-5, CODE),
         ("code", "Qwen2.5-7B", "3:1", 1e-5, 8, 1e-5, 5e-5, CODE)]
GLORA_TABLES = dict(commonsense="Tables 9, 12", math="Tables 10, 12", code="Tables 11, 12")
GLORA_MIX = CPS_MIX | dict(commonsense="commonsense_15k")                                    # §4
for task, model, ratio, exact, oversample, randomized, other, rates in GLORA:
    preset = {
        "all": dict(task=task, rank=8, targets="attention", batch_size=4, epochs=10, warmup_steps=500,
                    dropout=0.05, val_rows=1200, select="best", lr=other, mix=GLORA_MIX[task]),
        **{method: dict(lr=lr) for method, lr in rates.items()}}
    preset["rosa"] = preset.get("rosa", {}) | dict(reinit_every="2")        # Table 16: four times, as G-LoRA
    # Table 18; 0.3 % of the targets' weights, 6.4M on LLaMA2-7B, is the reading that LoRA's 8.4M is near.
    preset["spiel"] = dict(density=0.003)
    # The printed counts, 4.16M to 5.21M, are of this rank and these modules; r = 8 on q,k,v,o is not.
    preset["denselora"] = preset.get("denselora", {}) | dict(
        rank=64, targets="q_proj,k_proj,v_proj,up_proj,down_proj")
    name = f"glora-{task}-{model.lower()}"
    SOURCES[name] = SOURCES[f"{name}-randomized"] = ("G-LoRA", GLORA_TABLES[task], model)
    PRESETS[name] = preset | {"glora": dict(ratio=ratio, lr=exact)}
    PRESETS[f"{name}-randomized"] = preset | {
        "glora": dict(ratio=ratio, lr=randomized, svd="randomized", oversample=oversample)}

# GraLoRA, Table 5, and Table 2's hybrid row at rank 16; §4.1: Lion, all eight training sets,
# Magicoder-Evol-Instruct-110k; k by §3.4. Where the paper is silent, the authors' scripts: cosine, warm-up,
# dropout, lengths, RaSA's k. Batches of 192 in portions of 4, so that they fit.
GRALORA_MIX = dict(commonsense="commonsense_170k", code="data-evol_instruct-decontaminated")
GRALORA_LENGTH = dict(commonsense=256, code=4096)
GRALORA_OWN = dict(gralora=dict(k=0), rasa=dict(k=8))
GRALORA = [("LLaMA3.1-8B", "code", 64, 2e-4, 2, GRALORA_OWN),
           ("LLaMA3.1-8B", "code", 16, 2e-4, 2, dict(gralora=dict(k=2, hybrid=8), rasa=dict(k=2))),
           ("Qwen2.5-1.5B", "commonsense", 64, 2e-4, 2, GRALORA_OWN),
           ("Qwen2.5-7B", "commonsense", 64, 4e-4, 2, GRALORA_OWN),
           ("LLaMA3.1-70B", "commonsense", 64, 3e-4, 1, dict(gralora=dict(k=0)))]
for model, task, rank, lr, epochs, own in GRALORA:
    name = f"gralora-{task}-{model.lower()}" + ("-hybrid" if rank == 16 else "")
    SOURCES[name] = ("GraLoRA", "Tables 2, 5" if rank == 16 else "Table 5", model)
    PRESETS[name] = {
        "all": dict(task=task, rank=rank, batch_size=192, micro_batch_size=4, epochs=epochs, lr=lr,
                    optimizer="lion", schedule="cosine", warmup_ratio=0.1, dropout=0.05,
                    max_len=GRALORA_LENGTH[task], mix=GRALORA_MIX[task]), **own}

# peft's method_comparison/MetaMathQA, not run here; experiments/metamath.py makes the file. Its alpha, 64, is
# 2r. The rows but GraLoRA's are ours: as many stages as in the papers, for an epoch is longer than the run;
# GFA's rate; no decay of factors that hold pretrained weight.
SOURCES["peft-metamath-llama3.2-3b"] = ("peft", "method_comparison/MetaMathQA", "LLaMA3.2-3B")
PRESETS["peft-metamath-llama3.2-3b"] = {
    "all": dict(task="metamath.jsonl", rank=32, targets="q_proj,v_proj", batch_size=4, max_steps=5000,
                lr=1e-4, weight_decay=0.1, schedule="cosine", warmup_ratio=0.1, max_len=768, seed=0,
                train_on_prompt=True, dtype="bfloat16", eval_before=False, eval_limit=50),
    "gralora": dict(lr=2e-4, weight_decay=0.01), "gfa": dict(lr=3e-3), "cps_lora": dict(reinit_every="2500s"),
    "glora": dict(reinit_every="1000s", weight_decay=0.0)}
