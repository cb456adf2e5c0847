"""
What lies on disk: a Hugging Face directory, which becomes a model; method files, by name; an adapter
(adapter.safetensors + adapter.json); the merged model as a Hugging Face directory. A directory that is
written appears under its name only when it is whole. To peft's files or a merged model, see export.py:

    python checkpoint.py RUN/adapter --to peft --dest DIR
"""
import argparse
import hashlib
import importlib.util
import json
import math
import re
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import build, own_labels, read_config
from files import new_directory, read_json, write_json
from model import CausalLM

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "data" / "tiny"       # the bundled model
SHARD_BYTES = 5_000_000_000


class Parser(argparse.ArgumentParser):      # of each of our commands
    def error(self, message):               # in one line, exit 2
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).splitlines())}\n")


# -------------------------------------------------------------------------------- Hugging Face directories

# Tensors that a file may hold beyond the model: what old files carry, and RoBERTa's pretraining heads.
IGNORED = {"decoder": re.compile(r".*\.rotary_emb\.inv_freq"),
           "roberta": re.compile(r"roberta\.embeddings\.position_ids|roberta\.pooler\..*|lm_head\..*")}
TEXT_FILES = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"]
HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TEXT_FILES]


def resolve(path):
    """A local directory as it is; a hub id 'org/name' as the directory that huggingface_hub keeps it in."""
    if (directory := Path(path)).is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or directory.parent.is_dir():
        raise ValueError(f"{path}: no such model directory")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES))
    except Exception as error:      # many kinds, from "no network" to "gated": its first line says which
        raise ValueError(f"{path}: no such directory, and not to be had from the hub: "
                         f"{str(error).strip().splitlines()[0]}") from None


def tensor_files(directory):
    """The safetensors files of a checkpoint: a single one, or the shards that its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f"{directory}: neither model.safetensors nor model.safetensors.index.json")
    files = [directory / name for name in sorted(set((read_json(index).get("weight_map") or {}).values()))]
    if not files:
        raise ValueError(f"{index}: no weight_map")
    if absent := [file for file in files if file.parent != directory or not file.exists()]:
        raise ValueError(f"{absent[0]}: shard named in {index.name}, not found beside it")
    return files


def model_files(path):
    """The files that a checkpoint's answers depend on."""
    directory = resolve(path)
    texts = (directory / name for name in ("config.json", *TEXT_FILES))
    return [*filter(Path.exists, texts), *tensor_files(directory)]


def read_headers(files):
    """{key: (file, shape, dtype)} of safetensors files; ValueError: one is not whole, a key is in two."""
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for key, t in [(key, f.get_slice(key)) for key in f.keys()]:
                    if key in found:
                        raise ValueError(f"{file}: tensor {key} is in {found[key][0].name}, too")
                    found[key] = file, tuple(t.get_shape()), t.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    return found


def read_tensors(found, expected, ignored, dtype, device):
    """
    {key: tensor} of what read_headers found, one at a time into dtype and device. expected {key: shape};
    ignored: a pattern of other keys. All headers are checked before a tensor is read; ValueError names both.
    F16 where BF16 was written cannot be told, unless a number is not finite then.
    """
    for key, (file, shape, kind) in found.items():
        if key not in expected and not ignored.fullmatch(key):
            raise ValueError(f"{file}: tensor {key} is not part of the model")
        if key in expected and shape != expected[key]:
            raise ValueError(f"{file}: tensor {key} has shape {shape}, the model expects {expected[key]}")
        if key in expected and kind not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: tensor {key} is {kind}, expected a float")
    tensors = {}
    for file in dict.fromkeys(file for file, *_ in found.values()):
        with safe_open(file, "pt") as f:
            for key in (key for key in f.keys() if key in expected):
                tensors[key] = f.get_tensor(key).to(device, dtype)
                check_finite(file, key, tensors[key])
    return tensors


def check_finite(file, name, t):
    """ValueError where a tensor holds a NaN or an infinity: its sum has one then, and takes no memory."""
    total = t.sum(dtype=torch.promote_types(t.dtype, torch.float32))
    if not total.isfinite() and not t.isfinite().all():
        raise ValueError(f"{file}: tensor {name} is not finite")


