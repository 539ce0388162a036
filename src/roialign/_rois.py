"""The forms in which RoIs come, and the one in which the operations take them.

A form is an array (K, 5) of rows (image_index, x1, y1, x2, y2); a tuple of boxes (K, 4) and an
image index (K,); a list with an array (K_i, 4) of boxes for each image; or an array (N, M, 4) with
M boxes for each image. A box that is turned has 5 numbers, in the first three forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from roialign import _checks

if TYPE_CHECKING:
    from roialign._adapter import Adapter


class Rois(NamedTuple):
    """RoIs as the operations take them."""

    boxes: Any  # (K, 4), or (N, M, 4): x1, y1, x2, y2 in image pixels; turned: (K, 5)
    image_index: Any  # (K,); None for (N, M, 4)
    levels: Any = None  # (K,), or (N, M): which of several maps, -1 for none


PASS_A_LIST = ": for an array of boxes per image pass a list, not a tuple"
BOXES_ALONE = (
    ": boxes (K, 4) of one image go in a list, [rois]; of several, with (boxes, image_index)"
)


def check(adapter: Adapter, rois: Any, integers: bool = True) -> None:
    """The types in each form; `integers`: boxes may be integers."""
    if isinstance(rois, tuple) and len(rois) == 2:
        boxes, index = rois
        _check_boxes(adapter, "boxes", boxes, integers)
        check_integers(adapter, "image_index", index)
    elif isinstance(rois, tuple):  # of how many, is a question of values
        for name, item in zip(("boxes", "image_index"), rois):
            adapter.check_array(name, item)
    elif isinstance(rois, list):
        for i, boxes in enumerate(rois):
            _check_boxes(adapter, f"rois[{i}]", boxes, integers)
    else:
        _check_boxes(adapter, "rois", rois, integers)


def check_integers(adapter: Adapter, name: str, index: Any) -> None:
    adapter.check_array(name, index)
    if adapter.kind(index.dtype) != "integer":
        hint = PASS_A_LIST if index.ndim == 2 else _checks.cast(name, index, "int64")
        raise TypeError(f"`{name}` must have an integer dtype, got {index.dtype}{hint}")


def _check_boxes(adapter: Adapter, name: str, boxes: Any, integers: bool) -> None:
    adapter.check_array(name, boxes)
    accepted = ("float", "wide float", "integer") if integers else ("float", "wide float")
    if adapter.kind(boxes.dtype) not in accepted:
        wanted = "a float or integer" if integers else "a float"
        hint = _checks.cast(name, boxes, "float32")
        raise TypeError(f"`{name}` must have {wanted} dtype, got {boxes.dtype}{hint}")


def check_shapes(rois: Any, images: int, numbers: int = 4) -> None:
    """The shapes in each form, and how many arrays a list has; `numbers`: of a box."""
    if isinstance(rois, tuple):
        if len(rois) != 2:
            raise ValueError(
                "`rois` as a tuple must be (boxes, image_index), "
                f"got {len(rois)} items{PASS_A_LIST}"
            )
        boxes, index = rois
        _check_box_shape("boxes", boxes.shape, numbers)
        if index.shape != boxes.shape[:1]:
            hint = PASS_A_LIST if index.ndim == 2 else ""
            _checks.refuse_shape("image_index", f"({boxes.shape[0]},)", index.shape, hint)
    elif isinstance(rois, list):
        if len(rois) != images:
            raise ValueError(
                f"`rois` as a list must have one array per image, {images}, got {len(rois)}: an "
                "image without boxes has one of shape (0, 4)"
            )
        for i, boxes in enumerate(rois):
            _check_box_shape(f"rois[{i}]", boxes.shape, numbers)
    elif numbers != 4:
        if rois.ndim != 2 or rois.shape[1] != 1 + numbers:
            _checks.refuse_shape("rois", f"(K, {1 + numbers})", rois.shape)
    elif rois.ndim == 3:
        if rois.shape[0] != images or rois.shape[2] != 4:
            _checks.refuse_shape("rois", f"(K, 5) or ({images}, M, 4)", rois.shape)
    elif rois.ndim != 2 or rois.shape[1] != 5:
        hint = BOXES_ALONE if rois.shape[-1:] == (4,) else ""
        _checks.refuse_shape("rois", "(K, 5) or (N, M, 4)", rois.shape, hint)


def _check_box_shape(name: str, got: Sequence[int], numbers: int) -> None:
    if len(got) != 2 or got[1] != numbers:
        _checks.refuse_shape(name, f"(K, {numbers})", got)


def parse(
    adapter: Adapter, rois: Any, images: int, levels: Any = None, numbers: int = 4
) -> tuple[Any, Any, Any]:
    """Each form as the one; its types have been checked, its shapes are checked here."""
    boxes, index = boxes_and_index(adapter, rois, images, numbers)
    if levels is not None:
        leading = counts(rois, boxes)
        if tuple(levels.shape) != leading:
            shown = "(K,), here " if len(leading) == 1 else ""
            _checks.refuse_shape("levels", f"{shown}{leading}", levels.shape)
        if len(leading) == 2:
            levels = levels.reshape(boxes.shape[:-1])
    return boxes, index, levels


def boxes_and_index(adapter: Adapter, rois: Any, images: int, numbers: int = 4) -> tuple[Any, Any]:
    check_shapes(rois, images, numbers)
    if isinstance(rois, tuple):
        return rois
    if isinstance(rois, list):
        boxes = adapter.joined(rois).reshape((-1, numbers))  # of none: any number
        return boxes, adapter.repeated([b.shape[0] for b in rois], boxes)
    if rois.ndim == 3 and adapter.takes_any_form:
        return rois, None
    if rois.ndim == 3:
        boxes = rois.reshape((rois.shape[0] * rois.shape[1], 4))
        return boxes, adapter.numbered(rois.shape[0], rois.shape[1], boxes)
    return adapter.columns(rois)


def counts(rois: Any, boxes: Any) -> tuple[int, ...]:
    """The leading dimensions of what has an entry for each RoI: (K,) or (N, M)."""
    if isinstance(rois, (tuple, list)) or rois.ndim != 3:
        return (boxes.shape[0],)
    return tuple(rois.shape[:2])


def arrays(rois: Any, levels: Any = None) -> list[Any]:
    """The arrays that a form has."""
    found = list(rois) if isinstance(rois, (tuple, list)) else [rois]
    return found if levels is None else [*found, levels]


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
    if rois.ndim == 3:
        return cast(d_boxes, rois).reshape(rois.shape)
    return adapter.with_index_column(cast(d_boxes, rois))
