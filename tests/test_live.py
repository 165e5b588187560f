"""Live arguments: each kind, followed step by step, in precision, in the logs."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import (
    BACKEND,
    KERAS,
    linear_model,
    message_of,
    predictions,
    to_float,
    values_on_tensors,
)
from lossargs import AttachError, LossArgs, attach, live_args, with_args

pytestmark = pytest.mark.fit


def variable(value, name="shift", **options):
    return keras.Variable(value, trainable=False, name=name, **options)


def attached(loss, track=(), optimizer="sgd", **options):
    model = attach(linear_model(), loss, track=track)
    model.compile(optimizer, loss=loss, **options)
    return model


def loss_of(model, x, y, **options):
    """Only the loss; with live scalars, `evaluate` gives them as well."""
    return model.evaluate(x, y, verbose=0, return_dict=True, **options)["loss"]


def error_of(data):
    return np.mean((data.y - predictions(data.x)) ** 2)


def frozen():
    """An optimizer that changes nothing, so that only the argument changes the loss."""
    return keras.optimizers.SGD(0.0)


def test_variable_is_followed_without_another_trace(data):
    traces = []

    @with_args
    def counting(y_true, y_pred, shift):
        traces.append(shift)
        return keras.losses.mean_squared_error(y_true, y_pred) + shift

    shift = keras.Variable(0.0, trainable=False)  # of a Python number: weakly typed on JAX
    model = attached(counting(shift=shift), optimizer=frozen())
    seen = []
    for value in range(100):
        shift.assign(value)
        seen.append(model.train_on_batch(data.x, data.y, return_dict=True))
        if value == 0:
            first = len(traces)
            model.reset_metrics()
        model.reset_metrics()
    np.testing.assert_allclose(
        [logs["loss"] for logs in seen], error_of(data) + np.arange(100), rtol=1e-5
    )
    assert [logs["shift"] for logs in seen] == list(range(100))
    if BACKEND == "torch":  # not traced: called once a step, and never more
        assert len(traces) == 100
    else:
        assert len(traces) == first <= 2


def test_variable_is_assigned_by_a_callback(data):
    shift = variable(0.0)
    model = attached(losses.shifted(shift), optimizer=frozen())
    anneal = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: shift.assign(epoch))
    history = model.fit(data.x, data.y, epochs=3, callbacks=[anneal], verbose=0).history
    np.testing.assert_allclose(history["loss"], error_of(data) + np.arange(3), rtol=1e-5)
    assert history["shift"] == [0, 1, 2]
    shift.assign(10)
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(error_of(data) + 10, rel=1e-5)


def test_schedule_follows_the_steps_of_training(data):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)  # the step itself
    model = attached(losses.shifted(schedule), optimizer=frozen())
    for step in range(5):
        model.reset_metrics()
        logs = model.train_on_batch(data.x, data.y, return_dict=True)
        assert logs["shift"] == pytest.approx(step, abs=1e-4)
        assert logs["loss"] == pytest.approx(error_of(data) + step, rel=1e-5)
        for _ in range(2):  # which does not move it on
            logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
            assert logs["shift"] == pytest.approx(step + 1, abs=1e-4)
        model.predict(data.x, verbose=0)


def test_trainable_log_variance(data):
    """Kendall, Gal and Cipolla (2018): it goes to the logarithm of the residuals' variance."""
    log_var = keras.Variable(0.0, name="log_var")
    network = linear_model()
    network.trainable = False
    loss = losses.gaussian(log_var=log_var)
    model = attach(network, loss)
    assert any(weight is log_var for weight in model.trainable_variables)
    model.compile(keras.optimizers.Adam(0.05), loss=loss)
    model.fit(data.x, data.y, epochs=300, batch_size=12, verbose=0)
    assert float(log_var.numpy()) == pytest.approx(np.log(error_of(data)), abs=1e-3)


def test_constraint_and_regularizer_of_a_variable(data):
    scale = keras.Variable(0.5, name="scale")
    scale.constraint = keras.constraints.NonNeg()
    scale.regularizer = keras.regularizers.L2(3.0)
    loss = losses.scaled(scale)
    model = attach(linear_model(), loss)
    model.compile(keras.optimizers.SGD(10.0), loss=loss)
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(0.5 * error_of(data) + 3 * 0.25, rel=1e-5)
    model.train_on_batch(data.x, data.y)
    assert float(scale.numpy()) == 0


