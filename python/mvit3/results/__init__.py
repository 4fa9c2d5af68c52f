"""`mvit3 report`: one page from files of benchmark results. Nothing here loads PyTorch."""
