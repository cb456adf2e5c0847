"""
The directory of a run: a name that one process claims, whose args.json it keeps locked while it is at work;
and resume/, the last two states that a stopped run can go on from, each a directory named after its step:

    state.safetensors   adapter, optimizer moments, torch's random generators, what layers hold beside tensors
    state.json          where each tensor belongs, and all that is no tensor
    adapter-best        as it was then, where validation chose one
"""
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import checkpoint
from files import beside, digest, new_directory, put, read_json, write_json

try:
    import fcntl
except ImportError:         # Windows: no lock
    fcntl = None

FREE = ("out_dir", "overwrite", "resume", "log_every", "save_steps", "lr_from")     # may differ after a stop


# ------------------------------------------------------------------------------------ whose a directory is

def lock(directory):
    """The open args.json of a run, locked until it is closed. ValueError where a process is at work there."""
    file = open(directory / "args.json", "r+b")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):   # else another run took its place
            return file
    except OSError:
        pass
    file.close()
    raise ValueError(f"{directory}: another process is at work in this run")


def alive(process):
    """Whether another process has this number."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return process != os.getpid()


def clear(directory, name=None):
    """Removes what dead processes left beside `name`, or any; an old version without a new one comes back."""
    for left in Path(directory).iterdir() if os.name == "posix" else ():
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
    directory = checkpoint.resolve(args.model)
    texts = [directory / name for name in ("config.json", *checkpoint.TEXT_FILES)]
    parts = [file for file in texts if file.exists()] + checkpoint.tensor_files(directory)
    return {"the method's file": digest(Path(method.__file__)), "the model's files": digest(*parts),
            "the data's rows": digest(rows, sets)}


def compare(out, args, env):
    """ValueError where a run was started with another flag, or from another file, than this command has."""
    was = read_json(out / "env.json")
    for then, now, dashes in ((read_json(out / "args.json"), vars(args), "--"),
                              (was.get("inputs", {}), env["inputs"], "")):
        for key, value in json.loads(json.dumps(now)).items():
            if key not in FREE and (key not in then or then[key] != value):
                raise ValueError(f"{out}: cannot go on, it was started with {dashes}{key} {then.get(key)!r}, "
                                 f"and this command has {value!r}")
    if other := [key for key in ("torch", "threads", "device") if was.get(key) != env[key]]:
        print("note: started with " + ", ".join(f"{key} {was.get(key)}, now {env[key]}" for key in other)
              + ": it may round otherwise from here on")


# ------------------------------------------------------------------------------------ states

def pack(value, path, tensors):
    """
    The JSON form of nested dicts and lists; tensors go to `tensors`. Strides are kept, as a product may round
    otherwise where a factor lies otherwise in memory.
    """
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().contiguous()
        return {"tensor": path, "stride": value.stride(), "device": value.device.type}
    if isinstance(value, dict):
        return {key: pack(v, f"{path}/{key}", tensors) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def unpack(value, tensors, device):
    if isinstance(value, list):
        return [unpack(v, tensors, device) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"tensor", "stride", "device"}:
        return {key: unpack(v, tensors, device) for key, v in value.items()}
    t = tensors[value["tensor"]]
    device = "cpu" if value["device"] == "cpu" else device      # AdamW counts its steps on the CPU
    return torch.empty_strided(t.shape, value["stride"], dtype=t.dtype, device=device).copy_(t)


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
                        state=[dict(optimizer.state.get(p, {})) for p in group["params"]])
                   for group in optimizer.param_groups],
        numpy=[kind, words.tolist(), *rest], python=random.getstate(), torch=torch.get_rng_state(),
        device=None if device.type == "cpu" else getattr(torch, device.type).get_rng_state())


def set_state(state, model, optimizer, method, device):
    """Puts what state_of returned into a freshly injected model and its new optimizer."""
    if hasattr(method, "restore"):
        method.restore(model, state["adapter"])
    shapes = lambda tensors: {name: (t.dtype, t.shape) for name, t in tensors.items()}
    if shapes(state["adapter"]) != shapes(checkpoint.adapter_tensors(model)):
        raise ValueError("its tensors are not those of this model")
    parameters = dict(model.named_parameters())
    held = parameters | dict(model.named_buffers())
    for name, t in state["adapter"].items():        # no copy into what is there, whose strides may be others
        held[name].data = t
    for name, kept in state["layers"].items():
        vars(model.get_submodule(name)).update(kept)
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, state["optimizer"]):
        group["params"] = [parameters[name] for name in saved["params"]]
        group.update(saved["numbers"])
        optimizer.state.update({p: kept for p, kept in zip(group["params"], saved["state"]) if kept})
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(tuple(tuple(x) if isinstance(x, list) else x for x in state["python"]))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state["device"].cpu())


def states(out):
    """The directories of a run's states, the newest last."""
    return sorted(d for d in (out / "resume").glob("*") if d.name.isdecimal())


