"""
LLaMA (1 to 3.x), Qwen2 / Qwen2.5, Qwen3 and RoBERTa (sequence classification) in plain PyTorch, and decoding.

Modules carry the names that Hugging Face uses, so its safetensors load with no key mapping (checkpoint.py).

Two layouts of tokens, in every model:
    padded  ids (b, t)                      rows of one length, or padded ones with `real` marking the tokens
    packed  ids (n,), lengths [t1, t2, ..]  sequences laid end to end, n = t1 + t2 + ..: nothing is padded.
            Linears, norms and the loss see one long row; positions restart and attention stays in a sequence.

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

def attend(q, k, v, lengths=None, mask=None, causal=True, dropout=0.0):
    """
    Attention of q (..., t, h, e) over k, v (..., s, g, e) -> (..., t, h, e).
    Packed tokens are taken one sequence at a time: cheaper than a block-diagonal mask, and nothing is padded.
    """
    if lengths is not None:
        sequences = zip(*(x.unsqueeze(0).split(lengths, 1) for x in (q, k, v)))
        return torch.cat([attend(*qkv, causal=causal, dropout=dropout)[0] for qkv in sequences])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                    # (b, heads, t, e)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None,
                                       dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def cached_mask(real, past, t):
    """Who may look at whom, (b, 1, t, s): real (b, s) tokens not in the query's future, and oneself."""
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
        """One (keys, values) pair a layer, each (b, s, g, e); zeros, as a masked NaN would still poison."""
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
    logits predict a supervised token, and labels: those tokens.
    """
    ids, keep, labels = [], [], []
    for tokens, start in examples:
        start = max(start, 1)                                   # nothing predicts the first token
        keep += range(len(ids) + start - 1, len(ids) + len(tokens) - 1)
        labels += tokens[start:]
        ids += tokens
    ids, keep, labels = (torch.tensor(x, device=device) for x in (ids, keep, labels))
    return ids, [len(tokens) for tokens, _ in examples], keep, labels


def packed_positions(ids, lengths):
    """0, 1, 2, .. in every sequence: (t,) for rows of one length, (n,) for packed ones."""
    if lengths is None:
        return torch.arange(ids.shape[1], device=ids.device)
    return torch.cat([torch.arange(t) for t in lengths]).to(ids.device)


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

    def forward(self, x, lengths=None, mask=None):
        project, out = self.attention["self"], self.attention["output"]
        q, k, v = (project[name](x).unflatten(-1, (self.h, -1)) for name in ("query", "key", "value"))
        y = attend(q, k, v, lengths, mask, causal=False, dropout=self.p_attention * self.training)
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
        if lengths is None:
            real = ids != cfg.pad_token_id                                              # (b, t)
            positions, mask, first = real.cumsum(1) * real, real[:, None, None], (slice(None), 0)
        else:
            positions, mask = packed_positions(ids, lengths) + 1, None
            first = torch.tensor([0, *lengths[:-1]], device=ids.device).cumsum(0)   # where each <s> stands
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


# ------------------------------------------------------------------------------------ decoding

BATCH_TOKENS = 8192     # that one forward pass without gradient may see, pads and room for answers included
STOP_EVERY = 16         # new tokens between two looks whether a row is finished


def batches(sizes, budget=None):
    """Index lists, longest first (memory peaks in the first), each with count * longest <= budget."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while order:
        count = max(1, (budget or BATCH_TOKENS) // max(1, sizes[order[0]]))
        yield order[:count]
        order = order[count:]


def pick(logits, temperature=0.0, top_p=1.0):
    """Next tokens (b,) from logits (b, v): the likeliest, or drawn from the likeliest that hold top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0                            # the first is always kept
    return order.gather(-1, torch.multinomial(p, 1))[:, 0]


def pad_left(prompts, room, device):
    """ids (b, t) of prompts padded on the left, and real (b, t + room), False at the pads."""
    t = max(map(len, prompts))
    ids = torch.zeros(len(prompts), t, dtype=torch.long)
    real = torch.ones(len(prompts), t + room, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        pads = t - len(prompt)
        ids[row, pads:], real[row, :pads] = torch.tensor(prompt, dtype=torch.long), False
    return ids.to(device), real.to(device)


def generate_batch(model, prompts, max_new_tokens, eos, vocabulary, temperature, top_p, finished):
    """New tokens (b, up to max_new_tokens) of one batch; a row goes on past its end until all have one."""
    device, b, past, tokens = next(model.parameters()).device, len(prompts), 0, []
    ids, real = pad_left(prompts, max_new_tokens, device)
    cache = model.new_cache(b, real.shape[1])
    stop, stopped = torch.tensor(eos, device=device), torch.zeros(b, dtype=torch.bool, device=device)
    while len(tokens) < max_new_tokens and not stopped.all():
        now = past + ids.shape[1]
        last = torch.arange(1, b + 1, device=device) * ids.shape[1] - 1        # each row's newest token
        logits = model(ids, keep=last, real=real[:, :now], cache=cache, past=past)[:, :vocabulary]
        tokens.append(pick(logits, temperature, top_p))
        stopped |= torch.isin(tokens[-1], stop)
        if finished and len(tokens) % STOP_EVERY == 0:
            rows = torch.stack(tokens, 1).tolist()
            stopped |= torch.tensor([finished(row, ids) for row, ids in enumerate(rows)], device=device)
        ids, past = tokens[-1][:, None], now
    return torch.stack(tokens, 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, vocabulary=None, temperature=0.0, top_p=1.0,
             finished=None, each=None):
    """
    Continuations, without the EOS, of prompts (lists of ids) -> lists of ids; greedy, or sampled.

    Prompts of about one length share a batch, padded on the left; a row stops at any id of eos, or soon after
    finished(i, ids) says so. Logits past `vocabulary` are masked: embeddings are often padded beyond what the
    tokenizer can decode. each(i, ids) is told every row as soon as its batch is done.
    """
    out = [None] * len(prompts)
    for chosen in batches([len(p) + max_new_tokens for p in prompts]):
        done = finished and (lambda row, ids, chosen=chosen: finished(chosen[row], ids))
        tokens = generate_batch(model, [prompts[i] for i in chosen], max_new_tokens, eos, vocabulary,
                                temperature, top_p, done)
        for i, row in zip(chosen, tokens.tolist()):
            out[i] = row[:next((j for j, token in enumerate(row) if token in eos), None)]
            if each:
                each(i, out[i])
    return out
