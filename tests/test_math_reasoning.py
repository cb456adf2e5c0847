"""Numbers and letters read off outputs by both rules, the seven sets, their training rows."""
import json
import re

import pytest

from data import math_reasoning as task

# output -> strict, paper
NUMBERS = {
    "16-8": (8, -8), "16 - 8 = 8": (8, 8), "x = -8": (-8, -8), "so 5-3": (3, -3), "(2)-5": (5, -5),
    "-5": (-5, -5), "The answer is 8.": (8, 8), "The answer is -8": (-8, -8), "Answer: 3, not 5": (3, 5),
    "The answer is 7 of the 9": (7, 9), "The answer is 3 + 4 = 7. Of 99.": (7, 99),
    "The final answer to the question is 12.0.": (12, 12), "#### 1,234": (1234, 1234),
    "The answer is: 4\n5 apples": (4, 5), "the answer is -.5": (-0.5, 5), "The answer is $x = 4$": (4, 4),
    "The answer is 1. The answer is 2": (2, 2), "He has $1,250.50.": (1250.5, 1250.5), "-$5": (-5, 5),
    "$-5": (-5, -5), "\u22127": (-7, 7), "1234.": (1234, 1234), "1,2": (2, 12),
    "1,234,567": (1234567, 1234567), "12,34": (34, 1234), "50%": (50, 50), "3.0001": (3.0001, 3.0001),
    "The answer is 7 (x = 3 + 4)": (7, 4), "The answer is 8, because 3 + 5 = 9": (8, 9),
    "The answer is 5 apples, where n = 2": (5, 2), "The answer is 3 * 4 = 12 - 2 = 10": (10, 10),
    "no number": (None, None), "": (None, None), "The answer is unknown, about 6": (6, 6),
    "The answer is\n9": (9, 9),
}
LETTERS = {
    "Answer: (B)": ("B", "A"), "The answer is (D).": ("D", "D"), "answer is B because": ("B", "B"),
    "A train goes. (C)": ("C", "A"), "B": ("B", "B"), "B)": ("B", "B"), "The answer is A train": ("", "A"),
    "none": ("", ""), "answer: option C": ("C", "C"), "the answer is\n(B)": ("B", "B"),
    "answer is A.": ("A", "A"), "Each (A) is wrong, so answer (B)": ("B", "E"), "**C**": ("", "C"),
    "\\boxed{B}": ("B", "B"), "The correct option is C": ("C", "C"),
    "The correct answer is **C**": ("C", "C"), "Rationale: Both. The answer is (D).": ("D", "B"),
    "answer would be E": ("E", "E"), "": ("", ""),
}
# what the strict rule reads, and does not: one number each, or None
STRICT_NUMBERS = {
    # fractions, powers of ten, times, dates, powers
    "3/4 left": 0.75, "1/2": 0.5, "-3/4": -0.75, "2 1/2 cups": 2.5, "The answer is 3 / 4.": 0.75, "1/0": None,
    "12 / 4 = 3": 3, "1e5": 100000, "1.5e-3": 0.0015, "1e999": None, "7:30": None,
    "it is 10:30 or 5:15": None,
    "at 7:30 he has 5": 5, "ratio 3:4": None, "1/2/2020": None, "2.5.1": None, "10^3": None, "2^{10}": None,
    "12 cm^2": 12, "The answer is 7:30": None,
    # an equation turned round; one that goes on
    "20 = 4 * 5.": 20, "The answer is 20 = 4 * 5.": 20, "So x = 20 = 4*5": 20, "-20 = 4 * -5": -20,
    "20 = (4 + 1) * 4.": 20, "$20 = $4 × 5": 20, "7 = 10 - 3 apples": 7, "12 = 12 - 20 = 10": 10,
    "3 * 4 = 12 - 2 = 10": 10, "8 - 2 = 9 - 3": 3, "7 = 3 + 4, half of 14": 14, "0.5 = 2/4": 0.5, "5 = 5": 5,
    "20.5 = 20 + 0.5": 20.5,
    # thousands, currencies, percent, units
    "answer: -1,000": -1000, "1{,}234": 1234, "12,345,678 people": 12345678, "€1,200.50": 1200.5, "-£5": -5,
    "Rs.500": 500, "Rs500": 500, "Rs 500": 500, "5%": 5, "5 kg": 5, "5kg": 5, "(-5)": -5, "**5**": 5,
    "_5_": 5,
    # LaTeX
    "\\boxed{1,234}": 1234, "\\boxed{-7}. Check: 3": -7, "so \\boxed{\\frac{3}{4}} of 8": 0.75,
    "\\boxed{\\$18}": 18, "The final answer is $\\boxed{42}$.": 42, "\\boxed{x = 5}": 5, "1,\\!234": 1234,
    "The answer is $-\\dfrac{1}{2}$": -0.5,
    # words that hold a digit; two answers; what follows
    "x2": None, "5 moles of H2O": 5, "The answer is not 5 but 6": 6, "The answer is 5, not 20 = 4 * 5": 5,
    "The answer is 3. No, the answer is 4, I think": 4,
    "The answer is 1/3, which is 0.33": pytest.approx(1 / 3),
}
STRICT_LETTERS = {
    "The answer is A because 3 + 4 = 7": "A", "The answer is B because 3": "B", "answer is A, since": "A",
    "The answer is A which is 5": "A", "The answer is A train": "", "Answer: A bus": "", "A train goes": "",
    "A) 5": "A", "B) 5": "B", "**B) 12**": "B", "A: 5": "A", "C. 12": "C", "D. $7": "D", "A)5": "A",
    "A) 5\nB) 6": "", "E. coli": "", "C. Smith has 5": "", "Each is 5": "", "BAD": "", "ABCDE": "",
    "The answer is Both": "", "A or B": "", "The answer is A or B": "", "The answer is (A) or (B).": "",
    "Options A, B and C are wrong, answer D": "D", "The answer is A. No: the answer is B.": "B",
    "The answer isn't A. It is (B)": "B", "The answer is D) 42 because": "D", "the answer is a": "",
    "\\boxed{\\text{C}}": "C", "\\boxed{(D)}": "D", "\\boxed{B. 5}": "B", "The answer is C and it is 5": "C",
}


