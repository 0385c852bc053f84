"""An evaluation's models at work: each answers the held-out prompts, and is tested on what it knows."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from instructrl.config import Recipe
from instructrl.stages import answers, benchmarks, judging, trajectory
from instructrl.stages.answers import Answer
from instructrl.stages.contract import Contract
from instructrl.stages.judging import BASELINE, BEST, Scorer
from instructrl.stages.models import load_policy, load_reward_model, make_room
from instructrl.stages.names import GREEDY
from instructrl.stages.tables import read_table


class Study:
    """What an evaluation works on: the recipe, the artifacts, the prompts, and the answers so far."""

    def __init__(self, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> None:
        self.recipe, self.inputs, self.folder = recipe, inputs, folder
        self.contract = Contract.load(inputs["sft"] / "model")
        for name in ("reward_model", "judge", "ppo", "ppo_ptx"):
            if name in inputs:
                self.contract.check(inputs[name] / "model", name, BASELINE)
        self.context = context_of(load_policy(inputs["sft"] / "model", recipe))
        settings = recipe.eval
        self.names = judging.names(recipe)
        self.prompts = self._prompts("prompts.eval", settings.num_prompts)
        self.temperatures = sorted({settings.temperature, GREEDY}, reverse=True)
        tasks = inputs["data"] / "tasks.parquet"
        self.tasks = read_table(tasks) if tasks.exists() else []
        self.questions = benchmarks.encode_tasks(self.tasks, self.contract, self.context)
        self.text = benchmarks.held_out_text(inputs["data"], settings.num_prompts)
        self.documents = [self.contract.document(row["text"])[: self.context] for row in self.text]
        self.answers: dict[str, dict[float, list[Answer]]] = {}
        self.knows: dict[str, dict] = {}
        self.prefix: dict = {}

    @property
    def pad(self) -> int:
        return self.contract.tokenizer.pad_token_id

    def _prompts(self, table: str, limit: int) -> list[dict]:
        return answers.held_out_prompts(self.recipe, self.inputs["data"], self.contract, self.context, table, limit)

    def model(self, name: str) -> PreTrainedModel:
        """One of the models' weights; of the policies that PPO trained, those that `eval.weights` names."""
        if name in ("gpt", "gpt_prompted"):
            base = self.inputs["pretrain"] / "model" if "pretrain" in self.inputs else self.recipe.model.path
            model = load_policy(base, self.recipe)
            make_room(model, self.contract.tokenizer)
            return model
        average = name in ("ppo", "ppo_ptx") and self.recipe.eval.weights == "ema"
        return load_policy(self.inputs[name] / ("ema" if average else "model"), self.recipe)

    def asked(self) -> int:
        """How many pieces are done."""
        return len(list((self.folder / "checkpoints").glob("*.json")))

    def ask(self, name: str) -> None:
        """Leave a model's answers at each temperature, and what it knows, on the disk, unless they are there."""
        others = {"gpt_prompted": self._ask_prompted, BEST: self._ask_best}
        self.keep(name, others.get(name, lambda: self._ask(name)))

    def keep(self, piece: str, make: Callable[[], dict]) -> None:
        """Leave on the disk what `make` returns, JSON, unless it is there."""
        done = self._path(piece)
        if not done.exists():
            found = make()
            done.parent.mkdir(parents=True, exist_ok=True)
            half = done.with_suffix(".tmp")
            half.write_text(json.dumps(found))
            half.rename(done)

    def found(self, piece: str) -> dict:
        """What `keep` left there."""
        return json.loads(self._path(piece).read_text())

    def _path(self, piece: str) -> Path:
        return self.folder / "checkpoints" / f"{piece}.json"

    def read(self, name: str) -> None:
        """Take what `ask` left on the disk."""
        found = self.found(name)
        self.answers[name] = {float(key): [Answer(**row) for row in rows] for key, rows in found["answers"].items()}
        same = {"gpt_prompted": "gpt", BEST: BASELINE}  # weights
        self.knows[name] = self.knows[same[name]] if name in same else found["knows"]
        self.prefix = found.get("prefix", self.prefix)

    def _ask(self, name: str) -> dict:
        model, limit = self.model(name), self.recipe.runtime.max_tokens
        ids = [row["ids"] for row in self.prompts]
        found = {str(t): answers.sample(model, ids, self.contract, self.recipe, t) for t in self.temperatures}
        knows = {
            "tasks": benchmarks.task_results(model, self.tasks, self.questions, self.pad, limit),
            "text": benchmarks.text_losses(model, self.documents, self.pad, limit),
        }
        return {"answers": {key: [one.to_json() for one in rows] for key, rows in found.items()}, "knows": knows}

    def _ask_best(self) -> dict:
        """Not greedily: there is one greedy answer only. `drawn`: the scores of all answers, [n][prompts]."""
        reward_model, bias = load_reward_model(self.inputs["reward_model"] / "model", self.recipe)
        ids = [row["ids"] for row in self.prompts]
        best, drawn = answers.sample_best(self.model(BASELINE), reward_model, ids, self.contract, self.recipe)
        judged = [trajectory.judge_scores(self, self.prompts, given) for given, _ in drawn]
        scored = {"proxy": [[reward - bias for reward in rewards] for _, rewards in drawn]}
        scored |= {"judge": judged if judged[0] is not None else None}
        return {"answers": {str(self.recipe.eval.temperature): [one.to_json() for one in best]}, "drawn": scored}

    def _ask_prompted(self) -> dict:
        recipe, model = self.recipe, self.model("gpt_prompted")
        stop = recipe.eval.prompted_stop
        stops = answers.stop_tokens(self.contract, stop)

        def sample(prefix: str, rows: list[dict], temperature: float) -> list[Answer]:
            ids = answers.prefixed(recipe, prefix, rows, self.contract, self.context)
            return answers.sample(model, ids, self.contract, recipe, temperature, stops, stop)

        candidates = answers.prefixes(recipe, self.inputs["data"])
        best, rewards = candidates[0], {}
        valid = self._prompts("prompts.valid", answers.PREFIX_PROMPTS) if len(candidates) > 1 else []
        if valid:
            judge = Scorer(self.inputs["reward_model"] / "model", recipe)
            best, rewards = answers.choose_prefix(
                candidates,
                lambda prefix: judge.scores(valid, sample(prefix, valid, recipe.eval.temperature), self.pad).mean(),
            )
        found = {str(t): [one.to_json() for one in sample(best, self.prompts, t)] for t in self.temperatures}
        prefix = {"chosen": best, "rewards": rewards, "prompts": len(valid)}
        return {"answers": found, "prefix": prefix}


def context_of(model: PreTrainedModel) -> int:
    """The most tokens a model reads."""
    return getattr(model.config, "max_position_embeddings", None) or 2**20
