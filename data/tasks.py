"""Which task is which: families and their sets, by the task files of this directory."""
import importlib
from pathlib import Path

ADAPTERS = "git clone https://github.com/AGI-Edgerunners/LLM-Adapters, then --data LLM-Adapters"
REBUILT = "made for this project from others, not published"
MIXES = {       # where a user gets the file of a training mix; in LLM-Adapters they lie in ft-training_set/
    "commonsense_15k": ADAPTERS, "commonsense_170k": ADAPTERS, "train_15k_rebuilt": REBUILT,
    "math_10k": ADAPTERS, "math_7k": ADAPTERS, "train_gsm8k_mawps_aquadev": REBUILT,
    "codealpaca_20k": "https://github.com/sahil280114/codealpaca, data/code_alpaca_20k.json",
    "code_alpaca_20k": "https://github.com/sahil280114/codealpaca, data/code_alpaca_20k.json",
    "data-evol_instruct-decontaminated": "https://hf.co/datasets/ise-uiuc/Magicoder-Evol-Instruct-110K"}


def task_files():
    """The modules of this directory that define TASKS."""
    files = sorted(Path(__file__).resolve().parent.glob("*.py"))
    return [importlib.import_module(f"data.{file.stem}") for file in files
            if "\nTASKS = " in file.read_text(encoding="utf-8")]


def find_task(task):
    """
    A family or a set of one, in any case, or a .json / .jsonl -> its module, its name as that spells it, its
    test sets. ValueError lists what there is.
    """
    modules = task_files()
    for module in modules:
        for name in (module.FAMILY, *module.TASKS):
            if name.lower() == task.lower() and module.TASKS:
                return module, name, [name] if name in module.TASKS else list(module.TASKS)
    if task.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        return importlib.import_module("data.own"), task, [task]
    known = [name for module in modules if module.TASKS for name in (module.FAMILY, *module.TASKS)]
    raise ValueError(f"task {task!r}, expected one of {', '.join(known)}, or a path to a .json or .jsonl")


def test_rows(module, sets, directory, limit=None):
    """{set: rows} of the sets whose files are there, names of the others. ValueError where none is."""
    found, absent = {}, []
    for name in sets:
        try:
            found[name] = module.rows(directory, name, "test")[:limit]
        except FileNotFoundError as error:
            absent.append(name)
            reason = str(error)
    if not found:
        source = module.TASKS.get(absent[0], {}).get("source", "")  # a user's own file has none
        if len(absent) > 1:
            reason = f"{directory}: not found: {missing(module, absent)}"
        elif source:
            reason += f"; from {source}"
        raise ValueError(reason + f"; {ADAPTERS}" * ("LLM-Adapters" in source))
    return found, absent


def train_rows(module, directory, task, mix=None, exact=False):
    """The rows to train on, of the mix that `mix` names; not exact, or else of the first that is there."""
    if not hasattr(module, "MIXES"):
        if mix:
            raise ValueError(f"mix {mix!r}: task family {module.FAMILY!r} has no mixes to choose from")
        return module.rows(directory, task, "train")
    try:
        return module.rows(directory, task, "train", (mix,) if exact else (mix, *module.MIXES))
    except FileNotFoundError as error:
        names = [mix] if mix in module.MIXES else module.MIXES
        raise ValueError(f"{error}; training mixes: {'; '.join(map(mix_source, names))}") from None


def mix_source(name):
    return f"{name}: {MIXES.get(name, 'see its task file')}"


def forecast(module, sets, before, examples, seen):
    """
    Says how much evaluation after training, or `before` too, generates; and where that may take longer than
    training, which sees `seen` of these examples, how to have less. A classifier only reads its rows.
    """
    mean = sum(len(ids) for ids, _ in examples) / len(examples)
    rows, times = sum(map(len, sets.values())), 1 + before
    label, when = module.KIND == "classify", "before and after" if before else "after"
    each = mean if label else module.MAX_NEW_TOKENS
    words = "a label each" if label else f"up to {each} new tokens each"
    print(f"evaluation {when} training: {rows:,} rows, {words}", flush=True)
    if (cost := rows * each * times) > (trained := 3 * seen * mean):
        limit = max(1, int(trained / each / times / len(sets)))
        print(f"note: may take longer than training: {rows:,} x {each:.0f} x {times} = {cost:,.0f} tokens, "
              f"{seen:,} x {mean:.0f} x 3 = {trained:,.0f} (backward counts as 2); --eval_limit {limit}?",
              flush=True)


def explain(measures):
    """Says in words what names of measures do not say themselves."""
    for name, words in (("majority", "the accuracy of the commonest answer, given to every row"),
                        ("likelihood", "the accuracy of the likeliest choice, with nothing generated")):
        if name in measures:
            print(f"{name}: {words}", flush=True)


def check_kind(model, module):
    """ValueError where the task needs another kind of model: a RoBERTa classifier generates nothing."""
    if module.KIND not in model.KINDS:
        raise ValueError(f"model_type {model.cfg.model_type!r} does not fit task family {module.FAMILY!r}, "
                         f"whose kind is {module.KIND!r}")


def metric_of(module, name):
    """The measure that counts for a set: its task file's, or accuracy for a user's own file."""
    return module.TASKS.get(name, {}).get("metric", "accuracy")


def labels_of(module, name):
    """The labels of a set, in the order of a classification head; None for other kinds of task."""
    return module.TASKS[name]["labels"] if module.KIND == "classify" else None


def fitting(sets, module, labels):
    """The sets that the model's one head fits (a family may need several); a line for each other one."""
    needs = {name: len(labels_of(module, name) or ()) or None for name in sets}
    for name, needed in needs.items():
        if needed != labels:
            print(f"{name} needs a head of {needed} labels, the model's has {labels}")
    return {name: rows for name, rows in sets.items() if needs[name] == labels}


def missing(module, names):
    """A line that names the sets that were not found, and where they come from."""
    entries = {name: module.TASKS[name] for name in names}
    return "; ".join(f"{name} ({entry['file']}, from {entry['source']})" for name, entry in entries.items())


def list_tasks():
    for module in task_files():
        for name, entry in module.TASKS.items():
            print(f"{module.FAMILY:12} {name:14} {entry['rows']:6} rows  {entry['metric']:9} "
                  f"{entry['file']:32} from {entry['source']}")
    print(f"\nLLM-Adapters: {ADAPTERS}\n"
          "Training mixes, for --mix; without it, the first of its family that is there:")
    for module in task_files():
        for name in getattr(module, "MIXES", ()):
            print(f"{module.FAMILY:12} {mix_source(name)}")
