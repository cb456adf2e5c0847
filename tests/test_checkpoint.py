"""checkpoint.py: an adapter and a merged model come back as they went, whole or not at all."""
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import SMALL, old_dialect, saved

import checkpoint
import model as M

tf = pytest.importorskip("transformers")
RECORD = dict(method="lora", targets=["q_proj"], rank=2, alpha=3.0, dropout=0.0, own={})


def assert_rounding_only(y, z):
    """y and z are one fp32 model's outputs, computed twice: they differ by some eps of the largest."""
    atol = 64 * torch.finfo(torch.float32).eps * z.abs().max().item()
    torch.testing.assert_close(y, z, rtol=0, atol=atol)


@pytest.fixture
def adapter(tiny, tmp_path):
    model = checkpoint.load(tiny)
    lora = checkpoint.load_method("lora")
    lora.inject(model, ("q_proj",), 2, 3.0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.3)    # 1 would make attention so sharp that it enlarges rounding
    checkpoint.save_adapter(tmp_path / "a", model, RECORD)
    return model, tmp_path / "a"


def test_an_adapter_comes_back_with_its_settings(adapter, tiny):
    model, directory = adapter
    other = checkpoint.load(tiny)
    method, record = checkpoint.load_adapter(other, directory)
    assert record == RECORD and other.model.layers[0].self_attn.q_proj.scaling == 1.5
    assert set(load_file(directory / "adapter.safetensors")) == {
        f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in range(4) for x in "AB"}
    found = other.state_dict()
    assert all(torch.equal(found[name], t) for name, t in checkpoint.adapter_tensors(model).items())
    ids = torch.randint(400, (1, 9))
    assert_rounding_only(other(ids), model(ids))


def test_buffers_of_the_adapter_are_saved_and_others_are_not(tiny, tmp_path):
    model = checkpoint.load(tiny).requires_grad_(False)
    model.register_buffer("lora_index", torch.arange(3))
    model.register_buffer("table", torch.arange(3))
    assert list(checkpoint.adapter_tensors(model)) == ["lora_index"]


def changed(tiny, name, dtype):
    """A model with an update, over a re-initialisation where the method has one; and the method."""
    torch.manual_seed(0)
    model, method = checkpoint.load(tiny, dtype), checkpoint.load_method(name)
    method.inject(model, ("q_proj", "up_proj"), 4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0)
    for _ in range(2 if hasattr(method, "reinit") else 1):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.01 * torch.randn_like(p))
        model.losses(EXAMPLES).sum().backward()
        if hasattr(method, "observe"):
            method.observe(model, 1, 2)
        if hasattr(method, "reinit"):
            method.reinit(model, optimizer)
    return model, method


EXAMPLES = [([5, 6, 7, 8], 1), ([9, 10, 11], 0)]


