"""Files that name what they should not: refused with a clear error, nothing run nor imported."""

import base64
import contextlib
import copy
import importlib
import io
import json
import marshal
import re
import runpy
import sys
import types
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras.src.saving.serialization_lib import SafeModeScope, in_safe_mode

import losses
from helpers import KERAS, WHILE_BUILDING, linear_model
from lossargs import AttachError, LossArgs, LossArgsError, attach, grad

BIG = 2**40

CANARY = """
import pathlib
pathlib.Path(__file__).with_name("marker").touch()
def bark(*args, **kwargs):
    pathlib.Path(__file__).with_name("marker").touch()
"""


def function(name, module):
    return {"class_name": "function", "module": module, "config": name, "registered_name": name}


def of_class(name, module, **config):
    return {"class_name": name, "module": module, "config": config, "registered_name": None}


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


# Code that would run, as Keras writes it into a file.
CODE = base64.b64encode(marshal.dumps((lambda: Path("marker").touch()).__code__)).decode()
LAMBDA = {"value": [CODE, None, None]}
OBJECTS = {
    "os.system": function("system", "os"),
    "eval": function("eval", "builtins"),
    "canary function": function("bark", "canary"),
    "canary class": of_class("Dog", "canary"),
    "Popen": of_class("Popen", "subprocess", args=["touch", "marker"]),
    "unsafe": function("enable_unsafe_deserialization", "keras.config"),
    "get_file": function("get_file", "keras.utils"),
    "set_floatx": function("set_floatx", "keras.config"),
    "deserialize": function("deserialize", "builtins"),
    "lambda": {"class_name": "__lambda__", "config": LAMBDA},
    "registered lambda": {
        "class_name": "__lambda__",
        "registered_name": "lossargs>BoundLoss",
        "config": LAMBDA,
    },
    "object array": {"class_name": "__numpy__", "config": {"value": [None], "dtype": "object"}},
    "private name": of_class("LossFunction", "lossargs._function", fn="bark"),
    "layer": of_class("TFSMLayer", "keras.layers", filepath="/tmp/none"),
    "module of keras": of_class("Anything", "keras.src.no_such_module"),
    "wrong type": 3,
    "nothing": {},
}

VALUES = {
    **{name: {"kind": "keras", "object": one} for name, one in OBJECTS.items()},
    "huge array": {"kind": "array", "dtype": "<f4", "shape": [BIG], "data": ""},
    "huge dtype": {"kind": "array", "dtype": f"S{BIG}", "shape": [1], "data": ""},
    "huge and negative": {"kind": "array", "dtype": "<f4", "shape": [-1, -BIG], "data": "AAAAAA=="},
    "open shape": {"kind": "array", "dtype": "<f4", "shape": [-1], "data": "AAAAAA=="},
    "pickled": {"kind": "array", "dtype": "|O", "shape": [1], "data": "AAAAAAAAAAA="},
    "structure": {"kind": "array", "dtype": "f4,O", "shape": [1], "data": "AAAAAAAAAAA="},
    "subarray": {"kind": "array", "dtype": f"({BIG},)f4", "shape": [1], "data": "AAAA"},
    "dtype of a dict": {"kind": "array", "dtype": {"names": ["a"]}, "shape": [1], "data": "AAAA"},
    "scalar with a shape": {"kind": "scalar", "dtype": "|u1", "shape": [3], "data": "AAAA"},
    "tensor of text": {"kind": "tensor", "dtype": "no", "shape": [], "data": "AAAA"},
    "tuple of text": {"kind": "tuple", "items": "abc"},
    "dict of text": {"kind": "dict", "items": ["ab"]},
    "list as a key": {"kind": "dict", "items": [[[1], 2]]},
    "complex of text": {"kind": "complex", "items": ["a", "b"]},
    "live of a dict": {"kind": "live", "id": {}, "shown": "x"},
    "live of nobody": {"kind": "live", "id": "nobody", "shown": "x"},
    "unknown kind": {"kind": ["array"]},
    "deep": nested(800),
}

