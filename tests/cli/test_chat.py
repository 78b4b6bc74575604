"""`trl-ext chat` answers as the model generates."""

import pytest
from transformers import TextGenerationPipeline

import tiny
from trl_ext.cli.commands import chat


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def talk(monkeypatch, capsys, model, *said, options=()):
    answers = iter([*said, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    chat.main([str(model), "--max_new_tokens", "5", *options])
    return capsys.readouterr().out


def test_chat_answers_as_the_model_generates(paths, monkeypatch, capsys):
    model, tokenizer = tiny.tiny_actor().eval(), tiny.tiny_tokenizer()
    assert tokenizer.chat_template
    said = [{"role": "user", "content": "good film"}]
    batch = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**batch, max_new_tokens=5, do_sample=False)[0, batch["input_ids"].size(1) :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert expected.strip()
    printed = talk(monkeypatch, capsys, paths["actor"], "good film")
    assert expected in printed
    assert printed.startswith(
        f"{paths['actor']}: `--max_new_tokens 5`, `--temperature 0`, always the likeliest token."
    )
    assert printed.endswith("[cut off after 5 tokens: `--max_new_tokens`]\n")


@pytest.fixture
def asked(monkeypatch):
    """What a pipeline is asked."""
    asked, real = [], TextGenerationPipeline.__call__

    def call(self, messages, **options):
        asked.append(list(messages))
        return real(self, messages, **options)

    monkeypatch.setattr(TextGenerationPipeline, "__call__", call)
    return asked


def test_chat_remembers_until_it_starts_over(paths, monkeypatch, capsys, asked):
    talk(monkeypatch, capsys, paths["actor"], "one", "two", "/new", "three", options=["--system", "be brief"])
    roles = [[message["role"] for message in messages] for messages in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert asked[2][1]["content"] == "three"


def test_chat_ends_where_the_model_ends(tmp_path, monkeypatch, capsys, asked):
    model, tokenizer = tiny.tiny_actor(), tiny.tiny_tokenizer()
    model.generation_config.eos_token_id = list(range(3, 64))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "cut off" not in talk(monkeypatch, capsys, tmp_path, "one", "two")
    answer = asked[1][1]["content"]
    assert len(tokenizer(answer)["input_ids"]) <= 1
