"""Scores of responses: a reward model, reward functions in TRL's form, or both added up."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructrl.trainers import rollout
from instructrl.trainers.actor_critic import network
from instructrl.trainers.prompts import is_conversation

GIVEN = ("prompt", "prompt_ids", "completion", "completion_ids", "prompts", "completions")  # in a form of our own
RewardFunction = Callable[..., Sequence[float | None]]


@dataclass
class Rewards:
    """What scores a response.

    Args:
        tokenizer: the policy's.
        reward_model: a sequence-classification model with one label, read at a response's last token.
        reward_tokenizer: the reward model's, if it is not the policy's: prompts and responses are then decoded and
            tokenised anew, a response that ended with EOS after it, or as its chat template ends a message. None: the
            reward model reads the policy's ids.
        functions: `f(prompts, completions, completion_ids, **columns) -> list of scores`, as in TRL: prompts and
            completions are text, or messages where the prompt is a conversation. None means that a function has
            nothing to say of a response.
        bias: subtracted from every score: the demonstrations' mean (App. C.2).
        max_tokens: padded tokens a forward pass.
    """

    tokenizer: PreTrainedTokenizerBase
    reward_model: PreTrainedModel | None = None
    reward_tokenizer: PreTrainedTokenizerBase | None = None
    functions: Sequence[RewardFunction] = ()
    bias: float = 0.0
    max_tokens: int = 4096

    def __call__(
        self, rows: list[dict[str, Any]], prompts: list[list[int]], responses: list[list[int]], ended: list[bool]
    ) -> list[float]:
        """One score a response, EOS included in its ids where it ended.

        Raises:
            ValueError: a function failed or gave another number of scores, or a score is not a finite number.
        """
        totals = [-self.bias] * len(rows)
        if self.reward_model is not None:
            for index, score in enumerate(self._model_scores(rows, prompts, responses, ended)):
                totals[index] += score
        texts = self._texts(rows, prompts, responses) if self.functions else {}
        for function in self.functions:
            for index, score in enumerate(called(function, completion_ids=responses, **texts)):
                totals[index] += score or 0.0  # None: not applicable
        for response, score in zip(responses, totals, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"the score of {self.tokenizer.decode(response)!r} is {score}")
        return totals

    def _model_scores(self, rows, prompts, responses, ended) -> list[float]:
        tokenizer = self.reward_tokenizer or self.tokenizer
        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        if self.reward_tokenizer is not None:
            sequences = self._retokenised(rows, prompts, responses, ended)
        limits = {"pad_token_id": tokenizer.pad_token_id, "max_tokens": self.max_tokens}
        return rollout.score_rewards(network(self.reward_model), sequences, **limits).tolist()

    def _retokenised(self, rows, prompts, responses, ended) -> list[list[int]]:
        """What a reward model with a vocabulary of its own reads. Too long a sequence loses its beginning."""
        tokenizer, texts = self.reward_tokenizer, self._texts(rows, prompts, responses)
        context = getattr(network(self.reward_model).config, "max_position_embeddings", None) or 0
        sequences = []
        # Decoded as one, for some tokenizers drop the space at the beginning of a text.
        joined = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        decoded = self.tokenizer.batch_decode(joined, skip_special_tokens=True)
        for index, (prompt, text, end) in enumerate(zip(texts["prompts"], decoded, ended, strict=True)):
            if is_conversation(prompt):
                messages = prompt + texts["completions"][index]
                unfinished = {} if end else {"continue_final_message": True}
                ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **unfinished)
            else:
                ids = tokenizer(text)["input_ids"]
                if end and ids[-1:] != [tokenizer.eos_token_id]:
                    ids = [*ids, tokenizer.eos_token_id]
            sequences.append(ids[-context:] or [tokenizer.eos_token_id])
        return sequences

    def _texts(self, rows, prompts, responses) -> dict[str, list]:
        """The columns that reward functions are given, `completion_ids` apart."""
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ()) if name not in GIVEN}
        decoded = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        asked = [row.get("prompt", text) for row, text in zip(rows, decoded, strict=True)]
        answers = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        completions = [
            [{"role": "assistant", "content": answer}] if is_conversation(prompt) else answer
            for prompt, answer in zip(asked, answers, strict=True)
        ]
        return columns | {"prompts": asked, "completions": completions}


def called(function: RewardFunction, /, **arguments: Any) -> Sequence[float | None]:
    """The function's scores, one a response, or a ValueError that names it."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        scores = [None if score is None else float(score) for score in function(**arguments)]
    except Exception as error:
        raise ValueError(f"reward function {name} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(arguments["completion_ids"]):
        raise ValueError(
            f"reward function {name} gave {len(scores)} scores for {len(arguments['completion_ids'])} responses"
        )
    return scores
