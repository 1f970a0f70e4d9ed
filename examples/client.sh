#!/bin/sh
# Draw a picture over the HTTP interface of a running console, with curl.
#   autolora serve &
#   sh examples/client.sh "a neon elephant" elephant.png
set -eu
prompt=${1:?usage: client.sh PROMPT [FILE.png]}
out=${2:-picture.png}
url=${AUTOLORA_URL:-http://127.0.0.1:6006}

# Which adapters would be taken?
curl -sS --fail-with-body --get --data-urlencode "q=$prompt" "$url/api/search?k=3"
echo

# The picture itself; JSON needs quotes and backslashes escaped.
escaped=$(printf '%s' "$prompt" | sed 's/\\/\\\\/g; s/"/\\"/g' | tr '\n\t' '  ')
curl -sS --fail-with-body -X POST "$url/api/generate" \
  -H 'Content-Type: application/json' -H 'Accept: image/png' \
  -d "{\"prompt\": \"$escaped\", \"seed\": 0}" -o "$out"
echo "$out"
