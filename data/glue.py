"""
Five GLUE tasks: a sentence or a pair, and a label that an encoder's classification head predicts.

    {"text": "He said so .", "pair": "He did not .", "label": 1, "answer": "not_entailment"}   from a row of
    index\tsentence1\tsentence2\tlabel                                                        glue/rte/dev.tsv

Source: https://gluebenchmark.com/tasks, dev sets (the test labels are not public). Under --data, a file may
lie as glue/rte/dev.tsv or as in GLUE's archives, RTE/dev.tsv; .gz too. MNLI's dev set is the matched one.
Quotes in the text are literal; a byte order mark before the header is dropped.
Metric: Matthews' correlation for CoLA, accuracy for the others, with F1 of the positive class for MRPC, too.
"""
import gzip
import math
import zlib
from collections import Counter
from pathlib import Path

FAMILY, KIND, MAX_NEW_TOKENS, STOP = "glue", "classify", 1, ()
BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TASKS = {name: dict(rows=rows, metric=metric, file=f"glue/{name}/dev.tsv",
                    source=f"GLUE, {archive}/{dev}.tsv", columns=columns, labels=labels,
                    files={"test": (f"glue/{name}/dev.tsv", f"{archive}/{dev}.tsv"),
                           "train": (f"glue/{name}/train.tsv", f"{archive}/train.tsv")})
         for name, rows, metric, archive, dev, columns, labels in (
             ("cola", 1043, "matthews", "CoLA", "dev", (3, None, 1), BINARY),    # places: it has no header
             ("sst2", 872, "accuracy", "SST-2", "dev", ("sentence", None, "label"), BINARY),
             ("mrpc", 408, "accuracy", "MRPC", "dev", ("#1 String", "#2 String", "Quality"), BINARY),
             ("rte", 277, "accuracy", "RTE", "dev", ("sentence1", "sentence2", "label"), ENTAILMENT),
             ("mnli", 9815, "accuracy", "MNLI", "dev_matched", ("sentence1", "sentence2", "gold_label"),
              ("entailment", "neutral", "contradiction")))}


def rows(directory, task, split):
    """
    {"text", "pair" (None for a single sentence), "label" (place in the task's labels), "answer"} for each
    line. FileNotFoundError where no file is; ValueError names the file and line, or a family that cannot be
    trained at once.
    """
    if task == FAMILY:
        raise ValueError(f"GLUE's tasks have a head each: train on one of {', '.join(TASKS)}")
    entry = TASKS[task]
    candidates = [Path(directory, name + end) for name in entry["files"][split] for end in ("", ".gz")]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{directory}: found none of {', '.join(entry['files'][split])} (.gz or not)")
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from None
    lines = [line.split("\t") for line in text.replace("\r\n", "\n").removesuffix("\n").split("\n")]
    places, first = entry["columns"], 1
    if isinstance(places[0], str):
        header, first = lines.pop(0), 2
        if absent := [column for column in places if column and column not in header]:
            raise ValueError(f"{file}: line 1 has no column {absent[0]!r}, found {', '.join(header):.200}")
        places = [column and header.index(column) for column in places]
    found, width = [], max(place for place in places if place is not None) + 1
    for number, line in enumerate(lines, first):
        if len(line) < width:
            raise ValueError(f"{file}: line {number} has {len(line)} columns, expected at least {width}")
        text, pair, answer = (place if place is None else line[place] for place in places)
        if answer not in entry["labels"]:
            raise ValueError(f"{file}: line {number} has label {answer!r}, "
                             f"expected one of {', '.join(entry['labels'])}")
        label = entry["labels"].index(answer)
        found.append(dict(text=text, pair=pair, label=label, answer=answer, task=task))
    if not found:
        raise ValueError(f"{file}: no rows")
    return found


def matthews(predicted, labels):
    """Matthews' correlation of two lists of 0 and 1; 0 where one of them is constant."""
    n, p, l = len(labels), sum(predicted), sum(labels)
    both = sum(a * b for a, b in zip(predicted, labels))
    spread = p * (n - p) * l * (n - l)
    return (n * both - p * l) / math.sqrt(spread) if spread else 0.0


def f1(predicted, labels):
    """F1 of class 1; 0 where neither list has it."""
    both = sum(a * b for a, b in zip(predicted, labels))
    return 2 * both / (sum(predicted) + sum(labels)) if sum(predicted) + sum(labels) else 0.0


def score(outputs, rows, rule="strict"):
    """outputs: the predicted places in the labels."""
    labels, task = [row["label"] for row in rows], rows[0]["task"]
    correct = [o == label for o, label in zip(outputs, labels)]
    result = {"matthews": matthews(outputs, labels)} if task == "cola" else {}
    result["accuracy"] = sum(correct) / len(rows)
    if task == "mrpc":
        result["f1"] = f1(outputs, labels)
    return dict(**result, extracted=[TASKS[task]["labels"][o] for o in outputs], correct=correct,
                majority=max(Counter(labels).values()) / len(rows))
