"""
model.py against transformers on tiny random checkpoints of all four families, and every way to load a bad
one.
"""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

import checkpoint
import decode as D
import model as M
from data import text

tf = pytest.importorskip("transformers")
SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
DECODERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=4)),
    "llama3": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(
        **SMALL, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        rope_parameters=dict(LLAMA3, rope_theta=5e5))),
    "llama-biased": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, head_dim=12)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL, num_key_value_heads=2, rope_parameters=dict(
        rope_type="default", rope_theta=1e6))),
    "qwen2-tied": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(
        **SMALL, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)),
}
# Of float64 models: rotary tables are fp32, and the last bit of a cosine may depend on its place in one.
ONE_ULP = dict(rtol=1e-6, atol=1e-6)


def randomize(hf):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(0, 0.2)
    return hf.eval()


def saved(directory, hf, **kw):
    randomize(hf).save_pretrained(directory, **kw)
    return hf


def old_dialect(directory):
    """Rewrites config.json as transformers 4 wrote it: rope_theta, rope_scaling, `type` for `rope_type`."""
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = dict(rope, type=kind) if kind != "default" else None
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dialect", ["new", "old"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_transformers(name, dialect, tmp_path):
    hf = saved(tmp_path, DECODERS[name]())
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    if dialect == "old":
        old_dialect(tmp_path)
    ours, ids = checkpoint.load(tmp_path), torch.randint(97, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), hf(ids).logits, rtol=1e-4, atol=1e-4)


def test_llama3_rope_past_position_1000(tmp_path):
    """Its error is zero at position 0 and grows: short prompts would not show an ignored scaling."""
    hf = randomize(DECODERS["llama3"]())
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)       # attention that is sharp enough to feel an angle
    hf.save_pretrained(tmp_path)
    ours, ids = checkpoint.load(tmp_path), torch.randint(97, (1, 1300))
    with torch.no_grad():
        want = hf(ids).logits
        torch.testing.assert_close(ours(ids), want, rtol=1e-3, atol=1e-3)
        ours.cfg.rope["rope_type"] = "default"
        assert (ours(ids) - want).abs().max() > 0.02


def test_llama_1_and_2_state_no_theta_and_mean_10000():
    c = dict(model_type="llama", **SMALL, rms_norm_eps=1e-5)
    assert checkpoint.read_config(c).rope == {"rope_theta": 10000.0, "rope_type": "default"}
    with pytest.raises(ValueError, match="rotary embedding without rope_theta"):
        checkpoint.read_config(dict(c, model_type="qwen2"))


