"""`python -m ses_fast` is the command `ses-fast`."""

from .cli import main

if __name__ == "__main__":
    main()
