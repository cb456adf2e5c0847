"""
GFA's global matrix: `outlook` and `permute` of reproduce.py. What a budget of it leaves of an update beside
what LoRA leaves (Def. 3.1, Prop. 3.2), and whether the order in which modules and entries are strung matters.
"""
import os

import accuracy
import gfa_permuted
import torch
from analyze import error_curves, panels
from diagnostics import NULLS, gfa_errors, lora_errors
from structure import load, minus, show, text, told, train

BUDGETS = [0.3, *map(float, accuracy.RANKS)]        # multiples of LoRA's parameters at rank 1
HEAD = ["left of ‖ΔW‖²", *(f"at {x:g}" for x in BUDGETS)]


def left(deltas, least, ordered=None):
    """Shares of ‖ΔW‖², of {module: ΔW} together, that a method leaves at each budget."""
    prices = [x * sum(sum(M.shape) for M in deltas.values()) for x in BUDGETS]
    norm = sum(M.square().sum().item() for M in deltas.values())
    return [error / norm for error in least(ordered or list(deltas.values()), prices)]


def strung(deltas, order, seed):
    """The one vector (1, d) that GFA folds, its coordinates in this order."""
    found = gfa_permuted.places({name: M.numel() for name, M in deltas.items()}, order, seed)
    vec = torch.empty(1, sum(map(len, found.values())), dtype=torch.float64)
    for name, where in found.items():
        vec[0, where] = deltas[name].flatten()
    return vec


def table(found):
    return accuracy.as_table([HEAD, *([label, *(show(list(at), 3) for at in zip(*seeds))]
                                      for label, seeds in found.items())])


def outlook(sweep, args):
    """GFA Prop. 3.2 on a full fine-tuning ΔW and on a LoRA r = 64's."""
    wanted = {"full": "--method full", "lora r = 64": "--method lora --rank 64"}
    rows, runs = train(sweep, args, wanted, ("full",))
    found, verdict = {}, []
    for label, each in runs.items():
        for run in each:
            whole = load(run)[0]
            for kind, null in NULLS.items():
                deltas = {name: null(M) for name, M in whole.items()}
                for method, least in (("gfa", gfa_errors), ("lora", lora_errors)):
                    found.setdefault(f"{label}: {kind}, {method}", []).append(left(deltas, least))
        at = lambda kind, method, label=label: [*zip(*found[f"{label}: {kind}, {method}"])]
        verdict += [told(f"{label} at {x:g}: GFA leaves less than LoRA", minus(lora, gfa))
                    for x, lora, gfa in zip(BUDGETS, at("update", "lora"), at("update", "gfa"))]
        verdict += [told(f"{label} at 8: {method} leaves less than of shuffled entries", minus(
            at("shuffled", method)[BUDGETS.index(8)], at("update", method)[BUDGETS.index(8)]))
            for method in ("gfa", "lora")]
    mean = lambda values: [sum(x) / len(x) for x in zip(*values)]
    results = {label: dict(budgets=BUDGETS, errors={kind: {
        method: mean(found[f"{label}: {kind}, {method}"]) for method in ("gfa", "lora")} for kind in NULLS})
        for label in runs}
    words = text(args, "Budgets are multiples of LoRA's parameters at rank 1, of all linears. LoRA leaves of "
                 "`random` what it leaves of the update.", table(found), verdict=verdict)
    return dict(words=words, data=dict(rows=rows, budgets=BUDGETS, found=found, verdict=verdict),
                draw=lambda file: panels(results, file, error_curves, 80, ylabel="share left",
                                         xlabel="parameters / LoRA's at rank 1"))


def permute(sweep, args):
    """GFA's order of coordinates, trained and as an approximation of full fine-tuning's ΔW."""
    method = os.path.relpath(gfa_permuted.__file__)
    wanted = {order: f"--method {method} --match_lora 8 --order {order} --order_seed {{{{seed}}}}"
              for order in gfa_permuted.ORDERS}
    rows, runs = train(sweep, args, wanted | {"full": "--method full"})
    found, of = {}, lambda order: rows[order]["loss"]
    for seed, run in enumerate(runs["full"], 42):
        whole = load(run)[0]
        for order in wanted:
            errors = left(whole, gfa_errors, [strung(whole, order, seed)])
            found.setdefault(order, []).append(errors)
    at = {order: [*zip(*errors)][BUDGETS.index(8)] for order, errors in found.items()}
    others = gfa_permuted.ORDERS[1:]
    verdict = [told(f"loss: {order} above own", minus(of(order), of("own"))) for order in others]
    verdict += [told(f"left of full's ΔW at 8: {order} above own", minus(at[order], at["own"]))
                for order in others]
    losses = accuracy.as_table([["order", "rate", "re-inits", "loss", "minus own's"], *(
        [order, rows[order]["lr"], str(rows[order]["reinits"]), show(of(order), 4),
         show(minus(of(order), of("own")), 4)] for order in wanted)])
    words = text(args, "GFA with LoRA's parameters at rank 8, trained; losses of validation rows:", losses,
                 "What it can leave at best of full fine-tuning's ΔW, in that order; `entries` is the null "
                 "without any structure:", table(found), verdict=verdict)
    return dict(words=words, data=dict(rows=rows, budgets=BUDGETS, found=found, verdict=verdict),
                draw=lambda file: draw_orders(rows, found, wanted, file))


def draw_orders(rows, found, orders, file):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    for n, order in enumerate(orders):
        mean, half = accuracy.interval(rows[order]["loss"])
        losses.errorbar([order], [mean], yerr=[half], fmt="o", color=f"C{n}")
        y, bars = zip(*(accuracy.interval(list(at)) for at in zip(*found[order])))
        errors.errorbar([f"{x:g}" for x in BUDGETS], y, yerr=bars, color=f"C{n}", label=order)
    losses.set(ylabel="loss of validation rows")
    errors.set(xlabel="parameters / LoRA's at rank 1", ylabel="share left of full's ‖ΔW‖²")
    errors.legend()
    figure.savefig(file, dpi=80)
