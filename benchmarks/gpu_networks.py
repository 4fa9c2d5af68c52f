"""Whole networks on a GPU: images per second, peak memory and error of each way to run them; what training keeps."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.common import Report, Row, Run, elapsed, interleaved_bursts, peak_gpu_memory, saved_bytes
from mvit3.bench.plain import plain, plain_dense
from mvit3_kernels.tasks import Targets, assign, segmentation_loss, ssd_loss

Build = Callable[[], nn.Module]
Evidence = dict[str, Tensor]  # what a candidate computes, by name
BOXES = 8  # of an image, in a training step of detection


class Task(NamedTuple):
    """A network and what it is trained for.

    `ours` and `plain` make the same network, of our ops and of plain modules. `loss` takes a network's outputs and the
    target that `target` makes for images; `shown` of outputs and loss is what candidates are compared by.
    """

    ours: Build
    plain: Build
    side: int
    target: Callable[[Tensor], Tensor]
    loss: Callable[[Any, Tensor], Tensor]
    shown: Callable[[Any, Tensor], Tensor] = lambda outputs, loss: loss


class SmallLogits(nn.Module):
    """A segmentation network whose loss reads the logits before they are up-sampled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network.small_logits(x)


def task_of(name: str) -> Task:
    """Classification, segmentation or detection, by the name of the network, at the size of the published recipes."""
    classes = 21 if name.startswith(("deeplabv3", "pspnet")) else 81 if name.startswith("ssdlite") else 1000

    def ours() -> nn.Module:
        torch.manual_seed(0)
        # Dropout off: candidates then compute the same function. It would cost the peers more than ours.
        return mvit3_kernels.create_model(name, num_classes=classes, drop_rate=0.0, proj_drop_rate=0.0)

    if classes == 1000:
        targets = lambda x: torch.arange(len(x), device=x.device) % 1000  # noqa: E731
        return Task(ours, lambda: plain(ours()), 256, targets, _cross_entropy, lambda logits, loss: logits)
    if classes == 81:
        return Task(ours, lambda: plain_dense(ours()), 320, lambda x: _assigned(name, x), _ssd_loss)
    align = ours().align_corners

    def labels(x: Tensor) -> Tensor:
        return torch.randint(classes, (len(x), *x.shape[2:]), device=x.device)

    def loss(outputs: Any, target: Tensor) -> Tensor:
        if isinstance(outputs, Tensor):  # the plain peer's, as large as the images
            return F.cross_entropy(outputs.float(), target)
        return segmentation_loss(outputs, target, align_corners=align)

    return Task(lambda: SmallLogits(ours()), lambda: plain_dense(ours()), 512, labels, loss)


def _assigned(name: str, x: Tensor) -> Tensor:
    """What the anchors of a detector learn of images: label and offsets, (B, N, 5)."""
    anchors = mvit3_kernels.create_model(name, num_classes=81).anchors(tuple(x.shape[2:])).to(x.device)
    low = 0.7 * torch.rand(len(x), BOXES, 2, device=x.device)
    boxes = torch.cat((low, low + 0.05 + 0.25 * torch.rand(low.shape, device=x.device)), -1)
    targets = assign(list(boxes), list(torch.randint(1, 81, (len(x), BOXES), device=x.device)), anchors)
    return torch.cat((targets.labels[..., None].float(), targets.offsets), -1)


