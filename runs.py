"""
The directory of a run: one process has it for itself while it is at work, and a later one can go on in it.

A run begins in a hidden directory, and its rename into place is the claim: what is in sight is whole. Its
args.json is locked until the process ends, in whatever way. resume/ holds the last two states to go on from,
each in a directory named after its step, with AdamW three times as large as the adapter:

    state.safetensors   adapter, optimizer moments, torch's random generators, what layers hold beside tensors
    state.json          which tensor belongs where, all that is no tensor, and hashes
    adapter-best        as it was then, where validation chose one: steps that are taken again may differ
"""
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from files import beside, digest, new_directory, put, read_json, write_json

try:
    import fcntl
except ImportError:         # Windows: no lock
    fcntl = None

FREE = "out_dir overwrite resume log_every save_steps lr_from typed".split()      # may differ after a stop


# ------------------------------------------------------------------------------------ whose a directory is

def lock(directory):
    """The open args.json of a run, locked until it is closed. ValueError where a process is at work there."""
    file = open(directory / "args.json", "r+b")             # NFS locks no file that is open for reading alone
    with suppress(BlockingIOError):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):   # no: replaced since it was opened
            return file
    raise ValueError(f"{directory}: another process is at work in this run")


def place(part, path, numbered):
    """Renames `part` to `path`, or if numbered to path-2, -3 where that is taken -> what it is named now."""
    for count in itertools.count(1):
        free = path if count == 1 else path.with_name(f"{path.name}-{count}")
        try:
            return part.rename(free)        # of several processes one can; an empty directory gives way
        except OSError:
            if not free.exists():
                raise
            if not numbered:
                raise ValueError(f"{free}: holds another run; --overwrite replaces it") from None


def alive(process):
    """Whether another process has this number; one of another machine that shares the disk counts as dead."""
    try:
        os.kill(process, 0)                         # sends nothing
    except OSError as error:
        return isinstance(error, PermissionError)   # another user's
    return process != os.getpid()                   # which a dead one may have had


def clear(directory, name=None):
    """Removes what dead processes left beside `name`, or any; an old version without a new one comes back."""
    for left in list(Path(directory).glob(".*")) if os.name == "posix" else ():     # else os.kill would kill
        found = re.fullmatch(r"\.(.+)\.(part|old)-(\d+)", left.name)
        if not found or name not in (None, found[1]) or alive(int(found[3])):
            continue
        if found[2] == "old" and not (path := left.with_name(found[1])).exists():
            left.rename(path)
        else:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


# ------------------------------------------------------------------------------------ what a run depends on

def inputs(args, method, rows, sets):
    """Hashes of the method's file, the rows, and the model's files: of weights the header and both ends."""
    return {"the method's file": digest(Path(method.__file__)), "the data's rows": digest(rows, sets),
            "the model's files": digest(*checkpoint.model_files(args.model))}


def compare(out, args, env):
    """ValueError where a run was started with another flag, or from another file, than this command has."""
    flags, was = read_json(out / "args.json"), read_json(out / "env.json")
    then = {f"--{key}": value for key, value in flags.items()} | was.get("inputs", {})
    now = {f"--{key}": value for key, value in vars(args).items() if key not in FREE} | env["inputs"]
    for key, value in now.items():
        if then.get(key) != value:
            raise ValueError(f"{out}: cannot go on, it was started with {key} {then.get(key)!r}, and this "
                             f"command has {value!r}")
    names = ("torch", "threads", "device")
    if other := [f"{key} {was[key]}, now {env[key]}" for key in names if was[key] != env[key]]:
        print(f"note: started with {', '.join(other)}: it may round otherwise from here on")


# ------------------------------------------------------------------------------------ states

def pack(state, tensors):
    """`state` as JSON has it; its tensors go to `tensors`, named by number."""
    def refer(t):
        name = str(len(tensors))
        tensors[name] = t.detach().contiguous()     # of another stride a product may round otherwise
        return {"tensor": name, "stride": t.stride(), "device": t.device.type}

    return json.loads(json.dumps(state, default=refer))


