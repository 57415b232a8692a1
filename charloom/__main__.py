"""`python -m charloom`: the command line where no script is on the path."""

from charloom.cli import main

if __name__ == "__main__":
    main(prog_name="charloom")
