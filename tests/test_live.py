"""Live arguments: each kind, followed step by step, in precision, in the logs."""

import keras
import numpy as np
import pytest
from keras import ops

import losses
import networks
from helpers import (
    BACKEND,
    KERAS,
    attached,
    error_of,
    fixed,
    linear_model,
    logs_of,
    objects_of_lossargs,
    predictions,
    raising,
    step_itself,
    to_float,
)
from lossargs import ArgumentError, AttachError, LossArgs, attach, live_args, with_args

pytestmark = pytest.mark.fit
each = pytest.mark.parametrize


def bound():
    return losses.shifted(fixed())


def made(model, loss, **options):
    model.compile("sgd", loss=loss, **options)
    return model


def test_live_values_are_followed_without_another_trace(data):
    """A variable has its value of now, a schedule that of the step; evaluation counts no step."""
    counts, traces = [], []

    @with_args
    def counting(y_true, y_pred, shift, *, step):
        traces.append(shift)
        return keras.losses.mean_squared_error(y_true, y_pred) + shift + step

    shift = keras.Variable(0.0, trainable=False)  # of a Python number: weakly typed on JAX
    model = attached(counting(shift=shift, step=step_itself()))

    def train(step):
        shift.assign(10 * step)
        model.reset_metrics()
        logs = model.train_on_batch(data.x, data.y, return_dict=True)
        expected = {"loss": error_of(data) + 11 * step, "shift": 10 * step, "step": step}
        assert logs == pytest.approx(expected, rel=1e-5, abs=1e-4)
        counts.append(len(traces))

    for step in range(5):
        train(step)
    if BACKEND == "torch":  # not traced: called once a step, and never more
        assert counts == [1, 2, 3, 4, 5]
    else:
        assert counts == [counts[0]] * 5
        assert counts[0] <= 2
    for _ in range(2):
        assert logs_of(model, data.x, data.y)["step"] == pytest.approx(5, abs=1e-4)
    model.predict(data.x, verbose=0)
    train(5)


