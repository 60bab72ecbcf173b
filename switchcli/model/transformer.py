"""The complete model: T5's encoder and decoder with Switch layers in the blocks that the spec names.

Legend: B batch, S source, T target, D model, V vocabulary, H heads.

Pre-norm blocks: x + dropout(layer(norm(x))). The forward pass returns the router statistics, which carry the losses of
the sparse layers; modules store no state of a forward pass.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.attention import (
    Attention,
    Bias,
    KeyValue,
    RelativePositionBias,
    SegmentIds,
    cached_keys,
    cast_bias,
    decoder_inputs,
    padding_bias,
    segment_bias,
    shared_bias,
)
from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.kernels import flex
from switchcli.model.kernels.flex import FlexBias
from switchcli.model.kv_cache import DecoderCache, LayerKVCache
from switchcli.model.layers import SINGLE_PROCESS, FeedForward, Linear, RMSNorm, add_dropout, dropout
from switchcli.model.moe.layer import RouterWeights, SwitchAttention, SwitchLayer
from switchcli.model.moe.losses import AuxiliaryLoss, auxiliary_loss
from switchcli.model.moe.stats import StackStats
from switchcli.model.vocabulary import VocabularyShard
from switchcli.spec import PAD


class ModelOutput(NamedTuple):
    """The decoder's output at each target position, and the losses and statistics of the sparse layers."""

    hidden_BTD: torch.Tensor
    """The factor of the softmax matrix in the logits, so that a loss can be computed without all logits at once."""
    vocabulary: VocabularyShard
    """The softmax matrix."""
    auxiliary: AuxiliaryLoss | None
    """Load-balancing and z-losses of the sparse layers; None for a dense model."""
    encoder_stats: StackStats
    decoder_stats: StackStats

    @property
    def logits_BTV(self) -> torch.Tensor:
        return self.vocabulary.axis.all_gather(F.linear(self.hidden_BTD, self.vocabulary.weight_VD))

    @property
    def router_stats(self) -> StackStats:
        """The statistics of each sparse layer, the encoder's first."""
        return self.encoder_stats + self.decoder_stats


class EncoderOutput(NamedTuple):
    """The encoder's output."""

    hidden_BSD: torch.Tensor
    real_BS: torch.Tensor
    """bool, False for padding."""
    bias_B1TS: Bias
    """The bias of cross-attention: the padding mask, equal for all T, [B, 1, 1, S]; or [B, 1, T, S] in packed rows."""
    stats: StackStats


