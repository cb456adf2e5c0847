"""
Scores: likelihood, generation, classification, and the outputs on disk. train.py calls it; alone:

    python evaluate.py --model DIR [--adapter DIR] --task boolq --data DIR --limit 100
    python evaluate.py --model DIR [--adapter DIR] --prompt "What is 2 + 3?"    # the answer; no text: asks
    python evaluate.py --list                                       # every task, and its files
"""
import argparse
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
from checkpoint import Parser
from config import check_labels
from data import tasks, text
from decode import batches, generate, stream
from files import check, digest, read_json, write_json
from model import first_non_finite

# ------------------------------------------------------------------------------------ likelihood

@contextmanager
def eval_mode(model):
    """Dropout off inside, and afterwards as it was."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@torch.no_grad()
def nll(model, examples):
    """
    [(nats, count)]: of each example its negative log-likelihood, summed over `count` tokens or labels. In the
    place of an example a list of some with a common beginning, computed once: then a list of such pairs.
    """
    lists, out = [e if isinstance(e, list) else [e] for e in examples], [None] * len(examples)
    for batch in batches([sum(len(ids) for ids, _ in several) for several in lists]):
        with eval_mode(model):
            losses = model.losses([examples[i] for i in batch])
            check_finite(model, losses, [examples[i] for i in batch])
        parts = iter(losses.split([model.supervised(example) for i in batch for example in lists[i]]))
        for i in batch:
            # parts second: zip takes no more of it than lists[i] has
            found = [(part.sum().item(), len(part)) for _, part in zip(lists[i], parts)]
            out[i] = found if isinstance(examples[i], list) else found[0]
    return out


def check_finite(model, losses, examples):
    """FloatingPointError where a loss is no number: it would be a score, and an argmax over NaN an answer."""
    if not losses.isfinite().all():
        raise FloatingPointError("the loss is not finite; the first output that is not is that of "
                                 f"{first_non_finite(model, examples) or 'no module, but of the loss'}")


def mean_loss(losses):
    """Nats per supervised token, or per label, of what nll returns."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


@torch.no_grad()
def predict(model, examples):
    """A classifier's label for each example, and the losses that nll has, by one pass; in eval mode."""
    labels, losses = [None] * len(examples), [None] * len(examples)
    for batch in batches([len(ids) for ids, _ in examples]):
        logits = model.classify([examples[i] for i in batch]).float()
        gold = torch.tensor([examples[i][1] for i in batch], device=logits.device)
        parts = F.cross_entropy(logits, gold, reduction="none")
        check_finite(model, parts, [examples[i] for i in batch])
        for i, label, part in zip(batch, logits.argmax(-1).tolist(), parts.tolist()):
            labels[i], losses[i] = label, (part, 1)
    return labels, losses


def likelihoods(model, tokenizer, rows, room=0):
    """
    nll of the rows' outputs; {row number: the choice whose text has the least loss, summed and not by token}
    where it has any. room: of tokens, left for what is generated, so that prompts are cut alike.
    """
    losses = nll(model, [[text.example(tokenizer, row, words, room) for words in (None, *choices.values())]
                         for row in rows for choices in (row.get("choices", {}),)])     # None: its output
    best = {i: min(zip(found[1:], rows[i]["choices"]))[1] for i, found in enumerate(losses) if found[1:]}
    return [right for right, *_ in losses], best


# ------------------------------------------------------------------------------------ outputs on disk

def read_lines(file):
    """{row: the line} of a file of outputs, as far as it was written. ValueError: a line is none."""
    lines, held = {}, file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for number, line in enumerate(held.split("\n"), 1):         # not splitlines: an output may hold U+2028
        try:
            line = json.loads(line)
        except ValueError:
            continue                            # empty, or cut off in the middle: generated again
        lines[check(line, "outputs", f"{file}: line {number}")["row"]] = line
    return lines


def write_lines(file, lines):
    """Puts {row: line} in the place of what the file held; keys that only the old line has stay."""
    held, part = read_lines(file), file.with_name(f".{file.name}.part")
    lines = [json.dumps(held.get(i, {}) | line, ensure_ascii=False) for i, line in lines.items()]
    part.write_text("\n".join([*lines, ""]), encoding="utf-8")
    part.replace(file)


