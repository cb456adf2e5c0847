"""
The bundled default: two-step word problems with worked answers, for a model that was pretrained on one step.

    {"instruction": "Mia has 7 apples. She buys 5 more. She loses 4 of them.
                     How many apples does Mia have now?",
     "input": "", "output": "7 + 5 = 12. 12 - 4 = 8. The answer is 8.", "answer": "8"}

Source: generated here, from seeds; no file is read. All numbers are in 0..20. Whether a problem is training
or held-out is a hash of its numbers and signs, so no chain of operands occurs in both.
Metric: the number after "The answer is" equals the answer.
"""
import random
import re
import zlib

FAMILY, KIND, MAX_NEW_TOKENS, STOP = "arithmetic", "generate", 40, ()
TASKS = {"two_step": dict(rows=256, metric="accuracy", file="generated, no file", source="this file")}
TRAIN_ROWS = 8192

NAMES = {"She": ("Mia", "Anna", "Lena", "Ruth", "Nora", "Ida"),
         "He": ("Tom", "Ben", "Paul", "Max", "Emil", "Jonas")}
THINGS = "apples books coins cards pens shells stamps eggs marbles cookies stones keys".split()
GAINS = ("buys {} more", "finds {} more", "gets {} more", "wins {} more")
LOSSES = ("gives away {} of them", "loses {} of them", "sells {} of them", "drops {} of them")
LARGEST = 20
WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
         "sixteen seventeen eighteen nineteen twenty").split()


def problem(rng, steps, words=0.0):
    """
    One problem of `steps` additions and subtractions -> (row, key that names its numbers and signs).
    Each number of the story is spelled out with probability `words`.
    """
    pronoun = rng.choice(list(NAMES))
    name, thing, total = rng.choice(NAMES[pronoun]), rng.choice(THINGS), rng.randint(2, LARGEST)
    show = lambda n: WORDS[n] if rng.random() < words else str(n)
    story, work, key = f"{name} has {show(total)} {thing}.", "", str(total)
    for _ in range(steps):
        gain = total < 2 or total < LARGEST and rng.random() < 0.5
        n = rng.randint(1, LARGEST - total if gain else total)
        after = total + n if gain else total - n
        story += f" {pronoun} {rng.choice(GAINS if gain else LOSSES).format(show(n))}."
        work += f"{total} {'+' if gain else '-'} {n} = {after}. "
        key, total = f"{key}{'+' if gain else '-'}{n}", after
    return dict(instruction=f"{story} How many {thing} does {name} have now?", input="",
                output=f"{work}The answer is {total}.", answer=str(total)), key


def generate(split, count, steps, seed, words=0.0):
    """`count` distinct problems of one split; an eighth of all chains of operands is held out as 'test'."""
    rng, rows = random.Random(f"{split}-{steps}-{seed}"), {}
    while len(rows) < count:
        row, key = problem(rng, steps, words)
        if (zlib.crc32(key.encode()) % 8 == 0) == (split == "test"):
            rows[row["instruction"]] = row
    return list(rows.values())


def rows(directory, task, split):
    """Rows of 'two_step' (or the family, which is the same); directory is not used."""
    return generate(split, TRAIN_ROWS if split == "train" else TASKS["two_step"]["rows"], steps=2, seed=0)


def extract(output):
    # not of "3/4", "7:30", "1e5", "3.5" or "3 + 4"
    found = re.search(r"The answer is (-?\d+)(?!\w|[.,:/^]\d| ?[-+*/×÷%^] ?\(?\d)", output)
    return found[1] if found else ""


def score(outputs, rows, rule="strict"):
    extracted = [extract(output) for output in outputs]
    correct = [e == row["answer"] for e, row in zip(extracted, rows)]
    return dict(accuracy=sum(correct) / len(rows), extracted=extracted, correct=correct)
