"""The schema of a recipe: every key a recipe or the command line may set, with its type, default, range and source.

What a stage computes is in the stage's section; how this machine computes it is in `runtime`.
A change in `runtime` never re-runs a stage. A change anywhere else re-runs the stages that read it.

"Paper" is Ouyang et al. 2022, arXiv 2203.02155. Where a docstring says "our choice", the paper prints no value.
"""

import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from instructrl import adapters, columns

CHAT = "chat"
"""The `model.template` that stands for the tokenizer's own chat template."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""

Rule = Annotated[Any, AfterValidator(columns.rule)]
"""Which value of a row is one of ours: a column's name, a path, a list of them, or a rule of `instructrl.columns`."""

Condition = Annotated[Any, AfterValidator(columns.condition)]
"""What a value must be: itself, one of a list, or {not: ...}, {min: ...}, {max: ...}."""


class Section(BaseModel):
    """One block of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoRA(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in place of all weights: W + alpha / r B A, of which A and B
    are trained. Not in the paper, which trains all weights; for models whose gradients and moments do not fit.

    All stages adapt one frozen base model. `sft` and `ppo_init` train a new adapter on it; every later one goes on from
    a copy of its input's: `reward_model` from `sft`'s, the policy of PPO from its `init`'s, the critic from
    `reward_model`'s. So the four roles of PPO share the base. An artifact holds its adapter and the merged weights. A
    scalar head is trained in full.
    """

    r: PositiveInt = 16
    """Rank of the update of each matrix. Our choice."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r. Our choice: 2 r, as is usual."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what adapters read, in `sft` and `ppo_init`: reward models and PPO are trained without dropout. Our choice."""
    target_modules: tuple[str, ...] = ()
    """The matrices that are adapted, by the end of their names: `[q_proj, v_proj]`. Empty: all but embedding and head,
    which comes closest to training all weights (Dettmers et al. 2023, arXiv 2305.14314; Schulman et al. 2025, "LoRA
    Without Regret")."""
    quantization: Literal["nf4"] | None = None
    """QLoRA (Dettmers et al. 2023): the base model's matrices in 4 bits, the constants that scale them in 8. Needs
    `instructrl[qlora]`. Merged weights are those in 4 bits plus the adapter, in `model.dtype`. Null: no."""


class Model(Section):
    """The base model: a causal language model from a folder or the Hub, or one that `pretrain` makes."""

    path: str | None = "openai-community/gpt2"
    """A local folder or a Hub id; null: the `pretrain` stage makes the model and its tokenizer from scratch."""
    revision: str | None = None
    """The Hub commit (40 hex digits); ignored for a folder."""
    template: str = "{prompt}\n\n"
    """What the model reads before it answers; `{prompt}` is replaced by the prompt. Special tokens in it are special,
    in a prompt never. `chat`: the tokenizer's own chat template, and answers end as its turns do. Our choice."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """What becomes of a prompt above `data.max_prompt_tokens`: it is dropped and counted, or loses its beginning (left)
    or its end (right). The paper keeps to prompts that fit (App. C)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The precision of the weights. The paper trains in fp16 with fp32 master weights (App. C), to which float32 with
    `runtime.bf16` comes closest. In bfloat16 small steps are rounded away: it is for `model.lora`, whose adapters stay
    float32."""
    lora: LoRA | None = None
    """Train adapters in place of all weights; null, as in the paper: all weights."""
    trust_remote_code: bool = False
    """Run model code that comes with a Hub repository. Leave it off unless you have read that code."""

    @model_validator(mode="after")
    def template_holds_the_prompt(self) -> "Model":
        if self.template != CHAT and self.template.count("{prompt}") != 1:
            raise ValueError("model.template must contain {prompt} exactly once, or be chat")
        return self


class World(Section):
    """The built-in tiny world: text, prompts, demonstrators, labelers and a gold preference, all generated."""

    people: Annotated[int, Field(ge=2, le=60)] = 24
    """People about whom the pretraining text states facts."""
    strangers: Annotated[int, Field(ge=1, le=40)] = 8
    """Named people about whom nothing is known: the right answer is that one does not know."""
    documents: PositiveInt = 24_000
    """Pretraining documents."""
    valid_documents: PositiveInt = 600
    """Held-out documents, for the loss that shows the alignment tax."""
    demonstrations: PositiveInt = 2_600
    """Prompts with a demonstrator's answer, for `sft`."""
    ranked_prompts: PositiveInt = 2_000
    """Prompts whose sampled answers the labelers rank, for `reward_model`."""
    valid_ranked_prompts: PositiveInt = 300
    """The same, held out to measure the reward model."""
    ppo_prompts: PositiveInt = 3_100
    """Prompts for `ppo` and `ppo_ptx`."""
    eval_prompts: PositiveInt = 1_000
    """Held-out prompts for `eval`; none of them appears in a training set."""
    skip_rate: Share = 0.33
    """Share of demonstrations that ignore the prompt's constraint."""
    ramble_rate: Share = 0.25
    """Share of demonstrations that go on after the answer."""
    hallucinate_rate: Share = 0.4
    """Share of demonstrations on unanswerable questions that make an answer up."""
    wrong_rate: Share = 0.06
    """Share of demonstrations on answerable questions that are wrong."""
    rude_rate: Share = 0.04
    """Share of demonstrations that are rude."""


