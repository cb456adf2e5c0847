"""
Evaluation: the prompt template, batched generation, likelihood of choices, classification. train.py calls it; alone:

    python evaluate.py --model DIR [--adapter DIR] --task boolq --data DIR --limit 100
    python evaluate.py --list                                                               # every task, and its files
"""
import argparse
import importlib
import json
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
from model import Tokenizer, load, pick_device, pick_dtype

# The Alpaca form. LLM-Adapters indents every line after the first by 16 spaces, and not alike in training and
# evaluation; both are left out, since a prompt that ends in spaces is not a token prefix of prompt + answer.
TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
PROMPT = TASK + ". " + REQUEST + "{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = (TASK + ", paired with an input that provides further context. " + REQUEST
                     + "{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
BATCH_TOKENS = 8192     # tokens, pads and room for the answers included, that one forward pass may see
STOP_EVERY = 16         # new tokens between two looks for a task's stop patterns


def prompt_text(row):
    """The one template, for training and evaluation; a row's `prefix` opens the response."""
    return (PROMPT_WITH_INPUT if row.get("input") else PROMPT).format(**row) + row.get("prefix", "")


def shown(row):
    """What a model was given, as the outputs on disk show it."""
    return "\n".join(filter(None, (row["text"], row["pair"]))) if "label" in row else prompt_text(row)


def prompt_ids(tokenizer, row):
    """Prompt and answer are tokenised apart, so the prompt's ids are the same with any answer or none."""
    return tokenizer.bos + tokenizer.encode(prompt_text(row))


def pack(examples, device):
    """
    Examples [(ids, start), ..], supervised from token `start` on, laid end to end for model(ids, lengths, keep).
    -> ids (n,), lengths, keep: where the logits predict a supervised token, labels: those tokens
    """
    ids, keep, labels = [], [], []
    for tokens, start in examples:
        start = max(start, 1)                                   # nothing predicts the first token
        keep += range(len(ids) + start - 1, len(ids) + len(tokens) - 1)
        labels += tokens[start:]
        ids += tokens
    as_tensor = lambda x: torch.tensor(x, device=device)
    return as_tensor(ids), [len(tokens) for tokens, _ in examples], as_tensor(keep), as_tensor(labels)


def batches(sizes, budget):
    """Index lists, longest first (memory peaks in the first), each with count * longest <= budget."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while order:
        count = max(1, budget // max(1, sizes[order[0]]))
        yield order[:count]
        order = order[count:]


def supervised(model, example):
    """What an example is supervised on: its tokens from `start` on, or one label."""
    ids, start = example
    return 1 if hasattr(model, "classifier") else len(ids) - max(start, 1)


def token_losses(model, examples):
    """Cross-entropy (nats) of every supervised token, or label, of the examples [(ids, start or label), ..], in order."""
    device = next(model.parameters()).device
    if hasattr(model, "classifier"):
        logits, labels = classify(model, examples), torch.tensor([label for _, label in examples], device=device)
    else:
        ids, lengths, keep, labels = pack(examples, device)
        logits = model(ids, lengths, keep)
    return F.cross_entropy(logits.float(), labels, reduction="none")


def classify(model, examples):
    """Logits (b, labels) of a classifier; the examples are laid end to end."""
    ids = torch.tensor([token for tokens, _ in examples for token in tokens], device=next(model.parameters()).device)
    return model(ids, [len(tokens) for tokens, _ in examples])


@torch.no_grad()
def predict(model, examples):
    """A classifier's label for each example, and the loss of the right one as nll has it, by one forward pass."""
    labels, losses = [None] * len(examples), [None] * len(examples)
    for chosen in batches([len(ids) for ids, _ in examples], BATCH_TOKENS):
        logits = classify(model, [examples[i] for i in chosen]).float()
        right = torch.tensor([examples[i][1] for i in chosen], device=logits.device)
        parts = F.cross_entropy(logits, right, reduction="none").tolist()
        for i, label, part in zip(chosen, logits.argmax(-1).tolist(), parts):
            labels[i], losses[i] = label, (part, 1)
    return labels, losses


