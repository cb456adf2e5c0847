"""
Evaluation held against the field: log-likelihoods of choices against lm-evaluation-harness's (pip install
lm_eval) with the same prompts; extracted answers against LLM-Adapters' rules, row by row on a run's outputs.

    python experiments/harness.py --model DIR --data DIR [--rows 100]       # ARC-Easy and BoolQ
    python experiments/harness.py --outputs RUN/eval/*.jsonl                # math and commonsense
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from data import commonsense, math_reasoning, tasks, text
from evaluate import nll

ANSWERS = {"boolq": ["true", "false"], "piqa": ["solution1", "solution2"],
           "winogrande": ["option1", "option2"], "hellaswag": ["ending1", "ending2", "ending3", "ending4"]}


def likelihoods(directory, rows):
    """
    [(ours, theirs)], nats, of every choice of the rows. The harness moves the white space that ends a prompt
    to the choice and scores it, too; ours do so here, as tokens of the prompt that are supervised.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model = checkpoint.load(directory)
    tokenizer = text.Tokenizer(directory, model.cfg)
    ours, requests = [], []
    for row in rows:
        prompt = text.prompt_text(row)
        moved = len(tokenizer.encode(prompt)) - len(tokenizer.encode(prompt.rstrip()))
        for words in row["choices"].values():
            ids, start = text.example(tokenizer, row, words)
            ours.append((ids, start - moved))
            requests.append(Instance("loglikelihood", {}, (prompt, words), len(requests)))
    harness = HFLM(str(directory), dtype="float32", device="cpu", batch_size=8,
                   prefix_token_id=tokenizer.eos[0])
    values = harness.loglikelihood(requests)
    return [(-loss, value) for (loss, _), (value, _) in zip(nll(model, ours), values, strict=True)]


def last_number(words):
    """The last of: perhaps a minus, digits, perhaps a point and digits; commas do not count. Or None."""
    words, found, i = words.replace(",", ""), None, 0
    while i < len(words):
        end = i + (words[i] == "-")
        if not words[end:end + 1].isdecimal():
            i += 1
            continue
        while words[end:end + 1].isdecimal() or words[end:end + 1] == "." and "." not in words[i:end]:
            end += 1
        found, i = float(words[i:end]), end
    return found


def theirs(task, output):
    """What LLM-Adapters extracts, of what stands before a further response."""
    words = output.partition("### Response:")[0].strip()
    if task == "AQuA":
        return next((letter for letter in words if letter in "ABCDE"), "")
    if task in math_reasoning.TASKS:
        return last_number(words)
    answers = ANSWERS.get(task, [f"answer{i}" for i in range(1, 6)])
    return min(((words.find(a), a) for a in answers if a in words), default=(0, ""))[1]


def compare(file):
    """The lines of a file of outputs, and (row, ours by rule "paper", theirs) where these are not alike."""
    lines = [json.loads(line) for line in open(file, encoding="utf-8")]
    module, task, _ = tasks.find_task(Path(file).stem.partition(".")[0])
    pattern, outputs = module.TASKS[task].get("pattern"), [line["output"] for line in lines]
    rows = [dict(answer=line["answer"], pattern=pattern) for line in lines]
    pairs = zip(lines, module.score(outputs, rows, "paper")["extracted"], (theirs(task, o) for o in outputs))
    return lines, [(line["row"], ours, other) for line, ours, other in pairs if ours != other]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.strip().partition(":")[0])
    p.add_argument("--model")
    p.add_argument("--data")
    p.add_argument("--rows", type=int, default=100)
    p.add_argument("--outputs", nargs="+", default=[])
    args = p.parse_args()
    for task in ("ARC-Easy", "boolq") if args.model else ():
        pairs = likelihoods(args.model, commonsense.rows(args.data, task, "test")[:args.rows])
        worst = max(abs(a - b) for a, b in pairs)
        print(f"{task}: {len(pairs)} choices, largest difference {worst:.1e} nats")
    for file in args.outputs:
        lines, other = compare(file)
        print(f"{file}: {len(lines)} outputs, {len(other)} extracted otherwise", *other, sep="\n    ")
