"""
What the directory of a run is: a name that one process claims, and whose args.json it keeps locked while it is
at work; resume/, the last two states that a stopped run can go on from, each a directory:

    state.safetensors   adapter, optimizer moments, random generators, what layers hold beside their tensors
    state.json          where each tensor belongs, and all that is no tensor
    adapter-best        where a validation set chose one
"""
import hashlib
import json
import os
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

try:
    import fcntl
except ImportError:         # Windows: no lock
    fcntl = None

FREE = ("out_dir", "overwrite", "resume", "log_every", "save_steps")    # flags that may differ when a run goes on
MIB = 2**20


# ------------------------------------------------------------------------------------ directories

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


def clear(directory, name="*"):
    """Removes what dead processes left of writing `name`; an old version that no new one replaced is back."""
    for left in Path(directory).glob(f".{name}.*-*"):
        found = re.fullmatch(r"\.(.+)\.(part|old)-(\d+)", left.name)
        if os.name != "posix" or not found or alive(int(found[3])):
            continue
        if found[2] == "old" and not (path := left.with_name(found[1])).exists():
            left.rename(path)
        else:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


# ------------------------------------------------------------------------------------ what a run depends on

def digest(*parts):
    """A hash of bytes and of whole files, by path."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            total.update(part)
            continue
        with open(part, "rb") as f:
            while chunk := f.read(MIB):
                total.update(chunk)
    return total.hexdigest()


def inputs(args, method, rows, sets):
    """Hashes: of the method's file, of the rows, and of a model's files, of weights the header and both ends."""
    directory, parts = checkpoint.resolve(args.model), []
    for name in ("config.json", *checkpoint.TEXT_FILES):
        if (directory / name).exists():
            parts += [name.encode(), directory / name]
    for file in checkpoint.tensor_files(directory):
        size = file.stat().st_size
        with open(file, "rb") as f:
            header = int.from_bytes(f.read(8), "little")
            parts += [f"{file.name} {size}".encode(), f.read(min(header, size) + MIB)]
            f.seek(max(0, size - MIB))
            parts.append(f.read())
    rows = json.dumps([rows, sets], default=repr).encode()
    return {"the method's file": digest(Path(method.__file__)), "the model's files": digest(*parts),
            "the data's rows": digest(rows)}


def compare(out, args, found):
    """ValueError where a run was started with another flag, or from another file, than it is to go on with."""
    then = checkpoint.read_json(out / "args.json"), checkpoint.read_json(out / "env.json").get("inputs", {})
    for was, now, dashes in zip(then, (json.loads(json.dumps(vars(args))), found), ("--", "")):
        for key in now:
            if key not in FREE and (key not in was or was[key] != now[key]):
                raise ValueError(f"{out}: cannot go on, it was started with {dashes}{key} {was.get(key)!r}, "
                                 f"this command has {now[key]!r}")


# ------------------------------------------------------------------------------------ states

def pack(value, path, tensors):
    """
    The JSON form of nested dicts and lists; their tensors go to `tensors`. Strides are kept, since a product
    may round otherwise where a factor lies otherwise in memory.
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
    place = "cpu" if value["device"] == "cpu" else device       # AdamW counts its steps on the CPU
    return torch.empty_strided(t.shape, value["stride"], dtype=t.dtype, device=place).copy_(t)


def generators(device):
    kind, words, *rest = np.random.get_state()
    found = dict(torch=torch.get_rng_state(), numpy=[kind, words.tolist(), *rest], python=random.getstate())
    return found if device.type == "cpu" else found | {device.type: getattr(torch, device.type).get_rng_state()}


def set_generators(found, device):
    torch.set_rng_state(found["torch"])
    np.random.set_state(tuple(found["numpy"]))
    version, words, gauss = found["python"]
    random.setstate((version, tuple(words), gauss))
    if device.type in found:
        getattr(torch, device.type).set_rng_state(found[device.type])


def state_of(model, optimizer):
    """What the next step depends on: of a layer also the attributes that its class names in STATE."""
    names = {id(p): name for name, p in model.named_parameters()}
    numbers = lambda group: {key: v for key, v in group.items() if isinstance(v, (int, float))}
    return dict(
        adapter=checkpoint.adapter_tensors(model),
        layers={name: {key: getattr(m, key) for key in m.STATE}
                for name, m in model.named_modules() if hasattr(m, "STATE")},
        optimizer=[dict(numbers=numbers(group), params=[names[id(p)] for p in group["params"]],
                        state=[dict(optimizer.state.get(p, {})) for p in group["params"]])
                   for group in optimizer.param_groups])


