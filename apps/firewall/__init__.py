"""The firewall: forwarding with the kernel's own nftables rules in between. See README.md beside this file."""