class Plain(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.5


def test_constraint_and_regularizer_of_a_variable(data):
    scale = keras.Variable(0.5, name="scale")
    scale.constraint = keras.constraints.NonNeg()
    scale.regularizer = keras.regularizers.L2(3.0)
    model = attached(losses.scaled(scale), rate=10.0)
    logs = model.train_on_batch(data.x, data.y, return_dict=True)
    assert logs["loss"] == pytest.approx(0.5 * error_of(data) + 3 * 0.25, rel=1e-5)
    assert to_float(scale) == 0


def test_all_kinds_in_one_loss(data):
    @with_args
    def mixed(y_true, y_pred, constant, *, main, pair, numbers, mask, batch, default=1000.0):  # noqa: PLR0913
        error = main(y_true, y_pred) + constant + default + numbers["a"] * numbers["b"] + batch
        return error + ops.sum(ops.cast(mask, "float32") * pair[0], axis=-1) + pair[1]

    network = linear_model()
    x = network.inputs[0]
    numbers = {"a": fixed(2.0, "a"), "b": step_itself()}
    inner = losses.composed(main=losses.shifted(fixed(5.0)), weight=Plain())
    mask = keras.Input((3,), dtype="bool", name="mask")
    loss = mixed(1, main=inner, pair=[x, ops.max(x)], numbers=numbers, mask=mask)
    model = attached(loss, network)
    x, mask = data.x, data.x > 0
    batch = {"batch": data.weight, "sample_weight": data.weight}
    model.train_on_batch([x, mask], data.y, sample_weight=batch)
    logs = logs_of(model, [x, mask], data.y, sample_weight=batch)
    errors = 0.5 * (np.mean((data.y - predictions(x)) ** 2, axis=1) + 5)
    values = errors + 1003 + data.weight + (mask * x).sum(axis=1) + x.max()
    assert logs["loss"] == pytest.approx(np.mean(values * data.weight), rel=1e-5)
    scalars = {"shift": 5, "weight": 0.5, "numbers_a": 2, "numbers_b": 1, "pair_1": x.max()}
    assert {name: logs[name] for name in scalars} == pytest.approx(scalars, rel=1e-5)
    assert set(live_args(model)) == {"shift", "numbers_a"}


def test_precedence_of_the_call_live_values_and_the_batch(data):
    loss = losses.shifted(fixed(5.0))
    model = attached(loss)
    batch = {"shift": np.full(12, 7.0, "float32")}
    value = logs_of(model, data.x, data.y, sample_weight=batch)["loss"]
    assert value == pytest.approx(error_of(data) + 5, rel=1e-5)
    y_pred, y_true = model(data.x), ops.convert_to_tensor(data.y)
    by_hand = [
        loss(y_true, y_pred) - 5,
        loss(y_true, y_pred, shift=9.0) - 9,
        loss(data.y, predictions(data.x), shift=fixed(9.0)) - 9,
        losses.shifted(2.0)(data.y, y_pred) - 2,  # predictions of a model with another loss
    ]
    assert list(map(to_float, by_hand)) == pytest.approx([error_of(data)] * 4, rel=1e-5)


def test_bool_and_integers_keep_their_dtype(data):
    dtypes = {}

    @with_args
    def watching(y_true, y_pred, **extra):
        for name, value in extra.items():
            dtypes[name] = keras.backend.standardize_dtype(value.dtype)
        return ops.mean(ops.square(y_true - y_pred), axis=-1)

    inputs = {name: keras.Input((2,), dtype=name) for name in ("bool", "int32", "float16")}
    live = {"count": fixed(3, dtype="int32"), "on": fixed(True, dtype="bool")}
    batch = [data.x, *(np.ones((12, 2), name) for name in inputs)]
    logs = logs_of(attached(watching(**inputs, **live)), batch, data.y)
    assert logs == pytest.approx({"loss": error_of(data), "count": 3, "on": 1}, rel=1e-5)
    kept = {"bool": "bool", "int32": "int32", "count": "int32", "on": "bool"}
    assert dtypes == {**kept, "float16": "float32"}


def test_masks_pass_through():
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype("float32")
    x[:, 2:] = 0  # masked
    live = losses.shifted(fixed(0.0))

    def value(loss, put):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4, 3))
        y = keras.layers.Dense(2)(keras.layers.Masking()(inputs))
        model = keras.Model(inputs, put(y))
        model.compile("sgd", loss=loss)
        return logs_of(model, x, np.ones((6, 4, 2), "float32"))["loss"]

    plain = value(losses.shifted(0), lambda y: y)
    assert value(live, lambda y: attach(y, live)) == pytest.approx(plain, rel=1e-6)
    assert value(losses.shifted(0), ops.copy) != pytest.approx(plain, rel=1e-3)


def test_weights(data):
    """Weights of samples and of classes count as with a constant."""
    constant = made(linear_model(), losses.scaled(2.0))
    live = attached(losses.scaled(fixed(2.0)), rate=0.01)
    classes = np.eye(2, dtype="float32")[np.arange(12) % 2]
    for y, weights in (
        (data.y, {"sample_weight": data.weight}),
        (classes, {"class_weight": {0: 1.0, 1: 5.0}}),
    ):
        one, (other, _) = (m.train_on_batch(data.x, y, **weights) for m in (constant, live))
        assert one == pytest.approx(other, rel=1e-6)


def test_logs_of_fit(data, tmp_path):
    loss = losses.shifted(fixed(5.0))
    cubed = losses.scaled.options(name="cubed")(fixed(3.0, "s"), power=3.0)
    model = attached(loss, track=[losses.total(), cubed, loss])
    path = tmp_path / "log.csv"
    options = {"callbacks": [keras.callbacks.CSVLogger(path)], "verbose": 0}
    validation = {"validation_data": (data.x, data.y)}
    history = model.fit(data.x, data.y, batch_size=5, **validation, **options).history
    error, cubes = error_of(data), 3 * np.mean(np.abs(data.y - predictions(data.x)) ** 3)
    logs = {"total": error, "cubed": cubes, "shift": 5, "scale": 3}
    logs |= {"loss": error + 5, "shifted": error + 5}
    logs |= {f"val_{name}": value for name, value in logs.items()}
    assert {name: value for name, (value,) in history.items()} == pytest.approx(logs, rel=1e-5)
    assert set(history) < set(path.read_text().splitlines()[0].split(","))


