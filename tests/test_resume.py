"""
A run that was killed, interrupted or starved of disk goes on to the same bits; runs do not touch each other.

The children are forked from one process that has torch loaded, which this file is when it runs as a program.
By hand, with as many more kills of each method as wanted: KILLS=7 pytest tests/test_resume.py -k any_point
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file

import checkpoint

METHODS = sorted(checkpoint.method_files())
KILLS = int(os.environ.get("KILLS", 0))
SMALL = ["--max_steps", "5", "--batch_size", "2", "--val_rows", "4", "--eval_every", "2", "--rank", "4",
         "--eval_limit", "1", "--no-eval_before", "--targets", "q_proj,down_proj", "--warmup_steps", "0",
         "--task", "rows.json", "--log_every", "1"]
OWN = {"glora": ["--reinit_every", "2s", "--dropout", "0.1"],
       "cps_lora": ["--reinit_at", "2", "--dropout", "0.1"],
       "rosa": ["--reinit_every", "2s", "--dropout", "0.1"],
       "lora": ["--optimizer", "lion", "--dropout", "0.1"],
       "spiel": ["--reselection_steps", "2", "--accumulation_steps", "1"],
       "pissa": ["--niter", "1"],
       "full": ["--targets", "all"]}


# ------------------------------------------------------------------------------------ the forking process

def kill_at(n, marks=None):
    """
    SIGKILL at the n-th call or return of any function from here on. marks: a file for how many there were, at
    which a state was begun, and at which anything else that must not be torn.
    """
    seen, states, inside = 0, [], []

    def look(frame, event, arg):
        nonlocal seen
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if marks and event == "call" and name in ("save", "reinit", "new_directory") and str(ROOT) in file:
            (states if name == "save" else inside).append(seen)

    sys.setprofile(look)
    if marks:
        import atexit
        atexit.register(lambda: Path(marks).write_text(json.dumps([seen, states, inside])))


def child(args, before, out):
    """train.main as a process of its own would run it; `before` is code that prepares it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    text = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(text, 1), os.dup2(text, 2)
    import atexit
    import traceback

    import train
    status, train.plot = 0, lambda out: None        # which is no part of it, and slow
    try:
        exec(before, globals() | dict(train=train))
        train.main(args)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.setprofile(None)
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def serve():
    """Reads a job a line: {args, before, cwd, out}, answered by a pid; or a pid, answered by how it ended."""
    import torch

    import train  # noqa: F401, loaded once for all children
    torch.set_num_threads(1)
    model = checkpoint.load(checkpoint.TINY)        # whatever torch loads when it is first used, once for all
    torch.optim.AdamW(model.parameters()).step()
    for line in sys.stdin:
        job = json.loads(line)
        if isinstance(job, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
        elif not (answer := os.fork()):
            os.chdir(job.pop("cwd"))
            child(**job)
        print(answer, flush=True)


class Forks:
    def __init__(self, directory):
        self.directory, self.count = directory, 0
        rows = [dict(instruction=f"{i} + {i} =", input="", output=f"{2 * i}") for i in range(11)]
        (directory / "rows.json").write_text(json.dumps(rows))
        environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, env=environment,
                                       stdout=subprocess.PIPE, text=True)

    def ask(self, job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *args, before="", cwd=None):
        self.count += 1
        out = self.directory / f"{self.count}.txt"
        job = dict(args=list(map(str, args)), before=before, cwd=str(cwd or self.directory), out=str(out))
        return self.ask(job), out

    def end(self, started):
        pid, out = started
        return self.ask(pid), out.read_text()

    def run(self, *args, **kw):
        """-> exit status, or minus the signal; what was printed."""
        return self.end(self.start(*args, **kw))


