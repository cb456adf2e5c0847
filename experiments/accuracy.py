"""
Sweeps over learning rates and seeds: `main`, `anchors` and `k` of reproduce.py.

Every method has the same grid of rates at full length on the first seed; the rate with the least loss on the
validation rows goes on to all seeds. Seeds are paired: seed s draws the same order of data for every method.
Accuracy on a model of 0.75M weights tests no paper: that these rows differ, or that they do not, is all it says.
"""
import math
import statistics

RATES = "3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 3e-1".split()
T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}      # 97.5 %, Student's
# At 240 steps every method is above 98 %. At 50 LoRA reached 10, 81, 65 and 0 % at 3e-3, 1e-2, 3e-2 and 1e-1
# (seed 42), which lies between 50 and 85: so 50, before another method was looked at.
STEPS, BUNDLED = 50, "--val_rows 512 --eval_every 50 --log_every 50 --no-eval_before"
STAGES = dict(glora="--reinit_every {fifth}s", rosa="--reinit_every {fifth}s", cps_lora="--reinit_every {half}s")
# LoRA's 71,680 parameters at rank 8, or as near as the method comes; full has them all.
EQUAL = dict(gfa="--match_lora 8", gfa_aligned="--match_lora 8", denselora="--rank 24")
METHODS = ("lora dora pissa milora rosa rasa mora denselora spiel full gralora cps_lora glora gfa "
           "gfa_aligned").split()
BUDGETS = {"0.3": None, "1": 1, "2": 2, "4": 4, "8": 8, "16": 16}


def interval(values):
    """Mean and half of the 95 % interval; nan for one value."""
    n = len(values)
    return statistics.fmean(values), T[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def flags(words, steps, common, **given):
    """A run's command line; {fifth} and {half} of the steps are where the papers re-initialise."""
    parts = [words.format(fifth=max(1, round(steps / 5)), half=max(1, round(steps / 2))), common]
    return " ".join([*filter(None, parts), f"--max_steps {steps}", *(f"--{k} {v}" for k, v in given.items())])


def loss_of(result):
    return math.inf if "diverged" in result else result["summary"]["last"]["loss_val"]


def numbers(results):
    """What is kept of the runs of one row, a list each by seed."""
    of = lambda get: [get(result["summary"]) for result in results]
    return dict(accuracy=of(lambda s: s["after"]["mean"]), loss=of(lambda s: s["loss_after"]),
                speed=of(lambda s: s["tokens_per_second"]), steps=of(lambda s: s["steps"])[0],
                reinits=of(lambda s: len(s["reinit_seconds"])), trainable=of(lambda s: s["trainable"])[0])


def table(sweep, configs, seeds, steps=STEPS, common=BUNDLED, rates=RATES, equal_time=True):
    """{label: flags} -> {label: its grid {rate: validation loss}, rate, numbers(), and those in equal time}."""
    seeds = [42 + i for i in range(seeds)]
    plans = {label: {lr: flags(words, steps, common, lr=lr, seed=seeds[0]) for lr in rates}
             for label, words in configs.items()}
    found = iter(sweep([run for plan in plans.values() for run in plan.values()]))
    rows = {label: dict(flags=configs[label], grid={lr: loss_of(next(found)) for lr in plan})
            for label, plan in plans.items()}
    for row in rows.values():
        row["lr"] = min(row["grid"], key=row["grid"].get)
        if row["grid"][row["lr"]] == math.inf:
            raise RuntimeError(f"{row['flags']}: diverged at every rate")
    again = lambda row, steps: [flags(row["flags"], steps, common, lr=row["lr"], seed=seed) for seed in seeds]
    found = iter(sweep([run for row in rows.values() for run in again(row, steps)]))
    for row in rows.values():
        row |= numbers([next(found) for _ in seeds])
    if equal_time:      # as many steps as LoRA's time is for
        pace = statistics.median(rows[next(iter(rows))]["speed"])
        at = {label: max(1, round(steps * statistics.median(row["speed"]) / pace)) for label, row in rows.items()}
        found = iter(sweep([run for label, row in rows.items() for run in again(row, at[label])]))
        for row in rows.values():
            row["equal_time"] = numbers([next(found) for _ in seeds])
    return rows


def markdown(rows, seeds):
    """The table and its grid. The interval of a difference is the smallest that these seeds can tell from none."""
    first, *_ = reference = next(iter(rows)), rows[next(iter(rows))]
    percent = lambda values: "{:.1f} ± {:.1f}".format(*(100 * x for x in interval(values)))
    minus = lambda a, b: [x - y for x, y in zip(a, b)]
    timed = "equal_time" in reference[1]
    head = ["row", "trainable", "rate", "re-inits", "accuracy, %", f"minus {first}'s", "loss", f"minus {first}'s"]
    lines = [head + ["steps in equal time", "accuracy, %"] * timed]
    for label, row in rows.items():
        edge = " (edge)" if row["lr"] in (list(row["grid"])[0], list(row["grid"])[-1]) else ""
        other = reference[1]
        cells = [label, f"{row['trainable']:,}", row["lr"] + edge, "{}".format(row["reinits"][0]),
                 percent(row["accuracy"]), percent(minus(row["accuracy"], other["accuracy"])),
                 "{:.4f} ± {:.4f}".format(*interval(row["loss"])),
                 "{:+.4f} ± {:.4f}".format(*interval(minus(row["loss"], other["loss"])))]
        lines.append(cells + ([f"{row['equal_time']['steps']}", percent(row["equal_time"]["accuracy"])]
                              if timed else []))
    rates = list(reference[1]["grid"])
    shown = lambda loss: "diverged" if loss == math.inf else f"{loss:.4f}"
    grid = [["validation loss at rate", *rates],
            *([label, *(shown(row["grid"][lr]) for lr in rates)] for label, row in rows.items())]
    words = f"± is half of the 95 % interval over {seeds} paired seeds; a difference within it cannot be told from 0."
    return "\n\n".join([words, as_table(lines), "Rates, on the first seed:", as_table(grid)])


def as_table(lines):
    ruler = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], ruler, *lines[1:]])


def main(sweep, args):
    methods = args.methods.split(",") if args.methods else METHODS
    equal = {} if args.model else EQUAL
    words = {m: " ".join(filter(None, [f"--method {m}", STAGES.get(m), equal.get(m)])) for m in methods}
    how = dict(steps=args.steps or STEPS, common=args.common or BUNDLED, rates=args.rates or RATES)
    return table(sweep, words, args.seeds, **how, equal_time=not args.model)


def anchors(sweep, args):
    words = {f"{m} r = {r}": f"--method {m} --rank {r}" for m in ("lora", "dora") for r in BUDGETS.values() if r}
    words |= {f"gfa at {x}": f"--method gfa --match_lora {x}" for x in BUDGETS}
    return table(sweep, words, args.seeds, equal_time=False)


def k(sweep, args):
    words = {f"r = {r}, k = {k}": f"--method gralora --rank {r} --k {k}" for r in (8, 32) for k in (1, 2, 4, 8)}
    return table(sweep, words, args.seeds, equal_time=False)
