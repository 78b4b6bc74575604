"""The options of a run that differ from the defaults, for people to read."""

import dataclasses
from typing import Any


def changed_options(args: Any) -> dict[str, Any]:
    """The options of a config that differ from its class's defaults, without secrets."""
    written = args.to_dict()
    defaults = {}
    for option in dataclasses.fields(args):
        if option.default is not dataclasses.MISSING:
            defaults[option.name] = option.default
        elif option.default_factory is not dataclasses.MISSING:
            defaults[option.name] = option.default_factory()
    changed = {name: value for name, value in written.items() if value != defaults.get(name, dataclasses.MISSING)}
    return {name: value for name, value in changed.items() if not name.endswith("_token")}