class Tree(Section):
    """Messages that answer each other, one a row, the rows of a tree together. Each message that has answers becomes
    one row: its own columns, `path` (the messages from the first to itself) and `replies` (the answers to it)."""

    id: str
    """The column with the message's name, unique in its tree."""
    parent: str
    """The column with the name of the message that it answers; null: the tree's first."""
    group: str
    """The column with the tree's name."""
    where: dict[str, Condition] = {}
    """What a message must be, as in `where` of the source; any other is left out, with all that answers it."""
    replies: dict[str, Condition] = {}
    """What an answer must be to be among `replies`."""
    at_least: NonNegativeInt = 1
    """Replies that a message must have to become a row."""


class Source(Section):
    """One file, folder or Hub data set, and how its columns are named."""

    path: str
    """A local file (.jsonl, .json, .csv, .parquet, .txt, each also .gz), a folder of such files, or a Hub id. With an
    `adapter` it may be left out: the set's Hub id."""
    adapter: str | None = None
    """A public data set whose columns we know, as docs/data-sources.md lists them: fills in what is not given here."""
    columns: dict[str, Rule] = {}
    """Our column's name -> theirs, for each column that is named differently: `{prompt: instruction}`. A list joins
    columns: text by a blank line, `{prompt: [context, question]}`; else into a list, `{responses: [a, b]}`. Theirs may
    be a path, "completions[*].response", or a rule, `{scores: "completions[*].score"}`; see docs/data-sources.md."""
    where: dict[str, Condition] = {}
    """Keep rows whose values are these: `{lang: en, deleted: false}`; a list means any of these; {not: ...},
    {min: ...} and {max: ...} as they say. Others are counted and left out."""
    tree: Tree | None = None
    """The rows are messages that answer each other."""
    weight: PositiveFloat | None = None
    """This source's share of its table, beside the weights of the others: the largest mix that honours the weights
    without repeating a row. Null, for all sources of a table: every row."""
    name: str | None = None
    """The configuration of a Hub data set."""
    split: str = "train"
    """The split of a Hub data set."""
    revision: str | None = None
    """The Hub commit (40 hex digits)."""
    files: tuple[str, ...] = ()
    """Of a folder or a Hub data set only these files, named from its root; split and configuration then say nothing."""
    stream: bool = False
    """Read a Hub data set over the network as it comes; false: keep a copy on this disk."""
    licence: str = ""
    """The data's licence, for the data card."""
    limit: PositiveInt | None = None
    """Keep the first so many rows."""
    cut_prompt: int | None = None
    """Keep so many characters of a prompt, in whole words: its beginning (200: an article to summarize), or its end
    (-200: a dialogue). Null: prompts that are too long are dropped."""
    skip_invalid: bool = False
    """Drop and count rows that are wrong (an empty response, ranks that do not fit); false: stop at the first."""

    @model_validator(mode="after")
    def cut_leaves_something(self) -> "Source":
        if self.cut_prompt == 0:
            raise ValueError("cut_prompt=0 leaves nothing of a prompt; give a number of characters, or null")
        return self


Demonstrations = Annotated[Source, BeforeValidator(partial(adapters.expanded, kind="demonstrations"))]
Rankings = Annotated[Source, BeforeValidator(partial(adapters.expanded, kind="rankings"))]
Prompts = Annotated[Source, BeforeValidator(partial(adapters.expanded, kind="prompts"))]
Text = Annotated[Source, BeforeValidator(partial(adapters.expanded, kind="text"))]
Labels = Annotated[Source | None, BeforeValidator(partial(adapters.expanded, kind="labels"))]
"""A source of one kind of table, with its adapter's keys filled in."""


