"""
Python functions from their descriptions, scored by running their tests; training on instructions and code.

    {"task_id": "HumanEval/0", "entry_point": "has_close_elements",
     "prompt": "def has_close_elements(..) -> bool:\n    \"\"\" Check if in given list ..",
     "canonical_solution": "    for idx, ..", "test": "def check(candidate): .."}
    {"task_id": 2, "prompt": "Write a function to find the shared elements from the given two lists.",
     "code": "def similar_elements(..", "test_imports": [],
     "test_list": ["assert set(similar_elements(..", ..]}
    {"instruction": "Write a function ..", "input": "", "output": "def .."}                         (training)

Sources: github.com/openai/human-eval (HumanEval.jsonl.gz, MIT), github.com/evalplus/humanevalplus_release
(OriginFmt, Apache-2.0), google-research/mbpp/sanitized-mbpp.json (CC BY 4.0; test: task_id 11 - 510, train:
601 - 974), github.com/sahil280114/codealpaca (CC BY-NC 4.0),
hf.co/datasets/ise-uiuc/Magicoder-Evol-Instruct-110K. Under --data: code/NAME, or NAME; .gz too.
HumanEval's signature and docstring open the response, their last newline included; MBPP's instruction shows
the first test. HumanEval+ has one test, task 32's, that no solution passes: it is broken upstream.
Metric: pass@k, the unbiased estimate of Chen et al. 2021 from n samples.
Runs the code: --allow_code_execution. For EvalPlus's own harness, which wants every problem of a set:
python -m data.code_generation humaneval OUT/humaneval.jsonl samples.jsonl DATA
"""
import argparse
import functools
import inspect
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

from data.text import read

FAMILY, KIND, MAX_NEW_TOKENS = "code", "execute", 512
TASKS = {name: dict(rows=rows, metric="pass@1", file=f"code/{file}",
                    names=(f"code/{file}", file, other), source=source)
         for name, rows, file, other, source in (
             ("humaneval", 164, "humaneval.jsonl", "HumanEval.jsonl", "openai/human-eval"),
             ("humanevalplus", 164, "humanevalplus.jsonl", "HumanEvalPlus-OriginFmt.jsonl",
              "evalplus/humanevalplus_release"),
             ("mbpp", 257, "mbpp_sanitized.json", "sanitized-mbpp.json", "google-research, mbpp/"))}
# patterns; HumanEval: the body ends with its indentation
STOP = (r"(^|\n)(?=\S)", r"<\|(endoftext|eot_id)\|>")
MBPP_STOP = (r"\nclass", r"\nassert", r'\n"""', r"\nprint", r"\nif", r"\n<\|", r"\n```", STOP[1])
MIXES = ("codealpaca_20k", "code_alpaca_20k", "data-evol_instruct-decontaminated")    # the last: Magicoder's
TIMEOUT = 20.0      # seconds for a program with all its tests


def humaneval(row):
    """HumanEvalPack's instruction; prompt and completion together are the program."""
    signature = re.search(rf"def ({row['entry_point']}\(.*?\).*?):\n", row["prompt"], re.DOTALL)
    text = re.findall(r'''"""(.*?)"""|\'\'\'(.*?)\'\'\'''', row["prompt"], re.DOTALL)
    if not (signature and text):
        raise ValueError(f"{row.get('task_id')}: no signature or docstring in the prompt")
    text = inspect.cleandoc("".join(text[-1]))
    instruction = f"Write a Python function `{signature[1]}` to solve the following problem:\n{text}"
    return dict(task_id=row["task_id"], prefix=row["prompt"], output=row.get("canonical_solution", ""),
                stop=STOP, instruction=instruction,
                tests=f"{row['test']}\ncheck({row['entry_point']})", answer="passed",
                names=defined(row["prompt"]) + [row["entry_point"]])


def mbpp(row):
    return dict(task_id=row["task_id"], prefix="", output=row["code"].replace("\r", ""),
                stop=MBPP_STOP, answer="passed",
                instruction=f"{row['prompt']}\nYour code should pass this test:\n{row['test_list'][0]}",
                tests="\n".join(row["test_imports"] + row["test_list"]), names=defined(row["code"]))


def defined(code):
    """Names of the functions and classes that a piece of code defines: all that its tests may call."""
    return re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE)


