"""
What a step, a token and a start cost: ratios of contenders that take turns in one process.

    python experiments/benchmark.py --model DIR --data DIR          # all parts, some 15 minutes on 2 cores
    python experiments/benchmark.py --part peft --quick             # one part, on the bundled model
    python experiments/benchmark.py --device cuda --shape llama2-7b --model DIR --data DIR --peak 989

In a round all contenders take one batch, in the next another, in the other order; the first warms up. A ratio
is the median of the rounds' [and their quartiles]: what slows the machine for longer slows both. A step is
packing or padding, forward, backward, clipping, AdamW; in bf16 on a GPU, else in fp32. FLOPs are of matrix
products, on a CPU without attention's. Memory is the peak of a first step, optimizer state included.
"""
import argparse
import copy
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import train
from data import tasks, text
from decode import generate
from evaluate import nll
from files import read_json, write_json
from model import targets_of

SHAPES = {name: dict(model_type=kind, hidden_size=d, intermediate_size=f, num_hidden_layers=n, vocab_size=v,
                     num_attention_heads=h, num_key_value_heads=g, rms_norm_eps=1e-5, rope_theta=theta)
          for name, kind, d, f, n, v, h, g, theta in (
              ("llama2-7b", "llama", 4096, 11008, 32, 32000, 32, 32, 1e4),
              ("qwen2.5-1.5b", "qwen2", 1536, 8960, 28, 151936, 12, 2, 1e6))}
RANK, SAME = 8, dict(match_lora=4.0)
OURS = {name: (name, {}) for name in ("lora", "glora", "cps_lora", "gralora", "gfa", "gfa_aligned")}
OURS |= {f"{name}, stage 3": (name, dict(stage=3)) for name in ("glora", "cps_lora")}
METHODS = {     # each over the first; q and v are GFA's Table 1, the memory at several k is GraLoRA's
    "q_proj,v_proj": {"lora, r = 4": ("lora", dict(rank=4)), "dora, r = 4": ("dora", dict(rank=4)),
                      "gfa, r = 8": ("gfa", {}), "gfa": ("gfa", SAME), "gfa_aligned": ("gfa_aligned", SAME)},
    "attention": OURS,
    "all": OURS | {f"gralora, k = {k}": ("gralora", dict(k=k)) for k in (4, 8)}}


def row(what, values, unit="x", **more):
    """A line of the table: the median of the values and their quartiles; x is a ratio."""
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return dict(what=what, median=median, unit=unit, low=low, high=high, n=np.size(values), **more)


def race(bench, about, contenders, batches, pairs=None):
    """Rows of ratios of time, of the pairs or of each over the first, for functions that take turns."""
    times = {name: [] for name in contenders}
    for i, batch in enumerate(batches[:bench.rounds + 1]):
        for name in list(contenders)[::-1 if i % 2 else 1]:
            began = bench.clock()
            contenders[name](batch)
            times[name].append(bench.clock() - began)
    first, *others = contenders
    times = {name: np.array(seconds[1:]) for name, seconds in times.items()}
    return [row(f"{about}: {a} / {b}", times[a] / times[b], seconds=np.median(times[b]).item())
            for a, b in pairs or [(other, first) for other in others]]


def peak_memory(bench, step, batch):
    """Most bytes that step(batch) holds beyond what stood before; on a CPU as torch's profiler has them."""
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as record:
        step(batch)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def flops(step, batch):
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops()


def padded(rows, device, value=0, side="right"):
    return pad_sequence([torch.tensor(row) for row in rows], True, value, side).to(device)


def of_padded(model, batch):
    """The loss that transformers has, by it or by our model: label -100 where there is none."""
    device, labels = model.lm_head.weight.device, [[-100] * start + ids[start:] for ids, start in batch]
    ids, labels = padded([ids for ids, _ in batch], device), padded(labels, device, -100)
    mask = padded([[1] * len(ids) for ids, _ in batch], device)
    if not hasattr(model, "losses"):
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss
    logits = model(ids, real=mask.bool())[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten())


of_packed = lambda model, batch: model.losses(batch).mean()
of_all_logits = lambda model, batch: model.losses([(ids, 0) for ids, _ in batch]).mean()