class Data(Section):
    """Demonstrations, rankings, prompts and pretraining text: from the built-in world, or from your own sources."""

    world: World | None = None
    """Generate everything; null: read the sources below."""
    demonstrations: tuple[Demonstrations, ...] = ()
    """{prompt, response}; {messages}; or {instruction, examples}, which gives a few-shot prompt an example."""
    rankings: tuple[Rankings, ...] = ()
    """{prompt, responses[K], ranks[K]}, rank 1 is best, equal ranks are ties; or {prompt, chosen, rejected}."""
    prompts: tuple[Prompts, ...] = ()
    """{prompt}, for PPO and evaluation; empty: PPO takes the prompts of the rankings that train the reward model,
    evaluation those of the rankings held out to measure it."""
    text: tuple[Text, ...] = ()
    """{text}, pretraining text for `pretrain` and for PPO-ptx; a .txt file is split at blank lines."""
    dedup_prefix: NonNegativeInt = 128
    """Characters: of prompts that share a prefix this long (case and whitespace apart), one stays; 0: all stay. The
    paper does so and prints no length (3.2); 128 is our choice."""
    max_prompts_per_user: PositiveInt | None = 200
    """Paper, 3.2. Users are those of the rows' `user`; rows without one have no limit."""
    languages: tuple[str, ...] = ()
    """Keep prompts in these languages (ISO 639-1: en, fr), where `language` or `instructrl[lang]` knows it; empty: all.
    The paper keeps all; 96 % were English (A.4)."""
    pii_filter: bool = True
    """Drop training prompts with personal data (paper, 3.2). Needs `instructrl[pii]`."""
    leakage: Literal["remove", "refuse", "report", "ignore"] = "remove"
    """What to do with training rows that share a whole text, or `leakage_ngram` words in a row, with a held-out prompt
    or an evaluation set. Our choice: the paper does not say."""
    leakage_ngram: PositiveInt = 13
    """Words; GPT-3's (Brown et al. 2020, App. C)."""
    evaluation_sets: tuple[Prompts, ...] = ()
    """Files, Hub data sets or adapters that will measure the models, kept out of training. All of a row counts."""
    valid_share: Share = 0.1
    """Share of users (of prompts, where there are no users) held out of everything; of text. Our choice; the paper's is
    11 % of the SFT set (Table 6)."""
    valid_ranking_share: Share = 0.2
    """Share whose rankings measure the reward model, at least `valid_share`; paper: 35 % (Table 6). Their
    demonstrations and PPO prompts are dropped and counted."""
    judge_ranking_share: Share = 0.3
    """Share whose rankings train the judge and nothing else (`eval.judge: reward_model`). Their demonstrations and PPO
    prompts are dropped and counted. Our choice."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are dropped and counted (App. C: 1k)."""
    max_response_tokens: PositiveInt = 1024
    """Longer responses are dropped and counted (App. C: 1k)."""

    @model_validator(mode="after")
    def one_origin(self) -> "Data":
        if self.world and (self.demonstrations or self.rankings or self.prompts or self.text):
            raise ValueError(
                "data.world and data sources exclude each other; set data.world: null to use your own files"
            )
        for kind in adapters.KINDS:
            weights = [source.weight for source in getattr(self, kind)]
            if None in weights and any(weights):
                raise ValueError(
                    f"data.{kind}[{weights.index(None)}].weight is missing: give all of data.{kind} one, or none"
                )
        if max(self.valid_share, self.valid_ranking_share) + self.judge_ranking_share >= 1:
            raise ValueError(
                "data.judge_ranking_share and the larger of data.valid_share and data.valid_ranking_share must stay "
                "below 1 together"
            )
        return self


class Pretrain(Section):
    """A small Llama and its byte-level BPE tokenizer, made from `data`'s text. Only where `model.path` is null.

    Not in the paper (it starts from GPT-3); every value is our choice, found on the tiny world.
    """

    vocab_size: Annotated[int, Field(ge=300)] = 768
    hidden_size: PositiveInt = 96
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    context_length: PositiveInt = 192
    mimetic: bool = True
    """Start from the structure of trained transformers (Trockman & Kolter 2023): copying values, one head that
    looks at the previous token."""
    steps: PositiveInt = 500
    tokens_per_step: PositiveInt = 2048
    learning_rate: PositiveFloat = 5e-3
    """AdamW, for embeddings, norms and biases."""
    muon_learning_rate: PositiveFloat = 0.02
    """Muon, for the matrices (torch.optim.Muon)."""
    warmup_steps: NonNegativeInt = 40
    weight_decay: NonNegativeFloat = 0.01


class SFT(Section):
    """Supervised fine-tuning on demonstrations. Paper section 3.5 and App. C.1 (values for 1.3B)."""

    learning_rate: PositiveFloat = 9.65e-6
    """Peak; cosine to `final_learning_rate_share` without warm-up."""
    final_learning_rate_share: Share = 0.1
    batch_size: PositiveInt = 32
    """Demonstrations an optimizer step, over all devices."""
    epochs: PositiveFloat = 16
    residual_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    completion_only_loss: bool = True
    """Loss on the response only. Our choice: the paper does not say."""
    adam_beta2: Share = 0.95
    muon_learning_rate: PositiveFloat | None = None
    """Train the matrices with Muon at this rate; null: AdamW for all, as the paper. For models as small as tiny's."""
    trainer: dict[str, Any] = {}
    """Any further field of TRL's SFTConfig."""


