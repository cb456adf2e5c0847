"""
A user's own file: --task path/to/mine.json (a list) or mine.jsonl (one row a line), either also as .gz.

    {"instruction": "Name the capital of France.", "input": "", "output": "It is Paris.", "answer": "Paris"}

A tenth of the rows (at most 1000) is held out, drawn by a fixed seed, so that train.py and evaluate.py agree on it.
Metric: with `answer`, the output ends with it, as a whole word or number, in any case, before any closing . ! ? " ' );
without, the output equals the row's.
"""
import gzip
import json
import random
import re
from pathlib import Path

FAMILY, KIND, MAX_NEW_TOKENS, STOP = "own", "generate", 128, ()
TASKS = {}      # named by their path


def read(directory, names, fields=("instruction", "output")):
    """Rows of the first of these files under directory, .gz or not. ValueError names file, row and field."""
    candidates = [Path(directory or ".", name + end) for name in names for end in ("", ".gz")]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{directory}: found none of {', '.join(names)} (.gz or not)")
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8-sig")
        if ".jsonl" in file.suffixes:       # as a list with a row a line, so that an error names the line
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        rows = json.loads(text)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: expected a list of rows, found {type(rows).__name__ if rows else 'none'}")
    for number, row in enumerate(rows, 1):
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(f"{file}: row {number} has no text in {field!r}, expected {', '.join(fields)}")
    return rows


def rows(directory, task, split):
    """task is the file's path, taken from the working directory; `directory` (--data) is not used."""
    found = read("", [task])
    if len(found) < 2:
        raise ValueError(f"{task}: {len(found)} row, expected at least 2: one to train on and one held out")
    random.Random(0).shuffle(found)
    held_out = min(1000, max(1, len(found) // 10))
    return found[:held_out] if split == "test" else found[held_out:]


def score(outputs, rows, rule="strict"):
    extracted, correct = [], []
    for output, row in zip(outputs, rows):
        answer, text = row.get("answer"), output.strip()
        if answer is not None:      # "5" does not close "3.5", "-5" or "1,235"; a closing . or ! does not matter
            escaped = re.escape(str(answer).strip())
            found = re.search(rf"(?<![\w+-])(?<!\w[.,])({escaped})[\s.!?\"')]*$", text, re.IGNORECASE)
            text = found[1] if found else ""
        extracted.append(text)
        correct.append(bool(text) if answer is not None else text == row["output"].strip())
    return dict(accuracy=sum(correct) / len(rows), extracted=extracted, correct=correct)
