"""Generated signatures, bindings and values, against a model of them in plain Python."""

import contextlib
import gc
import itertools
import json
import operator
import pickle
import struct
import sys
import types
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from helpers import BACKEND
from lossargs import ArgumentError, BatchError, LossArgsError, SignatureError, with_args
from losses import described, shifted

pytestmark = [
    pytest.mark.properties,
    # Values beyond what the dtype of the loss has become infinite, which NumPy says.
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    # So it says of a NaN that signals.
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]

Y_TRUE, Y_PRED = np.zeros((2, 1), "float32"), np.array([[1.0], [3.0]], "float32")
SAMPLES = np.array([1.0, 9.0])  # the squared errors
RESERVED = ("y_true", "y_pred", "sample_weight")

# Functions are written here, so that pickle finds them.
MODULE = types.ModuleType("generated_losses")
sys.modules[MODULE.__name__] = MODULE
received = []


def observed(y_true, y_pred, args):
    """The squared error, plus each number given times its place: no two may change places."""
    received.append((args, keras.backend.standardize_dtype(y_pred.dtype)))
    values = keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)
    for place, value in enumerate(args.values(), start=1):
        added = value(y_true, y_pred) if hasattr(value, "inner_losses") else value
        if keras.ops.is_tensor(added):
            values = values + place * keras.ops.cast(added, values.dtype)
        elif type(added) in (int, float):
            values = values + place * added
    return values


def to_numpy(tensor):
    """Of TensorFlow's bfloat16, too, which is no number to NumPy."""
    if isinstance(tensor, np.ndarray):
        return tensor
    is_small = keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"
    tensor = keras.ops.cast(tensor, "float32") if is_small else tensor
    return keras.ops.convert_to_numpy(tensor)


def amount(value, batch):
    """What `observed` adds for a value, told by NumPy; `None` for what it does not add."""
    if isinstance(value, keras.losses.Loss):
        return SAMPLES + amount(batch.get("shift", value.args["shift"]), {})
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        return to_numpy(value).astype("float64")
    return np.float64(value) if type(value) in (int, float, *FLOATS) else None


