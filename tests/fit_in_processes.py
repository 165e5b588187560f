"""Two processes of PyTorch that both call `fit`; run by `test_distributed.py` with a free path.

Prints the errors of both as JSON.
"""

import json
import os
import sys

import keras
import numpy as np
import torch.distributed as dist

from lossargs import LossArgsError, with_args

reader, writer = os.pipe()
child = os.fork()  # after the imports, which take seconds
dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=int(bool(child)), world_size=2)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", loss=with_args(keras.losses.huber)(delta=2.0))
text = ""
try:
    model.fit(np.zeros((8, 3)), np.zeros((8, 1)), verbose=0)
except LossArgsError as error:
    text = str(error)
dist.destroy_process_group()
if child:
    os.close(writer)
    with open(reader) as other:  # noqa: PTH123 - a pipe
        print(json.dumps([text, other.read()]))  # noqa: T201
    os.waitpid(child, 0)
else:
    os.write(writer, text.encode())
