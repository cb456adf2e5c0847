"""
LLaMA (1 to 3.x), Qwen2 / Qwen2.5, Qwen3 and RoBERTa (sequence classification) in plain PyTorch.

Modules carry the names that Hugging Face uses, so its safetensors load with no key mapping.

Two layouts of tokens, in every model:
    padded  ids (b, t)                      rows of one length, or padded ones with `real` marking the tokens
    packed  ids (n,), lengths [t1, t2, ..]  sequences laid end to end, n = t1 + t2 + ..: no padding is computed.
            Linears, norms and the loss see one long row; positions restart and attention stays in each sequence.

Shapes: b batch, t new tokens, s cached + new tokens, n packed tokens, d hidden, h query heads, g key/value heads,
e head size, v vocabulary. `...` is (b, t) or (n).
"""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

DECODERS = ("llama", "qwen2", "qwen3")
TARGETS = {  # what --targets attention and --targets all mean: never embeddings, never a head
    **{family: {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
                "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
       for family in DECODERS},
    "roberta": {"attention": ("query", "key", "value", "attention.output.dense"),
                "all": ("query", "key", "value", "intermediate.dense", "output.dense")},
}


def targets_of(model, targets):
    """'all', 'attention' or a list such as 'q_proj,v_proj' -> names for inject. ValueError for none, or for a head."""
    named = TARGETS[model.cfg.model_type]
    found = named.get(targets) or tuple(re.findall(r"[\w.]+", targets))
    if not found:
        raise ValueError(f"targets {targets!r}, expected {', '.join(named)}, or module names: q_proj,v_proj")
    heads = ("classifier.dense", "classifier.out_proj") if hasattr(model, "classifier") else ("lm_head",)
    for head in heads:
        if any(f".{head}".endswith(f".{name}") for name in found):
            raise ValueError(f"targets {targets!r} match the head, {head}, which is not adapted")
    return found


def pick_device(name):
    """'auto' or torch's own names -> torch.device. ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None


def pick_dtype(name, device):
    """'auto': bf16 where the GPU has it, else fp32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


# ------------------------------------------------------------------------------------ attention

def attend(q, k, v, lengths=None, mask=None, causal=True, dropout=0.0):
    """
    Attention of q (..., t, h, e) over k, v (..., s, g, e) -> (..., t, h, e).
    Packed tokens are taken one sequence at a time: cheaper than one block-diagonal mask, and nothing is padded.
    """
    if lengths is not None:
        sequences = zip(*(x.unsqueeze(0).split(lengths, 1) for x in (q, k, v)))
        return torch.cat([attend(*qkv, causal=causal, dropout=dropout)[0] for qkv in sequences])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                    # (b, heads, tokens, e)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None,
                                       dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def cached_mask(real, past, t):
    """Who may look at whom, (b, 1, t, s): real (b, s) tokens that are not in the query's future, and oneself."""
    s = past + t
    query, key = torch.arange(past, s, device=real.device)[:, None], torch.arange(s, device=real.device)
    # A pad query sees itself: a softmax over nothing is NaN, and NaN spreads through the cache.
    return ((key <= query) & real[:, None, :] | (key == query))[:, None]


# ------------------------------------------------------------------------------------ LLaMA, Qwen

class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_table(cfg, positions):
    """
    cos and sin of the rotary angles at positions (...), each (..., 1, e), always fp32: in bf16, position 257 is 256.
    Llama 3's scaling leaves fast frequencies alone, divides slow ones by `factor` and blends in between.
    """
    rope = cfg.rope
    freq = rope["rope_theta"] ** -(torch.arange(0, cfg.head_dim, 2, device=positions.device).float() / cfg.head_dim)
    if rope["rope_type"] == "llama3":
        cycles = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        fast = ((cycles - low) / (high - low)).clamp(0, 1)                              # 1: keep, 0: divide
        freq = fast * freq + (1 - fast) * freq / rope["factor"]                         # (e/2,)
    angle = positions[..., None, None].float() * freq                                   # (..., 1, e/2)
    return torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(),) * 2, -1)