def set_state(state, model, optimizer, method):
    """Puts what state_of returned into a freshly injected model and its new optimizer."""
    if hasattr(method, "restore"):
        method.restore(model, state["adapter"])
    shapes = lambda tensors: {name: (t.dtype, t.shape) for name, t in tensors.items()}
    if shapes(state["adapter"]) != shapes(checkpoint.adapter_tensors(model)):
        raise ValueError("its tensors are not those of this model")
    parameters = dict(model.named_parameters())
    held = parameters | dict(model.named_buffers())
    for name, t in state["adapter"].items():
        held[name].data = t             # not copied into what is there: that may have other strides
    for name, kept in state["layers"].items():
        vars(model.get_submodule(name)).update(kept)
    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, state["optimizer"], strict=True):
        group |= saved["numbers"]
        group["params"] = [parameters[name] for name in saved["params"]]
        optimizer.state.update({p: s for p, s in zip(group["params"], saved["state"]) if s})


def states(out):
    """The directories of a run's states, the newest last."""
    return sorted(d for d in (out / "resume").glob("*") if d.name.isdecimal())


def seal(directory, record):
    """A hash of a whole state; record: what its state.json has beside it."""
    return digest(directory / "state.safetensors", json.dumps(record).encode())


def read_state(directory, run, device):
    """ValueError where a state is torn, or another run's."""
    try:
        record = checkpoint.read_json(directory / "state.json")
        found = record.pop("seal", None)
        if found != seal(directory, record):
            raise ValueError(f"{directory}: not as it was written")
        if record["run"] != run:
            raise ValueError(f"{directory}: a state of another run")
        return unpack(record, load_file(directory / "state.safetensors"), device)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory}: not whole ({error})") from None


@torch.no_grad()
def first_non_finite(model, examples):
    """What of a model is not finite first when it sees these examples: a module's output, or its own tensor."""
    found = []

    def look(name, module, output):
        if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
            own = [key for key, t in [*module.named_parameters(), *module.named_buffers()] if not t.isfinite().all()]
            found.append(f"{name}.{own[0]}" if own else f"the output of {name}")

    hooks = [m.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
             for name, m in model.named_modules() if name]
    for example in examples:            # one at a time: no more memory than the failing batch had
        if not found:
            model.losses([example])
    for hook in hooks:
        hook.remove()
    return found[0] if found else "the loss itself"