@pytest.mark.parametrize("name", ["lora", "gfa", "glora", "cps_lora", "rosa", "full"])
def test_a_merge_says_what_rounding_took_of_the_update_against_the_pretrained_weights(name, tiny, capsys):
    model, method = changed(tiny, name, torch.float32)
    pretrained = checkpoint.load(tiny, torch.float32).state_dict()
    wide = checkpoint.merge(method, model, tiny, torch.float32, EXAMPLES)
    exact = {key: t.double() for key, t in model.state_dict().items()}
    rounded, method = changed(tiny, name, torch.float32)
    narrow = checkpoint.merge(method, rounded, tiny, torch.bfloat16, EXAMPLES)
    assert {type(m) for m in rounded.modules()} == {type(m) for m in checkpoint.load(tiny).modules()}
    assert not hasattr(rounded, "adapter") and {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    took = update = 0
    for module, share in narrow["lost_by_module"].items():
        E, W, got = (d[f"{module}.weight"].double() for d in (exact, pretrained, rounded.state_dict()))
        torch.testing.assert_close(got, E, rtol=2**-8, atol=0)                  # rounded once
        assert share == pytest.approx(((got - E).norm() / (E - W).norm()).item(), rel=1e-3)
        took, update = took + (got - E).norm() ** 2, update + (E - W).norm() ** 2
    assert narrow["lost"] == pytest.approx((took / update).sqrt().item(), rel=1e-3) and narrow["lost"] > 0.001
    assert wide["lost"] == 0 and wide["log_probability"] < 1e-3 < narrow["log_probability"]
    assert f"merged in bfloat16: rounding took {narrow['lost']:.2%} of the update" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lora", "gfa", "glora"])
def test_adapters_of_a_transformers_model_are_saved_and_loaded_by_the_same_functions(name, tmp_path):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SMALL)
    model, ids = tf.LlamaForCausalLM(config).double().eval(), torch.randint(SMALL["vocab_size"], (2, 7))
    fresh = tf.LlamaForCausalLM(config).double().eval()
    fresh.load_state_dict(model.state_dict())
    checkpoint.load_method(name).inject(model, ("q_proj", "down_proj"), 4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    checkpoint.save_adapter(tmp_path / "a", model, dict(method=name, targets=["q_proj", "down_proj"], rank=4))
    checkpoint.load_adapter(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(ids).logits, model(ids).logits)


def test_a_classifier_head_travels_with_the_adapter(tmp_path):
    saved(tmp_path / "base", tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL, max_position_embeddings=40)))
    model, lora = checkpoint.load(tmp_path / "base", num_labels=3), checkpoint.load_method("lora")
    lora.inject(model, M.targets_of(model, "attention"), 2)
    model.classifier.requires_grad_(True)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    record = dict(RECORD, targets=M.targets_of(model, "attention"), alpha=None)
    checkpoint.save_adapter(tmp_path / "a", model, record)
    other, ids = checkpoint.load(tmp_path / "base", num_labels=3), torch.randint(3, 97, (2, 9))
    checkpoint.load_adapter(other, tmp_path / "a")
    found = other.state_dict()
    assert all(torch.equal(found[name], t) for name, t in checkpoint.adapter_tensors(model).items())
    assert_rounding_only(other(ids), model(ids))
    # merged, it is a sequence classifier for transformers, with three labels
    lora.merge(model)
    checkpoint.save_merged(tmp_path / "merged", model, tmp_path / "base")
    theirs = tf.RobertaForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        logits = theirs(ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", ["new", "old"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_directory_is_loaded_by_transformers(tied, dialect, tmp_path, tiny):
    hf = tf.Qwen2ForCausalLM(tf.Qwen2Config(
        **SMALL, num_key_value_heads=2, tie_word_embeddings=tied, dtype="bfloat16"))
    saved(tmp_path / "base", hf)
    if dialect == "old":
        old_dialect(tmp_path / "base")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        config["torch_dtype"] = config.pop("dtype", "bfloat16")
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "tokenizer.json", tmp_path / "base")
    model, lora = checkpoint.load(tmp_path / "base"), checkpoint.load_method("lora")
    lora.inject(model, ("q_proj", "down_proj"), 2)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    ids = torch.randint(97, (2, 9))
    want = model(ids)
    lora.merge(model)
    checkpoint.save_merged(tmp_path / "m", model, tmp_path / "base")
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert theirs.dtype == torch.float32        # not the bf16 of the base's config
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(checkpoint.load(tmp_path / "m")(ids), model(ids))
    base, merged = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("base", "m"))
    key = "torch_dtype" if dialect == "old" else "dtype"
    assert merged == dict(base, **{key: "float32"})
    tokenizers = [(tmp_path / d / "tokenizer.json").read_bytes() for d in ("base", "m")]
    assert tokenizers[0] == tokenizers[1]
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (not tied)


def test_large_models_are_written_in_shards(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 500_000)
    model = checkpoint.load(tiny)
    checkpoint.save_merged(tmp_path / "m", model, tiny)
    files = sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    other, ids = checkpoint.load(tmp_path / "m"), torch.randint(400, (1, 9))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
    assert_rounding_only(other(ids), model(ids))
    with torch.no_grad():
        theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)


