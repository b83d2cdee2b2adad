"""Public helpers for testing what is built with libfp: packets, private networks, traffic."""
