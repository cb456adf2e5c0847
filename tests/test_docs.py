"""docs/: the page is what make.py writes now, and is whole on a telephone; the walk-through runs."""
import ast
import html
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from test_papers import NUMBERED, SECTIONS, rows

import gfa
import glora
import gralora

PAGE = (ROOT / "docs" / "index.html").read_text(encoding="utf-8")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def make(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make
    return make


def parts(page):
    """What has to be equal, and what has to be near: each run's error, the level of each entry drawn."""
    levels = []
    for drawing in re.findall("<svg.*?</svg>", page, re.DOTALL):
        cells = {}
        for kind, opacity, path in re.findall(r'class="(warm|cold)" opacity="([\d.]+)" d="(.*?)"', drawing):
            for cell in re.findall(r"M(\d+ \d+)h", path):
                cells[cell] = float(opacity) * (1 if kind == "warm" else -1)
        levels.append(cells)
    text = re.sub(r'<path class="(warm|cold)".*?/>', "", page)
    return re.sub(r"\d+ % off", "", text), [int(off) for off in re.findall(r"(\d+) % off", text)], levels


def test_the_page_is_what_make_writes_but_for_rounding(tmp_path):
    """In a process of its own, which --seed-shift does not reach. If it is red: python docs/make.py."""
    subprocess.run([sys.executable, ROOT / "docs" / "make.py", tmp_path / "page"], check=True, cwd=tmp_path)
    text, off, levels = parts(PAGE)
    text_now, off_now, levels_now = parts((tmp_path / "page").read_text(encoding="utf-8"))
    assert text_now.splitlines() == text.splitlines()
    assert len(off) == 9 and off_now == pytest.approx(off, abs=1.01)
    assert len(levels) == 15 and all(len(cells) > 500 for cells in levels)
    for cells, cells_now in zip(levels, levels_now, strict=True):
        moved = [abs(cells.get(at, 0) - cells_now.get(at, 0)) for at in cells.keys() | cells_now]
        assert max(moved) < 0.2 and sum(m > 0 for m in moved) <= 10       # a level is 1/6


def test_every_line_of_code_on_the_page_stands_in_its_file():
    squeezed = lambda line: re.sub(r"\s+", " ", line).strip()
    shown = re.findall(r'<figcaption><a href="../(\w+\.py)">.*?<pre>(.*?)</pre>', PAGE)
    assert len(shown) >= 25 and {file for file, _ in shown} == {f"{name}.py" for name in NUMBERED}
    for file, block in shown:
        source = {squeezed(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()}
        for line in re.findall(r'<span style="--in:\d+">(.*?)</span>', block):
            line = html.unescape(re.sub("</?i>", "", line))
            assert squeezed(line) in source | {"…"}, (file, line)


@pytest.mark.parametrize("file, heading", dict(glora="G-LoRA", cps_lora="CPS-LoRA", gralora="GraLoRA",
                                               gfa="GFA").items())
def test_every_numbered_equation_that_a_file_computes_is_shown_under_its_method(file, heading):
    def numbers(texts):
        spans = re.findall(r"(\d+)(?: - (\d+))?", " ".join(re.findall(r"Eqs?\. ([\d, -]+)", " ".join(texts))))
        return {n for a, b in spans for n in range(int(a), int(b or a) + 1)}
    section = next(part for part in PAGE.split("<h2") if part.partition(">")[2].startswith(f"{heading}<"))
    table = rows(SECTIONS[file, f"test_{file}"], "paper | tags in the file | tests")
    computed = numbers(what for what, cell, _ in table if not cell.startswith("none"))
    shown = numbers(re.findall(r'class="tag">(.*?)<', section))
    assert computed and computed <= shown <= set(range(1, NUMBERED[file] + 1))


def test_lines_are_found_by_function_and_tag_whatever_stands_above_them(make, monkeypatch, tmp_path):
    asked = (("glora.py", "reinit", "# Eq. 10", "# Eq. 12"), ("gfa.py", "cut"),
             ("cps_lora.py", "reinit", "# Line 6"))
    before = [make.lines(*what) for what in asked]
    assert [len(text) for text in before] == [3, 2, 2]
    assert before[0][1] == "" and before[2][0].strip().startswith("# Line 6, ")
    for name in NUMBERED:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        (tmp_path / f"{name}.py").write_text("import os\n\n\n" + source, encoding="utf-8")
    monkeypatch.setattr(make, "DOCS", tmp_path / "docs")
    assert [make.lines(*what) for what in asked] == before


def test_a_tag_or_a_function_that_is_gone_is_an_error(make):
    with pytest.raises(ValueError, match="no line has '# Eq. 1'"):      # Eq. 10 is not Eq. 1
        make.lines("glora.py", "reinit", "# Eq. 1")
    with pytest.raises(StopIteration):
        make.lines("glora.py", "GLoRALinear.gone")


def test_formulas_and_numbers_are_set_as_they_are_written(make):
    assert make.formula("x_{i}^{2} + {1}") == 'x<span class="both"><sup>2</sup><sub>i</sub></span> + {1}'
    assert make.formula("x_{c_{i}}^{2}") == "x<sub>c<sub>i</sub></sub><sup>2</sup>"
    assert make.formula("[[a & b // c & d]]").count("<td>") == 4
    assert [make.number(x) for x in (3.0, -2.0, -0.0, -1e-12, 1 / 3)] == ["3", "−2", "0", "0", "0.33"]


def test_links_lead_somewhere():
    anchors = re.findall(r'href="#(.*?)"', PAGE)
    assert len(anchors) >= 7 and {*anchors} <= {*re.findall(r' id="(.*?)"', PAGE)}
    assert len(re.findall(r' id="', PAGE)) == len({*re.findall(r' id="(.*?)"', PAGE)})
    for link in set(re.findall(r'(?:href|src)="([^#].*?)"', PAGE)) - {"data:,"}:
        assert (ROOT / "docs" / link).is_file(), link
    assert not re.search(r"https?:|<script|@import|url\(", PAGE)       # nothing is fetched, nothing runs


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_either_theme(theme):
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    named = re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)[theme == "dark"]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", named))
    for text in ("ink", "soft", "warm", "cold", "link"):
        for ground in ("page", "card"):
            low, high = sorted(luminance(colours[name]) for name in (text, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)      # WCAG 2, AA


FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<iframe src="page.html" style="width: %dpx; height: 900px; border: 0"></iframe>"""
PROBE = """<script>addEventListener("load", () => {
  const out = [...document.body.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 1 || box.left < -1 || e.clientWidth && e.scrollWidth > e.clientWidth + 1;
  });
  console.log("PROBE" + JSON.stringify({
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    out: out.map(e => e.outerHTML.slice(0, 100)),
    ground: getComputedStyle(document.body).backgroundColor}) + "END");
});</script></body>"""


def browse(page, width, dark, tmp_path):
    """What the probe says of a page in a frame of this width, and what else went to the console."""
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME % width)     # a window is 500 wide at least
    ran = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--window-size=1500,1000", f"--blink-settings=preferredColorScheme={1 - dark}",
         "--enable-logging=stderr", "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120)
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    found = next(line for line in console if "PROBE" in line)
    return json.loads(re.search("PROBE(.*)END", found)[1]), [line for line in console if line != found]


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [320, 400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_nothing_is_cut_off_and_the_console_is_silent(width, dark, tmp_path):
    seen, console = browse(PAGE, width, dark, tmp_path)
    assert seen["width"] == width and seen["scroll"] <= width and seen["out"] == [] and console == []
    assert seen["ground"] == ("rgb(22, 24, 26)" if dark else "rgb(253, 253, 251)")


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium here")
def test_the_probe_sees_what_is_too_wide_and_what_fails(tmp_path):
    wide = PAGE.replace("</body>", '<p style="width:500px">too wide</p><script>missing()</script></body>')
    seen, console = browse(wide, 400, False, tmp_path)
    assert any("too wide" in element for element in seen["out"]) and "missing is not defined" in console[0]


# ------------------------------------------------------------------------------------ which contains which

def adapted(method, o, i, rank, **own):
    model = nn.Sequential(nn.Linear(i, o, bias=False, dtype=torch.float64))
    method.inject(model, ("0",), rank, **own)
    return model[0]


def test_lora_of_rank_r_over_k_is_within_gralora_and_that_within_lora_of_rank_k_r():
    torch.manual_seed(0)
    layer, a, b = adapted(gralora, 20, 24, 6, k=2, alpha=6), torch.randn(3, 24), torch.randn(20, 3)
    layer.lora_A.data, layer.lora_B.data = a.repeat(2, 1).double(), b.repeat(1, 2).double()
    torch.testing.assert_close(layer.delta(), (b.double() @ a.double()))        # any of rank r/k
    for p in (layer.lora_A, layer.lora_B):
        p.data.normal_()
    assert torch.linalg.matrix_rank(layer.delta()) == 12                        # k r, above LoRA's 6
    assert torch.linalg.matrix_rank(layer.delta()[:10, :12]) == 3               # below LoRA's 6 of a block


def test_gfa_of_one_square_weight_is_lora():
    layer = adapted(gfa, 12, 12, 3)
    layer.shared.lora_B.data.normal_()
    assert torch.equal(layer.delta(), layer.shared.lora_B @ layer.shared.lora_A)


def test_the_ranks_of_g_loras_stages_are_those_of_the_table():
    torch.manual_seed(0)
    layer = adapted(glora, 72, 72, 4)
    for stage in range(3):
        for p in (layer.lora_global_A, layer.lora_global_B, layer.lora_local_A, layer.lora_local_B):
            p.data.normal_()
            p.grad = torch.randn_like(p)
        A, B = layer.total()
        assert torch.linalg.matrix_rank(layer.delta()) == 3 + 2 ** stage
        assert torch.linalg.matrix_rank(B @ A, rtol=1e-9) == 2 * 3 + 2 * (2 ** (stage + 1) - 1)
        glora.observe(layer, 1, 2)
        glora.reinit(layer, torch.optim.SGD(layer.parameters()))


# ------------------------------------------------------------------------------------ the files

def test_the_walkthrough_runs_and_no_reinit_or_merge_moves_the_function(tmp_path):
    ran = subprocess.run([sys.executable, ROOT / "docs" / "walkthrough.py"], cwd=tmp_path, timeout=300,
                         capture_output=True, text=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    moved = re.findall(r"moved (?:the function )?by (\S+)", ran.stdout)
    assert len(moved) == 6 and all(float(by) < 1e-12 for by in moved)
    fell = re.findall(r"steps: squared distance to what we want (\S+) -> (\S+)", ran.stdout)
    assert len(fell) == 6 and all(float(after) < float(before) for before, after in fell)
    assert [ran.stdout.count(f"==== {name}") for name in ("GraLoRA", "CPS-LoRA", "G-LoRA", "GFA")] == [1] * 4
    assert "rank of the block 2 and of ΔW 8" in ran.stdout and "rank of M 2 and of w's slice 8" in ran.stdout


def test_the_walkthrough_is_cells_that_use_the_method_files():
    source = (ROOT / "docs" / "walkthrough.py").read_text(encoding="utf-8")
    assert source.count("\n# %%") >= 10 and len(source.splitlines()) <= 200
    names = {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)
             for alias in node.names}
    assert {*NUMBERED} < names


def test_make_is_short():
    assert len((ROOT / "docs" / "make.py").read_text(encoding="utf-8").splitlines()) <= 300
