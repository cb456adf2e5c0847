"""experiments/harness.py: LLM-Adapters' rules on texts; transformers in the place of lm_eval."""
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT

from data import commonsense

sys.path.insert(0, str(ROOT / "experiments"))
import harness


@pytest.mark.parametrize("words, want", [
    ("16-8 = 8", 8), ("16-8", -8), ("costs $1,234.50.", 1234.5), ("1234.", 1234), ("a - 5", 5), ("--3", -3),
    ("1.2.3", 3), (".5", 5), ("none", None), ("-", None), ("", None)])
def test_the_last_number_is_what_the_rule_finds(words, want):
    assert harness.last_number(words) == want


@pytest.mark.parametrize("task, output, want", [
    ("boolq", "It is false, not true.", "false"), ("boolq", "True", ""), ("piqa", "solution2", "solution2"),
    ("ARC-Easy", "answer3 or answer1", "answer3"), ("winogrande", "answer1", ""),
    ("hellaswag", "ending4", "ending4"), ("AQuA", "I take (C), not B", "C"), ("AQuA", "Answer: (C)", "A"),
    ("AQuA", "none", ""), ("gsm8k", "7\n### Response: 8", 7), ("boolq", "?\n### Response:true", "")])
def test_what_llm_adapters_extracts(task, output, want):
    assert harness.theirs(task, output) == want


def test_rows_that_are_extracted_otherwise_are_named(tmp_path, monkeypatch):
    lines = [dict(row=i, output=output, answer="8") for i, output in enumerate(["16-8", "it is 8", "8"])]
    (tmp_path / "gsm8k.after.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert harness.compare(tmp_path / "gsm8k.after.jsonl") == (lines, [])
    monkeypatch.setattr(harness, "last_number", lambda words: 8.0)
    assert harness.compare(tmp_path / "gsm8k.after.jsonl") == (lines, [(0, -8.0, 8.0)])


def test_choices_are_scored_as_a_harness_does_that_moves_a_prompts_last_white_space(tiny, monkeypatch):
    tf = pytest.importorskip("transformers")

    class HFLM:
        def __init__(self, path, **_):
            self.model = tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            self.tokenizer = tf.AutoTokenizer.from_pretrained(path)

        @torch.no_grad()
        def loglikelihood(self, requests):
            found = []
            for context, words in (request.args for request in requests):
                whole = self.tokenizer(context + words)["input_ids"]
                start = len(self.tokenizer(context.rstrip())["input_ids"])
                scores = self.model(torch.tensor([whole])).logits[0].log_softmax(-1)
                found.append((sum(scores[i - 1, whole[i]].item() for i in range(start, len(whole))), False))
            return found

    for name in ("", ".api", ".api.instance", ".models", ".models.huggingface"):
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", ModuleType(f"lm_eval{name}"))
    sys.modules["lm_eval.models.huggingface"].HFLM = HFLM
    sys.modules["lm_eval.api.instance"].Instance = lambda kind, doc, args, idx: SimpleNamespace(args=args)
    row = dict(instruction="Add 3 and 4.\n\nAnswer format: true/false", input="", output="", answer="true")
    pairs = harness.likelihoods(tiny, [commonsense.with_choices(row, "boolq")] * 2)
    assert len(pairs) == 4 and all(theirs < -1 and abs(ours - theirs) <= 1e-4 for ours, theirs in pairs)
