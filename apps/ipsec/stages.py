"""The stages of the IPsec gateway, in the order in which packets come to them:

Pipeline(
    parse, to_sa(sas), decrypt(sas, policies), select(sas, policies, linux), to_tunnel(sas), protect(sas),
    forward(linux),
)

Other stages may come between `select` and `to_tunnel`: they see each packet once and in clear, and with it in
`packet.is_kept` whether it comes from a tunnel or goes into one.
"""

from libfp.apps.ipsec.esp_in import decrypt, to_sa
from libfp.apps.ipsec.esp_out import protect, to_tunnel
from libfp.apps.ipsec.esp_select import select

__all__ = ["decrypt", "protect", "select", "to_sa", "to_tunnel"]
