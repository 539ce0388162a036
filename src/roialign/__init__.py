"""RoIAlign: exact, fast, deterministic, differentiable in features and boxes.

Start with :func:`roi_align`, which has every library's convention by name, or with
:class:`ROIAlign`, which is MindSpore's operator.
"""

from typing import TYPE_CHECKING, Any

from roialign._api import (
    ROIAlign,
    assign_levels,
    get_num_threads,
    multiscale_roi_align,
    multiscale_roi_align_adjoint,
    multiscale_roi_align_box_gradient,
    roi_align,
    roi_align_adjoint,
    roi_align_box_gradient,
    roi_align_rotated,
    roi_align_rotated_adjoint,
    roi_align_rotated_box_gradient,
    set_num_threads,
)
from roialign._rule import Convention, conventions

if TYPE_CHECKING:
    from roialign._explain import explain
    from roialign._grid import SamplingGrid, sampling_grid
    from roialign._identify import Identification, Match, identify

__all__ = [
    "Convention",
    "Identification",
    "Match",
    "ROIAlign",
    "SamplingGrid",
    "assign_levels",
    "conventions",
    "explain",
    "get_num_threads",
    "identify",
    "multiscale_roi_align",
    "multiscale_roi_align_adjoint",
    "multiscale_roi_align_box_gradient",
    "roi_align",
    "roi_align_adjoint",
    "roi_align_box_gradient",
    "roi_align_rotated",
    "roi_align_rotated_adjoint",
    "roi_align_rotated_box_gradient",
    "sampling_grid",
    "set_num_threads",
]

_MODULES = {  # not imported before use
    "Identification": "_identify",
    "Match": "_identify",
    "SamplingGrid": "_grid",
    "explain": "_explain",
    "identify": "_identify",
    "sampling_grid": "_grid",
}


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(f"roialign.{_MODULES[name]}"), name)
    if name in ("torch", "jax", "mindspore", "compat"):  # when asked for: they import the framework
        import importlib

        return importlib.import_module(f"roialign.{name}")
    if name == "__version__":
        from importlib.metadata import version  # slow to import, so only when asked

        return version("roialign")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
