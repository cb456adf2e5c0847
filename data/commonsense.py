"""
The eight commonsense sets in LLM-Adapters' format, and their training mix.

    {"instruction": "Please answer the following question with true or false, question: does ethanol take
     more energy make that produces?\n\nAnswer format: true/false", "input": "",
     "output": "the correct answer is false", "answer": "false"}

Source: https://github.com/AGI-Edgerunners/LLM-Adapters at 8166572 (data: ODC-By). Under --data, a file may
lie as commonsense/NAME.json, NAME.json, or as in that repository: dataset/NAME/test.json and
ft-training_set/*.json; .gz too.
Metric: accuracy of the first word of the set's form in the output (case-sensitive, none is wrong), as there.
"""
import re
from collections import Counter
from functools import partial

from data.text import read

FAMILY, KIND, MAX_NEW_TOKENS, STOP = "commonsense", "generate", 32, ()
TASKS = {name: dict(rows=rows, pattern=pattern, metric="accuracy", file=f"commonsense/{name}.json",
                    source=f"LLM-Adapters, dataset/{name}/test.json")
         for name, rows, pattern in (
             ("boolq", 3270, "true|false"), ("piqa", 1838, "solution1|solution2"),
             ("social_i_qa", 1954, "answer[1-5]"), ("hellaswag", 10042, "ending[1-4]"),
             ("winogrande", 1267, "option1|option2"), ("ARC-Easy", 2376, "answer[1-5]"),
             ("ARC-Challenge", 1172, "answer[1-5]"), ("openbookqa", 500, "answer[1-5]"))}
MIXES = ("commonsense_15k", "commonsense_170k", "train_15k_rebuilt")    # --mix, or the first that is there
WORDING = {"boolq": "with true or false",       # where a mix names no source
           "piqa": "choose the correct solution", "hellaswag": "choose the correct ending",
           "winogrande": "fill in the blank"}


def with_choices(row, task):
    """Adds {answer: text of that answer}, read off the instruction's end, 'Answer format: true/false'."""
    answers = row["instruction"].rpartition("format: ")[2].strip().split("/")
    choices = {a: f"the correct answer is {a}" for a in answers}
    return {**row, "pattern": TASKS[task]["pattern"], "choices": choices}


def wrong(task, number, row):
    """What is wrong with a test row's answer, or None."""
    answer, choices = row.get("answer"), list(with_choices(row, task)["choices"])
    if not answer or answer not in choices:         # a list: what is no text may be no key, either
        return f"{task}, test row {number}: answer {answer!r:.60}, expected one of {choices!r:.200}"


def rows(directory, task, split, mixes=MIXES):
    """
    'test': the rows of one set, with choices. 'train': the mix for the family, or one set's own rows of it.
    FileNotFoundError where no file is; ValueError for a bad row, or where the mix has no rows of the set.
    """
    if split == "test":
        names = [TASKS[task]["file"], f"{task}.json", f"dataset/{task}/test.json"]
        return [with_choices(row, task) for row in read(directory, names, wrong=partial(wrong, task))]
    folders = ("commonsense/", "", "ft-training_set/")
    names = [f"{folder}{name}.json" for name in mixes if name for folder in folders]
    found = read(directory, names, mix=mixes[0] or "")
    if task == FAMILY:
        return found
    named = [row for row in found if row.get("source") == task]
    worded = [row for row in found if task in WORDING and WORDING[task] in row["instruction"]]
    if not (named or worded):
        raise ValueError(f"{directory}: the training mix has no row of {task!r}, "
                         "neither by its source nor by its wording")
    return named or worded


def score(outputs, rows, rule="strict"):
    """The first answer of the set's form anywhere in the output: exactly LLM-Adapters' extract_answer."""
    found = [re.search(row["pattern"], output) for output, row in zip(outputs, rows)]
    extracted = [match[0] if match else "" for match in found]
    correct = [e == row["answer"] for e, row in zip(extracted, rows)]
    return dict(accuracy=sum(correct) / len(rows), extracted=extracted, correct=correct,
                majority=max(Counter(row["answer"] for row in rows).values()) / len(rows))
