"""Mixup and cutmix of batches, with soft targets, as timm 0.3.2 mixes whole batches.

Sources: Zhang et al. 2017 (arXiv:1710.09412), Yun et al. 2019 (arXiv:1905.04899) and, for what is
drawn and rounded how, `timm/data/mixup.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from convnext_jax.errors import InputError


def soft_targets(
    labels: jax.Array,
    num_classes: int,
    smoothing: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Smoothed one-hot targets.

    Args:
      labels: [N] integers.
      num_classes: K.
      smoothing: s; the label gets 1 - s + s / K and every other class s / K.
      dtype: Of the result.

    Returns:
      [N, K] of that dtype.
    """
    off = smoothing / num_classes
    on = 1 - smoothing + off
    return jnp.where(labels[:, None] == jnp.arange(num_classes), on, off).astype(dtype)


def mix(
    keys: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Mix each image with its partner, in groups that share one draw.

    A group corresponds to what one device of the original sees as its batch; the partner of image i
    of n is image n - 1 - i. Mixup adds the two with weights lambda and 1 - lambda; cutmix
    puts a box of the partner in, of an area of 1 - lambda before it is cut off at the edges, and
    lambda then becomes the share that is left of the image. Lambda ~ Beta(alpha, alpha).

    Args:
      keys: [G] typed PRNG keys, one a group.
      images: [N, H, W, C] floating point, normalized; N is a multiple of G.
      labels: [N] integers.
      num_classes: K.
      mixup: Its alpha; 0 for none.
      cutmix: Its alpha; 0 for none.
      prob: Probability that a group is mixed at all.
      switch_prob: Probability of cutmix, where both are on.
      smoothing: See `soft_targets`.

    Returns:
      The images, of the same shape and dtype, and [N, K] targets of at least float32.

    Raises:
      InputError: The images cannot be split into so many groups, or they are not floating point.
    """
    compute = jnp.promote_types(images.dtype, jnp.float32)
    if mixup == 0 and cutmix == 0:
        return images, soft_targets(labels, num_classes, smoothing, compute)
    groups = len(keys)
    if len(images) % groups:
        raise InputError(
            f"a batch of {len(images)} does not divide into {groups} groups to mix within: choose "
            "a group size that divides it"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images to mix are {images.dtype}: normalize them to floats first")
    height, width = images.shape[1:3]
    weights, use_cutmix, boxes = draw_mix(
        keys, height, width, mixup=mixup, cutmix=cutmix, prob=prob, switch_prob=switch_prob
    )

    def grouped(array: jax.Array) -> jax.Array:
        return array.reshape(groups, -1, *array.shape[1:])

    def wide(values: jax.Array) -> jax.Array:
        return values[:, None, None, None, None]

    own = grouped(images)
    partner = own[:, ::-1]
    top, bottom, left, right = (wide(edge) for edge in boxes.T)
    row, column = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    in_box = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    weight = wide(weights)
    blended = own.astype(compute) * weight + partner.astype(compute) * (1 - weight)
    pasted = jnp.where(in_box, partner, own)
    mixed = jnp.where(wide(use_cutmix), pasted, blended.astype(images.dtype))

    # Written as one expression so that it is one pass over one array, however many classes.
    off = smoothing / num_classes
    on = 1 - smoothing + off
    classes = jnp.arange(num_classes)
    own_label = grouped(labels)[..., None]
    weight = weights[:, None, None]
    targets = jnp.where(own_label == classes, on, off) * weight + jnp.where(
        own_label[:, ::-1] == classes, on, off
    ) * (1 - weight)
    return mixed.reshape(images.shape), targets.reshape(-1, num_classes).astype(compute)


def draw_mix(
    keys: jax.Array,
    height: int,
    width: int,
    *,
    mixup: float,
    cutmix: float,
    prob: float = 1.0,
    switch_prob: float = 0.5,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw what `mix` does to each group.

    Args:
      keys: [G] typed PRNG keys.
      height: Of the images, in pixels.
      width: Likewise.
      mixup: See `mix`, as for the others; not both are 0.
      cutmix: Likewise.
      prob: Likewise.
      switch_prob: Likewise.

    Returns:
      [G] float32, the weight of an image itself in its target (and in its pixels, for mixup), 1
      where nothing is mixed; [G] bool, whether it is cutmix; [G, 4] int32, top, bottom, left and
      right of the box, the second and fourth exclusive; empty where it is not cutmix.
    """
    both = jnp.logical_and(mixup > 0, cutmix > 0)
    cutmix_share = jnp.where(both, switch_prob, cutmix > 0)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        uniform_key, weight_key = jax.random.split(key)
        mixed, switch, *centres = jax.random.uniform(uniform_key, (4,))
        is_mixed = mixed < prob
        use_cutmix = is_mixed & (switch < cutmix_share)
        alpha = jnp.where(use_cutmix, cutmix, mixup)
        alpha = jnp.where(alpha > 0, alpha, 1)  # for a group that is not mixed
        weight = jax.random.beta(weight_key, alpha, alpha, dtype=jnp.float32)

        share = jnp.sqrt(1 - weight)
        edges = []
        for centre, side in zip(centres, (height, width), strict=True):
            half = (side * share).astype(jnp.int32) // 2
            centre = (centre * side).astype(jnp.int32)
            edges += [jnp.clip(centre - half, 0, side), jnp.clip(centre + half, 0, side)]
        box = jnp.where(use_cutmix, jnp.stack(edges), 0)
        left_over = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
        weight = jnp.where(use_cutmix, left_over, weight)
        return jnp.where(is_mixed, weight, 1.0).astype(jnp.float32), use_cutmix, box

    return jax.vmap(one)(keys)