def load(path, dtype=torch.float32, device="cpu", num_labels=None):
    """
    The model of a Hugging Face directory or hub id, its weights in dtype on device, in eval mode, with its
    config as `.cfg`. The keys in the files must be the model's, both ways, but for: a tied lm_head; rotary
    tables and position ids that older files carry; RoBERTa's pooler and LM head; its classifier, which is
    drawn from torch's random generator where the checkpoint has none (`fresh_head` is True then).
    num_labels: as in read_config. ValueError, in one line, names the file and the tensor.
    """
    directory = resolve(path)
    c, file = read_json(directory / "config.json"), directory / "config.json"
    try:
        cfg = read_config(c, num_labels)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    files = tensor_files(directory)
    found = read_headers(files)
    held = {int(m[1]) for m in map(re.compile(r".*\.layers?\.(\d{1,9})\..*").fullmatch, found) if m}
    if held and cfg.num_hidden_layers > max(held) + 1:          # before it is built: 10^6 layers take an hour
        raise ValueError(f"{file}: num_hidden_layers {cfg.num_hidden_layers}, {max(held) + 1} have tensors")
    with torch.device("meta"):
        model = build(c, num_labels)
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    ignored = IGNORED["roberta" if cfg.model_type == "roberta" else "decoder"]
    tensors = read_tensors(found, expected, ignored, dtype, device)
    missing = [key for key in expected if key not in tensors]
    if isinstance(model, CausalLM) and cfg.tie_word_embeddings:
        missing = [key for key in missing if key != "lm_head.weight"]
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(tensors.get("lm_head.weight", embedding), embedding):
            raise ValueError(f"{file}: tie_word_embeddings, but lm_head.weight is not the embedding")
    model.fresh_head = bool(missing) and missing == head_names(model)
    if model.fresh_head:
        for key in missing:
            tensors[key] = torch.zeros(expected[key], dtype=dtype, device=device)
            if key.endswith("weight"):
                tensors[key].normal_(0, getattr(cfg, "initializer_range", None) or 0.02)
    elif missing:
        raise ValueError(f"{files[0] if len(files) == 1 else directory}: tensor {missing[0]} is missing"
                         + f" (and {len(missing) - 1} more)" * (len(missing) > 1))
    model.load_state_dict(tensors, strict=False, assign=True)
    if isinstance(model, CausalLM):
        model.tie_weights()
    return model.eval()


def head_names(model):
    """Tensors of the head that trains beside any adapter; none for models without one, transformers' too."""
    head = getattr(model, "TRAINED_HEAD", None)
    return [name for name in model.state_dict() if head and name.startswith(f"{head}.")]


def pick_device(name):
    """'auto' or torch's own names -> torch.device. ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        there = torch.zeros(1, device=name)
        there.cpu()             # which "meta" cannot
        torch.cuda.set_device(there.device if there.is_cuda else -1)    # whose generator is meant; -1: none
        return there.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None


def pick_dtype(name, device, path=None):
    """
    'auto': bf16 where the GPU has it, or where a CPU has it and the checkpoint at `path` is in it; else fp32,
    and for the bundled model, whose run is not to differ from one machine to another.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        if path is not None and Path(path).resolve() == TINY:
            name = "float32"
        elif path is not None and device.type == "cpu" and cpu_has_bf16():
            config = read_json(resolve(path) / "config.json")
            if config.get("dtype", config.get("torch_dtype")) == "bfloat16":
                name = "bfloat16"
                print("dtype bfloat16, the checkpoint's own, which this processor has; or: --dtype float32")
    return getattr(torch, name)


def cpu_has_bf16():
    """Whether the processor multiplies bf16 in hardware; one with AMX has AVX512-BF16, too."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# -------------------------------------------------------------------------------- method files

def method_files():
    """{name: file} of the method files: those in the root and in baselines/ that define inject."""
    files = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "baselines").glob("*.py"))]
    return {file.stem: file for file in files if "\ndef inject(" in file.read_text(encoding="utf-8")}


def load_method(name):
    """A method's module, by name or by the path to a .py file. ValueError lists what there is."""
    known = method_files()
    file = known.get(name) or Path(name)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"method {name!r}, expected one of {', '.join(known)}, or a path to a .py file")
    spec = importlib.util.spec_from_file_location(f"method_{file.stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)     # where torch.compile looks
    spec.loader.exec_module(module)
    for needed in ("inject", "merge", "DEFAULTS"):
        if not hasattr(module, needed):
            raise ValueError(f"{file}: defines no {needed}, so it is not a method file")
    return module


# -------------------------------------------------------------------------------- adapter

def adapter_tensors(model):
    """{name: tensor}: every lora_ parameter and buffer, and what else trains (a head; all, for `full`)."""
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: t for name, t in model.state_dict().items()
            if name.rpartition(".")[2].startswith("lora_") or name in trains}


def seal(facts, tensors):
    """The hash of what an adapter's header says, and of its tensors."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def scaling(model):
    layers = [m for m in model.modules() if hasattr(m, "delta") and hasattr(m, "scaling")]
    return json.dumps(sorted({m.scaling for m in layers}))


def save_adapter(directory, model, record):
    """Writes an injected model's adapter. record: method, targets, rank, alpha, dropout, own flags, model."""
    tensors = {name: t.detach().contiguous() for name, t in adapter_tensors(model).items()}
    if not tensors:
        raise ValueError("nothing to save: the model has no lora_ tensor and nothing trains")
    if bad := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise ValueError(f"not saved: {bad[0]} is not finite ({len(bad)} such tensors)")
    facts = dict(format="pt", record=json.dumps(record, sort_keys=True), scaling=scaling(model))
    facts["sha256"] = seal(facts, tensors)
    with new_directory(directory) as part:
        save_file(tensors, str(part / "adapter.safetensors"), metadata=facts)
        write_json(part / "adapter.json", record)


