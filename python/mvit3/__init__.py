"""The application: trains and evaluates networks of the MobileViT family with the fused ops of `mvit3_kernels`."""
