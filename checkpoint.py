"""
What a run leaves for others: the adapter (adapter_model.safetensors + adapter_config.json), and the merged model as a
Hugging Face directory. A directory appears under its name only when it is whole.
"""
import importlib.util
import json
import os
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import TEXT_FILES, read_json, resolve

ROOT = Path(__file__).resolve().parent
SHARD_BYTES = 5_000_000_000


# ------------------------------------------------------------------------------------ method files

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
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)     # torch.compile looks it up there
    spec.loader.exec_module(module)
    if not hasattr(module, "inject"):
        raise ValueError(f"{file}: defines no inject, so it is not a method file")
    return module


# ------------------------------------------------------------------------------------ files

@contextmanager
def new_directory(path):
    """Yields a directory to fill, which takes the place of `path` at the end; an exception leaves `path` as it was."""
    path = Path(path)
    part, old = (path.with_name(f".{path.name}.{end}-{os.getpid()}") for end in ("part", "old"))
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.rename(old)
        part.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_json(file, obj):
    Path(file).write_text(json.dumps(obj, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ adapter

def adapter_tensors(model):
    """{name: tensor}: every lora_ parameter and buffer, and what else trains (a classifier head; all, for `full`)."""
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: t for name, t in model.state_dict().items()
            if name.rpartition(".")[2].startswith("lora_") or name in trains}


def save_adapter(directory, model, record):
    """
    Writes the adapter of an injected model. record: method, targets (a list of names), rank, alpha, dropout, the
    method's own flags under "own", and the base model's name.
    """
    tensors = {name: t.detach().contiguous() for name, t in adapter_tensors(model).items()}
    if not tensors:
        raise ValueError("nothing to save: the model has no lora_ tensor and nothing trains")
    with new_directory(directory) as part:
        save_file(tensors, str(part / "adapter_model.safetensors"), metadata={"format": "pt"})
        write_json(part / "adapter_config.json", record)


@contextmanager
def shapes_only(model):
    """Linear weights are on the meta device inside: an injection that would decompose them has nothing to compute."""
    weights = {m: m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    for m in weights:
        m.weight = nn.Parameter(m.weight.to("meta"), requires_grad=False)
    try:
        yield
    finally:
        for m, weight in weights.items():
            m.weight = weight.requires_grad_(m.weight.requires_grad)


def load_adapter(model, directory):
    """
    Injects the method that adapter_config.json names into a freshly loaded model, fills it -> (method, record).
    ValueError names the file and the tensor; the model is of no use after it.
    """
    config, file = Path(directory, "adapter_config.json"), Path(directory, "adapter_model.safetensors")
    record = read_json(config)
    if absent := [key for key in ("method", "targets", "rank") if key not in record]:
        raise ValueError(f"{config}: no {absent[0]!r}")
    try:
        tensors = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    method, device = load_method(record["method"]), next(model.parameters()).device
    with shapes_only(model) if hasattr(method, "restore") else nullcontext():
        method.inject(model, tuple(record["targets"]), record["rank"], record.get("alpha"), record.get("dropout", 0.0),
                      **record.get("own", {}))
    if hasattr(method, "restore"):
        try:
            method.restore(model, tensors)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    if hasattr(model, "classifier"):        # which trains in fp32 beside any adapter
        model.classifier.float()
    expected = adapter_tensors(model)
    head = {name: t for name, t in model.state_dict().items() if name.startswith("classifier.")}
    if getattr(model, "fresh_head", False) or tensors.keys() & head.keys():
        expected |= head        # a head that trained is in the file, and must be where the base has none
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in expected or name not in tensors:
            raise ValueError(f"{file}: tensor {name} is {'missing' if name in expected else 'not part of this model'}")
        if expected[name].shape != tensors[name].shape:
            raise ValueError(f"{file}: tensor {name} has shape {tuple(tensors[name].shape)}, "
                             f"the model expects {tuple(expected[name].shape)}")
    if hasattr(method, "restore"):      # what is still on the meta device can only be assigned
        tensors = {name: t.to(device, expected[name].dtype) for name, t in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=hasattr(method, "restore"))
    return method, record


# ------------------------------------------------------------------------------------ merged model

def save_merged(directory, model, source):
    """
    Writes a merged model (plain Linears, after method.merge) as a Hugging Face directory, in the dtype it is in.

    source is the directory or hub id it was loaded from: tokenizer and generation files are copied; config.json too,
    with its dtype set to what is written (transformers would otherwise load fp32 weights as bf16), and its labels
    where a new classifier head has another number of them.
    """
    source, cfg = resolve(source), model.cfg
    weights = {name: t.detach() for name, t in model.state_dict().items()}
    if getattr(cfg, "tie_word_embeddings", False):
        weights.pop("lm_head.weight", None)         # RoBERTa's config says so too, and has none
    config = read_json(source / "config.json")
    written = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config["dtype" if "dtype" in config else "torch_dtype"] = written
    if "classifier.out_proj.weight" in weights and len(config.get("id2label") or "01") != cfg.num_labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(cfg.num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(cfg.num_labels)}
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
