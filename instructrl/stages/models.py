"""Loading and saving models: folders and the Hub, safetensors only, with errors in one sentence."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import ranks
from instructrl.stages.contract import FILE, Contract


def device(recipe: Recipe) -> torch.device:
    """Where the stage computes: `runtime.device`, or the first of cuda, mps and cpu that this machine has."""
    wanted = recipe.runtime.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device=cuda: this machine has no CUDA device; set runtime.device=cpu or auto.")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("runtime.device=mps: this machine has no Metal device; set runtime.device=cpu or auto.")
    return torch.device(wanted, ranks.local_rank()) if wanted == "cuda" and ranks.count() > 1 else torch.device(wanted)


def nursery(recipe: Recipe) -> torch.device:
    """Where a model that is to be trained is loaded: `device`, or main memory if it is to be sharded, as a GPU may have
    no room for all of it."""
    return torch.device("cpu") if ranks.sharded(recipe) else device(recipe)


def load_tokenizer(path: Path | str, recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. It must have an EOS token.

    Raises:
        UserError: nothing usable is there.
    """
    tokenizer = _from(AutoTokenizer, path, recipe)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, which ends every response.")
    return tokenizer


def load_context(path: Path | str, recipe: Recipe) -> int | None:
    """The most tokens that the model of a folder or Hub id reads, without its weights; None: any number.

    Raises:
        UserError: nothing usable is there.
    """
    return getattr(_from(AutoConfig, path, recipe), "max_position_embeddings", None)


def load_policy(path: Path | str, recipe: Recipe, to: torch.device | None = None) -> PreTrainedModel:
    """A causal language model in the recipe's precision, in eval mode, on the stage's device or another one.

    Raises:
        UserError: nothing usable is there.
    """
    return _model(AutoModelForCausalLM, path, recipe, to)


def load_base(path: Path | str, recipe: Recipe) -> PreTrainedModel:
    """What adapters are put on, or what is trained without them: the same where such a model is loaded (`nursery`), and
    in 4 bits where `model.lora.quantization` says so.

    Raises:
        UserError: nothing usable is there.
    """
    lora = recipe.model.lora
    if lora is None or lora.quantization is None:
        return load_policy(path, recipe, nursery(recipe))
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.model.dtype),
    )
    options = {"quantization_config": settings, "device_map": {"": device(recipe)}}
    model = _model(AutoModelForCausalLM, path, recipe, **options)
    if model.device.type == "cpu":
        mend_for_cpu(model)
    return model


def mend_for_cpu(model: PreTrainedModel) -> None:
    """Keep bitsandbytes (0.50) from packing weights anew in eval mode, with constants rounded to bfloat16; and let go
    of the file, which stays in memory as long as a weight is a view of it.

    Raises:
        UserError: it would read a matrix wrongly, as it does where a block of 64 numbers spans two rows.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            raise UserError(
                f"model.lora.quantization: {name} reads {state.shape[-1]} numbers, and on a CPU that must be a "
                f"multiple of {state.blocksize}; set it to null, or use a GPU."
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def load_reward_model(
    path: Path | str, recipe: Recipe, to: torch.device | None = None
) -> tuple[PreTrainedModel, float]:
    """A reward model and its bias: the demonstrations' mean score, to be subtracted from every score (App. C.2)."""
    model = _model(AutoModelForSequenceClassification, path, recipe, to)
    return model, load_bias(path, recipe)


def load_bias(path: Path | str, recipe: Recipe) -> float:
    """The reward model's bias, without its weights."""
    return float(getattr(_from(AutoConfig, path, recipe), "reward_bias", 0.0))


def init_reward_model(path: Path | str, recipe: Recipe, to: torch.device | None = None) -> PreTrainedModel:
    """The policy's trunk with a new scalar head, without bias, in place of the unembedding (paper, 3.5).

    The head starts at standard deviation 1 / sqrt(hidden size + 1), as OpenAI's earlier code does (arXiv 2403.17031).
    """
    model = _model(AutoModelForSequenceClassification, path, recipe, to, num_labels=1)
    draw_head(model)
    return model


def draw_head(model: PreTrainedModel) -> None:
    """Draw the scalar head anew; on the CPU, so that it is the same wherever the model lies."""
    width = model.score.in_features
    drawn = torch.empty(model.score.weight.shape).normal_(std=(width + 1) ** -0.5)
    with torch.no_grad():
        model.score.weight.copy_(drawn)


