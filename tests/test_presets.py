"""
presets.py against the papers' hyper-parameter tables, typed here as they are printed: a row for each model, a
column for each method that the table names, the rest of its methods under "other".
"""
import pytest

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
                  dropout=0.05, targets="attention", val_rows=1200, seed=42)        # §4.1, App. C
G_LORA_MIX = dict(commonsense="commonsense_15k", math="math_10k", code="codealpaca_20k")        # §4, D.3
# Table 16: RoSA starts anew four times in its ten epochs. SpIEL has no place for a dropout.
G_LORA_OWN = dict(rosa=dict(reinit_every="2"), spiel=dict(dropout=0.0))

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
# §4.1: all seven linear layers, LionW. The cosine is the authors' scripts'. No warm-up or dropout is printed.
GRALORA_ALL = dict(optimizer="lion", schedule="cosine", targets="all", warmup_steps=0, dropout=0.0)
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
            every = GRALORA_ALL | dict(task=task, mix=GRALORA_MIX[task])
            every |= {flag: float(cell) for flag, cell in row.items()}
            methods = GRALORA_METHODS.get(model, "lora mora rasa gralora").split()
            found[f"gralora-{task}-{model}"] = {method: dict(every) for method in methods}
            found[f"gralora-{task}-{model}"]["gralora"]["k"] = 0                    # by the rank, §3.4
    return found


PRINTED = printed()


def parse(preset, method):
    return train.parse(["--method", method, "--model", "x"] + (["--preset", preset] if preset else []))[0]


def test_there_is_a_preset_for_every_row_of_the_tables_and_no_other():
    assert set(PRINTED) | {"tiny"} == set(presets.PRESETS)
    cells = lambda tables: [len(row) for table in tables for row in read(table).values()]
    assert sum(cells(CPS_LORA.values())) == 28
    assert len(cells(G_LORA.values())) * 2 == 12 and len(cells(GRALORA.values())) == 4
    for name, methods in PRINTED.items():       # no row for a method that its table does not have
        assert set(presets.PRESETS[name]) - {"all"} <= set(methods)


@pytest.mark.parametrize("preset", PRINTED)
def test_a_preset_is_what_the_papers_print(preset):
    """Flags that the papers leave open stay at train.py's or the method's own defaults."""
    for method, flags in PRINTED[preset].items():
        want = vars(parse(None, method)) | flags | dict(preset=preset, micro_batch_size=flags["batch_size"])
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
                assert adapted == 4 * dict(attention=4, all=7)[args.targets]


def test_gralora_has_four_blocks_a_side_at_rank_64_and_an_alpha_of_twice_the_rank_as_lora_has(tiny):
    """§3.4 and §4.1."""
    for preset in (name for name in PRINTED if name.startswith("gralora")):
        for method in ("lora", "gralora"):
            args, module = train.parse(["--method", method, "--model", str(tiny), "--preset", preset])
            model = checkpoint.load(tiny)
            train.adapt(args, module, model)
            layers = [m for m in model.modules() if hasattr(m, "delta")]
            assert {layer.scaling for layer in layers} == {2.0}
            assert method == "lora" or {layer.k for layer in layers} == {4}