# What stands at a place of the config, and what stands there instead.
LOSS = ("loss", "config")
INNER = (*LOSS, "args", "main", "object", "config")
VARIABLE = ("adapters", 0, "config", "variable")
TENSOR = ("adapters", 2, "config")
MISSING = object()
PLACES = {
    **{f"value: {name}": ((*LOSS, "args", "what"), one) for name, one in VALUES.items()},
    **{f"inner: {name}": ((*LOSS, "args", "main", "object"), one) for name, one in OBJECTS.items()},
    **{f"inner value: {name}": ((*INNER, "args", "shift"), one) for name, one in VALUES.items()},
    **{f"track: {name}": (("track", 0), one) for name, one in OBJECTS.items()},
    **{
        f"track value: {name}": (("track", 0, "config", "args", "what"), one)
        for name, one in VALUES.items()
    },
    **{
        f"{part} of {kind}: {name}": (("adapters", kind, "config", part), one)
        for kind, parts in enumerate((["dtype"], ["dtype"], ["dtype", "shape", "tensor"]))
        for part in parts
        for name, one in OBJECTS.items()
    },
    **{f"loss: {name}": (("loss",), one) for name, one in OBJECTS.items()},
    **{f"adapter: {name}": (("adapters", 0), one) for name, one in OBJECTS.items()},
    **{
        f"schedule: {name}": (("adapters", 1, "config", "schedule"), one)
        for name, one in OBJECTS.items()
    },
    **{
        f"{part}: {name}": (("adapters", 0, "config", part), one)
        for part in ("constraint", "regularizer")
        for name, one in OBJECTS.items()
    },
    **{f"variable: {name}": ((*VARIABLE, "value"), one) for name, one in VALUES.items()},
    **{
        f"no {'.'.join(map(str, place))}": (place, MISSING)
        for place in [
            *((*LOSS, name) for name in ("function", "module", "args", "name", "reduction")),
            *((name,) for name in ("loss", "track", "adapters", "live")),
            *((*VARIABLE, name) for name in ("value", "dtype", "trainable", "name")),
        ]
    },
    "no shape of a tensor": ((*TENSOR, "shape"), MISSING),
    "negative shape": ((*TENSOR, "shape"), [-1]),
    "shape of text": ((*TENSOR, "shape"), ["os.system"]),
    "deep shape": ((*TENSOR, "shape"), nested(800)),
    "tensor of a variable": (("adapters", 0, "config", "tensor"), "os.system"),
    "function of a list": ((*LOSS, "function"), ["os>system"]),
    "module of a dict": ((*LOSS, "module"), {}),
    "dtype of a dict": ((*LOSS, "dtype"), of_class("DTypePolicy", "keras")),
    "args of nothing": ((*LOSS, "args"), None),
    "y_true as an argument": ((*LOSS, "args", "y_true"), 1),
    "unknown entry": ((*LOSS, "call"), "os.system"),
    "inner function of os": ((*INNER, "function"), "os>system"),
    "inner private function": ((*INNER, "function"), "lossargs._function>registered"),
    "no inner function": ((*INNER, "function"), MISSING),
    "tracked function of os": (("track", 0, "config", "function"), "os>system"),
    "function of os": ((*LOSS, "function"), "os>system"),
    "function of the canary": ((*LOSS, "function"), "canary>bark"),
    "private function": ((*LOSS, "function"), "lossargs._function>registered"),
    "name of a dict": ((*LOSS, "name"), {"a": 1}),
    "reduction of a list": ((*LOSS, "reduction"), []),
    "unknown reduction": ((*LOSS, "reduction"), "eval"),
    "unknown dtype": ((*LOSS, "dtype"), "os.system"),
    "args of a list": ((*LOSS, "args"), [["what", 1]]),
    "deep args": ((*LOSS, "args"), nested(800)),
    "initializer by name": ((*VARIABLE, "value"), "zeros"),
    "variable of text": (VARIABLE, "os.system"),
    "track of text": (("track",), "abc"),
    "adapters of nothing": (("adapters",), []),
    "place of no adapter": (("live",), {"a": 7}),
    "negative place": (("live",), {"a": -1}),
    "kept": (("kept",), {"a": 1}),
}


def attached(**tensors):
    loss = losses.flexible(
        live=keras.Variable(1.0, trainable=False, name="live"),
        schedule=keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0),
        what=1.0,
        main=losses.shifted.options(reduction=None)(3),
        **tensors,
    )
    tracked = losses.described.options(name="tracked")(what=1.0)
    return attach(linear_model(), loss, track=[tracked])


def with_tensor():
    return attached(code=keras.Input((1,), name="code"))


