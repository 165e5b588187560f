"""Saved models load in a fresh process that has only imported the module of the loss."""

import functools
import json
import runpy
import sys
import types

import keras
import pytest

import losses
from helpers import BACKEND, TESTS, each_writer, linear_model, message_of, raising, run_python
from lossargs import BoundLoss, SavingError, with_args
from losses import shifted

sys.path.insert(0, str(TESTS / "models"))
import make

EXPECTED = json.loads((TESTS / "models" / "expected.json").read_text())


def saved(loss, path):
    model = linear_model()
    model.compile("sgd", loss=loss)
    model.save(path)


# A process that has imported lossargs alone, and then the module of the losses.
LOAD = """
import json, sys, keras, lossargs
assert repr(keras.saving.load_model({huber!r}).loss) == "huber(delta=0.25)"
try:
    keras.saving.load_model({path!r})
except lossargs.SavingError as error:
    message = str(error)
assert "losses" not in sys.modules  # nothing that the file names was imported

sys.path.append("models")
import losses, make
model = keras.saving.load_model({path!r})
assert model.loss == make.LOSSES, model.loss
assert all(loss is make.LOSSES[name] for name, loss in model.loss.items())
assert model.loss["options"].dtype == "float64" and model.loss["options"].reduction == "sum"
assert model.loss["array"].args["a"].dtype == "float32"
print(json.dumps([message, make.evaluated(model)]))
"""


