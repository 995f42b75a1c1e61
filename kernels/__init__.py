"""Attention and cache arithmetic on tensors. Knows nothing of models.

One folder per operator, with its float64-able torch reference beside the Triton path and one public function that
picks between them:

    kernels.decode.attend      one new token against a tiered, ragged cache
    kernels.prefill.attend     many rows at once, under structural masks, with column mass and row statistics
    kernels.encode             packing to 8, 4 and 2 bits, demotion and compaction in place
    kernels.select             page scores for sparse reading
    kernels.view               attention as a map of at most width x height cells

Importing this package imports neither torch nor triton.
"""
