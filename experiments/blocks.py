"""
Blocks of updates: GraLoRA Table 4 and its gradients; CPS-LoRA Figs. 2 (c), 5, 6, Tables 5, 6: names of
reproduce.py. Bi-clustering finds blocks in noise, too: what counts is the difference to it.
"""
import gradients as maps
import torch
from accuracy import STAGES, as_table
from analyze import draw_map
from diagnostics import NULLS, algebraic_rank, average, balanced_cut, bicluster, contrast
from structure import (
    LINE,
    LONG,
    above,
    judged,
    load,
    minus,
    result,
    rows_of,
    rows_table,
    show,
    text,
    told,
    train,
)

CPS = f"--method cps_lora {STAGES['cps_lora']}"
STAGE = ("eber_cps", "angle_trained", "contrast_trained")
ORDERS = ("cosine", "abs-cosine")


def rank(sweep, args):
    """GraLoRA Table 4: k r; at rank 8 no weight of the bundled model is too small for it."""
    words = {"lora": "--method lora", "gralora, k = 2": "--method gralora"}
    words |= {f"gralora, k = {k}": f"--method gralora --k {k}" for k in (4, 8)}
    rows, runs = rows_of(sweep, args, words)
    for (label, row), k in zip(rows.items(), (1, 2, 4, 8)):
        updates = [M for run in runs[label] for M in load(run)[0].values()]
        row["expected"] = 8 * k
        row["ranks"] = sorted({algebraic_rank(torch.linalg.svdvals(M), M.shape) for M in updates})
    off = max(abs(rank - row["expected"]) for row in rows.values() for rank in row["ranks"])
    verdict = [dict(claim="every module of every seed has rank k r; the most that one is off",
                    difference=off, half=0, seeds=args.seeds, verdict="not held" if off else "held")]
    listed = [[label, str(row["expected"]), ", ".join(map(str, row["ranks"]))] for label, row in rows.items()]
    return result(args, rows, verdict, as_table([["row", "k r", "ranks found"], *listed]),
                  rows_table(rows, ("rank",)), keys=("rank",))


def gradients(sweep, args):
    """GraLoRA Figs. 3, 4, 6, 9 on a planted outlier: gradients.py's own numbers, no run of train.py."""
    torch.manual_seed(0)
    planted = [maps.planted(256, 256, 51) for _ in range(maps.DRAWS)]
    found = dict(command="python experiments/reproduce.py gradients", layers=[],
                 subjects=[maps.subject(f"planted: 256 x 256, one channel x {maps.GAIN}", planted, 51)])
    rows = {(row["r"], row["k"]): row for row in found["subjects"][0]["rows"] if row["B"] == "noise"}
    verdict = []
    a, b = rows[128, 1], rows[128, 8]
    for name, claim in (("as is", "LoRA deviates more"), ("scaled", "LoRA deviates more"),
                        ("outside", "LoRA's step is larger where the outlier is not seen")):
        verdict.append(judged(f"r = 128, {name}: {claim} than with k = 8", a[name] - b[name],
                              a["spread"][name] + b["spread"][name], maps.DRAWS))
    words = [*maps.markdown(found).split("\n"), "± is here the sum of the two spreads over draws.", "",
             *map(LINE.format_map, verdict)]
    return dict(words=words, data=found | dict(verdict=verdict), draw=lambda file: maps.draw(found, file))


def angles(sweep, args):
    """CPS-LoRA Fig. 5: the mean principal angle of the trained blocks, of 8 / k vectors each, over k."""
    rows, _ = rows_of(sweep, args, {"k = 2": CPS} | {f"k = {k}": f"{CPS} --k {k}" for k in (4, 8)})
    of = lambda label, kind="update": rows[label][kind]["angle_trained"]
    fall = {kind: minus(of("k = 2", kind), of("k = 8", kind)) for kind in NULLS}
    verdict = [told(f"angle, {label}: above its null {kind}", minus(of(label), of(label, kind)))
               for label in rows for kind in list(NULLS)[1:]]
    verdict += [told("angle: k = 2 above k = 8", fall["update"]),
                told("that by more than with shuffled entries", minus(fall["update"], fall["shuffled"]))]
    return result(args, rows, verdict, rows_table(rows, STAGE[1:]), keys=STAGE[1:])


def partition(sweep, args):
    """CPS-LoRA Tables 5, 6: what a strategy does to the stage that trains on its blocks."""
    strategies = "none random spectral spectral-balance1 spectral-balance2 abs-cosine".split()
    wanted = {"cosine": CPS} | {s: f"{CPS} --strategy {s}" for s in strategies}
    wanted |= {"cosine at a fifth (Table 6)": "--method cps_lora --reinit_at {fifth}",
               "no re-init": "--method cps_lora --reinit_every none", "gralora": "--method gralora"}
    rows, _ = rows_of(sweep, args, wanted, ("cosine", "random", "none"))
    pairs = [("cosine", other) for other in ("random", "none", "no re-init")]
    pairs += [(f"cosine, {LONG} steps", f"{other}, {LONG} steps") for other in ("random", "none")]
    verdict = [above(rows, key, *pair) for key in STAGE[:2] for pair in pairs if pair[0] in rows]
    return result(args, rows, verdict, rows_table(rows, STAGE[:1], loss=True), rows_table(rows, STAGE[1:]),
                  "EBER, angle and contrast are of the last stage. Angles of unequal clusters (spectral) are "
                  "not to be compared with the others': a small cluster's vectors span much of its space.",
                  keys=STAGE)