class Label(Section):
    """Rankings of the SFT model's own answers by the world's simulated labelers. Paper section 3.2."""

    responses_per_prompt: Annotated[int, Field(ge=2, le=9)] = 4
    """K; paper: 4 to 9. Equal answers of one prompt are shown once."""
    temperature: PositiveFloat = 1.0
    response_length: PositiveInt = 256
    """Tokens an answer may have."""
    labelers: PositiveInt = 5
    """Labelers who rank for training; as many more are held out (paper, 3.4)."""
    agreement_noise: PositiveFloat = 0.5
    """Scale of the Gumbel noise on a labeler's judgement."""
    tie_threshold: NonNegativeFloat = 0.4
    """A labeler ties answers that seem to differ by less than this; ties are encouraged (App. B) and dropped."""
    taste_spread: NonNegativeFloat = 0.3
    """Standard deviation of the labelers' own weights on length, correctness, constraint and toxicity."""


class RewardModel(Section):
    """The reward model from K-way rankings. Paper eq. 1 and App. C.2."""

    learning_rate: PositiveFloat = 9e-6
    """Peak; cosine to `final_learning_rate_share`."""
    final_learning_rate_share: Share = 0.1
    batch_size: PositiveInt = 64
    """Prompts an optimizer step, each with all its completions."""
    epochs: PositiveFloat = 1
    """More than one overfits (App. C.2)."""
    shuffle_pairs: bool = False
    """Train on all pairs of all rankings, shuffled, as if each were a ranking of two: what the paper gave up, since it
    overfits in one pass (3.5). A step has as many pairs as `batch_size` rankings have on average, to a whole multiple.
    """
    adam_beta2: Share = 0.95
    muon_learning_rate: PositiveFloat | None = None
    """As `sft.muon_learning_rate`."""
    trainer: dict[str, Any] = {}
    """Any further field of TRL's RewardConfig."""


class PPOInit(SFT):
    """The policy that PPO starts from and stays close to, where `init` of ppo or ppo_ptx says so. As SFT it comes from
    the base model, in fewer epochs and with pretraining documents mixed in. Paper App. C.3 (values for 1.3B)."""

    learning_rate: PositiveFloat = 5e-6
    """Peak; cosine to `final_learning_rate_share` without warm-up."""
    epochs: PositiveFloat = 2
    pretraining_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Documents among the examples trained on: at .1, one for nine demonstrations. The paper mixes in "10 % pretraining
    data" and does not say of what. By tokens it is another share: a document is longer, and all its tokens count."""
    ptx_max_length: PositiveInt = 512
    """Tokens of a document; longer ones are cut. Our choice."""


