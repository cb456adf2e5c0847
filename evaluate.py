"""
Evaluation: the prompt template, batched greedy generation, likelihood of choices. train.py calls it; it runs alone, too.

    python evaluate.py --model DIR [--adapter DIR] --task boolq --data DIR --limit 100
"""
import argparse
import importlib
import json
from contextlib import contextmanager
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


def prompt_text(row):
    """The one template, for training and evaluation."""
    return (PROMPT_WITH_INPUT if row.get("input") else PROMPT).format(**row)


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


@torch.no_grad()
def nll(model, examples):
    """Negative log-likelihood (nats, summed over the supervised tokens) and their number, for each (ids, start)."""
    device, out = next(model.parameters()).device, [None] * len(examples)
    for chosen in batches([len(ids) for ids, _ in examples], BATCH_TOKENS):
        ids, lengths, keep, labels = pack([examples[i] for i in chosen], device)
        losses = F.cross_entropy(model(ids, lengths, keep).float(), labels, reduction="none")
        counts = [len(examples[i][0]) - max(examples[i][1], 1) for i in chosen]
        for i, part in zip(chosen, losses.split(counts)):
            out[i] = part.sum().item(), len(part)
    return out


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, vocabulary=None, progress=False):
    """
    Greedy continuations, without the EOS, of prompts (lists of ids) -> lists of ids.

    Prompts of about one length share a batch, padded on the left; a row stops at any id of eos.
    Logits past `vocabulary` are masked: embeddings are often padded beyond what the tokenizer can decode.
    """
    device, out = next(model.parameters()).device, [None] * len(prompts)
    bar = tqdm(total=len(prompts), desc="generate", disable=None if progress else True, leave=False)
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
            token = model(ids, keep=last, real=real[:, :now], cache=cache, past=past)[:, :vocabulary].argmax(-1)
            tokens.append(token)
            stopped |= torch.isin(token, stop)
            if stopped.all():
                break
            ids, past = token[:, None], now
        for i, row in zip(chosen, torch.stack(tokens, 1).tolist()):
            out[i] = row[:next((j for j, token in enumerate(row) if token in eos), None)]
        bar.update(b)
    bar.close()
    return out


# ------------------------------------------------------------------------------------ tasks

ROOT = Path(__file__).resolve().parent


def find_task(task):
    """
    A family, one set of it, or a path to a .json / .jsonl -> the task file's module and the names of its test sets.
    ValueError lists what there is.
    """
    modules = [importlib.import_module(f"data.{file.stem}") for file in sorted((ROOT / "data").glob("*.py"))
               if "\nTASKS = " in file.read_text(encoding="utf-8")]
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
        raise ValueError(reason)
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
    """(ids, start) of a row's prompt and its output, closed by EOS; or of its prompt and another text, not closed."""
    prompt = prompt_ids(tokenizer, row)
    answer = tokenizer.encode(row["output"]) + tokenizer.eos[:1] if text is None else tokenizer.encode(text)
    return prompt + answer, len(prompt)


def evaluate(model, tokenizer, module, rows, file=None):
    """
    Every measure of one set, {"accuracy", "loss"[, "likelihood", "majority"]}: accuracy by generation; nats per token
    of the right outputs, EOS included; accuracy of the likeliest choice, and of always saying the commonest answer.
    Writes one JSON line a row to `file`: prompt, output, extracted, answer, correct[, chosen].
    """
    with eval_mode(model):
        new = generate(model, [prompt_ids(tokenizer, row) for row in rows], module.MAX_NEW_TOKENS, tokenizer.eos,
                       tokenizer.size, progress=True)
        outputs = [tokenizer.decode(ids) for ids in new]
        losses = nll(model, [example(tokenizer, row) for row in rows])
        choices = [(i, answer, text) for i, row in enumerate(rows) for answer, text in row.get("choices", {}).items()]
        choice_losses = nll(model, [example(tokenizer, rows[i], text) for i, _, text in choices])
    result = module.score(outputs, rows)
    extracted, correct = result.pop("extracted"), result.pop("correct")
    result["loss"] = sum(total for total, _ in losses) / sum(count for _, count in losses)
    chosen = {}
    for (i, answer, _), (loss, _) in sorted(zip(choices, choice_losses), key=lambda c: -c[1][0]):
        chosen[i] = answer                                      # the least loss comes last and stays
    if chosen:
        result["likelihood"] = sum(chosen[i] == rows[i]["answer"] for i in chosen) / len(chosen)
    if file is not None:
        with open(file, "w", encoding="utf-8") as f:
            for i, row in enumerate(rows):
                line = dict(prompt=prompt_text(row), output=outputs[i], extracted=extracted[i],
                            answer=row.get("answer", row["output"]), correct=correct[i])
                f.write(json.dumps(line | ({"chosen": chosen[i]} if i in chosen else {}), ensure_ascii=False) + "\n")
    return result


def evaluate_sets(model, tokenizer, module, sets, name_file=lambda name: None):
    """
    {set: rows} -> {measure: {"mean": over the sets, set: value, ..}}, and prints a line a set.
    name_file(set) names the file of a set's examples.
    """
    table = {}
    for name, rows in sets.items():
        result = evaluate(model, tokenizer, module, rows, name_file(name))
        cells = (f"{measure} {value:.4f}" if measure == "loss" else f"{measure} {value:6.1%}"
                 for measure, value in result.items())
        print(f"{Path(name).stem:16}{'  '.join(cells)}  ({len(rows)} rows)", flush=True)
        for measure, value in result.items():
            table.setdefault(measure, {})[name] = value
    return {measure: {"mean": sum(values.values()) / len(values), **values} for measure, values in table.items()}


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None):
    p = Parser(prog="evaluate.py", description=__doc__.split("\n")[1], allow_abbrev=False)
    p.add_argument("--model", default=str(ROOT / "data" / "tiny"), help="Hugging Face directory or hub id")
    p.add_argument("--adapter", help="adapter directory that train.py wrote")
    p.add_argument("--task", default="arithmetic", help="family, set, or path to a .json / .jsonl")
    p.add_argument("--data", default=".", help="directory of the data sets")
    p.add_argument("--limit", type=int, help="rows per set")
    p.add_argument("--out", help="directory for the examples, <set>.jsonl; must not exist")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--device", default="auto")
    args = p.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        p.error(f"--limit {args.limit}, expected at least 1")
    try:
        module, names = find_task(args.task)
        sets, absent = test_rows(module, names, args.data, args.limit)
        out = Path(args.out) if args.out else None
        if out and out.exists():
            raise ValueError(f"{out}: exists already")
        device = pick_device(args.device)
        model = load(args.model, pick_dtype(args.dtype, device), device)
        check_kind(model, module)
        tokenizer = Tokenizer(args.model, model.cfg)
        if args.adapter:
            checkpoint.load_adapter(model, args.adapter)
    except (ValueError, OSError) as error:
        p.error(error)
    if out:
        out.mkdir(parents=True)
    table = evaluate_sets(model, tokenizer, module, sets, lambda name: out and out / f"{Path(name).stem}.jsonl")
    if absent:
        print(f"not found: {', '.join(absent)}; the mean is over the others")
    if len(sets) > 1:
        print("  ".join(f"mean {k} {v['mean']:.4f}" for k, v in table.items()))


if __name__ == "__main__":
    main()
