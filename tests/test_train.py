"""
train.py: its gradient, the order of its data, the hooks it calls, the files it leaves, the input it refuses.
"""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file

import checkpoint
import evaluate
import presets
import runs
import train
from data import arithmetic, text

FAST = ["--max_steps", "3", "--batch_size", "4", "--train_rows", "40", "--eval_limit", "4",
        "--log_every", "1"]


def run(*args, out):
    train.main([*map(str, args), "--out_dir", str(out)])
    return json.loads((out / "summary.json").read_text())


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def refuses(capsys, *args, **kw):
    """The one line on stderr with which train.py refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, args)))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("train.py: error: ")
    return err


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return text.Tokenizer(tiny, checkpoint.read_config(checkpoint.read_json(tiny / "config.json")))


# ------------------------------------------------------------------------------------ the gradient

def injected(tiny, method="lora", **kw):
    torch.manual_seed(0)
    model = checkpoint.load(tiny, torch.float64)
    checkpoint.load_method(method).inject(model, ("q_proj", "down_proj"), 4, **kw)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    return model.train()


def gradient(model, examples, micro_batch_size):
    for p in model.parameters():
        p.grad = None
    loss, seen = train.backward(model, examples, micro_batch_size)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), seen


def uneven(tokenizer):
    """Eight examples whose answers differ much in length: a mean of means would be another number."""
    rows = arithmetic.generate("train", 8, 2, 0)
    for i, row in enumerate(rows):
        row["output"] = row["output"] * (i % 4 + 1)
    return text.encode(tokenizer, rows, 512)[0]


FLOAT32 = 1e-5      # losses are float32 in a float64 model too: an ulp of its largest logits, 27, is 2e-6


def assert_same_gradient(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=FLOAT32 * want.abs().max().item())


def test_accumulation_is_normalised_by_supervised_tokens(tiny, tokenizer):
    model, examples = injected(tiny), uneven(tokenizer)
    loss, want, seen = gradient(model, examples, 8)
    assert seen == sum(len(ids) for ids, _ in examples)
    for micro in (1, 2, 3):             # 3 leaves a smaller last micro-batch
        again, got, _ = gradient(model, examples, micro)
        assert again == pytest.approx(loss, rel=FLOAT32)
        assert_same_gradient(got, want)


def test_the_loss_is_the_mean_over_answer_tokens_and_their_eos(tiny, tokenizer):
    model, examples = injected(tiny), uneven(tokenizer)
    losses = []
    for ids, start in examples:         # one row at a time, with every logit
        logits = model(torch.tensor([ids]))[0]
        losses += [F.cross_entropy(logits[t - 1], torch.tensor(ids[t])) for t in range(start, len(ids))]
    assert ids[-1] in tokenizer.eos
    want = torch.stack(losses).mean().item()
    assert gradient(model, examples, 8)[0] == pytest.approx(want, rel=FLOAT32)


def test_checkpointing_and_compile_free_gradients_agree(tiny, tokenizer):
    model, examples = injected(tiny, dropout=0.2), uneven(tokenizer)
    torch.manual_seed(1)
    _, want, _ = gradient(model, examples, 8)
    model.checkpointing = True
    torch.manual_seed(1)                # the same dropout masks, drawn again in backward
    assert_same_gradient(gradient(model, examples, 8)[1], want)


# ------------------------------------------------------------------------------------ examples

def test_supervision_starts_where_the_prompt_ends(tokenizer):
    row = arithmetic.generate("train", 1, 2, 0)[0]
    (ids, start), = text.encode(tokenizer, [row], 512)[0]
    assert tokenizer.decode(ids[start:-1]) == row["output"] and ids[-1] == tokenizer.eos[0]
    assert tokenizer.decode(ids[:start]).endswith("### Response:\n")
    (same, zero), = text.encode(tokenizer, [row], 512, train_on_prompt=True)[0]
    assert same == ids and zero == 0


def test_an_eos_inside_the_text_is_still_supervised(tokenizer):
    """Masking is by length: masking by id would take the EOS away, and the model would never stop."""
    row = dict(instruction="<eos> <eos>", input="", output="<eos>")
    (ids, start), = text.encode(tokenizer, [row], 512)[0]
    assert ids[start:] == [0, 0]


def test_bos_comes_once_and_only_where_the_tokenizer_adds_it(tokenizer):
    row = dict(instruction="a", input="", output="b")
    plain = text.encode(tokenizer, [row], 99)
    tokenizer.bos = [7]
    try:
        (ids, start), = text.encode(tokenizer, [row], 99)[0]
        (cut, cut_start), = text.encode(tokenizer, [row], len(ids) - 1)[0]
    finally:
        tokenizer.bos = []
    assert ids == [7, *plain[0][0][0]] and start == plain[0][0][1] + 1
    assert cut == [7, *ids[2:]] and cut_start == start - 1      # a cut prompt keeps its BOS


def test_truncation_spares_the_answer_and_is_counted(tokenizer):
    row = arithmetic.generate("train", 1, 2, 0)[0]
    (ids, start), = text.encode(tokenizer, [row], 512)[0]
    answer = len(ids) - start
    for max_len in (len(ids), len(ids) - 1, answer + 1, answer):
        ((got, where),), cut = text.encode(tokenizer, [row], max_len)
        assert len(got) == max_len and got[where:] == ids[start:] and cut == (max_len < len(ids))
    ((got, where),), cut = text.encode(tokenizer, [row], answer - 3)
    assert (got, where, cut) == (ids[start:-3], 0, 1)           # even the answer is too long


def test_the_order_is_a_function_of_seed_and_epoch():
    a, b = train.order(1, 0, 50), train.order(1, 0, 50)
    assert a.tolist() == b.tolist() and sorted(a) == list(range(50))
    assert len({tuple(train.order(seed, epoch, 50)) for seed in (1, 2) for epoch in (0, 1)}) == 4


# ------------------------------------------------------------------------------------ schedule, optimizer

def test_schedules():
    at = lambda kind: [train.lr_at(s, 10, 2, kind) for s in range(10)]
    assert at("constant") == [0.5] + [1.0] * 9
    assert at("linear") == pytest.approx([0.5, 1.0, 1.0] + [j / 8 for j in (7, 6, 5, 4, 3, 2, 1)])
    cosine = [(1 + math.cos(math.pi * j / 8)) / 2 for j in range(8)]
    assert at("cosine") == pytest.approx([0.5, 1.0, *cosine])


@pytest.mark.parametrize("every, at, want", [
    (None, None, set()), ("2", None, {20, 40}), ("0.5", None, set(range(5, 50, 5))), ("20s", None, {20, 40}),
    (None, 7, {7}), ("25s", 30, {25, 30}), ("50s", 50, set())])
def test_reinit_steps_are_epochs_or_steps_and_never_the_last(every, at, want):
    assert train.reinit_steps(every, at, 50, 10) == want


@pytest.mark.parametrize("every", ["0", "-1", "x", "s", "0.01", "nan", "inf"])
def test_reinit_every_refuses(every):
    with pytest.raises(ValueError, match="expected epochs"):
        train.reinit_steps(every, None, 50, 10)


def test_lion_is_its_formula():
    torch.manual_seed(0)
    p, m = torch.nn.Parameter(torch.randn(5)), torch.zeros(5)
    want, optimizer = p.detach().clone(), train.Lion([p], lr=0.1, weight_decay=0.2)
    for lr in (0.1, 0.05, 0.05):
        optimizer.param_groups[0]["lr"] = lr
        g = torch.randn(5)
        p.grad = g.clone()
        optimizer.step()
        want = want * (1 - 0.2 * lr / 0.1)                      # decoupled: relative to the peak
        want = want - lr * torch.sign(0.9 * m + 0.1 * g)
        m = 0.95 * m + 0.05 * g
        torch.testing.assert_close(p.detach(), want)


# ------------------------------------------------------------------------------------ a run and its files

@pytest.mark.parametrize("method", ["lora", "gfa", "full"])
def test_a_run_leaves_its_files(method, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    summary = run("--method", method, *FAST, "--rank", 3, "--merge", out=out)
    lines = capsys.readouterr().out.splitlines()
    adapted = "all weights" if method == "full" else "28 modules"
    assert lines[0].startswith(f"{method}: {adapted}, {summary['trainable']:,} trainable parameters, ")
    assert lines[1] == "3 steps of 4 examples (1 forward pass of 4 each); an epoch is 10 steps"
    assert lines[2].startswith("40 examples, ") and lines[2].endswith("0 of all rows truncated to 512")
    assert "evaluation before and after training: 4 rows, up to 40 new tokens each" in lines
    assert lines.index("before training") < lines.index("after training")
    shown = [line for line in lines if line.startswith("step ")]
    measures = (r"step {}/3  loss \d+\.\d{{4}}  lr \d\.\de-0\d  grad [\d.e+-]+  [\d,]+ tok/s  \d\.\d GB  "
                r"\d:\d\d, \d:\d\d left")
    assert len(shown) == 3
    assert all(re.fullmatch(measures.format(i), line) for i, line in enumerate(shown, 1)), shown
    assert shown[-1].endswith(", 0:00 left")
    named = [summary[key] for key in ("task", "method", "rank", "steps")]
    assert named == ["arithmetic", method, 3, 3]
    for when in ("before", "after"):
        assert 0 <= summary[when]["mean"] == summary[when]["two_step"] <= 1 and summary[f"loss_{when}"] > 0
        dump = (out / "eval" / f"two_step.{when}.jsonl").read_text().splitlines()
        dump = [json.loads(line) for line in dump]
        assert len(dump) == 4
        assert set(dump[0]) == {"row", "prompt", "output", "extracted", "answer", "correct"}
    assert summary["tokens_per_second"] > 0 and summary["seconds"] > 0
    measured = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_mb"}
    assert [set(line) for line in metrics(out)] == [measured] * 3
    args = json.loads((out / "args.json").read_text())
    assert args["rank"] == 3 and args["preset"] == "tiny"
    assert "torch" in json.loads((out / "env.json").read_text())
    assert {p.name for p in out.iterdir()} - {"loss.png"} == {
        "args.json", "env.json", "metrics.jsonl", "eval", "summary.json", "adapter", "merged"}
    adapted, merged = checkpoint.load(tiny), checkpoint.load(out / "merged")
    checkpoint.load_adapter(adapted, out / "adapter")
    ids = torch.randint(400, (1, 20))
    torch.testing.assert_close(merged(ids), adapted(ids), rtol=0, atol=1e-3)
    assert (merged(ids) - checkpoint.load(tiny)(ids)).abs().max() > 1e-3


def held_out(tmp_path, capsys, sets, lines):
    (tmp_path / "eval").mkdir()
    for name, several in lines.items():
        (tmp_path / "eval" / f"{name}.after.jsonl").write_text("".join(
            json.dumps(dict(line, row=i)) + "\n" for i, line in enumerate(several)))
    train.show(tmp_path, sets)
    head, *shown = capsys.readouterr().out.splitlines()
    assert head == "held-out rows after training" and len(shown) % 3 == 0 and len(shown) <= 9
    assert all(len(line) <= 110 and line.isprintable() for line in shown)
    assert [line[:12].split() for line in shown[:3]] == [["prompt"], ["output"], ["expected"]]
    return [tuple(line[12:] for line in shown[i:i + 3]) for i in range(0, len(shown), 3)]


def test_a_run_shows_three_held_out_rows_with_their_verdicts(tmp_path, capsys):
    run(*FAST, "--no-eval_before", out=tmp_path / "run")
    printed = capsys.readouterr().out.splitlines()
    at = printed.index("held-out rows after training")
    dump = [json.loads(line) for line in (tmp_path / "run" / "eval" / "two_step.after.jsonl").open()]
    words = {True: "right", False: "wrong"}
    assert printed[at + 3:at + 10:3] == [f"  expected  {line['answer']} -> {words[line['correct']]}"
                                         for line in dump[:3]]
    assert " ".join(dump[0]["output"].split()).startswith(printed[at + 2][12:50].strip())
    assert printed[at + 1][12:50] in dump[0]["prompt"] and len(printed) == at + 11


def test_held_out_rows_are_a_line_each_of_long_texts_both_ends_and_of_labels_the_names(tmp_path, capsys):
    long = dict(instruction="Is it?\n\nA \x1b[1mtext", input="of many words" * 20 + " the end",
                output="o" * 200, answer=7)
    label = dict(text="a film", pair=None, label=1, answer="positive")
    code = dict(instruction="Write f.", input="", prefix="def f():")
    lines = dict(own=[dict(prompt="x", output="words " * 60 + "8.", correct=False)],
                 sst2=[dict(prompt="a film", output=1, extracted="positive", correct=True)],
                 mbpp=[dict(prompt="y", output="pass")])
    found = held_out(tmp_path, capsys, {"a/own.json": [long] * 2, "sst2": [label], "mbpp": [code]}, lines)
    assert found[0][0].startswith("Is it? A [1mtext of many") and found[0][0].endswith("the end")
    assert found[0][1].startswith("words words") and " … " in found[0][1] and found[0][1].endswith(" 8.")
    assert found[0][2] == "7 -> wrong" and found[1] == ("a film", "positive", "positive -> right")
    assert found[2] == ("Write f.", "pass", "to pass its tests -> not scored")


def test_a_held_out_text_is_cut_where_its_line_would_be_longer_than_110_columns(tmp_path, capsys):
    texts = ["".join(map(str, range(60)))[:size] for size in (97, 98, 99)]
    rows = [dict(instruction=words, output="x") for words in texts]
    found = held_out(tmp_path, capsys, dict(a=rows), dict(a=[dict(prompt="", output="x", correct=True)] * 3))
    cut = f"{texts[2][:47]} … {texts[2][-48:]}"
    assert [prompt for prompt, *_ in found] == [*texts[:2], cut] and 12 + len(cut) == 110


def test_of_one_set_three_rows_are_shown_and_of_a_short_one_all(tmp_path, capsys):
    rows = [dict(instruction=f"{i}", output=f"{i}") for i in range(5)]
    lines = [dict(prompt="", output=f"{i}", correct=True) for i in range(5)]
    found = held_out(tmp_path, capsys, dict(a=rows), dict(a=lines))
    assert found == [(f"{i}", f"{i}", f"{i} -> right") for i in range(3)]
    shutil.rmtree(tmp_path / "eval")
    assert len(held_out(tmp_path, capsys, dict(a=rows[:2]), dict(a=lines))) == 2


def test_the_same_seed_gives_the_same_run_another_another(tmp_path):
    losses = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*FAST, "--seed", seed, "--no-eval_before", out=tmp_path / name)
        losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
    # rounding alone, of float32 losses after three steps, against another order of the data
    assert losses["a"] == pytest.approx(losses["b"], rel=1e-4)
    assert losses["a"] != pytest.approx(losses["c"], rel=1e-2)


def test_the_micro_batch_size_changes_memory_not_the_run(tmp_path):
    for name, micro in (("a", 4), ("b", 2)):
        run(*FAST, "--micro_batch_size", micro, "--no-eval_before", out=tmp_path / name)
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)


def test_the_loss_falls(tmp_path):
    run("--max_steps", 30, "--batch_size", 8, "--train_rows", 8, "--eval_limit", 1, "--no-eval_before",
        "--log_every", 1, out=tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_a_last_partial_batch_is_trained_on(tmp_path):
    summary = run("--epochs", 2, "--batch_size", 4, "--train_rows", 6, "--eval_limit", 1, "--no-eval_before",
                  *["--max_steps", 4], out=tmp_path / "run")
    assert summary["steps"] == 4        # 4 + 2 rows, twice


def test_epochs_count_steps(tmp_path, capsys):
    train.main(["--model", str(ROOT / "data" / "tiny"), "--task", "arithmetic", "--epochs", "1.5",
                "--train_rows", "10", "--batch_size", "4", "--eval_limit", "1", "--no-eval_before",
                "--out_dir", str(tmp_path / "x")])
    assert "5 steps of 4 examples (1 forward pass of 4 each); an epoch is 3 steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["steps"] == 5


def test_validation_keeps_the_best_adapter_beside_the_last(tmp_path, capsys):
    out = tmp_path / "run"
    summary = run(*FAST, "--val_rows", 8, "--eval_every", 1, "--lr", 0.3, "--warmup_steps", 0,
                  "--no-eval_before", out=out)
    printed = capsys.readouterr().out.splitlines()
    values = [float(line.split()[-1]) for line in printed if "validation loss" in line]
    last, best = summary["last"], summary["best"]
    assert len(values) == 3 and last["step"] == 3 and round(last["loss_val"], 4) == values[-1]
    assert round(best["loss_val"], 4) == min(values) and values[best["step"] - 1] == min(values)
    best = json.loads((out / "adapter-best" / "adapter.json").read_text())
    assert best["method"] == "lora"
    assert json.loads((out / "adapter" / "adapter.json").read_text())["step"] == 3


@pytest.mark.parametrize("method", ["lora", "full", "glora", "mine"])
def test_select_best_evaluates_keeps_and_merges_the_best_of_validation(method, tiny, tmp_path, monkeypatch):
    """The validation losses are made up, so that the second of three steps is the best."""
    losses, out = iter([5.0, 1.0, 2.0, 3.0]), tmp_path / "run"
    monkeypatch.setattr(train, "mean_loss", lambda _: next(losses))
    flags = ["--reinit_every", "1s"] if method == "glora" else []
    if method == "mine":                # a file whose merge knows its layers by their class
        method = tmp_path / "mine.py"
        method.write_text(VARIANT + '''
def merge(model, before=merge):
    assert any(isinstance(m, LoRALinear) for m in model.modules())
    before(model)
''', encoding="utf-8")
    flags += [*FAST, "--method", method, "--val_rows", 8, "--lr", 0.01, "--warmup_steps", 0]
    summary = run(*flags, "--no-eval_before", "--eval_every", 1, "--select", "best", "--merge", out=out)
    assert summary["selected"] == summary["best"] == dict(step=2, loss_val=1.0)
    assert summary["last"]["step"] == 3
    files = [{file.name: file.read_bytes() for file in (out / name).iterdir()}
             for name in ("adapter", "adapter-best")]
    assert files[0] == files[1] and len(files[0]) == 2
    rows = arithmetic.rows(None, "two_step", "test")[:4]
    best, merged = checkpoint.load(tiny), checkpoint.load(out / "merged")
    checkpoint.load_adapter(best, out / "adapter-best", method)
    examples = text.encode(text.Tokenizer(tiny, best.cfg), rows, 512)[0]
    loss = evaluate.mean_loss(evaluate.nll(best, examples))
    assert summary["loss_after"] == pytest.approx(loss, rel=1e-5)
    assert evaluate.mean_loss(evaluate.nll(merged, examples)) == pytest.approx(loss, rel=1e-3)
    last = run(*flags, "--no-eval_before", "--overwrite", out=out)
    assert last["loss_after"] != pytest.approx(loss, rel=1e-3) and "selected" not in last


def test_the_bf16_base_stays_bf16_and_adapters_train_in_fp32(tmp_path):
    out = tmp_path / "run"
    run(*FAST, "--dtype", "bfloat16", "--merge_dtype", "bfloat16", "--no-eval_before", "--merge", out=out)
    dtypes = lambda file: {t.dtype for t in load_file(file).values()}
    assert dtypes(out / "adapter" / "adapter.safetensors") == {torch.float32}
    assert dtypes(out / "merged" / "model.safetensors") == {torch.bfloat16}


@pytest.mark.slow
def test_compiled_blocks_train_alike(tiny, tmp_path):
    """On the bundled model's first layer alone: every shape of every layer is compiled apart."""
    shutil.copytree(tiny, tmp_path / "one")
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(dict(config, num_hidden_layers=1)))
    tensors = load_file(tiny / "model.safetensors")
    kept = {key: t for key, t in tensors.items() if not re.search(r"layers\.[1-9]", key)}
    save_file(kept, tmp_path / "one" / "model.safetensors")
    for name, flags in (("a", []), ("b", ["--compile"])):
        run(*FAST, "--preset", "tiny", "--model", tmp_path / "one", "--eval_limit", 1, "--no-eval_before",
            *flags, out=tmp_path / name)
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-3)
    saved = load_file(tmp_path / "b" / "adapter" / "adapter.safetensors")
    assert not any("_orig_mod" in key for key in saved)