def block_error(M, rows, columns, rank):
    """Share of ‖M‖² that the best pairs of this rank leave, one for each block of rows and columns."""
    blocks = [M[rows == i][:, columns == j] for i in rows.unique() for j in columns.unique()]
    left = sum(torch.linalg.svdvals(block)[rank:].square().sum() for block in blocks)
    return (left / M.square().sum()).item()


def errors(M, rank, true=None):
    """
    {grid: what it leaves}, of as many parameters as LoRA's at this rank: LoRA's one block, 2 x 2 blocks as
    they are, by clusters, and, where they are known, by the true ones, rank / 2 each.
    """
    plain = [balanced_cut(torch.arange(n), 2) for n in M.shape]
    orders = {"blocks as they are": plain} | {order: bicluster(M, 2, order) for order in ORDERS}
    orders |= {"true blocks": true} if true else {}
    return {"LoRA": block_error(M, *(torch.zeros_like(c) for c in plain), rank)} | {
        name: block_error(M, *clusters, rank // 2) for name, clusters in orders.items()}


def orthogonal_blocks(n, r):
    """M (n, n) of Prop. 2, 2 x 2 blocks of rank r in orthogonal spaces, its features mixed; its clusters."""
    A, B = (torch.linalg.qr(torch.randn(n // 2, 4 * r, dtype=torch.float64))[0].split(r, 1) for _ in range(2))
    rows, columns = (torch.randperm(n) % 2 for _ in range(2))
    M = torch.empty(n, n, dtype=torch.float64)
    for l, (i, j) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        M[(rows == i).nonzero(), (columns == j).nonzero()[:, 0]] = A[l] @ B[l].T
    return M, (rows, columns)


def blocks(sweep, args):
    """CPS-LoRA Figs. 2 (c), 6: planted blocks, and the same numbers of trained updates."""
    found, ranks = {}, []
    for seed in range(42, 42 + args.seeds):
        torch.manual_seed(seed)
        M, true = orthogonal_blocks(256, 16)
        ranks.append(algebraic_rank(torch.linalg.svdvals(M), M.shape))
        for kind, null in NULLS.items():
            found.setdefault("planted", {}).setdefault(kind, []).append(errors(null(M), 32, true))
    wanted = {"full": "--method full", "lora r = 64": "--method lora --rank 64"}
    rows, runs = train(sweep, args, wanted, ("full",))
    for label, run in ((label, run) for label, each in runs.items() for run in each):
        whole = load(run)[0].values()
        for kind, null in NULLS.items():
            drawn = [null(M) for M in whole]
            each = [errors(M, 8) | {"contrast": contrast(M, *bicluster(M, 2))} for M in drawn]
            found.setdefault(label, {}).setdefault(kind, []).append(average(each))
    for label, kinds in found.items():
        found[label] = {kind: {key: [one[key] for one in each] for key in each[0]}
                        for kind, each in kinds.items()}
    heads = ["left of ‖ΔW‖²", "LoRA", "blocks as they are", *ORDERS, "true blocks", "contrast"]
    lines = [[f"{label}: {kind}", *(show(one.get(key), 3) for key in heads[1:])]
             for label, kinds in found.items() for kind, one in kinds.items()]
    of = lambda label, kind, a, b="cosine": minus(found[label][kind][a], found[label][kind][b])
    verdict = [told(f"planted: {a} leave{'s' * (a == 'LoRA')} more than {b}", of("planted", "update", a, b))
               for a, b in (("LoRA", "true blocks"), *(("blocks as they are", order) for order in ORDERS))]
    for label in runs:
        verdict += [
            told(f"{label}: LoRA leaves more than blocks by cosine", of(label, "update", "LoRA")),
            told(f"{label}: that by more than with shuffled entries",
                 minus(of(label, "update", "LoRA"), of(label, "shuffled", "LoRA"))),
            told(f"{label}: contrast after bi-clustering above shuffled entries'",
                 minus(found[label]["update"]["contrast"], found[label]["shuffled"]["contrast"]))]
    words = text(args, "As many parameters each: LoRA's at rank 8, or 2 x 2 blocks of rank 4 each. Planted, "
                 "256 x 256, are four orthogonal blocks of rank 16; there LoRA has 32, a block 16.",
                 as_table([heads, *lines]), f"Rank of the planted: {ranks}; of LoRA, at most 32 (Fig. 2).",
                 verdict=verdict)
    name, M = [*load(runs["full"][0])[0].items()][0]
    return dict(words=words, data=dict(rows=rows, found=found, ranks=ranks, verdict=verdict),
                draw=lambda file: draw_map(M, 2, "cosine", f"full fine-tuning, {name}", file, 60, 40))