def trainer(model, method=None, loss=of_packed):
    """-> step(batch), as the loop of train.py has it; with .model and .optimizer."""
    def step(batch):
        loss(model, batch).backward()
        if hasattr(method, "observe"):
            method.observe(model, 1, 1)
        torch.nn.utils.clip_grad_norm_([p for g in step.optimizer.param_groups for p in g["params"]], 1.0)
        step.optimizer.step()
        step.optimizer.zero_grad()

    step.model, flags = model.train(), SimpleNamespace(lr=1e-4, optimizer="adamw", weight_decay=0.0)
    step.optimizer = train.make_optimizer(method, flags, [p for p in model.parameters() if p.requires_grad])
    return step


def ours(bench, name, targets="all", stage=1, dtype=None, rank=RANK, loss=of_packed, **own):
    """A step of our model and method in its n-th stage; frozen weights are shared but where they change."""
    method, shared = checkpoint.load_method(name), {} if dtype or name == "glora" else bench.weights
    model = copy.deepcopy(bench.model, shared.copy()).to(dtype)
    method.inject(model, targets_of(model, targets), rank, **own)
    step = trainer(model, method, loss)
    for _ in range(stage - 1):
        step(bench.batches[0])
        method.reinit(model, step.optimizer)
    return step


def theirs(bench, kind, packed=False):
    """A step of peft's method: on transformers' model, padded, as its users have it; or packed on ours."""
    how = dict(r=RANK, target_modules=list(targets_of(bench.model, "all")))
    config = (peft.GraloraConfig(alpha=2 * RANK, gralora_k=2, **how) if kind == "gralora" else
              peft.LoraConfig(lora_alpha=2 * RANK, use_dora=kind == "dora", **how))
    model = copy.deepcopy(bench.model, bench.weights.copy()) if packed else of_transformers(bench)
    return trainer(peft.inject_adapter_in_model(config, model), loss=of_packed if packed else of_padded)


