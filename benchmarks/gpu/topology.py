"""Prints how the GPUs of a machine are linked, and how quickly one copies into another. Needs torch alone."""

import itertools
import subprocess
import time

import torch

GIB = 1 << 30


def main() -> None:
    print(subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True).stdout)
    for one, other in itertools.permutations(range(torch.cuda.device_count()), 2):
        here = torch.empty(GIB, dtype=torch.uint8, device=f"cuda:{one}")
        there = torch.empty_like(here, device=f"cuda:{other}")
        there.copy_(here)  # the first copy also sets up the link
        torch.cuda.synchronize(one)
        began = time.perf_counter()
        there.copy_(here)
        torch.cuda.synchronize(one)
        seconds = time.perf_counter() - began
        reach = torch.cuda.can_device_access_peer(one, other)
        print(f"GPU {one} to {other}: peer access {reach}, 1 GiB in {seconds * 1000:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
