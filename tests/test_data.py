"""The task files: what they generate or read, how they score, which rows they refuse."""
import gzip
import inspect
import json
import math
import re

import pytest

import checkpoint
from data import arithmetic, code_generation, commonsense, math_reasoning, own, text

# ------------------------------------------------------------------------------------ arithmetic

def solve(row):
    """The answer from the story's own words."""
    n = [int(x) for x in re.findall(r"\d+", row["instruction"])]
    verbs = re.findall(r"(?:She|He) (buys|finds|gets|wins|gives|loses|sells|drops)", row["instruction"])
    signs = [1 if v in ("buys", "finds", "gets", "wins") else -1 for v in verbs]
    return n[0] + sum(s * x for s, x in zip(signs, n[1:], strict=True)), len(signs)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_worked_answers_are_right_and_of_the_wanted_length(steps):
    for row in arithmetic.generate("train", 300, steps, 0):
        assert solve(row) == (int(row["answer"]), steps)
        sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", row["output"])
        assert len(sums) == steps and all(eval(f"{a}{o}{b}") == int(c) for a, o, b, c in sums)
        assert all(0 <= int(x) <= 20 for x in re.findall(r"\d+", row["output"]))
        assert row["output"].endswith(f"The answer is {row['answer']}.")


def test_train_and_held_out_share_no_chain_of_operands():
    chains = lambda rows: {tuple(re.findall(r"\d+ [+-] \d+", row["output"])) for row in rows}
    train, test = arithmetic.rows(None, "two_step", "train"), arithmetic.rows(None, "two_step", "test")
    assert len(train) == 8192 and len(test) == 256 == arithmetic.TASKS["two_step"]["rows"]
    assert not chains(train) & chains(test)
    assert train == arithmetic.rows(None, "arithmetic", "train")    # the same every time, and for the family


@pytest.mark.parametrize("output, answer", [
    ("1 + 2 = 3. The answer is 3.", "3"), ("The answer is 3", "3"),
    ("The answer is 3. The answer is 4.", "3"), ("The answer is -3.", "-3"), ("3", ""), ("", ""),
    ("the answer is 3", ""), ("The answer is three", "")])
def test_arithmetic_extraction(output, answer):
    result = arithmetic.score([output], [dict(answer="3")])
    assert result["extracted"] == [answer] and result["correct"] == [answer == "3"]
    assert result["accuracy"] == (answer == "3")


@pytest.mark.parametrize("output, answer", [
    ("The answer is 20 = 4 * 5.", "20"), ("The answer is 7.5", ""), ("The answer is 7, I think", "7"),
    ("The answer is 3/4 left", ""), ("The answer is 7:30", ""), ("The answer is 1e5", ""),
    ("The answer is 1,234.", ""), ("The answer is 3 + 4 = 7.", ""), ("The answer is 3 * (1 + 1)", ""),
    ("The answer is 12kg", ""), ("The answer is 12 kg", "12"), ("The answer is 5%", "5"),
    ("The answer is $5", ""), ("The answer is 5. 5 - 3 = 2.", "5"), ("The answer is 3-1", ""),
    ("The answer is 10^3", ""), ("The answer is not 5", "")])
def test_arithmetic_reads_one_whole_number(output, answer):
    assert arithmetic.extract(output) == answer


# ------------------------------------------------------------------------------------ commonsense

def row(answer, form, **kw):
    return dict(instruction=f"Say it.\n\nAnswer format: {form}", input="",
                output=f"the correct answer is {answer}", answer=answer, **kw)


EXTRACTION = [
    ("boolq", "true/false", "the correct answer is true", "true"),
    ("boolq", "true/false", "false, not true", "false"),            # the first match anywhere
    ("boolq", "true/false", "untrue", "true"),                      # even inside a word, as in the original
    ("boolq", "true/false", "True", ""),                            # case-sensitive
    ("boolq", "true/false", "", ""),
    ("piqa", "solution1/solution2", "solution2 or solution1", "solution2"),
    ("piqa", "solution1/solution2", "solution 1", ""),
    ("social_i_qa", "answer1/answer2/answer3", "answer5 answer1", "answer5"),
    ("ARC-Challenge", "answer1/answer2/answer3/answer4", "answer7 then answer4", "answer4"),
    ("openbookqa", "answer1/answer2/answer3/answer4", "answer12", "answer1"),
    ("hellaswag", "ending1/ending2/ending3/ending4", "ending4.", "ending4"),
    ("winogrande", "option1/option2", "The option2", "option2"),
]


