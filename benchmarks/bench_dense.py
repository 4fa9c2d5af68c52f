"""Networks of dense prediction on the CPU, training steps and inference with post-processing, beside the best that a
user could run instead.

    python benchmarks/bench_dense.py [--json] [--quick] [--dtype bfloat16] [--peers compile ...]
        [--work training-21 ...]

float32, the same number of threads for all, one process, candidates in turns, medians. A turn is a pause, a call that
is not counted and one or more that are. The peers are the same networks in plain PyTorch (mvit3.bench.plain), as they
are in channels_last, compiled, and for inference in ONNX Runtime and OpenVINO. What every candidate computes, gradients
in training, label maps or probabilities and boxes in inference, is compared with eager before it is timed.

A training step is forward, loss, backward and AdamW, dropout off. Segmentation: the peers up-sample their logits and
take F.cross_entropy, which torch.compile may fuse; ours takes `segmentation_loss` of `small_logits`. Detection:
`assign` and `ssd_loss` for all. Inference includes what follows the network: up-sampling and argmax, or softmax and the
decoding of boxes; in the peers these are a part of the graph. Memory is what a first step adds to the resident set at
its peak, each in a process of its own (`--memory`). `--json` replaces what it measures in the rows of
results/dense_cpu.json and keeps the rest.

With `--dtype bfloat16`, inference alone: `fuse` with that dtype, beside eager autocast and OpenVINO told to compute in
bfloat16; those two and ours may err twice as much as eager autocast. Recorded beside the others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit3_kernels
from benchmarks.common import RESULTS, line, write
from mvit3.bench.candidates import BOUND, autocast, compiled, missing
from mvit3.bench.measure import PAUSE, in_turns, machine, peak_memory, timed
from mvit3.bench.plain import plain_dense
from mvit3_kernels.tasks import assign, segmentation_loss, ssd_loss

ROOT = Path(__file__).resolve().parents[1]
Results = tuple[Tensor, ...]


class Work(NamedTuple):
    name: str  # "training" or "inference"
    model: str
    classes: int
    batch: int
    side: int
    rounds: int
    burst: int = 1

    @property
    def training(self) -> bool:
        return self.name == "training"

    @property
    def segmentation(self) -> bool:
        return not self.model.startswith("ssdlite")

    def __str__(self) -> str:
        return f"{self.name}-{self.classes}"


DEEPLAB, SSD = "deeplabv3_mobilevitv3_s", "ssdlite_mobilevitv3_s"
WORK = (
    Work("training", DEEPLAB, 21, 4, 512, 5),
    Work("training", DEEPLAB, 150, 4, 512, 5),
    Work("training", SSD, 81, 8, 320, 5),
    Work("inference", DEEPLAB, 21, 1, 512, 12, 3),
    Work("inference", DEEPLAB, 150, 1, 512, 12, 3),
    Work("inference", SSD, 81, 1, 320, 12, 5),
)


class Loss(nn.Module):
    """A network and its loss, as one module that torch.compile sees whole."""

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, x: Tensor, target: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(self.network, x, target)


def plain_loss(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(network(x), target, ignore_index=255)


def small_loss(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return segmentation_loss(network.small_logits(x), target, align_corners=network.align_corners)


def detection_loss(network: nn.Module, x: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    return ssd_loss(*network(x), target)


def onnx_file(network: nn.Module, x: Tensor, folder: str) -> str:
    path = f"{folder}/network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (x,), path, input_names=["x"], dynamo=True, verbose=False)
    return path


def onnxruntime(network: nn.Module, x: Tensor) -> Callable[[Tensor], Results]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as fast, and no thread spins
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(onnx_file(network, x, folder), options, providers=["CPUExecutionProvider"])
    return lambda x: tuple(torch.from_numpy(y) for y in session.run(None, {"x": x.numpy()}))


def openvino(network: nn.Module, x: Tensor, precision: str = "f32") -> Callable[[Tensor], Results]:
    import openvino as ov

    threads = torch.get_num_threads()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    with tempfile.TemporaryDirectory() as folder:
        model = ov.Core().compile_model(onnx_file(network, x, folder), "CPU", settings)
    request, count = model.create_infer_request(), len(model.outputs)

    def run(x: Tensor) -> Results:
        found = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return tuple(torch.from_numpy(found[i]) for i in range(count))

    return run


def openvino_bfloat16(network: nn.Module, x: Tensor) -> Callable[[Tensor], Results]:
    return openvino(network, x, "bf16")


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, "openvino_bfloat16": openvino_bfloat16}
CANDIDATES = ("eager_channels_last", "compile", "onnxruntime", "openvino", "ours", "ours_fused")
HALF = ("eager_bfloat16", "openvino_bfloat16", "ours_fused_bfloat16")


class Candidate:
    """A network on one work: `step` does it once, `evidence` returns what candidates are compared by."""

    def __init__(self, candidate: str, work: Work) -> None:
        torch.manual_seed(0)
        options = {"drop_rate": 0.0, "proj_drop_rate": 0.0, "num_classes": work.classes}
        model = mvit3_kernels.create_model(work.model, **options).train(work.training)
        layout = torch.contiguous_format if candidate in RUNTIMES else torch.channels_last
        x = torch.randn(work.batch, 3, work.side, work.side).contiguous(memory_format=layout)
        ours = candidate.startswith("ours")
        network = model if ours else plain_dense(model, None if work.training else (work.side, work.side))
        self.x, self.work, self.network = x, work, network.to(memory_format=layout)
        self._make_training(candidate, model) if work.training else self._make_inference(candidate)

    def _make_training(self, candidate: str, model: nn.Module) -> None:
        work, x = self.work, self.x
        if work.segmentation:
            self.target = torch.randint(work.classes, (work.batch, 16, 16)).repeat_interleave(work.side // 16, 1)
            self.target = self.target.repeat_interleave(work.side // 16, 2)
            loss = small_loss if candidate == "ours" else plain_loss
        else:
            low = 0.7 * torch.rand(work.batch, 8, 2)
            self.boxes = list(torch.cat((low, low + 0.05 + 0.25 * torch.rand(work.batch, 8, 2)), -1))
            self.labels = list(torch.randint(1, work.classes, (work.batch, 8)))
            self.anchors = model.anchors((work.side, work.side))
            loss = detection_loss
        self.run = Loss(self.network, loss)
        if candidate == "compile":
            self.run = compiled(self.run.train(), x)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)

    def _make_inference(self, candidate: str) -> None:
        network = self.network
        with torch.no_grad():
            if candidate.startswith("ours_fused"):
                mvit3_kernels.fuse(network, dtype=torch.bfloat16 if candidate in HALF else torch.float32)
            if candidate.startswith("ours"):
                self.run = network.label_map if self.work.segmentation else network.predict
            elif candidate == "compile":
                self.run = compiled(network, self.x)
            elif candidate == "eager_bfloat16":
                self.run = autocast(network, self.x)
            else:
                self.run = RUNTIMES[candidate](network, self.x) if candidate in RUNTIMES else network

    def _loss(self) -> Tensor:
        if self.work.segmentation:
            return self.run(self.x, self.target)
        return self.run(self.x, assign(self.boxes, self.labels, self.anchors))

    def step(self) -> None:
        if not self.work.training:
            with torch.inference_mode():
                self.run(self.x)
            return
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evidence(self) -> Tensor:
        if not self.work.training:
            with torch.inference_mode():
                found = self.run(self.x)
            return torch.cat([y.flatten().float() for y in ((found,) if isinstance(found, Tensor) else found)])
        self._loss().backward()
        gradients = torch.cat([p.grad.flatten() for p in self.network.parameters()])
        self.optimizer.zero_grad()
        return gradients


def prepare(work: Work, names: Sequence[str]) -> tuple[dict[str, Candidate], dict[str, object]]:
    """The candidates, ready to be timed after their results were compared, and the first columns of their row."""
    torch._dynamo.reset()
    row: dict[str, object] = {"model": work.model, "work": work.name, "classes": work.classes}
    row |= {"batch": work.batch, "side": work.side}
    found, results = {}, {}
    for c in names:
        if work.training and (c in RUNTIMES or c in HALF or c == "ours_fused"):
            continue
        built = timed(lambda c=c: found.update({c: Candidate(c, work)}))
        first = timed(lambda c=c: results.update({c: found[c].evidence()}))
        row |= {f"{c}_built_ms": built, f"{c}_first_ms": first}
    plain = results[next(iter(results))]
    truth = exact_gradients(work) if work.training else plain
    labels = not work.training and work.segmentation  # a label may differ where two classes are equal but for rounding
    size = len(truth) if labels else truth.norm()
    errors = {c: float(((y != truth).sum() if labels else (y - truth).norm()) / size) for c, y in results.items()}
    # The gradients of a norm of one value a sample (ASPP's pooled branch) are mostly rounding, in every candidate.
    bound = 2 * next(iter(errors.values())) if work.training else BOUND
    bounds = {c: 2 * errors["eager_bfloat16"] if c in HALF else bound for c in errors}
    if wrong := {c: error for c, error in errors.items() if not error <= bounds[c]}:
        raise AssertionError(f"{work.model} {work}: results differ by more than {bounds}: {wrong}")
    halves = {f"{c}_error": errors[c] for c in errors if c in HALF}
    return found, {**row, "error": max(errors[c] for c in errors if c not in HALF), "bound": bound, **halves}


def exact_gradients(work: Work) -> Tensor:
    """Of the plain network in float64."""
    plain = Candidate("eager_channels_last", work)
    plain.network.double()
    plain.x = plain.x.double()
    return plain.evidence()


def measure(work: Work, found: dict[str, Candidate], quick: bool) -> dict[str, object]:
    def sample(_: str, run: Callable[[], object]) -> list[float]:
        time.sleep(PAUSE)
        run()
        return [timed(run) for _ in range(work.burst)]

    rounds = max(3, work.rounds // 3) if quick else work.rounds
    times = in_turns({c: candidate.step for c, candidate in found.items()}, rounds, sample)
    return {f"{c}_ms": sorted(t)[len(t) // 2] for c, t in times.items()}


MEMORY = """
import sys; sys.path.insert(0, {root!r})
import torch
from benchmarks.bench_dense import Candidate, Work
torch.set_num_threads({threads})
work = Work{work!r}
Candidate({candidate!r}, work._replace(batch=2, side=64)).step()  # whatever is loaded at a first call
step = Candidate({candidate!r}, work).step
"""


def step_memory(candidate: str, work: Work) -> float:
    threads = torch.get_num_threads()
    return peak_memory(MEMORY.format(root=str(ROOT), threads=threads, candidate=candidate, work=tuple(work)), "step()")


def with_ratios(row: dict[str, object]) -> dict[str, object]:
    """Adds the fastest peer, how many times as fast as that, as eager and as torch.compile ours is, and its share of
    eager's memory."""
    times = {c: row[f"{c}_ms"] for c in CANDIDATES if f"{c}_ms" in row}
    ours = min((t for c, t in times.items() if c.startswith("ours")), default=None)
    peers = {c: t for c, t in times.items() if not c.startswith("ours")}
    if ours and peers:
        row |= {"best_peer": min(peers, key=peers.get), "ratio": min(peers.values()) / ours}
        row |= {f"against_{c}": t / ours for c, t in peers.items()}
    if "ours_mib" in row:
        row["memory_share"] = row["ours_mib"] / row["eager_channels_last_mib"]
    if "ours_fused_bfloat16_ms" in row:
        ours = row["ours_fused_bfloat16_ms"]
        halves = [row[f"{c}_ms"] for c in HALF[:2] if f"{c}_ms" in row]
        row |= {"float32_ratio": min(peers.values()) / ours, "bfloat16_ratio": min(halves) / ours}
    return row


