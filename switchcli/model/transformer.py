"""The whole model: T5's encoder and decoder with Switch layers where the spec says.

Legend: B batch, S source, T target, D model, V vocabulary, H heads.

Pre-norm blocks: x + dropout(layer(norm(x))). The forward pass returns the routing reports, which hold the losses of the
sparse layers; nothing is kept on the side.
"""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.attention import Attention, KeyValue, RelativePositionBias, padding_bias, shared_bias
from switchcli.model.axis import SINGLE_PROCESS
from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.kv_cache import DecoderCache, LayerKVCache
from switchcli.model.layers import FeedForward, RMSNorm, dropout, linear
from switchcli.model.moe.layer import RouterWeights, SwitchLayer
from switchcli.model.moe.losses import AuxiliaryLoss, auxiliary_loss
from switchcli.model.moe.stats import StackStats
from switchcli.model.moe.switch_attention import SwitchAttention
from switchcli.model.packing import SegmentIds, decoder_inputs, segment_bias
from switchcli.model.vocabulary import VocabularyShard
from switchcli.spec import PAD


class ModelOutput(NamedTuple):
    """The decoder's answer at each target position, and what the sparse layers tell."""

    hidden_BTD: torch.Tensor
    """What the softmax matrix is multiplied with: a loss may then do without all logits at once."""
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
        """One for each sparse layer, the encoder's first."""
        return self.encoder_stats + self.decoder_stats


class EncoderOutput(NamedTuple):
    """The encoder's answer."""

    hidden_BSD: torch.Tensor
    bias_B1TS: torch.Tensor
    """Hides the padding from cross-attention, the same for all T: [B, 1, 1, S]."""
    stats: StackStats


