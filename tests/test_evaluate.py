"""evaluate.py: the template, generation and scoring batched and alone, the choice of a task, the command."""
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import checkpoint
import decode as D
import evaluate as E
from data import arithmetic, tasks, text

FLOAT32 = 1e-5      # losses are float32 in a float64 model too: an ulp of its largest logits, 28, is 2e-6


@pytest.fixture(scope="module")
def tok(tiny):
    return text.Tokenizer(tiny, checkpoint.read_config(checkpoint.read_json(tiny / "config.json")))


@pytest.fixture(scope="module")
def net(tiny):
    return checkpoint.load(tiny, torch.float64)


@pytest.fixture(scope="module")
def prompts(tok):
    """Prompts of very different lengths."""
    rows = [row for steps in (1, 1, 1, 2, 3, 5, 9, 20, 40)
            for row in arithmetic.generate("test", 1, steps, steps)]
    return [text.prompt_ids(tok, row) for row in rows]


# ------------------------------------------------------------------------------------ template

def test_the_template_is_alpacas_without_stray_spaces():
    row = dict(instruction="Add {1} and 2.", input="", output="3")
    assert text.prompt_text(row) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Response:\n")
    assert text.prompt_text(dict(row, input="be brief")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {1} and 2.\n\n### Input:\nbe brief\n\n### Response:\n")
    assert text.prompt_text({"instruction": "a"}) == text.prompt_text({"instruction": "a", "input": None})


def test_the_bundled_tokenizer_knows_the_template(tok):
    assert len(text.prompt_ids(tok, dict(instruction="", input=""))) == 2


def test_the_prompts_ids_are_a_prefix_of_the_examples(tok):
    row = dict(instruction="a", input="", output=" b c")
    ids, start = text.example(tok, row)
    assert ids[:start] == text.prompt_ids(tok, row) and ids[-1] == tok.eos[0]
    assert text.example(tok, row, " b c") == (ids[:-1], start)


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
        monkeypatch.setattr(D, "BATCH_TOKENS", budget)
        assert D.generate(net, prompts, 30, tok.eos) == want
        sizes.append(len(list(D.batches([len(p) + 30 for p in prompts], budget))))
    assert sizes[0] == 9 > sizes[1] > sizes[2] == 1


def test_generation_stops_at_any_eos_and_at_the_limit(net, tok, prompts):
    free = one_by_one(net, prompts[0], 12, [])
    assert len(set(free[:5])) > 2
    assert D.generate(net, prompts[:1], 12, eos=[]) == [free]
    assert D.generate(net, prompts[:1], 5, eos=[]) == [free[:5]]
    stop = free[4]
    assert D.generate(net, prompts[:1], 12, eos=[10**6, stop]) == [free[:free.index(stop)]]


def test_logits_beyond_the_vocabulary_are_masked(net, tok, prompts):
    want, padded = D.generate(net, prompts, 10, tok.eos), net.cfg.vocab_size
    widen = lambda m, a, logits: torch.cat([logits, logits.new_full((*logits.shape[:-1], 8), 1e6)], -1)
    with net.register_forward_hook(widen):
        assert D.generate(net, prompts[:1], 1, tok.eos) == [[padded]]
        assert D.generate(net, prompts, 10, tok.eos, tok.size) == want


def test_a_token_is_drawn_from_the_likeliest_that_hold_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))
    assert D.pick(logits).tolist() == [0, 3] and D.pick(logits, 1e-4).tolist() == [0, 3]
    torch.manual_seed(0)
    many = logits.repeat(20000, 1)
    for temperature, top_p, want in (
            (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]), (1.0, 0.9, [0.5, 0.3, 0.15, 0]),
            (1.0, 0.79, [0.5, 0.3, 0, 0]), (1.0, 0.49, [1, 0, 0, 0]), (1.0, 0.01, [1, 0, 0, 0]),
            (0.5, 1.0, [0.25, 0.09, 0.0225, 0.0025])):
        drawn = D.pick(many, temperature, top_p).view(-1, 2)
        for column, order in ((0, [0, 1, 2, 3]), (1, [3, 2, 1, 0])):
            share = drawn[:, column].bincount(minlength=4)[order] / len(drawn)
            want_share = torch.tensor(want) / sum(want)     # its deviation in 20000 draws is at most 0.0035
            torch.testing.assert_close(share, want_share, rtol=0, atol=0.02)
            assert all(s == 0 for s, w in zip(share, want) if w == 0)


def test_tokens_that_hold_exactly_top_p_are_enough():
    """Quarters and their sums are exact in any arithmetic; which two of the four are kept is the sort's."""
    torch.manual_seed(0)
    drawn = [D.pick(torch.zeros(1, 4), 1.0, 0.5).item() for _ in range(60)]
    assert len(set(drawn)) == 2


def test_sampling_differs_from_sample_to_sample_and_repeats_with_the_seed(net, tok, prompts):
    def draw():
        torch.manual_seed(1)
        return D.generate(net, prompts[:1] * 6, 12, tok.eos, tok.size, temperature=2.0)

    first = draw()
    assert len(set(map(tuple, first))) > 1 and draw() == first


