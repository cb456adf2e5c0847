"""
LLaMA (1 to 3.x), Qwen2 / Qwen2.5, Qwen3 and RoBERTa (sequence classification) in plain PyTorch.

Modules carry the names that Hugging Face uses, so its safetensors load with no key mapping (checkpoint.py).

Two layouts of tokens, in every model:
    padded  ids (b, t)                      rows of one length, or padded ones with `real` marking the tokens
    packed  ids (n,), lengths [t1, t2, ..]  sequences laid end to end, n = t1 + t2 + ..: Linears, norms, the
            loss see one long row without pads; positions restart, and attention stays in a sequence.

Shapes: b batch, t new tokens, s cached + new tokens, n packed tokens, d hidden, h query heads, g key/value
heads, e head size, v vocabulary. `...` is (b, t) or (n).

An example is (ids, start): tokens, supervised from `start` on; for a classifier (ids, label). What the two
kinds of model do differently, they answer themselves:
    KINDS                   kinds of task (data/) that the model fits
    HEADS, TRAINED_HEAD     Linears that no method adapts; the module that trains beside any adapter, or None
    supervised, losses      how many losses an example has; all of them, of a list of examples
"""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
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
    """'all', 'attention' or a list as 'q_proj,v_proj' -> names for inject. ValueError for none, or a head."""
    named = TARGETS[model.cfg.model_type]
    if not (found := named.get(targets) or tuple(re.findall(r"[\w.]+", targets))):
        raise ValueError(f"targets {targets!r}, expected {', '.join(named)}, or module names: q_proj,v_proj")
    for head in model.HEADS:
        if any(f".{head}".endswith(f".{name}") for name in found):
            raise ValueError(f"targets {targets!r} match the head, {head}, which is not adapted")
    return found


# ------------------------------------------------------------------------------------ attention

LAUNCHES = 4    # of attention for packed tokens, a layer


def layout(lengths, device, causal=True):
    """
    positions (n,) of packed tokens, and how attend pads them: fill, the token in each slot; back, the slot of
    each token; groups [((b, t), mask), ..] of slots. Sequences of about one length share a group: one for all
    would double the work where lengths are mixed, one each is a launch a sequence and layer.
    A length may be a list [t, t1, ..]: t tokens, and ends that all go on from there, blind to one another.
    """
    trees = [t if isinstance(t, list) else [t] for t in lengths]
    parts = [(i, t, tree[0] * (i > 0)) for tree in trees for i, t in enumerate(tree)]
    positions = torch.cat([torch.arange(past, past + t) for _, t, past in parts])
    branch = torch.cat([torch.full((t,), i) for i, t, _ in parts])                      # 0: what all ends see
    tokens = sorted(torch.arange(len(branch)).split([*map(sum, trees)]), key=len, reverse=True)
    rows, fill, groups = -(-len(trees) // LAUNCHES), [], []
    for i in range(0, len(tokens), rows):
        slots, mask = pad_sequence(tokens[i:i + rows], True, -1), None                  # (b, t), -1: a pad
        key = branch[slots][:, None, None]                                              # (b, 1, 1, t)
        if causal and key.any():                # else causal is enough: no token looks at a pad on its right
            mask = ((key == key.mT) | (key == 0)).tril().to(device)
        elif not causal and slots.min() < 0:
            mask = (slots >= 0)[:, None, None].to(device)
        groups.append((slots.shape, mask))
        fill.append(slots.flatten())
    fill = torch.cat(fill)
    back = fill.argsort()[len(fill) - len(branch):]             # pads come first
    return positions.to(device), (fill.clamp(min=0).to(device), back.to(device), groups)


def attend(q, k, v, packed=None, mask=None, causal=True, dropout=0.0):
    """Attention of q (..., t, h, e) over k, v (..., s, g, e) -> (..., t, h, e); packed is of layout."""
    if packed is not None:                                      # a block-diagonal mask would cost more
        fill, back, groups = packed
        parts = zip(*(x.index_select(0, fill).split([b * t for (b, t), _ in groups]) for x in (q, k, v)))
        y = [attend(*(x.unflatten(0, shape) for x in part), None, mask, causal, dropout).flatten(0, 1)
             for part, (shape, mask) in zip(parts, groups)]
        return torch.cat(y).index_select(0, back)
    dtype = q.dtype
    if q.device.type == "cpu" and torch.is_grad_enabled():      # there bf16's backward is five times slower
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                    # (b, heads, t, e)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None,
                                       dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).to(dtype)


def cached_mask(real, past):
    """Who after `past` may look at whom, (b, 1, t, s): at real (b, s) tokens up to itself, and at itself."""
    key = torch.arange(real.shape[1], device=real.device)
    query = key[past:, None]
    # A pad query sees itself: a softmax over nothing is NaN, and NaN spreads through the cache.
    return ((key <= query) & real[:, None] | (key == query))[:, None]


# ------------------------------------------------------------------------------------ LLaMA, Qwen

