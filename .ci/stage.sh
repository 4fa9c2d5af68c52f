#!/bin/sh
# stage.sh NAME COMMAND...: a step of the set-up in one line, its name and its time. What the command says is shown only
# where it fails: warnings of pip, numpy and setuptools are no news for who wants to see a demo.
name=$1
shift
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
started=$(date +%s)
printf '%-44s' "$name"
"$@" >"$log" 2>&1
status=$?
if [ "$status" -ne 0 ]; then
  echo "failed:"
  cat "$log"
  exit "$status"
fi
echo "$(($(date +%s) - started)) s"
