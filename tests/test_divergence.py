"""A loss or gradient that is no number stops every training stage before the step, and names step, rows, checkpoint."""

import math
import re
from collections import deque

import pytest
import torch
from test_ppo_stage import SECTION, WORDS
from test_sft import DEMONSTRATIONS_
from test_sft import recipe as sft_recipe
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from instructrl.errors import StageFailed
from instructrl.stages import models, ppo, ppo_init, pretrain, reward_model, sft
from instructrl.stages.checkpoints import FOLDER, MARK, train
from instructrl.stages.contract import Contract
from instructrl.stages.divergence import Rows, Watch, sources
from instructrl.stages.pretrain import make_tokenizer
from instructrl.stages.tables import DEMONSTRATIONS, PROMPTS, RANKINGS, TEXT, write_table

LIMIT = 40  # the embeddings of later positions are so large that their layer norm is nan: such a row spoils its batch
HUGE = torch.tensor([3e38, -3e38]).repeat(8)
LONG = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A GPT-2 that reads no more than LIMIT tokens, and data of which one row of each table is longer."""
    folder = tmp_path_factory.mktemp("inputs")
    contract = Contract(make_tokenizer([prompt for prompt, _ in DEMONSTRATIONS_] + WORDS, 300), "Q: {prompt}\nA:")
    special = {f"{name}_token_id": getattr(contract.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=512, n_embd=16, n_layer=1, n_head=2, **special))
    model.transformer.wpe.weight.data[LIMIT:] = HUGE
    models.save_base(model, contract.tokenizer, folder / "pretrain" / "model")
    models.save(model, contract, folder / "sft" / "model")
    scorer = models.init_reward_model(folder / "sft" / "model", sft_recipe())
    models.save(scorer, contract, folder / "reward_model" / "model")
    data = folder / "data"
    data.mkdir()
    rows = [{"prompt": f"Say {n}", "response": f"{n} {'x' * (n % 5)}"} for n in range(24)]
    rankings = [{"prompt": f"Say {n}", "responses": ["x", "xy"], "ranks": [1, 2]} for n in range(24)]
    for row in rankings:
        row |= {"annotators": [], "held_out": [], "gold": []}
    text = [{"text": f"{n} {'y' * (n % 7)}"} for n in range(24)]
    for split in ("valid", "train"):
        if split == "train":
            rows[17]["response"] = rankings[17]["responses"][0] = text[17]["text"] = LONG
        write_table(data / f"demonstrations.{split}.parquet", rows, DEMONSTRATIONS)
        write_table(data / f"rankings.{split}.parquet", rankings, RANKINGS)
        write_table(data / f"text.{split}.parquet", text, TEXT)
        write_table(data / f"prompts.{split}.parquet", [{"prompt": row["prompt"]} for row in rows], PROMPTS)
    return {name: folder / name for name in ("data", "pretrain", "sft", "reward_model")}


def failure(stage, name, recipe, inputs, folder):
    with pytest.raises(StageFailed) as caught:
        stage.run(name, recipe, inputs, folder)
    return str(caught.value)


def named_rows(message, table):
    found = re.search(rf"rows? ([\d, ]+) of \S*{table}", message)
    return [int(number) for number in found[1].split(", ")] if found else []


def recipe(**changes):
    return sft_recipe(
        reward_model={"learning_rate": 1e-3, "batch_size": 6},
        ppo_init={"learning_rate": 1e-3, "batch_size": 6, "pretraining_share": 0.5, "ptx_max_length": 400},
        data={"world": {}, "max_prompt_tokens": 200, "max_response_tokens": 300},
        ppo_ptx=SECTION | {"ptx_coef": 1.0, "ptx_ratio": 0.5, "ptx_max_length": 400, "learning_rate": 1e-6},
        **changes,
    )


@pytest.mark.parametrize(
    ("stage", "name", "table", "what"),
    [
        (sft, "sft", "demonstrations.train.parquet", "the loss is nan"),
        (ppo_init, "ppo_init", "demonstrations.train.parquet", "the loss is nan"),
        (reward_model, "reward_model", "rankings.train.parquet", "the loss is nan"),
        (ppo, "ppo_ptx", "text.train.parquet", "the gradient's norm is nan"),
    ],
)
def test_a_stage_names_step_rows_and_checkpoint(inputs, tmp_path, stage, name, table, what):
    """Only the batch with row 17 is spoilt; that it is among the rows named says that step and rows are right."""
    saving = {"runtime": {"micro_batch_size": 4, "logging_steps": 100, "device": "cpu", "save_minutes": 1e-9}}
    message = failure(stage, name, recipe(**({} if stage is ppo else saving)), inputs, tmp_path)
    step = int(re.search(r" at step (\d+);", message)[1])
    assert f"training diverged: {what} at step {step}; lower the learning rate. Its batch: row" in message
    rows = [row for of in ("demonstrations", "rankings", "text") for row in named_rows(message, f"{of}.train.parquet")]
    if name == "ppo_init":  # documents repeat no row before all were read, and row 17 of text is as long
        assert 17 in rows
        assert len(rows) == 6
    else:
        assert 17 in named_rows(message, table)
        assert len(named_rows(message, table)) == (4 if stage is ppo else 6)
    if stage is ppo:
        assert len(named_rows(message, "prompts.train.parquet")) == 8
        assert message.endswith("There is no checkpoint yet.")
    elif step > 1:  # saves at every step: the last one before is good
        assert message.endswith(f"The last good checkpoint is {tmp_path / FOLDER / f'checkpoint-{step - 1}'}.")


def test_pretraining_names_its_documents(inputs, tmp_path, monkeypatch):
    plain = pretrain.make_model

    def spoilt(settings, tokenizer):
        model = plain(settings, tokenizer)
        inner = model.model.forward

        def forward(input_ids, **options):
            found = inner(input_ids=input_ids, **options)
            if input_ids.shape[1] > LIMIT:
                found.last_hidden_state = found.last_hidden_state * math.nan
            return found

        model.model.forward = forward
        return model

    monkeypatch.setattr(pretrain, "make_model", spoilt)
    small = {"vocab_size": 300, "hidden_size": 16, "layers": 1, "heads": 2, "context_length": 128}
    settings = recipe(pretrain=small | {"steps": 40, "tokens_per_step": 60, "warmup_steps": 2})
    message = failure(pretrain, "pretrain", settings, inputs, tmp_path)
    assert named_rows(message, "text.train.parquet") == [17]  # too long to share a batch


class Toy(nn.Module):
    """Its loss is 0 and its gradient nan from step 3 on, or its loss infinite."""

    def __init__(self, loss):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.loss, self.calls = loss, 0

    def forward(self, x):
        self.calls += 1
        if self.calls < 3:
            return {"loss": (self.weight * x).sum()}
        return {"loss": self.weight.sum() * math.inf if self.loss else (0 * self.weight).pow(2).sum().sqrt()}


@pytest.mark.parametrize(("loss", "what"), [(True, "the loss is inf"), (False, "the gradient's norm is nan")])
def test_no_step_is_taken_with_it(tmp_path, loss, what):
    args = TrainingArguments(
        output_dir=str(tmp_path / FOLDER),
        max_steps=6,
        per_device_train_batch_size=1,
        logging_steps=100,  # what is not logged is seen all the same
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=Toy(loss), args=args, train_dataset=[{"x": torch.ones(2)}] * 8)
    with pytest.raises(StageFailed, match=rf"{what} at step 3; lower the learning rate\. There is no checkpoint yet"):
        train(trainer, tmp_path)
    assert trainer.state.global_step == 2
    assert torch.isfinite(trainer.model.weight).all()
    assert "training_step" not in vars(trainer)  # the trainer is as it was


class Arriving:
    """A copy that arrives after it was asked for a few times, as from a GPU."""

    def __init__(self, after):
        self.after = after

    def query(self):
        self.after -= 1
        return self.after < 0

    def synchronize(self):
        self.after = -1


def test_a_copy_from_a_gpu_is_looked_at_once_it_is_there():
    watch = Watch.__new__(Watch)
    seen = []
    watch.check = lambda step, values: seen.append((step, values))
    watch.copies = deque(
        (step, torch.tensor([float(step)]), Arriving(after)) for step, after in ((1, 0), (2, 1), (3, 0))
    )
    watch.settle(wait=False)
    assert seen == [(1, [1.0])]  # the third waits for the second
    watch.settle(wait=True)
    assert seen == [(1, [1.0]), (2, [2.0]), (3, [3.0])]


def test_a_checkpoint_counts_once_its_steps_numbers_were_looked_at(inputs, tmp_path, monkeypatch):
    """They come late from a GPU, and DeepSpeed does not take a step whose gradients are not finite."""

    def late(self, step, values):
        self.copies.append((step, torch.stack(values), Arriving(100)))

    monkeypatch.setattr(Watch, "look", late)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    saving = {"runtime": {"micro_batch_size": 4, "logging_steps": 100, "device": "cpu", "save_minutes": 1e-9}}
    message = failure(sft, "sft", recipe(**saving), inputs, tmp_path)
    step = int(re.search(r" at step (\d+);", message)[1])
    assert message.endswith(f"The last good checkpoint is {tmp_path / FOLDER / f'checkpoint-{step - 1}'}.")
    assert not (tmp_path / FOLDER / f"checkpoint-{step}" / MARK).exists()


def test_rows_are_named_by_their_tables(tmp_path):
    tables = [Rows(tmp_path / "a.parquet", [5, 7, 9]), Rows(tmp_path / "b.parquet", range(30))]
    assert sources(tables, [2, 0, 3]) == (
        f"Its batch: rows 5, 9 of {tmp_path / 'a.parquet'}; row 0 of {tmp_path / 'b.parquet'} (the first row is 0)."
    )
    assert "rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 18 more of" in sources(tables, range(3, 33))
    assert sources([], [1]) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_looking_never_waits_for_the_gpu():
    watch = Watch.__new__(Watch)
    watch.copies, watch.scaled = deque(), False
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.look(1, [torch.ones((), device="cuda"), torch.ones((), device="cuda")])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watch.settle(wait=True)
    watch.trainer, watch.tables, watch.checkpoint = None, [], lambda: None
    watch.look(2, [torch.ones((), device="cuda"), torch.full((), math.inf, device="cuda")])
    with pytest.raises(StageFailed, match="gradient's norm is inf"):
        watch.settle(wait=True)
