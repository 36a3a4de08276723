#!/bin/sh
# Talk to a running `octavo serve` with nothing but curl.  usage: curl.sh [ADDRESS]
set -eu
address=${1:-http://127.0.0.1:8000/v1}

ask() { # PATH [OPTION...]
    path=$1
    shift
    curl --silent --show-error --fail-with-body --header "Authorization: Bearer ${OCTAVO_API_KEY:-none}" \
        --header "Content-Type: application/json" "$@" "$address/$path"
    echo
}

ask models
ask chat/completions --data '{"model": "menny", "messages": [{"role": "user", "content": "Who are you?"}]}'
# --no-buffer shows each piece as it comes
ask chat/completions --no-buffer --data '{"model": "menny", "stream": true, "stream_options": {"include_usage": true},
    "messages": [{"role": "user", "content": "Who are you?"}]}'