# ------------------------------------------------------------------------------------ hooks and variants

VARIANT = (ROOT / "baselines" / "lora.py").read_text(encoding="utf-8")
HOOKS = '''
calls = []

def observe(model, t, T):
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    calls.append((t, T, sum(float(p.grad.norm()) for p in model.parameters() if p.requires_grad)))

def reinit(model, optimizer):
    calls.append("reinit")
    for group in optimizer.param_groups:
        fresh = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        new = dict(zip(map(id, group["params"]), fresh))
        for p in group["params"]:
            optimizer.state.pop(p, None)
        group["params"] = fresh
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) in new:
                    setattr(module, name, new[id(p)])

def make_optimizer(params, lr, weight_decay):
    calls.append(("optimizer", lr, weight_decay))
    return torch.optim.SGD(params, lr, weight_decay=weight_decay)
'''


def test_hooks_are_called_as_the_contract_says(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(VARIANT + HOOKS, encoding="utf-8")
    loaded = []
    original = checkpoint.load_method
    monkeypatch.setattr(checkpoint, "load_method", lambda name: loaded.append(original(name)) or loaded[-1])
    run("--method", tmp_path / "mine.py", *FAST, "--reinit_every", "1s", "--lr", 0.01, "--grad_clip", 1e-9,
        "--no-eval_before", "--micro_batch_size", 2, out=tmp_path / "run")
    calls = loaded[0].calls
    assert calls[0] == ("optimizer", 0.01, 0.0)
    assert [c if c == "reinit" else c[:2] for c in calls[1:]] == [(1, 3), "reinit", (2, 3), "reinit", (3, 3)]
    assert calls[1][2] > 1e-3           # before clipping, and once for the two micro-batches


SLOW = '''
import time

def slowly(call, seconds):
    return lambda *args, **own: (time.sleep(seconds), call(*args, **own))

inject, reinit = slowly(inject, 0.2), slowly(reinit, 0.1)
'''


@pytest.mark.parametrize("period, reinits", [("1s", 2), ("none", 0)])
def test_the_summary_has_the_seconds_of_inject_and_of_every_reinit(period, reinits, tmp_path):
    (tmp_path / "mine.py").write_text(VARIANT + HOOKS + SLOW, encoding="utf-8")
    summary = run("--method", tmp_path / "mine.py", *FAST, "--reinit_every", period, "--no-eval_before",
                  out=tmp_path / "run")
    assert summary["inject_seconds"] >= 0.2
    assert len(summary["reinit_seconds"]) == reinits and all(s >= 0.1 for s in summary["reinit_seconds"])


def test_a_copy_of_lora_is_a_method_without_any_other_edit(tmp_path):
    flags = '{"k": (2, "a number"), "mode": ("a", "a choice", ["a", "b"]), "on": (True, "a switch")}'
    own = VARIANT.replace("DEFAULTS = {}", f"DEFAULTS = {flags}")
    own = own.replace("alpha=None, dropout=0.0):", "alpha=None, dropout=0.0, *, k=2, mode='a', on=True):")
    own = own.replace("    model.requires_grad_(False)",
                      "    assert (k, mode, on) == (4, 'b', False)\n    model.requires_grad_(False)", 1)
    (tmp_path / "mine.py").write_text(own, encoding="utf-8")
    summary = run("--method", tmp_path / "mine.py", *FAST, "--k", 4, "--mode", "b", "--no-on",
                  out=tmp_path / "run")
    assert summary["method"].endswith("mine.py")
    model = checkpoint.load(ROOT / "data" / "tiny")
    checkpoint.load_adapter(model, tmp_path / "run" / "adapter", tmp_path / "mine.py")


def test_a_copied_file_trains_by_its_originals_presets_and_the_first_lines_say_so(tmp_path, capsys):
    (tmp_path / "mine.py").write_text((ROOT / "glora.py").read_text(encoding="utf-8"), encoding="utf-8")
    parse = lambda *a: train.parse(["--method", str(tmp_path / "mine.py"), *a])[0]
    assert (parse().lr, parse().reinit_every) == (5e-3, "60s")
    got = parse("--preset", "glora-math-llama2", "--model", "x")
    assert (got.lr, got.ratio, got.dropout) == (3e-4, "1:3", 0.05)
    run("--method", tmp_path / "mine.py", *FAST, "--reinit_every", "1s", out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert "preset tiny, for glora: lr 0.005, reinit_every 1s\n" in printed
    assert "step 1: re-initialised, 28 modules\n" in printed and "step 3: re-init" not in printed


@pytest.mark.parametrize("change, message", [
    (("def merge(", "def join("), r"mine\.py: defines no merge, so it is not a method file"),
    (("DEFAULTS = {}", ""), r"mine\.py: defines no DEFAULTS, so it is not a method file"),
    (("DEFAULTS = {}", 'DEFAULTS = {"seed": (1, "a seed")}'),
     r"mine\.py: DEFAULTS has 'seed', which is a common flag already"),
    (("DEFAULTS = {}", 'DEFAULTS = {}\nTINY = {"lrr": 1.0}'),
     r"mine\.py: no flag --lrr, for which it or preset tiny has a default")])
def test_a_method_file_that_misses_a_part_is_refused_at_the_start(change, message, tmp_path, capsys):
    assert change[0] in VARIANT
    (tmp_path / "mine.py").write_text(VARIANT.replace(*change), encoding="utf-8")
    assert re.search(message, refuses(capsys, "--method", tmp_path / "mine.py", "--out_dir", tmp_path / "x"))


def test_a_bf16_run_on_a_cpu_merges_into_fp32_unless_told_otherwise(tmp_path, capsys):
    for flags, dtype in (([], "float32"), (["--merge_dtype", "bfloat16"], "bfloat16")):
        summary = run(*FAST, "--no-eval_before", "--dtype", "bfloat16", "--merge", "--overwrite", *flags,
                      out=tmp_path / "run")
        config = json.loads((tmp_path / "run" / "merged" / "config.json").read_text())
        assert config["torch_dtype"] == summary["merge"]["dtype"] == dtype
        assert len(summary["merge"]["lost_by_module"]) == 28
        assert f"merged in {dtype}: " in capsys.readouterr().out


def test_match_lora_names_and_records_the_rank_that_it_chose(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "gfa", "--match_lora", "8", *FAST, "--no-eval_before"])
    (out,) = (tmp_path / "runs").iterdir()
    summary = json.loads((out / "summary.json").read_text())
    adapter = load_file(out / "adapter" / "adapter.safetensors")["adapter.lora_A"]
    rank = len(adapter)
    assert rank != 8 and summary["rank"] == rank and f"-gfa-r{rank}-" in out.name
    assert summary["trainable"] <= 71680            # LoRA's count at rank 8
    record = json.loads((out / "adapter" / "adapter.json").read_text())
    assert record["rank"] == rank == json.loads((out / "args.json").read_text())["rank"]
    assert f"match_lora 8: rank {rank}\n" in capsys.readouterr().out


def test_reinit_every_none_is_one_long_stage(tmp_path, capsys):
    run("--method", "glora", *FAST, "--no-eval_before", "--reinit_every", "none", out=tmp_path / "run")
    said = capsys.readouterr().out
    assert "re-initialised" not in said and "note: " not in said


@pytest.mark.parametrize("flags, warned", [
    (["--reinit_every", "2"], "--reinit_every 2, --reinit_at None"), (["--reinit_every", "2s"], None),
    (["--reinit_every", "none", "--reinit_at", "3"], "--reinit_every None, --reinit_at 3")])
def test_a_run_without_the_re_initialisation_that_it_asks_for_is_told(flags, warned, tmp_path, capsys):
    run("--method", "glora", *FAST, "--no-eval_before", *flags, out=tmp_path / "run")
    note = f"note: 3 steps end before the first re-initialisation ({warned}; an epoch is 10 steps)\n"
    said = capsys.readouterr().out
    assert said.count("note: ") == (note in said) == bool(warned)


def test_the_mix_is_chosen_by_name_and_the_file_that_was_read_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "commonsense").mkdir()
    row = dict(instruction="x\n\nAnswer format: true/false", input="", output="the correct answer is true")
    test = [dict(row, answer="true")]
    (tmp_path / "commonsense" / "boolq.json").write_text(json.dumps(test))
    for mix, count in (("commonsense_15k", 4), ("commonsense_170k", 5)):
        (tmp_path / "commonsense" / f"{mix}.json").write_text(json.dumps([dict(row, source="boolq")] * count))
    monkeypatch.setitem(presets.PRESETS, "other", {"all": dict(mix="other")})
    start = ["--model", str(ROOT / "data" / "tiny"), "--task", "BoolQ", "--data", str(tmp_path),
             "--max_steps", "1", "--batch_size", "1", "--no-eval_before", "--eval_limit", "1", "--overwrite"]
    for flags, read, rows in ((["--mix", "commonsense_170k"], "commonsense_170k.json\n", 5),
                              ([], "commonsense_15k.json\n", 4),
                              (["--preset", "other"], "commonsense_15k.json (other is not there)\n", 4)):
        summary = run(*start, *flags, out=tmp_path / "run")
        printed = capsys.readouterr().out
        assert f"training rows: {tmp_path / 'commonsense'}/{read}" in printed
        assert f"\n{rows} examples" in printed
        assert summary["task"] == "boolq"           # however it was spelled
    assert "has no mixes" in refuses(capsys, "--mix", "x", "--out_dir", tmp_path / "y")
    said = refuses(capsys, *start, "--mix", "other", "--out_dir", tmp_path / "y")      # typed, it is meant
    assert "found none of commonsense/other.json" in said


