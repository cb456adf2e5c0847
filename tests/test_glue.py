"""GLUE's files as they are, metrics against scikit-learn, a head that trains, is saved, merged, reloaded."""
import gzip
import json
import random

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import checkpoint
import decode as D
import evaluate as E
import train
from data import glue, text
from experiments.small_roberta import make

CASES = {name: ([random.Random(i).randint(0, 1) for i in range(n)],
                [random.Random(-i - 1).randint(0, 1) for i in range(n)])
         for name, n in (("random", 50), ("short", 3))}
CASES |= {"equal": ([0, 1, 1, 0], [0, 1, 1, 0]), "opposite": ([0, 1, 1, 0], [1, 0, 0, 1]),
          "all one": ([1, 1, 1], [0, 1, 1]), "all zero": ([0, 0, 0], [0, 1, 1]),
          "no positive": ([0, 0], [0, 0])}


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_scikit_learns(name):
    predicted, labels = CASES[name]
    assert glue.matthews(predicted, labels) == pytest.approx(matthews_corrcoef(labels, predicted))
    assert glue.f1(predicted, labels) == pytest.approx(f1_score(labels, predicted, zero_division=0))
    rows = {task: [dict(label=label, task=task) for label in labels] for task in ("cola", "mrpc", "rte")}
    assert glue.score(predicted, rows["cola"])["matthews"] == glue.matthews(predicted, labels)
    got = glue.score(predicted, rows["mrpc"])
    assert got["f1"] == glue.f1(predicted, labels) and got["accuracy"] == accuracy_score(labels, predicted)
    got = glue.score(predicted, rows["rte"])
    assert set(got) == {"accuracy", "extracted", "correct", "majority"}
    assert got["majority"] == max(labels.count(0), labels.count(1)) / len(labels)
    assert got["extracted"] == [("entailment", "not_entailment")[o] for o in predicted]


