"""The signatures of other libraries: a user of one of them changes one import line.

:mod:`roialign.compat.torchvision`, :mod:`roialign.compat.detectron2`, :mod:`roialign.compat.mmcv`
and :mod:`roialign.compat.mmdet` take torch tensors. None of these libraries is needed. torch is
imported when one of the modules is asked for.
"""

from typing import Any

__all__ = ["detectron2", "mmcv", "mmdet", "torchvision"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return importlib.import_module(f"roialign.compat.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
