"""
Several GPUs: the same command under torchrun, on one node, or on more that see the same disk.

    torchrun --nproc_per_node 8 train.py --method gfa --rank 8 --model DIR --task math --data DIR

Each process has the whole model, and does its share of every batch and of the rows to evaluate. Gradients are
summed in one all-reduce; from there on all do the same, to the bit, which is checked. The first one writes.
"""
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import runs


class Run(runs.Run):
    signal = 0      # the last all-reduce's, known to all; `asked` is this process's own

    def check(self):
        """Joins the others; who waits for one of them for half an hour ends with an error."""
        cuda = torch.cuda.is_available() and self.args.device != "cpu"
        self.gpu = [int(os.environ["LOCAL_RANK"])] if cuda else []
        torch.cuda.set_device(*self.gpu or [-1])        # what --device auto takes; -1: none
        if not dist.is_initialized():
            dist.init_process_group(timeout=timedelta(minutes=30))
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0
        if self.first:
            print(f"{self.n} processes, which share each batch's forward passes, and the rows to evaluate")
            return super().check()
        sys.stdout, tqdm.display = open(os.devnull, "w"), lambda *_, **__: None

    def claim(self, name, env):
        env["device"] = f"{self.n} x {env['device']}"
        found = [super().claim(name, env) if self.first else None]
        dist.broadcast_object_list(found)
        self.out, = found
        most = -(-self.args.batch_size // self.n)       # compared and written was what the command said
        self.args.micro_batch_size = min(self.args.micro_batch_size, most)
        return self.out

    def agree(self, model):
        """Waits for all. RuntimeError unless they have the same adapter, to the bit."""
        seal = checkpoint.seal(self.step, checkpoint.adapter_tensors(model))
        if len(set(self.share(lambda _: [seal], range(self.n)))) > 1:
            raise RuntimeError(f"step {self.step}: the processes' adapters differ")

    def backward(self, model, batch, micro_batch_size):
        """train.backward, of whose forward passes each process does its share; all have the sums."""
        count, share, total = sum(map(model.supervised, batch)), batch[self.rank::self.n], 0.0
        with torch.random.fork_rng(self.gpu):               # dropout differs; what a re-init draws must not
            torch.manual_seed(hash((self.args.seed, self.step, self.rank)))
            for i in range(0, max(1, len(share)), micro_batch_size):
                part = share[i:i + micro_batch_size]        # none: another's example, which does not count
                loss = model.losses(part or batch[:1]).sum() / count * bool(part)
                loss.backward()
                total += loss.item()
        sums = [p.grad for p in model.parameters() if p.grad is not None]
        # SpIEL's layers gather, in backward, gradients of what does not train.
        sums += [m.step_gradient for m in model.modules() if getattr(m, "step_gradient", None) is not None]
        sums.append(sums[0].new_tensor([total, bool(self.asked)]))
        flat = torch.cat([t.flatten() for t in sums])
        dist.all_reduce(flat)
        for t, part in zip(sums, flat.split([t.numel() for t in sums])):
            t.copy_(part.view_as(t))
        loss, asked = sums[-1].tolist()
        self.signal = (self.asked or signal.SIGTERM) if asked else 0
        return loss, sum(len(ids) for ids, _ in batch)

    def share(self, function, rows):
        """function(rows), a list of as many: each process does its share, and has all."""
        parts = [None] * self.n
        dist.all_gather_object(parts, function(rows[self.rank::self.n]))
        return [parts[i % self.n][i // self.n] for i in range(len(rows))]
