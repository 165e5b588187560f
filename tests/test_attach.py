"""`attach` and `detach`: what they give back, what they leave alone, what they refuse."""

import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import BACKEND, KERAS, linear_model, message_of
from lossargs import AttachError, LossArgs, attach, detach, live_args


def variable(value=1.0, name="shift"):
    return keras.Variable(value, trainable=False, name=name)


def functional(outputs="one", cls=keras.Model, **options):
    x = keras.Input((3,), name="x")
    a = keras.layers.Dense(2, name="a")(x)
    b = keras.layers.Dense(2, name="b")(a)
    given = {"one": a, "list": [a, b], "tuple": (a, b), "dict": {"first": a, "second": b}}[outputs]
    return cls(x, given, name="network", **options)


def same_predictions(one, other, data):
    for y, expected in zip(
        keras.tree.flatten(one.predict(data.x, verbose=0)),
        keras.tree.flatten(other.predict(data.x, verbose=0)),
        strict=True,
    ):
        np.testing.assert_array_equal(y, expected)


def test_functional_model(data):
    model = functional()
    attached = attach(model, losses.shifted(variable()))
    assert isinstance(attached, type(model))
    assert attached.name == "network"
    assert attached.get_layer("a") is model.get_layer("a")
    assert attached.count_params() == model.count_params() + 1
    same_predictions(attached, model, data)


def test_sequential_model(data):
    model = linear_model()
    attached = attach(model, losses.shifted(variable()))
    assert type(attached) is keras.Sequential
    assert attached.layers[:-1] == model.layers
    assert isinstance(attached.layers[-1], LossArgs)
    assert len(model.layers) == 1
    same_predictions(attached, model, data)
    assert [layer.name for layer in detach(attached).layers] == [model.layers[0].name]


@pytest.mark.fit
def test_sequential_model_without_an_input(data):
    loss = losses.shifted(variable())
    model = attach(keras.Sequential([keras.layers.Dense(2)]), loss)
    model.compile("sgd", loss=loss)
    assert model.fit(data.x, data.y, verbose=0).history["shift"] == [1]


def test_sequential_model_whose_loss_reads_tensors(data):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    attached = attach(model, losses.described(what=model.layers[0].output))
    assert isinstance(attached, type(functional()))
    same_predictions(attached, model, data)
    with pytest.raises(AttachError, match="Make it one first, keras.Model"):
        attach(keras.Sequential([keras.layers.Dense(2)]), losses.described(what=keras.Input(())))


@pytest.mark.parametrize("outputs", ["list", "tuple", "dict"])
@pytest.mark.parametrize("losses_by", ["order", "name"])
@pytest.mark.fit
def test_several_outputs(data, outputs, losses_by):
    model = functional(outputs)
    names = ["first", "second"] if outputs == "dict" else ["a", "b"]
    one = losses.shifted.options(name="one")(variable(1.0))
    two = losses.scaled.options(name="two")(variable(2.0, "scale"))
    loss = {names[0]: one, names[1]: two}
    if losses_by == "order":
        if outputs == "dict":
            pytest.skip("Keras wants a dict of losses for a dict of outputs")
        loss = [one, two]
    attached = attach(model, loss)
    same_predictions(attached, model, data)
    assert type(attached.predict(data.x, verbose=0)) is type(model.predict(data.x, verbose=0))
    assert list(attached.output_names) == list(model.output_names)

    attached.compile(keras.optimizers.SGD(0.0), loss=loss)
    plain = {names[0]: losses.shifted(1.0), names[1]: losses.scaled(2.0)}
    model.compile(
        keras.optimizers.SGD(0.0), loss=plain if losses_by == "name" else [*plain.values()]
    )
    y = dict.fromkeys(names, data.y) if outputs == "dict" else [data.y, data.y]
    logs = attached.fit(data.x, y, verbose=0).history
    expected = model.fit(data.x, y, verbose=0).history
    assert set(logs) == {*expected, "shift", "scale"}
    for name, value in expected.items():
        assert logs[name] == pytest.approx(value, rel=1e-6), name
    assert detach(attached).output_names == model.output_names


@pytest.mark.fit
def test_saved_model_of_several_outputs(data, tmp_path):
    loss = {"a": losses.shifted(variable()), "b": losses.scaled(variable(2.0, "scale"))}
    model = attach(functional("list"), loss, track={"b": [losses.total()]})
    model.compile("sgd", loss=loss)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.output_names == ["a", "b"]
    y = [data.y, data.y]
    logs, expected = (m.evaluate(data.x, y, verbose=0, return_dict=True) for m in (loaded, model))
    assert logs == pytest.approx(expected, rel=1e-6)
    assert {"a_loss", "b_loss", "shift", "scale", "total"} < set(logs)


