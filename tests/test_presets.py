"""
presets.py against the papers' hyper-parameter tables, typed here as they are printed: a row for each model, a
column for each method that the table names, the rest of its methods under "other".
"""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import trainable

import checkpoint
import presets
import train
from data import tasks

CPS_LORA = {    # Tables 7 - 10, LR; llama3-8b is LLaMA3-8B-Instruct
    "commonsense": """
                        cps_lora  pissa   other
    llama2-7b           1e-4      2e-4    1e-4
    llama3-8b           4e-5      2e-4    1e-4
    qwen2.5-1.5b        1e-4      2e-4    1e-4
    llama2-13b          1e-4      2e-4    1e-4""",
    "math": """
                        cps_lora  pissa   other
    llama2-7b           3e-4      4e-4    3e-4
    llama3-8b           4e-5      2e-4    1e-4
    qwen2.5-1.5b        5e-5      -       3e-4
    llama2-13b          1e-4      -       3e-4""",
    "code": """
                        cps_lora  pissa   gralora  other
    llama3-8b           4.5e-5    -       -        5e-5
    qwen2.5-1.5b        6e-5      4.5e-5  5e-5     4e-5"""}
CPS_LORA_METHODS = "cps_lora lora dora pissa rasa gralora"                          # §4
CPS_LORA_ALL = dict(schedule="linear", optimizer="adamw", batch_size=4, warmup_steps=500, epochs=2, rank=8,
                    targets="attention", seed=42)                                   # §4, App. G
CPS_LORA_MIX = dict(commonsense="commonsense_170k", math="math_10k", code="codealpaca_20k")     # Table 11

G_LORA = {      # Tables 9 - 11: r_g : r_l and LR with SVD | the same and the factor with RandomSVD
    "commonsense": """
                        ratio  lr     ratio'  lr'    factor'
    llama2              3:1    1e-4   3:1     1e-4   4
    llama3-8b           3:1    1e-4   3:1     1e-4   4""",
    "math": """
                        ratio  lr     ratio'  lr'    factor'
    llama2              1:3    3e-4   1:3     3e-4   4
    llama3-8b           3:1    3e-4   3:1     3e-4   4""",
    "code": """
                        ratio  lr     ratio'  lr'    factor'
    llama3-8b-instruct  1:3    2e-5   1:3     1e-5   8
    qwen2.5-7b          3:1    1e-5   3:1     1e-5   8"""}
G_LORA_OTHERS = """
                        pissa  rosa   gralora  milora  denselora  other
    commonsense         2e-4   2e-4   2e-4     -       -          1e-4
    math                -      -      -        -       -          3e-4
    code                -      -      -        3e-5    1e-5       5e-5"""           # Table 12, LR
G_LORA_METHODS = "lora dora pissa rosa rasa gralora milora denselora spiel"         # §4.1, App. H
G_LORA_ALL = dict(schedule="linear", epochs=10, rank=8, optimizer="adamw", batch_size=4, warmup_steps=500,
                  dropout=0.05, targets="attention", val_rows=1200, select="best",  # §4.1, App. C
                  seed=42)
G_LORA_MIX = dict(commonsense="commonsense_15k", math="math_10k", code="codealpaca_20k")        # §4, D.3
# Table 16: RoSA starts anew four times in its ten epochs. Table 18: SpIEL's density; it has no place for a
# dropout. DenseLoRA's printed counts are of this rank and these modules, as tested below.
G_LORA_OWN = dict(rosa=dict(reinit_every="2"), spiel=dict(dropout=0.0, density=0.003),
                  denselora=dict(rank=64, targets="q_proj,k_proj,v_proj,up_proj,down_proj"))

GRALORA = {     # Table 5; code's ranks are 16, 32, 64 and 128
    "code": """
                        rank  lr     batch_size  epochs
    llama3.1-8b         64    2e-4   192         2""",
    "commonsense": """
                        rank  lr     batch_size  epochs
    qwen2.5-1.5b        64    2e-4   192         2
    qwen2.5-7b          64    4e-4   192         2
    llama3.1-70b        64    3e-4   192         1"""}