def seal(directory, record):
    """A hash of a whole state; record: what its state.json has beside it."""
    return digest(directory / "state.safetensors", record, most=2**63)


def read_state(directory, run, device):
    """ValueError where a state is torn, or another run's."""
    try:
        record = read_json(directory / "state.json")
        if record.pop("seal", None) != seal(directory, record):
            raise ValueError(f"{directory}: torn, it is not as it was written")
        if record["run"] != run:
            raise ValueError(f"{directory}: the state of another run")
        return unpack(record, load_file(directory / "state.safetensors"), device)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory}: torn ({error})") from None


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
    """
    out, its directory; step, the last one that was begun; signal, the one that asks it to stop, or 0. As a
    context it listens to signals, and lets its lock go at the end.
    """

    def __init__(self, args):
        self.args, self.out, self.held = args, args.out_dir and Path(args.out_dir), None
        self.step, self.signal, self.looping, self.handlers = 0, 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():       # no other one may
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:          # as nohup wants it
                    self.handlers[number] = signal.signal(number, self.stop)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.held:
            self.held.close()

    def stop(self, number, frame):
        """In the loop the step ends first; a second signal does not wait, and none does elsewhere."""
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.looping:
            self.signal = number
            os.write(2, b"\nends after this step; a second signal ends it at once\n")   # print may be at work
        else:
            self.leave(number)

    def leave(self, number):
        words = "nothing was written"
        if self.held:
            found = states(self.out)
            done = f"after step {int(found[-1].name)}" if found else "from its first step"
            words = f"the same command with --resume --out_dir {self.out} goes on {done}"
        os.write(2, f"\nstopped by {signal.Signals(number).name}: {words}\n".encode())
        sys.exit(128 + number)

    def check(self):
        """ValueError, before anything is loaded, where claim would have to refuse the directory."""
        args, given = self.args, self.out
        if args.resume:
            self.out = given if args.resume is True else Path(args.resume)
            if not self.out:
                raise ValueError("--resume: needs the run's directory, --resume RUN or --out_dir RUN")
            if given and given.resolve() != self.out.resolve():
                raise ValueError(f"--resume {self.out}: goes on in place, and not in --out_dir {given}")
            if not (self.out / "args.json").is_file():
                raise ValueError(f"{self.out}: no run to go on with")
            summary = self.out / "summary.json"
            if summary.exists() and (not args.merge or "merge" in read_json(summary)):
                raise ValueError(f"{self.out}: this run has ended")
            return lock(self.out).close()
        parent = next(p for p in (given or Path("runs", "new")).absolute().parents if p.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{parent}: cannot be written to")
        if not given or not given.exists() or (given.is_dir() and not any(given.iterdir())):
            return
        if not (given / "args.json").is_file():
            raise ValueError(f"{given}: exists and holds something else than a run")
        if not args.overwrite:
            raise ValueError(f"{given}: holds another run; --overwrite replaces it, --resume goes on with it")
        for flag in ("model", "task", "data", "method"):
            path = Path(value := getattr(args, flag)).resolve()
            if path.exists() and given.resolve() in (path, *path.parents):
                raise ValueError(f"{given}: holds the {flag} {value}, which --overwrite would delete")
        lock(given).close()

    def claim(self, name, env):
        """
        The directory, this process's from here on: it appears locked, with args.json and env.json in it, or
        is the one to go on in. Without --out_dir it is runs/<name>, or <name>-2, -3 if that is taken.
        """
        base, count, old = self.out or Path("runs", name), 1, None
        base.parent.mkdir(parents=True, exist_ok=True)
        clear(base.parent, self.out and base.name)
        if self.args.resume:
            self.held = lock(base)
            compare(base, self.args, env)
            (base / "resume").mkdir(exist_ok=True)
            clear(base), clear(base / "resume")
            return base
        part = beside(base)
        (part / "eval").mkdir(parents=True)
        try:
            write_json(part / "args.json", vars(self.args))
            write_json(part / "env.json", env)
            self.held = lock(part)
            if self.out and self.args.overwrite and (base / "args.json").exists():
                old = lock(base)                        # so that no other process replaces it now
                put(part, base)
            while part.exists() and not old:
                path = base if count == 1 else base.with_name(f"{base.name}-{count}")
                try:
                    part.rename(path)                   # which of several processes one can do
                    base = path
                except OSError:
                    if not path.exists():
                        raise
                    if self.out:
                        raise ValueError(f"{path}: holds another run; --overwrite replaces it") from None
                    count += 1
        finally:
            if old:
                old.close()
            shutil.rmtree(part, ignore_errors=True)     # after put, the run that was there
        self.out = base
        return base

    def id(self):
        """Of this run alone; its states carry it."""
        return digest(self.out / "args.json", self.out / "env.json")

    def save(self, model, optimizer, **more):
        """Keeps the state after this step, and the one before; where a signal asked for it, the run ends."""
        device, tensors, best = next(model.parameters()).device, {}, self.out / "adapter-best"
        state = state_of(model, optimizer, device) | dict(more=more, run=self.id())
        with new_directory(self.out / "resume" / f"{self.step:08}") as part:
            record = pack(state, "", tensors)
            save_file(tensors, part / "state.safetensors")
            write_json(part / "state.json", record | {"seal": seal(part, record)})
            if best.exists():
                shutil.copytree(best, part / best.name)
        kept = [d for d in states(self.out) if int(d.name) <= self.step][-2:]
        for other in set(states(self.out)) - set(kept):     # older, or refused at a resume and overtaken now
            shutil.rmtree(other)
        if self.signal:
            self.leave(self.signal)

    def load(self, model, optimizer, method):
        """With --resume, puts the newest whole state back -> what save was given with it; {} without one."""
        if not self.args.resume:
            return {}
        more, best, device = {}, self.out / "adapter-best", next(model.parameters()).device
        for directory in (found := states(self.out)[::-1]):
            try:
                state = read_state(directory, self.id(), device)
                set_state(state, model, optimizer, method, device)
                self.step, more = int(directory.name), state["more"]
                break
            except ValueError as error:
                refused = error
                print(f"not gone on from {error}")
        if found and not more:
            raise ValueError(f"no whole state to go on from: {refused}")
        shutil.rmtree(best, ignore_errors=True)             # of steps that are taken again, perhaps
        if more and (directory / best.name).exists():
            shutil.copytree(directory / best.name, best)
        log = self.out / "metrics.jsonl"
        lines = log.read_text().split("\n")[:-1] if log.exists() else []        # the last one may be torn
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self.step))
        print(f"goes on after step {self.step}: {self.out}")
        return more

    def log(self, line, steps, elapsed, pace):
        """A line of metrics.jsonl, and of the screen: of `steps`, `elapsed` seconds so far, `pace` a step."""
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
                outputs.unlink()
        self.looping = True
        while self.step < last:
            self.step += 1
            yield self.step
        self.looping = False
        if self.signal:             # it came when the last step was saved already
            self.leave(self.signal)
