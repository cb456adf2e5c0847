"""
Seven sets of arithmetic word problems in LLM-Adapters' format, and their training mix.

    {"instruction": "There are 7 crayons in the drawer . Mary took 3 crayons out of the drawer . How many
     crayons are there now ? ", "input": "", "output": "\nA: There were 7 crayons [..] The answer is 4.",
     "answer": "4"}

Source: https://github.com/AGI-Edgerunners/LLM-Adapters at 8166572 (data: ODC-By). Under --data, a file may
lie as math/NAME.json, NAME.json, or as in that repository: dataset/NAME/test.json and
ft-training_set/*.json; .gz too. The outputs of its test rows are a model's, some wrong, some missing: "The
answer is .." with the answer stands for them.
Metric: accuracy of the extracted number (within 0.001) or letter, by one of two rules (--rule):
    strict  a stated final answer ("answer is 4", "#### 4", "\\boxed{4}", "answer: (B)") before the last
            number or (letter); the minus of "16-8" is no sign; "3/4" and "1e5" are one number each, "7:30",
            "x2" and "1/2/2020" none; "20 = 4 * 5" is 20; "A or B" is no letter. For figures of our own.
    paper   LLM-Adapters' evaluate.py, faults included: the last number, where "16-8" gives -8; AQuA's first
            capital A - E anywhere, so that "Answer: (B)" gives A. For figures beside those of the papers.
"""
import math
import re
from collections import Counter
from functools import partial

from data.text import read

FAMILY, KIND, MAX_NEW_TOKENS, STOP = "math", "generate", 256, ()
TASKS = {name: dict(rows=rows, metric="accuracy", file=f"math/{name}.json",
                    source=f"LLM-Adapters, dataset/{name}/test.json")
         for name, rows in (("MultiArith", 600), ("gsm8k", 1319), ("AddSub", 395), ("AQuA", 254),
                            ("SingleEq", 508), ("SVAMP", 1000), ("mawps", 238))}
MIXES = ("math_10k", "math_7k", "train_gsm8k_mawps_aquadev")        # --mix, or the first that is there
SOURCES = {"gsm8k": ("gsm8k",), "mawps": ("mawps", "mawps-single"), "AQuA": ("aqua", "aqua-dev", "AQuA")}
NOTE = ("The published mix math_10k holds questions of MultiArith, AddSub and SingleEq (its authors say so): "
        "scores on these three after training on it are no measure of generalisation.")


def wrong(task, number, row):
    """What is wrong with a test row's answer, or None."""
    answer, lettered = row.get("answer"), task == "AQuA"
    if not re.fullmatch("[A-E]" if lettered else r"-?\d{1,15}(\.\d+)?", str(answer)):
        expected = "a letter A - E" if lettered else "a number"
        return f"{task}, test row {number}: answer {answer!r:.60}, expected {expected}"


def rows(directory, task, split, mixes=MIXES):
    """
    'test': the rows of one set. 'train': the mix for the family, or one set's own rows of it.
    FileNotFoundError where no file is; ValueError for a bad row, or where the mix has no rows of the set.
    """
    if split == "test":
        names = [TASKS[task]["file"], f"{task}.json", f"dataset/{task}/test.json"]
        found = read(directory, names, wrong=partial(wrong, task))
        for row in found:
            answer = row["answer"] = str(row["answer"])
            if task == "AQuA":
                row["choices"] = {letter: f"The answer is ({letter})." for letter in "ABCDE"}
            row["output"] = f"The answer is {f'({answer})' if task == 'AQuA' else f'{float(answer):.10g}'}."
        return found
    folders = ("math/", "", "ft-training_set/")
    names = [f"{folder}{name}.json" for name in mixes if name for folder in folders]
    found = read(directory, names, mix=mixes[0] or "")
    if task == FAMILY:
        return found
    named = [row for row in found if row.get("source") in SOURCES.get(task, (task,))]
    worded = [row for row in found if task == "AQuA" and "Answer Choices: (A)" in row["instruction"]]
    if not (named or worded):
        raise ValueError(f"{directory}: the training mix has no row of {task!r}, "
                         "neither by its source nor by its wording")
    return named or worded


