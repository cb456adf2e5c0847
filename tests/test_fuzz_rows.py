"""
Seeded mutations of the row files of every family but code's and the generated one: a row is read as it was
meant, or refused in one line that names file, row and field. Nothing else is raised, no wrong type passes.
"""
import copy
import gzip
import json
import random

import pytest

import checkpoint
from data import commonsense, glue, math_reasoning, own, text

CASES = 24                      # of each place; seeds 0 ..
NO_TEXT = [None, True, 3, -0.5, float("nan"), float("inf"), 10**400, [], ["a"], {}, {"a": "b"}, [[["a"]]],
           "\ud800", "a\udfffb"]
NUMBERS = {"own": [3, -0.5, 10**400], "own lines": [3, -0.5, 10**400], "number": [3, -0.5]}    # good answers
OTHERS = ("label", "choices", "prefix", "stop", "text", "pair", "task", "pattern", "", "{", "self", "ANSWER")
DAMAGE = [b"", b"\x00", b"\xff", b"1", b"[", b"}", b'"', b"NaN"]


def rows_of(answers, **more):
    return [dict(instruction="Say it.\n\nAnswer format: true/false", input="", output="It is.", answer=answer,
                 **more) for answer in answers]


# module, set, split, file, right rows, more fields that must be texts, what the answer must not be
PLACES = {
    "own": (own, "mine.json", "train", "mine.json", rows_of(["a", "b", 3, 0.5, "-5"]), (), ["", " \n"]),
    "own lines": (own, "mine.jsonl", "test", "mine.jsonl", rows_of("abcdef"), (), ["", " \n"]),
    "choices": (commonsense, "boolq", "test", "commonsense/boolq.json", rows_of(["true", "false"]), (),
                ["maybe", "", " true", "true/false"]),
    "number": (math_reasoning, "SVAMP", "test", "SVAMP.json", rows_of(["3", "-0.5", 7, 2.5]), (),
               ["x", "", "1,000", "3/4", "1e5", "nan", "9" * 400, "5\n"]),
    "letter": (math_reasoning, "AQuA", "test", "dataset/AQuA/test.json", rows_of("ABC"), (),
               ["F", "a", "AB", "A\n", ""]),
    "mix": (commonsense, "boolq", "train", "ft-training_set/commonsense_15k.json",
            rows_of(["true", "false"], source="boolq"), ("source",), None),
    "math mix": (math_reasoning, "gsm8k", "train", "math_10k.json", rows_of("35", source="gsm8k"),
                 ("source",), None),
}


@pytest.fixture(scope="module")
def tok(tiny):
    return text.Tokenizer(tiny, checkpoint.read_config(checkpoint.read_json(tiny / "config.json")))


def mutate(rng, rows, fields, answers, numbers):
    """-> (rows, (row, field) that must be named, or None where all is still right)."""
    rows, number = copy.deepcopy(rows), rng.randrange(len(rows))
    one, field = rows[number], rng.choice(["instruction", "output", "input", *fields])
    kind = rng.choice(["no text"] * 3 + ["answer"] * 2 + ["missing", "no object", "others", "no input"])
    if kind == "no object":
        rows[number] = rng.choice(["a", *(value for value in NO_TEXT if not isinstance(value, dict))])
        return rows, (number, "instruction")
    if kind == "others":
        one.update({name: rng.choice(NO_TEXT) for name in rng.sample(OTHERS, 4)})
        return rows, None
    if kind == "no input":
        del one["input"]
        return rows, None
    if kind == "missing":
        field = rng.choice(["instruction", "output"])
        del one[field]
    elif kind == "answer" and answers:
        field = "answer"
        one[field] = rng.choice(answers + [value for value in NO_TEXT if value not in numbers])
    else:
        one[field] = rng.choice(NO_TEXT)
    return rows, (number, field)


def dump(file, rows):
    lines = [json.dumps(one) for one in rows]
    return ("\n".join(lines) if file.endswith("l") else f"[{', '.join(lines)}]").encode()


