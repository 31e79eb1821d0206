"""Adapters on Transformer Engine's linears. Imported only where it is installed (model/lora.py)."""

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)

from megatron_sstoken.config import LoraSettings
from megatron_sstoken.model.lora import AdaptedColumns, AdaptedRows, Blocks


class _AdaptedTEColumns(AdaptedColumns):
    """The constructor of a column-parallel linear with adapters."""

    out_features: int

    def __init__(self, input_size: int, output_size: int, *, lora: LoraSettings, blocks: Blocks, **kwargs):
        super().__init__(input_size, output_size, **kwargs)
        self.input_size = input_size
        self.add_column_adapters(lora, blocks, self.out_features)


class AdaptedTENormAndLinear(_AdaptedTEColumns, TELayerNormColumnParallelLinear):
    """A norm and the column-parallel linear that it is fused with, which gives the normalised input to the adapters.

    Megatron-Bridge's adapters ask the same of it (`peft/utils.py`), and have the normalised input gathered; here each tensor
    parallel rank keeps its share of the tokens.
    """

    def forward(self, x):
        self.return_layernorm_output = self.adapters_on
        output, bias = TELayerNormColumnParallelLinear.forward(self, x)
        if not self.adapters_on:
            return output, bias
        output, normalised = output
        return self.add_to(output, bias, self.adapter_output(normalised)), bias


class AdaptedTEColumns(_AdaptedTEColumns, TEColumnParallelLinear):
    """A column-parallel linear without a norm before it."""


def adapted_columns(linear: type) -> type[AdaptedColumns]:
    """What takes the place of `linear` where it gets adapters."""
    return AdaptedTEColumns if linear is TEColumnParallelLinear else AdaptedTENormAndLinear


class AdaptedTELinear(AdaptedRows, TERowParallelLinear):
    """A row-parallel linear with an adapter."""

    in_features: int
    out_features: int

    def __init__(self, input_size: int, output_size: int, *, lora: LoraSettings, target: str, **kwargs):
        super().__init__(input_size, output_size, **kwargs)
        self.input_size = input_size
        self.add_row_adapter(lora, target, self.in_features, self.out_features)
