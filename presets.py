"""
The papers' hyper-parameter tables, by name: python train.py --method glora --preset glora-math-llama2 ...

PRESETS[name]["all"] holds for every method, PRESETS[name][METHOD] overrides it. METHOD is a method file's
PRESET (which a copy of the file keeps), or else its name. What suits the bundled model, preset `tiny`, the
method file says itself, as TINY.
"""
from pathlib import Path

PRESETS = {"tiny": {"all": dict(
    model=str(Path(__file__).resolve().parent / "data" / "tiny"), task="arithmetic", lr=1e-2, batch_size=32,
    max_steps=240, warmup_steps=20, log_every=20, dtype="float32")}}


def rows(name, method):
    """
    What preset `name` says for every method and for this one (a module), {flag: value} each, and whose rows
    the latter are. ValueError lists the names that there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}, expected one of {', '.join(PRESETS)}")
    owner = getattr(method, "PRESET", Path(method.__file__).stem)
    tiny = getattr(method, "TINY", {}) if name == "tiny" else {}
    return PRESETS[name]["all"], PRESETS[name].get(owner, {}) | tiny, owner


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
CPS_MIX = dict(commonsense="commonsense_170k", math="math_10k", code="codealpaca_20k")      # §4.1
for model, task, other, rates in CPS:
    PRESETS[f"cps-{task}-{model}"] = {
        "all": dict(task=task, rank=8, targets="attention", batch_size=4, epochs=2, warmup_steps=500,
                    lr=other, mix=CPS_MIX[task]),
        **{method: dict(lr=lr) for method, lr in rates.items()}}

# G-LoRA, Tables 9 - 12: r_g : r_l; learning rate with the exact SVD; oversampling and learning rate with the
# randomized one; the learning rate of "Other", and of the methods that have a column of their own.
COMMONSENSE, CODE = dict(pissa=2e-4, rosa=2e-4, gralora=2e-4), dict(milora=3e-5, denselora=1e-5)
GLORA = [("commonsense", "llama2", "3:1", 1e-4, 4, 1e-4, 1e-4, COMMONSENSE),
         ("commonsense", "llama3-8b", "3:1", 1e-4, 4, 1e-4, 1e-4, COMMONSENSE),
         ("math", "llama2", "1:3", 3e-4, 4, 3e-4, 3e-4, {}),
         ("math", "llama3-8b", "3:1", 3e-4, 4, 3e-4, 3e-4, {}),
         ("code", "llama3-8b-instruct", "1:3", 2e-5, 8, 1e-5, 5e-5, CODE),
         ("code", "qwen2.5-7b", "3:1", 1e-5, 8, 1e-5, 5e-5, CODE)]
GLORA_MIX = CPS_MIX | dict(commonsense="commonsense_15k")                                    # §4
for task, model, ratio, exact, oversample, randomized, other, rates in GLORA:
    preset = {
        "all": dict(task=task, rank=8, targets="attention", batch_size=4, epochs=10, warmup_steps=500,
                    dropout=0.05, val_rows=1200, lr=other, mix=GLORA_MIX[task]),
        **{method: dict(lr=lr) for method, lr in rates.items()}}
    preset["rosa"] = preset.get("rosa", {}) | dict(reinit_every="2")        # Table 16: four times, as G-LoRA
    preset["spiel"] = dict(dropout=0.0)                                     # it has no place for one
    PRESETS[f"glora-{task}-{model}"] = preset | {"glora": dict(ratio=ratio, lr=exact)}
    PRESETS[f"glora-{task}-{model}-randomized"] = preset | {
        "glora": dict(ratio=ratio, lr=randomized, svd="randomized", oversample=oversample)}

# GraLoRA, Table 5; §4.1: Lion, all eight training sets, Magicoder-Evol-Instruct-110k; k by §3.4; cosine as in
# the authors' scripts.
GRALORA_MIX = dict(commonsense="commonsense_170k", code="data-evol_instruct-decontaminated")
GRALORA = [("llama3.1-8b", "code", 2e-4, 2), ("qwen2.5-1.5b", "commonsense", 2e-4, 2),
           ("qwen2.5-7b", "commonsense", 4e-4, 2), ("llama3.1-70b", "commonsense", 3e-4, 1)]
for model, task, lr, epochs in GRALORA:
    PRESETS[f"gralora-{task}-{model}"] = {
        "all": dict(task=task, rank=64, batch_size=192, epochs=epochs, lr=lr, optimizer="lion",
                    schedule="cosine", mix=GRALORA_MIX[task]),
        "gralora": dict(k=0)}
