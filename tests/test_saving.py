"""Saved models load in a fresh process that has only imported the module of the loss."""

import functools
import json
import sys
import textwrap

import keras
import numpy as np
import pytest

import lossargs
import losses
from helpers import BACKEND, KERAS, TESTS, linear_model, message_of, run_python
from lossargs import SavingError, with_args
from losses import shifted

sys.path.insert(0, str(TESTS / "models"))
import make

EXPECTED = json.loads((TESTS / "models" / "expected.json").read_text())
WRITTEN_ON = ["jax", "tensorflow", "torch"]


def saved(loss, path):
    model = linear_model()
    model.compile("sgd", loss=loss)
    model.save(path)
    return path


# A process that has imported the module of the losses, and nothing else of these tests.
LOAD = """
import sys; sys.path.append("models")
import json, keras, losses, make
model = keras.saving.load_model({path!r})
losses_of_model = {{name: loss for name, loss in sorted(model.loss.items())}}
assert losses_of_model == make.LOSSES, losses_of_model
assert all(loss is make.LOSSES[name] for name, loss in losses_of_model.items())
assert model.loss["options"].dtype == "float64" and model.loss["options"].reduction == "sum"
assert model.loss["array"].args["a"].dtype == "float32"
print(json.dumps(make.evaluated(model)))
"""


