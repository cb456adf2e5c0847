"""
Do the tests see it when a line of a method file computes something else? Each mutant is the file with one
small change; it survives where every test passes. Strings, messages and annotations are left as they are.

    python experiments/mutants.py mutants.jsonl gfa gralora

Nothing is written into the tree: a fork takes the mutant for the file as that is imported, and runs its
tests until one fails, or for 60 s of a processor, which counts as killed. What has a line in the log is
not run again. The order is shuffled (seed 0), so a run that was stopped is a random sample.
"""
import ast
import gc
import json
import os
import random
import resource
import signal
import sys
import tempfile
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOADED = "torch._dynamo peft transformers.models.llama.modeling_llama train experiments.vectors".split()

swaps = lambda words: {a: b for pair in words.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
OPERATORS = swaps("Add Sub, Mult Div, FloorDiv Mod, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or")
NAMES = swaps("A B, rows columns, o i, min max, any all, zip map, floor ceil")
ATTRIBUTES = NAMES | swaps(
    "argmin argmax, amin amax, zeros ones, zeros_like ones_like, new_zeros new_ones, sum mean, add_ sub_, "
    "lora_rows lora_columns, first last, partition rpartition, startswith endswith, randperm arange")
DROPPED = set("T abs clamp clone contiguous copy detach flip flatten sqrt square to".split())   # x.abs() -> x
SYMMETRIC = {"min", "max", "promote_types", "hasattr", "isinstance"}    # else f(a, b) -> f(b, a)
STATEMENTS = ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Delete, ast.Continue, ast.Break


def variants(node):
    """What may stand in the place of the node."""
    kind, other = type(node).__name__, lambda **fields: type(node)(**(vars(node) | fields))
    if kind in OPERATORS:
        yield getattr(ast, OPERATORS[kind])()
    if isinstance(node, STATEMENTS):
        yield ast.Pass()
    for field in ("values", "ifs", "decorator_list", "keywords"):       # one of them less
        found = getattr(node, field, []) if kind not in ("ClassDef", "JoinedStr", "Dict") else []
        for less in ([x for x in found if x is not one] for one in found):
            yield less[0] if field == "values" and len(less) == 1 else other(**{field: less})
    match node:
        case ast.If() | ast.While() | ast.IfExp() if not isinstance(getattr(node.test, "op", None), ast.Not):
            yield other(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=less) | ast.Attribute(value=less, attr="T"):
            yield less
        case ast.BinOp(op=ast.MatMult()):
            yield other(left=node.right, right=node.left)
        case ast.Constant(value=bool() | int() | float() as n):
            yield from map(ast.Constant, [not n] if isinstance(n, bool) else [0, 2] if n == 1 else [n + 1])
        case ast.Slice():
            for edge, value in ast.iter_fields(node):
                if value:
                    yield other(**{edge: None})
                    yield other(**{edge: ast.BinOp(value, ast.Add(), ast.Constant(1))})
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield other(id=NAMES[name])
        case ast.Attribute(attr=attr, ctx=ast.Load()):
            side = attr[:-1] + NAMES[attr[-1]] if attr.endswith(("_A", "_B")) else attr
            yield other(attr=ATTRIBUTES.get(attr, side))
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            if len(node.args) == 2 and name not in SYMMETRIC and not isinstance(node.args[0], ast.Starred):
                yield other(args=node.args[::-1])
            if name in DROPPED and ast.unparse(node.func) not in (name, "math.sqrt"):
                yield node.func.value
            if name == "argsort" and not node.keywords:
                yield other(keywords=[ast.keyword("descending", ast.Constant(True))])


def places(node):
    """(parent, field, its value, index or None, node) of all nodes that compute."""
    for field, value in ast.iter_fields(node):
        for j, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not docstring and field not in ("annotation", "returns"):
                yield node, field, value, j, child
                if not ast.unparse(child).startswith(("raise ", "warnings.warn(")):
                    yield from places(child)


def mutants(source, file="module.py"):
    """{(line, change): code}; the code has the lines of the source, which tests may look up."""
    old, tree, found = ast.unparse(ast.parse(source)).splitlines(), ast.parse(source), {}
    for parent, field, value, j, node in list(places(tree)):
        at = node if hasattr(node, "lineno") else parent
        for new in variants(node):
            setattr(parent, field, new if j is None else [*value[:j], new, *value[j + 1:]])
            differ = (pair for pair in zip(old, ast.unparse(tree).splitlines()) if pair[0] != pair[1])
            change = " -> ".join(map(str.strip, next(differ, ())))
            if change and (at.lineno, change) not in found:
                ast.fix_missing_locations(ast.copy_location(new, at))
                found[at.lineno, change] = compile(tree, file, "exec")
            setattr(parent, field, value)
    return found


def judge(file, code, stages, seconds=60):
    """"survived", "killed" or "timeout", in a process of its own; stages: pytest's arguments of each run."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        return "survived" if status == 0 else "timeout" if status & 127 == signal.SIGXCPU else "killed"
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 9))     # not the clock's: a machine is busy
    read, scratch = SourceFileLoader.get_code, f"{tempfile.gettempdir()}/mutants-{os.getppid()}"
    SourceFileLoader.get_code = lambda self, name: code if Path(self.path) == file else read(self, name)
    try:
        os.chdir(file.parent)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"      # they take longer than most tests
        common = f"-x -p no:terminal -p no:cacheprovider --basetemp {scratch} "
        os._exit(any(pytest.main((common + stage).split()) not in (0, 5) for stage in stages))  # 5: no test
    finally:
        os._exit(1)


def table(lines):
    """Markdown: counts by file, then what survived or ran too long."""
    rows = ["| file | mutants | run | survived | killed | of these by timeout |", "| --- " * 6 + "|"]
    for name, of in {line["file"]: line["of"] for line in lines}.items():
        found = [line["verdict"] for line in lines if line["file"] == name]
        left, late, n = found.count("survived"), found.count("timeout"), len(found)
        rows.append(f"| {name} | {of} | {n} | {left} | {1 - left / n:.1%} | {late} |")
    left = [line for line in lines if line["verdict"] != "killed"]
    return "\n".join(rows + [""] + sorted("- {file}:{line} {verdict} `{change}`".format(**x) for x in left))


if __name__ == "__main__":
    (log, *names), sys.path[:0] = sys.argv[1:], [str(ROOT), str(ROOT / "tests")]
    list(map(__import__, LOADED))
    gc.freeze()                                                         # or every fork copies all of it
    lines = [json.loads(line) for line in open(log)] if Path(log).exists() else []
    known = {(line["file"], line["line"], line["change"]) for line in lines}
    for name in names:
        found = mutants(source := (file := ROOT / f"{name}.py").read_text(encoding="utf-8"), file)
        stages = [" ".join(f"tests/test_{test}.py" for test in tests.split()) + f" -k {name}" for tests in (
            f"vectors {name}", "methods", "train resume checkpoint export")] + ["tests/test_presets.py"]
        assert judge(file, compile(source, file, "exec"), stages) == "survived", f"a test of {name} fails"
        for line, what in random.Random(0).sample(list(found), len(found)):
            if (name, line, what) not in known:
                lines.append(dict(file=name, line=line, change=what, of=len(found),
                                  verdict=judge(file, found[line, what], stages)))
                with open(log, "a") as f:
                    print(json.dumps(lines[-1]), file=f)
    print(table(lines))
