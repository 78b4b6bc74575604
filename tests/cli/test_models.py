"""Options of model, adapter, optimizer and schedule that cannot be, beside those of test_errors.py."""

import pytest
from peft import LoraConfig
from transformers import Trainer

import tiny
from cli_runs import TRAINING, error_of, run_of
from trl_ext.cli.main import main
from trl_ext.cli.models import ModelArguments, model_errors, require_adapted


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
LORA = "--use_peft"
OF_THE_MODEL = {
    f"{LORA} --lora_target_modules nothing": "The model has no modules that `--lora_target_modules` names (nothing).",
    f"{LORA} --lora_target_modules q_proj nothing": "`--lora_target_modules` has nothing, and no module",
    f"{LORA} --lora_modules_to_save nothing": "`--lora_modules_to_save` has nothing, and no module",
    f"{LORA} --lora_target_modules [": "`--lora_target_modules` is '[', which is no regular expression",
    f"{LORA} --lora_task_type TOKEN_CLS": "`--lora_task_type` is TOKEN_CLS; this command trains CAUSAL_LM: leave it",
    f"{LORA} --lora_alpha 0": "`--lora_alpha` is 0; it must be an integer of at least 1",
    f"{LORA} --lora_dropout 2": "`--lora_dropout` is 2.0; it must be 0 or above and below 1",
    f"{LORA} --load_in_4bit --bnb_4bit_quant_storage x": "`--bnb_4bit_quant_storage` must be a valid string (one of",
    f"{LORA} --load_in_4bit --bnb_4bit_quant_type x": "'x' is no choice",
    "--attn_implementation flash_attention_9": "In place of flash_attention_9 write `--attn_implementation sdpa`",
    "--attn_implementation none/of-the-hub": "In place of none/of-the-hub write `--attn_implementation sdpa`",
    "--dtype foo": "'foo' is no choice",
    "--pad_token nothing": "`--pad_token` is 'nothing', and the model's tokenizer has no such token",
    "--lora_r=8": "`--lora_r` is an option of an adapter, and none is made: every weight would be trained.",
    """--model_init_kwargs {"foo":1}""": "Correct `--model_init_kwargs`, or leave it out.",
}
OF_THE_TRAINING = {
    "--optim galore_adamw": "`--optim galore_adamw` is refused: You need to install `galore",
    "--adam_beta1 2": "`--adam_beta1` is 2.0; it must be 0 or above and below 1",
    "--lr_scheduler_type nothing": "'nothing' is no choice",
    "--lr_scheduler_type cosine_with_min_lr": "Give `--lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'`",
    """--lr_scheduler_type inverse_sqrt --lr_scheduler_kwargs {"foo":1}""": "unexpected keyword argument 'foo'. Leave",
    "--accelerator_config missing.json": "`--accelerator_config` cannot be read: [Errno 2] No such file",
    """--accelerator_config {"foo":1}""": "unexpected keyword argument 'foo'",
    "--seed -1": "`--seed` is -1; it must be 0 or above",
    "--dataloader_prefetch_factor 2": "--dataloader_prefetch_factor can only be set when data is",
    "--logging_steps 0": "`--logging_steps` is 0.0; it must be above 0. For none at all write `--logging_str",
    "--per_device_train_batch_size 0": "`--per_device_train_batch_size` is 0; it must be",
}


def refusal(name, words, paths, tmp_path, capsys):
    return error_of([name, *run_of(name, paths, output_dir=tmp_path), *words.split()], capsys)


@pytest.mark.parametrize("words", OF_THE_MODEL | OF_THE_TRAINING)
def test_what_other_packages_refuse_is_one_sentence(words, paths, tmp_path, capsys):
    said = refusal("dpo", words, paths, tmp_path, capsys)
    assert (OF_THE_MODEL | OF_THE_TRAINING)[words] in said
    assert "is no choice" in said or said.count("\n") == 0


@pytest.mark.parametrize("name", ["reward", "ppo"])
@pytest.mark.parametrize(
    "words", [*list(OF_THE_MODEL)[:2], "--attn_implementation flash_attention_9", *list(OF_THE_TRAINING)[-4:]]
)
def test_other_commands_refuse_it_alike(name, words, paths, tmp_path, capsys):
    said = refusal(name, words, paths, tmp_path, capsys)
    assert said.startswith("error: ")
    assert (OF_THE_MODEL | OF_THE_TRAINING)[words] in said


def test_advice_of_a_refusal_trains(paths, tmp_path, monkeypatch):
    """What the sentences above say to give, and a lone name, which PEFT would take for a pattern."""
    began = []

    def begin(trainer, **_):
        began.append(trainer)
        raise SystemExit("begins")

    monkeypatch.setattr(Trainer, "_inner_training_loop", begin)
    for more in ("q_proj", "all-linear", ".*q_proj"):
        with pytest.raises(SystemExit, match="begins"):
            main(["dpo", *run_of("dpo", paths, output_dir=tmp_path), "--use_peft", "--lora_target_modules", more])
        adapted = {name for name, _ in began[-1].model.named_modules() if name.endswith("lora_A")}
        assert any("q_proj" in name for name in adapted)
        assert any("k_proj" in name for name in adapted) == (more == "all-linear")


def test_error_that_no_option_explains_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), model_errors(ModelArguments(), ""):
        1 / 0  # noqa: B018
    with pytest.raises(TypeError), model_errors(ModelArguments(), ""):
        LoraConfig("too", "many", "words", *range(99))


def test_names_are_looked_for_in_a_model_with_an_adapter_alone():
    model = tiny.tiny_actor()
    require_adapted(model, ModelArguments(lora_target_modules=["q_proj", "nothing"]))
    given = ModelArguments(use_peft=True, lora_target_modules=["q_proj", "proj"])
    with pytest.raises(ValueError, match="`--lora_target_modules` has proj, and no module"):
        require_adapted(model, given)


@pytest.mark.parametrize("name", TRAINING)
def test_dry_run_checks_the_adapter(name, paths, tmp_path, capsys):
    words = "--use_peft --lora_task_type TOKEN_CLS --dry_run"
    assert "`--lora_task_type`" in refusal(name, words, paths, tmp_path, capsys)
