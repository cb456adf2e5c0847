"""What stands around the code: citation, workflows, CI's script with another torch, real_models.py."""
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT

import checkpoint

sys.path.insert(0, str(ROOT / "experiments"))


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_citation_names_the_four_papers_as_their_files_do():
    cff, flat = read("CITATION.cff"), lambda text: " ".join(text.split())
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(cff)
    for name, entry in zip(("glora", "cps_lora", "gralora", "gfa"), cff["references"], strict=True):
        head = flat(importlib.import_module(name).__doc__)[:200]
        assert entry["title"] in head and {"type", "authors"} <= set(entry)
        first = entry["authors"][0]
        assert first.get("family-names", "anonymous authors") in head
        assert str(entry.get("year", "ICML submission")) in head


def test_the_workflows_run_what_is_there():
    ci, real = read(".github/workflows/ci.yml"), read(".github/workflows/real-models.yml")
    assert ci["jobs"]["run"]["steps"][-1]["run"] == "bash .ci/run"
    assert ci["jobs"]["run"]["strategy"]["matrix"]["python"] == ["3.11", "3.14"]
    assert list(real[True]) == ["workflow_dispatch"]                    # YAML reads `on` as true
    for step in real["jobs"]["logits"]["steps"][2:]:
        for file in re.findall(r"[\w/-]+\.(?:py|txt)", step["run"]):
            assert (ROOT / file).is_file()


@pytest.mark.parametrize("version", [None, "2.6.0"])
def test_ci_installs_the_pinned_torch_or_the_one_that_TORCH_names(version, tmp_path):
    """With stand-ins for python3, which makes an empty environment, and pip, which shows its file."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    for name, line in (("python3", 'mkdir -p "$3/bin"; : > "$3/bin/activate"'),
                       ("pip", "cat requirements.txt; exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    before = (ROOT / "requirements.txt").read_text()
    env = {key: value for key, value in os.environ.items() if key != "TORCH"}
    env |= dict(PATH=f"{tmp_path}:{env['PATH']}") | (dict(TORCH=version) if version else {})
    ran = subprocess.run(["bash", str(ROOT / ".ci" / "run")], env=env, capture_output=True, text=True)
    pinned = re.search("^torch==.*", before, re.MULTILINE)[0]
    assert ran.stdout == before.replace(pinned, f"torch=={version}" if version else pinned)
    assert ran.returncode == 1
    assert (ROOT / "requirements.txt").read_text() == before


# ------------------------------------------------------------------------------------ real_models.py

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def bpe(directory, special, post=None):
    from tokenizers import ByteLevelBPETokenizer
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["the quick brown fox jumps over lazy dogs"], 300, special_tokens=special,
                                  show_progress=False)
    if post:
        tokenizer.post_processor = post
    tokenizer.save(str(directory / "tokenizer.json"))


def qwen2(tf, directory):
    directory.mkdir()
    bpe(directory, ["<|endoftext|>"])
    tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, vocab_size=304, num_key_value_heads=2, eos_token_id=0)
                        ).save_pretrained(directory)


def roberta(tf, directory):
    """As published: a masked language model, so without the classifier's head."""
    from tokenizers.processors import RobertaProcessing
    directory.mkdir()
    bpe(directory, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], RobertaProcessing(("</s>", 2), ("<s>", 0)))
    tf.RobertaForMaskedLM(tf.RobertaConfig(
        **SMALL, vocab_size=304, max_position_embeddings=514, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    ).save_pretrained(directory)


@pytest.mark.parametrize("make", [qwen2, roberta])
def test_a_random_checkpoint_has_transformers_ids_and_logits(make, tmp_path):
    tf = pytest.importorskip("transformers")
    import real_models
    torch.manual_seed(0)
    make(tf, tmp_path / "m")
    assert real_models.difference(tmp_path / "m") < 1e-5


def test_a_difference_above_the_bound_exits_with_1(tiny):
    script = [sys.executable, str(ROOT / "experiments" / "real_models.py"), str(tiny)]
    same = subprocess.run(script, capture_output=True, text=True)
    assert same.returncode == 0
    assert re.search(r"tiny: largest logit difference to transformers \d\.\de-0\d\n", same.stdout)
    assert subprocess.run([*script, "--bound", "1e-12"], capture_output=True).returncode == 1


def test_other_ids_than_transformers_are_an_error(tiny, monkeypatch):
    tf = pytest.importorskip("transformers")
    import real_models
    other = lambda words: dict(input_ids=[5, 6])
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", lambda path: other)
    with pytest.raises(ValueError, match="other ids than transformers'"):
        real_models.difference(tiny)


def test_a_difference_in_one_weight_is_seen(tiny, monkeypatch):
    pytest.importorskip("transformers")
    import real_models
    load = checkpoint.load

    def changed(*args):
        model = load(*args)
        with torch.no_grad():
            model.model.norm.weight[3] += 0.1
        return model
    monkeypatch.setattr(real_models.checkpoint, "load", changed)
    assert real_models.difference(tiny) > 1e-2
