"""`attach` and `detach`: what they give back, what they leave alone, what they refuse."""

import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import KERAS, attached, fixed, layer_of, linear_model, logs_of, raising, step_itself
from lossargs import AttachError, LossArgs, attach, detach, live_args

each = pytest.mark.parametrize


def functional(outputs="one", cls=keras.Model, **options):
    x = keras.Input((3,), name="x")
    a = keras.layers.Dense(2, name="a")(x)
    b = keras.layers.Dense(2, name="b")(a)
    given = {"one": a, "list": [a, b], "tuple": (a, b), "dict": {"first": a, "second": b}}
    given["list of one"] = [a]
    return cls(x, given[outputs], name="network", **options)


def same_predictions(one, other, data):
    y, expected = (keras.tree.flatten(m.predict_on_batch(data.x)) for m in (one, other))
    np.testing.assert_array_equal(y, expected)


def test_functional_model(data):
    model = functional()
    one = attach(model, losses.shifted(fixed()))
    assert isinstance(one, type(model))
    assert one.name == "network"
    assert one.get_layer("a") is model.get_layer("a")
    assert one.count_params() == model.count_params() + 1
    same_predictions(one, model, data)
    again = attach(one, losses.shifted(fixed()))
    assert layer_of(again) is not layer_of(one)
    assert list(live_args(again)) == ["shift"]
    assert detach(again).layers == model.layers
    assert detach(model) is model
    assert attach(model, losses.described(what=model.inputs[0])).input is model.input


def test_losses_to_track_for_each_output():
    mae, mse, loss = losses.total(), losses.scaled(), losses.shifted(1.0)
    one = functional("list of one")
    for track in ([mae], [[mae]], {"a": mae}):
        assert layer_of(attach(one, loss, track=track)).track == (mae,)
    both = [mae, mse], [mae, [mse]], {"a": mae, "b": mse}, ([mae], mse)
    for track in (*both, [None, mse], {"b": mse}):
        model = attach(functional("list"), loss, track=track)
        tracked = [layer.track for layer in model.layers if isinstance(layer, LossArgs)]
        assert tracked == [(mae,) if track in both else (), (mse,)]
    for track in (mae, [mae]):
        with raising(AttachError, "for the outputs 'a', 'b'", "a list with one entry for each"):
            attach(functional("list"), loss, track=track)


def test_sequential_model(data):
    model = linear_model()
    one = attach(model, losses.shifted(fixed()))
    assert isinstance(one, keras.Sequential)
    assert one.layers == [*model.layers, layer_of(one)]
    assert len(model.layers) == 1
    same_predictions(one, model, data)
    assert detach(one).layers == model.layers
    reads_tensor = attach(model, losses.described(what=model.layers[0].output))
    assert isinstance(reads_tensor, type(functional()))
    same_predictions(reads_tensor, model, data)


@pytest.mark.fit
def test_sequential_model_without_an_input(data):
    model = attached(losses.shifted(fixed()), keras.Sequential([keras.layers.Dense(2)]))
    assert model.fit(data.x, data.y, verbose=0).history["shift"] == [1]
    with pytest.raises(AttachError, match=r"keras\.Model\("):
        attach(keras.Sequential([keras.layers.Dense(2)]), losses.described(what=keras.Input(())))


# ---- Outputs ----


