#!/usr/bin/env bash
# One device's job for any scheduler: compress, compare with what is in production, release. Exit: 0 SHIP, 1 HOLD, 2 error.
#
#   PIPELINE=digits TARGET=x86_cpu [REGISTRY=registry] [WAIVERS=waivers.toml] [KEY=private.pem] examples/ci/job.sh [--set ...]
set -euo pipefail
: "${PIPELINE:?name a pipeline}" "${TARGET:?name a target}"

deploypipe run "$PIPELINE" "$TARGET" --out run "$@" || [ $? -eq 1 ] # HOLD is for the gate to say, with the comparison
options=(--markdown comment.md --junit checks.xml)
if [ -n "${REGISTRY:-}" ]; then options+=(--registry "$REGISTRY"); fi
if [ -n "${WAIVERS:-}" ]; then options+=(--waivers "$WAIVERS"); fi
deploypipe gate run "${options[@]}"
deploypipe release run --out bundles ${KEY:+--key "$KEY"}
