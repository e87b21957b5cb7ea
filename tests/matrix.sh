#!/usr/bin/env bash
# The suite on the lowest and on the newest versions that requirements.txt admits, with each Python from 3.10 to 3.13
# that is here, in virtual environments that are removed again. Arguments are pytest's: tests/matrix.sh -m "not slow"
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work PIP_DISABLE_PIP_VERSION_CHECK=1
sed 's/>=/==/' requirements.txt >"$work/lowest.txt"
failed=0
for minor in 10 11 12 13; do
  python=""
  for found in "$(command -v "python3.$minor")" "$HOME"/.pyenv/versions/3."$minor".*/bin/python; do
    [ -z "$python" ] && "$found" -c pass 2>/dev/null && python=$found
  done
  [ -n "$python" ] || { echo "python3.$minor: not here"; continue; }
  for versions in "$work/lowest.txt" requirements.txt; do
    name="python3.$minor with $(basename "$versions" .txt)"
    rm -rf "$work/venv"
    # wheels alone: where the lowest versions have none for a Python, they are not what anybody there installs
    if ! { "$python" -m venv "$work/venv" &&
      "$work/venv/bin/pip" install -q --only-binary :all: -r "$versions" -r tests/requirements.txt >"$work/log" 2>&1; }; then
      echo "$name: cannot be installed: $(grep -m 1 ERROR "$work/log")"
      continue
    fi
    if "$work/venv/bin/python" -m pytest -p no:cacheprovider "$@" >"$work/log" 2>&1; then
      echo "$name: $(tail -n 1 "$work/log")"
    else
      echo "$name: FAILED"
      tail -n 40 "$work/log"
      failed=1
    fi
  done
done
exit $failed
