"""
What a Hugging Face config.json says of a model, old dialect or new, as the models here read it.
"""
from types import SimpleNamespace

from model import TARGETS, CausalLM, RobertaClassifier


def rope_parameters(c):
    """
    {rope_type, rope_theta, ...} from either spelling: rope_theta + rope_scaling, or transformers 5's
    rope_parameters. A theta of 10000 is assumed for LLaMA 1 and 2 alone, whose files state none.
    """
    scaling = c.get("rope_scaling") or {}
    rope = {"rope_theta": c.get("rope_theta"), **scaling, **(c.get("rope_parameters") or {})}
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope["rope_theta"] is None and c["model_type"] == "llama" and "rope_parameters" not in c:
        rope["rope_theta"] = 10000.0
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope type {kind!r}, expected default or llama3")
    needed = ["rope_theta"]
    if kind == "llama3":
        needed += ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    if absent := [key for key in needed if rope.get(key) is None]:
        raise ValueError(f"rotary embedding without {', '.join(absent)}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError("rotary embedding with low_freq_factor not below high_freq_factor")
    return rope


def read_config(c, num_labels=None):
    """
    The object of a config.json, as a namespace with every field that the models read. num_labels: how many a
    classifier has, or their names. ValueError on a model type, activation, rope type or attention pattern
    that is not implemented here, and where sizes do not fit one another.
    """
    kind = c.get("model_type")
    if kind not in TARGETS:
        raise ValueError(f"model_type {kind!r}, expected one of {', '.join(TARGETS)}")
    expected = "gelu" if kind == "roberta" else "silu"
    if (act := c.get("hidden_act", expected)) != expected:
        raise ValueError(f"hidden_act {act!r}, expected {expected!r} for {kind}")
    needed = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
    needed += ["max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob",
               "attention_probs_dropout_prob", "pad_token_id"] if kind == "roberta" else ["rms_norm_eps"]
    if absent := [name for name in needed if c.get(name) is None]:
        raise ValueError(f"no {absent[0]!r} for model_type {kind!r}")
    cfg, d, heads = SimpleNamespace(**c), c["hidden_size"], c["num_attention_heads"]
    cfg.num_key_value_heads = c.get("num_key_value_heads") or heads
    cfg.head_dim, cfg.num_labels = c.get("head_dim") or d // heads, None
    if heads % cfg.num_key_value_heads or not c.get("head_dim") and d % heads:
        raise ValueError(f"hidden_size {d}, {heads} heads, {cfg.num_key_value_heads} of keys: no multiples")
    eos = c.get("eos_token_id") or 0
    if (last := max(eos, default=0) if isinstance(eos, list) else eos) >= c["vocab_size"]:
        raise ValueError(f"eos_token_id {last}, vocab_size is {c['vocab_size']}")
    if kind == "roberta":
        cfg.labels = num_labels if isinstance(num_labels, (list, tuple)) else None
        check_labels(c, cfg.labels or ())
        cfg.num_labels = len(cfg.labels or ()) or num_labels or len(own_labels(c))
        if not 0 <= c["pad_token_id"] < min(c["vocab_size"], c["max_position_embeddings"] - 1):
            raise ValueError(f"pad_token_id {c['pad_token_id']} is no token or leaves no position")
        if c.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"position_embedding_type {c['position_embedding_type']!r}, expected 'absolute'")
        return cfg
    if c.get("use_sliding_window") or set(c.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("sliding-window attention is not implemented")
    if cfg.head_dim % 2:
        raise ValueError(f"head_dim {cfg.head_dim}, which rotary embeddings need even")
    cfg.o_bias = bool(c.get("attention_bias")) and kind != "qwen2"
    cfg.qkv_bias = bool(c.get("attention_bias")) or kind == "qwen2"     # whose files do not mention it
    cfg.mlp_bias, cfg.qk_norm = bool(c.get("mlp_bias")), kind == "qwen3"
    cfg.tie_word_embeddings = bool(c.get("tie_word_embeddings"))
    cfg.rope = rope_parameters(c)
    return cfg


def own_labels(c):
    """The names of a config.json's labels, in the head's order."""
    named = {str(i): name for i, name in (c.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}).items()}
    if absent := [i for i in range(len(named)) if str(i) not in named]:
        raise ValueError(f"id2label has no {absent[0]}, but {', '.join(named)}")
    return [named[str(i)] for i in range(len(named))]


def check_labels(c, names):
    """ValueError where a config.json has these labels in another order; case does not matter."""
    own, theirs = ([name.casefold() for name in some] for some in (own_labels(c), names))
    if own != theirs and sorted(own) == sorted(theirs):
        raise ValueError(f"id2label is {', '.join(own)}, the task's labels are {', '.join(theirs)}: "
                         "a head for these has another order")


def build(c, num_labels=None):
    """The model that a config.json's object describes, with random weights."""
    cfg = read_config(c, num_labels)
    return RobertaClassifier(cfg) if cfg.model_type == "roberta" else CausalLM(cfg)