def test_tensor_of_a_layer_has_a_gradient(data):
    x = keras.Input((3,))
    hidden = keras.layers.Dense(2, use_bias=False, name="hidden")(x)
    y = keras.layers.Dense(2, use_bias=False, name="y")(hidden)

    @with_args
    def only_hidden(y_true, y_pred, *, code):
        return ops.mean(ops.square(code), axis=-1) + 0.0 * ops.mean(y_pred, axis=-1)

    loss = only_hidden(code=hidden)
    model = keras.Model(x, attach(y, loss))
    model.compile(keras.optimizers.SGD(1.0), loss=loss)
    kernel, other = (layer.get_weights()[0] for layer in model.layers[1:3])
    model.train_on_batch(data.x, data.y)
    gradient = 2 * data.x.T @ (data.x @ kernel) / (len(data.x) * 2)
    np.testing.assert_allclose(model.layers[1].get_weights()[0], kernel - gradient, atol=1e-5)
    np.testing.assert_allclose(model.layers[2].get_weights()[0], other, atol=1e-7)


def test_input_that_comes_with_the_batch(data):
    mask = keras.Input((2,), dtype="bool", name="mask")
    loss = losses.masked(mask=mask)
    model = attach(linear_model(), loss)
    model.compile("sgd", loss=loss)
    value = loss_of(model, [data.x, data.mask], data.y)
    assert value == pytest.approx(
        np.mean(data.mask * (data.y - predictions(data.x)) ** 2), rel=1e-5
    )
    model.fit([data.x, data.mask], data.y, validation_split=0.25, verbose=0)


def test_all_kinds_in_one_loss(data):
    @with_args
    def mixed(y_true, y_pred, constant, *, variable, schedule, tensor, batch, default=1000.0):  # noqa: PLR0913
        error = ops.mean(ops.square(y_true - y_pred), axis=-1)
        return error + constant + variable + schedule + tensor + batch + default

    network = linear_model()
    tensor = ops.sum(network.inputs[0], axis=-1)
    schedule = keras.optimizers.schedules.PolynomialDecay(20.0, 1, 20.0)
    loss = mixed(1, variable=variable(300.0, "variable"), schedule=schedule, tensor=tensor)
    model = keras.Model(network.inputs[0], attach(network.outputs[0], loss))
    model.compile("sgd", loss=loss)
    batch = {"batch": data.weight, "sample_weight": data.weight}
    value = loss_of(model, data.x, data.y, sample_weight=batch)
    errors = np.mean((data.y - predictions(data.x)) ** 2, axis=1)
    terms = errors + 1321 + data.x.sum(axis=1) + data.weight
    assert value == pytest.approx(np.mean(terms * data.weight), rel=1e-5)


def test_lists_and_dicts_of_live_values(data):
    @with_args
    def weighted(y_true, y_pred, *, parts, weights):
        total = ops.mean(ops.square(y_true - y_pred), axis=-1)
        for part, weight in zip(parts, [weights["a"], weights["b"]], strict=True):
            total = total + weight * ops.mean(part, axis=-1)
        return total

    network = linear_model()
    x, y = network.inputs[0], network.outputs[0]
    weights = {"a": variable(2.0, "a"), "b": variable(3.0, "b")}
    loss = weighted(parts=[x, 2 * x], weights=weights)
    model = keras.Model(x, attach(y, loss))
    model.compile("sgd", loss=loss)
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(error_of(data) + 8 * data.x.mean(), rel=1e-5)
    assert (logs["weights_a"], logs["weights_b"]) == (2, 3)
    assert live_args(model) == {"weights_a": weights["a"], "weights_b": weights["b"]}


def test_bound_losses_with_live_arguments_inside_another(data):
    loss = losses.composed(main=losses.shifted(variable(5.0)), weight=variable(2.0, "weight"))
    model = attached(loss)
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(2 * (error_of(data) + 5), rel=1e-5)
    assert (logs["shift"], logs["weight"]) == (5, 2)


