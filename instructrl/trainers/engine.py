"""vLLM as what samples a PPO policy's responses, run as TRL runs it: inside each process, or behind a server.

https://huggingface.co/docs/trl/vllm_integration
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from instructrl.trainers.actor_critic import network
from instructrl.trainers.experience import Episodes, seeded
from instructrl.trainers.ppo_config import PPOConfig
from instructrl.trainers.ppo_stats import sampler_stats
from instructrl.trainers.rollout import Completion, RolloutError

NEVER = -100.0
"""The bias of a logit that is not to be drawn: vLLM takes no less."""
PROCESSED = "processed_logprobs"
"""vLLM's log-probabilities after temperature and biases: those of the distribution that it draws from."""


class Engine(VLLMGeneration):
    """TRL's vLLM for a policy whose weights it is given anew before it answers.

    It draws from what `rollout.generate` draws from: the softmax of logits / temperature without the padding token,
    until `eos_id`. Its precision is its own (float32 weights run in bfloat16), so its log-probabilities are for
    comparison only.

    Args:
        policy: as it is trained; with an adapter, `plain_weights` must tell the weights of the model that it merges to.
        max_length: of a prompt and its response.

    Raises:
        RolloutError: vLLM is not installed, or the server is not there, or not as TRL needs it.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        args: PPOConfig,
        *,
        eos_id: int,
        pad_id: int,
        max_length: int,
        plain_weights: Callable[[PeftModel], Mapping[str, Tensor]] | None = None,
    ):
        if not is_vllm_available():
            raise RolloutError("use_vllm needs vLLM, which is not installed: pip install 'instructrl[vllm]'")
        if isinstance(policy, PeftModel) and plain_weights is None:
            raise ValueError("use_vllm and a policy with an adapter: pass plain_weights, which merges it")
        self.args, self.plain_weights = args, plain_weights
        with named(policy, args.vllm_model), global_seed(args.seed), self.asked():
            super().__init__(
                model=policy,
                accelerator=accelerator,
                processing_class=tokenizer,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                server_timeout=args.vllm_server_timeout,
                group_port=args.vllm_group_port,
                tensor_parallel_size=args.vllm_tensor_parallel_size,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=max_length,
                max_num_seqs=args.generation_batch_size,
                temperature=args.temperature,
                max_completion_length=args.response_length,
                logprobs=0,  # of the sampled token
                # EOS is one token like all others where another ends a response.
                generation_kwargs={"stop_token_ids": [eos_id], "ignore_eos": True, "logit_bias": {pad_id: NEVER}},
            )
            if self.mode == "server" and accelerator.is_main_process:
                told = self.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
                if told != PROCESSED:
                    raise RolloutError(f"it runs with --logprobs-mode {told}: restart it with {PROCESSED}")

    def answers(self, prompts: list[list[int]], most: int, *stream: object) -> list[Completion]:
        """One response to each of this process's prompts, by the policy's weights as they are now.

        Every process must call it at the same time.

        Args:
            most: prompts that any process has: those with fewer ask for one more often, as TRL needs equal shares.
            stream: what the random numbers belong to, with the seed. A server has its own.

        Raises:
            RolloutError: the server did not answer.
            FloatingPointError: the policy's logits are not numbers.
        """
        group = self.accelerator.process_index // self.tensor_parallel_size  # whose processes must draw alike
        filled = prompts + [prompts[0] if prompts else [self.processing_class.eos_token_id]] * (most - len(prompts))
        with global_seed(seeded(self.args.seed, *stream, group).initial_seed()), self.asked():
            self.sync_weights()
            _, responses, logprobs, _ = self.generate(filled, None, num_generations=1)
        found = [[math.nan if token[0] is None else token[0] for token in row] for row in logprobs]
        if not all(math.isfinite(value) for row in found for value in row):
            raise FloatingPointError(
                "the policy's logits are not numbers: training has diverged; lower the learning rate"
            )
        made = [Completion(list(ids), torch.tensor(row)) for ids, row in zip(responses, found, strict=True)]
        return made[: len(prompts)]

    def compared(self, episodes: Episodes) -> dict[str, Tensor]:
        """How far its log-probabilities are from the policy's: `sampler_stats`.

        Raises:
            RolloutError: too far for both to be of one policy.
        """
        stats, most = sampler_stats(episodes), self.args.vllm_max_logprob_difference
        mean, highest = (value.item() for value in stats.values())
        if not mean <= most:  # nor nan
            raise RolloutError(
                f"vLLM's log-probabilities of what it sampled differ from the policy's by {mean:.3g} nats a token (at "
                f"most {highest:.3g}), which is more than vllm_max_logprob_difference={most}: does it have other "
                "weights (a server that another run uses, too, or a sync that failed), another precision (its dtype, "
                "or quantization), or another tokenizer or model than the policy's?"
            )
        return stats

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """In the place of TRL's, which merges an adapter into the policy itself and then subtracts it again: that does
        not give back the same weights."""
        if not isinstance(self.model, PeftModel):
            yield from super()._iter_named_params()
            return
        buffers, sent = dict(network(self.model).named_buffers()), set()
        for name, weight in self.plain_weights(self.model).items():
            if name in buffers or weight.data_ptr() in sent:  # vLLM ties by itself, and refuses a head that is tied
                continue
            sent.add(weight.data_ptr())
            yield name, weight.to(self.accelerator.device)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Tell what a server refused: TRL raises a plain Exception where a request fails."""
        try:
            yield
        except Exception as error:
            if self.args.vllm_mode != "server":
                raise
            message = " ".join(str(error).split())
            raise RolloutError(f"the vLLM server at {self.args.vllm_server_base_url}: {message}") from error


@contextmanager
def named(policy: PreTrainedModel | PeftModel, path: str | None) -> Iterator[None]:
    """The policy with the name of the folder that vLLM reads config, tokenizer and first weights from."""
    model = network(policy)
    before = model.name_or_path
    model.name_or_path = path or before
    try:
        yield
    finally:
        model.name_or_path = before


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """The global generators seeded, and in the end as they were: vLLM draws from them, and seeds them as it starts."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        set_seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