@pytest.mark.fit
def test_one_output_reads_another(data):
    model = functional("dict")
    b = model.output["second"]
    loss = {"first": losses.flexible(other=ops.mean(b, axis=-1)), "second": None}
    attached = attach(model, loss)
    attached.compile("sgd", loss={"first": loss["first"], "second": "mse"})
    y = {"first": data.y, "second": data.y}
    logs = attached.evaluate(data.x, y, verbose=0, return_dict=True)
    first, second = (model.predict(data.x, verbose=0)[name] for name in ("first", "second"))
    errors = np.mean((data.y - first) ** 2) + np.mean((data.y - second) ** 2)
    assert logs["loss"] == pytest.approx(errors + second.mean(), rel=1e-5)


@pytest.mark.fit
def test_tracked_loss_that_another_output_is_trained_with(data):
    loss = {"a": losses.shifted(variable()), "b": losses.scaled()}
    model = attach(functional("list"), loss, track={"a": [losses.scaled()]})
    model.compile(keras.optimizers.SGD(0.0), loss=loss)
    logs = model.evaluate(data.x, [data.y, data.y], verbose=0, return_dict=True)
    assert logs["a_loss"] == pytest.approx(logs["scaled"] + 1, rel=1e-5)


@pytest.mark.fit
def test_one_loss_for_all_outputs(data):
    loss = losses.shifted(variable())
    model = attach(functional("list"), loss)
    model.compile("sgd", loss=loss)
    assert model.fit(data.x, [data.y, data.y], verbose=0).history["shift"] == [1]


def test_symbolic_tensors(data):
    model = functional("dict")
    loss = {"first": losses.shifted(variable())}
    outputs = attach(model.output, loss)
    assert list(outputs) == ["first", "second"]
    assert outputs["second"] is model.output["second"]
    a, b = attach([*model.outputs], [losses.shifted(variable()), None])
    assert b is model.outputs[1]
    same_predictions(keras.Model(model.input, [a, b]), functional_like(model), data)


def functional_like(model):
    return keras.Model(model.input, model.outputs)


