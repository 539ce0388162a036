"""The operations for devices that gather slowly and multiply matrices fast (docs/ascend.md).

`products` are the kernels, `launch` runs them, with the functions of `roialign._triton.launch`. The
rule of coordinates is that of `roialign._triton.geometry`. They have run on no device yet.
"""
