"""Triton's interpreter, without what it does again at each call."""

import functools
from types import SimpleNamespace

from triton.runtime import interpreter

NOTHING = SimpleNamespace(restore=lambda: None)


@functools.cache
def hasten():
    """From here on, in this process.

    At each call of a kernel, and of a function that one calls, the interpreter looks through the
    language for what it replaces by its own. That is about half of its time, and here it is done
    once for each module that has kernels.
    """
    patch, patched = interpreter._patch_lang, set()

    def once(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return NOTHING

    interpreter._patch_lang = once