@pytest.mark.parametrize("output", STRICT_NUMBERS)
def test_the_strict_rule_reads_one_whole_number(output):
    assert task.number(output) == STRICT_NUMBERS[output]


@pytest.mark.parametrize("output", STRICT_LETTERS)
def test_the_strict_rule_reads_one_stated_letter(output):
    assert task.letter(output) == STRICT_LETTERS[output]


def test_the_paper_rule_reads_what_its_regular_expressions_do():
    for output in (*STRICT_NUMBERS, *STRICT_LETTERS):       # LLM-Adapters' evaluate.py, written out
        found = re.findall(r"-?\d+\.?\d*", output.replace(",", ""))
        assert task.number(output, "paper") == (float(found[-1]) if found else None)
        assert task.letter(output, "paper") == (re.findall("A|B|C|D|E", output) or [""])[0]


@pytest.mark.parametrize("output", NUMBERS)
def test_the_number_of_an_output(output):
    assert (task.number(output), task.number(output, "paper")) == NUMBERS[output]


@pytest.mark.parametrize("output", LETTERS)
def test_the_letter_of_an_output(output):
    assert (task.letter(output), task.letter(output, "paper")) == LETTERS[output]


def test_a_number_is_right_within_a_thousandth_and_a_letter_if_equal():
    rows = [dict(answer=a) for a in ("3.0", "3", "-1.8333333", "2", "2", "B", "B")]
    outputs = ["3.001", "3.0011", "-1.8333", "", "answer is 2", "(B)", "b"]
    got = task.score(outputs, rows)
    assert got["correct"] == [True, False, True, False, True, True, False]
    assert got["accuracy"] == pytest.approx(4 / 7)
    assert got["extracted"] == [3.001, 3.0011, -1.8333, None, 2.0, "B", ""] and "majority" not in got
    assert task.score(["16-8"], [dict(answer="8")], "strict")["correct"] == [True]
    assert task.score(["16-8"], [dict(answer="8")], "paper")["correct"] == [False]


def test_questions_that_a_model_asks_itself_are_not_its_answer():
    """LLM-Adapters cuts at the next "### Response:", and so reads the next question's numbers."""
    output = "The answer is 1.\n\n### Instruction:\nTony has 5 trees.\n\n### Response:\nThe answer is 7."
    got = {rule: task.score([output], [dict(answer="1")], rule)["extracted"] for rule in ("strict", "paper")}
    assert got == {"strict": [1.0], "paper": [5.0]}


