"""
experiments/reproduce.py: every full-size command is understood; which rate is taken, what seeds can tell,
which runs are kept; a small sweep in earnest.
"""
import itertools
import json
import math
import shlex
import sys
from types import SimpleNamespace

import pytest
import scipy.stats
from conftest import ROOT

import evaluate
import train

sys.path.insert(0, str(ROOT / "experiments"))
import accuracy
import reproduce
import sweep

TINY = "--train_rows 64 --val_rows 16 --eval_limit 4 --no-eval_before --batch_size 4 --log_every 1"


def given(**more):
    return SimpleNamespace(**dict(seeds=2, steps=10, rates="1e-3,1e-2", common="", model=None) | more)


def measured(val, score, loss, speed=100.0, steps=10, reinits=0):
    summary = dict(last=dict(loss_val=val), after=dict(mean=score), loss_after=loss, tokens_per_second=speed,
                   steps=steps, reinit_seconds=[0.1] * reinits, trainable=7)
    return dict(summary=summary, env=dict(torch="2", threads=1, commit="c", platform="p"))


# ---------------------------------------------------------------------- full-size commands

@pytest.mark.parametrize("name", reproduce.tables())
def test_every_command_of_a_table_is_understood(name, capsys):
    reproduce.main([name])
    lines = capsys.readouterr().out.splitlines()
    assert lines and not any(set("{}") & set(line) for line in lines)
    for line in lines:
        python, script, *flags = shlex.split(line)
        assert python == "python" and (ROOT / script).is_file()
        if script == "train.py":
            assert train.parse(flags)[0].model == "DIR"
        elif script == "evaluate.py" and "--list" not in flags:
            with pytest.raises(SystemExit):             # it stops at the adapter, which is not there
                evaluate.main(flags)
            assert "RUN/adapter" in capsys.readouterr().err


def test_the_list_has_every_small_name_and_every_table(capsys):
    reproduce.main(["--list"])
    shown = capsys.readouterr().out
    for name in [*reproduce.SMALL, *reproduce.tables()]:
        assert name in shown
    assert {"main", "anchors", "k", "spectra", "rank", "angles", "blocks", "partition", "importance", "ends",
            "gradients", "outlook", "permute"} == set(reproduce.SMALL)


def test_a_table_is_named_by_its_beginning_where_that_is_one(capsys):
    reproduce.main(["glora-table-4"])
    assert capsys.readouterr().out.count("--importance") == 3
    for name in ("glora", "nothing"):
        with pytest.raises(SystemExit) as stop:
            reproduce.main([name])
        assert stop.value.code == 2 and name in capsys.readouterr().err


def test_braces_expand_as_a_shells_do():
    assert reproduce.expand("--a {x,y} --b q,v --c z{1,2}") == [
        f"--a {a} --b q,v --c z{c}" for a, c in itertools.product("xy", "12")]


# ---------------------------------------------------------------------- rates and seeds

@pytest.mark.parametrize("values", [[0.1, 0.4, 0.2], [1.0, 2.0], [3.0, 3.5, 2.0, 4.0, 4.5]])
def test_the_interval_is_students(values):
    mean, half = accuracy.interval(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, mean, scipy.stats.sem(values))
    assert mean == pytest.approx((low + high) / 2) and half == pytest.approx((high - low) / 2, rel=2e-3)


def test_of_one_value_there_is_no_interval():
    assert math.isnan(accuracy.interval([1.0])[1])


def test_stages_are_at_the_papers_fractions_of_any_length():
    assert "--reinit_every 10s" in accuracy.flags(accuracy.STAGES["glora"], 50, "")      # 20, 40, 60, 80 %
    assert "--reinit_every 20s" in accuracy.flags(accuracy.STAGES["cps_lora"], 40, "")   # 50 %
    assert train.reinit_steps("10s", None, 50, 100) == {10, 20, 30, 40}
    assert train.reinit_steps("20s", None, 40, 100) == {20}


def test_a_rate_is_chosen_by_validation_on_the_first_seed_and_then_every_seed_has_it():
    asked = []

    def fake(runs):
        asked.append(runs)
        val = lambda f: (2.0 if "lora" in f else 1.0) * (1 if "1e-2" in f else 3)
        return [dict(diverged="x") if "lora" in f and "1e-3" in f else measured(val(f), 0.5, 1.0)
                for f in runs]

    rows = accuracy.table(fake, {"a": ("--method lora", "a"), "b": ("--method gfa", "a")}, given())
    assert rows["a"]["grid"] == {"1e-3": math.inf, "1e-2": 2.0} and rows["a"]["lr"] == "1e-2"
    assert rows["b"]["grid"] == {"1e-3": 3.0, "1e-2": 1.0} and rows["b"]["lr"] == "1e-2"
    assert [f.rpartition("--seed ")[2] for f in asked[0]] == ["42"] * 4
    assert [f.rpartition("--seed ")[2] for f in asked[1]] == ["42", "43"] * 2
    assert all("--lr 1e-2" in f for f in asked[1])


