import pytest
import torch

from mvit3_kernels.ops.random import draw_seed, dropout, random_words

MASK = 0xFFFFFFFF


def word(seed: int, site: int, sample: int, element: int) -> int:
    """The hash in Python's integers, as a kernel computes it in 32-bit registers."""
    golden, first, second = 0x9E3779B1, 0x7FEB352D, 0x846CA68B

    def mix(h: int, shift: int, multiplier: int) -> int:
        return ((h ^ (h >> shift)) * multiplier) & MASK

    low, high = seed & MASK, (seed >> 32) & MASK
    key = mix(mix((low + sample * golden) & MASK, 16, first) ^ high ^ site, 15, second)
    h = mix(((element * golden) & MASK) ^ key, 16, first)
    h = mix(h ^ ((key * golden) & MASK), 15, second)
    return h ^ (h >> 16)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**62 - 1, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("site", [0, 1])
def test_words(seed, site):
    want = [[word(seed, site, sample, element) for element in range(7)] for sample in range(5)]
    assert random_words(torch.tensor(seed), site, 5, 7).tolist() == want


def test_words_stay_what_they_are():
    """A saved seed must give the same masks in every release."""
    assert random_words(torch.tensor(1234567890123), 1, 2, 2).tolist() == [
        [2283589054, 2118031588],
        [1342029917, 2070675265],
    ]


def test_words_are_uniform():
    words = random_words(torch.tensor(99), 0, 64, 1024).flatten()
    counts = torch.bincount(words >> 24, minlength=256).double()
    expected = words.numel() / 256
    assert ((counts - expected).square() / expected).sum() < 256 + 5 * (2 * 256) ** 0.5
    for bit in range(32):
        assert ((words >> bit) & 1).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / words.numel() ** 0.5), (
            bit
        )


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """How often two masks of probability one half agree: 0.5 if they are independent."""
    return ((a >> 31) == (b >> 31)).double().mean().item()


def test_neighbours_are_independent():
    seed, size = torch.tensor(5), (64, 1024)
    words = random_words(seed, 0, *size)
    bound = pytest.approx(0.5, abs=5 * 0.5 / words.numel() ** 0.5)
    assert agreement(words, random_words(seed, 1, *size)) == bound
    assert agreement(words, random_words(seed + 1, 0, *size)) == bound
    assert agreement(words, random_words(seed + 2**32, 0, *size)) == bound
    assert agreement(words[1:], words[:-1]) == bound
    assert agreement(words[:, 1:], words[:, :-1]) == bound


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout(p):
    x = torch.full((8, 16, 16, 16), 3.0, dtype=torch.float64)
    y = dropout(x, p, torch.tensor(3), site=0)
    dropped = y == 0
    assert dropped.double().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 3 / (1 - p)))
    assert torch.equal(dropout(x, 0.0, None, site=0), x)


def test_draw_seed_obeys_the_generator():
    def draws(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [draw_seed(torch.device("cpu")) for _ in range(2)]

    state = torch.get_rng_state()
    first, again, other = draws(1), draws(1), draws(2)
    torch.set_rng_state(state)
    assert first == again
    assert len({s.item() for s in (*first, *other)}) == 4
    assert all(s.dtype == torch.int64 and s.ndim == 0 and s >= 0 for s in first)
