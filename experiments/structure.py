"""
What the papers say of updates, in small, each number beside its nulls. Here: `spectra` of reproduce.py, and
what its names in blocks.py, regions.py and global_order.py share. Runs are of the bundled model in
accuracy.py's setting, at the rates that `main` chose; what a longer stage may change is run for 240 steps,
too. A claim is held where the 95 % interval of its difference, paired by seed, lies above 0, not held where
it lies below, and cannot be told where 0 is in it.
"""
import json
import sys
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from accuracy import BUNDLED, STAGES, STEPS, as_table, flags, interval, loss_of
from analyze import LINES, updates
from diagnostics import NULLS, average, measures, spectrum

import checkpoint
import presets

MAIN = Path(__file__).with_name("results") / "main.json"
LONG, LONG_SEEDS = 240, 3
LINE = "- {claim}: {difference:+.3g} ± {half:.2g}, **{verdict}**"
COLUMNS = {"eber_glora": "EBER (p ∝ s², whole update)", "eber_cps": "EBER (p ∝ s, last stage)",
           "angle_trained": "angle, degrees", "contrast_trained": "contrast", "size": "‖ΔW‖ / ‖W‖",
           "density": "density of full's ‖ΔW‖²"}
SPECTRAL = ("rank", "eber_glora", "eber_cps")      # to these the null `random` is the update


def rate(words):
    """(learning rate of these flags' method, who chose it)."""
    shared, own, owner = presets.rows("tiny", checkpoint.load_method(words.split()[1]))
    chosen = json.loads(MAIN.read_text())["rows"] if MAIN.is_file() else {}
    found = (chosen[owner]["lr"], "main") if owner in chosen else (own.get("lr", shared["lr"]), "its file")
    return f"{float(found[0]):g}", found[1]


def train(sweep, args, configs, long=()):
    """{label: flags} -> {label: row}, {label: results by seed}; those in long run for LONG steps, too."""
    common = args.common or f"{BUNDLED} --eval_limit 16"        # no accuracy is used
    plans = {label: (words, args.steps or STEPS, args.seeds) for label, words in configs.items()}
    for label in () if args.steps else long:
        plans[f"{label}, {LONG} steps"] = configs[label], LONG, min(args.seeds, LONG_SEEDS)
    runs = {label: [flags(words, steps, common, lr=rate(words)[0], seed=seed).format(seed=seed)
                    for seed in range(42, 42 + seeds)] for label, (words, steps, seeds) in plans.items()}
    found = iter(sweep([run for each in runs.values() for run in each]))
    results = {label: [next(found) for _ in each] for label, each in runs.items()}
    row = lambda words, steps, each: dict(
        flags=words, steps=steps, lr="{} ({})".format(*rate(words)), loss=[loss_of(run) for run in each],
        reinits=len(each[0]["summary"]["reinit_seconds"]))
    return {label: row(*plans[label][:2], each) for label, each in results.items()}, results


def load(run):
    """updates() of a run, read once; what is drawn after it, is drawn from the run's seed."""
    torch.manual_seed(run["args"]["seed"])
    if "updates" not in run:
        run["updates"] = updates(run["directory"], method=run["args"]["method"])
    return run["updates"]


def measured(run, ks=()):
    """{kind: {measure: mean over modules}}; the nulls' blocks are the trained ones."""
    whole, stage, trained = load(run)
    of = lambda null, name, M: measures(null(M), null(stage[name]) if name in stage else None,
                                        trained.get(name), ks, "cosine", 8)
    return {kind: average([of(null, *item) for item in whole.items()]) for kind, null in NULLS.items()}


def rows_of(sweep, args, configs, long=(), ks=()):
    """train(), with {kind: {measure: [by seed]}} in each row."""
    rows, runs = train(sweep, args, configs, long)
    for label, row in rows.items():
        found = [measured(run, ks) for run in runs[label]]
        row |= {kind: {key: [one[kind][key] for one in found] for key in found[0][kind]} for kind in NULLS}
    return rows, runs


def minus(a, b):
    return [x - y for x, y in zip(a, b)]        # by seed; the shorter one's


def judged(claim, difference, half, seeds):
    verdict = "held" if difference > half else "not held" if difference < -half else "cannot be told"
    return dict(claim=claim, difference=difference, half=half, seeds=seeds, verdict=verdict)


def told(claim, values):
    return judged(claim, *interval(values), len(values))


def show(values, digits=2):
    return "{:.{d}f} ± {:.{d}f}".format(*interval(values), d=digits) if values else ""


def text(args, *parts, verdict):
    """The lines of markdown of a name."""
    few = "" if args.steps else f" ({min(args.seeds, LONG_SEEDS)} where it has {LONG} steps)"
    return [f"The bundled model, all linears, rank 8 and {args.steps or STEPS} steps unless a row says "
            f"otherwise, {args.seeds} paired seeds{few}. ± is half of the 95 % interval over seeds. Nulls: "
            "`shuffled`, the same entries in another order; `random`, the same singular values with other "
            "vectors.", "", *"\n\n".join(parts).split("\n"), "",
            *map(LINE.format_map, verdict)]


