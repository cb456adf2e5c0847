"""Prompts, where a completion ends, pass@k, the files; what runs is in test_sandbox.py."""
import itertools
import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

import train
from data import code_generation as task
from data import sandbox
from data.text import shown

PROBLEM = {"task_id": "T/0", "entry_point": "add", "canonical_solution": "    return a + b\n",
           "prompt": 'import math\n\n\ndef add(a: int,\n        b: int) -> int:\n'
                     '    """ Add them.\n      Twice:\n    >>> add(1, 2)\n    3\n    """\n',
           "test": "def check(candidate):\n    assert candidate(1, 2) == 3"}
SANITIZED = {"task_id": 11, "prompt": "Write a function to add.", "code": "def add(a, b):\r\n  return a + b",
             "test_imports": ["import math"],
             "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.5, 0.5), 1)"]}


def test_humaneval_opens_the_response_with_the_signature_and_keeps_its_newline():
    row = task.humaneval(PROBLEM)
    assert row["instruction"] == (
        "Write a Python function `add(a: int,\n        b: int) -> int` to solve the following problem:\n"
        "Add them.\n  Twice:\n>>> add(1, 2)\n3")
    assert row["prefix"] == PROBLEM["prompt"] and row["prefix"].endswith('"""\n')
    assert row["tests"].endswith("== 3\ncheck(add)")
    assert task.program(row["output"], row) == PROBLEM["prompt"] + "    return a + b\n"
    with pytest.raises(ValueError, match="T/0: no signature or docstring in the prompt"):
        task.humaneval(dict(PROBLEM, prompt="def add(a, b):\n"))


def test_mbpp_shows_its_first_test_alone():
    row = task.mbpp(SANITIZED)
    assert row["instruction"] == (
        "Write a function to add.\nYour code should pass this test:\nassert add(1, 2) == 3")
    assert row["prefix"] == ""
    assert row["tests"] == "import math\nassert add(1, 2) == 3\nassert math.isclose(add(0.5, 0.5), 1)"
    assert "\r" not in row["output"] and row["names"] == ["add"]
    two = dict(PROBLEM, prompt="def help(x):\n    pass\n\n" + PROBLEM["prompt"])
    assert task.humaneval(two)["names"] == ["help", "add", "add"]


# completion -> what of it belongs to the program
HUMANEVAL = {
    "    return 1\n": "    return 1\n", "    return 1\n\n\ndef other():\n    pass": "    return 1\n\n",
    "    return 1\n# so": "    return 1", "    a = 1\n@x": "    a = 1", "return 1": "", "": "",
    "    return 1\n\n    # in\n    x\nprint(add(1))": "    return 1\n\n    # in\n    x",
    "    if x:\n        y\nif z:": "    if x:\n        y", "\n    return 1\nclass A": "\n    return 1",
    "    return 1<|endoftext|>x": "    return 1", "    return 1<|eot_id|>": "    return 1",
    "    s = '\\n'\n    return s\nassert x": "    s = '\\n'\n    return s"}
MBPP = {
    "def f():\n  return 1\n\nprint(f())": "def f():\n  return 1\n", "x = 1\n# y\nz = 2": "x = 1\n# y\nz = 2",
    "import re\ndef g(): pass\n\ndef f():\n  return g()\nassert f()":
        "import re\ndef g(): pass\n\ndef f():\n  return g()",
    "```python\ndef f(): pass\n```\nIt does nothing.": "def f(): pass\n",
    "Here it is:\n```python\ndef f(): pass\n\nx = 1\n```\nDone.": "def f(): pass\n\nx = 1\n",
    "def f(): pass\nif x:": "def f(): pass", "def f(): pass\n\"\"\"x": "def f(): pass",
    "def f(): pass\nclass A:": "def f(): pass", "def f(): pass\n<|im_end|>": "def f(): pass"}