def record(row: dict[str, object], facts: dict[str, object]) -> None:
    """Writes what was measured into results/dense_cpu.json, beside what else is known there."""

    def key(row: dict[str, object]) -> tuple[object, ...]:
        return tuple(row.get(name) for name in ("model", "work", "classes", "batch", "side"))

    path = RESULTS / "dense_cpu.json"
    known = {key(old): old for old in json.loads(path.read_text())["rows"]} if path.exists() else {}
    known[key(row)] = with_ratios({**known.get(key(row), {}), **row})
    order = [(w.model, w.name, w.classes, w.batch, w.side) for w in WORK]
    write("dense", [known[k] for k in order if k in known], facts, "dense_cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="record in results/dense_cpu.json")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--memory", action="store_true", help="the memory of training steps, no times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    peers = [c for c in CANDIDATES if not c.startswith("ours")]
    parser.add_argument("--peers", nargs="*", choices=peers, help="default: all that are installed")
    parser.add_argument("--work", nargs="+", choices=[str(w) for w in WORK], default=[str(w) for w in WORK])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    half = options.dtype == "bfloat16"
    names = [c for c in CANDIDATES if c.startswith("ours") or options.peers is None or c in options.peers]
    names += HALF if half else ()
    absent = {c: reason for c in names if (reason := missing(c))}
    facts = machine()
    versions = [c for c in ("onnxruntime", "openvino") if c in names and c not in absent]
    facts["peers"] = {c: importlib.metadata.version(c) for c in versions}
    print(line(facts), *(f"without {c}: {reason}" for c, reason in absent.items()), sep="\n", flush=True)
    for work in (w for w in WORK if str(w) in options.work and (w.training or not options.memory)):
        if half and work.training:
            continue
        if options.memory:
            columns = {"model": work.model, "work": work.name, "classes": work.classes}
            row = columns | {"batch": work.batch, "side": work.side}
            row |= {f"{c}_mib": step_memory(c, work) for c in ("eager_channels_last", "ours")}
        else:
            found, row = prepare(work, [c for c in names if c not in absent])
            row |= measure(work, found, options.quick)
            del found
            row["revision"] = facts["revision"]
        print(line(with_ratios(dict(row))), flush=True)
        if options.json:  # row by row: a run that is cut short loses its last row only
            record(row, facts)


if __name__ == "__main__":
    main()
