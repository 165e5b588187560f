"""One loss with every kind of argument, trained on several devices or in several processes.

    python distributed.py --engine data-parallel --devices 4
    python distributed.py --engine ddp --processes 2

The engines are those of Keras and of the backends. Each gives the results of `--engine single`:

    data-parallel, model-parallel   keras.distribution on JAX, also in several processes
    mirrored                        tf.distribute.MirroredStrategy on TensorFlow
    multi-worker                    MultiWorkerMirroredStrategy on TensorFlow, with Keras's train
                                    step in a custom loop: `fit` fails under it (keras #20585)
    ddp                             DistributedDataParallel on PyTorch, in a custom loop: there,
                                    Keras's `fit` does not combine processes

Devices are parts of the CPU, and processes communicate over loopback, so that this runs anywhere.
`--backup FOLDER` saves after each epoch, and continues from there when started again.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BACKENDS = {
    "data-parallel": "jax", "model-parallel": "jax",
    "mirrored": "tensorflow", "multi-worker": "tensorflow",
    "ddp": "torch",
}  # fmt: skip
PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--engine", choices=("single", *BACKENDS), default="single")
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"), help="of `single`")
PARSER.add_argument("--devices", type=int, default=2, help="of each process; default: %(default)s")
PARSER.add_argument("--processes", type=int, default=1, help="default: %(default)s")
PARSER.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
PARSER.add_argument(
    "--backup", type=Path, metavar="FOLDER", help="save there, and continue from there"
)
PARSER.add_argument("--kill-in-epoch", type=int, metavar="N", help="to try the backup")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write logs and weights there")
PARSER.add_argument("--rank", type=int, help=argparse.SUPPRESS)
PARSER.add_argument("--ports", type=int, action="append", help=argparse.SUPPRESS)
if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    backend = BACKENDS.get(OPTIONS.engine, OPTIONS.backend)
    if backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = backend
    if backend == "jax" and OPTIONS.engine != "single":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={OPTIONS.devices}"

import keras  # noqa: E402 - only now is its backend chosen
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402

from lossargs import attach, live_args, with_args  # noqa: E402

SAMPLES, BATCH = 64, 16


@with_args
def everything(y_true, y_pred, offset, *, advantage, live, schedule, log_var, code):
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    likelihood = 0.5 * (ops.exp(-log_var) * error + log_var)
    return likelihood + offset + live * advantage + schedule * ops.mean(ops.square(code), axis=-1)


def make_model():
    """A constant, an array of the batch, a value assigned, a schedule, one trained, a tensor."""
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    code = keras.layers.Dense(8, "tanh", name="code")(x)
    y = keras.layers.Dense(2, name="y")(code)
    loss = everything(
        10.0,
        live=keras.Variable(0.0, trainable=False),
        schedule=keras.optimizers.schedules.PolynomialDecay(0.0, 10, 1.0),
        log_var=keras.Variable(0.5),
        code=code,
    )
    return keras.Model(x, attach(y, loss)), loss


def make_data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, SAMPLES, 4)).astype("float32")
    return x, y[:, :2], {"advantage": rng.normal(size=SAMPLES).astype("float32")}


class Annealing(keras.callbacks.Callback):
    """Assigns a live value by hand; and, to try the backup, ends the process without a word."""

    def __init__(self, kill_in_epoch):
        super().__init__()
        self.kill_in_epoch = kill_in_epoch

    def on_epoch_begin(self, epoch, logs=None):  # noqa: ARG002
        live_args(self.model)["live"].assign(epoch + 1.0)

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002
        if self.kill_in_epoch is not None and batch == 1:
            epoch = int(live_args(self.model)["live"].numpy()) - 1
            if epoch == self.kill_in_epoch:
                os.kill(os.getpid(), signal.SIGKILL)


def by_fit(options):
    """Where Keras's `fit` knows the engine: a scope for the model, and `fit` as ever."""
    with SCOPES[options.engine](options):
        model, loss = make_model()
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss=loss)
    data, batch = make_data(), BATCH
    if options.engine.endswith("-parallel") and options.processes > 1:
        # Each process has its share of each batch.
        data = keras.tree.map_structure(lambda array: my_share(array, options), data)
        batch //= options.processes
    callbacks = [Annealing(options.kill_in_epoch)]
    if options.backup:
        folder = options.backup / str(options.rank)
        callbacks.insert(0, keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False))
    history = model.fit(
        data[0], data[1], sample_weight=data[2], batch_size=batch, epochs=options.epochs,
        shuffle=False, verbose=0, callbacks=callbacks,
    ).history  # fmt: skip
    return history, model


