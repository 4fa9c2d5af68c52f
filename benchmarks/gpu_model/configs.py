"""The predicted time of every configuration that the Triton kernels of a network offer, beside the shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.gpu_model import model, predict, trace
from mvit3_kernels.ops import tuning

SHARED = 227 * 1024  # bytes that a block may have
DIFFERS = 0.1  # of the time: less than that a count of instructions does not tell apart


@dataclass
class Offer:
    """What a kernel offers for some numbers of channels: seconds of all its launches in a step with each
    configuration, None where it does not fit or spills. shipped: the place of the one that runs."""

    choice: tuning.Choice
    shipped: int
    launches: int
    seconds: list[float | None]

    @property
    def best(self) -> int:
        """The place of the fastest one; of the shipped one unless another is faster by DIFFERS."""
        known = {i: s for i, s in enumerate(self.seconds) if s is not None}
        fastest, now = min(known, key=known.get), known.get(self.shipped)
        return self.shipped if now is not None and known[fastest] > (1 - DIFFERS) * now else fastest

    def add(self, other: Offer) -> None:
        self.launches += other.launches
        pairs = zip(self.seconds, other.seconds, strict=True)
        self.seconds = [None if None in pair else sum(pair) for pair in pairs]


Call = tuple[str, tuple]  # an op and its arguments on meta


def calls(network: str, training: bool, batch: int) -> list[tuple[Call, int]]:
    """The different calls of ops in a step, and how often each is made."""

    def described(value: Any) -> Any:
        return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value

    counts: dict[str, list] = {}
    for entry in trace.step(lambda: predict.network(network), training, batch):
        if not isinstance(entry, trace.Aten):
            counts.setdefault(repr(tree_map(described, entry)), [entry, 0])[1] += 1
    return [(call, count) for call, count in counts.values()]


def offers_of_call(call: Call, times: int) -> Iterator[Offer]:
    """What the kernels of a call that is made `times` times offer."""
    with tuning.watch() as seen:
        shipped = trace.launches([call]).launches
    for choice in {choice.key: choice for choice in seen if len(choice.offered) > 1}.values():
        tried = []
        for config in choice.offered:
            with tuning.trial(choice, config):
                tried.append(trace.launches([call]).launches)
        own = [i for i in range(len(shipped)) if len({_launched(launches[i]) for launches in tried}) > 1]
        if own:
            seconds = [_seconds([launches[i] for i in own], times) for launches in tried]
            place = [[_launched(x) for x in launches] for launches in tried].index([_launched(x) for x in shipped])
            yield Offer(choice, place, times * len(own), seconds)


def _launched(launch: trace.Launch) -> tuple:
    return launch.name, launch.grid, launch.compiled.hash


def _seconds(launches: list[trace.Launch], times: int) -> float | None:
    """Of these launches, `times` times; None where one cannot be launched or spills."""
    codes = [model.code_of(launch.compiled) for launch in launches]
    if any(code.stack or code.shared > SHARED for code in codes):
        return None
    return times * sum(model.triton(launch).seconds for launch in launches)


def offers(network: str, training: bool, batch: int) -> list[Offer]:
    """What the kernels of a network's step offer, the longest first."""
    found: dict[str, Offer] = {}
    with trace.as_on_a_gpu():
        for call, times in calls(network, training, batch):
            for offer in offers_of_call(call, times):
                key = offer.choice.key
                if key in found:
                    found[key].add(offer)
                else:
                    found[key] = offer
    return sorted(found.values(), key=lambda offer: -(offer.seconds[offer.shipped] or 0.0))


def write(network: str, training: bool, batch: int) -> None:
    """Prints a line for each configuration, and what the fastest ones would save."""
    found, saved = offers(network, training, batch), 0.0
    print(f"{network}, {'training step' if training else 'inference'}, batch {batch}: microseconds, predicted")
    for offer in found:
        print(f"{offer.choice.key}, {offer.launches} launches")
        for place, (config, seconds) in enumerate(zip(offer.choice.offered, offer.seconds, strict=True)):
            marks = [name for name, at in (("shipped", offer.shipped), ("best", offer.best)) if at == place]
            time = "does not fit" if seconds is None else f"{1e6 * seconds:.0f}"
            text = " ".join(f"{name}={value}" for name, value in config.items())
            print(f"    {time:>12}  {text}{'  <- ' if marks else ''}{', '.join(marks)}", flush=True)
        if None not in (now := offer.seconds[offer.shipped], best := offer.seconds[offer.best]):
            saved += now - best
    print(f"the best ones would save {1e3 * saved:.2f} ms", flush=True)
