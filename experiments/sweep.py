"""
Many runs of train.py, several at once. A run that has ended is kept by a hash of its flags and of the
project's files: the same sweep goes on where it was stopped. What --model and --task hold is not hashed.
"""
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from files import digest

CACHE = ROOT / "runs" / "sweeps"


def sources(root=ROOT):
    """A hash of all that a run of the bundled model depends on."""
    places = "*.py", "baselines/*.py", "data/*.py", "data/tiny/*"
    found = sorted(file for place in places for file in root.glob(place))
    return digest([str(file.relative_to(root)) for file in found], *found)


class Sweep:
    """sweep([flags, ..]) -> what ended() says of each, in that order. jobs at once share the cores."""

    def __init__(self, jobs=2, cache=CACHE):
        self.jobs, self.cache, self.sources = jobs, Path(cache), sources()
        self.threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))

    def __call__(self, runs):
        began, todo = time.monotonic(), [flags for flags in dict.fromkeys(runs) if not self.ended(flags)]
        print(f"{len(todo)} of {len(set(runs))} runs to do, {self.jobs} at once", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for done, flags in enumerate(pool.map(self.run, todo), 1):
                    left = (time.monotonic() - began) / done * (len(todo) - done)
                    print(f"{done} of {len(todo)}, {left / 60:.0f} min left: {flags}", flush=True)
            except BaseException:       # Ctrl-C, too: those that wait are not begun
                pool.shutdown(cancel_futures=True)
                raise
        return [self.ended(flags) for flags in runs]

    def directory(self, flags):
        return self.cache / digest(self.sources, flags)[:16]

    def ended(self, flags):
        """Its args, env, summary, metrics, directory; dict(diverged=why); None where it has not ended."""
        out = self.directory(flags)
        if (why := out.with_suffix(".diverged")).is_file():
            return dict(diverged=why.read_text())
        if not (out / "summary.json").is_file():
            return None
        found = {name: json.loads((out / f"{name}.json").read_text()) for name in ("args", "env", "summary")}
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return found | dict(directory=out, metrics=[json.loads(line) for line in lines])

    def run(self, flags):
        out = self.directory(flags)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), *shlex.split(flags), "--out_dir", str(out)]
        done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True,
                              env=os.environ | dict(OMP_NUM_THREADS=self.threads))
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode and "not finite" in last:    # a rate too high: a result, and no reason to stop
            out.with_suffix(".diverged").write_text(last)
        elif done.returncode:
            raise RuntimeError(f"train.py {flags}: {last}")
        return flags
