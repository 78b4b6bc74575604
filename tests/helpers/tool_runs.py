"""Chats with a tool, and an environment that owns its reward."""

from datasets import Dataset

import tiny


TOOL_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + ('unk' if message['role'] == 'tool' else message['role']) + '> ' + message['content'] + ' ' }}"
    "{% for call in message.get('tool_calls') or [] %}"
    "{{ call['function']['name'] + ' ' + (call['function']['arguments'] | tojson) + ' ' }}"
    "{% endfor %}"
    "{{ '<eos> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def look(word: str) -> str:
    """
    Looks a word up.

    Args:
        word: the word.
    """
    return "good film"


class Room:
    """An environment that owns its reward."""

    reward = 0.5

    def reset(self, **kwargs):
        return None

    def look(self, word: str) -> str:
        """
        Looks a word up.

        Args:
            word: the word.
        """
        self.looked = True
        return "good film"

    def get_reward(self):
        return self.reward


def tool_models():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.response_schema = {"type": "object"}
    tokenizer.response_template = {"unused": True}
    prompts = [[{"role": "user", "content": word}] for word in ("cat", "dog", "bird", "fish")]
    return {"processing_class": tokenizer, "train_dataset": Dataset.from_dict({"prompt": prompts})}
