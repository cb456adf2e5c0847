"""
Fine-tune one model with one low-rank method on one task, on one GPU or CPU.

    python train.py --method gfa --rank 8                                     # bundled model and task, about a minute
    python train.py --method lora --model DIR --task boolq --data DIR         # a Hugging Face directory, your data sets
    python train.py --method gfa --help                                       # that method's own flags are at the end
"""
import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from evaluate import (
    Parser,
    check_kind,
    eval_mode,
    evaluate_sets,
    example,
    find_task,
    metric_of,
    missing,
    nll,
    supervised,
    test_rows,
    token_losses,
)
from model import Tokenizer, load, pick_device, pick_dtype, targets_of

ROOT = Path(__file__).resolve().parent

# Defaults by name; "tiny" holds wherever no --model is given. "NAME/METHOD" adds to "NAME" for that method.
PRESETS = {
    "tiny": dict(model=str(ROOT / "data" / "tiny"), task="arithmetic", lr=1e-2, batch_size=32, max_steps=240,
                 warmup_steps=20, log_every=20),
    "tiny/gfa": dict(lr=3e-2),
    "tiny/full": dict(lr=1e-3),
    "tiny/glora": dict(lr=5e-3, reinit_every="60s"),
    "tiny/pissa": dict(lr=5e-3), "tiny/milora": dict(lr=5e-3), "tiny/rosa": dict(lr=5e-3, reinit_every="60s"),
    "tiny/cps_lora": dict(lr=5e-3, max_steps=300, reinit_every=None, reinit_at=150),     # two stages, as in the paper
}

# CPS-LoRA, Tables 7 - 10: one learning rate a column, "" for "Other".
for _model, _task, _rates in [
        ("llama2-7b", "commonsense", {"cps_lora": 1e-4, "pissa": 2e-4, "": 1e-4}),
        ("llama2-7b", "math", {"cps_lora": 3e-4, "pissa": 4e-4, "": 3e-4}),
        ("llama3-8b", "commonsense", {"cps_lora": 4e-5, "pissa": 2e-4, "": 1e-4}),
        ("llama3-8b", "math", {"cps_lora": 4e-5, "pissa": 2e-4, "": 1e-4}),
        ("llama3-8b", "code", {"cps_lora": 4.5e-5, "": 5e-5}),
        ("qwen2.5-1.5b", "commonsense", {"cps_lora": 1e-4, "pissa": 2e-4, "": 1e-4}),
        ("qwen2.5-1.5b", "math", {"cps_lora": 5e-5, "": 3e-4}),
        ("qwen2.5-1.5b", "code", {"cps_lora": 6e-5, "pissa": 4.5e-5, "gralora": 5e-5, "": 4e-5}),
        ("llama2-13b", "commonsense", {"cps_lora": 1e-4, "pissa": 2e-4, "": 1e-4}),
        ("llama2-13b", "math", {"cps_lora": 1e-4, "": 3e-4})]:
    PRESETS[f"cps-{_task}-{_model}"] = dict(task=_task, rank=8, targets="attention", batch_size=4, epochs=2,
                                            warmup_steps=500, lr=_rates.pop(""))
    PRESETS |= {f"cps-{_task}-{_model}/{method}": dict(lr=lr) for method, lr in _rates.items()}

# G-LoRA, Tables 9 - 12: r_g : r_l, the learning rate with the exact SVD and with a randomized one, those of the others.
_common, _code = {"pissa": 2e-4, "rosa": 2e-4, "gralora": 2e-4, "": 1e-4}, {"milora": 3e-5, "denselora": 1e-5, "": 5e-5}
for _task, _model, _ratio, _lr, _oversample, _randomized, _rates in [
        ("commonsense", "llama2", "3:1", 1e-4, 4, 1e-4, _common), ("commonsense", "llama3-8b", "3:1", 1e-4, 4, 1e-4, _common),
        ("math", "llama2", "1:3", 3e-4, 4, 3e-4, {"": 3e-4}), ("math", "llama3-8b", "3:1", 3e-4, 4, 3e-4, {"": 3e-4}),
        ("code", "llama3-8b-instruct", "1:3", 2e-5, 8, 1e-5, _code), ("code", "qwen2.5-7b", "3:1", 1e-5, 8, 1e-5, _code)]:
    for _name, _own in [(f"glora-{_task}-{_model}", dict(lr=_lr)),
                        (f"glora-{_task}-{_model}-randomized", dict(lr=_randomized, svd="randomized", oversample=_oversample))]:
        PRESETS[_name] = dict(task=_task, rank=8, targets="attention", batch_size=4, epochs=10, warmup_steps=500,
                              dropout=0.05, val_rows=1200, lr=_rates[""])
        PRESETS |= {f"{_name}/{method}": dict(lr=lr) for method, lr in _rates.items() if method}
        PRESETS[f"{_name}/glora"] = dict(ratio=_ratio) | _own
        PRESETS.setdefault(f"{_name}/rosa", {})["reinit_every"] = "2"       # Table 16: four
        PRESETS[f"{_name}/spiel"] = dict(dropout=0.0)

