"""What an installed wheel must do, run by `make wheels-test` in fresh environments with torch and the wheel alone, by
path: it imports nothing of the repository. Every network runs in compiled kernels, as it does in plain PyTorch."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    started = time.perf_counter()
    import torch

    loaded = time.perf_counter()
    import mvit3_kernels
    from mvit3_kernels import _native, info
    from mvit3_kernels.nn import guard

    imported = time.perf_counter() - loaded
    assert "site-packages" in mvit3_kernels.__file__, f"not the wheel: {mvit3_kernels.__file__}"
    assert _native.why_not() is None, _native.why_not()
    assert guard.unchanged is not guard.unchanged_python, "the compiled guard is not used"
    torch.manual_seed(0)
    names, worst = mvit3_kernels.list_models(), 0.0
    for name in names:
        model = mvit3_kernels.create_model(name, num_classes=10).eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            with mvit3_kernels.backend("reference"):
                want = model(x)
            with mvit3_kernels.backend("cpu"):
                plain = model(x)
            fused = mvit3_kernels.fuse(model)
            found, rows = fused(x), list(mvit3_kernels.explain(fused, x))
        assert [row.ran for row in rows] == ["fused"], (name, rows)
        errors = [float((y - want).norm() / want.norm()) for y in (plain, found)]
        assert max(errors) < 1e-4, (name, errors)
        worst = max(worst, *errors)
    model = mvit3_kernels.create_model("mobilevitv3_xxs", num_classes=10)
    torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    print(json.dumps({
        "python": sys.version.split()[0], "torch": torch.__version__, "kernels": info.collect()["backends"]["cpu"],
        "networks": len(names), "worst_error": worst, "import_seconds": round(imported, 2),
        "import_torch_seconds": round(loaded - started, 2),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
