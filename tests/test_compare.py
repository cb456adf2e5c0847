"""experiments/compare.py: the table of made-up runs cell by cell, and of real ones."""
import json
import sys

import pytest
from conftest import ROOT

import train

sys.path.insert(0, str(ROOT / "experiments"))
import compare


def made_up(directory, method="lora", losses=(2.0, 1.0), **summary):
    directory.mkdir()
    (directory / "args.json").write_text(json.dumps(dict(model="m")))
    summary = dict(task="boolq", method=method, rank=8, trainable=1234567, steps=20, before=dict(mean=0.125),
                   after=dict(mean=0.5), loss_after=0.25, tokens_per_second=1234.4, seconds=61.6) | summary
    (directory / "summary.json").write_text(json.dumps(summary))
    lines = [dict(step=10 * i, loss=loss, peak_memory_mb=1000.0 * i) for i, loss in enumerate(losses, 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory)


def shown(capsys, *args):
    compare.main([*map(str, args)])
    return capsys.readouterr().out.splitlines()


def test_a_run_is_a_row_of_a_markdown_table(tmp_path, capsys):
    lines = shown(capsys, made_up(tmp_path / "a"), "--png", tmp_path / "x.png")
    assert lines[0] == "| method | trainable | steps | before | after | loss | tokens/s | memory | seconds |"
    assert lines[1].count("---") == 9
    assert lines[2] == "| lora, r = 8 | 1,234,567 | 20 | 12.5% | 50.0% | 0.2500 | 1,234 | 2,000 MB | 62 |"
    assert len(lines) == 4


def test_what_was_not_evaluated_or_not_scored_is_a_dash_and_equal_labels_name_their_directories(
        tmp_path, capsys):
    runs = [made_up(tmp_path / "a", "my/gfa.py", before={}), made_up(tmp_path / "b", "gfa", after={})]
    lines = shown(capsys, *runs, made_up(tmp_path / "c"), "--png", tmp_path / "x.png")
    assert [line.split(" | ")[:5] for line in lines[2:5]] == [
        ["| gfa, r = 8 (a)", "1,234,567", "20", "-", "50.0%"],
        ["| gfa, r = 8 (b)", "1,234,567", "20", "12.5%", "-"],
        ["| lora, r = 8", "1,234,567", "20", "12.5%", "50.0%"]]


def test_runs_of_several_tasks_or_models_are_named(tmp_path, capsys):
    runs = [made_up(tmp_path / "a"), made_up(tmp_path / "b", task="piqa")]
    assert "note: not one task and one model: boolq of m, piqa of m" in shown(
        capsys, *runs, "--png", tmp_path / "x.png")


@pytest.mark.parametrize("lost, message", [
    ("args.json", "holds no args.json"), ("summary.json", "no run that has ended: it holds no summary.json"),
    (None, "holds no args.json, metrics.jsonl, summary.json")])
def test_a_directory_that_is_no_run_is_one_line(lost, message, tmp_path, capsys):
    good, bad = made_up(tmp_path / "a"), tmp_path / "b"
    if lost:
        made_up(bad)
        (bad / lost).unlink()
    with pytest.raises(SystemExit) as stop:
        compare.main([good, str(bad)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"compare.py: error: {bad}: ") and message in err


def test_without_matplotlib_there_is_the_table_and_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = shown(capsys, made_up(tmp_path / "a"), "--png", tmp_path / "x.png")
    assert lines[-1] == "no picture: pip install -r requirements-plots.txt"
    assert len(lines) == 4 and not (tmp_path / "x.png").exists()


def test_the_picture_has_a_curve_for_each_run(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, dpi: drawn.append(self.axes[0]))
    runs = [made_up(tmp_path / "a", losses=(4, 2, 1)), made_up(tmp_path / "b", "gfa")]
    compare.main(runs)
    lines = [(line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist())
             for line in drawn[0].get_lines()]
    assert lines == [("lora, r = 8", [10, 20, 30], [4, 2, 1]), ("gfa, r = 8", [10, 20], [2, 1])]


def test_real_runs_of_two_methods(tmp_path, capsys):
    for method in ("lora", "gfa"):
        train.main(["--method", method, "--max_steps", "4", "--batch_size", "4", "--train_rows", "40",
                    "--eval_limit", "4", "--log_every", "2", "--out_dir", str(tmp_path / method)])
    capsys.readouterr()
    lines = shown(capsys, tmp_path / "lora", tmp_path / "gfa", "--png", tmp_path / "x.png")
    cells = [line.strip("| ").split(" | ") for line in lines[2:4]]
    for run, found in zip(("lora", "gfa"), cells):
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        assert found[:3] == [f"{run}, r = 8", f"{summary['trainable']:,}", "4"]
        assert found[4] == f"{summary['after']['mean']:.1%}" and found[5] == f"{summary['loss_after']:.4f}"
        assert float(found[7].split()[0].replace(",", "")) > 1