def append_line(file, line):
    """Adds a line; before it ends one that was cut off in the middle."""
    with open(file, "a+b") as f:
        f.seek(max(0, f.tell() - 1))
        cut = f.read() not in (b"", b"\n")
        f.write(b"\n" * cut + json.dumps(line, ensure_ascii=False).encode() + b"\n")


def read_outputs(file, rows):
    """What a stopped run left in `file`: an output or None for each row. ValueError for other prompts."""
    outputs = [None] * len(rows)
    for i, line in read_lines(file).items():
        if not 0 <= i < len(rows) or line["prompt"] != text.shown(rows[i]):
            raise ValueError(f"{file}: the output of row {i} is to another prompt than this run's")
        if isinstance(line["output"], int) != ("label" in rows[i]):
            raise ValueError(f"{file}: output {line['output']!r} of row {i} is not of this task")
        outputs[i] = line["output"]
    return outputs


def output_lines(samples, outputs, scored, chosen, n):
    """{i: line}: row (i; every n belong to one), prompt, output[, extracted, answer, correct][, chosen]."""
    lines = {}
    for i, (row, output) in enumerate(zip(samples, outputs)):
        line = lines[i] = dict(row=i, prompt=text.shown(row), output=output)
        if scored:
            line |= dict(extracted=scored["extracted"][i], answer=row.get("answer", row.get("output")),
                         correct=scored["correct"][i])
        if i // n in chosen:
            line["chosen"] = chosen[i // n]
    return lines


# ------------------------------------------------------------------------------------ one set, and several

def complete(model, tokenizer, module, rows, file=None, rule="strict", temperature=0.0, top_p=1.0):
    """An output for each row: those that `file` holds, and new ones, which are appended to it one by one."""
    outputs = read_outputs(file, rows) if file else [None] * len(rows)
    todo = [i for i, output in enumerate(outputs) if output is None]
    if temperature and len(todo) < len(rows):       # not the same draws once more
        torch.manual_seed(torch.initial_seed() + len(rows) - len(todo))
    prompts = [text.prompt_ids(tokenizer, rows[i], module.MAX_NEW_TOKENS) for i in todo]    # k-th of todo
    stops = [[re.compile(stop) for stop in rows[i].get("stop", module.STOP)] for i in todo]
    words = lambda k, ids: tokenizer.continuation(prompts[k], ids, special=module.KIND == "execute")
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), desc="generate", disable=None, leave=False)
    right = []

    def finished(k, ids):
        so_far = words(k, ids)
        return any(stop.search(so_far) for stop in stops[k])

    def each(k, ids):
        i = todo[k]
        outputs[i] = words(k, ids)
        if file:
            append_line(file, dict(row=i, prompt=text.shown(rows[i]), output=outputs[i]))
        if module.KIND == "generate":               # the accuracy of this run's outputs so far
            right.extend(module.score([outputs[i]], [rows[i]], rule)["correct"])
            bar.set_postfix_str(f"accuracy {sum(right) / len(right):.1%}", refresh=False)
        bar.update()

    with bar:
        generate(model, prompts, module.MAX_NEW_TOKENS, tokenizer.eos, tokenizer.size, temperature, top_p,
                 finished if any(stops) else None, each)
    return outputs


def ask(model, tokenizer, module, rows, samples, file=None, rule="strict", temperature=0.0, top_p=1.0):
    """An output for each sample; of each row the loss that nll has, and its likeliest choice, or None."""
    with eval_mode(model):
        if module.KIND == "classify":
            labels, losses = predict(model, [text.example(tokenizer, row) for row in rows])
            return labels, losses, [None] * len(rows)
        outputs = complete(model, tokenizer, module, samples, file, rule, temperature, top_p)
        losses, chosen = likelihoods(model, tokenizer, rows, module.MAX_NEW_TOKENS)
        return outputs, losses, [chosen.get(i) for i in range(len(rows))]