def test_fresh_process(tmp_path):
    path = tmp_path / "model.keras"
    make.model().save(path)
    output = run_python(LOAD.format(path=str(path)))
    assert json.loads(output.splitlines()[-1]) == pytest.approx(EXPECTED, rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # written on JAX, a model asks torch for torch.compile
@pytest.mark.skipif(KERAS < (3, 15), reason="written by Keras 3.15, whose layers have more in them")
@pytest.mark.parametrize("written_on", WRITTEN_ON)
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
    assert model.loss == make.LOSSES
    assert make.evaluated(model) == pytest.approx(EXPECTED, rel=1e-5)


@pytest.mark.fit
def test_loaded_model_goes_on_training(tmp_path, data):
    path = saved(shifted(10), tmp_path / "model.keras")
    model = keras.saving.load_model(path)
    original = linear_model()
    original.compile("sgd", loss=shifted(10))
    for trained in (model, original):
        trained.fit(data.x, data.y, epochs=2, verbose=0, shuffle=False)
    np.testing.assert_allclose(model.get_weights()[0], original.get_weights()[0], rtol=1e-6)


def test_batch_arguments_stay_unbound(tmp_path, data):
    model = keras.saving.load_model(saved(losses.masked(), tmp_path / "model.keras"))
    assert model.loss is losses.masked()
    model.evaluate(data.x, data.y, sample_weight={"mask": data.mask}, verbose=0)


def test_keras_function_loads_without_any_import(tmp_path):
    path = saved(with_args(keras.losses.huber)(delta=0.25), tmp_path / "model.keras")
    code = f"""
        import keras, lossargs
        loss = keras.saving.load_model({str(path)!r}).loss
        assert repr(loss) == "huber(delta=0.25)", loss
    """
    run_python(textwrap.dedent(code))


@pytest.mark.parametrize("name", ["deserialize", "get", "Huber", "nothing"])
def test_only_loss_functions_of_keras_are_taken(name):
    config = {**shifted(1).get_config(), "function": f"keras.losses>{name}"}
    with pytest.raises(SavingError, match="which this process does not know"):
        type(shifted(1)).from_config(config)


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


@pytest.mark.parametrize("how", ["as a script", "as a module"])
def test_loss_of_a_script(tmp_path, how):
    (tmp_path / "train.py").write_text(SCRIPT)
    path = str(tmp_path / "model.keras")
    run = {
        "as a script": f"runpy.run_path({str(tmp_path / 'train.py')!r}, run_name='__main__')",
        "as a module": "runpy.run_module('train', run_name='__main__', alter_sys=True)",
    }[how]
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += f"sys.argv[1:] = [{path!r}]\n"
    assert run_python(code + run).split() == ["True"]

    # Another process imports the script, and finds the loss that it saved as `__main__`.
    code = f"import keras, train; print(keras.saving.load_model({path!r}).loss)"
    assert run_python(code, cwd=tmp_path).strip() == "in_script(shift=10)"


CELL = """
@with_args
def in_cell(y_true, y_pred, shift):
    return keras.losses.mean_squared_error(y_true, y_pred) + shift{edit}
"""


def test_notebook_cell_that_is_run_again(tmp_path):
    code = f"""
        import keras
        from lossargs import SavingError, with_args

        CELL = {CELL!r}

        def run(number, edit=""):
            cell = CELL.replace("{{edit}}", edit)
            exec(compile(cell, f"/tmp/ipykernel_1/{{number}}.py", "exec"), globals())

        def compiled():
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            model.compile("sgd", loss=in_cell(10))
            return model

        path = {str(tmp_path / "model.keras")!r}
        run(1)
        before = compiled()
        CELL = "\\n\\n" + CELL  # the cell moved down
        run(2)
        before.save(path)  # run again as it was: the same loss
        assert keras.saving.load_model(path).loss is in_cell(10)
        after = compiled()
        run(3, edit=" * 2")
        try:
            after.save(path)
        except SavingError as error:
            print(error)
        compiled().save(path)
        assert keras.saving.load_model(path).loss is in_cell(10)
    """
    output = run_python(textwrap.dedent(code))
    assert output.startswith(
        "in_cell was defined again, with other code, after this loss was bound"
    )
    assert "Bind and compile with the new function" in output


def test_unknown_function(tmp_path):
    path = saved(shifted(10), tmp_path / "model.keras")
    code = f"""
        import sys, keras, lossargs
        try:
            keras.saving.load_model({str(path)!r})
        except lossargs.SavingError as error:
            print(error)
        assert "losses" not in sys.modules  # nothing that the file names was imported
    """
    text = message_of(run_python(textwrap.dedent(code)))
    assert text.startswith("The saved loss uses the function 'losses>shifted', which this process")
    assert "Before loading, import the module that gives it to with_args ('losses' defined" in text
    assert "with_args(package='losses', name='shifted')" in text


def test_function_that_moved_is_given_by_hand(tmp_path):
    config = {**shifted(10).get_config(), "function": "old_place>shifted"}
    with pytest.raises(SavingError, match="old_place>shifted"):
        keras.saving.deserialize_keras_object(config_of(config))
    for name in ("old_place>shifted", "shifted"):
        with keras.saving.custom_object_scope({name: shifted}):
            assert keras.saving.deserialize_keras_object(config_of(config)) is shifted(10)
    with keras.saving.custom_object_scope({"shifted": shifted.__wrapped__}):
        assert keras.saving.deserialize_keras_object(config_of(config)) is shifted(10)


def config_of(inner):
    return {**keras.losses.serialize(shifted(10)), "config": inner}


def test_function_that_takes_other_arguments_by_now():
    config = {**shifted(10).get_config(), "args": {"offset": 10}}
    with pytest.raises(SavingError, match="does not fit its function: .*'offset'.* takes 'shift'"):
        type(shifted(1)).from_config(config)


def test_lambda(tmp_path):
    loss = with_args(lambda y_true, y_pred, shift: y_true - y_pred + shift)(1)
    with pytest.raises(SavingError) as error:
        saved(loss, tmp_path / "model.keras")
    assert message_of(error.value) == (
        "<lambda> is a lambda. Saved losses hold the name of a function, and nothing that it "
        "holds. Write it at the top of a module: `def my_loss(y_true, y_pred): ...`."
    )


def test_captured_values(tmp_path):
    margin = 2.0

    @with_args
    def hinge(y_true, y_pred):
        return keras.losses.hinge(y_true, y_pred) + margin

    with pytest.raises(SavingError) as error:
        saved(hinge(), tmp_path / "model.keras")
    assert "hinge captures 'margin' from the function around it" in message_of(error.value)
    assert "def hinge(y_true, y_pred, margin)" in message_of(error.value)


def test_same_code_with_other_defaults():
    def make(factor):
        @with_args
        def graded(y_true, y_pred, scale=factor, *, power=(factor,)):
            return scale * keras.losses.mean_squared_error(y_true, y_pred)

        return graded

    one, same, other = make(1.0)(), make(1.0)(), make(5.0)()
    with pytest.raises(SavingError, match="graded was defined again, with other code"):
        one.get_config()
    assert other.get_config()
    assert make(1.0)().get_config()
    assert one.get_config() == same.get_config()


def test_default_that_could_not_be_bound():
    def make(factor):
        @with_args
        def chosen(y_true, y_pred, among={factor}):  # noqa: B006
            return keras.losses.mean_squared_error(y_true, y_pred)

        return chosen

    one, _ = make(1)(), make(1)()
    assert one.get_config()
    make(2)
    with pytest.raises(SavingError, match="chosen was defined again"):
        one.get_config()


def test_value_captured_by_a_decorator_below():
    config = losses.doubled(1).get_config()  # found in its module, decorator and all
    assert type(losses.doubled(1)).from_config(config) is losses.doubled(1)
    tripled = with_args(losses.times(3)(losses.doubled.__wrapped__.__wrapped__))
    with pytest.raises(SavingError, match="doubled captures 'factor' from the function around it"):
        tripled(1).get_config()


def test_function_compiled_by_a_decorator():
    loss = losses.compiled(1)
    assert type(loss).from_config(loss.get_config()) is loss
    local = with_args(losses.Compiled(lambda y_true, y_pred: y_true - y_pred), name="local")
    with pytest.raises(SavingError, match="local is a lambda"):
        local().get_config()


def test_partial():
    loss = with_args(functools.partial(losses.scaled.__wrapped__, scale=3.0))(power=1.0)
    with pytest.raises(SavingError, match="partial is a partial, not a function"):
        loss.get_config()


def test_callable_object():
    class Loss:
        def __call__(self, y_true, y_pred, shift):
            return y_true - y_pred + shift

    loss = with_args(Loss())(1)
    assert (loss.name, repr(loss)) == ("loss", "Loss(shift=1)")
    with pytest.raises(SavingError, match="Loss is a Loss, not a function"):
        loss.get_config()


def test_saved_by_name_and_package():
    @with_args(name="mine", package="company.losses")
    def anything(y_true, y_pred, shift):
        return keras.losses.mean_squared_error(y_true, y_pred) + shift

    config = anything(1).get_config()
    assert config["function"] == "company.losses>mine"
    assert type(anything(1)).from_config(config) is anything(1)


def test_class_is_registered():
    cls = type(shifted(1))
    assert keras.saving.get_registered_name(cls) == "lossargs>BoundLoss"
    assert lossargs.__version__
