from ..triton_tools import run_interpreted
from .triton_kernel import needs_triton


@needs_triton
def test_interpreter():
    run_interpreted("ops/rounded_weights_interpreted.py")
