"""
SST-2 as prompts, for a language model: a .json that train.py takes as --task, of the first training rows.

    python experiments/sst2.py DATA sst2.json [--rows 10000]
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import glue
from files import write_json


def prompt(row):
    word = ("negative", "positive")[row["label"]]
    return dict(prompt=f"Review: {row['text'].strip()}\nSentiment:", completion=f" {word}", answer=word)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.strip().partition("\n")[0])
    p.add_argument("data", help="directory of the data sets")
    p.add_argument("file")
    p.add_argument("--rows", type=int, default=10000)
    args = p.parse_args()
    write_json(Path(args.file), [prompt(row) for row in glue.rows(args.data, "sst2", "train")[:args.rows]])
