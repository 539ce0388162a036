"""The operations on GPUs: one Triton source for NVIDIA and AMD, deterministic, without atomics.

`geometry` has coordinates and taps, `kernels` builds the taps of a call and adds over them, `rows`
has the forward of most calls, `launch` says which kernels an operation runs, on which grids, with
how much private memory. `sampled` has largest samples, `turned` boxes that are turned. No framework
here.
"""
