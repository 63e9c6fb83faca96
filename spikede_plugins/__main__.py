"""``python -m spikede_plugins`` is ``spikede``."""

from spikede_plugins.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
