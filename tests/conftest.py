"""Shared paths, and what the tests do where ../shared or a real model is not there."""
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser):
    parser.addoption("--seed-shift", type=int, default=0, metavar="N",
                     help="add N to every seed given to torch: a bound for one draw only turns red")


def pytest_configure(config):
    if shift := config.getoption("--seed-shift"):
        seeded = torch.manual_seed
        torch.manual_seed = lambda seed: seeded(seed + shift)


def needed(path, what):
    """path if it exists; else skip, or fail where NO_SKIPS is set (as .ci/run sets it)."""
    if path is None or not Path(path).exists():
        (pytest.fail if os.environ.get("NO_SKIPS") else pytest.skip)(f"{what} is not here: {path}")
    return Path(path)


@pytest.fixture(scope="session")
def shared_data():
    return needed(ROOT.parent / "shared" / "data", "the shared data")


@pytest.fixture(scope="session")
def smollm2():
    """A directory with SmolLM2-135M-Instruct, named by the environment variable SMOLLM2."""
    return needed(os.environ.get("SMOLLM2"), "SmolLM2 (variable SMOLLM2)")


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """Processes that run train.py, forked from one that has torch loaded."""
    from test_resume import Forks
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.server.stdin.close()
    forks.server.wait()


@pytest.fixture(scope="session")
def tiny():
    return ROOT / "data" / "tiny"


def decoder(kind, hidden, inter, layers, heads, kv, vocab, head_dim=None):
    return dict(model_type=kind, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
                head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab,
                rms_norm_eps=1e-5, rope_theta=1e4)


PUBLISHED = {   # shapes of released models, as their config.json has them
    "LLaMA2-7B": decoder("llama", 4096, 11008, 32, 32, 32, 32000),
    "LLaMA2-13B": decoder("llama", 5120, 13824, 40, 40, 40, 32000),
    "LLaMA3-8B": decoder("llama", 4096, 14336, 32, 32, 8, 128256),
    "LLaMA-3.2-3B": decoder("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128),
    "Qwen2.5-1.5B": decoder("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "Qwen2.5-3B": decoder("qwen2", 2048, 11008, 36, 16, 2, 151936),
    "RoBERTa-large": dict(model_type="roberta", hidden_size=1024, intermediate_size=4096, vocab_size=50265,
                          num_hidden_layers=24, num_attention_heads=16, max_position_embeddings=514,
                          type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
                          hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
}


def trainable(method, published, targets, rank, **own):
    """Trainable parameters of a method on a published model: on the meta device, so it takes no memory."""
    import checkpoint
    import model as M
    with torch.device("meta"):
        net = checkpoint.build(PUBLISHED[published])
    checkpoint.load_method(method).inject(net, M.targets_of(net, targets), rank, **own)
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