def base_of(directory):
    """The model that an adapter was trained on, as its record has it. ValueError where that is not there."""
    named = read_json(Path(directory, "adapter.json")).get("model") or TINY
    try:
        resolve(named)
    except ValueError as error:
        raise ValueError(f"{error}, which {directory} was trained on: --model?") from None
    return str(named)


@contextmanager
def shapes_only(model):
    """Linear weights are on the meta device inside: an injection has no weight that it could decompose."""
    weights = {m: m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    for m in weights:
        m.weight = nn.Parameter(m.weight.to("meta"), requires_grad=False)
    try:
        yield
    finally:
        for m, weight in weights.items():
            m.weight = weight.requires_grad_(m.weight.requires_grad)


def read_adapter(config, file):
    """-> record, tensors, scaling, as they were saved, and finite; ValueError names what is not."""
    if (inner := config.parent / "adapter").exists():
        raise ValueError(f"{config.parent}: a run, whose adapter is {inner}")
    record = read_json(config)
    try:
        with safe_open(file, "pt") as f:
            facts, tensors = f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    if (sealed := facts.pop("sha256", None)) is None:
        raise ValueError(f"{file}: its header does not say what it holds: train again")
    if sealed != seal(facts, tensors):
        raise ValueError(f"{file}: its header and tensors are not those that were saved")
    saved = json.loads(facts["record"])
    if other := [key for key in sorted(record.keys() | saved.keys()) if record.get(key) != saved.get(key)]:
        raise ValueError(f"{config}: {other[0]} {record.get(other[0])!r}, saved was {saved.get(other[0])!r}")
    for name, t in tensors.items():
        if t.is_floating_point() and t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{file}: tensor {name} is {t.dtype}, expected float32 or float64")
        check_finite(file, name, t)
    return record, tensors, facts["scaling"]


def load_adapter(model, directory, method=None):
    """
    Injects the method that adapter.json names into a freshly loaded model, ours or transformers', and fills
    it -> (method, record). It names one of the project's own; the file of another, which is code that runs,
    the caller gives: `method`. ValueError names file and tensor; the model is of no use after it.
    """
    config, file = Path(directory, "adapter.json"), Path(directory, "adapter.safetensors")
    record, tensors, trained_at = read_adapter(config, file)
    named, own = record["method"], record.get("own") or {}
    if method is None and named not in method_files():
        raise ValueError(f"{config}: method {named!r} is none of {', '.join(method_files())}: --method FILE?")
    if method is not None and Path(method).stem != Path(named).stem:
        raise ValueError(f"{config}: method {named!r}, not {method}")
    method, device = load_method(method or named), next(model.parameters()).device
    rebuilds = hasattr(method, "restore")
    kinds = {key: type(default) for key, (default, *_) in method.DEFAULTS.items()}
    if wrong := [name for name, value in own.items() if type(value) is not kinds.get(name)]:
        raise ValueError(f"{config}: {named} takes no {wrong[0]} {own[wrong[0]]!r}")
    try:
        with shapes_only(model) if rebuilds else nullcontext():
            method.inject(model, tuple(record["targets"]), record["rank"], record.get("alpha"),
                          record.get("dropout") or 0.0, **own)
        if rebuilds:
            method.restore(model, tensors)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if scaling(model) != trained_at:
        raise ValueError(f"{file}: was trained at the scale {trained_at}, which is {scaling(model)} here")
    expected, head = adapter_tensors(model), head_names(model)
    if head:                # it trains beside any adapter, in fp32
        model.get_submodule(model.TRAINED_HEAD).float()
        if model.fresh_head or tensors.keys() & set(head):      # trained it must be, where the base has none
            expected |= {name: t for name, t in model.state_dict().items() if name in head}
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in expected or name not in tensors:
            what = "missing" if name in expected else "not part of this model"
            raise ValueError(f"{file}: tensor {name} is {what}")
        ours, theirs = (f"{tuple(t.shape)}" if t.is_floating_point() else f"{tuple(t.shape)} of {t.dtype}"
                        for t in (expected[name], tensors[name]))
        if ours != theirs:
            raise ValueError(f"{file}: tensor {name} has shape {theirs}, the model expects {ours}")
    if rebuilds:            # what is still on the meta device can only be assigned
        tensors = {name: t.to(device, expected[name].dtype) for name, t in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=rebuilds)
    return method, record


# -------------------------------------------------------------------------------- merged model

def merge_layer(method, model, name, layer):
    """method.merge for one layer alone, in fp32 or wider: the Linear takes its place, and is returned."""
    layer.base.to(torch.promote_types(layer.base.weight.dtype, torch.float32))
    alone = nn.Module()                             # a model of this layer and of what it shares with others
    alone.layer, alone.adapter = layer, getattr(model, "adapter", None)
    method.merge(alone)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, alone.layer)
    return alone.layer


