"""`python -m instructrl`: the command line without the installed script."""

from instructrl.cli import main

if __name__ == "__main__":
    main()
