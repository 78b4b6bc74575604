"""Tiny models, tokenizer and prompts: built from a config, no network, no dropout, the same on every call."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)


SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
WORDS = (
    "zero one two three four five six seven eight nine ten plus minus times equals "
    "the a an and or but not is was to of in on it you we they "
    "cat dog bird fish tree house book film story song "
    "good bad great awful happy sad funny dull new old "
    "what why how . ?"
).split()
VOCABULARY = SPECIAL_TOKENS + WORDS  # 64 tokens: a word's id is its place in this list

# One line per message, closed by <eos>; the generation prompt opens the assistant's line.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <eos> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 64 tokens, padding on the left; `decode` gives the words back, separated by spaces."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def tiny_config(**overrides) -> LlamaConfig:
    """The config of every tiny model: hidden 16, 2 layers, 2 heads. `overrides` are `LlamaConfig` options."""
    options = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": 0.0,
        # The usual 0.02 leaves a model this narrow all but uniform; 0.2 gives tokens and values that differ visibly.
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": VOCABULARY.index("<pad>"),
        "bos_token_id": VOCABULARY.index("<bos>"),
        "eos_token_id": VOCABULARY.index("<eos>"),
    }
    return LlamaConfig(**(options | overrides))


def tiny_actor(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A causal LM in float32. The seed alone decides its weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**overrides))


def tiny_reward_model(seed: int = 1, **overrides) -> LlamaForSequenceClassification:
    """A reward model with one score, in evaluation mode. With another seed it serves as a critic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(tiny_config(num_labels=1, **overrides)).eval()


def tiny_mixture(seed: int = 0, output_router_logits: bool = True) -> MixtralForCausalLM:
    """A mixture of four experts, two at a time, that may return its router logits."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    ids = {
        name: getattr(tiny_config(), name) for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    }
    config = MixtralConfig(num_key_value_heads=2, max_position_embeddings=128, **sizes, **experts, **ids)
    config.output_router_logits = output_router_logits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(config)


def tiny_prompts(size: int = 16, seed: int = 0, conversational: bool = False) -> Dataset:
    """A dataset with a `prompt` column, text or one user message: 1 to 8 words each, so that a batch needs padding."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(size)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    return Dataset.from_dict({"prompt": prompts})


def save_tiny(directory: str | Path, **overrides) -> dict[str, str]:
    """Save actor and reward model with the tokenizer, for tests that load models by path; returns both paths."""
    paths = {}
    for name, model in {"actor": tiny_actor(**overrides), "reward_model": tiny_reward_model(**overrides)}.items():
        path = str(Path(directory) / name)
        model.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        paths[name] = path
    return paths
