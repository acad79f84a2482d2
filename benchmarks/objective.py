"""What the divergence of N answer tokens and its gradient cost at the head, over a vocabulary of 151,936: memory above the hidden states, and time.

    python benchmarks/objective.py [--device cpu|cuda] [--tokens 128,512,2048] [--student 64] [--teacher 96]

Ours (masters.distill.token_stats: divergence, log-probability, KL to nothing, entropy), TRL's ChunkedDivergenceFunction (divergence and entropy) and
the plain formula under autograd, each in a process of its own. Losses must agree. The plain one is left out beyond 512 tokens on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor
from train_step import MIB, VOCABULARY, machine, settle, status

CONTENDERS = ("ours", "trl", "plain")


def mean_jsd(name: str, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    if name == "ours":
        from masters.distill.token_stats import token_stats

        return token_stats(
            (student, head), (teacher, teacher_head), (None, None), torch.zeros(len(student), dtype=torch.long, device=head.device), "jsd", "k3"
        )[0].mean()
    if name == "trl":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        found: Tensor = ChunkedDivergenceFunction.apply(student, head, None, teacher, teacher_head, None, 0.5)[0].mean()
        return found
    s, t = (torch.log_softmax((states @ matrix.T).float(), -1) for states, matrix in ((student, head), (teacher, teacher_head)))
    mixture = torch.logaddexp(s, t) - torch.log(torch.tensor(2.0))
    return 0.5 * ((t.exp() * (t - mixture)).sum(-1) + (s.exp() * (s - mixture)).sum(-1)).mean()


def measure(name: str, tokens: int, widths: tuple[int, int], device: torch.device) -> dict[str, Any]:
    random, kind = torch.Generator().manual_seed(0), torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random) / shape[-1] ** 0.25).to(device, kind)

    inputs = [normal(n, width) for width in widths for n in (tokens, VOCABULARY)]
    trained = [t.requires_grad_() for t in inputs[:2]]
    mean_jsd(name, *(t[:4] for t in inputs)).backward()  # imports and compilation
    for t in trained:
        t.grad = torch.zeros_like(t)
    before, wall, cpu = settle(device), time.perf_counter(), time.process_time()
    value = mean_jsd(name, *inputs)
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - wall, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")
    return dict(loss=float(value.detach()), above=(peak - before) / MIB, seconds=seconds, processor=processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", default="128,512,2048")
    parser.add_argument("--student", type=int, default=64, help="hidden size")
    parser.add_argument("--teacher", type=int, default=96, help="hidden size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.one[0], int(options.one[1]), (options.student, options.teacher), torch.device(options.device))))
        return
    print(f"{machine(options.device)}; hidden sizes {options.student} and {options.teacher}, {options.threads} thread(s)\n")
    print("| tokens | | MiB above the inputs | seconds | processor s |\n|---|---|---|---|---|")
    for tokens in map(int, options.tokens.split(",")):
        losses = []
        for name in CONTENDERS[: 2 if tokens > 512 and options.device == "cpu" else 3]:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name, str(tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
            found = json.loads(done.stdout.splitlines()[-1])
            losses.append(found["loss"])
            print(f"| {tokens:,} | {name} | {found['above']:,.0f} | {found['seconds']:.2f} | {found['processor']:.2f} |", flush=True)
        if max(losses) - min(losses) > (1e-5 if options.device == "cpu" else 1e-3) * max(losses):
            sys.exit(f"the losses differ: {losses}")


if __name__ == "__main__":
    main()