def rotate(x, cos, sin):
    """Hugging Face's layout of rotary pairs: entry j turns with entry j + e/2."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, e, self.h, self.g = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
        self.q_proj = nn.Linear(d, self.h * e, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(d, self.g * e, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(d, self.g * e, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(self.h * e, d, bias=cfg.o_bias)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(e, cfg.rms_norm_eps), RMSNorm(e, cfg.rms_norm_eps)

    def forward(self, x, rope, lengths, mask, cache, past):
        q = self.q_proj(x).unflatten(-1, (self.h, -1))                                  # (..., h, e)
        k = self.k_proj(x).unflatten(-1, (self.g, -1))                                  # (..., g, e)
        v = self.v_proj(x).unflatten(-1, (self.g, -1))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            now = past + x.shape[1]
            cache[0][:, past:now], cache[1][:, past:now] = k, v
            k, v = cache[0][:, :now], cache[1][:, :now]                                 # (b, s, g, e)
        return self.o_proj(attend(q, k, v, lengths, mask).flatten(-2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, lengths=None, mask=None, cache=None, past=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths, mask, cache, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    checkpointing = False       # recompute activations in backward: less memory, about a quarter slower

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.model = cfg, nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.model.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        if self.cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def blocks(self):
        return self.model.layers

    def new_cache(self, b, s):
        """One (keys, values) pair a layer, each (b, s, g, e); zeros, since a masked NaN would still poison."""
        shape, W = (b, s, self.cfg.num_key_value_heads, self.cfg.head_dim), self.model.embed_tokens.weight
        return [(W.new_zeros(shape), W.new_zeros(shape)) for _ in self.model.layers]

    def forward(self, ids, lengths=None, keep=None, real=None, cache=None, past=0):
        """
        Logits (..., v) in the model's dtype.

        ids      (b, t), or (n,) packed with lengths
        keep     positions in the flattened tokens whose logits are wanted -> (len(keep), v); None: all
        real     (b, past + t) bool, False at padding, which may stand on the left; None: no padding
        cache    from new_cache(b, s), holding `past` tokens; filled in place
        """
        mask = None
        if cache is not None or real is not None:
            if real is None:
                real = torch.ones(len(ids), past + ids.shape[1], dtype=torch.bool, device=ids.device)
            mask = cached_mask(real, past, ids.shape[1])
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
        else:
            positions = packed_positions(ids, lengths)
        rope = rope_table(self.cfg, positions)
        x = self.model.embed_tokens(ids)                                                # (..., d)
        for i, block in enumerate(self.model.layers):
            rest = rope, lengths, mask, None if cache is None else cache[i], past
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *rest, use_reentrant=False)
            else:
                x = block(x, *rest)
        if keep is not None:
            x = x.reshape(-1, x.shape[-1])[keep]
        return self.lm_head(self.model.norm(x))


def packed_positions(ids, lengths):
    """0, 1, 2, .. in every sequence: (t,) for rows of one length, (n,) for packed ones."""
    if lengths is None:
        return torch.arange(ids.shape[1], device=ids.device)
    return torch.cat([torch.arange(t) for t in lengths]).to(ids.device)


# ------------------------------------------------------------------------------------ RoBERTa

class RobertaLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, eps, self.h = cfg.hidden_size, cfg.layer_norm_eps, cfg.num_attention_heads
        self.p, self.p_attention = cfg.hidden_dropout_prob, cfg.attention_probs_dropout_prob
        self.attention = nn.ModuleDict(dict(
            self=nn.ModuleDict({name: nn.Linear(d, d) for name in ("query", "key", "value")}),
            output=nn.ModuleDict(dict(dense=nn.Linear(d, d), LayerNorm=nn.LayerNorm(d, eps)))))
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(d, cfg.intermediate_size)))
        self.output = nn.ModuleDict(dict(dense=nn.Linear(cfg.intermediate_size, d), LayerNorm=nn.LayerNorm(d, eps)))

    def forward(self, x, lengths=None, mask=None):
        project, out = self.attention["self"], self.attention["output"]
        q, k, v = (project[name](x).unflatten(-1, (self.h, -1)) for name in ("query", "key", "value"))
        y = attend(q, k, v, lengths, mask, causal=False, dropout=self.p_attention * self.training)
        x = out["LayerNorm"](x + F.dropout(out["dense"](y.flatten(-2)), self.p, self.training))
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + F.dropout(y, self.p, self.training))


class RobertaClassifier(nn.Module):
    checkpointing = False

    def __init__(self, cfg):
        super().__init__()
        d, self.cfg = cfg.hidden_size, cfg
        self.roberta = nn.ModuleDict(dict(
            embeddings=nn.ModuleDict(dict(
                word_embeddings=nn.Embedding(cfg.vocab_size, d),
                position_embeddings=nn.Embedding(cfg.max_position_embeddings, d),
                token_type_embeddings=nn.Embedding(cfg.type_vocab_size, d),
                LayerNorm=nn.LayerNorm(d, cfg.layer_norm_eps))),
            encoder=nn.ModuleDict(dict(layer=nn.ModuleList(RobertaLayer(cfg) for _ in range(cfg.num_hidden_layers))))))
        self.classifier = nn.ModuleDict(dict(dense=nn.Linear(d, d), out_proj=nn.Linear(d, cfg.num_labels)))

    def blocks(self):
        return self.roberta["encoder"]["layer"]

    def forward(self, ids, lengths=None):
        """ids (b, t) padded with pad_token_id, or (n,) packed with lengths -> logits (b, labels)."""
        cfg, p, emb = self.cfg, self.cfg.hidden_dropout_prob, self.roberta["embeddings"]
        if lengths is None:
            real = ids != cfg.pad_token_id                                              # (b, t)
            positions, mask, first = real.cumsum(1) * real, real[:, None, None], (slice(None), 0)
        else:
            positions, mask = packed_positions(ids, lengths) + 1, None
            first = torch.tensor([0, *lengths[:-1]], device=ids.device).cumsum(0)       # where each <s> stands
        if (longest := int(positions.max())) + cfg.pad_token_id >= cfg.max_position_embeddings:
            raise ValueError(f"{longest} tokens in a sequence, the model has positions for "
                             f"{cfg.max_position_embeddings - cfg.pad_token_id - 1}")
        x = emb["word_embeddings"](ids) + emb["position_embeddings"](positions + cfg.pad_token_id)
        x = F.dropout(emb["LayerNorm"](x + emb["token_type_embeddings"].weight[0]), p, self.training)
        for layer in self.blocks():
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, lengths, mask, use_reentrant=False)
            else:
                x = layer(x, lengths, mask)
        head = self.classifier
        x = x[first].to(head["dense"].weight.dtype)     # (b, d), the <s> tokens; a head that trains is fp32
        x = torch.tanh(head["dense"](F.dropout(x, p, self.training)))
        return head["out_proj"](F.dropout(x, p, self.training))


# ------------------------------------------------------------------------------------ config.json

def read_json(file):
    """The object in a JSON file; ValueError names the file."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found a {type(found).__name__}, expected an object")
    return found


