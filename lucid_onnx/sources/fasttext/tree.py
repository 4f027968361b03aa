"""The tree of hierarchical softmax, which fastText builds anew from the counts of the labels whenever it reads a file.

Every label is a leaf. A node with children has a row of the output table; its logistic is the probability of the right
child, and a label's is the product along the way to it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

#: fastText's infinity: no count of a file may reach it.
_INFINITE = 10**15


class Tree(NamedTuple):
    """A tree of n labels, as steps from a node to one of its children.

    Step ``s`` < n - 1 goes from inner node ``s`` to its left child, step ``n - 1 + s`` to its right one, and step
    ``2 * (n - 1)`` is none.

    Attributes:
        before: int64 [2n - 1], the step before each: the one that leads to the node where it begins.
        last: int64 [n], the last step to each label.
        depth: the most steps to a label.
        order: int64 [n], the labels from left to right.
    """

    before: np.ndarray
    last: np.ndarray
    depth: int
    order: np.ndarray


def build(counts: np.ndarray) -> Tree:
    """Huffman's tree over the counts of labels, int64 [n]; equal counts as fastText takes them.

    Raises:
        ValueError: a count is negative, or all together are 10**15 or more.
    """
    num_labels = len(counts)
    inner = num_labels - 1
    weights = [int(count) for count in counts]
    if min(weights) < 0 or sum(weights) >= _INFINITE:
        raise ValueError(f"the counts of the labels must be at least 0, and less than {_INFINITE} together")
    # Node i < num_labels is a label, and num_labels + s is inner node s, made in this order.
    weights += [_INFINITE] * inner
    step_to = [2 * inner] * (num_labels + inner)  # the step that leads to each node
    leaf, node = num_labels - 1, num_labels
    children = []
    for made in range(inner):
        both = []
        for side in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                child, leaf = leaf, leaf - 1
            else:
                child, node = node, node + 1
            step_to[child] = side * inner + made
            both.append(child)
        weights[num_labels + made] = weights[both[0]] + weights[both[1]]
        children.append(both)
    depth = [0] * (num_labels + inner)
    order = []
    todo = [num_labels + inner - 1]
    while todo:
        at = todo.pop()
        if at < num_labels:
            order.append(at)
            continue
        for child in reversed(children[at - num_labels]):
            depth[child] = depth[at] + 1
            todo.append(child)
    into = np.array(step_to[num_labels:], np.int64)  # the step to each inner node
    before = np.concatenate([into, into, [2 * inner]])
    return Tree(before, np.array(step_to[:num_labels]), max(depth), np.array(order))
