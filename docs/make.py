"""
Writes docs/index.html: python docs/make.py

The page's text is docs/template.html, where <?...?> is an expression of the names below: lines of the method
files, found by function and tag and never by number; pictures and numbers of small runs in float64, on one
thread. A tag or a function that is gone is an error, so the page cannot show a line that no longer exists.
"""
import ast
import html
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cps_lora  # noqa: E402
import gfa  # noqa: E402
import glora  # noqa: E402
import gralora  # noqa: E402
from baselines import lora  # noqa: E402

F64 = torch.float64
tensor = lambda rows: torch.tensor(rows, dtype=F64)


# ------------------------------------------------------------------------------------ lines of the files

def place(node, name):
    """The function, class or assigned name `name`, as in GFALinear.forward, inside an ast node."""
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part or
                    isinstance(n, ast.Assign) and part in ast.unparse(n.targets[0]))
    return node


def lines(file, name, *tags):
    """
    Lines of a function: all, less its docstring, or the statements that hold a tag or stand under a comment
    that does. "" stands for what is left out. Comments that are a line of their own stay if they hold a tag.
    """
    source = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = place(ast.parse("\n".join(source)), name)
    if tags:
        spans = [span for tag in tags for span in statements(found, source, tag)]
        if not spans:
            raise ValueError(f"{file}, {name}: no line has {tags}")
    else:
        spans = [(found.lineno, found.end_lineno)]
    documented = isinstance(found, ast.FunctionDef) and ast.get_docstring(found)
    left_out = range(found.body[0].lineno, found.body[0].end_lineno + 1) if documented else ()
    numbers = sorted({n for first, last in spans for n in range(first, last + 1)} - set(left_out))
    text, before = [], None
    for n in numbers:
        line = source[n - 1]
        if tags and before and n > before + 1:
            text.append("")
        if line.strip() and (line.strip()[0] != "#" or any(tag in line for tag in tags)):
            text.append(line)
        before = n
    return text


def statements(found, source, tag):
    """(first, last) lines of each statement of a function that holds the tag. ValueError for none."""
    inner = [n for n in ast.walk(found) if isinstance(n, ast.stmt)]
    spans = []
    for n in range(found.lineno, found.end_lineno + 1):
        if re.search(re.escape(tag) + r"(?!\d)", source[n - 1]):
            if source[n - 1].strip()[0] == "#":
                spans.append((n, min((s.lineno, s.end_lineno) for s in inner if s.lineno > n)[1]))
            else:
                around = [s for s in inner if s.lineno <= n <= s.end_lineno]
                best = min(around, key=lambda s: s.end_lineno - s.lineno)
                spans.append((best.lineno, best.end_lineno))
    if not spans:
        raise ValueError(f"{found.name}: no line has {tag!r}")
    return spans


def code(file, name, *tags):
    """Lines of a file as a figure; each hangs under its own indentation where it has to wrap."""
    text, shown = lines(file, name, *tags), []
    margin = min(len(line) - len(line.lstrip()) for line in text if line)
    for line in text:
        body, comment = re.fullmatch(r"(.*?)( *#.*)?", line[margin:]).groups()
        deep = len(body) - len(body.lstrip()) if body.strip() else 0
        comment = f"<i>{'  ' * bool(body.strip())}{html.escape(comment.strip())}</i>" if comment else ""
        body = html.escape(body.strip()) if line else "…"
        shown.append(f'<span style="--in:{deep}">{body}{comment}</span>')
    return (f'<figure class="code"><figcaption><a href="../{file}">{file}</a>, <code>{name}</code></figcaption>'
            f'<pre>{"".join(shown)}</pre></figure>')


# ------------------------------------------------------------------------------------ formulas, tables

def formula(text):
    """W_{i}^{j} with its sub- and superscript, [[a & b // c & d]] as a matrix."""
    text = re.sub(r"\[\[(.*?)\]\]", lambda m: matrix([row.split("&") for row in m[1].split("//")]), text)
    text = re.sub(r"_\{([^}]*)\}\^\{([^}]*)\}", r'<span class="both"><sup>\2</sup><sub>\1</sub></span>', text)
    text = re.sub(r"\^\{([^}]*)\}", r"<sup>\1</sup>", text)
    return re.sub(r"_\{([^}]*)\}", r"<sub>\1</sub>", text)


