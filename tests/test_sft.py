"""SFT: the loss counts the response only, is TRL's own, drops what is too long, and resumes exactly."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, TrainerCallback
from trl import SFTTrainer

from instructrl.config import Pretrain, Recipe
from instructrl.errors import UserError
from instructrl.stages import models, sft
from instructrl.stages.checkpoints import FOLDER, LOG, train
from instructrl.stages.contract import Contract, Limits
from instructrl.stages.pretrain import make_model, make_tokenizer
from instructrl.stages.tables import DEMONSTRATIONS, write_table

TEXTS = ["The cat sat on the mat and saw a dog. ", "What is 2 plus 3? It is 5. "] * 10
DEMONSTRATIONS_ = [(f"Say {n} {'again ' * (n % 4)}", f"{n}, as you {'really ' * (n % 3)}wish.") for n in range(24)]


def recipe(**sections):
    base = {
        "model": {"path": None, "template": "Q: {prompt}\nA:"},
        "data": {"world": {}},
        "eval": {"judge": "gold"},
        "sft": {"learning_rate": 1e-2, "batch_size": 6, "epochs": 2},
        "runtime": {"micro_batch_size": 4, "logging_steps": 1, "device": "cpu"},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return Recipe(**base)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer(TEXTS, 300)
    torch.manual_seed(0)
    settings = Pretrain(vocab_size=300, hidden_size=16, layers=2, heads=2, context_length=96)
    models.save_base(make_model(settings, tokenizer), tokenizer, folder / "pretrain" / "model")
    write_demonstrations(folder / "data", DEMONSTRATIONS_)
    return {"data": folder / "data", "pretrain": folder / "pretrain"}


def write_demonstrations(folder, train_rows, valid_rows=DEMONSTRATIONS_[:4]):
    folder.mkdir(exist_ok=True)
    for split, rows in (("train", train_rows), ("valid", valid_rows)):
        table = [{"prompt": prompt, "response": response} for prompt, response in rows]
        write_table(folder / f"demonstrations.{split}.parquet", table, DEMONSTRATIONS)


def training_log(folder):
    """The lines of the training steps; the last of the log is the evaluation's."""
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def batch(trainer, rows=5):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


