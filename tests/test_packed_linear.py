import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
)
from transformers.activations import GELUActivation

from gistfast.guides.packed_linear import PackedLinear, can_pack, pack_linears
from gistfast.guides.precision import cpu_multiplies_bfloat16

pytestmark = pytest.mark.skipif(not can_pack(nn.Linear(1, 1)), reason="this processor or PyTorch cannot pack")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
MODELS: dict[str, tuple[type[PreTrainedModel], object, int]] = {
    "bert": (BertModel, BertConfig(**SMALL), 2),
    "bert, tanh gelu": (BertModel, BertConfig(**SMALL, hidden_act="gelu_new"), 0),
    "roberta": (RobertaModel, RobertaConfig(**SMALL), 2),
    "mpnet": (MPNetModel, MPNetConfig(**SMALL), 2),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40),
        2,
    ),
    "qwen3": (Qwen3Model, Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8), 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_model_computes_what_it_computed(name: str) -> None:
    kind, config, num_fused = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).eval()  # type: ignore[arg-type]
    # Biases are zero at first, and would hide one that is lost.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    packed = copy.deepcopy(model)
    pack_linears(packed)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == sum(type(module) is nn.Linear for module in model.modules()) > 0
    assert sum(layer.gelu for layer in layers) == num_fused
    ids, mask = torch.randint(3, 50, (3, 17)), torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.inference_mode():
        found, expected = (each(input_ids=ids, attention_mask=mask).last_hidden_state for each in (packed, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(not cpu_multiplies_bfloat16(), reason="this processor has no bfloat16 instructions")
def test_gelu_before_rounding_is_no_worse_than_after_it() -> None:
    torch.manual_seed(0)
    exact = nn.Linear(384, 1536)
    layer, inputs = copy.deepcopy(exact).bfloat16(), torch.randn(64, 384).bfloat16()
    with torch.inference_mode():
        expected = nn.functional.gelu(exact(inputs.float()))
        found = PackedLinear(layer, gelu=True)(inputs).float() - expected
        rounded = nn.functional.gelu(layer(inputs)).float() - expected
    assert found.abs().mean() <= rounded.abs().mean()


def test_layers_without_bias_and_of_any_shape_of_input() -> None:
    for bias in (True, False):
        layer = nn.Linear(8, 5, bias=bias)
        packed = PackedLinear(layer)
        for shape in ((8,), (3, 8), (0, 8), (2, 3, 8)):
            inputs = torch.randn(shape)
            with torch.inference_mode():
                torch.testing.assert_close(packed(inputs), layer(inputs))


def test_activation_of_a_module_from_elsewhere_is_left_alone() -> None:
    class BertIntermediate(nn.Module):
        """Has the names of transformers' module, and computes something else."""

        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(4, 4)
            self.intermediate_act_fn = GELUActivation()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            gelu: torch.Tensor = self.intermediate_act_fn(self.dense(inputs) + 1)
            return gelu

    module, inputs = BertIntermediate(), torch.randn(3, 4)
    with torch.inference_mode():
        expected = module(inputs)
        pack_linears(module)
        assert isinstance(module.dense, PackedLinear)
        torch.testing.assert_close(module(inputs), expected)


def test_subclasses_of_linear_are_left_alone() -> None:
    class Doubled(nn.Linear):
        pass

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    pack_linears(model)
    assert [type(child) for child in model] == [Doubled, PackedLinear]


def test_half_precision_that_the_processor_lacks_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gistfast.guides.packed_linear.cpu_multiplies_bfloat16", lambda: False)
    assert can_pack(nn.Linear(4, 4))
    assert not can_pack(nn.Linear(4, 4).bfloat16())
    assert not can_pack(nn.Linear(4, 4).half())
    assert not can_pack(nn.Identity())
