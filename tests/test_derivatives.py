"""`grad` and `derivatives`: their values, gradients through them, saving, and what goes wrong."""

import copy
import json
import re
import textwrap

import bench_derivatives as by_backend
import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import BACKEND, KERAS, TESTS, message_of, run_python
from lossargs import (
    ArgumentError,
    DerivativeError,
    LossArgs,
    SavingError,
    attach,
    derivatives,
    detach,
    grad,
    with_args,
)
from test_compiled import size_of_train_step
from test_live_parity import HOW

pytestmark = pytest.mark.fit
POINTS = np.random.default_rng(0).uniform(-1, 1, (2, 24, 1)).astype("float32")
X, T = POINTS


def numbers(values):
    return [ops.convert_to_numpy(value) for value in values]


def inputs():
    return keras.Input((1,), name="x"), keras.Input((1,), name="t")


def perceptron(name="net"):
    keras.utils.set_random_seed(1)
    network = keras.Sequential(name=name)
    for layer in (keras.Input((2,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)):
        network.add(layer)
    return network


def joined(x, t):
    return ops.concatenate([x, t], axis=1)


def in_numpy(network, x, t):
    """What `perceptron` gives, in float64."""
    inner, inner_bias, outer, bias = (np.float64(weight) for weight in network.get_weights())
    return np.tanh(np.hstack([x, t]) @ inner + inner_bias) @ outer + bias


def difference(function, x, t, path, step=1e-3):
    """The derivative by central differences; `path` names the arguments, as in "xt"."""
    if not path:
        return function(x, t)
    move = np.float64(step)
    if path[-1] == "x":
        ends = [difference(function, x + h, t, path[:-1]) for h in (move, -move)]
    else:
        ends = [difference(function, x, t + h, path[:-1]) for h in (move, -move)]
    return (ends[0] - ends[1]) / (2 * move)


def one_by_one(u, x, t, paths):
    results = []
    for path in paths:
        result = u
        for name in path:
            result = grad(result, {"x": x, "t": t}[name])
        results.append(result)
    return results


def at_once(u, x, t, paths):
    return derivatives(*[(u, *({"x": x, "t": t}[name] for name in path)) for path in paths])


PATHS = ("", "x", "t", "xx", "tt", "xt", "tx", "xxx", "xtt")
FORMS = pytest.mark.parametrize("form", [one_by_one, at_once])


@FORMS
def test_closed_form(form):
    x, t = inputs()
    u = ops.sin(2 * x) * ops.exp(x * t) + t**3
    model = keras.Model([x, t], form(u, x, t, PATHS[:7]))
    exponential, sine, cosine = np.exp(X * T), np.sin(2 * X), np.cos(2 * X)
    u_x = (2 * cosine + T * sine) * exponential
    u_xt = sine * exponential + X * u_x
    expected = [
        sine * exponential + T**3,
        u_x,
        X * sine * exponential + 3 * T**2,
        (2 * T * cosine - 4 * sine) * exponential + T * u_x,
        X**2 * sine * exponential + 6 * T,
        u_xt,
        u_xt,
    ]
    for called in (model.predict([X, T], verbose=0), numbers(model([X, T]))):
        for path, value, exact in zip(PATHS[:7], called, expected, strict=True):
            np.testing.assert_allclose(value, exact, atol=1e-4, err_msg=path)


@FORMS
def test_finite_differences(form):
    x, t = inputs()
    network = perceptron()
    values = keras.Model([x, t], form(network(joined(x, t)), x, t, PATHS)).predict([X, T])
    for path, value in zip(PATHS, values, strict=True):
        expected = difference(lambda x, t: in_numpy(network, x, t), X, T, path)
        np.testing.assert_allclose(value, expected, atol=1e-3, err_msg=path)


@pytest.mark.filterwarnings("ignore")  # torch's own, of torch.compile
@pytest.mark.parametrize("form", ["derivatives", "grad for each"])
@pytest.mark.parametrize("how", HOW)
def test_training_is_that_of_the_step_by_hand(how, form):
    if how == "compiled" and BACKEND == "torch" and (KERAS < (3, 12) or form != "derivatives"):
        pytest.skip("torch.compile takes minutes, or fails on any loss of this Keras")
    trained = {}
    data = ([*POINTS], np.sin(POINTS[0]))
    for name in ("by hand", form):
        model, loss = by_backend.FORMS[name](2, 8)
        # By hand, `torch.compile` fails: what it makes has no second derivative.
        options = {} if BACKEND == "torch" and name == "by hand" else HOW[how]
        model.compile(keras.optimizers.SGD(0.02), loss=loss, **options)
        history = model.fit(*data, batch_size=8, epochs=3, shuffle=False, verbose=0).history
        history["test"] = model.evaluate(*data, batch_size=8, verbose=0)
        trained[name] = history, model.get_weights()
    (history, weights), (expected, expected_weights) = trained[form], trained["by hand"]
    assert history["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert history["test"] == pytest.approx(expected["test"], abs=1e-5)
    for weight, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-5)


def test_the_step_is_not_larger_than_by_hand():
    sizes = {}
    for name in ("by hand", "derivatives"):
        model, loss = by_backend.FORMS[name](3, 8)
        model.compile(keras.optimizers.SGD(0.1), loss=loss)
        sizes[name] = size_of_train_step(model, ((X, T), np.sin(X)))
    assert sizes["derivatives"] <= sizes["by hand"]


def test_along_a_tensor_on_the_way():
    x = keras.Input((2,))
    middle = 3 * x
    y = ops.sum(middle**2 * x, axis=-1)  # what is not on the way over `middle` is held fast
    model = keras.Model(x, [grad(y, middle), grad(y, x), grad(middle, middle)])
    both = np.random.default_rng(0).normal(size=(5, 2)).astype("float32")
    expected = [6 * both**2, 27 * both**2, np.ones((5, 2))]
    for value, exact in zip(model.predict(both, verbose=0), expected, strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-5)


def test_what_does_not_depend_is_not_computed_again():
    calls = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            calls.append(self.name)
            return 2 * x

    x, t = inputs()
    u = t * Counting(name="beside")(x) + Counting(name="between")(t)
    model = keras.Model([x, t], grad(u, t))
    calls.clear()
    np.testing.assert_allclose(numbers([model([X, T])])[0], 2 * X + 2, rtol=1e-5)
    # A model calls what it needs; the derivative itself calls what depends on `t`.
    assert sorted(calls) == ["beside", "between"]


def test_nothing_to_differentiate():
    x, t = inputs()
    assert derivatives() == []
    assert derivatives(x, (t,)) == [x, t]


def test_derivatives_that_are_zero():
    x, t = inputs()
    model = keras.Model([x, t], [grad(grad(x * t, t), t), grad(ops.stop_gradient(t) * x, t)])
    for value in model.predict([X, T], verbose=0):
        assert not value.any()


def test_one_tensor_given_twice():
    x, t = inputs()
    model = keras.Model([x, t], derivatives((x * t**2, x), (x * t**2, t)))
    same = ops.convert_to_tensor(X)
    u_x, u_t = numbers(model([same, same]))
    np.testing.assert_allclose(u_x, X**2, rtol=1e-5)
    np.testing.assert_allclose(u_t, 2 * X**2, rtol=1e-5)


def test_several_functions_and_their_components():
    x, t = inputs()
    flow = ops.concatenate([x**2 * t, x * t**3], axis=1)
    u, v = flow[:, :1], flow[:, 1:]
    u_x, v_t, v_xt, whole = derivatives((u, x), (v, t), (v, x, t), flow)
    values = keras.Model([x, t], [u_x, v_t, v_xt, whole, grad(flow, x)]).predict([X, T])
    expected = [2 * X * T, 3 * X * T**2, 3 * T**2]
    expected += [np.hstack([X**2 * T, X * T**3]), 2 * X * T + T**3]
    for value, exact in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-6)


