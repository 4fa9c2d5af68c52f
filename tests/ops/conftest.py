import pytest

for name in ("contract", "cpu_kernel", "dropout", "kernel", "measure", "triton_kernel"):
    pytest.register_assert_rewrite(f"tests.ops.{name}")
