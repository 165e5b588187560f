"""`grad` and `derivatives`: their values, gradients through them, saving, and what goes wrong."""

import copy
import functools
import json

import bench_derivatives as by_backend
import keras
import measuring
import numpy as np
import pytest
from keras import layers, ops

import losses
from helpers import BACKEND, KERAS, TESTS, attached, each_writer, message_of, raising, run_python
from lossargs import ArgumentError, DerivativeError, SavingError, attach, derivatives, detach, grad
from networks import HOW

pytestmark = pytest.mark.fit
X, T = np.random.default_rng(0).uniform(-1, 1, (2, 24, 1)).astype("float32")


def numbers(values):
    return [ops.convert_to_numpy(value) for value in values]


def assert_same(values, expected):
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-5)


def inputs():
    return keras.Input((1,), name="x"), keras.Input((1,), name="t")


def joined(x, t):
    return ops.concatenate([x, t], axis=1)


def perceptron():
    keras.utils.set_random_seed(1)
    parts = [keras.Input((2,)), layers.Dense(8, "tanh"), layers.Dense(1)]
    return keras.Sequential(parts, name="net")


def in_numpy(weights, x, t):
    """What `perceptron` gives, in float64."""
    inner, inner_bias, outer, bias = map(np.float64, weights)
    return np.tanh(np.hstack([x, t]) @ inner + inner_bias) @ outer + bias


def difference(function, path, x, t):
    """The derivative by central differences; `path` names the arguments, as in "xt"."""
    if not path:
        return function(x, t)
    step = np.float64(1e-3)
    dx, dt = (step, 0) if path[-1] == "x" else (0, step)
    ends = [difference(function, path[:-1], x + s * dx, t + s * dt) for s in (1, -1)]
    return (ends[0] - ends[1]) / (2 * step)


def cases(network, x, t):
    """Derivatives by name, each with its values in NumPy."""
    middle, flow, v = 3 * x, joined(x**2 * t, x * t**3), x**2 * t
    over = middle**2 * x  # along `middle`, the other `x` is constant
    first, second, both = derivatives((flow[:, :1], x), (flow[:, 1:], x, t), flow)
    found = {
        "to the middle": (grad(over, middle), lambda x, t: 6 * x**2),
        "over the middle": (grad(over, x), lambda x, t: 27 * x**2),
        "of itself": (grad(middle, middle), lambda x, t: 1 + 0 * x),
        "a component": (first, lambda x, t: 2 * x * t),
        "another component": (second, lambda x, t: 3 * t**2),
        "all components": (both, lambda x, t: np.hstack([x**2 * t, x * t**3])),
        "their sum": (grad(flow, x), lambda x, t: 2 * x * t + t**3),
        "of a derivative": (grad(v * grad(v, x), x), lambda x, t: 6 * x**2 * t**2),
        "zero": (grad(grad(x * t, t), t), lambda x, t: 0 * x),
        "cut": (grad(ops.stop_gradient(t) * x, t), lambda x, t: 0 * x),
    }
    y, along = network(joined(x, t)), {"x": x, "t": t}
    paths = ("", "x", "t", "xx", "tt", "xt", "tx", "xxx", "xtt")
    at_once = derivatives(*[(y, *(along[name] for name in path)) for path in paths])
    one_by_one = [functools.reduce(lambda y, name: grad(y, along[name]), path, y) for path in paths]
    exact = functools.partial(in_numpy, network.get_weights())
    for path, *values in zip(paths, at_once, one_by_one, strict=True):
        for form, value in zip(("at once", "one by one"), values, strict=True):
            found[f"{path} {form}"] = value, functools.partial(difference, exact, path)
    return found


def test_values():
    x, t = inputs()
    found = cases(perceptron(), x, t)
    model = keras.Model([x, t], [tensor for tensor, _ in found.values()])
    same = ops.convert_to_tensor(X)  # one tensor given twice
    for given, values in (
        ([X, T], model.predict([X, T], verbose=0)),
        ([X, X], model([same, same])),
    ):
        for name, value in zip(found, numbers(values), strict=True):
            expected = found[name][1](*numbers(given))
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4, err_msg=name)
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            assert not any(value.requires_grad for value in model([X, T]))
    assert derivatives() == []
    assert derivatives(x, (t,)) == [x, t]


@functools.cache
def trained(form, how):
    model, loss = by_backend.FORMS[form](2, 8)
    model.compile(keras.optimizers.SGD(0.02), loss=loss, **HOW[how])
    given = {"validation_data": ([X, T], X)} if how == "as usual" else {}
    history = model.fit([X, T], np.sin(X), 6, epochs=2, shuffle=False, verbose=0, **given)
    return model, history.history