def test_derivative_of_a_flux():
    """A derivative of what is computed from derivatives: the conservation form."""
    x, t = inputs()
    u = ops.sin(x) * t
    flux = (1 + u**2) * grad(u, x)
    value = keras.Model([x, t], grad(flux, x)).predict([X, T], verbose=0)
    sine, cosine = np.sin(X), np.cos(X)
    exact = -T * sine * (1 + T**2 * sine**2) + 2 * T**3 * sine * cosine**2
    np.testing.assert_allclose(value, exact, atol=1e-5)


def test_gradient_penalty_trains_the_critic():
    """The weights' gradient of (|dy/dx| - 1)^2 for y = x @ w, which is 2 (|w| - 1) w / |w|."""

    @with_args
    def penalty(y_true, y_pred, *, slope):
        return ops.square(ops.norm(slope, axis=-1) - 1) + 0 * ops.mean(y_pred, axis=-1)

    x = keras.Input((2,))
    mixed = x + 1
    critic = keras.layers.Dense(1, use_bias=False)
    y = critic(mixed)
    loss = penalty(slope=grad(y, mixed))
    model = keras.Model(x, attach(y, loss))
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    before = np.array([[3.0], [4.0]], "float32")
    critic.set_weights([before])
    model.train_on_batch(np.zeros((4, 2)), np.zeros((4, 1)))
    step = 0.1 * 2 * (5 - 1) * before / 5
    np.testing.assert_allclose(critic.get_weights()[0], before - step, rtol=1e-5)


