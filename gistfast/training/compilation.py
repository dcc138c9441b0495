"""A student compiled before the first step, so that what cannot be compiled is said there, in one line."""

import logging
import time

import torch
from sentence_transformers import SentenceTransformer

from gistfast.errors import ConfigError, first_line
from gistfast.students.compiled import CompiledForm, compiled
from gistfast.students.input import InputForm
from gistfast.training.collate import Collator
from gistfast.training.step import embed
from gistfast.training.trial import as_in_a_run, early_weights, some_texts

logger = logging.getLogger(__name__)


def compile_student(model: SentenceTransformer, form: InputForm, collator: Collator, *, bf16: bool) -> CompiledForm:
    """What the student takes, with its transformer compiled and tried on a few texts.

    Args:
        model: The student, on its device.
        form: What it takes, padded.
        collator: Makes batches of that.
        bf16: Whether the run computes in bfloat16.

    Raises:
        ConfigError: When it cannot be compiled here.
        ModelError: When the student has no transformer.
    """
    begun_s = time.monotonic()
    found, texts = compiled(model, form), some_texts(model, collator)
    try:
        with as_in_a_run(model, training=True, bf16=bf16):
            torch.autograd.grad(embed(model, found, texts).sum(), early_weights(model), allow_unused=True)
    except Exception as error:  # From the model's code, the compiler of PyTorch, or that of C++.
        name = type(found.encoder).__name__
        raise ConfigError(f"--compile: {name} cannot be compiled here: {first_line(error)}: leave it out") from error
    logger.info("compiled the student's transformer in %.0f s", time.monotonic() - begun_s)
    return found
