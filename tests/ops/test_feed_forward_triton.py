import itertools
from functools import partial

import pytest

from mvit3_kernels.ops import feed_forward, triton_rows

from . import test_feed_forward_cpu as cpu
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton

DROPOUTS = {"hidden_dropout": 0.1, "output_dropout": 0.1}


@needs_triton
class TestFeedForwardTriton(TritonKernel):
    op = staticmethod(feed_forward)
    arguments = staticmethod(cpu.TestFeedForwardCpu.arguments)
    registered = staticmethod(partial(cpu.TestFeedForwardCpu.registered, keep=False))
    # A configuration is decided by the two tiles of a row and whether rows are few or, on sm_90, enough for a block on
    # each multiprocessor, of which a GPU that is not there has two. Those of sm_90 run nowhere else.
    alone = (90,)
    cases = (
        Case(90, BF16, (2, 32, 32, 144, 288), {}, 128),
        Case(90, BF16, (2, 32, 32, 144, 288), DROPOUTS, 128),
        Case(90, F16, (2, 32, 32, 192, 384), {}, 128),
        Case(90, BF16, (2, 32, 32, 240, 480), {}, 128),
        Case(90, BF16, (2, 32, 32, 240, 480), {"per_sample": True, **DROPOUTS}, 128),
        Case(90, F16, (2, 32, 32, 512, 1024), {}, 128),
        Case(90, BF16, (2, 32, 32, 9, 18), {"bias": False}),
        Case(90, BF16, (2, 8, 8, 144, 288), {}, 128),
        Case(90, F16, (2, 8, 8, 192, 384), DROPOUTS, 128),
        Case(90, BF16, (2, 8, 8, 240, 480), {"per_sample": True}, 128),
        Case(90, F32, (2, 32, 32, 144, 288), DROPOUTS, 128),
        Case(90, F32, (2, 32, 32, 256, 512), {}, 128),
        Case(80, BF16, (2, 32, 32, 192, 384), DROPOUTS, 128),
        Case(80, BF16, (2, 32, 32, 512, 1024), {"per_sample": True}, 128),
        Case(80, F32, (2, 32, 32, 240, 480), DROPOUTS, 128),
        Case(86, BF16, (2, 32, 32, 240, 480), DROPOUTS, 128),
        Case("gfx942", F16, (2, 32, 32, 64, 128)),
    )
    larger = (3, 29, 31, 144, 288)

    def test_forward_rounds_weights_of_many_rows(self):
        few, many = (self.cases[0]._replace(sizes=(2, size, size, *self.larger[3:])) for size in (8, 32))
        assert (self.casts(few), self.casts(many)) == (2, 4)

    @pytest.mark.parametrize("widths", [(144, 288), (192, 384), (240, 480)], ids=str)
    def test_fewer_blocks_than_multiprocessors_fit(self, widths, monkeypatch):
        monkeypatch.setattr(triton_rows, "multiprocessors", lambda x: 132)
        forward = self.registered
        monkeypatch.setattr(
            self, "registered", lambda arguments: itertools.islice(forward(arguments), 1), raising=False
        )
        self.test_kernels_fit(self.cases[0]._replace(sizes=(2, 32, 32, *widths)))