def rope_parameters(c):
    """
    {rope_type, rope_theta, ...} from either spelling: rope_theta + rope_scaling, or transformers 5's rope_parameters.
    A theta of 10000 is assumed for LLaMA 1 and 2 alone, whose files state none.
    """
    rope = {"rope_theta": c.get("rope_theta"), **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"rope type {rope['rope_type']!r}, expected default or llama3")
    if rope["rope_theta"] is None and c["model_type"] == "llama" and "rope_parameters" not in c:
        rope["rope_theta"] = 10000.0
    needed = ["rope_theta"]
    if rope["rope_type"] == "llama3":
        needed += ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if absent := [key for key in needed if rope.get(key) is None]:
        raise ValueError(f"rotary embedding without {', '.join(absent)}")
    return rope


def read_config(c, num_labels=None):
    """
    The object of a config.json, as a namespace with every field that the models read.
    Raises ValueError on a model type, activation, rope type or attention pattern that is not implemented here.
    """
    kind = c.get("model_type")
    if kind not in TARGETS:
        raise ValueError(f"model_type {kind!r}, expected one of {', '.join(TARGETS)}")
    expected = "gelu" if kind == "roberta" else "silu"
    if (act := c.get("hidden_act", expected)) != expected:
        raise ValueError(f"hidden_act {act!r}, expected {expected!r} for {kind}")
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    needed += ["max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob",
               "attention_probs_dropout_prob", "pad_token_id"] if kind == "roberta" else ["rms_norm_eps"]
    if absent := [name for name in needed if c.get(name) is None]:
        raise ValueError(f"no {absent[0]!r} for model_type {kind!r}")
    cfg = SimpleNamespace(**c)
    if kind == "roberta":
        cfg.num_labels = num_labels or len(c.get("id2label") or "01")
        if c.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"position_embedding_type {c['position_embedding_type']!r}, expected 'absolute'")
        return cfg
    if c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or ()):
        raise ValueError("sliding-window attention is not implemented")
    cfg.num_key_value_heads = c.get("num_key_value_heads") or c["num_attention_heads"]
    cfg.head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    cfg.o_bias = bool(c.get("attention_bias")) and kind != "qwen2"
    cfg.qkv_bias = bool(c.get("attention_bias")) or kind == "qwen2"      # Qwen2's files do not mention its biases
    cfg.mlp_bias, cfg.qk_norm = bool(c.get("mlp_bias")), kind == "qwen3"
    cfg.tie_word_embeddings = bool(c.get("tie_word_embeddings"))
    cfg.rope = rope_parameters(c)
    return cfg


