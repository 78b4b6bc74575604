"""
The planner: what a run needs on each GPU, before anything is loaded, from configs alone.

`plan` gives the phases of a run; `layout_from_options` makes the layout of a recipe; `suggest` searches layouts.
"""

from .changes import smallest_change
from .drawing import picture
from .layout import CPU, GIB, GPUS, Hardware, Layout, hardware
from .planning import ModelNames, Plan, plan
from .recipe import layout_from_options, names_from_options, this_machine
from .search import suggest
from .shapes import SHAPES, load_config, model_shape
from .table import plan_text, scale_table, speed_text, suggestion_table
from .timing import Assumptions, speed


__all__ = [
    "CPU",
    "GIB",
    "GPUS",
    "SHAPES",
    "Assumptions",
    "Hardware",
    "Layout",
    "ModelNames",
    "Plan",
    "hardware",
    "layout_from_options",
    "load_config",
    "model_shape",
    "names_from_options",
    "picture",
    "plan",
    "plan_text",
    "scale_table",
    "smallest_change",
    "speed",
    "speed_text",
    "suggest",
    "suggestion_table",
    "this_machine",
]
