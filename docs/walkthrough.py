"""
The four methods on one 8 x 8 weight: every tensor is printed as it comes to be, from the start over a
re-initialisation to the merge. To be run beside the papers, whole or cell by cell: python docs/walkthrough.py
"""
# %% A weight, and an update that we want
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cps_lora
import gfa
import glora
import gralora

torch.set_printoptions(precision=2, sci_mode=False, linewidth=100)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
W = torch.randn(8, 8)                                   # (out, in), as nn.Linear has it
wanted = torch.randn(2, 2)[torch.arange(8) % 2][:, torch.arange(8) // 4] + torch.randn(8, 8) / 4
x = torch.eye(8)                                        # then y - x Wᵀ is the update itself, transposed


goal = dict(w=W + wanted)


def show(what, T):
    T = T.detach()
    T = (100 * T).round() / 100 + 0.0 if T.is_floating_point() else T       # no -0.00
    print(f"\n{what}  {tuple(T.shape)}\n{T}")


def adapted(method, rank, **own):
    """A model of the one Linear `w`, with the method's layer around it; and an optimizer."""
    model = nn.ModuleDict(dict(w=nn.Linear(8, 8, bias=False)))
    model["w"].weight.data = W.clone()
    method.inject(model, ("w",), rank, **own)
    return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)


def train(method, model, optimizer, steps):
    off = lambda: sum((model[name](x) - x @ goal[name].T).square().sum() for name in goal)
    before = off().item()
    for t in range(1, steps + 1):
        optimizer.zero_grad()
        off().backward()
        if hasattr(method, "observe"):
            method.observe(model, t, steps)             # G-LoRA reads the gradients
        optimizer.step()
    print(f"\n{steps} steps: squared distance to what we want {before:.2f} -> {off():.2f}")


def merged(method, model):
    """Merge, and say what became of the function and of the module."""
    before = model["w"](x)
    method.merge(model)
    print(f"\nmerged: {model['w']}, the function moved by {(model['w'](x) - before).abs().max():.1g}")


show("W, pretrained and frozen", W)
show("the update that we want", wanted)
show("its singular values", torch.linalg.svdvals(wanted))

# %% GraLoRA: a grid of 2 x 2 blocks, each with a pair of rank r/k = 2
print("\n\n==== GraLoRA, rank 4, k = 2, s = α/r = 2")
model, optimizer = adapted(gralora, rank=4, k=2)
layer = model["w"]
show("A: row j p + .. belongs to output block j, columns n i/k + .. to input block n (Eq. 5)", layer.lora_A)
show("B: rows to output block j, column n p + .. to input block n; 0, so ΔW is 0", layer.lora_B)
show("A_11 of the paper, (N/k, r/k): transposed here", layer.lora_A[:2, :4].T)

# %%
train(gralora, model, optimizer, 200)
A, B = layer.factors()
show("A as one sparse factor, k r rows (Fig. 5)", A)
show("B as one sparse factor, k r columns, with s", B)
show("ΔW = their product", layer.delta())
block = layer.scaling * layer.lora_B[:4, 2:] @ layer.lora_A[:2, 4:]
show("its upper right block, s B_12 A_12ᵀ", block)
assert torch.allclose(block, layer.delta()[:4, 4:])
print("\nrank of the block", torch.linalg.matrix_rank(block).item(),
      "and of ΔW", torch.linalg.matrix_rank(layer.delta()).item(), "= k r (Eq. 6); LoRA's would be 4")
merged(gralora, model)

# %% CPS-LoRA: the same grid, on clusters of rows and columns that move
print("\n\n==== CPS-LoRA, rank 4, k = 2")
model, optimizer = adapted(cps_lora, rank=4, k=2)
layer = model["w"]
show("cluster I of each input feature, random at first (Alg. 1, line 1)", layer.lora_rows)
show("cluster J of each output feature", layer.lora_columns)
show("A, uniform within 1/√4: a cluster's size is the fan-in", layer.lora_A)
show("B", layer.lora_B)

# %%
train(cps_lora, model, optimizer, 100)
show("ΔW of the first stage (Eq. 11)", layer.delta())
order = layer.lora_columns.argsort(stable=True), layer.lora_rows.argsort(stable=True)
show("the same in the order π_c, π_r of the clusters: blocks (Eq. 10)", layer.delta()[order[0]][:, order[1]])

# %% Re-clustering, from the factors alone (App. E)
A, B = layer.expanded()                                 # ΔW = B A; the paper's is its transpose, Aᵀ Bᵀ
norms = (A.T @ (B.T @ B) * A.T).sum(1).sqrt()
show("norms of the paper's rows of ΔW, our columns", norms)
longest = A.T[norms.argmax()]
show("their cosines with the longest one", A.T @ (B.T @ B) @ longest / norms / norms.max())
before = model["w"](x)
cps_lora.reinit(model, optimizer)                       # lines 4 - 8
show("cluster I of each input feature: the lower half of the cosines, and the upper", layer.lora_rows)
show("cluster J of each output feature", layer.lora_columns)
show("A, drawn anew", layer.lora_A)
show("B, 0 again", layer.lora_B)
show("A of the ended stage stays, expanded", layer.lora_merged_A)
print(f"\nthe re-init moved the function by {(model['w'](x) - before).abs().max():.1g}")

