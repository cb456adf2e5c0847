"""experiments/mutants.py: the mutants of a few lines, and the verdicts on a toy module with its own tests."""
import gc
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import mutants

TOY = '''"""n + 1 is no code here."""
def largest(values, n):
    """Of the first n."""
    if not values:
        raise ValueError("no 1 + 1 values")
    return max(values[:n]) + len(values) * 2
'''
RETURN = "return max(values[:n]) + len(values) * 2 -> "


def test_four_lines_have_exactly_these_mutants():
    assert sorted(mutants.mutants(TOY)) == sorted([
        (4, "if not values: -> if values:"),
        (5, "raise ValueError('no 1 + 1 values') -> pass"),
        (6, f"{RETURN}pass"),
        (6, f"{RETURN}return max(values[:n]) - len(values) * 2"),
        (6, f"{RETURN}return min(values[:n]) + len(values) * 2"),
        (6, f"{RETURN}return max(values[:]) + len(values) * 2"),
        (6, f"{RETURN}return max(values[:n + 1]) + len(values) * 2"),
        (6, f"{RETURN}return max(values[:n]) + len(values) / 2"),
        (6, f"{RETURN}return max(values[:n]) + len(values) * 3")])


@pytest.mark.parametrize("line, changed", [
    ("a < b", ["a <= b"]), ("a >= b", ["a > b"]), ("a == b", ["a != b"]), ("a is b", ["a is not b"]),
    ("a in b", ["a not in b"]), ("a and b", ["a or b", "a", "b"]), ("-a", ["a"]), ("not a", ["a"]),
    ("a - b", ["a + b"]), ("a / b", ["a * b"]), ("a // b", ["a % b"]), ("a @ b", ["b @ a"]),
    ("0", ["1"]), ("1", ["0", "2"]), ("7", ["8"]), ("0.5", ["1.5"]), ("True", ["False"]), ("None", []),
    ("'text 1'", []), ("a if b else c", ["a if not b else c"]), ("a if not b else c", ["a if b else c"]),
    ("a[b:c]", ["a[:c]", "a[b + 1:c]", "a[b:]", "a[b:c + 1]"]), ("a.T", ["a"]), ("a.abs()", ["a"]),
    ("math.sqrt(a)", []), ("f(a, b)", ["f(b, a)"]), ("max(a, b)", ["min(a, b)"]), ("f(a, b, c)", []),
    ("f(a, dim=b, **c)", ["f(a, **c)", "f(a, dim=b)"]), ("math.floor(a)", ["math.ceil(a)"]),
    ("a.argsort()", ["a.argsort(descending=True)"]), ("x.argmin()", ["x.argmax()"]),
    ("a.sort(descending=True)", ["a.sort()", "a.sort(descending=False)"]), ("A", ["B"]),
    ("x.lora_A", ["x.lora_B"]), ("x.lora_fixed_B", ["x.lora_fixed_A"]), ("rows", ["columns"]),
    ("[a for a in b if c]", ["[a for a in b]"])])
def test_an_expression_is_changed_so(line, changed):
    whole = f"x = {line}"
    want = [f"{whole} -> pass", *(f"{whole} -> x = {new}" for new in changed)]
    assert sorted(mutants.mutants(whole)) == sorted((1, change) for change in want)


def test_statements_and_decorators_are_dropped_and_annotations_stay():
    source = "@a\ndef f(x: 1) -> 2:\n    x += y\n    del x\n    g(x)\n    while x:\n        break\n"
    assert [change for _, change in sorted(mutants.mutants(source))] == [
        "@a -> def f(x: 1) -> 2:", "x += y -> pass", "x += y -> x -= y", "del x -> pass", "g(x) -> pass",
        "while x: -> while not x:", "break -> pass"]


def test_a_mutant_has_the_lines_of_the_source():
    source = "\n\n\nx = 1\n\n\ny = 2\n"
    code = mutants.mutants(source)[7, "y = 2 -> y = 3"]
    assert {line for *_, line in code.co_lines() if line} == {4, 7}


def test_a_kill_a_survivor_and_one_that_does_not_end_are_told_apart(tmp_path):
    source = "def f(n):\n    while n >= 3:\n        n -= 3\n    return n\n"
    (tmp_path / "rest.py").write_text(source)
    (tmp_path / "test_rest.py").write_text("import rest\n\n\ndef test_it():\n    assert rest.f(5) == 2\n")
    (tmp_path / "test_more.py").write_text("import rest\n\n\ndef test_it():\n    assert rest.f(6) == 0\n")
    found, file = mutants.mutants(source), tmp_path / "rest.py"
    edge, endless = found[2, "while n >= 3: -> while n > 3:"], found[3, "n -= 3 -> pass"]
    gc.freeze()                                             # a fork would collect this process's garbage
    try:
        assert mutants.judge(file, compile(source, file, "exec"), ["test_rest.py test_more.py"]) == "survived"
        assert mutants.judge(file, edge, ["test_rest.py", "test_more.py -k other"]) == "survived"
        assert mutants.judge(file, edge, ["test_rest.py", "test_more.py"]) == "killed"
        assert mutants.judge(file, endless, ["test_rest.py"], seconds=2) == "timeout"
    finally:
        gc.unfreeze()
    assert file.read_text() == source and "rest" not in sys.modules


def test_the_table_counts_by_file_and_lists_what_was_not_killed():
    line = lambda file, number, verdict: dict(file=file, line=number, change="a -> b", verdict=verdict, of=9)
    assert mutants.table([line("x", 3, "survived"), line("x", 2, "timeout"), line("x", 5, "killed"),
                          line("x", 6, "killed"), line("y", 1, "killed")]).splitlines() == [
        "| file | mutants | run | survived | killed | of these by timeout |",
        "| --- | --- | --- | --- | --- | --- |",
        "| x | 9 | 4 | 1 | 75.0% | 1 |",
        "| y | 9 | 1 | 0 | 100.0% | 0 |", "", "- x:2 timeout `a -> b`", "- x:3 survived `a -> b`"]
