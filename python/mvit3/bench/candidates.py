"""The candidates: a network as this library runs it, and as its user could run it instead.

The peers of a network of ours are the same network in plain PyTorch (plain.py), those of a host (timm, transformers)
the host itself: eager in both layouts, torch.compile (frozen for inference; minutes to compile), ONNX Runtime and
OpenVINO. Those two are for inference only and optional (`pip install .[bench]`). What a candidate computes, outputs in
inference and gradients in training, is compared with eager's in float64 before it is timed. A network is trained with
the dropouts of its recipe; they are off where gradients are compared, as peers have other masks.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit3_kernels
from mvit3_kernels.inference import bfloat16_why_not

from .hosts import HOSTS
from .measure import peak_memory, timed
from .plain import plain

# A candidate may err so much, as a share of the norm of the output or of the gradients in float64.
BOUND = 2e-3  # float32 through 50 layers, in another order
HALF_BOUND = 7e-2  # the same for candidates that round to bfloat16: twice what eager autocast errs with fresh weights
HALF_GRADIENTS = 0.19  # the same for gradients
# Where eager errs more (few values in a batch norm), so many times its error: ours, and peers, which sum in other
# orders (compiled ones up to 3 times).
TIMES, PEER_TIMES = 2.0, 10.0
LARGEST = 0.5  # nothing is right beyond it, whatever eager does
EAGER, EAGER_HALF = "eager_nchw", "eager_bfloat16"
Run = Callable[[Tensor], Tensor]


class Work(NamedTuple):
    name: str  # "training" or "inference"
    batch: int
    side: int
    rounds: int
    burst: int = 1  # calls of a candidate in a row, in each round

    @property
    def training(self) -> bool:
        return self.name == "training"

    def __str__(self) -> str:
        return f"{self.name}-{self.batch}"


class Subject(NamedTuple):
    """A network by its name: of this library, or of a host that `fuse` then works on."""

    name: str
    host: str = ""  # "timm", "transformers"

    def network(self, dropout: bool = False) -> nn.Module:
        """With `dropout`, a network of ours has the rates of its recipe."""
        if self.host:
            return HOSTS[self.host].make(self.name)
        rates = {} if dropout else {"drop_rate": 0.0, "proj_drop_rate": 0.0}
        return mvit3_kernels.create_model(self.name, **rates)


# What a candidate makes of a network in plain PyTorch and an example of its input, or of our network (the names that
# begin with "ours").
def as_it_is(network: nn.Module, _: Tensor) -> Run:
    return network


def fused(network: nn.Module, _: Tensor) -> Run:
    return mvit3_kernels.fuse(network, mode="training" if network.training else "inference")


def fused_bfloat16(network: nn.Module, _: Tensor) -> Run:
    return mvit3_kernels.fuse(network, mode="inference", dtype=torch.bfloat16)


def autocast(network: nn.Module, _: Tensor) -> Run:
    @torch.autocast("cpu", torch.bfloat16)
    def run(x: Tensor) -> Tensor:
        return network(x)

    return run


def compiled(network: nn.Module, _: Tensor) -> Run:
    import torch._inductor.config as inductor

    # Frozen, the C++ wrapper saves 6 % at batch 1. Autotuning picks the same products; the other layout is as fast.
    inductor.freezing = inductor.cpp_wrapper = not network.training
    return torch.compile(network, dynamic=False)


def compiled_autocast(network: nn.Module, x: Tensor) -> Run:
    return autocast(compiled(network, x), x)


def exported(network: nn.Module, x: Tensor, folder: str) -> str:
    """An ONNX file. The older exporter (dynamo=False) gave graphs that run as fast, within 2 % in both runtimes."""
    path = f"{folder}/network.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (x,), path, input_names=["x"], output_names=["y"], dynamo=True, verbose=False)
    return path


def onnxruntime(network: nn.Module, x: Tensor) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # as fast, and no thread spins while another candidate runs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(exported(network, x, folder), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino(network: nn.Module, x: Tensor, precision: str = "f32") -> Run:
    import openvino as ov

    # One stream over all threads is the faster setting for one request at a time, at batch 32 too (THROUGHPUT gives it
    # one thread).
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = ov.Core().compile_model(exported(network, x, folder), "CPU", settings)
    assert model.get_property("INFERENCE_PRECISION_HINT") == getattr(ov.Type, precision)  # or it may choose bfloat16
    request = model.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0])


def openvino_bfloat16(network: nn.Module, x: Tensor) -> Run:
    return openvino(network, x, "bf16")


CANDIDATES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager_nchw": as_it_is,
    "eager_channels_last": as_it_is,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ours": as_it_is,
    "ours_fused": fused,
}
# With --dtype bfloat16 these too; the names end with what they compute in.
HALF = {
    "eager_bfloat16": autocast,
    "compile_bfloat16": compiled_autocast,
    "openvino_bfloat16": openvino_bfloat16,
    "ours_bfloat16": autocast,
    "ours_fused_bfloat16": fused_bfloat16,
}
INFERENCE_ONLY = ("onnxruntime", "openvino", "openvino_bfloat16", "ours_fused_bfloat16")
TRAINING_ONLY = ("ours_bfloat16",)
# The layout of these candidates' input; the others take channels_last.
NCHW = ("eager_nchw", "onnxruntime", "openvino", "openvino_bfloat16")


def missing(candidate: str) -> str | None:
    """Why this candidate cannot run here, or None."""
    if candidate == "ours_fused_bfloat16":
        return bfloat16_why_not()
    runtime = candidate.removesuffix("_bfloat16")
    if runtime not in ("onnxruntime", "openvino"):
        return None
    absent = [m for m in (runtime, "onnx", "onnxscript") if importlib.util.find_spec(m) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Candidate:
    """A network on one work: `step` does it once, `evidence` returns what candidates are compared by."""

    def __init__(self, candidate: str, subject: Subject, work: Work) -> None:
        torch.manual_seed(0)
        network = subject.network(dropout=work.training).train(work.training)
        layout = torch.contiguous_format if candidate in NCHW else torch.channels_last
        x = torch.randn(work.batch, 3, work.side, work.side).contiguous(memory_format=layout)
        network = (network if candidate.startswith("ours") or subject.host else plain(network)).to(memory_format=layout)
        self.network, self.training, self.x = network, work.training, x
        self.target = torch.arange(work.batch) % 1000
        with torch.set_grad_enabled(self.training):
            self.run = (CANDIDATES | HALF)[candidate](network, x)
        if self.training:
            self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        if not self.training:
            with torch.inference_mode():
                self.run(self.x)
            return
        F.cross_entropy(self.run(self.x), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evidence(self) -> Tensor:
        if not self.training:
            with torch.inference_mode():
                return self.run(self.x).flatten().clone()
        rates = {module: module.p for module in self.network.modules() if isinstance(module, nn.Dropout)}
        for module in rates:
            module.p = 0.0
        F.cross_entropy(self.run(self.x), self.target).backward()
        gradients = torch.cat([p.grad.flatten() for p in self.network.parameters()])
        self.optimizer.zero_grad()
        for module, rate in rates.items():
            module.p = rate
        return gradients


def runs(candidate: str, subject: Subject, work: Work) -> bool:
    """Whether there is such a candidate: a host is never ours before it is fused, and a training of our networks needs
    no `fuse`."""
    if candidate == "ours_fused":
        return bool(subject.host) or not work.training
    if candidate in ("ours", "ours_bfloat16") and subject.host:
        return False
    return candidate not in (INFERENCE_ONLY if work.training else TRAINING_ONLY)


class Prepared(NamedTuple):
    """Candidates that may be timed, those that may not, and what was found on the way."""

    right: dict[str, Candidate]
    errors: dict[str, float]  # of all results, as a share of the norm in float64
    wrong: dict[str, float]
    failed: dict[str, Exception]  # peers that did not run
    built_ms: dict[str, float]
    first_ms: dict[str, float]

    def all_right(self) -> Prepared:
        """Itself, or AssertionError where a result is wrong; a peer's own error where one failed."""
        if self.wrong:
            raise AssertionError(f"results err by too much of the norm: {self.wrong}, of {self.errors}")
        for error in self.failed.values():
            raise error
        return self