def unpack(record, tensors, device):
    """The state again, its tuples as lists."""
    def find(value):
        if value.keys() != {"tensor", "stride", "device"}:
            return value
        t, on = tensors[value["tensor"]], "cpu" if value["device"] == "cpu" else device     # AdamW's steps
        return torch.empty_strided(t.shape, value["stride"], dtype=t.dtype, device=on).copy_(t)

    return json.loads(json.dumps(record), object_hook=find)


def state_of(model, optimizer, device):
    """What the next step depends on; of a layer also the attributes that its class names in STATE."""
    names = {id(p): name for name, p in model.named_parameters()}
    kind, words, *rest = np.random.get_state()
    return dict(
        adapter=checkpoint.adapter_tensors(model),
        layers={name: {key: getattr(m, key) for key in m.STATE}
                for name, m in model.named_modules() if hasattr(m, "STATE")},
        optimizer=[dict(numbers={key: v for key, v in group.items() if isinstance(v, (int, float))},
                        params=[names[id(p)] for p in group["params"]],
                        state=[optimizer.state.get(p, {}) for p in group["params"]])
                   for group in optimizer.param_groups],
        numpy=[kind, words.tolist(), *rest], python=random.getstate(), torch=torch.get_rng_state(),
        device=None if device.type == "cpu" else getattr(torch, device.type).get_rng_state())


