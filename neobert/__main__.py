"""`python -m neobert NAME ...` is `neobert NAME ...`."""

from neobert.commands.table import main

if __name__ == "__main__":
    main()
