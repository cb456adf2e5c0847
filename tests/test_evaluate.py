"""evaluate.py: the template, generation and scoring in batches and one by one, the choice of a task, the command."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate as E
import model as M
from conftest import ROOT
from data import arithmetic


@pytest.fixture(scope="module")
def tok(tiny):
    return M.Tokenizer(tiny, M.read_config(M.read_json(tiny / "config.json")))


@pytest.fixture(scope="module")
def net(tiny):
    return M.load(tiny, torch.float64)


@pytest.fixture(scope="module")
def prompts(tok):
    """Prompts of very different lengths."""
    rows = [row for steps in (1, 1, 1, 2, 3, 5, 9, 20, 40) for row in arithmetic.generate("test", 1, steps, steps)]
    return [E.prompt_ids(tok, row) for row in rows]


# ------------------------------------------------------------------------------------ template

def test_the_template_is_alpacas_without_stray_spaces():
    row = dict(instruction="Add {1} and 2.", input="", output="3")
    assert E.prompt_text(row) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Response:\n")
    assert E.prompt_text(dict(row, input="be brief")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Input:\nbe brief\n\n### Response:\n")
    assert E.prompt_text({"instruction": "a"}) == E.prompt_text({"instruction": "a", "input": None})


def test_the_bundled_tokenizer_knows_the_template(tok):
    assert len(E.prompt_ids(tok, dict(instruction="", input=""))) == 2


def test_the_prompts_ids_are_a_prefix_of_the_examples(tok):
    row = dict(instruction="a", input="", output=" b c")
    ids, start = E.example(tok, row)
    assert ids[:start] == E.prompt_ids(tok, row) and ids[-1] == tok.eos[0]
    assert E.example(tok, row, " b c") == (ids[:-1], start)


# ------------------------------------------------------------------------------------ generation

def one_by_one(net, prompt, steps, eos, vocabulary=None):
    """Greedy decoding with no cache, no padding, no batch."""
    ids = list(prompt)
    for _ in range(steps):
        token = net(torch.tensor([ids]))[0, -1, :vocabulary].argmax().item()
        if token in eos:
            break
        ids.append(token)
    return ids[len(prompt):]


def test_batched_cached_left_padded_generation_is_one_by_one(net, tok, prompts, monkeypatch):
    want = [one_by_one(net, p, 30, tok.eos) for p in prompts]
    assert len({len(w) for w in want}) > 1 and sum(len(w) < 30 for w in want) > 2      # at different places
    sizes = []
    for budget in (1, 600, 10**6):
        monkeypatch.setattr(E, "BATCH_TOKENS", budget)
        assert E.generate(net, prompts, 30, tok.eos) == want
        sizes.append(len(list(E.batches([len(p) + 30 for p in prompts], budget))))
    assert sizes[0] == 9 > sizes[1] > sizes[2] == 1


def test_generation_stops_at_any_eos_and_at_the_limit(net, tok, prompts):
    free = one_by_one(net, prompts[0], 12, [])
    assert len(set(free[:5])) > 2
    assert E.generate(net, prompts[:1], 12, eos=[]) == [free]
    assert E.generate(net, prompts[:1], 5, eos=[]) == [free[:5]]
    stop = free[4]
    assert E.generate(net, prompts[:1], 12, eos=[10**6, stop]) == [free[:free.index(stop)]]


def test_logits_beyond_the_vocabulary_are_masked(net, tok, prompts):
    want, padded = E.generate(net, prompts, 10, tok.eos), net.cfg.vocab_size
    widen = lambda m, a, logits: torch.cat([logits, logits.new_full((*logits.shape[:-1], 8), 1e6)], -1)
    with net.register_forward_hook(widen):
        assert E.generate(net, prompts[:1], 1, tok.eos) == [[padded]]
        assert E.generate(net, prompts, 10, tok.eos, tok.size) == want


# ------------------------------------------------------------------------------------ likelihood

def test_nll_is_the_sum_of_token_losses_in_any_batching(net, tok, monkeypatch):
    examples = [E.example(tok, row) for row in arithmetic.generate("test", 7, 2, 0)]
    examples.append((examples[0][0], 0))                # supervised from the first token that has a past
    want = []
    for ids, start in examples:
        log_p = torch.log_softmax(net(torch.tensor([ids]))[0], -1)
        parts = [-log_p[t - 1, ids[t]].item() for t in range(max(start, 1), len(ids))]
        want.append((pytest.approx(sum(parts)), len(parts)))
    for budget in (1, 200, 10**6):
        monkeypatch.setattr(E, "BATCH_TOKENS", budget)
        assert E.nll(net, examples) == want


class Choosing:
    """A task of three rows with choices, and a scorer that is easy to follow."""
    MAX_NEW_TOKENS = 3

    @staticmethod
    def score(outputs, rows, rule="strict"):
        return dict(accuracy=0.0, extracted=outputs, correct=[False] * len(rows), majority=2 / 3)


def test_likelihood_picks_the_choice_with_the_least_loss(net, tok, tmp_path):
    rows = [dict(instruction=f"{i} + 1", input="", output="yes", answer="b" if i else "a",
                 choices={"a": "The answer is 3.", "b": "zzz qqq xxx"}) for i in range(3)]
    result = E.evaluate(net, tok, Choosing, rows, tmp_path / "dump.jsonl")
    assert result["likelihood"] == pytest.approx(1 / 3) and result["majority"] == 2 / 3
    dump = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    assert [line["chosen"] for line in dump] == ["a", "a", "a"] and [line["answer"] for line in dump] == ["a", "b", "b"]
    losses = E.nll(net, [E.example(tok, row) for row in rows])
    assert result["loss"] == pytest.approx(sum(a for a, _ in losses) / sum(b for _, b in losses))
    assert math.isfinite(result["loss"])


def test_evaluation_is_in_eval_mode_and_gives_the_mode_back(net, tok):
    seen = []
    handle = net.register_forward_pre_hook(lambda m, a: seen.append(m.training))
    net.train()
    E.evaluate(net, tok, arithmetic, arithmetic.generate("test", 2, 1, 0))
    assert net.training and seen and not any(seen)
    net.eval()
    E.evaluate(net, tok, arithmetic, arithmetic.generate("test", 2, 1, 0))
    assert not net.training
    handle.remove()


def test_the_mean_is_over_the_sets(net, tok, capsys):
    sets = {"easy": arithmetic.generate("test", 8, 1, 0), "hard": arithmetic.generate("test", 8, 2, 0)}
    table = E.evaluate_sets(net, tok, arithmetic, sets)
    accuracy = table["accuracy"]
    assert accuracy["easy"] > 0.8 > 0.2 > accuracy["hard"]
    assert accuracy["mean"] == (accuracy["easy"] + accuracy["hard"]) / 2
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["easy", "hard"]


# ------------------------------------------------------------------------------------ tasks, the command

def test_a_task_is_a_family_a_set_or_a_path():
    assert E.find_task("arithmetic")[1] == ["two_step"]
    module, names = E.find_task("commonsense")
    assert module.FAMILY == "commonsense" and len(names) == 8
    assert E.find_task("ARC-Easy") == (module, ["ARC-Easy"])
    assert E.find_task("some/mine.jsonl")[1] == ["some/mine.jsonl"]
    with pytest.raises(ValueError, match="task 'own', expected one of arithmetic"):
        E.find_task("own")


def test_every_task_file_meets_its_contract():
    stems = [f.stem for f in sorted((ROOT / "data").glob("*.py")) if f.stem != "__init__"]
    assert {"arithmetic", "commonsense", "own"} <= set(stems)
    for stem in stems:
        module = __import__(f"data.{stem}", fromlist=["x"])
        assert module.KIND in ("generate", "choose", "classify", "execute") and module.MAX_NEW_TOKENS > 0
        assert isinstance(module.STOP, tuple) and '{"instruction"' in module.__doc__ and "Metric: " in module.__doc__
        assert callable(module.rows) and callable(module.score)
        for entry in module.TASKS.values():
            assert {"rows", "metric", "file", "source"} <= set(entry)
        text = Path(module.__file__).read_text(encoding="utf-8")
        imported = {line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
        assert imported <= sys.stdlib_module_names


def test_the_command_runs_alone_with_an_adapter(tiny, tmp_path):
    net = M.load(tiny)
    lora = checkpoint.load_method("lora")
    lora.inject(net, ("q_proj",), 2)
    checkpoint.save_adapter(tmp_path / "a", net, dict(method="lora", targets=["q_proj"], rank=2))
    command = [sys.executable, str(ROOT / "evaluate.py"), "--task", "arithmetic", "--limit", "5", "--adapter", str(tmp_path / "a")]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("two_step") and "(5 rows)" in done.stdout
    assert len((tmp_path / "out" / "two_step.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("flags, message", [
    (["--adapter", "nowhere"], "nowhere/adapter_config.json: No such file"),
    (["--model", "nowhere"], "nowhere: no such model directory"),
    (["--task", "x"], "task 'x', expected one of"),
    (["--task", "boolq"], "found none of commonsense/boolq.json"),
    (["--limit", "0"], "--limit 0, expected at least 1"),
    (["--out", "."], ".: exists already"),
    (["--what"], "unrecognized arguments: --what")])
def test_the_command_refuses_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        E.main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("evaluate.py: error: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
