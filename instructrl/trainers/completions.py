"""Tables of sampled completions: what the policy says, which no curve shows."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from instructrl.trainers.experience import Episodes


def write_completions(episodes: Episodes, tokenizer: PreTrainedTokenizerBase, path: Path, count: int) -> None:
    """One JSON object a line, of the first `count` episodes:

    prompt, completion (special tokens left out), score (bias subtracted), reward (with the penalty for a missing EOS
    and for KL), kl (nats), length (tokens, EOS included), ended (with EOS).
    """
    mask = episodes.mask
    kl = (episodes.old_logprobs - episodes.ref_logprobs).mul(mask).sum(1).tolist()
    rewards = (episodes.final_scores - episodes.kl_coef * episodes.kl.mul(mask).sum(1)).tolist()
    prompts = tokenizer.batch_decode(episodes.prompts[:count], skip_special_tokens=True)
    completions = tokenizer.batch_decode(episodes.responses[:count], skip_special_tokens=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            line = {
                "prompt": prompt,
                "completion": completion,
                "score": episodes.scores[row].item(),
                "reward": rewards[row],
                "kl": kl[row],
                "length": int(mask[row].sum()),
                "ended": bool(episodes.ended[row]),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
