"""`trl-ext demo` is a reward model, then PPO against it."""

from argparse import Namespace

import pytest

from commands import command
from trl_ext.cli.commands import demo
from trl_ext.data import demo as embedded


# Of TRL, transformers and torch themselves, on the way through whole commands.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_demo_is_a_reward_model_and_then_ppo_against_it(monkeypatch, capsys, tmp_path):
    ran = []
    monkeypatch.setattr(demo.subprocess, "run", lambda words: ran.append(words[3:]) or Namespace(returncode=0))
    monkeypatch.setattr(embedded, "smollm2", lambda: pytest.fail("loaded something"))
    demo.main(["--output_dir", str(tmp_path)])
    (first, *of_reward), (second, *of_ppo) = ran
    assert (first, second) == ("reward", "ppo")
    reward, ppo = command("reward").COMMAND.options(of_reward), command("ppo").COMMAND.options(of_ppo)
    assert ppo.reward_model_path == reward.output_dir == str(tmp_path / "reward-demo")
    assert ppo.total_episodes == 896  # the demo's recipe
    monkeypatch.setattr(demo.subprocess, "run", lambda words: Namespace(returncode=3))
    with pytest.raises(SystemExit) as end:
        demo.main([])
    assert end.value.code == 3


def test_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs gguf, matplotlib, jinja2: pip install 'trl-ext\[demo\]'"):
        demo.main([])
