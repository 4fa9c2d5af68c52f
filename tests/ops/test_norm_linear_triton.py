import itertools

import pytest

from mvit3_kernels.ops import norm_linear, triton_rows

from . import test_norm_linear_cpu as cpu
from .triton_kernel import BF16, F16, F32, Case, TritonKernel, needs_triton


@needs_triton
class TestNormLinearTriton(TritonKernel):
    op = staticmethod(norm_linear)
    arguments = staticmethod(cpu.TestNormLinearCpu.arguments)
    registered = staticmethod(cpu.TestNormLinearCpu.registered)
    # A configuration is decided by the two tiles of a row and whether rows are few or, on sm_90, enough for a block on
    # each multiprocessor, of which a GPU that is not there has two. Those of sm_90 run nowhere else.
    alone = (90,)
    cases = (
        Case(90, BF16, (2, 32, 32, 144, 432), {}, 128),
        Case(90, BF16, (2, 32, 32, 192, 576), {}, 128),
        Case(90, BF16, (2, 32, 32, 240, 720), {"per_sample": True}, 128),
        Case(90, F16, (2, 32, 32, 512, 512), {}, 128),
        Case(90, BF16, (2, 32, 32, 9, 27), {"bias": False}),
        Case(90, BF16, (2, 8, 8, 144, 432), {}, 128),
        Case(90, BF16, (2, 8, 8, 240, 720), {"per_sample": True}, 128),
        Case(90, F32, (2, 32, 32, 144, 432), {}, 128),
        Case(90, F32, (2, 32, 32, 512, 64), {}, 128),
        Case(80, BF16, (2, 32, 32, 192, 576), {}, 128),
        Case(80, BF16, (2, 32, 32, 512, 512), {"per_sample": True}, 128),
        Case(80, F32, (2, 32, 32, 240, 720), {}, 128),
        Case(86, BF16, (2, 32, 32, 240, 720), {}, 128),
        Case("gfx942", F16, (2, 32, 32, 64, 192)),
    )
    larger = (3, 29, 31, 144, 432)

    def test_forward_rounds_weights_of_many_rows(self):
        few, many = (self.cases[0]._replace(sizes=(2, size, size, *self.larger[3:])) for size in (8, 32))
        assert (self.casts(few), self.casts(many)) == (1, 2)

    @pytest.mark.parametrize("widths", [(144, 432), (240, 720)], ids=str)
    def test_fewer_blocks_than_multiprocessors_fit(self, widths, monkeypatch):
        monkeypatch.setattr(triton_rows, "multiprocessors", lambda x: 132)
        forward = self.registered
        monkeypatch.setattr(
            self, "registered", lambda arguments: itertools.islice(forward(arguments), 1), raising=False
        )
        self.test_kernels_fit(self.cases[0]._replace(sizes=(2, 32, 32, *widths)))
