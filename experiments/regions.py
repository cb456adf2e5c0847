"""
G-LoRA's regions and starts (Tables 4, 6, 7): `importance` and `ends` of reproduce.py. Held-out losses stand
beside, paired; as a test of the paper's accuracies they are none.
"""
from statistics import fmean

import safetensors.torch
import torch
from accuracy import STAGES, STEPS, as_table
from analyze import weights
from diagnostics import shuffled
from structure import (
    above,
    checkpoint,
    load,
    minus,
    result,
    rows_of,
    rows_table,
    show,
    told,
    train,
)

GLORA = f"--method glora {STAGES['glora']}"


def regions(run):
    """{module: (input features, output features)} of G-LoRA's last region."""
    saved = safetensors.torch.load_file(run["directory"] / "adapter" / "adapter.safetensors")
    return {key.removesuffix(".lora_rows"): (rows, saved[key.replace("lora_rows", "lora_columns")])
            for key, rows in saved.items() if key.endswith(".lora_rows")}


def overlap(one, other):
    """Mean over modules and sides: the share of one's features that the other has."""
    return fmean(len(set(a.tolist()) & set(b.tolist())) / len(a)
                 for name in one for a, b in zip(one[name], other[name]))


def density(found, deltas):
    """Mean over modules: the share of ‖ΔW‖² in a region over its share of the entries. 1: as elsewhere."""
    return fmean((deltas[name][columns][:, rows].square().mean() / deltas[name].square().mean()).item()
                 for name, (rows, columns) in found.items())


def importance(sweep, args):
    """G-LoRA Table 4: whether scores agree on a region, and whether full fine-tuning's ΔW lies in it."""
    wanted = {"taylor": GLORA} | {one: f"{GLORA} --importance {one}" for one in ("grad", "fisher")}
    rows, runs = rows_of(sweep, args, wanted)
    full = [load(run)[0] for run in train(sweep, args, {"full": "--method full"})[1]["full"]]
    noise = [{name: shuffled(M) for name, M in deltas.items()} for deltas in full]
    found = {label: [regions(run) for run in each] for label, each in runs.items()}
    sizes = found["taylor"][0]
    chance = fmean(len(kept) / n for name, pair in sizes.items()
                   for kept, n in zip(pair, full[0][name].T.shape))
    verdict, lines = [], [["row", "density of full's ‖ΔW‖²", "shuffled",
                           *(f"overlap with {other}" for other in wanted), "of seeds"]]
    for label, mine in found.items():
        row = rows[label]
        for kind, deltas in (("update", full), ("shuffled", noise)):
            row[kind]["density"] = [*map(density, mine, deltas)]
        dense, null = row["update"]["density"], row["shuffled"]["density"]
        row["overlap"] = {other: [*map(overlap, mine, found[other])] for other in wanted}
        row["seeds"] = [*map(overlap, mine, mine[1:] + mine[:1])]
        lines.append([label, show(dense), show(null), *map(show, row["overlap"].values()),
                      show(row["seeds"])])
        above_chance = lambda values: [x - chance for x in values]
        verdict += [told(f"{label}: its region has more of full's ‖ΔW‖² than of the shuffled one's",
                         minus(dense, null)),
                    told(f"{label}: regions of other seeds overlap above chance", above_chance(row["seeds"]))]
        verdict += [told(f"{label} and {other} overlap above chance", above_chance(row["overlap"][other]))
                    for other in list(wanted)[list(wanted).index(label) + 1:]]
    return result(args, rows, verdict, rows_table(rows, ("eber_glora",), loss=True), as_table(lines),
                  f"Chance: an overlap of {chance:.3f}, a density of 1.", keys=("eber_glora", "density"),
                  chance=chance)


def ends(sweep, args):
    """G-LoRA Tables 6, 7: triplets to start on, global and local, and the period of re-initialisation."""
    steps, base = args.steps or STEPS, weights(checkpoint.load(checkpoint.TINY, torch.float64))
    wanted = {"bottom, top": GLORA} | {
        f"{g}, {l}": f"{GLORA} --global_init {g} --local_init {l}"
        for g, l in (("bottom", "bottom"), ("top", "top"), ("top", "bottom"))}
    wanted |= {f"every {epochs} of 10": f"--method glora --reinit_every {max(1, round(steps * epochs / 10))}s"
               for epochs in (3, 4, 5)} | {"none": "--method glora --reinit_every none"}
    rows, runs = rows_of(sweep, args, wanted)
    for label, row in rows.items():
        size = lambda run: fmean((M.norm() / base[name].norm()).item() for name, M in load(run)[0].items())
        row["update"]["size"] = [*map(size, runs[label])]
    verdict = [*(above(rows, "eber_glora", "bottom, top", other) for other in ("none", "every 5 of 10")),
               *(above(rows, "size", f"top, {l}", f"bottom, {l}") for l in ("top", "bottom"))]
    keys = ("eber_glora", "size")
    return result(args, rows, verdict, rows_table(rows, keys, loss=True), keys=keys)