class SelfAttention(nn.Module):
    """x + dropout(attention(norm(x))) over the cached positions and those of x, with a dense or sparse attention."""

    def __init__(self, spec: ModelSpec, stack: Stack, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        sparse = spec.is_sparse(stack, layer, "attention")
        self.attention = SwitchAttention(spec, stack) if sparse else Attention(spec)
        self.dropout = spec.dropout

    def forward(
        self, x_BTD: torch.Tensor, real_BT: torch.Tensor, bias_BHTS: Bias, cache: LayerKVCache | None = None
    ) -> tuple[torch.Tensor, StackStats]:
        """Return the new x, and the router statistics of a sparse attention. Adds the positions of x to `cache`."""
        normed_BTD = self.norm(x_BTD)
        stats: StackStats = ()
        if isinstance(self.attention, SwitchAttention):
            query_BHTK, memory, attention_stats = self.attention.project(normed_BTD, real_BT)
            stats = (attention_stats,)
        else:
            normed_BTD = self.attention.axis.enter_region(normed_BTD)
            query_BHTK, memory = self.attention.query(normed_BTD), self.attention.key_value(normed_BTD)
        memory = memory if cache is None else cache.append(memory)
        y_BTD = self.attention(query_BHTK, memory, bias_BHTS)
        return add_dropout(x_BTD, y_BTD, self.dropout, self.training), stats


class CrossAttention(nn.Module):
    """x + dropout(attention(norm(x), memory)), without a position bias, as in T5.

    In beam search adjacent rows of x, the beams of an input, share a row of the memory.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        self.attention = Attention(spec)
        self.dropout = spec.dropout

    def forward(self, x_BTD: torch.Tensor, memory: KeyValue, bias_B1TS: Bias) -> torch.Tensor:
        normed_BTD = self.attention.axis.enter_region(self.norm(x_BTD))
        # [B * beams, T, D] -> [B, beams * T, D]: the beams of an input are queries of one sequence.
        merged_BTD = normed_BTD.view(len(memory.key_BHSK), -1, x_BTD.shape[-1])
        y_BTD = self.attention(self.attention.query(merged_BTD), memory, bias_B1TS).view_as(x_BTD)
        return add_dropout(x_BTD, y_BTD, self.dropout, self.training)


class FeedForwardSublayer(nn.Module):
    """x + dropout(feed_forward(norm(x))), dense or sparse. A dropped token keeps its x."""

    def __init__(self, spec: ModelSpec, stack: Stack, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        sparse = spec.is_sparse(stack, layer, "feed_forward")
        self.layer = (
            SwitchLayer(spec, stack, spec.d_model, spec.shared_d_ff) if sparse else FeedForward(spec, spec.d_ff)
        )
        self.dropout = spec.dropout

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> tuple[torch.Tensor, StackStats]:
        normed_BSD = self.norm(x_BSD)
        stats: StackStats = ()
        if isinstance(self.layer, SwitchLayer):
            y_BSD, layer_stats = self.layer(normed_BSD, real_BS)
            stats = (layer_stats,)
        else:
            y_BSD = self.layer(normed_BSD)
        return add_dropout(x_BSD, y_BSD, self.dropout, self.training), stats


class EncoderBlock(nn.Module):
    """Self-attention, then a feed-forward."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(spec, "encoder", layer)
        self.feed_forward = FeedForwardSublayer(spec, "encoder", layer)

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor, bias_BHSS: Bias) -> tuple[torch.Tensor, StackStats]:
        x_BSD, attention_stats = self.self_attention(x_BSD, real_BS, bias_BHSS)
        x_BSD, feed_forward_stats = self.feed_forward(x_BSD, real_BS)
        return x_BSD, attention_stats + feed_forward_stats


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the encoder's output, then a feed-forward."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(spec, "decoder", layer)
        self.cross_attention = CrossAttention(spec)
        self.feed_forward = FeedForwardSublayer(spec, "decoder", layer)

    def forward(
        self,
        x_BTD: torch.Tensor,
        real_BT: torch.Tensor,
        bias_BHTS: Bias,
        encoded: EncoderOutput,
        cache: LayerKVCache | None,
    ) -> tuple[torch.Tensor, StackStats]:
        source = self.cross_attention.attention.key_value(encoded.hidden_BSD) if cache is None else cache.source
        x_BTD, attention_stats = self.self_attention(x_BTD, real_BT, bias_BHTS, cache)
        x_BTD = self.cross_attention(x_BTD, source, encoded.bias_B1TS)
        x_BTD, feed_forward_stats = self.feed_forward(x_BTD, real_BT)
        return x_BTD, attention_stats + feed_forward_stats

    def cross_key_value(self, encoded: EncoderOutput) -> KeyValue:
        """Return the keys and values of cross-attention, for step-by-step decoding.

        `forward` does not call it: sharded weights are gathered around either method, which must not happen twice.
        """
        return self.cross_attention.attention.key_value(encoded.hidden_BSD)


