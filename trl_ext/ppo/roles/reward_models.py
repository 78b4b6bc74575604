"""Reward models as sources of scores, on token ids or on text."""

import inspect
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..._trl import create_model_from_path, get_config_model_id
from ...data.formats import CONVERSATION, LOOKED_AT, describe
from ...models.loading import base_of, check_known, known_tokens, read_config
from ...models.probe import probe_rows, tolerance
from ...models.sharding import is_partitioned
from ...packing.budget import cut_by_tokens
from ...packing.forward import warn_of_padding
from ...packing.scores import PackedScores
from ..config import PPOConfigX
from ..data import check_prompts, is_tokenised, named, unpadded
from .reward_forms import RewardForm, Text


logger = logging.get_logger(__name__)

# Text on which two tokenizers with one vocabulary would still differ: case, accents, digits, spaces, other scripts.
PROBE = "Hello, World!  naïve café\n\t1234.5 don't 长城 <|x|> émile"
# Names of the tables of absolute positions, by family.
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe", "pos_emb")


class TokenScorer:
    """
    A reward model that scores texts in the form that it was trained on ([`RewardForm`]).

    GRPO calls it as a reward function; the sampled ids are passed as `prompt_ids` and `completion_ids`.

    transformers' classifiers of decoders read their score at the last id that is not the config's pad token. That
    token stays the one of the model's training, whatever the actor pads with. If it is the end token too, the end is
    not read, as in training. A model without a pad token reads its score at the last id.

    `ask` is called with `input_ids` and `attention_mask`, and returns `logits` (b, 1) or the scores themselves. It is
    the actor where the model is an adapter on its base, else unset: the model is called.

    Until [`pack`] finds that rows can be packed, `packed` is `None` and sequences are padded.
    """

    def __init__(
        self, model: nn.Module, name: str, form: RewardForm, batch_size: int, batch_tokens: int | None = None
    ):
        self.model = model
        self.ask: Callable[..., Any] | None = None  # instead of the model
        self.form = form
        config: Any = model.config
        self.config = config.get_text_config()
        self.pad_token_id: int | None = self.config.pad_token_id
        self.longest = longest_input(model)
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.reads_padding = False
        self.packed: PackedScores | None = None
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Text] | None = None,
        completions: Sequence[Text] | None = None,
        prompt_ids: Sequence[list[int]] | None = None,
        completion_ids: Sequence[list[int]] | None = None,
        environment: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float]:
        """Return one score per response."""
        if None in self.form.tools:  # one environment, or none: the column is the user's
            environment = None
        given = (prompts, completions, prompt_ids, completion_ids, environment)
        count = max(len(column) for column in given if column is not None)
        rows = zip(*([None] * count if column is None else column for column in given), strict=True)
        sequences = [self.form(*row) for row in rows]
        self._check_lengths(sequences)
        known, whose = known_tokens(self.model, self.config), f"The reward model {self.__name__!r}"
        check_known(chain.from_iterable(sequences), known, self.form.tokenizer, whose, "a prompt with its answer")
        groups = _of_one_prompt(prompt_ids or range(count))
        if self.packed is None or not self.packed.packing.shares:
            groups = [[i] for i in range(count)]
        scores = torch.empty(len(sequences))
        for part in self._parts(sequences, groups):
            place_of = {i: place for place, i in enumerate(part)}
            of_part = [[place_of[i] for i in group if i in place_of] for group in groups]
            scores[part] = self._score([sequences[i] for i in part], [group for group in of_part if group]).cpu()
        return scores.tolist()

    def _parts(self, sequences: list[list[int]], groups: list[list[int]]) -> list[list[int]]:
        """Return which sequences are scored in one pass; one that is longer than the budget, alone."""
        # Passes of a partitioned model wait for the other ranks, which would make more or fewer of them.
        if self.batch_tokens is not None and not self.reads_padding and not is_partitioned(self.model):
            shared = [0] * len(sequences)
            for group in groups:
                common = _common_beginning([sequences[i] for i in group])
                for i in group:
                    shared[i] = common
            own = [len(ids) - common for ids, common in zip(sequences, shared, strict=True)]
            packs = self.packed is not None and self.packed.packing.fits(max(map(len, sequences)))
            return cut_by_tokens(shared, own, self.batch_tokens, packs, groups)
        size = 1 if self.reads_padding else self.batch_size
        return [list(range(len(sequences)))[start : start + size] for start in range(0, len(sequences), size)]

    def pack(self, shares: bool, autocast: Callable[[], AbstractContextManager[Any]], by_fsdp: bool = False) -> None:
        """
        Read packed rows from here on where that is exact; say in the log where it is not.

        Args:
            shares: whether what the responses to a prompt begin with stands in their row once.
            autocast: the context in which the run computes.
            by_fsdp: whether FSDP has partitioned the model.
        """
        classifier = base_of(extract_model_from_parallel(self.model))
        name, reason = f"the reward model {self.__name__!r}", None
        if by_fsdp or is_partitioned(self.model):
            reason = f"{'FSDP' if by_fsdp else 'ZeRO-3'} has partitioned its weights, so that they cannot be tried out"
        elif not isinstance(classifier, PreTrainedModel):
            reason = f"{type(classifier).__name__} is not a model of transformers"
        elif self.reads_padding:
            reason = "it reads one answer at a time"
        if reason is not None:
            logger.warning("Rows are padded for %s, not packed: %s.", name, reason)
            return
        packed = PackedScores(classifier, shares)
        with autocast(), self._padding_with(self.pad_token_id or 0):
            warn_of_padding(packed.packing.switch_on(by_mask=False), name, packed.packing)
        self.packed, self._autocast = packed if packed.packing.on else None, autocast

    def try_padding(self) -> None:
        """
        Try random sequences to see whether the model reads padding behind one in spite of the mask, as XLNet does,
        which reads its score at the last column. If so, it gets one sequence at a time.
        """
        embeds = any(isinstance(module, nn.Embedding) for module in self.model.modules())
        if not embeds or is_partitioned(self.model) or self.ask is not None:
            return
        model = extract_model_from_parallel(self.model)  # DeepSpeed's engine has another `config`
        end = self.config.eos_token_id  # where BART's classifier reads its score
        sequences = [row[0].tolist() for row in probe_rows(model)]
        if isinstance(end, int) and end < self.config.vocab_size:
            sequences = [[*ids[:-1], end] for ids in sequences]

        def one_by_one() -> Tensor:
            return torch.cat([self._score([ids]) for ids in sequences])

        alone, allowed = one_by_one(), tolerance(model, one_by_one)
        self.reads_padding = (self._score(sequences) - alone).abs().mean().item() > allowed
        if self.reads_padding:
            logger.warning(
                "The reward model %r (%s) reads the padding of shorter answers: it scores them one by one.",
                *(self.__name__, type(model).__name__),
            )

    @contextmanager
    def _padding_with(self, pad: int) -> Iterator[None]:
        """Within the context the model takes `pad` for its pad token."""
        own = self.config.pad_token_id
        self.config.pad_token_id = pad
        try:
            yield
        finally:
            self.config.pad_token_id = own

    @torch.no_grad()
    def _score(self, sequences: list[list[int]], groups: list[list[int]] | None = None) -> Tensor:
        """
        Return the scores (b,) of sequences of ids, in packed rows or in one batch that is padded on the right.

        Args:
            groups: the sequences by their prompts.
        """
        device = next(self.model.parameters()).device
        pad = self.pad_token_id
        if pad is None:  # any id that no sequence ends with, so that each is read at its last id
            pad = next(id_ for id_ in range(len(sequences) + 1) if all(ids[-1] != id_ for ids in sequences))
        rows = [torch.tensor(ids) for ids in sequences]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        ask, output = self.ask or self.model, None
        with self._padding_with(pad):
            if self.packed is not None and groups is not None:
                with self._autocast():  # which decides the dtype that FlexAttention is tried in
                    output = self.packed(ask, input_ids, mask, groups)
            if output is None:
                output = ask(input_ids=input_ids, attention_mask=mask)
        scores = getattr(output, "logits", output)
        if not isinstance(scores, Tensor) or scores.numel() != len(sequences):
            raise ValueError(
                f"The reward model {self.__name__!r} ({type(self.model).__name__}) returns "
                f"{tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__} for "
                f"{len(sequences)} sequences. It has to return `logits` of shape (sequences, 1), one score each; or "
                "wrap it in a function for `reward_funcs`."
            )
        return scores.flatten().float()

    def try_out(self) -> None:
        """Score a short sequence with a model of a user's own class; `_score` checks the answer."""
        if not is_partitioned(self.model):
            self._score([[1, 2, 3]])

    def _check_lengths(self, sequences: list[list[int]]) -> None:
        longest = max(sequences, key=len)
        if self.longest is not None and len(longest) > self.longest:
            raise ValueError(
                f"The reward model {self.__name__!r} reads {self.longest} tokens, and a prompt with its answer has "
                f"{len(longest)}: {self.form.tokenizer.decode(longest)!r:.200}. Lower `response_length`, shorten the "
                "prompts, or pass a function in `reward_funcs` that cuts what it hands to the model."
            )


