"""A recorder of operators that plays the part of CUDA graphs where there is no GPU."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Positions of what an operator writes to although its schema does not say so: running statistics.
UNDECLARED = {torch.ops.aten.native_batch_norm.default: (3, 4)}


class _Tape(TorchDispatchMode):
    """Records every operator with its arguments, numbers as they are at that moment, and remembers what it writes
    to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.made, self.before = [], {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.item.default,
            torch.ops.aten.is_nonzero.default,
        ):
            raise RuntimeError("operation not permitted when stream is capturing")
        schema = func._schema
        for place, argument in enumerate(schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or place in UNDECLARED.get(func, ()):
                self._keep(args[place] if place < len(args) else kwargs.get(argument.name))
        out = func(*args, **kwargs)
        aliases = any(r.alias_info is not None for r in schema.returns)
        if not aliases:
            self.made |= {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.calls.append((func, args, kwargs, None if aliases else out))
        return out

    def _keep(self, value):
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and id(t) not in self.made:
                self.before.append((t, t.clone()))


class FakeRecorder:
    """Records on the CPU what a CUDA graph records on a GPU: operators on fixed memory, numbers as constants, nothing
    of Python. Recording leaves no trace in tensors that were there before. Reading a value on the host is an error, as
    on a GPU."""

    def __init__(self) -> None:
        self.asides, self.records, self.replays = 0, 0, 0

    def why_not(self, device):
        return None

    def aside(self, device):
        self.asides += 1
        return nullcontext()

    def record(self, device, run):
        self.records += 1
        with _Tape() as tape:
            outputs = run()
        with torch.no_grad():
            for t, value in reversed(tape.before):
                t.copy_(value)
            tree_map_only(Tensor, lambda t: t.detach().fill_(float("nan")) if t.is_floating_point() else t, outputs)

        def replay():
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, made in tape.calls:
                    found = func(*args, **kwargs)
                    if made is not None:
                        for t, value in zip(tree_leaves(made), tree_leaves(found), strict=True):
                            if isinstance(t, Tensor):
                                t.copy_(value)

        return replay, outputs