def test_the_call_comes_before_live_and_that_before_the_batch(data):
    loss = losses.shifted(variable(5.0))
    model = attached(loss)
    batch = {"shift": np.full(12, 7.0, "float32")}
    value = loss_of(model, data.x, data.y, sample_weight=batch)
    assert value == pytest.approx(error_of(data) + 5, rel=1e-5)
    y_pred = model(data.x)
    y_true = ops.convert_to_tensor(data.y)
    assert to_float(loss(y_true, y_pred)) == pytest.approx(error_of(data) + 5, rel=1e-5)
    assert to_float(loss(y_true, y_pred, shift=9.0)) == pytest.approx(error_of(data) + 9, rel=1e-5)
    by_hand = loss(data.y, predictions(data.x), shift=variable(9.0))
    assert to_float(by_hand) == pytest.approx(error_of(data) + 9, rel=1e-5)


def test_loop_of_ones_own(data):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)  # the step itself
    loss = losses.shifted(schedule)
    model = attach(linear_model(), loss)

    class Loop:
        def train_step(self):
            return loss(ops.convert_to_tensor(data.y), model(data.x, training=True))

    for step in range(3):
        assert to_float(Loop().train_step()) == pytest.approx(error_of(data) + step, rel=1e-5)


# ---- Precision, masks, dtypes ----


@pytest.fixture
def mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.usefixtures("mixed_precision")
@pytest.mark.skipif(BACKEND == "torch" and KERAS < (3, 12), reason="float16 on a CPU")
def test_small_values_survive_mixed_precision(data):
    seen = {}

    @with_args
    def watching(y_true, y_pred, *, tiny, schedule, tensor):
        seen.update(tiny=tiny, schedule=schedule, tensor=tensor)
        return ops.mean(ops.square(y_true - y_pred), axis=-1) * 0 + tiny * 1e6

    x = keras.Input((3,))
    y = keras.layers.Dense(2)(x)
    schedule = keras.optimizers.schedules.PolynomialDecay(1e-6, 10, 1e-6)
    loss = watching(tiny=variable(1e-6, "tiny"), schedule=schedule, tensor=y)
    model = keras.Model(x, attach(y, loss))
    model.compile("sgd", loss=loss)
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert model.output.dtype == "float16"
    assert logs["tiny"] == logs["schedule"] == np.float32(1e-6)
    assert logs["loss"] == pytest.approx(1, rel=1e-6)
    for name, value in seen.items():
        assert keras.backend.standardize_dtype(value.dtype) == "float32", name
    model.train_on_batch(data.x, data.y)


def test_bool_and_integers_keep_their_dtype(data):
    dtypes = {}

    @with_args
    def watching(y_true, y_pred, **extra):
        for name, value in extra.items():
            dtypes[name] = keras.backend.standardize_dtype(value.dtype)
        return ops.mean(ops.square(y_true - y_pred), axis=-1)

    network = linear_model()
    flag, index = keras.Input((2,), dtype="bool"), keras.Input((), dtype="int32")
    loss = watching(
        flag=flag, index=index, half=keras.Input((1,), dtype="float16"),
        count=variable(3, "count", dtype="int32"), on=variable(True, "on", dtype="bool"),
    )  # fmt: skip
    model = attach(network, loss)
    model.compile("sgd", loss=loss)
    inputs = [data.x, data.mask, np.arange(12, dtype="int32"), np.zeros((12, 1), "float16")]
    logs = model.evaluate(inputs, data.y, verbose=0, return_dict=True)
    assert dtypes == {
        "flag": "bool", "index": "int32", "half": "float32", "count": "int32", "on": "bool"
    }  # fmt: skip
    assert (logs["count"], logs["on"]) == (3, 1)


def test_masks_pass_through(data):
    def model_with(loss, put):
        keras.utils.set_random_seed(1)
        x = keras.Input((4, 3))
        y = keras.layers.Dense(2)(keras.layers.Masking()(x))
        model = keras.Model(x, put(y))
        model.compile("sgd", loss=loss)
        return model

    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype("float32")
    x[:, 2:] = 0  # masked
    y = np.ones((6, 4, 2), "float32")
    live = losses.shifted(variable(0.0))
    constant = losses.shifted(0)
    plain, value, unmasked = (
        loss_of(model_with(loss, put), x, y)
        for loss, put in (
            (constant, lambda tensor: tensor),
            (live, lambda tensor: attach(tensor, live)),
            (constant, ops.copy),
        )
    )
    assert value == pytest.approx(plain, rel=1e-6)
    assert unmasked != pytest.approx(plain, rel=1e-3)