def test_where_every_rate_diverges_it_stops():
    with pytest.raises(RuntimeError, match="diverged at every rate"):
        accuracy.table(lambda runs: [dict(diverged="x")] * (len(runs) - 1) + [measured(1, 1, 1)],
                       {"a": ("--method lora", "a"), "b": ("--method gfa", "a")}, given(rates="1,2"))


def test_in_equal_time_a_method_of_half_the_pace_has_half_the_steps_and_its_stages_move_along():
    def fake(runs):
        return [measured(1.0, 0.5, 1.0, speed=50.0 if "glora" in f else 100.0,
                         steps=int(f.partition("--max_steps ")[2].split()[0])) for f in runs]
    words = {"lora": ("--method lora", "lora"), "glora": ("--method glora --reinit_every {fifth}s", "lora")}
    rows = accuracy.table(fake, words, given(), equal_time=True)
    assert rows["lora"]["equal_time"]["steps"] == 10 and rows["glora"]["equal_time"]["steps"] == 5
    assert accuracy.flags(words["glora"][0], 5, "").startswith("--method glora --reinit_every 1s")


def test_differences_are_paired_by_seed_and_an_optimum_on_the_edge_is_told():
    """Two rows that move together by seed: each has a wide interval, their difference none."""
    row = lambda accuracies, beside: dict(
        flags="", beside=beside, grid={"1": 2.0, "2": 1.0}, lr="2", accuracy=accuracies, loss=[1.0, 2.0, 3.0],
        speed=[1.0] * 3, steps=10, reinits=[4] * 3, trainable=7)
    shown = accuracy.markdown({"a": row([0.1, 0.2, 0.3], "a"), "b": row([0.2, 0.3, 0.4], "a")}, 3)
    cells = [cell.strip() for cell in next(x for x in shown.splitlines() if x.startswith("| b |")).split("|")]
    assert cells[1:8] == ["b", "7", "2 (edge)", "4", "30.0 ± 24.8", "a", "10.0 ± 0.0"]


def test_no_path_of_a_machine_is_written():
    row = dict(beside="a", grid={"1": 1.0}, lr="1", accuracy=[1.0, 0.5], loss=[1.0, 2.0], reinits=[0],
               trainable=1)
    rows = dict(a=row, env=measured(1, 1, 1)["env"])
    made = accuracy.result(rows, given(common="--task here/x.json --a 1"))["data"]
    assert made["common"] == "--task x.json --a 1"
    assert made["env"] == dict(torch="2", threads=1, commit="c")


def test_infinity_is_written_as_null():
    assert reproduce.rounded({"a": [math.inf, 0.123456789, 3, "x"]}) == {"a": [None, 0.12346, 3, "x"]}


# ---------------------------------------------------------------------- sweeps

def test_a_run_is_kept_by_its_flags_and_by_the_projects_files(tmp_path, monkeypatch):
    made = sweep.Sweep(1, tmp_path)
    one, two = made.directory("--lr 1"), made.directory("--lr 2")
    monkeypatch.setattr(sweep, "sources", lambda: "others")
    assert len({one, two, sweep.Sweep(1, tmp_path).directory("--lr 1")}) == 3


def test_any_changed_or_renamed_file_gives_another_hash(tmp_path):
    (tmp_path / "baselines").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    hashes = [sweep.sources(tmp_path)]
    (tmp_path / "a.py").write_text("x = 2")
    hashes.append(sweep.sources(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "baselines" / "a.py")
    assert len({*hashes, sweep.sources(tmp_path)}) == 3


def test_main_in_earnest_is_resumed_from_what_is_kept(tmp_path, capsys):
    """Two rates, of which one diverges, and another seed: three runs; the second time none."""
    argv = ["main", "--seeds", "2", "--steps", "4", "--jobs", "1", "--methods", "glora", "--rates",
            "1e-3,1e25", "--equal_time", "--common", TINY, "--cache", str(tmp_path / "runs"), "--out",
            str(tmp_path)]
    reproduce.main(argv)
    found = json.loads((tmp_path / "main.json").read_text())
    assert found["rows"]["glora"]["reinits"] == [3, 3] and found["rows"]["glora"]["grid"]["1e25"] is None
    assert (tmp_path / "main.png").is_file() and "diverged" in (tmp_path / "main.md").read_text()
    assert [line for line in capsys.readouterr().out.splitlines() if "runs to do" in line] == [
        "2 of 2 runs to do, 1 at once", "1 of 2 runs to do, 1 at once", "0 of 2 runs to do, 1 at once"]
    reproduce.main(argv)
    assert capsys.readouterr().out.count("0 of 2 runs to do") == 3


def test_what_train_refuses_stops_the_sweep_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["main", "--methods", "nothing", "--cache", str(tmp_path), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("main.*"))
