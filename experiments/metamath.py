"""
The comparison that peft publishes (huggingface/peft, method_comparison/MetaMathQA): Llama-3.2-3B trained on
MetaMathQA, 5,000 steps of 4, then asked GSM8K's 1,319 test questions. Not run.

    python experiments/metamath.py --metamath MetaMathQA-395K.json          # writes metamath.jsonl
    python train.py --method gfa --preset peft-metamath-llama3.2-3b --model meta-llama/Llama-3.2-3B
    python experiments/metamath.py --gsm8k test.jsonl --model meta-llama/Llama-3.2-3B --adapter RUN/adapter

Differs from peft's: rows are shuffled; prompt and answer are tokenised apart; 1,000 rows are held out.
"""
import argparse
import json
import sys
from fractions import Fraction
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from data import text
from decode import generate

PROMPT = "Question: {} Think step by step.\nAnswer:"
MARKS = "The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### "


def training_rows(rows):
    """MetaMathQA's rows as {"prompt", "completion"}; those of more than 1,300 characters are left out."""
    return [dict(prompt=PROMPT.format(row["query"]), completion=row["response"]) for row in rows
            if len(f"{row['query']} {row['response']}") <= 1300]


def answer(words):
    """What follows the last of the first of MARKS that is there: a number, or else text; None without any."""
    words = words.strip().rstrip(".!?")
    if not (there := [mark for mark in MARKS if mark in words]):
        return None
    words = words.rpartition(there[0])[2].strip().split("\n")[0].strip(" .!?$%")
    try:
        return float(Fraction(words))
    except (ValueError, ZeroDivisionError):
        return words


def ask(model, tokenizer, rows):
    """Which of GSM8K's rows {"question", "answer"} are answered right, greedily, within 300 tokens."""
    prompts = [tokenizer.bos + tokenizer.encode(PROMPT.format(row["question"])) for row in rows]
    outputs = generate(model, prompts, 300, tokenizer.eos, tokenizer.size)
    return [answer(tokenizer.continuation(prompt, ids)) == answer(row["answer"])
            for prompt, ids, row in zip(prompts, outputs, rows)]


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    for flag in ("metamath", "gsm8k", "model", "adapter"):
        p.add_argument(f"--{flag}")
    args = p.parse_args()
    if args.metamath:
        lines = map(json.dumps, training_rows(json.loads(Path(args.metamath).read_text(encoding="utf-8"))))
        Path("metamath.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if args.gsm8k:
        model = checkpoint.load(args.model, torch.bfloat16, checkpoint.pick_device("auto"))
        checkpoint.load_adapter(model, args.adapter)
        right = ask(model, text.Tokenizer(args.model, model.cfg), list(map(json.loads, open(args.gsm8k))))
        print(f"{sum(right)} of {len(right)} right: {sum(right) / len(right):.1%}")