class PPO(Section):
    """Clipped PPO against the reward model with a per-token KL penalty. Paper eq. 2, App. C.4."""

    backend: Literal["instructrl", "trl"] = "instructrl"
    """Whose PPOTrainer runs: ours, or TRL's as it is, which only trl 1.12 has. TRL's has no PPO-ptx and cannot resume;
    what it is asked for and cannot do is refused before anything trains."""
    init: Literal["ppo_init", "sft"] = "ppo_init"
    """The stage whose model the policy starts from; also the reference of the KL penalty. The paper's is `ppo_init`
    (App. C.3), the supervised baseline that win rates are against is `sft`."""
    learning_rate: PositiveFloat = 5e-6
    """The policy's. Our choice in the paper's sweep, 2.55e-6 to 2.55e-5; without ptx all above 8.05e-6 diverged."""
    critic_learning_rate: PositiveFloat = 9e-6
    """The value function's (App. C.4)."""
    warmup_iterations: NonNegativeInt = 10
    """Both learning rates rise from a tenth of their peak over the first iterations, then stay (App. C.4)."""
    total_episodes: PositiveInt = 256_000
    batch_size: PositiveInt = 512
    """Episodes an iteration (one rollout)."""
    num_mini_batches: PositiveInt = 8
    """Optimizer steps an iteration and epoch; 512 / 8 = 64 episodes each."""
    num_ppo_epochs: PositiveInt = 1
    kl_coef: NonNegativeFloat = 0.02
    """beta in eq. 2."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """What the reward loses at each token: log pi/pi_ref (the paper's), or its estimate that is never negative."""
    kl_target: PositiveFloat | None = None
    """Nats a response that a controller moves beta towards, from `kl_coef` on (Ziegler et al. 2019); null: beta stays,
    as in the paper."""
    kl_horizon: PositiveInt = 10_000
    """Episodes; the controller's, as published."""
    cliprange: PositiveFloat = 0.2
    cliprange_value: PositiveFloat = 0.2
    """Our choice: the paper does not say whether values are clipped; TRL's default."""
    vf_coef: NonNegativeFloat = 0.1
    """TRL's default."""
    gamma: Share = 1.0
    """Discount: none (App. C.4). Not the paper's gamma, which is `ptx_coef`."""
    lam: Share = 0.95
    """GAE's lambda. Our choice (the paper does not print it); as TRL and lm-human-preferences."""
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    temperature: PositiveFloat = 1.0
    response_length: PositiveInt = 256
    """Tokens a response may have. Our choice; the paper caps responses at 1k."""
    missing_eos_penalty: NonNegativeFloat = 1.0
    """Subtracted from the score of a response that did not end by itself. Our choice."""
    missing_eos_score: float | None = None
    """The score of a response that did not end by itself, in place of its own and of the penalty; null: its own."""
    final_learning_rate_share: Share = 1.0
    """Both learning rates fall in a straight line to that share of their peak over the iterations after the warm-up;
    1: they stay, as in the paper."""
    max_grad_norm: PositiveFloat = 1.0
    """For the policy and for the critic, each. Our choice."""
    adam_beta2: Share = 0.95
    ptx_coef: NonNegativeFloat = 0.0
    """gamma in eq. 2: 0 is PPO, 27.8 is PPO-ptx."""
    ptx_ratio: PositiveFloat = 8.0
    """Pretraining examples an episode."""
    ptx_max_length: PositiveInt = 512
    """Tokens of a pretraining example; longer ones are cut. Our choice."""
    ptx_normalization: Literal["token_mean", "sequence_sum"] = "token_mean"
    """The pretraining loss is a mean over tokens, or a sum over each example's tokens averaged over examples.
    The paper does not say; gamma only has a meaning together with it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.992
    """Decay of the moving average of the policy's weights, saved as `ema` (App. C.4); 0: none."""
    ema_every: Literal["iteration", "step"] = "iteration"
    """When the average is updated. The paper does not say; at 500 iterations its horizon of 125 suggests iterations."""
    snapshots: NonNegativeInt = 0
    """Policies to keep along the way, evenly over the iterations, for `eval` to show where the reward goes on rising
    and the judge's score does not (Gao et al. 2022). Each takes the disk of a model. Our choice; 0: none."""

    @model_validator(mode="after")
    def minibatches_divide(self) -> "PPO":
        if self.batch_size % self.num_mini_batches:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of num_mini_batches={self.num_mini_batches}"
            )
        if self.total_episodes < self.batch_size:
            raise ValueError(f"total_episodes={self.total_episodes} is less than one batch_size={self.batch_size}")
        return self


class PPOPtx(PPO):
    """PPO with the pretraining gradient of eq. 2: the same keys, and gamma is the paper's (App. C.4)."""

    ptx_coef: NonNegativeFloat = 27.8
    """gamma in eq. 2; 0 would be plain PPO."""