def test_tracked_losses_read_the_batch_and_the_weights(data):
    loss = losses.composed(main=losses.masked(), weight=fixed(2.0, "weight"))
    model = attached(loss, track=[losses.masked(), losses.scaled()])
    batch = {"mask": data.mask, "sample_weight": data.weight}
    errors = (data.y - predictions(data.x)) ** 2
    masked, scaled = (
        np.mean(one.mean(axis=1) * data.weight) for one in (data.mask * errors, errors)
    )
    expected = {"loss": 2 * masked, "masked": masked, "scaled": scaled, "weight": 2}
    logs = logs_of(model, data.x, data.y, sample_weight=batch)
    assert logs == pytest.approx(expected, rel=1e-5)


def two_outputs(names, *values):
    x = keras.Input((3,), name="x")
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in "ab"}
    one, other = (losses.shifted.options(name=name) for name in names)
    return x, outputs, {"a": one(values[0]), "b": other(values[-1])}


def shifts_of(x, outputs, loss, data):
    """Return what is logged for the arguments, under the names of `live_args`."""
    model = made(keras.Model(x, outputs), loss, run_eagerly=True)
    logs = logs_of(model, data.x, {"a": data.y, "b": data.y})
    shifts = {name: value for name, value in logs.items() if "shift" in name}
    assert set(live_args(model)) == set(shifts)
    return shifts


@each("at_once", [True, False])
@each("shared", [True, False])
def test_names_that_two_losses_share(data, at_once, shared):
    values = [fixed()] if shared else [fixed(1.0), fixed(2.0)]
    x, outputs, loss = two_outputs(["one", "two"], *values)
    one_by_one = {name: attach(outputs[name], loss[name]) for name in outputs}
    shifts = shifts_of(x, attach(outputs, loss) if at_once else one_by_one, loss, data)
    assert shifts == ({"shift": 1} if shared else {"one_shift": 1, "two_shift": 2})


def test_names_that_clash(data):
    x, outputs, loss = two_outputs(["same", "same"], fixed(1.0), fixed(2.0))
    with raising(AttachError, "'same_shift'", "options(name="):
        attach(outputs, loss)
    outputs = {name: attach(outputs[name], loss[name]) for name in outputs}
    assert list(shifts_of(x, outputs, loss, data).values()) == [1, 2]  # by the names of layers
    for name in ("loss", "shift"):
        with raising(AttachError, f"'{name}'", "in the logs"):
            attach(linear_model(), bound(), track=losses.total.options(name=name)())


def test_names_that_keras_logs_as_well(data):
    x, outputs, _ = two_outputs("ab", 1.0)
    loss = {"a": losses.flexible(a_loss=fixed(), mae=fixed(2.0)), "b": "mse"}
    model = attach(keras.Model(x, outputs), {"a": loss["a"]})
    made(model, loss, metrics={"a": ["mae"], "b": []}, run_eagerly=True)
    logs = logs_of(model, data.x, {"a": data.y, "b": data.y})
    assert logs["flexible_a_loss"] == 1
    assert set(live_args(model)) == {"flexible_a_loss", "flexible_mae"}
    assert logs["a_loss"] > 3


class AutoEncoder(keras.Model):
    def __init__(self, loss, track=()):
        super().__init__()
        self.encoder, self.decoder = keras.layers.Dense(2), keras.layers.Dense(2)
        self.loss_args, self.steps = LossArgs(loss, track=track), 0

    def train_step(self, *args):
        self.steps += 1
        return super().train_step(*args)

    def call(self, x):  # does not pass `training` on
        code = self.encoder(x)
        return self.loss_args(self.decoder(code), code=code)


class Changing(AutoEncoder):
    def call(self, x):
        return ops.tanh(super().call(x))


