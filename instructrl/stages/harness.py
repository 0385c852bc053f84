"""The public tasks of `eval.tasks`, run on every model by lm-evaluation-harness.

What a model does on a task is kept in `checkpoints/harness/`, so that an evaluation that was interrupted asks nothing
twice. Kept are not only a task's metrics but their bootstrap draws over its questions: every model answers the same
questions, and the draws of all models take the same ones, so that their differences are paired.
"""

import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task as HarnessTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from instructrl import tasks
from instructrl.config import Recipe, Source, Task
from instructrl.errors import UserError
from instructrl.stages import sources
from instructrl.stages.harness_model import Policy
from instructrl.stages.judging import NAMES
from instructrl.stages.models import device
from instructrl.stages.toxicity import Toxicity
from instructrl.stages.winrate import SEED

if TYPE_CHECKING:
    from instructrl.stages.study import Study

FOLDER = "checkpoints/harness"
SLOW_DRAWS = 100
"""Bootstrap draws of a stock task's metric that is no mean; the harness's own number for BLEU, chrF and TER."""

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what its own defaults do


@dataclass(frozen=True)
class Trial:
    """One task with one of its prompts: what all models are asked."""

    number: int
    """The task's place in `eval.tasks`."""
    task: Task
    prompt: str | None

    @property
    def key(self) -> str:
        return f"eval.tasks[{self.number}]"

    def title(self, name: str) -> str:
        """The name of one of its tasks for a reader: what reads any file is named with the file."""
        card = tasks.cards().get(name)
        generic = card and card.n is None and self.task.path
        return f"{name}: {Path(self.task.path).name.partition('.')[0]}" if generic else name

    @property
    def file(self) -> str:
        """The name of what is kept of it."""
        parts = [f"{self.number:03}", self.task.task, *([self.prompt] if self.prompt else [])]
        return re.sub(r"[^\w.-]", "_", "-".join(parts)) + ".json"


def trials(recipe: Recipe) -> list[Trial]:
    """Each task with the prompt that the recipe names, or with each that it has."""
    found = []
    for number, task in enumerate(recipe.eval.tasks):
        card = tasks.cards().get(task.task)
        prompts = [task.prompt] if task.prompt else list(card.prompts) if card and card.prompts else [None]
        found += [Trial(number, task, prompt) for prompt in prompts]
    return found


class Harness:
    """The tasks and the models of one evaluation."""

    def __init__(self, study: "Study") -> None:
        self.study, self.trials = study, trials(study.recipe)
        self.names = [name for name in study.names if name in NAMES]  # best-of-n has SFT's weights

    def __len__(self) -> int:
        return len(self.names) * len(self.trials)

    def done(self) -> int:
        """How many trials of how many models are kept."""
        return sum(self.file(name, trial).exists() for name in self.names for trial in self.trials)

    def file(self, name: str, trial: Trial) -> Path:
        return self.study.folder / FOLDER / name / trial.file

    def ask(self, name: str, told: Callable[[], None] = lambda: None) -> None:
        """Leave what a model does on every task on the disk, unless it is there. `told` is called after each."""
        left = [trial for trial in self.trials if not self.file(name, trial).exists()]
        policy = self.policy(name) if left else None
        for trial in left:
            found = run(trial, policy, self.study.recipe)
            kept = self.file(name, trial)
            kept.parent.mkdir(parents=True, exist_ok=True)
            half = kept.with_suffix(".tmp")
            half.write_text(json.dumps(found))
            half.rename(kept)
            told()

    def policy(self, name: str) -> Policy:
        """One of the models. GPT (prompted) reads every task behind the prefix that was chosen for it."""
        study, runtime = self.study, self.study.recipe.runtime
        prompted = name == "gpt_prompted"
        return Policy(
            study.model(name),
            study.contract,
            study.context,
            max_tokens=runtime.max_tokens,
            batch_size=runtime.generation_batch_size,
            frame=study.prefix["chosen"] if prompted else "{prompt}",
            stop=study.recipe.eval.prompted_stop if prompted else "",
            seed=study.recipe.seed,
        )

    def read(self) -> list[dict[str, dict]]:
        """For each task and metric, in their order, {model: row of `run`}."""
        found: list[dict[str, dict]] = []
        for trial in self.trials:
            rows = {name: json.loads(self.file(name, trial).read_text()) for name in self.names}
            found += [dict(zip(rows, same, strict=True)) for same in zip(*rows.values(), strict=True)]
        return found


