"""`python -m deploypipe`."""

from deploypipe.cli import main

if __name__ == "__main__":
    main()
