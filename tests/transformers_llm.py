"""The part of vLLM that TRL uses of a colocated engine, computed by a transformers model from a folder.

It is its own copy of the model, so it answers by the weights that it was given last.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    """Those of vLLM's that are used, with its names and defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    logprobs: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)


class LLM:
    """`vllm.LLM`: `generate`, `reset_prefix_cache`, and the path on which TRL hands it weights."""

    def __init__(self, model, seed, dtype=torch.bfloat16, **options):
        torch.manual_seed(seed)  # as vLLM does in the process that it runs in
        self.options = options
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)
        self.loads, self.resets, self.asked = [], 0, []

    @torch.no_grad()
    def load_weights(self, named):
        mine = dict(self.model.named_parameters())  # a tied head is refused, as vLLM refuses it
        for name, weight in named:
            mine[name].copy_(weight)
            self.loads.append(name)

    def reset_prefix_cache(self):
        self.resets += 1

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked.append((prompts, sampling_params))
        return [self.answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def answer(self, prompt, params):
        """Token by token, without a cache."""
        ids, logprobs = list(prompt), []
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {self.model.config.eos_token_id})
        for _ in range(params.max_tokens):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            for token, bias in params.logit_bias.items():
                logits[token] += bias
            every = torch.log_softmax(logits / params.temperature, dim=-1)
            token = int(torch.multinomial(every.exp(), 1))
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(every[token]), rank=1)})
            if token in stops:
                break
        output = SimpleNamespace(token_ids=ids[len(prompt) :], logprobs=logprobs)
        return SimpleNamespace(prompt_token_ids=list(prompt), outputs=[output])