def test_class_and_sample_weights(data):
    live, constant = losses.scaled(variable(2.0, "scale")), losses.scaled(2.0)
    for options in ({"sample_weight": data.weight}, {"class_weight": {0: 1.0, 1: 5.0}}):
        y = np.eye(2, dtype="float32")[np.arange(12) % 2] if "class_weight" in options else data.y
        values = []
        for model in (attached(live), linear_model()):
            if not model.compiled:
                model.compile("sgd", loss=constant)
            logs = model.fit(data.x, y, verbose=0, shuffle=False, **options).history
            values.append(logs["loss"][0])
        assert values[0] == pytest.approx(values[1], rel=1e-6)


# ---- Logs ----


def test_logs_of_fit_and_evaluate(data, tmp_path):
    loss = losses.shifted(variable(5.0))
    track = [losses.total(), losses.scaled.options(name="cubed")(variable(3.0, "s"), power=3.0)]
    model = attached(loss, track=track, optimizer=frozen())
    path = tmp_path / "log.csv"
    history = model.fit(
        data.x, data.y, batch_size=5, epochs=2, validation_data=(data.x, data.y), verbose=0,
        callbacks=[keras.callbacks.CSVLogger(path)],
    ).history  # fmt: skip
    names = ["loss", "shift", "scale", "total", "cubed"]
    assert sorted(history) == sorted([*names, *(f"val_{name}" for name in names)])
    cubed = 3 * np.mean(np.abs(data.y - predictions(data.x)) ** 3)
    for prefix in ("", "val_"):
        np.testing.assert_allclose(history[f"{prefix}total"], error_of(data), rtol=1e-5)
        np.testing.assert_allclose(history[f"{prefix}cubed"], cubed, rtol=1e-5)
        assert history[f"{prefix}shift"] == [5, 5]
    assert set(names) < set(path.read_text().splitlines()[0].split(","))


def test_tracked_losses_read_the_batch_and_the_weights(data):
    @with_args
    def shifted_mask(y_true, y_pred, *, mask, shift):
        error = ops.mean(ops.cast(mask, "float32") * ops.square(y_true - y_pred), axis=-1)
        return error + shift

    loss = shifted_mask(shift=variable(1.0))
    model = attached(loss, track=[losses.masked(), losses.scaled()])
    batch = {"mask": data.mask, "sample_weight": data.weight}
    logs = model.evaluate(data.x, data.y, sample_weight=batch, verbose=0, return_dict=True)
    errors = (data.y - predictions(data.x)) ** 2
    masked = np.mean((data.mask * errors).mean(axis=1) * data.weight)
    assert logs["masked"] == pytest.approx(masked, rel=1e-5)
    assert logs["loss"] == pytest.approx(masked + data.weight.mean(), rel=1e-5)
    assert logs["scaled"] == pytest.approx(np.mean(errors.mean(axis=1) * data.weight), rel=1e-5)


def test_scalar_tensors_are_logged(data):
    network = linear_model()
    largest = ops.max(ops.abs(network.inputs[0]))
    loss = losses.shifted(largest)
    model = keras.Model(network.inputs[0], attach(network.outputs[0], loss))
    model.compile("sgd", loss=loss)
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["shift"] == pytest.approx(np.abs(data.x).max())


def two_outputs(*, names, shared=False):
    x = keras.Input((3,), name="x")
    a, b = keras.layers.Dense(2, name="a")(x), keras.layers.Dense(2, name="b")(x)
    one = variable(1.0)
    other = one if shared else variable(2.0)
    shifted = losses.shifted
    loss = {"a": shifted.options(name=names[0])(one), "b": shifted.options(name=names[1])(other)}
    return x, {"a": a, "b": b}, loss


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_names_that_two_losses_share(data, at_once, shared):
    x, outputs, loss = two_outputs(names=["one", "two"], shared=shared)
    if at_once:
        outputs = attach(outputs, loss)
    else:
        outputs = {name: attach(outputs[name], loss[name]) for name in outputs}
    model = keras.Model(x, outputs)
    model.compile("sgd", loss=loss)
    y = {"a": data.y, "b": data.y}
    history = model.fit(data.x, y, validation_data=(data.x, y), verbose=0).history
    assert sorted(live_args(model)) == (["shift"] if shared else ["one_shift", "two_shift"])
    if shared:
        assert history["shift"] == history["val_shift"] == [1]
    else:
        assert "shift" not in history
        assert (history["one_shift"], history["val_two_shift"]) == ([1], [2])