GRALORA_METHODS = {"llama3.1-70b": "lora gralora"}      # of the other models: all four
# §4.1: all seven linear layers, LionW. Schedule, warm-up, dropout and length, which the paper does not print,
# are those of its authors' scripts, as is RaSA's k = r / 8; 4 fit where 192 do not.
GRALORA_ALL = dict(optimizer="lion", schedule="cosine", targets="all", warmup_steps=0, warmup_ratio=0.1,
                   dropout=0.05, micro_batch_size=4)
GRALORA_LENGTH = dict(commonsense=256, code=4096)
HYBRID = "gralora-code-llama3.1-8b-hybrid"              # Table 2's row with a star, at rank 16
GRALORA_MIX = dict(commonsense="commonsense_170k", code="data-evol_instruct-decontaminated")    # §4.1


def read(table):
    """{name of the row: {name of the column: its cell, as text}}, blank cells left out."""
    head, *lines = [line.split() for line in table.strip("\n").splitlines()]
    assert all(len(line) == len(head) + 1 for line in lines)
    return {row: {name: cell for name, cell in zip(head, cells) if cell != "-"} for row, *cells in lines}


def rate(row, method):
    return float(row.get(method, row["other"]))


def printed():
    """{preset: {method: {flag: value}}}, of every method of a table."""
    found = {}
    for task, table in CPS_LORA.items():
        every = CPS_LORA_ALL | dict(task=task, mix=CPS_LORA_MIX.get(task))
        for model, row in read(table).items():
            found[f"cps-{task}-{model}"] = {method: every | dict(lr=rate(row, method))
                                            for method in CPS_LORA_METHODS.split()}
            found[f"cps-{task}-{model}"]["cps_lora"]["reinit_every"] = "1"          # Alg. 1, line 3
    for task, table in G_LORA.items():
        every = G_LORA_ALL | dict(task=task, mix=G_LORA_MIX.get(task))
        row = read(G_LORA_OTHERS)[task]
        others = {method: every | dict(lr=rate(row, method)) | G_LORA_OWN.get(method, {})
                  for method in G_LORA_METHODS.split()}
        for model, row in read(table).items():
            own = every | dict(reinit_every="2")
            exact = dict(ratio=row["ratio"], lr=float(row["lr"]), svd="exact")
            randomized = dict(ratio=row["ratio'"], lr=float(row["lr'"]), svd="randomized",
                              oversample=int(row["factor'"]))
            found[f"glora-{task}-{model}"] = others | dict(glora=own | exact)
            found[f"glora-{task}-{model}-randomized"] = others | dict(glora=own | randomized)
    for task, table in GRALORA.items():
        for model, row in read(table).items():
            every = GRALORA_ALL | dict(task=task, mix=GRALORA_MIX[task], max_len=GRALORA_LENGTH[task])
            every |= {flag: float(cell) for flag, cell in row.items()}
            methods = GRALORA_METHODS.get(model, "lora mora rasa gralora").split()
            found[f"gralora-{task}-{model}"] = {method: dict(every) for method in methods}
            found[f"gralora-{task}-{model}"]["gralora"]["k"] = 0                    # by the rank, §3.4
            if "rasa" in methods:
                found[f"gralora-{task}-{model}"]["rasa"]["k"] = 8
    found[HYBRID] = {method: flags | dict(rank=16) for method, flags in found[HYBRID[:-7]].items()}
    found[HYBRID]["gralora"] |= dict(k=2, hybrid=8)
    found[HYBRID]["rasa"] |= dict(k=2)
    return found


PRINTED = printed()
PEFT = "peft-metamath-llama3.2-3b"


def parse(preset, method):
    return train.parse(["--method", method, "--model", "x"] + (["--preset", preset] if preset else []))[0]


def test_there_is_a_preset_for_every_row_of_the_tables_and_no_other():
    assert set(PRINTED) | {"tiny", PEFT} == set(presets.PRESETS)
    cells = lambda tables: [len(row) for table in tables for row in read(table).values()]
    assert sum(cells(CPS_LORA.values())) == 28
    assert len(cells(G_LORA.values())) * 2 == 12 and len(cells(GRALORA.values())) == 4
    for name, methods in PRINTED.items():       # no row for a method that its table does not have
        assert set(presets.PRESETS[name]) - {"all"} <= set(methods)