def make(inputs, folder, kind, recipe_):
    tokenizer = models.load_tokenizer(inputs["pretrain"] / "model", recipe_)
    model = models.load_policy(inputs["pretrain"] / "model", recipe_)
    contract = Contract(tokenizer, recipe_.model.template)
    rows, _ = sft.encode(inputs["data"] / "demonstrations.train.parquet", contract, Limits.of(recipe_, model))
    return kind(
        model=model,
        args=sft.arguments(recipe_, folder / FOLDER),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_fast_loss_gradient_and_metrics_are_trls_own(inputs, tmp_path, completion_only):
    settings = recipe(sft={"completion_only_loss": completion_only})
    ours, theirs = (make(inputs, tmp_path, kind, settings) for kind in (sft.FastSFTTrainer, SFTTrainer))
    for items in (None, torch.tensor(37)):
        losses = [one.compute_loss(one.model, batch(one), num_items_in_batch=items) for one in (ours, theirs)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    for name in ("mean_token_accuracy", "entropy", "num_tokens"):
        assert ours._metrics["train"][name] == pytest.approx(theirs._metrics["train"][name], rel=1e-5), name


def test_only_the_response_is_trained_on(inputs, tmp_path):
    """By hand: -log p of the response's tokens and EOS, each row alone."""
    trainer = make(inputs, tmp_path, sft.FastSFTTrainer, recipe())
    contract = Contract(trainer.processing_class, "Q: {prompt}\nA:")
    total, tokens = 0.0, 0
    for prompt, response in DEMONSTRATIONS_[:5]:
        before, after = contract.prompt(prompt), contract.response(response)
        logprobs = trainer.model(input_ids=torch.tensor([before + after])).logits.log_softmax(-1)[0]
        total -= sum(logprobs[len(before) + i - 1, token].item() for i, token in enumerate(after))
        tokens += len(after)
    loss = trainer.compute_loss(trainer.model, batch(trainer))
    assert loss.item() == pytest.approx(total / tokens, abs=1e-5)


def test_a_run_learns_and_leaves_a_model_of_the_same_form(inputs, tmp_path):
    metrics = sft.run("sft", recipe(sft={"epochs": 10}), inputs, tmp_path)
    assert metrics["demonstrations"] == 24
    assert metrics["steps"] == 40
    lines = training_log(tmp_path)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert {"mean_token_accuracy", "entropy", "learning_rate"} <= lines[0].keys()
    assert metrics["valid_loss"] < 0.6 * lines[0]["loss"]
    configs = [path / "model" / "config.json" for path in (inputs["pretrain"], tmp_path)]
    before, after = (json.loads(config.read_text()) for config in configs)
    assert after == before
    assert weights(tmp_path).keys() == weights(inputs["pretrain"]).keys()
    assert Contract.load(tmp_path / "model").template == "Q: {prompt}\nA:"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not any(module._forward_hooks for module in loaded.modules())


def test_the_schedule_is_the_papers(inputs, tmp_path):
    """A cosine from the peak, without warm-up, to a tenth; beta2 .95."""
    sft.run("sft", recipe(sft={"learning_rate": 1e-3, "epochs": 5}), inputs, tmp_path)
    rates = [line["learning_rate"] for line in training_log(tmp_path)]
    assert rates[0] == pytest.approx(1e-3, rel=0.01)
    assert rates[10] == pytest.approx(0.55e-3, rel=0.01)
    assert rates[-1] == pytest.approx(1e-4, rel=0.1)
    assert sft.arguments(recipe(), tmp_path).adam_beta2 == 0.95


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("muon", [None, 0.01])
def test_a_killed_run_ends_as_one_that_was_not(inputs, tmp_path, monkeypatch, muon):
    """In the second epoch, with dropout (the state of the random numbers matters), with and without Muon's state."""
    optimizer = {"muon_learning_rate": muon, "residual_dropout": 0.2}
    settings, saving = recipe(sft=optimizer), recipe(sft=optimizer, runtime={"save_minutes": 1e-9})
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir()
    resumed.mkdir()
    sft.run("sft", settings, inputs, straight)

    def killed(trainer, *args):
        trainer.add_callback(KillAt(7))
        return train(trainer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(sft, "train", killed)
        with pytest.raises(Killed):
            sft.run("sft", saving, inputs, resumed)
    assert not (resumed / "model").exists()
    sft.run("sft", settings, inputs, resumed)
    for name, weight in weights(straight).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    logs = [[(line["step"], line["loss"]) for line in training_log(one)] for one in (straight, resumed)]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]] == list(range(1, 9))


def test_residual_dropout_drops_that_share_in_training_only():
    settings = Pretrain(vocab_size=300, hidden_size=64, layers=1, heads=2, mimetic=False)
    model = make_model(settings, make_tokenizer(TEXTS, 300))
    ids = torch.randint(2, 200, (20, 30))
    seen = {}
    branches = {"attention": model.model.layers[0].self_attn, "mlp": model.model.layers[0].mlp}

    def forward():
        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: first(out).detach()}))
            for name, module in branches.items()
        ]
        logits = model(input_ids=ids).logits
        for hook in hooks:
            hook.remove()
        return logits

    model.eval()
    plain = forward()
    kept = dict(seen)
    with sft.residual_dropout(model, 0.25):
        assert torch.equal(forward(), plain)
        model.train()
        dropped = forward()
        assert not torch.equal(dropped, plain)
        for output in seen.values():
            assert (output == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
        alive = seen["attention"] != 0
        torch.testing.assert_close(seen["attention"][alive], kept["attention"][alive] / 0.75)
    assert torch.equal(forward(), plain)
    assert not any(module._forward_hooks for module in model.modules())


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_gpt2s_own_dropout_layers_get_the_share_and_keep_their_config():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=50))
    layers = [layer for block in model.transformer.h for layer in (block.attn.resid_dropout, block.mlp.dropout)]
    with sft.residual_dropout(model, 0.2):
        assert [layer.p for layer in layers] == [0.2] * 4
        assert model.transformer.drop.p == 0.1  # the embedding's is none on the residual branches
    assert [layer.p for layer in layers] == [0.1] * 4
    assert model.config.resid_pdrop == 0.1


def test_an_unknown_architecture_is_refused_only_if_dropout_is_asked_for():
    config = OPTConfig(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8)
    model = OPTForCausalLM(config)
    with sft.residual_dropout(model, 0.0):
        pass
    with pytest.raises(UserError, match=r"opt model is not known here; set sft\.residual_dropout=0"):
        sft.residual_dropout(model, 0.1).__enter__()


def test_what_is_too_long_is_dropped_and_counted(inputs, tmp_path):
    data = tmp_path / "data"
    write_demonstrations(data, [("ok", "fine"), ("z" * 80, "a"), ("ok", "z" * 40), ("z" * 64, "z" * 29)])
    limits = {"max_prompt_tokens": 75, "max_response_tokens": 30}  # of a context of 96
    metrics = sft.run("sft", recipe(data=limits | {"world": {}}), inputs | {"data": data}, tmp_path)
    assert metrics["demonstrations"] == 1
    assert sorted(metrics["dropped"].values()) == [1, 1, 1]
    assert any("data.max_prompt_tokens=75" in reason for reason in metrics["dropped"])


