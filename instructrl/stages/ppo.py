"""PPO and PPO-ptx against the reward model, with our own trainer or TRL's (paper, 3.5 eq. 2, App. C.4)."""

from pathlib import Path

from transformers import PreTrainedModel

from instructrl.config import PPO, Recipe
from instructrl.errors import UserError
from instructrl.stages.checkpoints import FOLDER, train
from instructrl.stages.models import device, load_policy, load_reward_model, save
from instructrl.stages.tables import read_table
from instructrl.stages.template import Template
from instructrl.trainers.ppo import PPOConfig, PPOTrainer

FINAL = {  # name in the metrics -> name in the log
    "score": "objective/scores",
    "kl": "objective/kl",
    "length": "completions/mean_length",
    "entropy": "objective/entropy",
    "explained_variance": "val/explained_var",
    "ptx_loss": "loss/ptx",
    "ptx_grad_ratio": "ptx/grad_ratio",
}
LAST = 0.1  # share of the iterations over which final metrics are means


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the policy to `folder/model` and the critic to `folder/critic`. `name` is the recipe's section.

    Returns:
        prompts, dropped (too long), iterations, optimizer_steps; initial_score, initial_length; score, kl (nats a
        response), length (tokens), entropy, explained_variance and, with pretraining, ptx_loss (nats a token, or an
        example, as `ptx_normalization` says) and ptx_grad_ratio, each a mean over the last tenth of the iterations;
        seconds by phase. TRL's trainer has no explained_variance.

    Raises:
        UserError: no prompt is short enough, or there is no text for PPO-ptx.
    """
    section: PPO = getattr(recipe, name)
    policy = load_policy(inputs["sft"] / "model", recipe)
    reward_model, bias = load_reward_model(inputs["reward_model"] / "model", recipe)
    critic, _ = load_reward_model(inputs["reward_model"] / "model", recipe)
    template = Template.load(inputs["sft"] / "model")
    prompts, dropped = read_prompts(name, recipe, inputs["data"], template, policy)
    if section.backend == "trl":
        from instructrl.stages import trl_ppo

        log = trl_ppo.train(name, recipe, folder, template.tokenizer, policy, critic, reward_model, bias, prompts)
    else:
        trainer = PPOTrainer(
            args=arguments(recipe, section, bias, folder / FOLDER),
            processing_class=template.tokenizer,
            model=policy,
            value_model=critic,
            reward_model=reward_model,
            train_dataset=prompts,
            ptx_dataset=read_documents(name, section, inputs["data"], template) if section.ptx_coef else None,
        )
        train(trainer, folder, recipe.runtime.save_minutes)
        log = [line for line in trainer.state.log_history if FINAL["kl"] in line]
    save(policy, template, folder / "model")
    critic.save_pretrained(folder / "critic")

    last = log[-max(1, round(LAST * len(log))) :]
    return {
        "prompts": len(prompts),
        "dropped": dropped,
        "iterations": len(log),
        "optimizer_steps": len(log) * section.num_ppo_epochs * section.num_mini_batches,
        "initial_score": log[0][FINAL["score"]],
        "initial_length": log[0][FINAL["length"]],
        **{ours: sum(line[key] for line in last) / len(last) for ours, key in FINAL.items() if key in last[0]},
        "seconds": {
            key.removeprefix("seconds/"): sum(line[key] for line in log) for key in log[0] if key.startswith("seconds/")
        },
    }


def check(recipe: Recipe) -> None:
    """Refuse what TRL's trainer cannot do, where a section asks for it, before anything trains."""
    for name in ("ppo", "ppo_ptx"):
        if getattr(recipe, name).backend == "trl":
            from instructrl.stages import trl_ppo

            trl_ppo.check(name, recipe)


def arguments(recipe: Recipe, section: PPO, reward_bias: float, checkpoints: Path) -> PPOConfig:
    """The recipe's section under the same names, and what this machine adds."""
    settings = section.model_dump(exclude={"backend", "ptx_max_length"})
    where = device(recipe)
    return PPOConfig(
        output_dir=str(checkpoints),
        reward_bias=reward_bias,
        max_tokens=recipe.runtime.max_tokens,
        generation_batch_size=recipe.runtime.generation_batch_size,
        activation_checkpointing=recipe.runtime.gradient_checkpointing,
        seed=recipe.seed,
        use_cpu=where.type == "cpu",
        save_strategy="no",  # checkpoints.train saves by time
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )


def read_prompts(
    name: str, recipe: Recipe, data: Path, template: Template, policy: PreTrainedModel
) -> tuple[list[dict], int]:
    """The prompts whose response fits into the model's context, as rows with `prompt_ids`, and how many do not.

    Raises:
        UserError: none is left.
    """
    response_length = getattr(recipe, name).response_length
    context = getattr(policy.config, "max_position_embeddings", None) or recipe.data.max_prompt_tokens + response_length
    longest = min(recipe.data.max_prompt_tokens, context - response_length)
    every = [template.prompt(row["prompt"]) for row in read_table(data / "prompts.train.parquet")]
    rows = [{"prompt_ids": ids} for ids in every if len(ids) <= longest]
    if not rows:
        raise UserError(
            f"{name} has no prompt left: all {len(every)} have more than {longest} tokens, which is what "
            f"data.max_prompt_tokens={recipe.data.max_prompt_tokens}, the model's context of {context} and "
            f"{name}.response_length={response_length} allow."
        )
    return rows, len(every) - len(rows)


def read_documents(name: str, section: PPO, data: Path, template: Template) -> list[dict]:
    """Pretraining examples as rows with `input_ids`, cut at `ptx_max_length`.

    Raises:
        UserError: there are none.
    """
    texts = [row["text"] for row in read_table(data / "text.train.parquet")]
    if not texts:
        raise UserError(f"{name} has no pretraining text: set data.text, or {name}.ptx_coef=0.")
    return [{"input_ids": template.document(text)[: section.ptx_max_length]} for text in texts]
