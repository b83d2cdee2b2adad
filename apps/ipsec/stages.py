"""The stages of the IPsec gateway, in the order in which packets come to them:

Pipeline(parse, to_sa(sas), decrypt(sas, policies), select(sas, policies, linux), protect(sas), forward(linux))
"""

from libfp.apps.ipsec.esp_in import decrypt, to_sa
from libfp.apps.ipsec.esp_out import protect
from libfp.apps.ipsec.esp_select import select

__all__ = ["decrypt", "protect", "select", "to_sa"]