def run(trial: Trial, policy: Policy, recipe: Recipe) -> list[dict]:
    """A model on a task. A row a metric: {task, prompt, shots, metric, higher_is_better, n, cut, value, draws}.

    `cut` is how many requests lost their beginning, as they were too long for the model.

    Raises:
        UserError: the task's data cannot be read, or is not what the task reads.
    """
    loaded = load(trial, recipe)
    policy.cut = 0
    for task in loaded.values():
        task.set_fewshot_seed(seed=recipe.seed)
    random.seed(recipe.seed)  # a few tasks draw from the global generators
    np.random.seed(recipe.seed)
    # not simple_evaluate: it indexes all of the harness's tasks again, and asks the machine about itself
    results = evaluate(policy, {"tasks": loaded, "groups": {}}, limit=trial.task.limit, bootstrap_iters=0)
    rows = []
    for name, task in loaded.items():
        samples = results["samples"][name]
        for kind in dict.fromkeys(sample["filter"] for sample in samples):
            answered = sorted((sample for sample in samples if sample["filter"] == kind), key=lambda one: one["doc_id"])
            for metric in answered[0]["metrics"]:
                values = [sample[metric] for sample in answered]
                aggregate = task.aggregation().get(metric, mean)
                rows.append(
                    {
                        "task": trial.title(name),
                        "prompt": trial.prompt,
                        "shots": trial.task.shots,
                        "metric": metric if kind == "none" else f"{metric} ({kind})",
                        "higher_is_better": bool(task.higher_is_better().get(metric, True)),
                        "n": len(values),
                        "cut": policy.cut,
                        "value": float(aggregate(values)),
                        "draws": draws(values, aggregate, recipe.eval.bootstrap_samples),
                    }
                )
    return rows


def draws(values: Sequence, aggregate: Callable, samples: int) -> list[float]:
    """The metric of so many sets of questions drawn from all with replacement; the same sets for every model."""
    rng, size = np.random.default_rng(SEED), len(values)
    if aggregate is mean:
        array = np.asarray(values, dtype=np.float64)
        return [float(array[rng.integers(size, size=size)].mean()) for _ in range(samples)]
    ours = aggregate.__module__.startswith("instructrl.")
    chosen = (rng.integers(size, size=size) for _ in range(samples if ours else min(samples, SLOW_DRAWS)))
    return [float(aggregate([values[number] for number in numbers])) for numbers in chosen]


# ---- tasks


def load(trial: Trial, recipe: Recipe) -> dict[str, HarnessTask]:
    """The task, or the tasks of a group, by name; on the recipe's own files where it names some."""
    task, card = trial.task, tasks.cards().get(trial.task.task)
    own: dict[str, Any] = {"num_fewshot": task.shots}
    if card and card.classifier and task.classifier:
        own["process_results"] = toxicity_of(
            task.classifier, f"{trial.key}.classifier", device(recipe), recipe.runtime.offline
        )
    if trial.prompt and card:
        own["description"] = card.prompts[trial.prompt]
    if task.path:
        asked = read(task.path, f"{trial.key}.path")
        own |= {"custom_dataset": lambda **_: DatasetDict(splits), "test_split": "test", "fewshot_split": "test"}
        own |= {"validation_split": None, "training_split": None, "dataset_kwargs": None}
        splits = {"test": asked}
        if task.shots >= len(asked) and not task.examples:
            raise UserError(f"{trial.key}.shots={task.shots}: {task.path} has only {len(asked)} questions to draw from")
        if task.examples:
            splits["examples"] = read(task.examples, f"{trial.key}.examples")
            own["fewshot_split"] = "examples"
    try:
        return made(task.task, own, manager(stock=card is None))
    except UserError:
        raise
    except Exception as error:  # whatever a task's functions, datasets, and the Hub's clients raise
        where = task.path or "its data"
        told = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(".: ")
        way = f"it must hold {card.columns}" if card else "see the task's own file in lm_eval/tasks"
        raise UserError(f"{trial.key}: {task.task} cannot be made from {where} ({told}); {way}") from error


def made(name: str, own: dict[str, Any], known: TaskManager) -> dict[str, HarnessTask]:
    """The tasks that a name stands for, each with settings of our own, which only a group's members can have."""
    entry = known.task_index[name]
    if entry.kind is Kind.GROUP:
        members = [{"group": name, **own}]
    else:
        names = sorted(entry.tags) if entry.kind is Kind.TAG else [name]
        members = [{"task": one, **own} for one in names]
    return known.load([{"group": "eval.tasks", "task": members}])["tasks"]


def read(path: str, key: str) -> Dataset:
    """The rows of a file, folder or Hub data set."""
    return Dataset.from_list([row.values for row in sources.rows(Source(path=path), key)])


@lru_cache(maxsize=2)
def manager(stock: bool) -> TaskManager:
    """Our tasks, or the harness's own, whose index takes ten seconds."""
    return TaskManager(include_path=str(tasks.FOLDER), include_defaults=stock)


@lru_cache(maxsize=1)
def toxicity_of(path: str, key: str, place: torch.device, offline: bool) -> Toxicity:
    """Kept: every prompt of every model is scored by the same."""
    return Toxicity(path, key, place, offline)
