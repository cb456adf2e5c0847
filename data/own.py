"""
A user's own file: --task path/to/mine.json (a list) or mine.jsonl (one row a line), either also as .gz.

    {"instruction": "Name the capital of France.", "input": "", "output": "It is Paris.", "answer": "Paris"}
    {"prompt": "Q: What is the capital of France?\\nA:", "completion": " It is Paris.", "answer": "Paris"}

A file's rows have the first form, which the one template makes a prompt of, or the second, whose prompt is
given to the model as it is. Of a row these fields are read, whatever others it has: `instruction`, `output`,
`prompt`, `completion` are texts, `input` is one or missing, `answer` a text or a number or missing. Chats
(`messages`) are refused. A tenth of the rows (at most 1000) is held out, drawn by a fixed seed, so that
train.py and evaluate.py agree.
Metric: with `answer`, the output ends with it, as a whole word or number, in any case, before any closing
. ! ? " ' ) and the marks of **5**, $5$, \\boxed{5}; without, the output equals the row's.
"""
import math
import random
import re

from data.text import read

FAMILY, KIND, MAX_NEW_TOKENS, STOP = "own", "generate", 128, ()
TASKS = {}      # named by their path
CHAT = ("messages", "conversations")


def form(row):
    """The texts that every row of a file has, by its first; none of a chat, which `wrong` refuses."""
    keys = row.keys() if isinstance(row, dict) else ()
    if "instruction" not in keys and "prompt" in keys:
        return "prompt", "completion"
    return () if "instruction" not in keys and any(key in keys for key in CHAT) else ("instruction", "output")


def wrong(number, row):
    """What is wrong with a row, but for its texts, or None."""
    if not form(row):
        return (f'row {number} is a chat; convert it to {{"prompt", "completion"}}: all before the last '
                "answer, as your chat template writes it, and that answer")
    answer = row.get("answer", 0)
    number_or_text = type(answer) in (int, float) and abs(answer) < math.inf or (
        isinstance(answer, str) and answer.strip() and not re.search("[\ud800-\udfff]", answer))
    if not number_or_text:
        return f"row {number}: answer {answer!r:.60}, expected a text or a number"


def rows(directory, task, split):
    """task is the file's path, taken from the working directory; `directory` (--data) is not used."""
    found = read("", [task], form, wrong=wrong)
    fields = ("instruction", "input", "output", "answer")
    if "instruction" not in found[0]:
        fields = ("prompt", "output", "answer")
        found = [row | dict(output=row["completion"]) for row in found]
    found = [{name: row[name] for name in fields if name in row} for row in found]
    if empty := [number for number, row in enumerate(found, 1) if row.get("prompt") == ""]:
        raise ValueError(f"{task}: row {empty[0]}: prompt '', expected a text of at least one character")
    if len(found) < 2:
        raise ValueError(f"{task}: {len(found)} row, expected at least 2: one to train on and one held out")
    random.Random(0).shuffle(found)
    held_out = min(1000, max(1, len(found) // 10))
    return found[:held_out] if split == "test" else found[held_out:]


def score(outputs, rows, rule="strict"):
    extracted, correct = [], []
    for output, row in zip(outputs, rows):
        answer, text = row.get("answer"), output.strip().replace("\u2212", "-")      # the real minus
        if answer is not None:  # "5" does not close "3.5", ".5", "-5", "1,235", "2/5", "7:05"
            escaped = re.escape(str(answer).strip().replace("\u2212", "-"))
            if isinstance(answer, float) and answer.is_integer():
                escaped = rf"{escaped}|{answer:.0f}"            # 4.0 and 4
            before = r"(?<![\w+-])(?<!\w[.,])(?<!\d[/:^])(?<!\d / )(?!(?<=\.)\d)"
            found = re.search(rf"{before}({escaped})[\s.!?\"')}}*$]*$", text, re.IGNORECASE)
            text = found[1] if found else ""
        extracted.append(text)
        correct.append(bool(text) if answer is not None else output.strip() == row["output"].strip())
    return dict(accuracy=sum(correct) / len(rows), extracted=extracted, correct=correct)
