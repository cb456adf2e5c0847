"""
Writes docs/index.html: python docs/make.py

Its text is docs/template.html, where <?...?> is an expression of the names below: lines of the method files,
found by function and tag, never by number; pictures and numbers of small runs in float64. A tag or a function
that is gone is an error, so the page shows no line that is not there.
"""
import ast
import html
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import cps_lora
import gfa
import glora
import gralora
from baselines import lora

tensor = lambda rows: torch.tensor(rows, dtype=torch.float64)
rank = lambda T: torch.linalg.matrix_rank(T, rtol=1e-9).item()


# ------------------------------------------------------------------------------------ lines of the files

def place(node, name):
    """The function, class or assignment `name`, such as GFALinear.forward, inside an ast node."""
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part or
                    isinstance(n, ast.Assign) and part == ast.unparse(n.targets[0]))
    return node


def statements(found, source, tag):
    """(first, last) lines of the statements that hold the tag, or stand under a comment that does."""
    inner = [(n.lineno, n.end_lineno) for n in ast.walk(found) if isinstance(n, ast.stmt)]
    spans = []
    for n in range(found.lineno, found.end_lineno + 1):
        if re.search(re.escape(tag) + r"(?!\d)", source[n - 1]):
            after = [span for span in inner if span[0] > n]
            around = sorted((b - a, a, b) for a, b in inner if a <= n <= b)
            spans.append((n, min(after)[1]) if source[n - 1].strip()[0] == "#" else around[0][1:])
    if not spans:
        raise ValueError(f"no line has {tag!r}")
    return spans


def lines(file, name, *tags):
    """Lines of a function: its tags' statements, "" for what is between; or all but docstring, comments."""
    source = (DOCS.parent / file).read_text(encoding="utf-8").splitlines()
    found = place(ast.parse("\n".join(source)), name)
    spans = [span for tag in tags for span in statements(found, source, tag)]
    numbers = {n for a, b in spans or [(found.lineno, found.end_lineno)] for n in range(a, b + 1)}
    if isinstance(found, ast.FunctionDef) and ast.get_docstring(found):
        numbers -= {*range(found.body[0].lineno, found.body[0].end_lineno + 1)}
    text = []
    for n in sorted(numbers):
        line = source[n - 1]
        if line.strip() and (line.strip()[0] != "#" or any(tag in line for tag in tags)):
            text += [""] * bool(text and spans and n - 1 not in numbers) + [line]
    return text


def code(file, name, *tags):
    """Lines of a file as a figure; each hangs under its own indentation where it has to wrap."""
    text, shown = lines(file, name, *tags), []
    margin = min(len(line) - len(line.lstrip()) for line in text if line)
    for line in text:
        body, comment = re.fullmatch(r"(.*?)( *#.*)?", line[margin:] or "…").groups()
        comment = f"<i>{'  ' * bool(body)}{html.escape(comment.strip())}</i>" if comment else ""
        indent = len(body) - len(body.lstrip())
        shown.append(f'<span style="--in:{indent}">{html.escape(body.strip())}{comment}</span>')
    return (f'<figure class="code"><figcaption><a href="../{file}">{file}</a>, <code>{name}</code>'
            f'</figcaption><pre>{"".join(shown)}</pre></figure>')


# ------------------------------------------------------------------------------------ formulas, tables

SCRIPTS = [(r"_\{([^{}]*)\}\^\{([^{}]*)\}", r'<span class="both"><sup>\2</sup><sub>\1</sub></span>'),
           (r"\^\{([^{}]*)\}", r"<sup>\1</sup>"), (r"_\{([^{}]*)\}", r"<sub>\1</sub>")]


def formula(text):
    """W_{i}^{j} with its sub- and superscript, [[a & b // c & d]] as a matrix; the inner braces first."""
    text = re.sub(r"\[\[(.*?)\]\]", lambda m: matrix([row.split("&") for row in m[1].split("//")]), text)
    for pattern, shown in SCRIPTS * text.count("{"):
        text = re.sub(pattern, shown, text)
    return text


def equation(tag, *rows):
    rows = "".join(f"<div>{formula(row)}</div>" for row in rows)
    return f'<div class="eq"><span class="tag">{tag}</span>{rows}</div>'


def matrix(rows):
    rows = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f'<table class="matrix">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def number(x):
    """A whole number as it is, another with two places; with a minus sign, and no -0."""
    return f"{round(x, 2) + 0.0:.{0 if abs(x - round(x)) < 1e-9 else 2}f}".replace("-", "−")


def numbers(**named):
    """Tensors, each under its label, as a row of small matrices."""
    shown = ((formula(label), [[number(x) for x in row] for row in torch.atleast_2d(T.detach()).tolist()])
             for label, T in named.items())
    return f'<div class="numbers">{"".join(f"<div>{label} = {matrix(T)}</div>" for label, T in shown)}</div>'


