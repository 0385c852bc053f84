"""A model of ours as lm-evaluation-harness sees one: texts in, log-likelihoods and texts out.

The harness's own HFLM reads text otherwise than our stages do: it turns `</s>` in a question into the end, lets padding
be sampled, and scores right-padded batches. Here a task's text becomes ids as a pretraining document does
(`Contract.plain`), without the template: the paper gives all models the same prompts (App. D).

What is too long for a model loses its beginning; `cut` counts such requests.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel

from instructrl.stages.answers import stop_tokens
from instructrl.stages.contract import Contract
from instructrl.trainers.losses import token_logprobs
from instructrl.trainers.packing import Pack, outputs
from instructrl.trainers.rollout import generate, length_batches, next_token_logits, predicting

LONGEST = 256  # tokens of an answer where the task does not say; the harness's own default


class LogLikelihood(float):
    """A log-likelihood in nats that knows of how many tokens: the paper's choices go by the mean per token (App. D)."""

    tokens: int

    def __new__(cls, value: float, tokens: int) -> "LogLikelihood":
        made = super().__new__(cls, value)
        made.tokens = tokens
        return made

    @property
    def mean(self) -> float:
        """Per token."""
        return float(self) / max(self.tokens, 1)


class Policy(TemplateLM):
    """A causal language model under its text contract.

    Args:
        context: the most tokens that the model reads.
        max_tokens, batch_size: `runtime.max_tokens` and `runtime.generation_batch_size`.
        frame: text around everything that the model reads before it answers, with `{prompt}`: GPT (prompted)'s prefix.
        stop: where an answer ends besides where the task says: GPT (prompted)'s stop.
        seed: of what tasks ask to be sampled; the paper's are greedy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contract: Contract,
        context: int,
        *,
        max_tokens: int = 4096,
        batch_size: int = 128,
        frame: str = "{prompt}",
        stop: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.contract, self.context = model, contract.plain(), context
        self.max_tokens, self.batch_size, self.frame, self.stop, self.seed = max_tokens, batch_size, frame, stop, seed
        self.tokenizer = contract.tokenizer
        self.cut = 0
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        end = self.contract.document_end
        return self.tokenizer.eos_token_id if end is None else end

    @cached_property
    def before(self) -> list[int]:
        """What a text starts with: BOS, or what ends the document before it."""
        return self.contract.bos or [self.eot_token_id]

    @property
    def prefix_token_id(self) -> int:
        return self.before[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """With BOS, if the model was trained with one, unless `add_special_tokens` is False."""
        ids = self.contract.prompt(string)
        return ids[len(self.contract.bos) :] if add_special_tokens is False else ids

    # ---- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[LogLikelihood, bool]]:
        """(log p(continuation | context) in nats, whether it is the greedy one) of each request."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            framed = self.frame.replace("{prompt}", context)
            pairs.append(((context, continuation), *self._encode_pair(framed, continuation)))
        return self._loglikelihood_tokens(pairs)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Both together as ids, divided where they part from the context's own ids.

        Spaces between the two are the continuation's, as the harness has it. A token that the two share is the
        continuation's, too: the harness would leave it out, and a choice could come out without a token.
        """
        bare = context.rstrip()
        whole = self.tok_encode(context + continuation)
        alone = self.tok_encode(bare) if bare else list(self.contract.bos)
        shared = next((n for n, pair in enumerate(zip(whole, alone, strict=False)) if pair[0] != pair[1]), len(alone))
        shared = min(shared, len(whole))
        return whole[:shared] or self.before, whole[shared:]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_
    ) -> list[tuple[LogLikelihood, bool]]:
        sequences, wanted = [], []
        for _texts, context, continuation in requests:
            ids = self._fitting(context + continuation, self.context)
            sequences.append(ids)
            wanted.append(predicting(ids, max(len(ids) - len(continuation), 1)))
        pad, found = self.tokenizer.pad_token_id, [(LogLikelihood(0.0, 0), True)] * len(sequences)
        for rows in length_batches([len(ids) for ids in sequences], self.max_tokens):
            places = [wanted[row] for row in rows]
            pack = Pack.of([sequences[row] for row in rows], places, pad, self.model.device)
            logits = next_token_logits(self.model, outputs(self.model.base_model, pack), pad).float()
            right = logits.argmax(-1) == pack.targets
            sizes = [len(part) for part in places]
            logprobs = token_logprobs(logits, pack.targets).cpu().split(sizes)
            for row, values, greedy in zip(rows, logprobs, right.cpu().split(sizes), strict=True):
                found[row] = LogLikelihood(float(values.double().sum()), len(values)), bool(greedy.all())
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p(text) in nats, in windows of the model's context; every token is predicted once."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context - 1,
                context_len=1,
            )
            for before, tokens in map(make_disjoint_window, rolled):
                windows.append((("", ""), before, tokens))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    # ---- texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """An answer to each request, cut before the first of its stops."""
        texts = [""] * len(requests)
        for (longest, temperature, stops), rows in self._alike(requests).items():
            longest = min(longest, self.context // 2)  # half of what the model reads is the question's. Our choice
            prompts = []
            for row in rows:
                ids = self.tok_encode(self.frame.replace("{prompt}", requests[row].args[0])) or self.before
                prompts.append(self._fitting(ids, self.context - longest))
            completions = generate(
                self.model,
                prompts,
                max_new_tokens=longest,
                temperature=temperature,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                generator=torch.Generator().manual_seed(self.seed),
                batch_size=self.batch_size,
                max_tokens=self.max_tokens,
                stop_token_ids=sorted({self.eot_token_id}.union(*(self._stop_tokens(stop) for stop in stops))),
            )
            for row, completion in zip(rows, completions, strict=True):
                texts[row] = before_any(self.contract.decode(completion.ids), stops)
        return texts

    def _alike(self, requests: Iterable[Instance]) -> dict[tuple[int, float, tuple[str, ...]], list[int]]:
        """The numbers of the requests that can be answered together, by length, temperature and stops."""
        found: dict[tuple[int, float, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            options = request.args[1]
            until = options.get("until") or []
            stops = [*([until] if isinstance(until, str) else until), self.stop]
            longest = next((options[key] for key in ("max_gen_toks", "max_new_tokens") if options.get(key)), LONGEST)
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            key = int(longest), temperature, tuple(dict.fromkeys(filter(None, stops)))
            found.setdefault(key, []).append(number)
        return found

    def _stop_tokens(self, stop: str) -> list[int]:
        """Kept: a vocabulary is decoded for it."""
        if stop not in self._known_stops:
            self._known_stops[stop] = stop_tokens(self.contract, stop)
        return self._known_stops[stop]

    @cached_property
    def _known_stops(self) -> dict[str, list[int]]:
        return {}

    def _fitting(self, ids: list[int], most: int) -> list[int]:
        """The ids, or their end after what a text starts with."""
        if len(ids) <= most:
            return ids
        self.cut += 1
        start = len(self.contract.bos) if ids[: len(self.contract.bos)] == self.contract.bos else 0
        return ids[:start] + ids[len(ids) - most + start :]


def before_any(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop in it."""
    return text[: min((found for found in map(text.find, stops) if found >= 0), default=len(text))]
