"""PPO's snapshots at work in an evaluation: each answers the held-out prompts and is scored, each in a file of its own.

A piece is one snapshot, `ppo@000004`, or the last weights, where the evaluation's own PPO answers with others.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instructrl.stages import answers, judging, overoptimisation
from instructrl.stages.answers import Answer
from instructrl.stages.judging import BASELINE, BEST, Scorer
from instructrl.stages.models import load_policy
from instructrl.stages.overoptimisation import Point
from instructrl.stages.scores import log_ratios
from instructrl.stages.snapshots import iterations, kept

if TYPE_CHECKING:
    from instructrl.stages.scores import Scores
    from instructrl.stages.study import Study

POLICIES = ("ppo", "ppo_ptx")


def pieces(study: "Study") -> dict[str, Path]:
    """{piece: folder of its weights}; none where no snapshot was kept, or where answers are greedy and have no KL."""
    found: dict[str, Path] = {}
    if study.recipe.eval.temperature == 0:
        return found
    for policy in POLICIES:
        snapshots = kept(study.inputs[policy])
        if snapshots and study.recipe.eval.weights != "last":
            snapshots[iterations(getattr(study.recipe, policy))] = study.inputs[policy] / "model"
        found |= {f"{policy}@{iteration:06d}": folder for iteration, folder in snapshots.items()}
    return found


def ask(study: "Study", piece: str, folder: Path) -> None:
    """Leave a snapshot's answers and scores on the disk, unless they are there."""
    study.keep(piece, lambda: answered(study, folder))


def answered(study: "Study", folder: Path) -> dict:
    """{answers, proxy, judge, kl}, each [prompts]."""
    recipe = study.recipe
    model = load_policy(folder, recipe)
    ids = [row["ids"] for row in study.prompts]
    given = answers.sample(model, ids, study.contract, recipe, recipe.eval.temperature)
    proxy = Scorer(study.inputs["reward_model"] / "model", recipe).scores(study.prompts, given, study.pad)
    return {
        "answers": [one.to_json() for one in given],
        "proxy": proxy.tolist(),
        "judge": judge_scores(study, study.prompts, given),
        "kl": log_ratios(study, study.model(BASELINE), given).tolist(),
    }


def judge_scores(study: "Study", prompts: list[dict], given: list[Answer]) -> list[float] | None:
    """What the gold preference, or the judge that learnt, gives each answer; None where neither is there."""
    if study.recipe.data.world:
        return [one["utility"] for one in judging.gold_judgements(study.recipe, prompts, given)]
    if "judge" in study.inputs:
        return Scorer(study.inputs["judge"] / "model", study.recipe).scores(prompts, given, study.pad).tolist()
    return None


def points(study: "Study", scores: "Scores", policy: str) -> list[Point]:
    """The policy's trajectory, from SFT, where it began there, to its last weights."""
    asked = [piece for piece in pieces(study) if piece.startswith(f"{policy}@")]
    found = [read(study, piece) for piece in asked]
    if found and study.recipe.eval.weights == "last":
        found.append(own(study, scores, policy, iterations(getattr(study.recipe, policy))))
    if found and getattr(study.recipe, policy).init == BASELINE:
        found.insert(0, own(study, scores, BASELINE, 0))
    return found


def read(study: "Study", piece: str) -> Point:
    """What `ask` left on the disk."""
    found = study.found(piece)
    lengths = [Answer(**row).length for row in found["answers"]]
    return Point(int(piece.partition("@")[2]), lengths, found["proxy"], found["kl"], found["judge"])


def own(study: "Study", scores: "Scores", name: str, iteration: int) -> Point:
    """One of the evaluation's own models as a point."""
    key = (name, study.recipe.eval.temperature)
    given = study.answers[name][key[1]]
    judged = judge_scores(study, study.prompts, given)
    return Point(iteration, [one.length for one in given], scores.rewards[key], scores.kl[key], judged)


def measure(study: "Study", scores: "Scores") -> dict:
    """`overoptimisation` of `metrics.json`: {policies, best_of_n, best_by_judge, best_by_proxy, lost_since_best,
    by_length, within_length, notes}."""
    recipe, t = study.recipe, study.recipe.eval.temperature
    samples = recipe.eval.bootstrap_samples
    trajectories = {policy: points(study, scores, policy) for policy in POLICIES}
    trajectories = {policy: found for policy, found in trajectories.items() if found}
    judged = {policy: found for policy, found in trajectories.items() if found[0].judge is not None}
    baseline = judge_scores(study, study.prompts, study.answers[BASELINE][t]) if judged else None
    drawn = study.found(BEST).get("drawn") if BEST in study.names else None
    rewards = {name: scores.rewards[name, t] for name in (BASELINE, *POLICIES)}
    lengths = {name: [one.length for one in study.answers[name][t]] for name in rewards}
    gains, within = overoptimisation.by_length(
        {name: (lengths[name], rewards[name]) for name in POLICIES}, (lengths[BASELINE], rewards[BASELINE]), samples
    )
    return {
        "judge": "gold" if recipe.data.world else "reward_model" if "judge" in study.inputs else None,
        "policies": {
            policy: overoptimisation.curve(found, getattr(recipe, policy).batch_size, baseline, samples)
            for policy, found in trajectories.items()
        },
        "best_by_judge": {policy: overoptimisation.best(found, "judge").iteration for policy, found in judged.items()},
        "best_by_proxy": {
            policy: overoptimisation.best(found, "proxy").iteration for policy, found in trajectories.items()
        },
        "lost_since_best": {
            policy: list(
                overoptimisation.difference(overoptimisation.best(found, "judge").judge, found[-1].judge, samples)
            )
            for policy, found in judged.items()
        },
        "best_of_n": overoptimisation.best_of_n(
            np.transpose(drawn["proxy"]), np.transpose(drawn["judge"]) if drawn["judge"] else None, samples
        )
        if drawn
        else [],
        "by_length": gains,
        "within_length": within,
        "notes": notes(study, trajectories, bool(drawn)),
    }


def notes(study: "Study", trajectories: dict, drawn: bool) -> list[str]:
    """What must be known to read the numbers, and what was not measured."""
    recipe = study.recipe
    found = []
    if trajectories:
        judge = "the gold preference" if recipe.data.world else "the judge, another reward model,"
        scored = recipe.data.world or "judge" in study.inputs
        found.append(
            "The reward that PPO climbs is a proxy; "
            + (
                f"what {judge} says of the same answers shows where it goes too far (Gao et al. 2022). "
                if scored
                else ""
            )
            + "Over sqrt(KL from SFT, nats an answer), the policies' last weights after so many iterations, on all "
            "held-out prompts; in brackets 95 % intervals over prompts."
        )
        apart = [policy for policy in trajectories if getattr(recipe, policy).init != BASELINE]
        if apart:
            found.append(f"{' and '.join(judging.NAMES[name] for name in apart)} did not start from SFT.")
    else:
        found.append(
            "No policies along the way were kept: set ppo.snapshots and ppo_ptx.snapshots."
            if recipe.eval.temperature
            else "Greedy answers have no KL, so there is no curve: set eval.temperature."
        )
    if drawn:
        found.append(
            "Best of n: the expected reward and score of the best by reward of n of SFT's answers, for every n from "
            f"the same {recipe.eval.best_of_n} answers by the unbiased estimator (Nakano et al. 2021, App. I)."
        )
    return found