def test_a_row_stops_soon_after_it_is_finished(net, tok, prompts, monkeypatch):
    monkeypatch.setattr(D, "STOP_EVERY", 4)
    free = D.generate(net, prompts[:3], 20, [])
    asked = []
    finished = lambda i, ids: asked.append((i, len(ids))) or len(ids) >= (8 if i else 4)
    assert D.generate(net, prompts[:3], 20, [], finished=finished) == [free[0][:4], free[1][:8], free[2][:8]]
    assert {n for _, n in asked} == {4, 8} and {i for i, _ in asked} == {0, 1, 2}
    told = {}
    D.generate(net, prompts[:3], 5, [], each=told.__setitem__)
    assert told == {i: row[:5] for i, row in enumerate(free)}


def test_rows_that_have_ended_leave_the_batch(net, tok, prompts, monkeypatch):
    want, sizes = [one_by_one(net, p, 30, tok.eos) for p in prompts], []
    handle = net.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    assert D.generate(net, prompts, 30, tok.eos) == want
    handle.remove()
    lasts = [len(row) + 1 if len(row) < 30 else 30 for row in want]             # tokens drawn, EOS included
    assert sizes == [sum(map(len, prompts))] + [sum(n > step for n in lasts) for step in range(1, max(lasts))]


# ------------------------------------------------------------------------------------ likelihood

def test_nll_is_the_sum_of_token_losses_in_any_batching(net, tok, monkeypatch):
    examples = [text.example(tok, row) for row in arithmetic.generate("test", 7, 2, 0)]
    examples.append((examples[0][0], 0))                # supervised from the first token that has a past
    want = []
    for ids, start in examples:
        log_p = torch.log_softmax(net(torch.tensor([ids]))[0], -1)
        parts = [-log_p[t - 1, ids[t]].item() for t in range(max(start, 1), len(ids))]
        want.append((pytest.approx(sum(parts), rel=FLOAT32), len(parts)))
    for budget in (1, 200, 10**6):
        monkeypatch.setattr(D, "BATCH_TOKENS", budget)
        assert E.nll(net, examples) == want


class Choosing:
    """A task of three rows with choices, and a scorer that is easy to follow."""
    KIND, MAX_NEW_TOKENS, STOP, TASKS = "generate", 3, (), {}

    @staticmethod
    def score(outputs, rows, rule="strict"):
        return dict(accuracy=0.0, extracted=outputs, correct=[False] * len(rows), majority=2 / 3)


def test_likelihood_picks_the_choice_with_the_least_loss(net, tok, tmp_path):
    rows = [dict(instruction=f"{i} + 1", input="", output="yes", answer="b" if i else "a",
                 choices={"a": "The answer is 3.", "b": "zzz qqq xxx"}) for i in range(3)]
    result = E.evaluate(net, tok, Choosing, rows, tmp_path / "dump.jsonl")
    assert result["likelihood"] == pytest.approx(1 / 3) and result["majority"] == 2 / 3
    dump = [json.loads(line) for line in (tmp_path / "dump.jsonl").read_text().splitlines()]
    assert [(line["chosen"], line["answer"]) for line in dump] == [("a", "a"), ("a", "b"), ("a", "b")]
    losses = E.nll(net, [text.example(tok, row) for row in rows])
    want = sum(a for a, _ in losses) / sum(b for _, b in losses)
    assert result["loss"] == pytest.approx(want, rel=FLOAT32)
    assert math.isfinite(result["loss"])


def test_the_likelihood_of_choices_is_that_of_each_alone_and_a_prompt_is_read_once(net, tok):
    rows = [dict(row, choices={w: f"The answer is {w}." for w in ("7", "12", "3 apples")})
            for row in arithmetic.generate("test", 4, 2, 0)]
    rows[1] = {key: value for key, value in rows[1].items() if key != "choices"}
    seen = []
    handle = net.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    losses, chosen = E.likelihoods(net, tok, rows)
    handle.remove()
    assert losses == [(pytest.approx(total, rel=FLOAT32), n)
                      for total, n in E.nll(net, [text.example(tok, row) for row in rows])]
    spent = 0
    for i, row in enumerate(rows):
        examples = [text.example(tok, row, words) for words in row.get("choices", {}).values()]
        spent += len(text.example(tok, row)[0]) + sum(len(ids) - start for ids, start in examples)
        if examples:
            totals = [total for total, _ in E.nll(net, examples)]
            assert chosen[i] == list(row["choices"])[totals.index(min(totals))]
    assert set(chosen) == {0, 2, 3} and sum(seen) <= spent


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


# ------------------------------------------------------------------------------------ long prompts

