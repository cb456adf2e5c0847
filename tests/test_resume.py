"""
A run that was killed, interrupted or starved of disk goes on to the same bits; runs do not touch each other.

The children are forked from one process that has torch loaded, which this file is when it runs as a program. By
hand, with as many kills as wanted: KILLS=100 pytest tests/test_resume.py -k any_point
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file

import checkpoint

METHODS = sorted(checkpoint.method_files())
KILLS = int(os.environ.get("KILLS", 0))
SMALL = ["--max_steps", "5", "--batch_size", "2", "--train_rows", "12", "--val_rows", "4", "--eval_every", "2",
         "--eval_limit", "1", "--no-eval_before", "--targets", "q_proj,down_proj", "--rank", "4", "--warmup_steps", "0"]
OWN = {"glora": ["--reinit_every", "2s", "--dropout", "0.1"], "cps_lora": ["--reinit_at", "2", "--dropout", "0.1"],
       "rosa": ["--reinit_every", "2s", "--dropout", "0.1"], "lora": ["--optimizer", "lion", "--dropout", "0.1"],
       "spiel": ["--reselection_steps", "2", "--accumulation_steps", "1"], "pissa": ["--niter", "1"],
       "full": ["--targets", "all"]}


# ------------------------------------------------------------------------------------ the forking process

def kill_at(n, marks=None):
    """SIGKILL at the n-th call or return of any function from here on; marks: where to count them in a file."""
    seen, inside = 0, []

    def look(frame, event, arg):
        nonlocal seen
        seen += 1
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
        if marks and event == "call" and frame.f_code.co_name in ("save", "reinit", "new_directory", "load"):
            inside.append(seen)

    sys.setprofile(look)
    if marks:
        import atexit
        atexit.register(lambda: Path(marks).write_text(json.dumps([seen, inside])))


def child(args, before, out):
    """train.main as a process of its own would run it; `before` is code that prepares it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    text = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(text, 1), os.dup2(text, 2)
    import atexit
    import traceback

    import train
    status = 0
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

    import train    # noqa: F401, loaded once for all children
    torch.set_num_threads(1)
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
        self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))

    def ask(self, job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *args, before="", cwd=None):
        self.count += 1
        out = self.directory / f"{self.count}.txt"
        pid = self.ask(dict(args=[str(a) for a in args], before=before, cwd=str(cwd or self.directory), out=str(out)))
        return pid, out

    def end(self, started):
        pid, out = started
        return self.ask(pid), out.read_text()

    def run(self, *args, **kw):
        """-> exit status, or minus the signal; what was printed."""
        return self.end(self.start(*args, **kw))


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.server.stdin.close()
    forks.server.wait()


def tensors(out, adapter="adapter"):
    return load_file(out / adapter / "adapter_model.safetensors")


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()] == []


def leftovers(directory):
    return [path for path in directory.rglob(".*") if re.search(r"\.(part|old)", path.name)]


# ------------------------------------------------------------------------------------ kill -9

@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_any_point_goes_on_to_the_same_bits(method, forks, tmp_path):
    """One kill anywhere, one within a save, a load or a re-initialisation; the reference saves no state."""
    command = ["--method", method, *SMALL, *OWN.get(method, [])]
    whole, marks = tmp_path / "whole", tmp_path / "marks.json"
    status, printed = forks.run(*command, "--out_dir", whole)
    assert status == 0, printed
    once = [*command, "--save_steps", 1, "--out_dir"]
    assert forks.run(*once, tmp_path / "count", before=f"kill_at(0, {str(marks)!r})")[0] == 0
    assert_same_bits(tensors(tmp_path / "count"), tensors(whole))
    events, inside = json.loads(marks.read_text())
    draw = random.Random(method)
    points = [draw.randrange(events // 4, events), draw.choice(inside) + draw.randrange(2000)]
    points += [draw.choice([draw.randrange(events), draw.choice(inside) + draw.randrange(2000)]) for _ in range(KILLS)]
    for i, point in enumerate(points):
        out = tmp_path / f"killed{i}"
        status, printed = forks.run(*once, out, before=f"kill_at({point})")
        if not (out / "args.json").exists() or status == 0:
            continue            # killed before its directory was there, or not at all: nothing to go on with
        assert status == -signal.SIGKILL, printed
        status, printed = forks.run(*once, out, "--resume")
        assert status == (2 if "this run has ended" in printed else 0), printed
        for adapter in ("adapter", "adapter-best"):
            assert_same_bits(tensors(out, adapter), tensors(whole, adapter))
        assert leftovers(tmp_path) == [], (point, status)
        shutil.rmtree(out)


if __name__ == "__main__":
    serve()
