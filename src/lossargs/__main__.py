"""`python -m lossargs`: what is installed, what is in use, and what to type next."""

import sys

import keras

import lossargs
from lossargs._backends import CHOOSE, TRAINING, choice, is_installed, version
from lossargs._errors import DOCUMENTATION

in_use = keras.backend.backend()
# The first of the other backends that is installed, or the first one.
another = max((name for name in TRAINING if name != in_use), key=is_installed)
rows = ""
for name in dict.fromkeys((*TRAINING, in_use)):
    found = version(name) if is_installed(name) else "not installed"
    chosen = f"in use, chosen by {choice()[1]}" if name == in_use else ""
    rows += f"  {name:12}{found:16}{chosen}".rstrip() + "\n"
install = "" if is_installed(another) else f"  python -m pip install {another}\n"

sys.stdout.write(f"""\
lossargs {lossargs.__version__}, Keras {keras.__version__}, Python {sys.version.split()[0]}

Backends:
{rows}
Next, with any model:
  import keras, lossargs
  huber = lossargs.with_args(keras.losses.huber)
  model.compile("adam", loss=huber(delta=2.0))

Another backend, before Keras is imported:
{install}  {CHOOSE.format(another)}

More: {DOCUMENTATION}
""")