def test_what_no_position_is_left_for_is_cut_alike_for_both_losses_and_said(net, tok, tmp_path, capsys):
    short = arithmetic.generate("test", 2, 1, 0)
    row = dict(short[0], instruction="Ben has 3 apples. " * 3300 + short[0]["instruction"])
    long_output = dict(short[1], output="3 + 4 = 7. " * 1000)
    choices = {"7": "The answer is 7.", "8": "The answer is 8."}
    rows = [short[0], dict(row, choices=choices), long_output]
    whole, seen = text.prompt_ids(tok, row), []
    handle = net.register_forward_pre_hook(lambda m, a: seen.append(a[0].numel()))
    E.evaluate_sets(net, tok, arithmetic, {"x": rows}, lambda name: tmp_path / "x.jsonl")
    handle.remove()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "x: 2 of 3 rows cut to the model's 512 positions" and said[1].startswith("x  ")
    room = arithmetic.MAX_NEW_TOKENS
    prompt = text.prompt_ids(tok, row, room)
    assert len(prompt) == 512 - room and prompt == whole[room - 512:]
    assert 512 < max(seen) <= 3 * 512 < len(whole)             # three rows at once
    for words in (None, "The answer is 7.", "1 + 1 = 2. " * 1000):
        ids, start = text.example(tok, row, words, room)
        assert ids[:start] == prompt and ids == (prompt + text.example(tok, row, words)[0][len(whole):])[:512]
    right = tok.encode(row["output"]) + tok.eos[:1]
    total, count = E.nll(net, [(prompt + right, len(prompt))])[0]
    losses, chosen = E.likelihoods(net, tok, rows, room)
    assert losses[1] == (pytest.approx(total, rel=FLOAT32), count) and set(chosen) == {1}
    assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[1])["output"] == tok.continuation(
        prompt, one_by_one(net, prompt, room, tok.eos, tok.size))


def test_nothing_is_said_where_nothing_is_cut_and_short_rows_are_as_without_a_bound(net, tok, capsys):
    rows = arithmetic.generate("test", 4, 2, 0)
    E.evaluate_sets(net, tok, arithmetic, {"x": rows})
    assert "cut" not in capsys.readouterr().out
    assert [text.example(tok, row, room=40) for row in rows] == [text.example(tok, row) for row in rows]
    longest = 512 - 40
    filled = next(dict(rows[0], instruction="3 " * n) for n in range(longest)
                  if len(text.prompt_ids(tok, dict(rows[0], instruction="3 " * n))) == longest)
    assert text.encode(tok, [filled], 512, room=40)[1] == 0
    over = dict(filled, instruction=filled["instruction"] + "3 ")
    assert text.encode(tok, [over], 512, room=40)[1] == 1
    E.evaluate_sets(net, tok, arithmetic, {"x": [filled, over]})
    assert capsys.readouterr().out.startswith("x: 1 of 2 rows cut to the model's 512 positions\n")


def test_a_cut_prompt_keeps_its_bos_and_at_least_half_of_the_positions(tiny):
    cfg = checkpoint.read_config(checkpoint.read_json(tiny / "config.json"))
    tok, row = text.Tokenizer(tiny, cfg), dict(instruction="3 apples " * 1000, input="", output="7")
    whole = text.prompt_ids(tok, row)
    tok.bos = [5]
    assert text.prompt_ids(tok, row, 100) == [5, *whole[-411:]]
    assert text.prompt_ids(tok, row, 512) == text.prompt_ids(tok, row, 10**6) == [5, *whole[-255:]]
    del cfg.max_position_embeddings             # a decoder's file need not say
    assert text.prompt_ids(text.Tokenizer(tiny, cfg), row, 100) == whole


# ------------------------------------------------------------------------------------ outputs on disk