def of_transformers(bench):
    """transformers' own class around the same weights."""
    with bench.device:
        config = transformers.AutoConfig.for_model(**bench.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=bench.dtype)
    model.load_state_dict(bench.model.state_dict(), assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def products(bench, step):
    """-> a function of as many FLOPs as step(batch) has, all in the MLP's product: the machine's own rate."""
    W = step.model.blocks()[0].mlp.up_proj.base.weight
    work = {id(batch): flops(step, batch) / (2 * W.numel()) for batch in bench.batches}

    def multiply(batch):
        x = W.new_ones(sum(len(ids) for ids, _ in batch), W.shape[1])
        for _ in range(round(work[id(batch)] / len(x))):
            x @ W.T
    return multiply


def part_peft(bench):
    """peft's step over ours on all linears; LoRA's also move by move, and as matrix products alone."""
    rows = []
    for name in ("lora", "dora", "gralora"):
        steps = {"peft, padded": theirs(bench, name), "peft": theirs(bench, name, packed=True)}
        steps["ours"], pairs = ours(bench, name), [("peft, padded", "ours"), ("peft", "ours")]
        if bench.bf16:
            steps["bf16"] = ours(bench, name, dtype=torch.bfloat16)
            pairs += [("peft, padded", "bf16"), ("ours", "bf16")]
        if name == "lora":
            alone = {f"products of {us}": us for us in ("ours", "bf16") if us in steps}
            steps |= {what: products(bench, steps[us]) for what, us in alone.items()}
            steps["padded"] = ours(bench, name, loss=of_padded)
            steps["all logits"] = ours(bench, name, loss=of_all_logits)
            moves = ["peft, padded", "padded", "all logits", "ours"]
            pairs += [*zip(moves, moves[1:]), *alone.items()]
        over_ours, *others = race(bench, name, steps, bench.batches, pairs)
        rows += [over_ours, *others]
        if bench.args.peak:
            work = np.mean([flops(steps["ours"], batch) for batch in bench.batches])
            rows.append(row(f"{name}: MFU", work / over_ours["seconds"] / bench.args.peak / 1e12))
    return rows


def part_methods(bench):
    """A step of our methods over our LoRA's; FLOPs are the adapter's, memory is that of one long sequence."""
    rows, n = [], 128 if bench.args.quick else 1024
    batch = [(torch.randint(bench.model.cfg.vocab_size, (n,)).tolist(), n * 7 // 8)]
    for targets, contenders in METHODS.items():
        steps, costs = {}, []
        for what, (name, how) in contenders.items():
            step = steps[what] = ours(bench, name, targets, **how)
            trains = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
            plain, weights = peak_memory(bench, step, batch), sum(p.nbytes for p in step.model.parameters())
            step.optimizer.state.clear()                # as before a first step
            step.model.checkpointing = True
            cost = dict(trainable=trains, memory=plain, checkpointing=peak_memory(bench, step, batch))
            step.model.checkpointing = False
            costs.append(cost | {"and weights": plain + weights, "FLOPs": flops(step, bench.batches[0])})
        # LoRA's own are 6 r (in + out) a token, the rest is the model's.
        tokens = sum(len(ids) for ids, _ in bench.batches[0])
        frozen = costs[0]["FLOPs"] - 6 * tokens * costs[0]["trainable"]
        for cost in costs:
            cost["FLOPs"] -= frozen
        rows += [found | {name: value / costs[0][name] for name, value in cost.items()}
                 for found, cost in zip(race(bench, targets, steps, bench.batches), costs[1:])]
    return rows


def part_evaluation(bench):
    """Greedy decoding of as many tokens by transformers over ours; four choices scored apart over ours."""
    hf, new, rows = of_transformers(bench), 8 if bench.args.quick else 32, []
    hf.generation_config.eos_token_id = None

    def by_transformers(prompts):
        ids = padded(prompts, bench.device, side="left")
        mask = padded([[1] * len(prompt) for prompt in prompts], bench.device, side="left")
        return hf.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)

    contenders = dict(ours=lambda prompts: generate(bench.model, prompts, new, [-1]), theirs=by_transformers)
    prompts = [ids[:start] for ids, start in bench.examples]
    for b in (1, 16):
        rows += race(bench, f"batch {b}", contenders, [prompts[i:i + b] for i in range(0, len(prompts), b)])
    answers = [ids[start:] for ids, start in bench.examples]
    choices = [[(prompt + answer, len(prompt)) for answer in (answers * 2)[i:i + 4]]
               for i, prompt in enumerate(prompts)]
    contenders = dict(ours=lambda some: nll(bench.model, some),
                      apart=lambda some: nll(bench.model, sum(some, [])))
    return rows + race(bench, "choices", contenders, [choices[i:i + 16] for i in range(0, len(choices), 16)])


def part_init(bench):
    """inject and a reinit at LLaMA2-7B's or --shape's size: on a GPU of attention, else of one q_proj."""
    rows, config = [], bench.config if bench.args.quick else SHAPES[bench.args.shape or "llama2-7b"]
    config = config | dict(vocab_size=64) | ({} if bench.gpu else dict(num_hidden_layers=1))
    for name, own in (("glora", {}), ("glora", dict(svd="randomized")),
                      ("cps_lora", {}), ("cps_lora", dict(strategy="spectral"))):
        with bench.device:
            method, model = checkpoint.load_method(name), checkpoint.build(config).to(bench.dtype)
        targets = targets_of(model, "attention" if bench.gpu else "q_proj")
        seconds, what = [bench.clock()], " ".join([name, *own.values()])
        method.inject(model, targets, RANK, **own)
        seconds.append(bench.clock())
        step = trainer(model, method)
        step([(list(range(64)), 0)])
        seconds.append(bench.clock())
        method.reinit(model, step.optimizer)
        inject, _, reinit = np.diff([*seconds, bench.clock()])
        rows += [row(f"{what}: inject", inject, "s"), row(f"{what}: reinit", reinit, "s")]
    return rows


PARTS = {name.removeprefix("part_"): f for name, f in list(globals().items()) if name.startswith("part_")}


def prepare(args):
    """What the parts share: the machine, the frozen model, texts as examples and batches of them."""
    torch.manual_seed(0)
    device, cpu, b = checkpoint.pick_device(args.device), Path("/proc/cpuinfo"), args.batch_size
    gpu, said = device.type == "cuda", cpu.read_text() if cpu.exists() else ""
    machine = train.environment(device) | dict(
        processor=re.findall(r"model name\s*: (.*)|$", said)[0], cores=os.cpu_count(), peft=peft.__version__,
        bf16=sorted({*re.findall("avx512_bf16|amx_bf16", said)}), transformers=transformers.__version__)
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    dtype, rounds = torch.bfloat16 if gpu else torch.float32, 1 if args.quick else args.rounds
    own = read_json(checkpoint.resolve(args.model) / "config.json")
    config = SHAPES.get(args.shape, own)
    with device:
        model = checkpoint.build(config) if args.shape else checkpoint.load(args.model, dtype, device)
    model.to(dtype).eval().requires_grad_(False)
    module, task, _ = tasks.find_task("arithmetic" if args.model == str(checkpoint.TINY) else "commonsense")
    rows = tasks.train_rows(module, args.data, task)
    rows = [rows[i] for i in train.order(0, 0, len(rows))[:max(16, b) * (rounds + 1)]]
    examples, _ = text.encode(text.Tokenizer(args.model, checkpoint.read_config(own)), rows, 512)
    examples = [([i % model.cfg.vocab_size for i in ids], start) for ids, start in examples]
    return SimpleNamespace(
        args=args, device=device, gpu=gpu, dtype=dtype, bf16=machine["bf16"] and not gpu, machine=machine,
        clock=lambda: (gpu and torch.cuda.synchronize(), now())[1], rounds=rounds, config=config, model=model,
        weights={id(p): p for p in model.parameters()}, examples=examples,
        batches=[examples[i:i + b] for i in range(0, b * (rounds + 1), b)])


def draw(file, rows):
    """Every ratio with its quartiles, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure(figsize=(8, 1 + len(rows) / 5), layout="constrained").subplots()
    low, middle, high = np.array([[r["low"], r["median"], r["high"]] for r in rows[::-1]]).T
    axes.barh([r["what"] for r in rows[::-1]], middle, xerr=(middle - low, high - middle), color="lightblue")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.figure.savefig(file)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--part", choices=list(PARTS), help="one part; none: all")
    add("--quick", action="store_true", help="a smoke run: one round, short texts; its figures mean nothing")
    add("--rounds", type=int, default=7, help="pairs that a ratio is the median of")
    add("--model", default=str(checkpoint.TINY), help="Hugging Face directory or hub id of a decoder")
    add("--shape", choices=list(SHAPES), help="random weights of this shape; --model gives the tokenizer")
    add("--data", default=".", help="directory of the data sets")
    add("--batch_size", type=int, default=4)
    add("--device", default="auto")
    add("--peak", type=float, help="TFLOP/s of the GPU in dense bf16, for MFU; 989: H100, H200")
    add("--clock", default="wall", choices=["wall", "cpu"], help="cpu: with OMP_NUM_THREADS=1")
    add("--out", default=str(Path(__file__).parent / "results"))
    args = p.parse_args(argv)
    bench, out, parts = prepare(args), Path(args.out), {}
    name = "-".join(filter(None, ("benchmark", args.shape, args.part)))
    command = " ".join(["python experiments/benchmark.py", *(argv or sys.argv[1:])])
    result = dict(command=command, machine=bench.machine, date=time.strftime("%Y-%m-%d"),
                  load=[os.getloadavg()[0]], seconds={}, parts=parts)
    out.mkdir(parents=True, exist_ok=True)
    for part in [args.part] if args.part else PARTS:
        began = time.perf_counter()
        parts[part] = PARTS[part](bench)
        result["seconds"][part] = round(time.perf_counter() - began, 1)
        result["load"].append(os.getloadavg()[0])
        print(f"\n{part} ({result['seconds'][part]} s): {PARTS[part].__doc__}")
        for r in parts[part]:
            spread = f"{r['what']:40} {r['median']:8.3f} {r['unit']} [{r['low']:.3f}, {r['high']:.3f}]"
            print("  ".join([spread, *(f"{key} {r[key]:.3f}" for key in list(r)[6:])]), flush=True)
        write_json(out / f"{name}.json", result)
    if ratios := [r for found in parts.values() for r in found if r["unit"] == "x"]:
        draw(out / f"{name}.png", ratios)


if __name__ == "__main__":
    main()