def write(directory, name, rows):
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize("name", ["math/SVAMP.json", "SVAMP.json", "dataset/SVAMP/test.json"])
def test_a_set_is_found_in_every_layout_and_its_right_output_is_its_answer(name, tmp_path):
    write(tmp_path, name, [dict(instruction="q", input="", output="\nA: wrong", answer="145.0")])
    assert task.rows(tmp_path, "SVAMP", "test")[0]["output"] == "The answer is 145."
    write(tmp_path, name, [dict(instruction="q", input="", output="", answer=145.0)])   # a number, not a text
    rows = task.rows(tmp_path, "SVAMP", "test")
    assert rows[0]["output"] == "The answer is 145." and task.score(["145"], rows)["accuracy"] == 1
    found = "found none of math/mawps.json, mawps.json, dataset/mawps/test.json"
    with pytest.raises(FileNotFoundError, match=found):
        task.rows(tmp_path, "mawps", "test")


def test_aqua_has_choices_and_a_majority(tmp_path):
    write(tmp_path, "math/AQuA.json", [dict(instruction="q", input="", output="", answer=a) for a in "ABBE"])
    rows = task.rows(tmp_path, "AQuA", "test")
    assert rows[0]["choices"]["C"] == "The answer is (C)." and rows[0]["output"] == rows[0]["choices"]["A"]
    assert task.score(["(B)"] * 4, rows)["majority"] == task.score(["(B)"] * 4, rows)["accuracy"] == 0.5


@pytest.mark.parametrize("name, answer, message", [
    ("SVAMP", "a", "SVAMP, test row 2: answer 'a', expected a number"), ("SVAMP", None, "answer None"),
    ("SVAMP", "9" * 400, "expected a number"), ("SVAMP", True, "answer True"), ("AQuA", ["A"], "answer"),
    ("AQuA", "F", "answer 'F', expected a letter A - E")])
def test_a_bad_answer_is_named(name, answer, message, tmp_path):
    good = "B" if name == "AQuA" else "1"
    write(tmp_path, f"math/{name}.json", [dict(instruction="q", output="", answer=a) for a in (good, answer)])
    with pytest.raises(ValueError, match=message):
        task.rows(tmp_path, name, "test")


def test_one_set_trains_on_its_own_rows_by_source_or_wording(tmp_path):
    sources = (("a", "gsm8k"), ("b", "mawps"), ("c", "mawps-single"), ("d Answer Choices: (A) 1", None))
    rows = [dict(instruction=q, input="", output="o", answer="1", **({"source": s} if s else {}))
            for q, s in sources]
    write(tmp_path, "ft-training_set/math_10k.json", rows)
    train = lambda name: [row["instruction"][0] for row in task.rows(tmp_path, name, "train")]
    trained = [train(name) for name in ("math", "gsm8k", "mawps", "AQuA")]
    assert trained == [list("abcd"), ["a"], ["b", "c"], ["d"]]
    with pytest.raises(ValueError, match="no row of 'SVAMP', neither by its source nor by its wording"):
        train("SVAMP")


def test_the_shared_sets(shared_data):
    sizes = {name: len(task.rows(shared_data, name, "test")) for name in task.TASKS if name != "SVAMP"}
    assert sizes == {name: entry["rows"] for name, entry in task.TASKS.items() if name != "SVAMP"}
    count = lambda name: len(task.rows(shared_data, name, "train"))
    assert (count("math"), count("gsm8k"), count("mawps"), count("AQuA")) == (8402, 7473, 675, 254)
    # the right output is right by either rule, and training outputs are by the strict one
    for name in sizes:
        rows = task.rows(shared_data, name, "test")
        for rule in ("strict", "paper"):
            if (name, rule) != ("AQuA", "paper"):
                assert task.score([row["output"] for row in rows], rows, rule)["accuracy"] == 1
    rows = [row for row in task.rows(shared_data, "math", "train")
            if len(row["answer"]) > 1 or row["answer"] not in "ABCDE"]
    assert task.score([row["output"] for row in rows], rows)["accuracy"] > 0.999


def test_contamination_is_said_where_results_print():
    assert all(name in task.NOTE for name in ("math_10k", "MultiArith", "AddSub", "SingleEq"))