def tensors(out, adapter="adapter"):
    return load_file(out / adapter / "adapter.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()] == []


def leftovers(directory):
    return [path for path in directory.rglob(".*") if re.search(r"\.(part|old)", path.name)]


# ------------------------------------------------------------------------------------ kill -9

@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_any_point_goes_on_to_the_same_bits(method, forks, tmp_path):
    """One kill shortly before the fourth state, one around a save or a re-init; the reference saves none."""
    command = ["--method", method, *SMALL, *OWN.get(method, [])]
    whole, counted, marks = tmp_path / "whole", tmp_path / "counted", tmp_path / "marks.json"
    status, printed = forks.run(*command, "--out_dir", whole)
    assert status == 0, printed
    once = [*command, "--save_steps", 1, "--out_dir"]
    assert forks.run(*once, counted, before=f"kill_at(0, {str(marks)!r})")[0] == 0
    assert_same_bits(tensors(counted), tensors(whole))
    events, states, inside = json.loads(marks.read_text())
    draw = random.Random(method)
    around = lambda: draw.choice(states + inside) + draw.randrange(1500)
    points = [states[3] - draw.randrange(1, 500), around()]
    points += [draw.choice((draw.randrange(events), around())) for _ in range(KILLS)]
    for i, point in enumerate(points):
        out = tmp_path / f"killed{i}"
        status, printed = forks.run(*once, out, before=f"kill_at({point})")
        if not (out / "args.json").exists() or status == 0:
            continue            # killed before its directory was there, or after all: nothing to go on with
        assert status == -signal.SIGKILL, printed
        status, printed = forks.run(*once, out, "--resume")
        assert status == (2 if "this run has ended" in printed else 0), printed
        assert i or "goes on after step 3" in printed
        for adapter in ("adapter", "adapter-best"):
            assert_same_bits(tensors(out, adapter), tensors(whole, adapter))
        assert best_and_last(out) == best_and_last(whole)
        assert leftovers(tmp_path) == []
        shutil.rmtree(out)


def best_and_last(out):
    summary = json.loads((out / "summary.json").read_text())
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary["best"], summary["last"], summary["after"], summary["loss_after"], steps


def test_the_best_adapter_is_the_one_that_the_state_knows(forks, tmp_path):
    """Its step is taken; a better one of steps that are taken again, and now differ, goes."""
    command, worse = [*SMALL, "--save_steps", 1, "--out_dir", tmp_path / "run"], """
losses = iter(range(1, 99))
train.mean_loss = lambda _: float(next(losses))
"""
    kill = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGKILL)").replace("== 2", "== 3")
    assert forks.run(*command, before=worse + kill)[0] == -signal.SIGKILL
    best = tensors(tmp_path / "run", "adapter-best")
    shutil.rmtree(tmp_path / "run" / "adapter-best")
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "run" / "adapter-best")
    assert forks.run(*command, "--resume", before=worse.replace("1,", "50,"))[0] == 0
    assert_same_bits(tensors(tmp_path / "run", "adapter-best"), best)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["step"] == 2


def test_select_best_is_the_same_after_a_kill(forks, tmp_path):
    """Of the losses after steps 2, 4 and 5, made up, the second is the least; killed in step 5."""
    command = [*SMALL, "--save_steps", 1, "--select", "best", "--out_dir"]
    worse = """
train.mean_loss = lambda _: 1.0 / run_of.step if run_of.step < 5 else 1.0
run_of = None
def load(self, *rest, before=train.runs.Run.load):
    global run_of
    run_of = self
    return before(self, *rest)
train.runs.Run.load = load
"""
    kill = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGKILL)").replace("== 2", "== 4")
    assert forks.run(*command, tmp_path / "whole", before=worse)[0] == 0
    assert forks.run(*command, tmp_path / "run", before=worse + kill)[0] == -signal.SIGKILL
    assert forks.run(*command, tmp_path / "run", "--resume", before=worse)[0] == 0
    for out in (tmp_path / "run", tmp_path / "whole"):
        assert json.loads((out / "summary.json").read_text())["selected"]["step"] == 4
        for adapter in ("adapter", "adapter-best"):
            assert_same_bits(tensors(out, adapter), tensors(tmp_path / "whole"))


# ------------------------------------------------------------------------------------ signals

AT_STEP_3 = """
def lr_at(step, *rest, before=train.lr_at):
    if step == 2:
        SEND
    return before(step, *rest)
train.lr_at = lr_at
"""


@pytest.fixture(scope="module")
def stopped(forks, tmp_path_factory):
    """A run that was interrupted in step 3, without --save_steps; and the one that was not."""
    directory = tmp_path_factory.mktemp("stopped")
    before = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGINT)")
    status, printed = forks.run(*SMALL, "--out_dir", directory / "run", before=before)
    assert status == 130, printed
    assert forks.run(*SMALL, "--out_dir", directory / "whole")[0] == 0
    return directory, printed