def test_nothing_left_and_an_empty_response_are_one_sentence(inputs, tmp_path):
    data = tmp_path / "data"
    write_demonstrations(data, [("word " * 200, "a")] * 3)
    with pytest.raises(UserError, match="sft has no demonstration left; dropped: 3 longer than the model's context"):
        sft.run("sft", recipe(), inputs | {"data": data}, tmp_path)
    write_demonstrations(data, [("a", "b"), ("Who?", "  ")])
    with pytest.raises(UserError, match=r"demonstration 2 has an empty response; its prompt is 'Who\?'"):
        sft.run("sft", recipe(), inputs | {"data": data}, tmp_path)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"weight_decy": 0.1}, r"sft\.trainer\.weight_decy: .* Did you mean sft\.trainer\.weight_decay\?"),
        ({"learning_rate": 0.1}, r"sft\.trainer\.learning_rate is set by sft\.learning_rate"),
        ({"gradient_accumulation_steps": 2}, r"is set by sft\.batch_size and runtime\.micro_batch_size"),
        ({"weight_decay": "much"}, r"sft\.trainer\.weight_decay='much': input should be a valid number"),
        ({"neftune_noise_alpha": [1]}, r"sft\.trainer\.neftune_noise_alpha=\[1\]"),
    ],
)
def test_wrong_trainer_fields_are_one_sentence(trainer, message):
    with pytest.raises(UserError, match=message):
        sft.check(recipe(sft={"trainer": trainer}))


def test_further_trainer_fields_reach_trl(tmp_path):
    settings = recipe(sft={"trainer": {"weight_decay": 0.25, "loss_type": "dft"}})
    sft.check(settings)
    arguments = sft.arguments(settings, tmp_path)
    assert (arguments.weight_decay, arguments.loss_type) == (0.25, "dft")


@pytest.mark.parametrize(("batch", "micro", "expected"), [(6, 4, 3), (32, 8, 8), (7, 4, 1), (16, 100, 16), (12, 5, 4)])
def test_the_micro_batch_is_the_largest_divisor(batch, micro, expected, tmp_path):
    settings = recipe(sft={"batch_size": batch}, runtime={"micro_batch_size": micro})
    arguments = sft.arguments(settings, tmp_path)
    assert arguments.per_device_train_batch_size == expected
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == batch


def test_batches_are_of_similar_length_and_each_row_comes_once():
    from instructrl.trainers.sampler import LengthBuckets

    lengths = [(37 * i) % 101 for i in range(102)]
    sampler = LengthBuckets(lengths, batch_size=4, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(102))
    batches = [order[i : i + 4] for i in range(0, 102, 4)]
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 25  # 60 in random batches
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_no_network_is_one_sentence(inputs, tmp_path):
    settings = recipe(model={"path": "nobody/nothing"}, runtime={"offline": True})
    with pytest.raises(UserError, match=r"model\.path=nobody/nothing: .* not in the local cache"):
        sft.run("sft", settings, {"data": inputs["data"]}, tmp_path)


def test_real_weights(tmp_path):
    stories = Path(__file__).parents[2] / "shared/data/model/stories260K-hf"
    if not stories.exists():
        pytest.skip(f"{stories} is absent")
    data = tmp_path / "data"
    write_demonstrations(data, DEMONSTRATIONS_)
    settings = recipe(model={"path": str(stories)}, sft={"epochs": 1})
    metrics = sft.run("sft", settings, {"data": data}, tmp_path)
    assert metrics["steps"] == 4
    before, after = (json.loads((path / "config.json").read_text()) for path in (stories, tmp_path / "model"))
    # Its pad token is <unk>; it gets one of its own, and the embedding a row.
    before["transformers_version"] = after["transformers_version"]
    assert after == before | {"pad_token_id": 512, "vocab_size": 513}


def test_autocast_is_left_to_trl(inputs, tmp_path):
    """The fast loss calls the trunk by itself, where autocast would not reach it."""
    asked = recipe(sft={"trainer": {"bf16": True}})
    trls, ours = (make(inputs, tmp_path, kind, asked) for kind in (SFTTrainer, sft.FastSFTTrainer))
    losses = []
    for trainer in (trls, ours):
        with trainer.accelerator.autocast():
            losses.append(trainer.compute_loss(trainer.model, batch(trainer)).item())
    assert losses[0] == losses[1]
