"""
An adapter in the forms that others read:

    python checkpoint.py RUN/adapter --to peft|lora|merged --dest DIR

peft: as peft has the method, DoRA and GraLoRA by name, others that are low-rank as a plain LoRA. lora: always
that, for vLLM and llama.cpp. merged: the model, as train.py --merge writes it. A plain LoRA has the largest
rank of its modules, zeros where one needs less; the scale is in B, so that a reader's alpha / rank is 1.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import checkpoint
from files import new_directory, write_json


def plain(found):
    """{module: (A, B)} -> fields of peft's config, {name: tensor}."""
    r = max(len(A) for A, _ in found.values())
    tensors = {f"{name}.lora_A.weight": F.pad(A, (0, 0, 0, r - len(A))) for name, (A, _) in found.items()}
    tensors |= {f"{name}.lora_B.weight": F.pad(B, (0, r - B.shape[1])) for name, (_, B) in found.items()}
    return dict(peft_type="LORA", r=r, lora_alpha=r, lora_dropout=0.0), tensors


def dora(layers):
    fields, tensors = plain({name: (m.lora_A, m.scaling * m.lora_B) for name, m in layers.items()})
    tensors |= {f"{name}.lora_magnitude_vector": m.lora_m for name, m in layers.items()}
    return fields | dict(use_dora=True), tensors


def gralora(layers):
    """As the header of gralora.py has it; peft's r leaves the hybrid part out."""
    m, tensors = next(iter(layers.values())), {}
    r, h, k = len(m.lora_A), len(getattr(m, "lora_A_general", ())), m.k
    for name, m in layers.items():
        tensors[f"{name}.gralora_A"] = m.lora_A.unflatten(1, (k, -1)).permute(1, 2, 0)
        tensors[f"{name}.gralora_B"] = m.scaling * m.lora_B.unflatten(0, (k, -1)).mT
        if h:
            tensors[f"{name}.gralora_A_general.weight"] = m.lora_A_general
            tensors[f"{name}.gralora_B_general.weight"] = m.scaling * m.lora_B_general
    return dict(peft_type="GRALORA", r=r, hybrid_r=h, gralora_k=k, alpha=r + h, gralora_dropout=0.0), tensors


def form(method, model, native):
    """Fields and tensors, as plain returns them; ValueError says why where the update is not low-rank."""
    if native:
        return native({name: m for name, m in model.named_modules() if hasattr(m, "delta")})
    try:
        if hasattr(method, "factors"):
            return plain(method.factors(model))
        raise NotImplementedError("it has no factors")
    except NotImplementedError as error:
        kept = "" if hasattr(method, "NOT_MERGEABLE") else "; --to merged keeps it"
        raise ValueError(f"{error}{kept}") from None


def write(directory, fields, tensors, model, targets, source):
    """peft's two files; ValueError, and none of them, unless what is read back is the model's."""
    head, state = checkpoint.head_names(model), model.state_dict()
    tensors |= {name: state[name] for name in head}
    tensors = {f"base_model.model.{name}": t.detach().float().contiguous() for name, t in tensors.items()}
    config = fields | dict(
        task_type="SEQ_CLS" if head else "CAUSAL_LM", target_modules=targets, bias="none",
        modules_to_save=[model.TRAINED_HEAD] if head else None, inference_mode=True,
        base_model_name_or_path=str(Path(source).resolve() if Path(source).is_dir() else source))
    with new_directory(directory) as part:
        save_file(tensors, str(part / "adapter_model.safetensors"), metadata={"format": "pt"})
        write_json(part / "adapter_config.json", config)
        held = load_file(part / "adapter_model.safetensors")
        if wrong := [name for name, t in tensors.items() if not (held[name] - t).norm() <= 1e-5 * t.norm()]:
            raise ValueError(f"{directory}: not written, {wrong[0]} read back is not the adapter's")
    return config


@torch.no_grad()
def run(args):
    if Path(args.dest).exists():
        raise ValueError(f"{args.dest}: exists already")
    source = args.model or checkpoint.base_of(args.adapter)
    files = checkpoint.tensor_files(checkpoint.resolve(source))
    in_bf16 = all(kind == "BF16" for _, _, kind in checkpoint.read_headers(files).values())
    saved = checkpoint.read_headers([Path(args.adapter, "adapter.safetensors")])
    labels = saved.get("classifier.out_proj.weight", (None, (None,)))[1][0]
    model = checkpoint.load(source, torch.bfloat16 if in_bf16 else torch.float32, num_labels=labels)
    method, record = checkpoint.load_adapter(model, args.adapter, args.method)
    if args.to != "merged":
        native = dict(dora=dora, gralora=gralora).get(record["method"]) if args.to == "peft" else None
        config = write(args.dest, *form(method, model, native), model, record["targets"], source)
        return print(f"{args.dest}: {config['peft_type']} of rank {config['r']}, read back and compared")
    checkpoint.merge(method, model, source, getattr(torch, args.merge_dtype), [])
    checkpoint.save_merged(args.dest, model, source)


def main(argv=None):
    p = checkpoint.Parser(prog="checkpoint.py", description=__doc__.split("\n\n")[2], allow_abbrev=False)
    p.add_argument("adapter", help="adapter directory that train.py wrote")
    p.add_argument("--to", required=True, choices=["peft", "lora", "merged"], help="which form")
    p.add_argument("--dest", required=True, help="directory to write, which is not there yet")
    p.add_argument("--model", help="Hugging Face directory or hub id; none: the adapter's")
    p.add_argument("--method", help="the adapter's method, where that is a .py file of your own: it is run")
    p.add_argument("--merge_dtype", default="float32", choices=["float32", "bfloat16"])
    args = p.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, NotImplementedError) as error:
        p.error(error)
