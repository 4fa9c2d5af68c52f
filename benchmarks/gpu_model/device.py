"""What the model takes a GPU for: an NVIDIA H200, with the rates that kernels reach rather than those of its sheet."""

from __future__ import annotations

import math
from typing import NamedTuple

MULTIPROCESSORS = 132
CLOCK = 1.7e9  # under load
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 * 1024  # of a multiprocessor
SHARED_OF_DRIVER = 1024  # that every block takes beside its own
SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp each in a cycle

MEMORY = 4.3e12  # bytes/s of a copy; the sheet says 4.8e12
L2 = 6.0e12  # bytes/s
L2_HOLDS = 30e6  # bytes that a kernel finds where the one before it left them
WGMMA, MMA_SYNC = 700e12, 450e12  # operations/s in 16 bits; the sheet says 990e12
FLOAT32 = 60e12  # operations/s of cuBLAS and cuDNN without tensor cores

MEMORY_LATENCY, L2_LATENCY = 850, 300  # cycles
ISSUED_BY_A_WARP = 0.18  # instructions a cycle between two waits
ISSUED_AT_MOST = 0.7  # of a scheduler's cycles
FOURTH_OF_RATE = 4  # cycles that exponentials and the like keep a scheduler's unit busy, beyond their own

START = 2.0e-6  # s on the GPU from one launch of a stream to the next, where nothing else takes longer
START_IN_GRAPH = 1.3e-6

# s of the CPU for a launch and its share of what is around it: dispatch, autograd, outputs and workspaces, a launcher's
# arithmetic. An op of PyTorch under autocast and autograd (4.6 us without a GPU, and some 2 of the driver); an op of
# csrc/cuda; a kernel of compiled code. Of Triton, over the 230 launches of a training step of v3-S (18 arguments, 9 of
# them tensors), measured with a driver that does nothing: dispatch 2.9 us, the launcher 13.5, finding the kernel 2.5,
# Triton's start of it 1.6; the driver's cuLaunchKernelEx and cuPointerGetAttribute, 2.1, are guesses.
CPU = {"triton": 22.6e-6, "cuda": 8e-6, "aten": 6e-6, "compiled": 5e-6}


class Occupancy(NamedTuple):
    blocks: int  # of a multiprocessor at once
    limit: str  # what allows no more


def occupancy(registers: int, warps: int, shared: int) -> Occupancy:
    """Blocks that share a multiprocessor: `registers` of a thread, `warps` and bytes of shared memory of a block."""
    of_warp = math.ceil(max(registers, 1) / 8) * 8 * 32
    limits = {
        "registers": REGISTERS // (of_warp * warps),
        "threads": THREADS // (32 * warps),
        "blocks": BLOCKS,
        "shared memory": SHARED // (shared + SHARED_OF_DRIVER),
    }
    limit = min(limits, key=limits.get)
    return Occupancy(max(limits[limit], 1), limit)
