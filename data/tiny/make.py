"""
Makes the bundled model: a LLaMA of 0.7M parameters, pretrained on data/arithmetic.py's one-step problems.

    python data/tiny/make.py OUT_DIR         # about 8 minutes on 2 cores

It is judged by what it can do, which is printed at the end: one-step problems, and hardly any two-step ones.
The tokenizer is a byte-level BPE trained on such problems, with digits apart; the prompt template's two fixed
parts are one token each, so the template costs the small model next to nothing.
"""
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import checkpoint
from data import arithmetic, text
from decode import generate
from model import pack

STEPS, BATCH, LR, WARMUP = 2000, 64, 3e-3, 100
LEADS = ("", "", "Let us see. ", "We count. ", "First we write it down: ", "So ")   # no fixed place for a sum
CONFIG = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=128,
              intermediate_size=320, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
              initializer_range=0.02, bos_token_id=None, eos_token_id=0, torch_dtype="bfloat16")


def make_tokenizer(rows):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    before, after = text.PROMPT.split("{instruction}")
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [words for row in rows for words in (row["instruction"], row["output"], *LEADS)]
    tok.train_from_iterator(texts, trainer)
    tok.add_tokens([AddedToken(before, normalized=False), AddedToken(after, normalized=False)])
    return tok


def accuracy(model, tok, split, steps):
    rows = arithmetic.generate(split, 256, steps, seed=1)
    prompts = [text.prompt_ids(tok, row) for row in rows]
    outputs = generate(model, prompts, arithmetic.MAX_NEW_TOKENS, tok.eos, tok.size)
    return arithmetic.score([tok.decode(ids) for ids in outputs], rows)["accuracy"]


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # Numbers are half spelled out, half digits: so the sum is done on the digits that the answer writes, not
    # on the story's, and a second sum can be. Each problem is seen twice.
    rows = arithmetic.generate("train", STEPS * BATCH // 2, steps=1, seed=0, words=0.5)
    make_tokenizer(rows[:4000]).save(str(out / "tokenizer.json"))
    vocabulary = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size()
    config = dict(CONFIG, vocab_size=-(-vocabulary // 8) * 8)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = checkpoint.build(json.loads((out / "config.json").read_text()))
    tok = text.Tokenizer(out, model.cfg)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, 0, CONFIG["initializer_range"])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {vocabulary} tokens", flush=True)

    examples, leads = [], random.Random(0)
    for row in rows:
        prompt, answer = text.prompt_ids(tok, row), leads.choice(LEADS) + row["output"]
        examples.append((prompt + tok.encode(answer) + tok.eos[:1], len(prompt)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARMUP, max(0.0, (STEPS - s) / (STEPS - WARMUP))))
    for step in range(STEPS):
        if step % (len(examples) // BATCH) == 0:
            order = torch.randperm(len(examples)).tolist()
        batch = [examples[order[(step * BATCH + j) % len(examples)]] for j in range(BATCH)]
        ids, lengths, keep, labels = pack(batch, "cpu")
        loss = F.cross_entropy(model(ids, lengths, keep), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}  loss {loss:.4f}", flush=True)
    model.to(torch.bfloat16).float()                       # judge what is written
    print(f"one step {accuracy(model, tok, 'train', 1):.1%}, with sums never seen "
          f"{accuracy(model, tok, 'test', 1):.1%}; two steps {accuracy(model, tok, 'test', 2):.1%}")
    weights = {key: t.to(torch.bfloat16) for key, t in model.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else sys.exit(__doc__)
