"""The PPO trainer against a float64 oracle, and what must hold exactly. T1, T2, T4, T10, T11, T13, T14, T15, T18."""

import contextlib
import copy
import json
import math

import oracle_ppo as oracle
import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PrinterCallback, TrainerCallback

from instructrl.trainers import rollout
from instructrl.trainers.packing import Pack
from instructrl.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = [{"prompt_ids": ids} for ids in tiny.sequences(11, 1, 12)]
DOCUMENTS = [{"input_ids": ids} for ids in tiny.sequences(37, 2, 20, seed=1)]
SETTINGS = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "total_episodes": 16,
    "batch_size": 8,
    "num_mini_batches": 2,
    "response_length": 8,
    "learning_rate": 1e-3,
    "critic_learning_rate": 2e-3,
    "warmup_iterations": 0,
    "max_tokens": 64,
}


class Recorder(PPOTrainer):
    """The trainer, and what each of its steps was given and did."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.steps = [*getattr(self, "steps", []), (inputs["episodes"], inputs["rows"])]
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return loss


class Steps(TrainerCallback):
    """Gradients and learning rates as the optimizer sees them."""

    def __init__(self):
        self.norms, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.norms.append([norm(part.parameters()) for part in (model.policy, model.critic)])
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def norm(parameters):
    return torch.stack([p.grad.norm() for p in parameters]).norm().item()


def trainer(folder, architecture="llama", dtype=torch.float32, kind=Recorder, models=None, callbacks=None, **settings):
    make = {"dtype": dtype}
    parts = {
        "model": tiny.policy(architecture, **make),
        "value_model": tiny.reward_model(architecture, **make),
        "reward_model": tiny.reward_model(architecture, **make),
        "train_dataset": PROMPTS,
        "ptx_dataset": DOCUMENTS,
        "processing_class": tiny.tokenizer(),
    }
    options = SETTINGS | {"output_dir": str(folder)} | settings
    made = kind(args=PPOConfig(**options), callbacks=callbacks, **parts | (models or {}))
    made.remove_callback(PrinterCallback)
    return made


def trained(folder, *args, **settings):
    made = trainer(folder, *args, **settings)
    made.train()
    return made


def log(made):
    return [line for line in made.state.log_history if "objective/kl" in line]


def weights(model):
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def distance(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def rows_of(column, mask):
    return [row[keep].tolist() for row, keep in zip(column, mask, strict=True)]


# ---- the whole algorithm ---------------------------------------------------------------------------------------------


ORACLE = {"batch_size": 6, "total_episodes": 12, "response_length": 6}
LORE = {"temperature": 0.7, "reward_bias": 0.4, "kl_coef": 0.3, "lam": 0.8, "gamma": 0.9, "whiten_rewards": True}
PTX_SUM = {"ptx_coef": 0.1, "ptx_ratio": 0.5, "ptx_normalization": "sequence_sum"}
FAR = {"num_ppo_epochs": 3, "learning_rate": 1e-2, "critic_learning_rate": 3e-2}  # far enough for both clips to act


CASES = pytest.mark.parametrize(
    ("architecture", "dtype", "options"),
    [
        ("gpt2", torch.float64, {}),
        ("gpt2", torch.float64, FAR),
        ("gpt2", torch.float64, LORE | {"ptx_coef": 0.7, "ptx_ratio": 1.5}),
        ("gpt2", torch.float64, LORE | PTX_SUM),
        ("gpt2", torch.float32, LORE | PTX_SUM),
        ("llama", torch.float64, LORE | PTX_SUM),
        ("llama", torch.float32, FAR),
    ],
    ids=["gpt2", "gpt2-clipped", "gpt2-ptx", "gpt2-ptx-sum", "gpt2-float32", "llama-ptx-sum", "llama-float32-clipped"],
)


@CASES
def test_weights_after_two_iterations_are_the_oracles(tmp_path, architecture, dtype, options):
    # Llama computes its norms and rotations in float32 whatever its weights are in; Adam magnifies rounding.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5 if architecture == "llama" else 1e-9
    double = {"dtype": torch.float64}
    policy, critic = tiny.policy(architecture, **double), tiny.reward_model(architecture, **double)
    reference, reward_model = copy.deepcopy(policy), copy.deepcopy(critic)
    made = trained(tmp_path, architecture, dtype, **ORACLE | options)
    args = made.args
    settings = oracle.Settings(
        pad=tiny.PAD,
        eos=tiny.EOS,
        temperature=args.temperature,
        beta=args.kl_coef,
        discount=args.gamma,
        lam=args.lam,
        bias=args.reward_bias,
        ptx=args.ptx_coef,
        ptx_per_sequence=args.ptx_normalization == "sequence_sum",
        whiten_rewards=args.whiten_rewards,
        policy_rate=args.learning_rate,
        critic_rate=args.critic_learning_rate,
    )
    optimizers = [oracle.Adam(list(model.parameters()), settings) for model in (policy, critic)]
    seen, norms = None, []
    for step, (sampled, rows) in enumerate(made.steps):
        if sampled is not seen:
            seen, episodes = sampled, list(zip(sampled.sequences, sampled.prompt_lengths, strict=True))
            batch = oracle.experience(policy, critic, reference, reward_model, episodes, settings)
            for column, expected in zip(("old_logprobs", "values", "advantages", "returns"), batch, strict=True):
                for ours, theirs in zip(rows_of(getattr(sampled, column), sampled.mask), expected, strict=True):
                    assert ours == pytest.approx(theirs, abs=tolerance), column
        examples = []
        if made.ptx_order:
            count = args.ptx_batch_size
            examples = [DOCUMENTS[row]["input_ids"] for row in made.ptx_order.rows(step * count, count)]
        norms.append(oracle.update(policy, critic, optimizers, episodes, batch, rows, examples, settings))
    assert len(norms) == 2 * args.steps_per_iteration
    for ours, theirs in ((made.model.policy, policy), (made.model.critic, critic)):
        assert distance(weights(ours), weights(theirs)) < tolerance
    first = norms[: args.steps_per_iteration]
    assert log(made)[0]["critic/grad_norm"] == pytest.approx(sum(n for _, n in first) / len(first), rel=1e-4)
    if options.get("num_ppo_epochs"):
        assert log(made)[0]["policy/clipfrac_avg"] > 0.01
        assert log(made)[0]["val/clipfrac_avg"] > 0.01


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_first_minibatch_has_ratio_one_and_no_kl(tmp_path, architecture):
    made = trained(tmp_path, architecture, num_mini_batches=1, temperature=0.7, total_episodes=8)
    (first,) = log(made)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/approxkl_avg"] < 1e-10
    assert first["policy/clipfrac_avg"] == 0
    assert first["loss/policy_avg"] == pytest.approx(0, abs=1e-5)  # whitened advantages have mean 0
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["objective/non_score_reward"] == pytest.approx(0, abs=1e-5)
    assert 0 < first["val/num_eos_tokens"] < 8


def test_dropout_in_the_configuration_does_not_disturb_the_ratio(tmp_path):
    models = {"model": tiny.policy("llama", attention_dropout=0.5)}
    first = log(trained(tmp_path, num_mini_batches=1, total_episodes=8, models=models))[0]
    assert first["policy/approxkl_avg"] < 1e-10


@pytest.mark.parametrize("precision", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "weights"])
def test_in_bfloat16_the_old_log_probabilities_are_the_updates(tmp_path, precision):
    """The sampler's would be off by up to 0.1 there, before the first step."""
    first = log(trained(tmp_path, "gpt2", num_mini_batches=1, total_episodes=8, **precision))[0]
    assert first["val/ratio"] == pytest.approx(1, abs=0.01)
    assert first["policy/approxkl_avg"] < 1e-3
    assert abs(first["objective/kl"]) < 0.01


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = trained(tmp_path), trained(tmp_path, activation_checkpointing=True)
    assert checkpointed.model.policy.is_activation_checkpointing
    assert checkpointed.model.critic.is_activation_checkpointing
    assert distance(weights(plain.model), weights(checkpointed.model)) < 1e-6


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_critic_starts_at_the_score(tmp_path, architecture):
    """At EOS, the value right after the start is the shifted score: same position, same weights."""
    made = trainer(tmp_path, architecture, reward_bias=0.37, response_length=20)
    episodes = made.experience(0)
    ended = [row for row in range(8) if episodes.ended[row]]
    assert ended
    for row in ended:
        ids = episodes.sequences[row]
        pack = Pack.of([ids], [range(len(ids) - 1, len(ids))], tiny.PAD, "cpu")
        value = rollout.token_scores(made.model.critic, pack) - made.args.reward_bias
        assert value.item() == pytest.approx(episodes.scores[row].item(), abs=1e-5)