def test_an_interrupted_evaluation_goes_on_where_it_stopped(net, tok, tmp_path, monkeypatch):
    rows, file = arithmetic.generate("test", 6, 1, 0), tmp_path / "easy.jsonl"
    want = E.evaluate(net, tok, arithmetic, rows, file)
    whole = file.read_text()
    kept = [json.loads(line) for line in whole.splitlines()][:2]
    kept[0]["output"] = "The answer is 12345."                  # what is there is believed
    kept = "".join(json.dumps({k: line[k] for k in ("row", "prompt", "output")}) + "\n" for line in kept)
    file.write_text(kept + whole.splitlines()[2][:30])
    asked = []
    real = D.generate
    counted = lambda model, prompts, *a, **k: asked.append(len(prompts)) or real(model, prompts, *a, **k)
    monkeypatch.setattr(E, "generate", counted)
    E.evaluate(net, tok, arithmetic, rows, file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert asked == [4] and lines[0]["extracted"] == "12345" and not lines[0]["correct"]
    assert lines[1:] == [json.loads(line) for line in whole.splitlines()][1:] and want["accuracy"] > 0.5
    with pytest.raises(ValueError, match="the output of row 0 is to another prompt than this run's"):
        E.evaluate(net, tok, arithmetic, rows[1:], file)


def test_outputs_survive_line_separators_and_two_stops(net, tok, tmp_path):
    """U+2028 is no end of a line of JSON; what follows a cut line starts a line of its own."""
    rows, file = arithmetic.generate("test", 4, 1, 0), tmp_path / "easy.jsonl"
    first = json.dumps(dict(row=0, prompt=text.shown(rows[0]), output="a\u2028b\u0085c"), ensure_ascii=False)
    file.write_bytes((first + "\n" + '{"row": 1, "prompt": "\u00e9').encode()[:-1])
    E.evaluate(net, tok, arithmetic, rows, file)
    lines = E.read_lines(file)
    assert sorted(lines) == [0, 1, 2, 3] and lines[0]["output"] == "a\u2028b\u0085c"
    assert lines[1]["correct"] in (True, False)


def test_a_resumed_sampling_draws_anew(net, tok, tmp_path):
    rows, file = arithmetic.generate("test", 1, 1, 0) * 8, tmp_path / "s.jsonl"
    torch.manual_seed(3)
    E.complete(net, tok, arithmetic, rows, file, temperature=3.0)
    lines = file.read_text().split("\n")
    first = [json.loads(line)["output"] for line in lines[:4]]
    file.write_text("\n".join(lines[:4]) + "\n")
    torch.manual_seed(3)
    again = E.complete(net, tok, arithmetic, rows, file, temperature=3.0)
    assert again[:4] == first and again[4:] != first


def test_scoring_again_keeps_what_only_the_model_could_tell(net, tok, tmp_path):
    choices = {"a": "The answer is 2.", "b": "zzz"}
    rows = [dict(instruction="1 + 1", input="", output="yes", answer="a", choices=choices)]
    E.evaluate(net, tok, Choosing, rows, tmp_path / "x.jsonl")
    before = json.loads((tmp_path / "x.jsonl").read_text())
    E.evaluate(None, None, Choosing, rows, tmp_path / "x.jsonl")
    assert json.loads((tmp_path / "x.jsonl").read_text()) == before and before["chosen"] in "ab"


def test_a_continuation_keeps_the_space_that_a_decoder_drops_at_the_start():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    fast = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "<x>": 2, "[UNK]": 3}, "[UNK]"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast.add_special_tokens(["<x>"])
    tok = text.Tokenizer.__new__(text.Tokenizer)
    tok.fast = fast
    assert tok.decode([1]) == "b" and tok.continuation([0, 0], [1]) == " b"
    assert tok.continuation([0], [1, 2]) == " b" and "<x>" in tok.continuation([0], [1, 2], special=True)


def test_each_output_is_on_disk_as_soon_as_its_batch_is_done_and_before_any_score(net, tok, tmp_path,
                                                                                  monkeypatch):
    rows, file, seen = arithmetic.generate("test", 4, 1, 0), tmp_path / "easy.jsonl", []
    monkeypatch.setattr(D, "BATCH_TOKENS", 1)                   # a row a batch
    monkeypatch.setattr(E, "nll", lambda *a: 1 / 0)
    forward, written = net.forward, lambda: file.read_text().count("\n") if file.exists() else 0
    monkeypatch.setattr(net, "forward", lambda *a, **k: seen.append(written()) or forward(*a, **k))
    with pytest.raises(ZeroDivisionError):
        E.evaluate(net, tok, arithmetic, rows, file)
    assert set(seen) == {0, 1, 2, 3} and file.read_text().count("\n") == 4


def test_the_command_resumes_scores_again_and_refuses_other_settings(tmp_path, capsys):
    flags = ["--task", "two_step", "--limit", "3", "--out", str(tmp_path / "out")]
    E.main(flags)
    first, file = capsys.readouterr().out, tmp_path / "out" / "two_step.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:2]) + "\n")
    E.main(flags)
    assert capsys.readouterr().out == first and file.read_text().splitlines() == lines
    assert all(not json.loads(line)["correct"] for line in lines)
    right = arithmetic.rows(None, "two_step", "test")[0]["answer"]
    answered = json.dumps(json.loads(lines[0]) | {"output": f"The answer is {right}."})
    file.write_text("\n".join([answered, *lines[1:]]) + "\n")
    E.main([*flags, "--score_only", "--model", str(ROOT / "data" / "tiny")])
    assert "accuracy  33.3%  (3 rows)" in capsys.readouterr().out
    for more, message in ((["--limit", "2"], "a run with other settings: limit 3"),
                          (["--temperature", "1"], "other settings: temperature 0")):
        with pytest.raises(SystemExit):
            E.main([*flags, *more])
        assert message in capsys.readouterr().err
    file.write_text(lines[0] + "\n")
    with pytest.raises(SystemExit):
        E.main([*flags, "--score_only"])
    assert "holds 1 of 3 outputs" in capsys.readouterr().err


def test_n_samples_a_row_are_scored_together(net, tok, tmp_path):
    rows = arithmetic.generate("test", 3, 1, 0)
    torch.manual_seed(0)
    # at this temperature the likeliest output of a row has a chance of about 0.001
    E.evaluate(net, tok, arithmetic, rows, tmp_path / "s.jsonl", n=4, temperature=3.0)
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(12)) and len({line["prompt"] for line in lines}) == 3
    assert all(len({line["prompt"] for line in lines[i:i + 4]}) == 1 for i in (0, 4, 8))
    assert len({line["output"] for line in lines[:4]}) > 1