# %%
train(cps_lora, model, optimizer, 100)
order = layer.lora_columns.argsort(stable=True), layer.lora_rows.argsort(stable=True)
show("ΔW of both stages, in the order of the new clusters", layer.delta()[order[0]][:, order[1]])
merged(cps_lora, model)

# %% G-LoRA: one adapter for the whole weight, one for a region that shrinks
print("\n\n==== G-LoRA, rank 4, ratio 3:1, so r_g = 3 and r_l = 1")
show("singular values of W (Eq. 4)", torch.linalg.svdvals(W))
model, optimizer = adapted(glora, rank=4)
layer = model["w"]
show("G_A, from the three smallest (Eq. 5)", layer.lora_global_A)
show("G_B", layer.lora_global_B)
show("L_A, from the largest", layer.lora_local_A)
show("L_B", layer.lora_local_B)
show("W_res, what they leave", layer.base.weight)
show("its singular values: three and one are 0", torch.linalg.svdvals(layer.base.weight))
print(f"\nW_res + G + L is W within {(layer.base.weight + layer.delta() - W).abs().max():.1g}")

# %%
train(glora, model, optimizer, 100)
show("I_A summed over the steps: |L_A ⊙ gradient| (Eq. 9)", layer.scores[0])
show("I_B", layer.scores[1].T)
rows, columns = (glora.most_important(score, dim) for dim, score in enumerate(layer.scores))
show("the half of the inputs that mattered most (Eq. 10)", rows)
show("the half of the outputs", columns)

# %% The next stage
before, local = model["w"](x), layer.lora_local_B @ layer.lora_local_A
region = (layer.base.weight + local)[columns][:, rows]
show("the region of W_res + L (Eqs. 11, 12)", region)
show("its singular values, of which 2 r_l = 2 would be taken (Eq. 13)", torch.linalg.svdvals(region))
print("\na pair of rank 2 costs 2 (4 + 4) = 16 numbers, the region has 16: dense is", glora.is_dense(2, 4, 4))
print("so here the region gets one block of its own, and shrinks no further (§3.2.2)")
glora.reinit(model, optimizer)
assert layer.lora_rows.equal(rows) and layer.lora_columns.equal(columns)
show("the dense block, 0 at first", layer.lora_local_B)
show("W_res, which keeps what L was", layer.base.weight)
print(f"\nthe re-init moved the function by {(model['w'](x) - before).abs().max():.1g}")

# %%
train(glora, model, optimizer, 100)
show("the dense block", layer.lora_local_B)
A, B = layer.total()
show("the update against the pretrained weight, all stages", B @ A)
merged(glora, model)

# %% GFA: one pair for all weights. Of one square weight it is LoRA, so there is a second one here, 4 x 8
print("\n\n==== GFA, rank 2, weights of 8 x 8 and 4 x 8")
model = nn.ModuleDict(dict(w=nn.Linear(8, 8, bias=False), v=nn.Linear(8, 4, bias=False)))
model["w"].weight.data = W.clone()
goal["v"] = model["v"].weight.detach() + wanted[:4]     # v wants what w's first rows want
gfa.inject(model, ("w", "v"), rank=2)
optimizer = torch.optim.Adam(model.adapter.parameters(), lr=0.02)
d, (m, k) = 8 * 8 + 4 * 8, gfa.fold(8 * 8 + 4 * 8)
print(f"\nd = {d}, k = ⌊√d⌋ = {k}, m = ⌈d/k⌉ = {m}, padding {m * k - d} (Steps 1, 2)")
show("A, normal with σ = 0.02 (Step 3)", model.adapter.lora_A)
show("B, 0", model.adapter.lora_B)
for name in "wv":
    layer = model[name]
    print(f"\n{name} is in rows {layer.first} to {layer.last - 1} of M, from column {layer.offset} on")

# %%
train(gfa, model, optimizer, 200)
M = model.adapter.lora_B @ model.adapter.lora_A
show("M = B A, never formed in training", M)
show("w's slice of it, the first 64 entries, in rows of 8 (Step 4)", model["w"].delta())
show("v's slice of it", model["v"].delta())
assert torch.equal(M.flatten()[:64].view(8, 8), model["w"].delta())
print("\nrank of M", torch.linalg.matrix_rank(M).item(), "and of w's slice",
      torch.linalg.matrix_rank(model["w"].delta()).item())
merged(gfa, model)
