import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvit3_kernels.ops import BatchNorm, batch_norm_act
from tests.triton_tools import SHARED_MEMORY_LIMITS, offline, resources, run_interpreted

pytest.importorskip("triton")

SILU = 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_interpreter():
    run_interpreted("ops/batch_norm_act_interpreted.py")


def compiled(channels: int, dtype: torch.dtype, training: bool, residual: bool, few: bool = False):
    """Every kernel of one pass forward and backward, compiled as the launchers configure it; `few`: for few rows and
    parts."""
    from mvit3_kernels.ops.batch_norm_act import kernels
    from mvit3_kernels.ops.batch_norm_act.triton import configurations, few_configuration

    def configuration(tensors: int, sums: bool = False) -> dict:
        return few_configuration(channels) if few else configurations(channels, dtype.itemsize, tensors, sums)[0]

    f32, rows, parts, per_part, eps = torch.float32, 1000, 3, 400, 1e-5
    flags = {"ACT": SILU, "TRAINING": training, "C": channels}
    most = {"MOST": 16 if few and training else None}
    norm = (f32, f32, f32, f32)
    if training:
        yield kernels.moments_fwd_kernel.warmup(
            dtype, f32, rows, parts, per_part, C=channels, **configuration(1, sums=True), grid=(1,)
        )
    yield kernels.normalize_fwd_kernel.warmup(
        dtype, dtype if residual else None, f32, f32, f32 if training else None, None, dtype, f32, f32,
        rows, per_part, parts, per_part, eps,
        **flags, **most, **configuration(2 if residual else 1), grid=(1,),
    )  # fmt: skip
    yield kernels.sums_bwd_kernel.warmup(
        dtype, dtype, *norm, dtype, f32, rows, parts, per_part, eps,
        **flags, DY_STRIDE=2 * channels, **configuration(2, sums=True), grid=(1,),
    )  # fmt: skip
    yield kernels.input_bwd_kernel.warmup(
        dtype, dtype, *norm, f32, dtype, f32, f32, rows, parts, per_part, eps,
        **flags, **most, DY_STRIDE=2 * channels, **configuration(2), grid=(1,),
    )  # fmt: skip


# The configurations differ in the columns of a tile (a power of 2 up to 32), the last tile being full or not, and
# 16-byte rows or not.
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "channels"), [(90, 1), (90, 7), (90, 8), (90, 64), (90, 80), (80, 7), (80, 80), (86, 320)]
)
def test_kernels_fit(architecture, channels, dtype, training):
    with offline(architecture):
        few = compiled(channels, dtype, training, residual=True, few=True) if channels in (7, 80) else ()
        kernels = [(kernel, 128) for kernel in compiled(channels, dtype, training, residual=channels == 64)]
        kernels += [(kernel, 32 * dtype.itemsize) for kernel in few]  # four values a thread
        for kernel, load_bits in kernels:
            used = resources(kernel)
            assert used.stack == 0, f"{kernel.metadata.name} spills: {used}"
            assert used.registers <= 128, (
                f"{kernel.metadata.name}: two programs of 256 threads do not fit a multiprocessor: {used}"
            )
            assert used.shared <= min(SHARED_MEMORY_LIMITS.values()), f"{kernel.metadata.name}: {used}"
            assert used.load_bits >= load_bits or channels in (1, 7), f"{kernel.metadata.name}: {used}"


def test_kernels_compile_for_amd():
    with offline("gfx942"):
        for kernel in compiled(80, torch.float16, training=True, residual=True):
            assert kernel.asm["hsaco"] and kernel.metadata.shared <= 65536


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_silu_is_few_instructions(dtype):
    """Its gradient by tanh where bfloat16 hides that error; else without what scales tiny and huge numbers."""
    with offline(90):
        [*_, backward] = (kernel.asm["ptx"] for kernel in compiled(80, dtype, True, False))
    coarse = dtype is torch.bfloat16
    assert ("tanh.approx" in backward, "rcp.approx.ftz" in backward) == (coarse, not coarse)


def test_one_binary_for_every_map_size():
    """Multi-scale training must not compile again: sizes are not specialised on, C and the dtype are."""
    from mvit3_kernels.ops.batch_norm_act import kernels
    from mvit3_kernels.ops.batch_norm_act.triton import configurations

    def compile(rows):
        config = configurations(64, 2, 1)[0]
        return kernels.moments_fwd_kernel.warmup(
            torch.bfloat16, torch.float32, rows, rows, rows, C=64, **config, grid=(1,)
        )

    with offline(90):
        assert compile(1) is compile(16) is compile(999)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training, monkeypatch):
    """torch.compile sees one call of the op each way, with CUDA tensors that exist in name only."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(x, weight, bias, mean, var, residual):
        return batch_norm_act(x, BatchNorm(weight, bias, mean, var, training), "silu", residual)[0]

    with FakeTensorMode():
        x, residual = (torch.empty(2, 5, 7, 24, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        parameters = [torch.empty(24, device="cuda") for _ in range(4)]
        y = torch.compile(call, fullgraph=True, backend=record)(x, *parameters, residual)
    assert y.shape == x.shape and y.dtype == torch.bfloat16 and y.device.type == "cuda"
    [graph] = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("mvit3.batch_norm_act" in target for target in targets) == 1, targets
