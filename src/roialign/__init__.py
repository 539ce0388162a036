"""RoIAlign: exact, fast, deterministic, differentiable in features and boxes.

Start with :func:`roi_align`, which has every library's convention by name, or with
:class:`ROIAlign`, which is MindSpore's operator.
"""

from typing import Any

from roialign._api import (
    ROIAlign,
    get_num_threads,
    roi_align,
    roi_align_adjoint,
    roi_align_box_gradient,
    set_num_threads,
)
from roialign._rule import Convention, conventions

__all__ = [
    "Convention",
    "ROIAlign",
    "conventions",
    "get_num_threads",
    "roi_align",
    "roi_align_adjoint",
    "roi_align_box_gradient",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    if name in ("torch", "jax", "mindspore", "compat"):  # when asked for: they import the framework
        import importlib

        return importlib.import_module(f"roialign.{name}")
    if name == "__version__":
        from importlib.metadata import version  # slow to import, so only when asked

        return version("roialign")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