def test_the_bias_shifts_scores_values_and_returns_and_changes_no_advantage(tmp_path):
    plain, shifted = (trainer(tmp_path, reward_bias=bias, missing_eos_penalty=0.0).experience(0) for bias in (0.0, 2.5))
    assert plain.sequences == shifted.sequences
    assert torch.allclose(shifted.scores, plain.scores - 2.5, atol=1e-5)
    mask = plain.mask
    assert torch.allclose(shifted.values[mask], plain.values[mask] - 2.5, atol=1e-5)
    assert torch.allclose(shifted.returns[mask], plain.returns[mask] - 2.5, atol=1e-4)
    assert torch.allclose(shifted.advantages, plain.advantages, atol=1e-4)
    assert torch.equal(shifted.scores.argsort(), plain.scores.argsort())


def test_a_response_without_eos_loses_the_penalty(tmp_path):
    free, fined = (
        trainer(tmp_path, missing_eos_penalty=x, whiten_advantages=False, lam=1.0).experience(0) for x in (0, 3)
    )
    cut = ~free.ended
    assert cut.any()
    assert (~cut).any()
    assert torch.equal(free.scores, fined.scores)  # what is logged as the score is the score
    difference = (free.returns - fined.returns)[:, 0]
    assert torch.allclose(difference, 3.0 * cut, atol=1e-5)


