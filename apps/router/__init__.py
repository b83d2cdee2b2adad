"""The router: RFC 1812 unicast forwarding whose tables are Linux's. See README.md beside this file."""
