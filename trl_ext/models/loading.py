"""Load models, adapters and tokenizers: by which arguments, and what is checked before any weight is read."""

import difflib
import json
import re
import shlex
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..runs.folder import DATA_FILES, is_local


# What may be meant by an adapter in place of a model.
WAYS_OUT = {
    "ref_model": "Load it with `AutoPeftModelForCausalLM.from_pretrained(...)`",
    "value_model": "Set `critic='adapter'` to put it on the base of an actor that trains an adapter too",
    "reward model": "Give it as `reward_model`, and the actor a `peft_config`, to put it on the actor's base",
}


def base_of(model: Any) -> Any:
    """Return the model that a `PeftModel` wraps; any other model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def is_quantized(model: Any, **options: Any) -> bool:
    """Return whether a model is quantised: one in memory or, by its config, the checkpoint of a path."""
    if isinstance(model, str):
        return getattr(AutoConfig.from_pretrained(model, **options), "quantization_config", None) is not None
    return any(getattr(model, name, False) for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"))


def source_options(args: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that a model's config and tokenizer are read with."""
    revision = {name: value for name, value in (args.model_init_kwargs or {}).items() if name == "revision"}
    return {"trust_remote_code": args.trust_remote_code} | revision


def init_kwargs(args: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` for every model of a run, as TRL chooses them."""
    kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED", "FSDP"):
        kwargs["device_map"] = None
    return kwargs


def text_config(model: Any, args: Any, name: str = "model", scores: bool = False) -> Any:
    """
    Return the text part of the config of a model, or of a path or hub name, which may score text with `scores`.

    Raises:
        ValueError: when the path, given as `name`, holds no model, one that cannot be read or that scores text, or an
            encoder-decoder.
    """
    if not isinstance(model, str):
        if not scores:
            refuse_scoring(model.config, f"`{name}`")
        refuse_encoder_decoder(model.config, type(model).__name__)
        return model.config.get_text_config()
    options = source_options(args)
    require_model(model, name, options.get("revision"))
    config = read_config(model, name, **options)
    if not scores:
        refuse_scoring(config, f"{model!r} ({shown(name)})", model, name)
    refuse_encoder_decoder(config, model)
    return config.get_text_config()


def read_config(path: str, name: str, **options: Any) -> Any:
    """Read the config of a folder or hub name, given as `name`; raise `ValueError` if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # of transformers, of the family's own checks, of the hub
        reason = " ".join(str(error).split())
        raise ValueError(f"The config of {path!r} ({shown(name)}) cannot be read: {reason:.400}") from error


def refuse_scoring(config: Any, name: str, path: str = "", option: str = "") -> None:
    """
    Raise `ValueError` for a model trained to score text, called `name`: as a language model it would get a new head.
    Where it is the model of a `path`, given as `option`, models beside it that write are named.
    """
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        reward = f"`--reward_model_path {shlex.quote(path)}` of `trl-ext ppo`" if path else "the `reward_model` of PPO"
        raise ValueError(
            f"{name} holds a {config.architectures[0]}, which scores text and cannot write it: it may be {reward}. "
            f"Give a causal language model here{such_as(path, option)}."
        )


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Raise `ValueError` for a model whose encoder would read the answers that it is trained on or scores."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder ({config.model_type}): prompt and answer would both go through its "
            "encoder, and it would be trained on what it has read. Use a decoder-only model."
        )


def restore_weights(model: PreTrainedModel, folder: str | Path, but_not: str | None = None) -> None:
    """Load the weights saved to `folder`, also those saved under other names, such as a mixture's experts."""
    if not (Path(folder) / "config.json").is_file():  # transformers would make a model of the default size
        raise ValueError(f"{folder} has no config.json, so its weights cannot be read. Give a folder that has one.")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    widest = reduce(torch.promote_types, dtypes)  # a model may have several
    saved = type(model).from_pretrained(folder, dtype=widest).state_dict()
    missing = model.load_state_dict(saved, strict=False).missing_keys
    absent = [name for name in missing if but_not is None or not name.startswith(f"{but_not}.")]
    if absent:
        raise RuntimeError(f"{folder} lacks {len(absent)} of the model's weights, the first being {absent[0]}.")


def tokenizer_of(model: Any, processing_class: Any, args: Any) -> Any:
    """Return the tokenizer that a trainer will take; `None` if none can be loaded from the model's path."""
    path = model if isinstance(model, str) else getattr(model.config, "_name_or_path", None)
    if processing_class is not None or not path:
        return processing_class
    try:
        return AutoTokenizer.from_pretrained(path, **source_options(args))
    except Exception:  # of transformers, tokenizers, sentencepiece: the trainer will say so
        return None


def require_tokens(args: Any, tokenizer: Any) -> None:
    """
    Raise `ValueError` for an `eos_token` or `pad_token` that a tokenizer does not have, unless it gets the tokens of a
    chat template.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if tokenizer is None or getattr(args, "chat_template_path", None) is not None:
        return
    for name in ("eos_token", "pad_token"):
        token = getattr(args, name, None)
        if token is None or token in tokenizer.get_vocab():
            continue
        known = list(dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]))
        near = difflib.get_close_matches(token, known, n=1)
        meant = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(map(repr, known[:8]))}."
        raise ValueError(
            f"`{name}` is {token!r}, and the model's tokenizer has no such token. {meant} Without the option its own "
            "is used."
        )


# Two tokenizers differ if more than this share of their ids mean other tokens; below it, tokens were renamed.
RENAMED = 0.01


def check_same_tokens(tokenizer: Any, model: Any, name: str, args: Any) -> None:
    """Raise `ValueError` if ids mean other tokens to `model`, a path or a model, than to the run's tokenizer."""
    its = None if tokenizer is None else tokenizer_of(model, None, args)
    if its is None or not hasattr(its, "get_vocab") or not hasattr(tokenizer, "get_vocab"):
        return
    mine, others = ({id_: token for token, id_ in each.get_vocab().items()} for each in (tokenizer, its))
    common = mine.keys() & others.keys()
    differing = [id_ for id_ in common if mine[id_] != others[id_]]
    if common and len(differing) > RENAMED * len(common):
        first = min(differing)
        raise ValueError(
            f"`{name}` was trained with another tokenizer than the model: {len(differing)} of {len(common)} ids mean "
            f"other tokens to it (id {first} is {mine[first]!r} here and {others[first]!r} there). Give one with the "
            "model's tokenizer, whose ids it reads, or leave it out."
        )


def known_tokens(model: Any, config: Any) -> int | None:
    """Return how many tokens a model has an embedding of; `None` for a user's own class that does not say."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return getattr(config, "vocab_size", None)


def check_known(ids: Iterable[int | None], known: int | None, tokenizer: Any, whose: str, where: str) -> None:
    """
    Raise `ValueError` for an id, of those that a model will read, without an embedding, of which it has `known`, as
    when tokens were added to the tokenizer alone. `whose` model it is, and `where` the ids come from, is for the
    error.
    """
    unknown = None if known is None else next((i for i in ids if i is not None and not 0 <= i < known), None)
    if unknown is None:
        return
    token = f" ({tokenizer.decode([unknown])!r})" if unknown > 0 else ""
    raise ValueError(
        f"{whose} knows {known} tokens, and {where} has the id {unknown}{token}. Give the tokenizer that it was "
        "trained with, or train it with the token: `model.resize_token_embeddings(len(tokenizer))`."
    )


def adapter_config(path: Any) -> PeftConfig | None:
    """Return the config of the adapter in a folder; `None` without an adapter, and for anything but a folder."""
    if not isinstance(path, str) or not (Path(path) / "adapter_config.json").exists():
        return None
    try:
        return PeftConfig.from_pretrained(path)
    except (ValueError, KeyError, TypeError) as error:  # of JSON, of PEFT
        raise ValueError(
            f"{path}/adapter_config.json cannot be read by this version of PEFT ({type(error).__name__}: {error}). "
            "Save the adapter again with `save_pretrained`, or install the version of PEFT that it was saved with."
        ) from error


def adapter_configs(model: Any, peft_config: PeftConfig | None) -> list[PeftConfig]:
    """Return the configs of the adapters that a model has, and of the new one that it will get."""
    held = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    return held if peft_config is None else [*held, peft_config]


def check_no_adapter(path: str, name: str) -> None:
    """Raise `ValueError` if a folder holds only an adapter where a whole model is needed."""
    config = adapter_config(path)
    if config is None:
        return
    if config.task_type == "SEQ_CLS" and name in ("model", "ref_model"):
        raise ValueError(
            f"The folder {path!r} (`{name}`) holds an adapter of task type SEQ_CLS, which scores text, not writes it. "
            "Give it as `reward_model`, and a causal language model, or its adapter, here."
        )
    merge = f"merge it, `{merge_line(path)}`, and give {merged_beside(path)}"
    way_out = f"{WAYS_OUT[name]}, or {merge}" if name in WAYS_OUT else merge.capitalize()
    raise ValueError(f"The folder {path!r} ({shown(name)}) holds an adapter without its base model. {way_out}.")


def merged_beside(adapter: str) -> str:
    """Return the folder that `merge_line` writes, as a word of a command line."""
    return shlex.quote(f"{adapter.rstrip('/')}-merged")


def merge_line(adapter: str) -> str:
    """Return the command that merges an adapter, to be shown; where it names no base, one before it names that."""
    config = adapter_config(adapter)
    named = config is None or config.base_model_name_or_path
    before = "" if named else f"{base_line(adapter)} && "
    return f"{before}trl-ext merge {shlex.quote(adapter)} --output_dir {merged_beside(adapter)}"


def base_line(adapter: str) -> str:
    """Return the command that names an adapter's base in its config, to be shown."""
    return (
        f'python -c "from peft import PeftConfig; config = PeftConfig.from_pretrained({adapter!r}); '
        f"config.base_model_name_or_path = 'BASE'; config.save_pretrained({adapter!r})\""
    )


def require_model(path: str, what: str, revision: str | None = None) -> None:
    """Raise `ValueError` unless a folder or hub name has a model's config, or an adapter's."""
    if adapter_config(path) is not None:
        return
    _require_no_gguf(path, what)
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ValueError(
                f"{path!r} ({shown(what)}) holds no model: there is no config.json and no adapter_config.json in it. "
                f"Give the folder that a model was saved to{such_as(path, what)}."
            )
        return
    if Path(path).is_file():
        is_data = Path(path).suffix in DATA_FILES and Path(path).name not in CONFIGS
        data = f" If it is data, write `--dataset_name {shlex.quote(path)}`." if is_data else ""
        raise ValueError(
            f"{path!r} ({shown(what)}) is a file.{data} Give the folder that a model was saved to"
            f"{such_as(path, what)}."
        )
    near = near_folder(path, revision)
    meant = f" Did you mean {_as_given(near, what)}, which is here?" if near else ""
    if is_local(path):
        kind = "an adapter" if what.endswith("merge") else "a model"
        way = "" if near else f" Give the folder that {kind} was saved to{such_as(path, what)}."
        raise ValueError(f"There is no folder {path!r} ({shown(what)}).{meant}{way}")
    if near is not None:
        raise ValueError(
            f"There is no folder {path!r} ({shown(what)}).{meant} For the hub's model of the name {path}, download it "
            f"first: `hf download {path}`."
        )
    try:
        PretrainedConfig.get_config_dict(path, revision=revision)
    except OSError as error:
        raise ValueError(
            f"{path!r} ({shown(what)}) is no folder here, and no model of that name came from the "
            f"hub{_of_hub(error)}. Give the folder that a model was saved to{such_as(path, what)}, or, where there is "
            f"a network, download it: `hf download {path}`."
        ) from error


def _of_hub(error: OSError) -> str:
    """Return what stopped the hub, in brackets, where it says more than that there is no network or no such model."""
    reason = " ".join(str(error).split())
    if re.search("connect|offline", reason, re.IGNORECASE):
        return " (`HF_HUB_OFFLINE` forbids it)" if is_offline_mode() else " (it was not reached)"
    return "" if "not a valid model identifier" in reason else f" ({reason.rstrip('.'):.200})"


def near_folder(path: str, revision: str | None = None) -> str | None:
    """
    Return the folder of a model or adapter whose name is nearly the last part of a path that is not there; `None` for
    the name of a model of the hub that is in its cache.
    """
    place, name = Path(path).parent, Path(path).name
    if not place.is_dir() or Path(path).exists() or not name:
        return None
    if not is_local(path) and isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        return None
    names = [each.name for each in place.iterdir() if any((each / file).is_file() for file in CONFIGS)]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=NEAR)
    return str(place / nearest[0]) if nearest else None


def shown(what: str) -> str:
    """Return an argument as errors name it: its code, in backticks, or words."""
    return f"`{what}`" if what.isidentifier() or what.startswith(("--", "trl-ext")) else what


def _as_given(folder: str, what: str) -> str:
    """Return a folder as it is to be given as `what`: `--model my-sft`, `model='my-sft'`, or alone."""
    if what.startswith(("--", "trl-ext")):
        return f"`{what} {shlex.quote(folder)}`"
    return f"`{what}={folder!r}`" if what.isidentifier() else repr(folder)


def such_as(path: str, what: str) -> str:
    """
    Return, in a sentence, what may be given as `what` of the folder that a path is or would be in, or below the path,
    the most similar name first; nothing where there is nothing.
    """
    places = [place for place in (Path(path), *Path(path).parents) if place.is_dir()][:2]
    found = {str(each) for place in places for each in _models_in(place, what)} - {path, str(Path(path))}
    first, *others = sorted(found, key=lambda name: (-difflib.SequenceMatcher(None, name, path).ratio(), name)) or [""]
    if not first:
        return ""
    more = f" (or {' or '.join(map(repr, others[:2]))})" if others else ""
    return f", such as {_as_given(first, what)}{more}"


def _models_in(place: Path, what: str) -> list[Path]:
    """Return the folders in a folder that may be given as `what`: adapters to merge, reward models, or what writes."""
    wanted = CONFIGS[1] if what.endswith("merge") else CONFIGS[0]
    try:
        found = [each for each in place.iterdir() if (each / wanted).is_file()]
        if wanted == CONFIGS[1]:
            return found
        configs = {each: (each / wanted).read_text(encoding="utf-8") for each in found if has_tokenizer(str(each))}
    except (OSError, UnicodeDecodeError):  # what cannot be read is not offered
        return []
    return [each for each, text in configs.items() if ("ForSequenceClassification" in text) is ("reward" in what)]


def require_weights(path: str, what: str) -> None:
    """Raise `ValueError` if weights in a folder are missing, cut off or no safetensors; only headers are read."""
    folder = Path(path)
    if not folder.is_dir():
        return
    wanted = {file.name for pattern in WEIGHTS for file in folder.glob(pattern)}
    if not wanted:
        raise ValueError(
            f"The folder {path!r} ({shown(what)}) holds a config and no weights: there is no {', '.join(WEIGHTS)} in "
            f"it. Give the folder that a model was saved to whole{such_as(path, what)}."
        )
    for index in folder.glob("*.safetensors.index.json"):
        wanted |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted(folder / name for name in wanted):
        try:
            if file.suffix == ".safetensors":
                safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            is_pointer = file.is_file() and file.read_bytes()[:11] == b"version htt"
            cure = "It is a pointer of git-lfs: run `git lfs pull` in that folder."
            if not is_pointer:
                fault = "is incomplete" if file.is_file() else "is missing"
                cure = (
                    f"The file {fault}: copy it again from where the model came from, a hub's with `hf download NAME "
                    f"--local-dir {shlex.quote(path)}`, or save it again with `model.save_pretrained({path!r})`."
                )
            raise ValueError(
                f"The weights in {str(file)!r} ({shown(what)}) cannot be read ({error}). {cure}"
            ) from error


