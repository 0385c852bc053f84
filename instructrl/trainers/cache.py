"""A KV cache with room for tokens to come. DynamicCache copies itself at every token: a sixth of long responses."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens: room for all to come would be wasted on rows that end early


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [B, heads, tokens, D]: views of buffers that hold up to `ROOM` tokens more."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int, tokens: int) -> None:
        """For so many rows and, at first, tokens, all 0; of the given [., heads, ., D]'s heads, D and precision."""
        super().__init__()
        self.lazy_initialization(keys, values)
        # under autocast rotated keys are float32 beside values in bfloat16
        self.buffers = [like.new_zeros(rows, like.shape[1], tokens + ROOM, like.shape[3]) for like in (keys, values)]
        self._show(tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add tokens [B, heads, t, D], and return all."""
        start = self.get_seq_length()
        tokens = start + key_states.shape[2]
        if tokens > self.buffers[0].shape[2]:
            self.keys = self.values = None  # so that each old buffer is gone before the next one grows
            for number in range(2):
                rows, heads, _, width = self.buffers[number].shape
                room = self.buffers[number].new_empty(rows, heads, tokens - start + ROOM, width)
                self.buffers[number] = torch.cat([self.buffers[number][:, :, :start], room], dim=2)
        self._show(tokens)
        for seen, new in ((self.keys, key_states), (self.values, value_states)):
            seen[:, :, start:] = new
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        tokens = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show(tokens)

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)