class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rope_table(cfg, positions):
    """
    cos and sin of the rotary angles at positions (...), each (..., 1, e), always fp32: bf16 has no 257.
    Llama 3's scaling leaves fast frequencies alone, divides slow ones by `factor` and blends in between.
    """
    rope = cfg.rope
    pair = torch.arange(0, cfg.head_dim, 2, device=positions.device).float()            # (e/2,)
    freq = rope["rope_theta"] ** -(pair / cfg.head_dim)
    if rope["rope_type"] == "llama3":
        cycles = rope["original_max_position_embeddings"] * freq / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        fast = ((cycles - low) / (high - low)).clamp(0, 1)                              # 1: keep, 0: divide
        freq = fast * freq + (1 - fast) * freq / rope["factor"]
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

    def forward(self, x, rope, packed, mask, cache, put, keep):
        q = self.q_proj(x).unflatten(-1, (self.h, -1))                                  # (..., h, e)
        k = self.k_proj(x).unflatten(-1, (self.g, -1))                                  # (..., g, e)
        v = self.v_proj(x).unflatten(-1, (self.g, -1))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache[0][put], cache[1][put] = k, v
            if packed is None:
                k, v = (held[:, :put[1].stop] for held in cache)                        # (b, s, g, e)
        return self.o_proj(attend(q, k, v, packed, mask).flatten(-2)[keep])


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

    def forward(self, x, rope, packed=None, mask=None, cache=None, put=None, keep=...):
        x = x[keep] + self.self_attn(self.input_layernorm(x), rope, packed, mask, cache, put, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    KINDS, HEADS, TRAINED_HEAD = ("generate", "execute"), ("lm_head",), None
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
        """(keys, values) of each layer, (b, s, g, e); zeros, as a masked NaN would still poison."""
        shape, W = (b, self.cfg.num_key_value_heads, s, self.cfg.head_dim), self.model.embed_tokens.weight
        return [[W.new_zeros(shape).transpose(1, 2) for _ in "kv"] for _ in self.model.layers]  # as read

    def forward(self, ids, lengths=None, keep=..., real=None, cache=None, past=0):
        """
        Logits (..., v) in the model's dtype.

        ids      (b, t), or (n,) packed with lengths
        keep     which packed tokens' logits are wanted -> (len(keep), v): the last block's MLP sees no other
        real     (b, past + t) bool, False at padding, which may stand on the left; None: no padding
        cache    from new_cache(b, s), holding `past` tokens; filled in place, by packed tokens where real is
        """
        mask, packed, now = None, None, past + ids.shape[-1]
        positions, put = torch.arange(past, now, device=ids.device), (slice(None), slice(past, now))
        if lengths is not None:
            positions, packed = layout(lengths, ids.device)
            put = cache and real.nonzero(as_tuple=True)
        elif real is not None or past:
            mask = cached_mask(ids.new_ones(1, now).bool() if real is None else real, past)
            positions = mask.sum(-1)[:, 0] - 1
        rope = rope_table(self.cfg, positions)
        x = self.model.embed_tokens(ids)                                                # (..., d)
        for i, block in enumerate(self.model.layers):
            wanted = keep if block is self.model.layers[-1] else ...
            rest = rope, packed, mask, cache and cache[i], put, wanted
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *rest, use_reentrant=False)
            else:
                x = block(x, *rest)
        return self.lm_head(self.model.norm(x))

    def supervised(self, example):
        """How many tokens of an example (ids, start) have a loss: nothing predicts the first one."""
        ids, start = example
        return len(ids) - max(start, 1)

    def losses(self, examples):
        """Cross-entropy (nats) of every supervised token of the examples, in order."""
        ids, lengths, keep, labels = pack(examples, self.model.embed_tokens.weight.device)
        return F.cross_entropy(self(ids, lengths, keep).float(), labels, reduction="none")


def pack(examples, device):
    """
    Examples [(ids, start), ..] laid end to end -> what model(ids, lengths, keep) takes, keep being where the
    logits predict a supervised token, and labels: those tokens. Where an example is a list of examples, their
    common beginning is laid once. A last token predicts nothing and stays out.
    """
    ids, lengths, keep, labels = [], [], [], []
    for example in examples:
        several = example if isinstance(example, list) else [example]
        alike = [len(set(column)) == 1 for column in zip(*(tokens[:-1] for tokens, _ in several))]
        shared, first = [*alike, False].index(False), len(ids)
        ids += several[0][0][:shared]
        lengths.append([shared, *(len(tokens) - 1 - shared for tokens, _ in several)])
        for tokens, start in several:
            end, start = tokens[shared:-1], max(start, 1)       # nothing predicts the first token
            keep += [*range(first, first + shared), *range(len(ids), len(ids) + len(end))][start - 1:]
            labels += tokens[start:]
            ids += end
    ids, keep, labels = (torch.tensor(x, device=device) for x in (ids, keep, labels))
    return ids, lengths, keep, labels


# ------------------------------------------------------------------------------------ RoBERTa

class RobertaLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, f, self.h = cfg.hidden_size, cfg.intermediate_size, cfg.num_attention_heads
        self.p, self.p_attention = cfg.hidden_dropout_prob, cfg.attention_probs_dropout_prob
        norm = lambda: nn.LayerNorm(d, cfg.layer_norm_eps)
        self.attention = nn.ModuleDict(dict(
            self=nn.ModuleDict({name: nn.Linear(d, d) for name in ("query", "key", "value")}),
            output=nn.ModuleDict(dict(dense=nn.Linear(d, d), LayerNorm=norm()))))
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(d, f)))
        self.output = nn.ModuleDict(dict(dense=nn.Linear(f, d), LayerNorm=norm()))

    def forward(self, x, packed=None, mask=None):
        project, out = self.attention["self"], self.attention["output"]
        q, k, v = (project[name](x).unflatten(-1, (self.h, -1)) for name in ("query", "key", "value"))
        y = attend(q, k, v, packed, mask, causal=False, dropout=self.p_attention * self.training)
        x = out["LayerNorm"](x + F.dropout(out["dense"](y.flatten(-2)), self.p, self.training))
        y = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + F.dropout(y, self.p, self.training))


class RobertaClassifier(nn.Module):
    KINDS, HEADS, TRAINED_HEAD = ("classify",), ("classifier.dense", "classifier.out_proj"), "classifier"
    checkpointing = False

    def __init__(self, cfg):
        super().__init__()
        d, self.cfg = cfg.hidden_size, cfg
        layers = nn.ModuleList(RobertaLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.roberta = nn.ModuleDict(dict(
            embeddings=nn.ModuleDict(dict(
                word_embeddings=nn.Embedding(cfg.vocab_size, d),
                position_embeddings=nn.Embedding(cfg.max_position_embeddings, d),
                token_type_embeddings=nn.Embedding(cfg.type_vocab_size, d),
                LayerNorm=nn.LayerNorm(d, cfg.layer_norm_eps))),
            encoder=nn.ModuleDict(dict(layer=layers))))
        self.classifier = nn.ModuleDict(dict(dense=nn.Linear(d, d), out_proj=nn.Linear(d, cfg.num_labels)))

    def blocks(self):
        return self.roberta["encoder"]["layer"]

    def forward(self, ids, lengths=None):
        """ids (b, t) padded with pad_token_id, or (n,) packed with lengths -> logits (b, labels)."""
        cfg, p, emb = self.cfg, self.cfg.hidden_dropout_prob, self.roberta["embeddings"]
        mask = packed = None
        if lengths is None:
            real = ids != cfg.pad_token_id                                              # (b, t)
            positions, mask, first = real.cumsum(1) * real, real[:, None, None], (slice(None), 0)
        else:
            positions, packed = layout(lengths, ids.device, causal=False)
            positions = positions + 1
            first = torch.tensor([0, *lengths[:-1]], device=ids.device).cumsum(0)   # where each <s> stands
        if (longest := int(positions.max())) + cfg.pad_token_id >= cfg.max_position_embeddings:
            raise ValueError(f"{longest} tokens in a sequence, the model has positions for "
                             f"{cfg.max_position_embeddings - cfg.pad_token_id - 1}")
        x = emb["word_embeddings"](ids) + emb["position_embeddings"](positions + cfg.pad_token_id)
        x = F.dropout(emb["LayerNorm"](x + emb["token_type_embeddings"].weight[0]), p, self.training)
        for layer in self.blocks():
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, packed, mask, use_reentrant=False)
            else:
                x = layer(x, packed, mask)
        head = self.classifier
        x = x[first].to(head["dense"].weight.dtype)     # (b, d), the <s> tokens; a head that trains is fp32
        x = torch.tanh(head["dense"](F.dropout(x, p, self.training)))
        return head["out_proj"](F.dropout(x, p, self.training))

    def supervised(self, example):
        return 1

    def classify(self, examples):
        """Logits (b, labels) of the examples [(ids, label), ..], which are laid end to end."""
        ids = [token for tokens, _ in examples for token in tokens]
        ids = torch.tensor(ids, device=next(self.parameters()).device)
        return self(ids, [len(tokens) for tokens, _ in examples])

    def losses(self, examples):
        """Cross-entropy (nats) of every example's label."""
        logits = self.classify(examples)
        labels = torch.tensor([label for _, label in examples], device=logits.device)
        return F.cross_entropy(logits.float(), labels, reduction="none")


# ------------------------------------------------------------------------------------ where a number went

@torch.no_grad()
def first_non_finite(model, examples):
    """
    The name of the module that is the first to put out a NaN or an infinity for these examples, by one more
    forward pass; None where no module does. What went in was finite: its own weights, or their size, did it.
    """
    found = []

    def look(module, inputs, output):
        if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(module)

    handles = [m.register_forward_hook(look) for m in model.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):      # a compiled block calls no hook
            model.losses(examples)
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, m in model.named_modules() if found and m is found[0]), None)