def test_packed_is_one_by_one_is_a_block_diagonal_mask(tmp_path):
    saved(tmp_path, DECODERS["qwen3"]())
    ours, lengths = checkpoint.load(tmp_path).double(), [7, 1, 12, 5]
    ids = torch.randint(97, (sum(lengths),))
    packed = ours(ids, lengths)
    one_by_one = torch.cat([ours(part[None])[0] for part in ids.split(lengths)])
    torch.testing.assert_close(packed, one_by_one, **ONE_ULP)
    keep = torch.tensor([3, 8, 24])
    torch.testing.assert_close(ours(ids, lengths, keep=keep), one_by_one[keep], **ONE_ULP)
    # the dense reference: one row, one mask, positions that restart
    block = torch.block_diag(*[torch.ones(t, t).tril() for t in lengths]).bool()
    x = ours.model.embed_tokens(ids)[None]
    rope = M.rope_table(ours.cfg, torch.cat([torch.arange(t) for t in lengths]))
    for layer in ours.model.layers:
        x = layer(x, rope, mask=block[None, None])
    torch.testing.assert_close(packed, ours.lm_head(ours.model.norm(x))[0], **ONE_ULP)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_192_packed_sequences_are_four_launches_a_layer_and_equal_one_by_one(kind, tmp_path, monkeypatch):
    """Values and gradients, in fp32; lengths as mixed as they come."""
    hf = DECODERS["llama3"]() if kind == "decoder" else roberta()
    saved(tmp_path, hf)
    ours, calls, real = checkpoint.load(tmp_path), [], F.scaled_dot_product_attention
    lengths = (torch.arange(192) * 7 % 23 + 1).tolist()
    ids = torch.randint(3, 97, (sum(lengths),))
    W = next(p for name, p in ours.named_parameters() if name.endswith(("v_proj.weight", "value.weight")))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or real(*a, **k))
    packed = ours(ids, lengths)
    assert len(calls) == 4 * SMALL["num_hidden_layers"]
    one_by_one = torch.cat([ours(part[None]).flatten(0, -2) for part in ids.split(lengths)])
    torch.testing.assert_close(packed, one_by_one, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(packed)
    got, want = (torch.autograd.grad((y * weights).sum(), W)[0] for y in (packed, one_by_one))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_attention_of_packed_tokens_drops_some_and_no_more():
    """With values that are all one, dropout of p leaves a sum of means 1: each output is kept / (1 - p)."""
    torch.manual_seed(0)
    _, packed = M.layout([50, 3, 200, 120, 7], "cpu", causal=False)
    q, v = torch.zeros(380, 2, 4), torch.ones(380, 2, 4)
    y = M.attend(q, q, v, packed, causal=False, dropout=0.25)
    assert y.std() > 0.02 and abs(y.mean().item() - 1) < 0.05
    torch.testing.assert_close(M.attend(q, q, v, packed, causal=False), v)


def test_attention_of_a_bf16_model_trains_in_fp32_on_a_cpu(tmp_path, monkeypatch):
    saved(tmp_path, DECODERS["qwen2"]())
    ours, kinds, real = checkpoint.load(tmp_path, torch.bfloat16), [], F.scaled_dot_product_attention
    seen = lambda q, *a, **k: kinds.append(q.dtype) or real(q, *a, **k)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    assert ours(torch.arange(9), [4, 5]).dtype == torch.bfloat16
    with torch.no_grad():
        ours(torch.arange(9), [4, 5])
    half = len(kinds) // 2
    assert set(kinds[:half]) == {torch.float32} and set(kinds[half:]) == {torch.bfloat16}


def test_examples_with_one_beginning_lay_it_once_and_lose_nothing(tmp_path):
    """Losses equal those of each example alone, in fp32; ends of any length, none, and the same one twice."""
    saved(tmp_path, DECODERS["qwen3"]())
    ours, begin = checkpoint.load(tmp_path), torch.randint(97, (20,)).tolist()
    ends = [[5, 6, 7, 8], [5, 6, 9], [5], [5, 6, 7, 8], [], [11, 6]]
    family = [(begin + end, start) for end, start in zip(ends, (20, 20, 20, 3, 19, 0))]
    examples = [family, (begin[:7], 2), family[:3], [(begin + [3], 18), (begin + [4], 20)]]
    ids, lengths, _, _ = M.pack(examples, "cpu")
    assert lengths == [[19, 4, 3, 1, 4, 0, 2], [6, 0], [20, 3, 2, 0], [20, 0, 0]]
    assert len(ids) == sum(map(sum, lengths))
    alone = [e for example in examples for e in (example if isinstance(example, list) else [example])]
    want = torch.cat([ours.losses([e]) for e in alone])
    torch.testing.assert_close(ours.losses(examples), want, rtol=1e-5, atol=1e-5)
    first = torch.log_softmax(ours(torch.tensor([family[0][0]]))[0], -1)
    torch.testing.assert_close(want[:4], -first[range(19, 23), ends[0]], rtol=1e-5, atol=1e-5)


def test_the_last_block_sees_after_attention_the_supervised_positions_alone(tmp_path):
    saved(tmp_path, DECODERS["llama3"]())
    ours, seen = checkpoint.load(tmp_path), []
    for block in ours.blocks():
        for part in (block.self_attn.o_proj, block.mlp):
            part.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    ours.losses([(list(range(12)), 9), (list(range(5)), 4)])
    assert seen == [15, 15, 4, 4]               # 11 + 4 tokens that predict, 3 + 1 of them supervised


def test_left_padding_changes_nothing_and_is_never_nan(tmp_path):
    saved(tmp_path, DECODERS["llama3"]())
    ours = checkpoint.load(tmp_path).double()
    row, pads = torch.randint(97, (1, 9)), 30
    padded = torch.cat([torch.zeros(1, pads, dtype=torch.long), row], 1)
    real = torch.arange(pads + 9)[None] >= pads
    logits = ours(padded, real=real)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, pads:], ours(row), **ONE_ULP)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_cached_is_uncached(name, tmp_path):
    saved(tmp_path, DECODERS[name]())
    ours, ids = checkpoint.load(tmp_path).double(), torch.randint(97, (2, 14))
    cache, past, got = ours.new_cache(2, 14), 0, []
    for t in (5, 1, 1, 4, 3):       # chunks after the first see the past and the past only
        got.append(ours(ids[:, past:past + t], cache=cache, past=past))
        past += t
    torch.testing.assert_close(torch.cat(got, 1), ours(ids), **ONE_ULP)


