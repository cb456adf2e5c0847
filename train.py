"""
Fine-tune one model with one low-rank method on one task, on one GPU or CPU; on several: distributed.py.

    python train.py --method gfa --rank 8                              # bundled model and task, a minute
    python train.py --method lora --model DIR --task boolq --data DIR  # a Hugging Face directory, your data
    python train.py --method gfa --help                                # the method's own flags are at the end
"""
import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import presets
import runs
from checkpoint import Parser
from data import tasks, text
from evaluate import evaluate_sets, mean_loss, nll, shared_flags, show
from files import write_json
from model import first_non_finite, targets_of

# ------------------------------------------------------------------------------------ command line

class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):         # no "(default: None)"
        return action.help if action.default is None else super()._get_help_string(action)


def parse(argv):
    """-> args, method. Command line > preset (its method's rows > all) > method's COMMON > add_flags."""
    first = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    add = first.add_argument_group("what").add_argument
    add("--method", default="lora", help=f"{', '.join(checkpoint.method_files())}, or a path to a .py file")
    add("--model", "--base_model", "--model_name_or_path",
        help="Hugging Face directory or hub id; none: the bundled model, with --preset tiny")
    add("--preset", help="defaults by name, those of the papers' tables")
    add("--list_presets", action="store_true", default=argparse.SUPPRESS,
        help="show each one's name, paper, table, model and what it sets; and stop")
    early = first.parse_known_args(argv)[0]
    if "list_presets" in early:
        print(presets.listing())
        first.exit()
    name = early.preset or (None if early.model else "tiny")
    try:
        method = checkpoint.load_method(early.method)
        shared, own, _ = presets.rows(name, method) if name else ({}, {}, None)    # own: of this method
    except ValueError as error:
        first.error(error)
    p = Parser(prog="train.py", parents=[first], allow_abbrev=False, description=__doc__.split("\n")[1],
               formatter_class=Help, usage="%(prog)s [--flag value ..]")
    add_flags(p, method)
    flags, lr_from = vars(p.parse_args([])), "train.py's default"       # flags: every one's name
    for whose, defaults in ((f"{Path(early.method).stem}'s own default", getattr(method, "COMMON", {})),
                            (f"preset {name}", shared | own | dict(preset=name))):      # the later one wins
        if unknown := [flag for flag in defaults if flag not in flags]:
            p.error(f"{method.__file__}: no flag --{unknown[0]}, for which it or preset {name} has a default")
        p.set_defaults(**defaults)
        lr_from = whose if "lr" in defaults else lr_from
    args = p.parse_args(argv)
    bare = argparse.Namespace(**dict.fromkeys(flags))   # argparse puts no default over what is there already
    args.typed = sorted(flag for flag, value in vars(p.parse_args(argv, bare)).items() if value is not None)
    args.lr_from = "the command line" if "lr" in args.typed else lr_from
    if "epochs" in args.typed and "max_steps" not in args.typed:
        args.max_steps = None       # a preset's
    check(p, args, method)
    return args, method