def contract_of(path: Path | str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Contract:
    """The text contract that the recipe asks for, on the tokenizer of the base model at `path`.

    Raises:
        UserError: as `Contract.of`; or the base model is one that was made here, under another contract.
    """
    contract = Contract.of(tokenizer, recipe)
    if (Path(path).expanduser() / FILE).is_file():
        remedy = f"Ask for the same here, or delete {FILE} there to train the model anew under this one."
        contract.check(Path(path).expanduser(), f"model.path={path}", "this recipe", remedy)
    return contract


def fit(model: PreTrainedModel, contract: Contract) -> None:
    """Give the model a row for each of the contract's tokens, and its padding and end. Called in `sft` and `ppo_init`,
    which so have the same; every later stage inherits it."""
    make_room(model, contract.tokenizer)
    pad, end = contract.tokenizer.pad_token_id, contract.tokenizer.eos_token_id
    for config in filter(None, (model.config, model.generation_config)):
        known = config.eos_token_id
        ends = known if isinstance(known, list) else [] if known is None else [known]
        if end not in ends:  # what ended a document still ends an answer of `generate`
            config.eos_token_id = [end, *ends] if ends and config is model.generation_config else end
        config.pad_token_id = pad


@torch.no_grad()
def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add rows to the embeddings until every token of the tokenizer has one: the mean of the others.

    It is the same every time, which transformers' `mean_resizing`, a draw around the mean, is not; and a random row
    could make a new token likely at once (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        for weight in filter(lambda found: found is not None, (layer.weight, getattr(layer, "bias", None))):
            weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)
    print(f"The embeddings grew from {rows} to {len(tokenizer)} rows, as the tokenizer has tokens.", flush=True)


def save(model: PreTrainedModel, contract: Contract, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights (safetensors), config, tokenizer and contract: a folder that the stock Auto classes load.

    weights: in place of the model's own.
    """
    save_base(model, contract.tokenizer, folder, weights)
    if ranks.rank() == 0:
        contract.save(folder, tokenizer=False)


def save_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """The same without a contract, which only a model that answers prompts has."""
    if ranks.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True  # Trainer switches it off, and a policy that samples without it is slow
    write_weights(model, folder, weights)
    tokenizer.save_pretrained(folder)


def write_weights(model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Weights (safetensors) and config. Of a model in 4 bits, `weights` must be those of the plain one."""
    if hasattr(model.config, "quantization_config"):
        generation, model = model.generation_config, unquantized(model)
        model.generation_config = generation
    model.save_pretrained(folder, state_dict=weights)


def unquantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model that a quantized one was made from, without its weights."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)(config)


def _model(
    kind: Any, path: Path | str, recipe: Recipe, to: torch.device | None = None, **options: Any
) -> PreTrainedModel:
    dtype = getattr(torch, recipe.model.dtype)
    return _from(kind, path, recipe, use_safetensors=True, dtype=dtype, **options).eval().to(to or device(recipe))


def _from(kind: Any, path: Path | str, recipe: Recipe, **options: Any) -> Any:
    """`kind.from_pretrained`, whose many kinds of failure become one sentence."""
    options |= where(str(path), recipe) | {"trust_remote_code": recipe.model.trust_remote_code}
    folder = Path(path).expanduser()
    try:
        return kind.from_pretrained(str(folder) if folder.is_dir() else str(path), **options)
    except (OSError, ValueError) as error:
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise UserError(f"model.path={path}: it holds no .safetensors weights, the only kind read.") from error
        raise UserError(f"model.path={path} cannot be loaded: {_first_line(error)}") from error


def where(path: str, recipe: Recipe) -> dict[str, Any]:
    """How `from_pretrained` shall look for a folder or a Hub id.

    Raises:
        UserError: there is no such folder, it holds no config.json, the Hub has no such id, or there is no network.
    """
    folder, revision = Path(path).expanduser(), recipe.model.revision
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path={path}: the folder holds no config.json, so it is not a saved model.")
        return {"local_files_only": True}
    if folder.exists():
        raise UserError(f"model.path={path} is a file; give the folder that holds config.json and the weights.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise UserError(f"model.path={path}: there is no such folder.")
    offline = recipe.runtime.offline or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    why = "runtime.offline is set and it is not in the local cache"
    if not offline:
        try:
            HfApi().model_info(path, revision=revision, timeout=10)
            return {"revision": revision}
        except HFValidationError as error:
            raise UserError(f"model.path={path} is neither a folder nor a Hub id: {_first_line(error)}") from error
        except RevisionNotFoundError as error:
            raise UserError(f"model.path={path}: the Hub has it, but not model.revision={revision}.") from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"model.path={path}: there is no such folder, and the Hub has no such model, or it is private."
            ) from error
        except Exception:  # whatever the HTTP client of the day raises without a network: the cache may still have it
            why = "the Hub cannot be reached"
    if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        return {"revision": revision, "local_files_only": True}
    raise UserError(
        f"model.path={path}: there is no such folder, and {why}; give a local folder, or try again with a network."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
