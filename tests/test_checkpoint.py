"""checkpoint.py: an adapter and a merged model come back as they went, whole or not at all."""
import json
import shutil

import pytest
import torch
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
    model = M.load(tiny)
    lora = checkpoint.load_method("lora")
    lora.inject(model, ("q_proj",), 2, 3.0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.3)    # 1 would make attention so sharp that it enlarges rounding
    checkpoint.save_adapter(tmp_path / "a", model, RECORD)
    return model, tmp_path / "a"


def test_an_adapter_comes_back_with_its_settings(adapter, tiny):
    model, directory = adapter
    other = M.load(tiny)
    method, record = checkpoint.load_adapter(other, directory)
    assert record == RECORD and other.model.layers[0].self_attn.q_proj.scaling == 1.5
    assert set(load_file(directory / "adapter_model.safetensors")) == {
        f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in range(4) for x in "AB"}
    found = other.state_dict()
    assert all(torch.equal(found[name], t) for name, t in checkpoint.adapter_tensors(model).items())
    ids = torch.randint(400, (1, 9))
    assert_rounding_only(other(ids), model(ids))


def test_buffers_of_the_adapter_are_saved_and_others_are_not(tiny, tmp_path):
    model = M.load(tiny).requires_grad_(False)
    model.register_buffer("lora_index", torch.arange(3))
    model.register_buffer("table", torch.arange(3))
    assert list(checkpoint.adapter_tensors(model)) == ["lora_index"]


def test_a_classifier_head_travels_with_the_adapter(tmp_path):
    saved(tmp_path / "base", tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL, max_position_embeddings=40)))
    model, lora = M.load(tmp_path / "base", num_labels=3), checkpoint.load_method("lora")
    lora.inject(model, M.targets_of(model, "attention"), 2)
    model.classifier.requires_grad_(True)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    record = dict(RECORD, targets=M.targets_of(model, "attention"), alpha=None)
    checkpoint.save_adapter(tmp_path / "a", model, record)
    other, ids = M.load(tmp_path / "base", num_labels=3), torch.randint(3, 97, (2, 9))
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
    model, lora = M.load(tmp_path / "base"), checkpoint.load_method("lora")
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
    torch.testing.assert_close(M.load(tmp_path / "m")(ids), model(ids))
    base, merged = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("base", "m"))
    key = "torch_dtype" if dialect == "old" else "dtype"
    assert merged == dict(base, **{key: "float32"})
    tokenizers = [(tmp_path / d / "tokenizer.json").read_bytes() for d in ("base", "m")]
    assert tokenizers[0] == tokenizers[1]
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (not tied)


def test_large_models_are_written_in_shards(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 500_000)
    model = M.load(tiny)
    checkpoint.save_merged(tmp_path / "m", model, tiny)
    files = sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    other, ids = M.load(tmp_path / "m"), torch.randint(400, (1, 9))
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
        checkpoint.save_adapter(tmp_path / "a", M.load(tiny).requires_grad_(False), RECORD)
    assert not (tmp_path / "a").exists()


def edit(directory, change):
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


KEY = "model.layers.1.self_attn.q_proj.lora_A"
BAD = {
    "no directory": (lambda d: shutil.rmtree(d), r"adapter_config\.json: No such file"),
    "no tensors": (lambda d: (d / "adapter_model.safetensors").unlink(),
                   r"adapter_model\.safetensors: not a whole"),
    "truncated": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"12345678"),
                  r"adapter_model\.safetensors: not a whole"),
    "no method": (lambda d: (d / "adapter_config.json").write_text("{}"),
                  r"adapter_config\.json: no 'method'"),
    "unknown method": (lambda d: (d / "adapter_config.json").write_text(json.dumps(dict(RECORD, method="x"))),
                       r"method 'x'"),
    "a tensor too few": (lambda d: edit(d, lambda t: t.pop(KEY)), rf"tensor {KEY} is missing"),
    "a tensor too many": (lambda d: edit(d, lambda t: t.update({"lora_z": torch.ones(2)})),
                          r"tensor lora_z is not part of"),
    "another shape": (lambda d: edit(d, lambda t: t.update({KEY: torch.ones(2, 3)})),
                      rf"tensor {KEY} has shape \(2, 3\), the model expects \(2, 128\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_one_clear_error(name, adapter, tiny):
    _, directory = adapter
    spoil, message = BAD[name]
    spoil(directory)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_adapter(M.load(tiny), directory)
    assert "\n" not in str(error.value)
