"""``python -m freshline`` is the ``freshline`` command."""

from freshline.cli import main

if __name__ == "__main__":
    main()
