"""`python -m asgo_cli`, which is also what torchrun starts."""

from asgo_cli.app import main

if __name__ == "__main__":
    main()
