"""Two processes of PyTorch that both call `fit`; run by `test_distributed.py` with the rank."""

import sys

import keras
import numpy as np
import torch.distributed as dist

from lossargs import LossArgsError, with_args

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", loss=with_args(keras.losses.huber)(delta=2.0))
try:
    model.fit(np.zeros((8, 3)), np.zeros((8, 1)), verbose=0)
except LossArgsError as error:
    print(error)  # noqa: T201
dist.destroy_process_group()
