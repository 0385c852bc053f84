"""Muon and AdamW as one optimizer: against a plain reference, torch's own two, and itself after a reload."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from instructrl.trainers.muon import MuonAdamW, orthogonalise, parameter_groups


def tiny_llama(kind=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        tie_word_embeddings=True,
        pad_token_id=0,
        **options,
    )
    return kind(config)


def backward(model, seed):
    model.zero_grad()
    ids = torch.randint(1, 32, (4, 7), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()


def test_orthogonalise_keeps_singular_vectors_and_brings_values_near_one():
    torch.manual_seed(0)
    for shape in ((6, 6), (9, 4), (4, 9)):
        matrix = torch.randn(shape, dtype=torch.float64)
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        values = u.T @ orthogonalise(matrix) @ vt.T
        diagonal = values.diagonal()
        assert ((diagonal > 0.5) & (diagonal < 1.5)).all()
        assert (values - torch.diag(diagonal)).abs().max() < 1e-9


def test_steps_equal_a_plain_reference():
    """Momentum .95 as an average, Nesterov, orthogonalise, scale by sqrt(max(1, rows / columns)), decoupled decay."""
    torch.manual_seed(1)
    for shape in ((6, 3), (3, 6)):
        param = nn.Parameter(torch.randn(shape))
        expected, momentum = param.detach().clone(), torch.zeros(shape)
        optimizer = MuonAdamW([{"params": [param], "muon": True, "lr": 0.1, "weight_decay": 0.2}])
        for _ in range(4):
            param.grad = torch.randn(shape)
            momentum = 0.95 * momentum + 0.05 * param.grad
            update = orthogonalise(0.05 * param.grad + 0.95 * momentum) * max(1, shape[0] / shape[1]) ** 0.5
            expected = expected * (1 - 0.1 * 0.2) - 0.1 * update
            optimizer.step()
            torch.testing.assert_close(param.detach(), expected, rtol=1e-5, atol=1e-6)


def test_steps_equal_torch_muon_up_to_its_bfloat16():
    torch.manual_seed(2)
    start = torch.randn(12, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = MuonAdamW([{"params": [ours], "muon": True, "lr": 0.02, "weight_decay": 0.01}])
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(12, 5)
        optimizer.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # bfloat16 has 8 bits
    assert moved > 0.1


def test_the_rest_is_stepped_as_torch_adamw():
    model, twin = tiny_llama(), tiny_llama()
    optimizer = MuonAdamW(parameter_groups(model, learning_rate=0.01, muon_learning_rate=0.0), betas=(0.9, 0.95))
    rest = [p for name, p in twin.named_parameters() if "proj.weight" not in name]
    reference = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(3):
        backward(model, seed)
        backward(twin, seed)
        optimizer.step()
        reference.step()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification])
def test_groups_hold_every_parameter_once_and_heads_are_no_matrices_of_the_trunk(kind):
    model = tiny_llama(kind, **({"num_labels": 1} if kind is LlamaForSequenceClassification else {}))
    groups = parameter_groups(model, 1e-3, 1e-2, weight_decay=0.1)
    names = {id(param): name for name, param in model.named_parameters()}
    of = [{names[id(param)] for param in group["params"]} for group in groups]
    assert sorted(name for group in of for name in group) == sorted(names.values())
    assert of[0] == {name for name in names.values() if "proj.weight" in name}
    assert of[1] == {"model.embed_tokens.weight"} | ({"score.weight"} if "score.weight" in names.values() else set())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


def test_a_schedule_reaches_both_and_a_reload_continues_exactly():
    def run(model, optimizer, scheduler, seeds):
        for seed in seeds:
            backward(model, seed)
            optimizer.step()
            scheduler.step()

    def make(model):
        optimizer = MuonAdamW(parameter_groups(model, 0.01, 0.02, 0.1))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    straight = tiny_llama()
    optimizer, scheduler = make(straight)
    run(straight, optimizer, scheduler, range(3))
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    run(straight, optimizer, scheduler, range(3, 6))

    resumed = tiny_llama()
    optimizer, scheduler = make(resumed)
    for part, state in zip((resumed, optimizer, scheduler), saved, strict=True):
        part.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 4, 0.01 / 4, 0.01 / 4]
    run(resumed, optimizer, scheduler, range(3, 6))
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_vector_is_refused_by_muon():
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True, "lr": 0.1, "weight_decay": 0.0}])