@pytest.mark.parametrize("completion", HUMANEVAL)
def test_a_humaneval_completion_ends_with_its_indentation(completion):
    row = task.humaneval(PROBLEM)
    assert task.program(completion, row) == PROBLEM["prompt"] + HUMANEVAL[completion]


@pytest.mark.parametrize("completion", MBPP)
def test_an_mbpp_completion_ends_at_its_stops(completion):
    assert task.program(completion, task.mbpp(SANITIZED)) == MBPP[completion]


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (5, 2), (10, 3), (6, 6), (6, 0)])
def test_pass_at_k_is_the_chance_that_k_of_the_n_hold_a_right_one(n, c):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert task.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_by_hand():
    assert task.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert task.pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert task.pass_at_k(50, 1, 10) == pytest.approx(0.2) and math.isclose(task.pass_at_k(200, 100, 100), 1)


def test_samples_are_grouped_by_problem_and_every_verdict_is_kept(monkeypatch):
    verdict = lambda program, tests, names, timeout: "passed" if "right" in program else "AssertionError: "
    monkeypatch.setattr(sandbox, "run", verdict)
    rows = [row for i in range(3) for row in [dict(task.humaneval(PROBLEM), task_id=i)] * 5]
    right, wrong = "    right", "    wrong"
    outputs = [right, wrong, wrong, wrong, wrong] + [right] * 5 + [wrong] * 5
    got = task.score(outputs, rows)
    assert got["pass@1"] == pytest.approx((0.2 + 1 + 0) / 3) and got["pass@5"] == pytest.approx(2 / 3)
    assert "pass@10" not in got and got["extracted"][1] == "AssertionError: "
    assert got["correct"] == ["right" in output for output in outputs]


def test_scoring_runs_the_programs():
    rows = [task.humaneval(PROBLEM), task.mbpp(SANITIZED)]
    assert task.score([row["output"] for row in rows], rows)["pass@1"] == 1
    assert task.score(["    return a - b", "def add(a, b): return 3"], rows)["correct"] == [False, False]


def test_the_way_in_which_programs_run_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(sandbox, "run", lambda *_: "passed")
    for works, said in ((True, "generated code runs in namespaces of its own (bubblewrap)\n"),
                        (False, "generated code runs without bubblewrap, under limits and a hook that "
                                "hostile code can take apart: see data/sandbox.py\n")):
        monkeypatch.setattr(sandbox, "namespace", lambda works=works: works)
        task.say_how.cache_clear()
        task.score(["x"], [task.humaneval(PROBLEM)])
        task.score(["x"], [task.mbpp(SANITIZED)])
        assert capsys.readouterr().out == said
    task.say_how.cache_clear()


def test_outputs_on_disk_become_the_samples_of_evalplus(tmp_path):
    rows = [dict(PROBLEM), dict(PROBLEM, task_id="T/1", entry_point="sub",
                                prompt=PROBLEM["prompt"].replace("def add", "def sub"))]
    (tmp_path / "humaneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    other = dict(SANITIZED, task_id=12, test_list=["assert add(1, 2) == 3 and add"])    # begins as the first
    (tmp_path / "mbpp_sanitized.json").write_text(json.dumps([SANITIZED, other]))
    for name, outputs in (("humaneval", ["    return a\nx", "    return b", "    c", ""]),
                          ("mbpp", ["```python\nx\n```", "y\nassert z", "", "w"])):
        asked = [row for row in task.rows(tmp_path, name, "test") for _ in range(2)]
        lines = [dict(row=i, prompt=shown(row), output=output)
                 for i, (row, output) in enumerate(zip(asked, outputs))]
        (tmp_path / "out").mkdir(exist_ok=True)
        file = tmp_path / "out" / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        subprocess.run([sys.executable, "-m", "data.code_generation", name, file, tmp_path / "samples.jsonl",
                        tmp_path], check=True, cwd=ROOT)
        found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
        ids = ["T/0", "T/0", "T/1", "T/1"] if name == "humaneval" else ["Mbpp/11"] * 2 + ["Mbpp/12"] * 2
        assert found == [dict(task_id=i, solution=task.program(output, row))
                         for i, output, row in zip(ids, outputs, asked)]
    assert [line["solution"] for line in found] == ["x\n", "y", "", "w"]
    command = [sys.executable, "-m", "data.code_generation", "humaneval", file, tmp_path / "x", tmp_path]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert "mbpp.jsonl: row 1 has another prompt than those of humaneval in" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name, text, count", [
    ("code/codealpaca_20k.json", json.dumps([dict(instruction="a", input="", output="b")] * 3), 3),
    ("code_alpaca_20k.json", json.dumps([dict(instruction="a", input="", output="b")]), 1),
    ("code/data-evol_instruct-decontaminated.jsonl",
     '{"instruction": "a", "response": "b"}\n{"instruction": "c", "response": "d"}', 2)])
