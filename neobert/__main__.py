"""`python -m neobert NAME ...` is `neobert NAME ...`."""

from neobert.commands.registry import main

if __name__ == "__main__":
    main()
