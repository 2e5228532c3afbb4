"""The subcommands of `yolov4-fast`, one a file: each has `add` (its arguments) and `run`."""
