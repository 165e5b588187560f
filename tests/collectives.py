"""The collectives in a step of training on two devices, by hand and with lossargs, as JSON.

Run by `test_distributed.py`.
"""

import collections
import json
import os
import re

BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras  # noqa: E402 - only now is the number of devices set
from cases import CASES, compute_loss, live  # noqa: E402

from helpers import operations_of_train_step  # noqa: E402

CASE = CASES["tiny"]


def on_jax():
    import jax

    keras.distribution.set_distribution(keras.distribution.DataParallel())
    for way in (compute_loss, live):
        x, y = CASE.data(CASE.batch)
        layout = keras.distribution.distribution().get_data_layout(x.shape)
        batch = tuple(jax.device_put(one, layout.backend_layout) for one in (x, y))  # as `fit` does
        program = "\n".join(operations_of_train_step(way(CASE), batch))
        yield re.findall(r"(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program)


def on_tensorflow():
    import tensorflow as tf

    logical = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    for way in (compute_loss, live):
        with strategy.scope():
            model = way(CASE)
        x, y = CASE.data(CASE.batch)
        model.fit(x, y, batch_size=CASE.batch, verbose=0)

        @tf.function
        def step(x, y, model=model):
            return strategy.run(model.train_step, args=((x, y),))

        definition = step.get_concrete_function(tf.constant(x), tf.constant(y)).graph.as_graph_def()
        functions = [list(function.node_def) for function in definition.library.function]
        nodes = [*definition.node, *(node for nodes in functions for node in nodes)]
        yield [node.op for node in nodes if re.search("Collective|AllReduce|AddN", node.op)]


print(json.dumps([collections.Counter(one) for one in globals()[f"on_{BACKEND}"]()]))  # noqa: T201