def plain(value):
    """What is bound for a value: scalars of Python, and arrays of NumPy's own dtypes."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if isinstance(value, (str, bytes)):
        return value[:]
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)
    array = array.astype("float32") if array.dtype.isbuiltin == 2 else array  # of ml_dtypes
    is_array = isinstance(value, np.ndarray) or array.dtype.kind in "Mm"
    return array if is_array else array.item()


def handed_on(value, given, dtype):
    """Whether the function got what was given: as it was, or as a tensor, floats in its dtype.

    Scalars of NumPy become those of Python. JAX has no 64 bits.
    """
    given = plain(given)
    if isinstance(given, dict):
        value, given = list(value.items()), list(given.items())
    if isinstance(given, (list, tuple)):
        pairs = zip(value, given, strict=True)
        return type(value) is type(given) and all(handed_on(v, g, dtype) for v, g in pairs)
    if isinstance(given, keras.losses.Loss):
        return value.args == given.args
    is_text = getattr(getattr(given, "dtype", None), "kind", "") in tuple("SUMm")
    is_array = isinstance(given, np.ndarray) or keras.ops.is_tensor(given)
    if is_text or not is_array:
        return same(value, given)
    if not keras.ops.is_tensor(value) or tuple(value.shape) != tuple(given.shape):
        return False
    is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(given.dtype))
    got, given = to_numpy(value), to_numpy(given)
    if is_float:
        limits = {"rtol": EPSILON[dtype], "atol": 1e-6, "equal_nan": True}
        is_near = np.allclose(got, given.astype(dtype).astype("float64"), **limits)
        return is_near and keras.backend.standardize_dtype(value.dtype) == dtype
    # PyTorch computes with the next larger signed integers in place of some unsigned ones.
    kinds = {"u": ("u", "i")}.get(given.dtype.kind, (given.dtype.kind,))
    is_large = got.itemsize >= min(given.itemsize, 4)
    return got.dtype.kind in kinds and is_large and same(got, given.astype(got.dtype))


MODULE.observed = observed

FLOATS = (np.float16, np.float32, np.float64)
# Half a unit in the last place is the error of one operation; integers are exact.
EPSILON = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-23, "int32": 0.0}

NAMES = ["shift", "a", "b", "self", "name", "reduction", "fn", "args", "größe", "t", "labels", "_x"]
CALLED = [*NAMES, "shfit", "not a name", *RESERVED]
ARRAY_DTYPES = st.sampled_from(["float16", "float32", "float64", "int32"])
numbers = st.integers(-9, 9) | st.floats(-9, 9, allow_subnormal=False).map(lambda v: round(v, 3))
per_sample = st.builds(
    lambda number, shape, dtype: np.full(shape, number, dtype),
    numbers, st.sampled_from([(), (2,)]), ARRAY_DTYPES,
)  # fmt: skip
constants = (
    numbers
    | st.none()
    | st.booleans()
    | st.text(max_size=3)
    | st.lists(numbers, max_size=2)
    | st.tuples(numbers, st.text(max_size=1))
    | st.dictionaries(st.sampled_from("abc"), numbers, max_size=3)
    | per_sample
    | per_sample.map(keras.ops.convert_to_tensor)
    | st.builds(lambda kind, number: kind(number), st.sampled_from(FLOATS), numbers)
    | st.integers(-9, 9).map(shifted.options(reduction=None))
)


@st.composite
def functions(draw, reserved):
    """Source of a function, and what it takes: by position, by name only, defaults, any name."""
    first = draw(st.sampled_from([("y_true", "y_pred"), ("t", "p"), ("labels", "outputs")]))
    slash = draw(st.booleans())
    free = [n for n in [*NAMES, *(RESERVED[2:] if reserved else [])] if n not in first]
    names = draw(st.lists(st.sampled_from(free), unique=True, max_size=4))
    cut = draw(st.integers(0, len(names)))
    defaults = {n: draw(numbers) for n in names if draw(st.booleans())}
    positional = sorted(names[:cut], key=lambda n: n in defaults)
    keyword = names[cut:]
    extra = draw(st.booleans())
    written = [f"{n}={defaults[n]!r}" if n in defaults else n for n in (*positional, *keyword)]
    parts = [*first, *(["/"] if slash else []), *written[:cut]]
    parts += [*(["*"] if keyword else []), *written[cut:], *(["**others"] if extra else [])]
    given = [f"{n!r}: {n}" for n in (*positional, *keyword)] + ["**others"] * extra
    source = f"def generated({', '.join(parts)}):\n"
    source += f"    return observed({first[0]}, {first[1]}, {{{', '.join(given)}}})\n"
    forbidden = {*RESERVED, *(() if slash else first)}
    return types.SimpleNamespace(
        source=source, positional=positional, keyword=keyword,
        defaults=defaults, extra=extra, forbidden=forbidden,
    )  # fmt: skip


class ExpectedError(Exception):
    """What the model expects an error for: the kind of error, and the names it may tell."""


def checked(names, known, extra, forbidden, error=ArgumentError):
    bad = [n for n in names if n not in known and (not extra or n in forbidden)]
    if bad:
        raise ExpectedError(error, [repr(n) for n in bad])


def same(one, other):
    """Equal in type, dtype, shape and bits, whatever the order of bytes; dicts in order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float) and not isinstance(one, np.generic):
        return (one != one and other != other) or struct.pack("d", one) == struct.pack("d", other)  # noqa: PLR0124
    if type(one) is complex:
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, (np.str_, np.bytes_)):
        return one[:] == other[:]
    if isinstance(one, (np.ndarray, np.generic)):
        one, other = np.asarray(one), np.asarray(other)
        one, other = (array.astype(array.dtype.newbyteorder("=")) for array in (one, other))
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


