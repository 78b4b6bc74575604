"""Pairs with images go TRL's way: the numbers are TRL's, and no prefix is shared."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import dpo_runs
import tiny


pytestmark = pytest.mark.integration
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{{ '<eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def processor() -> LlavaProcessor:
    """Pictures of 8 × 8 pixels in 4 patches, behind a class token that the model leaves out."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    pictures = CLIPImageProcessorPil(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def vision_model(seed: int = 0) -> LlavaForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        text_config=tiny.tiny_config(vocab_size=len(tiny.VOCABULARY) + 1),
        image_token_id=len(tiny.VOCABULARY),
        image_seq_length=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config)


def vision_pairs() -> Dataset:
    words = [
        ("the cat", "a good film", "a bad film"),
        ("of two books", "it is new .", "we are old"),
        ("why", "a", "b"),
    ]
    rows = [
        dpo_runs.chat(*texts, image=Picture.new("RGB", (8, 8), (40 * i, 255 - 60 * i, 128)))
        for i, texts in enumerate(words + words[:1])
    ]
    message = [{"role": Value("string"), "content": Value("string")}]
    features = {"prompt": message, "chosen": message, "rejected": message, "image": Image()}
    return Dataset.from_list(rows, features=Features(features))


def test_pairs_with_images_give_trl_s_numbers(tmp_path):
    logs = []
    for side in (dpo_runs.OURS, dpo_runs.TRLS):
        models = {"model": vision_model(), "ref_model": vision_model(seed=1), "processing_class": processor()}
        trainer = dpo_runs.dpo_trainer(tmp_path, models | {"train_dataset": vision_pairs()}, side)
        trainer.train()
        logs.append(dpo_runs.lines(trainer))
    ours, theirs = logs
    assert len(ours) == len(theirs) > 0
    for mine, line in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            assert mine[key] == pytest.approx(line[key], rel=1e-5)
        assert mine["preference/pairs"] > 0


def test_pictures_change_the_numbers_and_prefixes_are_not_shared(tmp_path):
    """Otherwise the comparison above would not have seen them."""
    results = []
    for pairs in (vision_pairs(), vision_pairs().map(lambda row: {"image": Picture.new("RGB", (8, 8))})):
        models = {"model": vision_model(), "ref_model": vision_model(seed=1), "processing_class": processor()}
        trainer = dpo_runs.dpo_trainer(tmp_path, models | {"train_dataset": pairs})
        assert not any(forward.packing.on for forward in trainer._forwards)
        trainer.train()
        results.append(dpo_runs.lines(trainer)[0]["logps/chosen"])
    assert results[0] != pytest.approx(results[1], rel=1e-5)
