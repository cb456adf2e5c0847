"""What the README says of the code: line counts, parameter counts, commands."""
import re
import shlex

import pytest
from conftest import ROOT, trainable

import checkpoint
import evaluate
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in README.splitlines() if line.startswith("| [")]
COMMANDS = re.findall(r"^python (train|evaluate)\.py (.*DIR.*)$", README, re.MULTILINE)


def test_the_table_lists_every_method_file_with_its_lines():
    listed = {re.search(r"\((.*)\)", row[0])[1]: int(row[1]) for row in ROWS}
    assert listed == {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
                      for file in checkpoint.method_files().values()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_parameter_counts_of_the_table(row):
    name = re.search(r"(\w+)\.py\)", row[0])[1]
    assert trainable(name, "LLaMA3-8B", "attention", 8) == int(row[4].split()[0].replace(",", ""))


def test_there_are_commands():
    assert len(COMMANDS) >= 3 and len(ROWS) >= 3


@pytest.mark.parametrize("program, flags", COMMANDS)
def test_its_commands_are_understood(program, flags, tmp_path, monkeypatch, capsys):
    """Read as far as the data, which is not at DIR: no flag is unknown, no task, no method."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        dict(train=train, evaluate=evaluate)[program].main(shlex.split(flags))
    assert re.search("DIR: (found none of|not found:).* [(]?(commonsense|math|code|glue)/",
                     capsys.readouterr().err)


def test_set_up_takes_the_two_commands_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("pip install -r requirements.txt && python train.py --method gfa --rank 8",
                    "pip install -r requirements-test.txt && pytest"):
        assert command in README and command.replace("install -r", "install -q -r") in ci
    first = README.index("pip install -r requirements.txt")
    assert len(README[:first].split()) < 120 and len(README.splitlines()) <= 140