# ---- PPO-ptx ---------------------------------------------------------------------------------------------------------


def test_the_gradient_of_ppo_ptx_is_the_sum_of_the_two(tmp_path):
    one_step = {
        "architecture": "gpt2",
        "total_episodes": 8,
        "num_mini_batches": 1,
        "dtype": torch.float64,
        "ptx_ratio": 2.0,
    }
    ppo = trained(tmp_path, **one_step)
    both = trained(tmp_path, **one_step, ptx_coef=27.8)
    policy = tiny.policy("gpt2", dtype=torch.float64)
    examples = [DOCUMENTS[row]["input_ids"] for row in both.ptx_order.rows(0, 16)]
    settings = oracle.Settings(pad=tiny.PAD, eos=tiny.EOS)
    oracle.pretraining_loss(policy, examples, settings).backward()
    for name, p in policy.named_parameters():
        expected = ppo.gradients[f"policy.{name}"] + 27.8 * p.grad
        assert torch.allclose(both.gradients[f"policy.{name}"], expected, atol=1e-9)
    for name in weights(ppo.model.critic):
        assert torch.equal(ppo.gradients[f"critic.{name}"], both.gradients[f"critic.{name}"])
    line, pretraining = log(both)[0], 27.8 * norm(policy.parameters())
    alone = torch.stack([g.norm() for name, g in ppo.gradients.items() if name.startswith("policy.")]).norm().item()
    assert line["ptx/grad_norm"] == pytest.approx(pretraining, rel=1e-6)
    assert line["ppo/grad_norm"] == pytest.approx(alone, rel=1e-6)
    assert line["ptx/grad_ratio"] == pytest.approx(pretraining / alone, rel=1e-6)
    assert -1 <= line["ptx/grad_cosine"] <= 1
    assert line["loss/ptx"] == pytest.approx(oracle.pretraining_loss(policy, examples, settings).item(), rel=1e-6)


