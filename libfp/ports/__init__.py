"""Ways in and out: `memory` for tests and for machines without root, `xdp` for interfaces."""