class Encoder(nn.Module):
    """`num_layers` blocks with attention to all positions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.position_bias = RelativePositionBias(spec, bidirectional=True)
        self.blocks = nn.ModuleList(EncoderBlock(spec, layer) for layer in range(spec.num_layers))
        self.final_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        self.dropout = spec.dropout
        self.uses_flex = False
        """Whether training uses flex_attention, which needs compiled blocks (`compile_blocks`)."""

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor, segments: SegmentIds | None = None) -> EncoderOutput:
        """Encode embedded tokens.

        Args:
            x_BSD: the embedded tokens.
            real_BS: bool, False for padding, which is masked in attention and not routed.
            segments: the examples of packed rows; None: each row is one example.
        """
        S = x_BSD.shape[1]
        padding_B11S = padding_bias(real_BS)
        bias_BHSS: Bias
        if self.uses_flex and self.training:
            bias_BHSS = self._flex_bias(real_BS, segments)
        else:
            mask_B1SS = padding_B11S
            if segments is not None:
                mask_B1SS = mask_B1SS + segment_bias(segments.source_BS, segments.source_BS)
            bias_BHSS = shared_bias(self.position_bias(S, S), mask_B1SS, x_BSD)
        x_BSD = dropout(x_BSD, self.dropout, self.training)
        stats: StackStats = ()
        for block in self.blocks:
            x_BSD, block_stats = block(x_BSD, real_BS, bias_BHSS)
            stats += block_stats
        hidden_BSD = dropout(self.final_norm(x_BSD), self.dropout, self.training)
        return EncoderOutput(hidden_BSD, real_BS, padding_B11S, stats)

    def _flex_bias(self, real_BS: torch.Tensor, segments: SegmentIds | None) -> FlexBias:
        """Return the bias of self-attention for flex_attention."""
        S, segment_BS = real_BS.shape[1], None if segments is None else segments.source_BS
        return FlexBias(self.position_bias.by_distance(S, S), flex.visible(S, real_BS, segment_BS, segment_BS))


class Decoder(nn.Module):
    """`decoder_layers` blocks with attention to earlier positions and to the encoder's output."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.position_bias = RelativePositionBias(spec, bidirectional=False)
        self.blocks = nn.ModuleList(DecoderBlock(spec, layer) for layer in range(spec.decoder_layers))
        self.final_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        self.dropout = spec.dropout
        self.uses_flex = False
        """Whether training uses flex_attention, as in the encoder."""

    def forward(
        self,
        x_BTD: torch.Tensor,
        real_BT: torch.Tensor,
        encoded: EncoderOutput,
        cache: DecoderCache | None = None,
        segments: SegmentIds | None = None,
    ) -> tuple[torch.Tensor, StackStats]:
        """Return the hidden states of T positions, and the router statistics.

        Args:
            x_BTD: the embedded tokens. With a cache T is 1, and B may be a multiple of the encoder's rows: the beams.
            real_BT: bool, False for padding, which is not routed.
            encoded: the encoder's output.
            cache: the positions so far, to which this one is added; None: x has all positions.
            segments: the examples of packed rows, which have no cache.
        """
        T = x_BTD.shape[1]
        bias_BHTS: Bias
        if cache is not None:
            bias_BHTS = cache.bias_1H1S
        elif self.uses_flex and self.training:
            bias_BHTS, cross_bias = self._flex_biases(encoded.real_BS, T, segments)
            encoded = encoded._replace(bias_B1TS=cross_bias)
        else:
            mask_B1TT = None
            if segments is not None:
                mask_B1TT = segment_bias(segments.target_BT, segments.target_BT)
                assert isinstance(encoded.bias_B1TS, torch.Tensor)
                bias_B1TS = encoded.bias_B1TS + segment_bias(segments.target_BT, segments.source_BS)
                encoded = encoded._replace(bias_B1TS=shared_bias(bias_B1TS, None, x_BTD))
            bias_BHTS = shared_bias(self.position_bias(T, T), mask_B1TT, x_BTD)
        x_BTD = dropout(x_BTD, self.dropout, self.training)
        stats: StackStats = ()
        for layer, block in enumerate(self.blocks):
            x_BTD, block_stats = block(x_BTD, real_BT, bias_BHTS, encoded, cache and cache.blocks[layer])
            stats += block_stats
        return dropout(self.final_norm(x_BTD), self.dropout, self.training), stats

    def _flex_biases(
        self, real_BS: torch.Tensor, num_targets: int, segments: SegmentIds | None
    ) -> tuple[FlexBias, FlexBias]:
        """Return the biases of self-attention and cross-attention for flex_attention. `real_BS` is the encoder's."""
        source_BS, target_BT = (None, None) if segments is None else segments
        itself = flex.causal(num_targets, target_BT, real_BS.device)
        source = flex.visible(num_targets, real_BS, target_BT, source_BS)
        return FlexBias(self.position_bias.by_distance(num_targets, num_targets), itself), FlexBias(None, source)

    def decoding_weights(self) -> Iterator[torch.Tensor]:
        """Yield the dense matrices that each token of a decoding needs: not those of the source's keys and values."""
        for block in cast(Iterable[DecoderBlock], self.blocks):
            source = block.cross_attention.attention
            for module in block.modules():
                if isinstance(module, Linear) and module not in (source.k, source.v):
                    yield module.weight

    def cache(self, encoded: EncoderOutput) -> DecoderCache:
        """Return an empty cache for step-by-step decoding: keys and values of the source, and the position bias."""
        sources = []
        for block in cast(Iterable[DecoderBlock], self.blocks):
            source = block.cross_key_value(encoded)
            # Contiguous by head, as every step reads them.
            sources.append(KeyValue(cached_keys(source.key_BHSK).contiguous(), source.value_BHSK.contiguous()))
        return DecoderCache(sources, lambda length: cast_bias(self.position_bias(1, length), encoded.hidden_BSD))