# GraLoRA, Table 5 and §4.1 (k by §3.4, Lion, cosine).
for _model, _task, _lr, _epochs in [("llama3.1-8b", "code", 2e-4, 2), ("qwen2.5-1.5b", "commonsense", 2e-4, 2),
                                    ("qwen2.5-7b", "commonsense", 4e-4, 2), ("llama3.1-70b", "commonsense", 3e-4, 1)]:
    PRESETS[f"gralora-{_task}-{_model}"] = dict(task=_task, rank=64, batch_size=192, epochs=_epochs, lr=_lr,
                                                optimizer="lion", schedule="cosine")
    PRESETS[f"gralora-{_task}-{_model}/gralora"] = dict(k=0)


# ------------------------------------------------------------------------------------ command line

def parse(argv):
    """Two passes: the first finds the method and the preset, whose defaults the second shows and may override."""
    first = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    names = ", ".join(checkpoint.method_files())
    first.add_argument("--method", default="lora", help=f"{names}, or a path to a .py file")
    first.add_argument("--preset", help=f"defaults by name: {', '.join(p for p in PRESETS if '/' not in p)}")
    first.add_argument("--model", "--base_model", "--model_name_or_path",
                       help="Hugging Face directory or hub id; none: the bundled model, with --preset tiny")
    early, _ = first.parse_known_args(argv)
    try:
        method = checkpoint.load_method(early.method)
    except ValueError as error:
        first.error(error)

    p = Parser(prog="train.py", parents=[first], allow_abbrev=False, description=__doc__.split("\n")[1],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = p.add_argument, argparse.BooleanOptionalAction
    add("--rank", "--lora_r", type=int, default=8, help="rank r of the update")
    add("--alpha", "--lora_alpha", type=float, help="scale is alpha / rank; none: the method's own rule")
    add("--dropout", "--lora_dropout", type=float, default=0.0, help="on the adapter's input")
    add("--targets", "--target_modules", default="all", help="all, attention, or module names: q_proj,v_proj")
    add("--task", default="commonsense", help="family, set, or path to a .json / .jsonl of your own")
    add("--data", default=".", help="directory of the data sets")
    add("--train_rows", type=int, help="use the first N training rows")
    add("--val_rows", type=int, default=0, help="split off N training rows; keeps the best adapter beside the last")
    add("--epochs", "--num_epochs", type=float, default=3.0, help="passes over the training rows")
    add("--max_steps", type=int, help="optimizer steps, instead of --epochs")
    add("--lr", "--learning_rate", type=float, default=3e-4, help="peak learning rate")
    add("--batch_size", type=int, default=4, help="effective: examples per optimizer step")
    add("--micro_batch_size", type=int, help="examples per forward pass; none: batch_size")
    add("--warmup_steps", type=int, default=0, help="linear warm-up")
    add("--schedule", default="linear", choices=["linear", "cosine", "constant"], help="after the warm-up")
    add("--optimizer", default="adamw", choices=["adamw", "lion"])
    add("--weight_decay", type=float, default=0.0)
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--max_len", "--cutoff_len", type=int, default=512, help="tokens per example; a longer prompt loses its start")
    add("--train_on_prompt", action=flag, default=False, help="loss on the prompt too, not on the answer alone")
    add("--reinit_every", help="re-initialise every N epochs ('2', '0.5') or steps ('60s'); only where the method does")
    add("--reinit_at", type=int, help="one re-initialisation after N steps")
    add("--seed", type=int, default=42)
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the frozen model")
    add("--device", default="auto")
    add("--compile", action=flag, default=False, help="torch.compile the blocks; needs a C++ compiler")
    add("--checkpointing", action=flag, default=False, help="recompute activations: less memory, slower")
    add("--eval_limit", type=int, help="evaluate on the first N rows of each set")
    add("--eval_every", type=int, help="validation loss every N steps; none: every epoch, with --val_rows")
    add("--rule", default="strict", choices=["strict", "paper"], help="how answers are read off (math); paper: as LLM-Adapters")
    add("--allow_code_execution", action=flag, default=False, help="run the generated code to score it, see data/sandbox.py")
    add("--eval_before", action=flag, default=True, help="evaluate before training, too")
    add("--log_every", type=int, default=10)
    add("--save_steps", type=int, help="save the adapter every N steps")
    add("--merge", action=flag, default=False, help="also write the merged model, as a Hugging Face directory")
    add("--out_dir", "--output_dir", help="none: runs/<task>-<method>-r<rank>-<time>")
    add("--overwrite", action=flag, default=False, help="replace the run that is in out_dir")
    own = p.add_argument_group(f"{early.method}'s own")
    for name, (default, text, *choices) in method.DEFAULTS.items():
        kind = dict(type=type(default), choices=choices[0] if choices else None)
        kind = dict(action=flag) if isinstance(default, bool) else kind
        own.add_argument(f"--{name}", default=default, help=text, **kind)

    # command line > preset > the method's COMMON > the defaults above
    p.set_defaults(**getattr(method, "COMMON", {}))
    preset = early.preset or (None if early.model else "tiny")
    if preset is not None:
        if preset not in PRESETS or "/" in preset:
            p.error(f"preset {preset!r}, expected one of {', '.join(name for name in PRESETS if '/' not in name)}")
        p.set_defaults(**PRESETS[preset] | PRESETS.get(f"{preset}/{Path(early.method).stem}", {}), preset=preset)
    args = p.parse_args(argv)
    check(p, args, method)
    return args, method


def check(p, args, method):
    """What argparse cannot see for itself; exits 2."""
    if args.model is None:
        p.error(f"preset {args.preset!r} names no model: give --model")
    least = dict(batch_size=1, micro_batch_size=1, max_steps=1, max_len=2, log_every=1, save_steps=1, eval_every=1,
                 eval_limit=1, train_rows=1, reinit_at=1, rank=1, val_rows=0, warmup_steps=0, weight_decay=0, grad_clip=0)
    for name, smallest in least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= smallest:
            p.error(f"--{name} {getattr(args, name)}, expected at least {smallest}")
    args.micro_batch_size = args.micro_batch_size or args.batch_size
    if args.batch_size % args.micro_batch_size:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --micro_batch_size {args.micro_batch_size}")
    if not 0 <= args.dropout < 1:
        p.error(f"--dropout {args.dropout}, expected 0 <= dropout < 1")
    if args.epochs <= 0 or args.lr <= 0:
        p.error(f"--epochs {args.epochs:g} --lr {args.lr:g}, expected both above 0")
    if args.merge and hasattr(method, "NOT_MERGEABLE"):
        p.error(f"--merge: {method.NOT_MERGEABLE}")
    if args.eval_every and not args.val_rows:
        p.error("--eval_every computes the validation loss: it needs --val_rows")
    if (args.reinit_every or args.reinit_at) and not hasattr(method, "reinit"):
        p.error(f"--reinit_every, --reinit_at: {args.method} does not re-initialise")


# ------------------------------------------------------------------------------------ pieces of the loop

def encode(tokenizer, rows, max_len, train_on_prompt=False):
    """
    [(ids, start)] of prompt + answer + EOS, supervised from `start`, or [(ids, label)]; and how many rows were cut.
    A long prompt loses its beginning (not its BOS), so that the answer and its EOS stay whole where they can.
    """
    examples, cut = [], 0
    for row in rows:
        if "label" in row:
            ids = tokenizer.pair(row["text"], row["pair"], max_len)
            if len(ids) >= min(max_len, tokenizer.longest):     # else surely whole: most rows are encoded once
                cut += len(ids) < len(tokenizer.fast.encode(row["text"], row["pair"]).ids)
            examples.append((ids, row["label"]))
            continue
        ids, start = example(tokenizer, row)
        if (over := len(ids) - max_len) > 0:
            bos = len(tokenizer.bos)
            dropped = min(over, start - bos)
            ids, start, cut = (ids[:bos] + ids[bos + dropped:])[:max_len], start - dropped, cut + 1
        examples.append((ids, 0 if train_on_prompt else start))
    return examples, cut


def order(seed, epoch, n):
    """The order of the n examples in an epoch, a pure function of (seed, epoch): a resumed run sees the same."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def lr_at(step, steps, warmup, schedule):
    """Factor of the peak learning rate at step 0 .. steps - 1: linear warm-up, then down to 0, or constant."""
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)                          # from 1 to nearly 0
    return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]


def reinit_steps(every, at, steps, steps_per_epoch):
    """After which steps (1 .. steps) to re-initialise; never after the last, whose factors would not train."""
    found = {at} if at else set()
    if every:
        number, unit = (every[:-1], 1) if every.endswith("s") else (every, steps_per_epoch)
        try:
            period = float(number) * unit
        except ValueError:
            period = 0
        if not 1 <= period < math.inf:
            raise ValueError(f"reinit_every {every!r}, expected epochs such as '2' or '0.5', or steps such as '60s'")
        found |= {round(i * period) for i in range(1, int(steps / period) + 1)}
    return {step for step in found if step < steps}


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023) with decoupled weight decay, as in GraLoRA's scripts: half of Adam's state."""

    def __init__(self, params, lr, weight_decay=0.0, betas=(0.9, 0.95)):
        super().__init__(params, dict(lr=lr, initial_lr=lr, weight_decay=weight_decay, betas=betas))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - group["weight_decay"] * group["lr"] / group["initial_lr"])
                p.sub_(group["lr"] * torch.sign(m.lerp(p.grad, 1 - group["betas"][0])))
                m.lerp_(p.grad, 1 - group["betas"][1])