@pytest.mark.parametrize("at_once", [True, False])
def test_names_that_clash(data, at_once):
    x, outputs, loss = two_outputs(names=["same", "same"])
    text = "'same_shift' would stand for 2 different things in the logs. .*options\\(name="
    if at_once:
        with pytest.raises(AttachError, match=text):
            attach(outputs, loss)
        return
    outputs = {name: attach(outputs[name], loss[name]) for name in outputs}
    model = keras.Model(x, outputs)
    model.compile("sgd", loss=loss)
    logs = model.evaluate(data.x, {"a": data.y, "b": data.y}, verbose=0, return_dict=True)
    one, two = (layer.name for layer in model.layers if isinstance(layer, LossArgs))
    assert (logs[f"{one}_shift"], logs[f"{two}_shift"]) == (1, 2)
    assert sorted(live_args(model)) == sorted([f"{one}_shift", f"{two}_shift"])


@pytest.mark.parametrize(
    ("loss", "track"),
    [
        (lambda: losses.shifted(1), lambda: [losses.total(), losses.total()]),
        (lambda: losses.shifted(1), lambda: [losses.total.options(name="loss")()]),
        (lambda: losses.shifted(variable(1.0)), lambda: [losses.total.options(name="shift")()]),
    ],
)
def test_other_names_that_clash(loss, track):
    with pytest.raises(AttachError, match="would stand for 2 different things in the logs"):
        attach(linear_model(), loss(), track=track())


def test_name_of_a_metric_that_clashes(data):
    loss = losses.flexible(mae=variable(1.0))
    model = attach(linear_model(), loss)
    model.compile("sgd", loss=loss, metrics=["mae"])
    history = model.fit(data.x, data.y, verbose=0).history
    assert history["flexible_mae"] == [1.0]
    assert history["mae"] != [1.0]


# ---- Errors ----


def raises_at_the_first_step(model, data):
    with pytest.raises(AttachError) as error:
        model.fit(data.x, data.y, verbose=0)
    return message_of(error.value)


@pytest.mark.parametrize(
    "value",
    [
        lambda: variable(1.0),
        lambda: keras.optimizers.schedules.ExponentialDecay(1.0, 2, 0.5),
        lambda: keras.Input((2,)),
    ],
)
def test_not_attached(data, value):
    loss = losses.shifted(value())
    model = linear_model()
    model.compile("sgd", loss=loss)
    text = raises_at_the_first_step(model, data)
    assert text.startswith(f"{loss!r} has live arguments ('shift'), and `y_pred` does")
    assert "Write model = attach(model, loss)" in text
    assert "loss(y_true, y_pred, shift=...)" in text
    with pytest.raises(AttachError, match="does not come directly from a model that is attached"):
        loss(data.y, predictions(data.x))
    with pytest.raises(AttachError, match="does not come directly from a model that is attached"):
        loss.call(ops.convert_to_tensor(data.y), ops.convert_to_tensor(predictions(data.x)))


@pytest.mark.parametrize(
    "compiled",
    [
        lambda: losses.shifted(variable(1.0)),  # bound anew
        lambda: losses.shifted(1.0),
        lambda: losses.scaled(variable(1.0)),
        lambda: "mse",
    ],
)
def test_compiled_with_another_loss(data, compiled):
    loss, other = losses.shifted(variable(1.0)), compiled()
    model = attach(linear_model(), loss)
    model.compile("sgd", loss=other)
    with pytest.raises(AttachError) as error:
        model.fit(data.x, data.y, verbose=0)
    text = message_of(error.value)
    assert f"is attached to {loss!r}, and was compiled with {other!r}. Bind once, and give" in text
    assert "For another loss take model = detach(model)" in text