def test_numbers_come_without_a_graph():
    x, t = inputs()
    model = keras.Model([x, t], derivatives(x * t, (x * t, x)))
    for value in model.predict_on_batch([X, T]):
        assert isinstance(value, np.ndarray)
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            assert not any(value.requires_grad for value in model([X, T]))


def test_own_precision_of_what_is_differentiated_along():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        x = keras.Input((2,), dtype="float32")
        network = keras.layers.Dense(1, use_bias=False)
        slope = grad(network(x), x)
    finally:
        keras.config.set_dtype_policy(policy)
    assert network(x).dtype == "float16"
    assert slope.dtype == "float32"
    network.set_weights([np.array([[0.5], [2.0]])])
    value = keras.Model(x, slope).predict(np.ones((3, 2)), verbose=0)
    np.testing.assert_array_equal(value, np.full((3, 2), [0.5, 2.0]))


@pytest.mark.skipif(
    BACKEND == "torch" and KERAS < (3, 15), reason="masked pooling changes its input there"
)
def test_mask_of_what_is_differentiated_along():
    words = keras.Input((4,), dtype="int32")
    vectors = keras.layers.Embedding(5, 3, mask_zero=True)(words)
    mean = keras.layers.GlobalAveragePooling1D()(vectors)
    slope = keras.Model(words, grad(mean, vectors)).predict(np.array([[1, 2, 0, 0]]), verbose=0)
    np.testing.assert_allclose(slope[0, :, 0], [0.5, 0.5, 0, 0])


# State: layers that keep statistics, draw random numbers, or add losses.


def stateful(x, *others):
    h = keras.layers.Dense(4, "tanh")(keras.layers.Concatenate()([x, *others]))
    h = keras.layers.BatchNormalization(momentum=0.5)(h)
    h = keras.layers.Dropout(0.5, seed=0)(h)
    h = keras.layers.ActivityRegularization(l2=1.0)(h)
    return h, keras.layers.Dense(1)(h)


STATEFUL = {
    "plain": lambda h, u, x, t: u,
    "one": lambda h, u, x, t: grad(u, x),
    "two": lambda h, u, x, t: [grad(u, x), grad(u, t)],
    "nested": lambda h, u, x, t: grad(grad(u, x), t),
    "flux": lambda h, u, x, t: grad(u * grad(u, x), t),
    "with y": lambda h, u, x, t: [grad(u, x), u],
    "with hidden": lambda h, u, x, t: [*derivatives(u, (u, x)), h],
    "twice": lambda h, u, x, t: [*derivatives(u, (u, x)), *derivatives(h, (h, t))],
    "continued": lambda h, u, x, t: grad(derivatives(u, (u, x))[0], t),
}


def stateful_model(form):
    keras.utils.set_random_seed(2)
    x, t = inputs()
    return keras.Model([x, t], STATEFUL[form](*stateful(x, t), x, t))


def no_loss(y_true, y_pred):
    return 0 * y_pred