PLAIN = r"(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
# sign, whole part of a mixed number, numerator, denominator, or plain number; none in a word, time or power
NUMBER = re.compile(r"((?<![\w)\]])-)?[$€£₹]?(?:(?<![^\W_])|(?<=\bRs)(?=\d))(?<!\d[.:/])(?<!\^)(?<!\^\{)"
                    r"(?:(?:(\d+) )?(\d+) ?/ ?(\d+)|(" + PLAIN + r"))(?!\d|[.:/]\d|\^\W?\d)")
# "20 = 4 * 5": a number, then what it was computed from
REVERSED = re.compile(r"(?<![\w.+*/×÷-])(?<![+*/×÷-] )(-?" + PLAIN + r") ?=[ ($]*-?" + PLAIN
                      + r"(?:[ ()]*[-+*/×÷][ ($]*-?" + PLAIN + r")+\)*(?!\.?\d| *[-+*/×÷=])")


def numbers(text):
    """The numbers of a text in order."""
    found = []
    for sign, whole, above, below, plain in NUMBER.findall(text):
        if not below or float(below):
            value = float(plain) if plain else float(whole or 0) + float(above) / float(below)
            found.append(-value if sign else value)
    return [value for value in found if math.isfinite(value)]


def number(output, rule="strict"):
    """The number that an output answers with, or None."""
    if rule == "paper":
        found = re.findall(r"-?\d+\.?\d*", output.replace(",", ""))
        return float(found[-1]) if found else None
    text = output.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = REVERSED.sub(r"\1", re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text))
    heads = re.finditer(r"\banswer\b.{0,40}?(?:\bis\b(?! not\b)|:|=)|####|\\boxed\{", text, re.IGNORECASE)
    tails = [text[head.end():].partition("\n")[0] for head in heads]
    if stated := [tail for tail in tails if numbers(tail)]:
        # "is 3 + 4 = 7" and "is x = 7" are 7, "is 7, as 3 + 5 = 8", too
        worked = re.match(r"[\s$\d.+*/()a-z×÷-]*?=(?:[\s$\d.+*/()×÷-]*=)*(.*)", stated[-1])
        plain = worked and not re.match(r"[\s:$]*\d[\d.]*\s*[a-z(]", stated[-1])
        return (numbers(worked[1]) if plain and numbers(worked[1]) else numbers(stated[-1]))[0]
    return (numbers(text) or [None])[-1]


def letter(output, rule="strict"):
    """The letter that an output answers with, or ""."""
    if rule == "paper":
        return next(iter(re.findall("[A-E]", output)), "")
    output = re.sub(r"\(?\b[A-E]\b\)?,?\s+(?:or|and)\s+\(?[A-E]\b\)?", "", output)     # two are none
    article = r"A\s+(?!(?:because|since|as|so|for|and|but|which|due|by)\b)[a-z]"      # "A train"
    stated = (r"(?i:\b(?:answer|option|choice))(?: is| would be| must be)?\W*"
              rf"(?:(?i:option|choice)\W*)?(?!{article})([A-E])\b")
    boxed = r"\\boxed\{(?:\\text\{)?\(?([A-E])\b"
    for form in (boxed, stated, r"\(([A-E])\)", r"(?m:^\s*([A-E])[).:]?\s*$)"):
        if found := re.findall(form, output):
            return found[-1]
    opened = set(re.findall(r"(?m:^\W*([A-E])(?:\)|[.:]\s\W*\d))", output))     # "A) 5", no list of options
    return opened.pop() if len(opened) == 1 else ""


def score(outputs, rows, rule="strict"):
    """rows with a letter for an answer are AQuA's; all others are numbers."""
    extracted, correct = [], []
    for output, row in zip(outputs, rows):
        # what is read: up to the next question, or response, that a model goes on with
        output = output.partition("### Instruction:" if rule == "strict" else "### Response:")[0]
        lettered = row["answer"] in "ABCDE"
        extracted.append((letter if lettered else number)(output, rule))
        correct.append(extracted[-1] == row["answer"] if lettered else
                       extracted[-1] is not None and abs(extracted[-1] - float(row["answer"])) <= 0.001)
    result = dict(accuracy=sum(correct) / len(rows), extracted=extracted, correct=correct)
    if rows and all("choices" in row for row in rows):
        result["majority"] = max(Counter(row["answer"] for row in rows).values()) / len(rows)
    return result