def test_training_rows_of_codealpaca_and_magicoder(name, text, count, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = task.rows(tmp_path, "code", "train")
    assert len(rows) == count and rows[0]["output"] == "b"
    with pytest.raises(ValueError, match="humaneval has no training rows: train on code"):
        task.rows(tmp_path, "humaneval", "train")
    found = "found none of code/humaneval.jsonl, humaneval.jsonl, HumanEval.jsonl"
    with pytest.raises(FileNotFoundError, match=found):
        task.rows(tmp_path, "humaneval", "test")


def test_a_training_row_without_an_answer_is_named(tmp_path):
    rows = [dict(instruction="a", output="b"), dict(instruction="a")]
    (tmp_path / "codealpaca_20k.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="training row 2 has no text in 'output' or 'response'"):
        task.rows(tmp_path, "code", "train")


def test_the_shared_files(shared_data):
    sizes = {name: len(task.rows(shared_data, name, "test")) for name in task.TASKS}
    assert sizes == {name: entry["rows"] for name, entry in task.TASKS.items()}
    assert sizes == {"humaneval": 164, "humanevalplus": 164, "mbpp": 257}
    assert len(task.rows(shared_data, "code", "train")) == 20022
    assert len(task.rows(shared_data, "mbpp", "train")) == 120
    for name in task.TASKS:     # nothing of a reference solution is cut off but blank ends
        for row in task.rows(shared_data, name, "test"):
            kept, whole = task.program(row["output"], row), row["prefix"] + row["output"]
            assert kept.rstrip() == whole.rstrip(), (name, row["task_id"])


@pytest.mark.parametrize("name", task.TASKS)
def test_every_prompt_of_the_shared_files_is_told_from_the_others(name, shared_data, tmp_path):
    rows = task.rows(shared_data, name, "test")
    lines = [json.dumps(dict(row=i, prompt=shown(row), output="")) for i, row in enumerate(rows)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    found = [line["task_id"] for line in task.samples(name, tmp_path / "x.jsonl", shared_data)]
    assert found == [f"Mbpp/{row['task_id']}" if name == "mbpp" else row["task_id"] for row in rows]


def test_training_on_code_scores_only_where_that_is_allowed(tmp_path, tiny, capsys):
    rows = [dict(instruction="a", input="", output="b c")] * 4
    (tmp_path / "codealpaca_20k.json").write_text(json.dumps(rows))
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(PROBLEM))
    flags = ["--model", str(tiny), "--task", "code", "--data", str(tmp_path), "--max_steps", "1",
             "--no-eval_before", "--out_dir"]
    after = lambda name: json.loads((tmp_path / name / "summary.json").read_text())["after"]
    train.main([*flags, str(tmp_path / "a")])
    assert after("a") == {} and "pass@1 not scored" in capsys.readouterr().out
    train.main([*flags, str(tmp_path / "b"), "--allow_code_execution"])
    assert after("b") == {"mean": 0.0, "humaneval": 0.0}
    assert "not found: humanevalplus (code/humanevalplus.jsonl, from evalplus" in capsys.readouterr().out
