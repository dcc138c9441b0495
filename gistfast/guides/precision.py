"""The precision that a guide computes in."""

from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def choose_precision(dtype: Precision, device: str) -> str:
    """The precision to compute in: `dtype`, or for "auto" bfloat16 where the device multiplies it, else float32.

    Args:
        dtype: What the user asked for.
        device: As PyTorch names it.
    """
    if dtype != "auto":
        return dtype
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if cpu_multiplies_bfloat16() else "float32"


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 products (AMX-BF16 or AVX512-BF16)."""
    return has_onednn() and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def has_onednn() -> bool:
    """Whether this build of PyTorch brings oneDNN, which knows those instructions."""
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found


def precision_of(model: torch.nn.Module) -> str:
    """The precision of the model's weights."""
    weight = next(model.parameters(), torch.empty(0))
    return str(weight.dtype).removeprefix("torch.")


def pool_in_float32(model: "SentenceTransformer") -> None:
    """Let everything behind the encoder compute in fp32: a rounding less, though the encoder's own weigh more.

    Without it, sentence-transformers rounds each pooled vector to the encoder's precision before it is normalised.
    """
    encoder, *others = model.children()
    for module in others:
        module.float()
    encoder.register_forward_hook(_tokens_to_float32)


def _tokens_to_float32(_module: torch.nn.Module, _inputs: Any, features: dict[str, Any]) -> None:
    if "token_embeddings" in features:
        features["token_embeddings"] = features["token_embeddings"].float()