@pytest.mark.parametrize(
    ("form", "how"), [("grad for each", "as usual"), *(("derivatives", how) for how in HOW)]
)
def test_training_is_that_of_the_step_by_hand(form, how):
    model, logs = trained(form, how)
    by_hand, expected = trained("by hand", "as usual")
    assert_same(model.get_weights(), by_hand.get_weights())
    assert_same(logs.values(), [expected[name] for name in logs])


def test_the_step_is_not_larger_than_by_hand():
    forms = ("derivatives", "by hand")
    programs = [measuring.program(trained(form, "as usual")[0], ((X, T), X)) for form in forms]
    ours, by_hand = (next(iter(program.values())) for program in programs)
    assert 0 < ours <= by_hand


def test_only_what_depends_is_computed_again():
    calls = []

    def square(name):
        return layers.Lambda(lambda x: calls.append(name) or x**2)

    x, t = inputs()
    model = keras.Model([x, t], grad(t * square("beside")(x) + square("between")(t), t))
    model([X, T])  # the first call looks for layers that hide what they depend on
    calls.clear()
    np.testing.assert_allclose(numbers([model([X, T])])[0], X**2 + 2 * T, rtol=1e-5)
    assert sorted(calls) == ["beside", "between"]  # no layer has state, so once each


def test_own_precision_of_what_is_differentiated_along(request):
    request.addfinalizer(lambda: keras.config.set_dtype_policy("float32"))
    keras.config.set_dtype_policy("mixed_float16")
    x, network = keras.Input((2,), dtype="float32"), layers.Dense(1, use_bias=False)
    slope = grad(network(x), x)
    assert (network(x).dtype, slope.dtype) == ("float16", "float32")
    network.set_weights([np.array([[0.5], [2.0]])])
    value = keras.Model(x, slope).predict(np.ones((3, 2)))
    np.testing.assert_array_equal(value, np.full((3, 2), [0.5, 2.0]))


@pytest.mark.skipif(
    BACKEND == "torch" and KERAS < (3, 15), reason="masked pooling changes its input there"
)
def test_mask_of_what_is_differentiated_along():
    words = keras.Input((4,), dtype="int32")
    vectors = layers.Embedding(5, 3, mask_zero=True)(words)
    mean = layers.GlobalAveragePooling1D()(vectors)
    slope = keras.Model(words, grad(mean, vectors)).predict(np.array([[1, 2, 0, 0]]))
    np.testing.assert_allclose(slope[0, :, 0], [0.5, 0.5, 0, 0])


STATEFUL = {
    "plain": lambda h, u, x, t: u,
    "one": lambda h, u, x, t: grad(u, x),
    "nested": lambda h, u, x, t: grad(grad(u, x), t),
    "flux": lambda h, u, x, t: grad(u * grad(u, x), t),
    "with y": lambda h, u, x, t: [grad(u, x), u],
    "with hidden": lambda h, u, x, t: [*derivatives(u, (u, x)), h],
    "twice": lambda h, u, x, t: [*derivatives(u, (u, x)), *derivatives(h, (h, t))],
    "continued": lambda h, u, x, t: grad(derivatives(u, (u, x))[0], t),
}


def stateful_model(form, only_losses):
    keras.utils.set_random_seed(2)
    x, t = inputs()
    h = layers.Dense(4, "tanh")(joined(x, t))
    if not only_losses:
        h = layers.Dropout(0.5, seed=0)(layers.BatchNormalization(momentum=0.5)(h))
    h = layers.ActivityRegularization(l2=1.0)(h)
    return keras.Model([x, t], STATEFUL[form](h, layers.Dense(1)(h), x, t))


def state_after_training(model, how):
    """Return the losses that layers add in each call or epoch, and the variables at the end."""
    added = []
    if how == "calls":
        for _ in range(2):
            model([X, T], training=True)
            added += numbers(model.losses)
    else:
        no_losses = [lambda y_true, y_pred: 0 * y_pred for _ in model.outputs]
        model.compile(keras.optimizers.SGD(0.1), loss=no_losses, **HOW[how])
        batches = [X + 2, T], [T for _ in model.outputs]
        added += model.fit(*batches, 8, epochs=2, shuffle=False, verbose=0).history["loss"]
    assert len(added) == 2
    assert min(added) > 0
    return [*added, *numbers(model.variables)]


@functools.cache
def plain_state(how, only_losses):
    return state_after_training(stateful_model("plain", only_losses), how)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of the last bias
