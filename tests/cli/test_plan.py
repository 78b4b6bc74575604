"""`trl-ext plan` ends in one sentence, whatever goes wrong on the way."""

import json
import re
import subprocess
import sys
import textwrap

import pytest

from run_logs import PPO_LOG, run_folder
from trl_ext.cli.commands import plan


def ended_with(*argv):
    with pytest.raises(SystemExit) as stopped:
        plan.main([*map(str, argv)])
    return str(stopped.value)


def test_error_of_another_package_is_one_sentence_with_its_class(monkeypatch):
    def broken(*args):
        raise TypeError("unsupported operand\n  type(s)")

    monkeypatch.setattr("trl_ext.planner.plan", broken)
    assert ended_with("--model", "135m") == "error: TypeError: unsupported operand type(s)"


def test_recipe_in_another_folder_needs_the_trainer(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model_name_or_path: smollm2-135m-instruct\n")
    said = ended_with("--from_config", recipe)
    assert said == (
        f"error: The recipe '{recipe}' is in no folder of the name ppo, dpo or reward: say whose it is, such as "
        "`--trainer ppo`."
    )
    plan.main(["--from_config", str(recipe), "--trainer", "dpo"])
    assert "GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--episodes -5", "`--episodes` is -5; it must be above 0"),
        ("--episodes nan", "`--episodes` is nan; it must be above 0"),
        ("--optimizer adamw_8bits", "`--optimizer` is 'adamw_8bits', .* Did you mean adamw_8bit or "),
    ],
)
def test_value_that_can_only_be_a_mistake_is_refused(flags, said):
    assert re.match(f"error: {said}", ended_with("--model", "135m", *flags.split()))


def test_plan_for_a_cpu_speaks_of_processes(capsys):
    plan.main("--model 135m --gpu cpu --gpu_memory 4".split())
    text = capsys.readouterr().out
    assert re.search(
        r"at \S+ GiB on the process:.* tokens/s on 1 process\. 100,000 responses: \S+ process-hours", text, re.S
    )
    assert "GPU" not in text


def test_fsdp_is_planned(capsys):
    plan.main(["--model", "0.5b", "--gpus", "4", "--fsdp"])
    assert "FSDP2, autocast" in capsys.readouterr().out


def test_plan_of_a_known_model_report_and_help_need_neither_torch_nor_the_hub(tmp_path):
    """They answer at once, though torch and transformers take seconds to import."""
    run_folder(tmp_path, PPO_LOG)
    code = f"""
        from trl_ext.cli.main import main
        for name in ("plan", "report", "chat", "demo", "merge"):
            main([name, "--help"])
        main(["plan", "--model", "8b", "--gpu", "4090", "--suggest"])
        main(["report", {str(tmp_path)!r}])
        import sys
        print({{"torch", "transformers", "trl", "huggingface_hub"}} & sys.modules.keys())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "| lora " in run.stdout
    assert run.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("name, said", [("missing/plan.png", "FileNotFoundError: "), ("plan.abc", "`--picture` is ")])
def test_picture_that_cannot_be_written_is_one_sentence(tmp_path, capsys, name, said):
    sentence = ended_with("--model", "135m", "--picture", tmp_path / name)
    assert sentence.startswith(f"error: {said}")
    assert "\n" not in sentence
    # What could be said stands before it; a name's ending is looked at first
    assert ("GiB" in capsys.readouterr().out) == (name != "plan.abc")


@pytest.mark.parametrize(
    "config", [{"model_type": "llama", "hidden_size": "wide"}, {"model_type": "llama", "num_attention_heads": 0}, []]
)
def test_config_that_makes_no_sense_is_one_sentence(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentence = ended_with("--model", tmp_path)
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
