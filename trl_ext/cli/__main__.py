"""`python -m trl_ext.cli COMMAND`: what a launcher starts in every process."""

from .main import main


if __name__ == "__main__":
    main()