REDUCED = {
    "sum_over_batch_size": lambda v, w: (v * w).sum() / 2,
    "sum": lambda v, w: (v * w).sum(),
    "mean_with_sample_weight": lambda v, w: (v * w).sum() / w.sum(),
    None: lambda v, w: v * w,
}


@st.composite
def calls(draw):
    """A function and what it is bound to and called with; most of it sound, the rest anything."""
    sound = draw(st.integers(0, 3)) > 0
    function = draw(functions(reserved=not sound))
    known = [*function.positional, *function.keyword]
    # At a call, reserved names are Keras's own; given twice, they are Python's TypeError.
    names = CALLED if function.extra or not sound else known
    free = [n for n in names if not sound or n not in function.forbidden]
    at_a_call = [n for n in free if n not in RESERVED]

    def some(names, values=constants, at_most=3):
        # A sound case is one where most of the function's own names are given.
        if not names:
            return {}
        own = st.sampled_from([n for n in known if n in names] or names)
        return draw(st.dictionaries(own | st.sampled_from(names), values, max_size=at_most))

    most = len(function.positional) if sound else 3
    positionals = draw(st.lists(constants, max_size=most))
    by_name = [n for n in free if not sound or n not in function.positional[: len(positionals)]]
    numbers_by_batch = numbers | per_sample | numbers.map(np.float32)
    case = types.SimpleNamespace(
        positionals=positionals,
        keywords=some(by_name),
        replacements=[some(free) for _ in range(draw(st.integers(0, 2)))],
        batch=some(
            at_a_call if sound else [*at_a_call, 0],
            numbers_by_batch if sound else numbers_by_batch | st.none(),
            at_most=2,
        ),
        extras=some(at_a_call),
        reduction=draw(st.sampled_from(list(REDUCED))),
        dtype=draw(st.sampled_from([None, "float16", "bfloat16", "float32", "float64"])),
        weight=draw(st.sampled_from([None, (2.0, 0.5)])),
    )
    if sound:
        for name in known[len(positionals) :]:
            places = [case.keywords, *case.replacements, case.batch, case.extras]
            if name not in function.defaults and not any(name in place for place in places):
                draw(st.sampled_from(places))[name] = draw(numbers_by_batch)
    return function, case


def merged(function, case):
    """What the function is to receive, or what is wrong with the case, told by plain Python."""
    known = [*function.positional, *function.keyword]
    rules = (known, function.extra, function.forbidden)
    if "sample_weight" in known:
        raise ExpectedError(SignatureError, ["'sample_weight'"])
    if len(case.positionals) > len(function.positional):
        raise ExpectedError(
            ArgumentError, ["arguments by position", "which generated does not take"]
        )
    args = dict(zip(function.positional, case.positionals, strict=False))
    if twice := [n for n in case.keywords if n in args]:
        raise ExpectedError(ArgumentError, [repr(n) for n in twice])
    for changes in (case.keywords, *case.replacements):
        checked(changes, *rules)
        args |= changes
    no_names = [n for n in case.batch if not isinstance(n, str)]
    # Losses among the bound arguments read the batch, too.
    case.inner = any(isinstance(value, keras.losses.Loss) for value in args.values())
    own = [n for n in case.batch if n != "shift" or not case.inner]
    checked(own, known, function.extra, {*function.forbidden, *no_names}, BatchError)
    if nothing := [n for n, value in case.batch.items() if value is None]:
        raise ExpectedError(BatchError, [repr(n) for n in nothing])
    checked(case.extras, *rules)
    batch = {n: v for n, v in case.batch.items() if n in own or n in known or function.extra}
    args = args | batch | case.extras
    if missing := [n for n in known if n not in args and n not in function.defaults]:
        raise ExpectedError(ArgumentError, [repr(n) for n in missing])
    own = {n: args.get(n, function.defaults.get(n)) for n in known}
    return own | {n: v for n, v in args.items() if n not in known}