class Endpoint(Section):
    """A judge behind an OpenAI-compatible endpoint. Its address and key are `OPENAI_BASE_URL` and `OPENAI_API_KEY` of
    the environment. It is told the rubric of the paper's labelers (Fig. 10) and asked about each pair in both orders.
    """

    model: str | None = None
    """The model's name, as the endpoint knows it."""
    pairs: Literal["sft", "all"] = "sft"
    """Which models are compared: each with SFT, or all with all, which costs two to three times as much."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 512}
    """What else is in each request."""


class Task(Section):
    """One public task, run by lm-evaluation-harness (`instructrl[eval]`) on every model. docs/tasks.md lists ours."""

    task: str
    """The name of one of ours, `paper_hellaswag`, or of any task of the harness, `hellaswag`."""
    path: str | None = None
    """The questions: a file, a folder of files or a Hub id, with the columns that the task reads; null: the task's own
    Hub data set."""
    examples: str | None = None
    """Where solved examples come from (`shots`), read as `path` is; null: the other questions, or the task's own."""
    shots: NonNegativeInt = 0
    """Solved examples before each question. Paper: 0, and as many as docs/tasks.md says (Table 14)."""
    prompt: str | None = None
    """Of the prompts that the paper tries on a task (`basic`, `respectful`, `biased`) this one; null: each of them."""
    limit: PositiveInt | None = None
    """The first so many questions; null: all."""
    classifier: str | None = None
    """For `paper_realtoxicity`: the folder or Hub id of a text classifier with a label that says toxic."""

    @model_validator(mode="before")
    @classmethod
    def name_alone(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value


class Eval(Section):
    """Samples and win rates of all five models, and what alignment cost. Paper section 4."""

    judge: Literal["gold", "reward_model", "labels", "endpoint"] = "reward_model"
    """Who compares answers: the world's gold preference; a reward model trained on rankings held out for it;
    your own labels (`eval.labels`); or a model behind an OpenAI-compatible endpoint (`eval.endpoint`)."""
    endpoint: Endpoint = Endpoint()
    labels: Labels = None
    """{prompt, model_a, model_b, winner} or {prompt, model, score}: human labels of an earlier run's samples. Beside a
    score, or in its place, may stand `likert` (1 to 7), and beside either the metadata of the paper's Table 3."""
    num_prompts: PositiveInt = 512
    temperature: NonNegativeFloat = 1.0
    """The paper samples InstructGPT at 1 (App. F); 0 is greedy. The report shows greedy beside it."""
    response_length: PositiveInt = 256
    """Tokens an answer may have."""
    prompted_templates: tuple[str, ...] = ()
    """Few-shot prefixes for GPT (prompted), each with `{prompt}`; of several, the one whose answers have the highest
    reward on validation prompts is used (App. C.5). Empty: the world's; on your own data a plain
    question-and-answer frame, and one with three short demonstrations."""
    prompted_stop: str = "\n"
    """GPT (prompted) stops here."""
    weights: Literal["ema", "last"] = "ema"
    """Which weights of ppo and ppo_ptx answer: the moving average, as in the paper (App. C.4), or the last."""
    best_of_n: NonNegativeInt = 0
    """One more baseline: of so many answers of SFT's, the one with the highest reward. Not in the paper; 0: none."""
    bootstrap_samples: PositiveInt = 2_000
    tasks: tuple[Task, ...] = ()
    """Public tasks by name, or {task, path, shots, limit, ...}; each question is asked of every model."""
    samples_shown: NonNegativeInt = 8
    """Prompts shown side by side in the report."""


class EndpointCalls(Section):
    """How an endpoint that judges is called. Its replies are kept in `endpoint/replies.sqlite` in `output_dir`, so that
    none is paid for twice."""

    at_once: PositiveInt = 8
    """Calls at the same time."""
    timeout: PositiveFloat = 120
    """Seconds to wait for a reply, before the call is made again."""
    retries: NonNegativeInt = 6
    """Of a call that fails with 429, 500 or above, a timeout, a cut connection or a broken reply."""
    backoff: PositiveFloat = 1
    """Seconds before the first retry, doubled for each further one; a server's Retry-After counts if it is longer."""
    price_in: NonNegativeFloat | None = None
    """Price of a million tokens that are sent, for the report; null: it says tokens only."""
    price_out: NonNegativeFloat | None = None
    """Price of a million tokens that are replied."""


JOB_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


def job_time(value: Any) -> Any:
    """The value, if it is a time as Slurm writes it.

    Raises:
        ValueError: it is not; YAML reads 24:00:00 without quotes as the number 86400.
    """
    if value is None or (isinstance(value, str) and JOB_TIME.fullmatch(value)):
        return value
    raise ValueError("write hours, minutes and seconds in quotes, '24:00:00', with days before them '2-12:00:00'")


class Slurm(Section):
    """What the job of a stage asks Slurm for, with `--slurm`: see docs/slurm.md. Null: the cluster's default."""

    partition: Annotated[str, Field(pattern=r"^\S+$")] | None = None
    """Several, separated by commas: whichever is free first."""
    account: Annotated[str, Field(pattern=r"^\S+$")] | None = None
    time: Annotated[str | None, BeforeValidator(job_time)] = None
    """The longest that one job may take: '24:00:00', '2-12:00:00'. A stage that trains may take several jobs."""
    save_seconds: Annotated[int, Field(ge=1, le=65535)] = 300
    """So long before the end of that time a stage is told to save and leave; its job is then queued again. PPO saves at
    the end of an iteration, which must not take longer. Our choice."""
    cpus: PositiveInt | None = None
    """Cores of each node."""
    mem_gb: PositiveInt | None = None
    """Main memory of each node, in Slurm's gigabytes (2^30 bytes)."""
    gpus: PositiveInt | None = None
    """GPUs of each node."""
    extra: tuple[str, ...] = ()
    """Further lines of the script: options of sbatch (`--qos=low`), and what is to be run before the stage
    (`module load cuda`)."""

    @model_validator(mode="after")
    def told_to_save_after_it_began(self) -> "Slurm":
        if self.time:
            found = JOB_TIME.fullmatch(self.time)
            days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
            if self.save_seconds >= ((days * 24 + hours) * 60 + minutes) * 60 + seconds:
                raise ValueError(f"save_seconds={self.save_seconds} is not less than time={self.time}")
        return self


class VLLM(Section):
    """VLLM as TRL runs it, with `runtime.rollouts=vllm`: the keys of TRL's GRPOConfig that begin with `vllm_`, and its
    defaults. See docs/scaling.md."""

    mode: Literal["colocate", "server"] = "colocate"
    """`colocate`: one inside each process, on its GPU; `server`: behind `vllm serve`, on GPUs of its own."""
    server_base_url: Annotated[str, Field(pattern=r"^https?://\S+$")] = "http://localhost:8000"
    server_timeout: PositiveFloat = 240
    """Seconds to wait for the server to be up."""
    group_port: PositiveInt = 51216
    """Where rank 0 hands the weights to the server's processes."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of each GPU's memory that a colocated vLLM takes for its copy of the weights and its cache."""
    tensor_parallel_size: PositiveInt = 1
    """Processes that share one colocated vLLM; each otherwise has one of its own."""
    max_logprob_difference: PositiveFloat = 0.1
    """Nats a token: where vLLM's log-probabilities of what it sampled differ from the policy's own by more, on average
    over an iteration, the stage stops. Our choice: bfloat16 alone makes about a hundredth."""


class Runtime(Section):
    """How this machine runs the recipe. Nothing here changes a fingerprint."""

    output_dir: str = "artifacts"
    jobs: PositiveInt = 1
    """What runs at the same time: independent stages (ppo beside ppo_ptx, points of a sweep) while memory has room for
    them, and with one thread a stage, on a CPU, the sampling inside `label` and `eval`. On the command line: --jobs."""
    memory_gb: PositiveFloat | None = None
    """Gigabytes (1e9 bytes) of main memory that stages may take side by side; null: what is free."""
    threads: PositiveInt | None = None
    """CPU threads a stage; null: torch's default. Very small models are faster on one."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    num_processes: PositiveInt = 1
    """Processes of a stage on each node, one a GPU. They share a recipe's batches, and end where one process does, to
    rounding. `data`, `pretrain` and `label` have one process all the same. See docs/scaling.md."""
    sharding: Literal["none", "fsdp", "zero1", "zero2", "zero3"] = "none"
    """What the processes of a training share, in place of holding all of it each: `fsdp` weights, gradients and
    optimizer state; by DeepSpeed `zero1` optimizer state, `zero2` gradients, too, `zero3` weights, too. One process has
    nothing to share. See docs/scaling.md."""
    nodes: PositiveInt = 1
    """Machines that share a stage's work, and a file system for `output_dir`."""
    node_command: str = "srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1"
    """What starts the command that follows it once on each of several nodes; {nodes} is their number."""
    rdzv_endpoint: str | None = None
    """`host:port` where the nodes meet, on one of them; null: this host, port 29400."""
    micro_batch_size: PositiveInt = 8
    """Sequences a forward pass in `sft`; prompts a forward pass in `reward_model`."""
    max_tokens: PositiveInt = 4096
    """Padded tokens a forward pass in rollouts, scoring, PPO updates and evaluation."""
    generation_batch_size: PositiveInt = 128
    """Sequences decoded together."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass in place of keeping them: a third more time, and only a
    layer's in memory."""
    bf16: bool = False
    """Train with matrix products in bfloat16; the weights and Adam's moments keep `model.dtype`. For GPUs."""
    completions_every: NonNegativeInt = 10
    """PPO iterations between tables of sampled completions, with score, KL and length; 0: none."""
    save_minutes: PositiveFloat = 10
    """Time between checkpoints to resume from."""
    logging_steps: PositiveInt = 10
    """Optimizer steps between lines in `log.jsonl`."""
    rollouts: Literal["transformers", "vllm"] = "transformers"
    """What samples the responses of `ppo` and `ppo_ptx`. With vllm, exact resume is not promised."""
    vllm: VLLM = VLLM()
    endpoint: EndpointCalls = EndpointCalls()
    slurm: Slurm = Slurm()
    offline: bool = False
    """Never look at the Hub: only what is on this disk. A `tracker` keeps its runs there, too."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = "none"
    """Where training is watched: a run a stage, in a group that is the recipe's. See docs/trackers.md."""

    @model_validator(mode="after")
    def vllm_has_room(self) -> "Runtime":
        if self.rollouts != "vllm":
            return self
        if self.vllm.mode == "server" and self.jobs > 1:
            raise ValueError(
                f"jobs={self.jobs}: a vLLM server holds one policy at a time; set runtime.jobs=1, or "
                "runtime.vllm.mode=colocate"
            )
        if self.vllm.mode == "server" and self.device == "cpu":
            raise ValueError(
                "vllm.mode=server needs a CUDA device: weights reach the server through NCCL; set "
                "runtime.vllm.mode=colocate"
            )
        if self.vllm.mode == "colocate" and self.ranks % self.vllm.tensor_parallel_size:
            raise ValueError(
                f"vllm.tensor_parallel_size={self.vllm.tensor_parallel_size} does not divide the stage's {self.ranks} "
                "processes (runtime.nodes * runtime.num_processes)"
            )
        return self

    @property
    def ranks(self) -> int:
        """Processes of a stage on all nodes."""
        return self.nodes * self.num_processes

    @property
    def shares(self) -> bool:
        """Whether they share more than batches."""
        return self.sharding != "none" and self.ranks > 1

    @property
    def sharded(self) -> bool:
        """Whether they share weights."""
        return self.shares and self.zero in (0, 3)

    @property
    def zero(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        return int(self.sharding.removeprefix("zero")) if self.shares and self.sharding.startswith("zero") else 0


class Recipe(Section):
    """One experiment."""

    name: str = "unnamed"
    seed: NonNegativeInt = 0
    model: Model = Model()
    data: Data = Data()
    pretrain: Pretrain = Pretrain()
    sft: SFT = SFT()
    label: Label = Label()
    reward_model: RewardModel = RewardModel()
    ppo_init: PPOInit = PPOInit()
    ppo: PPO = PPO()
    ppo_ptx: PPOPtx = PPOPtx()
    eval: Eval = Eval()
    runtime: Runtime = Runtime()

    def goes_with_zero(self, muon: list[str]) -> None:
        """Raises: ValueError: DeepSpeed cannot share what this trains. `muon` are the keys that ask for Muon."""
        instead = f"is not for runtime.sharding={self.runtime.sharding}; set runtime.sharding=fsdp"
        if muon:
            raise ValueError(f"{', '.join(muon)}: Muon {instead}, or null there")
        if self.model.dtype != "float32":
            raise ValueError(f"model.dtype={self.model.dtype} {instead}, or model.dtype=float32")
        if self.model.lora and self.runtime.zero == 3:
            raise ValueError(f"model.lora {instead}")
        for name in ("sft", "reward_model", "ppo_init"):
            trainer = getattr(self, name).trainer
            if trainer.get("optim", "adamw_torch") not in ("adamw_torch", "adamw_torch_fused"):
                raise ValueError(f"{name}.trainer.optim={trainer['optim']} {instead}")
            if trainer.get("fp16"):
                raise ValueError(f"{name}.trainer.fp16 {instead}")

    @model_validator(mode="after")
    def sections_agree(self) -> "Recipe":
        if self.eval.judge == "gold" and not self.data.world:
            raise ValueError("eval.judge=gold needs data.world: only the built-in world knows the truth")
        if self.eval.judge == "labels" and not self.eval.labels:
            raise ValueError("eval.judge=labels needs eval.labels: a file with the labels")
        if self.eval.judge == "endpoint" and not self.eval.endpoint.model:
            raise ValueError("eval.judge=endpoint needs eval.endpoint.model: the name of the model that judges")
        if self.eval.judge == "reward_model" and self.data.world:
            raise ValueError(
                "eval.judge=reward_model needs rankings in data; in the built-in world use eval.judge=gold"
            )
        if not (self.data.world or self.data.text):
            needing = {"ppo_ptx.ptx_coef": self.ppo_ptx.ptx_coef}
            if "ppo_init" in (self.ppo.init, self.ppo_ptx.init):
                needing["ppo_init.pretraining_share"] = self.ppo_init.pretraining_share
            without = [f"{key}=0" for key, value in needing.items() if value]
            if without:
                raise ValueError(f"there is no pretraining text: set data.text, or {' and '.join(without)}")
        if self.eval.weights == "ema" and not (self.ppo.ema_decay and self.ppo_ptx.ema_decay):
            raise ValueError(
                "eval.weights=ema needs ppo.ema_decay and ppo_ptx.ema_decay above 0; set them, or eval.weights=last"
            )
        if self.eval.best_of_n and not self.eval.temperature:
            raise ValueError("eval.best_of_n needs eval.temperature above 0: greedy answers are all the same")
        if self.runtime.rollouts == "vllm":
            foreign = [name for name in ("ppo", "ppo_ptx") if getattr(self, name).backend == "trl"]
            if foreign:
                raise ValueError(
                    f"runtime.rollouts=vllm needs {foreign[0]}.backend=instructrl; or set runtime.rollouts=transformers"
                )
            if self.model.lora and self.model.lora.quantization:
                raise ValueError(
                    "runtime.rollouts=vllm is not for model.lora.quantization: vLLM would put the merged weights in 4 "
                    "bits again; set runtime.rollouts=transformers"
                )
        muon = [
            f"{name}.muon_learning_rate"
            for name in ("sft", "reward_model", "ppo_init")
            if getattr(self, name).muon_learning_rate
        ]
        if self.runtime.shares:
            sharding = f"runtime.sharding={self.runtime.sharding}"
            if self.runtime.rollouts == "vllm":
                raise ValueError(f"runtime.rollouts=vllm is not for {sharding}; set one of them otherwise")
            if self.model.lora and self.model.lora.quantization:
                raise ValueError(f"model.lora.quantization is not for {sharding}; set runtime.sharding=none")
        if self.runtime.zero:
            self.goes_with_zero(muon)
        if self.model.lora and muon:
            raise ValueError(f"{muon[0]} is for all weights of small models; set it to null, or model.lora=null")
        if self.model.path is None and not (self.data.world or self.data.text):
            raise ValueError("model.path is null, so pretrain makes the model, which needs data.text")
        return self
