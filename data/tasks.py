"""Which task is which: families and their sets, by the task files of this directory."""
import importlib
from pathlib import Path


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
    if not found and len(absent) > 1:
        raise ValueError(f"{directory}: not found: {missing(module, absent)}")
    if not found:
        source = module.TASKS.get(absent[0], {}).get("source")      # a user's own file has none
        raise ValueError(f"{reason}; from {source}" if source else reason)
    return found, absent


def train_rows(module, directory, task, mix=None):
    """The rows to train on; of several mixes the one that `mix` names, if it is there (a line says which)."""
    if not hasattr(module, "MIXES"):
        if mix:
            raise ValueError(f"mix {mix!r}: task family {module.FAMILY!r} has no mixes to choose from")
        return module.rows(directory, task, "train")
    return module.rows(directory, task, "train", mix)


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
