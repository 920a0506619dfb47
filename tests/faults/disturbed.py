"""Runs the program in this process, with the preloaded injector armed.

python tests/faults/disturbed.py ORDER ARGUMENT…      ORDER is JSON, as `injector.Order.to_json` writes it
"""

import ctypes
import json
import os
import sys
from typing import Any


def arm(order: dict[str, Any]) -> None:
    """Arm the injector, unless the order is for another process of the group."""
    if order["rank"] == int(os.environ.get("RANK", "0")):
        texts = [str(order[key]).encode() for key in ("directory", "journal", "copies")]
        numbers = [order[key] for key in ("fault", "error", "lasting")]
        arm_injector = ctypes.CDLL(None).faults_arm
        arm_injector.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        arm_injector(*texts, numbers[0], order["at"], *numbers[1:])


def main() -> None:
    """Arm the injector, and run the program."""
    order, arguments = json.loads(sys.argv[1]), sys.argv[2:]
    sys.argv[1:] = arguments
    from composing import composed_once

    from pipeline import __main__ as program
    from pipeline.runs import stopping

    stopping.heed_signals()
    arm(order)
    with composed_once(arguments):
        sys.exit(program.status(arguments))


if __name__ == "__main__":
    main()
