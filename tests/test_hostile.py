"""Files that name what they should not: refused with a clear error, nothing run nor imported."""

import base64
import contextlib
import copy
import functools
import io
import itertools
import json
import marshal
import operator
import os
import pickle
import runpy
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import numpy.testing  # which older NumPy imports when it is used first
import pytest
from keras.src.saving.serialization_lib import ObjectSharingScope, SafeModeScope, in_safe_mode

import losses
from helpers import KERAS, layer_of, linear_model
from lossargs import LossArgsError, attach, grad

BIG = 2**28  # float32 of it are 1 GiB
MISSING = object()

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


class Pickled:
    def __reduce__(self):
        return os.system, ("touch marker",)


def array(descr, shape, data=b""):
    """An array as `numpy.lib.format` writes it."""
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return of_bytes(file.getvalue() + data)


def of_bytes(data):
    return {"kind": "array", "data": base64.b64encode(data).decode()}


# Code that would run, as Keras writes it into a file.
CODE = base64.b64encode(marshal.dumps((lambda: Path("marker").touch()).__code__)).decode()
LAMBDA = {"class_name": "__lambda__", "module": "builtins", "config": {"value": [CODE, None, None]}}
OBJECTS = {
    "os.system": function("system", "os"),
    "eval": function("eval", "builtins"),
    "canary function": function("bark", "canary"),
    "canary class": of_class("Dog", "canary"),
    "Popen": of_class("Popen", "subprocess", args=["touch", "marker"]),
    "unsafe": function("enable_unsafe_deserialization", "keras.config"),
    "get_file": function("get_file", "keras.utils"),
    "deserialize": function("deserialize", "builtins"),
    "lambda": {**LAMBDA, "registered_name": None},
    "registered lambda": {**LAMBDA, "registered_name": "lossargs>BoundLoss"},
    "object array": {"class_name": "__numpy__", "config": {"value": [None], "dtype": "object"}},
    "private name": of_class("LossFunction", "lossargs._function", fn="bark"),
    "layer": of_class("TFSMLayer", "keras.layers", filepath="/tmp/none"),
    "variable": of_class("Variable", "keras", initializer="zeros", shape=[BIG]),
    "module of keras": of_class("Anything", "keras.src.no_such_module"),
}
FUNCTIONS = ["eval", "os.system", "canary>bark", "deserialize", "Huber", "__name__", ["eval"]]
HEADER = b"__import__('os').system('touch marker')"
VALUES = {
    **{name: {"kind": "keras", "object": one} for name, one in OBJECTS.items()},
    **{f"live {name}": {"kind": "live", "object": one} for name, one in OBJECTS.items()},
    **{f"function {name}": {"kind": "function", "name": name} for name in FUNCTIONS},
    "huge array": array("<f4", (BIG,)),
    "huge dtype": array(f"|S{BIG}", (1,)),
    "huge and negative": array("<f4", (-1, -BIG), bytes(4)),
    "huge subarray": array(("<f4", (BIG,)), (1,), bytes(4)),
    "structure": array([("a", "<f4"), ("b", "|O")], (1,), bytes(12)),
    "pickled": array("|O", (1,), pickle.dumps(Pickled())),
    "pickle alone": of_bytes(pickle.dumps(Pickled())),
    "code as a header": of_bytes(b"\x93NUMPY\x01\x00" + bytes([len(HEADER), 0]) + HEADER),
    "another version": of_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff"),
    "list as a key": {"kind": "dict", "items": [[[1], 2]]},
    "no kind": {"no": "kind"},
    "pair of one": {"kind": "dict", "items": [[1]]},
    "no base64": {"kind": "array", "data": "not base64!"},
    "too short": array("<f4", (3,), bytes(8)),
    "unknown kind": {"kind": ["array"]},
    "deep": nested(800),
}
JUNK = [None, -1, BIG, "os.system", [], ["eval"], {}, nested(800), MISSING]