def table(text):
    """Rows of cells a | b | c, the first row the heads: on a narrow screen each cell says its head."""
    head, *rows = [[formula(cell.strip()) for cell in re.split(r"(?<!\S)\|(?!\S)", line)]
                   for line in text.strip("\n").splitlines()]
    body = ""
    for first, *rest in rows:
        cells = "".join(f'<td data-head="{h}">{cell}</td>' for h, cell in zip(head[1:], rest, strict=True))
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>'
    heads = "".join(f'<th scope="col">{h}</th>' for h in head)
    return f'<table class="wide"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


# ------------------------------------------------------------------------------------ pictures

LEVELS, TOP = 6, 2.0        # steps of strength on either side of 0, the last from about TOP on


def picture(T, title, caption, marks="", words="", size=""):
    """T (out, in) as a figure, a square an entry; marks is an SVG path over it, words are SVG texts."""
    (o, i), level, cells = T.shape, (T / TOP * LEVELS).round().clamp(-LEVELS, LEVELS).int(), ""
    for n in sorted({*level.flatten().tolist()} - {0}):
        path = "".join(f"M{x} {y}h.9" for y, x in (level == n).nonzero().tolist())
        kind = "warm" if n > 0 else "cold"
        cells += f'<path class="{kind}" opacity="{abs(n) / LEVELS:.2f}" d="{path}"/>'
    return (f'<figure class="heat{size}"><svg viewBox="-.5 -.5 {i + 1} {o + 1}" role="img">'
            f'<title>{title}</title><rect width="{i}" height="{o}"/>'
            f'<g transform="translate(.05 .5)">{cells}</g><path class="marks" d="{marks}"/>{words}</svg>'
            f'<figcaption><b>{title}</b> {caption}</figcaption></figure>')


SHAPES = dict(q=(36, 36), k=(12, 36), v=(12, 36), o=(36, 36))       # (out, in) of an attention layer
RANK, STEPS, EYE = 4, 400, torch.eye(36, dtype=torch.float64)


