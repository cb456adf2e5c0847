"""
Runs beside each other: a markdown table, and the loss curves of all in one picture (pip install -r
requirements-plots.txt; without matplotlib there is the table alone).

    python experiments/compare.py runs/RUN runs/RUN [--png FILE]
"""
import argparse
import json
from pathlib import Path

HEAD = ["method", "trainable", "steps", "before", "after", "loss", "tokens/s", "memory", "seconds"]


def load(directory):
    """A run's args, summary, metrics and directory. ValueError in one line where it is none, or not ended."""
    directory = Path(directory)
    needed = "args.json", "metrics.jsonl", "summary.json"
    if missing := [name for name in needed if not (directory / name).is_file()]:
        raise ValueError(f"{directory}: no run that has ended: it holds no {', '.join(missing)}")
    try:
        args, summary = (json.loads((directory / f"{name}.json").read_text()) for name in ("args", "summary"))
        metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{directory}: not JSON ({error})") from None
    return dict(args=args, summary=summary, metrics=metrics, directory=directory)


def labels(runs):
    """Method and rank of each run, and its directory's name where another run has the same."""
    short = [f"{Path(run['summary']['method']).stem}, r = {run['summary']['rank']}" for run in runs]
    return [f"{label} ({run['directory'].resolve().name})" if short.count(label) > 1 else label
            for label, run in zip(short, runs)]


def row(label, run):
    """The cells of a run: the mean over its sets, the loss on held-out answers, the largest memory."""
    summary = run["summary"]
    score = lambda when: f"{summary[when]['mean']:.1%}" if summary.get(when) else "-"
    memory = max((line["peak_memory_mb"] for line in run["metrics"]), default=0)
    return [label, f"{summary['trainable']:,}", f"{summary['steps']}", score("before"), score("after"),
            f"{summary['loss_after']:.4f}", f"{summary['tokens_per_second']:,.0f}", f"{memory:,.0f} MB",
            f"{summary['seconds']:.0f}"]


def plot(names, runs, file):
    from matplotlib.figure import Figure
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    for name, run in zip(names, runs):
        axes.plot([line["step"] for line in run["metrics"]], [line["loss"] for line in run["metrics"]],
                  label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    axes.figure.savefig(file, dpi=150)


def main(argv=None):
    p = argparse.ArgumentParser(prog="compare.py", description=__doc__.strip().partition(":")[0])
    p.add_argument("runs", nargs="+", metavar="RUN", help="directory that train.py wrote")
    p.add_argument("--png", default="compare.png", help="file of the loss curves")
    args = p.parse_args(argv)
    try:
        runs = [load(directory) for directory in args.runs]
    except ValueError as error:
        p.exit(2, f"compare.py: error: {error}\n")
    names = labels(runs)
    for cells in [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *map(row, names, runs)]:
        print(f"| {' | '.join(cells)} |")
    if len(tasks := sorted({f"{run['summary']['task']} of {run['args']['model']}" for run in runs})) > 1:
        print(f"note: not one task and one model: {', '.join(tasks)}")
    try:
        plot(names, runs, args.png)
        print(f"loss curves: {args.png}")
    except ImportError:
        print("no picture: pip install -r requirements-plots.txt")


if __name__ == "__main__":
    main()
