"""
GraLoRA's Figs. 3, 4, 6, 9: how far a step of LoRA (k = 1) or of GraLoRA is from one of full fine-tuning
where an input channel is an outlier: a planted one, and with --model those of every down_proj.

    python experiments/gradients.py [--model DIR --data DIR] [--out experiments/results]

The paper does not print its measure. Here G = ∂L/∂W (out, in) is full fine-tuning's gradient, and the
method's is what its step does to W, to first order and for a rate of 1 (Eq. 4): U = s² (G AᵀA + B BᵀG) in
each block, s = α / r = 2; with B = 0, the start, and with B ~ N(0, σ_A²), as one that has trained.
    as is      ‖U − G‖ / ‖G‖
    scaled     the least ‖cU − G‖ / ‖G‖ over c, for the learning rate is another one for each method
    map        c ‖U_b‖ / ‖G_b‖ of each block b of the method's k x k grid; LoRA's on a grid of 8 x 8
    inside, outside     the same of all blocks that see the outlier channel, and of all others
    share      the outlier column's part of ‖U‖²; of G: `share of G`
The null beside each: the same for G with its entries shuffled, where no channel stands out.
"""
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import train
from data import commonsense, text
from gralora import GraLoRALinear

RANKS, KS, GRID = (16, 32, 64, 128), (1, 2, 4, 8), 8
GAIN = 50               # of the planted channel
OUTLIER = 20            # a channel is one from this multiple of the median channel's mean |x| on
DRAWS, ROWS = 3, 16     # of A and B, and of the planted G; rows of the training mix
NUMBERS = ("as is", "scaled", "inside", "outside", "share")


def planted(o, i, channel, gain=GAIN, tokens=512):
    """G = dYᵀ X (o, i) of Gaussian dY and X, one channel of X times gain."""
    X = torch.randn(tokens, i)
    X[:, channel] *= gain
    return torch.randn(tokens, o).T @ X


blocks = lambda G, k: G.unflatten(0, (k, -1)).unflatten(-1, (k, -1))                    # (j, o/k, n, i/k)
share = lambda G, channel: (G[:, channel].square().sum() / G.square().sum()).item()     # of a column


def fused(G, layer):
    """U (o, i) of a GraLoRALinear: its k² blocks, each from G's own block alone."""
    k, U = layer.k, torch.empty_like(G)
    A, B = blocks(layer.lora_A, k), blocks(layer.lora_B, k)             # (j, p, n, i/k), (j, o/k, n, p)
    for j, n in itertools.product(range(k), repeat=2):
        a, b, g = A[j, :, n], B[j, :, n], blocks(G, k)[j, :, n]
        blocks(U, k)[j, :, n] = layer.scaling ** 2 * (g @ a.T @ a + b @ (b.T @ g))
    return U


def measure(U, G, channel, grid):
    """{number: value} of U, and its map (grid, grid) as lists."""
    c = (U * G).sum() / U.square().sum()
    mine, full = (blocks(x, grid).square().sum((1, 3)) for x in (c * U, G))             # (j, n)
    sees = torch.arange(grid) == channel * grid // G.shape[1]
    ratio = lambda n: (mine[:, n].sum() / full[:, n].sum()).sqrt().item()
    deviation = lambda U: ((U - G).norm() / G.norm()).item()
    values = deviation(U), deviation(c * U), ratio(sees), ratio(~sees), share(U, channel)
    return dict(zip(NUMBERS, values), map=(mine / full).sqrt().tolist())


def rounded(x):
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.3g}")


@torch.no_grad()
def sweep(gradients, channel, ranks=RANKS, ks=KS):
    """A row for each B, r, k: means over draws, one for each G; under `spread` the largest - the least."""
    rows = []
    for start, r, k in itertools.product(("zero", "noise"), ranks, ks):
        found = []
        for seed, G in enumerate(gradients, 1):
            torch.manual_seed(seed)
            layer = GraLoRALinear(SimpleNamespace(weight=G), r, 2 * r, 0.0, k, 0)
            if start == "noise":
                layer.lora_B.normal_(0, (k / (3 * G.shape[1])) ** 0.5)      # the variance of A's init
            found.append(measure(fused(G, layer), G, channel, GRID if k == 1 else k))
        values = {name: torch.tensor([one[name] for one in found]) for name in found[0]}
        spread = {name: rounded((values[name].max() - values[name].min()).item()) for name in NUMBERS}
        means = {name: rounded(v.mean(0).tolist()) for name, v in values.items()}
        rows.append({"B": start, "r": r, "k": k, **means, "spread": spread})
    return rows


def subject(name, gradients, channel):
    """The sweep of these G beside its null's."""
    shuffled = [G.flatten()[torch.randperm(G.numel())].view_as(G) for G in gradients]
    return {"name": name, "channel": channel, "share of G": sum(share(G, channel) for G in gradients) / DRAWS,
            "rows": sweep(gradients, channel), "null": sweep(shuffled, channel)}


def outliers(mean):
    """[(channel, multiple of the median)] from OUTLIER on, the largest first; at least the largest."""
    values, channels = (mean / mean.median()).sort(descending=True)
    return list(zip(channels.tolist(), rounded(values.tolist())))[:max(1, (values >= OUTLIER).sum())]


def activations(directory, data):
    """[(G (o, i), outliers)] of each down_proj, for train.py's loss; the last one sees fewer tokens."""
    model, found = checkpoint.load(directory).requires_grad_(False), []
    rows, tokenizer = commonsense.rows(data, "commonsense", "train"), text.Tokenizer(directory, model.cfg)
    examples, _ = text.encode(tokenizer, [rows[n] for n in train.order(0, 0, len(rows))[:ROWS]], 512)
    look = lambda layer, x, y: found.append((layer, outliers(x[0].detach().abs().mean(0))))
    for block in model.blocks():
        block.mlp.down_proj.requires_grad_(True).register_forward_hook(look)
    model.losses(examples).mean().backward()
    return [(layer.weight.grad, named) for layer, named in found]


