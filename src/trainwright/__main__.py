"""`python -m trainwright`: what torchrun starts."""

from trainwright.cli import main

main()
