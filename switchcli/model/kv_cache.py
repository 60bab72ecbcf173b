"""The keys and values that a decoder caches between steps, so that each position is computed once.

Legend: B rows, S key positions, H heads, K head size.
"""

from collections.abc import Callable, Iterable

import torch

from switchcli.model.attention import KeyValue, cached_keys

INITIAL_CAPACITY = 32
"""Number of positions that the first buffers hold; their size doubles when they are full."""


class LayerKVCache:
    """The keys and values of one decoder block: those of the source, and those of the target positions so far."""

    def __init__(self, source: KeyValue) -> None:
        self.source = source
        self.length = 0
        """Number of target positions so far."""
        self._buffers: tuple[torch.Tensor, ...] = ()  # keys and values [B, H, capacity, K], of which `length` are used

    def append(self, new: KeyValue) -> KeyValue:
        """Add positions, and return all positions so far as views of the buffers. Later steps write behind them."""
        new = KeyValue(cached_keys(new.key_BHSK), new.value_BHSK)
        start = self.length
        self.length = start + new.key_BHSK.shape[2]
        if not self._buffers or self._buffers[0].shape[2] < self.length:
            # Without buffers, `new` only gives the shape: start is 0, so none of it is copied yet.
            self._buffers = tuple(self._grow(buffer_BHSK, start) for buffer_BHSK in self._buffers or new)
        for buffer_BHSK, new_BHSK in zip(self._buffers, new, strict=True):
            buffer_BHSK[:, :, start : self.length] = new_BHSK
        return KeyValue(*(buffer_BHSK[:, :, : self.length] for buffer_BHSK in self._buffers))

    def reorder(self, row_B: torch.Tensor) -> None:
        """Make row i a copy of the former row `row_B[i]`. The source is not reordered: beams of an input share it."""
        for buffer_BHSK in self._buffers:
            buffer_BHSK[:, :, : self.length] = buffer_BHSK[:, :, : self.length].index_select(0, row_B)

    def _grow(self, x_BHSK: torch.Tensor, used: int) -> torch.Tensor:
        """Return a buffer for twice the positions, with the `used` positions of x."""
        B, H, _, K = x_BHSK.shape
        buffer_BHSK = x_BHSK.new_empty(B, H, max(INITIAL_CAPACITY, 2 * self.length), K)
        buffer_BHSK[:, :, :used] = x_BHSK[:, :, :used]
        return buffer_BHSK


class DecoderCache:
    """The cache of every decoder block, and the position bias of a step, which is computed once and sliced."""

    def __init__(self, sources: Iterable[KeyValue], last_query_bias: Callable[[int], torch.Tensor]) -> None:
        """Begin an empty cache.

        Args:
            sources: the keys and values of the source, for each block.
            last_query_bias: returns, for S, the position bias of the last of S positions: [1, H, 1, S].
        """
        self.blocks = tuple(LayerKVCache(source) for source in sources)
        self._last_query_bias = last_query_bias
        self._bias_1H1S = last_query_bias(INITIAL_CAPACITY)

    @property
    def bias_1H1S(self) -> torch.Tensor:
        """The position bias of the next position.

        It depends on distances only, so the bias of a longer sequence's last position ends with it.
        """
        length = self.blocks[0].length + 1
        if length > self._bias_1H1S.shape[-1]:
            self._bias_1H1S = self._last_query_bias(2 * length)
        return self._bias_1H1S[..., -length:]

    def reorder(self, row_B: torch.Tensor) -> None:
        """Let row i of the next step continue row `row_B[i]` of the last one, as beam search does."""
        for block in self.blocks:
            block.reorder(row_B)