class Run:
    """
    A run at work: `out`, its directory; `step`, the last one taken; `signal`, the number of the one that asks it
    to end with the step, or 0. As a context it listens to signals, and lets its lock go.
    """

    def __init__(self, args):
        self.args, self.out, self.held = args, args.out_dir and Path(args.out_dir), None
        self.step, self.signal, self.looping, self.former = 0, 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():       # no other one may
            self.former = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)
                           if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)
        if self.held:
            self.held.close()

    def stop(self, number, frame):
        """In the loop the step ends first; a second signal does not wait, as none does outside of it."""
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.looping:
            self.leave(number)
        else:
            self.signal = number
            os.write(2, b"\nthe step is finished and saved first; once more: at once\n")    # print may be at work

    def leave(self, number):
        saved = states(self.out) if self.held else []
        words = (f"after step {int(saved[-1].name)} it goes on" if saved else "from its first step it starts again"
                 ) + f" by the same command with --resume --out_dir {self.out}"
        os.write(2, f"\nstopped by {signal.Signals(number).name}; {words if self.held else 'nothing was written'}"
                    "\n".encode())
        sys.exit(128 + number)

    def check(self):
        """ValueError where the directory must not be replaced, or holds no run to go on with."""
        args = self.args
        if isinstance(args.resume, str):
            if self.out and self.out.resolve() != Path(args.resume).resolve():
                raise ValueError(f"--resume {args.resume}: goes on there, and not in --out_dir {self.out}")
            self.out = Path(args.resume)
        if args.resume:
            if not self.out:
                raise ValueError("--resume: needs the run's directory, --resume RUN or --out_dir RUN")
            if not (self.out / "args.json").is_file():
                raise ValueError(f"{self.out}: no run to go on with")
            summary = self.out / "summary.json"
            if summary.exists() and (not args.merge or "merge" in checkpoint.read_json(summary)):
                raise ValueError(f"{self.out}: this run has ended")
            return lock(self.out).close()
        parent = next(p for p in (self.out or Path("runs", "x")).absolute().parents if p.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{parent}: cannot be written to")
        if not self.out or not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not (self.out / "args.json").is_file():
            raise ValueError(f"{self.out}: exists and holds something else than a run")
        if not args.overwrite:
            raise ValueError(f"{self.out}: holds another run; --overwrite replaces it, --resume goes on with it")
        for flag in ("model", "task", "data", "method"):
            path = Path(getattr(args, flag)).resolve()
            if path.exists() and self.out.resolve() in (path, *path.parents):
                raise ValueError(f"{self.out}: holds the {flag} {getattr(args, flag)}, which --overwrite would delete")
        lock(self.out).close()

    def claim(self, name, env):
        """
        The directory, this process's from here on: it appears with args.json and env.json in it, locked, or is
        the one to go on in. Without --out_dir runs/<name>, or with -2, -3 at its end if that is taken.
        """
        base = self.out or Path("runs", name)
        base.parent.mkdir(parents=True, exist_ok=True)
        clear(base.parent, self.out.name if self.out else "*")
        if self.args.resume:
            self.held = lock(self.out)
            compare(self.out, self.args, env["inputs"])
            clear(self.out)
            clear(self.out / "resume")
            return self.out
        part = checkpoint.beside(base)
        (part / "eval").mkdir(parents=True)
        old = None
        try:
            checkpoint.write_json(part / "args.json", vars(self.args))
            checkpoint.write_json(part / "env.json", env)
            self.held, count = lock(part), 1
            if (base / "args.json").exists() and self.out and self.args.overwrite:
                old = lock(base)                            # nobody else may replace it now
                checkpoint.put(part, base)
            else:
                while not self.take(part, base if count == 1 else Path(f"{base}-{count}")):
                    count += 1
        finally:
            if old:
                old.close()
            shutil.rmtree(part, ignore_errors=True)         # after put, the run that was there
        return self.out

    def take(self, part, path):
        """Renames part to path, if nothing is there: one step, which one process of several takes."""
        try:
            part.rename(path)
            self.out = path
            return True
        except OSError:
            if not path.exists():
                raise
            if self.out:
                raise ValueError(f"{path}: holds another run; --overwrite replaces it") from None
            return False

    def id(self):
        """Of this run alone; its states carry it."""
        return digest(self.out / "args.json", self.out / "env.json")

    def save(self, model, optimizer, **more):
        """Keeps the state after step `step`, and the one before; where a signal asked for it, the run ends here."""
        device, tensors, best = next(model.parameters()).device, {}, self.out / "adapter-best"
        state = state_of(model, optimizer) | dict(generators=generators(device), more=more, run=self.id())
        with checkpoint.new_directory(self.out / "resume" / f"{self.step:08}") as part:
            record = pack(state, "", tensors)
            save_file(tensors, part / "state.safetensors")
            checkpoint.write_json(part / "state.json", record | {"seal": seal(part, record)})
            if best.exists():
                shutil.copytree(best, part / best.name)
        kept = [d for d in states(self.out) if int(d.name) <= self.step][-2:]
        for other in set(states(self.out)) - set(kept):     # older, or refused and now overtaken
            shutil.rmtree(other)
        if self.signal:
            self.leave(self.signal)

    def load(self, model, optimizer, method):
        """With --resume, puts the newest whole state back -> what save was given with it, or {}: from step 1."""
        if not self.args.resume:
            return {}
        more, best, device = {}, self.out / "adapter-best", next(model.parameters()).device
        shutil.rmtree(best, ignore_errors=True)             # of steps that are taken again, perhaps
        for directory in (found := states(self.out)[::-1]):
            try:
                state = read_state(directory, self.id(), device)
                set_state(state, model, optimizer, method)
            except ValueError as error:
                refused = error
                print(f"state refused: {error}")
                continue
            set_generators(state["generators"], device)
            self.step, more = int(directory.name), state["more"]
            if (directory / best.name).exists():
                shutil.copytree(directory / best.name, best)
            break
        else:
            if found:
                raise ValueError(f"no state to go on from: {refused}")
        print(f"{self.out}: goes on after step {self.step}")
        log = self.out / "metrics.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= self.step))
        return more

    def steps(self, last):
        """The numbers of the steps to take; here a signal waits for the end of the step."""
        if self.step < last:
            for outputs in self.out.glob("eval/*.after.jsonl"):     # of an earlier attempt's adapter
                outputs.unlink()
        self.looping = True
        for self.step in range(self.step + 1, last + 1):
            yield self.step
        self.looping = False
        if self.signal:             # it came after the last step was saved
            self.leave(self.signal)