def _ssd_loss(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    scores, offsets = outputs
    return ssd_loss(scores.float(), offsets.float(), Targets(target[..., 0].long(), target[..., 1:]))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def _host(name: str) -> Build | None:
    """Timm's network of that name, if it has one."""
    with contextlib.suppress(ImportError):
        import timm

        if timm.is_model(name):

            def theirs() -> nn.Module:
                torch.manual_seed(0)
                return timm.create_model(name, num_classes=1000)

            return theirs
    return None


class Variant(NamedTuple):
    """A way to run a network; the names that begin with "ours" are our network, the others its plain peer."""

    name: str
    channels_last: bool
    mode: str | None = None  # of torch.compile
    graph: bool = False


VARIANTS = (
    Variant("eager_nchw", False),
    Variant("eager_channels_last", True),
    Variant("ours", True),
    Variant("ours_graph", True, graph=True),
    Variant("compile", True, "default"),
    Variant("ours_compile", True, "default"),
    Variant("max_autotune", True, "max-autotune"),
)
# At batch 1 a CUDA graph on both sides.
PEER_GRAPHS = (Variant("eager_graph", True, graph=True), Variant("compile_graph", True, "default", graph=True))


class Candidate:
    """A network, its input and one step: forward, or forward, backward and AdamW."""

    def __init__(
        self, build: Build, task: Task, variant: Variant, x: Tensor, target: Tensor, options: argparse.Namespace
    ) -> None:
        self.training, self.device, self.task = options.piece == "train", options.device, task
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model = build().to(options.device, memory_format=layout).train(self.training)
        self.x, self.target = x.contiguous(memory_format=layout), target
        self.run = self.model
        if variant.mode is not None:
            settings = (
                {"backend": "eager"} if options.tiny else {"mode": None if variant.mode == "default" else variant.mode}
            )
            self.run = torch.compile(self.model, dynamic=False, **settings)
        if self.training:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.graph = None
        if variant.graph and self.training:
            self.graph = mvit3_kernels.cuda_graph_step(self.run, task.loss, self.optimizer, autocast=torch.bfloat16)
        elif variant.graph:
            self.graph = mvit3_kernels.cuda_graph(self.run, autocast=torch.bfloat16)

    def forward(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
            return self.run(self.x)

    def step(self) -> None:
        if self.graph is not None:
            self.graph(*((self.x, self.target) if self.training else (self.x,)))
            return
        if not self.training:
            with torch.inference_mode():
                self.forward()
            return
        self.task.loss(self.forward(), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evidence(self, dtype: torch.dtype = torch.bfloat16) -> Evidence:
        """What candidates are compared by: the logits or, in training of dense networks, the loss; and in training the
        loss and the gradients of all parameters. A graph shows what its replay gives."""
        if not self.training:
            with torch.inference_mode():
                shown = self.graph(self.x) if self.graph is not None else self.forward(dtype)
                return {"shown": shown.float().clone()}
        if self.graph is not None:
            return self._of_replay()
        outputs = self.forward(dtype)
        loss = self.task.loss(outputs, self.target)
        loss.backward()
        found = {"loss": loss.detach().float(), "shown": self.task.shown(outputs, loss).detach().float()}
        found |= self._gradients()
        self.optimizer.zero_grad()
        return found

    def _of_replay(self) -> Evidence:
        """Loss and gradients of the first replay, with learning rates of 0, so that the steps before it change no
        parameter."""
        groups = self.optimizer.param_groups
        rates = [float(group["lr"]) for group in groups]
        for group in groups:
            group["lr"] = 0.0
        for _ in range(self.graph.warmup + 1):
            loss = self.graph(self.x, self.target)
        found = {"loss": loss.float(), **self._gradients()}
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        return found

    def _gradients(self) -> Evidence:
        return {name: p.grad.float().clone() for name, p in enumerated(self.model)}


def enumerated(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their position: a network and its plain peer call them differently, in one order."""
    return ((f"gradient {i}", p) for i, p in enumerate(model.parameters()))


def errors(found: Evidence, exact: Evidence) -> dict[str, float]:
    """The relative error of each tensor, and of all of them as one vector. A gradient of hardly any size is measured
    by a thousandth of that of the others; by all of it where it is zero but for rounding, as that of a bias in front of
    a norm: in half precision its noise is as large as chance has it, and has no ratio to another candidate's."""
    exact = {name: exact[name].flatten() for name in found}
    apart = {name: float((t.flatten() - exact[name]).norm()) for name, t in found.items()}
    gradients = [t for name, t in exact.items() if name.startswith("gradient")]
    usual = float(torch.cat(gradients).square().mean().sqrt()) if gradients else 0.0

    def size(name: str, t: Tensor) -> float:
        norm, others = float(t.norm()), usual * t.numel() ** 0.5 if name.startswith("gradient") else 0.0
        return max(norm, (1.0 if norm < 1e-4 * others else 1e-3) * others, 1e-30)

    sizes = {name: size(name, t) for name, t in exact.items()}
    whole = sum(a * a for a in apart.values()) ** 0.5 / sum(s * s for s in sizes.values()) ** 0.5
    return {"all": whole, **{name: a / sizes[name] for name, a in apart.items()}}


def wrong(found: Mapping[str, float], eager: Mapping[str, float]) -> list[str]:
    """The tensors whose error is beyond rounding. The compiled peers round in other places than eager does; three times
    its distance from float32, that of the tensor or of all of them, is a wrong result."""
    return [
        name
        for name, error in found.items()
        if not error <= 3 * max(eager.get(name, 0.0), eager["all"]) + 1e-3  # NaN is wrong too
    ]


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Inside, float32 is float32: in convolutions it is TF32 by default."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def networks(options: argparse.Namespace, report: Report) -> None:
    """Whole networks in bf16, at 256x256 or, dense ones, at the size of their recipes: images per second, peak memory
    and error of each candidate against float32 eager."""
    task, host = task_of(options.model), _host(options.model)
    if options.piece == "infer" and task.loss is not _cross_entropy:
        raise SystemExit(f"networks of dense prediction are measured in training alone, got infer of {options.model}")
    side = task.side // 4 if options.tiny else task.side
    for batch in options.batches:
        x = torch.randn(batch, 3, side, side, device=options.device)
        hosts = {"plain": None} | ({"timm": host} if host else {})
        for name in hosts if options.host is None else [options.host] if options.host in hosts else []:
            torch._dynamo.reset()
            _time_network(task, hosts[name], name, x, options, report)


def _chosen(batch: int, options: argparse.Namespace) -> Iterator[Variant]:
    """The variants that are asked for and that the device can run."""
    graphs = PEER_GRAPHS if batch == 1 and options.piece == "infer" else ()
    for variant in (*VARIANTS, *graphs):
        wanted = not options.candidates or variant.name in options.candidates
        if wanted and not (variant.graph and options.device == "cpu"):
            yield variant


def _time_network(
    task: Task, host: Build | None, name: str, x: Tensor, options: argparse.Namespace, report: Report
) -> None:
    """Our network beside its peer: the same in plain modules, or the network of another library, the host."""
    batch, prefix = len(x), "" if host is None else f"{name}_"
    peer, target = host or task.plain, task.target(x)
    torch.backends.cudnn.benchmark = True  # the best that eager and compiled convolutions can do
    with no_tf32():
        exact = {  # of ours too by plain modules
            of: Candidate(make, task, Variant("exact", True), x, target, options).evidence(torch.float32)
            for of, make in {"peer": peer, "ours": task.plain}.items()
        }
    apart: dict[str, dict[str, float]] = {}
    steps: dict[str, Run] = {}
    rows: dict[str, Row] = {}
    for variant in _chosen(batch, options):
        is_ours = variant.name.startswith("ours")
        label = variant.name if is_ours else prefix + variant.name
        row: Row = {"model": options.model, "batch": batch, "candidate": label}
        try:
            start = time.perf_counter()
            candidate = Candidate(task.ours if is_ours else peer, task, variant, x, target, options)
            apart[label] = errors(candidate.evidence(), exact["ours" if is_ours else "peer"])
            row["error"] = apart[label]["all"]
            for _ in range(1 if options.tiny else 4):
                candidate.step()
            row["first_call_s"] = time.perf_counter() - start
            # The pool of a graph is taken while it is recorded.
            row["peak_bytes"] = None if variant.graph else peak_gpu_memory(candidate.step, options.device)
            if variant.graph:  # which is in its time: the input goes to where the graph reads it
                aside = torch.empty_like(candidate.x)
                row["input_copy_s"] = elapsed(partial(aside.copy_, candidate.x), 5, options.device)
        except Exception as failure:  # one peer that cannot run must not cost the others their numbers
            report.add(**row, failure=f"{type(failure).__name__}: {failure}"[:500])
            continue
        eager = apart.get(f"{prefix}eager_channels_last", {"all": row["error"]})
        found = wrong(apart[label], eager)
        row["correct"] = not found
        if found:
            row["wrong"] = found[:10]
        steps[label], rows[label] = candidate.step, row
        # A first number at once, from this candidate alone; the interleaved ones follow when all candidates are warm.
        alone = interleaved_bursts({label: candidate.step}, options)[label]["seconds"]
        report.add(**row, images_per_s_alone=batch / alone)
    for label, timing in interleaved_bursts(steps, options, 0.1).items():
        report.add(interleaved=True, **rows[label], images_per_s=batch / timing["seconds"], **timing)


# What training keeps for backward


def _blocks(model: nn.Module, plain_peer: bool) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a network in the order in which they run."""
    names = ("conv_1", "layer_1", "layer_2", "layer_3", "layer_4", "layer_5", "conv_1x1_exp")
    for name, stage in zip(names, model if plain_peer else (getattr(model, n) for n in names), strict=False):
        if name.startswith("layer"):
            yield from ((f"{name}[{i}]", block) for i, block in enumerate(stage))
        else:
            yield name, stage


def saved_memory(options: argparse.Namespace, report: Report) -> None:
    """Bytes that each block keeps for backward, its input among them where it is needed: ours and plain eager PyTorch
    in bf16."""
    [batch] = options.batches
    side = 64 if options.tiny else 256
    task = task_of(options.model)
    for candidate, model in {"ours": task.ours(), "eager": task.plain()}.items():
        model = model.to(options.device, memory_format=torch.channels_last).train()
        x = torch.randn(batch, 3, side, side, device=options.device).contiguous(memory_format=torch.channels_last)
        for name, block in _blocks(model, candidate == "eager"):
            with torch.autocast(options.device, torch.bfloat16):
                known = (*model.parameters(), *model.buffers())
                kept, y = saved_bytes(lambda block=block, x=x: block(x.requires_grad_()), known)
            report.add(model=options.model, batch=batch, candidate=candidate, block=name, saved_bytes=kept)
            x = y.detach()