def rows(directory, task, split, mixes=MIXES):
    """
    'test': problems, with `prefix` (what opens the response), `stop`, `tests`. 'train': the family's mix;
    MBPP's own training problems. FileNotFoundError where no file is; ValueError for a bad row or a set
    without training rows.
    """
    if task == "mbpp":
        first, last = (11, 510) if split == "test" else (601, 974)
        found = read(directory, TASKS[task]["names"], ("prompt", "code"))
        return [mbpp(row) for row in found if first <= row["task_id"] <= last]
    if split == "test":
        found = read(directory, TASKS[task]["names"], ("prompt", "entry_point", "test"))
        return [humaneval(row) for row in found]
    if task != FAMILY:
        raise ValueError(f"{task} has no training rows: train on code, the family")
    names = [f"{folder}{name}.{end}" for name in mixes if name for folder in ("code/", "")
             for end in ("json", "jsonl")]
    found = read(directory, names, ("instruction",), mix=mixes[0] or "")
    found = [row if "output" in row else {**row, "output": row.get("response")} for row in found]
    for number, row in enumerate(found, 1):
        if not isinstance(row["output"], str):
            raise ValueError(f"{directory}: training row {number} has no text in 'output' or 'response'")
    return found


def program(output, row):
    """The code in an output: what opened it, then the text before the first stop, without a fence."""
    if not row["prefix"] and (fenced := re.search(r"```\w*\n(.*?)(```|$)", output, re.DOTALL)):
        output = fenced[1]
    ends = [match.start() for stop in row["stop"] if (match := re.search(stop, output))]
    return row["prefix"] + output[:min(ends, default=len(output))]


def pass_at_k(n, c, k):
    """Unbiased estimate from n samples, c of them right: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@functools.cache        # once
def say_how(namespace):
    print("generated code runs in namespaces of its own (bubblewrap)" if namespace else
          "generated code runs without bubblewrap, under limits and a hook that hostile code can take apart: "
          "see data/sandbox.py")


def score(outputs, rows, rule="strict"):
    """Runs every sample; a problem has as many as there are rows of its task_id."""
    from data import sandbox  # here, since it needs a Unix
    say_how(sandbox.namespace())
    run = lambda output, row: sandbox.run(program(output, row), row["tests"], row["names"], TIMEOUT)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        said = list(pool.map(run, outputs, rows))
    problems = {}
    for row, result in zip(rows, said):
        problems.setdefault(row["task_id"], []).append(result == "passed")
    least = min(map(len, problems.values()))
    estimates = {f"pass@{k}": sum(pass_at_k(len(p), sum(p), k) for p in problems.values()) / len(problems)
                 for k in (1, 5, 10, 50, 100) if k <= least}
    return dict(**estimates, extracted=said, correct=[result == "passed" for result in said])


def samples(task, file, directory):
    """
    Outputs that evaluate.py left in `file` as EvalPlus's samples: task_id, and as solution the whole program.
    ValueError for an output to no prompt of the task.
    """
    problems, found = rows(directory, task, "test"), []
    head, tail = os.path.split(file)
    for number, line in enumerate(read(head, [tail], ("prompt", "output")), 1):
        asked = [row for row in problems
                 if row["instruction"] in line["prompt"] and line["prompt"].endswith(row["prefix"])]
        if not asked:
            raise ValueError(f"{file}: row {number} has another prompt than those of {task} in {directory}")
        row = max(asked, key=lambda row: len(row["instruction"]))       # one may begin as another
        name = row["task_id"] if isinstance(row["task_id"], str) else f"Mbpp/{row['task_id']}"
        found.append(dict(task_id=name, solution=program(line["output"], row)))
    return found


if __name__ == "__main__":
    p = argparse.ArgumentParser(prog="python -m data.code_generation", description=samples.__doc__)
    p.add_argument("task", choices=list(TASKS))
    for name in ("outputs", "samples", "data"):
        p.add_argument(name)
    args = p.parse_args()
    try:
        lines = [json.dumps(line) + "\n" for line in samples(args.task, args.outputs, args.data)]
        with open(args.samples, "w", encoding="utf-8") as f:
            f.writelines(lines)
    except (ValueError, OSError) as error:
        p.error(error)