def _of_one_prompt(prompts: Sequence[Any]) -> list[list[int]]:
    """Return the places of equal prompts that stand side by side."""
    return [[i for i, _ in group] for _, group in groupby(enumerate(prompts), key=itemgetter(1))]


def _common_beginning(sequences: list[list[int]]) -> int:
    """Return how many tokens all sequences begin with: those that the first and the last in order begin with."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


def check_readable(
    reward_funcs: list[Any],
    train_dataset: Any,
    eval_dataset: Any,
    args: PPOConfigX,
    tokenizer: PreTrainedTokenizerBase,
    pad_id: int | None = None,
) -> None:
    """
    Raise `ValueError` for prompts that a reward model cannot read: conversations without a chat template, and prompts
    that do not fit its table of positions with a response of `response_length` tokens.
    """
    datasets = named(train_dataset, eval_dataset).items()
    actors = RewardForm(tokenizer, tokenizer, shares_ids=True, template_kwargs=args.chat_template_kwargs)
    for source in reward_funcs:
        # `ImplicitReward` has one if its model is trained on chats.
        if getattr(getattr(source, "tokenizer", None), "chat_template", None):
            for name, dataset in datasets:
                _check_function_gets_chats(dataset, name, actors, source.__name__, pad_id)
    for scorer in (source for source in reward_funcs if isinstance(source, TokenScorer)):
        form, model = scorer.form, f"the reward model {scorer.__name__!r}"
        for name, dataset in datasets:
            if not isinstance(dataset, Dataset | IterableDataset):
                continue
            is_chat = describe(dataset).columns.get("prompt") == CONVERSATION
            if is_chat and not form.tokenizer.chat_template:
                raise ValueError(
                    f"`{name}` holds conversations, and the tokenizer of {model} has no chat template. Pass the one "
                    "that it was trained with in `reward_processing_classes`, its `chat_template` set; or give "
                    "prompts of text."
                )
            _check_ids_readable(dataset, name, form, model, pad_id)
            if scorer.longest is not None and isinstance(dataset, Dataset):
                kinds = (True, False) if "input_ids" in dataset.column_names else (is_chat,)
                longest = scorer.longest - max(map(form.behind, kinds))
                options = (args.response_length, args.dataset_num_proc, args.chat_template_kwargs)
                limits = {f"{model}'s context": longest}
                check_prompts(dataset, name, form.tokenizer, limits, *options, pad_id=pad_id)


def _check_function_gets_chats(dataset: Any, name: str, actors: RewardForm, source: str, pad_id: int | None) -> None:
    rows = islice(dataset, LOOKED_AT) if isinstance(dataset, Dataset | IterableDataset) else []
    for row in rows:
        if is_tokenised(row) and actors.is_chat(unpadded(row, pad_id, actors.tokenizer.eos_token_id)):
            raise ValueError(
                f"`{name}` holds conversations in `input_ids`. The reward function {source!r} would get them as text "
                "without the marks of their roles, and it has a chat template that writes messages. Give the messages "
                "in a column `prompt`."
            )


def _check_ids_readable(dataset: Any, name: str, form: RewardForm, model: str, pad_id: int | None) -> None:
    for row in islice(dataset, LOOKED_AT):
        if not is_tokenised(row):
            return
        why = form.why_unreadable(unpadded(row, pad_id, form.actors.eos_token_id))
        if why is not None:
            raise ValueError(
                f"`{name}` holds conversations in `input_ids`, written by the actor's chat template, and "
                f"{why.format(model)}. Give the messages in a column `prompt`, which it writes its own way; or, if it "
                "was trained on text like this, set the `chat_template` of its tokenizer in "
                "`reward_processing_classes` to the actor's."
            )


def longest_input(model: nn.Module) -> int | None:
    """Return the number of tokens that a model has positions for; `None` without a table of absolute positions."""
    tables = [
        # RoBERTa's table begins behind the pad token's row.
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES
    ]
    config: Any = model.config
    declared = getattr(config.get_text_config(), "max_position_embeddings", None)
    if tables and declared:
        tables.append(declared)  # OPT's table has two rows more than there are positions
    return min(tables, default=None)


def token_scorer(reward_func: Any) -> TokenScorer | None:
    """Return the reward if it is a [`TokenScorer`], else `None`."""
    return reward_func if isinstance(reward_func, TokenScorer) else None


def model_of_text(reward_func: Any) -> nn.Module | None:
    """Return the reward's model if that has its own tokenizer, which GRPO takes, else `None`."""
    return reward_func.model if isinstance(reward_func, TokenScorer) and not reward_func.form.shares_ids else None


