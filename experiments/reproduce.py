"""
What of the four papers can be made by a command: small runs of the bundled model, each for a mechanism, and
the papers' own tables at full size, as PAPERS.md has them.

    python experiments/reproduce.py --list              # all names
    python experiments/reproduce.py main                # runs; writes experiments/results/main.{md,json,png}
    python experiments/reproduce.py glora-table-4       # prints the full-size commands, one a row
    python experiments/reproduce.py main --model DIR --task FILE --steps 300 --rates 1e-4,3e-4,1e-3

Runs are kept under runs/sweeps: the same command goes on where it was stopped. --jobs 2 shares the cores.
"""
import argparse
import itertools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import accuracy
import blocks
import global_order
import regions
import structure
from sweep import CACHE, ROOT, Sweep

SMALL = dict(
    main=(accuracy.main, "all methods and baselines at LoRA's parameters"),
    anchors=(accuracy.anchors, "GFA Fig. 2: GFA, LoRA and DoRA over budgets"),
    k=(accuracy.k, "GraLoRA Fig. 8 (a): k at two ranks"),
    spectra=(structure.spectra, "G-LoRA Table 8, CPS-LoRA Figs. 4, 7: singular spectra, effective ranks"),
    rank=(blocks.rank, "GraLoRA Table 4: algebraic ranks"),
    angles=(blocks.angles, "CPS-LoRA Fig. 5: angles between blocks"),
    blocks=(blocks.blocks, "CPS-LoRA Figs. 2 (c), 6: blocks against a global low rank"),
    partition=(blocks.partition, "CPS-LoRA Tables 5, 6: how features are clustered"),
    importance=(regions.importance, "G-LoRA Table 4: importance scores"),
    ends=(regions.ends, "G-LoRA Tables 6, 7: which triplets start the adapters, and how often"),
    gradients=(blocks.gradients, "GraLoRA Figs. 3, 4, 6, 9: a planted outlier channel"),
    outlook=(global_order.outlook, "GFA Prop. 3.2: budgeted errors of a full update"),
    permute=(global_order.permute, "GFA §7: the order of coordinates"))
STEMS = dict(gradients="gradients-planted")         # gradients.py writes gradients.md


def slug(words):
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def tables(papers=ROOT / "PAPERS.md"):
    """{name: (paper, [table, commands, where run, claim])} of every table and figure with a command."""
    found = {}
    for part in papers.read_text(encoding="utf-8").split("\n## ")[1:]:
        paper, file = re.match(r"(\S+): (\w+)\.py", part).groups()
        rows = part.partition("| table, figure |")[2].partition("\n\n")[0].splitlines()[2:]
        for cells in ([cell.strip() for cell in row[1:-1].split("|")] for row in rows):
            if commands(cells[1]):
                found[f"{file}-{slug(cells[0])}"] = paper, cells
    return found


def expand(words):
    """One command for each word of each pair of braces, as a shell has it."""
    parts = [part.split(",") for part in re.split(r"[{}]", words)]
    parts[::2] = [[",".join(part)] for part in parts[::2]]          # outside of braces a comma is a comma
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def commands(cell):
    """The command lines of a cell of PAPERS.md."""
    whole = lambda flags: f"python train.py --model DIR --data DIR {flags}"
    return [whole(line) if line.startswith("--") else line
            for code in re.findall("`([^`]+)`", cell) if code.startswith(("--method", "python "))
            for line in expand(code)]


def listing():
    lines = ["run here, small:"] + [f"  {name:12}{words}" for name, (_, words) in SMALL.items()]
    for name, (paper, (what, _, ran, claim)) in tables().items():
        lines += ["", f"{name}: {paper}, {what}", f"  {ran or '-'}", f"  {claim or '-'}"]
    return "\n".join(lines)


def find(name):
    """The table's cells; ValueError where none or several are meant."""
    known = tables()
    hits = [key for key in known if key == name] or [key for key in known if key.startswith(f"{name}-")]
    if len(hits) != 1:
        raise ValueError(f"{name!r}: {' or '.join(hits) or 'no such name; see --list'}")
    return known[hits[0]][1]


def run(name, args):
    """Runs a small name, writes its three files."""
    given = [f"--{flag} {vars(args)[flag]}" for flag in ("model", "task", "data") if vars(args)[flag]]
    if given:
        args.common = " ".join([*filter(None, [args.common]), *given])
    made = SMALL[name][0](Sweep(args.jobs, args.cache), args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{Path(args.model).name}" if args.model else STEMS.get(name, name)
    words = "\n".join([f"# {name}: {SMALL[name][1]}", "", *made["words"]])
    (out / f"{stem}.md").write_text(words + "\n", encoding="utf-8")
    numbers = json.dumps(rounded(made["data"])).replace("}, ", "},\n")
    (out / f"{stem}.json").write_text(numbers + "\n", encoding="utf-8")
    if made.get("draw"):
        try:
            made["draw"](out / f"{stem}.png")
        except ImportError:
            print("no picture: pip install -r requirements-plots.txt")
    print(words)


def rounded(found):
    """Floats to five digits; infinity, which JSON has not, as null."""
    if isinstance(found, dict):
        return {str(key): rounded(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [rounded(value) for value in found]
    if isinstance(found, float):
        return float(f"{found:.5g}") if abs(found) < float("inf") else None
    return found


def main(argv=None):
    p = argparse.ArgumentParser(prog="reproduce.py", description=__doc__.split("\n\n")[0])
    p.add_argument("name", nargs="?", help="one of --list")
    p.add_argument("--list", action="store_true", help="show all names")
    p.add_argument("--seeds", type=int, default=5, help="42, 43, ..")
    p.add_argument("--jobs", type=int, default=2, help="runs at once")
    p.add_argument("--steps", type=int, help=f"of each run; default: {accuracy.STEPS}, some more")
    p.add_argument("--rates", default=",".join(accuracy.RATES), help="grid of learning rates")
    p.add_argument("--equal_time", action="store_true",
                   help="main once more in the first method's time; on an idle machine, with --jobs 1")
    p.add_argument("--methods", default=",".join(accuracy.METHODS), help="of main; held against the first")
    p.add_argument("--model", help="of main: in place of the bundled one, with --task and --data")
    p.add_argument("--task")
    p.add_argument("--data")
    p.add_argument("--common", help="flags of every run, --val_rows among them, for accuracy.BUNDLED")
    p.add_argument("--cache", default=str(CACHE), help="directory of the runs")
    p.add_argument("--out", default=str(ROOT / "experiments" / "results"), help="directory of the results")
    args = p.parse_args(argv)
    try:
        if args.list or not args.name:
            print(listing())
        elif args.name in SMALL:
            if args.model and args.name != "main":
                raise ValueError("--model: of main alone")
            run(args.name, args)
        else:
            print("\n".join(commands(find(args.name)[1])))
    except (ValueError, RuntimeError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
