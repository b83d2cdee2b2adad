"""`fp firewall`: the command line of the firewall. Its rules are the kernel's own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from libfp.cli import options, running

if TYPE_CHECKING:
    from libfp.apps.firewall.following import Following

#: Reasons to punt what Linux may well go on to forward.
BY_LINUX = ("fragment", "untracked-protocol", "untracked-icmp", "ipv6-extension", "crossed-echo", "flow-unknown")


@click.command(
    cls=options.Command,
    commands={"rules": "libfp.apps.firewall.rules:rules"},
    epilog="`fp firewall rules [NAME]` shows the rules of a running firewall, with their hits.",
)
@options.common("firewall", "Read options from a TOML file; SIGHUP reads it again, as it does the rules.")
@click.option("--load", metavar="FILE", help="Have nft load this file first, and again on SIGHUP.")
@click.option(
    "--connections",
    type=click.IntRange(1 << 10, 1 << 24),
    default=1 << 18,
    metavar="N",
    help="Room for N connections a worker.  [262144]",
)
@options.offline()
@click.option(
    "--rules", metavar="FILE", help="With --pcap: what `nft -j list ruleset` printed; for root, a file for nft."
)
@click.pass_context
def firewall(context: click.Context, config: str | None, **given: Any) -> None:
    """Route as `fp router` does, and filter by the kernel's nftables rules on the hook forward.

    The rules are read when it starts, and whenever they change; those that cannot be applied exactly are refused, with
    the rule quoted. Connections are tracked here, apart from the kernel's: what Linux is given to finish (a packet
    without a neighbour, a fragment, one to reject) meets the same rules there.

    With --pcap it needs no interface: the same pipeline filters and forwards a capture, by rules and routes in files.
    """
    settings = running.Settings(context, config, given)
    if settings.without_linux("rules"):
        _offline(settings)
        return
    settings.require_interfaces(", or a --pcap")
    rules: list[Following] = []

    def opening(undo: ExitStack) -> dict[str, Any]:
        from libfp.apps.firewall.following import Following

        rules.append(Following(settings.interfaces, settings.load, settings.connections))
        return {"applies": rules[0].applies, "policy_changed": rules[0].changed}

    def pipeline(linux: Any) -> Any:
        from libfp import Pipeline
        from libfp.engine.reasons import FORWARDED_RATE

        rules[0].changed()  # what has become of them since they were read: from here on Linux tells of changes
        rates = dict.fromkeys(BY_LINUX, FORWARDED_RATE)
        return Pipeline(*_stages(linux, rules[0].policy, rules[0].connections), rates=rates)

    def started(app: Any, linux: Any) -> None:
        from libfp.linux.verify import handler

        app.control.add("verify", handler(linux.mirror))
        app.control.add("rules", rules[0].answer)

    running.run("firewall", settings, pipeline, opening=opening, started=started, reload=lambda: rules[0].reload())


def _stages(routes: Any, policy: Any, connections: Any) -> tuple[Any, ...]:
    from libfp.apps.firewall.filtering import filter as filtering
    from libfp.stages import by_flow, parse, rewrite, route

    between = filtering(routes, policy.acl, policy.acl6, policy.hits, connections)
    return parse, by_flow, route(routes), between, rewrite(routes)


def _offline(settings: running.Settings) -> None:
    from libfp.apps.firewall import ruleset, scratch
    from libfp.cli import offline

    text = scratch.text_of(settings.rules)

    def stages(routes: Any, names: Sequence[str]) -> Sequence[Any]:
        from libfp.apps.firewall.conntrack import Connections, Settings
        from libfp.apps.firewall.following import require_chain
        from libfp.apps.firewall.policy import Policy

        is_json = text.lstrip().startswith("{")
        found = ruleset.parse(text) if is_json else scratch.of_file(settings.rules, names)
        policy, connections = Policy(names), Connections(Settings(), settings.connections)
        policy.load(require_chain(found, f"{settings.rules} has"))
        return _stages(routes, policy, connections)

    offline.run(settings.pcap, settings.routes, settings.out, settings.as_json, stages)
