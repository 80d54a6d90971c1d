"""Sets of local features that tests make for themselves: views of one scene under a known affine map."""

import math

import numpy as np

from ray_retrieval.descriptors import Local, concatenate

SIZE = (640, 480)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def local_set(descriptors, locations, *, size=SIZE):
    """One image's features, as descriptors [k, d] and locations [k, 2] say."""
    count = len(descriptors)
    return Local(
        offsets=np.array([0, count], np.int64),
        data=np.asarray(descriptors, np.float16),
        locations=np.asarray(locations, np.float32),
        scales=np.ones(count, np.float32),
        scores=np.linspace(2, 1, count, dtype=np.float32),
        sizes=np.array([size], np.int32),
        vectors=np.zeros((1, 0), np.float32),
    )


def draw_set(count, *, dimension=16, seed=0, size=SIZE):
    """Features that have nothing to do with each other."""
    generator = np.random.default_rng(seed)
    descriptors = unit(generator.standard_normal((count, dimension)))
    return local_set(descriptors, generator.uniform(0, 1, (count, 2)) * size, size=size)


def draw_affine(seed):
    """float64 [2, 3]: turned by up to 0.3, scaled by 0.75 to 1.3, sheared a little, moved a little."""
    generator = np.random.default_rng(seed)
    angle, scale = generator.uniform(-0.3, 0.3), generator.uniform(0.75, 1.3)
    turned = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turned @ (np.eye(2) + generator.uniform(-0.1, 0.1, (2, 2)))
    centre = np.array(SIZE) / 2
    moved = centre - linear @ centre + generator.uniform(-20, 20, 2)
    return np.concatenate([linear, moved[:, None]], axis=1)


def draw_view(scene, shared, *, seed=0, noise=2.0, blur=0.1):
    """Another image: `shared` features of the scene where an affine map puts them, the others its own.

    Returns:
        The image, the map float64 [2, 3], and the true pairs int64 [shared, 2].
    """
    generator = np.random.default_rng(1000 + seed)
    count, dimension = scene.data.shape
    affine = draw_affine(seed)
    other = draw_set(count, dimension=dimension, seed=2000 + seed)
    descriptors, locations = other.data.astype(np.float64), other.locations.astype(np.float64)
    places = generator.permutation(count)[:shared]
    own = scene.data[:shared].astype(np.float64)
    spread = blur * generator.standard_normal(own.shape)
    descriptors[places] = unit(own + spread)
    mapped = scene.locations[:shared] @ affine[:, :2].T + affine[:, 2]
    locations[places] = mapped + noise * generator.standard_normal(mapped.shape)
    view = local_set(descriptors, locations)
    return view, affine, np.stack([np.arange(shared), places], axis=1)


def together(sets):
    return concatenate(list(sets))