@pytest.mark.parametrize("preset", PRINTED)
def test_a_preset_is_what_the_papers_print(preset):
    """Flags that the papers leave open stay at train.py's or the method's own defaults."""
    for method, flags in PRINTED[preset].items():
        want = vars(parse(None, method)) | dict(micro_batch_size=flags["batch_size"]) | flags
        want |= dict(preset=preset, lr_from=f"preset {preset}", typed=["method", "model", "preset"])
        got = vars(parse(preset, method))
        assert (method, got) == (method, want)


def test_a_mix_is_one_of_its_task():
    for preset, methods in PRINTED.items():
        for method in methods:
            args = parse(preset, method)
            assert args.mix in tasks.find_task(args.task)[0].MIXES


def test_presets_of_the_papers_tables():
    fields = lambda p, names: tuple(getattr(p, name) for name in names.split())
    seen = lambda *a: fields(parse(*a), "task rank targets batch_size epochs warmup_steps lr optimizer")
    assert seen("cps-commonsense-llama2-7b", "cps_lora") == (
        "commonsense", 8, "attention", 4, 2, 500, 1e-4, "adamw")
    assert seen("cps-math-llama2-7b", "lora") == ("math", 8, "attention", 4, 2, 500, 3e-4, "adamw")
    assert [parse("cps-code-qwen2.5-1.5b", m).lr for m in ("cps_lora", "gralora", "lora")] == [
        6e-5, 5e-5, 4e-5]
    assert parse("cps-commonsense-llama3-8b", "cps_lora").lr == 4e-5
    assert parse("cps-commonsense-llama2-7b", "cps_lora").reinit_every == "1"
    assert seen("glora-commonsense-llama2", "glora") == (
        "commonsense", 8, "attention", 4, 10, 500, 1e-4, "adamw")
    own = lambda preset: fields(parse(preset, "glora"),
                                "ratio lr svd oversample reinit_every dropout val_rows")
    assert own("glora-math-llama2") == ("1:3", 3e-4, "exact", 4, "2", 0.05, 1200)
    assert own("glora-math-llama3-8b-randomized") == ("3:1", 3e-4, "randomized", 4, "2", 0.05, 1200)
    assert own("glora-code-llama3-8b-instruct") == ("1:3", 2e-5, "exact", 4, "2", 0.05, 1200)
    assert own("glora-code-llama3-8b-instruct-randomized") == ("1:3", 1e-5, "randomized", 8, "2", 0.05, 1200)
    assert own("glora-code-qwen2.5-7b-randomized") == ("3:1", 1e-5, "randomized", 8, "2", 0.05, 1200)
    assert [parse("glora-commonsense-llama3-8b", m).lr for m in ("gralora", "lora")] == [2e-4, 1e-4]
    assert [parse("glora-math-llama2-randomized", m).lr for m in ("gralora", "lora")] == [3e-4, 3e-4]
    assert parse("glora-code-qwen2.5-7b", "lora").lr == 5e-5
    assert seen("gralora-commonsense-qwen2.5-7b", "gralora") == (
        "commonsense", 64, "all", 192, 2, 0, 4e-4, "lion")
    assert parse("gralora-code-llama3.1-8b", "gralora").k == 0
    assert parse("gralora-commonsense-llama3.1-70b", "lora").epochs == 1


def test_a_method_takes_what_the_presets_of_its_tables_give_it(tiny):
    """Rank, targets, dropout and its own flags, on the bundled model: four layers of seven linears."""
    seen = []
    for preset, methods in PRINTED.items():
        for method in methods:
            args, module = train.parse(["--method", method, "--model", str(tiny), "--preset", preset])
            given = method, args.rank, args.targets, args.dropout, [getattr(args, f) for f in module.DEFAULTS]
            if given not in seen:
                seen.append(given)
                model = checkpoint.load(tiny)
                train.adapt(args, module, model)
                adapted = sum(hasattr(m, "delta") for m in model.modules())
                assert adapted == 4 * dict(attention=4, all=7).get(args.targets, 5)


def test_gralora_has_four_blocks_a_side_at_rank_64_and_an_alpha_of_twice_the_rank_as_lora_has(tiny):
    """§3.4 and §4.1."""
    for preset in (name for name in PRINTED if name.startswith("gralora") and name != HYBRID):
        for method in ("lora", "gralora"):
            args, module = train.parse(["--method", method, "--model", str(tiny), "--preset", preset])
            model = checkpoint.load(tiny)
            train.adapt(args, module, model)
            layers = [m for m in model.modules() if hasattr(m, "delta")]
            assert {layer.scaling for layer in layers} == {2.0}
            assert method == "lora" or {layer.k for layer in layers} == {4}


