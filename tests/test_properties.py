"""Generated signatures, calls and values, against a model of them in plain Python."""

import itertools
import json
import operator
import pickle
import sys
import types

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossargs import ArgumentError, BatchError, with_args
from losses import described

pytestmark = [
    pytest.mark.properties,
    # Values beyond what the dtype of the loss has become infinite, and NaN may signal.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast"),
]

Y_TRUE, Y_PRED = np.zeros((2, 1), "float32"), np.array([[1.0], [3.0]], "float32")
SAMPLES = np.array([1.0, 9.0])  # the squared errors
RESERVED = ("y_true", "y_pred", "sample_weight")
FLOATS = (np.float16, np.float32, np.float64)

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


MODULE.observed = observed


@with_args
def shifted(y_true, y_pred, *, shift):
    error = keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)
    return error + keras.ops.cast(shift, error.dtype)


def amount(value, batch):
    """What `observed` adds for a value, told by NumPy; `None` for what it does not add."""
    if isinstance(value, keras.losses.Loss):
        return SAMPLES + amount(batch.get("shift", value.args["shift"]), {})
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value).astype("float64")
    return np.float64(value) if type(value) in (int, float, *FLOATS) else None


def plain(value):
    """What is bound for a value: scalars of Python, and arrays of NumPy's own dtypes and order."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)
    is_of_ml_dtypes = array.dtype.isbuiltin == 2
    array = array.astype("float32" if is_of_ml_dtypes else array.dtype.newbyteorder("="))
    return array if isinstance(value, np.ndarray) else array.item()


def bits(value):
    """A key of type, dtype, shape and bits; dicts in order."""
    if isinstance(value, (dict, list, tuple)):
        return type(value), [*map(bits, value.items() if isinstance(value, dict) else value)]
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return type(value), repr(value)


# Signatures and calls

NAMES = ["shift", "a", "b", "self", "name", "reduction", "fn", "args", "größe", "t", "labels", "_x"]
CALLED = [*NAMES, "shfit", "not a name", *RESERVED]
numbers = st.integers(-9, 9) | st.floats(-9, 9, allow_subnormal=False).map(lambda v: round(v, 3))
per_sample = st.builds(
    lambda number, shape, dtype: np.full(shape, number, dtype),
    numbers, st.sampled_from([(), (2,)]), st.sampled_from(["float16", "float32", "int32"]),
)  # fmt: skip
constants = (
    numbers
    | st.none()
    | st.text(max_size=3)
    | st.lists(numbers, max_size=2)
    | st.dictionaries(st.sampled_from("abc"), numbers, max_size=3)
    | per_sample
    | per_sample.map(keras.ops.convert_to_tensor)
    | st.builds(lambda kind, number: kind(number), st.sampled_from(FLOATS), numbers)
    | st.integers(-9, 9).map(lambda number: shifted(shift=number))
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
    known = [*positional, *names[cut:]]
    extra = draw(st.booleans())
    written = [f"{n}={defaults[n]!r}" if n in defaults else n for n in known]
    parts = [*first, *(["/"] if slash else []), *written[:cut]]
    parts += [*(["*"] if names[cut:] else []), *written[cut:], *(["**others"] if extra else [])]
    given = [f"{n!r}: {n}" for n in known] + ["**others"] * extra
    source = f"def generated({', '.join(parts)}):\n"
    source += f"    return observed({first[0]}, {first[1]}, {{{', '.join(given)}}})\n"
    forbidden = {*RESERVED, *(() if slash else first)}
    return types.SimpleNamespace(
        source=source, positional=positional, known=known, defaults=defaults,
        takes=lambda n: n in known or (extra and isinstance(n, str) and n not in forbidden),
    )  # fmt: skip


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
    # At a call, reserved names are Keras's own; given twice, they are Python's TypeError.
    free = list(filter(function.takes, CALLED)) if sound else CALLED
    at_a_call = [n for n in free if n not in RESERVED]

    def some(names, values=constants):
        if not names:
            return {}
        own = [n for n in function.known if n in names] or names
        names = st.sampled_from(own) | st.sampled_from(names)
        return draw(st.dictionaries(names, values, max_size=3))

    positionals = draw(st.lists(constants, max_size=len(function.positional) if sound else 3))
    by_position = function.positional[: len(positionals)] if sound else []
    in_batch = numbers | per_sample | numbers.map(np.float32)
    case = types.SimpleNamespace(
        positionals=positionals,
        keywords=some([n for n in free if n not in by_position]),
        replacements=some(free),
        batch=some(at_a_call, in_batch) if sound else some([*at_a_call, 0], in_batch | st.none()),
        extras=some(at_a_call),
        reduction=draw(st.sampled_from(list(REDUCED))),
        dtype=draw(st.sampled_from([None, "float16", "float32"])),
        weight=draw(st.sampled_from([None, (2.0, 0.5)])),
    )
    for name in function.known[len(positionals) :] if sound else []:
        places = [case.keywords, case.replacements, case.batch, case.extras]
        if name not in function.defaults and not any(name in place for place in places):
            draw(st.sampled_from(places))[name] = draw(in_batch)
    return function, case


def merged(function, case):
    """What the function is to receive, and the first mistake: an error, and words of its text."""

    def unknown(names):
        return [n for n in names if not function.takes(n)]

    args = dict(zip(function.positional, case.positionals, strict=False))
    twice = [n for n in case.keywords if n in args]
    args |= case.keywords | case.replacements
    # Losses among the arguments read the batch, too.
    given = [*args.values(), *case.extras.values()]
    has_inner = any(isinstance(value, keras.losses.Loss) for value in given)
    own = [n for n in case.batch if n != "shift" or not has_inner]
    args |= {n: v for n, v in case.batch.items() if function.takes(n)} | case.extras
    too_many = case.positionals[len(function.positional) :]
    mistakes = [
        (ArgumentError, [n for n in function.known if n == "sample_weight"]),
        (ArgumentError, too_many),
        (ArgumentError, twice),
        (ArgumentError, unknown(case.keywords)),
        (ArgumentError, unknown(case.replacements)),
        (BatchError, unknown(own)),
        (BatchError, [n for n, value in case.batch.items() if value is None]),
        (ArgumentError, unknown(case.extras)),
        (ArgumentError, [n for n in function.known if n not in {*args, *function.defaults}]),
    ]
    error, names = next((mistake for mistake in mistakes if mistake[1]), (None, []))
    words = ["arguments by position", "generated has no argument"] if names is too_many else []
    own = {n: args.get(n, function.defaults.get(n)) for n in function.known}
    args = own | {n: v for n, v in args.items() if n not in own}
    return args, error, [*words, *map(repr, names)]


def evaluated(function, case):
    """What lossargs gives, after a round trip by config and by pickle."""
    exec(function.source, MODULE.__dict__)
    factory = MODULE.generated = with_args(MODULE.generated)
    factory = factory.options(reduction=case.reduction, dtype=case.dtype)
    loss = factory(*case.positionals, **case.keywords).replace(**case.replacements)
    third = None if case.weight is None else np.array(case.weight, "float32")
    if case.batch:
        third = case.batch if third is None else {**case.batch, "sample_weight": third}
    received.clear()
    value = keras.ops.convert_to_numpy(loss(Y_TRUE, Y_PRED, third, **case.extras))
    assert pickle.loads(pickle.dumps(loss)) is loss
    assert keras.losses.deserialize(json.loads(json.dumps(keras.losses.serialize(loss)))) is loss
    return value


@given(calls())
def test_bound_loss_equals_the_direct_call(call):
    function, case = call
    args, error, words = merged(function, case)
    if error:
        with pytest.raises(error) as raised:
            evaluated(function, case)
        # Several things may be wrong with one call; which of them is told is free.
        assert any(word in str(raised.value) for word in words), raised.value
        return
    value = evaluated(function, case)
    [(got, dtype)] = received
    assert dtype == (case.dtype or "float32")
    assert list(got) == list(args)
    for name, given_value in args.items():
        if amount(given_value, {}) is None:  # no number
            assert bits(got[name]) == bits(plain(given_value))
    amounts = [amount(value, case.batch) for value in args.values()]
    terms = [place * term for place, term in enumerate(amounts, 1) if term is not None]
    weights = np.ones(2) if case.weight is None else np.array(case.weight)
    expected = REDUCED[case.reduction](sum(terms, SAMPLES), weights)
    largest = (9 + sum(np.max(np.abs(term)) for term in terms)) * weights.sum()
    epsilon = {"float16": 2**-10, "float32": 2**-23}[dtype]  # half a unit in the last place
    np.testing.assert_allclose(value, expected, rtol=0, atol=4 * epsilon * largest)


# Values

DTYPES = [
    "bool", "int8", "int64", "uint8", "uint32", "float16", "float32", "float64", "complex64",
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
]  # fmt: skip


@st.composite
def arrays(draw):
    """Of any bits: NaN with a payload, infinities, -0.0; empty, of no dimension, of several."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.sampled_from([(), (0,), (3,), (2, 0), (2, 3)]))
    size = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    data = bytes(b & 1 for b in data) if dtype.kind == "b" else data
    array = np.frombuffer(data, dtype).reshape(shape)
    return array[()] if draw(st.booleans()) and dtype.kind != "c" else array


