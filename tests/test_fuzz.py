"""
Over 1,000 seeded mutations of what a person may edit or types, and of what lies on disk: each is refused in
one line (ValueError, OSError, exit 2), or changes nothing, or is another valid value of a field that is meant
to matter. No case hangs.
"""
import copy
import json
import random
import shutil
import signal
import struct

import pytest
import torch
from safetensors.torch import save_file
from test_model import SMALL

import checkpoint
import evaluate as E
import train
from data import arithmetic, text
from files import TABLES

SECONDS = 20        # one case takes some milliseconds
CASES = dict(config=220, encoder=100, header=160, record=180, tensors=180, index=60, generation=60,
             outputs=110, settings=50, flags=160, command=30)
JUNK = [None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 2**31, 10**30, 0.5, -0.0, 1e-30, 1e308, float("nan"),
        float("inf"), "x", "", "2", "llama", "\0", [], [1], [None], ["x"], [[[]]], {}, {"a": 1}, {"0": None}]
IDS = torch.arange(3, 20)


def model_directory(directory, tiny, kind):
    config = dict(SMALL, vocab_size=488, model_type=kind, eos_token_id=0, torch_dtype="bfloat16")
    if kind == "llama":
        config |= dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1e4,
                       hidden_act="silu", tie_word_embeddings=True, attention_bias=False,
                       rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                         high_freq_factor=4.0, original_max_position_embeddings=64))
    else:
        config |= dict(layer_norm_eps=1e-5, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
                       pad_token_id=1, max_position_embeddings=40, type_vocab_size=1, hidden_act="gelu",
                       id2label={"0": "no", "1": "yes"}, position_embedding_type="absolute")
    directory.mkdir()
    torch.manual_seed(0)
    model = checkpoint.build(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    tensors = {name: t.bfloat16() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    shutil.copy(tiny / "tokenizer.json", directory)
    return directory


def save_adapter(directory, base, name):
    torch.manual_seed(1)
    model, method = checkpoint.load(base), checkpoint.load_method(name)
    own = {flag: default for flag, (default, *_) in method.DEFAULTS.items()}
    method.inject(model, ("q_proj", "down_proj"), 4, None, 0.0, **own)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.3)
    if hasattr(method, "reinit"):
        method.reinit(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0))
    checkpoint.save_adapter(directory, model, dict(method=name, targets=["q_proj", "down_proj"], rank=4,
                                                   alpha=None, dropout=0.0, own=own, model=str(base)))


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny):
    """Directories of two models, one of them sharded, too, and of three adapters."""
    root = tmp_path_factory.mktemp("fuzz")
    base = model_directory(root / "llama", tiny, "llama")
    model_directory(root / "roberta", tiny, "roberta")
    shutil.copytree(base, root / "sharded")
    tensors = checkpoint.load(base, torch.bfloat16).state_dict()
    tensors.pop("lm_head.weight")
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    (root / "sharded" / "model.safetensors").unlink()
    for i, part in enumerate(parts):
        save_file({name: t.clone() for name, t in part.items()}, root / "sharded" / f"model-{i}.safetensors")
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={
        name: f"model-{i}.safetensors" for i, part in enumerate(parts) for name in part})))
    for name in ("lora", "gralora", "cps_lora"):
        save_adapter(root / name, base, name)
    return root


