"""
Several processes under torchrun are one run: the same adapter, files and scores as of one process, no hang.

The pairs of processes are forked, as in test_resume.py, and meet by a file: no port, whatever else runs here.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_resume import AT_STEP_3, assert_same_bits, leftovers, tensors

# 10 rows train: of the last batch of an epoch, a single example, the second process has none.
COMMAND = ["--task", "rows.json", "--max_steps", "20", "--batch_size", "3", "--micro_batch_size", "1",
           "--rank", "4", "--targets", "q_proj,down_proj", "--no-eval_before", "--log_every", "5"]
SHORT = [*COMMAND, "--max_steps", "5", "--log_every", "1", "--save_steps", "1", "--dropout", "0.1",
         "--method", "cps_lora", "--strategy", "random", "--reinit_at", "2"]
OWN = {"glora": ["--reinit_at", "10"], "cps_lora": ["--reinit_at", "10"]}
BRIEF = "from data import own; own.MAX_NEW_TOKENS = 4\n"        # scores are not what these tests look at
PREPARE = BRIEF + """
import datetime
import torch.distributed as dist
os.environ.update(LOCAL_RANK="{rank}", GLOO_SOCKET_IFNAME="lo")
dist.init_process_group("gloo", init_method="file://{meet}", rank={rank}, world_size=2,
                        timeout=datetime.timedelta(seconds=120))
"""


def start(forks, *args, before=("", "")):
    """Starts both processes, which `before`, code of each, prepares."""
    meet = forks.directory / f"meet{forks.count}"
    return [forks.start(*args, before=PREPARE.format(rank=rank, meet=meet) + before[rank])
            for rank in (0, 1)]


def run(forks, *args, **kw):
    """[(exit status, what was printed)] of the two."""
    return [forks.end(started) for started in start(forks, *args, **kw)]


def succeed(forks, *args, **kw):
    for status, printed in (found := run(forks, *args, **kw)):
        assert status == 0, printed
    return found[0][1]


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for line in lines] for key in ("step", "lr", "loss", "grad_norm")]


# ------------------------------------------------------------------------------------ the same run

@pytest.mark.parametrize("method", ["lora", "dora", "gralora", "cps_lora", "glora", "gfa"])
def test_two_processes_train_the_adapter_of_one(method, forks, tmp_path):
    """With accumulation, batches that do not divide, a process without an example, a re-initialisation."""
    command = [*COMMAND, "--method", method, *OWN.get(method, []), "--lr", "1e-3", "--out_dir"]
    status, printed = forks.run(*command, tmp_path / "one", before=BRIEF)
    assert status == 0, printed
    shown = succeed(forks, *command, tmp_path / "two")
    assert ("re-initialised" in shown) == (method in ("cps_lora", "glora"))
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, t in one.items():
        assert t.shape == two[name].shape and t.dtype == two[name].dtype
        assert (t.double() - two[name].double()).abs().max() <= 1e-5, name
    for got, want in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one")):
        assert got == pytest.approx(want, rel=1e-4)


def test_gradients_that_a_layer_gathers_in_backward_are_summed_too(forks, tmp_path):
    """SpIEL's, by which its places change; where two are nearly as large, rounding chooses."""
    command = [*COMMAND, "--method", "spiel", "--reselection_steps", "4", "--accumulation_steps", "2",
               "--max_steps", "4", "--lr", "1e-3", "--out_dir"]
    assert forks.run(*command, tmp_path / "one", before=BRIEF)[0] == 0
    succeed(forks, *command, tmp_path / "two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in (name for name in one if name.endswith("lora_places")):
        assert torch.isin(one[name], two[name]).float().mean() > 0.99


def test_each_scores_a_share_of_the_rows_and_the_file_is_that_of_one_process(forks, tmp_path):
    command = [*COMMAND, "--task", "arithmetic", "--train_rows", "20", "--eval_limit", "5", "--eval_before",
               "--max_steps", "1", "--val_rows", "7", "--out_dir"]
    count = """
import evaluate
complete = evaluate.complete
def counted(model, tokenizer, module, rows, *rest):
    print(f"asked for {len(rows)}", file=sys.stderr)
    return complete(model, tokenizer, module, rows, *rest)
evaluate.complete = counted
"""
    assert forks.run(*command, tmp_path / "one")[0] == 0
    found = run(forks, *command, tmp_path / "two", before=(count, count))
    assert [status for status, _ in found] == [0, 0], found
    assert [re.findall(r"asked for (\d)", printed) for _, printed in found] == [["3", "3"], ["2", "2"]]
    one, two = (next((tmp_path / name).glob("eval/*.before.jsonl")).read_text() for name in ("one", "two"))
    assert one == two and one.count("\n") == 5
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert one["before"] == two["before"] and one["trainable"] == two["trainable"]
    for when in ("before", "after"):
        assert two[f"loss_{when}"] == pytest.approx(one[f"loss_{when}"], rel=1e-5)
    assert two["last"]["loss_val"] == pytest.approx(one["last"]["loss_val"], rel=1e-5)


def test_the_first_alone_writes_and_prints(forks, tmp_path):
    command = [*COMMAND, "--max_steps", "4", "--val_rows", "2", "--eval_every", "1", "--select", "best",
               "--merge", "--out_dir", tmp_path / "run"]
    writes = """
import files
put = files.put
files.put = lambda *where: print("writes", where[1], file=sys.stderr) or put(*where)
"""
    (status, first), (other_status, other) = run(forks, *command, before=(writes, writes))
    assert status == other_status == 0 and other == ""
    assert first.count("2 processes") == 1 and "adapter-best" in first and "merged in float32" in first
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "adapter", "adapter-best", "args.json", "env.json", "eval", "merged", "metrics.jsonl", "summary.json"}
    assert json.loads((tmp_path / "run" / "env.json").read_text())["device"] == "2 x cpu"