def build(c, num_labels=None):
    """The model that a config.json's object describes, with random weights (put it under torch.device('meta'))."""
    cfg = read_config(c, num_labels)
    return RobertaClassifier(cfg) if cfg.model_type == "roberta" else CausalLM(cfg)


# ------------------------------------------------------------------------------------ checkpoints

# Tensors that a file may hold beyond the model: what old files carry, and RoBERTa's pretraining heads.
IGNORED = {"decoder": re.compile(r".*\.rotary_emb\.inv_freq"),
           "roberta": re.compile(r"roberta\.embeddings\.position_ids|roberta\.pooler\..*|lm_head\..*")}
TEXT_FILES = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja"]
HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TEXT_FILES]


def resolve(path):
    """A local directory as it is; a hub id 'org/name' as the directory that huggingface_hub keeps it in."""
    if (directory := Path(path)).is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or directory.parent.is_dir():
        raise ValueError(f"{path}: no such model directory")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES))
    except Exception as error:      # many kinds, from "no network" to "gated": its first line says which
        raise ValueError(f"{path}: no such directory, and not to be had from the hub: "
                         f"{str(error).strip().splitlines()[0]}") from None


def tensor_files(directory):
    """The safetensors files of a checkpoint: a single one, or the shards that its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f"{directory}: neither model.safetensors nor model.safetensors.index.json")
    files = [directory / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if not files:
        raise ValueError(f"{index}: no weight_map")
    if absent := [file for file in files if not file.exists()]:
        raise ValueError(f"{absent[0]}: shard named in {index.name}, not found")
    return files


def read_tensors(files, expected, ignored, dtype, device):
    """
    {key: tensor} from safetensors files, one tensor at a time into dtype and device.
    expected {key: shape}, ignored: a pattern of other keys. Every header is checked before the first tensor is read;
    ValueError names file and tensor.
    """
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                found |= {key: (file, tuple(f.get_slice(key).get_shape())) for key in f.keys()}
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    for key, (file, shape) in found.items():
        if key not in expected and not ignored.fullmatch(key):
            raise ValueError(f"{file}: tensor {key} is not part of the model")
        if key in expected and shape != expected[key]:
            raise ValueError(f"{file}: tensor {key} has shape {shape}, the model expects {expected[key]}")
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as f:
            for key in f.keys():
                if key in expected:
                    tensors[key] = f.get_tensor(key).to(device, dtype)
    return tensors


def load(path, dtype=torch.float32, device="cpu", num_labels=None):
    """
    The model of a Hugging Face directory or hub id, its weights in dtype on device, in eval mode; `.cfg` is its config.

    The keys in the files must be those of the model, both ways, but for: a tied lm_head; rotary tables and position
    ids that older files carry; RoBERTa's pooler and LM head; and RoBERTa's classifier, drawn anew from torch's random
    generator where the checkpoint has none (then `fresh_head` is True).
    Raises ValueError, in one line, that names the file and the tensor.
    """
    directory = resolve(path)
    try:
        with torch.device("meta"):
            model = build(read_json(directory / "config.json"), num_labels)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(directory)) else f"{directory / 'config.json'}: {text}") from None
    cfg, files = model.cfg, tensor_files(directory)
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    ignored = IGNORED["roberta" if cfg.model_type == "roberta" else "decoder"]
    tensors = read_tensors(files, expected, ignored, dtype, device)
    missing = [key for key in expected if key not in tensors]
    if isinstance(model, CausalLM) and cfg.tie_word_embeddings:
        missing = [key for key in missing if key != "lm_head.weight"]
    model.fresh_head = bool(missing) and missing == [key for key in expected if key.startswith("classifier.")]
    if model.fresh_head:
        for key in missing:
            tensors[key] = torch.zeros(expected[key], dtype=dtype, device=device)
            if key.endswith("weight"):
                tensors[key].normal_(0, getattr(cfg, "initializer_range", 0.02))
    elif missing:
        raise ValueError(f"{files[0] if len(files) == 1 else directory}: tensor {missing[0]} is missing"
                         + f" (and {len(missing) - 1} more)" * (len(missing) > 1))
    model.load_state_dict(tensors, strict=False, assign=True)
    if isinstance(model, CausalLM):
        model.tie_weights()
    return model.eval()


class Tokenizer:
    """
    tokenizer.json with the ids that Hugging Face keeps beside it.

    bos   what the tokenizer's own post-processor puts before a text: [] for Qwen, [id] for LLaMA
    eos   ids that end a text, from config.json and generation_config.json; eos[0] closes a training example
    size  vocabulary, added tokens included; the embedding may be padded beyond it
    longest  tokens that an encoder has positions for; None for the others, which have no table of them
    """

    def __init__(self, path, cfg):
        from tokenizers import Tokenizer as Fast
        directory = resolve(path)
        file = directory / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file}: no such file; expected a tokenizers file beside the weights")
        try:
            self.fast = Fast.from_file(str(file))
        except Exception as error:      # the library raises bare Exception
            raise ValueError(f"{file}: not a tokenizer ({error})") from None
        self.fast.no_truncation()       # a saved file may hold either, and both are ours to do
        self.fast.no_padding()
        self.size = 1 + max(self.fast.get_vocab().values(), default=-1)
        if self.size > cfg.vocab_size:
            raise ValueError(f"{file}: {self.size} tokens, the model's embedding has {cfg.vocab_size}")
        self.longest = cfg.max_position_embeddings - cfg.pad_token_id - 1 if cfg.model_type == "roberta" else None
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
        """Text of ids as they go on after a prompt's: a decoder may drop a space at the very start. special: and its names."""
        last = prompt[-1:]
        before = self.fast.decode(last, skip_special_tokens=not special)
        return self.fast.decode([*last, *ids], skip_special_tokens=not special)[len(before):]

    def pair(self, text, other=None, longest=None):
        """Ids of a text, or of two, with all special tokens; of the longer one as much as the model has positions for."""
        longest = min(length for length in (longest, self.longest) if length)
        ids = self.fast.encode(text, other).ids
        if len(ids) > longest:
            self.fast.enable_truncation(longest)
            ids = self.fast.encode(text, other).ids
            self.fast.no_truncation()
        return ids