@each(("outputs", "by_name"), [("list", False), ("tuple", True), ("dict", True)])
@pytest.mark.fit
def test_several_outputs(data, outputs, by_name):
    model = functional(outputs)
    names = ["first", "second"] if outputs == "dict" else ["a", "b"]
    one = losses.shifted.options(name="one")(fixed())
    two = losses.scaled.options(name="two")(fixed(2.0, "scale"))
    loss = {names[0]: one, names[1]: two} if by_name else [one, two]
    live = attached(loss, model)
    same_predictions(live, model, data)
    assert type(live.predict_on_batch(data.x)) is type(model.predict_on_batch(data.x))
    assert list(live.output_names) == list(model.output_names)

    plain = [losses.shifted(1.0), losses.scaled(2.0)]
    plain = dict(zip(names, plain, strict=True)) if by_name else plain
    model.compile(keras.optimizers.SGD(0.0), loss=plain)
    y = dict.fromkeys(names, data.y) if outputs == "dict" else [data.y, data.y]
    histories = (m.fit(data.x, y, verbose=0).history for m in (live, model))
    logs, expected = ({name: value for name, (value,) in history.items()} for history in histories)
    assert logs == pytest.approx({**expected, "shift": 1, "scale": 2}, rel=1e-6)
    assert detach(live).output_names == model.output_names


@pytest.mark.fit
def test_losses_of_several_outputs(data):
    model = functional("dict")
    y = {"first": data.y, "second": data.y}
    first, second = model.predict_on_batch(data.x).values()
    errors = {"first": np.mean((data.y - first) ** 2), "second": np.mean((data.y - second) ** 2)}

    # One output reads another, and tracks the loss of another.
    one = losses.flexible(other=ops.mean(model.output["second"], axis=-1))
    loss = {"first": one, "second": losses.scaled()}
    live = attached(loss, model, track={"first": [losses.scaled()]})
    logs = logs_of(live, data.x, y)
    assert logs["loss"] == pytest.approx(sum(errors.values()) + second.mean(), rel=1e-5)
    assert logs["scaled"] == pytest.approx(errors["first"], rel=1e-5)

    # One output has no bound loss, and one loss serves all outputs.
    loss = {"first": losses.shifted(fixed(3.0)), "second": "mse"}
    live = attach(model, {**loss, "second": None})
    live.compile("sgd", loss=loss)
    assert logs_of(live, data.x, y)["loss"] == pytest.approx(sum(errors.values()) + 3, rel=1e-5)
    live = attached(losses.shifted(fixed(2.0)), functional("list"))
    assert logs_of(live, data.x, [data.y, data.y])["shift"] == 2


def test_symbolic_tensors(data):
    model = functional("dict")
    outputs = attach(model.output, {"first": losses.shifted(fixed())})
    assert list(outputs) == ["first", "second"]
    assert outputs["second"] is model.output["second"]
    a, b = attach([*model.outputs], [losses.shifted(fixed()), None])
    assert b is model.outputs[1]
    one = attach(functional(), losses.shifted(fixed()), track=losses.total())  # needs no list
    assert layer_of(one).track == (losses.total(),)
    live, plain = (keras.Model(model.input, outputs) for outputs in ([a, b], model.outputs))
    same_predictions(live, plain, data)
    again = attach(a, losses.total())
    assert layer_of(keras.Model(model.input, again)).loss is losses.total()


# ---- Inputs ----


@each(
    ("inputs", "expected"),
    [
        (lambda x, y: x, ["x", "mask"]),
        (lambda x, y: [x], ["x", "mask"]),
        (lambda x, y: [x, y], ["x", "y", "mask"]),
        (lambda x, y: {"x": x, "y": y}, {"x": "x", "y": "y", "mask": "mask"}),
    ],
)
def test_argument_inputs_become_inputs_of_the_model(inputs, expected, data):
    x, y = keras.Input((3,), name="x"), keras.Input((3,), name="y")
    given = inputs(x, y)
    output = keras.layers.Dense(2)(x + y if len(keras.tree.flatten(given)) == 2 else x)
    model = keras.Model(given, output)
    mask = keras.Input((2,), name="mask")
    live = attach(model, losses.masked(mask=mask))
    assert keras.tree.map_structure(lambda tensor: tensor.name, live.input) == expected
    detached = detach(live)
    assert keras.tree.flatten(detached.input) == keras.tree.flatten(given)
    one, other = (
        m.predict_on_batch(keras.tree.map_structure(lambda _: data.x, m.input))
        for m in (detached, model)
    )
    np.testing.assert_array_equal(one, other)


