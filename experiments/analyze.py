"""
What an update ΔW is like, each number beside its nulls: `shuffled`, the same entries in another order, and
`random`, the same singular values with other vectors. Sorting noise yields blocks, too.

    python experiments/analyze.py RUN ... [--out DIR]                   # directories that train.py wrote
    python experiments/analyze.py CHECKPOINT ... --base CHECKPOINT      # Hugging Face directories

analysis.json, by module and in the mean, and where matplotlib is (pip install -r requirements-plots.txt):
    spectra.png   singular values over their sum (CPS-LoRA Figs. 4, 7), with either paper's effective rank: of
                  two things, so never compared with each other. Algebraic ranks (GraLoRA Table 4) are in JSON
    angles.png    between the blocks of a k x k grid, of 8 / k vectors each, before and after bi-clustering
                  (CPS-LoRA App. L, Fig. 5; `trained`, in JSON: by the clusters of the run itself)
    errors.png    the least that GFA and LoRA leave of all updates at a budget (GFA Def. 3.1, Prop. 3.2)
    map-RUN.png   |ΔW| of a module, log scale, before and after bi-clustering (CPS-LoRA Fig. 1); contrast: the
                  share of the variance of |ΔW| that lies between blocks
A stage: CPS-LoRA's live one, whose angles and map are shown; the whole update where a method has no stages;
none for others. ΔW = B A, or merged - base where there are no factors, in float64: 16 bytes a parameter.
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from diagnostics import NULLS, analyze, bicluster, contrast

import checkpoint
from cps_lora import STRATEGIES, balanced_cut
from files import write_json


def weights(model):
    """{name: weight (out, in)}, copied, of every nn.Linear that is no head."""
    return {name: m.weight.detach().clone() for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and name not in model.HEADS}


@torch.no_grad()
def updates(directory, base=None, method=None):
    """-> {module: ΔW} against the pretrained weights, {module: the stage's}, {module: trained clusters}."""
    stage, trained, adapter = {}, {}, Path(directory, "adapter")
    if base:
        old, new = (weights(checkpoint.load(path, torch.float64)) for path in (base, directory))
        if {n: W.shape for n, W in old.items()} != {n: W.shape for n, W in new.items()}:
            raise ValueError(f"{directory}: its modules are not those of {base}")
        whole = {name: W - old[name] for name, W in new.items()}
    else:
        head = checkpoint.read_headers([adapter / "adapter.safetensors"]).get("classifier.out_proj.weight")
        model = checkpoint.load(checkpoint.base_of(adapter), torch.float64, num_labels=head and head[1][0])
        old, (method, _) = weights(model), checkpoint.load_adapter(model, adapter, method)
        for name, layer in [(name, m) for name, m in model.named_modules() if hasattr(m, "expanded")]:
            A, B = layer.expanded()
            stage[name], trained[name] = B @ A, (layer.lora_columns, layer.lora_rows)
        try:
            whole = {name: B @ A for name, (A, B) in method.factors(model).items()}
        except (AttributeError, NotImplementedError):
            method.merge(model)
            whole = {name: W - old[name] for name, W in weights(model).items()}
    whole, stage = ({name: M for name, M in found.items() if M.any()} for found in (whole, stage))
    if not whole:
        raise ValueError(f"{directory}: no module has an update")
    return whole, stage if base is None and hasattr(method, "reinit") else whole, trained


# ---- pictures

LINES = dict(update="C0", shuffled="C1", random="C2")


def panels(results, file, curves, dpi=150, **labels):
    """A panel a run, with curves(result): (label, x, y, deviation or None, colour, line style)."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(5 * len(results), 4), layout="constrained").subplots(
        1, len(results), squeeze=False, sharey=True)[0]
    for ax, (run, result) in zip(axes, results.items()):
        for label, x, y, deviation, colour, style in curves(result):
            ax.plot(x, y, color=colour, linestyle=style, label=label)
            if deviation:
                ax.fill_between(x, *([a + sign * b for a, b in zip(y, deviation)] for sign in (-1, 1)),
                                color=colour, alpha=0.15, linewidth=0)
        ax.set(title=run, **labels)
        ax.legend(fontsize="x-small")
    axes[0].figure.savefig(file, dpi=dpi)


def spectra_curves(result):
    for what, eber, style in (("accumulated", "eber_glora", "-"), ("stage", "eber_cps", "--")):
        paper = dict(eber_glora="G-LoRA's", eber_cps="CPS-LoRA's")[eber]
        for kind in ("update", "shuffled"):                 # of `random` they are the update's
            if found := result["spectra"][kind].get(what):
                label = f"{kind}, {what}: {paper} effective rank {result['mean'][kind][eber]:.1f}"
                yield (label, range(1, len(found["mean"]) + 1), found["mean"], found["deviation"],
                       LINES[kind], style)


def angle_curves(result):
    ks = [int(key.rpartition("_")[2]) for key in result["mean"]["update"] if key.startswith("angle_after_")]
    for kind in reversed(NULLS):                            # the update on top
        for when, style in (("before", ":"), ("after", "-")):
            mean, deviation = ([result[part][kind][f"angle_{when}_{k}"] for k in ks]
                               for part in ("mean", "deviation"))
            yield f"{kind}, {when}", [str(k) for k in ks], mean, deviation, LINES[kind], style


def error_curves(result):
    budgets = [f"{budget:g}" for budget in result["budgets"]]
    for kind in reversed(NULLS):                            # to LoRA, `random` is the update
        for method, style in (("gfa", "-"), ("lora", "--"))[:1 if kind == "random" else 2]:
            yield f"{kind}, {method}", budgets, result["errors"][kind][method], None, LINES[kind], style


def draw_map(M, k, strategy, title, file, dpi=150, most=256):
    """|M| and its nulls, as they are and by clusters; large ones as means of most x most cells."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(12, 8), layout="constrained").subplots(2, len(NULLS))
    for column, (kind, null) in zip(axes.T, NULLS.items()):
        N = null(M)
        clusters = bicluster(N, k, strategy)
        plain = [balanced_cut(torch.arange(n), k) for n in N.shape]
        for ax, when, (rows, columns) in zip(column, ("before", "after"), (plain, clusters)):
            cells = N.abs()[rows.argsort(stable=True)][:, columns.argsort(stable=True)]
            cells = nn.functional.adaptive_avg_pool2d(cells[None], [min(n, most) for n in N.shape])[0]
            floor = cells.max() * 1e-4          # an untouched entry has no logarithm
            image = ax.imshow(cells.clamp(min=floor).log10().numpy(), aspect="auto", interpolation="nearest")
            ax.set(title=f"{kind}, {when}: contrast {contrast(N, rows, columns):.3f}", xticks=[], yticks=[])
            ax.figure.colorbar(image, ax=ax)
    axes[0, 0].figure.suptitle(f"log10 |ΔW|: {title}")
    axes[0, 0].figure.savefig(file, dpi=dpi)


# ---- the command

def run(args):
    names = [Path(run).resolve().name for run in args.runs]
    names = [name if names.count(name) == 1 else str(run) for name, run in zip(names, args.runs)]
    out, results, maps = Path(args.out), {}, {}
    for name, directory in zip(names, args.runs):
        torch.manual_seed(args.seed)
        whole, stage, trained = updates(directory, args.base, args.method)
        found = results[name] = analyze(whole, stage, trained, args.k, args.budgets, args.strategy)
        hits = [module for module in whole if (args.module or "") in module]
        if not hits:
            raise ValueError(f"--module {args.module}: none of {', '.join(whole)}")
        module = hits[len(hits) // 2]           # by its place: not the one that looks best
        maps[name] = module, stage.get(module, whole[module])
        for kind in NULLS:
            shown = "  ".join(f"{key} {value:.3g}" for key, value in found["mean"][kind].items())
            print(f"{name} | {kind} | {shown}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "analysis.json", results)
    try:
        panels(results, out / "spectra.png", spectra_curves, xlabel="index", ylabel="s / Σ s")
        panels(results, out / "angles.png", angle_curves, xlabel="k", ylabel="degrees")
        panels(results, out / "errors.png", error_curves, xlabel="parameters / LoRA's at rank 1",
               ylabel="share left")
        for name, (module, M) in maps.items():
            file = out / f"map-{name.strip('/').replace('/', '-')}.png"
            draw_map(M, args.k[0], args.strategy, f"{name}, {module}", file)
    except ImportError:
        print("no pictures: pip install -r requirements-plots.txt")
    print(f"written: {out}")


def main(argv=None):
    p = checkpoint.Parser(prog="analyze.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="directory that train.py wrote, or a checkpoint")
    p.add_argument("--base", help="checkpoint that the others started from")
    p.add_argument("--method", help="the runs' method, where that is a .py file of your own: it is run")
    p.add_argument("--out", default="analysis", help="directory to write to")
    p.add_argument("--k", type=int, nargs="+", default=[2, 4, 8], help="clusters a side; the map: the first")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.3, 1, 2, 4, 8, 16],
                   help="multiples of LoRA's parameters at rank 1")
    p.add_argument("--strategy", default="cosine", choices=STRATEGIES, help="of the bi-clustering")
    p.add_argument("--module", help="part of the name of the map's module: of several hits the middle one")
    p.add_argument("--seed", type=int, default=42, help="of the nulls")
    args = p.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