class Executed:
    KIND, MAX_NEW_TOKENS, STOP, TASKS = "execute", 24, (r"nothing",), {"x": dict(metric="pass@1")}

    @staticmethod
    def score(outputs, rows, rule="strict"):
        return {"pass@1": 0.5, "extracted": outputs, "correct": [True] * len(rows)}


def test_code_is_scored_only_where_that_is_allowed(net, tok, tmp_path, capsys):
    rows = [dict(row, prefix="def f():\n") for row in arithmetic.generate("test", 2, 1, 0)]
    dump = lambda name: tmp_path / "x.jsonl"
    table, printed = E.evaluate_sets(net, tok, Executed, {"x": rows}, dump), capsys.readouterr().out
    assert set(table) == {"loss"}
    assert "x: not scored, since that runs generated code: --allow_code_execution" in printed
    raw = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert set(raw[0]) == {"row", "prompt", "output"}
    assert raw[0]["prompt"].endswith("### Response:\ndef f():\n")
    table = E.evaluate_sets(None, None, Executed, {"x": rows}, dump, execute=True)
    assert table["main"] == {"mean": 0.5, "x": 0.5} and "pass@1  50.0%" in capsys.readouterr().out


def test_the_list_shows_every_task(capsys):
    E.main(["--list"])
    out = capsys.readouterr().out.splitlines()
    mixes = out[out.index("") + 1:]
    out = out[:out.index("")]
    assert len(out) == sum(len(module.TASKS) for module in tasks.task_files()) > 20
    line = next(line for line in out if " SVAMP " in line)
    assert line.split()[:5] == ["math", "SVAMP", "1000", "rows", "accuracy"]
    assert "math/SVAMP.json" in line and "from LLM-Adapters" in line
    clone = "git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --data LLM-Adapters"
    assert mixes[0] == f"LLM-Adapters: {clone}"
    assert f"commonsense  commonsense_170k: {clone}" in mixes
    assert len(mixes) == 2 + sum(len(getattr(module, "MIXES", ())) for module in tasks.task_files()) > 10


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        E.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "default: None" not in said
    groups = dict(what="--dtype", data="--limit", output="--out", evaluation="--rule")
    for group, flag in groups.items():
        assert flag in said.partition(f"\n{group}:\n")[2].partition("\n\n")[0], flag


def test_every_training_mix_has_a_source_and_one_that_is_missing_is_told_where_it_is(tmp_path):
    for module in tasks.task_files():
        names = getattr(module, "MIXES", ())
        assert set(names) <= set(tasks.MIXES)
        if not names:
            continue
        with pytest.raises(ValueError, match=f"^{tmp_path}: found none of .*{names[0]}") as error:
            tasks.train_rows(module, tmp_path, module.FAMILY)
        assert all(f"{name}: {tasks.MIXES[name]}" in str(error.value) for name in names)
        with pytest.raises(ValueError, match=f"training mixes: {names[1]}: [^;]*$"):
            tasks.train_rows(module, tmp_path, module.FAMILY, names[1])


def test_a_set_that_is_missing_is_told_where_it_is(tmp_path):
    for name, words in (("boolq", "from LLM-Adapters, dataset/boolq/test.json; git clone"),
                        ("math", "not found: MultiArith .*; git clone"), ("rte", "from GLUE, RTE/dev.tsv$")):
        module, _, names = tasks.find_task(name)
        with pytest.raises(ValueError, match=words):
            tasks.test_rows(module, names, tmp_path)


@pytest.mark.parametrize("kind, before, seen, words, note", [
    ("generate", True, 1000, "before and after training: 30 rows, up to 40 new tokens each", ""),
    ("generate", False, 80, "after training: 30 rows, up to 40 new tokens each", ""),
    ("generate", False, 79, "after training: 30 rows, up to 40 new tokens each",
     "30 x 40 x 1 = 1,200 tokens, 79 x 5 x 3 = 1,185 (backward counts as 2); --eval_limit 14?"),
    ("generate", True, 79, "before and after training: 30 rows, up to 40 new tokens each",
     "30 x 40 x 2 = 2,400 tokens, 79 x 5 x 3 = 1,185 (backward counts as 2); --eval_limit 7?"),
    ("generate", False, 1, "after training: 30 rows, up to 40 new tokens each",
     "30 x 40 x 1 = 1,200 tokens, 1 x 5 x 3 = 15 (backward counts as 2); --eval_limit 1?"),
    ("classify", False, 10, "after training: 30 rows, a label each", ""),
    ("classify", False, 9, "after training: 30 rows, a label each",
     "30 x 5 x 1 = 150 tokens, 9 x 5 x 3 = 135 (backward counts as 2); --eval_limit 13?")])
def test_the_cost_of_evaluation_is_said_and_eval_limit_suggested_where_it_is_more_than_trainings(
        kind, before, seen, words, note, capsys):
    module = SimpleNamespace(KIND=kind, MAX_NEW_TOKENS=40)
    tasks.forecast(module, dict(a=range(10), b=range(20)), before, [([0] * 4, 1), ([0] * 6, 1)], seen)
    note = note and f"note: may take longer than training: {note}\n"
    assert capsys.readouterr().out == f"evaluation {words}\n{note}"


