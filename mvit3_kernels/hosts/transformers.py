"""MobileViT and MobileViTV2 of transformers, with every head.

MobileViT's layers keep query, key and value apart. MobileViTV2 leaves a map of odd size as it is: the last row and
column take no part in attention, and are zero behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.models.mobilevit import modeling_mobilevit as v1
from transformers.models.mobilevitv2 import modeling_mobilevitv2 as v2

from ..inference import FusedNetwork, stands_for_network
from ..inference.dense import pooled_sum
from ..inference.program import IMAGE, Program, Refused, assemble, check, emit, pool
from ..nn.guard import dropout_rate, is_dropout, known
from ..nn.layout import to_nchw
from ..nn.plans import (
    ACTIVATION_NAMES,
    ConvPlan,
    LayerPlan,
    ResidualPlan,
    SeparablePlan,
    TokensPlan,
    TransformerPlan,
    Unfit,
    activation_name,
    layer_norm,
    linear,
)
from ..ops.types import Layer, Linear
from .swapped import Swapped, known_of_host, stands_for

ACTIVATION_NAMES[SiLUActivation] = "silu"
known_of_host(
    SiLUActivation,
    v1.MobileViTMobileNetLayer,
    v1.MobileViTSelfAttention,
    v1.MobileViTSelfOutput,
    v1.MobileViTAttention,
    v1.MobileViTIntermediate,
    v1.MobileViTOutput,
    v1.MobileViTTransformerLayer,
    v1.MobileViTTransformer,
    v1.MobileViTEncoder,
    v1.MobileViTASPPPooling,
    v1.MobileViTASPP,
    v2.MobileViTV2MobileNetLayer,
    v2.MobileViTV2LinearSelfAttention,
    v2.MobileViTV2FFN,
    v2.MobileViTV2TransformerLayer,
    v2.MobileViTV2Transformer,
    v2.MobileViTV2Encoder,
    v2.MobileViTV2ASPPPooling,
    v2.MobileViTV2ASPP,
)


def _expect(kind: type[nn.Module], **modules: object) -> None:
    for name, module in modules.items():
        if not isinstance(module, kind):
            raise Unfit(f"its {name} is a {type(module).__name__}, not a {kind.__name__}")


# Convolutions and inverted residuals


def _conv(layer: nn.Module) -> ConvPlan:
    if not isinstance(layer, v1.MobileViTConvLayer | v2.MobileViTV2ConvLayer):
        raise Unfit(f"a {type(layer).__name__} stands where a convolution should")
    act = "identity" if layer.activation is None else activation_name(layer.activation)
    return ConvPlan(layer.convolution, layer.normalization, act)


def _residual(block: nn.Module) -> ResidualPlan:
    if not isinstance(block, v1.MobileViTInvertedResidual | v2.MobileViTV2InvertedResidual):
        raise Unfit(f"a {type(block).__name__} stands where an inverted residual should")
    parts = (block.expand_1x1, block.conv_3x3, block.reduce_1x1)
    return ResidualPlan(*(_conv(part) for part in parts), block.use_residual)


@stands_for(v1.MobileViTConvLayer)
class MobileViTConvLayer(Swapped, v1.MobileViTConvLayer):
    describe = _conv


@stands_for(v2.MobileViTV2ConvLayer)
class MobileViTV2ConvLayer(Swapped, v2.MobileViTV2ConvLayer):
    describe = _conv


@stands_for(v1.MobileViTInvertedResidual)
class MobileViTInvertedResidual(Swapped, v1.MobileViTInvertedResidual):
    describe = _residual


@stands_for(v2.MobileViTV2InvertedResidual)
class MobileViTV2InvertedResidual(Swapped, v2.MobileViTV2InvertedResidual):
    describe = _residual


# Layers of attention


class SplitTokensPlan(NamedTuple):
    """Layers whose query, key and value are maps of their own, put together for the op at each call: training changes
    them. The layers of `tokens` have none."""

    tokens: TokensPlan
    parts: list[tuple[Linear, Linear, Linear]]

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.tokens.patch_size

    def joined(self) -> TokensPlan:
        layers = zip(self.tokens.layers, self.parts, strict=True)
        return self.tokens._replace(layers=[layer._replace(qkv=_join(parts)) for layer, parts in layers])

    def run(self, x: Tensor) -> Tensor:
        return self.joined().run(x)


def _join(parts: Iterable[Linear]) -> Linear:
    weights, biases = zip(*parts, strict=True)
    return Linear(torch.cat(weights), None if biases[0] is None else torch.cat(biases))


@emit.register
def _(plan: SplitTokensPlan, program: Program, x: int) -> int:
    return emit(plan.joined(), program, x)


def _rates(**modules: nn.Module) -> dict[str, float]:
    for place, module in modules.items():
        if not is_dropout(module):
            raise Unfit(f"a {type(module).__name__} stands at its {place}")
    return {place: dropout_rate(module) for place, module in modules.items()}


def _transformer(block: v1.MobileViTLayer) -> SplitTokensPlan:
    _expect(v1.MobileViTTransformer, transformer=block.transformer)
    _expect(nn.LayerNorm, layernorm=block.layernorm)
    layers = [_transformer_layer(layer) for layer in block.transformer.layer]
    patch_size = (block.patch_height, block.patch_width)
    tokens = TokensPlan.of([plan for plan, _ in layers], layer_norm(block.layernorm), patch_size)
    return SplitTokensPlan(tokens, [parts for _, parts in layers])


def _transformer_layer(layer: nn.Module) -> tuple[LayerPlan, tuple[Linear, Linear, Linear]]:
    """A layer without query, key and value; those."""
    _expect(v1.MobileViTTransformerLayer, layer=layer)
    _expect(v1.MobileViTAttention, attention=layer.attention)
    _expect(v1.MobileViTIntermediate, intermediate=layer.intermediate)
    _expect(v1.MobileViTOutput, output=layer.output)
    attention, projection = layer.attention.attention, layer.attention.output
    _expect(v1.MobileViTSelfAttention, attention=attention)
    _expect(v1.MobileViTSelfOutput, attention_output=projection)
    _expect(nn.LayerNorm, layernorm_before=layer.layernorm_before, layernorm_after=layer.layernorm_after)
    query, key, value = parts = attention.query, attention.key, attention.value
    fc1, fc2 = layer.intermediate.dense, layer.output.dense
    _expect(nn.Linear, query=query, key=key, value=value, dense=projection.dense, fc1=fc1, fc2=fc2)
    # By attributes: reading the shape of a weight would leave a trace in torch.jit.trace.
    widths = {width for part in (*parts, projection.dense) for width in (part.in_features, part.out_features)}
    width = attention.num_attention_heads * attention.attention_head_size
    if widths != {width} or attention.all_head_size != width:
        raise Unfit("query, key, value and dense do not keep the width, as heads that were pruned do not")
    if len({part.bias is None for part in parts}) > 1:
        raise Unfit("of query, key and value some have a bias and some have none")
    act = activation_name(layer.intermediate.intermediate_act_fn)
    if act != "silu":
        raise Unfit(f"the activation of its feed-forward network is {act}, where the op knows silu")
    norms = layer_norm(layer.layernorm_before), layer_norm(layer.layernorm_after)
    rates = _rates(
        attention_dropout=attention.dropout,
        output_dropout=projection.dropout,
        ffn_output_dropout=layer.output.dropout,
    )
    weights = Layer(norms[0], None, linear(projection.dense), norms[1], linear(fc1), linear(fc2))
    return LayerPlan(weights, attention.num_attention_heads, rates), tuple(linear(part) for part in parts)


def _separable(block: v2.MobileViTV2Layer) -> TokensPlan:
    _expect(v2.MobileViTV2Transformer, transformer=block.transformer)
    _expect(nn.GroupNorm, layernorm=block.layernorm)
    layers = [_separable_layer(layer) for layer in block.transformer.layer]
    return TokensPlan.of(layers, layer_norm(block.layernorm), (block.patch_height, block.patch_width))


def _separable_layer(layer: nn.Module) -> LayerPlan:
    _expect(v2.MobileViTV2TransformerLayer, layer=layer)
    attention, ffn = layer.attention, layer.ffn
    _expect(v2.MobileViTV2LinearSelfAttention, attention=attention)
    _expect(v2.MobileViTV2FFN, ffn=ffn)
    _expect(nn.GroupNorm, layernorm_before=layer.layernorm_before, layernorm_after=layer.layernorm_after)
    qkv = _pointwise("qkv_proj", attention.qkv_proj, "identity")
    out_proj = _pointwise("out_proj", attention.out_proj, "identity")
    fc1, fc2 = _pointwise("conv1", ffn.conv1, "silu"), _pointwise("conv2", ffn.conv2, "identity")
    if attention.qkv_proj.convolution.out_channels != 1 + 2 * attention.embed_dim:
        raise Unfit("qkv_proj is not as wide as embed_dim says")
    # layer.dropout1 is never called
    rates = _rates(
        attention_dropout=attention.attn_dropout,
        hidden_dropout=ffn.dropout1,
        ffn_output_dropout=ffn.dropout2,
    )
    norms = layer_norm(layer.layernorm_before), layer_norm(layer.layernorm_after)
    return LayerPlan(Layer(norms[0], qkv, out_proj, norms[1], fc1, fc2), None, rates)


def _pointwise(name: str, layer: nn.Module, act: str) -> Linear:
    plan = _conv(layer)
    if plan.norm is not None or plan.act != act or not plan.is_pointwise():
        raise Unfit(f"{name} is not a plain 1x1 convolution with act {act}")
    return linear(plan.conv)


# Blocks


class DownsampledPlan(NamedTuple):
    """A block and the inverted residual in front of it, or None."""

    residual: ResidualPlan | None
    block: TransformerPlan | SeparablePlan

    def misfit(self) -> str | None:
        return (None if self.residual is None else self.residual.misfit()) or self.block.misfit()

    def run(self, x: Tensor) -> Tensor:
        return self.block.run(x if self.residual is None else self.residual.run(x))


@emit.register
def _(plan: DownsampledPlan, program: Program, x: int) -> int:
    return emit(plan.block, program, x if plan.residual is None else emit(plan.residual, program, x))


def _downsampled(layer: nn.Module, block: TransformerPlan | SeparablePlan) -> DownsampledPlan:
    return DownsampledPlan(None if layer.downsampling_layer is None else _residual(layer.downsampling_layer), block)


@stands_for(v1.MobileViTLayer)
class MobileViTLayer(Swapped, v1.MobileViTLayer):
    def describe(self) -> DownsampledPlan:
        local = _conv(self.conv_kxk), _conv(self.conv_1x1)
        projection, fusion = _conv(self.conv_projection), _conv(self.fusion)
        return _downsampled(self, TransformerPlan(local, _transformer(self), projection, fusion))


@stands_for(v2.MobileViTV2Layer)
class MobileViTV2Layer(Swapped, v2.MobileViTV2Layer):
    def describe(self) -> DownsampledPlan:
        local = _conv(self.conv_kxk), _conv(self.conv_1x1)
        return _downsampled(self, SeparablePlan(local, _separable(self), _conv(self.conv_projection), crops=True))


# Networks: a classifier is a program, and so are the model below every head and the head of segmentation.

LAST, HIDDEN = 0, 1  # the endings of a program: without and with the hidden states behind what it returns


def _wants_states(network: nn.Module, output_hidden_states: bool | None) -> bool:
    return network.config.output_hidden_states if output_hidden_states is None else output_hidden_states


def _wants_dict(network: nn.Module, return_dict: bool | None) -> bool:
    return network.config.return_dict if return_dict is None else return_dict


class _Model(FusedNetwork):
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> tuple | BaseModelOutputWithPoolingAndNoAttention:
        if not self._runs_program(pixel_values):
            return super().forward(pixel_values, output_hidden_states, return_dict, **kwargs)
        ending = HIDDEN if _wants_states(self, output_hidden_states) else LAST
        (last, pooled), states = self._fused.run(pixel_values, ending)
        if _wants_dict(self, return_dict):
            return BaseModelOutputWithPoolingAndNoAttention(last, pooled, states)
        return tuple(output for output in (last, pooled, states) if output is not None)


# A classifier's program may stand in for the model below its head, fused or not.
known_of_host(v1.MobileViTModel, v2.MobileViTV2Model)


@known
@stands_for_network(v1.MobileViTModel)
class MobileViTModel(_Model, v1.MobileViTModel):
    pass


@known
@stands_for_network(v2.MobileViTV2Model)
class MobileViTV2Model(_Model, v2.MobileViTV2Model):
    pass


class _Classifier(FusedNetwork):
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> tuple | ImageClassifierOutputWithNoAttention:
        if not self._runs_program(pixel_values):
            return super().forward(pixel_values, output_hidden_states, labels, return_dict, **kwargs)
        ending = HIDDEN if _wants_states(self.base_model, output_hidden_states) else LAST
        (logits,), states = self._fused.run(pixel_values, ending)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if _wants_dict(self, return_dict):
            return ImageClassifierOutputWithNoAttention(loss, logits, states)
        return tuple(output for output in (loss, logits, states) if output is not None)


@stands_for_network(v1.MobileViTForImageClassification)
class MobileViTForImageClassification(_Classifier, v1.MobileViTForImageClassification):
    pass


@stands_for_network(v2.MobileViTV2ForImageClassification)
class MobileViTV2ForImageClassification(_Classifier, v2.MobileViTV2ForImageClassification):
    pass


@assemble.register(v1.MobileViTModel)
@assemble.register(v2.MobileViTV2Model)
def _(network, program: Program) -> None:
    x, states = _emit_model(network, program)
    if not network.expand_output:
        _finish(program, [x], states, lambda results: (to_nchw(results[0]), None))
        return
    outputs = [x, program.add("global_pool", [x])]
    _finish(program, outputs, states, lambda results: (to_nchw(results[0]), results[1].flatten(1)))


@assemble.register(v1.MobileViTForImageClassification)
@assemble.register(v2.MobileViTV2ForImageClassification)
def _(network, program: Program) -> None:
    model = network.base_model
    if not model.expand_output:
        raise Refused("its model does not pool")
    x, states = _emit_model(model, program)
    x = pool(program, x)
    if isinstance(network, v1.MobileViTForImageClassification):
        x = emit(network.dropout, program, x)
    _finish(program, [emit(network.classifier, program, x)], states, lambda results: (results[0].flatten(1),))


def _emit_model(network: nn.Module, program: Program) -> tuple[int, list[int]]:
    """The last map of a model and its hidden states."""
    x, states = emit(network.conv_stem, program, IMAGE), []
    for layer in network.encoder.layer:
        x = emit(layer, program, x)
        states.append(x)
    if network.expand_output and isinstance(network, v1.MobileViTModel):
        x = emit(network.conv_1x1_exp, program, x)
    return x, states


def _finish(program: Program, outputs: list[int], states: list[int], convert: Callable[[list[Tensor]], tuple]) -> None:
    """Both endings: what `convert` makes of the maps `outputs`, and None or the hidden states."""
    first = len(outputs)
    program.finish(outputs, lambda results: (convert(results), None))
    program.finish(
        [*outputs, *states],
        lambda results: (convert(results[:first]), tuple(to_nchw(state) for state in results[first:])),
    )


@emit.register(v1.MobileViTMobileNetLayer)
@emit.register(v2.MobileViTV2MobileNetLayer)
def _(module, program: Program, x: int) -> int:
    for layer in module.layer:
        x = emit(layer, program, x)
    return x


class _Head(FusedNetwork):
    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        x = hidden_states[-1]
        return self._fused.run(x) if self._runs_program(x) else super().forward(hidden_states)


@stands_for_network(v1.MobileViTDeepLabV3)
class MobileViTDeepLabV3(_Head, v1.MobileViTDeepLabV3):
    pass


@stands_for_network(v2.MobileViTV2DeepLabV3)
class MobileViTV2DeepLabV3(_Head, v2.MobileViTV2DeepLabV3):
    pass


@assemble.register(v1.MobileViTDeepLabV3)
@assemble.register(v2.MobileViTV2DeepLabV3)
def _(head, program: Program) -> None:
    x = emit(head.aspp, program, IMAGE)
    x = emit(head.classifier, program, emit(head.dropout, program, x))
    program.finish([x], lambda results: to_nchw(results[0]))


@emit.register(v1.MobileViTASPP)
@emit.register(v2.MobileViTV2ASPP)
def _(module, program: Program, x: int) -> int:
    *branches, pooled = module.convs
    if not isinstance(pooled, v1.MobileViTASPPPooling | v2.MobileViTV2ASPPPooling):
        raise Refused(f"its last branch is a {type(pooled).__name__}")
    maps = [emit(branch, program, x) for branch in branches]
    vector = emit(pooled.conv_1x1, program, emit(pooled.global_pool, program, x))
    for layer in (pooled.conv_1x1, module.project):
        check(layer)
    x = pooled_sum(program, maps, vector, pooled.conv_1x1.convolution.out_channels, _conv(module.project))
    return emit(module.dropout, program, x)