def add_flags(p, method):
    group, flag = lambda title: p.add_argument_group(title).add_argument, argparse.BooleanOptionalAction
    add = group("data")
    add("--task", default="commonsense", help="family, set, or path to a .json / .jsonl of your own")
    add("--data", default=".", help="directory of the data sets")
    add("--mix", help="training mix of the task's family, as commonsense_170k; none: the first that is there")
    add("--train_rows", type=int, help="use the first N training rows")
    add("--val_rows", type=int, default=0, help="split off N training rows; keeps the best adapter, too")
    add("--max_len", "--cutoff_len", type=int, default=512, help="tokens; a longer prompt loses its start")
    add("--train_on_prompt", action=flag, default=False, help="loss on the prompt, too")
    add = group("method")
    add("--rank", "--lora_r", type=int, default=8, help="rank r of the update")
    add("--alpha", "--lora_alpha", type=float, help="scale is alpha / rank; none: the method's own rule")
    add("--dropout", "--lora_dropout", type=float, default=0.0, help="on the adapter's input")
    add("--targets", "--target_modules", default="all", help="all, attention, or module names: q_proj,v_proj")
    add("--reinit_every", help="re-initialise every N epochs ('2', '0.5') or steps ('60s'), or none")
    add("--reinit_at", type=int, help="one re-initialisation after N steps")
    add = loop = group("loop")
    add("--epochs", "--num_epochs", type=float, default=3.0, help="passes over the training rows")
    add("--max_steps", type=int, help="optimizer steps, instead of --epochs")
    add("--lr", "--learning_rate", type=float, default=3e-4, help="peak learning rate")
    add("--batch_size", type=int, default=4, help="effective: examples per optimizer step")
    add("--micro_batch_size", type=int, help="examples per forward pass; none: batch_size")
    add("--warmup_steps", type=int, default=0, help="linear warm-up; longer than the run: never at the peak")
    add("--warmup_ratio", type=float, default=0.0, help="share of the steps, instead of --warmup_steps")
    add("--schedule", default="linear", choices=["linear", "cosine", "constant"], help="after the warm-up")
    add("--optimizer", default="adamw", choices=["adamw", "lion"], help="unless the method has its own")
    add("--weight_decay", type=float, default=0.0, help="decoupled from the gradient")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add("--seed", type=int, default=42, help="of the data's order, dropout, what inject draws")
    add("--compile", action=flag, default=False, help="torch.compile the blocks; needs a C++ compiler")
    add("--checkpointing", action=flag, default=False, help="recompute activations: less memory, slower")
    add = evaluation = group("evaluation")
    add("--eval_limit", type=int, help="evaluate on the first N rows of each set")
    add("--eval_every", type=int, help="validation loss every N steps; none: every epoch, with --val_rows")
    add("--eval_before", action=flag, default=True, help="evaluate before training, too")
    add("--select", default="last", choices=["last", "best"], help="adapter to keep; best: by --val_rows")
    add = group("output")
    add("--log_every", type=int, default=10, help="a line every N steps")
    add("--save_steps", type=int, help="save the adapter, and what --resume goes on from, every N steps")
    add("--merge", action=flag, default=False, help="also write the merged model, a Hugging Face directory")
    add("--merge_dtype", choices=["float32", "bfloat16"], help="none: float32 on a CPU, else --dtype's")
    add("--out_dir", "--output_dir", help="none: runs/<task>-<method>-r<rank>-<time>")
    add("--overwrite", action=flag, default=False, help="replace the run that is in out_dir")
    add("--resume", nargs="?", const=True, metavar="RUN", help="go on with a stopped run; none: in out_dir")
    shared_flags(loop, evaluation)
    add = group(f"{Path(method.__file__).name}'s own")
    for name, (default, words, *choices) in method.DEFAULTS.items():        # words: the help
        kind = dict(action=flag) if isinstance(default, bool) else dict(type=type(default))
        if choices:
            kind["choices"] = choices[0]
        try:
            add(f"--{name}", default=default, help=words, **kind)
        except argparse.ArgumentError:
            p.error(f"{method.__file__}: DEFAULTS has {name!r}, which is a common flag already")


def check(p, args, method):
    """What argparse cannot see for itself; exits 2."""
    least = dict(batch_size=1, micro_batch_size=1, max_steps=1, max_len=2, log_every=1, save_steps=1,
                 eval_every=1, eval_limit=1, train_rows=1, reinit_at=1, rank=1,
                 val_rows=0, warmup_steps=0, weight_decay=0, grad_clip=0, seed=0)
    for name, smallest in least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= smallest:
            p.error(f"--{name} {getattr(args, name)}, expected at least {smallest}")
    for name, value in vars(args).items():      # what no fp32 number and no 64-bit counter holds is a slip
        if type(value) in (int, float) and not abs(value) <= (2**62 if isinstance(value, int) else 1e30):
            p.error(f"--{name} {value}, expected a number that fits")
    if args.reinit_every == "none":
        args.reinit_every = None
    args.micro_batch_size = micro = args.micro_batch_size or args.batch_size
    for wrong, message in [
            (args.model is None, f"preset {args.preset!r} names no model: give --model"),
            (args.batch_size % micro,
             f"--batch_size {args.batch_size} is not a multiple of --micro_batch_size {micro}"),
            (not 0 <= args.warmup_ratio < 1,
             f"--warmup_ratio {args.warmup_ratio}, expected 0 <= warmup_ratio < 1"),
            (args.warmup_steps and args.warmup_ratio,
             f"--warmup_steps {args.warmup_steps}, --warmup_ratio {args.warmup_ratio}: one has to be 0"),
            (not 0 <= args.dropout < 1, f"--dropout {args.dropout}, expected 0 <= dropout < 1"),
            (args.epochs <= 0, f"--epochs {args.epochs:g}, expected above 0"),
            (args.lr <= 0, f"--lr {args.lr:g}, expected above 0"),
            (args.merge and hasattr(method, "NOT_MERGEABLE"),
             f"--merge: {getattr(method, 'NOT_MERGEABLE', '')}"),
            (args.eval_every and not args.val_rows,
             "--eval_every computes the validation loss: it needs --val_rows"),
            (args.select == "best" and not args.val_rows,
             "--select best takes the adapter with the least validation loss: it needs --val_rows"),
            ((args.reinit_every or args.reinit_at) and not hasattr(method, "reinit"),
             f"--reinit_every, --reinit_at: {args.method} does not re-initialise")]:
        if wrong:
            p.error(message)