def test_an_interrupt_ends_the_step_saves_and_says_how_to_go_on(stopped, forks, tmp_path):
    directory, printed = stopped
    assert "Traceback" not in printed
    assert printed.endswith("stopped by SIGINT: the same command with --resume "
                            f"--out_dir {directory / 'run'} goes on after step 3\n")
    assert json.loads((directory / "run" / "adapter" / "adapter.json").read_text())["step"] == 3
    for name, flags in (("a", ["--resume"]), ("b", ["--resume", "--out_dir"])):
        flags = [*flags, tmp_path / name]
        shutil.copytree(directory / "run", tmp_path / name)
        status, printed = forks.run(*SMALL, *flags, "--overwrite", "--log_every", 1, "--save_steps", 1)
        assert status == 0 and "goes on after step 3" in printed
        assert_same_bits(tensors(tmp_path / name), tensors(directory / "whole"))
        assert [d.name for d in sorted((tmp_path / name / "resume").iterdir())] == ["00000004", "00000005"]
        assert forks.run(*SMALL, *flags)[1].endswith(f"{tmp_path / name}: this run has ended\n")


def test_sigterm_does_the_same_and_a_second_signal_ends_at_once(forks, tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGTERM)"
    status, printed = forks.run(*SMALL, "--out_dir", tmp_path / "a", before=AT_STEP_3.replace("SEND", kill))
    assert status == 143 and "stopped by SIGTERM" in printed
    assert (tmp_path / "a" / "resume" / "00000003").exists()
    twice = AT_STEP_3.replace("SEND", f"{kill}; {kill}")
    status, printed = forks.run(*SMALL, "--out_dir", tmp_path / "b", before=twice)
    assert status == -signal.SIGTERM and not (tmp_path / "b" / "resume").exists()


@pytest.mark.parametrize("place, words", [
    ("train.checkpoint.load", "nothing was written"), ("train.evaluate_sets", "goes on after step 5")])
def test_outside_of_the_loop_an_interrupt_ends_at_once_in_one_line(place, words, forks, tmp_path):
    before = f"def interrupt(*_, **kw):\n    os.kill(os.getpid(), signal.SIGINT)\n{place} = interrupt"
    out = tmp_path / "run"
    status, printed = forks.run(*SMALL, "--save_steps", 5, "--out_dir", out, before=before)
    assert status == 130 and "Traceback" not in printed and words in printed.splitlines()[-1]
    assert out.exists() == (words != "nothing was written") and leftovers(tmp_path) == []


# ------------------------------------------------------------------------------------ what cannot go on

def test_a_state_that_is_torn_is_refused_with_the_reason_and_the_one_before_is_taken(forks, tmp_path):
    command = [*SMALL, "--save_steps", 1, "--out_dir"]
    before = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGKILL)")
    assert forks.run(*command, tmp_path / "run", before=before)[0] == -signal.SIGKILL
    assert forks.run(*command, tmp_path / "whole")[0] == 0

    def cut(file):
        file.write_bytes(file.read_bytes()[:-9])

    def flip(file):
        file.write_bytes(file.read_bytes().replace(b'"0"', b'"1"', 1))      # the first tensor's name

    for hurt, name in [(cut, "state.safetensors"), (flip, "state.safetensors"), (cut, "state.json"),
                       (flip, "state.json"), (Path.unlink, "state.safetensors")]:
        out = tmp_path / f"{hurt.__name__}-{name}"
        shutil.copytree(tmp_path / "run", out)
        hurt(out / "resume" / "00000002" / name)
        status, printed = forks.run(*command, out, "--resume")
        assert status == 0 and re.search("not gone on from .*00000002.*", printed), printed
        assert f"goes on after step 1: {out}" in printed
        assert_same_bits(tensors(out), tensors(tmp_path / "whole"))
    for directory in (tmp_path / "run" / "resume").iterdir():
        cut(directory / "state.json")
    status, printed = forks.run(*command, tmp_path / "run", "--resume")
    assert status == 2 and "train.py: error: no whole state to go on from" in printed


def test_a_state_of_another_run_is_refused(stopped, forks, tmp_path):
    directory, _ = stopped
    before = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGINT)")
    out = tmp_path / "run"
    assert forks.run(*SMALL, "--seed", 1, "--out_dir", out, before=before)[0] == 130
    shutil.rmtree(out / "resume")
    shutil.copytree(directory / "run" / "resume", out / "resume")
    status, printed = forks.run(*SMALL, "--seed", 1, "--out_dir", out, "--resume")
    assert status == 2 and "00000003: the state of another run" in printed