def make_optimizer(method, args, params):
    if hasattr(method, "make_optimizer"):
        return method.make_optimizer(params, args.lr, args.weight_decay)
    if args.optimizer == "lion":
        return Lion(params, args.lr, args.weight_decay)
    return torch.optim.AdamW(params, args.lr, weight_decay=args.weight_decay)


def backward(model, batch, micro_batch_size):
    """
    Gradient of the mean loss over the batch's supervised tokens -> (that loss, tokens seen).
    Each micro-batch counts by its supervised tokens, so the gradient does not depend on micro_batch_size.
    """
    count = sum(supervised(model, one) for one in batch)
    total, seen = 0.0, 0
    for i in range(0, len(batch), micro_batch_size):
        some = batch[i:i + micro_batch_size]
        loss = token_losses(model, some).sum() / count
        loss.backward()
        total, seen = total + loss.detach(), seen + sum(len(ids) for ids, _ in some)
    return total.item(), seen


def check_finite(model, step, loss, norm):
    """RuntimeError that names the step and the tensor, before anything is stepped."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    what = "gradient norm" if math.isfinite(loss) else "loss"
    what = f"gradient of {bad[0]} ({len(bad)} in all)" if bad else what
    raise RuntimeError(f"step {step}: loss {loss}, gradient norm {norm}; not finite: {what}. "
                       "Nothing was stepped; what was saved is kept. Lower --lr?")


def peak_memory_mb(device):
    """Peak memory: the GPU's allocations, or the process's resident set (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------ set-up

def prepare(args, method):
    """Everything that bad input can stop, before anything is written. ValueError or OSError, in one line."""
    run = SimpleNamespace()
    default = f"{Path(args.task).stem}-{Path(args.method).stem}-r{args.rank}-{time.strftime('%Y%m%d-%H%M%S')}"
    run.out = Path(args.out_dir or Path("runs") / default)
    if run.out.exists() and (not run.out.is_dir() or any(run.out.iterdir())):
        if not (run.out / "args.json").is_file():
            raise ValueError(f"{run.out}: exists and holds something else than a run")
        if not args.overwrite:
            raise ValueError(f"{run.out}: holds another run; --overwrite replaces it")
        if run.out.resolve() in Path(args.model).resolve().parents:
            raise ValueError(f"{run.out}: holds the model {args.model}, which --overwrite would delete")

    run.module, names = find_task(args.task)
    run.sets, run.absent = test_rows(run.module, names, args.data, args.eval_limit)
    rows = run.module.rows(args.data, args.task, "train")[:args.train_rows]
    if args.val_rows >= len(rows):
        raise ValueError(f"val_rows {args.val_rows}, there are {len(rows)} training rows")
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    labels = len(run.module.TASKS[args.task]["labels"]) if run.module.KIND == "classify" else None
    run.model = load(args.model, pick_dtype(args.dtype, device), device, labels)
    check_kind(run.model, run.module)
    run.tokenizer = Tokenizer(args.model, run.model.cfg)
    run.train, run.cut = encode(run.tokenizer, rows, args.max_len, args.train_on_prompt)
    held = set(order(args.seed, -1 % 2**32, len(rows))[:args.val_rows].tolist())
    run.val = [run.train[i] for i in sorted(held)]
    run.train = [e for i, e in enumerate(run.train) if i not in held]

    run.steps_per_epoch = math.ceil(len(run.train) / args.batch_size)
    run.steps = args.max_steps or math.ceil(args.epochs * run.steps_per_epoch)
    run.reinits = reinit_steps(args.reinit_every, args.reinit_at, run.steps, run.steps_per_epoch)
    targets = targets_of(run.model, args.targets)
    own = {name: getattr(args, name) for name in method.DEFAULTS}
    known = args.method in checkpoint.method_files()
    run.record = dict(method=args.method if known else str(Path(args.method).resolve()), targets=targets, rank=args.rank,
                      alpha=args.alpha, dropout=args.dropout, own=own, model=str(args.model))
    run.size = sum(p.numel() for p in run.model.parameters())
    method.inject(run.model, targets, args.rank, args.alpha, args.dropout, **own)
    if hasattr(run.model, "classifier"):        # trains beside any adapter, in fp32 as they do
        run.model.classifier.float().requires_grad_(True)
    run.params = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = make_optimizer(method, args, run.params)
    return run


def describe(args, run):
    """The first lines: what is adapted, on what, in which portions."""
    trainable, tokens = sum(p.numel() for p in run.params), sum(len(ids) for ids, _ in run.train)
    head = sum(p.numel() for p in run.model.classifier.parameters()) if hasattr(run.model, "classifier") else 0
    trainable -= head       # adapters are counted without the head, as in GFA's tables
    adapted = sum(hasattr(m, "delta") for m in run.model.modules())
    print(f"{args.method}: {f'{adapted} modules' if adapted else 'all weights'}, {trainable:,} trainable parameters, "
          f"{100 * trainable / run.size:.3f} % of the model's {run.size:,}" + (f", and {head:,} of its head" if head else ""))
    print(f"batch {args.micro_batch_size} x {args.batch_size // args.micro_batch_size} = {args.batch_size}, "
          f"{run.steps} steps of {run.steps_per_epoch} an epoch, peak learning rate {args.lr:g}")
    print(f"{len(run.train)} examples, {tokens:,} tokens, {run.cut} truncated to {args.max_len}", flush=True)
    return trainable


def environment(device):
    try:
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    except OSError:
        git = ""
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                platform=platform.platform(), threads=torch.get_num_threads(), commit=git.strip() or None,
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


# ------------------------------------------------------------------------------------ the run

def main(argv=None):
    args, method = parse(argv)
    try:
        run = prepare(args, method)
    except (ValueError, OSError) as error:
        Parser(prog="train.py").error(error)
    model, tokenizer, optimizer, out = run.model, run.tokenizer, run.optimizer, run.out
    device = next(model.parameters()).device
    trainable = describe(args, run)
    if (out / "args.json").exists():        # --overwrite, see prepare
        shutil.rmtree(out)
    (out / "eval").mkdir(parents=True)
    checkpoint.write_json(out / "args.json", vars(args))
    checkpoint.write_json(out / "env.json", environment(device))
    summary = dict(task=args.task, method=args.method, rank=args.rank, trainable=trainable, steps=run.steps)

    def measure(when):
        table = evaluate_sets(model, tokenizer, run.module, run.sets, lambda name: out / "eval" / f"{Path(name).stem}.{when}.jsonl",
                              rule=args.rule, execute=args.allow_code_execution)
        summary[when], summary[f"loss_{when}"] = table.pop("main", {}), table.pop("loss")["mean"]
        if "majority" in table:
            summary["majority"] = table.pop("majority")
        own = {metric_of(run.module, name) for name in run.sets}
        summary.update({f"{when}_{measure}": values for measure, values in table.items() if {measure} != own})

    started = time.perf_counter()
    if args.eval_before:
        print("before training")
        measure("before")

    model.checkpointing = args.checkpointing
    if args.compile:
        for block in model.blocks():
            block.compile(dynamic=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    best, training_seconds, training_tokens, since, tokens = None, 0.0, 0, time.perf_counter(), 0
    validate_every = args.eval_every or run.steps_per_epoch
    bar = tqdm(total=run.steps, disable=None, desc="train")
    for step in range(1, run.steps + 1):
        epoch, position = divmod(step - 1, run.steps_per_epoch)
        if position == 0:
            shuffled = order(args.seed, epoch, len(run.train))
        chosen = shuffled[position * args.batch_size:(position + 1) * args.batch_size]
        loss, seen = backward(model, [run.train[i] for i in chosen], args.micro_batch_size)
        if hasattr(method, "observe"):
            method.observe(model, step, run.steps)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        check_finite(model, step, loss, norm.item())
        if args.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(params, args.grad_clip, norm)
        factor = lr_at(step - 1, run.steps, args.warmup_steps, args.schedule)
        for group in optimizer.param_groups:        # a method's own optimizer may have a rate for each group
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad()
        if step in run.reinits:
            method.reinit(model, optimizer)
            if args.compile:        # new shapes: they would add up to dynamo's limit, and it falls back to eager
                torch.compiler.reset()
        tokens += seen
        bar.update()

        if step % args.log_every == 0 or step == run.steps:
            elapsed = time.perf_counter() - since
            line = dict(step=step, loss=loss, lr=args.lr * factor, grad_norm=norm.item(),
                        tokens_per_second=tokens / elapsed, peak_memory_mb=peak_memory_mb(device))
            training_seconds, training_tokens = training_seconds + elapsed, training_tokens + tokens
            with open(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            text = (f"step {step:5}  loss {loss:.4f}  lr {line['lr']:.2e}  grad {norm:.3f}  "
                    f"{line['tokens_per_second']:,.0f} tokens/s")
            bar.set_postfix_str(text) if not bar.disable else print(text, flush=True)
            since, tokens = time.perf_counter(), 0
        if run.val and (step % validate_every == 0 or step == run.steps):
            paused = time.perf_counter()
            with eval_mode(model):
                parts = nll(model, run.val)
            value = sum(total for total, _ in parts) / sum(count for _, count in parts)
            summary["last"] = dict(step=step, loss_val=value)
            tqdm.write(f"step {step:5}  validation loss {value:.4f}")
            if best is None or value < best["loss_val"]:
                best = dict(step=step, loss_val=value)
                checkpoint.save_adapter(out / "adapter-best", model, run.record)
            since += time.perf_counter() - paused
        if args.save_steps and step % args.save_steps == 0:
            checkpoint.save_adapter(out / "adapter", model, run.record | {"step": step})
    bar.close()

    checkpoint.save_adapter(out / "adapter", model, run.record | {"step": run.steps})
    print("after training")
    measure("after")
    if run.absent:
        summary["absent"] = run.absent
        print(f"not found: {missing(run.module, run.absent)}; the mean is over the others")
    if best:
        summary["best"] = best
    summary |= dict(tokens_per_second=training_tokens / training_seconds, seconds=time.perf_counter() - started)
    checkpoint.write_json(out / "summary.json", summary)
    if args.merge:
        method.merge(model)
        checkpoint.save_merged(out / "merged", model, args.model)
    plot(out)
    show = lambda when: f"{summary[when]['mean']:.1%}" if summary[when] else "not scored"
    before = f"{show('before')} -> " if args.eval_before else ""
    print(f"{metric_of(run.module, next(iter(run.sets)))} {before}{show('after')}  {trainable:,} trainable  {summary['seconds']:.0f} s  {out}")


def plot(out):
    """loss.png, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="training loss")
    figure.savefig(out / "loss.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
