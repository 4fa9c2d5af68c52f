"""The model of GPU kernels (benchmarks/gpu_model): what it reads off code, and the budgets of every shipped kernel."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from benchmarks.gpu_model import (
    budgets,
    configs,
    device,
    model,
    page,
    paths,
    peers,
    predict,
    record,
    sass,
    single,
    trace,
    ttir,
)
from benchmarks.gpu_model.model import Demand, duration
from mvit3_kernels.ops import tuning

SOURCE = """
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<bf16>, %y_ptr: !tt.ptr<f32>, %rows: i32, %each: i32) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c32 = arith.constant 32 : i32 loc(#loc1)
    %c64 = arith.constant 64 : i32 loc(#loc1)
    %0 = tt.get_program_id x : i32 loc(#loc2)
    %begin = arith.muli %0, %each : i32 loc(#loc2)
    %left = arith.subi %rows, %begin : i32 loc(#loc2)
    %length = arith.minsi %left, %each : i32 loc(#loc2)
    %p = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<32x16x!tt.ptr<bf16>> loc(#loc2)
    %s:2 = scf.for %i = %c0 to %length step %c32 iter_args(%a = %b, %q = %p) -> (tensor<32x8xf32>)  : i32 {
      %v = tt.load %q, %m, %o : tensor<32x16x!tt.ptr<bf16>> loc(#loc3)
      %t = scf.for %j = %c0 to %c64 step %c32 iter_args(%u = %a) -> (tensor<32x8xf32>)  : i32 {
        %d = tt.dot %v, %w, %u, inputPrecision = tf32 : tensor<32x16xbf16> * tensor<16x8xbf16> -> tensor<32x8xf32>
        scf.yield %d : tensor<32x8xf32> loc(#loc3)
      } loc(#loc3)
      %k = "tt.reduce"(%v) <{axis = 0 : i32}> ({
      ^bb0(%e: f32, %f: f32):
        tt.reduce.return %e : f32 loc(#loc4)
      }) : (tensor<32x16xf32>) -> tensor<16xf32> loc(#loc4)
      scf.yield %t : tensor<32x8xf32> loc(#loc3)
    } {tt.num_stages = 2 : i32} loc(#loc3)
    %z = tt.splat %y_ptr : !tt.ptr<f32> -> tensor<32x8x!tt.ptr<f32>> loc(#loc2)
    tt.store %z, %s#0, %m : tensor<32x8x!tt.ptr<f32>> loc(#loc5)
    tt.return loc(#loc5)
  }
}
"""


def test_work_of_a_program():
    """100 rows, of which the last program has 36 in two passes."""
    values = {"x_ptr": torch.empty(0), "y_ptr": torch.empty(0), "rows": 100, "each": 64}
    first, last = (ttir.work(SOURCE, values, (i,)) for i in (0, 1))
    assert [loop.trips for loop in first.loops] == [2] and [loop.trips for loop in last.loops] == [2]
    [inner] = first.loops[0].inner
    assert (inner.trips, inner.constant, first.loops[0].constant) == (2, True, False)
    assert first.read == {"x_ptr": 2 * 32 * 16 * 2} and first.written == {"y_ptr": 32 * 8 * 4}
    assert first.products == 2 * 2 * 2 * 32 * 16 * 8
    empty = ttir.work(SOURCE, values | {"rows": 64}, (1,))
    assert empty.loops[0].trips == 0 and empty.products == 0 and not any(empty.read.values())


TWO_WAYS = """
  tt.func public @kernel(%x_ptr: !tt.ptr<bf16>, %y_ptr: !tt.ptr<f32>, %parts: i32) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c8 = arith.constant 8 : i32 loc(#loc1)
    %0 = tt.get_program_id x : i32 loc(#loc2)
    %1 = arith.cmpi eq, %0, %c0 : i32 loc(#loc2)
    %whole = arith.divui %parts, %c8 : i32 loc(#loc2)
    %p = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<16x!tt.ptr<bf16>> loc(#loc2)
    scf.if %1 {
      %s = scf.for %i = %c0 to %whole step %c1 iter_args(%a = %b) -> (tensor<16xf32>)  : i32 {
        %v = tt.load %p, %m, %o : tensor<16x!tt.ptr<bf16>> loc(#loc3)
      } loc(#loc3)
    } else {
      %z = tt.splat %y_ptr : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>> loc(#loc2)
      tt.store %z, %c, %m : tensor<8x!tt.ptr<f32>> loc(#loc5)
    } loc(#loc3)
    tt.return loc(#loc5)
  }
"""


def test_programs_that_go_different_ways():
    values = {"x_ptr": torch.empty(0), "y_ptr": torch.empty(0), "parts": 27}
    one, other = (ttir.work(TWO_WAYS, values, (i,)) for i in (0, 1))
    assert one.branches and other.branches
    assert (one.read, one.written) == ({"x_ptr": 3 * 16 * 2}, {"y_ptr": 0})
    assert (other.read, other.written) == ({"x_ptr": 0}, {"y_ptr": 8 * 4})
    code = loop(loop(all=4))
    assert [times for _, times, _ in model.passes(one.loops, code)] == [3]
    assert [times for _, times, _ in model.passes(other.loops, code)] == [0]
    works = model.works_of(TWO_WAYS, values, (4,))
    assert [bool(w.read["x_ptr"]) for w in works] == [True, False, False, False]
    assert ttir.mean(works).read == {"x_ptr": 3 * 16 * 2 / 4} and ttir.mean(works).written == {"y_ptr": 8 * 4 * 3 / 4}
    assert len(model.works_of(SOURCE, {"rows": 64, "each": 64}, (100,))) == 1
    of_all = TWO_WAYS.replace("get_program_id", "get_num_programs").replace("cmpi eq", "cmpi ne")
    assert (
        ttir.work(of_all, values, (0,), (4,)).read["x_ptr"] and not ttir.work(of_all, values, (0,), (0,)).read["x_ptr"]
    )


CODE = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   LDGSTS.E [R1], desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   MUFU.EX2 R3, R4 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
        /*00b0*/                   NOP ;
$__internal_0_slowpath:
        /*00c0*/                   FMUL R1, R1, R1 ;
"""


def test_loops_of_machine_code():
    root = sass.kernels(CODE)["kernel"]
    outer, inner = root.walk()[1:]
    assert inner.counts == Counter({"all": 3, "loads": 1, "mma": 1}) and not inner.inner
    assert outer.counts == Counter({"all": 3, "copies": 1, "special": 1}) and outer.inner == [inner]
    assert root.counts == Counter({"all": 5, "stores": 1})


BRANCHES = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.TANH R3, R4 ;
        /*0050*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/                   MUFU.RCP R3, R4 ;
        /*0070*/                   MOV R5, R6 ;
        /*0080*/                   MOV R5, R6 ;
.L_x_4:
        /*0090*/               @P2 BRA `(.L_x_5) ;
        /*00a0*/                   MOV R5, R6 ;
.L_x_5:
        /*00b0*/               @P3 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""


def test_the_way_through_a_loop_is_the_shortest_of_those_that_compute_most():
    """Three products and the hyperbolic tangent, not the shorter way around them; nothing that may be left out."""
    lines = sass.sections(BRANCHES)["kernel"]
    [outer] = sass.kernels(BRANCHES)["kernel"].inner
    way = paths.one_pass(paths.read(lines), outer, lambda inner: 3)
    assert way.work == 4 and way.counts == Counter({"all": 1 + 3 * 2 + 2 + 1 + 1, "mma": 3, "special": 1})


VOTE = """
.text.kernel:
.L_x_1:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0010*/                   VOTE.ANY P1, P1 ;
        /*0020*/                   STG.E desc[UR6][R8.64], R4 ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0050*/                   STG.E.U16 desc[UR6][R8.64], R4 ;
.L_x_2:
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_what_is_made_again_after_a_vote_is_no_part_of_the_way():
    [outer] = sass.kernels(VOTE)["kernel"].inner
    way = paths.one_pass(paths.read(sass.sections(VOTE)["kernel"]), outer, lambda inner: 1)
    assert way.work == 2 and way.counts == Counter({"all": 5, "mma": 1, "stores": 1})


STORES = """
.text.kernel:
.L_x_1:
        /*0000*/               @P0 BRA `(.L_x_2) ;
        /*0010*/                   STG.E desc[UR6][R8.64], R4 ;
        /*0020*/                   STG.E desc[UR6][R8.64+0x4], R5 ;
        /*0030*/                   STG.E desc[UR6][R8.64+0x8], R6 ;
        /*0040*/                   STG.E desc[UR6][R8.64+0xc], R7 ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   STG.E.128 desc[UR6][R8.64], R4 ;
.L_x_3:
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2+UR4], R3 ;
        /*0080*/              @!P1 BRA `(.L_x_5) ;
.L_x_4:
        /*0090*/               @P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_5:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2+UR4], R3 ;
        /*00c0*/              @!P1 BRA `(.L_x_5) ;
        /*00d0*/                   BRA `(.L_x_4) ;
"""


def test_a_store_of_16_bytes_is_as_much_work_as_four_and_a_wait_no_loop_around():
    """The way has the one store, and the code behind the end where a warp waits is no loop from there to the end."""
    outer, waits = sass.kernels(STORES)["kernel"].inner
    assert not outer.inner and not waits.inner
    way = paths.one_pass(paths.read(sass.sections(STORES)["kernel"]), outer, lambda inner: 1)
    assert way.work == 4 and way.counts == Counter({"all": 5, "stores": 1})


def loop(*inner: sass.Loop, **counts: int) -> sass.Loop:
    return sass.Loop(0, 0, Counter(counts), list(inner))


def test_each_loop_of_the_code_runs_as_often_as_its_source():
    inner = loop(all=10)
    code = loop(loop(inner, all=100), loop(all=7))
    source = [ttir.Loop(5, False, [ttir.Loop(2, True), ttir.Loop(8, True)]), ttir.Loop(3, False)]
    found = model.passes(source, code)
    assert [(here.counts["all"], times) for here, times, _ in found] == [(100, 5), (10, 40), (7, 3)]
    assert not any(guess for *_, guess in found)


def test_a_loop_that_the_compiler_unrolled_in_part():
    code = loop(loop(all=40, loads=4), loop(all=11, loads=1))
    found = model.passes([ttir.Loop(11, False)], code)
    assert sorted((here.counts["loads"], times) for here, times, _ in found) == [(1, 3), (4, 2)]


def test_a_loop_of_unknown_length_is_said():
    assert [guess for *_, guess in model.passes([ttir.Loop(None, False)], loop(loop(all=4)))] == [True]


def demand(**changed: float) -> Demand:
    usual = {
        "blocks": 10_000, "warps": 8, "resident": 4, "instructions": 100.0, "special": 0.0, "alone": [100.0],
        "bytes": 1e6, "cached": 1e6, "products": 1e6, "wgmma": True,
    }  # fmt: skip
    return Demand(**usual | changed)


@pytest.mark.parametrize(
    "limit, changed",
    [
        ("memory", {"bytes": 1e10}),
        ("l2", {"cached": 1e11}),
        ("tensor cores", {"products": 1e14}),
        ("issue", {"instructions": 1e6}),
        ("latency", {"alone": [1e6, 2.0], "blocks": 3}),
    ],
)
def test_the_longest_limit_is_named(limit, changed):
    seconds, named, _ = duration(demand(**changed))
    assert named == limit and seconds > duration(demand())[0]
    assert duration(demand(products=1e14, wgmma=False))[0] > duration(demand(products=1e14))[0]


def test_occupancy():
    assert device.occupancy(128, 8, 0) == (2, "registers")
    assert device.occupancy(129, 8, 0) == (1, "registers")
    assert device.occupancy(32, 4, 50_000) == (4, "shared memory")
    assert device.occupancy(16, 8, 0) == (8, "threads")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm(self.conv(x))).mean((2, 3))


def test_compiled_code_writes_what_a_library_or_a_sum_needs():
    """An inference call: one kernel casts the convolution's input, one reads its result for norm, activation, mean."""
    made = peers.Fusion(peers.graph(Block, False, 4, 32)).kernels()
    assert sum(p.name == "convolution" for p in made) == 1
    pixels = 4 * 32 * 32
    fused = sorted(p.bytes for p in made if p.name == "fused" and p.bytes > 1000)
    assert fused == pytest.approx([pixels * 8 * 2, pixels * 3 * (4 + 2)], rel=0.02)


def test_eager_code_reads_and_writes_for_each_op():
    made = [peers.aten(op) for op in trace.step(Block, False, 4, 32) if isinstance(op, trace.Aten)]
    of = {p.name: p for p in made}
    assert of["silu"].bytes == 2 * 4 * 8 * 32 * 32 * 2 and of["convolution"].products == 2 * 4 * 32 * 32 * 3 * 8


# Configurations


def offer(*seconds: float | None, shipped: int = 0) -> configs.Offer:
    choice = tuning.Choice("kernel", "bfloat16", (8,), tuple({"num_warps": n} for n in range(len(seconds))))
    return configs.Offer(choice, shipped, 1, list(seconds))


def test_another_configuration_is_best_if_it_is_faster_by_a_tenth():
    assert offer(1.0, 0.95, None).best == 0
    assert offer(1.0, 0.85, 0.8, None).best == 2
    assert offer(None, 0.9, 1.0).best == 1
    both = offer(1.0, 0.5, 2.0)
    both.add(offer(1.0, 1.7, None))
    assert (both.launches, both.seconds, both.best) == (2, [2.0, 2.2, None], 0)


def test_each_configuration_of_a_call_is_predicted():
    qkv = torch.empty(64, 8, 8, 576, dtype=torch.bfloat16, device="meta")
    call = ("patch_attention_forward", (qkv, 4, 2, 2, 0.0, None))
    with trace.as_on_a_gpu():
        [found] = configs.offers_of_call(call, 3)
        [launch] = trace.launches([call]).launches
    assert found.choice.kernel == "patch_attention_16_fwd" and found.launches == 3
    assert len(found.seconds) == len(found.choice.offered) == 2 and len(set(found.seconds)) == 2
    assert found.seconds[found.shipped] == pytest.approx(3 * model.triton(launch).seconds)


# What is recorded


@pytest.fixture(scope="module")
def kernels():
    return record.read(record.KERNELS)["kernels"]


def test_every_shipped_kernel_keeps_its_budget_or_says_why(kernels):
    assert len(kernels) > 100
    rows = record.read(record.ROWS)["rows"]
    over = [f"{e.budget}: {e.kernel}: {e.found}" for e in budgets.unexplained(kernels, rows)]
    assert not over, "\n".join(over)
    assert not budgets.unused(kernels, rows)


@pytest.mark.parametrize(
    "budget, changed",
    [
        ("registers", {"registers": 136}),
        ("spill", {"stack": 8}),
        ("pipeline", {"loops": [{"all": 50, "loads": 4}]}),
        ("blocks", {"few": {"blocks": 9, "us": 12.0, "where": "here"}}),
    ],
)
def test_a_kernel_over_a_budget_fails(budget, changed):
    within = {"registers": 128, "warps": 8, "stack": 0, "loops": [{"all": 50, "loads": 1, "copies": 4}]}
    assert not budgets.unexplained({"new.kernel[C=16]": within})
    assert [e.budget for e in budgets.unexplained({"new.kernel[C=16]": within | changed})] == [budget]


@pytest.mark.parametrize(
    "ms, share, candidate, over",
    [(2.6, 1, "ours", 1), (2.4, 1, "ours", 0), (2.6, 200, "ours", 0), (2.6, 1, "eager", 0)],
)
def test_a_kernel_far_from_its_floor_fails(ms, share, candidate, over):
    """Unless it is a small share of a step, or a peer's."""
    row = {"network": "n", "mode": "train", "batch": 256, "candidate": candidate, "gpu_ms": ms * share}
    rows = [row | {"kernels": [{"kernel": "new.kernel", "ms": ms, "floor_ms": 1.0}]}]
    assert [e.budget for e in budgets.unexplained({}, rows)] == ["floor"] * over


def test_a_floor_is_of_bytes_or_products_and_the_start():
    p = model.Prediction("k", "triton", 1.0, "issue", bytes=4.3e9, products=1.4e12, launches=2)
    assert predict.floor(p) == pytest.approx(2e-3 + 4e-6)
    p.products = 0
    assert predict.floor(p) == pytest.approx(1e-3 + 4e-6)


def test_kernels_are_recorded_as_they_are(kernels):
    """A kernel that was changed has to be recorded anew, which shows whether it keeps its budget."""
    old = sorted({key.partition("[")[0] for key in record.changed(kernels)})
    assert not old, f"changed since they were recorded; run `python -m benchmarks.gpu_model`: {', '.join(old)}"


def test_compiled_again_they_are_as_recorded(kernels):
    """A few of them, for the whole record takes minutes; by another Triton they differ."""
    import triton

    recorded_with = record.read(record.KERNELS)["triton"]
    if triton.__version__ != recorded_with:
        pytest.skip(f"recorded with triton {recorded_with}, this is {triton.__version__}")
    qkv = torch.empty(256, 16, 16, 576, dtype=torch.bfloat16, device="meta")
    with trace.as_on_a_gpu():
        [forward, *_] = trace.launches([("patch_attention_forward", (qkv, 4, 2, 2, 0.0, None))]).launches
    entry = record.kernel(model.code_of(forward.compiled), record.source_of(forward.function))
    assert entry.items() <= kernels[model.key_of(forward)].items()


def test_rows_and_page(tmp_path, monkeypatch):
    rows = record.read(record.ROWS)["rows"]
    found = {(r["network"], r["mode"], r["batch"], r["candidate"]) for r in rows}
    complete = itertools.product(predict.NETWORKS, predict.MODES, predict.BATCHES, predict.CANDIDATES)
    assert found == set(complete)
    assert all(r["predicted_ms"] >= r["floor_ms"] > 0 for r in rows if r["batch"] == 256)
    before = page.PAGE.read_text()
    assert "predicted, not measured" in before
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.write()
    assert (tmp_path / "page.md").read_text() == before, "run `python -m benchmarks.gpu_model --page`"


def test_only_one_kernel_of_a_step():
    """The option --only: those launches, and nothing else is compiled."""
    made = single.lines("mobilevitv3_xxs", False, 1, "image_fwd")
    assert len(made) == 1 and made[0][0].startswith("conv3x3.image_fwd") and made[0][1] > 0
    assert single.lines("mobilevitv3_xxs", False, 1, "no such kernel") == []


def test_readme_says_what_is_predicted():
    """Its one sentence of figures is typed by hand."""
    found = record.read(record.ROWS)["rows"]
    times = {(r["network"], r["mode"], r["candidate"]): r["predicted_ms"] for r in found if r["batch"] == 256}

    def span(mode: str, peer: str) -> str:
        ratios = [times[n, m, peer] / t for (n, m, c), t in times.items() if m == mode and c == "ours"]
        return f"{min(ratios):.1f} to {max(ratios):.1f}"

    said = " ".join(Path(__file__).parents[1].joinpath("README.md").read_text().split())
    assert f"inference {span('infer', 'eager')} times as fast as eager PyTorch" in said
    assert f"{span('infer', 'compile')} times as fast as `torch.compile`" in said
    assert f"training steps {span('train', 'eager')} and {span('train', 'compile')} times" in said
