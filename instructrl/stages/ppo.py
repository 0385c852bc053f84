"""PPO and PPO-ptx against the reward model, with our own trainer or TRL's (paper, 3.5 eq. 2, App. C.4)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from instructrl.config import PPO, Recipe
from instructrl.errors import StageFailed, UserError
from instructrl.stages import base_model, lora, ranks
from instructrl.stages.checkpoints import FOLDER, train
from instructrl.stages.contract import Contract
from instructrl.stages.divergence import Rows
from instructrl.stages.models import device
from instructrl.stages.roles import Roles
from instructrl.stages.snapshots import Snapshots, iterations
from instructrl.stages.tables import read_table
from instructrl.trainers.actor_critic import network
from instructrl.trainers.ema import EMA
from instructrl.trainers.ppo import PPOConfig, PPOTrainer
from instructrl.trainers.rollout import RolloutError

FINAL = {  # name in the metrics -> name in the log
    "score": "objective/scores",
    "kl": "objective/kl",
    "length": "completions/mean_length",
    "entropy": "objective/entropy",
    "explained_variance": "val/explained_var",
    "ptx_loss": "loss/ptx",
    "ptx_grad_ratio": "ptx/grad_ratio",
    "logprob_difference": "sampling/sampling_logp_difference/mean",
}
HELD_OUT = 256  # validation prompts answered at the end
LAST = 0.1  # share of the iterations over which final metrics are means


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the policy to `folder/model`, the moving average of its weights to `folder/ema` if there is one, the critic
    to `folder/critic`, what `snapshots` asks for to `folder/snapshots`, and tables of completions to
    `folder/completions`. `name` is the recipe's section.

    Returns:
        score, kl (nats a response), length (tokens), entropy, explained_variance and, with pretraining, ptx_loss (nats
        a token, or an example, as `ptx_normalization` says) and ptx_grad_ratio, and with vLLM logprob_difference (nats
        a token from ours), each a mean over the last tenth of the iterations; initial_score, initial_length; prompts,
        dropped (too long), iterations, optimizer_steps; held_out, and ema if there is one: score, kl, length and
        entropy on validation prompts; seconds by phase.
        TRL's trainer has no explained_variance, and answers no validation prompts.

    Raises:
        UserError: no prompt is short enough, or there is no text for PPO-ptx.
        StageFailed: vLLM is not there, or not the policy that it should be.
    """
    section: PPO = getattr(recipe, name)
    contract = Contract.load(inputs[section.init] / "model")
    contract.check(inputs["reward_model"] / "model", "reward_model", section.init)  # the critic's, too
    roles = Roles.of(section, recipe, inputs, contract)
    policy, critic, bias = roles.policy, roles.critic, roles.bias
    prompts, dropped = read_prompts(name, recipe, inputs["data"], contract, network(policy))
    held_out: dict[str, dict] = {}
    if section.backend == "trl":
        from instructrl.stages import trl_ppo

        ema = EMA(policy, section.ema_decay, every=1) if section.ema_decay else None
        models = (policy, critic, roles.reward_model)
        callbacks = [Snapshots(policy, folder, section.snapshots, iterations(section)), *([ema] if ema else [])]
        log = trl_ppo.train(name, recipe, folder, contract.tokenizer, *models, bias, prompts, callbacks)
    else:
        set_seed(recipe.seed)
        documents = read_documents(name, section, inputs["data"], contract) if section.ptx_coef else []
        args = arguments(recipe, section, bias, folder / FOLDER)
        args.vllm_model = str(inputs[section.init] / "model")
        args.vllm_max_model_length = longest_prompt(name, recipe, network(policy)) + section.response_length
        with refused():
            trainer = PPOTrainer(
                args=args,
                processing_class=contract.tokenizer,
                model=policy,
                value_model=critic,
                reward_model=roles.reward_model,
                ref_model=roles.reference,
                train_dataset=prompts,
                ptx_dataset=documents or None,
                plain_weights=lora.merged_weights,
                callbacks=[Snapshots(policy, folder, section.snapshots, args.num_iterations, args.steps_per_iteration)],
            )
        tables = [
            Rows(inputs["data"] / "prompts.train.parquet", [row["number"] for row in prompts]),
            Rows(inputs["data"] / "text.train.parquet", range(len(documents))),
        ]
        with refused():
            train(trainer, folder, recipe.runtime.save_minutes, tables)
            held_out = evaluated(trainer, read_held_out(name, recipe, inputs["data"], contract, network(policy)))
        ema, log = trainer.ema, [line for line in trainer.state.log_history if FINAL["kl"] in line]
    base = base_model.identity(inputs, recipe)
    lora.save(policy, contract, folder / "model", base)
    lora.save(critic, contract, folder / "critic", base)
    if ema:
        with ema.applied():
            lora.save(policy, contract, folder / "ema", base)

    last = log[-max(1, round(LAST * len(log))) :]
    return {
        **{ours: sum(line[key] for line in last) / len(last) for ours, key in FINAL.items() if key in last[0]},
        "initial_score": log[0][FINAL["score"]],
        "initial_length": log[0][FINAL["length"]],
        "prompts": len(prompts),
        "dropped": dropped,
        "iterations": len(log),
        "optimizer_steps": len(log) * section.num_ppo_epochs * section.num_mini_batches,
        **held_out,
        "seconds": {
            key.removeprefix("seconds/"): sum(line[key] for line in log) for key in log[0] if key.startswith("seconds/")
        },
    }


