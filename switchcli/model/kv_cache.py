"""What a decoder keeps between steps, so that each position is computed once.

Legend: B rows, S positions of keys, H heads, K head size.
"""

from collections.abc import Callable, Iterable

import torch

from switchcli.model.attention import KeyValue

ROOM = 32
"""Positions that memory is taken for at first; doubled when they are full."""


class LayerKVCache:
    """Keys and values of one decoder block: the source's, and those of the positions so far, which grow in place."""

    def __init__(self, source: KeyValue) -> None:
        self.source = source
        self.length = 0
        self._kept: tuple[torch.Tensor, ...] = ()

    def append(self, new: KeyValue) -> KeyValue:
        """The positions so far, the new ones last: views, which the next steps write behind."""
        before, self.length = self.length, self.length + new.key_BHSK.shape[2]
        if not self._kept or self._kept[0].shape[2] < self.length:
            self._kept = tuple(self._more_room(kept_BHSK, before) for kept_BHSK in self._kept or new)
        for kept_BHSK, new_BHSK in zip(self._kept, new, strict=True):
            kept_BHSK[:, :, before : self.length] = new_BHSK
        return KeyValue(*(kept_BHSK[:, :, : self.length] for kept_BHSK in self._kept))

    def reorder(self, row_B: torch.Tensor) -> None:
        """Row i goes on from what row `row_B[i]` was; the source, which is common to beams, stays."""
        for kept_BHSK in self._kept:
            kept_BHSK[:, :, : self.length] = kept_BHSK[:, :, : self.length].index_select(0, row_B)

    def _more_room(self, x_BHSK: torch.Tensor, before: int) -> torch.Tensor:
        B, H, _, K = x_BHSK.shape
        room_BHSK = x_BHSK.new_empty(B, H, max(ROOM, 2 * self.length), K)
        room_BHSK[:, :, :before] = x_BHSK[:, :, :before]
        return room_BHSK


class DecoderCache:
    """The past of every block, and the position bias of the steps, computed once and sliced."""

    def __init__(self, sources: Iterable[KeyValue], bias_of: Callable[[int], torch.Tensor]) -> None:
        """`bias_of(S)`: [1, H, 1, S], what the last of S positions adds to its logits of them."""
        self.blocks = tuple(map(LayerKVCache, sources))
        self._bias_of = bias_of
        self._bias_1H1S = bias_of(ROOM)

    @property
    def bias_1H1S(self) -> torch.Tensor:
        """Of the position after those so far. It depends on distances alone: the last entries of a longer row."""
        length = self.blocks[0].length + 1
        if length > self._bias_1H1S.shape[-1]:
            self._bias_1H1S = self._bias_of(2 * length)
        return self._bias_1H1S[..., -length:]

    def reorder(self, row_B: torch.Tensor) -> None:
        """Row i of the next step goes on from row `row_B[i]` of the last: what beams do."""
        for past in self.blocks:
            past.reorder(row_B)