def test_predictions_of_a_model_that_is_attached_to_another_loss(data):
    loss, other = losses.shifted(variable(1.0)), losses.shifted(variable(1.0))
    y_pred = attach(linear_model(), loss)(data.x)
    with pytest.raises(AttachError, match="and this model was attached to another loss, shifted"):
        other(ops.convert_to_tensor(data.y), y_pred)


def test_bound_again_to_the_same_variable_is_the_same_loss(data):
    shift = variable(1.0)
    model = attach(linear_model(), losses.shifted(shift))
    model.compile("sgd", loss=losses.shifted(shift))
    model.fit(data.x, data.y, verbose=0)


def test_as_a_metric(data):
    loss = losses.shifted(variable(1.0))
    model = attach(linear_model(), loss)
    model.compile("sgd", loss=loss, metrics=[loss])
    text = raises_at_the_first_step(model, data)
    assert "has live arguments, and was given to compile as a metric" in text
    assert "attach(..., loss, track=[this one])" in text


def test_output_that_is_changed_after_attach(data):
    loss = losses.shifted(variable(1.0))
    network = linear_model()
    model = keras.Model(network.inputs[0], 2 * attach(network.outputs[0], loss))
    model.compile("sgd", loss=loss)
    assert "`y_pred` does not come directly from a model" in raises_at_the_first_step(model, data)


def test_repr_tells_what_is_trained():
    loss = losses.flexible(a=keras.Variable(1.0, name="v"), b=variable(1.0, "w"))
    assert repr(loss) == "flexible(a=<trainable variable 'v'>, b=<variable 'w'>)"
    assert loss.args["b"] is next(leaf for _, label, leaf in loss.live_leaves() if label == "b")


# ---- Subclassed models ----


class AutoEncoder(keras.Model):
    def __init__(self, loss, track=()):
        super().__init__()
        self.encoder, self.decoder = keras.layers.Dense(2), keras.layers.Dense(2)
        self.loss_args = LossArgs(loss, track=track)

    def call(self, x):
        code = self.encoder(x)
        return self.loss_args(self.decoder(code), code=code)


@with_args
def sparse(y_true, y_pred, *, code, weight=1.0):
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    return error + weight * ops.mean(ops.abs(code), axis=-1)


def test_subclassed_model(data):
    loss = sparse(weight=variable(3.0, "weight"))
    model = AutoEncoder(loss, track=[sparse.options(name="only_code")(weight=0.0)])
    model.compile(frozen(), loss=loss)
    history = model.fit(data.x, data.y, validation_data=(data.x, data.y), verbose=0).history
    code = model.encoder(data.x)
    code_size = np.mean(np.abs(keras.ops.convert_to_numpy(code)))
    y_pred = keras.ops.convert_to_numpy(model.decoder(code))
    error = np.mean((data.y - y_pred) ** 2)
    assert history["loss"][0] == pytest.approx(error + 3 * code_size, rel=1e-5)
    assert history["val_only_code"][0] == pytest.approx(error, rel=1e-5)
    assert history["weight"] == [3]
    np.testing.assert_allclose(model.predict(data.x, verbose=0), y_pred, atol=1e-6)


def test_default_in_a_model_beside_one_that_gives_the_argument(data):
    class Scaling(AutoEncoder):
        def call(self, x):
            y_pred = self.decoder(self.encoder(x))
            return self.loss_args(y_pred, scale=ops.full((ops.shape(x)[0],), 3.0))

    loss = losses.scaled()
    gives, leaves_out = Scaling(loss), linear_model()
    for model in (gives, leaves_out):
        model.compile("sgd", loss=loss)
    for model, scale in ((gives, 3), (leaves_out, 1), (gives, 3)):
        error = np.mean((data.y - model.predict(data.x, verbose=0)) ** 2)
        loss_logged = model.evaluate(data.x, data.y, verbose=0)
        assert loss_logged == pytest.approx(scale * error, rel=1e-5)