def test_epochs_that_are_typed_take_the_place_of_a_presets_steps():
    steps = lambda *flags: (lambda args: (args.max_steps, args.epochs))(train.parse(list(flags))[0])
    assert steps() == (240, 3.0) and steps("--epochs", "2") == (None, 2.0)
    assert steps("--epochs", "2", "--max_steps", "240") == (240, 2.0)


def test_precedence_command_line_preset_common_default(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(VARIANT + '\nCOMMON = {"lr": 7e-4, "alpha": 3.0}\n', encoding="utf-8")
    rows = {"all": dict(alpha=5.0, batch_size=64), "mine": dict(batch_size=32)}
    monkeypatch.setitem(presets.PRESETS, "some", rows)
    parse = lambda *a: train.parse(["--method", str(tmp_path / "mine.py"), "--model", "x", *a])[0]
    assert (parse().lr, parse().alpha, parse().batch_size) == (7e-4, 3.0, 4)
    got = parse("--preset", "some")
    assert (got.lr, got.alpha, got.batch_size) == (7e-4, 5.0, 32)
    got = parse("--preset", "some", "--batch_size", "8", "--lr", "1e-5")
    assert (got.lr, got.alpha, got.batch_size) == (1e-5, 5.0, 8)


def test_the_learning_rate_is_printed_with_where_it_comes_from(tmp_path, capsys):
    from_of = lambda *flags: train.parse(["--model", "x", *flags])[0].lr_from
    assert from_of() == "train.py's default"
    assert from_of("--method", "gfa") == "gfa's own default"
    assert from_of("--method", "gfa", "--preset", "cps-math-llama2-7b") == "preset cps-math-llama2-7b"
    for flags in (["--lr", "3e-4"], ["--learning_rate=3e-4"], ["--method", "gfa", "--lr", "3e-3"]):
        assert from_of(*flags) == "the command line"            # even the default's own value
    run(*FAST, "--no-eval_before", out=tmp_path / "run")
    assert "\npeak learning rate 0.01, from preset tiny; not reached in " in capsys.readouterr().out


def test_help_is_in_groups_with_defaults_where_there_are_some(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--method", "gralora", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "default: None" not in said and "Tables" not in said
    groups = ["what", "data", "method", "loop", "evaluation", "output", "gralora.py's own"]
    assert re.findall(r"^(\S.*):$", said, re.MULTILINE) == ["options", *groups]
    flat = " ".join(said.split())
    for words in ("peak learning rate (default: 0.01)", "a line every N steps (default: 20)",
                  "--dtype {auto,float32,bfloat16} of the frozen model (default: float32)"):
        assert words in flat
    assert not [name for name in presets.PRESETS if name != "tiny" and name in said]
    flags = "--list_presets --mix --reinit_at --dtype --select --resume --hybrid".split()
    for group, flag in zip(groups, flags, strict=True):
        assert flag in said.partition(f"\n{group}:\n")[2].partition("\n\n")[0], flag


@pytest.mark.parametrize("seconds, words", [
    (0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.4, "59:59"), (3599.6, "1h00"), (360000, "100h00")])
def test_a_clock_has_minutes_and_seconds_or_hours_and_minutes(seconds, words):
    assert runs.clock(seconds) == words


def test_a_log_line_fits_in_100_columns_and_has_all_that_is_measured(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    line = dict(step=90000, loss=12.34567, lr=3.14e-05, grad_norm=1234.5, tokens_per_second=123456.7,
                peak_memory_mb=79 * 1024.0)
    at_work = runs.Run(train.parse([])[0])
    at_work.out = tmp_path / "run"
    at_work.log(line, 99999, 35999, 3.6)
    said = capsys.readouterr().out
    assert said == ("step 90000/99999  loss 12.3457  lr 3.1e-05  grad 1.23e+03  123,457 tok/s  79.0 GB  "
                    "9h59, 9h59 left\n")
    assert len(said) <= 101 and metrics(tmp_path / "run") == [line]


def test_aliases_of_the_field():
    args, _ = train.parse("--base_model m --lora_r 4 --lora_alpha 9 --lora_dropout 0.1 "
                          "--target_modules q_proj --learning_rate 1e-3 --num_epochs 2 --cutoff_len 99 "
                          "--output_dir o --model_name_or_path n".split())
    assert (args.model, args.rank, args.alpha, args.dropout, args.targets) == ("n", 4, 9.0, 0.1, "q_proj")
    assert (args.lr, args.epochs, args.max_len, args.out_dir) == (1e-3, 2.0, 99, "o")


# ------------------------------------------------------------------------------------ trouble

def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path):
    poison = VARIANT + '''
def observe(model, t, T):
    if t == 3:
        model.model.layers[1].mlp.up_proj.lora_B.grad[0, 0] = float("nan")
'''
    (tmp_path / "mine.py").write_text(poison, encoding="utf-8")
    out = tmp_path / "run"
    named = r"step 3: .*not finite: gradient of model\.layers\.1\.mlp\.up_proj\.lora_B \(1 in all\)"
    with pytest.raises(RuntimeError, match=named):
        run("--method", tmp_path / "mine.py", *FAST, "--save_steps", 2, "--no-eval_before", out=out)
    assert json.loads((out / "adapter" / "adapter.json").read_text())["step"] == 2
    assert all(t.isfinite().all() for t in load_file(out / "adapter" / "adapter.safetensors").values())
    assert not (out / "summary.json").exists() and len(metrics(out)) == 2


def breaks(monkeypatch, at):
    """The optimizer's step number `at` leaves factors whose product overflows, whatever it meets."""
    real, taken = torch.optim.AdamW.step, []

    def step(self, *args):
        real(self, *args)
        taken.append(self)
        for p in self.param_groups[0]["params"] if len(taken) == at else ():
            p.data.fill_(1e30)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def test_what_a_last_step_leads_to_is_looked_at_before_it_is_saved(tmp_path, monkeypatch):
    """The loss before a step says nothing of what the step did: it is computed once more, before a save."""
    named = r"the loss is not finite; the first output that is not is that of model\.layers\.\d"
    with monkeypatch.context() as once:
        breaks(once, 1)
        with pytest.raises(FloatingPointError, match=named):
            run(*FAST, "--max_steps", 1, "--no-eval_before", out=tmp_path / "a")
    assert not (tmp_path / "a" / "summary.json").exists() and not (tmp_path / "a" / "adapter").exists()
    breaks(monkeypatch, 3)
    with pytest.raises(FloatingPointError, match=named):
        run(*FAST, "--max_steps", 9, "--save_steps", 1, "--no-eval_before", out=tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter" / "adapter.json").read_text())["step"] == 2
    assert [d.name for d in sorted((tmp_path / "b" / "resume").iterdir())] == ["00000001", "00000002"]


def test_a_validation_without_a_finite_loss_ends_the_run_before_it_counts_as_the_best(tmp_path, monkeypatch):
    breaks(monkeypatch, 1)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        run(*FAST, "--val_rows", 4, "--eval_every", 1, "--no-eval_before", out=tmp_path / "run")
    assert not (tmp_path / "run" / "adapter-best").exists()


def test_an_evaluation_without_a_finite_loss_ends_the_run(tmp_path, monkeypatch):
    """The batch that was looked at may hold what the evaluation's rows do not."""
    breaks(monkeypatch, 1)
    monkeypatch.setattr(train, "nll", lambda *_: None)
    with pytest.raises(FloatingPointError, match="the first output that is not is that of model"):
        run(*FAST, "--max_steps", 1, "--no-eval_before", out=tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_base_that_overflows_is_named_and_not_what_it_reached(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = 3e38
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    named = r"step 1: .*; first of all the output of model\.layers\.1\.mlp\.up_proj"
    for method in ("lora", "full"):
        with pytest.raises(RuntimeError, match=named):
            run("--method", method, *FAST, "--model", tmp_path / "model", "--preset", "tiny",
                "--no-eval_before", out=tmp_path / method)
        assert not (tmp_path / method / "adapter").exists()


def test_an_adapter_that_is_not_finite_is_not_saved(tiny, tmp_path):
    model = injected(tiny).float()
    record = dict(method="lora", targets=["q_proj", "down_proj"], rank=4)
    checkpoint.save_adapter(tmp_path / "a", model, record)
    held = load_file(tmp_path / "a" / "adapter.safetensors")
    for value in (math.nan, math.inf):
        model.model.layers[1].mlp.down_proj.lora_B.data[0, 0] = value
        with pytest.raises(ValueError, match=r"not saved: model\.layers\.1\.mlp\.down_proj\.lora_B is not "):
            checkpoint.save_adapter(tmp_path / "a", model, record)
        again = load_file(tmp_path / "a" / "adapter.safetensors")
        assert all(torch.equal(again[name], t) for name, t in held.items())


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch, capsys):
    def backward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train, "backward", backward)
    with pytest.raises(torch.OutOfMemoryError):
        run(*FAST, "--no-eval_before", out=tmp_path / "run")
    said = capsys.readouterr().err
    flags = ["--micro_batch_size", "--max_len", "--checkpointing", "--targets attention", "--rank",
             "BATCH_TOKENS"]
    assert sorted(flags, key=said.index) == flags
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Memory")[2]
    assert sorted(flags, key=readme.index) == flags


def test_without_an_exchange_of_names_a_directory_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.sys, "platform", "other")
    for words in "12":
        with checkpoint.new_directory(tmp_path / "a") as part:
            (part / "x").write_text(words)
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "x"] and (tmp_path / "a" / "x").read_text() == "2"
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: 1 / 0 if "part" in path.name else rename(path, to))
    with pytest.raises(ZeroDivisionError):
        with checkpoint.new_directory(tmp_path / "a") as part:
            (part / "x").write_text("3")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "x"] and (tmp_path / "a" / "x").read_text() == "2"


