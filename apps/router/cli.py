"""`fp router`: the command line of the router. Its stages are the shared ones: parse and forward."""

from __future__ import annotations

from typing import Any

import click

from libfp.cli import options, running


@click.command(
    cls=options.Command,
    commands={"verify": "libfp.apps.router.verify:verify"},
    epilog="`fp router verify [NAME]` compares a running router's tables with the kernel.",
)
@options.common("router")
@options.offline(" or memif ports")
@click.pass_context
def router(context: click.Context, config: str | None, **given: Any) -> None:
    """Route IPv4 and IPv6 between the interfaces IF..., with Linux's routes and neighbours.

    Linux keeps its say: addresses, routes, neighbours and forwarding settings are followed as they change, and what
    the fast path cannot finish (ICMP errors, fragments, options, unresolved neighbours) is handed to it. Ctrl-C and
    SIGTERM leave the traffic to Linux.

    With --pcap it needs neither root nor Linux's tables: the same pipeline forwards a capture by the routes in a file.
    So it does between memif ports: IF is memif:SOCKET,role=client,id=0,name=NAME, the routes are those of --routes.
    """
    settings = running.Settings(context, config, given)
    from libfp.cli import wires

    if wires.asked_for(settings):
        wires.run("router", settings, lambda routes, names: _stages(routes))
        return
    if settings.without_linux():
        from libfp.cli import offline

        paths = settings.pcap, settings.routes, settings.out
        offline.run(*paths, settings.as_json, lambda routes, names: _stages(routes))
        return
    settings.require_interfaces(", or a --pcap")

    def pipeline(linux: Any) -> Any:
        from libfp import Pipeline

        return Pipeline(*_stages(linux))

    def started(app: Any, linux: Any) -> None:
        from libfp.linux.verify import handler

        app.control.add("verify", handler(linux.mirror))

    running.run("router", settings, pipeline, started=started)


def _stages(routes: Any) -> tuple[Any, ...]:
    from libfp.stages import forward, parse

    return parse, forward(routes)