@contextmanager
def refused() -> Iterator[None]:
    """Tell what is wrong with vLLM by the names of the recipe's keys.

    Raises:
        StageFailed: it is not there, or not the policy that it should be.
    """
    try:
        yield
    except RolloutError as error:
        raise StageFailed(
            str(error).replace("use_vllm", "runtime.rollouts=vllm").replace("vllm_", "runtime.vllm.")
        ) from error


def check(recipe: Recipe) -> None:
    """Refuse what TRL's trainer cannot do, where a section asks for it, before anything trains."""
    for name in ("ppo", "ppo_ptx"):
        if getattr(recipe, name).backend == "trl":
            from instructrl.stages import trl_ppo

            trl_ppo.check(name, recipe)


def arguments(recipe: Recipe, section: PPO, reward_bias: float, checkpoints: Path) -> PPOConfig:
    """The recipe's section under the same names, and what this machine adds."""
    settings = section.model_dump(exclude={"backend", "init", "ptx_max_length", "snapshots"})
    where = device(recipe)
    return PPOConfig(
        output_dir=str(checkpoints),
        reward_bias=reward_bias,
        completions_every=recipe.runtime.completions_every,
        completions_dir=str(checkpoints.parent / "completions"),
        max_tokens=recipe.runtime.max_tokens,
        generation_batch_size=recipe.runtime.generation_batch_size,
        use_vllm=recipe.runtime.rollouts == "vllm",
        **{f"vllm_{key}": value for key, value in recipe.runtime.vllm.model_dump().items()},
        bf16=recipe.runtime.bf16,
        activation_checkpointing=recipe.runtime.gradient_checkpointing,
        sharding=recipe.runtime.sharding,
        seed=recipe.seed,
        use_cpu=where.type == "cpu",
        ddp_backend="gloo" if where.type == "cpu" and ranks.count() > 1 else None,
        save_strategy="no",  # checkpoints.train saves by time
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )


def read_prompts(
    name: str, recipe: Recipe, data: Path, contract: Contract, policy: PreTrainedModel
) -> tuple[list[dict], int]:
    """The prompts whose response fits into the model's context, as rows with `prompt_ids`, and how many do not.

    Raises:
        UserError: none is left.
    """
    every = read_table(data / "prompts.train.parquet")
    response_length, longest = getattr(recipe, name).response_length, longest_prompt(name, recipe, policy)
    rows = short_enough(every, contract, longest)
    if not rows:
        raise UserError(
            f"{name} has no prompt left: all {len(every)} have more than {longest} tokens, which is what "
            f"data.max_prompt_tokens={recipe.data.max_prompt_tokens}, the model's context of {context_of(policy)} and "
            f"{name}.response_length={response_length} allow."
        )
    return rows, len(every) - len(rows)


def read_held_out(name: str, recipe: Recipe, data: Path, contract: Contract, policy: PreTrainedModel) -> list[dict]:
    """Validation prompts, in the same form."""
    rows = short_enough(read_table(data / "prompts.valid.parquet"), contract, longest_prompt(name, recipe, policy))
    return rows[:HELD_OUT]


def short_enough(rows: list[dict], contract: Contract, longest: int) -> list[dict]:
    """The rows of that length, as `prompt_ids`, with the `number` of each, from 0."""
    encoded = (contract.prompt(row["prompt"]) for row in rows)
    return [{"prompt_ids": ids, "number": number} for number, ids in enumerate(encoded) if len(ids) <= longest]


def longest_prompt(name: str, recipe: Recipe, policy: PreTrainedModel) -> int:
    """The most tokens of a prompt that leave room for a response."""
    most, context = recipe.data.max_prompt_tokens, context_of(policy)
    return min(most, context - getattr(recipe, name).response_length) if context else most


def context_of(policy: PreTrainedModel) -> int | None:
    return getattr(policy.config, "max_position_embeddings", None)


def evaluated(trainer: PPOTrainer, prompts: list[dict]) -> dict[str, dict]:
    """What the policy and its moving average do on held-out prompts: {"held_out": {score, kl, ...}, "ema": {...}}."""
    if not prompts:
        return {}
    found = trainer.evaluate(prompts)
    names = {"held_out": "eval_", "ema": "eval_ema_"} if trainer.ema else {"held_out": "eval_"}
    keys = ("score", "kl", "length", "entropy")
    return {name: {key: found[prefix + FINAL[key]] for key in keys} for name, prefix in names.items()}


def read_documents(name: str, section: PPO, data: Path, contract: Contract) -> list[dict]:
    """Pretraining examples as rows with `input_ids`, cut at `ptx_max_length`.

    Raises:
        UserError: there are none.
    """
    texts = [row["text"] for row in read_table(data / "text.train.parquet")]
    if not texts:
        raise UserError(f"{name} has no pretraining text: set data.text, or {name}.ptx_coef=0.")
    return [{"input_ids": contract.document(text)[: section.ptx_max_length]} for text in texts]