@pytest.mark.parametrize(
    ("form", "how", "only_losses", "saved"),
    [
        *((form, "calls", False, False) for form in STATEFUL if form != "plain"),
        *((form, "calls", True, False) for form in ("one", "nested", "flux")),
        ("nested", "several steps" if "several steps" in HOW else "as usual", False, False),
        *((form, "as usual", False, True) for form in ("one", "with y")),
    ],
)
def test_state_changes_as_in_the_plain_network(form, how, only_losses, saved, tmp_path):
    model = stateful_model(form, only_losses)
    if saved:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(state_after_training(model, how), plain_state(how, only_losses))


def test_random_layers_draw_once_in_each_step():
    x = keras.Input((64,))
    u = layers.Dropout(0.5, seed=0)(x)
    model = keras.Model(x, derivatives(u, (u, x)))
    first, second = (numbers(model(np.ones((2, 64)), training=True)) for _ in range(2))
    for values, slopes in (first, second):
        np.testing.assert_array_equal(values, slopes)
        assert 0 < (values == 0).sum() < values.size
    assert (first[1] != second[1]).any()


TRAIN = """
import json, keras, numpy as np, losses
X, T = np.random.default_rng(0).uniform(-1, 1, (2, 24, 1)).astype("float32")
model = keras.saving.load_model(path)
logs = model.fit([X, T], np.sin(X), batch_size=8, epochs=2, shuffle=False, verbose=0).history
print(json.dumps([len(model.weights), logs["loss"]]))
"""


def test_saved_model_continues_as_one_network(tmp_path):
    x, t = inputs()
    u = perceptron()(joined(x, t))
    u_xx = grad(grad(u, x), x)
    u, u_t = derivatives(u, (u, t))
    loss, path = losses.equation(u_t=u_t, u_xx=u_xx), str(tmp_path / "pinn.keras")
    model = keras.Model([x, t], attach(u, loss))
    model.compile(keras.optimizers.Adam(0.01), loss=loss)
    model.fit([X, T], np.sin(X), batch_size=8, shuffle=False, verbose=0)
    model.save(path)
    expected = model.predict([X, T], verbose=0)
    for one in (model, keras.saving.load_model(path)):
        plain = detach(one)
        assert [layer.name for layer in plain.layers] == ["x", "t", "net"]
        assert plain.get_layer("net").weights == one.weights
        np.testing.assert_allclose(plain.predict([X, T], verbose=0), expected, rtol=1e-6)
    output = run_python(f"path = {path!r}\n{TRAIN}")
    logs = model.fit([X, T], np.sin(X), batch_size=8, epochs=2, shuffle=False, verbose=0).history
    expected = [4, pytest.approx(logs["loss"], rel=1e-6)]
    assert json.loads(output.splitlines()[-1]) == expected


def test_detached_derivatives_stay_outputs():
    (x, t), network = inputs(), perceptron()
    u = network(joined(x, t))
    u, u_x = derivatives(u, (u, x))
    loss = {"u": losses.total(), "u_x": losses.total()}
    model = keras.Model([x, t], attach({"u": u, "u_x": u_x}, loss))
    exact = functools.partial(in_numpy, network.get_weights())
    for one in (model, detach(model)):
        values = one.predict([X, T], verbose=0)
        np.testing.assert_allclose(values["u"], exact(X, T), atol=1e-5)
        np.testing.assert_allclose(values["u_x"], difference(exact, "x", X, T), atol=1e-4)


def test_layers_stay_shared_with_the_rest(tmp_path):
    x, t = inputs()
    hidden = layers.Dense(4, name="first")(joined(x, t))
    u = layers.Dense(1, name="second")(ops.tanh(hidden))
    models = [keras.Model([x, t], [u, grad(u[:, :1], x), layers.Dense(1)(hidden)])]
    models.append(copy.deepcopy(models[0]))
    for path in (tmp_path / "model.keras", tmp_path / "again.keras"):
        models[-1].save(path)
        models.append(keras.saving.load_model(path))
    for model in models:
        assert len(model.weights) == 6
        for name in ("first", "second"):
            layer = model.get_layer(name)
            layer.set_weights([np.ones_like(weight) for weight in layer.get_weights()])
        _, slope, _ = model.predict([X, T], verbose=0)
        np.testing.assert_allclose(slope, 4 / np.cosh(X + T + 1) ** 2, rtol=1e-4)
    config = models[0].get_config()
    for make in (keras.models.clone_model, lambda _: keras.Model.from_config(config)):
        with pytest.raises(SavingError, match="Cannot clone a model with derivatives"):
            make(models[0])


