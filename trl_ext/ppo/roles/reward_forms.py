"""The token ids in which a reward model reads an answer: those that `trl.RewardTrainer` would train it on."""

from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..._trl import reward_ids
from ..data import TokenisedPrompt


Text = str | list[dict[str, Any]]

ANSWER = "xANSWERx"  # stands for the words of an answer, to see what is written behind them
QUESTION, WITH_ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}


class RewardForm:
    """
    A prompt and its answer in the form of `RewardTrainer`'s data: text with an end token behind it and whatever the
    tokenizer adds (BOS, CLS, SEP); conversations by the chat template of the reward model's own tokenizer.

    A model that shares the actor's vocabulary reads the sampled ids, with that end behind them, if they say the same.
    An answer that was cut off gets an end here too, since a reward model is trained on ended answers and reads its
    score at the end.

    A chat in token ids is recognised by its end, which opens an answer in the actor's chat template. The answer
    follows, and then what the template writes behind one.

    Args:
        tokenizer: the reward model's.
        actors: the actor's.
        shares_ids: whether the reward model's vocabulary is the actor's.
        template_kwargs: keyword arguments of the chat template.

    `tools`, by the name of the environment (`None` without), are those of the actor's prompts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        actors: PreTrainedTokenizerBase,
        shares_ids: bool,
        template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.actors, self.shares_ids = tokenizer, actors, shares_ids
        self._special = {id_ for id_, token in actors.added_tokens_decoder.items() if token.special}
        self.template_kwargs = template_kwargs or {}
        self.tools: dict[str | None, list[Any]] = {}
        self._added = self._added_behind_text()
        self._behind_text = self._ids(tokenizer.eos_token or "") + self._added
        # What the chat template writes behind an answer's words; `None` unless it writes them once
        written = self._written(tokenizer, [QUESTION, WITH_ANSWER]) if tokenizer.chat_template else ""
        self._closing = written.partition(ANSWER)[2] if written.count(ANSWER) == 1 else None
        self._behind_chat = None if self._closing is None else self._ids(self._closing)

    def __call__(
        self,
        prompt: Text | None,
        answer: Text | None,
        prompt_ids: list[int] | None,
        answer_ids: list[int] | None,
        environment: str | None = None,
    ) -> list[int]:
        """Return the ids that the model reads. Without `prompt` they are those of a text, with the end behind them."""
        if isinstance(prompt, list):
            return self._of_chat(prompt, answer, prompt_ids, answer_ids, environment)
        if isinstance(prompt, TokenisedPrompt) and self._closing is not None and self.is_chat(prompt.input_ids):
            return self._of_written_chat(prompt.input_ids, answer, answer_ids)
        if self.shares_ids and prompt_ids is not None and answer_ids is not None:
            added = len(self._added)
            if added and prompt_ids[-added:] == self._added:
                prompt_ids = prompt_ids[:-added]
            return [*prompt_ids, *self._without_end(answer_ids), *self._behind_text]
        return reward_ids(self.tokenizer, prompt, self._text_of(answer, prompt_ids, answer_ids))

    def is_chat(self, prompt_ids: list[int]) -> bool:
        """
        Return whether a prompt's ids end with the opening of an answer in the actor's chat template. If that opening
        has a special token, the beginning of an answer may follow it.
        """
        opening, size = self._opening, len(self._opening)
        ends = [end for end in range(size, len(prompt_ids) + 1) if prompt_ids[end - size : end] == opening]
        if not opening or not ends:
            return False
        begun = prompt_ids[ends[-1] :]
        return not begun or (self._has_mark(opening) and not self._has_mark(begun))

    def why_unreadable(self, prompt_ids: list[int]) -> str | None:
        """
        Return why the reward model cannot read a chat in token ids as it was trained; `None` if it can, and for text.
        Token ids cannot be turned back into messages, which it would write its own way.
        """
        if not self.is_chat(prompt_ids):
            return None
        if not self.tokenizer.chat_template:
            loses_marks = not self.shares_ids and self._has_mark(self._opening)
            return "the tokenizer of {} has none" if loses_marks else None
        if not self._writes_as_the_actor:
            return "the tokenizer of {} has another one, or writes it with other special tokens"
        written_to_answer = self._written(self.actors, [QUESTION, WITH_ANSWER]).partition(ANSWER)[0]
        if self._closing is None or not written_to_answer.startswith(self._written_to_the_opening):
            return (
                "it does not write an answer as it opens one, as where thoughts are taken out: {} reads it otherwise"
            )
        if self.shares_ids or self._ids_by_actor(self.actors.decode(prompt_ids)) == prompt_ids:
            return None
        return "they cannot be decoded to the text that they were made of, for {}, which has another vocabulary"

    def behind(self, is_chat: bool) -> int:
        """Return the number of tokens that are written behind an answer."""
        return len((self._behind_chat or ()) if is_chat else self._behind_text)

    def _of_written_chat(self, prompt_ids: list[int], answer: Any, answer_ids: Any) -> list[int]:
        if self.shares_ids and answer_ids is not None:
            return [*prompt_ids, *self._without_end(answer_ids), *(self._behind_chat or ())]
        text = self._text_of(answer, prompt_ids, answer_ids)
        return self._ids(f"{self.actors.decode(prompt_ids)}{text}{self._closing}")

    def _of_chat(
        self, prompt: Any, answer: Any, prompt_ids: Any, answer_ids: Any, environment: str | None
    ) -> list[int]:
        tools = self.tools.get(environment) or None
        trained_on = reward_ids(self.tokenizer, prompt, answer, tools, self.template_kwargs)
        if not self.shares_ids or prompt_ids is None or self._behind_chat is None:
            return trained_on
        sampled = [*prompt_ids, *self._without_end(answer_ids), *self._behind_chat]
        # The messages lack special tokens that were sampled within an answer; the ids have them.
        plain_answer = [id_ for id_ in answer_ids if id_ not in self._special]
        plain = [*prompt_ids, *plain_answer, *self._behind_chat]
        written = self.tokenizer.decode(trained_on)
        return sampled if written in (self.tokenizer.decode(sampled), self.tokenizer.decode(plain)) else trained_on

    def _text_of(self, answer: Any, prompt_ids: Any, answer_ids: Any) -> str:
        """Return the answer's text after the prompt; decoded alone, it may lose a space at its beginning."""
        if prompt_ids is None or answer_ids is None:
            return answer
        before, whole = self.actors.batch_decode([prompt_ids, [*prompt_ids, *answer_ids]], skip_special_tokens=True)
        return whole.removeprefix(before) if whole.startswith(before) else answer

    def _has_mark(self, ids: list[int]) -> bool:
        return not self._special.isdisjoint(ids)

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self._special else ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _added_behind_text(self) -> list[int]:
        """Return the ids that the tokenizer itself puts behind a text: SEP, or another end token."""
        plain, whole = self._ids(ANSWER), self.tokenizer(ANSWER)["input_ids"]
        before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[before + len(plain) :]

    @cached_property
    def _opening(self) -> list[int]:
        """Return the ids with which the actor's chat template opens an answer; none if it opens none."""
        if not self.actors.chat_template:
            return []
        without = self._written(self.actors, [QUESTION])
        return self._ids_by_actor(self._written_to_the_opening.removeprefix(without))

    @cached_property
    def _written_to_the_opening(self) -> str:
        return self._written(self.actors, [QUESTION], add_generation_prompt=True)

    @cached_property
    def _writes_as_the_actor(self) -> bool:
        theirs, own = (self._written(one, [QUESTION, WITH_ANSWER]) for one in (self.actors, self.tokenizer))
        return self.actors.chat_template == self.tokenizer.chat_template and theirs == own

    def _written(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, **(self.template_kwargs | {"tokenize": False} | options))

    def _ids_by_actor(self, text: str) -> list[int]:
        return self.actors(text, add_special_tokens=False)["input_ids"]