def test_compiled_blocks_are_compiled_anew_after_a_reinit(tmp_path, monkeypatch):
    """The new shapes would reach dynamo's limit of 8 recompilations, after which it falls back to eager."""
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: calls.append("compile"))
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    run("--method", "glora", *FAST, "--compile", "--max_steps", 5, "--reinit_every", "2s", "--no-eval_before",
        out=tmp_path / "run")
    assert calls == ["compile"] * 4 + ["reset"] * 2


def test_a_loss_that_is_not_finite_is_named(tiny):
    model = injected(tiny)
    batch = [([3, 4, 5], 1)]
    with pytest.raises(RuntimeError, match="step 7: loss nan.*not finite: loss; first of all .* no module"):
        train.check_finite(model, 7, float("nan"), 1.0, batch)
    with pytest.raises(RuntimeError, match="not finite: gradient norm"):
        train.check_finite(model, 7, 1.0, math.inf, batch)  # every gradient is finite, their norm is not
    train.check_finite(model, 7, 1.0, 1.0, batch)


def test_the_exit_status_of_a_failed_run_is_1_and_of_bad_input_2(tmp_path):
    broken = VARIANT + '''
def observe(model, t, T):
    next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))
'''
    (tmp_path / "mine.py").write_text(broken, encoding="utf-8")
    command = [sys.executable, str(ROOT / "train.py"), *FAST, "--no-eval_before",
               "--out_dir", str(tmp_path / "run")]
    failed = subprocess.run([*command, "--method", str(tmp_path / "mine.py")], capture_output=True, text=True,
                            cwd=tmp_path)
    assert failed.returncode == 1 and "Traceback" in failed.stderr and "step 1" in failed.stderr
    refused = subprocess.run([*command, "--method", "nope"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr
    assert not refused.stdout


BAD = {
    "unknown flag": (["--ranks", "8"], r"unrecognized arguments: --ranks 8"),
    "abbreviated flag": (["--warmup", "8"], r"unrecognized arguments: --warmup 8"),
    "another method's flag": (["--method", "lora", "--sigma", "1"], r"unrecognized arguments: --sigma"),
    "unknown method": (["--method", "lorra"], r"method 'lorra', expected one of .*gfa, .*lora"),
    "unknown task": (["--task", "bool"], r"task 'bool', expected one of arithmetic.* boolq"),
    "merge of what is no matrix": (["--method", "denselora", "--merge"],
                                   r"--merge: DenseLoRA's GELUs make its update a function of the input"),
    "unknown preset": (["--preset", "x"], r"preset 'x', expected one of tiny"),
    "no such data": (["--task", "boolq", "--data", "nowhere"],
                     r"nowhere: found none of commonsense/boolq\.json"),
    "no such model": (["--model", "nowhere", "--task", "arithmetic"], r"nowhere: no such model directory"),
    "rank 0": (["--rank", "0"], r"--rank 0, expected at least 1"),
    "rank too large": (["--rank", "65"],
                       r"rank 65 for model\.layers\.0\.self_attn\.k_proj, expected 1 to 64"),
    "GFA rank too large": (["--method", "gfa", "--rank", "900"],
                           r"rank 900 for a global matrix of \d+ x \d+, expected 1 to \d+"),
    "target": (["--targets", "q_proj,query"], r"target 'query' matches no nn\.Linear"),
    "no targets": (["--targets", ","], r"targets ',', expected"),
    "alpha without a place": (["--method", "gfa", "--alpha", "8"], r"GFA has no alpha"),
    "dropout": (["--dropout", "1"], r"--dropout 1\.0, expected 0 <= dropout < 1"),
    "negative": (["--val_rows", "-1"], r"--val_rows -1, expected at least 0"),
    "negative clip": (["--grad_clip", "-1"], r"--grad_clip -1\.0, expected at least 0"),
    "micro batch": (["--batch_size", "4", "--micro_batch_size", "3"],
                    r"4 is not a multiple of --micro_batch_size 3"),
    "the head": (["--targets", "q_proj,lm_head"], r"match the head, lm_head"),
    "choice": (["--schedule", "step"], r"argument --schedule: invalid choice: 'step'"),
    "reinit": (["--reinit_every", "2"], r"lora does not re-initialise"),
    "val_rows": (["--val_rows", "9000"], r"val_rows 9000, there are 8192 training rows"),
    "eval_every alone": (["--eval_every", "5"], r"--eval_every .* needs --val_rows"),
    "select": (["--select", "best"], r"--select best .* needs --val_rows"),
    "device": (["--device", "abacus"], r"device 'abacus': "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = BAD[name]
    assert re.search(message, refuses(capsys, *flags, "--out_dir", "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_out_dir_that_holds_a_run_is_kept_unless_overwrite(tmp_path, capsys):
    out = tmp_path / "run"
    run(*FAST, "--no-eval_before", out=out)
    first = (out / "summary.json").read_text()
    assert "holds another run; --overwrite replaces it" in refuses(capsys, *FAST, "--out_dir", out)
    assert (out / "summary.json").read_text() == first
    (out / "left").touch()
    run(*FAST, "--no-eval_before", "--overwrite", "--rank", 2, out=out)
    assert not (out / "left").exists() and json.loads((out / "summary.json").read_text())["rank"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "something else than a run" in refuses(capsys, *FAST, "--overwrite",
                                                  "--out_dir", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


# ------------------------------------------------------------------------------------ own files, real data

def test_a_users_own_file_trains_and_evaluates(tmp_path):
    rows = [dict(r, instruction=r["instruction"] + "?") for r in arithmetic.generate("train", 50, 1, 3)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    summary = run("--task", tmp_path / "mine.json", "--max_steps", 2, out=tmp_path / "run")
    assert summary["after"]["mean"] > 0.5           # one-step problems: the bundled model can do them
    assert len((tmp_path / "run" / "eval" / "mine.after.jsonl").read_text().splitlines()) == 5


def test_prompts_and_completions_train_and_evaluate_and_a_chat_is_one_line(tmp_path, capsys):
    rows = [dict(prompt=text.prompt_text(r), completion=r["output"], answer=r["answer"])
            for r in arithmetic.generate("train", 50, 1, 3)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    summary = run("--task", tmp_path / "mine.json", "--max_steps", 2, out=tmp_path / "run")
    assert summary["before"]["mean"] > 0.5          # asked as the bundled model was
    line = json.loads((tmp_path / "run" / "eval" / "mine.after.jsonl").read_text().splitlines()[0])
    assert line["prompt"] in [row["prompt"] for row in rows] and line["answer"] in line["output"]
    (tmp_path / "chat.jsonl").write_text(json.dumps(dict(messages=[])))
    assert "row 1 is a chat; convert it" in refuses(capsys, "--task", tmp_path / "chat.jsonl")
    assert "error: no such file: found none of nowhere.jsonl" in refuses(capsys, "--task", "nowhere.jsonl")


def test_one_set_trains_on_its_own_rows_of_the_mix(shared_data, tmp_path, capsys):
    summary = run("--task", "boolq", "--data", shared_data, "--max_steps", 1, "--eval_limit", 2,
                  "--batch_size", 2, "--no-eval_before", out=tmp_path / "run")
    assert "830 examples" in capsys.readouterr().out
    assert set(summary["after"]) == {"mean", "boolq"} and "absent" not in summary


def test_a_family_names_the_sets_that_are_not_there(shared_data, tmp_path, capsys):
    summary = run("--task", "commonsense", "--data", shared_data, "--max_steps", 1, "--eval_limit", 2,
                  "--train_rows", 20, "--batch_size", 2, "--no-eval_before", out=tmp_path / "run")
    assert summary["absent"] == ["social_i_qa"]
    assert len(summary["after"]) == 8           # seven sets and their mean
    assert set(summary["after_likelihood"]) == set(summary["majority"]) == set(summary["after"])
    assert "after_accuracy" not in summary
    assert ("not found: social_i_qa (commonsense/social_i_qa.json, from LLM-Adapters, "
            "dataset/social_i_qa/test.json); the mean is over the others") in capsys.readouterr().out


@pytest.mark.slow
def test_a_bf16_run_of_the_bundled_model_learns_as_well(tmp_path):
    summary = run("--method", "gfa", "--rank", 8, "--dtype", "bfloat16", out=tmp_path / "run")
    assert summary["before"]["mean"] <= 0.10 and summary["after"]["mean"] >= 0.95


def test_dtype_auto_is_the_checkpoints_bf16_where_the_processor_has_it(tiny, tmp_path, monkeypatch, capsys):
    """The bundled checkpoint is bf16 and runs in fp32 on any machine; a copy of it is like any other."""
    shutil.copytree(tiny, tmp_path / "copy")
    cpu, config = torch.device("cpu"), checkpoint.read_json(tiny / "config.json")
    kind = config.pop("torch_dtype", None) or config.pop("dtype")
    assert kind == "bfloat16"
    for spelling in ("dtype", "torch_dtype"):
        for said, has, want in (("bfloat16", True, torch.bfloat16), ("bfloat16", False, torch.float32),
                                ("float32", True, torch.float32)):
            checkpoint.write_json(tmp_path / "copy" / "config.json", config | {spelling: said})
            monkeypatch.setattr(checkpoint, "cpu_has_bf16", lambda has=has: has)
            assert checkpoint.pick_dtype("auto", cpu, tmp_path / "copy") == want
            printed = capsys.readouterr().out
            assert printed.startswith("dtype bfloat16, ") if want == torch.bfloat16 else not printed
    monkeypatch.setattr(checkpoint, "cpu_has_bf16", lambda: True)
    for path in (tiny, str(tiny)):
        assert checkpoint.pick_dtype("auto", cpu, path) == torch.float32
    assert checkpoint.pick_dtype("bfloat16", cpu, tiny) == torch.bfloat16
    assert train.parse([])[0].dtype == "float32" and train.parse(["--model", "x"])[0].dtype == "auto"


def test_the_flags_of_the_processor_are_the_systems():
    file = Path("/proc/cpuinfo")
    if not file.exists():
        pytest.skip("no /proc/cpuinfo")
    assert checkpoint.cpu_has_bf16() == ("avx512_bf16" in file.read_text().split())


# ------------------------------------------------------------------------------------ Lion's constants

@pytest.mark.parametrize("gradients, sign", [
    ((1, -0.449), 1), ((1, -0.451), -1),            # 0.9 · 0.05 + 0.1 g changes its sign at g = -0.45,
    ((1, 0, -0.427), 1), ((1, 0, -0.428), -1)])     # 0.9 · 0.95 · 0.05 + 0.1 g at g = -0.4275
def test_lions_last_step_turns_where_betas_of_0_9_and_0_95_put_it(gradients, sign):
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = train.Lion([p], lr=0.5)
    for g in gradients:
        before, p.grad = p.item(), torch.tensor([float(g)])
        optimizer.step()
    assert p.item() - before == -sign * 0.5