def evaluate(model, tokenizer, module, rows, file=None, rule="strict", n=1, temperature=0.0, top_p=1.0,
             execute=False, share=None):
    """
    Every measure of one set: the task's own (accuracy, pass@k, Matthews ..) of n outputs a row; "loss", nats
    per token of the right outputs, EOS included, or per label; with choices "likelihood", the accuracy of the
    likeliest one. Code is run, and so scored, only with `execute`. model None: the outputs in `file` are
    scored, nothing else. Writes output_lines to `file`. share, with n = 1: distributed.py's, of several
    processes each asks the model some of the rows.
    """
    samples, losses, chosen = [row for row in rows for _ in range(n)], None, []
    if model is None:
        outputs = read_outputs(file, samples)
        if None in outputs:
            raise ValueError(f"{file}: holds {len(outputs) - outputs.count(None)} of {len(outputs)} outputs")
        if module.KIND == "classify" and max(outputs) >= len(tasks.labels_of(module, rows[0]["task"])):
            raise ValueError(f"{file}: an output is label {max(outputs)}, which the task has not")
    elif share:
        found = share(lambda some: list(zip(*ask(model, tokenizer, module, some, some))), rows)
        outputs, losses, chosen = map(list, zip(*found))
    else:
        outputs, losses, chosen = ask(model, tokenizer, module, rows, samples, file, rule, temperature, top_p)
    chosen = {i: choice for i, choice in enumerate(chosen) if choice is not None}
    scored = module.score(outputs, samples, rule) if module.KIND != "execute" or execute else {}
    if file is not None:
        write_lines(file, output_lines(samples, outputs, scored, chosen, n))
    result = {measure: value for measure, value in scored.items() if measure not in ("extracted", "correct")}
    if losses:
        result["loss"] = mean_loss(losses)
    if chosen:
        result["likelihood"] = sum(answer == rows[i]["answer"] for i, answer in chosen.items()) / len(chosen)
    return result


def evaluate_sets(model, tokenizer, module, sets, name_file=lambda name: None, **how):
    """
    {set: rows} -> {measure: {"mean": over the sets, set: value, ..}}, and prints a line a set. "main" is each
    set's own metric, as its task file has it. name_file(set): the file of its outputs; `how` is evaluate's.
    """
    table = {}
    for name, rows in sets.items():
        if model and (cut := text.encode(tokenizer, rows, tokenizer.longest, room=module.MAX_NEW_TOKENS)[1]):
            print(f"{name}: {cut} of {len(rows)} rows cut to the model's {tokenizer.longest} positions")
        result = evaluate(model, tokenizer, module, rows, name_file(name), **how)
        if module.KIND == "execute" and not how.get("execute"):
            print(f"{name}: not scored, since that runs generated code: --allow_code_execution (sandbox.py)")
        cells = (f"{measure} {value:.4f}" if measure == "loss" else f"{measure} {value:6.1%}"
                 for measure, value in result.items())
        print(f"{Path(name).stem:16}{'  '.join(cells)}  ({len(rows)} rows)", flush=True)
        if (metric := tasks.metric_of(module, name)) in result:
            result["main"] = result[metric]
        for measure, value in result.items():
            table.setdefault(measure, {})[name] = value
    if hasattr(module, "NOTE"):
        print(f"note: {module.NOTE}")
    tasks.explain(table)
    return {measure: {"mean": sum(v.values()) / len(v), **v} for measure, v in table.items()}


def show(out, sets):
    """Three held-out rows, of as many sets as can be: what was asked, answered, expected, and the verdict."""
    def line(name, words, width=98):            # one printed line; of a long text its beginning and its end
        words = " ".join("".join(c if c.isprintable() else " " for c in str(words)).split())
        words = words if len(words) <= width else f"{words[:width // 2 - 2]} … {words[1 - width // 2:]}"
        print(f"  {name:10}{words}")

    print("held-out rows after training")
    for name, i in [(name, i) for i in range(3) for name in sets if i < len(sets[name])][:3]:
        row, held = sets[name][i], read_lines(out / "eval" / f"{Path(name).stem}.after.jsonl")[i]
        asked = f"{row['instruction']} {row.get('input', '')}" if "instruction" in row else held["prompt"]
        line("prompt", asked)
        line("output", held["extracted"] if isinstance(held["output"], int) else held["output"])
        verdict = {True: "right", False: "wrong"}.get(held.get("correct"), "not scored")
        line("expected", f"{row.get('answer', row.get('output', 'to pass its tests'))} -> {verdict}")


# ------------------------------------------------------------------------------------ command line

