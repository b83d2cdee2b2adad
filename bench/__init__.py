"""One case definition per number claimed: run by ``python -m bench`` and by pytest-benchmark (`test_bench.py`)."""