def state_after_training(model, **options):
    """Return the losses that layers add in each epoch, and all variables after these."""
    outputs = len(model.outputs)
    model.compile(keras.optimizers.SGD(0.1), loss=[no_loss] * outputs, **options)
    data = ([X + 2, T], [T] * outputs)
    history = model.fit(*data, batch_size=8, shuffle=False, epochs=2, verbose=0).history["loss"]
    return [np.array(history), *numbers(sorted(model.variables, key=natural_order))]


def natural_order(variable):
    """Return a key that sorts `dense_9` before `dense_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", variable.path)]


def assert_same(state, expected):
    assert len(state) == len(expected)
    for value, other in zip(state, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own, of torch.compile
@pytest.mark.parametrize(
    ("form", "how", "saved"),
    [
        *((form, "graph", False) for form in STATEFUL),
        *((form, "graph", True) for form in ("one", "nested", "with y")),
        *(("one", how, False) for how in HOW if how not in ("graph", "compiled")),
    ],
)
def test_state_changes_as_in_the_plain_network(form, how, saved, tmp_path):
    model = stateful_model(form)
    if saved:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    expected = state_after_training(stateful_model("plain"), **HOW[how])
    assert expected[0].min() > 0
    assert_same(state_after_training(model, **HOW[how]), expected)


@pytest.mark.parametrize("form", STATEFUL)
def test_state_changes_in_own_loops(form):
    model, plain = stateful_model(form), stateful_model("plain")
    for _ in range(2):
        both = [(model([X, T], training=True), model.losses) for model in (model, plain)]
        assert_same(*[numbers(losses) for _, losses in both])
    assert_same(*[numbers(model.variables) for model in (model, plain)])
    if BACKEND == "jax":
        import jax

        def call(model, *state):
            return model.stateless_call(*state, [X, T], training=True, return_losses=True)[1:]

        states = [
            jax.jit(lambda *state, model=model: call(model, *state))(
                [v.value for v in model.trainable_variables],
                [v.value for v in model.non_trainable_variables],
            )
            for model in (model, plain)
        ]
        assert_same(*[numbers(keras.tree.flatten(state)) for state in states])


def test_random_layers_draw_in_each_step():
    x = keras.Input((64,))
    slope = keras.Model(x, grad(keras.layers.Dropout(0.5, seed=0)(x), x))
    first, second = (numbers([slope(np.ones((2, 64)), training=True)])[0] for _ in range(2))
    assert (first != second).any()


def test_layers_without_state_are_not_evaluated_beside():
    x, t = inputs()
    u = perceptron()(joined(x, t))
    model = keras.Model([x, t], grad(grad(u, x), t))
    assert "net" not in [operation.name for operation in model.operations]


def test_random_layers_are_evaluated_once():
    x = keras.Input((64,))
    u = keras.layers.Dropout(0.5, seed=0)(x)
    both = keras.Model(x, derivatives(u, (u, x)))
    for _ in range(2):
        values, slopes = numbers(both(np.ones((2, 64)), training=True))
        np.testing.assert_array_equal(values, slopes)
        assert 0 < (values == 0).sum() < values.size


# Saving.


def attached_pinn(form):
    x, t = inputs()
    u = perceptron()(joined(x, t))
    if form is at_once:
        u, u_t, u_xx = form(u, x, t, ("", "t", "xx"))
    else:
        u_t, u_xx = form(u, x, t, ("t", "xx"))
    loss = losses.equation(u_t=u_t, u_xx=u_xx)
    model = keras.Model([x, t], attach(u, loss))
    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    return model


def train(model):
    data = ([X, T], np.sin(X))
    return model.fit(*data, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"]


GO_ON = """
import json, keras, numpy as np, losses
points = np.random.default_rng(0).uniform(-1, 1, (2, 24, 1)).astype("float32")
model = keras.saving.load_model({path!r})
history = model.fit([*points], np.sin(points[0]), batch_size=8, epochs=2, shuffle=False, verbose=0)
print(json.dumps([len(model.weights), history.history["loss"]]))
"""


@FORMS
def test_saved_model_goes_on_as_one_network(form, tmp_path):
    model = attached_pinn(form)
    train(model)
    path = str(tmp_path / "pinn.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)
    expected = train(model)
    assert len(model.weights) == len(loaded.weights) == 4
    assert train(loaded) == pytest.approx(expected, rel=1e-6)
    weights, in_fresh_process = json.loads(
        run_python(textwrap.dedent(GO_ON.format(path=path))).splitlines()[-1]
    )
    assert weights == 4
    assert in_fresh_process == pytest.approx(expected, rel=1e-6)


def test_layers_stay_shared_with_the_rest(tmp_path):
    x, t = inputs()
    hidden = keras.layers.Dense(4, name="first")(joined(x, t))
    u = keras.layers.Dense(1, name="second")(ops.tanh(hidden))
    beside = keras.Model([x, t], [u, grad(u[:, :1], x), keras.layers.Dense(1)(hidden)])
    beside.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.save(tmp_path / "again.keras")
    for model in (beside, loaded, keras.saving.load_model(tmp_path / "again.keras")):
        assert len(model.weights) == 6
        for name in ("first", "second"):
            layer = model.get_layer(name)
            layer.set_weights([np.ones_like(weight) for weight in layer.get_weights()])
        _, slope, _ = model.predict([X, T], verbose=0)
        np.testing.assert_allclose(slope, 4 / np.cosh(X + T + 1) ** 2, rtol=1e-4)


@pytest.mark.skipif(KERAS < (3, 15), reason="written by Keras 3.15, whose layers have more in them")
@pytest.mark.parametrize("written_on", ["jax", "tensorflow", "torch"])
def test_models_written_on_other_backends(written_on):
    path = TESTS / "models" / f"derivatives-{written_on}.keras"
    model = keras.saving.load_model(path, compile=False)
    inner, inner_bias, outer, bias = (np.linspace(-1, 1, size) for size in (8, 4, 8, 2))

    def u(x, t):
        hidden = np.tanh(np.hstack([x, t]) @ inner.reshape(2, 4) + inner_bias)
        return hidden @ outer.reshape(4, 2)[:, :1] + bias[0]

    values = model.predict([X, T], verbose=0)
    np.testing.assert_allclose(values["u"], u(X, T), atol=1e-5)
    np.testing.assert_allclose(values["again"], u(X, T), atol=1e-5)
    np.testing.assert_allclose(values["u_xt"], difference(u, X, T, "xt"), atol=1e-4)
    assert len(model.weights) == 4


def test_copies_and_clones():
    x, t = inputs()
    u = keras.layers.Dense(1)(joined(x, t))
    model = keras.Model([x, t], [u, grad(u, x)])
    copied = copy.deepcopy(model)
    copied.set_weights([np.full((2, 1), 7.0), np.zeros(1)])
    np.testing.assert_allclose(copied.predict([X, T], verbose=0)[1], 7.0)
    again = model.get_config()
    for make in (keras.models.clone_model, lambda _: keras.Model.from_config(again)):
        with pytest.raises(SavingError) as caught:
            make(model)
        assert message_of(caught.value).startswith(
            "A model with derivatives cannot be made again from its config alone"
        )


@pytest.mark.parametrize("saved", [False, True])
def test_detached_model_takes_no_derivatives(saved, tmp_path):
    model = attached_pinn(at_once)
    train(model)
    expected = model.predict([X, T], verbose=0)
    if saved:
        model.save(tmp_path / "pinn.keras")
        model = keras.saving.load_model(tmp_path / "pinn.keras")
    plain = detach(model)
    assert not any("derivatives" in layer.name for layer in plain.layers)
    assert not any(isinstance(layer, LossArgs) for layer in plain.layers)
    assert plain.get_layer("net").weights == model.weights
    np.testing.assert_allclose(plain.predict([X, T], verbose=0), expected, rtol=1e-6)


# What goes wrong.


def fails(kind, *arguments):
    with pytest.raises(kind) as caught:
        derivatives(*arguments)
    return message_of(caught.value)


def test_error_if_y_does_not_depend_on_x():
    x, t = inputs()
    message = fails(DerivativeError, (x**2, t))
    assert "is not computed from x, <symbolic tensor 't' (None, 1)>" in message
    assert "but from the inputs 'x': the derivative would be zero" in message
    message = fails(DerivativeError, (x * t + 1, x * t))
    assert "is not computed from x" in message
    assert "but from the inputs" in message


def test_error_of_another_graph():
    old = keras.Input((2,))
    network = keras.Model(old, 2 * old)
    message = fails(DerivativeError, (network.output, keras.Input((2,), name="new")))
    assert "y = network(x), and not network.output" in message


def test_error_of_integers():
    words = keras.Input((3,), dtype="int32", name="words")
    vectors = keras.layers.Embedding(5, 2)(words)
    message = fails(DerivativeError, (vectors, words))
    assert message.startswith("<symbolic tensor 'words' (None, 3)> is int32, and derivatives")
    assert "keras.Input(shape, dtype='float32')" in message
    message = fails(DerivativeError, (ops.argmax(vectors, axis=-1), vectors))
    assert "is int32" in message


@pytest.mark.parametrize("wrong", [(), 1.0, "x", np.ones(3)], ids=str)
def test_error_of_other_things(wrong):
    x, _ = inputs()
    for argument in (wrong, (x, wrong)):
        assert "grad(y, x) takes symbolic tensors" in fails(ArgumentError, argument)


def test_error_of_variables_that_depend():
    x, _ = inputs()
    y = 2 * x
    message = fails(DerivativeError, (y**2, x), (y**2, y))
    assert "is computed from <symbolic tensor 'x' (None, 1)>" in message
    assert "Take them one after another, by grad()." in message


@keras.saving.register_keras_serializable("tests")
class Opaque(keras.layers.Layer):
    """x^2, whose derivatives exist up to a certain order."""

    def __init__(self, orders, **kwargs):
        super().__init__(**kwargs)
        self.orders = orders

    def call(self, x):
        return square_with(self.orders, x)


def square_with(orders, x):
    if BACKEND == "jax":
        import jax

        if orders == 0:
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jax.pure_callback(np.square, shape, x, vmap_method="sequential")
        squared = jax.custom_vjp(lambda x: x**2)
        squared.defvjp(
            lambda x: (x**2, x), lambda x, slope: (2 * slope * (x + 0 * square_with(0, x)),)
        )
        return squared(x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def squared(x):
            return x**2, lambda slope: 2 * slope * (x + 0 * square_with(0, x))

        def none(x):
            def refused(_):
                raise LookupError("gradient registry has no entry for: Opaque")

            return x**2, refused

        return squared(x) if orders else tf.custom_gradient(none)(x)
    import torch

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            if orders == 0:
                raise RuntimeError("derivative for opaque is not implemented")
            return 2 * slope * ctx.saved_tensors[0]

    return Once.apply(x)


def test_error_of_a_layer_without_a_derivative():
    x, _ = inputs()
    y = Opaque(0, name="opaque")(x)
    message = fails(DerivativeError, (y, x))
    assert "Could not automatically infer" not in message
    assert f"{BACKEND} cannot take a derivative of order 1 through 'opaque': " in message


def test_error_of_a_layer_without_a_second_derivative():
    x, _ = inputs()
    y = Opaque(1, name="opaque")(x)
    slope = grad(y, x)
    np.testing.assert_allclose(keras.Model(x, slope).predict(X, verbose=0), 2 * X, rtol=1e-5)
    assert "of order 2" in fails(DerivativeError, (y, x, x))


def test_error_when_training_needs_a_second_derivative():
    x, _ = inputs()
    y = keras.layers.Dense(1)(Opaque(1, name="opaque")(keras.layers.Dense(1)(x)))
    loss = losses.equation(u_t=grad(y, x), u_xx=0.0)
    model = keras.Model(x, attach(y, loss))
    model.compile("sgd", loss=loss)
    with pytest.raises(DerivativeError) as caught:
        model.fit(X, T, verbose=0)
    assert "of order 2, which training needs, through" in message_of(caught.value)


def test_errors_of_layers_come_as_they_are():
    class Fails(keras.layers.Layer):
        broken = False

        def call(self, x):
            if self.broken:
                raise KeyError("mine")
            return 2 * x

    x, _ = inputs()
    layer = Fails()
    model = keras.Model(x, grad(layer(x), x))
    layer.broken = True
    with pytest.raises(KeyError, match="mine"):
        model(X)
