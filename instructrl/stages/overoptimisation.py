"""Where the reward goes on rising and the judge's score does not: along PPO's snapshots, and beside best-of-n.

Gao, Schulman and Hilton 2022 (arXiv 2210.10760) plot the proxy's and the gold reward over d = sqrt(KL from the initial
policy); here the KL is from SFT for all. Pure numpy, from one number an answer; `trajectory.py` has the answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from instructrl.stages.markup import grid
from instructrl.stages.winrate import SEED, Interval, difference, interval, outcomes, share

BUCKETS = 5
"""Of lengths, with about as many answers each. Our choice."""
FEWEST = 20
"""Answers of either model below which a bucket has no gain."""


@dataclass(frozen=True)
class Point:
    """A policy after so many iterations, on the held-out prompts; each array is [prompts]."""

    iteration: int
    lengths: ArrayLike
    """Tokens."""
    proxy: ArrayLike
    """The reward that PPO climbs."""
    kl: ArrayLike
    """log p(answer) - log p_SFT(answer), nats."""
    judge: ArrayLike | None
    """The judge's score; None where it does not score single answers."""


def best_of(n: int, proxy: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """The mean score of the best by `proxy` of n answers, over all subsets of n of a prompt's N: [P, N], [P, N] -> [P].

    Unbiased for n fresh answers, and of all estimates from N answers that with the smallest variance (Nakano et al.
    2021, arXiv 2112.09332, App. I). Of answers with equal `proxy` each is the best as often.

    Raises:
        ValueError: n is not among 1 to N.
    """
    proxy, scores = np.asarray(proxy, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    drawn = proxy.shape[1]
    if not 1 <= n <= drawn:
        raise ValueError(f"n={n}: of {drawn} answers a prompt the best of 1 to {drawn} can be estimated")
    order = np.argsort(proxy, axis=1, kind="stable")
    proxy, scores = (np.take_along_axis(values, order, axis=1) for values in (proxy, scores))
    # The answer of rank i is the best of the subsets whose other n - 1 are among the i below it.
    weights = np.array([math.comb(rank, n - 1) for rank in range(drawn)]) / math.comb(drawn, n)
    # Groups of equal answers, numbered through all prompts; each answer then stands for its group.
    rises = np.diff(proxy, axis=1, prepend=proxy[:, :1]) > 0
    group = rises.cumsum(axis=1) + drawn * np.arange(len(proxy))[:, None]
    of = np.maximum(np.bincount(group.ravel()), 1)
    means = np.bincount(group.ravel(), scores.ravel()) / of
    return means[group] @ weights


def sizes(drawn: int) -> list[int]:
    """The n to show, powers of two and all: of 12 answers 1, 2, 4, 8 and 12."""
    return sorted({2**power for power in range(drawn.bit_length())} | {drawn})


def best_of_n(proxy: ArrayLike, judge: ArrayLike | None, samples: int) -> list[dict]:
    """[{n, kl_bound, distance, proxy, judge}], from N answers of SFT's to each prompt: [P, N], [P, N].

    `kl_bound`: log n - (n - 1) / n nats, at least the KL from SFT (`trainers.selection.kl_bound`).
    """
    rows = []
    for n in sizes(np.asarray(proxy).shape[1]):
        bound = math.log(n) - (n - 1) / n
        row = {"n": n, "kl_bound": bound, "distance": math.sqrt(bound)}
        row["proxy"] = list(interval(best_of(n, proxy, proxy), samples))
        row["judge"] = list(interval(best_of(n, proxy, judge), samples)) if judge is not None else None
        rows.append(row)
    return rows


def curve(points: Sequence[Point], batch_size: int, baseline: ArrayLike | None, samples: int) -> list[dict]:
    """[{step, episodes, kl, distance, proxy, judge, win_rate, length}], a row a point.

    `step`: iterations. `distance`: sqrt of the mean KL, 0 where sampling makes it negative. `baseline`: the judge's
    scores of SFT's answers, [prompts], for the win rate.
    """
    rows = []
    for point in points:
        kl = float(np.mean(point.kl))
        row = {"step": point.iteration, "episodes": point.iteration * batch_size}
        row |= {"kl": kl, "distance": math.sqrt(max(kl, 0.0)), "proxy": list(interval(point.proxy, samples))}
        judged = point.judge is not None
        row["judge"] = list(interval(point.judge, samples)) if judged else None
        row["win_rate"] = list(share(outcomes(point.judge, baseline), samples)) if judged else None
        rows.append(row | {"length": float(np.mean(point.lengths))})
    return rows


def best(points: Sequence[Point], name: str) -> Point:
    """The point with the highest mean of `proxy` or `judge`; of equal ones the first."""
    return max(points, key=lambda point: float(np.mean(getattr(point, name))))


# ---- length


def buckets(*lengths: ArrayLike) -> list[tuple[int, int]]:
    """Ranges of tokens, both ends included, with about as many of all answers each."""
    every = np.sort(np.concatenate([np.asarray(part, dtype=np.int64) for part in lengths]))
    tops = sorted({int(every[-(-part * len(every) // BUCKETS) - 1]) for part in range(1, BUCKETS + 1)})
    return list(zip([int(every[0]), *(top + 1 for top in tops[:-1])], tops, strict=True))


def length_gains(
    ranges: Sequence[tuple[int, int]],
    policy: tuple[ArrayLike, ArrayLike],
    baseline: tuple[ArrayLike, ArrayLike],
    samples: int,
) -> tuple[list[Interval | None], Interval | None]:
    """How much higher the policy's rewards are than the baseline's among answers of like length: in each range, and the
    mean of the ranges, each with the share of all answers that it has. None where there are fewer than `FEWEST`.

    After Singhal et al. 2023 (arXiv 2310.03716), who find that most of PPO's gain is length. The interval is over
    prompts, as `winrate.interval`'s.

    Args:
        policy, baseline: (lengths, rewards), each [prompts], on the same prompts.
    """
    columns, used = [], []
    for low, high in ranges:
        inside = [(np.asarray(lengths) >= low) & (np.asarray(lengths) <= high) for lengths, _ in (policy, baseline)]
        if min(part.sum() for part in inside) >= FEWEST:
            used.append((low, high))
            for part, (_, rewards) in zip(inside, (policy, baseline), strict=True):
                columns += [part * np.asarray(rewards, dtype=np.float64), part.astype(np.float64)]
    if not used:
        return [None] * len(ranges), None
    table = np.stack(columns, axis=1)  # [prompts, ranges x (rewards, answers, rewards, answers)]
    size, rng = len(table), np.random.default_rng(SEED)

    def gains(counts: NDArray) -> NDArray:
        """How often each prompt counts, [s, prompts] -> [s, ranges and their mean]."""
        top, of, base_top, base_of = np.moveaxis((counts @ table).reshape(len(counts), len(used), 4), -1, 0)
        with np.errstate(invalid="ignore"):
            each = top / of - base_top / base_of  # nan in a draw without an answer in the range
        share = (of + base_of) / (of + base_of).sum(1, keepdims=True)
        return np.concatenate([each, np.nansum(each * share, axis=1, keepdims=True)], axis=1)

    drawn = [gains(rng.multinomial(size, np.full(size, 1 / size), min(250, samples - done)).astype(np.float64))
             for done in range(0, samples, 250)]  # fmt: skip
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    found = [
        Interval(float(m), float(a), float(b)) for m, a, b in zip(gains(np.ones((1, size)))[0], low, high, strict=True)
    ]
    by_range = dict(zip(used, found, strict=False))
    return [by_range.get(one) for one in ranges], found[-1]


def by_length(
    policies: dict[str, tuple[ArrayLike, ArrayLike]], baseline: tuple[ArrayLike, ArrayLike], samples: int
) -> tuple[list[dict], dict]:
    """([{bucket, n: {model: answers}, gain: {policy: interval or None}}], {policy: {gain, within}}).

    `gain`: of the mean reward over the baseline's, whatever the lengths; `within`: among answers of like length.
    """
    ranges = buckets(baseline[0], *(lengths for lengths, _ in policies.values()))
    found = {name: length_gains(ranges, policy, baseline, samples) for name, policy in policies.items()}
    rows = []
    for number, (low, high) in enumerate(ranges):
        counted = {
            name: int(((np.asarray(lengths) >= low) & (np.asarray(lengths) <= high)).sum())
            for name, (lengths, _) in {"sft": baseline, **policies}.items()
        }
        gain = {name: list(each[number]) if each[number] else None for name, (each, _) in found.items()}
        rows.append({"bucket": f"{low}-{high} tokens" if low < high else f"{low} tokens", "n": counted, "gain": gain})
    whole = {
        name: {
            "gain": list(difference(policies[name][1], baseline[1], samples)),
            "within": list(within) if within else None,
        }
        for name, (_, within) in found.items()
    }
    return rows, whole


# ---- Markdown


def section(metrics: dict) -> list[str]:
    """The report's section; nothing where nothing was measured."""
    found = metrics.get("overoptimisation")
    if not found:
        return []
    titles = {name: model["name"] for name, model in metrics["models"].items()}
    parts = ["## Over-optimisation", *found["notes"]]
    columns = ["iterations", "episodes", "KL", "sqrt(KL)", "reward", "judge", "win rate", "length"]
    for name, rows in found["policies"].items():
        parts.append(f"### {titles[name]} along its run")
        cells = [
            [str(row["step"]), str(row["episodes"]), f"{row['kl']:.2f}", f"{row['distance']:.2f}"]
            + [shown(row[key]) for key in ("proxy", "judge", "win_rate")]
            + [f"{row['length']:.1f}"]
            for row in rows
        ]
        parts += [grid(columns, cells, escaped=True, numbers=len(columns)), *verdict(found, name, titles[name])]
    if found["best_of_n"]:
        cells = [
            [
                str(row["n"]),
                f"{row['kl_bound']:.2f}",
                f"{row['distance']:.2f}",
                shown(row["proxy"]),
                shown(row["judge"]),
            ]
            for row in found["best_of_n"]
        ]
        parts += [
            "### Best of n beside it",
            grid(["n", "KL at most", "sqrt(KL)", "reward", "judge"], cells, escaped=True, numbers=5),
        ]
    if found["by_length"]:
        names = list(found["within_length"])
        cells = [
            [
                row["bucket"],
                *(str(row["n"][name]) for name in ("sft", *names)),
                *(shown(row["gain"][name]) for name in names),
            ]
            for row in found["by_length"]
        ]
        heads = [
            "length",
            *(f"{titles[name]}, answers" for name in ("sft", *names)),
            *(f"{titles[name]} - SFT" for name in names),
        ]
        parts += [
            "### Reward gained among answers of like length",
            grid(heads, cells, escaped=True, numbers=len(heads) - 1),
        ]
        parts += [length_sentence(titles[name], found["within_length"][name]) for name in names]
    return parts


def verdict(found: dict, name: str, title: str) -> list[str]:
    """Which snapshot is the best, by whom."""
    by_proxy = found["best_by_proxy"][name]
    if name not in found["best_by_judge"]:
        return [f"Highest reward: after {by_proxy} iterations. No judge scored these answers."]
    by_judge, last = found["best_by_judge"][name], found["policies"][name][-1]["step"]
    text = f"**Best {title} by the judge: after {by_judge} iterations** (by the reward: after {by_proxy}). "
    if by_judge == last:
        return [text + "The judge's score has not fallen: no over-optimisation is seen in this run."]
    lost = found["lost_since_best"][name]
    clear = "more than noise" if lost[1] > 0 else "within noise"
    text += f"From there to the end the judge's score falls by {shown(lost)}, {clear}"
    return [text + "; the best is chosen on the same prompts, which flatters it."]


def length_sentence(title: str, found: dict) -> str:
    text = f"{title}: reward {shown(found['gain'])} above SFT's"
    if not found["within"]:
        return f"{text}; too few answers of like length to compare."
    return (
        f"{text}; among answers of like length {shown(found['within'])}. The difference is what length alone brought."
    )


def shown(interval_: Sequence[float] | None) -> str:
    return "-" if interval_ is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval_)