def evaluated(function, case):
    """What lossargs gives, after a round trip by config and by pickle."""
    exec(function.source, MODULE.__dict__)
    factory = MODULE.generated = with_args(MODULE.generated)
    loss = factory.options(reduction=case.reduction, dtype=case.dtype)(
        *case.positionals, **case.keywords
    )
    for changes in case.replacements:
        loss = loss.replace(**changes)
    third = None if case.weight is None else np.array(case.weight, "float32")
    if case.batch:
        third = case.batch if third is None else {**case.batch, "sample_weight": third}
    received.clear()
    value = to_numpy(loss(Y_TRUE, Y_PRED, third, **case.extras))
    assert pickle.loads(pickle.dumps(loss)) is loss
    config = json.loads(json.dumps(keras.losses.serialize(loss)))
    assert keras.losses.deserialize(config) is loss
    return value


@given(calls())
def test_bound_loss_equals_the_direct_call(call):
    function, case = call
    try:
        args = merged(function, case)
    except ExpectedError as expected:
        error, tellings = expected.args
        with pytest.raises(LossArgsError) as raised:
            evaluated(function, case)
        # Several things may be wrong with one call; which of them is told is free.
        assert isinstance(raised.value, error), raised.value
        assert any(telling in str(raised.value) for telling in tellings), raised.value
        return
    value = evaluated(function, case)
    [(got, dtype)] = received
    # JAX has float64 only where it is asked for.
    assert dtype in (case.dtype or "float32", "float32" if BACKEND == "jax" else case.dtype)
    assert list(got) == list(args)
    assert all(handed_on(got[name], given, dtype) for name, given in args.items())
    amounts = [amount(v, case.batch if case.inner else {}) for v in args.values()]
    terms = [place * term for place, term in enumerate(amounts, 1) if term is not None]
    weights = np.ones(2) if case.weight is None else np.array(case.weight)
    expected = REDUCED[case.reduction](sum(terms, SAMPLES), weights)
    largest = (9 + sum(np.max(np.abs(term)) for term in terms)) * weights.sum()
    np.testing.assert_allclose(value, expected, rtol=0, atol=4 * EPSILON[dtype] * largest)


DEEPEST = 33  # a list, and 32 in it
DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128", "S3", "U2", "M8[s]", "m8[s]",
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, "longdouble", "V2", "O",
]  # fmt: skip


