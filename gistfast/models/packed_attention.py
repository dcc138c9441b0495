"""Attention over texts that stand in one row, one after the other, without padding.

Transformers calls it by name, as it calls its own ways. A pass whose features say where the texts end
(`cu_seq_lens_q`, as for flash attention) is packed: each text attends to itself alone. Every other pass is computed by
PyTorch's scaled dot product attention, as if this were not here.

On a GPU a packed pass is PyTorch's variable-length attention, on a CPU one text follows the other.

Shapes: N texts, T tokens, H heads, K heads of keys and values, D width of a head.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gistfast.errors import ModelError

PACKED = "gistfast_packed"

# What PyTorch's variable-length attention must take; it came step by step.
_VARLEN_OPTIONS = {"scale", "window_size", "enable_gqa"}

# What a model may ask of attention that packed attention does not do.
_NOT_DONE = {
    "position_bias": "adds a bias for positions",
    "softcap": "caps its scores",
    "s_aux": "has attention sinks",
}


def pack_attention(encoder: PreTrainedModel) -> None:
    """Let a transformer take packed passes beside padded ones.

    Raises:
        ModelError: When its attention is not to be exchanged.
    """
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _mask)
    if encoder.config._attn_implementation not in ("sdpa", PACKED) or not encoder._can_set_attn_implementation():
        raise ModelError(f"{type(encoder).__name__} computes attention in its own way")
    encoder.set_attn_implementation(PACKED)


def unpack_attention(encoder: PreTrainedModel) -> None:
    """Undo `pack_attention`."""
    encoder.set_attn_implementation("sdpa")


def packing_missing(device: torch.device, half_precision: str | None) -> str | None:
    """What is known to keep packed passes from running on a device; None when nothing is.

    Args:
        device: The model's.
        half_precision: How to compute in half precision; None where that is so.
    """
    if device.type == "cpu":
        return None
    name = "PyTorch's variable-length attention"
    if device.type != "cuda":
        return f"{name} does not run on {device.type}"
    if half_precision is not None:
        return f"{name} computes in half precision: give {half_precision}"
    missing = varlen_missing(device)
    return None if missing is None else f"{name}: {missing}"


def varlen_missing(device: torch.device) -> str | None:
    """What keeps PyTorch's variable-length attention from running on a device; None when nothing is known to.

    Args:
        device: A GPU.
    """
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than its kernel, which begins with Ampere"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        options = set()
    else:
        options = set(inspect.signature(varlen_attn).parameters)
    if not options >= _VARLEN_OPTIONS:
        return f"PyTorch {torch.__version__} does not have it yet"
    return None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a layer's attention gives, (1, T, H, D) where the pass is packed; called by transformers.

    Args:
        module: The layer's attention.
        query: (1, H, T, D).
        key: (1, K, T, D).
        value: (1, K, T, D).
        attention_mask: None where the pass is packed.
        dropout: Of attention weights.
        scaling: Of scores; one over the root of D when None.
        is_causal: Whether tokens see only those before them; as the module says when None.
        sliding_window: Tokens see those that are less than so many away.
        cu_seq_lens_q: (N + 1,) int32, where the texts begin and the last one ends; None where the pass is padded.
        max_length_q: Tokens of the longest text.
        **options: Whatever else the model tells its attention.

    Raises:
        ModelError: When the layer asks for something that packed attention does not do.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window, **options,
        )  # fmt: skip
        return padded
    for name, what in _NOT_DONE.items():
        if options.get(name) is not None:
            raise ModelError(f"its attention {what}")
    if dropout and query.is_cuda:
        raise ModelError(f"the student drops attention weights ({dropout}), which that cannot: --dropout 0 drops none")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reach = -1 if sliding_window is None else sliding_window - 1
    texts = _Texts(cu_seq_lens_q, max_length_q, (reach, 0 if causal else reach))
    if query.is_cuda:
        return _varlen(query, key, value, texts, scaling), None
    return _text_by_text(query, key, value, texts, scaling, dropout), None


class _Texts(NamedTuple):
    """The texts of a packed pass.

    Attributes:
        bounds: (N + 1,) where they begin and the last one ends.
        longest: Tokens of the longest.
        window: How many tokens before and after itself a token sees; -1 for all.
    """

    bounds: Tensor
    longest: int
    window: tuple[int, int]


def _varlen(query: Tensor, key: Tensor, value: Tensor, texts: _Texts, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if torch.is_autocast_enabled("cuda"):
        # Rotary positions leave them in fp32; PyTorch's other attention casts them by itself.
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bounds, longest, window = texts
    grouped = query.shape[1] != key.shape[1]
    found = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window, enable_gqa=grouped
    )
    assert isinstance(found, Tensor)  # A pair only where more is asked for.
    return found[None]


def _text_by_text(
    query: Tensor, key: Tensor, value: Tensor, texts: _Texts, scale: float | None, dropout: float
) -> Tensor:
    sizes: list[int] = texts.bounds.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    found = []
    parts = (torch.split(tensor, sizes, dim=2) for tensor in (query, key, value))
    for size, one_query, one_key, one_value in zip(sizes, *parts, strict=True):
        mask = _window_mask(size, texts.window)
        attended = functional.scaled_dot_product_attention(
            one_query, one_key, one_value, mask, dropout, scale=scale, enable_gqa=grouped
        )
        found.append(attended)
    return torch.cat(found, dim=2).transpose(1, 2)


def _window_mask(length: int, window: tuple[int, int]) -> Tensor | None:
    """Which tokens each token sees, (length, length): from so many before it to so many after it, -1 for all."""
    left, right = (length if reach < 0 else reach for reach in window)
    if min(left, right) >= length - 1:
        return None
    ahead = torch.arange(length) - torch.arange(length)[:, None]
    return (ahead >= -left) & (ahead <= right)


def _mask(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The mask of a pass, none where the pass is packed: it comes without, and a mask would be of size T x T."""
    if attention_mask is None:
        return None
    options["attention_mask"] = attention_mask
    mask: Tensor | None = sdpa_mask(*arguments, **options)
    return mask
