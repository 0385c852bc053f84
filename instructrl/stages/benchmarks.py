"""What a model knows, apart from following instructions, which shows the alignment tax: multiple choice, held-out text.

Multiple choice goes by the mean log-probability per token of each choice at temperature 1, as in the paper (App. D; it
prints "lowest", which must be highest).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from instructrl.stages.contract import Contract
from instructrl.stages.tables import read_table
from instructrl.trainers.packing import Pack, outputs
from instructrl.trainers.rollout import length_batches, next_token_logits, score_logprobs

Question = tuple[list[int], list[list[int]]]
"""A context and its choices, as ids."""


def encode_tasks(rows: Sequence[dict], contract: Contract, context: int) -> list[Question]:
    """Rows of TASKS as ids, in the form of a pretraining document. What is too long loses its beginning."""
    plain, bos = contract.plain(), contract.bos
    known: dict[str, list[int]] = {}
    questions = []
    for row in rows:
        for text in row["choices"]:
            if text not in known:
                known[text] = plain.response(text)[:-1]
        choices = [known[text] for text in row["choices"]]
        room = context - max(map(len, choices)) - len(bos)
        questions.append((bos + plain.prompt(row["context"])[len(bos) :][-room:], choices))
    return questions


def task_results(
    model: PreTrainedModel, rows: Sequence[dict], questions: Sequence[Question], pad_token_id: int, max_tokens: int
) -> dict[str, list[int]]:
    """1 or 0 for each question of each task (rows of TASKS, and the same encoded)."""
    scores = choice_scores(model, questions, pad_token_id, max_tokens)
    results: dict[str, list[int]] = {}
    for row, of_choices in zip(rows, scores, strict=True):
        best = max(range(len(of_choices)), key=lambda number: of_choices[number])
        results.setdefault(row["task"], []).append(int(best == row["answer"]))
    return results


@torch.no_grad()
def choice_scores(
    model: PreTrainedModel,
    questions: Sequence[Question],
    pad_token_id: int,
    max_tokens: int,
) -> list[list[float]]:
    """Mean log-probability per token of each choice after its context.

    Choices that differ in their last token only share one forward pass: a question with one-word choices costs one.
    """
    inputs: dict[tuple[tuple[int, ...], int], list[tuple[int, int]]] = {}
    for question, (context, choices) in enumerate(questions):
        for number, choice in enumerate(choices):
            sequence = (*context, *choice[:-1])
            inputs.setdefault((sequence, len(context)), []).append((question, number))
    keys = list(inputs)
    scores = [[0.0] * len(choices) for _, choices in questions]
    for batch in length_batches([len(sequence) for sequence, _ in keys], max_tokens):
        rows = [keys[index] for index in batch]
        wanted = [range(before - 1, len(sequence)) for sequence, before in rows]
        pack = Pack.of([sequence for sequence, _ in rows], wanted, pad_token_id, model.device)
        hidden = outputs(model.base_model, pack)  # [choice positions, H]
        logits = next_token_logits(model, hidden, pad_token_id).float()  # [choice positions, V]
        places, tokens, owners, first = [], [], [], 0
        for sequence, before in rows:
            for question, number in inputs[sequence, before]:
                choice = questions[question][1][number]
                places += range(first, first + len(choice))
                tokens += choice
                owners.append((question, number, len(choice)))
            first += len(sequence) - before + 1
        at = torch.tensor(places, device=logits.device)
        found = logits[at, torch.tensor(tokens, device=logits.device)] - logits.logsumexp(-1)[at]
        for (question, number, _), part in zip(
            owners, found.cpu().split([length for _, _, length in owners]), strict=True
        ):
            scores[question][number] = float(part.mean())
    return scores


def text_losses(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], pad_token_id: int, max_tokens: int
) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, tokens) of each document, as ids; its first token is given."""
    logprobs = score_logprobs(
        model, documents, [1] * len(documents), temperature=1.0, pad_token_id=pad_token_id, max_tokens=max_tokens
    )
    losses = []
    for values in logprobs:
        known = torch.isfinite(values)  # a model whose padding token is <unk> cannot predict unknown characters
        losses.append((-float(values[known].double().sum()), int(known.sum())))
    return losses


def held_out_text(data: Path, limit: int) -> list[dict]:
    """The first `limit` held-out documents of each kind."""
    path = data / "text.valid.parquet"
    counts: dict[str, int] = {}
    kept = []
    for row in read_table(path) if path.exists() else []:
        counts[row["kind"]] = counts.get(row["kind"], 0) + 1
        if counts[row["kind"]] <= limit:
            kept.append(row)
    return kept