@st.composite
def arrays(draw):
    """Of any bits: NaN with a payload, infinities, -0.0; empty, of no dimension, of several."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 0), (2, 3)]))
    size = int(np.prod(shape))
    if dtype.kind in "OU" or dtype == np.longdouble:
        array = np.full(shape, "ä" if dtype.kind == "U" else 1).astype(dtype)
    else:
        data = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
        data = bytes(b & 1 for b in data) if dtype.kind == "b" else data
        array = np.frombuffer(data, dtype).reshape(shape) if size else np.zeros(shape, dtype)
    return array[()] if draw(st.booleans()) else array


def nested(what):
    value, depth = what
    for _ in range(depth):
        value = [value]
    return value


atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**1000), 0.0, -0.0, 1e-320, "x" * 10_000, "\ud800"])
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(), max_size=8)
    | st.binary(max_size=4)
    | st.text(max_size=3).map(np.str_)
)
keys = (
    st.text(max_size=3)
    | st.integers(-2, 2)
    | st.floats(allow_nan=False)
    | st.none()
    | st.tuples(st.booleans())
)
values = st.recursive(
    atoms | arrays(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys | st.sampled_from(["kind", "class_name"]), inner, max_size=3)
        | st.tuples(inner, st.integers(1, 40)).map(nested)
    ),
    max_leaves=5,
)


def is_refused(value, depth=0):
    """Whether it is too deep, or an array that no backend computes with and no file keeps."""
    if isinstance(value, (list, tuple, dict)):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth == DEEPEST or any(is_refused(one, depth + 1) for one in inner)
    dtype = getattr(value, "dtype", np.dtype(bool))
    return dtype.type in (np.object_, np.void) or dtype == np.longdouble


def bound(value):
    """The loss with it, or `None` where its own error says why not, and names the argument."""
    try:
        loss = described(what=value)
    except ArgumentError as error:
        assert is_refused(value)
        assert "'what' of described()" in str(error)  # noqa: PT017
        return None
    assert not is_refused(value)
    return loss


@given(values)
@example(nested((np.bytes_(b"text"), DEEPEST)))
@example(nested((np.array([b"text"]), DEEPEST)))
def test_values_come_back_from_config_and_pickle(value):
    loss = bound(value)
    assume(loss is not None)
    assert same(loss.args["what"], plain(value))
    # NumPy's own pickle drops zeros at the end of text.
    assume(same(pickle.loads(pickle.dumps(value)), value))
    text, pickled = json.dumps(keras.losses.serialize(loss)), pickle.dumps(loss)
    alive = weakref.ref(loss)
    del loss  # else loading an equal one gives this one, whatever was read
    for load in (
        lambda: keras.losses.deserialize(json.loads(text)),
        lambda: pickle.loads(pickled),
    ):
        if alive() is not None:
            gc.collect()
        assert alive() is None
        loaded = load()
        assert same(loaded.args["what"], plain(value))
        assert loaded == described(what=value)
        alive = weakref.ref(loaded)
        del loaded


@with_args
def noticed(y_true, y_pred, *, what):
    return observed(y_true, y_pred, {"what": [what]})


@given(values)
def test_any_value_arrives_or_is_refused(value):
    received.clear()
    try:
        noticed(what=value)(Y_TRUE, Y_PRED)
        noticed()(Y_TRUE, Y_PRED, what=value)
    except ArgumentError as error:
        assert "'what'" in str(error)  # noqa: PT017
    for args, dtype in received:
        assert handed_on(args["what"], [value], dtype)


CONVERSIONS = (bool, int, float, complex, str, np.float64, np.str_, np.array, operator.neg)
ARRAY_CHANGES = (
    np.asfortranarray,
    operator.neg,
    lambda array: array[None],
    lambda array: array[()],
    lambda array: array.astype(array.dtype.newbyteorder()),
    lambda array: array.astype("complex128"),
    lambda array: array.real,
    lambda array: array.tolist(),
)


def variants(value):
    """Values that are easily taken for this one; some of them are this one."""
    if isinstance(value, (list, tuple)):
        yield from (list(value), tuple(value), value[::-1])
        for place, item in enumerate(value):
            for other in variants(item):
                yield type(value)([*value[:place], other, *value[place + 1 :]])
    elif isinstance(value, dict):
        yield from (dict(reversed(value.items())), list(value.items()))
        for place, key in enumerate(value):
            items = list(value.items())
            for other in variants(key):
                with contextlib.suppress(TypeError):  # not hashable
                    yield dict([*items[:place], (other, value[key]), *items[place + 1 :]])
            yield from (value | {key: other} for other in variants(value[key]))
    else:
        is_array = isinstance(value, (np.ndarray, np.generic))
        for change in ARRAY_CHANGES if is_array else CONVERSIONS:
            # What this kind of value has no such variant of.
            with (
                contextlib.suppress(TypeError, ValueError, OverflowError),
                np.errstate(all="ignore"),
            ):
                yield change(np.asarray(value) if is_array else value)


@given(values, values)
def test_equal_constants_are_one_loss(value, another):
    one = bound(value)
    assume(one is not None)
    again = pickle.loads(pickle.dumps(value))
    assume(same(again, value))  # NumPy's own pickle drops zeros at the end of text
    assert described(what=again) is one
    for other in (value, another, *itertools.islice(variants(value), 100)):
        if (two := bound(other)) is not None:
            assert (one == two) == (one is two) == same(plain(value), plain(other))
            assert one != two or hash(one) == hash(two)
