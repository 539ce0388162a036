"""The table of operations: what each takes and gives, and what follows from it in every framework.

The sum of ``forward(features) * d_output`` is linear in the features and in ``d_output``. Its
derivative along a ``tangent`` of the boxes is linear in that too. So there is one trilinear form of
the three, and each operation takes all but one of them and gives its gradient in the one
(docs/spec.md, 5, 7 and 8)::

    forward       (features [, tangent])  ->  d_output, "the output"
    adjoint       (d_output [, tangent])  ->  features
    box_gradient  (d_output, features)    ->  tangent

Without a tangent, `forward` and `adjoint` are the form before it is differentiated in the boxes.
``features`` stands for all maps of a call. Where bins are their largest samples, ``selectors`` are
maps like the features that say which those are: that is how the form is linear. In a call of a user
they are the features; no derivative is taken in them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

# The named dimensions of each array: images n, channels c, RoIs k; h and w are a map's own.
DIMENSIONS = {
    "features": ("n", "c", "h", "w"),
    "selectors": ("n", "c", "h", "w"),
    "d_output": ("k", "c", "p", "q"),
    "tangent": ("k", "xy"),
    "boxes": ("k", "xy"),
    "image_index": ("k",),
    "levels": ("k",),
}
ROIS = ("boxes", "image_index", "levels")
BESIDE = (*ROIS, "selectors")  # what all operations take; levels and selectors may be missing
TAKES = {
    "forward": ("features", "tangent"),
    "adjoint": ("d_output", "tangent"),
    "box_gradient": ("d_output", "features"),
}
GIVES = {"forward": "d_output", "adjoint": "features", "box_gradient": "tangent"}


def result_shapes(
    operation: str, sizes: Mapping[str, Any], maps: Sequence[tuple[Any, Any]]
) -> list[tuple[Any, ...]]:
    """The shape of the result, for the adjoint of one result per map.

    Args:
        sizes: the length of each named dimension of the result but h and w; a box has 4 numbers
            ("xy") if they say nothing else.
        maps: (h, w) of each map.

    >>> result_shapes("adjoint", {"n": 2, "c": 3}, [(8, 9), (4, 5)])
    [(2, 3, 8, 9), (2, 3, 4, 5)]
    """
    if GIVES[operation] == "features":
        return [(sizes["n"], sizes["c"], *size) for size in maps]
    known = {"xy": 4, **sizes}
    return [tuple([known[d] for d in DIMENSIONS[GIVES[operation]]])]


def giving(array: str) -> str:
    """The operation that gives `array`.

    It is the gradient in `array` of every operation that takes it: of the same other arrays, and of
    the gradient of that operation's result in the result's place.

    >>> giving("features")
    'adjoint'
    """
    (operation,) = (name for name, gives in GIVES.items() if gives == array)
    return operation


def terms(
    operation: str, given: Mapping[str, Any], moved: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The arguments of the calls of `operation` whose sum is its derivative.

    Args:
        given: the arrays that it took, by name, without those that are None.
        moved: their tangents, and that of "boxes", without those that are zero.

    Raises:
        NotImplementedError: a second derivative in the boxes.
    """
    for name, tangent in moved.items():
        if name == "boxes":
            require_first_order(operation, given)
            name = "tangent"
        yield {**given, name: tangent}


def require_first_order(operation: str, given: Collection[str]) -> None:
    """Refuses a derivative in the boxes of what is one already."""
    if "tangent" in given or GIVES[operation] == "tangent":
        raise NotImplementedError(
            "roialign has no second derivative in the boxes: take them as constants (detach() in "
            "PyTorch, jax.lax.stop_gradient in JAX, ops.stop_gradient in MindSpore) where a "
            "gradient is differentiated again"
        )


def folded(operation: str, batched: Collection[str]) -> dict[str, str | None]:
    """Into which dimension of each array, and of the result, the axis of a batch is folded.

    None: the array is the same for the whole batch. Where nothing but channels differs, they are
    more channels, and taps are built once. Else they are more RoIs, on more images where maps
    differ too.

    >>> folded("forward", {"features"})["d_output"], folded("forward", {"boxes"})["d_output"]
    ('c', 'k')
    """
    arrays = (*BESIDE, *TAKES[operation], GIVES[operation])
    result = GIVES[operation]
    if all("c" in DIMENSIONS[name] for name in (*batched, result)):
        return {name: "c" if "c" in DIMENSIONS[name] else None for name in arrays}
    maps_differ = not {"features", "selectors"}.isdisjoint((*batched, result))
    return {
        name: "k" if "k" in DIMENSIONS[name] else "n" if maps_differ else None for name in arrays
    }
