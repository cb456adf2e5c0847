"""
Published checkpoints against transformers: the ids of a text, and the logits on them, in fp32 on a CPU. Not
run: it needs the hub. .github/workflows/real-models.yml does it by hand.

    python experiments/real_models.py Qwen/Qwen2.5-0.5B FacebookAI/roberta-base     # or directories
"""
import argparse
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from data import text

TEXT = "The quick brown fox jumps over 13 lazy dogs; das kostet 4,50 €.\n\n    def f(x):\n        return x"


@torch.no_grad()
def difference(name):
    """Of a logit, the largest. A head that the checkpoint lacks is ours in both. ValueError for other ids."""
    directory = checkpoint.resolve(name)
    ours = checkpoint.load(directory)
    tokenizer = text.Tokenizer(directory, ours.cfg)
    decoder = "generate" in ours.KINDS
    ids = tokenizer.bos + tokenizer.encode(TEXT) if decoder else tokenizer.pair(TEXT)
    if ids != transformers.AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]:
        raise ValueError(f"{name}: other ids than transformers'")
    kind = "AutoModelForCausalLM" if decoder else "AutoModelForSequenceClassification"
    theirs = getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32).eval()
    if not decoder:
        theirs.classifier.load_state_dict(ours.classifier.state_dict())
    ids = torch.tensor([ids])
    return (ours(ids) - theirs(ids).logits).abs().max().item()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.strip().partition(":")[0])
    p.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face directory or hub id")
    p.add_argument("--bound", type=float, default=1e-3, help="largest difference that passes")
    args = p.parse_args()
    found = {name: difference(name) for name in args.models}
    for name, value in found.items():
        print(f"{name}: largest logit difference to transformers {value:.1e}")
    sys.exit(max(found.values()) > args.bound)
