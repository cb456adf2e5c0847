"""
Files: JSON that a person may edit, by one table a kind of file (field -> type, range) that read_json checks;
the digest by which content is known again; directories and JSON that at every moment are the old or the new.
"""
import ctypes
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2     # Linux's own numbers

# A rule: what is expected, in words; whether a value is that. null stands for a field that is not there.


def number(least, most, kinds=(int, float)):        # not isinstance: JSON's true is no 1
    return f"a number from {least:g} to {most:g}", lambda v: type(v) in kinds and least <= v <= most


def whole(least=0, most=2**31 - 1):
    words, holds = number(least, most, (int,))
    return words.replace("a number", "a whole number"), holds


def several(rule, least=0):
    return (f"a list of {least} or more, each {rule[0]}",
            lambda v: isinstance(v, list) and len(v) >= least and all(map(rule[1], v)))


def named(rule):
    return f"fields, each {rule[0]}", lambda v: isinstance(v, dict) and all(map(rule[1], v.values()))


def either(*rules):
    return " or ".join(words for words, _ in rules), lambda v: any(holds(v) for _, holds in rules)


TEXT = "a text", lambda v: isinstance(v, str)
SWITCH = "true or false", lambda v: isinstance(v, bool)
OBJECT = "an object", lambda v: isinstance(v, dict)
SIZE, HEADS = whole(1, 2**24), whole(1, 2**12)      # any product of three has room in 64 bits
RATE, IDS = number(0, 1), either(whole(), several(whole()))

ROPE = dict(rope_type=TEXT, type=TEXT, rope_theta=number(1, 1e15), factor=number(1, 1e6),
            low_freq_factor=number(1e-6, 1e6), high_freq_factor=number(1e-6, 1e6),
            original_max_position_embeddings=whole(1))
TABLES = {
    "config.json": dict(
        model_type=TEXT, hidden_act=TEXT, vocab_size=SIZE, hidden_size=SIZE, intermediate_size=SIZE,
        num_hidden_layers=whole(1), num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEADS,
        max_position_embeddings=SIZE, type_vocab_size=SIZE, pad_token_id=whole(-1), eos_token_id=IDS,
        rms_norm_eps=RATE, layer_norm_eps=RATE, hidden_dropout_prob=RATE, attention_probs_dropout_prob=RATE,
        initializer_range=number(0, 1e3), attention_bias=SWITCH, mlp_bias=SWITCH, tie_word_embeddings=SWITCH,
        use_sliding_window=SWITCH, layer_types=several(TEXT), position_embedding_type=TEXT,
        id2label=named(TEXT), rope_theta=ROPE["rope_theta"], rope_scaling=ROPE, rope_parameters=ROPE),
    "generation_config.json": dict(eos_token_id=IDS),
    "model.safetensors.index.json": dict(weight_map=named(TEXT)),
    "adapter.json": dict(
        method=TEXT, targets=several(TEXT, 1), rank=whole(1), alpha=number(-1e30, 1e30), dropout=RATE,
        template=SWITCH, own=named(either(TEXT, SWITCH, number(-1e30, 1e30))), model=TEXT, step=whole()),
    "outputs": dict(row=whole(), prompt=TEXT, output=either(TEXT, whole())),
}
NEEDED = {"adapter.json": ("method", "targets", "rank"), "outputs": ("row", "prompt", "output")}


def check(obj, kind, where):
    """obj as it is; ValueError names where it stands, the field, and what a file of this kind has there."""
    if not isinstance(obj, dict):
        raise ValueError(f"{where}: found a {type(obj).__name__}, expected an object")
    if absent := [field for field in NEEDED.get(kind, ()) if obj.get(field) is None]:
        raise ValueError(f"{where}: no {absent[0]!r}")
    checks = [(field, obj.get(field), rule) for field, rule in TABLES.get(kind, {}).items()]
    for field, value, rule in checks:
        words, holds = OBJECT if isinstance(rule, dict) else rule
        if value is not None and not holds(value):
            raise ValueError(f"{where}: {field} {repr(value)[:60]}, expected {words}")
        if value is not None and isinstance(rule, dict):
            checks += [(f"{field}.{inner}", value.get(inner), of) for inner, of in rule.items()]
    return obj


def read_json(file):
    """The object in a JSON file, checked by the table of files of its name; ValueError names the file."""
    def constant(word):
        raise ValueError(f"{word} is no number of JSON")

    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"), parse_constant=constant)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    return check(found, Path(file).name, file)


def digest(*parts, most=2**20):
    """
    SHA-256, in hex, of files (Paths: name, size, first and last `most` bytes) and of other objects, as JSON
    has them. OSError where a file is not there.
    """
    found = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Path):
            found.update(json.dumps(part, sort_keys=True).encode() + b"\0")
            continue
        with open(part, "rb") as f:
            size = f.seek(0, 2)
            found.update(f"{part.name} {size}\0".encode())
            for start in dict.fromkeys((0, max(0, size - most))):
                f.seek(start)
                while (left := start + most - f.tell()) > 0 and (chunk := f.read(min(left, 2**20))):
                    found.update(chunk)
    return found.hexdigest()


# -------------------------------------------------------------------------------- writing

def beside(path, kind="part"):
    """A hidden name next to `path`, of this process; runs.clear knows it."""
    return Path(path).with_name(f".{Path(path).name}.{kind}-{os.getpid()}")


def sync(path):
    """What was written to a file, or the names in a directory, are on the disk; Windows opens none."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def put(part, path):
    """The directory `part` takes the place of `path`, and that of `part`: in one step where there is one."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if not path.exists():
        part.rename(path)
    elif not swap or swap(AT_FDCWD, os.fsencode(part), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE):
        path.rename(old := beside(path, "old"))     # stopped here, runs.clear renames it back
        part.rename(path)
        old.rename(part)
    sync(path.parent)


@contextmanager
def new_directory(path):
    """Yields a directory to fill, which replaces `path` at the end; an exception leaves `path` as it was."""
    path, part = Path(path), beside(path)
    shutil.rmtree(part, ignore_errors=True)         # of a dead process that had this one's number
    part.mkdir(parents=True)
    try:
        yield part
        for file in (*part.rglob("*"), part):
            sync(file)
        put(part, path)
    finally:
        if not path.exists() and beside(path, "old").exists():
            beside(path, "old").rename(path)
        shutil.rmtree(part, ignore_errors=True)


def write_json(file, obj):
    """The file is the old or the new one, whole, at every moment."""
    part = beside(file)
    try:
        part.write_text(json.dumps(obj, indent=2) + "\n", encoding="utf-8")
        sync(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