def test_checkpointing_changes_memory_not_gradients(tmp_path):
    saved(tmp_path, DECODERS["qwen2"]())
    ours, ids = checkpoint.load(tmp_path).double(), torch.randint(97, (11,))
    ours.requires_grad_(False)
    W = ours.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)     # frozen embeddings below
    grads, kept = [], []
    for ours.checkpointing in (False, True):
        sizes = []
        keep = lambda t, sizes=sizes: sizes.append(t.numel()) or t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = ours(ids, [4, 7]).square().sum()
        loss.backward()
        grads.append(W.grad)
        kept.append(sum(sizes))
        W.grad = None
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0 and kept[1] < kept[0] / 2


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_are_those_of_transformers_on_a_padded_batch(name, tmp_path):
    """fp32, every weight; the padded batch has its labels at -100 where there is no loss."""
    hf = saved(tmp_path, DECODERS[name]())
    ours, lengths, starts = checkpoint.load(tmp_path), [17, 3, 29, 8], [9, 1, 28, 0]
    examples = [(torch.randint(97, (t,)).tolist(), start) for t, start in zip(lengths, starts)]
    ours.losses(examples).mean().backward()
    pad = lambda rows, value: pad_sequence([torch.tensor(row) for row in rows], True, value)
    loss = hf(pad([ids for ids, _ in examples], 0), attention_mask=pad([[1] * t for t in lengths], 0),
              labels=pad([[-100] * start + ids[start:] for ids, start in examples], -100)).loss
    loss.backward()
    torch.testing.assert_close(ours.losses(examples).mean(), loss, rtol=1e-5, atol=1e-5)
    theirs = dict(hf.named_parameters())
    for name, p in ours.named_parameters():
        want = theirs.pop(name).grad
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5 * want.abs().max().item(), msg=name)
    assert not theirs


def roberta(**kw):
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL, max_position_embeddings=40, **kw))


@pytest.mark.parametrize("labels", [2, 3])
def test_roberta_is_transformers_padded_and_packed(labels, tmp_path):
    hf = saved(tmp_path, roberta(num_labels=labels))
    ours, ids = checkpoint.load(tmp_path), torch.randint(3, 97, (2, 11))
    ids[1, 7:] = 1
    with torch.no_grad():
        want = hf(ids, attention_mask=ids != 1).logits
        assert want.shape == (2, labels)
        torch.testing.assert_close(ours(ids), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(torch.cat([ids[0], ids[1, :7]]), [11, 7]), want, rtol=1e-4, atol=1e-4)


def test_roberta_counts_its_positions_from_the_pad(tmp_path):
    saved(tmp_path, roberta())
    ours = checkpoint.load(tmp_path)
    ours(torch.full((1, 38), 5))                    # 40 positions, two before the first token
    with pytest.raises(ValueError, match="39 tokens in a sequence, the model has positions for 38"):
        ours(torch.full((1, 39), 5))


