"""The operations on GPUs: one Triton source for NVIDIA and AMD, deterministic, without atomics.

`geometry` has coordinates and taps, `kernels` builds the taps of a call and adds over them,
`launch` says which kernels an operation runs, on which grids, with how much private memory. No
framework here.
"""