# ------------------------------------------------------------------------------------ pieces of the loop

def order(seed, epoch, n):
    """The order of n examples in an epoch: a pure function of (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def lr_at(step, steps, warmup, schedule):
    """Factor of the peak learning rate at step 0 .. steps - 1: warm-up, then towards 0 or constant."""
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / (steps - warmup)                    # from 1 to 1 / (steps - warmup)
    return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[schedule]


def reinit_steps(every, at, steps, steps_per_epoch):
    """After which steps to re-initialise; never after the last one, as the new factors would not train."""
    found = {at} if at else set()
    if every:
        number, unit = (every[:-1], 1) if every.endswith("s") else (every, steps_per_epoch)
        try:
            period = float(number) * unit
        except ValueError:
            period = 0
        if not 1 <= period < math.inf:
            raise ValueError(f"reinit_every {every!r}, expected epochs, '2' or '0.5', or steps, '60s'")
        found |= {round(i * period) for i in range(1, int(steps / period) + 1)}
    return {step for step in found if step < steps}


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023), half of Adam's state; decay by the schedule, not the peak rate (GraLoRA's)."""

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
    kind = Lion if args.optimizer == "lion" else torch.optim.AdamW
    return kind(params, args.lr, weight_decay=args.weight_decay)


def backward(model, batch, micro_batch_size):
    """
    Adds the gradient of a batch's loss -> (the loss, tokens seen): summed over its supervised tokens,
    or labels, and divided by their number in the whole batch, so that micro-batches of any size add up to
    the same but for rounding and dropout.
    """
    count, total = sum(map(model.supervised, batch)), 0.0     # supervised: how many tokens or labels count
    for i in range(0, len(batch), micro_batch_size):
        loss = model.losses(batch[i:i + micro_batch_size]).sum() / count
        loss.backward()
        total += loss.detach()
    return total.item(), sum(len(ids) for ids, _ in batch)