def test_without_ptx_coef_the_pretraining_data_change_nothing(tmp_path):
    with_data = trained(tmp_path)
    without = trained(tmp_path, models={"ptx_dataset": None})
    assert distance(weights(with_data.model), weights(without.model)) == 0


def test_the_papers_gamma_trains_on_and_its_ratio_says_what_it_does(tmp_path):
    """At 27.8 the pretraining gradient decides: its loss falls, nothing diverges, and PPO's share is small."""
    options = {"total_episodes": 8 * 20, "learning_rate": 5e-3, "ptx_ratio": 2.0}
    weak, papers = (log(trained(tmp_path, ptx_coef=gamma, **options)) for gamma in (0.01, 27.8))
    assert papers[-1]["loss/ptx"] < papers[0]["loss/ptx"] - 0.3
    assert papers[-1]["loss/ptx"] < weak[-1]["loss/ptx"] - 0.2
    assert all(math.isfinite(value) for line in papers for value in line.values())
    assert max(line["ptx/grad_ratio"] for line in weak) < 1 < min(line["ptx/grad_ratio"] for line in papers)


@pytest.mark.parametrize("ids", [[3, 4, tiny.PAD, tiny.PAD], [3], []])
def test_pretraining_rows_that_are_padded_or_empty_are_refused(tmp_path, ids):
    made = trainer(tmp_path, ptx_coef=1.0, models={"ptx_dataset": [{"input_ids": ids}]})
    with pytest.raises(ValueError, match="padded, or has fewer than two tokens"):
        made.train()


def test_eight_pretraining_examples_an_episode_and_every_one_once_a_pass(tmp_path):
    made = trainer(tmp_path, ptx_coef=1.0, total_episodes=32)
    used = []
    made.pack = lambda sequences, starts: used.extend(map(tuple, sequences)) or PPOTrainer.pack(made, sequences, starts)
    made.train()
    documents = [tuple(row["input_ids"]) for row in DOCUMENTS]
    pretraining = [ids for ids in used if ids in set(documents)]
    assert len(pretraining) == 8 * 32
    counts = [pretraining.count(ids) for ids in documents]
    assert max(counts) - min(counts) <= 1


# ---- steps, splits, schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize(("max_tokens", "accumulation"), [(1, 1), (40, 1), (10_000, 1), (10_000, 2), (10_000, 8)])
def test_an_iteration_takes_minibatches_times_epochs_steps(tmp_path, minibatches, epochs, max_tokens, accumulation):
    """Also where an iteration crosses the end of the prompts: there are 11, so the second of 3 does."""
    steps = Steps()
    options = {"num_mini_batches": minibatches, "num_ppo_epochs": epochs, "max_tokens": max_tokens}
    options["gradient_accumulation_steps"] = accumulation
    made = trained(tmp_path, callbacks=[steps], total_episodes=24, **options)
    assert len(steps.norms) == made.state.global_step == 3 * minibatches * epochs
    per_iteration = minibatches * epochs
    for iteration in range(3):
        of_iteration = made.steps[iteration * per_iteration : (iteration + 1) * per_iteration]
        assert len({id(episodes) for episodes, _ in of_iteration}) == 1
        for epoch in range(epochs):
            rows = [row for _, rows in of_iteration[epoch * minibatches : (epoch + 1) * minibatches] for row in rows]
            assert sorted(rows) == list(range(8))
    assert [line["episode"] for line in log(made)] == [8, 16, 24]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_micro_batches_do_not_change_the_gradient(tmp_path, architecture):
    split = [
        trainer(tmp_path, architecture, ptx_coef=0.5, ptx_ratio=2, total_episodes=8, **cut)
        for cut in (
            {"max_tokens": 10_000},
            {"max_tokens": 1},
            {"max_tokens": 50},
            {"max_tokens": 10_000, "gradient_accumulation_steps": 2},
        )
    ]
    passes = []
    for made in split:
        made.args.max_steps = 1
        made.pack = lambda *inputs, made=made: passes.append(made) or PPOTrainer.pack(made, *inputs)
        made.train()
    assert [passes.count(made) for made in split[:2]] == [2, 4 + 8]  # one of each kind, or one a sequence
    assert passes.count(split[3]) == 3
    for made in split[1:]:
        assert made.steps[0][1] == split[0].steps[0][1]
        assert distance(made.gradients, split[0].gradients) < 1e-6