def test_names_of_measures_are_said_in_words(capsys):
    tasks.explain(dict(accuracy=1, majority=1, likelihood=1))
    assert capsys.readouterr().out == (
        "majority: the accuracy of the commonest answer, given to every row\n"
        "likelihood: the accuracy of the likeliest choice, with nothing generated\n")
    tasks.explain(dict(accuracy=1))
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------ tasks, the command

def test_a_task_is_a_family_a_set_or_a_path():
    assert tasks.find_task("arithmetic")[2] == ["two_step"]
    module, _, names = tasks.find_task("commonsense")
    assert module.FAMILY == "commonsense" and len(names) == 8
    assert tasks.find_task("ARC-Easy") == (module, "ARC-Easy", ["ARC-Easy"])
    assert tasks.find_task("some/mine.jsonl")[2] == ["some/mine.jsonl"]
    assert tasks.find_task("arc-easy") == tasks.find_task("ARC-Easy")           # in any case
    assert tasks.find_task("svamp")[1:] == ("SVAMP", ["SVAMP"]) and tasks.find_task("MATH")[1] == "math"
    with pytest.raises(ValueError, match="task 'own', expected one of arithmetic"):
        tasks.find_task("own")


def test_every_task_file_meets_its_contract():
    others = ("__init__", "sandbox", "tasks", "text")
    stems = [f.stem for f in sorted((ROOT / "data").glob("*.py")) if f.stem not in others]
    assert {"arithmetic", "commonsense", "math_reasoning", "code_generation", "glue", "own"} == set(stems)
    for stem in stems:
        module = __import__(f"data.{stem}", fromlist=["x"])
        assert module.KIND in ("generate", "choose", "classify", "execute") and module.MAX_NEW_TOKENS > 0
        assert isinstance(module.STOP, tuple)
        assert re.search(r'\{"\w+": ', module.__doc__) and "Metric: " in module.__doc__
        assert callable(module.rows) and callable(module.score)
        for entry in module.TASKS.values():
            assert {"rows", "metric", "file", "source"} <= set(entry)
        lines = Path(module.__file__).read_text(encoding="utf-8").splitlines()
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        imported = {line.split()[1].partition(".")[0] for line in imports}
        assert imported <= sys.stdlib_module_names | {"data"}       # what of data: test_rooms


def test_the_command_runs_alone_with_an_adapter(tiny, tmp_path):
    net = checkpoint.load(tiny)
    lora = checkpoint.load_method("lora")
    lora.inject(net, ("q_proj",), 2)
    checkpoint.save_adapter(tmp_path / "a", net, dict(method="lora", targets=["q_proj"], rank=2))
    command = [sys.executable, str(ROOT / "evaluate.py"), "--task", "arithmetic", "--limit", "5",
               "--adapter", str(tmp_path / "a")]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("two_step") and "(5 rows)" in done.stdout
    assert len((tmp_path / "out" / "two_step.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("flags, message", [
    (["--adapter", "nowhere"], "nowhere/adapter.json: No such file"),
    (["--model", "nowhere"], "nowhere: no such model directory"),
    (["--task", "x"], "task 'x', expected one of"),
    (["--task", "boolq"], "found none of commonsense/boolq.json, boolq.json, dataset/boolq/test.json "
                          "(.gz or not); from LLM-Adapters, dataset/boolq"),
    (["--limit", "0"], "--limit 0, expected at least 1"),
    (["--out", "."], ".: exists already, and holds no run of evaluate.py"),
    (["--adapter", ""], "--adapter '', expected a path"),
    (["--method", "x.py"], "--method is that of an adapter"),
    (["--temperature", "nan"], "--temperature nan --top_p 1, expected 0 or more"),
    (["--temperature", "1e-40"], "--temperature 1e-40 --top_p 1, expected 0 or more"),
    (["--seed", "-1"], "--seed -1, expected at least 0"),
    (["--device", "meta"], "device 'meta': "),
    (["--score_only"], "--score_only: no outputs in --out None"),
    (["--n", "4"], "--n 4: greedy outputs are all the same"),
    (["--prompt", "x", "--out", "y"], "--prompt prints one answer: no --out"),
    (["--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens 0, expected at least 1"),
    (["--top_p", "0"], "expected 0 or more, and 0 < top_p <= 1"),
    (["--task", "math"], ".: not found: MultiArith (math/MultiArith.json, from LLM-Adapters, "
                         "dataset/MultiArith/test.json); gsm8k"),
    (["--task", "sst2", "--n", "3", "--temperature", "1"], "--n 3: a classifier has one answer"),
    (["--what"], "unrecognized arguments: --what")])
def test_the_command_refuses_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        E.main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("evaluate.py: error: ")
    assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_trains_on_after_an_evaluation_that_failed(tiny):
    net = checkpoint.load(tiny).train()
    with pytest.raises(ZeroDivisionError), E.eval_mode(net):
        assert not net.training
        raise ZeroDivisionError
    assert net.training


# ------------------------------------------------------------------------------------ nothing stale, no NaN

def adapter_of(tiny, directory, std):
    net = checkpoint.load(tiny)
    checkpoint.load_method("lora").inject(net, ("q_proj",), 2)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, std)
    checkpoint.save_adapter(directory, net, dict(method="lora", targets=["q_proj"], rank=2))