def check_finite(model, step, loss, norm, batch):
    """RuntimeError that names the step and what is not finite, before anything is stepped."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    what = f"gradient of {bad[0]} ({len(bad)} in all)" if bad else "gradient norm"
    if not math.isfinite(loss):             # then gradients are not, either: forward tells where it began
        what = f"loss; first of all the output of {first_non_finite(model, batch) or 'no module'}"
    raise RuntimeError(f"step {step}: loss {loss}, gradient norm {norm}; not finite: {what}. "
                       "This step was not taken; what was saved is kept. Lower --lr?")


# ------------------------------------------------------------------------------------ set-up

def adapt(args, method, model):
    """Injects the method, and unfreezes a classifier's head -> what an adapter's file says of itself."""
    targets = targets_of(model, args.targets)
    own = {name: getattr(args, name) for name in method.DEFAULTS}
    method.inject(model, targets, args.rank, args.alpha, args.dropout, **own)
    if own.get("match_lora"):                   # GFA: inject chose the rank that costs what LoRA's does
        args.rank = len(model.adapter.lora_A)
        print(f"match_lora {own['match_lora']:g}: rank {args.rank}")
    if model.TRAINED_HEAD:                      # trains beside any adapter and, as adapters do, in fp32
        model.get_submodule(model.TRAINED_HEAD).float().requires_grad_(True)
    name = args.method if args.method in checkpoint.method_files() else str(Path(args.method).resolve())
    return dict(method=name, targets=targets, rank=args.rank, alpha=args.alpha, dropout=args.dropout, own=own,
                model=str(args.model))


def describe(args, method, model, examples, cut, steps, epoch_steps):
    """Prints the first lines: what is adapted, on what, in which portions -> how many parameters train."""
    count = lambda parameters: sum(p.numel() for p in parameters)
    size = count(p for name, p in model.named_parameters() if not name.rpartition(".")[2].startswith("lora_"))
    head = count(model.get_submodule(model.TRAINED_HEAD).parameters()) if model.TRAINED_HEAD else 0
    trainable = count(p for p in model.parameters() if p.requires_grad) - head      # as GFA's tables count
    adapted = sum(hasattr(m, "delta") for m in model.modules())
    print(f"{args.method}: {f'{adapted} modules' if adapted else 'all weights'}, "
          f"{trainable:,} trainable parameters, {100 * trainable / size:.3f} % of the model's {size:,}"
          + (f", and {head:,} of its head" if head else ""))
    passes = args.batch_size // args.micro_batch_size
    print(f"{steps} steps of {args.batch_size} examples ({passes} forward pass{'es' * (passes > 1)} of "
          f"{args.micro_batch_size} each); an epoch is {epoch_steps} steps")
    print(f"{len(examples)} examples, {sum(len(ids) for ids, _ in examples):,} tokens, "
          f"{cut} of all rows truncated to {args.max_len}")
    print(f"peak learning rate {args.lr:g}, from {args.lr_from}"
          + f"; not reached in {steps} of --warmup_steps {args.warmup_steps}" * (steps < args.warmup_steps))
    if args.preset:
        presets.describe(args.preset, method, vars(args))
    return trainable


def environment(device):
    git = shutil.which("git") and subprocess.run(["git", "-C", str(checkpoint.ROOT), "rev-parse", "HEAD"],
                                                 capture_output=True, text=True).stdout.strip()
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                platform=platform.platform(), threads=torch.get_num_threads(), commit=git or None,
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


# ------------------------------------------------------------------------------------ the run

def measure(when, args, model, tokenizer, task, sets, run):
    """Evaluates "before" or "after", prints, writes the outputs -> what summary.json has of it."""
    print(f"{when} training")
    name_file = lambda name: run.out / "eval" / f"{Path(name).stem}.{when}.jsonl" if run.first else None
    table = evaluate_sets(model, tokenizer, task, sets, name_file, rule=args.rule, share=run.share,
                          execute=args.allow_code_execution and run.first)
    found = {when: table.pop("main", {}), f"loss_{when}": table.pop("loss")["mean"]}
    if "majority" in table:                     # the score of the commonest answer to every row
        found["majority"] = table.pop("majority")
    metrics = {tasks.metric_of(task, name) for name in sets}
    if len(metrics) == 1:                       # of all sets: these are the numbers of "main" once more
        table.pop(metrics.pop(), None)
    return found | {f"{when}_{name}": values for name, values in table.items()}


def validate(model, examples, step, summary, run, record):
    """The validation loss, into the summary: last, the latest, and best, whose adapter is adapter-best."""
    losses = run.share(lambda some: nll(model, some), examples) if run.share else nll(model, examples)
    last = summary["last"] = dict(step=step, loss_val=mean_loss(losses))
    print(f"step {step}: validation loss {last['loss_val']:.4f}", flush=True)
    if "best" not in summary or last["loss_val"] < summary["best"]["loss_val"]:
        summary["best"] = last
        run.write_adapter("adapter-best", model, record)


def main(argv=None):
    args, method = parse(argv)
    run = runs.Run(args)
    if "LOCAL_RANK" in os.environ:      # torchrun's: this is one of several processes
        import distributed
        run = distributed.Run(args)
    with run:       # Ctrl-C and SIGTERM set run.signal, which the loop reads; in the end out_dir is unlocked
        try:
            train(args, method, run)
        except torch.OutOfMemoryError:
            print("out of memory; what to change, in this order: lower --micro_batch_size, lower --max_len, "
                  "--checkpointing, --targets attention, lower --rank; where it was evaluated, lower "
                  "BATCH_TOKENS in decode.py", file=sys.stderr)
            raise


def train(args, method, run):
    try:        # bad input fails in here, in one line; nothing is written before run.claim
        run.check()         # are out_dir and --resume usable?
        task, args.task, names = tasks.find_task(args.task)
        sets, absent = tasks.test_rows(task, names, args.data, args.eval_limit)
        rows = tasks.train_rows(task, args.data, args.task, args.mix, exact="mix" in args.typed)
        rows = rows[:args.train_rows]
        if args.val_rows >= len(rows):
            raise ValueError(f"val_rows {args.val_rows}, there are {len(rows)} training rows")
        torch.manual_seed(args.seed)        # a new classification head, what inject draws, dropout
        device = checkpoint.pick_device(args.device)
        dtype = checkpoint.pick_dtype(args.dtype, device, args.model)
        base = lambda: checkpoint.load(args.model, dtype, device, tasks.labels_of(task, args.task))
        model = base()
        tasks.check_kind(model, task)
        tokenizer = text.Tokenizer(args.model, model.cfg)
        examples, cut = text.encode(tokenizer, rows, args.max_len, args.train_on_prompt)
        held = set(order(args.seed, 2**32 - 1, len(rows))[:args.val_rows].tolist())     # no epoch of a run
        held_out = [example for i, example in enumerate(examples) if i in held]
        examples = [example for i, example in enumerate(examples) if i not in held]
        epoch_steps = math.ceil(len(examples) / args.batch_size)
        steps = args.max_steps or math.ceil(round(args.epochs * epoch_steps, 6)) or 1   # 1.1 * 10 is over 11
        reinits = reinit_steps(args.reinit_every, args.reinit_at, steps, epoch_steps)
        # synchronize returns None, so `or` goes on: a GPU's calls return before their work is done.
        clock = lambda: device.type == "cuda" and torch.cuda.synchronize(device) or time.perf_counter()
        began = clock()
        record = adapt(args, method, model)     # injects the method; record: what adapter.json says of it
        inject_seconds = clock() - began
        record["template"] = "prompt" not in rows[0]        # else the prompts are the file's own
        optimizer = make_optimizer(method, args, [p for p in model.parameters() if p.requires_grad])
        now = time.strftime("%Y%m%d-%H%M%S")
        name = f"{Path(args.task).stem}-{Path(args.method).stem}-r{args.rank}-{now}"
        out = run.claim(name, environment(device) | dict(inputs=runs.inputs(args, method, rows, sets)))
        resumed = run.load(model, optimizer, method)        # {} unless --resume goes on from a saved state
    except (ValueError, OSError) as error:
        Parser(prog="train.py").error(error)    # one line, exit 2
    run.agree(model)        # what several processes injected is the same; of one this does nothing
    trainable = describe(args, method, model, examples, cut, steps, epoch_steps)
    summary = dict(task=args.task, method=args.method, rank=args.rank, trainable=trainable, steps=steps,
                   inject_seconds=inject_seconds, reinit_seconds=[])
    summary |= resumed.get("summary", {})
    started = time.perf_counter() - resumed.get("seconds", 0)
    if (args.reinit_every or args.reinit_at) and not reinits:
        print(f"note: {steps} steps end before the first re-initialisation (--reinit_every "
              f"{args.reinit_every}, --reinit_at {args.reinit_at}; an epoch is {epoch_steps} steps)")
    before = args.eval_before and not resumed
    tasks.forecast(task, sets, before, examples, steps * args.batch_size)
    if before:
        summary |= measure("before", args, model, tokenizer, task, sets, run)

    model.checkpointing = args.checkpointing
    if args.compile:
        for block in model.blocks():
            block.compile(dynamic=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    pace = resumed.get("pace", [])          # (tokens, seconds) of each step; of those before a resume, in one
    speed = lambda pace: sum(tokens for tokens, _ in pace) / sum(seconds for _, seconds in pace)
    shuffled = None
    for step in run.steps(steps):           # 1, 2, .. steps; a resumed run goes on where it stopped
        began = time.perf_counter()
        epoch, position = divmod(step - 1, epoch_steps)
        if position == 0 or shuffled is None:
            shuffled = order(args.seed, epoch, len(examples))
        chosen = shuffled[position * args.batch_size:(position + 1) * args.batch_size]
        batch = [examples[i] for i in chosen]
        loss, seen = (run.backward or backward)(model, batch, args.micro_batch_size)    # run's: torchrun
        if hasattr(method, "observe"):      # sees the gradients before they are checked or clipped
            method.observe(model, step, steps)
        # Collected anew every step: reinit may replace parameters in the optimizer's groups.
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        check_finite(model, step, loss, norm.item(), batch)
        if args.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(params, args.grad_clip, norm)
        factor = lr_at(step - 1, steps, args.warmup_steps or round(args.warmup_ratio * steps), args.schedule)
        for group in optimizer.param_groups:        # a method's own optimizer may have a rate for each group
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad()
        if step in reinits:         # the schedule goes on; the method drops what of the optimizer's is stale
            reinit_began = clock()
            method.reinit(model, optimizer)
            summary["reinit_seconds"].append(clock() - reinit_began)
            run.agree(model)        # several processes each did that for themselves
            adapted = sum(hasattr(m, "delta") for m in model.modules())
            print(f"step {step}: re-initialised, {adapted} modules", flush=True)
            if args.compile:        # new shapes add up to dynamo's limit, where it falls back to eager
                torch.compiler.reset()
        pace.append((seen, time.perf_counter() - began))

        if step % args.log_every == 0 or step == steps:
            run.log(dict(step=step, loss=loss, lr=args.lr * factor, grad_norm=norm.item(),
                         tokens_per_second=speed(pace[-args.log_every:]),
                         peak_memory_mb=runs.peak_memory_mb(device)),
                    steps, time.perf_counter() - started, sum(seconds for _, seconds in pace) / step)
        if held_out and (step % (args.eval_every or epoch_steps) == 0 or step == steps):
            validate(model, held_out, step, summary, run, record)
        if step == steps or run.signal or (args.save_steps and step % args.save_steps == 0):
            nll(model, batch)       # FloatingPointError if this step broke the model: the last save stays
            run.write_adapter("adapter", model, record)
            if args.save_steps or run.signal:       # after a signal save does not return: the run ends here
                run.save(model, optimizer, summary=summary, seconds=time.perf_counter() - started,
                         pace=[[sum(column) for column in zip(*pace)]])

    if args.select == "best":               # on a fresh base: inject or reinit may have rewritten this one
        model = optimizer = params = group = block = None   # all that hold weights: two models may not fit
        model, best = base(), out / "adapter-best"
        method, _ = checkpoint.load_adapter(model, best, args.method)
        run.select()                        # adapter-best takes the place of adapter
        summary["selected"] = summary["best"]
        print(f"selected: the adapter of step {summary['best']['step']}, the best on the validation rows")
    summary |= measure("after", args, model, tokenizer, task, sets, run)
    if not run.first:               # of several processes one does the rest
        return
    show(out, sets)
    if absent:
        summary["absent"] = absent
        print(f"not found: {tasks.missing(task, absent)}; the mean is over the others")
    summary |= dict(tokens_per_second=speed(pace), seconds=time.perf_counter() - started)
    write_json(out / "summary.json", summary)
    if args.merge:
        dtype = torch.float32 if device.type == "cpu" else dtype
        dtype = getattr(torch, args.merge_dtype) if args.merge_dtype else dtype
        summary["merge"] = checkpoint.merge(method, model, args.model, dtype, examples[:8])
        checkpoint.save_merged(out / "merged", model, args.model)
        write_json(out / "summary.json", summary)
    plot(out)
    shown = [f"{summary[when]['mean']:.1%}" if summary[when] else "not scored"
             for when in ("before", "after") if when in summary]
    print(f"{tasks.metric_of(task, next(iter(sets)))} {' -> '.join(shown)}  {trainable:,} trainable  "
          f"{summary['seconds']:.0f} s  {out}")


def plot(out):
    """loss.png, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    axes = Figure().subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="training loss")
    axes.figure.savefig(out / "loss.png")


if __name__ == "__main__":
    main()
