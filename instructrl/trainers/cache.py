"""A KV cache with room for all tokens to come. DynamicCache copies itself at every token: a sixth of long responses."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values [B, heads, tokens, D]: views of buffers that hold `room` tokens more."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = [torch.cat([x, x.new_empty(*x.shape[:2], room, x.shape[3])], dim=2) for x in (keys, values)]
        self._show(keys.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add tokens [B, heads, t, D], and return all."""
        start = self.get_seq_length()
        self._show(start + key_states.shape[2])
        for seen, new in ((self.keys, key_states), (self.values, value_states)):
            seen[:, :, start:] = new
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._show(self.get_seq_length())

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)
