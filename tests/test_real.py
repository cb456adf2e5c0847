"""
The whole road at full length: the README's first command, a real pretrained model. Minutes, so marked slow:

    SMOLLM2=DIR pytest -m slow -s          # DIR: SmolLM2-135M-Instruct as a Hugging Face directory
"""
import json

import pytest
import torch

import checkpoint
import evaluate
import train
from data import commonsense, text

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["lora", "gralora", "cps_lora", "glora"])
def test_the_bundled_model_learns_two_step_problems(method, tmp_path):
    """GFA is the README's first command, whose figures .ci/run reads."""
    train.main(["--method", method, "--rank", "8", "--out_dir", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["mean"] <= 0.10 and summary["after"]["mean"] >= 0.80


def questions(directory, data):
    """Ids (4, 60) of what the model trained on: the first BoolQ prompts with their answers, as one text."""
    tok = text.Tokenizer(directory, checkpoint.read_config(checkpoint.read_json(directory / "config.json")))
    rows = commonsense.rows(data, "boolq", "test")[:8]
    ids = [i for row in rows for i in text.example(tok, row)[0]]
    return torch.tensor(ids[:240]).view(4, 60)


def test_smollm2_learns_the_form_of_boolq_and_merges(smollm2, shared_data, tmp_path):
    tf = pytest.importorskip("transformers")
    out = tmp_path / "run"
    train.main(["--method", "gfa", "--rank", "8", "--lr", "3e-3", "--model", str(smollm2), "--task", "boolq",
                "--data", str(shared_data), "--max_steps", "60", "--eval_limit", "100", "--merge",
                "--dtype", "float32", "--out_dir", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    print(json.dumps(summary))
    assert summary["loss_before"] > 2.5 and summary["loss_after"] <= 0.15
    assert summary["majority"]["boolq"] == 0.70
    for key in ("before", "after", "before_likelihood", "after_likelihood"):
        assert 0 <= summary[key]["boolq"] <= 1
    ours = checkpoint.load(out / "merged")
    theirs = tf.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    ids = questions(smollm2, shared_data)
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().max().item()
    print(f"gfa: merged, largest logit difference to transformers {difference:.1e}")
    assert difference <= 1e-3


@pytest.mark.parametrize("method, flags", [
    ("lora", ["--lr", "1e-3"]), ("gralora", ["--lr", "1e-3"]),
    ("cps_lora", ["--lr", "1e-3", "--reinit_every", "4s"]),
    ("glora", ["--lr", "3e-4", "--reinit_every", "4s", "--svd", "randomized"])])
def test_a_short_run_on_smollm2_merges_to_the_same_function(method, flags, smollm2, shared_data, tmp_path):
    """Twelve steps, with re-initialisations in between where there are any; the bound is fp32's."""
    out = tmp_path / "run"
    train.main(["--method", method, "--rank", "8", "--model", str(smollm2), "--task", "boolq",
                "--data", str(shared_data), "--dtype", "float32", "--max_steps", "12", "--eval_limit", "8",
                "--no-eval_before", "--merge", "--out_dir", str(out), *flags])
    merged, adapted, base = (checkpoint.load(path) for path in (out / "merged", smollm2, smollm2))
    checkpoint.load_adapter(adapted, out / "adapter")
    ids = questions(smollm2, shared_data)
    with torch.no_grad():
        difference = (merged(ids) - adapted(ids)).abs().max().item()
        change = (merged(ids) - base(ids)).abs().max().item()
    print(f"{method}: merged to unmerged {difference:.1e}, to the base model {change:.1e}")
    assert difference <= 1e-3 < 1e-1 < change


@pytest.mark.parametrize("task, metric", [
    ("gsm8k", "accuracy"), ("AQuA", "likelihood"), ("humaneval", "pass@1"), ("mbpp", "pass@1")])
def test_smollm2_answers_math_and_code(task, metric, smollm2, shared_data, tmp_path, capsys):
    evaluate.main(["--model", str(smollm2), "--task", task, "--data", str(shared_data), "--limit", "2",
                   "--dtype", "float32", "--out", str(tmp_path / "out"), "--allow_code_execution"])
    assert f" {metric} " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / f"{task}.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["output"].strip() and {"extracted", "correct"} <= set(line) for line in lines)