@pytest.mark.parametrize("task, form, output, answer", EXTRACTION)
def test_commonsense_extraction_is_llm_adapters(task, form, output, answer):
    rows = [commonsense.with_choices(row("x", form), task)]
    assert commonsense.score([output], rows)["extracted"] == [answer]


def test_choices_are_read_off_the_instruction():
    got = commonsense.with_choices(row("true", "true/false"), "boolq")["choices"]
    assert got == {"true": "the correct answer is true", "false": "the correct answer is false"}


def test_the_majority_rate():
    answers = ("true", "true", "false", "true")
    rows = [commonsense.with_choices(row(a, "true/false"), "boolq") for a in answers]
    assert commonsense.score([""] * 4, rows)["majority"] == 0.75


def test_the_real_sets_are_whole_and_consistent(shared_data):
    for name, entry in commonsense.TASKS.items():
        try:
            rows = commonsense.rows(shared_data, name, "test")
        except FileNotFoundError:
            assert name == "social_i_qa"
            continue
        assert len(rows) == entry["rows"], name
        assert all(r["choices"].get(r["answer"]) == r["output"] for r in rows), name
        assert commonsense.score([r["output"] for r in rows], rows)["accuracy"] == 1.0


def test_test_rows_must_hold_one_of_their_choices(tmp_path):
    for bad in (row("true", "true/false"), row("maybe", "true/false"),
                dict(row("true", ""), instruction="Is it?")):
        (tmp_path / "boolq.json").write_text(json.dumps([row("true", "true/false"), bad]))
        if bad["answer"] == "true" and "format" in bad["instruction"]:
            commonsense.rows(tmp_path, "boolq", "test")
        else:
            with pytest.raises(ValueError, match="boolq, test row 2: answer '.*', expected one of"):
                commonsense.rows(tmp_path, "boolq", "test")


@pytest.mark.parametrize("answer", [None, 3, ["true"], {"true": "false"}, "", float("nan")])
def test_an_answer_that_is_no_text_is_named_with_file_and_row(answer, tmp_path):
    (tmp_path / "boolq.json").write_text(json.dumps([row("true", "true/false"), row(answer, "true/")]))
    with pytest.raises(ValueError, match=r"/boolq\.json: boolq, test row 2: answer .*, expected one of"):
        commonsense.rows(tmp_path, "boolq", "test")


def test_fields_that_only_task_files_add_are_not_read_from_a_file(tmp_path):
    others = dict(label=1, choices=3, prefix=None, stop=[], text="a", pair=None)
    rows = [row("true", "true/false", source="boolq") for _ in range(2)]
    (tmp_path / "commonsense_15k.json").write_text(json.dumps([rows[0], rows[1] | others]))
    assert commonsense.rows(tmp_path, "boolq", "train") == rows
    (tmp_path / "commonsense_15k.json").write_text(json.dumps([rows[0], rows[1] | dict(source=None)]))
    with pytest.raises(ValueError, match=r"commonsense_15k\.json: row 2 has no text in 'source', found None"):
        commonsense.rows(tmp_path, "boolq", "train")


def test_training_rows_of_one_set_come_by_source_or_by_wording(shared_data):
    mix = commonsense.rows(shared_data, "commonsense", "train")
    assert len(mix) == 15000
    for name, by in commonsense.WORDING.items():
        assert [r for r in mix if r["source"] == name] == [r for r in mix if by in r["instruction"]]
        assert commonsense.rows(shared_data, name, "train") == [r for r in mix if r["source"] == name]
    assert len(commonsense.rows(shared_data, "ARC-Easy", "train")) == 198


def test_a_mix_that_names_no_source(tmp_path):
    """The published commonsense_15k.json has four fields: ARC-Easy's rows look like OpenBookQA's."""
    (tmp_path / "ft-training_set").mkdir()
    rows = [row("true", "true/false"), row("answer1", "answer1/answer2")]
    rows[0]["instruction"] = "Please answer the following question with true or false, question: is it?"
    (tmp_path / "ft-training_set" / "commonsense_15k.json").write_text(json.dumps(rows))
    assert commonsense.rows(tmp_path, "commonsense", "train") == rows
    assert commonsense.rows(tmp_path, "boolq", "train") == rows[:1]
    with pytest.raises(ValueError, match="no row of 'ARC-Easy', neither by its source nor by its wording"):
        commonsense.rows(tmp_path, "ARC-Easy", "train")


@pytest.mark.parametrize("place", ["commonsense/boolq.json", "commonsense/boolq.json.gz", "boolq.json",
                                   "dataset/boolq/test.json"])
