"""The part of the Genet and UDR actors that needs TensorFlow: reading their checkpoints, and being the port's reference.

python -m netllm_lib.abr.policies.tensorflow_actor CHECKPOINT OUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from netllm_lib.abr.policies.pensieve import CONV, DENSE, HIDDEN, OUT, SHAPES, save_actor


def read_checkpoint(checkpoint: Path) -> dict[str, np.ndarray]:
    """The actor's 16 variables of a TensorFlow 1 checkpoint (a path without ".index"), as "<layer>/W" and "<layer>/b".

    Raises ValueError if one is missing or has another shape. Critic and optimizer slots are ignored.
    """
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(checkpoint))
    found = reader.get_variable_to_shape_map()
    weights = {}
    for layer, shape in SHAPES.items():
        for part, expected in (("W", shape), ("b", shape[-1:])):
            key = f"actor/{layer}/{part}"
            if tuple(found.get(key, ())) != expected:
                raise ValueError(f"{checkpoint}: variable {key} has shape {found.get(key)}, expected {list(expected)}")
            weights[f"{layer}/{part}"] = np.ascontiguousarray(reader.get_tensor(key), dtype=np.float32)
    return weights


def probabilities(checkpoint: Path, states: np.ndarray) -> np.ndarray:
    """[N, 3] float32, computed by TensorFlow's own operations, convolutions and padding included."""
    import tensorflow as tf

    w, x = read_checkpoint(checkpoint), tf.constant(states, tf.float32)
    dense = [
        tf.nn.relu(x[:, row, -1:] @ w[f"{name}/W"] + w[f"{name}/b"]) for name, row in zip(DENSE, (0, 1, 5), strict=True)
    ]
    convolved = []
    for name, row in zip(CONV, (2, 3, 4), strict=True):  # length 1, six channels
        y = tf.nn.conv2d(x[:, row, None, None, :], w[f"{name}/W"], strides=1, padding="SAME")
        convolved.append(tf.reshape(tf.nn.relu(y + w[f"{name}/b"]), [len(states), -1]))
    merged = tf.concat([dense[0], dense[1], *convolved, dense[2]], axis=1)
    hidden = tf.nn.relu(merged @ w[f"{HIDDEN}/W"] + w[f"{HIDDEN}/b"])
    return tf.nn.softmax(hidden @ w[f"{OUT}/W"] + w[f"{OUT}/b"]).numpy()


if __name__ == "__main__":
    save_actor(read_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]))
