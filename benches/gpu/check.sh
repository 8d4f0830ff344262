#!/bin/sh
# Checks and measures training on one GPU; README.md beside this says what each part shows.
exec python3 -B "$(dirname "$0")/check.py" "$@"