def exact(subject: Subject, work: Work) -> Tensor:
    """Eager's results in float64."""
    eager = Candidate(EAGER, subject, work)
    eager.network.double()
    eager.x = eager.x.double()
    return eager.evidence()


def allowed(candidate: str, errors: Mapping[str, float], training: bool) -> float:
    """The error that a candidate may have where `errors` has that of eager in its dtype."""
    half = candidate in HALF
    bound = (HALF_GRADIENTS if training else HALF_BOUND) if half else BOUND
    times = TIMES if candidate.startswith("ours") else PEER_TIMES
    return min(LARGEST, max(bound, times * errors.get(EAGER_HALF if half else EAGER, 0.0)))


def prepare(
    subject: Subject, work: Work, names: Sequence[str], told: Callable[[str], object] = lambda name: None
) -> Prepared:
    """Makes the candidates and compares their results with eager's in float64. Eager, by whose own error they are
    judged, need not be among them. `told` hears of each before it is made."""
    torch._dynamo.reset()
    found, results, failed, built, first = {}, {}, {}, {}, {}
    told("eager_float64")
    truth = exact(subject, work)
    judges = (EAGER, EAGER_HALF) if any(c in HALF for c in names) else (EAGER,)
    for c in dict.fromkeys((*judges, *names)):
        if not runs(c, subject, work):
            continue
        told(c)
        try:
            built[c] = timed(lambda c=c: found.update({c: Candidate(c, subject, work)}))
            first[c] = timed(lambda c=c: results.update({c: found[c].evidence()}))
        except Exception as error:
            if c == EAGER or c.startswith("ours"):
                raise
            failed[c] = error
    errors = {c: float((result.double() - truth).norm() / truth.norm()) for c, result in results.items()}
    wrong = {c: errors[c] for c in names if c in errors and not errors[c] <= allowed(c, errors, work.training)}
    right = {c: found[c] for c in names if c in errors and c not in wrong}
    return Prepared(right, errors, wrong, failed, built, first)


MEMORY = """
import torch
from mvit3.bench.candidates import Candidate, Subject, Work
torch.set_num_threads({threads})
# whatever is loaded at a first call; so small that it leaves no room behind
Candidate({candidate!r}, {subject!r}, {work!r}._replace(batch=2, side=64)).step()
step = Candidate({candidate!r}, {subject!r}, {work!r}).step
"""


def step_memory(candidate: str, subject: Subject, work: Work) -> float:
    """MiB that a first call (of training: gradients and optimiser state included) adds at its peak to the resident
    set."""
    setup = MEMORY.format(threads=torch.get_num_threads(), candidate=candidate, subject=subject, work=work)
    return peak_memory(setup, "step()")