def rows_table(rows, keys, loss=False):
    """A line a row: re-inits, rate, measures and nulls; loss of validation rows, and minus the first's."""
    kinds = [(key, kind) for key in keys for kind in NULLS if any(key in row[kind] for row in rows.values())
             and (key not in SPECTRAL or kind != "random")]
    heads = [COLUMNS.get(key, key) if kind == "update" else kind for key, kind in kinds]
    lines = [["row", "re-inits", "rate", *heads, *["loss", "minus the first's"] * loss]]
    for label, row in rows.items():
        first = next(other for other in rows.values() if other["steps"] == row["steps"])
        digits = lambda key: 3 if key in ("contrast_trained", "size") else 2
        cells = [show(row[kind].get(key), digits(key)) for key, kind in kinds]
        lines.append([label, str(row["reinits"]), row["lr"], *cells,
                      *[show(row["loss"], 4), show(minus(row["loss"], first["loss"]), 4)] * loss])
    return as_table(lines)


def draw_rows(rows, keys, file):
    """A panel a measure: of each row mean and interval, beside its nulls'; far off, as ranks', in words."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(5 * len(keys), 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(keys), squeeze=False, sharey=True)[0]
    for ax, key in zip(axes, keys):
        for n, (kind, colour) in enumerate(LINES.items()):
            found = [(y + 0.2 * n, *interval(row[kind][key])) for y, row in enumerate(rows.values())
                     if key in row[kind] and (key not in SPECTRAL or kind != "random")]
            y, mean, half = zip(*found) if found else ((), (), ())
            if found and kind == "shuffled" and key in SPECTRAL:
                ax.plot([], [], label=f"shuffled: {min(mean):.0f} to {max(mean):.0f}", color=colour)
            elif found:
                ax.errorbar(mean, y, xerr=half, fmt="o", markersize=4, color=colour, label=kind)
        ax.set(xlabel=COLUMNS.get(key, key), yticks=range(len(rows)), yticklabels=rows,
               ylim=(len(rows) - 0.3, -0.5))
        ax.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    figure.savefig(file, dpi=80)


def result(args, rows, verdict, *parts, keys, **more):
    return dict(words=text(args, *parts, verdict=verdict), data=dict(rows=rows, verdict=verdict, **more),
                draw=lambda file: draw_rows(rows, keys, file))


def above(rows, key, label, other):
    return told(f"{COLUMNS.get(key, key)}: {label} above {other}",
                minus(rows[label]["update"][key], rows[other]["update"][key]))


def spectra(sweep, args):
    """Effective ranks: of the accumulated update (G-LoRA), of one stage (CPS-LoRA)."""
    methods = "lora dora pissa rasa rosa gralora cps_lora glora".split()
    wanted = {m: " ".join(filter(None, [f"--method {m}", STAGES.get(m)])) for m in methods}
    rows, runs = rows_of(sweep, args, wanted, ("lora", "gralora", "cps_lora", "glora"))
    curves = {}
    for label, each in runs.items():
        found = [load(run) for run in each]
        values = {what: [torch.linalg.svdvals(M) for one in found for M in one[n].values()]
                  for n, what in enumerate(("whole", "stage"))}
        curves[label] = {what: spectrum(s)["mean"] for what, s in values.items() if s}
    verdict = [above(rows, "eber_glora", "glora", other) for other in methods[:-1]]
    for end in [end for end in ("", f", {LONG} steps") if f"lora{end}" in rows]:
        verdict += [above(rows, "eber_cps", *pair) for pair in (
            (f"gralora{end}", f"lora{end}"), (f"cps_lora{end}", f"gralora{end}"))]
    found = result(args, rows, verdict, "G-LoRA Table 8, of the update of all stages:",
                   rows_table(rows, ("rank", "eber_glora")), "CPS-LoRA Figs. 4, 7, of the last stage, or of "
                   "the whole update where a method has no stages; another measure of another thing:",
                   rows_table(rows, ("eber_cps",)), keys=SPECTRAL, curves=curves)
    return found | dict(draw=lambda file: draw_spectra(curves, rows, file))


def draw_spectra(curves, rows, file):
    from matplotlib.figure import Figure
    axes = Figure(figsize=(13, 5), layout="constrained").subplots(1, 2)
    for ax, what, key in zip(axes, ("whole", "stage"), SPECTRAL[1:]):
        for n, (label, found) in enumerate(curves.items()):
            if what in found and key in rows[label]["update"]:
                s, eber = [x for x in found[what] if x > 1e-5], fmean(rows[label]["update"][key])
                ax.plot(range(1, len(s) + 1), s, ":" if "steps" in label else "-", color=f"C{n % 8}",
                        label=f"{label}: {eber:.1f}")
        ax.set(title=COLUMNS[key], xlabel="index", ylabel="s / Σ s", xscale="log", yscale="log")
        ax.legend(fontsize="small")
    axes[0].figure.savefig(file, dpi=80)
