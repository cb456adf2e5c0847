"""The rooms of the house: imports run train -> evaluate -> data -> checkpoint -> model, never back."""
import ast

import pytest
from conftest import ROOT

import checkpoint

OURS = {"train", "evaluate", "data", "checkpoint", "config", "files", "decode", "model", "presets",
        "distributed", "runs", "export"}
MAY = {
    "train.py": OURS - {"train"},
    "evaluate.py": {"data", "checkpoint", "config", "files", "decode", "model"},
    "data/text.py": {"checkpoint"},
    "data/tasks.py": set(),                         # it finds task files, and imports them by name
    "checkpoint.py": {"config", "files", "model", "export"},        # export: as a command alone
    "export.py": {"checkpoint", "files"},
    "config.py": {"model"},
    "files.py": set(),
    "decode.py": set(),
    "model.py": set(),
    "presets.py": set(),
    "runs.py": {"checkpoint", "files"},
}
TASK_FILES = [file for file in sorted((ROOT / "data").glob("*.py"))
              if "\nTASKS = " in file.read_text(encoding="utf-8")]


def imports(file):
    """{top-level module: names taken from it} of a file, whatever function an import stands in."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name.partition(".")[0], set())
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module.partition(".")[0], set()).update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("file", MAY)
def test_imports_run_one_way(file):
    assert imports(ROOT / file).keys() & OURS <= MAY[file]


@pytest.mark.parametrize("file", TASK_FILES, ids=lambda file: file.name)
def test_a_task_file_imports_at_most_read_and_its_sandbox(file):
    found = imports(file)
    assert found.keys() & OURS <= {"data"} and found.get("data", set()) <= {"read", "sandbox"}


def test_method_files_import_nothing_of_ours():
    files = checkpoint.method_files().values()
    assert files and not any(imports(file).keys() & OURS for file in files)


def test_what_the_two_kinds_of_model_do_differently_they_answer_themselves():
    for file in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]:
        assert 'hasattr(model, "classifier")' not in file.read_text(encoding="utf-8"), file
