"""Checkpoints: a run that was stopped or killed ends as one that was not; the log holds each step once."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from instructrl.errors import StageFailed
from instructrl.progress import read_progress
from instructrl.stages.checkpoints import FOLDER, LOG, last_checkpoint, train

STEPS = 12


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x, y):
        noise = 0.1 * torch.randn(()) if self.training else 0.0  # so that the state of the random numbers matters
        return {"loss": ((x @ self.weight + noise - y) ** 2).mean()}


def make(folder, learning_rate=0.1, callbacks=(), kind=Trainer, logging_steps=1):
    torch.manual_seed(0)
    rows = [{"x": torch.randn(3), "y": torch.randn(())} for _ in range(16)]
    args = TrainingArguments(
        output_dir=str(folder / FOLDER),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=learning_rate,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return kind(model=Line(), args=args, train_dataset=rows, callbacks=list(callbacks))


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act()


class Killed(Exception):
    """Stands for SIGKILL: nothing after it runs, no handler either."""


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def log(folder):
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def steps(folder):
    return [line["step"] for line in log(folder)]


@pytest.fixture
def reference(tmp_path):
    folder = tmp_path / "reference"
    folder.mkdir()
    trainer = make(folder)
    train(trainer, folder)
    return trainer.model.weight.detach().clone(), log(folder)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_sigterm_saves_exits_with_75_and_resumes_exactly(reference, folder):
    with pytest.raises(SystemExit) as exit_:
        train(make(folder, callbacks=[At(5, terminate)]), folder)
    assert exit_.value.code == 75
    assert Path(last_checkpoint(folder / FOLDER)).name == "checkpoint-5"
    trainer = make(folder)
    train(trainer, folder)
    assert torch.equal(trainer.model.weight, reference[0])
    assert steps(folder) == list(range(1, STEPS + 1))
    assert [line["loss"] for line in log(folder)] == [line["loss"] for line in reference[1]]


def test_a_line_of_the_log_is_the_mean_over_all_its_steps_though_resumed_among_them(tmp_path):
    def trained(folder, **options):
        folder.mkdir(exist_ok=True)
        trainer = make(folder, logging_steps=4, **options)
        trainer._metrics = {"train": {"accuracy": []}}
        trainer.add_callback(At(6, lambda: trainer._metrics["train"]["accuracy"].append(1.0)))
        return train(trainer, folder), trainer._metrics["train"]["accuracy"]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = trained(whole)
    with pytest.raises(SystemExit):
        trained(cut, callbacks=[At(7, terminate)])
    assert trained(cut) == expected  # the mean loss of the training, and a metric of step 6, saved in step 7
    assert log(cut) == log(whole)
    assert steps(cut) == list(range(4, STEPS + 1, 4))


def test_the_handler_of_sigterm_is_put_back(folder):
    before = signal.getsignal(signal.SIGTERM)
    train(make(folder), folder)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_kill_between_saves_costs_only_the_steps_since(reference, folder):
    """A save every step (0 minutes), killed in step 8: what the log says of later steps goes."""
    with pytest.raises(Killed):
        train(make(folder, callbacks=[At(8, kill)]), folder, save_minutes=0)
    assert Path(last_checkpoint(folder / FOLDER)).name == "checkpoint-7"
    with (folder / LOG).open("a") as file:
        file.write('{"step": 8, "loss": 9.0}\n{"step": 9, "lo')  # logged after the checkpoint, the last one half
    trainer = make(folder)
    train(trainer, folder)
    assert torch.equal(trainer.model.weight, reference[0])
    assert steps(folder) == list(range(1, STEPS + 1))
    assert 9.0 not in [line["loss"] for line in log(folder)]


def test_a_checkpoint_without_its_mark_does_not_count(reference, folder):
    with pytest.raises(Killed):
        train(make(folder, callbacks=[At(6, kill)]), folder, save_minutes=0)
    half = folder / FOLDER / "checkpoint-11"
    half.mkdir()
    (half / "config.json").write_text("{}")
    trainer = make(folder)
    train(trainer, folder)
    assert torch.equal(trainer.model.weight, reference[0])


def test_no_checkpoint_before_its_time(folder):
    train(make(folder), folder, save_minutes=10)
    assert last_checkpoint(folder / FOLDER) is None


class EveryFourth(Trainer):
    """Puts saves off, as PPO does to the end of an iteration."""

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.state.global_step % 4:
            self.control.should_save = False
        return super()._maybe_log_save_evaluate(*args, **kwargs)


def test_a_trainer_may_put_a_save_off_and_the_stop_with_it(reference, folder):
    with pytest.raises(SystemExit):
        train(make(folder, callbacks=[At(5, terminate)], kind=EveryFourth), folder)
    assert [path.name for path in (folder / FOLDER).iterdir()] == ["checkpoint-8"]
    trainer = make(folder, kind=EveryFourth)
    train(trainer, folder)
    assert torch.equal(trainer.model.weight, reference[0])


def test_sigterm_in_the_last_step_changes_nothing(reference, folder):
    trainer = make(folder, callbacks=[At(STEPS, terminate)])
    train(trainer, folder)
    assert torch.equal(trainer.model.weight, reference[0])


def test_the_display_knows_step_and_loss(folder):
    train(make(folder), folder)
    shown = read_progress(folder)
    assert (shown.step, shown.total) == (STEPS, STEPS)
    assert shown.numbers["loss"] == pytest.approx(log(folder)[-1]["loss"])


def test_a_loss_that_is_no_number_stops_the_stage(folder):
    with pytest.raises(StageFailed, match=r"diverged: the loss is (nan|inf) at step \d+; lower the learning rate"):
        train(make(folder, learning_rate=1e38), folder, save_minutes=10)
    assert last_checkpoint(folder / FOLDER) is None


def test_weights_that_are_no_numbers_are_never_saved(folder):
    trainer = make(folder)

    def spoil():
        trainer.model.weight.data[1] = float("inf")

    trainer.add_callback(At(4, spoil))
    with pytest.raises(StageFailed, match="weight is not finite at step 4"):
        train(trainer, folder, save_minutes=0)
    assert Path(last_checkpoint(folder / FOLDER)).name == "checkpoint-3"
