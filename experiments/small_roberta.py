"""
A small RoBERTa with random weights, and a byte-level BPE of SST-2's own text, as a Hugging Face directory:
something to train from nothing where no pretrained encoder is at hand.

    python experiments/small_roberta.py OUT_DIR --data DIR
    python train.py --method full --model OUT_DIR --task sst2 --data DIR --lr 5e-4 --batch_size 32 \\
                    --epochs 1 --merge
"""
import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from data import glue
from files import write_json

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]        # ids 0 - 4, as RoBERTa has them


def make(directory, data, vocabulary=4096, width=128, layers=4, seed=42):
    """Writes config.json, model.safetensors, tokenizer.json to a new directory; weights are N(0, 0.02²)."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator((row["text"] for row in glue.rows(data, "sst2", "train")), vocabulary,
                                  special_tokens=SPECIAL, show_progress=False)
    directory = Path(directory)
    directory.mkdir(parents=True)
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(directory / "tokenizer.json"))
    config = dict(architectures=["RobertaForSequenceClassification"], model_type="roberta", hidden_act="gelu",
                  vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
                  num_attention_heads=width // 32, intermediate_size=4 * width, max_position_embeddings=514,
                  type_vocab_size=1, layer_norm_eps=1e-5, hidden_dropout_prob=0.1,
                  attention_probs_dropout_prob=0.1, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    write_json(directory / "config.json", config)
    torch.manual_seed(seed)
    net = checkpoint.build(config)
    for name, p in net.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(p, 0, 0.02) if p.ndim > 1 else torch.nn.init.zeros_(p)
    # a task brings its head
    encoder = {name: t for name, t in net.state_dict().items() if not name.startswith("classifier.")}
    save_file(encoder, str(directory / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory")
    p.add_argument("--data", required=True, help="directory of the data sets: glue/sst2/train.tsv")
    args = p.parse_args()
    make(args.directory, args.data)
