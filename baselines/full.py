"""
Full fine-tuning: every parameter of the model trains; what low-rank methods are measured against.

    W' = W + ΔW, with no constraint on ΔW

Weights are held in fp32 (a step of 2e-5 vanishes in a bf16 weight), so with AdamW a parameter costs
16 bytes: itself, its gradient and two moments. targets and rank are part of the contract and have
no meaning here; a target that no nn.Linear has is refused all the same, as a slip.
"""
import torch
import torch.nn as nn

DEFAULTS = {}
COMMON = {"lr": 2e-5}
TINY = {"lr": 1e-3}                     # on the bundled model
TRAINS_BASE_WEIGHTS = True      # the declared exception to "only lora_ tensors train"


def inject(model, targets, rank, alpha=None, dropout=0.0):
    """Unfreeze the model, in fp32 or wider. ValueError for an alpha, a dropout or a bad target."""
    if alpha is not None or dropout:
        raise ValueError("full fine-tuning has no alpha and no dropout: there is no adapter")
    linears = [f".{name}" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linears):
            raise ValueError(f"target {target!r} matches no nn.Linear of the model")
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    model.requires_grad_(True).to(dtype)


def merge(model):
    """Nothing to fold: the weights hold the update."""
    model.requires_grad_(False)