@pytest.mark.parametrize("change, words", [
    (["--rank", 5], "--rank 4, and this command has 5"), (["--seed", 1], "--seed 42, and this command has 1"),
    (["--method", "dora"], "--method 'lora', and this command has 'dora'"),
    (["--dropout", 0.5], "--dropout 0.0, and this command has 0.5"), (["--lr", 1], "--lr 0.01, and"),
    (["--eval_limit", 2], "--eval_limit 1, and this command has 2")])
def test_a_changed_flag_is_refused_and_both_values_are_named(change, words, stopped, forks):
    directory, _ = stopped
    status, printed = forks.run(*SMALL, *change, "--resume", directory / "run")
    assert status == 2 and f"{directory / 'run'}: cannot go on, it was started with {words}" in printed


def test_a_changed_file_is_refused_and_named(forks, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copy(ROOT / "baselines" / "lora.py", tmp_path / "mine.py")
    shutil.copy(forks.directory / "rows.json", tmp_path)
    command = [*SMALL, "--model", "model", "--preset", "tiny", "--method", "mine.py", "--out_dir", "run"]
    before = AT_STEP_3.replace("SEND", "os.kill(os.getpid(), signal.SIGINT)")
    assert forks.run(*command, before=before, cwd=tmp_path)[0] == 130
    weights = tmp_path / "model" / "model.safetensors"
    for file, change, what in [
            (weights, lambda held: held[:-1] + bytes([held[-1] ^ 1]), "the model's files"),
            (tmp_path / "model" / "tokenizer.json", lambda held: held + b" ", "the model's files"),
            (tmp_path / "mine.py", lambda held: held + b"#", "the method's file"),
            (tmp_path / "rows.json", lambda held: held.replace(b'"6"', b'"7"'), "the data's rows")]:
        held = file.read_bytes()
        assert change(held) != held
        file.write_bytes(change(held))
        status, printed = forks.run(*command, "--resume", cwd=tmp_path)
        assert status == 2 and f"started with {what} '" in printed, printed
        file.write_bytes(held)
    assert forks.run(*command, "--resume", cwd=tmp_path)[0] == 0


def test_resume_without_a_run_is_refused(forks, tmp_path):
    for flags, words in ([["--resume"], "needs the run's directory"],
                         [["--resume", tmp_path / "none"], "no run to go on with"],
                         [["--resume", tmp_path / "a", "--out_dir", tmp_path / "b"], "goes on in place"]):
        status, printed = forks.run(*SMALL, *flags)
        assert status == 2 and words in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ runs beside each other

def test_three_runs_started_in_one_second_leave_three_summaries(forks, tmp_path):
    shutil.copy(forks.directory / "rows.json", tmp_path)
    one_second = "train.time.strftime = lambda form: 'now'"
    started = [forks.start(*SMALL, "--seed", seed, before=one_second, cwd=tmp_path) for seed in range(3)]
    assert [forks.end(run)[0] for run in started] == [0, 0, 0]
    outs = sorted((tmp_path / "runs").iterdir())
    assert [out.name for out in outs] == [f"rows-lora-r4-now{end}" for end in ("", "-2", "-3")]
    assert {json.loads((out / "args.json").read_text())["seed"] for out in outs} == {0, 1, 2}
    assert all((out / "summary.json").exists() and tensors(out) for out in outs)


def test_of_several_runs_with_one_out_dir_one_goes_on_and_the_others_are_refused(forks, tmp_path):
    """Each waits before it claims the directory, so that all have found it free."""
    wait = f"""
def claim(self, *rest, before=train.runs.Run.claim):
    Path({str(tmp_path)!r}, str(os.getpid())).touch()
    while len(list(Path({str(tmp_path)!r}).glob('[0-9]*'))) < 3:
        time.sleep(0.01)
    return before(self, *rest)
train.runs.Run.claim = claim
"""
    started = [forks.start(*SMALL, "--seed", i, "--out_dir", tmp_path / "run", before=wait) for i in range(3)]
    ended = [forks.end(run) for run in started]
    assert sorted(status for status, _ in ended) == [0, 2, 2]
    assert sum("holds another run" in printed for _, printed in ended) == 2
    seed = json.loads((tmp_path / "run" / "args.json").read_text())["seed"]
    assert ended[seed][0] == 0 and (tmp_path / "run" / "summary.json").exists() and leftovers(tmp_path) == []


def test_a_run_at_work_is_neither_replaced_nor_gone_on_with(forks, tmp_path):
    """It stands still in its third step, until the others have been refused."""
    out, go, there = tmp_path / "run", tmp_path / "go", tmp_path / "there"
    wait = f"Path({str(there)!r}).touch(); [time.sleep(0.01) for _ in iter(Path({str(go)!r}).exists, True)]"
    run = forks.start(*SMALL, "--out_dir", out, before=AT_STEP_3.replace("SEND", wait))
    while not there.exists():
        time.sleep(0.01)
    held = sorted(out.rglob("*"))
    for flags in (["--overwrite"], ["--resume"]):
        status, printed = forks.run(*SMALL, "--out_dir", out, *flags)
        assert status == 2 and f"{out}: another process is at work in this run" in printed
        assert sorted(out.rglob("*")) == held
    go.touch()
    assert forks.end(run)[0] == 0 and (out / "summary.json").exists()
    assert forks.run(*SMALL, "--out_dir", out, "--overwrite", "--rank", 2)[0] == 0      # the lock fell
    assert json.loads((out / "summary.json").read_text())["rank"] == 2 and leftovers(tmp_path) == []


def test_a_mistyped_flag_beside_overwrite_deletes_nothing(stopped, forks):
    directory, _ = stopped
    held = sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*"))
    for wrong in (["--rank", 900], ["--task", "nowhere.json"], ["--targets", "query"], ["--epoch", 1]):
        status, printed = forks.run(*SMALL, *wrong, "--out_dir", directory / "run", "--overwrite")
        assert status == 2, printed
        assert sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*")) == held


# ------------------------------------------------------------------------------------ disks

def test_a_full_disk_ends_a_run_and_leaves_what_was_saved_whole(stopped, forks, tmp_path):
    """No file may be longer than the adapter is: the states do not fit."""
    directory, _ = stopped
    whole, out = directory / "whole", tmp_path / "run"
    size = (whole / "adapter" / "adapter.safetensors").stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    status, printed = forks.run(*SMALL, "--save_steps", 2, "--out_dir", out, before=limit)
    assert status == 1 and "File too large" in printed
    assert not list((out / "resume").iterdir()) and not (out / "summary.json").exists()
    assert json.loads((out / "adapter" / "adapter.json").read_text())["step"] == 2
    assert tensors(out).keys() == tensors(whole).keys() and leftovers(tmp_path) == []
    assert forks.run(*SMALL, "--resume", out)[0] == 0           # from its first step
    assert_same_bits(tensors(out), tensors(whole))


def test_a_read_only_directory_is_one_line_before_anything_is_loaded(forks, tmp_path):
    parent = tmp_path / "kept"
    parent.mkdir(mode=0o555)
    if os.geteuid() == 0:               # whom no mode stops
        parent = Path("/proc")
    never = "train.checkpoint.load = None" if parent != Path("/proc") else ""
    status, printed = forks.run(*SMALL, "--out_dir", parent / "run", before=never)
    assert status == 2 and printed.startswith("train.py: error: ") and printed.count("\n") == 1


def test_what_a_dead_process_left_is_gone_after_the_next_start(stopped, forks, tmp_path):
    directory, _ = stopped
    out, ended = tmp_path / "run", forks.start("--help")
    assert forks.end(ended)[0] == 0
    dead = ended[0]
    shutil.copytree(directory / "run", out)
    for path in (tmp_path / ".run", out / ".merged", out / "resume" / ".00000003"):
        path = path.with_name(f"{path.name}.part-{dead}")
        shutil.copytree(directory / "run" / "adapter", path)
    (out / f".summary.json.part-{dead}").touch()
    other = [tmp_path / f".run.part-{os.getpid()}", tmp_path / f".elsewhere.part-{dead}"]
    for path in other:
        path.mkdir()
    (out / "adapter").rename(out / f".adapter.old-{dead}")      # stopped between two renames
    status, printed = forks.run(*SMALL, "--resume", out, "--rank", 5)
    assert status == 2 and (out / f".adapter.old-{dead}").exists()      # refused: nothing is touched
    before = "def steps(self, last):\n    os._exit(0)\ntrain.runs.Run.steps = steps"
    assert forks.run(*SMALL, "--resume", out, before=before)[0] == 0
    assert sorted(leftovers(tmp_path)) == sorted(other) and tensors(out)
    assert forks.run(*SMALL, "--resume", out)[0] == 0


if __name__ == "__main__":
    serve()
