"""`python -m netllm_lib.cli`."""

from netllm_lib.cli import main

main()