def test_places_where_a_set_may_lie(place, tmp_path):
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps([row("true", "true/false")]).encode()
    file.write_bytes(gzip.compress(data) if place.endswith(".gz") else data)
    assert commonsense.rows(tmp_path, "boolq", "test")[0]["answer"] == "true"


# ------------------------------------------------------------------------------------ a user's own file

def write(path, rows):
    if ".jsonl" in path.name:
        text = "\n".join(json.dumps(r) for r in rows) + "\n\n"
    else:
        text = json.dumps(rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else b"\xef\xbb\xbf" + data)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_own_rows_are_split_once_and_for_all(name, tmp_path):
    rows = [dict(instruction=str(i), output=str(i)) for i in range(25)]
    write(tmp_path / name, rows)
    task = str(tmp_path / name)
    test, train = own.rows("elsewhere", task, "test"), own.rows(None, task, "train")
    assert len(test) == 2 and sorted(test + train, key=lambda r: int(r["output"])) == rows
    assert test == own.rows(None, task, "test") != rows[:2]


def test_own_rows_are_read_for_four_fields_alone(tmp_path):
    rows = [dict(instruction=str(i), input="", output="b", answer=i / 2) for i in range(20)]
    other = dict(label=3, choices=["a"], prefix=None, stop=3, text=[], pair={}, source=None)
    others = [dict(other) for _ in rows]
    others[3] |= dict(prefix="x", label="y")
    write(tmp_path / "a.json", rows)
    write(tmp_path / "b.json", [other | row for row, other in zip(rows, others)])
    for split in ("train", "test"):
        a, b = (own.rows(None, str(tmp_path / name), split) for name in ("a.json", "b.json"))
        assert a == b


@pytest.mark.parametrize("output, answer, correct", [
    ("It is Paris.", "Paris", True), ("it is PARIS!", "Paris", True), ("Paris is it", "Paris", False),
    ("17", "7", False), ("x = 7", "7", True), ("a+b", "a+b", True), ("", "7", False), ("3.5", "5", False),
    ("-5", "5", False), ("1,200", "200", False), ("C++", "C", False), ("It is 0.", 0, True),
    ("is (7).", "7", True), ("So:7", "7", True)])
def test_own_answers_close_the_output(output, answer, correct):
    assert own.score([output], [dict(answer=answer, output="x")])["correct"] == [correct]


@pytest.mark.parametrize("output, answer, correct", [
    ("3/4", "4", False), ("It is 3 / 4.", "4", False), ("3/4", "3/4", True), ("7:30", "30", False),
    ("1e5", "5", False), (".5", "5", False), ("It is .5", "5", False), ("0.5", ".5", False),
    ("2^5", "5", False),
    ("is \u22125", "5", False), ("is \u22125", "-5", True), ("is -5", -5, True), ("10-5", "-5", False),
    ("It costs $5", "5", True), ("5%", "5", False), ("5 kg", "5", False), ("5 kg.", "5 kg", True),
    ("\\boxed{12}", "12", True), ("so $x = 12$.", 12, True), ("It is **Paris**.", "Paris", True),
    ("Neuparis", "Paris", False), ("new-paris", "Paris", False), ("Paris, Texas", "Paris", False),
    ("4", 4.0, True), ("4.0", 4.0, True), ("4.05", 4.0, False), ("14", 4.0, False), ("0.25", 0.25, True),
    ("The year ended.Paris", "Paris", False), ("... Paris", "Paris", True)])
def test_own_answers_are_whole_words_and_numbers(output, answer, correct):
    assert own.score([output], [dict(answer=answer, output="x")])["correct"] == [correct]


def test_without_an_answer_the_output_must_be_equal():
    assert own.score([" a b\n", "a  b"], [dict(output="a b")] * 2)["correct"] == [True, False]


def test_rows_of_prompt_and_completion_are_used_as_they_are(tmp_path, tiny):
    rows = [dict(prompt=f"Q: {i} \n\nA:", completion=f" {i}.", other=1) for i in range(20)]
    rows[3] |= dict(answer=3, instruction="no", output="no", input="no")
    write(tmp_path / "a.jsonl", rows)
    task = str(tmp_path / "a.jsonl")
    test, train = own.rows(None, task, "test"), own.rows(None, task, "train")
    found = sorted(test + train, key=lambda row: int(row["output"][1:-1]))
    assert found == [dict(prompt=row["prompt"], output=row["completion"])
                     | (dict(answer=3) if "answer" in row else {}) for row in rows]
    tok = text.Tokenizer(tiny, checkpoint.read_config(checkpoint.read_json(tiny / "config.json")))
    (ids, start), = text.encode(tok, found[:1], 512)[0]
    assert tok.decode(ids[:start]) == text.shown(found[0]) == rows[0]["prompt"]
    assert tok.decode(ids[start:-1]) == " 0." and ids[-1] in tok.eos
    assert own.score([" 0.", "0.", "1."], [found[0], found[0], found[3]])["correct"] == [True, True, False]