# Places in the config of the layer: of objects, of values, and others.
ARGS = "loss.config.args"
LIVE, CODED, OWNED = (f"{ARGS}.{name}.object.config" for name in ("live", "code", "owned"))
VARIABLE, MAIN = f"{LIVE}.variable", f"{ARGS}.main.object"
OF_OBJECTS = [
    *["loss", "track.0", MAIN, VARIABLE, f"{OWNED}.owner", f"{OWNED}.owner.0"],
    *(f"{ARGS}.{name}.object" for name in ("live", "schedule", "code", "owned")),
    *(f"{LIVE}.{name}" for name in ("constraint", "regularizer", "dtype")),
    *(f"{CODED}.{name}" for name in ("dtype", "shape", "tensor")),
]
OF_VALUES = [f"{ARGS}.what", f"{VARIABLE}.value", f"{MAIN}.config.args.shift"]
HOSTILE_NAMES = ["os>system", "canary>bark", "lossargs._function>function_of", "keras.losses>get"]
OTHERS = {
    **{place: [MISSING] for place in ("loss", "new_inputs")},
    f"{VARIABLE}.value": [MISSING, 1.0],
    **{f"loss.config.{n}": [MISSING, {}] for n in ("module", "name", "reduction", "dtype")},
    **{f"{VARIABLE}.{n}": [MISSING, {}] for n in ("dtype", "trainable", "name", "aggregation")},
    **{f"{one}.config.function": [MISSING, {}, *HOSTILE_NAMES] for one in ("loss", MAIN)},
    ARGS: [None, "abc", [["what", 1]], nested(800)],
    "track": [MISSING, None, "abc", {}, [1]],
    f"{ARGS}.y_true": [1],
    f"{CODED}.shape": [[-1], ["os.system"], "abc", nested(800)],
    "loss.config.call": ["os.system"],
    "kept": [{"a": 1}],
}
TURN = itertools.cycle(OBJECTS)  # each place has some of the objects, each object is at some places
CASES = {
    **{f"{p}: {n}": (p, OBJECTS[n]) for p in OF_OBJECTS for n in itertools.islice(TURN, 7)},
    **{f"{OF_VALUES[i % 3]}: {n}": (OF_VALUES[i % 3], VALUES[n]) for i, n in enumerate(VALUES)},
    **{f"{p} {i}": (p, one) for p, several in OTHERS.items() for i, one in enumerate(several)},
}


def everything():
    """A model with live values of each kind, a loss in a loss, and a tracked loss."""
    variable = keras.Variable(1.0, trainable=False, name="live")
    variable.constraint = keras.constraints.MaxNorm(3.0)
    network = linear_model()
    loss = losses.flexible(
        live=variable,
        schedule=keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0),
        code=keras.Input((1,), name="code"),
        owned=network.layers[0].bias,
        what=1.0,
        main=losses.shifted.options(reduction=None)(3),
    )
    return attach(network, loss, track=[losses.described.options(name="tracked")(what=[1.0])])


def load(saved, path, name, content):
    """Load a file of which one member is another one."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path / "hostile.keras", "w") as new:
        for member in old.namelist():
            new.writestr(member, content if member == name else old.read(member))
    return keras.saving.load_model(path / "hostile.keras")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.keras"
    everything().save(path)
    return path


@pytest.fixture
def config(saved):
    with zipfile.ZipFile(saved) as file:
        return json.loads(file.read("config.json"))


@pytest.fixture
def layer(config):
    """The part of the config that describes the layer."""
    return next(one for one in config["config"]["layers"] if one["class_name"] == "LossArgs")


def changed(config, place, value):
    config = copy.deepcopy(config)
    *above, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    part = functools.reduce(operator.getitem, above, config)
    if value is not MISSING:
        part[last] = value
    else:
        del part[last]
    return config


def places(config):
    """Every place in a config."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield f"{key}"
        if isinstance(value, (dict, list)):
            yield from (f"{key}.{place}" for place in places(value))


@contextlib.contextmanager
def watching(folder):
    """Fails if anything is imported, run, allowed in Keras, or large."""
    (folder / "canary.py").write_text(CANARY)
    before = set(sys.modules)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()
    assert set(sys.modules) == before
    assert not (folder / "marker").exists()
    assert in_safe_mode() is not False


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def watched(folder):
    with watching(folder):
        yield folder


