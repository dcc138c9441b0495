"""Linear layers on the CPU with their weights laid out once for the processor's matrix unit.

PyTorch's own `linear` lays a bfloat16 weight out anew in every call, and copies the bias into the result before it
adds the product. oneDNN, which comes with PyTorch, does neither when the weight is packed beforehand, and applies
GELU while the product is still in registers. This is what torch.compile makes of these layers, without compiling.
"""

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from gistfast.guides.precision import cpu_multiplies_bfloat16, has_onednn

# The oneDNN layout depends little on it.
TYPICAL_TOKENS = 1024

# Names under which encoders of transformers hold a linear layer and the activation that alone follows it.
LAYER_AND_ACTIVATION = (("dense", "intermediate_act_fn"), ("lin1", "activation"))


class PackedLinear(nn.Module):
    """Computes what an `nn.Linear` computes, and GELU of it if wanted; for inference on the CPU only."""

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        """Pack a layer.

        Args:
            linear: In fp32 or bf16, on the CPU.
            gelu: Whether to apply GELU (the exact one, by erf) to the result.
        """
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        # Not a parameter: a packed weight can be neither trained nor saved.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TYPICAL_TOKENS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.gelu = gelu

    def forward(self, inputs: Tensor) -> Tensor:
        """The result (..., out_features) for inputs (..., in_features)."""
        name, algorithm = ("gelu", "none") if self.gelu else ("none", "")
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, name, [], algorithm)
        return outputs


def can_pack(model: nn.Module) -> bool:
    """Whether this processor, this build of PyTorch and the model's precision allow packing."""
    weight = next(model.parameters(), None)
    if weight is None or weight.device.type != "cpu" or not has_onednn():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and cpu_multiplies_bfloat16())


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer of the model by a packed one, where `can_pack` says so.

    Subclasses of `nn.Linear` stay as they are, because they may compute something else.
    """
    for parent in list(model.modules()):
        fused = _layer_before_gelu(parent)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, gelu=name == fused))


def _layer_before_gelu(parent: nn.Module) -> str | None:
    """The name of the layer whose GELU can be applied with it; that activation is taken out of the module."""
    # Elsewhere these names may mean something else.
    if not type(parent).__module__.startswith("transformers.models."):
        return None
    for layer, activation in LAYER_AND_ACTIVATION:
        if type(getattr(parent, layer, None)) is nn.Linear and _is_exact_gelu(getattr(parent, activation, None)):
            setattr(parent, activation, nn.Identity())
            return layer
    return None


def _is_exact_gelu(activation: object) -> bool:
    return isinstance(activation, GELUActivation) or (
        isinstance(activation, nn.GELU) and activation.approximate == "none"
    )
