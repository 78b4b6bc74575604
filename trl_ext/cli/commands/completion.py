"""
Print a script for the shell that completes commands, options, their values and the names of recipes.

    trl-ext completion bash > ~/.local/share/bash-completion/completions/trl-ext
    trl-ext completion zsh > ~/.trl-ext.zsh          # and in ~/.zshrc: source ~/.trl-ext.zsh

The script runs nothing while you type: it holds the options of the installed versions, so write it again after an
update.
"""

import argparse
from collections.abc import Iterator

from ..flags import CommandParser, is_negation, spellings
from ..recipes import RECIPES, installed_recipes
from ..shipped import shipped


def arguments() -> CommandParser:
    parser = CommandParser("completion", __doc__)
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell to complete in")
    return parser


def main(argv: list[str] | None = None) -> None:
    given = arguments().parse_args(argv)
    print(ZSH if given.shell == "zsh" else "", shipped("completion") or made(), sep="", end="")


def made() -> str:
    """Return the script from the parsers of all commands, for which torch is imported."""
    from ..main import COMMANDS
    from ..parser import parser_of

    return script({name: parser_of(name) for name in COMMANDS})


def script(parsers: dict[str, argparse.ArgumentParser]) -> str:
    """Return the script for bash, from the parser of each command."""
    flags = "\n".join(f'        {name}) words="{" ".join(flags_of(parser))}" ;;' for name, parser in parsers.items())
    values = "\n".join(
        f'        "{name} {flag}") words="{" ".join(words)}" ;;'
        for name, parser in parsers.items()
        for flag, words in values_of(name, parser)
    )
    return SCRIPT.format(commands=" ".join(parsers), flags=flags, values=values)


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in spellings(action) if name.startswith("--")]


def values_of(command: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Give each flag, or the command itself for what stands without one, that has known values, with these."""
    for action in parser._actions:
        words = [str(choice) for choice in action.choices or ()]
        if action.dest in ("config", "from_config"):
            words = [recipe.name for recipe in installed_recipes(*([command] if command in RECIPES else []))]
        if words and not (action.option_strings and is_negation(action.option_strings[0])):
            yield from ((flag, words) for flag in spellings(action) or [command])


# Where it has no words, and beside them for a recipe, the shell completes the names of files.
SCRIPT = """\
_trl_ext() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
        return
    fi
    case "$command ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
    esac
    case "$word" in -*) case "$command" in
{flags}
    esac ;; esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _trl_ext trl-ext
"""
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"  # runs what is bash's