def test_own_train_step(data):
    class Doubling(AutoEncoder):
        def train_step(self, *args):
            self.used = True
            return super().train_step(*args)

    loss = sparse(weight=variable(3.0, "weight"))
    model = Doubling(loss)
    model.compile("sgd", loss=loss)
    assert model.fit(data.x, data.y, verbose=0).history["weight"] == [3]
    assert model.used


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda layer, y: layer(y, kode=y), "was called with 'kode', which none of its losses "),
        (lambda layer, y: layer(y, kode=y), "Did you mean 'code'?"),
        (lambda layer, y: layer(y, code=y, weight=y), "'weight' of sparse(weight=<variable"),
        (lambda layer, y: layer({"a": y}, code=y), "called with a dict, and takes the one tensor"),
    ],
)
def test_wrong_call_of_the_layer(call, text):
    layer = LossArgs(sparse(weight=variable(3.0, "weight")))
    with pytest.raises(AttachError) as error:
        call(layer, keras.Input((2,)))
    assert text in message_of(error.value)


def test_symbolic_tensor_in_a_subclassed_model(data):
    loss = sparse(code=keras.Input((2,)))
    model = AutoEncoder(loss)
    model.compile("sgd", loss=loss)
    model.loss_args(keras.Input((2,)), code=keras.Input((2,)))
    with pytest.raises(AttachError) as error:
        model.loss_args(ops.convert_to_tensor(data.y))
    text = message_of(error.value)
    assert "'code' of sparse(code=<symbolic tensor" in text
    assert "self.loss_args(y_pred, code=...)" in text


@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanSquaredError(), None, losses.shifted])
def test_loss_that_no_factory_made(loss):
    with pytest.raises(AttachError, match="is not a loss with arguments. Make one: with_args"):
        LossArgs(loss)


def test_schedule_in_a_subclassed_model_that_does_not_pass_training_on(data):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)  # the step itself
    loss = sparse(weight=schedule)
    model = AutoEncoder(loss)
    model.compile("sgd", loss=loss)
    options = {"batch_size": 4, "epochs": 2, "validation_data": (data.x, data.y), "verbose": 0}
    history = model.fit(data.x, data.y, **options).history
    assert history["weight"] == pytest.approx([2, 5])
    assert history["val_weight"] == pytest.approx([3, 6])
    model.predict(data.x, verbose=0)
    assert model.evaluate(data.x, data.y, verbose=0, return_dict=True)["weight"] == pytest.approx(6)


class Changing(AutoEncoder):
    def call(self, x):
        return ops.tanh(super().call(x))


@with_args
def optional(y_true, y_pred, *, code=None):
    return keras.losses.mean_squared_error(y_true, y_pred)


@pytest.mark.parametrize("loss", [optional, sparse])
def test_values_of_the_layer_that_do_not_arrive(data, loss):
    model = Changing(loss())
    model.compile("sgd", loss=loss())
    with pytest.raises(AttachError, match="live arguments \\('code'.*does not come directly"):
        model.fit(data.x, data.y, verbose=0)


@with_args
def awkward(y_true, y_pred, **extra):
    return ops.mean(ops.square(y_true - y_pred), axis=-1) + sum(extra.values())


@pytest.mark.parametrize("name", ["given", "tensors", "self", "y", "mask", "inputs"])
def test_names_of_arguments_in_a_call_of_the_layer(data, name):
    layer = LossArgs(awkward())
    y_pred = layer(ops.convert_to_tensor(predictions(data.x)), **{name: ops.ones(12)})
    value = awkward()(ops.convert_to_tensor(data.y), y_pred)
    assert to_float(value) == pytest.approx(error_of(data) + 1, rel=1e-5)


def test_loss_that_tracks_itself(data):
    loss = losses.shifted(variable(5.0))
    logs = attached(loss, track=[loss]).evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["shifted"] == pytest.approx(logs["loss"], rel=1e-6)


def test_output_loss_as_a_name(data):
    x, outputs, _ = two_outputs(names=["one", "two"])
    loss = {"a": losses.flexible(a_loss=variable(1.0))}
    model = attach(keras.Model(x, list(outputs.values())), loss)
    model.compile("sgd", loss={**loss, "b": "mse"})
    assert set(model.fit(data.x, [data.y, data.y], verbose=0).history) == {
        "loss",
        "a_loss",
        "b_loss",
        "flexible_a_loss",
    }