def my_share(array, options):
    steps = array.reshape(-1, options.processes, BATCH // options.processes, *array.shape[1:])
    return steps[:, options.rank].reshape(-1, *array.shape[1:])


def single(options):  # noqa: ARG001
    return contextlib.nullcontext()


def data_parallel(options):
    join_jax(options)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    return contextlib.nullcontext()


def model_parallel(options):
    join_jax(options)
    total = options.devices * options.processes
    mesh = keras.distribution.DeviceMesh((total // 2, 2), ["batch", "model"])
    layout = keras.distribution.LayoutMap(mesh)
    layout["code/kernel"] = (None, "model")
    layout["code/bias"] = ("model",)
    layout["y/kernel"] = ("model", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
        )
    )
    return contextlib.nullcontext()


def join_jax(options):
    if options.processes > 1:
        keras.distribution.initialize(
            f"127.0.0.1:{options.ports[0]}", options.processes, process_id=options.rank
        )


def mirrored(options):
    import tensorflow as tf

    logical = [tf.config.LogicalDeviceConfiguration()] * options.devices
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
    devices = [f"/cpu:{number}" for number in range(options.devices)]
    return tf.distribute.MirroredStrategy(devices).scope()


SCOPES = {
    "single": single, "data-parallel": data_parallel, "model-parallel": model_parallel,
    "mirrored": mirrored,
}  # fmt: skip


def by_train_step(options):
    """TensorFlow in several processes: Keras's train step, run by the strategy."""
    import tensorflow as tf

    workers = [f"127.0.0.1:{port}" for port in options.ports]
    task = {"type": "worker", "index": options.rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        model, loss = make_model()
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss=loss)
        model.optimizer.build(model.trainable_variables)
    sharded = tf.data.Options()
    sharded.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices(make_data()).batch(BATCH).with_options(sharded)
    batches = strategy.experimental_distribute_dataset(batches)

    @tf.function
    def step(batch):
        strategy.run(model.train_step, args=(batch,))

    history, first = {}, 0
    saved = options.backup / str(options.rank) if options.backup else None
    for file in sorted(saved.glob("*.weights.h5")) if saved else ():
        first = int(file.name.partition(".")[0]) + 1
    if first:
        model.load_weights(file)
    annealing = Annealing(options.kill_in_epoch)
    annealing.set_model(model)
    for epoch in range(first, options.epochs):
        annealing.on_epoch_begin(epoch)
        model.reset_metrics()
        for number, batch in enumerate(batches):
            step(batch)
            annealing.on_train_batch_end(number)
        for name, value in model.get_metrics_result().items():
            mean = strategy.reduce("MEAN", value, axis=None)
            history.setdefault(name, []).append(float(mean))
        if saved:
            saved.mkdir(exist_ok=True)
            model.save_weights(saved / f"{epoch}.weights.h5")
    return history, model


def by_ddp(options):
    """PyTorch: its own loop, as Keras's guide to distributed training has it."""
    import torch
    import torch.distributed as dist

    address = f"tcp://127.0.0.1:{options.ports[0]}"
    dist.init_process_group("gloo", address, rank=options.rank, world_size=options.processes)
    model, loss = make_model()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, y, extra = keras.tree.map_structure(lambda array: my_share(array, options), make_data())
    known, size = live_args(model), BATCH // options.processes
    history, first = {"loss": [], **{name: [] for name in known}}, 0
    saved = options.backup / "weights.pt" if options.backup else None
    if saved and saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    for epoch in range(first, options.epochs):
        known["live"].assign(epoch + 1.0)
        losses = []
        for step in range(len(x) // size):
            batch = slice(step * size, (step + 1) * size)
            if epoch == options.kill_in_epoch and step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            y_pred = parallel(torch.as_tensor(x[batch]), training=True)
            value = loss(y[batch], y_pred, advantage=extra["advantage"][batch])
            logs = {name: ops.convert_to_numpy(known[name]).item() for name in known}
            value.backward()
            optimizer.step()
            dist.all_reduce(value := value.detach())
            losses.append(value.item() / options.processes)
        history["loss"].append(float(np.mean(losses)))
        for name in known:
            history[name].append(logs[name])
        if saved and options.rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "epoch": epoch}, saved)
    dist.barrier()
    dist.destroy_process_group()
    return history, model


LOOPS = {"multi-worker": by_train_step, "ddp": by_ddp}


def launch(options):
    """Start the processes, and end all of them where one fails."""
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.socket()) for _ in range(options.processes)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [f"--ports={one.getsockname()[1]}" for one in sockets]
    started = [
        subprocess.Popen([sys.executable, *sys.argv, f"--rank={rank}", *ports])
        for rank in range(options.processes)
    ]
    try:
        while (codes := [one.poll() for one in started]).count(None):
            if failed := [code for code in codes if code]:
                return abs(failed[0])
            time.sleep(0.1)
        return max(map(abs, codes))
    finally:
        for one in started:
            one.kill()


def main(options):
    if options.rank is None:
        if options.processes > 1 or options.engine in LOOPS:
            return launch(options)
        options.rank = 0
    history, model = LOOPS.get(options.engine, by_fit)(options)
    if options.rank == 0:
        for epoch in range(len(history["loss"])):
            shown = ", ".join(f"{name} {values[epoch]:.4f}" for name, values in history.items())
            print(f"{options.engine}: {shown}", flush=True)
        if options.json:
            weights = {v.path: ops.convert_to_numpy(v.value).tolist() for v in model.variables}
            options.json.write_text(json.dumps({"history": history, "weights": weights}))
    return 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
