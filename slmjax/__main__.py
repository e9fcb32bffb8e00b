"""`python -m slmjax` is the command `slmjax`."""

from slmjax.cli import main

if __name__ == "__main__":
    main()
