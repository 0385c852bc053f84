"""A weight transfer of vLLM's for CPUs: what its NCCL engine sends through NCCL goes through a TCP store.

In vLLM's processes it is a plugin (`--weight-transfer-config '{"backend": "store"}'`); in the trainer's,
`take_the_place_of_nccl` gives it to TRL's client. All requests, and what vLLM does with the weights, are their own.
"""

from dataclasses import dataclass

import torch
from vllm import _custom_ops
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


@dataclass
class Link:
    """Trainer and workers, as ranks of a store."""

    group: StatelessProcessGroup

    @classmethod
    def of(cls, info, rank):
        told = info if isinstance(info, dict) else vars(info)
        address, port, size = told["master_address"], told["master_port"], told["world_size"]
        return cls(StatelessProcessGroup.create(host=address, port=port, rank=rank, world_size=size))


class StoreWeightTransferEngine(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info):
        self.model_update_group = Link.of(init_info, self.parallel_config.rank + init_info.rank_offset)

    def receive_weights(self, update_info):
        for name in update_info.names:
            weight = self.model_update_group.group.broadcast(torch.empty(0), src=0)
            self.model.load_weights([(name, weight)])

    @staticmethod
    def trainer_init(init_info):
        return Link.of(init_info, 0)

    @staticmethod
    def trainer_send_weights(iterator, trainer_args):
        broadcast(iterator, trainer_args.group)


def broadcast(iterator, group, src=0, post_iter_func=None):
    """`packed_nccl_broadcast_producer`, a tensor at a time."""
    for _, weight in iterator:
        group.group.broadcast(weight.detach().contiguous(), src=src)


def register():
    """Called by vLLM in each of its processes."""
    _custom_ops._supports_onednn = False  # matrices stay as they are, or could not be loaded again
    if "store" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("store", StoreWeightTransferEngine)


def take_the_place_of_nccl():
    """In TRL's client, which asks for a CUDA device because of NCCL."""
    from trl.generation import vllm_client

    connect = vllm_client.VLLMClient.init_communicator
    if hasattr(vllm_client, "open_trainer_endpoint"):  # with vLLM 0.28 and later
        vllm_client.open_trainer_endpoint = StoreWeightTransferEngine.trainer_init
        vllm_client.packed_nccl_broadcast_producer = broadcast
    else:
        vllm_client.NCCLWeightTransferEngine = StoreWeightTransferEngine
    vllm_client.VLLMClient.init_communicator = lambda self, device: connect(self, "cuda")  # no index: none is touched