class SelfAttention(nn.Module):
    """x + dropout(attention(norm(x))) over the positions of x itself, after those of `past`; dense or sparse."""

    def __init__(self, spec: ModelSpec, stack: Stack, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        sparse = spec.is_sparse(stack, layer, "attention")
        self.attention = SwitchAttention(spec, stack) if sparse else Attention(spec)
        self.dropout = spec.dropout

    def forward(
        self, x_BTD: torch.Tensor, real_BT: torch.Tensor, bias_BHTS: torch.Tensor, past: LayerKVCache | None = None
    ) -> tuple[torch.Tensor, StackStats]:
        """The new x, and the report if it is sparse; `past` grows by the positions of x."""
        normed_BTD = self.norm(x_BTD)
        reports: StackStats = ()
        if isinstance(self.attention, SwitchAttention):
            query_BHTK, memory, report = self.attention.project(normed_BTD, real_BT)
            reports = (report,)
        else:
            normed_BTD = self.attention.axis.enter_region(normed_BTD)
            query_BHTK, memory = self.attention.query(normed_BTD), self.attention.key_value(normed_BTD)
        memory = memory if past is None else past.append(memory)
        y_BTD = self.attention(query_BHTK, memory, bias_BHTS)
        return x_BTD + dropout(y_BTD, self.dropout, self.training), reports


class CrossAttention(nn.Module):
    """x + dropout(attention(norm(x), memory)); no position bias, as in T5.

    Rows of x side by side may share a row of the memory, as beams do: they are then queries of one sequence.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        self.attention = Attention(spec)
        self.dropout = spec.dropout

    def forward(self, x_BTD: torch.Tensor, memory: KeyValue, bias_B1TS: torch.Tensor) -> torch.Tensor:
        normed_BTD = self.attention.axis.enter_region(self.norm(x_BTD))
        shared_BTD = normed_BTD.view(len(memory.key_BHSK), -1, x_BTD.shape[-1])
        y_BTD = self.attention(self.attention.query(shared_BTD), memory, bias_B1TS).view_as(x_BTD)
        return x_BTD + dropout(y_BTD, self.dropout, self.training)


class FeedForwardSublayer(nn.Module):
    """x + dropout(feed_forward(norm(x))), dense or sparse; a dropped token keeps its x."""

    def __init__(self, spec: ModelSpec, stack: Stack, layer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        sparse = spec.is_sparse(stack, layer, "feed_forward")
        self.layer = SwitchLayer(spec, stack, spec.d_model) if sparse else FeedForward(spec)
        self.dropout = spec.dropout

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> tuple[torch.Tensor, StackStats]:
        normed_BSD = self.norm(x_BSD)
        reports: StackStats = ()
        if isinstance(self.layer, SwitchLayer):
            y_BSD, report = self.layer(normed_BSD, real_BS)
            reports = (report,)
        else:
            y_BSD = self.layer(normed_BSD)
        return x_BSD + dropout(y_BSD, self.dropout, self.training), reports


class EncoderBlock(nn.Module):
    """Self-attention, then a feed-forward."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(spec, "encoder", layer)
        self.feed_forward = FeedForwardSublayer(spec, "encoder", layer)

    def forward(
        self, x_BSD: torch.Tensor, real_BS: torch.Tensor, bias_BHSS: torch.Tensor
    ) -> tuple[torch.Tensor, StackStats]:
        x_BSD, attended = self.self_attention(x_BSD, real_BS, bias_BHSS)
        x_BSD, fed = self.feed_forward(x_BSD, real_BS)
        return x_BSD, attended + fed


class DecoderBlock(nn.Module):
    """Self-attention over the past, attention to the encoder, then a feed-forward."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(spec, "decoder", layer)
        self.cross_attention = CrossAttention(spec)
        self.feed_forward = FeedForwardSublayer(spec, "decoder", layer)

    def forward(
        self,
        x_BTD: torch.Tensor,
        real_BT: torch.Tensor,
        bias_BHTS: torch.Tensor,
        encoded: EncoderOutput,
        past: LayerKVCache | None,
    ) -> tuple[torch.Tensor, StackStats]:
        source = self._source(encoded) if past is None else past.source
        x_BTD, attended = self.self_attention(x_BTD, real_BT, bias_BHTS, past)
        x_BTD = self.cross_attention(x_BTD, source, encoded.bias_B1TS)
        x_BTD, fed = self.feed_forward(x_BTD, real_BT)
        return x_BTD, attended + fed

    def cross_key_value(self, encoded: EncoderOutput) -> KeyValue:
        """What cross-attention attends to, for decoding step by step. Apart from `forward`'s own: what gathers weights
        around either must not do so twice."""
        return self._source(encoded)

    def _source(self, encoded: EncoderOutput) -> KeyValue:
        return self.cross_attention.attention.key_value(encoded.hidden_BSD)


class Encoder(nn.Module):
    """`num_layers` blocks that see all positions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.position_bias = RelativePositionBias(spec, bidirectional=True)
        self.blocks = nn.ModuleList(EncoderBlock(spec, layer) for layer in range(spec.num_layers))
        self.final_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        self.dropout = spec.dropout

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor, segments: SegmentIds | None = None) -> EncoderOutput:
        """x_BSD: the embedded tokens; `real_BS` is False for padding, which nothing attends to and no router sees."""
        S = x_BSD.shape[1]
        padding_B11S = padding_bias(real_BS)
        bias_BHSS = self.position_bias(S, S) + padding_B11S
        if segments is not None:
            bias_BHSS = bias_BHSS + segment_bias(segments.source_BS, segments.source_BS)
        bias_BHSS = shared_bias(bias_BHSS, x_BSD)
        x_BSD = dropout(x_BSD, self.dropout, self.training)
        reports: StackStats = ()
        for block in self.blocks:
            x_BSD, new = block(x_BSD, real_BS, bias_BHSS)
            reports += new
        hidden_BSD = dropout(self.final_norm(x_BSD), self.dropout, self.training)
        return EncoderOutput(hidden_BSD, padding_B11S, reports)