class SwitchTransformer(nn.Module):
    """An encoder-decoder from token ids to logits. `initialize` or a checkpoint fills its weights."""

    def __init__(self, spec: ModelSpec, router_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Parameter(torch.empty(spec.vocab_size, spec.d_model))
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.head = None if spec.tie_embeddings else Linear(spec.d_model, spec.vocab_size)
        self.axis = SINGLE_PROCESS
        """The processes among which the vocabulary is divided."""
        for module in self.modules():
            if isinstance(module, RouterWeights):
                module.dtype = router_dtype

    def forward(
        self, inputs_BS: torch.Tensor, targets_BT: torch.Tensor, segments: SegmentIds | None = None
    ) -> ModelOutput:
        """Predict every target from the inputs and the targets before it.

        Args:
            inputs_BS: int64 token ids; 0 is padding.
            targets_BT: int64 token ids; 0 is padding.
            segments: the examples of packed rows (`packing.segment_ids`): a target is predicted from its own example
                only. None: each row is one example.
        """
        encoded = self._encode(inputs_BS, segments)
        x_BTD = self.embed(decoder_inputs(targets_BT, segments))
        hidden_BTD, decoder_stats = self.decoder(x_BTD, targets_BT != PAD, encoded, segments=segments)
        encoder, decoder = (self.spec.router_of(stack) for stack in STACKS)
        auxiliary = auxiliary_loss([(encoder, encoded.stats), (decoder, decoder_stats)], self.spec.balance_reduction)
        return ModelOutput(*self.vocabulary(hidden_BTD), auxiliary, encoded.stats, decoder_stats)

    def encode(self, inputs_BS: torch.Tensor) -> EncoderOutput:
        """Encode inputs for step-by-step decoding. `forward` does not call it, see `DecoderBlock.cross_key_value`."""
        return self._encode(inputs_BS)

    def _encode(self, inputs_BS: torch.Tensor, segments: SegmentIds | None = None) -> EncoderOutput:
        encoded: EncoderOutput = self.encoder(self.embed(inputs_BS), inputs_BS != PAD, segments)
        # All cross-attentions use it in their divided heads: one sum of the gradient serves them all.
        return encoded._replace(hidden_BSD=self.axis.enter_region(encoded.hidden_BSD))

    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of tokens, not scaled, as in T5: [B, S, D]."""
        return VocabularyShard(self.embedding, self.axis).embed(ids_BS)

    def vocabulary(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, VocabularyShard]:
        """Return the factors of the logits: the hidden states, and the softmax matrix [V, D].

        With tied embeddings the hidden states are scaled by d_model**-0.5, as in T5 1.0.
        """
        if self.head is not None:
            return hidden_BTD, VocabularyShard(self.head.weight, self.axis)
        return hidden_BTD * self.spec.d_model**-0.5, VocabularyShard(self.embedding, self.axis)


def named_weights(model: SwitchTransformer) -> dict[str, torch.Tensor]:
    """Return all that a checkpoint stores of a model, by name: its parameters, and the biases of routers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