def check_reward_checkpoint(path: str, trust_remote_code: bool = False) -> None:
    """Raise `ValueError`, from the config alone, for a checkpoint without a trained score of one label."""
    config = read_config(path, "reward model", trust_remote_code=trust_remote_code)
    architecture = (config.architectures or ["an unknown architecture"])[0]
    if "ForSequenceClassification" not in architecture:
        reward = f"{path.rstrip('/')}-reward"
        raise ValueError(
            f"The reward model {path!r} holds a {architecture}, whose score head would be untrained. Train one on "
            f"pairs first: `trl-ext reward --model {shlex.quote(path)} --dataset_name PAIRS.jsonl --output_dir "
            f"{shlex.quote(reward)}`, and give `reward_model_path={reward!r}`."
        )
    check_single_label(config.num_labels, path)


def load_reward_model(path: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a trained reward model; raise `ValueError` for a checkpoint without a trained score of one label."""
    check_reward_checkpoint(path, init_kwargs.get("trust_remote_code", False))
    return create_model_from_path(path, architecture=AutoModelForSequenceClassification, num_labels=1, **init_kwargs)


def check_reward_model(model: PreTrainedModel) -> None:
    """
    Raise `ValueError` for a reward model in memory with several labels, or without a config. A module that takes the
    arguments of a reward function passes.
    """
    if is_function(model):
        return
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(
            f"The reward model {type(model).__name__} has no `config` of transformers, which says how many tokens it "
            "knows and how many labels it has. Give it one (`vocab_size`, `num_labels=1`, `pad_token_id`), or wrap it "
            "in a function for `reward_funcs`."
        )
    check_single_label(config.num_labels, get_config_model_id(config) or type(model).__name__)


def is_function(source: Any) -> bool:
    """Return whether a module takes the arguments of a reward function, and no token ids."""
    if not isinstance(source, nn.Module) or hasattr(source, "config"):
        return False
    parameters = inspect.signature(source.forward).parameters
    return "input_ids" not in parameters and bool({"completions", "prompts", "completion_ids"} & parameters.keys())


def check_single_label(num_labels: int, name: str) -> None:
    if num_labels != 1:
        raise ValueError(
            f"The reward model {name!r} has {num_labels} labels; a response gets one score. Use a model trained with "
            "`num_labels=1`, or wrap it in a function for `reward_funcs`."
        )


def find_tokenizer(path: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer saved beside the reward model in `path`, or `None`."""
    if not path:
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def same_tokenizer(actors: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, actor_vocabulary: int) -> bool:
    """
    Return whether two tokenizers turn text into the same ids and ids into the same text. Two differences do not count:
    ids without a row in the actor's embedding, and a pad token that only one of the two has, which is never read
    (scripts for TRL 1.12 add one).
    """
    if actors is other:
        return True
    mine, its = actors.get_vocab().items(), other.get_vocab().items()
    differing = {token for token, _ in its - mine} | {token for token, id_ in mine - its if id_ < actor_vocabulary}
    same_vocabulary = differing <= {actors.pad_token, other.pad_token}
    return same_vocabulary and actors(PROBE)["input_ids"] == other(PROBE)["input_ids"]


def reads_actor_ids(
    reward_model: PreTrainedModel,
    reward_tokenizer: PreTrainedTokenizerBase | None,
    actor_tokenizer: PreTrainedTokenizerBase,
    actor_vocabulary: int,
) -> bool:
    """
    Return whether the reward model shares the actor's tokenizer. A model without a tokenizer, such as one made in
    memory by scripts for TRL 1.12, must have an embedding of every id of the actor's.

    `actor_vocabulary` is the number of rows in the actor's embedding; it samples no id beyond.
    """
    vocabulary = reward_model.config.get_text_config().vocab_size
    if reward_tokenizer is not None:
        return vocabulary >= actor_vocabulary and same_tokenizer(actor_tokenizer, reward_tokenizer, actor_vocabulary)
    if vocabulary < actor_vocabulary:
        raise ValueError(
            f"The reward model knows {vocabulary} tokens and the actor {actor_vocabulary}, and no tokenizer is saved "
            "beside the reward model: it could not read every id. Pass its tokenizer as `reward_processing_classes`."
        )
    logger.info("No tokenizer is saved beside the reward model: it reads the actor's token ids.")
    return True
