import pytest

pytest.register_assert_rewrite("tests.ops.contract", "tests.ops.dropout", "tests.ops.kernel", "tests.ops.measure", "tests.ops.triton_kernel")