BAD = {
    "no output": ([dict(instruction="a", output="b"), dict(instruction="a")],
                  r"row 2 has no text in 'output'"),
    "no instruction": ([dict(output="b")], r"row 1 has no text in 'instruction'"),
    "not text": ([dict(instruction=3, output="b")], r"row 1 has no text in 'instruction'"),
    "not an object": (["a"], r"row 1 has no text in 'instruction'"),
    "input NaN": ([dict(instruction="a", output="b", input=math.nan)],
                  r"row 1 has no text in 'input', found nan, expected texts in instruction, output"),
    "input a number": ([dict(instruction="a", output="b", input=5)], r"row 1 .* 'input', found 5"),
    "input a list": ([dict(instruction="a", output="b", input=["c"])], r"row 1 .* 'input', found \['c'\]"),
    "input null": ([dict(instruction="a", output="b", input=None)], r"row 1 .* 'input', found None"),
    "half a letter": ([dict(instruction="a\ud800", output="b")], r"row 1 .* 'instruction', found 'a"),
    "answer null": ([dict(instruction="a", output="b", answer=None)],
                    r"row 1: answer None, expected a text or a number"),
    "answer NaN": ([dict(instruction="a", output="b", answer=math.nan)], r"row 1: answer nan, expected"),
    "answer a truth": ([dict(instruction="a", output="b", answer=True)], r"row 1: answer True, expected"),
    "answer a list": ([dict(instruction="a", output="b", answer=["c"])], r"row 1: answer \['c'\], expected"),
    "answer blank": ([dict(instruction="a", output="b", answer=" ")], r"row 1: answer ' ', expected a text"),
    "empty": ([], r"expected a list of rows, found none"),
    "one row": ([dict(instruction="a", output="b")], r"1 row, expected at least 2"),
    "a chat": ([dict(messages=[dict(role="user", content="a")])] * 2,
               r'row 1 is a chat; convert it to {"prompt", "completion"}: '),
    "another chat": ([dict(conversations=[])] * 2, r"row 1 is a chat; convert it to "),
    "a chat among others": ([dict(instruction="a", output="b"), dict(messages=[])],
                            r"row 2 has no text in 'instruction', found {'messages'"),
    "no completion": ([dict(prompt="a", completion="b"), dict(prompt="a")],
                      r"row 2 has no text in 'completion', found .*, expected texts in prompt, completion"),
    "two forms": ([dict(prompt="a", completion="b"), dict(instruction="a", output="b")],
                  r"row 2 has no text in 'prompt'"),
    "empty prompt": ([dict(prompt="a", completion="b"), dict(prompt="", completion="b")],
                     r"row 2: prompt '', expected a text of at least one character"),
    "prompt and answer null": ([dict(prompt="a", completion="b", answer=None)],
                               r"row 1: answer None, expected a text or a number"),
    "an object": (dict(instruction="a", output="b"), r"expected a list of rows, found dict"),
}


@pytest.mark.parametrize("name", BAD)
def test_own_rows_that_are_refused(name, tmp_path):
    rows, message = BAD[name]
    write(tmp_path / "a.json", rows)
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        own.rows(None, str(tmp_path / "a.json"), "train")


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b"[{]", r"a\.json: not JSON \(.*line 1"),
    ("a.jsonl", b"{}\n\n{,", r"a\.jsonl: not JSON \(.*line 2"),
    ("a.json.gz", gzip.compress(b"[{}]")[:12] + b"\xff" * 9, r"a\.json\.gz: not JSON"),
    ("a.json", b"\xff\xfe", r"a\.json: not JSON"), ("a.json.gz", b"nothing", r"a\.json\.gz: not JSON")])
def test_own_files_that_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        own.rows(None, str(tmp_path / name), "train")
    with pytest.raises(FileNotFoundError, match=rf"^no such file: found none of {tmp_path}/b\.json \("):
        own.rows(None, str(tmp_path / "b.json"), "train")
    with pytest.raises(FileNotFoundError, match=r"found none of .*b\.json"):
        own.rows(None, str(tmp_path / "b.json"), "train")


def test_task_files_read_alike_to_the_letter():
    modules = (own, commonsense, math_reasoning, code_generation)
    assert len({inspect.getsource(module.read) for module in modules}) == 1
