"""The IPsec gateway: ESP tunnels on the fast path. See README.md beside this file."""

#: What its file says beside options of the command line. Here, where a --help finds it without loading more.
TABLES = ("sa", "policy", "default", "state")