def set_state(state, model, optimizer, method, device):
    """Puts what state_of returned into a freshly injected model and its new optimizer."""
    if hasattr(method, "restore"):
        method.restore(model, state["adapter"])
    kinds = lambda tensors: {name: (t.dtype, t.shape) for name, t in tensors.items()}
    if kinds(state["adapter"]) != kinds(checkpoint.adapter_tensors(model)):
        raise ValueError("the state's tensors are not those of this model: was the code changed since?")
    held = model.state_dict(keep_vars=True)
    for name, t in state["adapter"].items():        # no copy into what is there, whose strides may be others
        held[name].data = t
    for name, kept in state["layers"].items():
        vars(model.get_submodule(name)).update(kept)
    for group, saved in zip(optimizer.param_groups, state["optimizer"]):
        group["params"] = [held[name] for name in saved["params"]]      # a re-init may have moved them
        group.update(saved["numbers"])
        optimizer.state.update(zip(group["params"], saved["state"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state["device"])


def states(out):
    """The directories of a run's states, the newest last."""
    return sorted((out / "resume").glob("[0-9]*"))


def hashes(out, directory, record):
    """Of the run, from whose states no other goes on, and of a whole state, which is read again for it."""
    return dict(run=digest(out / "args.json", out / "env.json"),
                seal=digest(directory / "state.safetensors", record, most=2**63))


def newest_state(out, device):
    """The last whole state and its directory; None, None before the first. ValueError where all are torn."""
    for directory in reversed(found := states(out)):
        try:
            record = read_json(directory / "state.json")
            was, now = record.pop("hashes", {}), hashes(out, directory, record)
            if was.get("seal") != now["seal"]:
                raise ValueError(f"{directory}: torn, it is not as it was written")
            if was["run"] != now["run"]:
                raise ValueError(f"{directory}: the state of another run")
            return unpack(record, load_file(directory / "state.safetensors"), device), directory
        except (ValueError, OSError) as error:
            print(f"not gone on from {error}")
    if found:
        raise ValueError(f"no whole state to go on from in {out / 'resume'}")    # the user may begin anew
    return None, None


# ------------------------------------------------------------------------------------ a run at work

def peak_memory_mb(device):
    """Peak of the GPU's allocations, or of the process's resident set (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss           # bytes on a Mac, else kB
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def clock(seconds):
    """0:07, 59:59, 1h00."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}"


class Run:
    """As a context it listens to signals, and lets its lock go at the end."""
    out, held = None, None      # its directory, and the lock that it has
    step, asked = 0, 0          # the last step that was begun, and the signal that asks it to stop
    # What distributed.py has in their place, for several processes:
    first = True                # is this the one that writes?
    signal = property(lambda self: self.asked)      # a signal that all know of
    backward = share = None     # the gradient of a batch, and what is found of rows, by all

    def __init__(self, args):
        self.args = args

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()        # no other one may listen
        self.before = {n: how for n in (signal.SIGINT, signal.SIGTERM)
                       if main and (how := signal.getsignal(n)) != signal.SIG_IGN}      # as a script's & is
        self.listen(self.leave)
        return self

    def __exit__(self, *_):
        for number, how in self.before.items():
            signal.signal(number, how)
        if self.held:
            self.held.close()

    def listen(self, how):
        for number in self.before:
            signal.signal(number, how)

    def stop(self, number, frame):
        """What a signal does in the loop: save ends the run after this step, and a second one at once."""
        self.asked = number
        self.listen(signal.SIG_DFL)
        if self.first:
            os.write(2, b"\nends after this step; a second signal ends it at once\n")   # print may be at work

    def leave(self, number, frame=None):
        """What it does elsewhere: by an exception, so that nothing half-written stays."""
        words = "nothing was written"
        if self.out:
            found = states(self.out)
            done = f"after step {int(found[-1].name)}" if found else "from its first step"
            words = f"the same command with --resume --out_dir {self.out} goes on {done}"
        if self.first:
            os.write(2, f"\nstopped by {signal.Signals(number).name}: {words}\n".encode())
        raise SystemExit(128 + number)

    def check(self):
        """
        ValueError, before anything is loaded, where claim would have to refuse the directory. A run that is
        there, to go on in or to replace, is locked from here on.
        """
        args, out = self.args, self.args.out_dir and Path(self.args.out_dir)
        if args.resume:
            run = out if args.resume is True else Path(args.resume)
            if not run:
                raise ValueError("--resume: needs the run's directory, --resume RUN or --out_dir RUN")
            if out and out.resolve() != run.resolve():
                raise ValueError(f"--resume {run}: goes on in place, and not in --out_dir {out}")
            if not (run / "args.json").is_file():
                raise ValueError(f"{run}: no run to go on with")
            summary = run / "summary.json"              # written last; with --merge once more, after merged/
            if summary.exists() and (not args.merge or "merge" in read_json(summary)):
                raise ValueError(f"{run}: this run has ended")
            self.held, self.out = lock(run), run
            return
        parent = next(p for p in (out or Path("runs", "new")).absolute().parents if p.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{parent}: cannot be written to")
        if not out or not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not (out / "args.json").is_file():
            raise ValueError(f"{out}: exists and holds something else than a run")
        if not args.overwrite:
            raise ValueError(f"{out}: holds another run; --overwrite replaces it, --resume goes on with it")
        for flag in ("model", "task", "data", "method"):
            path = Path(value := getattr(args, flag)).resolve()
            if path.exists() and path.is_relative_to(out.resolve()):
                raise ValueError(f"{out}: holds the {flag} {value}, which --overwrite would delete")
        self.held = lock(out)

    def claim(self, name, env):
        """
        The directory, this process's from here on: --out_dir, or else runs/<name>, or <name>-2, -3. Called
        once set-up has passed: a mistyped flag deletes nothing, and args are complete and can be compared.
        """
        args, given = self.args, self.args.out_dir
        if args.resume:
            compare(self.out, args, env)
            clear(self.out.parent, self.out.name), clear(self.out), clear(self.out / "resume")
            return self.out
        base = Path(given or Path("runs", name))
        base.parent.mkdir(parents=True, exist_ok=True)
        clear(base.parent, given and base.name)
        part = beside(base)
        try:
            (part / "eval").mkdir(parents=True)
            write_json(part / "args.json", vars(args))
            write_json(part / "env.json", env)
            held = lock(part)
            if self.held:                               # of the run that --overwrite replaces
                put(part, base)
                self.held.close()
            else:
                base = place(part, base, numbered=not given)
            self.held, self.out = held, base
            return base
        finally:
            shutil.rmtree(part, ignore_errors=True)     # after put, the run that was there

    def agree(self, model):
        """Of several processes that they have the same adapter; each waits for the others."""

    def write_adapter(self, name, model, record):
        self.agree(model)
        if self.first:
            checkpoint.save_adapter(self.out / name, model, record | {"step": self.step})

    def select(self):
        """adapter-best becomes the run's adapter."""
        if self.first:
            with new_directory(self.out / "adapter") as part:
                shutil.copytree(self.out / "adapter-best", part, dirs_exist_ok=True)

    def save(self, model, optimizer, **more):
        """Keeps the state after this step, and the one before; ends the run where a signal asked for it."""
        if self.first:
            self.write_state(model, optimizer, more)
        self.agree(model)           # no process ends before the state is whole
        if self.signal:
            self.leave(self.signal)

    def write_state(self, model, optimizer, more):
        device, tensors, best = next(model.parameters()).device, {}, self.out / "adapter-best"
        record = pack(state_of(model, optimizer, device) | dict(more=more), tensors)    # more: the loop's own
        with new_directory(self.out / "resume" / f"{self.step:08}") as part:
            save_file(tensors, part / "state.safetensors")
            write_json(part / "state.json", record | dict(hashes=hashes(self.out, part, record)))
            if best.exists():
                shutil.copytree(best, part / best.name)
        kept = [d for d in states(self.out) if int(d.name) <= self.step][-2:]
        for other in set(states(self.out)) - set(kept):     # older, or refused at a resume and overtaken now
            shutil.rmtree(other)

    def load(self, model, optimizer, method):
        """
        With --resume, puts the newest whole state back -> what save was given with it; {} without one. What
        later steps wrote goes; if the process dies here, the next does all of it again.
        """
        if not self.args.resume:
            return {}
        device, best = next(model.parameters()).device, self.out / "adapter-best"
        state, directory = newest_state(self.out, device)
        if state:
            set_state(state, model, optimizer, method, device)
            self.step = int(directory.name)
        if self.first:
            self.cut(best, directory and directory / best.name)
        print(f"goes on after step {self.step}: {self.out}")
        return state["more"] if state else {}

    def cut(self, best, kept):
        """Takes back what later steps wrote."""
        shutil.rmtree(best, ignore_errors=True)
        if kept and kept.exists():
            shutil.copytree(kept, best)
        with open(self.out / "metrics.jsonl", "a+b") as log:
            log.seek(0)
            kept = [line for line in log if line.endswith(b"\n") and json.loads(line)["step"] <= self.step]
            log.truncate(sum(map(len, kept)))               # steps rise, and only the last line may be torn

    def log(self, line, steps, elapsed, pace):
        """A line of metrics.jsonl, and of the screen: of `steps`, `elapsed` seconds so far, `pace` a step."""
        if not self.first:
            return
        with open(self.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        print(f"step {line['step']:{len(str(steps))}}/{steps}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  "
              f"grad {line['grad_norm']:.3g}  {line['tokens_per_second']:,.0f} tok/s  "
              f"{line['peak_memory_mb'] / 2**10:.1f} GB  {clock(elapsed)}, "
              f"{clock((steps - line['step']) * pace)} left", flush=True)

    def steps(self, last):
        """The numbers of the steps to take; here a signal waits for the end of the step."""
        if self.step < last:
            for outputs in self.out.glob("eval/*.after.jsonl"):     # of an earlier attempt's adapter
                outputs.unlink(missing_ok=True)
        self.listen(self.stop)
        while self.step < last:
            self.step += 1
            yield self.step
        self.listen(self.leave)
        if self.asked:              # it came when the last step was saved already
            self.leave(self.asked)