atoms = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8)
keys = st.text(max_size=3) | st.integers(-2, 2) | st.none() | st.tuples(st.booleans())
values = st.recursive(
    atoms | arrays(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys | st.sampled_from(["kind", "class_name"]), inner, max_size=3)
    ),
    max_leaves=5,
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
        for key in value:
            yield from (value | {key: other} for other in variants(value[key]))
    elif isinstance(value, np.ndarray):
        yield from (np.asfortranarray(value), value[None], value[()], value.astype("complex128"))
        yield from (value.tolist(), value.astype(value.dtype.newbyteorder()))
    elif type(value) in (bool, int, float):
        yield from (change(value) for change in (str, bool, np.array, operator.neg))
        yield float(value)


@given(values, values)
def test_equal_values_are_one_loss_and_come_back(value, another):
    one = described(what=value)
    assert bits(one.args["what"]) == bits(plain(value))
    text, pickled = json.dumps(keras.losses.serialize(one)), pickle.dumps(one)
    assert keras.losses.deserialize(json.loads(text)) is one
    assert pickle.loads(pickled) is described(what=pickle.loads(pickle.dumps(value))) is one
    for other in (another, *itertools.islice(variants(value), 50)):
        two = described(what=other)
        assert (one == two) == (one is two) == (bits(plain(value)) == bits(plain(other)))
