"""
The plan of a run: what it needs on each GPU, from configs alone, before anything is loaded.

    catalogue   published configs of models that people name
    counts      what is counted in a model
    counting    what transformers builds from a config, counted on a meta model
    shapes      sizes of models and adapters
    layout      what is planned: how a run is laid out, on which hardware
    machines    GPUs by what people call them, and the machines that they are in
    optimizers  bytes of each optimizer's states
    memory      bytes of each part, as formulas
    phases      bytes by role and moment
    planning    a plan: the phases, and whether they fit
    changes     what would make a plan fit
    timing      seconds, tokens per second, GPU-hours
    search      the fastest layouts that fit
    recipe      from a run's options to its layout
    table       plans in words and tables
    drawing     how cost grows, as a picture
"""

from .catalogue import SHAPES, load_config
from .changes import smallest_change
from .drawing import picture
from .layout import GIB, Hardware, Layout
from .machines import CPU, GPUS, hardware
from .planning import ModelNames, Plan, plan
from .recipe import layout_from_options, names_from_options, this_machine
from .search import suggest
from .shapes import model_shape
from .table import plan_text, scale_table, speed_text, suggestion_table
from .timing import assumed, speed


__all__ = [
    "CPU",
    "GIB",
    "GPUS",
    "SHAPES",
    "Hardware",
    "Layout",
    "ModelNames",
    "Plan",
    "assumed",
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
