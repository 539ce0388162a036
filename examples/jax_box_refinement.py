"""Boxes that are learned through RoIAlign: `torch_box_refinement.py` in plain JAX.

Each image has two shapes on noise, and rough boxes around them. A small network looks twice:

    crops = roi_align(features, rough)     # the rough boxes
    refined = move(rough, refine(crops))   # a first head moves them
    crops = roi_align(features, refined)   # the network looks again
    output = judge(crops)                  # a second head: what is it, how well does the box fit?

`judge` learns the class and the IoU of any box, from the true ones. `refine` learns only from
what `judge` thinks of the refined boxes, and that reaches it in one way alone: the gradient of the
second `roi_align` in its boxes.

    pip install '.[jax,plot]'
    python examples/jax_box_refinement.py             # under two minutes on two cores
    python examples/jax_box_refinement.py --detach    # without that gradient: no box moves

It prints the norm of the gradient that came through the boxes, and the mean IoU of held-out boxes
before and after; it draws both losses, that norm, and some held-out images.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn, random
from refinement_figure import report

from roialign import roi_align

HEIGHT, WIDTH, STRIDE, CHANNELS, BINS = 64, 96, 4, 24, 6
CLASSES = ("disc", "rectangle", "triangle")


def draw_images(key, count):
    """Images (N, 3, H, W) of a left and a right shape, their boxes (N, 2, 4) and classes (N, 2)."""
    keys = iter(random.split(key, 10))
    images = 0.25 * random.normal(next(keys), (count, 3, HEIGHT, WIDTH))
    classes = random.randint(next(keys), (count, 2), 0, len(CLASSES))
    y, x = jnp.arange(HEIGHT)[:, None] + 0.5, jnp.arange(WIDTH) + 0.5
    boxes = []
    for side in range(2):
        size = 18 + 20 * random.uniform(next(keys), (count, 2))
        room = jnp.array([WIDTH / 2, HEIGHT]) - size
        start = random.uniform(next(keys), (count, 2)) * room + jnp.array([side * WIDTH / 2, 0])
        boxes.append(jnp.concatenate([start, start + size], 1))
        u = (x - start[:, :1, None]) / size[:, :1, None] * 2 - 1  # -1 to 1 across the box
        v = (y - start[:, 1:, None]) / size[:, 1:, None] * 2 - 1
        inside = (abs(u) <= 1) & (abs(v) <= 1)
        masks = jnp.stack([u**2 + v**2 <= 1, inside, inside & (abs(u) <= (v + 1) / 2)], 1)
        mask = masks[jnp.arange(count), classes[:, side]]
        stripes = 1 + 0.3 * jnp.sin(0.8 * (x + y))
        colour = 0.6 + 0.9 * random.uniform(next(keys), (count, 3, 1, 1))
        noise = 0.15 * random.normal(next(keys), images.shape)
        images = jnp.where(mask[:, None], colour * stripes - 0.3 + noise, images)
    return images, jnp.stack(boxes, 1), classes


def propose(key, boxes, classes, each):
    """Rough boxes, `each` per shape: (K, 4), image index (K,), true boxes (K, 4), classes (K,)."""
    image_index = jnp.arange(len(boxes)).repeat(2 * each)
    true = boxes.reshape(-1, 4).repeat(each, 0)
    jitter = random.uniform(key, true.shape, minval=-1)
    rough = move(true, jitter * jnp.array([0.3, 0.3, 0.4, 0.4]))
    return rough, image_index, true, classes.ravel().repeat(each)


def move(boxes, deltas):
    """Centres move by a part of the size, sizes change by a power of e."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + size / 2 + size * deltas[:, :2]
    size = size * jnp.exp(deltas[:, 2:])
    return jnp.concatenate([centre - size / 2, centre + size / 2], 1)


def box_iou(a, b):
    """IoU of each row with its row, (K,)."""
    low, high = jnp.maximum(a[:, :2], b[:, :2]), jnp.minimum(a[:, 2:], b[:, 2:])
    common = jnp.maximum(high - low, 0).prod(1)
    return common / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common)


# The network: parameters are a dictionary


def layer(key, *shape):
    """A convolution's or a matrix' weights, and its bias."""
    fan_in = np.prod(shape[1:])
    return random.uniform(key, shape, minval=-1, maxval=1) * fan_in**-0.5, jnp.zeros(shape[0])


def make_parameters(key):
    keys = random.split(key, 7)
    crops = CHANNELS * BINS * BINS
    return {
        "backbone": [
            layer(keys[0], 16, 3, 3, 3),
            layer(keys[1], CHANNELS, 16, 3, 3),
            layer(keys[2], CHANNELS, CHANNELS, 3, 3),
        ],
        "judge": [layer(keys[3], 96, crops), layer(keys[4], len(CLASSES) + 1, 96)],
        "refine": [
            layer(keys[5], 96, crops),
            (jnp.zeros((4, 96)), jnp.zeros(4)),
        ],  # moves nothing yet
    }


