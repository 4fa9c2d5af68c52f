"""A model of how fast the GPU kernels are, made without a GPU: launches on fake tensors, kernels compiled offline,
instructions counted in their machine code. It predicts; it does not measure.

    python -m benchmarks.gpu_model                          every network, and docs/gpu_model.md
    python -m benchmarks.gpu_model --networks mobilevitv3_s --modes train --batches 256
    python -m benchmarks.gpu_model --configs --modes train --batches 256     other configurations, only printed
    python -m benchmarks.gpu_model --only project_bwd --networks mobilevitv3_s --modes train --batches 256
                                                            single kernels, only printed
    python -m benchmarks.gpu_model --page                   only the page, from what is recorded
"""