def markdown(result):
    cell = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = [f"`{result['command']}`; its docstring says what the numbers are."]
    table = lambda head, rows: lines.extend(
        f"| {' | '.join(map(cell, row))} |" for row in [head, ["---"] * len(head), *rows])
    for s in result["subjects"]:
        lines.append(f"\n## {s['name']}\n\nChannel {s['channel']}, share of G {s['share of G']:.3g}; "
                     f"means of {DRAWS} draws (null).\n")
        table(["B", "r", "k", *NUMBERS], [
            [row["B"], row["r"], row["k"], *(f"{cell(row[n])} ({cell(null[n])})" for n in NUMBERS)]
            for row, null in zip(s["rows"], s["null"])])
    rows = []
    for s in result["layers"]:
        named = [f"{c} ({v:.3g})" for c, v in s["outliers"]]
        at = {(row["r"], row["k"]): row for row in s["rows"] if row["B"] == "noise"}
        cells = [" / ".join(cell(at[rk][n]) for rk in ((16, 1), (128, 1), (128, 8))) for n in NUMBERS]
        named[3:] = [f"{len(named) - 3} more"] if len(named) > 3 else []
        rows.append([s["layer"], ", ".join(named), s["share of G"], *cells])
    if rows:
        lines.append(f"\n## Every down_proj\n\nChannels of {OUTLIER} times the median's mean |x| on, else "
                     "the largest. B noise, one draw: LoRA r = 16 / LoRA r = 128 / GraLoRA r = 128, k = 8.\n")
        table(["layer", "channels", "share of G", *NUMBERS], rows)
    return "\n".join(lines) + "\n"


def draw(result, file):
    """Fig. 3 (a); then of each subject the numbers over r, dashed the null's, and maps: Figs. 3, 4, 6, 9."""
    from matplotlib import colors, figure
    heights = [1] + [3] * len(result["subjects"])
    whole = figure.Figure(figsize=(13, 3 * sum(heights)), layout="constrained")
    first, *parts = whole.subfigures(len(heights), 1, height_ratios=heights)
    (ax := first.subplots()).set(yscale="log", xlabel="down_proj of layer", ylabel="mean |x| / median")
    for n, channel, value in ((s["layer"], *pair) for s in result["layers"] for pair in s["outliers"][:3]):
        ax.annotate(channel, (n, value), fontsize=7)
        ax.plot(n, value, ".", color="C0")
    for part, s in zip(parts, result["subjects"]):
        part.suptitle(f"{s['name']}, channel {s['channel']}, B noise (dashed: entries of G shuffled)")
        axes = part.subplots(3, 4)
        for (n, k), (kind, style) in itertools.product(enumerate(KS), (("null", "--"), ("rows", "-"))):
            rows = [row for row in s[kind] if row["k"] == k and row["B"] == "noise"]
            for ax, name in zip(axes[0], ("as is", "scaled", "outside", "share")):
                ax.plot([str(row["r"]) for row in rows], [row[name] for row in rows], f"C{n}{style}")
                ax.set(title=name, xlabel="r")
            for ax, row in zip(axes[1:, n], rows[1::2]):
                image = ax.imshow(row["map"], "RdBu_r", colors.LogNorm(0.1, 10), aspect="auto")
                ax.set(title=f"map, r = {row['r']}, k = {k}", xticks=[], yticks=[])
        axes[0, 3].axhline(s["share of G"], color="black", linewidth=0.5)
        axes[0, 0].legend(axes[0, 0].lines[1::2], [f"k = {k}" for k in KS])
        part.colorbar(image, ax=axes[1:])
    whole.savefig(file, dpi=80)


def main(argv=None):
    p = checkpoint.Parser(prog="gradients.py", description=__doc__.strip().partition(":")[0])
    p.add_argument("--model", help="Hugging Face directory or hub id of a decoder")
    p.add_argument("--data", default=".", help="directory of the data sets: the commonsense training mix")
    p.add_argument("--out", default=str(Path(__file__).parent / "results"))
    args = p.parse_args(argv)
    torch.manual_seed(0)
    gradients = [planted(256, 256, 51) for _ in range(DRAWS)]
    subjects = [subject(f"planted: 256 x 256, one channel x {GAIN}", gradients, 51)]
    found = activations(args.model, args.data) if args.model else []
    layers = [{"layer": n, "outliers": named, "share of G": share(G, named[0][0]), "rows": [
        {name: row[name] for name in ("B", "r", "k", *NUMBERS)} for row in sweep([G], named[0][0])]}
        for n, (G, named) in enumerate(found)]
    if found:
        n = max(range(len(found)), key=lambda n: found[n][1][0][1])
        name, (G, named) = f"{Path(args.model).name}: down_proj of layer {n}", found[n]
        subjects.append(subject(name, [G] * DRAWS, named[0][0]))
    command = " ".join(["python experiments/gradients.py", *(sys.argv[1:] if argv is None else argv)])
    result, out = dict(command=command, subjects=subjects, layers=layers), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gradients.json").write_text(json.dumps(result).replace("}, {", "},\n{") + "\n")
    (out / "gradients.md").write_text(markdown(result))
    print(markdown(result))
    try:
        draw(result, out / "gradients.png")
    except ImportError:
        print("no picture: pip install -r requirements-plots.txt")


if __name__ == "__main__":
    main()