def test_batching_of_generation_does_not_change_the_result(tmp_path):
    a, b = trained(tmp_path, generation_batch_size=3), trained(tmp_path, generation_batch_size=128)
    assert a.last_episodes.sequences == b.last_episodes.sequences
    assert distance(weights(a.model), weights(b.model)) < 1e-5


class Waits(TorchDispatchMode):
    """What a GPU would have to be waited for: a number that is read, or a shape that depends on one."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen, self.passes = set(), 0

    def __enter__(self):
        Tensor.tolist = lambda tensor: self.seen.add("tolist")  # which reads memory without an operator
        return super().__enter__()

    def __exit__(self, *error):
        del Tensor.tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(one is not None and one.dtype == torch.bool for one in chosen)
        if name in self.names or by_mask:
            self.seen.add(name)
        self.passes += name in ("_log_softmax", "logsumexp", "embedding")
        return operator(*args, **kwargs or {})


@contextlib.contextmanager
def in_the_inner_loop(made, watch):
    """`with watch():` around every forward pass, with its loss and statistics, and every backward pass."""
    forward, backward = made.compute_loss_context_manager, made.accelerator.backward

    @contextlib.contextmanager
    def watched_forward():
        with forward(), watch():
            yield

    def watched_backward(loss):
        with watch():
            backward(loss)

    made.compute_loss_context_manager, made.accelerator.backward = watched_forward, watched_backward
    yield
    made.compute_loss_context_manager, made.accelerator.backward = forward, backward


INNER = {"ptx_coef": 0.5, "num_ppo_epochs": 2, "max_tokens": 30}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_nothing_in_the_inner_loop_waits_for_the_device(tmp_path, architecture, precision):
    made, waits = trainer(tmp_path, architecture, **INNER, **precision), Waits()
    with in_the_inner_loop(made, lambda: waits):
        made.train()
    assert waits.seen == set()
    assert waits.passes > 3 * made.state.global_step  # of ptx, policy and critic


@pytest.mark.parametrize(
    "wait",
    [Tensor.item, lambda one: one.tolist(), bool, torch.nonzero, lambda one: one[one > 0]],
    ids=["item", "tolist", "bool", "nonzero", "mask"],
)
def test_what_would_wait_is_seen(wait):
    with Waits() as waits:
        wait(torch.ones(1))
    assert waits.seen
    assert torch.ones(1).tolist() == [1]


def test_learning_rates_warm_up_by_iterations_and_stay(tmp_path):
    steps = Steps()
    trained(tmp_path, callbacks=[steps], total_episodes=8 * 12, warmup_iterations=10, response_length=1)
    factors = [0.1 + 0.09 * iteration for iteration in range(10)] + [1.0, 1.0]
    assert len(steps.rates) == 24
    for step, rates in enumerate(steps.rates):
        assert sorted(set(rates)) == pytest.approx([1e-3 * factors[step // 2], 2e-3 * factors[step // 2]], rel=1e-9)


def test_learning_rates_may_fall_in_a_straight_line_after_the_warm_up(tmp_path):
    steps = Steps()
    options = {"warmup_iterations": 2, "final_learning_rate_share": 0.2, "num_ppo_epochs": 1, "response_length": 1}
    trained(tmp_path, callbacks=[steps], total_episodes=8 * 6, **options)
    factors = [rates[0] / 1e-3 for rates in steps.rates[::2]]
    assert factors == pytest.approx([0.1, 0.55, 1, 0.8, 0.6, 0.4])
    assert [rates[-1] for rates in steps.rates] == pytest.approx([2 * rates[0] for rates in steps.rates])


def test_policy_and_critic_have_their_own_learning_rates_and_every_weight_one(tmp_path):
    made = trainer(tmp_path, weight_decay=0.1)
    rates = {id(p): group["lr"] for group in made.create_optimizer().param_groups for p in group["params"]}
    assert {rates[id(p)] for p in made.model.policy.parameters()} == {1e-3}
    assert {rates[id(p)] for p in made.model.critic.parameters()} == {2e-3}
    decays = {id(p): group["weight_decay"] for group in made.optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for name, p in made.model.named_parameters() if "norm" in name} == {0.0}
    assert {decays[id(p)] for name, p in made.model.named_parameters() if "mlp" in name} == {0.1}


def test_policy_and_critic_are_each_clipped_to_the_norm(tmp_path):
    steps = Steps()
    made = trained(tmp_path, callbacks=[steps], max_grad_norm=1e-3)
    for norms in steps.norms:
        assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert min(line["grad_norm"] for line in log(made)) > 1e-2  # logged before clipping


def test_the_twenty_numbers_are_logged_once_an_iteration(tmp_path):
    lines = log(trained(tmp_path, ptx_coef=1.0))
    names = """episode eps lr objective/scores objective/scores_std objective/kl objective/non_score_reward
        objective/rlhf_reward objective/entropy policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg
        val/clipfrac_avg val/ratio val/explained_var val/num_eos_tokens completions/mean_length grad_norm loss/ptx"""
    assert len(lines) == 2
    for line in lines:
        assert set(names.split()) <= line.keys()
        json.dumps(line)


# ---- learning --------------------------------------------------------------------------------------------------------


LEARNING = {"num_mini_batches": 1, "missing_eos_penalty": 0.0, "max_tokens": 10_000, "generation_batch_size": 1000}


@pytest.mark.parametrize(("beta", "iterations"), [(0.5, 40), (20.0, 10)])
def test_a_bandit_converges_to_its_known_optimum(tmp_path, beta, iterations):
    """One prompt, answers of one token: eq. 2 is largest at the reference times exp(reward / beta), normalised."""
    rewards = torch.randn(tiny.VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def reward(completion_ids, **kwargs):
        return rewards[[ids[0] for ids in completion_ids]].tolist()

    models = {"reward_model": None, "reward_funcs": [reward], "train_dataset": [{"prompt_ids": [5, 6]}]}
    options = LEARNING | {"batch_size": 256, "total_episodes": 256 * iterations, "response_length": 1, "models": models}
    rates = {"learning_rate": 1e-2, "critic_learning_rate": 1e-2, "vf_coef": 1.0, "cliprange_value": 100.0}
    made = trained(tmp_path, kl_coef=beta, whiten_advantages=False, **options, **rates)

    def distribution(model):
        hidden = model.base_model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
        return rollout.next_token_logits(model, hidden, None).double().softmax(0)

    with torch.no_grad():
        policy, reference = distribution(made.model.policy), distribution(made.ref_model)
        optimum = reference * (rewards / beta).exp()
        allowed = [token for token in range(tiny.VOCABULARY) if token != tiny.PAD]
        policy, reference, optimum = (p[allowed] / p[allowed].sum() for p in (policy, reference, optimum))
    distance_to = {
        name: (policy * (policy / p).log()).sum().item() for name, p in (("best", optimum), ("ref", reference))
    }
    start = (reference * (reference / optimum).log()).sum().item()
    assert distance_to["best"] < 0.02
    assert start > 1.5 if beta == 0.5 else distance_to["ref"] < 0.02  # far to go, or held back


def test_a_reward_model_can_be_learnt_from(tmp_path):
    """Episodes of several tokens, a score at their end only, and the critic from the reward model."""
    options = LEARNING | {"batch_size": 64, "num_mini_batches": 4, "total_episodes": 64 * 24, "response_length": 6}
    lines = log(trained(tmp_path, learning_rate=1e-2, critic_learning_rate=1e-2, kl_coef=0.01, **options))
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-4:]) / 4 > scores[0] + lines[0]["objective/scores_std"] / 2
    assert lines[-1]["objective/kl"] > 1


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Interrupt(TrainerCallback):
    """Wants to save and stop after a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path, architecture):
    options = {"total_episodes": 32, "ptx_coef": 0.5, "ptx_ratio": 2.0, "num_ppo_epochs": 2}
    options |= {"warmup_iterations": 3, "response_length": 6}
    whole = trained(tmp_path / "whole", architecture, **options)
    # The wish comes in the middle of the second iteration (of 4 steps each) and is put off to its end.
    stopped = trained(tmp_path / "parts", architecture, callbacks=[Interrupt(5)], **options)
    assert stopped.state.global_step == 8
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-8"]
    torch.manual_seed(12345)
    torch.rand(100)
    resumed = trainer(tmp_path / "parts", architecture, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert len(resumed.steps) == 8
    assert distance(weights(whole.model), weights(resumed.model)) == 0
    for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    timeless = [{k: v for k, v in line.items() if k != "eps" and "seconds" not in k} for line in log(whole)]
    assert timeless == [{k: v for k, v in line.items() if k != "eps" and "seconds" not in k} for line in log(resumed)]


def test_what_is_saved_loads_with_the_stock_classes(tmp_path):
    models = {"model": tiny.policy("gpt2", resid_pdrop=0.2)}
    made = trained(tmp_path, "gpt2", models=models)
    made.save_model(str(tmp_path / "model"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model" / "critic")
    assert distance(weights(policy), weights(made.model.policy)) == 0
    assert distance(weights(critic), weights(made.model.critic)) == 0
    assert policy.config.use_cache
    assert policy.config.resid_pdrop == 0.2
    assert not list((tmp_path / "model").rglob("*.bin"))  # nothing that would have to be unpickled


def test_only_policy_and_critic_change(tmp_path):
    made = trainer(tmp_path)
    before = [weights(model) for model in (made.ref_model, made.reward_model, made.model.policy, made.model.critic)]
    made.train()
    after = [weights(model) for model in (made.ref_model, made.reward_model, made.model.policy, made.model.critic)]
    moved = [distance(a, b) for a, b in zip(before, after, strict=True)]
    assert moved[:2] == [0, 0]
    assert min(moved[2:]) > 0


# ---- reward functions and refusals -----------------------------------------------------------------------------------


def test_reward_functions_get_what_trl_gives_them(tmp_path):
    seen = {}

    def reward(prompts, completions, completion_ids, length, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, length=length, others=set(kwargs))
        return [float(len(ids)) for ids in completion_ids]

    rows = [
        {"prompt": " ".join(f"w{i}" for i in row["prompt_ids"]), "length": len(row["prompt_ids"])} for row in PROMPTS
    ]
    made = trainer(tmp_path, models={"train_dataset": rows, "reward_model": None, "reward_funcs": [reward, reward]})
    episodes = made.experience(0)
    responses = [ids[start:] for ids, start in zip(episodes.sequences, episodes.prompt_lengths, strict=True)]
    assert episodes.scores.tolist() == [2 * len(ids) for ids in responses]
    assert seen["ids"] == responses
    assert seen["length"] == episodes.prompt_lengths
    assert [words(text) for text in seen["prompts"]] == [
        ids[:start] for ids, start in zip(episodes.sequences, episodes.prompt_lengths, strict=True)
    ]
    assert [words(text) for text in seen["completions"]] == [[i for i in ids if i > 2] for ids in responses]


def words(text):
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize(
    ("scores", "message"),
    [([1.0], "reward function bad gave 1 scores for 8 responses"), ([float("nan")] * 8, r"the score of 'w.*' is nan")],
)
def test_wrong_scores_are_refused(tmp_path, scores, message):
    def bad(**kwargs):
        return scores

    made = trainer(tmp_path, models={"reward_funcs": [bad]})
    with pytest.raises(ValueError, match=message):
        made.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 9}, "batch_size=9 is not a multiple of num_mini_batches x processes = 2"),
        ({"total_episodes": 4}, "total_episodes=4 is less than one batch_size=8"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"ptx_normalization": "mean"}, "neither token_mean nor sequence_sum"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs=0 must be at least 1"),
        ({"response_length": 0}, "response_length=0 must be at least 1"),
        ({"max_steps": 3}, "max_steps=3: the length of training is total_episodes"),
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "load_best_model_at_end",
        ),
        ({"ptx_coef": 1.0, "ptx_ratio": 0.1}, "ptx_ratio=0.1 leaves 0 pretraining examples a step"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0"),
        ({"ema_every": "epoch"}, "ema_every='epoch' is neither iteration nor step"),
        ({"kl_estimator": "k2"}, "kl_estimator='k2' is neither k1 nor k3"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be above 0"),
        ({"response_length": 40}, "a prompt of 9 tokens and response_length=40 exceed the policy's context of 48"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def shared():
    model = tiny.reward_model("llama")
    return {"reward_model": model, "value_model": model}


def same_policy():
    model = tiny.policy("llama")
    return {"model": model, "ref_model": model}


def adapted_reference():
    model = get_peft_model(tiny.policy("llama"), LoraConfig(target_modules=["q_proj"]))
    return {"model": model, "ref_model": model.get_base_model()}


def learnt_prompts():
    return {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}


def without(name):
    words = tiny.tokenizer()
    setattr(words, name, None)
    return words


def pad_is_eos():
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    return words


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda: {"value_model": tiny.reward_model("llama", max_position_embeddings=10)}, "critic's context of 10"),
        (
            lambda: {"reward_model": tiny.reward_model("llama", max_position_embeddings=10)},
            "reward model's context of 10",
        ),
        (lambda: {"ref_model": tiny.policy("llama", vocab_size=20)}, r"the ref_model's vocabulary \(20\) is smaller"),
        (adapted_reference, "ref_model shares its weights with the policy"),
        (learnt_prompts, "adapter of learnt prompts"),
        (shared, "value_model shares its weights with another model"),
        (same_policy, "ref_model is the policy itself"),
        (lambda: {"value_model": None}, "value_model is missing"),
        (lambda: {"value_model": tiny.policy("llama", 1)}, "value_model must be a sequence-classification model"),
        (lambda: {"reward_model": None}, "nothing scores the responses"),
        (lambda: {"processing_class": pad_is_eos()}, "the same as EOS"),
        (lambda: {"processing_class": without("pad_token")}, "pad token is missing"),
        (lambda: {"processing_class": without("eos_token")}, "no EOS token"),
        (lambda: {"train_dataset": []}, "no prompts"),
        (lambda: {"train_dataset": [{"prompt_ids": []}]}, "a prompt has no tokens"),
        (lambda: {"ptx_dataset": None}, "ptx_coef=1.0 needs pretraining examples"),
        (lambda: {"ptx_dataset": []}, "ptx_coef=1.0 needs pretraining examples"),
    ],
)
def test_models_and_data_that_cannot_work_are_refused(tmp_path, models, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, models=models(), ptx_coef=1.0)