def backbone(layers, images):
    for (weights, bias), stride in zip(layers, (2, 2, 1), strict=True):
        images = lax.conv_general_dilated(images, weights, (stride, stride), [(1, 1), (1, 1)])
        groups = images.reshape(len(images), 4, -1)
        groups = (groups - groups.mean(2, keepdims=True)) / (groups.std(2, keepdims=True) + 1e-3)
        images = nn.relu(groups.reshape(images.shape) + bias[:, None, None])
    return images


def head(layers, crops):
    (w1, b1), (w2, b2) = layers
    return nn.relu(crops.reshape(len(crops), -1) @ w1.T + b1) @ w2.T + b2


def pool(features, boxes, image_index):
    rois = boxes, image_index
    return roi_align(features, rois, BINS, spatial_scale=1 / STRIDE, sampling_ratio=2)


def refined_boxes(parameters, features, boxes, image_index):
    deltas = 0.6 * jnp.tanh(head(parameters["refine"], pool(features, boxes, image_index)))
    return move(boxes, deltas)


def judge_loss(output, classes, iou):
    classified = -jnp.take_along_axis(nn.log_softmax(output[:, :-1]), classes[:, None], 1).mean()
    logit = output[:, -1]
    return classified + (nn.softplus(logit) - iou * logit).mean()


def losses(parameters, moved, batch, key, trust, detach):
    """What is minimised; the losses of judge and of the refined boxes.

    `moved` is 0, added to these: the gradient in it is the one that comes through the boxes.
    """
    images, (rough, image_index, true, classes) = batch
    features = backbone(parameters["backbone"], images)
    refined = refined_boxes(parameters, features, rough, image_index)

    # judge and backbone learn what is in a box: in rough, refined and nearly true ones
    near = move(true, 0.1 * random.normal(key, true.shape))
    seen = lax.stop_gradient(jnp.concatenate([rough, refined, near]))
    output = head(parameters["judge"], pool(features, seen, jnp.tile(image_index, 3)))
    learn = judge_loss(output, jnp.tile(classes, 3), box_iou(seen, jnp.tile(true, (3, 1))))

    # refine learns to please judge, through the boxes: judge and the features are held
    held = lax.stop_gradient((parameters["judge"], features))
    second = lax.stop_gradient(refined) if detach else refined + moved
    output = head(held[0], pool(held[1], second, image_index))
    please = judge_loss(output, classes, jnp.ones(len(true)))
    return learn + trust * please, (learn, please)


@functools.partial(jax.jit, static_argnames="detach", donate_argnames="state")
def train_step(state, key, trust, detach):
    """Adam, one step."""
    keys = random.split(key, 3)
    images, boxes, classes = draw_images(keys[0], 16)
    batch = images, propose(keys[1], boxes, classes, 2)
    parameters, first, second, step = state
    gradients, (learn, please) = jax.grad(losses, argnums=(0, 1), has_aux=True)(
        parameters, jnp.zeros_like(batch[1][0]), batch, keys[2], trust, detach
    )
    gradients, came = gradients
    step = step + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)

    def moved(p, m, v):
        return p - 2e-3 * (m / (1 - 0.9**step)) / (jnp.sqrt(v / (1 - 0.999**step)) + 1e-8)

    parameters = jax.tree.map(moved, parameters, first, second)
    return (parameters, first, second, step), (learn, please, jnp.linalg.norm(came))


def train(key, options):
    """The parameters; of each step: the losses of judge and the refined boxes, the box gradient."""
    key, start = random.split(key)
    parameters = make_parameters(start)
    state = (parameters, *[jax.tree.map(jnp.zeros_like, parameters) for _ in range(2)], 0.0)
    history, every = [], max(1, options.steps // 8)
    for step in range(1, options.steps + 1):
        trust = min(1, 4 * step / options.steps) ** 2  # judge has to know something first
        state, row = train_step(state, random.fold_in(key, step), trust, options.detach)
        history.append(jax.device_get(row))
        if step % every == 0:
            judge, refined, box = np.mean(history[-every:], 0)
            print(
                f"step {step:4d}  judge {judge:.3f}  refined {refined:.3f}  box gradient {box:.2e}"
            )
    return state[0], np.array(history)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="box_refinement.png", metavar="PATH")
    parser.add_argument("--detach", action="store_true", help="cut the gradient in the boxes")
    options = parser.parse_args(arguments)

    learning, held_out, jitter = random.split(random.key(options.seed), 3)
    parameters, history = train(learning, options)

    images, boxes, classes = draw_images(held_out, 200)
    rough, image_index, true, _ = propose(jitter, boxes, classes, 1)
    features = backbone(parameters["backbone"], images)
    refined = refined_boxes(parameters, features, rough, image_index)
    arrays = (history, images, image_index, rough, refined, true)
    report(options.output, *map(np.asarray, arrays))


if __name__ == "__main__":
    main()