class Plain(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.5


def test_schedule_that_gives_a_python_number(data):
    model = attached(losses.shifted(Plain()))
    assert model.fit(data.x, data.y, verbose=0).history["shift"] == [0.5]


def test_variable_assigned_after_each_batch(data):
    class Assign(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs["shift"])
            live_args(self.model)["shift"].assign(batch + 1.0)

    seen = []
    model = attached(losses.shifted(variable(0.0)))
    model.fit(data.x, data.y, batch_size=4, callbacks=[Assign()], verbose=0)
    assert seen == [0, 1, 2]


@pytest.mark.skipif(KERAS < (3, 12), reason="newer than that")
def test_rematerialization(data):
    with keras.RematScope(mode="activations"):
        model = attached(losses.shifted(variable(5.0)))
        model.fit(data.x, data.y, verbose=0)
    with keras.RematScope(mode="full"):
        layer = LossArgs(awkward())
        y_pred = layer(ops.convert_to_tensor(predictions(data.x)), a=ops.ones(12))
    value = awkward()(ops.convert_to_tensor(data.y), y_pred)
    assert to_float(value) == pytest.approx(error_of(data) + 1, rel=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="a train step as JAX has it")
def test_train_step_of_the_guide_for_jax_has_no_logs(data):
    import jax

    class Guide(AutoEncoder):
        def compute_loss_and_updates(self, trainable, state, x, y):
            y_pred, state = self.stateless_call(trainable, state, x, training=True)
            return self.compute_loss(x, y, y_pred), state

        def train_step(self, state, data):
            trainable, state, optimizer, metrics = state
            gradient = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
            (loss, state), gradients = gradient(trainable, state, *data)
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
            logs, rest = {"loss": loss}, list(metrics)
            for metric in self.metrics:
                own, rest = rest[: len(metric.variables)], rest[len(metric.variables) :]
                if metric.name in ("weight", "tracked"):
                    logs[metric.name] = metric.stateless_result(own)
            return logs, (trainable, state, optimizer, metrics)

        def call(self, x, training=None):
            return super().call(x)

    loss = sparse(weight=variable(3.0, "weight"))
    model = Guide(loss, track=[sparse.options(name="tracked")(weight=0.0)])
    model.compile("sgd", loss=loss)
    model(data.x)
    model.optimizer.build(model.trainable_variables)
    history = model.fit(data.x, data.y, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert np.isnan(history["weight"]).all()  # and no zero that looks like a value
    assert np.isnan(history["tracked"]).all()


# ---- Nothing is left behind ----


def test_trained_models_are_let_go(data):
    def trained():
        loss = losses.flexible(a=variable(1.0), b=keras.Input(()))
        model = attach(linear_model(), loss)
        model.compile("sgd", loss=loss)
        model.fit([data.x, data.weight], data.y, verbose=0)
        return weakref.ref(model.layers[-1]), weakref.ref(loss)

    left = [trained() for _ in range(2)]
    keras.backend.clear_session()
    for _ in range(3):
        gc.collect()
    assert [reference() for references in left[:1] for reference in references] == [None, None]


def test_nothing_is_left_on_tensors(data):
    loss = losses.flexible(a=variable(1.0), b=keras.Input(()))
    model = attach(linear_model(), loss)
    model.compile("sgd", loss=loss)
    inputs = [data.x, data.weight]
    for _ in range(3):
        model.train_on_batch(inputs, data.y)
        model.evaluate(inputs, data.y, verbose=0)
        model.predict(inputs, verbose=0)
        model(inputs)
    gc.collect()
    assert not values_on_tensors()


def test_nothing_is_left_where_losses_read_outputs(data):
    x = keras.Input((3,))
    a, b = keras.layers.Dense(2, name="a")(x), keras.layers.Dense(2, name="b")(x)
    loss = {"a": losses.described(what={"own": a, "other": b}), "b": losses.described(what=[a, b])}
    model = keras.Model(x, attach({"a": a, "b": b}, loss))
    model.compile("sgd", loss=loss)
    y = {"a": data.y, "b": data.y}
    for _ in range(3):
        model.train_on_batch(data.x, y)
        model(data.x)
    gc.collect()
    assert not values_on_tensors()