class Decoder(nn.Module):
    """`decoder_layers` blocks that see the past and the encoder's output."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.position_bias = RelativePositionBias(spec, bidirectional=False)
        self.blocks = nn.ModuleList(DecoderBlock(spec, layer) for layer in range(spec.decoder_layers))
        self.final_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)
        self.dropout = spec.dropout

    def forward(
        self,
        x_BTD: torch.Tensor,
        real_BT: torch.Tensor,
        encoded: EncoderOutput,
        cache: DecoderCache | None = None,
        segments: SegmentIds | None = None,
    ) -> tuple[torch.Tensor, StackStats]:
        """Hidden states of T positions and the reports.

        With a cache T is 1: the position after those in it, which it then holds too. Its rows may be several for each
        of the encoder's, as beams are. Packed rows have no cache.
        """
        T = x_BTD.shape[1]
        if cache is not None:
            bias_BHTS = cache.bias_1H1S
        else:
            bias_BHTS = self.position_bias(T, T)
            if segments is not None:
                bias_BHTS = bias_BHTS + segment_bias(segments.target_BT, segments.target_BT)
                bias_B1TS = encoded.bias_B1TS + segment_bias(segments.target_BT, segments.source_BS)
                encoded = encoded._replace(bias_B1TS=shared_bias(bias_B1TS, x_BTD))
            bias_BHTS = shared_bias(bias_BHTS, x_BTD)
        x_BTD = dropout(x_BTD, self.dropout, self.training)
        reports: StackStats = ()
        for layer, block in enumerate(self.blocks):
            x_BTD, new = block(x_BTD, real_BT, bias_BHTS, encoded, cache and cache.blocks[layer])
            reports += new
        return dropout(self.final_norm(x_BTD), self.dropout, self.training), reports

    def cache(self, encoded: EncoderOutput) -> DecoderCache:
        """An empty one for decoding step by step: keys and values of the source, and the position bias."""
        blocks = cast(Iterable[DecoderBlock], self.blocks)
        sources = (block.cross_key_value(encoded) for block in blocks)
        by_head = (KeyValue(*(x_BHSK.contiguous() for x_BHSK in source)) for source in sources)  # read at every step
        return DecoderCache(by_head, lambda length: shared_bias(self.position_bias(1, length), encoded.hidden_BSD))


class SwitchTransformer(nn.Module):
    """An encoder-decoder from token ids to logits; `initialise` or a checkpoint fills its weights."""

    def __init__(self, spec: ModelSpec, router_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Parameter(torch.empty(spec.vocab_size, spec.d_model))
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.head = None if spec.tie_embeddings else linear(spec.d_model, spec.vocab_size)
        self.axis = SINGLE_PROCESS
        """Of the vocabulary."""
        for module in self.modules():
            if isinstance(module, RouterWeights):
                module.dtype = router_dtype

    def forward(
        self, inputs_BS: torch.Tensor, targets_BT: torch.Tensor, segments: SegmentIds | None = None
    ) -> ModelOutput:
        """The answer for every target given the inputs and the targets before it (int64 ids; 0 is padding).

        With `segments` (packing.segments_of) rows are packed: given those of its own example alone.
        """
        encoded = self._encode(inputs_BS, segments)
        x_BTD = self.embed(decoder_inputs(targets_BT, segments))
        hidden_BTD, reports = self.decoder(x_BTD, targets_BT != PAD, encoded, segments=segments)
        encoder, decoder = (self.spec.router_of(stack) for stack in STACKS)
        auxiliary = auxiliary_loss([(encoder, encoded.stats), (decoder, reports)], self.spec.balance_reduction)
        return ModelOutput(*self.vocabulary(hidden_BTD), auxiliary, encoded.stats, reports)

    def encode(self, inputs_BS: torch.Tensor) -> EncoderOutput:
        """The first step of decoding step by step; apart from `forward`'s own, as `DecoderBlock.source` is."""
        return self._encode(inputs_BS)

    def _encode(self, inputs_BS: torch.Tensor, segments: SegmentIds | None = None) -> EncoderOutput:
        encoded: EncoderOutput = self.encoder(self.embed(inputs_BS), inputs_BS != PAD, segments)
        return encoded._replace(hidden_BSD=self.axis.enter_region(encoded.hidden_BSD))  # once for all cross-attentions

    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        return VocabularyShard(self.embedding, self.axis).embed(ids_BS)

    def vocabulary(self, hidden_BTD: torch.Tensor) -> tuple[torch.Tensor, VocabularyShard]:
        """The factors of the logits: hidden states, scaled as T5 1.0 does with tied embeddings, and matrix [V, D]."""
        if self.head is not None:
            return hidden_BTD, VocabularyShard(self.head.weight, self.axis)
        return hidden_BTD * self.spec.d_model**-0.5, VocabularyShard(self.embedding, self.axis)