def check_usable(module, rows, tok):
    """Fails where a row that was accepted is none in its types, tokens, score or outputs on disk."""
    for one in rows:
        texts = [one.get(name, "") for name in ("instruction", "input", "output", "source")]
        assert all(isinstance(value, str) for value in texts)
        assert set(one) >= {"instruction", "output"} and "label" not in one and text.shown(one).encode()
    examples, _ = text.encode(tok, rows, 512)
    assert all(0 < start < len(ids) for ids, start in examples)
    if module is own or "choices" in rows[0]:
        scored = module.score([one["output"] for one in rows], rows)
        answers = [one.get("answer") for one in rows]
        json.dumps([scored, answers], ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("place", PLACES)
def test_a_mutated_row_is_named_and_a_foreign_field_changes_nothing(place, tok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, name, split, file, rows, fields, answers = PLACES[place]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(dump(file, rows))
    whole, refused = module.rows(tmp_path, name, split), 0
    check_usable(module, whole, tok)
    for seed in range(CASES):
        mutated, bad = mutate(random.Random(seed), rows, fields, answers, NUMBERS.get(place, []))
        (tmp_path / file).write_bytes(dump(file, mutated))
        if bad is None:
            found = module.rows(tmp_path, name, split)
            check_usable(module, found, tok)
            assert text.encode(tok, found, 512) == text.encode(tok, whole, 512), seed
            continue
        with pytest.raises(ValueError) as error:
            module.rows(tmp_path, name, split)
        number, field, said, refused = *bad, str(error.value), refused + 1
        assert f"{file}: " in said and f"row {number + 1}" in said and field in said, (seed, said)
        assert "\n" not in said and len(said.partition(file)[2]) < 400, (seed, said)
    assert refused > CASES // 2


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_refused_in_a_line_or_its_rows_are_rows(place, packed, tok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, name, split, file, rows, _, _ = PLACES[place]
    whole = gzip.compress(dump(file, rows), mtime=0) if packed else dump(file, rows)
    file, refused = tmp_path / (file + ".gz" * packed), 0
    name = file.name if module is own else name
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(CASES):
        rng, data = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(data))
            data[start:start + rng.randint(0, 4)] = rng.choice(DAMAGE)
        file.write_bytes(data)
        try:
            check_usable(module, module.rows(tmp_path, name, split), tok)
        except ValueError as error:
            refused += 1
            said = str(error)
            assert file.name in said or "the training mix has no row of" in said, (seed, said)
            assert "\n" not in said, seed
    assert refused > CASES // 2


def test_mutated_lines_of_glue_are_named(tmp_path):
    lines = ["sentence1\tsentence2\tgold_label", "a b\tc\tneutral", "d\te\tentailment", "f\tg\tneutral"]
    file = tmp_path / "MNLI" / "dev_matched.tsv"
    file.parent.mkdir()
    for seed in range(2 * CASES):
        rng, mutated = random.Random(seed), list(lines)
        place = rng.randrange(4)
        a, b, label = lines[place].split("\t")
        mutated[place] = rng.choice(["", a, f"{a}\t{b}", f"{b}\t{label}", f"{a}\t{b}\t", f"{a}\t{b}\t3",
                                     f"{a}\t{b}\t {label}", f"{a}\t{b}\t{label.upper()}", f"{a} {b} {label}"])
        file.write_text("\n".join([*mutated, ""]), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"MNLI/dev_matched\.tsv: line {place + 1} has [^\n]*$"):
            glue.rows(tmp_path, "mnli", "test")
    file.write_text("\n".join(lines), encoding="utf-8")
    packed, whole = gzip.compress(file.read_bytes(), mtime=0), glue.rows(tmp_path, "mnli", "test")
    file.unlink()
    for seed in range(CASES):
        rng, data = random.Random(seed), bytearray(packed)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.with_name(f"{file.name}.gz").write_bytes(data)
        try:
            assert glue.rows(tmp_path, "mnli", "test") == whole
        except ValueError as error:
            assert "dev_matched.tsv.gz: not UTF-8 text" in str(error)
