"""The engine: stages, pipelines, workers and what is counted. Names are loaded when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from libfp.lazy import lazy

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

__all__, __getattr__, __dir__ = lazy(__name__, {
    "application": "Application",
    "decorator": "Bindable BoundStage Stage stage",
    "pipeline": "Outcome Pipeline",
    "stats": "Counters",
    "worker": "Worker",
})  # fmt: skip