@pytest.mark.parametrize(
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
    attached = attach(model, losses.masked(mask=mask))
    assert keras.tree.map_structure(lambda tensor: tensor.name, attached.input) == expected

    detached = detach(attached)
    assert keras.tree.flatten(detached.input) == keras.tree.flatten(given)
    one, other = (
        m.predict(keras.tree.map_structure(lambda _: data.x, m.input), verbose=0)
        for m in (detached, model)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("of", [list, tuple])
def test_inputs_that_stay_as_they_are(of):
    x, y = keras.Input((3,), name="x"), keras.Input((3,), name="y")
    model = keras.Model(of([x, y]), keras.layers.Dense(2)(x + y))
    attached = attach(model, losses.shifted(variable()))
    for other in (attached, detach(attached)):
        assert type(other.input) is type(model.input)
        assert len(other.inputs) == 2


def test_input_of_the_model_as_an_argument():
    model = functional()
    attached = attach(model, losses.described(what=model.inputs[0]))
    assert attached.input is model.input


def test_attach_again_replaces():
    model = functional()
    for _ in range(2):
        model = attach(model, losses.shifted(variable()))
        assert sum(isinstance(layer, LossArgs) for layer in model.layers) == 1
    assert list(live_args(model)) == ["shift"]
    output = attach(attach(functional().outputs[0], losses.total()), losses.shifted(variable()))
    assert output.shape == (None, 2)


def test_detach_shares_layers_and_leaves_other_models_alone():
    model = functional()
    detached = detach(attach(model, losses.shifted(variable())))
    assert detached.layers == model.layers
    assert detach(model) is model


def test_detached_model_is_exported(data, tmp_path):
    mask = keras.Input((2,), name="mask")
    model = detach(attach(functional(), losses.masked(mask=mask)))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        model.export(tmp_path / "saved_model", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "saved_model")
        served = loaded.serve(data.x)
        np.testing.assert_allclose(served, model.predict(data.x, verbose=0), atol=1e-6)
    elif BACKEND == "torch":
        import torch

        program = torch.export.export(model.eval(), (torch.as_tensor(data.x),))
        served = program.module()(torch.as_tensor(data.x)).detach().numpy()
        np.testing.assert_allclose(served, model.predict(data.x, verbose=0), atol=1e-6)
    else:
        pytest.skip("Keras exports from JAX and NumPy through TensorFlow or torch only")


# ---- Classes of models ----


class OwnStep(keras.Model):
    """A Functional model with a train step of its own, as Keras's guide has it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = 0

    def train_step(self, *args):
        self.steps += 1
        return super().train_step(*args)


class OwnConstructor(keras.Model):
    def __init__(self, x, y, factor, name=None):
        super().__init__(x, y, name=name)
        self.factor = factor


class OwnSequential(keras.Sequential):
    def __init__(self, layers, factor):
        super().__init__(layers)
        self.factor = factor


@pytest.mark.fit
def test_functional_subclass_is_kept(data):
    loss = losses.shifted(variable())
    model = attach(functional(cls=OwnStep), loss)
    assert type(model) is OwnStep
    model.compile("sgd", loss=loss)
    assert model.fit(data.x, data.y, verbose=0).history["shift"] == [1]
    assert model.steps > 0
    assert type(detach(model)) is OwnStep


def test_classes_that_cannot_be_kept():
    loss = losses.shifted(variable())
    with pytest.raises(AttachError) as error:
        attach(functional(cls=OwnConstructor, factor=2), loss)
    text = message_of(error.value)
    assert text.startswith("'network', a OwnConstructor has an __init__ of its own, so that attach")
    assert "super().__init__(inputs, attach(y_pred, loss))" in text

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(AttachError, match="return self.loss_args\\(y_pred\\) in its `call`"):
        attach(Subclassed(), loss)
    with pytest.raises(AttachError, match="model.add\\(LossArgs\\(loss\\)\\)"):
        attach(OwnSequential([keras.Input((3,))], 2), loss)


def test_subclassed_model_cannot_be_detached():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.loss_args = LossArgs(losses.shifted(variable()))

    with pytest.raises(AttachError, match="`predict` and `export` work with it"):
        detach(Subclassed())


@pytest.mark.fit
def test_attached_model_as_a_layer(data):
    loss = losses.shifted(variable())
    inner = attach(functional(), loss)
    x = keras.Input((3,))
    model = keras.Model(x, inner(x))
    model.compile("sgd", loss=loss)
    assert model.fit(data.x, data.y, verbose=0).history["shift"] == [1]
    with pytest.raises(AttachError, match="The layers 'network' of .* are attached models themsel"):
        detach(model)


# ---- Errors ----


def test_tensor_of_another_graph():
    encoder = functional()
    x = keras.Input((3,))
    model = keras.Model(x, encoder(x), name="outer")
    with pytest.raises(AttachError) as error:
        attach(model, losses.described(what=encoder.output))
    text = message_of(error.value)
    assert text.startswith("'what' of described(what=<symbolic tensor")
    assert (
        "is a tensor of another graph: it is computed from the input 'x', which 'outer' does"
        in (text)
    )
    assert "z = encoder(x), and not encoder.output" in text

    if KERAS < (3, 15):
        return  # Keras does not look
    y = attach(model.outputs[0], losses.described(what=encoder.output))
    with pytest.raises(ValueError, match="not connected"):  # Keras's own
        keras.Model(x, y)


@pytest.mark.parametrize(
    ("outputs", "arguments", "text"),
    [
        ("one", lambda: ["mse"], "'mse' is not a loss with arguments. Make one: with_args"),
        ("one", lambda: [losses.shifted], "<loss factory shifted(shift)> is not a loss with arg"),
        ("list", lambda: [["mse", None]], "'mse' is not a loss with arguments"),
        ("list", lambda: [None], "None is not a loss with arguments"),
        ("list", lambda: [{"c": losses.total()}], "names the output 'c', and there are 'a', 'b'"),
        ("dict", lambda: [{"frist": losses.total()}], "Did you mean 'first'?"),
        ("list", lambda: [[losses.total()]], "for the outputs 'a', 'b'. Give a dict, {'a': ...}"),
    ],
)
def test_wrong_losses(outputs, arguments, text):
    with pytest.raises(AttachError) as error:
        attach(functional(outputs), *arguments())
    assert text in message_of(error.value)


def test_wrong_track():
    model, total = functional("list"), losses.total
    loss = [losses.shifted(variable()), None]
    with pytest.raises(AttachError, match="attach\\(track=...\\) was given .* for the outputs 'a'"):
        attach(model, loss, track=[total()])
    with pytest.raises(AttachError, match="None is not a loss with arguments"):
        attach(model, loss, track={"b": [total()]})
    one = attach(functional(), loss[0], track=total())
    assert [layer.track for layer in one.layers if isinstance(layer, LossArgs)] == [(total(),)]


def test_wrong_target():
    with pytest.raises(AttachError, match="takes a model, or the symbolic tensor that is its out"):
        attach(np.zeros(3), losses.total())


def test_loss_that_reads_tensors_behind_a_layer_by_hand():
    with pytest.raises(AttachError, match="Let attach\\(y_pred, loss\\) connect it"):
        LossArgs(losses.described(what=keras.Input(())))(keras.Input((2,)))
