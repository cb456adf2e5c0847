"""
From rows to tokens: the row files, the tokenizer, the one prompt template of training and evaluation.

A row is {"instruction", "input", "output"}, or {"prompt", "output"} whose prompt is used as it is, or for a
classifier {"text", "pair", "label"}; what a task file adds (answer, choices, prefix, stop) its docstring has.
"""
import gzip
import json
import re
import zlib
from pathlib import Path

import tokenizers

from checkpoint import read_json, resolve

ADDED = {"label", "text", "pair", "choices", "prefix", "stop"}      # by task files; files cannot set them


def read(directory, names, fields=("instruction", "output"), mix=None, wrong=lambda number, row: None):
    """
    Rows of the first of these files under directory, .gz or not. ValueError names file, row and field where
    one of `fields` is no text, or `input` (of training rows `source`, too) is there and none, and where
    wrong(number, row) says something. Of training rows it prints the file: mix is the name asked for, or "".
    `fields` may be a function of the first row.
    """
    candidates = [Path(directory or ".", name + end) for name in names for end in ("", ".gz")]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        where = directory or "no such file"
        raise FileNotFoundError(f"{where}: found none of {', '.join(names)} (.gz or not)")
    if mix is not None:
        print(f"training rows: {file}" + (f" ({mix} is not there)" if mix not in file.name else ""))
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8-sig")
        if ".jsonl" in file.suffixes:       # as a list with a row a line, so that an error names the line
            text = "[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]"
        rows = json.loads(text)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: expected a list of rows, found {type(rows).__name__ if rows else 'none'}")
    fields = fields(rows[0]) if callable(fields) else fields
    may = ("input",) if mix is None else ("input", "source")
    is_text = lambda value: isinstance(value, str) and not re.search("[\ud800-\udfff]", value)   # half a pair
    for number, row in enumerate(rows, 1):
        given = dict.fromkeys(may, "") | row if isinstance(row, dict) else {}
        for field in (*fields, *may):
            if not is_text(given.get(field)):
                raise ValueError(f"{file}: row {number} has no text in {field!r}, found "
                                 f"{given.get(field, row)!r:.60}, expected texts in {', '.join(fields)}")
        if said := wrong(number, row):
            raise ValueError(f"{file}: {said}")
    return [{name: row[name] for name in row if name not in ADDED} for row in rows]


class Tokenizer:
    """
    tokenizer.json with the ids that Hugging Face keeps beside it.

    bos   what the tokenizer's own post-processor puts before a text: [] for Qwen, [id] for LLaMA
    eos   ids that end a text, from config.json and generation_config.json; eos[0] closes a training example
    size  vocabulary, added tokens included; the embedding may be padded beyond it
    longest  tokens that the model has positions for; None where a decoder's config does not say
    """

    def __init__(self, path, cfg):
        directory = resolve(path)
        file = directory / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file}: no such file; expected a tokenizers file beside the weights")
        try:
            self.fast = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:      # the library raises bare Exception
            raise ValueError(f"{file}: not a tokenizer ({error})") from None
        self.fast.no_truncation()       # a saved file may hold either, and both are ours to do
        self.fast.no_padding()
        self.size = 1 + max(self.fast.get_vocab().values(), default=-1)
        if self.size > cfg.vocab_size:
            raise ValueError(f"{file}: {self.size} tokens, the model's embedding has {cfg.vocab_size}")
        self.longest = getattr(cfg, "max_position_embeddings", None)
        if cfg.model_type == "roberta":
            self.longest -= cfg.pad_token_id + 1
        as_list = lambda ids: [] if ids is None else ids if isinstance(ids, list) else [ids]
        generation = directory / "generation_config.json"
        listed = as_list(read_json(generation).get("eos_token_id")) if generation.exists() else []
        self.eos = list(dict.fromkeys(as_list(getattr(cfg, "eos_token_id", None)) + listed))
        if not self.eos:
            raise ValueError(f"{directory}: no eos_token_id in config.json or generation_config.json")
        whole, body = self.fast.encode("a").ids, self.encode("a")
        self.bos = whole[:whole.index(body[0])]

    def encode(self, text):
        """Ids of the text alone: no BOS, no EOS."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.fast.decode(ids)

    def continuation(self, prompt, ids, special=False):
        """
        Text of ids as they go on after a prompt's: a decoder may drop a space at the very start.
        special: names of special tokens, too.
        """
        last = prompt[-1:]
        before = self.fast.decode(last, skip_special_tokens=not special)
        return self.fast.decode([*last, *ids], skip_special_tokens=not special)[len(before):]

    def pair(self, text, other=None, longest=None):
        """Ids of a text or of two, with all special tokens; the longer one is cut to fit."""
        longest = min(length for length in (longest, self.longest) if length)
        ids = self.fast.encode(text, other).ids
        if len(ids) > longest:
            self.fast.enable_truncation(longest)
            ids = self.fast.encode(text, other).ids
            self.fast.no_truncation()
        return ids


# The Alpaca form. LLM-Adapters indents every line after the first by 16 spaces, and not alike in training and
# evaluation; both are left out, since a prompt that ends in spaces is not a token prefix of prompt + answer.
TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
PROMPT = TASK + ". " + REQUEST + "{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = (TASK + ", paired with an input that provides further context. " + REQUEST
                     + "{instruction}\n\n### Input:\n{input}\n\n### Response:\n")


def prompt_text(row):
    """The one template, for training and evaluation; a row's `prefix` opens the response."""
    if "instruction" not in row:
        return row["prompt"]
    return (PROMPT_WITH_INPUT if row.get("input") else PROMPT).format(**row) + row.get("prefix", "")