def drawn():
    """{name: pretrained W}, {name: wanted ΔW}, (out, in): hidden 2 x 2 clusters, a rank 1, a hot spot."""
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    order = lambda n: torch.randperm(n, generator=g)
    weights, wanted = {}, {}
    for name, (o, i) in SHAPES.items():
        weights[name] = normal(o, i) / 6
        wanted[name] = normal(2, 2)[order(o) % 2][:, order(i) % 2] + normal(o, 1) @ normal(1, i) / 2
        wanted[name][order(o)[:o // 4, None], order(i)[:i // 4]] += 1.5 * normal(o // 4, i // 4)
    return weights, wanted


WEIGHTS, WANTED = drawn()


def adapt(method, weights, r, **own):
    """{name: W (out, in)} as a model of Linears without bias, adapted; W are copied."""
    model = nn.ModuleDict({name: nn.Linear(*W.T.shape, False) for name, W in weights.items()})
    for name, W in weights.items():
        model[name].weight.data = W.clone()
    torch.manual_seed(0)
    method.inject(model, tuple(weights), r, **own)
    return model


def fit(method, stages=1, **own):
    """Adam on the squared distance of all four changes to the wanted ones -> what stands after each stage."""
    model, ends = adapt(method, WEIGHTS, RANK, **own), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    change = lambda: {name: model[name](EYE).T - W for name, W in WEIGHTS.items()}
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        sum((changed - WANTED[name]).square().sum() for name, changed in change().items()).backward()
        if hasattr(method, "observe"):
            method.observe(model, t, STEPS)
        optimizer.step()
        if t % (STEPS // stages) == 0:
            changed = {name: T.detach() for name, T in change().items()}
            off = sum((changed[name] - T).square().sum() for name, T in WANTED.items())
            off = (off / sum(T.square().sum() for T in WANTED.values())).sqrt()
            trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
            caption = f"rank {rank(changed['q'])}<br>{trains} parameters train<br>{100 * off:.0f} % off"
            ends.append(dict(q=changed["q"], caption=caption,
                             **{key: T.clone() for key, T in model["q"].named_buffers()}))
            if t < STEPS:
                method.reinit(model, optimizer)
    return ends, model


def pictures():
    """{name: figure} of q's ΔW by every method, and of GFA's whole M."""
    q, grid = WANTED["q"], "M18 0V36M0 18H36"
    draw = lambda end, title, *marks: picture(end["q"], title, end["caption"], *marks)
    show = dict(wanted=picture(q, "Wanted", f"rank {rank(q)}"), lora=draw(fit(lora)[0][0], "LoRA"),
                gralora=draw(fit(gralora)[0][0], "GraLoRA, k = 2", grid), cps="", glora="", gfa="")
    for t, end in enumerate(fit(cps_lora, 2)[0], 1):
        order = end["lora_columns"].argsort(stable=True)[:, None], end["lora_rows"].argsort(stable=True)
        title = f"CPS-LoRA, k = 2, stage {t}"
        show["cps"] += draw(end, title) + picture(end["q"][order], title, "in order of its clusters", grid)
    show["cps"] += picture(q[order], "Wanted", "in order of stage 2's clusters", grid)
    stages = fit(glora, 4)[0]
    stays = [sum(torch.isin(torch.arange(36), end[side]).int() for end in stages)
             for side in ("lora_columns", "lora_rows")]
    rows, columns = (n.argsort(descending=True, stable=True) for n in stays)
    show["glora"] += picture(q[rows][:, columns], "Wanted", "in order of how long features stay")
    for t, end in enumerate(stages):
        n, end["q"] = len(end["lora_rows"]), end["q"][rows][:, columns]
        show["glora"] += draw(end, f"G-LoRA, stage {t}", f"M0 {n}H{n}V0")
    ends, model = fit(gfa, match_lora=RANK)
    M, start, marks, words = (model.adapter.lora_B @ model.adapter.lora_A).detach(), 0, "", ""
    m, k = M.shape
    for name, (o, i) in SHAPES.items():
        words += f'<text x="{k / 2}" y="{(start + o * i / 2) // k + 1}">{name}</text>'
        row, column = divmod(start := start + o * i, k)
        marks += f"M0 {row + 1}H{column}V{row}H{k}"
    whole = picture(M, "GFA's M", f"{m} × {k}, rank {rank(M)}", marks, words, " large")
    show["gfa"] += draw(ends[0], "GFA") + whole
    return show


def flops(method):
    """Of q's update alone, forward, for 36 tokens: counted, less the frozen weight's own."""
    layer = adapt(method, dict(q=WEIGHTS["q"]), RANK)["q"]
    with FlopCounterMode(display=False) as counter:
        layer(EYE)
    return f"{counter.get_total_flops() - 2 * 36 ** 3:,}"


# ------------------------------------------------------------------------------------ steps by hand

X, E, ZERO = tensor([3, 1, 0, -2]), tensor([1, -2, 0, 3]), tensor([[0] * 4] * 4)


def gralora_by_hand():
    layer = adapt(gralora, dict(w=ZERO), 2, alpha=2)["w"]
    layer.lora_A.data = tensor([[1, 0, 2, 1], [0, 1, 1, -1]])
    (E * layer(X)).sum().backward()
    B, layer.lora_B.data = layer.lora_B.data, layer.lora_B.data - layer.lora_B.grad
    return numbers(**{"x": X, "e": E, "A": layer.lora_A, "B": B, "∂L/∂B": layer.lora_B.grad,
                      "B, after": layer.lora_B, "ΔW": layer.delta()})


def cps_by_hand():
    layer = adapt(cps_lora, dict(w=ZERO), 2)["w"]
    layer.start(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    layer.lora_A.data = tensor([[0, 1, 2, -1], [1, -1, 0, -1]])
    layer.lora_B.data = tensor([[-1, -1], [2, -1], [2, 0], [0, 2]])
    shown = dict(I=layer.lora_rows, J=layer.lora_columns, A=layer.lora_A, B=layer.lora_B, ΔW=layer.delta())
    shown = {label: T.detach().clone() for label, T in shown.items()}
    for side, M in dict(inputs=shown["ΔW"].T, outputs=shown["ΔW"]).items():
        M = M / M.norm(dim=1).max()
        shown[f"cosines, {side}"] = M @ M[M.norm(dim=1).argmax()] / M.norm(dim=1)
    cps_lora.reinit(layer, torch.optim.SGD(layer.parameters()))
    return numbers(**shown, **{"I, after": layer.lora_rows, "J, after": layer.lora_columns})


def glora_by_hand():
    H = tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    layer = adapt(glora, dict(w=H * tensor([16, 12, 8, 4]) @ H.T), 2, ratio="1:1")["w"]
    (E * layer(X)).sum().backward()
    glora.observe(layer, 1, 2)
    shown = {"W": layer.pretrained, "G_{A} G_{B}": layer.lora_global_B @ layer.lora_global_A,
             "L_{A} L_{B}": layer.lora_local_B @ layer.lora_local_A, "W_{res}": layer.base.weight.clone(),
             "x": X, "e": E, "I_{A}": layer.scores[0], "I_{B}": layer.scores[1].T}
    glora.reinit(layer, torch.optim.SGD(layer.parameters()))
    return numbers(**shown, R=layer.lora_rows, C=layer.lora_columns, **{"W_{res}, after": layer.base.weight})


def gfa_by_hand():
    model = adapt(gfa, dict(first=ZERO[:2, :3], second=ZERO[:2, :2]), 1)
    A, B = model.adapter.lora_A, model.adapter.lora_B
    A.data, B.data = tensor([[1, -1, 2]]), tensor([[1], [2], [3], [4]])
    for layer, x, e in ((model["first"], [1, 0, 2], [1, -1]), (model["second"], [1, 3], [2, 1])):
        (tensor(e) * layer(tensor(x))).sum().backward()
    return numbers(**{"B": B, "A": A, "M = B A": B @ A, "ΔW_{1}": model["first"].delta(),
                      "ΔW_{2}": model["second"].delta(), "∂L/∂B": B.grad, "∂L/∂A": A.grad})


def page():
    text, names = (DOCS / "template.html").read_text(encoding="utf-8"), dict(globals(), show=pictures())
    return re.sub(r"<\?(.*?)\?>", lambda found: eval(found[1], names), text, flags=re.DOTALL)


if __name__ == "__main__":
    Path(*sys.argv[1:] or [DOCS / "index.html"]).write_text(page(), encoding="utf-8")