@with_args
def sparse(y_true, y_pred, *, code, weight=1.0):
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    return error + weight * ops.mean(ops.abs(code), axis=-1)


@with_args
def optional(y_true, y_pred, *, code=None):
    return keras.losses.mean_squared_error(y_true, y_pred)


def test_subclassed_model(data):
    loss = sparse(weight=step_itself())
    model = AutoEncoder(loss, track=[sparse.options(name="only_error")(weight=0.0)])
    model.compile(keras.optimizers.SGD(0.0), loss=loss)
    options = {"batch_size": 4, "epochs": 2, "validation_data": (data.x, data.y), "verbose": 0}
    history = model.fit(data.x, data.y, shuffle=False, **options).history
    code = ops.convert_to_numpy(model.encoder(data.x))
    y_pred = ops.convert_to_numpy(model.decoder(code))
    error, sizes = np.mean((data.y - y_pred) ** 2), np.abs(code).reshape(3, -1).mean(axis=1)
    penalties = [sizes @ steps / 3 for steps in ([0, 1, 2], [3, 4, 5])]
    assert history["loss"] == pytest.approx([error + one for one in penalties], rel=1e-4)
    assert history["val_only_error"] == pytest.approx([error] * 2, rel=1e-5)
    assert history["weight"] == pytest.approx([2, 5])
    assert history["val_weight"] == pytest.approx([3, 6])
    np.testing.assert_allclose(model.predict(data.x, verbose=0), y_pred, atol=1e-6)
    assert logs_of(model, data.x, data.y)["weight"] == pytest.approx(6)
    assert model.steps


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
        assert logs_of(model, data.x, data.y)["loss"] == pytest.approx(scale * error, rel=1e-5)


@pytest.mark.skipif(KERAS < (3, 12), reason="newer than that")
def test_rematerialization(data):
    with keras.RematScope(mode="activations"):
        model = attached(losses.shifted(fixed(5.0)))
        logs = model.train_on_batch(data.x, data.y, return_dict=True)
        assert logs == pytest.approx({"loss": error_of(data) + 5, "shift": 5}, rel=1e-5)
    with keras.RematScope(mode="full"):
        layer = LossArgs(losses.flexible())
        y_pred = layer(ops.convert_to_tensor(predictions(data.x)), a=ops.ones(12))
    value = losses.flexible()(ops.convert_to_tensor(data.y), y_pred)
    assert to_float(value) == pytest.approx(error_of(data) + 1, rel=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="a train step as JAX has it")