def shared_flags(add, score):
    """Flags that train.py has, too; two groups' add_argument."""
    flag = argparse.BooleanOptionalAction
    score("--rule", default="strict", choices=["strict", "paper"], help="of math; paper: as LLM-Adapters")
    score("--allow_code_execution", action=flag, default=False, help="run generated code: data/sandbox.py")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the frozen model")
    add("--device", default="auto", help="auto: a GPU, if there is one")


def parse(argv):
    p = Parser(prog="evaluate.py", description=__doc__.split("\n")[1], allow_abbrev=False)
    group, flag = lambda title: p.add_argument_group(title).add_argument, argparse.BooleanOptionalAction
    add = what = group("what")
    add("--list", action="store_true", help="show every task and training mix, and their sources; and stop")
    add("--model", help="Hugging Face directory or hub id; none: the adapter's, or the bundled one")
    add("--adapter", help="adapter directory that train.py wrote")
    add("--method", help="the adapter's method, where that is a .py file of your own: it is run")
    add("--prompt", nargs="?", const=True, help="print the answer to it; no text: to lines, to an empty one")
    add("--max_new_tokens", type=int, default=128, help="of --prompt; a task has its own")
    add = group("data")
    add("--task", help="family, set, or path to a .json / .jsonl; none: arithmetic, for the bundled model")
    add("--data", default=".", help="directory of the data sets")
    add("--limit", type=int, help="rows per set")
    add = group("output")
    add("--out", help="directory for the outputs, <set>.jsonl; the same command goes on with a stopped run")
    add("--score_only", action=flag, default=False, help="score the outputs in --out again, without a model")
    add = score = group("evaluation")
    add("--n", type=int, default=1, help="outputs a row, for pass@k")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this probability")
    add("--seed", type=int, default=0)
    shared_flags(what, score)
    args = p.parse_args(argv)
    for name, least, most in (("limit", 1, 2**31), ("n", 1, 10**4), ("max_new_tokens", 1, 2**20),
                              ("seed", 0, 2**63 - 1)):
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            p.error(f"--{name} {value}, expected at least {least}, at most {most}")
    if empty := [name for name in ("model", "adapter", "method", "out") if getattr(args, name) == ""]:
        p.error(f"--{empty[0]} '', expected a path")
    if args.prompt is not None and (args.out or args.score_only or args.n > 1):
        p.error("--prompt prints one answer: no --out, --score_only or --n")
    if args.method and not args.adapter:
        p.error("--method is that of an adapter: give --adapter, too")
    if not 0 <= args.temperature <= 1e4 or 0 < args.temperature < 1e-4 or not 0 < args.top_p <= 1:
        p.error(f"--temperature {args.temperature:g} --top_p {args.top_p:g}, "
                "expected 0 or more, and 0 < top_p <= 1; a temperature above 0 from 1e-4 to 1e4")
    if args.n > 1 and args.temperature == 0:
        p.error(f"--n {args.n}: greedy outputs are all the same, give --temperature")
    return args, p


def contents(args, sets):
    """What the names in the settings stand for, as digests. With --score_only a model need not be there."""
    rows = [dict(instruction="i", input=words, output="o", prefix="p") for words in ("", "j")]
    found = {f"content of {name}": digest(rows) for name, rows in sets.items()}
    found["content of the prompt"] = digest(*map(text.prompt_text, rows))
    try:
        found["content of the model"] = digest(*checkpoint.model_files(args.model))
        if args.adapter:
            files = ("adapter.json", "adapter.safetensors")
            found["content of the adapter"] = digest(*(Path(args.adapter, name) for name in files))
    except (ValueError, OSError):
        if not args.score_only:
            raise
    return found


def check_out(out, settings, score_only):
    """ValueError unless `out` is new or holds a run with these settings; --score_only needs such a run."""
    if not out or not out.exists():
        if score_only:
            raise ValueError(f"--score_only: no outputs in --out {out}")
        return
    file = out / "args.json"
    if not file.is_file():
        raise ValueError(f"{out}: exists already, and holds no run of evaluate.py")
    held = read_json(file)
    other = [key for key in settings if settings[key] != held.get(key)]
    other = [key if "content" in key else f"{key} {held.get(key)!r}" for key in other]
    if other:
        raise ValueError(f"{out}: exists already, and holds a run with other settings: {', '.join(other)}")


