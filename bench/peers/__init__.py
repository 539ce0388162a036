"""One small module per implementation; `worker` serves one of them over a pipe.

A module has `forward(problem)` and may have `adjoint` and `box_gradient`: each takes the worker's
`Problem`, does everything that a user does once, and returns a function of no arguments that
computes the result and waits for it. `array(result)` makes it a NumPy array. `DTYPES` and
`LAYOUTS` say what the module takes beyond float32 and NCHW, `versions()` what it runs.
A ValueError means that the implementation lacks the case.
"""