def _require_no_gguf(path: str, what: str) -> None:
    """Refuse weights in GGUF, also beside a config: what is trained is saved as safetensors."""
    folder = Path(path)
    files = [folder] if folder.is_file() else sorted(folder.iterdir()) if folder.is_dir() else []
    gguf = next((file for file in files if file.suffix.lower() == ".gguf"), None)
    if gguf is None or any(file.suffix in (".safetensors", ".bin") for file in files):
        return
    raise ValueError(
        f"{path!r} ({shown(what)}) holds its weights as GGUF. Convert them once: "
        f"`AutoModelForCausalLM.from_pretrained({str(gguf.parent)!r}, gguf_file={gguf.name!r})`, the same with "
        "AutoTokenizer, and `save_pretrained(...)` of both into a folder to give here."
    )


CONFIGS = ("config.json", "adapter_config.json")
NEAR = 0.8  # of difflib: "my-sfft" is "my-sft"; "gpt2" is not "gpt2-ft"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "tekken", "special_tokens_map", "added_tokens")


def has_tokenizer(folder: str) -> bool:
    return any(file.name.startswith(TOKENIZER_FILES) for file in Path(folder).iterdir())


def load_tokenizer(path: str, what: str = "model", **options: Any) -> Any:
    """
    Load the tokenizer of a folder or hub name, of an adapter without one that of its base, with the chat template
    beside the adapter, if there is one; raise `ValueError` if there is none that can be read.
    """
    if not path:
        raise ValueError("The model was not loaded from a folder with a tokenizer: give it as `processing_class`.")
    if Path(path).is_dir() and not has_tokenizer(path):
        adapter = adapter_config(path)
        if adapter is not None and adapter.base_model_name_or_path:
            options = options | {"revision": adapter.revision}
            tokenizer = load_tokenizer(adapter.base_model_name_or_path, f"the base of the adapter {path}", **options)
            if (Path(path) / TEMPLATE).is_file():
                tokenizer.chat_template = (Path(path) / TEMPLATE).read_text(encoding="utf-8")
            return tokenizer
        raise ValueError(
            f"The folder {path!r} ({shown(what)}) has no tokenizer. Save that of BASE, the model that it was trained "
            'from, into it: `python -c "from transformers import AutoTokenizer; '
            f"AutoTokenizer.from_pretrained('BASE').save_pretrained({path!r})\"`, in Python `processing_class="
            "AutoTokenizer.from_pretrained('BASE')`."
        )
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # of transformers, tokenizers, sentencepiece, the hub: each raises its own
        reason = " ".join(str(error).split())
        raise ValueError(f"The tokenizer of {path!r} ({shown(what)}) cannot be read: {reason:.400}") from error
