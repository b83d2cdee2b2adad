"""The engine: stages, pipelines, workers and what is counted. Names are loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libfp.engine.application import Application as Application
    from libfp.engine.decorator import Bindable as Bindable
    from libfp.engine.decorator import BoundStage as BoundStage
    from libfp.engine.decorator import Stage as Stage
    from libfp.engine.decorator import stage as stage
    from libfp.engine.pipeline import Outcome as Outcome
    from libfp.engine.pipeline import Pipeline as Pipeline
    from libfp.engine.stats import Counters as Counters
    from libfp.engine.worker import Worker as Worker

_HOME = {
    "Application": "application",
    "Bindable": "decorator",
    "BoundStage": "decorator",
    "Counters": "stats",
    "Outcome": "pipeline",
    "Pipeline": "pipeline",
    "Stage": "decorator",
    "Worker": "worker",
    "stage": "decorator",
}

__all__ = [
    "Application",
    "Bindable",
    "BoundStage",
    "Counters",
    "Outcome",
    "Pipeline",
    "Stage",
    "Worker",
    "stage",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"libfp.engine.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
