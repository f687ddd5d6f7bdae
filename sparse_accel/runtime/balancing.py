"""Which features go together so that all batches have as many tokens: packed batches are then equally long, and no rank
waits for another."""

from __future__ import annotations

import numpy as np

# Features are drawn to steps from windows of this many: enough to balance them, few enough to leave an epoch mixed.
_WINDOW = 4096
# Exchanges that are tried between the longest and the shortest part of each set, where parts are so small that dealing
# leaves something to gain.
_EXCHANGES = 4
_SMALL_PART = 64


def balanced_steps(
    lengths: np.ndarray, order: np.ndarray, step_size: int, generator: np.random.Generator
) -> np.ndarray:
    """The features of `order`, a multiple of `step_size`, as steps `[steps, step_size]` of nearly equal numbers of tokens.

    `lengths` int64 [N] is by feature. Within each window the longest features are dealt to the steps first, each next
    round's longest to the step that has least so far; then the steps of a window are shuffled. `order` decides which
    features share a window and, of those of one length, which comes first: so that other orders give other steps, a
    window has half of them at most.
    """
    window = max(1, min(_WINDOW, len(order) // 2) // step_size) * step_size
    steps = []
    for part in (order[at : at + window] for at in range(0, len(order), window)):
        places = split_evenly(lengths[part], np.arange(len(part))[None], len(part) // step_size)[0]
        steps.append(generator.permutation(part[places]))
    return np.concatenate(steps) if steps else order.reshape(0, step_size)


def split_evenly(lengths: np.ndarray, sets: np.ndarray, num_parts: int) -> np.ndarray:
    """Each row of `sets` `[n, size]` cut into `num_parts` of equally many features and nearly equally many tokens,
    `[n, num_parts, size / num_parts]`; a function of the set, whatever its order."""
    count, size = sets.shape
    # Of features of one length the smaller index comes first, so that the order of a set does not matter.
    sets = np.sort(sets, axis=1)
    sets = np.take_along_axis(sets, np.argsort(-lengths[sets], axis=1, kind="stable"), axis=1)
    parts = np.empty((count, num_parts, size // num_parts), sets.dtype)
    loads = np.zeros((count, num_parts), np.int64)
    for dealt in range(size // num_parts):
        hand = sets[:, dealt * num_parts : (dealt + 1) * num_parts]
        poorest = np.argsort(loads, axis=1, kind="stable")
        np.put_along_axis(parts[:, :, dealt], poorest, hand, axis=1)
        np.put_along_axis(loads, poorest, np.take_along_axis(loads, poorest, axis=1) + lengths[hand], axis=1)
    if count and num_parts > 1 and size // num_parts <= _SMALL_PART:
        for _ in range(_EXCHANGES):
            _exchange(lengths, parts, loads)
    return parts


def _exchange(lengths: np.ndarray, parts: np.ndarray, loads: np.ndarray) -> None:
    """In each set, let the part with most tokens and the one with least exchange the two features that bring them nearest
    to each other, where that is nearer than they are; in place."""
    rows = np.arange(len(parts))
    most, least = loads.argmax(1), loads.argmin(1)
    heavy, light = lengths[parts[rows, most]], lengths[parts[rows, least]]
    gap = loads[rows, most] - loads[rows, least]
    # What is left of the gap when a of the heavy and b of the light part change places: |gap - 2 (a - b)|.
    left = np.abs(gap[:, None, None] - 2 * (heavy[:, :, None] - light[:, None, :])).reshape(len(parts), -1)
    best = left.argmin(1)
    better = rows[left[rows, best] < gap]
    a, b = np.divmod(best[better], light.shape[1])
    m, s = most[better], least[better]
    moved = heavy[better, a] - light[better, b]
    parts[better, m, a], parts[better, s, b] = parts[better, s, b].copy(), parts[better, m, a].copy()
    loads[better, m] -= moved
    loads[better, s] += moved