def test_fresh_process(tmp_path):
    path, huber = str(tmp_path / "model.keras"), str(tmp_path / "huber.keras")
    make.model().save(path)
    saved(with_args(keras.losses.huber)(delta=0.25), huber)
    output = run_python(LOAD.format(path=path, huber=huber))
    message, values = json.loads(output.splitlines()[-1])
    assert message_of(message).startswith(
        "The saved loss uses the function 'losses>shifted', which this process does not know. "
        "Before loading, import the module that gives it to with_args: import losses. "
        "If it moved: load_model(path, custom_objects={'losses>shifted': ...})."
    )
    assert values == pytest.approx(EXPECTED, rel=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of NumPy
@each_writer
def test_models_written_on_other_backends(written_on):
    path = TESTS / "models" / f"{written_on}.keras"
    if written_on == "torch" and BACKEND != "torch":
        # Keras stores torch's own class of optimizer, which no other backend can make. Loading
        # without compiling, then compiling, is the way around it.
        with pytest.raises((TypeError, ValueError, ImportError, ModuleNotFoundError)):
            keras.saving.load_model(path)
        model = keras.saving.load_model(path, compile=False)
        model.compile("adam", loss=make.LOSSES)
    else:
        model = keras.saving.load_model(path)
    model.jit_compile = False  # a model written on JAX asks torch for a compilation of 20 seconds
    assert model.loss == make.LOSSES
    assert make.evaluated(model) == pytest.approx(EXPECTED, rel=1e-5)


def test_batch_arguments_stay_unbound(tmp_path, data):
    saved(losses.masked(), tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    assert model.loss is losses.masked()
    model.evaluate(data.x, data.y, sample_weight={"mask": data.mask}, verbose=0)


def test_only_loss_functions_of_keras_are_taken():
    for name in ("deserialize", "get", "Huber", "nothing"):
        config = {**shifted(1).get_config(), "function": f"keras.losses>{name}"}
        with pytest.raises(SavingError, match="which this process does not know"):
            BoundLoss.from_config(config)


SCRIPT = """
import sys
import keras
from lossargs import with_args

@with_args
def in_script(y_true, y_pred, shift):
    return keras.losses.mean_squared_error(y_true, y_pred) + shift

if __name__ == "__main__":
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", loss=in_script(10))
    model.save(sys.argv[1])
    print(keras.saving.load_model(sys.argv[1]).loss is in_script(10))
"""


def test_loss_of_a_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "script.keras"])
    runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
    sys.argv[1] = "module.keras"
    runpy.run_module("train", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.split() == ["True", "True"]
    # Another process imports the script, and finds the losses that it saved as `__main__`.
    code = "import keras, train\n"
    code += "print(*(keras.saving.load_model(f'{n}.keras').loss for n in ('script', 'module')))"
    assert run_python(code, cwd=tmp_path).split() == ["in_script(shift=10)"] * 2


CELL = """
import keras
from lossargs import with_args

@with_args
def in_cell(y_true, y_pred, shift):
    return keras.losses.mean_squared_error(y_true, y_pred) + shift
"""


def test_notebook_cell_that_is_run_again(tmp_path, monkeypatch):
    notebook, path = types.ModuleType("__main__"), tmp_path / "model.keras"
    monkeypatch.setitem(sys.modules, "__main__", notebook)

    def run(cell, number):
        exec(compile(cell, f"/tmp/ipykernel_1/{number}.py", "exec"), vars(notebook))
        return notebook.in_cell(10)

    before = run(CELL, 1)
    moved = run("\n\n" + CELL, 2)  # the cell moved down; it is the same loss
    saved(before, path)
    assert keras.saving.load_model(path).loss is moved
    edited = run(CELL.replace("+ shift", "+ shift * 2"), 3)
    with raising(
        SavingError,
        "in_cell was defined again, with other code, after this loss was bound",
        "Bind and compile with that one, loss=in_cell(...), or",
    ):
        saved(moved, path)
    saved(edited, path)
    assert keras.saving.load_model(path).loss is edited


def test_function_that_moved_is_given_by_hand():
    config = {**shifted(10).get_config(), "function": "old_place>shifted"}
    with pytest.raises(SavingError, match="old_place>shifted"):
        BoundLoss.from_config(config)
    plain = shifted.__wrapped__
    for found in ({"old_place>shifted": shifted}, {"shifted": shifted}, {"shifted": plain}):
        with keras.saving.custom_object_scope(found):
            assert BoundLoss.from_config(config) is shifted(10)


def test_function_that_takes_other_arguments_by_now():
    config = {**shifted(10).get_config(), "args": {"offset": 10}}
    text = "does not match the signature of its function: .*'offset'.* takes 'shift'"
    with pytest.raises(SavingError, match=text):
        BoundLoss.from_config(config)


def plain(y_true, y_pred):
    return y_true - y_pred


class Callable:
    def __call__(self, y_true, y_pred, shift):
        return y_true - y_pred + shift


def capturing():
    margin, later = 2.0, [1.0]

    def hinge(y_true, y_pred):
        return keras.losses.hinge(y_true, y_pred) + margin + later[0] + unassigned

    if not margin:
        unassigned = 1.0
    return hinge


scaled_partial = functools.partial(losses.scaled.__wrapped__, scale=3.0)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda y_true, y_pred, shift: 0, "<lambda> is a lambda"),
        (losses.Compiled(lambda y_true, y_pred: 0), "<lambda> is a lambda"),
        (scaled_partial, "hinge is a partial, not a function"),
        (losses.times(3)(functools.update_wrapper(scaled_partial, capturing())), "is a partial"),
        (Callable(), "Callable is a Callable, not a function"),
        (
            capturing(),
            "hinge captures 'later', 'margin', 'unassigned' from the function around it. Saved",
        ),
        (losses.times(3)(plain), "plain captures 'factor' from the function around it"),
    ],
)
def test_functions_that_cannot_be_saved(function, problem):
    with raising(SavingError, problem):
        with_args(function)().get_config()


def test_functions_with_decorators():
    for loss in (losses.doubled(1), losses.compiled(1)):
        assert BoundLoss.from_config(loss.get_config()) is loss


def test_same_code_with_other_defaults():
    def make(factor):
        @with_args
        def graded(y_true, y_pred, scale=factor, *, power=(factor,), among={factor}):  # noqa: B006
            return scale * keras.losses.mean_squared_error(y_true, y_pred)

        return graded

    one, same, other = make(1.0)(), make(1.0)(), make(5.0)()
    with pytest.raises(SavingError, match="graded was defined again, with other code"):
        one.get_config()
    assert other.get_config()
    assert make(1.0)().get_config()
    assert one.get_config() == same.get_config()