def test_a_directory_appears_whole_or_stays_as_it_was(tmp_path):
    with checkpoint.new_directory(tmp_path / "a") as part:
        (part / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError):
        with checkpoint.new_directory(tmp_path / "a") as part:
            (part / "x").write_text("2")
            raise RuntimeError
    assert (tmp_path / "a" / "x").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["a"]
    with checkpoint.new_directory(tmp_path / "a") as part:
        (part / "y").write_text("3")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_empty_adapter_is_not_written(tiny, tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        checkpoint.save_adapter(tmp_path / "a", checkpoint.load(tiny).requires_grad_(False), RECORD)
    assert not (tmp_path / "a").exists()


TENSORS = "adapter.safetensors"


def edit(directory, change, **other):
    """Other tensors, under a seal that is theirs: a whole adapter, of something else."""
    file = directory / TENSORS
    with safe_open(file, "pt") as f:
        facts = {key: value for key, value in f.metadata().items() if key != "sha256"} | other
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=facts | {"sha256": checkpoint.seal(facts, tensors)})


def rewrite(directory, **changes):
    """Another record, in both places."""
    record = dict(RECORD, **changes)
    (directory / "adapter.json").write_text(json.dumps(record))
    edit(directory, lambda tensors: None, record=json.dumps(record, sort_keys=True))


def flip(directory):
    raw = bytearray((directory / TENSORS).read_bytes())
    raw[-1] ^= 1
    (directory / TENSORS).write_bytes(raw)


KEY = "model.layers.1.self_attn.q_proj.lora_A"
BAD = {
    "no directory": (lambda d: shutil.rmtree(d), r"adapter\.json: No such file"),
    "no tensors": (lambda d: (d / "adapter.safetensors").unlink(),
                   r"adapter\.safetensors: not a whole"),
    "truncated": (lambda d: (d / "adapter.safetensors").write_bytes(b"12345678"),
                  r"adapter\.safetensors: not a whole"),
    "no method": (lambda d: (d / "adapter.json").write_text("{}"),
                  r"adapter\.json: no 'method'"),
    "unknown method": (lambda d: (d / "adapter.json").write_text(json.dumps(dict(RECORD, method="x"))),
                       r"method 'x'"),
    "a tensor too few": (lambda d: edit(d, lambda t: t.pop(KEY)), rf"tensor {KEY} is missing"),
    "a tensor too many": (lambda d: edit(d, lambda t: t.update({"lora_z": torch.ones(2)})),
                          r"tensor lora_z is not part of"),
    "a NaN": (lambda d: edit(d, lambda t: t[KEY][0].fill_(float("nan"))), rf"tensor {KEY} is not finite"),
    "bf16": (lambda d: edit(d, lambda t: t.update({KEY: t[KEY].bfloat16()})),
             rf"tensor {KEY} is torch.bfloat16, expected float32 or float64"),
    "integers": (lambda d: edit(d, lambda t: t.update({KEY: t[KEY].long()})),
                 rf"tensor {KEY} has shape \(2, 128\) of torch.int64, the model expects \(2, 128\)"),
    "another number": (lambda d: flip(d), r"its header and tensors are not those that were saved"),
    "no seal": (lambda d: save_file(load_file(d / TENSORS), d / TENSORS),
                r"its header does not say what it holds: train again"),
    "another rank": (lambda d: (d / "adapter.json").write_text(json.dumps(dict(RECORD, rank=1))),
                     r"adapter\.json: rank 1, saved was 2"),
    "another scale": (lambda d: edit(d, lambda t: None, scaling="[2.0]"),
                      r"was trained at the scale \[2\.0\], which is \[1\.5\] here"),
    "a flag of no method": (lambda d: rewrite(d, own={"k": 2}), r"adapter\.json: lora takes no k 2"),
    "a rank of a text": (lambda d: rewrite(d, rank="2"), r"rank '2', expected a whole number from 1"),
    "a rank too large": (lambda d: rewrite(d, rank=129), r"rank 129 for .*, expected 1 to "),
    "another shape": (lambda d: edit(d, lambda t: t.update({KEY: torch.ones(2, 3)})),
                      rf"tensor {KEY} has shape \(2, 3\), the model expects \(2, 128\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_one_clear_error(name, adapter, tiny):
    _, directory = adapter
    spoil, message = BAD[name]
    spoil(directory)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_adapter(checkpoint.load(tiny), directory)
    assert "\n" not in str(error.value)


def test_an_adapter_runs_no_code_but_the_projects_own_or_what_the_caller_names(adapter, tiny, tmp_path):
    _, directory = adapter
    evil, ran = tmp_path / "evil.py", tmp_path / "ran"
    lora = checkpoint.method_files()["lora"].read_text(encoding="utf-8")
    evil.write_text(lora + f"\nopen({str(ran)!r}, 'w')\n", encoding="utf-8")
    rewrite(directory, method=str(evil))
    with pytest.raises(ValueError, match=r"evil\.py' is none of .*lora.*: --method FILE\?"):
        checkpoint.load_adapter(checkpoint.load(tiny), directory)
    with pytest.raises(ValueError, match=r"method '.*evil\.py', not gfa"):
        checkpoint.load_adapter(checkpoint.load(tiny), directory, "gfa")
    assert not ran.exists()
    method, _ = checkpoint.load_adapter(checkpoint.load(tiny), directory, evil)
    assert ran.exists() and method.__file__ == str(evil)


def test_an_index_that_leads_elsewhere_or_to_a_tensor_twice_is_refused(tmp_path):
    saved(tmp_path / "m", tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, num_key_value_heads=2)))
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="shard named in .*index.json, not found beside it"):
        checkpoint.load(tmp_path / "m")
    for name in "yz":
        shutil.copy(tmp_path / "x.safetensors", tmp_path / "m" / f"{name}.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "y.safetensors", "b": "z.safetensors"}}))
    with pytest.raises(ValueError, match="z.safetensors: tensor .* is in y.safetensors, too"):
        checkpoint.load(tmp_path / "m")


def test_what_belongs_to_a_tokenizer_is_copied_but_for_a_chat_template(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "base")
    for name, words in {"tokenizer_config.json": '{"chat_template": "x", "eos_token": "y"}',
                        "vocab.json": "{}", "chat_template.jinja": "x",
                        "generation_config.json": '{"eos_token_id": 0}'}.items():
        (tmp_path / "base" / name).write_text(words)
    checkpoint.save_merged(tmp_path / "m", checkpoint.load(tmp_path / "base"), tmp_path / "base")
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json",
        "generation_config.json"}
    assert json.loads((tmp_path / "m" / "tokenizer_config.json").read_text()) == {"eos_token": "y"}