def merge(method, model, source, dtype, examples):
    """
    method.merge a layer at a time: in fp32, then rounded once to dtype, which the whole model is in then.
    Prints, and returns for summary.json, what rounding took of each update ΔW of the pretrained W (of
    source), ‖W' - (W + ΔW)‖ / ‖ΔW‖, and how far log-probabilities of a few training examples moved, if any.
    """
    files, changes = {key: at[0] for key, at in read_headers(tensor_files(resolve(source))).items()}, {}

    def change(name, exact, seen):
        with safe_open(files[f"{name}.weight"], "pt") as f:
            W = f.get_tensor(f"{name}.weight").to(exact.device, seen)       # as the run saw it
        changes[name] = (exact.to(dtype) - exact).norm().item(), (exact - W).norm().item()

    model.eval().requires_grad_(False)
    before, ran_in = model.losses(examples) if examples else None, next(model.parameters()).dtype
    for name, layer in [(name, m) for name, m in model.named_modules() if hasattr(m, "delta")]:
        seen, linear = layer.base.weight.dtype, merge_layer(method, model, name, layer)
        change(name, linear.weight, seen)
        linear.to(dtype)
    if hasattr(model, "adapter"):
        del model.adapter
    if not changes:                                 # full fine-tuning has no layers of its own
        method.merge(model)
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear) and f"{name}.weight" in files:
                change(name, m.weight, m.weight.dtype)
    model.to(dtype)
    moved = (model.losses(examples) - before).abs().max().item() if examples else None
    dtype, ran_in = (str(x).removeprefix("torch.") for x in (dtype, ran_in))
    return report_merge(changes, dtype, ran_in, moved, len(examples))


def report_merge(changes, dtype, ran_in, moved, count):
    """changes {module: (‖what rounding took‖, ‖ΔW‖)} -> summary.json's entry, after a line that says it."""
    share = {name: took / update if update else 0.0 for name, (took, update) in changes.items()}
    took, update = (math.hypot(*norms) for norms in zip(*changes.values()))
    worst, lost = max(share, key=share.get), took / update if update else 0.0
    print(f"merged in {dtype}: rounding took {lost:.2%} of the update, at most {share[worst]:.2%} ({worst})"
          + (f"; log-probabilities of {count} training rows moved by up to {moved:.3g}"
             + f" (activations were {ran_in})" * (ran_in != dtype) if count else ""))
    if count and moved > 0.5 and dtype != "float32":
        print("--merge_dtype float32 would keep them")
    return dict(dtype=dtype, lost=lost, log_probability=moved, lost_by_module=share)


def save_merged(directory, model, source):
    """
    Writes a merged model (plain Linears, after method.merge) as a Hugging Face directory, in the dtype it is
    in. source is the directory or hub id it was loaded from: tokenizer and generation files are copied, but
    no chat template; config.json too, with its dtype set to what is written (transformers would otherwise
    load fp32 weights as bf16), and the labels of a head that was trained.
    """
    source, cfg = resolve(source), model.cfg
    weights = {name: t.detach() for name, t in model.state_dict().items()}
    if getattr(cfg, "tie_word_embeddings", False):
        weights.pop("lm_head.weight", None)         # RoBERTa's config says so too, and has none
    config = read_json(source / "config.json")
    written = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config["dtype" if "dtype" in config else "torch_dtype"] = written
    if head_names(model) and (cfg.labels or len(own_labels(config)) != cfg.num_labels):
        labels = cfg.labels or [f"LABEL_{i}" for i in range(cfg.num_labels)]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    shards, size = [{}], 0
    for name, t in weights.items():
        if shards[-1] and size + t.nbytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = t, size + t.nbytes
    with new_directory(directory) as part:
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards):
            shard = {key: t.contiguous().cpu() for key, t in shard.items()}
            save_file(shard, str(part / name), metadata={"format": "pt"})
        if len(shards) > 1:
            write_json(part / "model.safetensors.index.json", {
                "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
                "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}})
        write_json(part / "config.json", config)
        for file in TEXT_FILES:
            if (source / file).exists():
                shutil.copyfile(source / file, part / file)
        if (file := part / "tokenizer_config.json").exists():   # the weights know our prompt, not a chat's
            write_json(file, {key: x for key, x in read_json(file).items() if key != "chat_template"})


if __name__ == "__main__":
    from export import main  # which imports this file under its name
    main()