def load_model(args, module=None, sets=()):
    """-> model with its adapter, tokenizer. A classifier without a head gets one, if one fits all sets."""
    device = checkpoint.pick_device(args.device)
    labels = {tasks.labels_of(module, name) for name in sets}
    if len(labels) > 1:                                         # then a head that fits all, if there is one
        labels = {len(names) for names in labels}
    model = checkpoint.load(args.model, checkpoint.pick_dtype(args.dtype, device, args.model), device,
                            num_labels=labels.pop() if len(labels) == 1 else None)
    for name in sets:                                           # with any of them, for load knows of one
        check_labels(vars(model.cfg), tasks.labels_of(module, name) or ())
    if module:
        tasks.check_kind(model, module)
    elif "generate" not in model.KINDS:
        raise ValueError(f"--prompt: a model of model_type {model.cfg.model_type!r} generates nothing")
    if args.adapter:
        named = checkpoint.load_adapter(model, args.adapter, args.method)[1].get("model") or args.model
        if Path(named).resolve() != Path(args.model).resolve():
            print(f"note: the adapter was trained on {named}")
    elif model.fresh_head:
        print("note: the checkpoint has no classification head, this one is random")
    return model, text.Tokenizer(args.model, model.cfg)


def answer(args):
    """Responds to --prompt; without a text to a line after the other, up to an empty one or none."""
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args)
    record = read_json(Path(args.adapter, "adapter.json")) if args.adapter else {}
    field = "instruction" if record.get("template", True) else "prompt"         # as it was trained
    ask = lambda: input("> " * sys.stdin.isatty())
    try:
        for words in iter(ask, "") if args.prompt is True else [args.prompt]:
            ids = text.prompt_ids(tokenizer, {field: words}, args.max_new_tokens)
            stream(model, tokenizer, ids, args.max_new_tokens, args.temperature, args.top_p)
    except (EOFError, KeyboardInterrupt):
        print(end="\n" * sys.stdin.isatty())


def run(args):
    """Evaluates and prints what the flags say. ValueError or OSError, in one line."""
    if args.model is None:
        args.model = checkpoint.base_of(args.adapter) if args.adapter else str(checkpoint.TINY)
    if args.prompt is not None:
        return answer(args)
    if args.task is None and args.adapter and Path(args.model).resolve() != checkpoint.TINY:
        raise ValueError("--task: not given; --list names them")
    module, args.task, names = tasks.find_task(args.task or "arithmetic")
    if args.n > 1 and module.KIND == "classify":
        raise ValueError(f"--n {args.n}: a classifier has one answer")
    sets, absent = tasks.test_rows(module, names, args.data, args.limit)
    out = Path(args.out) if args.out else None
    may_differ = ("out", "score_only", "allow_code_execution", "rule", "device", "prompt", "max_new_tokens")
    settings = {key: value for key, value in vars(args).items() if key not in may_differ}
    settings |= contents(args, sets) if out else {}
    check_out(out, settings, args.score_only)
    torch.manual_seed(args.seed)        # a head that the checkpoint lacks, sampling
    model = tokenizer = None
    if not args.score_only:
        model, tokenizer = load_model(args, module, sets)
        sets = tasks.fitting(sets, module, getattr(model.cfg, "num_labels", None))
    elif len(sets) > 1 and module.KIND == "classify":       # those whose labels the head had
        sets = {name: rows for name, rows in sets.items() if (out / f"{name}.jsonl").exists()}
    if out and not out.exists():
        out.mkdir(parents=True)
        write_json(out / "args.json", settings)
    name_file = lambda name: out and out / f"{Path(name).stem}.jsonl"
    table = evaluate_sets(model, tokenizer, module, sets, name_file, rule=args.rule, n=args.n,
                          temperature=args.temperature, top_p=args.top_p, execute=args.allow_code_execution)
    if absent:
        print(f"not found: {tasks.missing(module, absent)}; the mean is over the others")
    if len(sets) > 1:
        print("  ".join(f"mean {'of each own metric' if measure == 'main' else measure} {values['mean']:.4f}"
                        for measure, values in table.items()))


def main(argv=None):
    args, p = parse(argv)
    if args.list:
        return tasks.list_tasks()
    try:
        run(args)
    except FloatingPointError as error:
        p.exit(1, f"{p.prog}: {error}\n")
    except (ValueError, OSError) as error:
        p.error(error)


if __name__ == "__main__":
    main()
