"""experiments/metamath.py on a handful of rows as they are published."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import checkpoint
from data import text

sys.path.insert(0, str(ROOT / "experiments"))
import metamath

METAMATH = [
    {"query": "Gracie and Joe are choosing numbers on the complex plane.", "type": "MATH_AnsAug",
     "original_question": "Gracie and Joe.", "response": "The distance is $4$.\nThe answer is: 4"},
    {"query": "q" * 1000, "type": "GSM_Rephrased", "original_question": "q", "response": "r" * 299},
    {"query": "q" * 1000, "type": "GSM_Rephrased", "original_question": "q", "response": "r" * 300}]
GSM8K = [{"question": "Janet's ducks lay 16 eggs per day.", "answer": "She sells <<16-3-4=9>>9.\n#### 18"},
         {"question": "How much?", "answer": "1 + 1 = 2\n#### 1,234"}]


def test_a_row_has_pefts_prompt_and_those_above_1300_characters_are_left_out():
    first, second = metamath.training_rows(METAMATH)
    assert first == dict(
        prompt="Question: Gracie and Joe are choosing numbers on the complex plane. Think step by step.\n"
               "Answer:", completion="The distance is $4$.\nThe answer is: 4")
    assert len(second["completion"]) == 299             # with the space between, 1,300


@pytest.mark.parametrize("words, want", [
    ("so 9 * 2 = 18. The answer is: 18", 18), ("The answer is: 18.", 18), ("#### 65.33", 65.33),
    ("The answer is: 1. No, the total. The answer is: 2", 2), ("The answer is 20/8", 2.5),
    ("The final answer is: $50%$\n\nQuestion: next", 50), ("#### 1,234", "1,234"),
    ("The answer is: 1/0", "1/0"), ("The answer is: \\frac{1}{2}", "\\frac{1}{2}"), ("18", None), ("", None)])
def test_an_answer_is_read_as_peft_reads_it(words, want):
    assert metamath.answer(words) == want


def test_outputs_are_compared_with_gsm8ks_answers(tiny, monkeypatch):
    model = checkpoint.load(tiny)
    tokenizer = text.Tokenizer(tiny, model.cfg)
    given, asked = ["The answer is: 18.0", "The answer is: 1234"], []

    def generate(model, prompts, room, eos, size):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        assert (room, eos) == (300, tokenizer.eos)
        return [tokenizer.encode(words) for words in given]
    monkeypatch.setattr(metamath, "generate", generate)
    assert metamath.ask(model, tokenizer, GSM8K) == [True, False]       # the comma makes it a text
    assert asked[0] == "Question: Janet's ducks lay 16 eggs per day. Think step by step.\nAnswer:"


def test_the_script_writes_the_rows_and_asks_a_model(tiny, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(METAMATH))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    model = checkpoint.load(tiny)
    checkpoint.load_method("lora").inject(model, ("q_proj",), 2)
    checkpoint.save_adapter(tmp_path / "adapter", model, dict(
        method="lora", targets=["q_proj"], rank=2, alpha=None, dropout=0.0, own={}, model=str(tiny)))
    script = [sys.executable, str(ROOT / "experiments" / "metamath.py")]
    subprocess.run([*script, "--metamath", "m.json"], cwd=tmp_path, check=True)
    lines = (tmp_path / "metamath.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == metamath.training_rows(METAMATH)
    ran = subprocess.run([*script, "--gsm8k", "test.jsonl", "--model", str(tiny), "--adapter", "adapter"],
                         cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == "0 of 2 right: 0.0%\n"