def layer_of(model):
    return next(layer for layer in model.layers if isinstance(layer, LossArgs))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The members of a good file."""
    path = tmp_path_factory.mktemp("good") / "model.keras"
    with_tensor().save(path)
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def written(members, path):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def changed(config, place, value):
    config = copy.deepcopy(config)
    part = config
    for key in place[:-1]:
        part = part[key]
    if value is MISSING:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    return config


@contextlib.contextmanager
def watching(folder):
    """Fails if anything is imported, the canary run, or Keras configured."""
    (folder / "canary.py").write_text(CANARY)
    before = set(sys.modules)
    yield
    assert set(sys.modules) == before
    assert not (folder / "marker").exists()
    assert keras.config.floatx() == "float32"
    assert in_safe_mode() is not False


@pytest.fixture
def in_folder_of_canary(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def watched(in_folder_of_canary):
    with watching(in_folder_of_canary):
        yield


def import_canary():
    importlib.import_module("canary")
    (Path.cwd() / "marker").unlink()


def run_canary():
    runpy.run_path("canary.py")


def make_keras_unsafe():
    keras.config.enable_unsafe_deserialization()


def run_lambda():
    types.FunctionType(marshal.loads(base64.b64decode(CODE)), {"Path": Path})()


@pytest.mark.parametrize("act", [import_canary, run_canary, make_keras_unsafe, run_lambda])
def test_what_is_watched_is_seen(in_folder_of_canary, act):
    with SafeModeScope(), pytest.raises(AssertionError), watching(in_folder_of_canary):
        act()
    sys.modules.pop("canary", None)


def check(error):
    """The error is one of lossargs, and says what it is about."""
    assert isinstance(error, LossArgsError), repr(error)
    assert any(text in str(error) for text in ("cannot be read", "does not know", "not fit"))


@pytest.mark.parametrize("case", PLACES)
def test_layer(good, case, watched):
    model = json.loads(good["config.json"])
    layer = next(c for c in model["config"]["layers"] if c["class_name"] == "LossArgs")
    place, value = PLACES[case]
    layer["config"] = changed(layer["config"], place, value)
    with pytest.raises(LossArgsError) as error:
        keras.saving.deserialize_keras_object(layer)
    check(error.value)


CASES = list(PLACES)[::10]  # whole files take longer


@pytest.mark.parametrize("case", CASES)
def test_file(good, case, watched, tmp_path):
    model = json.loads(good["config.json"])
    layer = next(c for c in model["config"]["layers"] if c["class_name"] == "LossArgs")
    place, value = PLACES[case]
    layer["config"] = changed(layer["config"], place, value)
    path = written({**good, "config.json": json.dumps(model)}, tmp_path / "hostile.keras")
    with pytest.raises(LossArgsError) as error:
        keras.saving.load_model(path)
    check(error.value)


def test_good_file_loads_afterwards(good, tmp_path):
    model = keras.saving.load_model(written(good, tmp_path / "good.keras"))
    assert repr(layer_of(model).loss) == repr(layer_of(with_tensor()).loss)


# The same places where a loss stands by itself, but for the one that only its layer knows.
ALONE = {
    name: one
    for name, one in PLACES.items()
    if one[0][: len(LOSS)] == LOSS and name != "value: live of nobody"
    if name != "inner value: live of nobody"
}


def compiled(**config):
    keras.Model().compile_from_config({"optimizer": "sgd", **config})


READ = {
    "keras.saving": keras.saving.deserialize_keras_object,
    "keras.losses": keras.losses.deserialize,
    "keras.losses.get": keras.losses.get,
    "the loss": lambda loss: compiled(loss=loss),
    "the loss of an output": lambda loss: compiled(loss={"a": "mse", "b": loss}),
    "one of the losses": lambda loss: compiled(loss=["mse", loss]),
    "a metric": lambda loss: compiled(loss="mse", metrics=[loss]),
}


@pytest.fixture(scope="module")
def good_loss():
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer_of(attached()).loss)))
    for read in READ.values():
        read(config)
    return config


@pytest.mark.parametrize("case", ALONE)
def test_loss_alone(good_loss, case, watched):
    hostile = changed({"loss": good_loss}, *ALONE[case])["loss"]
    for read in READ.values():
        with pytest.raises(LossArgsError) as error:
            read(hostile)
        check(error.value)


def test_losses_deep_in_one_another(good_loss, watched):
    config = good_loss
    for _ in range(800):
        args = {"main": {"kind": "keras", "object": config}}
        config = {**good_loss, "config": {**good_loss["config"], "args": args}}
    with pytest.raises(LossArgsError, match="cannot be read"):
        keras.losses.deserialize(config)


def compiled_members(good, config):
    """The members of a good file of a model that was compiled with this loss."""
    model = json.loads(good["config.json"])
    model["compile_config"] = {"optimizer": "sgd", "loss": config}
    return {**good, "config.json": json.dumps(model)}


@pytest.mark.parametrize("case", list(ALONE)[::12])
def test_file_of_a_compiled_model(good, good_loss, case, watched, tmp_path):
    hostile = changed({"loss": good_loss}, *ALONE[case])["loss"]
    path = written(compiled_members(good, hostile), tmp_path / "hostile.keras")
    with pytest.raises(LossArgsError) as error:
        keras.saving.load_model(path)
    check(error.value)


def test_compiled_with_live_values_of_nobody():
    model = attached()
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer_of(model).loss)))
    hostile = changed({"loss": config}, *PLACES["value: live of nobody"])["loss"]
    model.compile_from_config({"optimizer": "sgd", "loss": hostile})
    with pytest.raises(WHILE_BUILDING, match="and was compiled with|has live arguments"):
        model.evaluate(np.zeros((2, 3)), np.zeros((2, 2)), verbose=0)


@pytest.mark.skipif(KERAS < (3, 15), reason="Keras itself imports what an optimizer names")
@pytest.mark.parametrize("case", OBJECTS)
@pytest.mark.parametrize("part", ["optimizer", "metrics"])
def test_no_easier_to_attack_with_a_bound_loss(good_loss, case, part, watched):
    def outcome(loss):
        try:
            compiled(**{"loss": loss, part: copy.deepcopy(OBJECTS[case])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return type(error)
        return None

    assert outcome(copy.deepcopy(good_loss)) == outcome("mse")


# What stands at a place of the config of a model of several outputs, and what stands there instead.
MODEL = {
    **{f"no {name}": ((name,), MISSING) for name in ("layers", "input_layers", "output_layers")},
    "no name": (("name",), MISSING),
    "name of a dict": (("name",), {"a": 1}),
    "trainable of text": (("trainable",), "os.system"),
    "layers of text": (("layers",), "abc"),
    "layers of a dict": (("layers",), {"a": 1}),
    "no layer": (("layers",), []),
    **{f"layer: {name}": (("layers", 0), one) for name, one in OBJECTS.items()},
    **{f"outputs: {name}": (("output_layers",), one) for name, one in OBJECTS.items()},
    **{
        f"{ends} {name}": ((ends,), one)
        for ends in ("input_layers", "output_layers")
        for name, one in {
            "of text": "abc",
            "of nothing": [],
            "in an empty dict": {},
            "deep": nested(800),
            "of no layer": [["nobody", 0, 0]],
            "of no call": [["a", 7, 0]],
            "of a negative call": [["a", -1, 0]],
            "of a call of text": [["a", "x", 0]],
            "of no tensor": [["a", 0, 9]],
        }.items()
    },
}


@pytest.fixture(scope="module")
def several_outputs():
    x = keras.Input((3,))
    model = keras.Model(x, [keras.layers.Dense(2, name=name)(x) for name in "ab"])
    model = attach(model, [losses.shifted(keras.Variable(1.0, name="live")), losses.shifted(2)])
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
    assert config["class_name"] == "AttachedModel"
    loaded = keras.saving.deserialize_keras_object(copy.deepcopy(config))
    assert loaded.output_names == ["a", "b"]
    return config


def test_good_model_of_named_inputs_and_several_outputs():
    x = {name: keras.Input((3,), name=name) for name in ("p", "q")}
    model = keras.Model(x, [keras.layers.Dense(2, name=f"{name}_out")(x[name]) for name in "pq"])
    model = attach(model, [losses.shifted(keras.Variable(1.0, name="live")), losses.shifted(2)])
    config = keras.saving.serialize_keras_object(model)
    assert config["class_name"] == "AttachedModel"
    loaded = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
    loaded.set_weights(model.get_weights())
    given = {"p": np.ones((2, 3)), "q": np.zeros((2, 3))}
    for one, two in zip(loaded(given), model(given), strict=True):
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (one, two)))


@pytest.mark.parametrize("case", MODEL)
def test_model_of_several_outputs(several_outputs, case, watched):
    hostile = {**several_outputs, "config": changed(several_outputs["config"], *MODEL[case])}
    with pytest.raises(LossArgsError) as error:
        keras.saving.deserialize_keras_object(hostile)
    check(error.value)


NEWER = pytest.mark.skipif(KERAS < (3, 15), reason="older Keras does not look at that")
# The dataset that a weights file holds in place of a live value, and what the error says of it.
WEIGHTS = {
    "missing": (None, "expected 1 variables, but received 0"),
    "shape": (
        {"data": np.zeros((3, 4))},
        "The shape of the target variable and .* of the target value .* must match",
    ),
    "text": ({"data": np.array([b"os.system"])}, "could not convert string|Invalid dtype: bytes"),
    "huge": ({"shape": (BIG,), "chunks": (1024,)}, "Not allowed: H5 dataset .* 4.00 TB"),
    "external": (
        {"shape": (4,), "dtype": "u1", "external": [("/etc/passwd", 0, 4)]},
        "Not allowed: H5 file with external Dataset: .*/etc/passwd",
    ),
}


@pytest.mark.parametrize(
    "how",
    ["missing", "shape", "text", *(pytest.param(h, marks=NEWER) for h in ("huge", "external"))],
)
def test_weights(good, how, tmp_path):
    import h5py

    content = io.BytesIO(good["model.weights.h5"])
    with h5py.File(content, "r+") as file:
        found = []
        file.visit(lambda name: found.append(name) if "adapter" in name else None)
        place = next(n for n in found if isinstance(file[n], h5py.Dataset) and "variable" in n)
        del file[place]
        dataset, reason = WEIGHTS[how]
        if dataset:
            file.create_dataset(place, **dataset)
    members = {**good, "model.weights.h5": content.getvalue()}
    with pytest.raises(ValueError, match="could not be loaded.*VariableAdapter") as error:
        keras.saving.load_model(written(members, tmp_path / "weights.keras"))
    assert re.search(reason, str(error.value)), error.value


# What stands at a place of the config of a layer of derivatives, and what stands there instead.
PROGRAM = {
    "shared of a model alone": (("shared",), False),
    **{f"no {name}": ((name,), MISSING) for name in ("operations", "calls", "results", "paths")},
    "operations of text": (("operations",), "abc"),
    "an operation of text": (("operations", 0), "os.system"),
    "calls of nothing": (("calls", 0), [0]),
    "arguments of text": (("calls", 0, 1), "abc"),
    "place of no operation": (("calls", 0, 0), 7),
    "slot before the first": (("calls", 0, 1, 0, "config", "index"), -1),
    "results of a dict": (("results",), {}),
    "result of text": (("results", 0), "abc"),
    "along a negative place": (("paths", 0, 1), [-1]),
    "derivative of no result": (("paths", 0, 0), 9),
    "no derivatives": (("paths",), []),
    "paths of numbers": (("paths",), [1]),
    "along of text": (("along",), "abc"),
}


@pytest.fixture(scope="module")
def with_derivatives(tmp_path_factory):
    path = tmp_path_factory.mktemp("derivatives") / "model.keras"
    x = keras.Input((1,))
    y = keras.layers.Dense(1)(x)
    keras.Model(x, [y, grad(y, x)]).save(path)
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.skipif(keras.backend.backend() == "numpy", reason="has no derivatives")
@pytest.mark.parametrize("case", PROGRAM)
def test_derivatives(with_derivatives, case, watched, tmp_path):
    model = json.loads(with_derivatives["config.json"])
    layer = next(c for c in model["config"]["layers"] if c["class_name"] == "Derivatives")
    layer["config"] = changed(layer["config"], *PROGRAM[case])
    members = {**with_derivatives, "config.json": json.dumps(model)}
    with pytest.raises(LossArgsError, match="cannot be read|its config alone"):
        keras.saving.load_model(written(members, tmp_path / "hostile.keras"))


@pytest.mark.skipif(keras.backend.backend() == "numpy", reason="has no derivatives")
def test_a_slot_beyond_all_values(with_derivatives, watched, tmp_path):
    model = json.loads(with_derivatives["config.json"])
    layer = next(c for c in model["config"]["layers"] if c["class_name"] == "Derivatives")
    for place in (("calls", 0, 1, 0, "config", "index"), ("results", 0)):
        changed_layer = {**layer, "config": changed(layer["config"], place, 99)}
        layers = [changed_layer if one is layer else one for one in model["config"]["layers"]]
        config = {**model, "config": {**model["config"], "layers": layers}}
        members = {**with_derivatives, "config.json": json.dumps(config)}
        with pytest.raises(LossArgsError, match="there is no value 99"):
            keras.saving.load_model(written(members, tmp_path / "hostile.keras"))


def test_more_tensors_than_a_layer_reads():
    layer = attached().layers[-1]
    with pytest.raises(AttachError, match=r"called with 1 tensors in a list, and reads 0"):
        layer(keras.ops.zeros((1, 2)), [keras.ops.zeros(())])


def test_object_under_the_id_of_another(good, watched, tmp_path):
    model = json.loads(good["config.json"])
    layer = next(c for c in model["config"]["layers"] if c["class_name"] == "LossArgs")
    variable, schedule, _ = layer["config"]["adapters"]
    variable["shared_object_id"] = schedule["config"]["schedule"]["shared_object_id"] = 123456
    members = {**good, "config.json": json.dumps(model)}
    with pytest.raises(LossArgsError, match="VariableAdapter is no LearningRateSchedule"):
        keras.saving.load_model(written(members, tmp_path / "hostile.keras"))
