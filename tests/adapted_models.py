"""Artifacts of stages with `model.lora`: a base model, and random adapters on it in place of trained ones."""

import torch

from instructrl.stages import base_model, lora, models

SCALE = 0.1


def write(base, contract, recipe, folder, names=("sft", "reward_model"), bias=0.0):
    """`folder/pretrain/model`, and `folder/NAME/model` with its adapter for each name."""
    inputs = {"pretrain": folder / "pretrain"}
    models.save(base, contract, inputs["pretrain"] / "model")
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = base_model.load(inputs, recipe, contract)
        if name == "reward_model":
            model = base_model.scorer(model)
            model.config.reward_bias = bias
        adapted = lora.adapted(model, recipe)
        randomize(adapted)
        lora.save(adapted, contract, folder / name / "model", base_model.identity(inputs, recipe))


@torch.no_grad()
def randomize(adapted):
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            weight.normal_(std=SCALE)