def test_without_torchrun_nothing_of_it_is_imported(forks, tmp_path):
    look = "import atexit; atexit.register(lambda: print('imported:', 'distributed' in sys.modules))"
    status, printed = forks.run(*COMMAND, "--max_steps", "1", "--out_dir", tmp_path / "run", before=look)
    assert status == 0 and printed.endswith("imported: False\n")


def test_torchrun_starts_it(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(
        [dict(instruction=f"{i} + {i} =", input="", output=f"{2 * i}") for i in range(11)]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*COMMAND, "--batch_size", "4", "--micro_batch_size", "4", "--max_steps", "2"]
    ran = subprocess.run([*torchrun, ROOT / "train.py", *command, "--out_dir", "run"],
                         cwd=tmp_path, capture_output=True, text=True, timeout=300,
                         env=os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("2 processes") == 1 and ran.stdout.count("\nafter training\n") == 1
    assert "2 steps of 4 examples (2 forward passes of 2 each)" in ran.stdout
    assert json.loads((tmp_path / "run" / "args.json").read_text())["micro_batch_size"] == 4
    assert json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())["step"] == 2


# ------------------------------------------------------------------------------------ stopped, and gone on

@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(forks, *SHORT, "--out_dir", out)
    return out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_both_after_the_same_step_and_they_go_on_to_the_same_bits(
        rank, whole, forks, tmp_path):
    """With dropout, whose masks differ, and a re-initialisation, whose draws must not."""
    before = ["", ""]
    before[rank] = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGINT)")
    command = [*SHORT, "--save_steps", "9", "--out_dir", tmp_path / "run"]
    found = run(forks, *command, before=before)         # the signal is told to all in the step that follows
    assert [status for status, _ in found] == [130 if r == rank else 143 for r in (0, 1)], found
    assert "goes on after step 4" in found[0][1] and "Traceback" not in found[0][1] + found[1][1]
    assert "goes on after step 4" in succeed(forks, *command, "--resume")
    assert_same_bits(tensors(tmp_path / "run"), tensors(whole))
    assert leftovers(tmp_path) == []


def test_masks_of_dropout_differ_between_the_processes(whole, forks, tmp_path):
    """Where the second draws the first one's, as here, it is another run."""
    alike = "import distributed; distributed.hash = lambda what: hash((*what[:2], 0))"
    succeed(forks, *SHORT, "--out_dir", tmp_path / "run", before=(alike, alike))
    assert any((tensors(tmp_path / "run")[name] != t).any() for name, t in tensors(whole).items())


def test_one_process_goes_on_with_the_run_of_two(whole, forks, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    status, printed = forks.run(*SHORT, "--out_dir", tmp_path / "run", "--resume")
    assert status == 0 and "note: started with device 2 x cpu, now cpu" in printed
    assert_same_bits(tensors(tmp_path / "run"), tensors(whole))


# ------------------------------------------------------------------------------------ one of them fails

def test_where_one_is_killed_the_other_ends_with_an_error(forks, tmp_path):
    kill = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGKILL)")
    (status, printed), (killed, _) = run(forks, *SHORT, "--out_dir", tmp_path / "run", before=("", kill))
    assert status == 1 and killed == -signal.SIGKILL and "Error" in printed
    assert "goes on after step 2" in succeed(forks, *SHORT, "--out_dir", tmp_path / "run", "--resume")


def test_where_one_hangs_the_other_ends_when_its_time_is_up(forks, tmp_path):
    hang = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGSTOP)")
    hurry = AT_STEP_3.replace("SEND", "dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=3))")
    first, second = start(forks, *SHORT, "--out_dir", tmp_path / "run", before=(hurry, hang))
    try:
        status, printed = forks.end(first)
    finally:
        os.kill(second[0], signal.SIGKILL)
    assert forks.end(second)[0] == -signal.SIGKILL
    assert status == 1 and re.search("[Tt]imed? ?out", printed), printed


def test_where_set_up_fails_in_one_its_line_is_told_and_the_other_ends(forks, tmp_path):
    fails = "def fails(*_):\n    raise ValueError('the disk is not here')\ntrain.checkpoint.load = fails"
    (status, _), (failed, printed) = run(forks, *SHORT, "--out_dir", tmp_path / "run", before=("", fails))
    assert failed == 2 and printed == "train.py: error: the disk is not here\n"
    assert status == 1 and leftovers(tmp_path) == []


@pytest.mark.parametrize("place, step", [("train.make_optimizer", 0), ("train.lr_at", 2), ("train.nll", 5)])
def test_adapters_that_differ_in_a_bit_end_the_run(place, step, forks, tmp_path):
    """After injection, at a re-initialisation, at a save."""
    differ = f"""
def changed(*args, before={place}):
    import gc
    for m in gc.get_objects():
        if type(m).__name__ == "CPSLinear" and run_of[-1].step == {step}:
            m.lora_B.data.view(-1)[0] += 1e-7
            break
    return before(*args)
run_of = []
init = train.runs.Run.__init__
train.runs.Run.__init__ = lambda self, args: run_of.append(self) or init(self, args)
{place} = changed
"""
    command = [*SHORT, "--save_steps", "9", "--out_dir", tmp_path / "run"]
    for status, printed in run(forks, *command, before=("", differ)):
        assert status == 1 and f"step {step}: the processes' adapters differ" in printed
    assert not (tmp_path / "run" / "adapter").exists()