def test_the_hybrid_row_has_half_of_rank_16_as_plain_lora_and_two_blocks_a_side(tiny):
    """§3.5: up to half of the total rank, in low-rank scenarios."""
    args, module = train.parse(["--method", "gralora", "--model", str(tiny), "--preset", HYBRID])
    model = checkpoint.load(tiny)
    train.adapt(args, module, model)
    layers = [m for m in model.modules() if hasattr(m, "delta")]
    assert {(layer.k, layer.scaling, layer.lora_B_general.shape[1]) for layer in layers} == {(2, 2.0, 8)}
    assert args.rank == 16


@pytest.mark.parametrize("model, printed", [("LLaMA2-7B", 4.16), ("LLaMA2-13B", 5.21), ("LLaMA3-8B", 4.19)])
def test_denseloras_row_has_the_parameters_that_g_lora_prints(model, printed):
    """Tables 1 and 2, Params, in millions."""
    row = presets.PRESETS["glora-math-llama2"]["denselora"]
    assert round(trainable("denselora", model, row["targets"], row["rank"]) / 1e6, 2) == printed


def test_spiels_density_is_of_the_targets_and_near_the_budget_of_lora():
    """Table 18, "comparable": 6.4M beside 8.4M; of all weights of the model it would be 20.2M."""
    density = presets.PRESETS["glora-math-llama2"]["spiel"]["density"]
    assert trainable("spiel", "LLaMA2-7B", "attention", 8, density=density) == 6_442_368
    assert trainable("lora", "LLaMA2-7B", "attention", 8) == 8_388_608


def test_every_preset_names_its_paper_its_table_and_its_model():
    assert list(presets.SOURCES) == list(presets.PRESETS)
    assert presets.SOURCES["cps-code-qwen2.5-1.5b"] == ("CPS-LoRA", "Table 9", "Qwen2.5-1.5B")
    assert presets.SOURCES["glora-code-qwen2.5-7b-randomized"] == ("G-LoRA", "Tables 11, 12", "Qwen2.5-7B")
    assert presets.SOURCES["gralora-commonsense-llama3.1-70b"] == ("GraLoRA", "Table 5", "LLaMA3.1-70B")
    assert presets.SOURCES[HYBRID] == ("GraLoRA", "Tables 2, 5", "LLaMA3.1-8B")


def test_list_presets_shows_each_with_paper_table_model_and_what_it_sets_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--list_presets", "--method", "gfa"])
    said = capsys.readouterr().out
    assert not stop.value.code
    for name, (paper, table, model) in presets.SOURCES.items():
        assert f"\n{name}: {paper}, {table}, {model}\n" in said
    entry = " ".join(said.partition("\nglora-math-llama2-randomized: ")[2].partition("\n\n")[0].split())
    assert "all: task math, rank 8, targets attention, " in entry and " select best, " in entry
    assert entry.endswith("glora: ratio 1:3, lr 0.0003, svd randomized, oversample 4")
    flags = [line for line in said.splitlines() if line.startswith(" ") and "/" not in line]
    assert max(map(len, flags)) <= 80
    assert "list_presets" not in vars(parse(None, "gfa"))


# What the inject of each method has no place for, by its own refusal.
REFUSES = {"full": {"alpha", "dropout"}, "gfa": {"alpha", "dropout"}, "gfa_aligned": {"alpha", "dropout"},
           "spiel": {"alpha", "dropout"}, "glora": {"alpha"}, "cps_lora": {"alpha"}, "rosa": {"alpha"},
           "mora": {"alpha"}}
OURS = [*REFUSES, "lora", "dora", "gralora", "pissa", "milora", "rasa", "denselora"]


