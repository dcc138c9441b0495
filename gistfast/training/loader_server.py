"""What the server of `gistfast.training.loader` imports, and nobody else.

It leaves the group of the training process before anything else, and so do the processes that it makes: Ctrl-C and
torchrun's signals are for the training process, which ends the others after its last step.
"""

import os

os.setpgrp()

import gistfast.training.collate  # noqa: E402, F401  # what each process needs
