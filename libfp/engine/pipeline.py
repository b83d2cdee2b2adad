"""Pipelines: stages in order, compiled into one loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from libfp.engine import loop
from libfp.engine.decorator import Bindable, BoundStage, Stage, as_bound, is_constant
from libfp.engine.digest import Digest
from libfp.engine.mistakes import refuse_unfit, told
from libfp.engine.reasons import Reasons
from libfp.errors import BadInput
from libfp.jit.cache import generate
from libfp.packet.verdict import KINDS, PORT_MASK

#: Words of table updates a worker applies between two bursts, at most.
UPDATE_BUDGET = 512


class Outcome(str):
    """What became of one packet of `Pipeline.run_once`: ``"forward"``, ``"drop denied"``, ``"punt ttl-expired"``,
    ``"consume"``, or ``"pass"`` when no stage decided.

    `frame` is the packet as the stages left it, `port` the index of the port it leaves by (None unless forwarded),
    `reason` the second word (or ""), `next_hop` the index of the next hop that decided, 0 for none.
    """

    frame: bytes
    port: int | None
    reason: str
    next_hop: int


class Pipeline:
    """Stages in order. Packets of a burst run through the first stage, then those still undecided through the next.

    `rates` overrides how many punts a second each worker may make, by reason (0: no limit; default 1000).
    Raises NotCacheable for stages whose code or arguments cannot be compiled in, StageError for those that raise or
    print, BadInput without stages.
    """

    def __init__(self, *stages: Stage | BoundStage, rates: Mapping[str, int] | None = None) -> None:
        if not stages:
            raise BadInput("a pipeline without stages", "Pipeline(parse, ...)")
        self.stages = [as_bound(one) for one in stages]
        self._digest = Digest()
        #: Numbers of the stages that may hand packets off to other workers; without any, there is nothing for it.
        self.hands_off: list[int] = []
        for number, bound in enumerate(self.stages):
            digest, owner = Digest(), f"stage {bound.stage.__name__!r}"
            refuse_unfit(bound.stage.function, owner)
            digest.add_function(bound.stage.function, owner)
            self._digest.merge(digest)
            if digest.hands_off:
                self.hands_off.append(number)
            for value in bound.arguments:
                if is_constant(value):
                    self._digest.add_strings(value)
                self._digest.strings.update(getattr(value, "stage_reasons", ()))  # given through its entries
        self.reasons = Reasons(self._digest.strings, rates)
        self._bindings: list[Any] = []  # what the loop takes as arguments, in order
        self._calls: list[tuple[bool, str]] = []
        self._turned: list[str] = []  # those of the arguments that want to be called each turn of the loop
        for bound in self.stages:
            rest = "".join(f", {self._argument(value)}" for value in bound.arguments)
            self._calls.append((bound.stage.per_burst, rest))
        self._once: Any = None

    def _argument(self, value: Any) -> str:
        if is_constant(value):
            return repr(value)
        for number, known in enumerate(self._bindings):
            if known is value:
                return f"a{number}"
        self._bindings.append(value)
        return f"a{len(self._bindings) - 1}"

    @property
    def tables(self) -> list[Any]:
        """Every table the stages see, and what their workers have of their own; each once."""
        found: dict[int, Any] = {}
        for value in self._bindings:
            if isinstance(value, Bindable):
                for table in value.stage_tables():
                    found.setdefault(id(table), table)
        return list(found.values())

    @property
    def headers_only(self) -> bool:
        """Whether no stage looks at more than a packet's headers, and none hands packets off."""
        return not self.hands_off and all(bound.stage.headers_only for bound in self.stages)

    def bind(self, replica: Callable[[Any], Any]) -> list[Any]:
        """The loop's arguments for one worker, whose view of a table is `replica(table)`."""
        made = [value.stage_view(replica) if isinstance(value, Bindable) else value for value in self._bindings]
        for view in made:
            self._digest.add_object(view)
        self._turned = [f"a{number}" for number, view in enumerate(made) if hasattr(type(view), "each_turn")]
        return made

    def explain(self, next_hop: int, packet: bytes) -> str:
        """The table entry by which `packet` (a whole frame, or its first bytes) came to next hop number `next_hop`.

        Asked of what is bound to the stages; as the tables are now. Empty if nothing knows.
        """
        found = (value.explain(next_hop, packet) for value in self._bindings if hasattr(value, "explain"))
        return next(filter(None, found), "")

    def module(self, *, kick: str = "none", idle: str = "spin", sealed: bool = False) -> ModuleType:
        """The generated module, its functions not yet compiled: `process`, `step`, `loop`.

        Call `bind` before: the classes of what it returns are part of the module's name.
        """
        names = [bound.stage.__name__ for bound in self.stages]
        arguments = [f"a{number}" for number in range(len(self._bindings))]
        title = "the pipeline " + ", ".join(names) + f" (kick: {kick}, idle: {idle})"
        source = loop.render(
            title,
            self._calls,
            arguments,
            kick=kick,
            idle=idle,
            sealed=sealed,
            budget=UPDATE_BUDGET,
            hands_off=self.hands_off,
            turned=self._turned,
        )
        scope = {f"stage_{number}": bound.stage.kernel for number, bound in enumerate(self.stages)}
        return generate("pipeline", source, self._digest.text(), scope)

    def first_call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Call a function of `module`, which compiles it or loads it. Raises StageError."""
        collects = gc.isenabled()
        gc.disable()  # a compiler's garbage is not worth a tenth of its time
        try:
            with told([bound.stage.function for bound in self.stages]):
                function(*arguments)
        finally:
            if collects:
                gc.enable()

    def run_once(self, packets: Iterable[bytes], *, port: int = 0, ports: int = 2, guard: str = "") -> list[Outcome]:
        """Run `packets` (whole Ethernet frames) through the stages and return what became of each, in order.

        No root, no NIC, no thread: for tests. They arrive on port number `port` of `ports`; tables are seen as they
        are now. `guard` is that of `FrameMemory`.
        """
        from libfp.engine.once import Once

        if self._once is None or self._once.shape != (ports, guard):
            if self._once is not None:
                self._once.close()
            self._once = Once(self, ports, guard)
        return self._once.run(list(packets), port)

    def start(self, ports: Sequence[Any], cores: Sequence[int] | None = None, **options: Any) -> Any:
        """Open `ports` and run one worker for each of `cores`; return the running `Application`.

        `options` are those of `Application`. Returns once every worker forwards.
        """
        from libfp.engine.application import Application

        app = Application(self, ports, cores, **options)
        app.start()
        return app

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.stages))})"


def outcome(reasons: Reasons, verdict: int, frame: bytes, next_hop: int) -> Outcome:
    """Name a verdict word."""
    kind, reason = reasons.describe(verdict) if verdict else (KINDS[0], "")
    made = Outcome(f"{kind} {reason}".strip())
    made.frame, made.reason, made.next_hop = frame, reason, next_hop
    made.port = verdict & PORT_MASK if kind == "forward" else None
    return made