def equation(tag, *rows):
    return (f'<div class="eq"><span class="tag">{tag}</span>'
            + "".join(f"<p>{formula(row)}</p>" for row in rows) + "</div>")


def matrix(rows):
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f'<table class="matrix">{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'


def number(x):
    """A whole number as it is, another with two places; a minus sign, never a hyphen or a -0."""
    return f"{round(x + 0.0, 2) + 0.0:.{0 if abs(x - round(x)) < 1e-9 else 2}f}".replace("-", "−")


def numbers(named):
    """{label: tensor or text} as a row of small matrices."""
    shown = [(formula(label), T if isinstance(T, str) else
              matrix([[number(x) for x in row] for row in torch.atleast_2d(T.detach()).tolist()]))
             for label, T in named.items()]
    return '<div class="numbers">' + "".join(f"<div>{a} = {b}</div>" for a, b in shown) + "</div>"


def table(text):
    """Rows of cells a | b | c, the first row the heads: on a narrow screen each cell says its head."""
    head, *rows = [[formula(cell.strip()) for cell in re.split(r"(?<!\S)\|(?!\S)", line)] for line in text.strip().splitlines()]
    body = "".join(f'<tr><th scope="row">{first}</th>' + "".join(
        f'<td data-head="{re.sub("<.*?>", "", h)}">{cell}</td>' for h, cell in zip(head[1:], rest, strict=True))
        + "</tr>" for first, *rest in rows)
    heads = "".join(f'<th scope="col">{h}</th>' for h in head)
    return f'<table class="wide"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


# ------------------------------------------------------------------------------------ pictures

LEVELS, TOP = 6, 3.0        # steps of strength on either side of 0; an entry of TOP is as strong as it gets


def heat(T, title, marks="", texts=()):
    """T (out, in) as an SVG, a square an entry; marks: a path drawn over it, texts: (x, y, word)."""
    o, i = T.shape
    level = (T / TOP * LEVELS).round().clamp(-LEVELS, LEVELS).int()
    shown = []
    for n in sorted(set(level.flatten().tolist()) - {0}):
        cells = "".join(f"M{x} {y}h.9" for y, x in (level == n).nonzero().tolist())
        shown.append(f'<path class="{"warm" if n > 0 else "cold"}" opacity="{abs(n) / LEVELS:.2f}" d="{cells}"/>')
    words = "".join(f'<text x="{x}" y="{y}">{word}</text>' for x, y, word in texts)
    return (f'<svg viewBox="-.5 -.5 {i + 1} {o + 1}" role="img"><title>{title}</title>'
            f'<rect width="{i}" height="{o}"/><g transform="translate(.05 .5)">{"".join(shown)}</g>'
            f'<path class="marks" d="{marks}"/>{words}</svg>')


def picture(T, title, caption, marks="", texts=()):
    return (f'<figure class="heat">{heat(T, title, marks, texts)}'
            f"<figcaption><b>{title}</b> {formula(caption)}</figcaption></figure>")


# ------------------------------------------------------------------------------------ the runs

SHAPES = dict(q=(36, 36), k=(12, 36), v=(12, 36), o=(36, 36))       # (out, in) of an attention layer
RANK, STEPS, EYE = 4, 400, torch.eye(36, dtype=F64)


def adapt(method, weights, rank, **own):
    """{name: W (out, in)} as a model of Linears without bias, adapted; W are copied."""
    model = nn.ModuleDict({n: nn.Linear(*W.shape[::-1], bias=False, dtype=F64) for n, W in weights.items()})
    for name, W in weights.items():
        model[name].weight.data.copy_(W)
    method.inject(model, tuple(weights), rank, **own)
    return model


