"""Makes jax-VERSION-NAME.bin, exports that later versions must load: `python make_jax.py NAME...`.

Run it with the oldest JAX that is supported, as newer ones read what it wrote.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import roialign

HERE = Path(__file__).parent
CALLS = [f"roialign_{name}_maps" for name in ("forward", "adjoint", "box_gradient")]


def arguments():
    """Maps, boxes, image index, and levels."""
    shapes = (2, 3, 9, 11), (2, 3, 5, 6)
    maps = [jnp.asarray(np.cos(np.arange(np.prod(s)).reshape(s)), jnp.float32) for s in shapes]
    boxes = [[1, 2, 9, 8], [0.5, 0, 20, 16.5], [-3, 4, 7, 30], [6, 6, 6.25, 6.5]]
    index, levels = (jnp.array(x, jnp.int32) for x in ([1, 0, 0, 1], [0, 1, -1, 1]))
    return tuple(maps), jnp.array(boxes, jnp.float32), index, levels


def one_map(maps, boxes, index, levels):
    """By the public function; no number of the rule is the default."""
    convention = roialign.Convention(
        pixel_offset=0.25, input_offset=0.5, end_offset=1, min_size=2, adaptive="floor"
    )
    options = {"spatial_scale": (0.5, 0.4), "sampling_ratio": 3, "convention": convention}
    return roialign.roi_align(maps[0], (boxes, index), (3, 2), **options)


def adaptive(maps, boxes, index, levels):
    return roialign.roi_align(maps[0], (boxes, index), (3, 2), convention="mindspore")


def two_maps(maps, boxes, index, levels):
    from roialign import _rois, _rule, jax as adapter

    rule = _rule.vector(roialign.conventions["half_pixel"], 2)
    rois = _rois.Rois(boxes, index, levels)
    return adapter.forward(maps, rois, (3, 2), (0.5, 0.4, 0.25, 0.3), rule)


def with_gradients(pool):
    """All three operations in one program."""

    def function(maps, boxes, index, levels):
        output, pull = jax.vjp(lambda m, b: pool(m, b, index, levels), maps, boxes)
        return output, *pull(jnp.sin(output))

    return jax.jit(function)


POOLS = {pool.__name__: pool for pool in (one_map, adaptive, two_maps)}


def main(names):
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")  # no one's folders
    consent = [export.DisabledSafetyCheck.custom_call(name) for name in CALLS]
    for name in names or POOLS:
        exported = export.export(with_gradients(POOLS[name]), disabled_checks=consent)(*arguments())
        path = HERE / f"jax-{roialign.__version__}-{name}.bin"
        path.write_bytes(exported.serialize())
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])
