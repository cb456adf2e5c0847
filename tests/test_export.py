"""export.py: peft computes what the adapter computes, in each form; what has none says why."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_methods import ADAPTERS, stages
from test_model import SMALL, saved

import checkpoint
import export
import train
from data import commonsense, text

tf, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
LOW_RANK = ["cps_lora", "gfa_aligned", "glora", "gralora", "lora", "milora", "pissa", "rasa", "rosa"]
FORMS = [*((name, "lora", {}) for name in ADAPTERS), ("dora", "peft", {}), ("gralora", "peft", {}),
         ("gralora", "peft", dict(hybrid=2)), ("gralora", "lora", dict(hybrid=2)), ("glora", "peft", {})]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base(directory, **more):
    return saved(directory, tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2, **more)))


def adapted(source, directory, name, ids, rank=4, dtype=torch.float64, **own):
    """A model with the method, after some noise and its re-initialisations, and its adapter on the disk."""
    model, method = checkpoint.load(source, dtype), checkpoint.load_method(name)
    method.inject(model, tuple(TARGETS), rank, **own)
    stages(method, model, ids, output=lambda: model(ids))
    checkpoint.save_adapter(directory, model, dict(method=name, targets=TARGETS, rank=rank, own=own,
                                                   model=str(source)))
    return model, method


def refused(capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        export.main([*map(str, flags)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("checkpoint.py: error: ")
    return err


def peft_logits(source, directory, ids, kind="CausalLM", **how):
    model = getattr(tf, f"AutoModelFor{kind}").from_pretrained(source, dtype=torch.float32, **how)
    model = peft.PeftModel.from_pretrained(model, str(directory)).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name, form, own", FORMS)
def test_peft_computes_what_the_adapter_computes(name, form, own, tmp_path, capsys):
    base(tmp_path / "base")
    ids = torch.randint(97, (2, 9))
    model, method = adapted(tmp_path / "base", tmp_path / "a", name, ids, **own)
    flags = [tmp_path / "a", "--to", form, "--dest", tmp_path / "p"]
    try:
        found = None if form == "peft" and name in ("dora", "gralora") else method.factors(model)
    except NotImplementedError as error:
        kept = "" if name == "denselora" else "; --to merged keeps it"
        assert name not in LOW_RANK and f"error: {error}{kept}\n" in refused(capsys, *flags)
        return
    export.main([*map(str, flags)])
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    if found:
        rank = max(len(A) for A, _ in found.values())
        assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == rank
        tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
        assert tensors.keys() == {f"base_model.model.{m}.lora_{x}.weight" for m in found for x in "AB"}
        assert {t.shape[key.endswith("lora_B.weight")] for key, t in tensors.items()} == {rank}
    elif name == "gralora":
        h = own.get("hybrid", 0)
        assert [config[key] for key in ("peft_type", "r", "hybrid_r")] == ["GRALORA", 4 - h, h]
    else:
        assert config["peft_type"] == "LORA" and config["use_dora"] and config["r"] == 4
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    want = model(ids)
    assert (peft_logits(tmp_path / "base", tmp_path / "p", ids) - want).abs().max() <= 1e-4
    assert (checkpoint.load(tmp_path / "base")(ids) - want).abs().max() > 1e-2
    assert f"{config['peft_type']} of rank {config['r']}, read back" in capsys.readouterr().out


def test_modules_of_less_rank_are_padded_with_zeros_to_the_largest():
    found = {"a": (torch.randn(1, 5), torch.randn(4, 1)), "b": (torch.randn(3, 6), torch.randn(7, 3))}
    config, tensors = export.plain(found)
    assert config["r"] == config["lora_alpha"] == 3
    for name, (A, B) in found.items():
        padded = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert padded[0].shape == (3, A.shape[1]) and padded[1].shape == (len(B), 3)
        assert torch.equal(padded[0][:len(A)], A) and torch.equal(padded[1][:, :len(A)], B)
        assert not padded[0][len(A):].any() and not padded[1][:, len(A):].any()


def test_a_classifiers_trained_head_goes_to_peft_with_it(tmp_path):
    saved(tmp_path / "base", tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL, max_position_embeddings=40)))
    model, method = checkpoint.load(tmp_path / "base", num_labels=3), checkpoint.load_method("lora")
    method.inject(model, ("query", "output.dense"), 2)
    model.classifier.requires_grad_(True)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, 0, 0.1)
    checkpoint.save_adapter(tmp_path / "a", model, dict(method="lora", targets=["query", "output.dense"],
                                                        rank=2, model=str(tmp_path / "base")))
    export.main([str(tmp_path / "a"), "--to", "peft", "--dest", str(tmp_path / "p")])
    ids = torch.randint(3, 97, (2, 9))
    found = peft_logits(tmp_path / "base", tmp_path / "p", ids, "SequenceClassification", num_labels=3)
    torch.testing.assert_close(found, model(ids).detach(), rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]


def test_full_fine_tuning_has_no_factors_and_dora_no_plain_lora(tmp_path, capsys):
    base(tmp_path / "base")
    for name, why in (("full", "it has no factors"), ("dora", "DoRA scales the rows of W: its update is not "
                                                      "low-rank")):
        adapted(tmp_path / "base", tmp_path / name, name, torch.randint(97, (2, 9)))
        for form in ("lora", "peft")[:1 + (name == "full")]:
            err = refused(capsys, tmp_path / name, "--to", form, "--dest", tmp_path / "p")
            assert err == f"checkpoint.py: error: {why}; --to merged keeps it\n"
    adapted(tmp_path / "base", tmp_path / "d", "denselora", torch.randint(97, (2, 9)))
    err = refused(capsys, tmp_path / "d", "--to", "merged", "--dest", tmp_path / "p")
    assert err == f"checkpoint.py: error: {checkpoint.load_method('denselora').NOT_MERGEABLE}\n"
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("method", ["lora", "pissa", "full"])
def test_merged_afterwards_is_merged_by_the_run(method, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--method", method, "--max_steps", "2", "--batch_size", "4", "--train_rows", "40", "--merge",
                "--eval_limit", "4", "--no-eval_before", "--out_dir", str(out)])
    line = capsys.readouterr().out.partition("merged in float32: ")[2].partition(")")[0]
    export.main([str(out / "adapter"), "--to", "merged", "--dest", str(tmp_path / "m")])
    assert capsys.readouterr().out == f"merged in float32: {line})\n"
    assert ({file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
            == {file.name: file.read_bytes() for file in (out / "merged").iterdir()})
    export.main([str(out / "adapter"), "--to", "merged", "--dest", str(tmp_path / "b"),
                 "--merge_dtype", "bfloat16"])
    assert {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_base_in_float32_is_merged_as_it_is(tmp_path):
    base(tmp_path / "base")
    model, method = adapted(tmp_path / "base", tmp_path / "a", "lora", torch.randint(97, (2, 9)),
                            dtype=torch.float32)
    export.main([str(tmp_path / "a"), "--to", "merged", "--dest", str(tmp_path / "m")])
    method.merge(model)
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in found.items())


def test_what_is_read_back_otherwise_is_not_written(tmp_path, monkeypatch, capsys):
    base(tmp_path / "base")
    adapted(tmp_path / "base", tmp_path / "a", "lora", torch.randint(97, (2, 9)))

    def changed(file):
        tensors = load_file(file)
        tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3] *= 1 + 1e-3
        return tensors
    monkeypatch.setattr(export, "load_file", changed)
    err = refused(capsys, tmp_path / "a", "--to", "peft", "--dest", tmp_path / "p")
    assert "not written, base_model.model.model.layers.1.mlp.down_proj.lora_B.weight read back" in err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "base"}


def test_the_base_is_the_adapters_or_the_one_that_is_named(tmp_path, capsys):
    base(tmp_path / "base")
    adapted(tmp_path / "base", tmp_path / "a", "lora", torch.randint(97, (2, 9)))
    flags = [tmp_path / "a", "--to", "peft", "--dest", tmp_path / "p"]
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert refused(capsys, *flags).endswith(
        f"base: no such model directory, which {tmp_path / 'a'} was trained on: --model?\n")
    export.main([*map(str, flags), "--model", str(tmp_path / "moved")])
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "moved")
    assert "p: exists already" in refused(capsys, *flags)


def test_the_command_is_checkpoint_py_and_our_own_adapter_is_none_for_peft(tmp_path):
    base(tmp_path / "base")
    adapted(tmp_path / "base", tmp_path / "a", "lora", torch.randint(97, (2, 9)))
    done = subprocess.run([sys.executable, str(ROOT / "checkpoint.py"), "a", "--to", "peft", "--dest", "p"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "p: LORA of rank 4, read back and compared\n"), done.stderr
    assert {file.name for file in (tmp_path / "p").iterdir()} == {"adapter_config.json",
                                                                  "adapter_model.safetensors"}
    with pytest.raises(ValueError, match="adapter_config.json"):
        peft.PeftConfig.from_pretrained(str(tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.parametrize("name, form", [*((name, "lora") for name in LOW_RANK), ("dora", "peft"),
                                        ("gralora", "peft")])
def test_peft_computes_it_on_smollm2(name, form, smollm2, shared_data, tmp_path):
    tok = text.Tokenizer(smollm2, checkpoint.read_config(checkpoint.read_json(smollm2 / "config.json")))
    rows = commonsense.rows(shared_data, "boolq", "test")[:4]
    ids = torch.tensor([i for row in rows for i in text.example(tok, row)[0]][:120]).view(2, 60)
    model, method = checkpoint.load(smollm2), checkpoint.load_method(name)
    torch.manual_seed(0)
    method.inject(model, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
    checkpoint.save_adapter(tmp_path / "a", model, dict(
        method=name, rank=8, model=str(smollm2), targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                                          "up_proj", "down_proj"]))
    export.main([str(tmp_path / "a"), "--to", form, "--dest", str(tmp_path / "p")])
    with torch.no_grad():
        want, was = model(ids), checkpoint.load(smollm2)(ids)
    difference = (peft_logits(smollm2, tmp_path / "p", ids) - want).abs().max().item()
    print(f"{name} as {form}: {difference:.1e} of a change of {(want - was).abs().max().item():.1e}")
    assert difference <= 1e-3 < 1e-1 < (want - was).abs().max()