@pytest.mark.parametrize("method", OURS)
def test_a_preset_drops_what_the_method_has_no_place_for_and_only_that(method, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "some", {"all": dict(alpha=5.0, dropout=0.1, rank=3)})
    module, before = checkpoint.load_method(method), torch.get_rng_state()
    left = {"alpha", "dropout"} - REFUSES.get(method, set())
    shared, own, _ = presets.rows("some", module)
    assert (set(shared), own) == (left | {"rank"}, {})
    assert set(presets.dropped("some", module)) == REFUSES.get(method, set())
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_dropped_for_a_method_that_refuses_the_layer_itself(monkeypatch):
    """Then its refusal says nothing of the dropout."""
    monkeypatch.setitem(presets.PRESETS, "some", {"all": dict(dropout=0.1)})

    def inject(model, targets, rank, alpha=None, dropout=0.0):
        raise ValueError("8 is too small")
    assert presets.dropped("some", SimpleNamespace(inject=inject)) == []


def test_a_dropout_that_a_preset_states_is_left_out_of_gfa_in_one_line_and_an_explicit_one_is_an_error(
        tiny, tmp_path, capsys, monkeypatch):
    rows = presets.PRESETS["tiny"]["all"] | dict(dropout=0.1, max_steps=1, batch_size=1, train_rows=4)
    monkeypatch.setitem(presets.PRESETS, "tiny", {"all": rows})
    flags = ["--eval_limit", "1", "--no-eval_before", "--out_dir", str(tmp_path / "run")]
    train.main(["--method", "gfa", *flags])
    assert "left out of it: dropout, for which gfa has no place\n" in capsys.readouterr().out
    train.main(["--method", "lora", *flags, "--overwrite"])
    assert "left out of it" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(["--method", "gfa", "--dropout", "0.1", *flags, "--overwrite"])
    assert "GFA has no alpha" in capsys.readouterr().err


def test_a_methods_usual_rate_is_its_default_and_a_preset_or_the_user_overrides_it():
    usual = dict(gfa=3e-3, gfa_aligned=3e-3, full=2e-5, pissa=2e-5, rosa=5e-5, dora=2e-4, spiel=1e-4)
    for method in OURS:
        assert parse(None, method).lr == usual.get(method, 3e-4), method
    assert parse("glora-math-llama2", "gfa").lr == 3e-4
    assert train.parse(["--method", "gfa", "--model", "x", "--lr", "1"])[0].lr == 1
    assert train.parse(["--method", "gfa"])[0].lr == 3e-2            # TINY, on the bundled model


def test_the_comparison_that_peft_publishes(tiny):
    """Its default_training_params.json, the adapter_config.json of LoRA, DoRA and GraLoRA: r 32, alpha 64."""
    theirs = dict(rank=32, alpha=None, dropout=0.0, targets="q_proj,v_proj", batch_size=4, max_steps=5000,
                  lr=1e-4, weight_decay=0.1, schedule="cosine", warmup_ratio=0.1, warmup_steps=0, max_len=768,
                  seed=0, grad_clip=1.0, optimizer="adamw", dtype="bfloat16", train_on_prompt=True)
    own = dict(lora={}, dora={}, gralora=dict(lr=2e-4, weight_decay=0.01, k=2, hybrid=0))
    for method, differs in own.items():
        args = vars(parse(PEFT, method))
        assert {flag: args[flag] for flag in theirs | differs} == theirs | differs
        model = checkpoint.load(tiny)
        train.adapt(*train.parse(["--method", method, "--model", str(tiny), "--preset", PEFT]), model)
        assert {m.scaling for m in model.modules() if hasattr(m, "delta")} == {2.0}     # 64 / 32


def test_warm_up_is_a_share_of_the_steps_or_a_number_of_them(tmp_path, capsys):
    """5 of 20 steps: a quarter; the rate is at its peak from the fifth on, as the schedule is constant."""
    flags = ["--max_steps", "20", "--batch_size", "1", "--train_rows", "20", "--eval_limit", "1",
             "--no-eval_before", "--log_every", "1", "--schedule", "constant", "--lr", "1e-3",
             "--out_dir", str(tmp_path / "run")]
    train.main([*flags, "--warmup_steps", "0", "--warmup_ratio", "0.25"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in lines]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4] + [1e-3] * 16)
    for wrong, message in ((["--warmup_steps", "5", "--warmup_ratio", "0.25"], "one has to be 0"),
                           (["--warmup_ratio", "1.0"], "expected 0 <= warmup_ratio < 1"),
                           (["--warmup_ratio", "-0.1"], "expected 0 <= warmup_ratio < 1")):
        with pytest.raises(SystemExit):
            train.parse([*wrong])
        assert message in capsys.readouterr().err