def test_labels_are_those_of_the_task_and_in_its_order(tmp_path):
    labels = ("entailment", "neutral", "contradiction")
    config = tf.RobertaConfig(**SMALL, max_position_embeddings=40, num_labels=3)
    saved(tmp_path / "base", tf.RobertaForSequenceClassification(config))
    model = checkpoint.load(tmp_path / "base", num_labels=labels)
    checkpoint.save_merged(tmp_path / "m", model, tmp_path / "base")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert [written["id2label"][str(i)] for i in range(3)] == [*labels]
    assert written["label2id"] == {label: i for i, label in enumerate(labels)}
    assert checkpoint.load(tmp_path / "m", num_labels=labels).cfg.num_labels == 3
    assert checkpoint.load(tmp_path / "m", num_labels=("yes", "no", "perhaps")).cfg.num_labels == 3
    written["id2label"] = {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="config.json: id2label is contradiction, neutral, entailment, the"):
        checkpoint.load(tmp_path / "m", num_labels=labels)
    written["id2label"].pop("1")
    (tmp_path / "m" / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="config.json: id2label has no 1, but 0, 2"):
        checkpoint.load(tmp_path / "m", num_labels=labels)


@pytest.mark.parametrize("place", ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj",
                                   "model.norm"])
def test_the_first_output_that_is_not_finite_is_found_and_nothing_stays_behind(place, tiny):
    model = checkpoint.load(tiny)
    assert M.first_non_finite(model, EXAMPLES) is None
    checkpoint.load_method("lora").inject(model, ("q_proj",), 2)
    with torch.no_grad():
        layer = model.get_submodule(place)
        getattr(layer, "lora_B", getattr(layer, "weight", None)).fill_(float("inf"))
    for block in model.blocks():
        block.compile(backend="eager")
    assert M.first_non_finite(model, EXAMPLES) == place
    assert not any(m._forward_hooks for m in model.modules())