def shown(row):
    """What a model was given, before it was cut to fit, as the outputs on disk show it."""
    return "\n".join(filter(None, (row["text"], row["pair"]))) if "label" in row else prompt_text(row)


def fit(tokenizer, ids, start, longest, room=None):
    """
    (ids, start) in at most `longest` tokens, if there is a bound. A long prompt loses its beginning, not its
    BOS, so that answer and EOS stay whole where they can; with `room`, so that it is the same before any
    answer: as many new tokens fit behind it, or half of `longest`.
    """
    if not longest:
        return ids, start
    bos, room = len(tokenizer.bos), len(ids) - start if room is None else min(room, longest // 2)
    dropped = min(max(0, start + room - longest), start - bos)
    return (ids[:bos] + ids[bos + dropped:])[:longest], start - dropped


def prompt_ids(tokenizer, row, room=0):
    """Prompt and answer are tokenised apart, so the prompt's ids are the same with any answer or none."""
    ids = tokenizer.bos + tokenizer.encode(prompt_text(row))
    return fit(tokenizer, ids, len(ids), room and tokenizer.longest, room)[0]


def example(tokenizer, row, text=None, room=0):
    """
    (ids, start) of a row's prompt and output, closed by EOS; or of its prompt and another text, not closed;
    with `room` in the model's positions. (ids, label) of a row with a label.
    """
    if "label" in row:
        return tokenizer.pair(row["text"], row["pair"]), row["label"]
    prompt = prompt_ids(tokenizer, row)
    answer = tokenizer.encode(row["output"]) + tokenizer.eos[:1] if text is None else tokenizer.encode(text)
    return fit(tokenizer, prompt + answer, len(prompt), room and tokenizer.longest, room)


def encode(tokenizer, rows, max_len, train_on_prompt=False, room=None):
    """[(ids, start)], see fit, supervised from `start`, or [(ids, label)] of rows; how many were cut."""
    examples, cut = [], 0
    for row in rows:
        if "label" in row:
            ids = tokenizer.pair(row["text"], row["pair"], max_len)
            if len(ids) >= min(max_len, tokenizer.longest):     # else whole: most rows are encoded once
                cut += len(ids) < len(tokenizer.fast.encode(row["text"], row["pair"]).ids)
            examples.append((ids, row["label"]))
            continue
        ids, start = example(tokenizer, row)
        kept, start = fit(tokenizer, ids, start, max_len, room)
        cut += len(kept) < len(ids)
        examples.append((kept, 0 if train_on_prompt else start))
    return examples, cut