def test_train_step_of_the_guide_for_jax(data):
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
            of_layer = self.loss_args.metrics[0]
            logs = of_layer.stateless_result(metrics[-len(of_layer.variables) :])
            return {"loss": loss, **logs}, (trainable, state, optimizer, metrics)

        def call(self, x, training=None):
            return super().call(x)

    loss = sparse(weight=fixed(3.0, "weight"))
    model = made(Guide(loss, track=[sparse.options(name="tracked")(weight=0.0)]), loss)
    model(data.x)
    model.optimizer.build(model.trainable_variables)
    history = model.fit(data.x, data.y, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert np.isnan(history["weight"]).all()  # and no zero that looks like a value
    assert np.isnan(history["tracked"]).all()

    @with_args
    def decay(y_true, y_pred, code):
        return ops.mean(code, axis=-1) + ops.sum(ops.square(model.encoder.kernel))

    model = made(Guide(loss := decay()), loss)  # whose loss reads a weight that is frozen there
    with raising(ArgumentError, "decay", "state", "stateless_compute_loss"):
        model.fit(data.x, data.y, verbose=0)


def changed_after(loss):
    network = linear_model()
    return keras.Model(network.inputs[0], 2 * attach(network.outputs[0], loss))


NOT_ATTACHED = [
    "shifted(shift=<",
    "has live arguments ('shift')",
    "attach(model, loss)",
    "shift=...",
]
OTHER = "shifted(shift=<variable 'shift'>)", "Compile with the attached loss", "attach(model, loss)"
WRONG = {
    "variable": (lambda: made(linear_model(), bound()), NOT_ATTACHED),
    "schedule": (lambda: made(linear_model(), losses.shifted(step_itself())), NOT_ATTACHED),
    "input": (lambda: made(linear_model(), losses.shifted(keras.Input((2,)))), NOT_ATTACHED),
    "layer": (lambda: made(linear_model(), losses.shifted(networks.head())), NOT_ATTACHED),
    "changed output": (lambda: made(changed_after(loss := bound()), loss), NOT_ATTACHED),
    "bound anew": (lambda: made(attach(linear_model(), bound()), bound()), OTHER),
    "constant": (lambda: made(attach(linear_model(), bound()), losses.shifted(1.0)), OTHER),
    "name": (lambda: made(attach(linear_model(), bound()), "mse"), [*OTHER, "'mse'"]),
    "metric": (
        lambda: made(attach(linear_model(), loss := bound()), loss, metrics=[loss]),
        ["metric", "track=["],
    ),
    "changing call": (lambda: made(Changing(sparse()), sparse()), ["'code'", "self.loss_args("]),
    "default": (lambda: made(Changing(optional()), optional()), ["'code'", "self.loss_args("]),
}


@each(("make", "words"), WRONG.values(), ids=WRONG)
def test_model_that_does_not_fit_the_loss(data, make, words):
    model = make()
    with raising(AttachError, *words):
        model.fit(data.x, data.y, verbose=0)


def test_predictions_without_live_values(data):
    loss, y_true = losses.shifted(fixed()), ops.convert_to_tensor(data.y)
    for call in (loss, loss.call):
        with pytest.raises(AttachError, match=r"'shift'.*`y_pred`"):
            call(y_true, ops.convert_to_tensor(predictions(data.x)))
    with pytest.raises(AttachError, match="another loss, shifted"):
        loss(y_true, attach(linear_model(), losses.shifted(fixed()))(data.x))
    assert repr(losses.flexible(a=keras.Variable(1.0, name="v"), b=loss.args["shift"])) == (
        "flexible(a=<trainable variable 'v'>, b=<variable 'shift'>)"
    )


INPUT = keras.Input((2,))
CALLS = {
    "unknown": (lambda layer, y: layer(y, kode=y), ["'kode'", "Did you mean 'code'?"]),
    "twice": (lambda layer, y: layer(y, code=y, weight=y), ["'weight' of sparse(weight=<variable"]),
    "dict": (lambda layer, y: layer({"a": y}, code=y), ["dict", "one tensor"]),
    "list": (
        lambda _, y: LossArgs(losses.described(what=INPUT))(y, [y, y]), ["2 tensors", "reads 1"]
    ),
    "none": (
        lambda _, y: LossArgs(losses.described(what=INPUT))(y),
        ["'what' of described(what=<symbolic tensor", "self.loss_args(y_pred, what=...)"],
    ),
    "no bound loss": (lambda _, y: LossArgs("mse"), ["'mse'", "with_args(function)(...)"]),
}  # fmt: skip


@each(("call", "words"), CALLS.values(), ids=CALLS)
def test_wrong_call_of_the_layer(call, words, data):
    layer = LossArgs(sparse(weight=fixed(3.0, "weight")))
    for y in (INPUT, ops.convert_to_tensor(data.y)):
        with raising(AttachError, *words):
            call(layer, y)


def test_steps_leave_nothing_behind(data):
    x = keras.Input((3,))
    a, b = keras.layers.Dense(2, name="a")(x), keras.layers.Dense(2, name="b")(x)
    loss = {"a": losses.flexible(live=fixed(), other=b[:, 0]), "b": losses.described(what=[a, b])}
    model = keras.Model(x, attach({"a": a, "b": b}, loss))
    model.compile("sgd", loss=loss)
    counts = []
    for _ in range(3):
        model.train_on_batch(data.x, {"a": data.y, "b": data.y})
        model.evaluate(data.x, {"a": data.y, "b": data.y}, verbose=0)
        model.predict(data.x, verbose=0)
        model(data.x)
        counts.append(objects_of_lossargs())
    assert counts[1] == counts[2]  # before, objects of other tests may be left
