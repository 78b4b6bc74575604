"""The documentation site: `make docs` builds it with Sphinx, from the Markdown pages and the docstrings.

Docstrings are plain text with names in single backticks; `default_role` shows those as code.
"""

import dataclasses
import inspect
import re
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers.shell import BashLexer
from pygments.token import Name
from transformers import TrainingArguments

import trl_ext


project = "trl_ext"
author = "The trl_ext authors"
release = version = trl_ext.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nb_execution_mode = "off"  # notebooks show the outputs that `make notebooks` has stored
nb_render_markdown_format = "myst"  # with tables
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings, as GitHub makes them
default_role = "code"
highlight_language = "none"  # a block without a language is output or a formula

autodoc_inherit_docstrings = False  # those of TRL and transformers are Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}

html_theme = "furo"
html_title = "trl_ext"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # below: browsers show it by themselves, so that the site also reads offline


class CommandLexer(BashLexer):
    """Bash in which an option is one token: `site.css` keeps it in one piece where a long command wraps."""

    tokens = {**BashLexer.tokens, "root": [(r"(?<=\s)--?[\w-]+", Name.Attribute), *BashLexer.tokens["root"]]}


def describe_options(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Adds to a config class the options that it and the topics it joins declare, with their help and default."""
    lines[:] = [re.sub(r"\[(`[\w.]+`)\]", r"\1", line) for line in lines]  # links in the style of Hugging Face
    if not is_config(value):
        return
    fields = {field.name: field for field in dataclasses.fields(value)}
    # A dataclass has the fields of its last base first.
    for owner in (part for part in reversed(value.__mro__) if part.__module__.startswith("trl_ext.")):
        topic = "Options" if owner is value else owner.TOPIC
        options = [name for name in inspect.get_annotations(owner) if name in fields]
        lines += ["", f"{topic}:", ""] if options else []
        for option in options:
            help_text, default = fields[option].metadata.get("help", ""), _default(fields[option])
            lines += [f"- ``{option}`` (default ``{default!r}``): {help_text}"]
    lines += [""]


def drop_signature(app: Any, what: str, name: str, value: Any, *rest: Any) -> tuple[str, None] | None:
    """Of a config class with its two hundred inherited options; those of its own are listed."""
    return ("", None) if is_config(value) else None


def is_config(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, TrainingArguments)


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def write_inline_formula(writer: Any, node: Any) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode


def write_formula(writer: Any, node: Any) -> None:
    formula = tex2mathml(node.astext().strip(), as_block=True)
    writer.body.append(f'<div style="overflow-x: auto; overflow-y: hidden; padding: 0.3em 0">{formula}</div>')
    raise SkipNode


def setup(app: Any) -> None:
    app.add_lexer("bash", CommandLexer)
    app.add_html_math_renderer("mathml", (write_inline_formula, None), (write_formula, None))
    app.connect("autodoc-process-docstring", describe_options)
    app.connect("autodoc-process-signature", drop_signature)