def test_roberta_dropout_acts_in_training_only(tmp_path):
    saved(tmp_path, roberta())
    ours, ids = checkpoint.load(tmp_path), torch.randint(3, 97, (4, 9))
    torch.testing.assert_close(ours(ids), ours(ids))
    ours.train()
    assert not torch.allclose(ours(ids), ours(ids), atol=1e-3)      # far more than rounding


def test_a_pretrained_roberta_gets_a_fresh_head_and_leaves_its_lm_head(tmp_path):
    saved(tmp_path, tf.RobertaForMaskedLM(tf.RobertaConfig(**SMALL, max_position_embeddings=40)))
    torch.manual_seed(1)
    ours = checkpoint.load(tmp_path, num_labels=3)
    assert ours.fresh_head and ours.classifier["out_proj"].weight.shape == (3, 32)
    assert 0.01 < ours.classifier["dense"].weight.std() < 0.03 and not ours.classifier["dense"].bias.any()
    assert ours(torch.randint(3, 97, (2, 9))).shape == (2, 3)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_shards_load_like_one_file_into_the_wanted_dtype(name, tmp_path):
    hf = saved(tmp_path / "one", DECODERS[name]())
    hf.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (checkpoint.load(tmp_path / n, torch.bfloat16) for n in ("one", "many"))
    for (name, a), (_, b) in zip(one.state_dict().items(), many.state_dict().items(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b), name
    tied = one.lm_head.weight is one.model.embed_tokens.weight
    assert tied == one.cfg.tie_word_embeddings


def test_rotary_tables_are_fp32_in_a_bf16_model(tmp_path):
    saved(tmp_path, DECODERS["llama3"]())
    ours = checkpoint.load(tmp_path, torch.bfloat16)
    cos, sin = M.rope_table(ours.cfg, torch.arange(1000, 1003))
    assert cos.dtype == sin.dtype == torch.float32
    assert not any("rotary" in name for name, _ in ours.named_buffers())
    assert ours(torch.randint(97, (1, 9))).dtype == torch.bfloat16


def test_a_hub_id_is_looked_up_in_the_hubs_cache(tmp_path, monkeypatch):
    """The real code of huggingface_hub, offline, on a cache directory laid out as it lays them out."""
    import huggingface_hub.constants as constants
    commit = "0" * 40
    hf = saved(tmp_path / "models--org--name" / "snapshots" / commit, DECODERS["qwen2"]())
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ids = torch.randint(97, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.load("org/name")(ids), hf(ids).logits, rtol=1e-4, atol=1e-4)
    message = "org/other: no such directory, and not to be had from the hub: ."
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load("org/other")
    assert "\n" not in str(error.value)


def test_targets_never_hold_an_embedding_or_a_head():
    for family, named in M.TARGETS.items():
        with torch.device("meta"):
            model = checkpoint.build(dict(
                model_type=family, **SMALL, rms_norm_eps=1e-5, layer_norm_eps=1e-5, rope_theta=1e4,
                hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, pad_token_id=1,
                max_position_embeddings=40, type_vocab_size=1))
        linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        hit = {key: {n for n in linears if any(f".{n}".endswith(f".{t}") for t in named[key])}
               for key in named}
        assert hit["all"] == {n for n in linears if "lm_head" not in n and "classifier" not in n}
        assert hit["attention"] == {n for n in hit["all"] if "attn" in n or "attention" in n}


def test_targets_are_read_as_a_word_or_a_list():
    with torch.device("meta"):
        net = checkpoint.build(dict(model_type="llama", **SMALL, rms_norm_eps=1e-5))
        encoder = checkpoint.build(roberta().config.to_dict())
    assert M.targets_of(net, "attention") == ("q_proj", "k_proj", "v_proj", "o_proj")
    for names in ("q_proj,self_attn.v_proj", "q_proj self_attn.v_proj", '["q_proj", "self_attn.v_proj"]'):
        assert M.targets_of(net, names) == ("q_proj", "self_attn.v_proj")
    assert M.targets_of(encoder, "output.dense") == ("output.dense",)
    for model, names, head in ((net, "q_proj,lm_head", "lm_head"), (encoder, "dense", "classifier.dense"),
                               (encoder, "out_proj", "classifier.out_proj")):
        with pytest.raises(ValueError, match=f"match the head, {head}"):
            M.targets_of(model, names)


# ------------------------------------------------------------------------------------ bad checkpoints

@pytest.fixture
def directory(tmp_path):
    saved(tmp_path, DECODERS["qwen2"]())
    return tmp_path


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config.update(changes)
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:len(data) // 2])


def missing_shard(directory):
    shutil.move(directory / "model.safetensors", directory / "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))


BAD = {
    "no directory": (lambda d: shutil.rmtree(d), r"no such model directory"),
    "empty directory": (lambda d: [f.unlink() for f in d.iterdir()], r"config\.json: No such file"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: not JSON"),
    "config incomplete": (lambda d: edit_config(d, hidden_size=None), r"config\.json: no 'hidden_size'"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "missing shard": (missing_shard,
                      r"model-00002-of-00002\.safetensors: shard named in .*index\.json, not found"),
    "truncated": (truncate, r"model\.safetensors: not a whole safetensors file"),
    "a key too few": (lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")),
                      r"model\.safetensors: tensor model\.norm\.weight is missing"),
    "a key too many": (lambda d: edit_tensors(d, lambda t: t.update({"model.extra": torch.ones(2)})),
                       r"model\.safetensors: tensor model\.extra is not part of the model"),
    "a key of another family": (
        lambda d: edit_tensors(d, lambda t: t.update({"lm_head.bias": torch.ones(97)})),
        r"tensor lm_head\.bias is not part of the model"),
    "not an object": (lambda d: (d / "config.json").write_text("[]"),
                      r"config\.json: found a list, expected an object"),
    "empty index": (lambda d: (missing_shard(d), (d / "model.safetensors.index.json").write_text("{}")),
                    r"index\.json: no weight_map"),
    "no heads": (lambda d: edit_config(d, num_attention_heads=None),
                 r"no 'num_attention_heads' for model_type 'qwen2'"),
    "another shape": (lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
                      r"tensor model\.norm\.weight has shape \(31,\), the model expects \(32,\)"),
    "untied, no head": (lambda d: edit_tensors(d, lambda t: t.pop("lm_head.weight")),
                        r"lm_head\.weight is missing"),
    "model type": (lambda d: edit_config(d, model_type="mistral"),
                   r"config\.json: model_type 'mistral', expected one of"),
    "rope type": (lambda d: edit_config(d, rope_parameters=dict(rope_type="yarn", rope_theta=1e4)),
                  r"config\.json: rope type 'yarn', expected default or llama3"),
    "no theta": (lambda d: edit_config(d, rope_parameters=dict(rope_type="default")), r"without rope_theta"),
    "llama3 without factor": (
        lambda d: edit_config(d, rope_parameters=dict(LLAMA3, rope_theta=1e4, factor=None)),
        r"rotary embedding without factor"),
    "activation": (lambda d: edit_config(d, hidden_act="gelu"),
                   r"hidden_act 'gelu', expected 'silu' for qwen2"),
    "a million layers": (lambda d: edit_config(d, num_hidden_layers=10**6),
                         r"config\.json: num_hidden_layers 1000000, 2 have tensors"),
    "no heads at all": (lambda d: edit_config(d, num_attention_heads=0),
                        r"config\.json: num_attention_heads 0, expected a whole number from 1"),
    "a text for a number": (lambda d: edit_config(d, rms_norm_eps="1e-5"),
                            r"config\.json: rms_norm_eps '1e-5', expected a number from 0 to 1"),
    "no number of JSON": (lambda d: edit_config(d, rms_norm_eps=float("inf")),
                          r"config\.json: not JSON \(Infinity is no number of JSON\)"),
    "a theta of 0": (lambda d: edit_config(d, rope_parameters=dict(rope_type="default", rope_theta=0)),
                     r"config\.json: rope_parameters.rope_theta 0, expected a number from 1"),
    "heads that do not divide": (lambda d: edit_config(d, num_attention_heads=5, num_key_value_heads=5),
                                 r"hidden_size 32, 5 heads, 5 of keys: no multiples"),
    "an EOS that is no token": (lambda d: edit_config(d, eos_token_id=[1, 97]),
                                r"config\.json: eos_token_id 97, vocab_size is 97"),
    "not finite": (lambda d: edit_tensors(d, lambda t: t["model.norm.weight"].fill_(float("nan"))),
                   r"model\.safetensors: tensor model\.norm\.weight is not finite"),
    "integers": (lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(32).int()})),
                 r"model\.safetensors: tensor model\.norm\.weight is I32, expected a float"),
    "tied to another": (lambda d: edit_config(d, tie_word_embeddings=True),
                        r"config\.json: tie_word_embeddings, but lm_head\.weight is not the embedding"),
    "sliding window": (lambda d: edit_config(d, use_sliding_window=True), r"sliding-window attention"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_one_clear_error(name, directory):
    checkpoint.load(directory)
    spoil, message = BAD[name]
    spoil(directory)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_older_files_may_carry_rotary_tables_and_a_tied_head(tmp_path):
    saved(tmp_path, DECODERS["qwen2-tied"]())
    edit_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                                               "lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoint.load(tmp_path)


# ------------------------------------------------------------------------------------ tokenizer

def test_tokenizer_bos_is_the_post_processors_and_eos_is_a_list(tiny, tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing
    cfg = checkpoint.read_config(checkpoint.read_json(tiny / "config.json"))
    plain = text.Tokenizer(tiny, cfg)
    assert plain.bos == [] and plain.eos == [0]
    shutil.copytree(tiny, tmp_path / "t")
    fast = Fast.from_file(str(tiny / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 7), ("<eos>", 0)])
    fast.enable_truncation(3)           # both may be left in a published file
    fast.enable_padding(length=16)
    fast.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": [5, 0, 9]}')
    other = text.Tokenizer(tmp_path / "t", cfg)
    assert other.bos == [7] and other.eos == [0, 5, 9]
    assert other.encode("3 apples") == plain.encode("3 apples")
    assert other.decode(other.encode("She buys 3 apples, é!")) == "She buys 3 apples, é!"


def test_tokenizer_errors(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "t")
    config = checkpoint.read_json(tiny / "config.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json: \d+ tokens, the model's embedding has 100"):
        text.Tokenizer(tiny, checkpoint.read_config(dict(config, vocab_size=100)))
    with pytest.raises(ValueError, match="no eos_token_id"):
        text.Tokenizer(tiny, checkpoint.read_config(dict(config, eos_token_id=None)))
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        text.Tokenizer(tmp_path / "t", checkpoint.read_config(config))
    (tmp_path / "t" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        text.Tokenizer(tmp_path / "t", checkpoint.read_config(config))


# ------------------------------------------------------------------------------------ a real model

@pytest.mark.slow
def test_smollm2_is_transformers_smollm2(smollm2):
    ours = checkpoint.load(smollm2)
    hf = tf.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tok = text.Tokenizer(smollm2, ours.cfg)
    prompt = tok.encode("The capital of France is Paris. The capital of Italy is")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        difference = (ours(ids) - hf(ids).logits).abs().max().item()
        want = hf.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=[], pad_token_id=0)
        want = want[0, len(prompt):]
    print(f"SmolLM2: largest logit difference {difference:.1e}")
    assert difference <= 1e-3
    assert D.generate(ours, [prompt], 20, eos=[]) == [want.tolist()]