@torch.no_grad()
def nll(model, examples):
    """Negative log-likelihood (nats, summed over what is supervised) and how much that is, for each example."""
    out = [None] * len(examples)
    for chosen in batches([len(ids) for ids, _ in examples], BATCH_TOKENS):
        counts = [supervised(model, examples[i]) for i in chosen]
        for i, part in zip(chosen, token_losses(model, [examples[i] for i in chosen]).split(counts)):
            out[i] = part.sum().item(), len(part)
    return out


def pick(logits, temperature=0.0, top_p=1.0):
    """Next tokens (b,) from logits (b, v): the likeliest, or drawn from the likeliest that hold top_p together."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0                            # the first is always kept
    return order.gather(-1, torch.multinomial(p, 1))[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, vocabulary=None, temperature=0.0, top_p=1.0, finished=None, each=None):
    """
    Continuations, without the EOS, of prompts (lists of ids) -> lists of ids; greedy, or sampled at a temperature.

    Prompts of about one length share a batch, padded on the left; a row stops at any id of eos, or soon after
    finished(i, ids) says so. Logits past `vocabulary` are masked: embeddings are often padded beyond what the
    tokenizer can decode. each(i, ids) is told every row as soon as its batch is done.
    """
    device, out = next(model.parameters()).device, [None] * len(prompts)
    for chosen in batches([len(p) + max_new_tokens for p in prompts], BATCH_TOKENS):
        b, t = len(chosen), max(len(prompts[i]) for i in chosen)
        ids, real = torch.zeros(b, t, dtype=torch.long), torch.ones(b, t + max_new_tokens, dtype=torch.bool)
        for row, i in enumerate(chosen):
            pads = t - len(prompts[i])
            ids[row, pads:], real[row, :pads] = torch.tensor(prompts[i], dtype=torch.long), False
        ids, real, past = ids.to(device), real.to(device), 0
        cache, stopped = model.new_cache(b, t + max_new_tokens), torch.zeros(b, dtype=torch.bool, device=device)
        stop, tokens = torch.tensor(eos, device=device), []
        for _ in range(max_new_tokens):
            now = past + ids.shape[1]
            last = torch.arange(1, b + 1, device=device) * ids.shape[1] - 1
            logits = model(ids, keep=last, real=real[:, :now], cache=cache, past=past)[:, :vocabulary]
            token = pick(logits, temperature, top_p)
            tokens.append(token)
            stopped |= torch.isin(token, stop)
            if finished and len(tokens) % STOP_EVERY == 0:
                texts = torch.stack(tokens, 1).tolist()
                stopped |= torch.tensor([finished(i, text) for i, text in zip(chosen, texts)], device=device)
            if stopped.all():
                break
            ids, past = token[:, None], now
        for i, row in zip(chosen, torch.stack(tokens, 1).tolist()):
            out[i] = row[:next((j for j, token in enumerate(row) if token in eos), None)]
            if each:
                each(i, out[i])
    return out


# ------------------------------------------------------------------------------------ tasks

ROOT = Path(__file__).resolve().parent


def task_files():
    return [importlib.import_module(f"data.{file.stem}") for file in sorted((ROOT / "data").glob("*.py"))
            if "\nTASKS = " in file.read_text(encoding="utf-8")]


def find_task(task):
    """
    A family, one set of it, or a path to a .json / .jsonl -> the task file's module and the names of its test sets.
    ValueError lists what there is.
    """
    modules = task_files()
    for module in modules:
        if task == module.FAMILY and module.TASKS:
            return module, list(module.TASKS)
        if task in module.TASKS:
            return module, [task]
    if task.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        return importlib.import_module("data.own"), [task]
    known = [name for module in modules if module.TASKS for name in (module.FAMILY, *module.TASKS)]
    raise ValueError(f"task {task!r}, expected one of {', '.join(known)}, or a path to a .json or .jsonl file")


def test_rows(module, sets, directory, limit=None):
    """{set: rows} of the sets whose files are there, and the names of the others. ValueError where none is."""
    found, absent = {}, []
    for name in sets:
        try:
            found[name] = module.rows(directory, name, "test")[:limit]
        except FileNotFoundError as error:
            absent.append(name)
            reason = str(error)
    if not found:
        one = len(absent) == 1 and reason + (f"; from {module.TASKS[name]['source']}" if module.TASKS else "")
        raise ValueError(one or f"{directory}: not found: {missing(module, absent)}")
    return found, absent


def check_kind(model, module):
    """ValueError where the task needs another kind of model: a RoBERTa classifier generates nothing."""
    if (module.KIND == "classify") != hasattr(model, "classifier"):
        raise ValueError(f"model_type {model.cfg.model_type!r} does not fit task family {module.FAMILY!r}, "
                         f"whose kind is {module.KIND!r}")


@contextmanager
def eval_mode(model):
    """Dropout off inside, and afterwards as it was."""
    was = model.training
    model.eval()
    yield
    model.train(was)


def example(tokenizer, row, text=None):
    """
    (ids, start) of a row's prompt and its output, closed by EOS; or of its prompt and another text, not closed.
    (ids, label) of a row with a label.
    """
    if "label" in row:
        return tokenizer.pair(row["text"], row["pair"]), row["label"]
    prompt = prompt_ids(tokenizer, row)
    answer = tokenizer.encode(row["output"]) + tokenizer.eos[:1] if text is None else tokenizer.encode(text)
    return prompt + answer, len(prompt)


def read_lines(file):
    """{row: the line} of a file of outputs, as far as it was written."""
    lines, text = {}, file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for line in text.split("\n"):               # not splitlines: an output may hold U+2028
        try:
            line = json.loads(line)
        except ValueError:
            continue                            # empty, or cut off in the middle: generated again
        lines[line["row"]] = line
    return lines


def write_lines(file, lines):
    """Puts {row: line} in the place of what the file held; a key that a line lacks, but had there, it keeps."""
    held, part = read_lines(file), file.with_name(f".{file.name}.part")
    part.write_text("".join(json.dumps(held.get(i, {}) | line, ensure_ascii=False) + "\n" for i, line in lines.items()),
                    encoding="utf-8")
    part.replace(file)


def read_outputs(file, rows):
    """The outputs that an interrupted run left in `file`, None for each row without one. ValueError for other prompts."""
    outputs = [None] * len(rows)
    for i, line in read_lines(file).items():
        if not 0 <= i < len(rows) or line["prompt"] != shown(rows[i]):
            raise ValueError(f"{file}: the output of row {i} is to another prompt than this run's")
        outputs[i] = line["output"]
    return outputs


def complete(model, tokenizer, module, rows, file=None, rule="strict", temperature=0.0, top_p=1.0):
    """An output for each row. Each is appended to `file` as soon as it is there; those that it holds are kept."""
    outputs, right = read_outputs(file, rows) if file else [None] * len(rows), []
    todo = [i for i, output in enumerate(outputs) if output is None]
    if temperature and len(todo) < len(rows):       # not the same draws once more
        torch.manual_seed(torch.initial_seed() + len(rows) - len(todo))
    prompts = [prompt_ids(tokenizer, rows[i]) for i in todo]
    stops = [[re.compile(stop) for stop in row.get("stop", module.STOP)] for row in rows]
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), desc="generate", disable=None, leave=False)
    text = lambda k, ids: tokenizer.continuation(prompts[k], ids, special=module.KIND == "execute")

    def finished(k, ids):
        so_far = text(k, ids)
        return any(stop.search(so_far) for stop in stops[todo[k]])

    def each(k, ids):
        i = todo[k]
        outputs[i] = text(k, ids)
        if dump:
            print(json.dumps(dict(row=i, prompt=shown(rows[i]), output=outputs[i]), ensure_ascii=False), file=dump, flush=True)
        if module.KIND == "generate":               # the accuracy so far
            right.extend(module.score([outputs[i]], [rows[i]], rule)["correct"])
            bar.set_postfix_str(f"accuracy {sum(right) / len(right):.1%}", refresh=False)
        bar.update()

    cut = file and file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
    with open(file, "a", encoding="utf-8") if file else nullcontext() as dump, bar:
        if cut:
            dump.write("\n")
        generate(model, prompts, module.MAX_NEW_TOKENS, tokenizer.eos, tokenizer.size,
                 temperature, top_p, finished if any(stops) else None, each)
    return outputs


def evaluate(model, tokenizer, module, rows, file=None, rule="strict", n=1, temperature=0.0, top_p=1.0, execute=False):
    """
    Every measure of one set: the task's own (accuracy, pass@k, Matthews ..) of n outputs a row; "loss", nats per token of
    the right outputs, EOS included, or per label; with choices "likelihood", the accuracy of the likeliest one.
    Code is run, and so scored, only with `execute`. model None: outputs are those in `file`, and only they are scored.
    Writes one JSON line an output to `file`: row, prompt, output, extracted, answer, correct[, chosen].
    """
    samples, result, chosen = [row for row in rows for _ in range(n)], {}, {}
    if model is None:
        outputs = read_outputs(file, samples)
        if None in outputs:
            raise ValueError(f"{file}: holds {len(outputs) - outputs.count(None)} of {len(outputs)} outputs")
    else:
        with eval_mode(model):
            examples = [example(tokenizer, row) for row in rows]
            if module.KIND == "classify":
                outputs, losses = predict(model, examples)
            else:
                outputs = complete(model, tokenizer, module, samples, file, rule, temperature, top_p)
                losses = nll(model, examples)
            choices = [(i, answer, text) for i, row in enumerate(rows) for answer, text in row.get("choices", {}).items()]
            choice_losses = nll(model, [example(tokenizer, rows[i], text) for i, _, text in choices])
        result["loss"] = sum(total for total, _ in losses) / sum(count for _, count in losses)
        for (i, answer, _), (loss, _) in sorted(zip(choices, choice_losses), key=lambda c: -c[1][0]):
            chosen[i] = answer                                  # the least loss comes last and stays
        if chosen:
            result["likelihood"] = sum(chosen[i] == rows[i]["answer"] for i in chosen) / len(chosen)
    scored = module.score(outputs, samples, rule) if module.KIND != "execute" or execute else {}
    verdicts = zip(scored.pop("extracted"), scored.pop("correct")) if scored else []
    if file is not None:
        lines = {i: dict(row=i, prompt=shown(row), output=output) for i, (row, output) in enumerate(zip(samples, outputs))}
        for i, (extracted, correct) in enumerate(verdicts):
            lines[i] |= dict(extracted=extracted, answer=samples[i].get("answer", samples[i].get("output")), correct=correct)
        for i in lines.keys() & {i * n + j for i in chosen for j in range(n)}:
            lines[i]["chosen"] = chosen[i // n]
        write_lines(file, lines)
    return scored | result


def evaluate_sets(model, tokenizer, module, sets, name_file=lambda name: None, **how):
    """
    {set: rows} -> {measure: {"mean": over the sets, set: value, ..}}, and prints a line a set. "main" is each set's own
    metric, as its task file names it. name_file(set) names the file of a set's outputs; `how` is evaluate's.
    """
    table = {}
    for name, rows in sets.items():
        result = evaluate(model, tokenizer, module, rows, name_file(name), **how)
        if module.KIND == "execute" and not how.get("execute"):
            print(f"{name}: not scored, since that runs generated code: --allow_code_execution, see data/sandbox.py")
        cells = (f"{measure} {value:.4f}" if measure == "loss" else f"{measure} {value:6.1%}"
                 for measure, value in result.items())
        print(f"{Path(name).stem:16}{'  '.join(cells)}  ({len(rows)} rows)", flush=True)
        metric = metric_of(module, name)
        for measure, value in (result | ({"main": result[metric]} if metric in result else {})).items():
            table.setdefault(measure, {})[name] = value
    if hasattr(module, "NOTE"):
        print(f"note: {module.NOTE}")
    return {measure: {"mean": sum(values.values()) / len(values), **values} for measure, values in table.items()}


def metric_of(module, name):
    """The measure that counts for a set: its task file's, or accuracy for a user's own file."""
    return module.TASKS.get(name, {}).get("metric", "accuracy")


def missing(module, names):
    """A line that names the sets that were not found, and where they come from."""
    return "; ".join(f"{name} ({module.TASKS[name]['file']}, from {module.TASKS[name]['source']})" for name in names)


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def list_tasks():
    for module in task_files():
        for name, entry in module.TASKS.items():
            print(f"{module.FAMILY:12} {name:14} {entry['rows']:6} rows  {entry['metric']:9} {entry['file']:32} from {entry['source']}")


def main(argv=None):
    p = Parser(prog="evaluate.py", description=__doc__.split("\n")[1], allow_abbrev=False)
    add, flag = p.add_argument, argparse.BooleanOptionalAction
    add("--list", action="store_true", help="show every task: rows, metric, file under --data, source; and stop")
    add("--model", default=str(ROOT / "data" / "tiny"), help="Hugging Face directory or hub id")
    add("--adapter", help="adapter directory that train.py wrote")
    add("--task", default="arithmetic", help="family, set, or path to a .json / .jsonl")
    add("--data", default=".", help="directory of the data sets")
    add("--limit", type=int, help="rows per set")
    add("--out", help="directory for the outputs, <set>.jsonl; a run that was stopped goes on where the same command left it")
    add("--score_only", action=flag, default=False, help="score the outputs in --out again, without the model")
    add("--rule", default="strict", choices=["strict", "paper"], help="how answers are read off (math); paper: as LLM-Adapters")
    add("--n", type=int, default=1, help="outputs a row, for pass@k")
    add("--temperature", type=float, default=0.0, help="0: greedy")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens that hold this probability")
    add("--allow_code_execution", action=flag, default=False, help="run the generated code, see data/sandbox.py")
    add("--seed", type=int, default=0)
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    add("--device", default="auto")
    args = p.parse_args(argv)
    if args.list:
        return list_tasks()
    for name in ("limit", "n"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}, expected at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        p.error(f"--temperature {args.temperature:g} --top_p {args.top_p:g}, expected 0 or more, and 0 < top_p <= 1")
    if args.n > 1 and args.temperature == 0:
        p.error(f"--n {args.n}: greedy outputs are all the same, give --temperature")
    try:
        module, names = find_task(args.task)
        if args.n > 1 and module.KIND == "classify":
            raise ValueError(f"--n {args.n}: a classifier has one answer")
        sets, absent = test_rows(module, names, args.data, args.limit)
        out = Path(args.out) if args.out else None
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "score_only", "allow_code_execution", "rule", "device")}
        if out and out.exists():
            before = out / "args.json"
            if not before.is_file() or (held := json.loads(before.read_text(encoding="utf-8"))) != settings:
                raise ValueError(f"{out}: exists already, and holds " + (
                    "no run of evaluate.py" if not before.is_file() else "a run with other settings: " + ", ".join(
                        f"{k} {held.get(k)!r}" for k in settings if settings[k] != held.get(k))))
        if args.score_only and not (out and out.exists()):
            raise ValueError(f"--score_only: no outputs in --out {out}")
        if args.score_only and module.KIND == "classify":       # of a family, those that the head fitted
            sets = {name: rows for name, rows in sets.items() if (out / f"{name}.jsonl").exists()}
        model = tokenizer = None
        if not args.score_only:
            device = pick_device(args.device)
            labels = {len(module.TASKS[name]["labels"]) for name in sets} if module.KIND == "classify" else {None}
            model = load(args.model, pick_dtype(args.dtype, device), device, num_labels=labels.pop() if len(labels) == 1 else None)
            check_kind(model, module)
            tokenizer = Tokenizer(args.model, model.cfg)
            if args.adapter:
                checkpoint.load_adapter(model, args.adapter)
            if getattr(model, "fresh_head", False) and not args.adapter:
                print("note: the checkpoint has no classification head, this one is random")
            if module.KIND == "classify":       # a family may need heads of several sizes, and the model has one
                needs = {name: len(module.TASKS[name]["labels"]) for name in sets}
                sets = {name: rows for name, rows in sets.items() if needs[name] == model.cfg.num_labels}
                for name in needs.keys() - sets.keys():
                    print(f"{name} needs a head of {needs[name]} labels, the model's has {model.cfg.num_labels}")
        if out and not out.exists():
            out.mkdir(parents=True)
            checkpoint.write_json(out / "args.json", settings)
        torch.manual_seed(args.seed)
        how = dict(rule=args.rule, n=args.n, temperature=args.temperature, top_p=args.top_p, execute=args.allow_code_execution)
        table = evaluate_sets(model, tokenizer, module, sets, lambda name: out and out / f"{Path(name).stem}.jsonl", **how)
    except (ValueError, OSError) as error:
        p.error(error)
    if absent:
        print(f"not found: {missing(module, absent)}; the mean is over the others")
    if len(sets) > 1:
        print("  ".join(f"mean {'of each own metric' if k == 'main' else k} {v['mean']:.4f}" for k, v in table.items()))


if __name__ == "__main__":
    main()
