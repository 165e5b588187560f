"""A training that is killed, and one that continues it; run by `test_kill.py`.

    python killed.py FOLDER WAY [WAY ...] [--kill-after STEP]

It saves in each of these ways: by Keras's `BackupAndRestore`, or by `ModelCheckpoint` with whole
models or with weights only. Writes the logs of each step to `FOLDER/steps.jsonl`, and what there is
at the end to `FOLDER/result.json`.
"""

import argparse
import json
import os
import signal
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
from keras import ops

from lossargs import attach, live_args, with_args

EPOCHS, STEPS, BATCH = 5, 6, 4
WAYS = ("backup", "model", "weights")


@with_args
def everything(y_true, y_pred, offset, *, advantage, by_step, by_epoch, schedule, log_var, code):  # noqa: PLR0913
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    likelihood = 0.5 * (ops.exp(-log_var) * error + log_var)
    activity = ops.mean(ops.square(code), axis=-1)
    return likelihood + offset + by_epoch + by_step * advantage + schedule * activity


def make_model():
    """With a constant, two values assigned, a schedule, one value trained, a tensor of a layer."""
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    code = keras.layers.Dense(8, "tanh")(x)
    y = keras.layers.Dense(2)(code)
    loss = everything(
        10.0,
        by_step=keras.Variable(0.0, trainable=False),
        by_epoch=keras.Variable(0.0, trainable=False),
        schedule=keras.optimizers.schedules.PolynomialDecay(0.0, EPOCHS * STEPS, 1.0),
        log_var=keras.Variable(0.5),
        code=code,
    )
    model = keras.Model(x, attach(y, loss))
    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    model.optimizer.build(model.trainable_variables)  # else its state is not loaded
    return model


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Assigning(keras.callbacks.Callback):
    """Assigns one value in each epoch; and one after each step, which depends on what it was."""

    def on_epoch_begin(self, epoch, logs=None):
        live_args(self.model)["by_epoch"].assign(0.5**epoch)

    def on_train_batch_end(self, batch, logs=None):
        by_step = live_args(self.model)["by_step"]
        by_step.assign(0.75 * by_step + 0.25)


class Killing(keras.callbacks.Callback):
    """Writes down each step, and ends the process without a word."""

    def __init__(self, path, *, after=None, in_file=None, between_files=None):
        super().__init__()
        self.path, self.after = path, after
        self.in_file, self.between_files = in_file, between_files

    def on_train_begin(self, logs=None):
        self.path.unlink(missing_ok=True)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        step = self.epoch * STEPS + batch
        with self.path.open("a") as file:
            file.write(json.dumps([step, {k: float(v) for k, v in logs.items()}]) + "\n")
        if step == self.after:
            kill()

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.in_file:  # written, but for what is written at its end
            zipfile.ZipFile.close = h5py.File.close = kill
        if epoch == self.between_files:  # weights, and then the epoch as JSON
            json.dumps = kill


def saving(way, folder):
    """The callback that saves in this way."""
    if way == "backup":
        # The last backup may be damaged, so that there are two.
        return keras.callbacks.BackupAndRestore(
            folder, double_checkpoint=True, delete_checkpoint=False
        )
    if way == "model":
        return keras.callbacks.ModelCheckpoint(folder / "{epoch:03d}.keras")
    return keras.callbacks.ModelCheckpoint(
        folder / "{epoch:03d}.weights.h5", save_weights_only=True
    )


def newest(folder, load):
    """What is loaded of the newest file that can be read, the epoch after it, and damaged files."""
    damaged = []
    for file in sorted(folder.glob("*"), reverse=True):
        try:
            return load(file), int(file.name.partition(".")[0]), damaged
        except (OSError, ValueError, zipfile.BadZipFile):
            damaged.append(file.name)
    return None, 0, damaged


def found(way, folder):
    """The model as it was saved, or a new one, the epoch to continue with, and damaged files."""
    if way == "model":
        model, *rest = newest(folder, keras.saving.load_model)
        return model or make_model(), *rest
    model = make_model()
    if way == "weights":
        return model, *newest(folder, model.load_weights)[1:]
    return model, 0, []  # the callback finds the epoch


def train(model, epoch, folder, callbacks=(), **kill_at):
    rng = np.random.default_rng(0)
    x, y, more = rng.normal(size=(3, STEPS * BATCH, 4)).astype("float32")
    steps = folder / "steps.jsonl"
    history = model.fit(
        x, y[:, :2], sample_weight={"advantage": more[:, 0]}, batch_size=BATCH, shuffle=False,
        initial_epoch=epoch, epochs=EPOCHS, verbose=0,
        callbacks=[Assigning(), Killing(steps, **kill_at), *callbacks],
    ).history  # fmt: skip
    # Not by name: two models of one process have different ones.
    weights = [
        ops.convert_to_numpy(variable.value).tolist()
        for variable in (*model.variables, *model.optimizer.variables)
    ]
    live = {name: ops.convert_to_numpy(v.value).tolist() for name, v in live_args(model).items()}
    made = dict(map(json.loads, steps.read_text().splitlines()))
    result = {"history": history, "weights": weights, "live": live, "steps": made}
    (folder / "result.json").write_text(json.dumps(result))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("ways", choices=WAYS, nargs="+")
    parser.add_argument("--kill-after", type=int, dest="after")
    parser.add_argument("--kill-in-file", type=int, dest="in_file", metavar="EPOCH")
    parser.add_argument("--kill-between-files", type=int, dest="between_files", metavar="EPOCH")
    options = vars(parser.parse_args())
    folder, ways = options.pop("folder"), options.pop("ways")
    for way in ways:
        (folder / way).mkdir()
    train(make_model(), 0, folder, [saving(way, folder / way) for way in ways], **options)


if __name__ == "__main__":
    main()