def drawn():
    """Pretrained weights and wanted updates {name: (out, in)}: 2 x 2 hidden clusters, a rank 1, a hot spot."""
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    order = lambda n: torch.randperm(n, generator=g)
    weights, wanted = {}, {}
    for name, (o, i) in SHAPES.items():
        weights[name] = normal(o, i) / 6
        wanted[name] = normal(2, 2)[order(o) % 2][:, order(i) % 2] + normal(o, 1) @ normal(1, i) / 2
        wanted[name][order(o)[:o // 4, None], order(i)[:i // 4]] += 1.5 * normal(o // 4, i // 4)
    return weights, wanted


WEIGHTS, WANTED = drawn()


def fit(method, stages=1, **own):
    """Adam on the squared distance of all four changes to the wanted ones -> what stands after each stage."""
    torch.manual_seed(0)
    model, ends = adapt(method, WEIGHTS, RANK, **own), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for t in range(1, STEPS + 1):
        changed = {name: model[name](EYE).T - W for name, W in WEIGHTS.items()}
        loss = sum((changed[name] - T).square().sum() for name, T in WANTED.items())
        optimizer.zero_grad()
        loss.backward()
        if hasattr(method, "observe"):
            method.observe(model, t, STEPS)
        optimizer.step()
        if t % (STEPS // stages) == 0:
            changed = {name: (model[name](EYE).T - W).detach() for name, W in WEIGHTS.items()}
            ends.append(dict(changed, trains=sum(p.numel() for p in model.parameters() if p.requires_grad),
                             model=model, **{key: T.clone() for key, T in model["q"].named_buffers()}))
            if t < STEPS:
                method.reinit(model, optimizer)
    return ends


def said(end):
    """What a picture's caption says of the run that it shows."""
    off = sum((end[name] - T).square().sum() for name, T in WANTED.items())
    off = (off / sum(T.square().sum() for T in WANTED.values())).sqrt()
    rank = torch.linalg.matrix_rank(end["q"], rtol=1e-9)
    return f"rank {rank}, {end['trains']} parameters train, {100 * off:.0f} % off"


def pictures():
    """{name: figure} of q's ΔW, or of GFA's whole M, by every method."""
    show = {"wanted": picture(WANTED["q"], "Wanted", f"rank {torch.linalg.matrix_rank(WANTED['q'])}")}
    show["lora"] = picture((end := fit(lora)[0])["q"], "LoRA", said(end))
    show["gralora"] = picture((end := fit(gralora)[0])["q"], "GraLoRA, k = 2", said(end), "M18 0V36M0 18H36")
    for t, end in enumerate(fit(cps_lora, 2), 1):
        order = end["lora_columns"].argsort(stable=True)[:, None], end["lora_rows"].argsort(stable=True)
        title = f"CPS-LoRA, k = 2, stage {t}"
        show[f"cps{t}"] = picture(end["q"], title, said(end))
        show[f"cps{t} sorted"] = picture(end["q"][order], title, "its features put in order of their cluster",
                                         "M18 0V36M0 18H36")
    stages = fit(glora, 4)
    depth = [sum(torch.isin(torch.arange(36), end[side]).int() for end in stages)
             for side in ("lora_columns", "lora_rows")]
    order = [(-d).argsort(stable=True) for d in depth]
    order = order[0][:, None], order[1]
    show["wanted sorted"] = picture(WANTED["q"][order], "Wanted", "its features in G-LoRA's final order")
    for t, end in enumerate(stages):
        n = len(end["lora_rows"])
        show[f"glora{t}"] = picture(end["q"][order], f"G-LoRA, stage {t}", said(end), f"M0 {n}H{n}V0")
    show["gfa"] = picture((end := fit(gfa, match_lora=RANK)[0])["q"], "GFA", said(end))
    adapter, start, marks, words = end["model"].adapter, 0, "", []
    M = (adapter.lora_B @ adapter.lora_A).detach()
    m, k = M.shape
    for name, (o, i) in SHAPES.items():
        words.append((k / 2, (start + o * i / 2) // k + 1, name))
        row, column = divmod(start := start + o * i, k)
        marks += f"M0 {row + 1}H{column}V{row}H{k}"
    show["M"] = picture(M, "GFA's M", f"{m} × {k}, rank {torch.linalg.matrix_rank(M, rtol=1e-9)}", marks, words)
    return show


# ------------------------------------------------------------------------------------ steps by hand

X, E = tensor([3, 1, 0, -2]), tensor([1, -2, 0, 3])


def gralora_by_hand():
    model = adapt(gralora, dict(w=torch.zeros(4, 4, dtype=F64)), 2, alpha=2)
    layer = model["w"]
    layer.lora_A.data = tensor([[1, 0, 2, 1], [0, 1, 1, -1]])
    (E * layer(X)).sum().backward()
    shown = {"x": X, "e": E, "A": layer.lora_A, "B": layer.lora_B.clone(), "∂L/∂B": layer.lora_B.grad}
    layer.lora_B.data -= layer.lora_B.grad
    return numbers({**shown, "B, after": layer.lora_B, "ΔW": layer.delta()})


def cps_by_hand():
    model = adapt(cps_lora, dict(w=torch.zeros(4, 4, dtype=F64)), 2)
    layer = model["w"]
    layer.start(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    layer.lora_A.data = tensor([[0, 1, 2, -1], [1, -1, 0, -1]])
    layer.lora_B.data = tensor([[-1, -1], [2, -1], [2, 0], [0, 2]])
    shown = {"I": layer.lora_rows, "J": layer.lora_columns, "A": layer.lora_A.clone(),
             "B": layer.lora_B.clone(), "ΔW": (D := layer.delta().detach())}
    for side, M in (("inputs", D.T), ("outputs", D)):
        longest = M[M.norm(dim=1).argmax()]
        shown[f"cosines, {side}"] = M @ longest / M.norm(dim=1) / longest.norm()
    cps_lora.reinit(model, torch.optim.SGD(model.parameters(), 1.0))
    return numbers({**shown, "I, after": layer.lora_rows, "J, after": layer.lora_columns})


def glora_by_hand():
    H = tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    W = H * tensor([16, 12, 8, 4]) @ H.T
    model = adapt(glora, dict(w=W), 2, ratio="1:1")
    layer = model["w"]
    (E * layer(X)).sum().backward()
    glora.observe(model, 1, 2)
    G = layer.lora_global_B @ layer.lora_global_A
    L = layer.lora_local_B @ layer.lora_local_A
    shown = {"W": W, "G_{A} G_{B}": G, "L_{A} L_{B}": L, "W_{res}": layer.base.weight.clone(), "x": X, "e": E,
             "I_{A}": layer.scores[0], "I_{B}": layer.scores[1].T}
    glora.reinit(model, torch.optim.SGD(model.parameters(), 1.0))
    return numbers({**shown, "R": layer.lora_rows, "C": layer.lora_columns,
                    "W_{res}, after": layer.base.weight})


def gfa_by_hand():
    model = adapt(gfa, dict(first=torch.zeros(2, 3, dtype=F64), second=torch.zeros(2, 2, dtype=F64)), 1)
    A, B = model.adapter.lora_A, model.adapter.lora_B
    A.data, B.data = tensor([[1, -1, 2]]), tensor([[1], [2], [3], [4]])
    first, second = (model[name].delta().detach() for name in ("first", "second"))
    (tensor([1, -1]) * model["first"](tensor([1, 0, 2])) + tensor([2, 1]) * model["second"](tensor([1, 3]))
     ).sum().backward()
    return numbers({"B": B, "A": A, "M = B A": B @ A, "ΔW_{1}": first, "ΔW_{2}": second, "∂L/∂B": B.grad, "∂L/∂A": A.grad})


def flops(method, **own):
    """Of q's update alone, forward, for 36 tokens: counted, less the frozen weight's own."""
    torch.manual_seed(0)
    layer = adapt(method, dict(q=WEIGHTS["q"]), RANK, **own)["q"]
    with FlopCounterMode(display=False) as counter:
        layer(EYE)
    return counter.get_total_flops() - 2 * 36 ** 3


def page():
    text = (ROOT / "docs" / "template.html").read_text(encoding="utf-8")
    names = {**globals(), "show": pictures()}
    return re.sub(r"<\?(.*?)\?>", lambda m: str(eval(m[1].strip(), names)), text, flags=re.DOTALL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    (ROOT / "docs" / "index.html").write_text(page(), encoding="utf-8")
