"""What every op with dropout is held to on top of `contract.Contract`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .contract import Contract
from .inputs import Draw, seed
from .measure import tensors


class DropoutContract(Contract):
    dropouts: tuple[str, ...]  # names of the probabilities

    def pytest_generate_tests(self, metafunc):
        super().pytest_generate_tests(metafunc)
        if "dropout" in metafunc.fixturenames:
            metafunc.parametrize("dropout", self.dropouts)

    def output(self, dropout: str, p: float, seed: Tensor | None, **options) -> Tensor:
        arguments = {**self.arguments(Draw(), **options), dropout: p, "seed": seed}
        return tensors(self.op(**arguments))[0]

    def test_seed_decides(self, dropout):
        same, again, other = (self.output(dropout, 0.5, seed(i)) for i in (1, 1, 2))
        assert torch.equal(same, again)
        assert not torch.allclose(same, other)
        torch.testing.assert_close(self.output(dropout, 0.0, seed(1)), self.output(dropout, 0.0, None), rtol=0, atol=0)

    def test_high_and_low_words_of_the_seed_count(self, dropout):
        outputs = [self.output(dropout, 0.5, torch.tensor(s)) for s in (3, 4, 3 + 2**40, 3 - 2**62)]
        assert len({y.sum().item() for y in outputs}) == len(outputs)

    def test_samples_are_independent(self, dropout):
        """A sample's mask depends on its own position alone: other samples may change or leave."""
        arguments = {**self.arguments(Draw(), batch=3), dropout: 0.5, "seed": seed()}
        whole = tensors(self.op(**arguments))[0]
        maps = {name: t for name, t in arguments.items() if name in self.maps and t is not None}
        first = arguments | {name: t[:2] for name, t in maps.items()}
        torch.testing.assert_close(whole[:2], tensors(self.op(**first))[0], rtol=1e-12, atol=1e-12)
        twins = arguments | {name: t[:1].expand_as(t) for name, t in maps.items()}
        y = tensors(self.op(**twins))[0]
        assert not torch.allclose(y[0], y[1])

    def test_mean_and_probability(self, dropout):
        """Over many masks the mean is the output without dropout, and the variance grows as p / (1 - p): the mask
        enters linearly."""
        one = self.arguments(Draw(), batch=1)
        maps = {name: t for name, t in one.items() if name in self.maps and t is not None}
        many = one | {name: t.expand(2000, *t.shape[1:]) for name, t in maps.items()}
        without = tensors(self.op(**one))[0]
        variances = {}
        for p in (0.2, 0.5):
            runs = tensors(self.op(**{**many, dropout: p, "seed": seed()}))[0]
            variance = runs.var(0)
            distance = (runs.mean(0) - without[0]).abs() / (variance / len(runs)).sqrt().clamp(min=1e-9)
            assert distance.max() < 5, p  # standard errors
            variances[p] = variance.sum()
        assert (variances[0.5] / variances[0.2]).item() == pytest.approx(4, rel=0.1)
