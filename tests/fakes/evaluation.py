"""An evaluation's numbers, logs and samples as the stages leave them, made up: for tests of reports."""

import json
import math

import pyarrow
import pyarrow.parquet

from instructrl import jobs
from instructrl.artifacts import Artifact
from instructrl.recipe import compose_recipe
from instructrl.stages import report
from instructrl.stages.names import NAMES

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> ```\n## Win rates\n</pre> \x1b[31m\u202e {{ 7 * 7 }} & done"
)
RATES = {"gpt": 0.06, "gpt_prompted": 0.43, "sft": 0.5, "ppo": 0.64, "ppo_ptx": 0.6, "best_of_n": 0.63}
TASKS = {"facts": (0.9, 0.7, 0.68, 0.8), "sums": (0.7, 0.6, 0.62, 0.66)}
PAIRS = {
    "sft - gpt": (1, 0),
    "ppo - gpt": (2, 0),
    "ppo - sft": (2, 1),
    "ppo_ptx - ppo": (3, 2),
    "ppo_ptx - gpt": (3, 0),
}
CASES = ("generation", "open qa", HOSTILE)


def around(mean: float, half: float = 0.02) -> list[float]:
    return [mean, mean - half, mean + half]


def metrics(**more: object) -> dict:
    """What every evaluation writes; `more` are the keys that only some write."""
    models = {}
    for name, rate in RATES.items():
        place = {"gpt": 0, "gpt_prompted": 0, "sft": 1, "ppo": 2, "ppo_ptx": 3, "best_of_n": 1}[name]
        models[name] = {
            "name": NAMES.get(name, "SFT, best of 8"),
            "win_rate": around(rate) if name != "sft" else [0.5, 0.5, 0.5],
            "win_rate_greedy": around(rate - 0.05) if name != "best_of_n" else None,
            "length": around(9.5, 0.3),
            "ended": around(0.98, 0.01),
            "reward": around(rate * 2 - 1, 0.1),
            "kl": around(0.98, 0.05) if name.startswith("ppo") else None,
            "kl_bound": 1.2 if name == "best_of_n" else None,
            "tasks": {task: around(values[place]) for task, values in TASKS.items()},
            "tasks_average": around(0.7),
            "text_loss": {"stories": around(0.7 + place / 3)},
            "text_loss_all": around(0.7 + place / 3),
        }
    changes = {task: {key: around(v[a] - v[b]) for key, (a, b) in PAIRS.items()} for task, v in TASKS.items()}
    found = {
        "recipe": "base",
        "seed": 0,
        "model": "made by pretrain",
        "judge": "gold",
        "judge_description": "the built-in world's gold preference",
        "judge_held_out": True,
        "labels": None,
        "prompts": 24,
        "temperature": 1.0,
        "weights": "last",
        "references": {"ppo": "sft", "ppo_ptx": "sft"},
        "prefix": {},
        "models": models,
        "tax": {"tasks": changes, "text_loss": {}},
        "reward_model": [],
        "judge_model": None,
        "versions": {"instructrl": "0"},
        "claims": [
            {"claim": "SFT < PPO", "number": around(0.64), "border": 0.5, "verdict": "holds"},
            {"claim": "SFT < PPO-ptx", "number": around(0.5), "border": 0.5, "verdict": "undecided"},
        ],
        "use_cases": {
            case: {"prompts": 8, "win_rate": {name: around(rate, 0.1) for name, rate in RATES.items() if name != "sft"}}
            for case in CASES
        },
    }
    found["table"] = report.table(found)
    found["use_case_table"] = {"columns": ["use case", "prompts"], "rows": [[case, "8"] for case in CASES], "notes": []}
    return found | more


MORE = {
    "matrix": {a: {b: around(0.5 + (RATES[a] - RATES[b]) / 2) for b in RATES if b != a} for a in RATES},
    "judge_card": {
        "name": "a-model",
        "prompts": 24,
        "same_answers": 1,
        "ties": 3,
        "no_verdict": 0,
        "refusals": 0,
        "unparsable": 0,
        "first_position_wins": around(0.5),
        "order_agreement": around(0.9),
        "position_biased": False,
        "calls": 48,
        "cached": 0,
        "retried": 0,
        "tokens": {"prompt": 4800, "completion": 480},
        "cost": None,
        "notes": ["Asked in both orders."],
    },
    "likert": {"sft": around(4.1, 0.1), "ppo": around(5.2, 0.1)},
    "metadata": {"hallucination": {"sft": around(0.2), "ppo": around(0.1)}},
    "harness": [
        {
            "task": task,
            "metric": "accuracy",
            "higher_is_better": True,
            "shots": 15,
            "prompt": None,
            "n": 128,
            "cut": {"gpt": 0},
            "recovery": around(0.09, 0.03),
            "models": {name: around(0.6) for name in ("gpt", "sft", "ppo", "ppo_ptx")},
            "deltas": {
                name: around(shift, 0.03) for name, shift in (("sft", -0.02), ("ppo", -0.1), ("ppo_ptx", -0.01))
            },
            "verdict": {"sft": "unchanged", "ppo": "taxed", "ppo_ptx": "recovered"},
        }
        for task in ("rte", "sst")
    ],
    "overoptimisation": {
        "policies": {
            name: [
                {
                    "step": 4 * step,
                    "episodes": 128 * step,
                    "kl": 0.3 * step**2,
                    "distance": math.sqrt(0.3) * step,
                    "proxy": around(0.4 * step, 0.1),
                    "judge": around(0.5 + 0.1 * step - 0.02 * step**2),
                    "win_rate": around(0.5 + 0.05 * step - 0.01 * step**2),
                    "length": 9.0,
                }
                for step in range(6)
            ]
            for name in ("ppo", "ppo_ptx")
        },
        "best_of_n": [
            {
                "n": n,
                "kl_bound": math.log(n) - (n - 1) / n,
                "distance": math.sqrt(math.log(n) - (n - 1) / n),
                "proxy": around(0.3 * n),
                "judge": around(0.5 + 0.02 * n),
            }
            for n in (1, 2, 4, 8)
        ],
        "best_by_judge": {"ppo": 8, "ppo_ptx": 8},
        "best_by_proxy": {"ppo": 20, "ppo_ptx": 20},
        "lost_since_best": {"ppo": around(0.1), "ppo_ptx": around(0.1)},
        "by_length": [
            {
                "bucket": "1-5 tokens",
                "n": {"sft": 30, "ppo": 31, "ppo_ptx": 8},
                "gain": {"ppo": around(0.3), "ppo_ptx": None},
            }
        ],
        "within_length": {
            "ppo": {"gain": around(0.4), "within": around(0.3)},
            "ppo_ptx": {"gain": around(0.4), "within": None},
        },
        "notes": ["The judge peaks before the proxy."],
    },
    "scorecard": [
        {
            "claim": "C1",
            "text": "Labelers prefer PPO-ptx to SFT",
            "paper": {"number": "71 %", "where": "Fig. 1"},
            "yours": {"number": around(0.6), "n": 24, "note": "on the closest task"},
            "verdict": "direction only",
            "scale": "0.4 M parameters against 175 B.",
        },
        {
            "claim": "C2",
            "text": "K-wise beats shuffled pairs",
            "paper": {"number": "better", "where": "App. C.2"},
            "yours": {"number": None, "n": None, "note": ""},
            "verdict": "not measured",
            "scale": "One world.",
        },
    ],
}
"""All the keys of `metrics.json` that only some evaluations write."""


def samples(count: int = 24) -> list[dict]:
    """Rows of samples.parquet: prompts of three use cases in turn; PPO's first answer is hostile."""
    rows = []
    for name in RATES:
        for temperature in (1.0, 0.0):
            for number in range(count):
                answer = HOSTILE if (name, number) == ("ppo", 0) else f"{name} says {number} at {temperature:g}"
                rows.append(
                    {
                        "prompt": f"Prompt {number}?",
                        "category": CASES[number % 3],
                        "source": "made up",
                        "model": name,
                        "temperature": temperature,
                        "response": "" if (name, number) == ("gpt", 1) else answer,
                        "reward": 0.25,
                        "tokens": 5,
                        "against_sft": 0.5 if name == "sft" else float(number % 2),
                    }
                )
    return rows


def ppo_log(ptx: bool, lines: int = 8) -> list[dict]:
    """As the PPO trainer logs, a line an iteration, and the summary of held-out prompts at the end."""
    found = []
    for number in range(1, lines + 1):
        line = {"step": 2 * number, "episode": 128 * number, "objective/scores": number / 4, "objective/kl": number / 8}
        line |= {"completions/mean_length": 9 + number / 9, "objective/entropy": 12 - number, "grad_norm": 1.5}
        line |= {"val/num_eos_tokens": 512, "critic/grad_norm": 2.0, "policy/clipfrac_avg": 0.1}
        line |= {"val/explained_var": None if number == 1 else 0.5, "objective/kl_coef": 0.3}
        found.append(line | ({"loss/ptx": 2.0, "ptx/grad_norm": 0.5, "ptx/grad_ratio": 0.4} if ptx else {}))
    return [*found, {"step": 2 * lines, "eval_objective/scores": 1.0}]


def supervised_log(lines: int = 8) -> list[dict]:
    return [
        {"step": 10 * n, "loss": 3 / n, "mean_token_accuracy": 1 - 1 / n, "grad_norm": 1.0} for n in range(1, lines + 1)
    ]


def make(arguments: list[str], more: dict | None = None, logs: bool = True) -> Artifact:
    """The artifacts of a recipe, as if it had run to its end; returns that of eval. `more`: of `metrics.json`."""
    job = jobs.plan_job(None, arguments, (), compose_recipe(arguments), {})
    made: dict[str, Artifact] = {}
    for step in job.plan:
        name = step.stage.name
        if step.artifact:
            made[name] = step.artifact
            continue
        folder = job.store.partial(name, step.key)
        folder.mkdir(parents=True)
        log = ppo_log(name == "ppo_ptx") if name in ("ppo", "ppo_ptx") else supervised_log()
        if logs and name in ("pretrain", "sft", "reward_model", "ppo", "ppo_ptx"):
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        if name == "eval":
            (folder / "order.json").write_text(json.dumps({"recipe": job.composition.recipe.model_dump(mode="json")}))
            (folder / "metrics.json").write_text(json.dumps(metrics(**(more or {}))))
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(samples()), folder / "samples.parquet")
        digests = {need: made[need].digest for need in step.stage.needs if need in made}
        facts = {
            "seconds": 1.5,
            "published": 1_000_000_000.0,
            "at": "2026-01-01",
            "host": "here",
            "packages": {"torch": "2.13"},
        }
        made[name] = job.store.publish(name, step.key, digests, facts, {})
    return made["eval"]
