"""Route between INTERFACES, filter by the kernel's nftables rules on its hook forward, and send what the policies in
FILE protect through IPsec tunnels: `gateway.py lan0 wan0 --config ipsec.toml`. Router, firewall and gateway in one.

The rules see each packet once, and in clear: before it is encrypted, or after it has been decrypted. FILE and what the
gateway leaves in the kernel are those of `fp ipsec`; what a tunnel protects needs a route, as in Linux, and that says
what `oifname` is. What comes or goes by a tunnel never gets to Linux: what the rules reject is dropped instead.
"""

import sys

import click

from libfp.apps.firewall.filtering import filter as filtering
from libfp.apps.firewall.following import Following
from libfp.apps.ipsec.gateway import Gateway, Settings
from libfp.apps.ipsec.stages import decrypt, protect, select, to_sa, to_tunnel
from libfp.cli import run
from libfp.cli.options import Command, common
from libfp.stages import by_flow, forward, parse, route


class Everything(Gateway):
    """The gateway of `fp ipsec`, with the rules of `fp firewall`."""

    def opening(self, undo):
        """Both say which of the kernel's policies they apply, and hear of changes."""
        ours = super().opening(undo)
        self.rules = Following(self.settings.interfaces)

        def applies(conflict):
            return ours["applies"](conflict) or self.rules.applies(conflict)

        def changed():
            ours["policy_changed"]()
            self.rules.changed()

        return {**ours, "applies": applies, "policy_changed": changed}

    def stages(self, linux):
        """An SA is one worker's, and so is a flow: packets go from the worker of the SA that they come by to that of
        their flow, and on to that of the SA that they leave by.

        `select` comes before the rules, since what it marks is kept from Linux whatever they say, as decrypted packets
        are. What Linux would answer with an ICMP error it answers itself, as Linux does before its rules.
        """
        self.rules.changed()  # since they were read: from here on Linux tells of changes
        sas, policies, rules = self.table, self.policies, self.rules.policy
        return (
            parse,
            to_sa(sas),
            decrypt(sas, policies),
            by_flow,
            select(sas, policies, linux),  # in clear, through a tunnel, or nowhere
            route(linux),  # the port that the rules ask for
            filtering(linux, rules.acl, rules.acl6, rules.hits, self.rules.connections),
            to_tunnel(sas),
            protect(sas),
            forward(linux),  # ESP has another way than what is in it
        )

    def started(self, app, linux):
        super().started(app, linux)
        app.control.add("rules", self.rules.answer)  # for `fp firewall rules`

    def reload(self):
        super().reload()
        self.rules.reload()


@click.command(cls=Command, tables=Settings.TABLES, help=__doc__)
@common("gateway", "The SAs and policies (and options) as TOML; SIGHUP reads it again, and the rules.")
@click.pass_context
def main(context, config, **given):
    settings = Settings(context, config, given)
    settings.require_interfaces()
    Everything(settings).run("gateway")


if __name__ == "__main__":
    sys.exit(run(main, "gateway.py"))
