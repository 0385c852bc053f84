"""One trainer of `bench_ppo.py`: instructrl's or TRL 1.12's PPOTrainer on a workload, an iteration a turn.

Started by the driver with {workload, side}. Its first turn builds libraries and models; then come iterations.
"""

import tempfile
from functools import partial

import torch
from turns import Player, peak_mb

SETTINGS = {
    "num_mini_batches": 4,
    "learning_rate": 1e-9,  # so small that every iteration samples from the same distribution
    "temperature": 1.0,
    "kl_coef": 0.05,
    "missing_eos_penalty": 1.0,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}
PTX_COEF = 1.0


def settings(workload: dict) -> dict:
    """A GPU computes in bfloat16, as anyone's would; the weights stay float32 on both."""
    gpu = workload["device"] == "cuda"
    return SETTINGS | {"use_cpu": not gpu, "bf16": gpu}


def main() -> None:
    player = Player()
    workload, side = player.arguments["workload"], player.arguments["side"]
    torch.set_num_threads(1)
    player.wait()
    build = {"ours": ours, "trl": trl}[side]
    with tempfile.TemporaryDirectory() as folder:
        train = build(player, workload, folder)
        player.report(loaded_mb=peak_mb())
        player.wait()
        train()


def models_of(workload: dict) -> dict:
    """Policy, critic, reference and reward model; with LoRA the reference is the policy without its adapter."""
    import models

    architecture, vocabulary, size = workload["architecture"], workload["vocabulary"], models.Size(*workload["size"])
    policy = partial(models.policy, architecture, vocabulary, workload["end_probability"], size)
    model, reference = policy(), None if workload["lora"] else policy()
    if workload["lora"]:
        from peft import LoraConfig, get_peft_model

        layers = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=layers, fan_in_fan_out=architecture == "gpt2"))
    return {
        "model": model,
        "ref_model": reference,
        "reward_model": models.scorer(architecture, vocabulary, seed=1, size=size),
        "value_model": models.scorer(architecture, vocabulary, seed=1, size=size),
    }


def prompts_of(workload: dict) -> list[list[int]]:
    import models

    return models.prompts(1024, workload["vocabulary"], seed=2)


def pretraining_of(workload: dict) -> list[list[int]]:
    import models

    return models.sequences(512, workload["vocabulary"], 32, 128, seed=3)


def ours(player: Player, workload: dict, folder: str):
    import models

    from instructrl.trainers.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        output_dir=folder,
        batch_size=workload["episodes"],
        total_episodes=workload["episodes"] * 1000,  # the driver ends it
        response_length=workload["response_length"],
        num_ppo_epochs=workload["epochs"],
        ptx_coef=PTX_COEF if workload["ptx_ratio"] else 0.0,
        ptx_ratio=workload["ptx_ratio"],
        **settings(workload),
    )

    def facts() -> dict:
        """Lengths of prompts and responses of the iteration, for the floor."""
        episodes = trainer.last_episodes
        lengths = [
            [start, len(ids) - start] for ids, start in zip(episodes.sequences, episodes.prompt_lengths, strict=True)
        ]
        return {"response_tokens": sum(response for _, response in lengths), "lengths": lengths}

    trainer = PPOTrainer(
        args=args,
        processing_class=models.tokenizer(workload["vocabulary"]),
        train_dataset=[{"prompt_ids": ids} for ids in prompts_of(workload)],
        ptx_dataset=[{"input_ids": ids} for ids in pretraining_of(workload)] if workload["ptx_ratio"] else None,
        callbacks=[player.callback(args.steps_per_iteration, facts)],
        **models_of(workload),
    )
    return trainer.train


def trl(player: Player, workload: dict, folder: str):
    import models
    import trl.experimental.ppo.ppo_trainer as trl_ppo
    from datasets import Dataset

    args = trl_ppo.PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=workload["episodes"],
        local_rollout_forward_batch_size=workload["episodes"],
        gradient_accumulation_steps=1,
        total_episodes=workload["episodes"] * 1000,
        response_length=workload["response_length"],
        num_ppo_epochs=workload["epochs"],
        stop_token="eos",
        num_sample_generations=0,
        gradient_checkpointing=False,
        **settings(workload),
    )
    counted, truncate = [0], trl_ppo.truncate_response

    def counting(stop_token_id, pad_token_id, responses):
        kept = truncate(stop_token_id, pad_token_id, responses)
        counted[0] = int((kept != pad_token_id).sum())
        return kept

    trl_ppo.truncate_response = counting
    prompts = Dataset.from_list([{"input_ids": ids} for ids in prompts_of(workload)])
    trainer = trl_ppo.PPOTrainer(
        args=args,
        processing_class=models.tokenizer(workload["vocabulary"]),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(8)),
        callbacks=[player.callback(1, lambda: {"response_tokens": counted[0]})],
        **models_of(workload),
    )
    if workload["ptx_ratio"]:
        add_pretraining(trainer, workload)
    return trainer.train


def add_pretraining(trainer, workload: dict) -> None:
    """TRL has no ptx: a second backward pass before each step, over as many pretraining examples as ours has."""
    import models

    examples, backward, seen = pretraining_of(workload), trainer.accelerator.backward, [0]
    count = round(workload["ptx_ratio"] * workload["episodes"] / SETTINGS["num_mini_batches"])

    def both(loss, **options) -> None:
        backward(loss, **options)
        rows = models.padded([examples[(seen[0] + i) % len(examples)] for i in range(count)])
        ids, mask = (part.to(trainer.accelerator.device) for part in rows)
        seen[0] += count
        labels = ids.masked_fill(mask == 0, -100)
        with trainer.accelerator.autocast():
            pretraining = trainer.model.policy(input_ids=ids, attention_mask=mask, labels=labels).loss
        backward(PTX_COEF * pretraining)

    trainer.accelerator.backward = both


if __name__ == "__main__":
    main()