@pytest.fixture(autouse=True)
def no_hang():
    def late(*_):
        raise AssertionError(f"a case took over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@torch.no_grad()
def logits(directory, adapter=None):
    model = checkpoint.load(directory)
    if adapter:
        checkpoint.load_adapter(model, adapter)
    return model(IDS[None])


def outcome(case):
    """What case() returns; None where it is refused, in one line. Anything else goes through."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return case()
    except (ValueError, OSError) as error:
        assert "\n" not in str(error).rstrip() and str(error), repr(error)
    except SystemExit as stop:
        assert stop.code == 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def spoil(rng, obj):
    """A copy of a JSON object with one field, here or in an object inside, of another value, away, or new."""
    obj = copy.deepcopy(obj)
    at, inside = obj, [value for value in obj.values() if isinstance(value, dict) and value]
    if inside and rng.random() < 0.3:
        at = rng.choice(inside)
    key, what = rng.choice(list(at)), rng.random()
    if what < 0.1:
        del at[key]
    elif what < 0.15:
        at[key + "_"] = at.pop(key)
    elif what < 0.3 and type(at[key]) in (int, float):
        x = at[key]
        at[key] = rng.choice([x + 1, -x, x * 2, float(x) / 3, str(x), [x]])
    else:
        at[key] = rng.choice(JUNK)
    return obj


def spoil_text(rng, words):
    """A JSON text with a character too few or another one, cut off, or of another kind."""
    i, what = rng.randrange(len(words)), rng.random()
    if what < 0.4:
        return words[:i] + words[i + 1:]
    if what < 0.8:
        return words[:i] + rng.choice('0123456789{}[]",:.-eE \\') + words[i + 1:]
    return words[:i] if what < 0.9 else rng.choice(["", "[]", "null", "7", '"x"', "{}", "NaN", "\ufeff{}"])


def mutants(seed, count, file, every=False):
    """
    Writes count mutations of a JSON file, and the worst values in every field, and yields each text; puts the
    file back.
    """
    whole = file.read_text()
    for field in json.loads(whole) if every else ():
        for value in (None, 0, 10**6, 10**30, 0.5, "x", [], {}):
            words = json.dumps(json.loads(whole) | {field: value})
            file.write_text(words)
            yield words
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        words = (json.dumps(spoil(rng, json.loads(whole))) if rng.random() < 0.7 else spoil_text(rng, whole))
        file.write_text(words)
        yield words
    file.write_text(whole)


def differing(a, b):
    return {key for key in a.keys() | b.keys() if json.dumps(a.get(key)) != json.dumps(b.get(key))}


# ------------------------------------------------------------------------------------ a model

@pytest.mark.parametrize("kind, family, matter", [
    ("config", "llama", {"rms_norm_eps", "rope_theta", "rope_scaling"}),
    ("encoder", "roberta", {"layer_norm_eps", "pad_token_id", "num_attention_heads"})])
def test_a_config_is_refused_or_loads_the_same_model(kind, family, matter, world):
    directory = world / family
    want, file, loaded = logits(directory), directory / "config.json", 0
    before = json.loads(file.read_text())
    cases = 0
    for words in mutants(kind, CASES[kind], file, every=True):
        found = outcome(lambda: logits(directory))
        cases, loaded = cases + 1, loaded + (found is not None)
        if found is not None and not torch.equal(found, want):
            fields = differing(before, json.loads(words)) & TABLES["config.json"].keys()    # none misspelt
            assert fields <= matter and found.isfinite().all(), words
    assert cases >= CASES[kind] + 8 * len(before) and 10 < loaded < cases / 2


def spoil_header(rng, raw, sealed=False):
    """A safetensors file with another header or, where a seal shows them, other bytes after it."""
    size, = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8:8 + size]), raw[8 + size:]
    names = [name for name in header if name != "__metadata__"]
    a, b = rng.sample(names, 2)
    what = rng.randrange(9)
    if what == 0:
        kinds = {"BF16": ["I16", "U16"], "F32": ["I32", "U32"], "I64": ["F64", "U64"]}
        header[a]["dtype"] = rng.choice(kinds[header[a]["dtype"]] + ["x", "BOOL", "F8_E4M3"])
    elif what == 1:
        header[a]["shape"] = rng.choice([header[a]["shape"][::-1] + [1], [], [-1], [10**9], "x", [2**62, 4]])
    elif what == 2:
        header[a]["data_offsets"] = rng.choice([header[b]["data_offsets"], [0, 0], [5, 1], [0, 10**12], None])
    elif what == 3:
        header[a + rng.choice(["_", ".x", "\u00e9"])] = header.pop(a)
    elif what == 4:
        del header[a]
    elif what == 5:
        header["__metadata__"] = rng.choice([{}, None, {"format": 1}, {"format": "tf", "record": "[]"}, 7])
    elif what == 6:
        data = data[:rng.randrange(len(data))]
    elif what == 7 and sealed:
        i = rng.randrange(len(data))
        data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]
    elif what == 8 and sealed:
        alike = [(x, y) for x in names for y in names if x < y and header[x]["shape"] == header[y]["shape"]]
        x, y = rng.choice(alike)
        header[x], header[y] = header[y], header[x]
    else:
        return raw[:8] + bytes(rng.randrange(256) for _ in range(16)) + raw[24:]
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


@pytest.mark.parametrize("kind, name", [("header", None), ("tensors", "lora"), ("tensors", "gralora"),
                                        ("tensors", "cps_lora")])
def test_a_header_is_refused_or_loads_the_same_tensors(kind, name, world):
    base, adapter = world / "llama", name and world / name
    file = adapter / "adapter.safetensors" if name else base / "model.safetensors"
    want, raw, loaded = logits(base, adapter), file.read_bytes(), 0
    for i in range(CASES[kind] // (3 if name else 1)):
        file.write_bytes(spoil_header(random.Random(f"{kind} {name} {i}"), raw, sealed=bool(name)))
        found = outcome(lambda: logits(base, adapter))
        loaded += found is not None
        assert found is None or torch.equal(found, want), i
    file.write_bytes(raw)
    assert torch.equal(logits(base, adapter), want) and loaded < (3 if name else 40)


def test_f16_for_bf16_is_what_no_header_of_a_base_shows(world):
    """Stated in read_tensors; an adapter's seal shows it."""
    file = world / "llama" / "model.safetensors"
    want, raw = logits(world / "llama"), file.read_bytes()
    file.write_bytes(raw.replace(b'"BF16"', b'"F16" ', 1))
    assert not torch.equal(logits(world / "llama"), want)
    file.write_bytes(raw)


def test_an_index_is_refused_or_loads_the_same_tensors(world):
    directory = world / "sharded"
    want = logits(directory)
    for words in mutants("index", CASES["index"], directory / "model.safetensors.index.json"):
        found = outcome(lambda: logits(directory))
        assert found is None or torch.equal(found, want), words


def test_a_generation_config_is_refused_or_names_ids(world):
    cfg, file = checkpoint.load(world / "llama").cfg, world / "llama" / "generation_config.json"
    for words in mutants("generation", CASES["generation"], file):
        found = outcome(lambda: text.Tokenizer(world / "llama", cfg).eos)
        assert found is None or found[0] == 0 and all(type(i) is int and i >= 0 for i in found), words


# ------------------------------------------------------------------------------------ an adapter

@pytest.mark.parametrize("name", ["lora", "gralora", "cps_lora"])
def test_a_record_is_refused_or_loads_the_same_adapter(name, world):
    base, adapter = world / "llama", world / name
    want = logits(base, adapter)
    for words in mutants(name, CASES["record"] // 3, adapter / "adapter.json"):
        found = outcome(lambda: logits(base, adapter))
        assert found is None or torch.equal(found, want), words


# ------------------------------------------------------------------------------------ an evaluation on disk

def test_outputs_are_refused_or_score_the_same(world, tmp_path):
    rows, file = arithmetic.generate("test", 6, 1, 0), tmp_path / "easy.jsonl"
    lines = [dict(row=i, prompt=text.shown(row), output=row["output"], extracted=row["answer"],
                  answer=row["answer"], correct=True) for i, row in enumerate(rows)]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    for i in range(CASES["outputs"]):
        rng = random.Random(f"outputs {i}")
        at = rng.randrange(6)
        line = json.dumps(lines[at])
        words = json.dumps(spoil(rng, lines[at])) if rng.random() < 0.7 else spoil_text(rng, line)
        file.write_text(whole.replace(line, words))
        found = outcome(lambda: E.evaluate(None, None, arithmetic, rows, file))
        if found is not None and found["accuracy"] < 1:
            assert json.loads(words)["output"] != lines[at]["output"], words


def test_settings_on_disk_are_refused_or_the_same(tmp_path):
    args, _ = E.parse(["--task", "two_step", "--limit", "3"])
    file = tmp_path / "args.json"
    file.write_text(json.dumps(vars(args)))
    for words in mutants("settings", CASES["settings"], file):
        if outcome(lambda: E.check_out(tmp_path, vars(args), False) or True):
            held = json.loads(words)
            assert {key: held.get(key) for key in vars(args)} == vars(args), words


# ------------------------------------------------------------------------------------ the command line

TYPED = ["nan", "inf", "-inf", "-1", "0", "1", "2.5", "1e308", "1e-320", "1e20", "", "x", "9" * 30, "0x10",
         "1_0", "\u0663", "\0", "-", "none", "a\nb", "true", "[1]"]


def test_a_command_line_is_refused_or_holds_numbers_that_fit(capsys):
    programs = [(E.parse, [])] + [(train.parse, ["--method", name]) for name in ("lora", "gfa", "glora")]
    for i in range(CASES["flags"]):
        rng = random.Random(f"flags {i}")
        parse, first = rng.choice(programs)
        names = [name for name in vars(parse(first)[0]) if name not in ("preset", "method")]
        typed = [f"--{rng.choice(names)}={rng.choice(TYPED)}" for _ in range(rng.choice([1, 1, 2]))]
        found = outcome(lambda parse=parse, flags=[*first, *typed]: parse(flags)[0])
        for name, value in vars(found).items() if found else ():
            assert type(value) is not int or abs(value) < 2**63, (typed, name)
            assert type(value) is not float or abs(value) <= 1e30, (typed, name)
        if found and parse is E.parse:
            assert found.temperature == 0 or 1e-4 <= found.temperature <= 1e4


def test_a_command_is_refused_in_one_line_or_evaluates(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(arithmetic, "MAX_NEW_TOKENS", 4)
    devices = ["meta", "xla", "hpu", "cuda:99", "cpu:-1", "privateuseone", "a b", ""]
    for i in range(CASES["command"]):
        rng = random.Random(f"command {i}")
        flag = rng.choice("device model adapter task data limit temperature top_p seed n".split())
        value = rng.choice(devices if flag == "device" else [*TYPED, "a/b", "/dev/null", "."])
        flags = ["--model", str(world / "llama"), "--task", "two_step", "--limit", "1", f"--{flag}={value}"]
        outcome(lambda flags=flags: E.main(flags))
        printed = capsys.readouterr()
        assert printed.err.count("\n") <= 1 and (printed.err.startswith("evaluate.py: error: ")
                                                 or "two_step" in printed.out), flags


def test_there_are_a_thousand_cases():
    assert sum(CASES.values()) >= 1000
