"""``python -m freshline`` is the ``freshline`` command."""

from freshline.cli.app import main

if __name__ == "__main__":
    main()
