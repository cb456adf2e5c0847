"""experiments/benchmark.py: every part runs, and contenders in a race do the same work."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import checkpoint
from decode import generate

pytest.importorskip("peft")
sys.path.insert(0, str(ROOT / "experiments"))
import benchmark as B


@pytest.fixture(scope="module")
def bench():
    return B.prepare(SimpleNamespace(quick=True, rounds=7, model=str(checkpoint.TINY), shape=None, data=".",
                                     batch_size=4, device="cpu", peak=0.1, clock="wall"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a smoke run of all parts leaves."""
    out = tmp_path_factory.mktemp("benchmark")
    B.main(["--quick", "--device", "cpu", "--peak", "0.1", "--out", str(out)])
    return json.loads((out / "benchmark.json").read_text())


def test_every_part_runs_and_leaves_its_figures(found):
    assert list(found["parts"]) == list(found["seconds"]) == list(B.PARTS)
    assert found["command"].startswith("python experiments/benchmark.py --quick --device cpu")
    assert {"processor", "cores", "threads", "torch", "peft", "commit"} <= found["machine"].keys()
    assert "lora: MFU" in {r["what"] for r in found["parts"]["peft"]}
    for rows in found["parts"].values():
        assert rows and all(0 < r["low"] <= r["median"] <= r["high"] for r in rows)


def test_one_part_has_a_file_of_its_own(tmp_path, capsys):
    B.main(["--quick", "--device", "cpu", "--part", "init", "--out", str(tmp_path)])
    rows, shown = json.loads((tmp_path / "benchmark-init.json").read_text())["parts"], capsys.readouterr().out
    assert list(rows) == ["init"] and all(r["what"] in shown and r["unit"] == "s" for r in rows["init"])


def test_padded_and_packed_contenders_have_the_same_loss_as_transformers(bench):
    """At B = 0; and the padded batch is one: its rows differ in length."""
    batch = bench.batches[0]
    assert len({len(ids) for ids, _ in batch}) > 1
    losses = [B.of_padded(B.of_transformers(bench), batch), B.of_padded(bench.model, batch),
              B.of_packed(bench.model, batch), B.of_packed(B.ours(bench, "lora").model, batch),
              B.of_padded(B.theirs(bench, "dora").model, batch)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], atol=1e-5, rtol=1e-5)


def test_a_shape_has_random_weights_and_the_texts_of_the_models_tokenizer(bench, monkeypatch):
    small = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=1, vocab_size=50)
    monkeypatch.setitem(B.SHAPES, "small", B.SHAPES["qwen2.5-1.5b"] | small)
    shape = B.prepare(SimpleNamespace(**vars(bench.args) | dict(shape="small")))
    assert [([i % 50 for i in ids], start) for ids, start in bench.examples] == shape.examples
    batch = shape.batches[0]
    torch.testing.assert_close(B.of_padded(B.of_transformers(shape), batch), B.of_packed(shape.model, batch))


@pytest.mark.parametrize("kind", ["lora", "dora", "gralora"])
def test_peft_trains_as_many_parameters_as_we_do_and_a_step_moves_them(bench, kind):
    count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = B.ours(bench, kind), B.theirs(bench, kind), B.theirs(bench, kind, packed=True)
    assert len({count(step.model) for step in steps}) == 1 < count(steps[0].model)
    before = [p.clone() for p in bench.model.parameters()]
    for step in steps:
        trained = {name: p.clone() for name, p in step.model.named_parameters() if p.requires_grad}
        step(bench.batches[0])
        assert any((p != trained[name]).any() for name, p in step.model.named_parameters() if name in trained)
    assert all(torch.equal(p, old) for p, old in zip(bench.model.parameters(), before))     # they share these


@pytest.mark.parametrize("how", [dict(name="glora"), dict(name="lora", dtype=torch.bfloat16)])
def test_a_contender_that_changes_the_frozen_weights_has_its_own(bench, how):
    before = [p.clone() for p in bench.model.parameters()]
    B.ours(bench, **how)
    for p, old in zip(bench.model.parameters(), before):
        assert p.dtype == torch.float32 and torch.equal(p, old)


def test_both_decoders_write_as_many_tokens_and_the_same(bench):
    hf, prompts = B.of_transformers(bench), [ids[:start] for ids, start in bench.examples[:3]]
    hf.generation_config.eos_token_id = None
    ids, mask = (B.padded(rows, "cpu", side="left") for rows in (prompts, [[1] * len(p) for p in prompts]))
    theirs = hf.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)
    assert len({len(prompt) for prompt in prompts}) > 1
    assert generate(bench.model, prompts, 8, [-1]) == theirs[:, ids.shape[1]:].tolist()


def test_contenders_take_turns_in_alternating_order_and_the_first_round_is_dropped(bench):
    order, clock = [], iter(range(10**6))
    run = SimpleNamespace(rounds=2, clock=lambda: next(clock))

    def slow(batch):                    # a tick more than fast, and in the first round many more
        order.append(("slow", batch))
        for _ in range(1 if batch else 9):
            next(clock)
    fast = lambda batch: order.append(("fast", batch))
    rows = B.race(run, "t", dict(fast=fast, slow=slow), [0, 1, 2, 3])
    assert order == [("fast", 0), ("slow", 0), ("slow", 1), ("fast", 1), ("fast", 2), ("slow", 2)]
    assert [(r["what"], r["median"], r["n"]) for r in rows] == [("t: slow / fast", 2, 2)]


def test_peak_memory_is_that_of_what_is_held_at_once(bench):
    def work(n):
        a = torch.ones(n)
        b = a + 1                       # two at once
        del a
        c = b + 1                       # two again, not three
        return c.sum().item()
    assert 8_000_000 <= B.peak_memory(bench, work, 1_000_000) < 8_100_000


def test_the_products_alone_are_as_many_flops_as_the_step(bench):
    step = B.ours(bench, "lora")
    product = B.products(bench, step)
    for batch in bench.batches:
        assert B.flops(product, batch) == pytest.approx(B.flops(step, batch), rel=0.02)


def test_an_adapters_flops_are_over_loras_and_its_memory_is_without_the_weights(found):
    rows = {r["what"].removeprefix("all: "): r for r in found["parts"]["methods"]}
    two, eight, gfa = (rows[f"{name} / lora"] for name in ("gralora", "gralora, k = 8", "gfa"))
    assert two["FLOPs"] == pytest.approx(1, abs=0.01) and gfa["FLOPs"] > 2 and gfa["trainable"] < 1
    assert eight["memory"] > two["memory"] > two["and weights"] > 1
