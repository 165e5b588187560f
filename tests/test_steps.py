"""What a loss reads, the value and number of a step, variables in callbacks, names of users."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from helpers import BACKEND, KERAS, attached, logs_of, step_itself, to_float
from lossargs import Adapter, ArgumentError, LossArgs, attach, with_args

pytestmark = [pytest.mark.fit, pytest.mark.filterwarnings("ignore:`shuffle=True`")]
variable = functools.partial(keras.Variable, name="secret")
each = pytest.mark.parametrize
X, Y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")


def run(model, how, y=Y):
    return getattr(model, how)(X, y, **({} if how == "train_on_batch" else {"verbose": 0}))


def mse(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


plus = with_args(lambda y_true, y_pred, s: mse(y_true, y_pred) + ops.sum(s))
times = with_args(lambda y_true, y_pred, s: ops.mean(s[0] * ops.square(y_true - y_pred), axis=-1))
wrapped = with_args(lambda y_true, y_pred, inner: inner(y_true, y_pred))
sum_of = with_args(lambda y_true, y_pred, inner, s: inner(y_true, y_pred) + s)


def network(units=1):
    return keras.Sequential([keras.Input((3,)), layers.Dense(units, kernel_initializer="zeros")])


class Subclassed(keras.Model):
    def __init__(self, loss, given=()):
        super().__init__()
        self.dense, self.drop = layers.Dense(1, kernel_initializer="zeros"), layers.Dropout(0.1)
        self.loss_args, self.given = LossArgs(loss), dict(given)

    def call(self, x, training=None):
        return self.loss_args(self.dense(self.drop(x, training=False)), **self.given)


class Nested(keras.Model):
    def __init__(self, loss):
        super().__init__()
        self.part, self.drop = attach(network(), loss), layers.Dropout(0.5)

    def call(self, x):
        return self.part(self.drop(x, training=False))


def compiled(model, loss, rate=0.0, **options):
    model.compile(keras.optimizers.SGD(rate), loss=loss, **options)
    return model


def steps(model):
    return {int(to_float(one)) for one in model.variables if one.path.endswith("step")}


def assert_refused(model, how, *words, y=Y):
    before = [one.copy() for one in model.get_weights()]
    with pytest.raises(ArgumentError, match="argument") as caught:
        run(model, how, y)
    assert all(word in str(caught.value) for word in words)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def reader(read, *args):
    return lambda y_true, y_pred: mse(y_true, y_pred) + read(*args)


NORMALIZED = keras.Sequential([keras.Input((1,)), layers.BatchNormalization(name="secret")])
CAPTURES = [
    ("fit", lambda v: type("Holder", (), {"method": lambda _, a, b: mse(a, b) + v})().method),
    ("evaluate", lambda v: reader(functools.partial(ops.multiply, v, 2.0))),
    ("fit", lambda v: reader(lambda box: box["a"][0][1]["b"], {"a": [(1, {"b": v})]})),
    ("train_on_batch", lambda v: reader(with_args(reader(lambda: v))(), Y, Y)),
    ("fit", lambda _: reader(lambda norm: ops.mean(norm(Y, training=True)), NORMALIZED)),
    ("fit", lambda v: reader(lambda: (v.assign(3.0), 0.0)[1])),
]


@each(("how", "capture"), CAPTURES)
def test_captured_variable(how, capture):
    function, model = capture(variable(1.0)), network()
    loss = with_args(function)()
    assert_refused(compiled(model, loss, 0.1), how, "secret", function.__name__)
    run(compiled(model, plus(1.0)), how)


@each("place", ["inner", "tracked", "second", "variable", "schedule"])
def test_captured_by_a_part_of_the_loss(place):
    bad, x = with_args(reader(variable(1.0).__mul__, 1.0))(), keras.Input((3,))
    live = step_itself() if place == "schedule" else variable(0.0)
    inner = wrapped(wrapped(bad)) if place == "inner" else bad
    loss, model, y = sum_of(inner, live), network(), Y
    if place == "second":
        model = keras.Model(x, [layers.Dense(1)(x), layers.Dense(1)(x)])
        loss, y = [plus(live), bad], [Y, Y]
    loss = plus(live) if place == "tracked" else loss
    model = attach(model, loss, track=[bad] if place == "tracked" else ())
    for how in ("fit", "evaluate"):
        assert_refused(compiled(model, loss, run_eagerly=True), how, "secret", "<lambda>", y=y)


def test_captured_after_the_first_step():
    box = [0.0]
    loss = with_args(reader(box.__getitem__, 0))()
    model = compiled(network(), loss)
    model.evaluate(X, Y, verbose=0)
    box[0] = variable(1.0)
    assert_refused(compiled(model, loss), "fit", "secret")


def test_model_reads_its_own_state():
    x, drop, norm = keras.Input((3,)), layers.Dropout(0.5, seed=1), layers.BatchNormalization()
    part = keras.Sequential([keras.Input((3,)), layers.Dense(2), drop])
    model = keras.Model(x, norm(layers.Dense(1)(part(x))))
    model.total = keras.metrics.Mean(name="total")

    def reading(y_true, y_pred):
        model.total.update_state(y_pred)
        noise = ops.mean(drop(y_pred, training=True)) + keras.random.uniform((), seed=3)
        noise = noise + mse(y_true, norm(layers.Rescaling(2.0)(y_pred), training=True)) + X[0, 0]
        return noise + ops.sum(ops.square(part.layers[0].kernel))

    compiled(model, with_args(reading)(), metrics=[loss := plus(2.0)])
    for one in (model, compiled(network(), loss)):
        for how in ("evaluate", "fit", "evaluate"):
            run(one, how)


@each("read", [lambda: keras.metrics.Mean()(2.0), lambda: keras.random.uniform(())])
def test_own_loop_makes_variables(read):
    assert np.isfinite(to_float(with_args(reader(read))()(Y, network()(X))))


class Held(Adapter):
    shape = ()

    def __init__(self, how, trainable=False, **kwargs):
        super().__init__(**kwargs)
        self.how, self.counts = how, not trainable
        self.state = self.add_weight(shape=(), initializer="zeros", trainable=trainable)

    def value(self, tensor, training):
        old = self.how(self.state)
        if training and self.counts:
            self.state.assign_add(1.0)
        return old


@each("eagerly", [False, True])
def test_state_of_a_live_argument(eagerly):
    only = with_args(lambda y_true, y_pred, a, b: 0 * mse(y_true, y_pred) + a + 2.0 * b)
    loss = only(Held(lambda v: v + 0.0), Held(lambda v: v.value))
    model = attached(loss, network(), run_eagerly=eagerly)
    for step in range(3):
        model.reset_metrics()
        logs = model.train_on_batch(X, Y, return_dict=True)
        assert logs == {"loss": 3 * step, "a": step, "b": step}


@each("form", ["scalar", "vector", "inner", "adapter"])
def test_trained_on_the_value_before_the_step(form, data):
    wrong = []
    # Without XLA, TensorFlow may let the update overtake the read: in one graph of four.
    options = {"jit_compile": False} if BACKEND == "tensorflow" else {}
    for _ in range(6 if options else 1):
        live = value = keras.Variable([1.0, 3.0] if form == "vector" else 1.0)
        if form == "adapter":
            live = Held(lambda v: 1.0 * v, trainable=True)
            value = live.state
            value.assign(1.0)
        loss = wrapped(times([live])) if form == "inner" else times([live])
        model = attached(loss, network(2), 0.1, **options)
        dense = model.layers[0]
        for _ in range(2):
            s, kernel, bias = (np.array(ops.convert_to_numpy(v)) for v in (value, *dense.weights))
            error = data.x @ kernel + bias - data.y
            slope, part = 2 * s * error / error.size, error**2 / error.size
            want = [np.mean(s * error**2), kernel - 0.1 * data.x.T @ slope]
            want += [bias - 0.1 * slope.sum(0), s - 0.1 * (part.sum(0) if s.ndim else part.sum())]
            model.reset_metrics()
            got = model.train_on_batch(data.x, data.y, return_dict=True)["loss"]
            got = [got, *dense.get_weights(), ops.convert_to_numpy(value)]
            pairs = zip(got, want, strict=True)
            wrong += [(g, w) for g, w in pairs if not np.allclose(g, w, rtol=1e-4, atol=1e-5)]
    assert not wrong


@each("make", [lambda loss: attach(network(), loss), Subclassed, Nested])
def test_own_loop(make):
    if make is Nested and KERAS < (3, 15):
        pytest.skip("older Keras does not tell who gave `training`")
    loss = plus(step_itself())
    model = make(loss)
    for step in range(3):
        y_pred = model(X, training=True)
        assert to_float(loss(Y, y_pred)) == pytest.approx(step, abs=1e-4)
        assert [loss(Y, other) for other in (y_pred, model(X, training=False), model(X))]
    assert steps(model) == {3}


def callback(hooks, function):
    made = keras.callbacks.Callback()
    for hook in hooks.split():
        setattr(made, f"on_{hook}", lambda *_, **__: function())
    return {"callbacks": [made], "verbose": 0}


def using(value, seen):
    def function():
        seen.append(float(np.sum(ops.convert_to_numpy(value))))
        value.assign(value + 1.0)
        value.assign_add(ops.ones(value.shape))

    return function


HOOKS = [  # apart, as one that synchronizes the variable helps the one after it
    "train_begin train_batch_begin test_batch_begin train_end",
    "epoch_begin train_batch_end test_batch_end",
    "epoch_end",
]


@each(("hooks", "kind"), [*((hooks, "trained") for hooks in HOOKS), (HOOKS[1], "bias")])
def test_variable_in_callbacks(kind, hooks):
    base, seen = network(), []
    value = base.layers[0].bias if kind == "bias" else variable(0.0)
    model = attached(plus(value), base)
    used = callback(hooks, using(value, seen))
    model.fit(X, Y, epochs=2, batch_size=4, validation_data=(X, Y), **used)
    assert len(seen) >= 2
    assert seen == [2 * i for i in range(len(seen))]
    last, got = 2 * len(seen), np.ravel(run(model, "evaluate"))[0]
    assert got == pytest.approx(last + last**2 * (kind == "bias"))


def test_variable_in_callbacks_of_predict():
    """Before the first training and after it."""
    value, seen = variable(0.0), []
    model = attached(plus(value), network())
    used = callback("predict_batch_end", using(value, seen))
    model.predict(X, batch_size=4, **used)
    run(model, "fit")
    model.predict(X, batch_size=4, **used)
    assert seen == [0, 2, 4, 6]


def test_error_in_a_later_epoch():
    value = variable(0.0)

    @with_args
    def failing(y_true, y_pred, s):
        if y_true.shape[0] == 4:
            raise RuntimeError
        return mse(y_true, y_pred) + s

    model = attached(failing(value), network(), run_eagerly=BACKEND == "tensorflow")
    batches = ((X[:n], Y[:n]) for n in (8, 8, 4))
    with pytest.raises(RuntimeError):
        model.fit(batches, steps_per_epoch=2, epochs=2, **callback("epoch_begin", using(value, [])))
    assert to_float(value) == 4


KINDS = [
    "def {}(self, body): return body()\ncall = lambda model, body: {}(model, body)",
    "def call(model, body, {}=None, self=None, training=True): return body()",
    "class Trainer:\n def {}(model, body): return body()\ncall = Trainer.{}",
]


@each("name", ["train_step", "test_step", "compute_loss_and_updates", "fit", "stateless_call"])
@each("kind", KINDS)
def test_names_in_an_own_loop(kind, name):
    loss, free, namespace = plus(step_itself()), with_args(reader(ops.abs, variable(1.0)))(), {}
    exec(kind.replace("{}", name), namespace)
    model, call = attach(network(), loss), namespace["call"]
    for training in (True, False, True):
        call(model, lambda training=training: loss(Y, model(X, training=training)))
    assert steps(model) == {2}
    assert to_float(call(model, lambda: free(Y, Y))) == 1


NAMES = ["training", "self", "mask", "name", "dtype", "layer", "values", "loss", "given", "inputs"]


@each("name", NAMES)
@each("in_call", [False, True])
def test_names_of_parameters(in_call, name):
    namespace = {"mse": mse}
    exec(f"def function(y_true, y_pred, {name}): return mse(y_true, y_pred) + {name}", namespace)
    loss = with_args(namespace["function"])(**({} if in_call else {name: variable(3.0)}))

    model = Subclassed(loss, {name: 3 * ops.ones(())}) if in_call else attach(network(), loss)
    compiled(model, loss, run_eagerly=True)
    assert logs_of(model, X, Y)["loss"] == pytest.approx(3)