def test_an_evaluation_of_something_else_under_the_same_names_is_refused(tiny, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    adapter_of(tiny, tmp_path / "a", 0.1)
    model, data = tmp_path / "model", tmp_path / "mine.json"
    shutil.copytree(tiny, model)
    rows = [dict(instruction=f"{i} + 1", input="", output=f"The answer is {i + 1}.") for i in range(3)]
    data.write_text(json.dumps(rows))
    flags = ["--model", str(model), "--adapter", str(tmp_path / "a"), "--task", str(data),
             "--out", str(tmp_path / "out")]
    E.main(flags)
    first = capsys.readouterr().out
    E.main(flags)
    assert capsys.readouterr().out == first

    def refused(*more):
        with pytest.raises(SystemExit):
            E.main([*flags, *more])
        return capsys.readouterr().err.partition("other settings: ")[2].strip()

    whole = data.read_text()
    data.write_text(whole.replace("The", "An"))
    assert refused() == f"content of {data}"
    data.write_text(whole)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(config, rms_norm_eps=1e-6)))
    assert refused() == refused("--score_only") == "content of the model"
    (model / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(text, "PROMPT", text.PROMPT.replace("request", "wish"))
        assert refused() == "content of the prompt"
    E.main(flags)
    adapter_of(tiny, tmp_path / "a", 0.2)
    assert refused() == refused("--score_only") == "content of the adapter"
    shutil.rmtree(tmp_path / "a")                       # what was evaluated can be scored without it
    E.main([*flags, "--score_only"])


def test_the_command_runs_a_method_file_that_it_is_told_of(tiny, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_bytes(checkpoint.method_files()["lora"].read_bytes())
    net = checkpoint.load(tiny)
    checkpoint.load_method(mine).inject(net, ("q_proj",), 2)
    checkpoint.save_adapter(tmp_path / "a", net, dict(method=str(mine), targets=["q_proj"], rank=2))
    flags = ["--task", "arithmetic", "--limit", "2", "--adapter", str(tmp_path / "a")]
    with pytest.raises(SystemExit):
        E.main(flags)
    assert "mine.py' is none of" in capsys.readouterr().err
    E.main([*flags, "--method", str(mine)])
    assert "(2 rows)" in capsys.readouterr().out


def test_a_loss_that_is_no_number_is_no_score_and_names_the_first_module(tiny, tmp_path, capsys):
    """Every weight is finite, and what they make is not."""
    net = checkpoint.load(tiny)
    with torch.no_grad():
        net.model.layers[2].mlp.up_proj.weight.fill_(3e38)
    checkpoint.save_merged(tmp_path / "m", net, tiny)
    with pytest.raises(SystemExit) as stop:
        E.main(["--model", str(tmp_path / "m"), "--task", "arithmetic", "--limit", "2", "--dtype", "float32"])
    printed = capsys.readouterr()
    assert stop.value.code == 1 and "loss" not in printed.out
    assert printed.err == ("evaluate.py: the loss is not finite; the first output that is not is that of "
                           "model.layers.2.mlp.up_proj\n")


@pytest.mark.parametrize("line, message", [
    ("[]", "line 2: found a list, expected an object"), ("null", "line 2: found a NoneType"),
    ('{"row": 1}', "line 2: no 'prompt'"),
    ('{"row": "1", "prompt": "", "output": ""}', "line 2: row '1', expected a whole number"),
    ('{"row": 1, "prompt": PROMPT, "output": 3}', "output 3 of row 1 is not of this task")])
def test_a_line_of_outputs_that_is_none_is_one_clear_error(line, message, tmp_path):
    rows, file = arithmetic.generate("test", 3, 1, 0), tmp_path / "easy.jsonl"
    lines = [json.dumps(dict(row=i, prompt=text.shown(row), output="x")) for i, row in enumerate(rows)]
    lines[1] = line.replace("PROMPT", json.dumps(text.shown(rows[1])))
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        E.evaluate(None, None, arithmetic, rows, file)


# ------------------------------------------------------------------------------------ --prompt

def test_a_stream_is_the_text_in_parts_and_no_part_has_half_a_character(tok, monkeypatch):
    want, parts = "an ñ → 😀\ufffd, and \u65e5\u672c.", []
    ids = tok.encode(want)
    assert len(ids) > len(want)                         # characters of several tokens
    monkeypatch.setattr(tok, "eos", tok.encode("Z"))    # a token that no decoder leaves out
    monkeypatch.setattr("builtins.print", lambda words, end, flush: parts.append(words + end))

    def batch(model, prompts, room, vocabulary, temperature, top_p, ended):
        assert (room, vocabulary, temperature, top_p) == (len(ids) + 1, tok.size, 0.5, 0.9)
        over = [ended(0, new[:i + 1]) for i in range(len(new))]
        assert not any(over[:-1]) and over[-1]
    monkeypatch.setattr(D, "generate_batch", batch)
    for new in (ids + tok.eos, [*ids, ids[-1]]):        # closed, or out of room
        parts.clear()
        D.stream(None, tok, tok.encode("x:"), len(ids) + 1, 0.5, 0.9)
        assert "".join(parts) == want + "." * (new[-1] == ids[-1]) + "\n"
        assert sum("\ufffd" in part for part in parts) == 1 and len(parts) > len(want) / 2


@pytest.fixture
def answers(capsys):
    def run(*flags):
        E.main([*map(str, flags)])
        return capsys.readouterr().out
    return run


def test_prompt_is_as_it_is_for_an_adapter_trained_without_the_template(answers, tok, tiny, tmp_path):
    net, asked = checkpoint.load(tiny), "Tom has 3 pens and buys 4. How many has he?"
    checkpoint.load_method("lora").inject(net, ("q_proj",), 2)
    record = dict(method="lora", targets=["q_proj"], rank=2, model=str(tiny))
    for template, prompt in ((True, dict(instruction=asked)), (False, dict(prompt=asked))):
        checkpoint.save_adapter(tmp_path / "adapter", net, record | dict(template=template))
        prompt = text.prompt_ids(tok, prompt)
        [ids] = D.generate(net, [prompt], 9, tok.eos, tok.size)
        said = answers("--adapter", tmp_path / "adapter", "--prompt", asked, "--max_new_tokens", 9)
        assert said == tok.continuation(prompt, ids) + "\n"


def test_a_runs_directory_is_told_from_its_adapters(answers, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(SystemExit):
        E.main(["--adapter", str(tmp_path), "--model", str(checkpoint.TINY), "--prompt", "x"])
    assert f"{tmp_path}: a run, whose adapter is {tmp_path / 'adapter'}" in capsys.readouterr().err


def test_prompt_answers_in_the_trained_template_by_the_bundled_model(answers, tok, tiny):
    asked = "Tom has 3 pens and buys 4. How many has he?"
    net, prompt = checkpoint.load(tiny), text.prompt_ids(tok, dict(instruction=asked))
    [ids] = D.generate(net, [prompt], 128, tok.eos, tok.size)
    assert answers("--prompt", asked) == tok.continuation(prompt, ids) + "\n"
    assert answers("--prompt", asked, "--max_new_tokens", 3) == tok.continuation(prompt, ids[:3]) + "\n"
    drawn = [answers("--prompt", asked, "--temperature", 9, "--seed", seed, "--max_new_tokens", 9)
             for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_prompt_without_a_text_answers_line_by_line_until_an_empty_one(answers, monkeypatch):
    one, two = (answers("--prompt", words) for words in ("1 + 1", "2 + 2"))
    for lines in ("1 + 1\n2 + 2\n\n3 + 3\n", "1 + 1\n2 + 2\n", "1 + 1\n2 + 2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert answers("--prompt") == one + two


def test_an_answer_ends_where_the_models_positions_do(answers, tok, monkeypatch):
    found = []
    monkeypatch.setattr(D, "generate_batch", lambda model, prompts, room, *rest: found.append(
        (len(prompts[0]), room)))
    answers("--prompt", "a " * 800, "--max_new_tokens", 2000)
    answers("--prompt", "a", "--max_new_tokens", 2000)
    short = len(text.prompt_ids(tok, dict(instruction="a")))
    assert tok.longest == 512 and found == [(256, 256), (short, 512 - short)]


def test_an_adapters_base_is_the_default_and_another_one_is_said(answers, tiny, tmp_path):
    torch.manual_seed(0)
    base = checkpoint.load(tiny)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.normal_()
    checkpoint.save_merged(tmp_path / "base", base, tiny)
    lora = checkpoint.load_method("lora")
    lora.inject(base, ("q_proj",), 2)
    checkpoint.save_adapter(tmp_path / "a", base, dict(method="lora", targets=["q_proj"], rank=2,
                                                       model=str(tmp_path / "base")))
    flags = "--adapter", tmp_path / "a", "--prompt", "1 + 1"
    found = answers(*flags)
    assert found == answers("--model", tmp_path / "base", "--prompt", "1 + 1")
    assert found == answers(*flags, "--model", tmp_path / "base") != answers("--prompt", "1 + 1")
    note = f"note: the adapter was trained on {tmp_path / 'base'}\n"
    assert answers(*flags, "--model", tiny) == note + answers("--prompt", "1 + 1")


def test_a_classifier_is_not_asked_for_words(tmp_path, capsys):
    tf = pytest.importorskip("transformers")
    tf.RobertaForMaskedLM(tf.RobertaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40)).save_pretrained(tmp_path / "m")
    with pytest.raises(SystemExit):
        E.main(["--model", str(tmp_path / "m"), "--prompt", "x"])
    assert "--prompt: a model of model_type 'roberta' generates nothing" in capsys.readouterr().err