ACTS = {
    "import": lambda: __import__("canary") and Path("marker").unlink(),
    "run": lambda: runpy.run_path("canary.py"),
    "unsafe": keras.config.enable_unsafe_deserialization,
    "lambda": types.FunctionType(marshal.loads(base64.b64decode(CODE)), {"Path": Path}),
    "unpickle": lambda: pickle.loads(pickle.dumps(Pickled())),
    "allocate": lambda: np.ones(BIG, "int8"),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_is_watched_is_seen(folder, act):
    with SafeModeScope(), pytest.raises(AssertionError), watching(folder):
        ACTS[act]()
    sys.modules.pop("canary", None)


def refused(match="cannot be read|does not know|not match"):
    return pytest.raises(LossArgsError, match=match)


@pytest.mark.parametrize("case", CASES)
def test_layer(layer, case, watched):
    hostile = {**layer, "config": changed(layer["config"], *CASES[case])}
    with refused():
        keras.saving.deserialize_keras_object(hostile)


def test_anything_anywhere(layer, watched):
    """Keras and lossargs take any object for some entries. None is imported or run."""
    found = itertools.cycle([*OBJECTS.values(), *JUNK])
    for place in places(layer["config"]):
        hostile = {**layer, "config": changed(layer["config"], place, next(found))}
        with contextlib.suppress(LossArgsError):
            keras.saving.deserialize_keras_object(hostile)


@pytest.mark.parametrize("case", list(CASES)[::12])  # whole files take longer
def test_file(saved, config, layer, case, watched):
    layer["config"] = changed(layer["config"], *CASES[case])
    with refused():
        load(saved, watched, "config.json", json.dumps(config))


def test_good_file_loads_afterwards(saved):
    assert repr(layer_of(keras.saving.load_model(saved)).loss) == repr(layer_of(everything()).loss)


def compiled(**config):
    keras.Model().compile_from_config({"optimizer": "sgd", **config})


READ = {
    "keras.saving": keras.saving.deserialize_keras_object,
    "keras.losses": keras.losses.get,
    "the loss of an output": lambda loss: compiled(loss={"a": "mse", "b": loss}),
    "a metric": lambda loss: compiled(loss="mse", metrics=[loss]),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_loss_alone(layer, read, watched):
    good = {"loss": layer["config"]["loss"]}
    read(copy.deepcopy(good["loss"]))
    for case in [one for one in CASES.values() if ARGS in one[0]][::8]:
        with refused():
            read(changed(good, *case)["loss"])


def test_losses_deep_in_one_another(layer, watched):
    config = good = layer["config"]["loss"]
    for _ in range(800):
        args = {"main": {"kind": "keras", "object": config}}
        config = {**good, "config": {**good["config"], "args": args}}
    with refused():
        keras.losses.deserialize(config)


# Parts of the config of a model of several outputs, and of a layer of derivatives.
ENDS = [["nobody", 0, 0], ["a", 7, 0], ["a", "x", 0], ["a", 0, 9]]
NODES = [MISSING, "abc", [], {}, nested(800), *([end] for end in ENDS)]
MODEL = {
    "layers": [MISSING, "abc", {"a": 1}, []],
    "name": [MISSING, {"a": 1}],
    "layers.0": [*OBJECTS.values()],
    "output_layers": NODES,
    "input_layers": NODES,
}
PROGRAM = {
    "shared": [False],
    "calls": [MISSING, "abc", [0]],
    "calls.0": [[0]],
    "calls.0.0": ["os.system", 7, *OBJECTS.values()],
    "calls.0.1": ["abc"],
    "calls.0.1.0.config.index": [-1, 99, {}],
    "paths": [MISSING, {}, [], [1]],
    "paths.0": [[9, 0], [0, -1], ["abc", 0], [0, 99]],
}


def assert_refused(model, changes, *words):
    """As `load_model` reads the config of a model."""
    with ObjectSharingScope():
        good = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
    with ObjectSharingScope():
        loaded = keras.saving.deserialize_keras_object(copy.deepcopy(good))
    assert (type(loaded), loaded.output_names) == (type(model), model.output_names)
    for place, one in ((place, one) for place, several in changes.items() for one in several):
        hostile = {**good, "config": changed(good["config"], place, one)}
        with ObjectSharingScope(), refused(*words):
            keras.saving.deserialize_keras_object(hostile)


def test_model_of_several_outputs(watched):
    x = keras.Input((3,))
    model = keras.Model(x, [keras.layers.Dense(2, name=name)(x) for name in "ab"])
    live = losses.shifted(keras.Variable(1.0, name="live"))
    assert_refused(attach(model, [live, losses.shifted(2)]), MODEL)


@pytest.mark.skipif(keras.backend.backend() == "numpy", reason="has no derivatives")
@pytest.mark.skipif(KERAS < (3, 15), reason="older Keras imports what a config names")
def test_derivatives(watched):
    x = keras.Input((1,))
    y = keras.layers.Dense(1)(x)
    changes = {f"layers.2.config.{place}": several for place, several in PROGRAM.items()}
    assert_refused(keras.Model(x, [y, grad(y, x)]), changes, "cannot be read|Cannot clone a model")


# Keras looks for the weights of a layer that failed in a second place, and warns.
@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "expected 1 variables, but received 0"),
        (np.zeros((3, 4)), "target variable and .* must match"),
        (np.array([b"os.system"]), "could not convert string|Invalid dtype: bytes"),
    ],
)
def test_weights(saved, data, reason, tmp_path):
    with zipfile.ZipFile(saved) as file:
        content = io.BytesIO(file.read("model.weights.h5"))
    with h5py.File(content, "r+") as file:
        place = "layers/loss_args/adapters/variable_adapter/vars/0"
        del file[place]
        if data is not None:
            file.create_dataset(place, data=data)
    with pytest.raises(ValueError, match=f"(?s)({reason}).*VariableAdapter"):
        load(saved, tmp_path, "model.weights.h5", content.getvalue())


def test_object_under_the_id_of_another(saved, config, layer, watched):
    parts = layer["config"]
    for one in (parts["loss"]["config"]["args"]["live"]["object"], parts["track"][0]):
        one["shared_object_id"] = 123456
    with refused("VariableAdapter is no BoundLoss"):
        load(saved, watched, "config.json", json.dumps(config))