TEXTS = {
    "cola": ('gj04\t1\t\tThe "sailors rode.\ngj04\t0\t*\tHe \'s "it".', "glue/cola/dev.tsv",
             [('The "sailors rode.', None, 1), ('He \'s "it".', None, 0)]),
    "sst2": ('sentence\tlabel\na "gem \t1\r\nbad\t0\r\n', "SST-2/dev.tsv",
             [('a "gem ', None, 1), ("bad", None, 0)]),
    "mrpc": ('\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\t"He said , " a\t"b\n',
             "MRPC/dev.tsv", [('"He said , " a', '"b', 1)]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n", "glue/rte/dev.tsv",
            [("a", "b", 1)]),
    "mnli": ("index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction\n",
             "MNLI/dev_matched.tsv", [("a", "b", 2)]),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_read_with_quotes_as_they_stand_and_the_byte_order_mark_dropped(name, packed, tmp_path):
    text, file, want = TEXTS[name]
    file = tmp_path / file
    file.parent.mkdir(parents=True)
    data = text.encode()
    file.with_name(file.name + ".gz" * packed).write_bytes(gzip.compress(data) if packed else data)
    assert [(row["text"], row["pair"], row["label"]) for row in glue.rows(tmp_path, name, "test")] == want


@pytest.mark.parametrize("text, message", [
    ("sentence\tlabel\nfine\t1\nshort\n", "line 3 has 1 columns, expected at least 2"),
    ("sentence\tlabel\nfine\t2\n", "line 2 has label '2', expected one of 0, 1"),
    ("text\tlabel\na\t1\n", "line 1 has no column 'sentence', found text, label"),
    ("sentence\tlabel\n", "no rows|line 2")])
def test_a_bad_line_is_named(text, message, tmp_path):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "dev.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        glue.rows(tmp_path, "sst2", "test")
    with pytest.raises(FileNotFoundError, match="found none of glue/cola/dev.tsv, CoLA/dev.tsv"):
        glue.rows(tmp_path, "cola", "test")
    with pytest.raises(ValueError, match="train on one of cola"):
        glue.rows(tmp_path, "glue", "train")


def test_the_shared_sets(shared_data):
    count = lambda name: tuple(len(glue.rows(shared_data, name, split)) for split in ("train", "test"))
    sizes = {name: count(name) for name in ("cola", "sst2", "mrpc", "rte")}
    assert sizes == {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "rte": (2490, 277)}
    assert all(glue.TASKS[name]["rows"] == dev for name, (_, dev) in sizes.items())


# ------------------------------------------------------------------------------------ RoBERTa, head, adapters

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SST-2 and MNLI of a few words: good ones make it positive; MNLI's labels are drawn."""
    directory, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    good, bad = ("fine", "great", "lovely"), ("dull", "awful", "poor")
    other = ("film", "plot", "cast", "score", "a very long word salad")
    for split, count in (("train", 400), ("dev", 60)):
        lines = []
        for _ in range(count):
            label = rng.randint(0, 1)
            words = [rng.choice(some) for some in (other, good if label else bad, other)]
            lines.append(f"{' '.join(words)}\t{label}")
        file = directory / "glue" / "sst2" / f"{split}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("sentence\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
        file = directory / "glue" / "mnli" / f"{split}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{rng.choice(good)} {rng.choice(other)}\t{rng.choice(bad)}\t"
                 f"{rng.choice(glue.TASKS['mnli']['labels'])}\n" for _ in range(count)]
        file.write_text("sentence1\tsentence2\tgold_label\n" + "".join(lines), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def roberta(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("net") / "roberta"
    make(directory, data, vocabulary=300, width=32, layers=2)
    return directory


def run(*flags, out):
    train.main([*map(str, flags), "--out_dir", str(out)])
    return json.loads((out / "summary.json").read_text())


def test_a_classifier_learns_and_its_head_is_saved_merged_and_reloaded(roberta, data, tmp_path, capsys):
    summary = run("--model", roberta, "--data", data, "--task", "sst2", "--method", "lora", "--rank", 4,
                  "--batch_size", 16, "--micro_batch_size", 8, "--max_steps", 150, "--lr", "3e-3",
                  "--log_every", 50, "--merge", out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert summary["after"]["sst2"] >= 0.95 > 0.7 > summary["before"]["sst2"] and summary["loss_after"] < 0.3
    assert "majority" in summary and "before_accuracy" not in summary
    head = 32 * 32 + 32 + 2 * 32 + 2
    assert f"and {head:,} of its head" in printed
    assert summary["trainable"] == 2 * 4 * (4 * 64 + 2 * (32 + 128))        # the adapters alone
    adapted = checkpoint.load(roberta, num_labels=2)
    checkpoint.load_adapter(adapted, tmp_path / "run" / "adapter")
    merged = checkpoint.load(tmp_path / "run" / "merged")
    tok = text.Tokenizer(roberta, merged.cfg)
    rows = glue.rows(data, "sst2", "test")
    results = [E.evaluate(net, tok, glue, rows) for net in (adapted, merged)]
    for result in results:
        assert result["accuracy"] == summary["after"]["sst2"]
        # rounding is absolute here: a small loss is the difference of float32 logits of about 5
        assert result["loss"] == pytest.approx(summary["loss_after"], rel=1e-4, abs=1e-5)
    tf = pytest.importorskip("transformers")
    theirs = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged").eval()
    ids = torch.tensor([tok.pair("fine plot", "dull")])
    torch.testing.assert_close(merged(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_select_best_takes_the_head_of_the_best_step_too(roberta, data, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 2.0])
    monkeypatch.setattr(train, "mean_loss", lambda _: next(losses))
    summary = run("--model", roberta, "--data", data, "--task", "sst2", "--max_steps", 3, "--lr", "3e-2",
                  "--val_rows", 4, "--eval_every", 1, "--select", "best", "--merge", out=tmp_path / "run")
    assert summary["selected"]["step"] == 1 and abs(summary["loss_before"] - summary["loss_after"]) > 1e-3
    best, merged = checkpoint.load(roberta, num_labels=2), checkpoint.load(tmp_path / "run" / "merged")
    checkpoint.load_adapter(best, tmp_path / "run" / "adapter-best")
    tok, rows = text.Tokenizer(roberta, best.cfg), glue.rows(data, "sst2", "test")
    for net in (best, merged):
        assert E.evaluate(net, tok, glue, rows)["loss"] == pytest.approx(summary["loss_after"], rel=1e-4)


def test_three_labels_get_a_head_of_three(roberta, data, tmp_path):
    summary = run("--model", roberta, "--data", data, "--task", "mnli", "--batch_size", 4, "--max_steps", 2,
                  "--method", "gfa", "--merge", out=tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "merged").cfg.num_labels == 3
    assert 0 <= summary["after"]["mnli"] <= 1


def test_packed_batches_are_one_by_one(roberta, data, monkeypatch):
    net = checkpoint.load(roberta, torch.float64, num_labels=2)
    tok = text.Tokenizer(roberta, net.cfg)
    rows = glue.rows(data, "sst2", "test")
    examples = [text.example(tok, row) for row in rows]
    assert len({len(ids) for ids, _ in examples}) > 2
    alone = torch.cat([net(torch.tensor([ids])) for ids, _ in examples])
    torch.testing.assert_close(net.classify(examples), alone)
    labels = torch.tensor([row["label"] for row in rows])
    want = torch.nn.functional.cross_entropy(alone, labels, reduction="none").tolist()
    for budget in (1, 50, 10**6):
        monkeypatch.setattr(D, "BATCH_TOKENS", budget)
        assert [loss for loss, _ in E.nll(net, examples)] == pytest.approx(want)
        right = accuracy_score(labels, alone.argmax(-1))
        assert E.evaluate(net, tok, glue, rows)["accuracy"] == right


def test_a_pair_keeps_its_special_tokens_and_at_most_512_tokens(roberta, capsys):
    cfg = checkpoint.load(roberta, num_labels=2).cfg
    tok = text.Tokenizer(roberta, cfg)
    assert tok.longest == 512
    short = tok.pair("fine", "dull")
    one, two = tok.encode("fine"), tok.encode("dull")
    assert short == [0, *one, 2, 2, *two, 2] and tok.pair("fine") == [0, *one, 2]
    long = tok.pair("fine " * 900, "dull plot")
    assert len(long) == 512 and long[0] == 0 and long[-1] == 2 and long.count(2) == 3
    assert len(tok.pair("fine " * 900, None, 40)) == 40
    net = checkpoint.load(roberta, num_labels=2)
    assert net(torch.tensor([long])).isfinite().all()
    rows = [dict(text="fine " * 900, pair=None, label=1), dict(text="fine", pair=None, label=0)]
    examples, cut = text.encode(tok, rows, 2000)
    assert cut == 1 and [len(ids) for ids, _ in examples] == [512, len(one) + 2]
    assert [label for _, label in examples] == [1, 0]
    E.evaluate_sets(net, tok, glue, {"sst2": [dict(row, task="sst2") for row in rows]})
    assert capsys.readouterr().out.startswith("sst2: 1 of 2 rows cut to the model's 512 positions\nsst2 ")


def test_a_head_that_trains_on_a_bf16_encoder_is_fp32(roberta, data, tmp_path):
    run("--model", roberta, "--data", data, "--task", "sst2", "--max_steps", 2, "--method", "lora",
        "--dtype", "bfloat16", out=tmp_path / "run")
    net = checkpoint.load(roberta, torch.bfloat16, num_labels=2)
    checkpoint.load_adapter(net, tmp_path / "run" / "adapter")
    assert {p.dtype for p in net.classifier.parameters()} == {torch.float32}
    assert net.blocks()[0].output["dense"].base.weight.dtype == torch.bfloat16
    assert net.classify([([0, 5, 2], 1)]).dtype == torch.float32


def test_the_command_evaluates_the_family_and_names_what_is_missing(roberta, data, capsys):
    E.main(["--model", str(roberta), "--task", "glue", "--data", str(data), "--limit", "5"])
    out = capsys.readouterr().out
    assert out.startswith("note: the checkpoint has no classification head, this one is random\n"
                          "mnli needs a head of 3 labels, the model's has 2\nsst2 ")
    assert "not found: cola (glue/cola/dev.tsv, from GLUE, CoLA/dev.tsv)" in out


def test_predictions_are_on_disk_and_can_be_scored_again(roberta, data, tmp_path, capsys):
    flags = ["--model", str(roberta), "--task", "mnli", "--data", str(data), "--limit", "5",
             "--out", str(tmp_path / "out")]
    E.main(flags)
    first = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "mnli.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and "\n" in lines[0]["prompt"]
    assert lines[0]["extracted"] == glue.TASKS["mnli"]["labels"][lines[0]["output"]]
    E.main([*flags, "--score_only"])
    accuracy = lambda out: out.split("accuracy")[1].split()[0]
    assert accuracy(capsys.readouterr().out) == accuracy(first)
