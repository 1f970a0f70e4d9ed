"""``python -m autolora`` is the same as the command ``autolora``."""

import sys


def run() -> int:
    """Run the command; after Ctrl-C the process ends as by the signal, without a traceback.

    Raises:
        KeyboardInterrupt: Of Ctrl-C. A shell that sees a signal (status 130) ends a loop around
            the command too, which it would not do for a mere exit status.
    """
    try:
        from autolora.cli import INTERRUPTED, main

        status = main()
    except KeyboardInterrupt:
        # So early that nothing else could catch it: modules were being loaded.
        print("autolora: interrupted.", file=sys.stderr)
    else:
        if status != INTERRUPTED:
            return status
    sys.excepthook = lambda *_: None
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run())
