"""The forms in which RoIs come, and the one in which the operations take them.

A form is an array (K, 5) of rows (image_index, x1, y1, x2, y2); a tuple of boxes (K, 4) and an
image index (K,); or a list with an array (K_i, 4) of boxes for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from roialign import _checks

if TYPE_CHECKING:
    from roialign._adapter import Adapter


class Rois(NamedTuple):
    """RoIs as the operations take them."""

    boxes: Any  # (K, 4): x1, y1, x2, y2 in image pixels
    image_index: Any  # (K,)
    levels: Any = None  # (K,): which of several maps, -1 for none


def check(adapter: Adapter, rois: Any, integers: bool = True) -> None:
    """The types in each form; `integers`: boxes may be integers."""
    if isinstance(rois, tuple) and len(rois) == 2:
        boxes, index = rois
        _check_boxes(adapter, "boxes", boxes, integers)
        adapter.check_array("image_index", index)
        if adapter.kind(index.dtype) != "integer":
            raise TypeError(f"`image_index` must have an integer dtype, got {index.dtype}")
    elif isinstance(rois, tuple):  # of how many, is a question of values
        for name, item in zip(("boxes", "image_index"), rois):
            adapter.check_array(name, item)
    elif isinstance(rois, list):
        for i, boxes in enumerate(rois):
            _check_boxes(adapter, f"rois[{i}]", boxes, integers)
    else:
        _check_boxes(adapter, "rois", rois, integers)


def _check_boxes(adapter: Adapter, name: str, boxes: Any, integers: bool) -> None:
    adapter.check_array(name, boxes)
    accepted = ("float", "wide float", "integer") if integers else ("float", "wide float")
    if adapter.kind(boxes.dtype) not in accepted:
        wanted = "a float or integer" if integers else "a float"
        raise TypeError(f"`{name}` must have {wanted} dtype, got {boxes.dtype}")


def check_shapes(rois: Any, images: int) -> None:
    """The shapes in each form, and how many arrays a list has."""
    if isinstance(rois, tuple):
        if len(rois) != 2:
            raise ValueError(
                f"`rois` as a tuple must be (boxes, image_index), got {len(rois)} items"
            )
        boxes, index = rois
        _check_box_shape("boxes", boxes.shape)
        if index.shape != boxes.shape[:1]:
            _checks.shape("image_index", f"({boxes.shape[0]},)", index.shape, False)
    elif isinstance(rois, list):
        if len(rois) != images:
            raise ValueError(
                f"`rois` as a list must have one array per image, {images}, got {len(rois)}"
            )
        for i, boxes in enumerate(rois):
            _check_box_shape(f"rois[{i}]", boxes.shape)
    else:
        got = rois.shape
        _checks.shape("rois", "(K, 5)", got, len(got) == 2 and got[1] == 5)


def _check_box_shape(name: str, got: Sequence[int]) -> None:
    _checks.shape(name, "(K, 4)", got, len(got) == 2 and got[1] == 4)


def parse(adapter: Adapter, rois: Any, images: int) -> Rois:
    """Each form as the one; its types have been checked, its shapes are checked here."""
    return Rois(*boxes_and_index(adapter, rois, images))


def boxes_and_index(adapter: Adapter, rois: Any, images: int) -> tuple[Any, Any]:
    check_shapes(rois, images)
    if isinstance(rois, tuple):
        return rois
    if isinstance(rois, list):
        boxes = adapter.joined(rois)
        return boxes, adapter.repeated([b.shape[0] for b in rois], boxes)
    return adapter.columns(rois)


def arrays(rois: Any) -> list[Any]:
    """The arrays that a form has."""
    return list(rois) if isinstance(rois, (tuple, list)) else [rois]


def gradient_dtype(adapter: Adapter, dtype: Any) -> Any:
    """Of a gradient in boxes of `dtype`: float32 for integers."""
    return adapter.float32 if adapter.kind(dtype) == "integer" else dtype


def like_given(adapter: Adapter, rois: Any, d_boxes: Any) -> Any:
    """A gradient (K, 4) in the form and dtype in which the rois came."""

    def cast(gradient: Any, boxes: Any) -> Any:
        return adapter.cast(gradient, gradient_dtype(adapter, boxes.dtype))

    if isinstance(rois, list):
        pieces = adapter.split(d_boxes, [boxes.shape[0] for boxes in rois])
        return [cast(piece, boxes) for piece, boxes in zip(pieces, rois)]
    if isinstance(rois, tuple):
        return cast(d_boxes, rois[0])
    return adapter.with_index_column(cast(d_boxes, rois))
