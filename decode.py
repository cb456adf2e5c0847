"""Passes without a gradient: batches that fit, and generation, greedy or sampled, whole or as it comes."""
import torch

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


def generate_batch(model, prompts, room, vocabulary, temperature, top_p, ended):
    """New tokens (lists) of one batch. Prompts are packed, and end together in a cache with pads before."""
    device, lengths = next(model.parameters()).device, [len(prompt) for prompt in prompts]
    ids, sizes = torch.tensor(sum(prompts, []), device=device), torch.tensor(lengths, device=device)
    past, rows, out = max(lengths), list(range(len(prompts))), [[] for _ in prompts]
    real = torch.arange(past + room, device=device) >= past - sizes[:, None]            # (b, s)
    cache = model.new_cache(*real.shape)
    logits = model(ids, lengths, sizes.cumsum(0) - 1, real[:, :past], cache)
    while True:
        tokens = pick(logits[:, :vocabulary], temperature, top_p)
        for row, token in zip(rows, tokens.tolist()):
            out[row].append(token)
        stay = [i for i, row in enumerate(rows) if not ended(row, out[row])]
        if not stay:
            return out
        if len(stay) < len(rows):               # the others leave the batch
            rows, tokens, real = [rows[i] for i in stay], tokens[stay], real[stay]
            for layer in cache:
                layer[:] = (held[stay] for held in layer)
        past += 1
        logits = model(tokens[:, None], real=real[:, :past], cache=cache, past=past - 1)[:, 0]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, vocabulary=None, temperature=0.0, top_p=1.0,
             finished=None, each=None):
    """
    Continuations, without the EOS, of prompts (lists of ids) -> lists of ids; greedy, or sampled. A row stops
    at any id of eos, or soon after finished(i, ids) says so. Logits past `vocabulary` are masked: embeddings
    are often padded. each(i, ids) is told every row as soon as its batch, of prompts of a length, is done.
    """
    out = [None] * len(prompts)
    for chosen in batches([len(p) + max_new_tokens for p in prompts]):
        def ended(row, ids, chosen=chosen):
            look = finished and len(ids) % STOP_EVERY == 0
            return ids[-1] in eos or len(ids) == max_new_tokens or look and finished(chosen[row], ids)

        some = [prompts[i] for i in chosen]
        new = generate_batch(model, some, max_new_tokens, vocabulary, temperature, top_p, ended)
        for i, row in zip(chosen, new):
            out[i] = row[:-1] if row[-1] in eos else row
            if each:
                each(i, out[i])
    return out


@torch.no_grad()
def stream(model, tokenizer, prompt, max_new_tokens, temperature=0.0, top_p=1.0):
    """Prints what follows a prompt (ids) as it comes, but no character before it is whole; ends the line."""
    room, told = min(max_new_tokens, (tokenizer.longest or 2**31) - len(prompt)), 0

    def ended(_, ids):
        nonlocal told
        closed = ids[-1] in tokenizer.eos
        over = closed or len(ids) == room
        words = tokenizer.continuation(prompt, ids[:len(ids) - closed])
        if over or not words.endswith("\ufffd"):        # stands for bytes whose character may yet be whole
            print(words[told:], end="\n" * over, flush=True)
            told = len(words)
        return over

    generate_batch(model, [prompt], room, tokenizer.size, temperature, top_p, ended)