@each("of", [list, tuple])
def test_inputs_that_stay_as_they_are(of):
    x, y = keras.Input((3,), name="x"), keras.Input((3,), name="y")
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model = keras.Model(of([x, y]), inner(x + y))
    live = attach(model, losses.flexible(shift=fixed(), tensor=x[:, 0]))
    for other in (live, detach(live)):
        assert type(other.input) is type(model.input)
        assert len(other.inputs) == 2


# ---- Errors ----


class OwnConstructor(keras.Model):
    def __init__(self, x, y, factor, name=None):
        super().__init__(x, y, name=name)


class OwnSequential(keras.Sequential):
    def __init__(self, factor):
        super().__init__([keras.Input((3,))])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.loss_args = LossArgs(losses.shifted(fixed()))


def inside_a_model():
    x = keras.Input((3,))
    return keras.Model(x, attach(functional(), losses.shifted(step_itself()))(x))


def attach_live(model):
    return attach(model, losses.shifted(fixed()))


NOT_KEPT = [
    (
        attach_live,
        lambda: functional(cls=OwnConstructor, factor=2),
        ["'network'", "OwnConstructor", "super().__init__(inputs, attach(y_pred, loss))"],
    ),
    (attach_live, lambda: OwnSequential(2), ["OwnSequential", "model.add(LossArgs(loss))"]),
    (attach_live, Subclassed, ["self.loss_args(y_pred)"]),
    (attach_live, lambda: np.zeros(3), ["array([0., 0., 0.])"]),
    (
        attach_live,
        lambda: keras.KerasTensor((None, 1)),
        ["neither a model nor the symbolic output of a layer"],
    ),
    (detach, Subclassed, ["Subclassed", "model.predict(x)"]),
    (detach, inside_a_model, ["'network'", "detach(inner_model)"]),
    (detach, lambda: keras.Sequential([inside_a_model()]), ["detach(inner_model)"]),
]


@each(("function", "target", "words"), NOT_KEPT)
def test_models_that_cannot_be_kept(function, target, words):
    with raising(AttachError, *words):
        function(target())


@pytest.mark.fit
def test_attached_model_as_a_layer(data):
    model = inside_a_model()
    loss = layer_of(model.get_layer("network")).loss
    model.compile("sgd", loss=loss)
    logs = model.fit(data.x, data.y, batch_size=6, verbose=0).history
    assert logs["shift"] == pytest.approx([1])


def test_tensor_of_another_graph():
    encoder = functional()
    x = keras.Input((3,))
    model = keras.Model(x, encoder(x), name="outer")
    loss = losses.described(what=encoder.output)
    words = "'what' of described(what=<symbolic", "input 'x'", "'outer'", "z = encoder(x)"
    with raising(AttachError, *words):
        attach(model, loss)
    if KERAS >= (3, 15):  # older Keras does not look
        with pytest.raises(ValueError, match="not connected"):  # Keras's own
            keras.Model(x, attach(model.outputs[0], loss))


TOTAL = losses.total()
WRONG = [
    ("one", "mse", (), ["'mse'", "with_args"]),
    ("one", losses.shifted, (), ["<loss factory shifted(shift)>"]),
    ("list", ["mse", None], (), ["'mse'"]),
    ("list", None, (), ["None"]),
    ("list", {"c": TOTAL}, (), ["'c'", "'a', 'b'"]),
    ("dict", {"frist": TOTAL}, (), ["Did you mean 'first'?"]),
    ("list", [TOTAL], (), ["'a', 'b'", "{'a': ...}"]),
    ("list", [TOTAL, None], [TOTAL], ["track", "'a', 'b'"]),
    ("list", [TOTAL, None], {"b": [TOTAL]}, ["None"]),
]


@each(("outputs", "loss", "track", "words"), WRONG)
def test_wrong_losses(outputs, loss, track, words):
    with raising(AttachError, *words):
        attach(functional(outputs), loss, track=track)