@each_writer
def test_models_written_on_other_backends(written_on):
    path = TESTS / "models" / f"derivatives-{written_on}.keras"
    model = keras.saving.load_model(path, compile=False)
    inner, inner_bias, outer, bias = (np.linspace(-1, 1, size) for size in (8, 4, 8, 2))
    weights = [inner.reshape(2, 4), inner_bias, outer.reshape(4, 2)[:, :1], bias[0]]
    u = functools.partial(in_numpy, weights)
    values = model.predict([X, T], verbose=0)
    np.testing.assert_allclose(values["u"], u(X, T), atol=1e-5)
    np.testing.assert_allclose(values["again"], u(X, T), atol=1e-5)
    np.testing.assert_allclose(values["u_xt"], difference(u, "xt", X, T), atol=1e-4)
    assert len(model.weights) == 4


def fails(kind, *arguments):
    with pytest.raises(kind) as caught:
        derivatives(*arguments)
    return message_of(caught.value)


def test_errors_of_arguments():
    x, t = inputs()
    for wrong in ((), 1.0, "x", np.ones(3), keras.KerasTensor((None, 1))):
        for argument in (wrong, (x, wrong)):
            assert "grad(y, x) takes symbolic tensors" in fails(ArgumentError, argument)
    message = fails(DerivativeError, (x**2, t))
    assert "is not computed from x, <symbolic tensor 't' (None, 1)>" in message
    assert "but from the inputs 'x': the derivative would be zero" in message
    assert "is not computed from x" in fails(DerivativeError, (x * t + 1, x * t))
    message = fails(DerivativeError, (keras.Model(x, 2 * x).output, keras.Input((1,))))
    assert "y = network(x), and not network.output" in message
    words = keras.Input((3,), dtype="int32", name="words")
    vectors = layers.Embedding(5, 2)(words)
    message = fails(DerivativeError, (vectors, words))
    assert message.startswith("<symbolic tensor 'words' (None, 3)> is int32, and derivatives")
    assert "keras.Input(shape, dtype='float32')" in message
    assert "is int32" in fails(DerivativeError, (ops.argmax(vectors, axis=-1), vectors))
    y = 2 * x
    message = fails(DerivativeError, (y**2, x), (y**2, y))
    assert "is computed from <symbolic tensor 'x' (None, 1)>" in message
    assert "Write grad(y, x1), grad(y, x2)." in message


def opaque(orders):
    """x^2, with no derivatives beyond these orders."""
    return layers.Lambda(functools.partial(square, orders=orders), name="opaque")


def square(x, orders):
    def gradient(x, slope):
        if orders == 0:
            raise LookupError("no gradient")
        return 2 * slope * (x if BACKEND == "torch" else x + 0 * square(x, orders - 1))

    if BACKEND == "jax":
        import jax

        squared = jax.custom_vjp(lambda x: x**2)
        squared.defvjp(lambda x: (x**2, x), lambda x, slope: (gradient(x, slope),))
        return squared(x)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.custom_gradient(lambda x: (x**2, functools.partial(gradient, x)))(x)
    import torch

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return gradient(*ctx.saved_tensors, slope)

    return Square.apply(x)


def test_errors_of_a_layer_without_a_derivative():
    x, _ = inputs()
    message = fails(DerivativeError, (opaque(0)(x), x))
    assert f"{BACKEND} cannot take a derivative of order 1 through 'opaque': " in message
    y = opaque(1)(x)
    value = keras.Model(x, grad(y, x)).predict(X, verbose=0)
    np.testing.assert_allclose(value, 2 * X, rtol=1e-5)
    assert "of order 2 through 'opaque'" in fails(DerivativeError, (y, x, x))
    # Keras's symbolic tensors on PyTorch can lose the way from y to x.
    with pytest.raises(DerivativeError, match="of order 2 through 'power.*', 'opaque'"):
        keras.Model(x, grad(grad(y + x**3, x), x)).predict(X, verbose=0)


@pytest.mark.parametrize("kind", ["opaque", *(["attention"] if BACKEND == "torch" else [])])
def test_error_when_training_needs_a_second_derivative(kind):
    x = keras.Input((3, 2))
    h = layers.Dense(2)(x)
    h = opaque(1)(h) if kind == "opaque" else layers.MultiHeadAttention(1, 2, name=kind)(h, h)
    y = layers.Dense(2)(h)
    model = attached(losses.equation(u_t=grad(y, x), u_xx=0.0), keras.Model(x, y))
    with raising(DerivativeError, "of order 2, which training needs, through", kind):
        model.fit(np.ones((4, 3, 2)), np.ones((4, 3, 2)), verbose=0)


def test_errors_of_layers_come_as_they_are():
    x, broken = keras.Input((1,)), []
    layer = layers.Lambda(lambda x: {}["mine"] if broken else 2 * x)
    model = keras.Model(x, grad(layer(x), x))
    broken.append(True)
    with pytest.raises(KeyError, match="mine"):
        model(X)
