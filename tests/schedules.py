"""Schedules that tests import, here and in other processes."""

from keras import ops

from lossargs import schedule

received = []  # dtypes and shapes of steps, once for each trace


@schedule
def warmup(step, steps, peak=1.0):
    received.append((step.dtype, tuple(step.shape)))
    return peak * ops.minimum((step + 1.0) / steps, 1.0)


@schedule
def cyclical(step, period, *, ratio=0.5):
    return ops.minimum((step % period) / (ratio * period), 1.0)


@schedule
def joined(step, parts, boundary):
    first, second = parts
    return ops.where(step < boundary, first(step), second(step - boundary))
